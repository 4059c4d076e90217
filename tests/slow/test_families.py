"""Every family with every method: its loss falls, only the intended parameters train, diffusers opens the result.

After an intended change, update the golden losses by `FT_RENEW_GOLDEN=1 pytest tests/slow/test_families.py -k golden`.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from finetune.config.schema import Recipe
from finetune.export import export
from finetune.job import Job
from finetune.memory import quantization
from finetune.memory.activation_checkpointing import checkpoint_activations
from finetune.memory.quantization import QuantizedLinear
from finetune.rng import Draw
from tests.helpers import tiny, tiny_pipelines

OVERFIT_STEPS = 6
GOLDEN = Path(__file__).parents[1] / "helpers" / "golden.json"


@dataclass(frozen=True)
class Case:
    """One pipeline (or scratch family) trained by one method; with `text`, its text encoders train too."""

    pipeline: str
    method: str
    overrides: tuple[str, ...] = ()

    @property
    def text(self) -> bool:
        return "model.train_text_encoder=true" in self.overrides or (self.method, self.pipeline) == ("scratch", "sd")

    @property
    def rounded(self) -> bool:
        return any(override.startswith("model.quantize") for override in self.overrides)

    @property
    def dropout(self) -> bool:
        return any(override.startswith("adapter.dropout") for override in self.overrides)

    def recipe(self, folder: Path, *overrides: str) -> Recipe:
        rate = "3e-2" if self.method == "lora" else "3e-3"
        # A larger ε keeps Adam from magnifying rounding errors of gradients near zero, so that runs can be compared.
        common = (
            f"optimizer.lr={rate}",
            "optimizer.eps=1e-4",
            "optimizer.weight_decay=0",
            "train.batch_size=4",
            "train.checkpoint_every=1",
        )
        return tiny.recipe(
            self.pipeline, self.method, *common, "train.keep_checkpoints=99", *self.overrides, *overrides, folder=folder
        )


TEXT = "model.train_text_encoder=true"
CASES = {
    "sd15-lora": Case("sd15", "lora", ("adapter.alpha=10",)),
    "sd15-lora-text": Case(
        "sd15", "lora", (TEXT, "adapter.alpha=2", "adapter.dropout=0.2", "adapter.targets=attention+mlp")
    ),
    "sd21-lora-rslora": Case(
        "sd21", "lora", ("adapter.rslora=true", "adapter.alpha=6", "diffusion={min_snr_gamma: 5}")
    ),
    "sd21-lora-ema": Case(
        "sd21", "lora", ("train.ema=0.8", "adapter.targets='to_q, conv1'", "diffusion={zero_terminal_snr: true}")
    ),
    "sdxl-lora-dora": Case("sdxl", "lora", ("adapter.dora=true", "adapter.alpha=7")),
    "sdxl-lora-text": Case(
        "sdxl", "lora", (TEXT, "adapter.targets=all-linear", "adapter.alpha=3", "adapter.rslora=true")
    ),
    "sdxl-lora-nf4": Case(
        "sdxl",
        "lora",
        ("model.quantize=nf4", "adapter.targets=all-linear", "adapter.dora=true", "model.vae_tiling=true"),
    ),
    "sd15-lora-int8": Case(
        "sd15", "lora", ("model.quantize=int8", "adapter.targets=attention+mlp", "train.gradient_checkpointing=2")
    ),
    "emoji-lora": Case(
        "emoji", "lora", ("data.flip=true", "adapter.targets='conv1, conv2, to_q, to_v'", "optimizer.clip_norm=0.5")
    ),
    "sd15-pissa": Case(
        "sd15",
        "lora",
        ("adapter.pissa=true", "adapter.rank_pattern={attn1.to_q: 8}", "adapter.rslora=true", "adapter.alpha=2"),
    ),
    "sdxl-loha-text": Case(
        "sdxl", "lora", (TEXT, "adapter.kind=loha", "adapter.targets='to_q, down_.*conv1, q_proj'", "adapter.alpha=64")
    ),
    "sd21-lokr": Case("sd21", "lora", ("adapter.kind=lokr", "adapter.alpha=8", "optimizer.name=schedulefree")),
    "sd15-oft": Case(
        "sd15", "lora", ("adapter.kind=oft", "adapter.rank=8", "adapter.targets=attention+mlp", "optimizer.lr=5e-2")
    ),
    "sd21-preserve": Case(
        "sd21", "lora", (TEXT, "adapter.distill_every=4", "adapter.targets='to_q, to_k, conv1, q_proj'")
    ),
    "flux2-preserve": Case(
        "flux2", "lora", ("adapter.distill_every=4", "adapter.dora=true", "train.gradient_checkpointing=true")
    ),
    "sd15-full": Case("sd15", "full", ("train.ema=0.8", "diffusion={noise_offset: 0.1}")),
    "sd21-full-text": Case("sd21", "full", (TEXT,)),
    "sdxl-full-text": Case("sdxl", "full", (TEXT, "diffusion={huber: 0.1}", "train.gradient_checkpointing=true")),
    "emoji-full": Case("emoji", "full", ("train.ema=0.9", "optimizer.schedule=cosine", "optimizer.warmup_steps=2")),
    "vae-scratch": Case("vae", "scratch", ("autoencoder={kl_weight: 1e-3}",)),
    "sd-scratch": Case("sd", "scratch", ("diffusion={min_snr_gamma: 5, zero_terminal_snr: true}",)),
}
for _name in tiny.FLOWS:
    CASES |= {
        f"{_name}-{_method}": Case(_name, _method, getattr(tiny_pipelines.tiny_of(_name), _method))
        for _method in ("lora", "full")
    }
# QLoRA of every transformer. Resuming and accumulation are tested with LoRA on unquantized weights, above.
ON_NF4 = {
    f"{name}-nf4": Case(
        name,
        "lora",
        (
            "model.quantize=nf4",
            "adapter.targets=attention+mlp",
            f"train.gradient_checkpointing={str(tiny_pipelines.tiny_of(name).checkpoint_nf4).lower()}",
        ),
    )
    for name in tiny.FLOWS
}
ALL = CASES | ON_NF4
NARROWEST = 256  # in weights: tiny transformers are that narrow

# Parameters that do not affect the output. SDXL reads the first encoder's second-to-last layer, so the last of its
# three layers and the norm after it are unused; so is the text stream's part of a two-stream network's last block.
IDLE = {
    "sdxl": ("text_encoder.encoder.layers.2.", "text_encoder.final_layer_norm."),
    **{name: tiny_pipelines.tiny_of(name).idle for name in tiny.FLOWS},
}


@dataclass
class Overfitted:
    """A case trained on one image: losses on fixed noise before and after, weights before, and the finished job."""

    job: Job
    before: dict[str, Tensor]
    losses: tuple[float, float]


def parameters(job: Job) -> dict[str, torch.nn.Parameter]:
    """All parameters of the networks, frozen or not, by their names in checkpoints."""
    train_step = job.model.train_steps()[0]
    return {f"{train_step.name}.{name}": parameter for name, parameter in train_step.net.named_parameters()}


def fixed_loss(job: Job) -> float:
    """The mean loss on the one image for 16 fixed samples of noise and timestep."""
    places = range(16)
    draw = Draw(99, 0, places)
    batch = job.data.batch(0, [0] * len(places), draw)
    with torch.no_grad(), job.trainer.state.averaged():
        return float(job.model.train_steps()[0].loss(batch, draw).mean())


@functools.cache
def overfitted(name: str) -> Overfitted:
    one = (f"data.path={tiny.one_image()}", "data.caption_dropout=0", f"train.steps={OVERFIT_STEPS}")
    smallest = NARROWEST if name in ON_NF4 else quantization.SMALLEST
    with mock.patch.object(quantization, "SMALLEST", smallest):
        job = tiny.prepare(ALL[name].recipe(tiny.root() / "runs" / name, *one))
    before = {key: parameter.detach().clone() for key, parameter in parameters(job).items()}
    first = fixed_loss(job)
    job.trainer.train()
    found = Overfitted(job, before, (first, fixed_loss(job)))
    tiny.finish(job)
    return found


def weights(run: Path, step: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(run / "checkpoints" / f"step-{step:07d}" / "weights.safetensors")
    return found


def should_train(case: Case, names: set[str]) -> set[str]:
    """The parameters that should train according to the recipe, from their names alone."""
    found = (
        {name for name in names if any(f".{kind}_" in name for kind in ("lora", "hada", "lokr", "oft"))}
        if case.method == "lora"
        else set(names)
    )
    return {name for name in found if not any(part in name for part in IDLE.get(case.pipeline, ()))}


@pytest.mark.parametrize("name", ALL)
def test_family_loss_falls_and_only_intended_parameters_train(name: str) -> None:
    case, run = ALL[name], overfitted(name)
    first, last = run.losses
    assert last < 0.97 * first

    expected = should_train(case, set(run.before))
    now = parameters(run.job)
    assert {key for key, parameter in now.items() if parameter.requires_grad} == expected
    assert any(".encoders." in key for key in expected) == case.text
    rounded = [module for module in run.job.model.train_steps()[0].net.modules() if isinstance(module, QuantizedLinear)]
    assert bool(rounded) == case.rounded
    folder = run.job.run.folder
    third = weights(folder, 3)
    assert set(third) == expected
    still = {key for key, tensor in third.items() if torch.equal(tensor, run.before[key])}
    assert not still, "no gradient reached these parameters within three steps"
    assert all(torch.equal(parameter, run.before[key]) for key, parameter in now.items() if key not in expected)
    if any(".lora_A." in key for key in expected) and "adapter.pissa=true" not in case.overrides:
        # B starts at zero, so that A gets no gradient at the first step.
        one = weights(folder, 1)
        assert all(torch.equal(tensor, run.before[key]) == (".lora_A." in key) for key, tensor in one.items())


@pytest.mark.parametrize("kind", ["lora", "nf4", "full"])
@pytest.mark.parametrize("pipeline", ["sd15", "sdxl", *tiny.FLOWS])
def test_gradient_checkpointing_does_not_change_gradients(pipeline: str, kind: str, tmp_path: Path) -> None:
    more = (
        "train.gradient_checkpointing=false",
        "sample.prompts=[]",
        *(["model.quantize=nf4"] if kind == "nf4" else []),
    )
    with mock.patch.object(quantization, "SMALLEST", NARROWEST):
        job = tiny.prepare(tiny.recipe(pipeline, "full" if kind == "full" else "lora", *more, folder=tmp_path / "run"))
    train_step, draw = job.model.train_steps()[0], Draw(99, 0, range(2))
    batch = job.data.batch(0, [0, 1], draw)

    def gradients() -> dict[str, Tensor]:
        train_step.net.zero_grad()
        train_step.loss(batch, draw).mean().backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in job.model.trained().items()
            if parameter.grad is not None
        }

    plain = gradients()
    checkpoint_activations(job.model.denoiser, 1)  # type: ignore[attr-defined]
    with mock.patch.object(
        torch.utils.checkpoint, "checkpoint", wraps=torch.utils.checkpoint.checkpoint
    ) as computed_again:
        found = gradients()
    assert computed_again.call_count and plain.keys() == found.keys() == job.model.trained().keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)


def test_losses_match_the_golden_file() -> None:
    """Refactoring reproduces these losses. The tolerance is for other CPUs, whose sums round differently."""
    found = {}
    for name in CASES:
        lines = (overfitted(name).job.run.folder / "metrics.jsonl").read_text().splitlines()
        found[name] = [
            next(value for key, value in json.loads(line).items() if key.startswith("loss.")) for line in lines
        ]
    if os.environ.get("FT_RENEW_GOLDEN"):
        GOLDEN.write_text(
            json.dumps({name: [round(loss, 6) for loss in losses] for name, losses in found.items()}, indent=1) + "\n"
        )
    golden = json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for name, losses in golden.items():
        assert found[name] == pytest.approx(losses, rel=1e-3), name


@functools.cache
def generated_by_diffusers() -> Path:
    """The images of all cases, generated by plain diffusers in one fresh process."""
    folder = tiny.root() / "redrawn"
    folder.mkdir()
    jobs = []
    for name, case, merged in [
        *((name, case, False) for name, case in ALL.items()),
        *((name, case, True) for name, case in ON_NF4.items()),
    ]:
        run = overfitted(name).job.run.folder
        sample = overfitted(name).job.plan.recipe.sample
        if merged:
            export(run, merge=True, out=folder / name)
        jobs.append(
            {
                "artifact": str(folder / name if merged else run / "final"),
                "base": str(tiny.pipeline(case.pipeline)) if case.method == "lora" and not merged else None,
                "sample": str(last_sample(name)),
                "out": str(folder / f"{name}{'-merged' if merged else ''}.png"),
                "prompt": None if case.pipeline == "vae" else sample.prompts[0],
                "seed": sample.seed,
                "steps": sample.steps,
                "arguments": arguments(case.pipeline, sample.guidance),
                "bool_masks": case.pipeline in tiny.FLOWS and tiny_pipelines.tiny_of(case.pipeline).bool_masks,
            }
        )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).parents[1] / "helpers" / "redraw.py"
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(folder / "jobs.json")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def arguments(pipeline: str, guidance: float) -> dict[str, object]:
    """Arguments of the pipeline's call, as its documentation gives them."""
    if pipeline not in tiny.FLOWS:
        return {"guidance_scale": guidance, "negative_prompt": ""}
    found = tiny_pipelines.tiny_of(pipeline)
    return {found.guidance: guidance} | ({"negative_prompt": ""} if found.negative else {}) | dict(found.arguments)


def last_sample(name: str) -> Path:
    return overfitted(name).job.run.folder / "samples" / f"step-{OVERFIT_STEPS:07d}" / "00.png"


def difference(one: Path, other: Path) -> int:
    """The largest difference of two images, in 1/255."""
    return int(numpy.abs(numpy.array(Image.open(one)).astype(int) - numpy.array(Image.open(other)).astype(int)).max())


@pytest.mark.parametrize("name", ALL)
def test_plain_diffusers_generates_the_trainers_last_sample(name: str) -> None:
    again = generated_by_diffusers() / f"{name}.png"
    assert difference(again, last_sample(name)) <= 1
    first = last_sample(name).parent.parent / f"step-{0:07d}" / "00.png"
    assert difference(first, last_sample(name)) > 5, "training has no visible effect"


@pytest.mark.parametrize("name", ON_NF4)
def test_nf4_lora_merged_into_the_unquantized_base_generates_the_same(name: str) -> None:
    """`ft export --merge` of a LoRA trained on a quantized base."""
    assert difference(generated_by_diffusers() / f"{name}-merged.png", last_sample(name)) <= 1


def test_text_encoder_from_scratch_is_saved_with_standard_names() -> None:
    saved = load_file(overfitted("sd-scratch").job.run.folder / "final" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in saved)


@pytest.mark.parametrize("name", CASES)
def test_resume_is_exact_and_accumulation_equals_a_larger_batch(name: str, tmp_path: Path) -> None:
    case = CASES[name]

    def run(folder: str, *overrides: str) -> Job:
        return tiny.prepare(case.recipe(tmp_path / folder, "train.steps=4", "sample.prompts=[]", *overrides))

    whole = run("whole")
    whole.trainer.train()

    class Killed(Exception):
        pass

    def kill(done: int) -> None:
        if done == 2:
            raise Killed

    broken = run("broken", "sample.every=2")
    broken.trainer.observe = kill
    with pytest.raises(Killed):
        broken.trainer.train()
    resumed = tiny.prepare(case.recipe(tmp_path / "broken", "train.steps=4", "sample.prompts=[]"), resume=True)
    resumed.trainer.train()
    for file in ("weights", "ema"):
        one, other = (
            tmp_path / folder / "checkpoints" / "step-0000004" / f"{file}.safetensors" for folder in ("whole", "broken")
        )
        assert one.is_file() == other.is_file() == (file == "weights" or whole.plan.recipe.train.ema is not None)
        if one.is_file():
            assert one.read_bytes() == other.read_bytes()
    assert [json.loads(line)["step"] for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]

    if case.dropout:  # its masks depend on how the batch is split
        return
    split = run("split", "train.batch_size=1", "train.accumulation=4")
    split.trainer.train()
    halves = weights(tmp_path / "split", 4)
    for key, tensor in weights(tmp_path / "whole", 4).items():
        # Another order of sums: gradients differ by 1e-8; Adam divides by ε = 1e-4; four steps at a rate up to 3e-2.
        torch.testing.assert_close(halves[key], tensor, rtol=1e-4, atol=1e-4)

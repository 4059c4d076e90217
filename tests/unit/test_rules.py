"""Validation: every rule is broken once, and is reported with its location and fix."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from finetune.config import validation
from finetune.config.loader import load_recipe, parse_recipe
from finetune.config.machine import Machine
from finetune.config.rules import Context, Rule
from finetune.config.schema import Precision, Recipe
from finetune.errors import UserError

GIB = 1 << 30
MINIMAL = """\
method: lora
model:
  family: sd
  path: some/model
adapter:
  rank: 4
data:
  path: images
train:
  steps: 10
"""
FULL = ("method=full", "adapter=null")
SCRATCH = ("method=scratch", "adapter=null", "model.path=null")
FLUX = ("model.family=flux1",)
GPU = Machine("cuda", "NVIDIA A100", 1, 8, True, 80 * GIB)

# Rule → overrides of MINIMAL that break it, or (bundled recipe, overrides).
CASES: dict[str, tuple[str, ...] | tuple[str, tuple[str, ...]]] = {
    "name-is-one-word": ("name=a/b",),
    "one-length": ("train.epochs=2",),
    "scratch-needs-length": ("scratch/vae", ("train.steps=null", "train.epochs=null")),
    "one-warmup": ("optimizer.warmup=0.05", "optimizer.warmup_steps=10"),
    "one-place-of-images": ("data.sources=[{path: x}]",),
    "lora-needs-adapter": ("adapter=null",),
    "adapter-needs-lora": ("method=full",),
    "scratch-needs-network": (*SCRATCH, "model.family=vae"),
    "net-or-build": ("scratch/dcgan", ("model.build={a: 1}",)),
    "build-is-for-scratch": ("model.build={unet: {}}",),
    "pretrained-needs-path": ("model.path=null",),
    "scratch-has-no-path": ("scratch/dcgan", ("model.path=x",)),
    "scratch-only-family": ("model.family=vae",),
    "transformer-of-a-pipeline": ("model.transformer=x.safetensors",),
    "diffusion-section-needs-noise-schedule": (*FLUX, "diffusion.huber=0.1"),
    "flow-section-needs-velocity": ("flow.mean=0",),
    "net-says-prediction": ("scratch/ddpm", ("model.prediction=epsilon",)),
    "prediction-needs-noise-schedule": (*FLUX, "model.prediction=epsilon"),
    "zero-terminal-snr-needs-v": ("diffusion.zero_terminal_snr=true", "model.prediction=epsilon"),
    "tokens-need-lora": (*FULL, "tokens=[{token: <it>}]"),
    "token-without-blanks": ("tokens=[{token: 'my dog'}]",),
    "tokens-are-distinct": ("tokens=[{token: <it>}, {token: <it>}]",),
    "prior-needs-base": ("scratch/dcgan", ("prior={prompt: a dog}",)),
    "pixel-keys-of-data": ("data.grayscale=true",),
    "truncation-needs-gan": ("sample.truncation=0.7",),
    "collapse-check-needs-net": ("sample.collapse_check_every=5",),
    "two-betas": ("optimizer.betas=[0.9]",),
    "schedule-free-needs-beta": ("optimizer.name=schedulefree", "optimizer.betas=[0, 0.9]"),
    "schedule-free-without-ema": ("optimizer.name=schedulefree", "train.ema=0.9"),
    "paged-needs-bitsandbytes": ("optimizer.paged=true",),
    "quantize-needs-lora": (*FULL, "model.quantize=nf4"),
    "text-encoders-that-train-stay": ("model.text_encoder_placement=nf4", "model.train_text_encoder=true"),
    "vae-tiling-needs-frozen-vae": ("scratch/dcgan", ("model.vae_tiling=true",)),
    "offload-needs-lora": (*FULL, "train.offload_blocks=true"),
    "offload-needs-checkpointing": (*FLUX, "train.offload_blocks=true"),
    "offload-needs-transformer": ("train.offload_blocks=true", "train.gradient_checkpointing=true"),
    "bfloat16-weights-need-full": ("train.weights=bfloat16",),
    "bfloat16-weights-compute-in-bfloat16": (*FULL, "train.weights=bfloat16", "train.precision=float32"),
    "per-tensor-optimizer": (*FULL, "train.weights=bfloat16", "optimizer.name=prodigy"),
    "fused-backward-needs-full": ("train.fused_backward=true",),
    "fused-backward-clips-per-tensor": (*FULL, "train.fused_backward=true"),
    "fused-backward-without-accumulation": (
        *FULL,
        "train.fused_backward=true",
        "optimizer.clip=tensor",
        "train.accumulation=2",
    ),
    "fused-backward-without-float16": (
        *FULL,
        "train.fused_backward=true",
        "optimizer.clip=tensor",
        "train.precision=float16",
    ),
    "base-run-needs-cascade": ("scratch/ddpm", ("model.base_run=runs/x",)),
    "cascade-needs-base-run": ("scratch/cascade", ("model.base_run=null",)),
    "codes-need-first-stage": ("scratch/vq-pixelcnn", ("model.vae=null",)),
    "unet-width": ("scratch/ddpm", ("net.width=30",)),
    "unet-multipliers": ("scratch/ddpm", ("net.channel_multipliers=[]",)),
    "halvings-divide-resolution": ("scratch/dcgan", ("data.resolution=30",)),
    "heads-divide-width": ("scratch/imagegpt", ("net.heads=5",)),
    "edm-sigmas": ("scratch/edm", ("net.sigma_min=90",)),
    "flow-shift-of-net": ("scratch/flow-matching", ("flow.shift=3",)),
    "flow-guidance-of-net": ("scratch/flow-matching", ("flow.guidance=3",)),
    "penalty-without-batch-norm": ("scratch/dcgan", ("net.discriminator_norm=batch", "net.r1=1")),
    "stddev-group-divides-batch": ("scratch/dcgan", ("net.stddev_group=3",)),
    "discrimination-needs-batch": ("scratch/dcgan", ("net.minibatch=discrimination", "train.batch_size=1")),
    "categorical-pixels-are-gray": ("scratch/pixelcnn++", ("net.distribution=categorical",)),
}
SHARDED = dataclasses.replace(GPU, processes=2, sharded=True)
MACHINE_CASES: dict[str, tuple[Machine, Precision, tuple[str, ...]]] = {
    "fused-backward-needs-one-process": (
        dataclasses.replace(GPU, processes=2),
        "bfloat16",
        (*FULL, "train.fused_backward=true", "optimizer.clip=tensor"),
    ),
    "fused-backward-on-float16-gpu": (GPU, "float16", (*FULL, "train.fused_backward=true", "optimizer.clip=tensor")),
    "bfloat16-weights-on-this-machine": (GPU, "float16", (*FULL, "train.weights=bfloat16")),
    "fsdp-quantize": (SHARDED, "bfloat16", ("model.quantize=nf4",)),
    "fsdp-offload": (
        SHARDED,
        "bfloat16",
        (*FLUX, "train.offload_blocks=true", "train.gradient_checkpointing=true"),
    ),
    "fsdp-bfloat16-weights": (SHARDED, "bfloat16", (*FULL, "train.weights=bfloat16")),
    "fsdp-optimizer": (SHARDED, "bfloat16", ("optimizer.name=lion",)),
    "fsdp-float16": (SHARDED, "float16", ()),
}
NOTE_CASES: dict[str, tuple[str, ...]] = {
    "paging-without-cuda": ("optimizer.name=adamw8bit", "optimizer.paged=true"),
    "offload-without-cuda": (*FLUX, "train.offload_blocks=true", "train.gradient_checkpointing=true"),
    "text-encoder-offload-without-cuda": ("model.text_encoder_placement=offload",),
    "warmup-is-longer-than-the-run": ("optimizer.warmup_steps=10",),
    "warmup-is-long": ("optimizer.warmup_steps=5",),
    "no-sample-before-the-end": ("sample.prompts=[a dog]", "sample.every=10"),
    "emoji-base-with-other-images": ("model.path=embedded:base",),
    "prodigy-lr": ("optimizer.name=prodigy",),
    "schedule-free-schedule": ("optimizer.name=schedulefree", "optimizer.schedule=cosine"),
    "min-snr-with-zero-terminal-snr": ("diffusion.zero_terminal_snr=true", "diffusion.min_snr_gamma=5"),
}


def parse(*overrides: str) -> Recipe:
    return parse_recipe(MINIMAL, "my.yaml", "my", overrides)


def load(case: tuple[str, ...] | tuple[str, tuple[str, ...]]) -> Recipe:
    if len(case) == 2 and isinstance(case[1], tuple):
        return load_recipe(case[0], case[1])
    return parse(*case)


def rule(name: str) -> Rule:
    (found,) = (one for one in (*validation.RULES, *validation.MACHINE_RULES, *validation.NOTES) if one.name == name)
    return found


def test_validation_rules_have_unique_names_and_a_case_each() -> None:
    names = [one.name for one in (*validation.RULES, *validation.MACHINE_RULES, *validation.NOTES)]
    assert max(Counter(names).values()) == 1
    # FSDP with a model from scratch, FSDP with a fused backward pass, and excessive steps have their own tests below.
    elsewhere = {"fsdp-scratch", "fsdp-fused-backward", "steps-in-range"}
    assert set(names) == CASES.keys() | MACHINE_CASES.keys() | NOTE_CASES.keys() | elsewhere


@pytest.mark.parametrize("name", CASES)
def test_broken_rule_is_reported_with_its_key_and_fix(name: str) -> None:
    with pytest.raises(UserError) as caught:
        load(CASES[name])
    expected = rule(name)
    template = expected.message if isinstance(expected.message, str) else ""
    assert all(part in caught.value.problem for part in template.replace("}", "{").split("{")[::2])
    assert caught.value.where.endswith(f", {expected.key}")
    assert caught.value.remedy
    assert "{" not in caught.value.problem


def test_broken_rule_is_reported_with_the_line_of_its_key() -> None:
    with pytest.raises(UserError) as caught:
        parse("train.epochs=2")
    assert caught.value.where == "my.yaml:10, train.steps"
    assert caught.value.remedy == "give exactly one of the two"
    with pytest.raises(UserError) as caught:
        parse_recipe(MINIMAL.replace("  steps: 10", "  batch_size: 1"), "my.yaml", "my", SCRATCH)
    assert caught.value.where == "my.yaml, train.steps", "a missing key has no line"


@pytest.mark.parametrize("name", MACHINE_CASES)
def test_broken_machine_rule_is_reported(name: str) -> None:
    machine, precision, overrides = MACHINE_CASES[name]
    recipe = parse(*overrides)
    validation.check_machine(parse(), GPU, "bfloat16", 10)
    with pytest.raises(UserError) as caught:
        validation.check_machine(recipe, machine, precision, 10)
    assert caught.value.where == rule(name).key
    if name.startswith("fsdp"):
        assert caught.value.problem.startswith(f"{rule(name).key} is incompatible with FSDP: ")
        assert caught.value.remedy.endswith(", or use DDP (--accelerate many-gpus)")


def test_fsdp_of_a_model_from_scratch_is_refused() -> None:
    with pytest.raises(UserError, match="method is incompatible with FSDP"):
        validation.check_machine(load_recipe("scratch/dcgan"), SHARDED, "bfloat16", 10)


def test_fsdp_with_fused_backward_is_refused() -> None:
    context = Context(parse(*FULL, "train.fused_backward=true", "optimizer.clip=tensor"), SHARDED, "bfloat16", 10)
    assert rule("fsdp-fused-backward").broken(context)


def test_run_of_too_many_steps_is_refused() -> None:
    with pytest.raises(UserError, match="would take 2,000,000,000 steps") as caught:
        validation.check_machine(parse("train.steps=null", "train.epochs=1e6"), GPU, "bfloat16", 2_000_000_000)
    assert caught.value.where == "train.epochs"


@pytest.mark.parametrize("name", NOTE_CASES)
def test_setting_without_effect_or_probably_mistaken_is_noted(name: str) -> None:
    cpu = Machine("cpu", "CPU", 1, 8, True, 32 * GIB)
    notes = validation.notes(parse(*NOTE_CASES[name]), cpu, "float32", 10)
    assert len(notes) == 1
    assert rule(name).message.partition("{")[0] in notes[0]  # type: ignore[union-attr]
    assert validation.notes(parse(), cpu, "float32", 10) == ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("adapter.kind=loha", "adapter.dora=true"), "adapter.dora does not exist for LoHa, only for LoRA"),
        (("adapter.kind=oft", "adapter.alpha=2"), "adapter.alpha does not exist for OFT"),
        (("adapter.dora=true", "adapter.pissa=true"), "cannot be exported"),
        (("adapter.distill_every=5", "adapter.pissa=true"), "no base left to distill from"),
        (("adapter.kind=lokr", "model.quantize=nf4"), "nf4 weights cannot be changed"),
        (("adapter.pissa=true", "model.quantize=int8"), "PiSSA changes the base's weights"),
        (("adapter.pissa=true", "adapter.init_lora=x.safetensors"), "takes ranks and alphas from its file"),
    ],
)
def test_broken_rule_of_an_adapter_kind_is_reported(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*overrides)
    assert message in caught.value.problem
    assert caught.value.where == "my.yaml:5, adapter"


def test_unknown_family_is_reported_with_its_line() -> None:
    with pytest.raises(UserError, match="there is no model family") as caught:
        parse_recipe(MINIMAL.replace("family: sd", "family: sdlx"), "my.yaml", "my")
    assert caught.value.where == "my.yaml:3, model.family"
    assert "sdxl" in caught.value.remedy

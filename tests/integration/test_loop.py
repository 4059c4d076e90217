"""The training loop under adverse conditions: kills, launchers, NaN, full memory, bfloat16, a gradient scaler."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks import torture
from finetune import job as jobs
from finetune.cli.process import report_errors
from finetune.config.loader import load_recipe, to_dict
from finetune.config.schema import Recipe
from finetune.errors import UserError
from finetune.estimate.monitor import Expected
from finetune.models.pretrained.model import CaptionAndLatent
from finetune.training.failures import memory_explained
from tests.helpers import tiny
from tests.helpers.commands import CHECKOUT

# A larger ε keeps Adam from magnifying rounding errors of gradients near zero, so that runs can be compared.
COMPARABLE = ("optimizer.eps=1e-4", "optimizer.lr=1e-2", "sample.prompts=[]")


def write_recipe(recipe: Recipe, folder: Path) -> str:
    """Write the recipe to a file; return its path."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(to_dict(recipe)), encoding="utf-8")
    return str(file)


# -- real processes ---------------------------------------------------------------------------------------------------


def test_run_killed_anywhere_and_resumed_equals_the_unkilled_run(tmp_path: Path) -> None:
    """A short `benchmarks/torture.py`: real processes, real SIGKILLs."""
    (victim,) = torture.run(["lora"], 4, 0, tmp_path, images=24)
    assert not victim.differing
    assert victim.survived.total() == 4 and len(victim.survived) > 1, victim


def test_accelerate_launch_resumes_a_killed_run_from_another_folder(tmp_path: Path) -> None:
    """SIGKILL in the middle, then `accelerate launch --mixed_precision=fp16 … --resume`: the result is bit-identical.

    On a CPU there is no float16, which the plan reports: the resumed part trains in float32 as the first part did.
    """
    steps = 80

    def recipe(name: str) -> Recipe:
        return tiny.recipe(
            "sd15", "lora", *COMPARABLE, f"train.steps={steps}", "train.checkpoint_every=7", folder=tmp_path / name
        )

    tiny.prepare(recipe("whole")).trainer.train()

    metrics = tmp_path / "killed" / "metrics.jsonl"
    process = torture.live(recipe("killed"), False, tmp_path / "log")
    while not os.waitpid(process, os.WNOHANG)[0] and not (
        metrics.is_file() and metrics.read_bytes().count(b"\n") >= 10
    ):
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "killed" / "final").exists()

    file, script = write_recipe(recipe("killed"), tmp_path), str(CHECKOUT / "finetune" / "lora.py")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--mixed_precision=fp16",
        "--num_processes=1",
        "--cpu",
        script,
        file,
        "--resume",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "float16 is not available on CPUs: training in float32" in done.stdout
    found = re.search(r"resuming after step (\d+)", done.stdout)
    assert found is not None
    assert 7 <= int(found[1]) < steps
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, steps + 1))
    ours, theirs = tiny.final_weights(tmp_path / "killed"), tiny.final_weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# -- failures --------------------------------------------------------------------------------------------------------


def test_host_out_of_memory_is_explained() -> None:
    recipe, expected = load_recipe("full/emoji"), Expected(None, "no profile")
    refused = pytest.raises(UserError, match=r"out of memory: \d+ bytes more could not be allocated")
    with refused as caught, memory_explained(recipe, expected, lambda: {"gradients": 1 << 30}):
        torch.empty(1 << 50)
    assert "gradients 1.00 GiB" in caught.value.where and "train.gradient_checkpointing" in caught.value.remedy
    with pytest.raises(RuntimeError, match="another"), memory_explained(recipe, expected, dict):
        raise RuntimeError("another")


@pytest.mark.parametrize("poisoned", ["trained", "frozen"])
def test_nan_stops_the_run_before_it_reaches_the_weights(
    poisoned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tiny.prepare(tiny.recipe("sd15", "lora", "train.ema=0.9", folder=tmp_path / "run"))
    job.trainer.train_step(0)
    net = job.model.train_steps()[0].net
    weight = next(p for p in net.parameters() if p.requires_grad == (poisoned == "trained"))
    with torch.no_grad():
        weight[(0,) * weight.ndim] = torch.nan
    before, average = tiny.trained(job), [tensor.clone() for tensor in job.trainer.state.ema.averages.values()]  # type: ignore[union-attr]
    with pytest.raises(SystemExit) as ended, report_errors():
        job.trainer.train_step(1)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "step 2" in said
    assert all(Path(name).name in said for name in job.data.names(1))
    assert "optimizer.lr" in said
    for name, tensor in tiny.trained(job).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(
        torch.equal(now, then)
        for now, then in zip(job.trainer.state.ema.averages.values(), average, strict=True)  # type: ignore[union-attr]
    )


def test_non_finite_latents_stop_the_run_before_they_are_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = CaptionAndLatent.encode_image

    def poisoned(self: CaptionAndLatent, pixels: Tensor) -> dict[str, Tensor]:
        return {key: value * torch.nan for key, value in encode(self, pixels).items()}

    monkeypatch.setattr(CaptionAndLatent, "encode_image", poisoned)
    asked = tiny.recipe("sd15", "lora", f"data.cache={tmp_path / 'cache'}", folder=tmp_path / "run")
    with pytest.raises(UserError, match="encodes this image to non-finite") as caught:
        tiny.prepare(asked)
    assert Path(caught.value.where).suffix in (".png", ".jpg", ".webp")
    monkeypatch.undo()
    tiny.prepare(asked, resume=True).trainer.train_step(0)


@pytest.mark.parametrize("estimated", [True, False])
def test_gpu_out_of_memory_reports_estimate_live_memory_and_options(
    estimated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is torch's own, raised where CUDA would; according to the estimate, the run fits the GPU."""
    from finetune.config.loader import load_recipe
    from finetune.estimate.forecast import forecast
    from finetune.estimate.hardware.gpus import find
    from finetune.estimate.monitor import Expected

    job = tiny.prepare(tiny.recipe("sd15", "lora", "train.ema=0.9", folder=tmp_path / "run"))
    job.trainer.train_step(0)
    if estimated:
        one = forecast(load_recipe("lora/sdxl", ["train.batch_size=2"]), "lora/sdxl", find("rtx3090"), 100)
        assert one.fits
        job.trainer.pace.expected = Expected(one)

    def full(*arguments: Any) -> Tensor:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB"
        )

    monkeypatch.setattr(job.trainer.state.train_steps[0], "loss", full)
    with pytest.raises(UserError) as caught:
        job.trainer.train()
    error = caught.value
    assert error.problem == "out of memory: 2.00 GiB more could not be allocated"
    assert error.where.startswith("estimate: " if estimated else "no estimate: ")
    parts = job.trainer.state.live()
    sizes = {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in parts.items()}
    assert (
        sizes["weights that train"] == sizes["averages"]
        and sizes["adamw"] > 2 * sizes["averages"]
        and sizes["frozen weights"] > 0
    )
    assert sizes["gradients"] == 0, "gradients must be freed after each step"
    assert "frozen weights 0.00 GiB, weights that train" in error.where
    edits = re.findall(r"--set ([\w.]+=[\w.]+)|^ +([\w.]+=[\w.]+)", error.remedy, re.M)
    assert edits and all("=" in "".join(edit) for edit in edits)
    if estimated:
        fits = [line for line in error.remedy.splitlines() if "GiB" in line]
        assert fits and all(line.strip().startswith("−") for line in fits)


class Scaled(Accelerator):  # type: ignore[misc]
    """Accelerate's float16 path on a CPU: its gradient scaler, with the arithmetic left in float32."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.native_amp, self.state._mixed_precision = True, "fp16"
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def autocast(self, *arguments: Any, **named: Any) -> Any:
        return torch.autocast("cpu", enabled=False)

    def prepare_model(self, model: nn.Module, *arguments: Any, **named: Any) -> nn.Module:
        return model


def test_gradient_scaler_takes_the_same_step_and_skips_an_overflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overflow halves the scale and skips the step; NaN at a scale below 1 is no overflow, and stops the run."""
    plain = tiny.prepare(tiny.recipe("sd15", "lora", *COMPARABLE, folder=tmp_path / "plain"))
    record = plain.trainer.train_step(0)
    monkeypatch.setattr(jobs, "Accelerator", Scaled)
    job = tiny.prepare(tiny.recipe("sd15", "lora", *COMPARABLE, folder=tmp_path / "run"))
    scaler = job.accelerator.scaler
    assert job.trainer.train_step(0)["gradient.denoiser"] == pytest.approx(record["gradient.denoiser"], rel=1e-4)
    for name, tensor in tiny.trained(plain).items():
        torch.testing.assert_close(tiny.trained(job)[name], tensor, rtol=1e-4, atol=1e-6)
    assert job.trainer.state.checkpoint(1).facts["scaler"]["scale"] == 2.0**10

    before = tiny.trained(job)
    overflow = job.trainer.state.parameters[0][0].register_hook(lambda gradient: gradient * torch.inf)
    assert not job.trainer.train_step(1)["gradient.denoiser"] < float("inf")
    overflow.remove()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.trained(job).items())
    scaler.update(0.5)
    with torch.no_grad():
        job.trainer.state.parameters[0][0][0, 0] = torch.nan
    with pytest.raises(UserError, match="step 2"):
        job.trainer.train_step(1)


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_runs_forward_twice_with_equal_results(tmp_path: Path) -> None:
    counts, found = [], []
    for checkpointing in ("false", "true"):
        overrides = ("model.train_text_encoder=true", f"train.gradient_checkpointing={checkpointing}", *COMPARABLE)
        job = tiny.prepare(tiny.recipe("sd15", "lora", *overrides, folder=tmp_path / checkpointing))
        calls = dict.fromkeys(("unet", "text"), 0)

        def count(module: nn.Module, inputs: Any, name: str, calls: dict[str, int] = calls) -> None:
            calls[name] += 1

        net: Any = job.model.train_steps()[0].net
        # A block behind the first adapter: before it no activations are stored, so none are recomputed.
        net.denoiser.up_blocks[1].resnets[1].register_forward_pre_hook(lambda m, i, count=count: count(m, i, "unet"))
        net.encoders["text_encoder"].encoder.layers[0].self_attn.register_forward_pre_hook(
            lambda m, i, count=count: count(m, i, "text")
        )
        job.trainer.train_step(0)
        job.trainer.train_step(1)
        counts.append(calls)
        found.append(tiny.trained(job))
    assert counts == [{"unet": 2, "text": 2}, {"unet": 4, "text": 4}]
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bfloat16_applies_to_frozen_weights_and_arithmetic_only(method: str, tmp_path: Path) -> None:
    exact = tiny.prepare(
        tiny.recipe("sdxl", method, "train.precision=float32", folder=tmp_path / "float32")
    ).trainer.train_step(0)
    job = tiny.prepare(tiny.recipe("sdxl", method, "train.precision=bfloat16", folder=tmp_path / "bfloat16"))
    record = job.trainer.train_step(0)
    assert record["loss.denoiser"] == pytest.approx(exact["loss.denoiser"], rel=0.03)
    assert record["loss.denoiser"] != exact["loss.denoiser"]
    parameters = job.model.train_steps()[0].net.parameters()
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in parameters}
    assert dtypes == ({(True, torch.float32), (False, torch.bfloat16)} if method == "lora" else {(True, torch.float32)})
    assert job.model.pipeline.vae.dtype == torch.float32  # type: ignore[attr-defined]
    states = itertools.chain.from_iterable(state.values() for state in job.trainer.state.optimizers[0].state.values())
    assert {tensor.dtype for tensor in states} == {torch.float32}


def test_validation_is_repeatable_and_does_not_affect_training(tmp_path: Path) -> None:
    found = {}
    for share in (0.0, 0.4):
        held = (
            ("data.held_out=0.4", "train.validate_every=1")
            if share
            else ("data.held_out=0.4", "train.validate_every=99")
        )
        job = tiny.prepare(
            tiny.recipe(
                "sd15", "lora", *COMPARABLE, *held, "train.steps=3", "optimizer.lr=1e-9", folder=tmp_path / str(share)
            )
        )
        job.trainer.train()
        found[share] = [json.loads(line) for line in (tmp_path / str(share) / "metrics.jsonl").read_text().splitlines()]
    losses = [record["validation"] for record in found[0.4]]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert ["validation" in record for record in found[0.0]] == [False, False, True]
    assert [record["loss.denoiser"] for record in found[0.0]] == [record["loss.denoiser"] for record in found[0.4]]


def test_missing_tracker_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed"):
        tiny.prepare(tiny.recipe("vae", "scratch", "output.trackers=[wandb]", folder=tmp_path / "run"))


def test_tensorboard_tracker_writes_into_the_run_folder(tmp_path: Path) -> None:
    job = tiny.prepare(tiny.recipe("vae", "scratch", "output.trackers=[tensorboard]", folder=tmp_path / "run"))
    job.trainer.train()
    job.accelerator.end_training()
    assert any(path.stat().st_size for path in (tmp_path / "run" / "trackers").rglob("events.out.tfevents.*"))

"""What cannot be where weights are shared out among processes; that all else is the same, `test_processes` shows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from finetune import job
from finetune.engine.machine import this_machine
from finetune.errors import UserError
from finetune.planning import Machine
from tests import tiny

FULL_BFLOAT16 = ("train.weights=bfloat16", "train.precision=bfloat16")


@pytest.mark.parametrize(
    ("method", "overrides", "key"),
    [
        ("scratch", (), "method"),
        ("lora", ("model.quantize=nf4",), "model.quantize"),
        ("lora", ("train.offload_blocks=true", "train.gradient_checkpointing=true"), "train.offload_blocks"),
        ("full", FULL_BFLOAT16, "train.weights"),
        ("lora", ("optimizer.name=adamw8bit",), "optimizer.name"),
        ("lora", ("train.precision=float16",), "train.precision"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_by_the_plan(
    method: str, overrides: tuple[str, ...], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "sd" if method == "scratch" else "flux2"
    gpus = Machine("cuda", "NVIDIA H100", 2, 1, True, 80 << 30, sharded=True)
    monkeypatch.setattr(job, "this_machine", lambda: dataclasses.replace(gpus, processes=1))
    with pytest.raises(UserError, match=f"{key} cannot be with weights shared out by FSDP") as caught:
        job.plan(tiny.recipe(name, method, *overrides, folder=tmp_path / "run"))
    assert caught.value.where is not None and key in caught.value.where and "many-gpus" in caught.value.remedy


def test_accelerate_that_leaves_weights_whole_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without GPUs it does so, and says nothing."""
    monkeypatch.setattr(job, "this_machine", lambda: dataclasses.replace(this_machine(), sharded=True))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # as it was, for the tests that follow: Accelerate sets it
    with pytest.raises(UserError, match="among GPUs only"):
        tiny.prepare(tiny.recipe("flux2", "lora", "sample.prompts=[]", folder=tmp_path / "run"))

"""What FSDP does not support; `tests/slow/test_processes.py` shows that the rest works."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune import job
from finetune.config.machine import Machine
from finetune.errors import UserError
from finetune.training import fsdp
from finetune.training.device import this_machine
from tests.helpers import tiny

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
def test_plan_with_options_incompatible_with_fsdp_is_refused(
    method: str, overrides: tuple[str, ...], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "sd" if method == "scratch" else "flux2"
    gpus = Machine("cuda", "NVIDIA H100", 2, 1, True, 80 << 30, sharded=True)
    monkeypatch.setattr(job, "this_machine", lambda: dataclasses.replace(gpus, processes=1))
    with pytest.raises(UserError, match=f"{key} is incompatible with FSDP") as caught:
        job.plan(tiny.recipe(name, method, *overrides, folder=tmp_path / "run"))
    assert caught.value.where is not None and key in caught.value.where and "many-gpus" in caught.value.remedy


def test_fsdp_that_accelerate_did_not_apply_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without GPUs, Accelerate silently does not shard."""
    monkeypatch.setattr(job, "this_machine", lambda: dataclasses.replace(this_machine(), sharded=True))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # restored for later tests: Accelerate sets it
    with pytest.raises(UserError, match="shards weights only across GPUs"):
        tiny.prepare(tiny.recipe("flux2", "lora", "sample.prompts=[]", folder=tmp_path / "run"))


def test_settle_strides_of_1x1_kernels_matches_flat_copies() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, 1)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    values = [parameter.detach().clone() for parameter in net.parameters()]
    assert net[1].weight.stride() == (
        6,
        1,
        6,
        6,
    )  # which `DistributedDataParallel` copies flat to another layout
    fsdp.settle_strides(net)
    assert net[0].weight.stride() == (36, 1, 12, 4) and net[1].weight.stride() == (6, 1, 1, 1)
    assert all(torch.equal(now, before) for now, before in zip(net.parameters(), values, strict=True))

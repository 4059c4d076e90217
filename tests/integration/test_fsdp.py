"""What cannot be where weights are shared out among processes; that all else is the same, `test_processes` shows."""

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
def test_what_cannot_be_shared_out_is_refused_by_the_plan(
    method: str, overrides: tuple[str, ...], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "sd" if method == "scratch" else "flux2"
    gpus = Machine("cuda", "NVIDIA H100", 2, 1, True, 80 << 30, sharded=True)
    monkeypatch.setattr(job, "this_machine", lambda: dataclasses.replace(gpus, processes=1))
    with pytest.raises(UserError, match=f"{key} is incompatible with FSDP") as caught:
        job.plan(tiny.recipe(name, method, *overrides, folder=tmp_path / "run"))
    assert caught.value.where is not None and key in caught.value.where and "many-gpus" in caught.value.remedy


def test_accelerate_that_leaves_weights_whole_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without GPUs it does so, and says nothing."""
    monkeypatch.setattr(job, "this_machine", lambda: dataclasses.replace(this_machine(), sharded=True))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # as it was, for the tests that follow: Accelerate sets it
    with pytest.raises(UserError, match="among GPUs only"):
        tiny.prepare(tiny.recipe("flux2", "lora", "sample.prompts=[]", folder=tmp_path / "run"))


def test_kernels_of_one_place_lie_as_torch_copies_them_from_process_to_process() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, 1)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    values = [parameter.detach().clone() for parameter in net.parameters()]
    assert net[1].weight.stride() == (
        6,
        1,
        6,
        6,
    )  # of which `DistributedDataParallel` makes a flat copy at the same place
    fsdp.settle_strides(net)
    assert net[0].weight.stride() == (36, 1, 12, 4) and net[1].weight.stride() == (6, 1, 1, 1)
    assert all(torch.equal(now, before) for now, before in zip(net.parameters(), values, strict=True))

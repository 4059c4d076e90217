"""The passes that make a pipeline trainable: their order, and which of them can run twice."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from finetune.memory import quantization
from finetune.models.pretrained import trainable
from finetune.models.pretrained.family import family_of
from tests.helpers import tiny

SETUPS = {
    "lora": ("sd15", "lora", ()),
    "everything": (
        "flux1",
        "lora",
        (
            "model.quantize=nf4",
            "train.gradient_checkpointing=true",
            "train.offload_blocks=true",
            "model.vae_tiling=true",
            "optimizer.clip_norm=null",
        ),
    ),
    "full": ("sd15", "full", ("train.gradient_checkpointing=2",)),
}


def setup_of(name: str, tmp_path: Any) -> trainable.Trainable:
    pipeline_name, method, overrides = SETUPS[name]
    recipe = tiny.recipe(pipeline_name, method, *overrides, folder=tmp_path / "run")
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny.pipeline(pipeline_name))
    family = family_of(recipe.model.family)
    denoiser = family.spec.denoiser
    networks = {denoiser: getattr(pipeline, denoiser)}
    return trainable.Trainable(recipe, networks, denoiser, torch.float32, torch.device("cpu"), pipeline, family)


def state(setup: trainable.Trainable) -> list[tuple[Any, ...]]:
    """What passes change: classes, layouts, identities of tensors, and which of them train."""
    found: list[tuple[Any, ...]] = []
    for network in setup.components:
        for module in network.modules():
            found.append((type(module), type(getattr(module, "processor", None)), len(module._forward_hooks)))
        for name, parameter in network.named_parameters():
            found.append((name, parameter.requires_grad, parameter.data_ptr(), parameter.stride(), parameter.dtype))
    return found


def test_trainable_docstring_lists_the_passes_in_order() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", trainable.__doc__ or "", re.MULTILINE)
    assert documented == [step.name for step in trainable.PASSES]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "lora",
            "channels_last freeze adapters unet_blocks fused_lora rope freeze_unused train_tokens",
        ),
        (
            "everything",
            "channels_last freeze quantize adapters unet_blocks fused_lora rope activation_checkpointing offload "
            "freeze_unused train_tokens tile_vae",
        ),
        ("full", "channels_last freeze unfreeze rope activation_checkpointing freeze_unused train_tokens"),
    ],
)
def test_passes_run_in_order_and_twice_only_if_repeatable(name: str, expected: str, tmp_path: Any) -> None:
    with mock.patch.object(quantization, "SMALLEST", 256):  # in weights: tiny transformers are that narrow
        setup = setup_of(name, tmp_path)
        adapted = trainable.make_trainable(setup)
        assert setup.done == expected.split()
        assert (name == "full") != bool(adapted)
        before = state(setup)
        for step in trainable.PASSES:
            if step.name not in setup.done:
                continue
            if not step.repeatable:
                with pytest.raises(RuntimeError, match=f"the pass {step.name} cannot run twice"):
                    trainable.make_trainable(setup, only=[step.name])
            elif step.name not in (
                "freeze",
                "unfreeze",
            ):  # these two undo what later ones decide, and are refused nothing
                trainable.make_trainable(setup, only=[step.name])
        assert state(setup) == before


def test_freeze_and_unfreeze_are_idempotent(tmp_path: Any) -> None:
    setup = setup_of("full", tmp_path)
    for only in (["freeze"], ["unfreeze"]):
        trainable.make_trainable(setup, only=only)
        before = state(setup)
        trainable.make_trainable(setup, only=only)
        assert state(setup) == before


def test_make_trainable_of_a_denoiser_alone_skips_pipeline_passes(tmp_path: Any) -> None:
    recipe = tiny.recipe("sd15", "lora", "model.vae_tiling=true", folder=tmp_path / "run")
    net: nn.Module = DiffusionPipeline.from_pretrained(tiny.pipeline("sd15")).unet
    setup = trainable.Trainable(recipe, {"denoiser": net}, "denoiser", torch.float32, torch.device("cpu"))
    trainable.make_trainable(setup)
    assert setup.done == ["freeze", "adapters", "unet_blocks", "fused_lora", "rope", "train_tokens"]

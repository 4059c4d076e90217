"""Rotary embeddings as complex products match diffusers with fewer kernel launches in patched networks only."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from finetune.estimate.tracing.recorder import Recorder
from finetune.kernels import KERNELS, _parts, rope
from tests.unit.test_fused_lora import Built, flux1, flux2


def tables(places: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.linspace(-3, 9, places * width // 2).view(places, -1).repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


def plain(values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate [B, S, heads, D] in its own dtype; diffusers' formula converts to float32."""
    even, odd = values[..., ::2], values[..., 1::2]
    across = torch.stack([-odd, even], -1).flatten(-2)
    return values * cosine[:, None] + across * sine[:, None]


def test_rope_gradients_match_the_plain_formula() -> None:
    cosine_and_sine = tables(5, 6)
    values = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)
    found, expected = rope.rotated(values, cosine_and_sine, sequence_dim=1), plain(values, *cosine_and_sine)
    torch.testing.assert_close(found, expected)
    moved = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, values, moved), torch.autograd.grad(expected, values, moved))
    assert torch.autograd.gradcheck(lambda values: rope.rotated(values, cosine_and_sine, sequence_dim=1), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequence_dim", [1, 2])
def test_rope_output_matches_diffusers(dtype: torch.dtype, sequence_dim: int) -> None:
    """Up to float32 rounding, which may round a bfloat16 the other way; also with transposed and expanded gradients."""
    shape = (2, 7, 3, 8) if sequence_dim == 1 else (2, 3, 7, 8)
    values = torch.randn(shape, dtype=dtype, requires_grad=True)
    exact = values.detach().float().requires_grad_()
    for moved in (
        torch.randn(2, shape[2], shape[1], 8).bfloat16().transpose(1, 2),
        torch.ones((), dtype=torch.bfloat16).expand(shape),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            found = rope.rotated(values, tables(7, 8), sequence_dim)
        expected = apply_rotary_emb(exact, tables(7, 8), sequence_dim=sequence_dim)
        torch.testing.assert_close(found, expected.bfloat16())
        (gradient,), (theirs,) = (
            torch.autograd.grad(found, values, moved),
            torch.autograd.grad(expected, exact, moved.float()),
        )
        torch.testing.assert_close(gradient, theirs.to(dtype))


@pytest.mark.parametrize("build", [flux1, flux2])
def test_rope_patch_reduces_launches_of_its_network_only(build: Any) -> None:
    def step(net: nn.Module, run: Any) -> int:
        with Recorder() as recorder:
            recorder.section("step")
            run(net).sum().backward()
        net.zero_grad()
        return len(recorder.sections[0].operators)

    def attentions(net: nn.Module) -> int:
        return len(list(_parts(net, KERNELS["rope"].parts)))

    net, run = build()
    before, processors = (
        step(net, run),
        {type(module.processor) for module in net.modules() if hasattr(module, "processor")},
    )
    count = attentions(net)
    rope.patch(net)
    # Per attention, for query and key, forward and backward: one product instead of a stack, a negation, two products
    # and a sum. The rotations are computed once: two operators.
    assert step(net, run) == before - 2 * 2 * 4 * count + 2
    gc.collect()
    assert not len(rope._rotations), "rotations must be freed with the step's cosines"
    other: Built = build()
    assert {type(module.processor) for module in other[0].modules() if hasattr(module, "processor")} == processors
    assert step(*other) == before

"""What makes a run fit a smaller card: the same gradients from less memory, or a difference that is stated."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any, cast

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from finetune.models.checkpointing import checkpoint_activations
from tests import tiny


def transformer() -> nn.Module:
    """A FLUX.1 in miniature, of two double and three single blocks."""
    torch.manual_seed(0)
    sizes = {"in_channels": 8, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 8, "num_attention_heads": 4}
    net: nn.Module = FluxTransformer2DModel(**sizes, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[2, 2, 4])
    return net


def unet() -> nn.Module:
    """The UNet of a tiny SD 1.5: of ResNet and transformer blocks."""
    net: nn.Module = UNet2DConditionModel.from_pretrained(tiny.pipeline("sd15") / "unet")
    return net


def predict(net: Any) -> Tensor:
    """What the net makes of fixed inputs."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if isinstance(net, UNet2DConditionModel):
        found = net(draw(2, 4, 8, 8), torch.tensor([3, 500]), draw(2, 16, 32), return_dict=False)[0]
        return cast(Tensor, found)
    ids = {"img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3)}
    inputs = {"encoder_hidden_states": draw(2, 5, 32), "pooled_projections": draw(2, 32), "timestep": torch.tensor([0.1, 0.9])}
    found = net(hidden_states=draw(2, 6, 8), **inputs, **ids, return_dict=False)[0]
    return cast(Tensor, found)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    net.train()
    predict(net).square().mean().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("build", [unet, transformer])
def test_every_nth_block_is_computed_twice_and_gradients_stay(build: Any) -> None:
    expected = gradients(build())
    for every in (1, 2):
        net = build()
        checkpoint_activations(net, every)
        calls: Counter[str] = Counter()
        # diffusers hands all its blocks over but the first of a UNet's middle.
        names = [name for name, module in net.named_modules() if is_block(module) and name != "mid_block.resnets.0"]
        for name in names:
            net.get_submodule(name).register_forward_pre_hook(functools.partial(count, calls, name))
        found = gradients(net)
        assert expected.keys() == found.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
        assert list(calls.values()) == [2 if place % every == 0 else 1 for place in range(len(names))], calls


def count(calls: Counter[str], name: str, module: nn.Module, inputs: Any) -> None:
    calls[name] += 1


def is_block(module: nn.Module) -> bool:
    return type(module).__name__ in ("ResnetBlock2D", "BasicTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")

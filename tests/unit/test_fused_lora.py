"""Fused LoRA layers, complex rotary embeddings and straight U-Net blocks match PEFT and diffusers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel

from finetune import kernels
from finetune.adapters import peft
from finetune.config.schema import Adapter
from finetune.kernels import unet_blocks
from finetune.kernels.fused_lora import FusedConv2d, FusedLinear
from finetune.kernels.onednn_conv import packed
from finetune.memory.activation_checkpointing import checkpoint_activations
from tests.helpers import tiny

Built = tuple[Any, Callable[[Any], Tensor]]
STRAIGHT = (unet_blocks.ResnetBlock2D, unet_blocks.Attention, unet_blocks.Transformer2DModel)
OURS = (FusedLinear, FusedConv2d, *STRAIGHT)


def unet() -> Built:
    net = UNet2DConditionModel.from_pretrained(tiny.pipeline("sd15"), subfolder="unet")
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32)
    return net, lambda net: net(latents, torch.tensor([3, 500]), text, return_dict=False)[0]


def text_encoder() -> Built:
    net = CLIPTextModel.from_pretrained(tiny.pipeline("sd15"), subfolder="text_encoder")
    return net, lambda net: net(torch.arange(1, 17)[None].repeat(2, 1))[0]


def flux1() -> Built:
    net = FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        axes_dims_rope=(4, 4, 8),
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
    )
    latents, text, pooled = torch.randn(2, 6, 8), torch.randn(2, 5, 24), torch.randn(2, 12)
    image, words = torch.arange(6.0)[:, None].expand(6, 3), torch.zeros(5, 3)
    return net, lambda net: net(latents, text, pooled, torch.tensor([0.3, 0.7]), image, words, return_dict=False)[0]


def flux2() -> Built:
    net = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        num_attention_heads=2,
        joint_attention_dim=24,
        guidance_embeds=False,
    )
    latents, text = torch.randn(2, 6, 8), torch.randn(2, 5, 24)
    image, words = torch.arange(6)[:, None].expand(6, 4), torch.arange(5)[:, None].expand(5, 4)
    return net, lambda net: net(latents, text, torch.tensor([0.3, 0.7]), image, words, return_dict=False)[0]


Found = tuple[Tensor, dict[str, Tensor], Counter[type]]


def gradients(build: Callable[[], Built], section: Adapter, checkpointing: bool, dtype: torch.dtype) -> Found:
    """Output, trained gradients, and counts of our layers and blocks of one step.

    The weights are the same each time.
    """
    tiny.pipeline("sd15")
    torch.manual_seed(0)
    net, run = build()
    net.requires_grad_(False)
    net.to(dtype)
    peft.add_adapter(net, section)
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    for kernel in kernels.KERNELS:
        if kernel != "onednn_conv":
            kernels.apply(kernel, net)
    checkpoint_activations(net, int(checkpointing))
    net.train()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        found = run(net)
    (found.float() * torch.linspace(-1, 1, found.numel()).view(found.shape)).sum().backward()
    trained = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in trained.values())
    return found.detach(), trained, Counter(type(module) for module in net.modules() if isinstance(module, OURS))


CONVOLUTIONS = "conv1, conv2, conv_shortcut, proj_in, proj_out, downsamplers.0.conv, conv_in, conv_out, to_q"


@pytest.mark.parametrize(
    ("build", "targets", "ours"),
    [
        (unet, "all-linear", {FusedLinear: 10} | dict.fromkeys(STRAIGHT, 2)),
        (text_encoder, "all-linear", {FusedLinear: 10}),
        (flux1, "all-linear", {FusedLinear: 10}),
        (flux2, "all-linear", {FusedLinear: 10}),
        (unet, CONVOLUTIONS, {FusedConv2d: 10, FusedLinear: 2} | dict.fromkeys(STRAIGHT, 2)),
    ],
)
@pytest.mark.parametrize(
    ("checkpointing", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)]
)
def test_kernels_match_outputs_and_gradients_of_peft_and_diffusers(
    build: Callable[[], Built],
    targets: str,
    ours: dict[type, int],
    checkpointing: bool,
    dtype: torch.dtype,
) -> None:
    section = Adapter(rank=4, alpha=3, targets=targets, rank_pattern={"to_k": 2} if targets == "all-linear" else {})
    output, found, kinds = gradients(build, section, checkpointing, dtype)
    with kernels.without(*kernels.KERNELS):
        expected, theirs, none = gradients(build, section, checkpointing, dtype)
    assert kinds.keys() == ours.keys() and all(kinds[kind] >= least for kind, least in ours.items()) and not none
    relative, absolute = (1e-4, 1e-5) if dtype == torch.float32 else (0.1, 0.1)
    torch.testing.assert_close(output, expected, rtol=relative, atol=absolute)
    assert found.keys() == theirs.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, theirs[name], rtol=relative, atol=absolute * float(theirs[name].abs().max())
        )


def test_fused_linear_with_different_inputs_computes_each_layer_alone() -> None:
    """A group assumes that its layers read the same tensor.

    If not, each computes for itself, and nothing is retained.
    """
    net, _ = unet()
    net.requires_grad_(False)
    peft.add_adapter(net, Adapter(rank=4))
    kernels.apply("fused_lora", net)
    attention = net.mid_block.attentions[0].transformer_blocks[0].attn1
    for layer in (attention.to_q, attention.to_k):
        nn.init.normal_(layer.lora_B["default"].weight)
    one, other = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    with torch.no_grad():
        query, key = attention.to_q(one), attention.to_k(other)
        for layer, values, found in ((attention.to_q, one, query), (attention.to_k, other, key)):
            weight = layer.base_layer.weight + layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            torch.testing.assert_close(found, values @ weight.T)
    assert attention.to_q.group._input is None and not attention.to_q.group._pending


@torch.no_grad()
def test_packed_convolution_follows_changes_of_its_weight() -> None:
    weight = nn.Parameter(torch.randn(6, 5, 3, 3), requires_grad=False)
    inputs = torch.randn(2, 5, 8, 8).contiguous(memory_format=torch.channels_last)

    def of(padding: int) -> Any:
        return packed(weight, ((1, 1), (padding, padding), (1, 1)), inputs)

    first = of(1)
    assert of(1) is first and packed(weight, ((2, 2), (1, 1), (1, 1)), inputs) is None
    torch.testing.assert_close(first(inputs, None), functional.conv2d(inputs, weight, padding=1))
    weight.mul_(2)  # as PEFT merges an adapter
    torch.testing.assert_close(of(1)(inputs, None), functional.conv2d(inputs, weight, padding=1))
    weight.data = torch.randn(6, 5, 3, 3)  # as when a network moves to another device
    torch.testing.assert_close(of(1)(inputs, None), functional.conv2d(inputs, weight, padding=1))

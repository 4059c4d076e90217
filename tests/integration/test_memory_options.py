"""Memory options: the same gradients with less memory, or a documented difference."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import numpy
import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from finetune.adapters.peft import add_adapter
from finetune.config.loader import load_recipe
from finetune.config.schema import Adapter, Quantization
from finetune.data.decoding import to_tensor
from finetune.data.media.image import decode
from finetune.errors import UserError
from finetune.job import Job
from finetune.memory import apply
from finetune.memory.activation_checkpointing import checkpoint_activations
from finetune.memory.offload import blocks_of, offload_blocks
from finetune.memory.quantization import QuantizedLinear, dequantized, quantize, whole_weights
from finetune.paths import ASSETS
from finetune.training.optimizer_step import TensorByTensor, widened
from finetune.training.stochastic_rounding import rounded
from tests.helpers import tiny
from tools.archive import bundled


def transformer() -> nn.Module:
    """A miniature FLUX.1 with two double and three single blocks."""
    torch.manual_seed(0)
    sizes = {
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
    }
    net: nn.Module = FluxTransformer2DModel(
        **sizes, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8]
    )
    return net


def unet() -> nn.Module:
    """The UNet of a tiny SD 1.5, with ResNet and transformer blocks."""
    net: nn.Module = UNet2DConditionModel.from_pretrained(tiny.pipeline("sd15") / "unet")
    return net


def predict(net: Any) -> Tensor:
    """The network's output for fixed inputs."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if isinstance(net, UNet2DConditionModel):
        found = net(normal(2, 4, 8, 8), torch.tensor([3, 500]), normal(2, 16, 32), return_dict=False)[0]
        return cast(Tensor, found)
    ids = {"img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3)}
    inputs = {
        "encoder_hidden_states": normal(2, 5, 32),
        "pooled_projections": normal(2, 32),
        "timestep": torch.tensor([0.1, 0.9]),
    }
    found = net(hidden_states=normal(2, 6, 8), **inputs, **ids, return_dict=False)[0]
    return cast(Tensor, found)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    net.train()
    predict(net).square().mean().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("build", [unet, transformer])
def test_checkpointing_every_nth_block_recomputes_it_with_equal_gradients(build: Any) -> None:
    expected = gradients(build())
    for every in (1, 2):
        net = build()
        checkpoint_activations(net, every)
        calls: Counter[str] = Counter()
        # diffusers checkpoints all blocks except the first in a UNet's middle.
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
    return type(module).__name__ in (
        "ResnetBlock2D",
        "BasicTransformerBlock",
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
    )


def relative_error(one: Tensor, other: Tensor) -> float:
    """The norm of the difference over the norm of the second tensor."""
    return float((one.detach() - other.detach()).norm() / other.detach().norm())


# -- quantized weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bits", "most"), [("nf4", 4.5, 0.11), ("int8", 8.5, 0.01)])
def test_quantized_linear_equals_a_linear_with_dequantized_weights(
    kind: Quantization, bits: float, most: float
) -> None:
    """Outputs and input gradients are bit-identical to those of a linear layer with the rounded weights."""
    torch.manual_seed(0)
    layer, values = nn.Linear(64, 128), torch.randn(2, 3, 64, requires_grad=True)
    packed = QuantizedLinear(layer, kind, torch.float32, torch.device("cpu"), keep_whole=False)
    held = packed.weight.nbytes + packed.scales.nbytes
    assert held == bits * layer.weight.numel() / 8
    assert packed.weight.numel() + packed.packed_away == layer.weight.numel()
    rounded = nn.Linear(64, 128)
    rounded.weight.data, rounded.bias.data = packed.dequantize(), layer.bias.data
    assert 0 < relative_error(rounded.weight, layer.weight) < most
    found, expected = packed(values), rounded(values)
    assert torch.equal(found, expected)
    one, other = (torch.autograd.grad(product.square().sum(), values)[0] for product in (found, expected))
    assert torch.equal(one, other)


def test_nf4_levels_match_the_paper() -> None:
    """QLoRA, appendix E: quantiles of the normal distribution, 0 and ±1; two to a byte, the first in the high bits."""
    levels = dequantized(
        torch.tensor([0x01, 0x78, 0xEF], dtype=torch.uint8).view(torch.int8)[:, None],
        torch.ones(1),
        (1, 6),
        torch.float32,
    )
    assert levels.tolist()[0] == pytest.approx(
        [-1.0, -0.6961928009986877, 0.0, 0.07958029955625534, 0.7229568362236023, 1.0]
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantize_packs_blocks_and_keeps_shared_layers(kind: Quantization) -> None:
    net = transformer()
    exact = predict(net)
    names = quantize(net, kind, torch.float32, keep_whole=True)
    assert names and all(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in names)
    left = {name for name, layer in net.named_modules() if type(layer) is nn.Linear}
    assert {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"} <= left
    assert all(net.get_parameter(f"{name}.weight").numel() < 4096 for name in left if "blocks." in name)
    with torch.no_grad():
        assert not torch.equal(predict(net), exact)
        with whole_weights(net):
            assert torch.equal(predict(net), exact)
        assert not torch.equal(predict(net), exact)


def test_quantized_t5_encodes_on_the_device_and_offloaded() -> None:
    """T5 reads the dtype of a layer's weights and casts to it; for packed weights that would be bytes."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    section, ids = load_recipe("lora/sd15").model, torch.arange(20)[None]
    found = {}
    for encoders in get_args(get_type_hints(type(section))["text_encoder_placement"]):
        torch.manual_seed(0)
        net = T5EncoderModel(config).eval().requires_grad_(False)
        apply.fit_encoders(
            {"text_encoder": net}, dataclasses.replace(section, text_encoder_placement=encoders), torch.device("cpu")
        )
        found[encoders] = net(ids)[0]
        assert (bytes_on_device(list(net.encoder.block)) == 0) == (encoders == "offload")
    assert torch.equal(found["offload"], found["device"])
    for encoders, most in (("nf4", 0.2), ("int8", 0.02)):
        assert 0 < relative_error(found[encoders], found["device"]) < most


# -- blocks in host memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_offloaded_blocks_give_the_same_gradients_one_block_at_a_time(kind: Quantization | None) -> None:
    """In forward and backward pass a block's weights are on the device only while it computes."""

    def prepared() -> nn.Module:
        net = transformer().requires_grad_(False)
        if kind:
            quantize(net, kind, torch.float32)
        add_adapter(net, Adapter(rank=4, targets="all-linear"))
        for name, parameter in net.named_parameters():
            if "lora_B" in name:  # zero at first, so that A would get no gradient
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        checkpoint_activations(net, 1)
        return net

    expected, net = gradients(prepared()), prepared()
    weights = sum(
        parameter.nbytes
        for name, parameter in net.named_parameters()
        if "blocks." in name and not parameter.requires_grad
    )
    assert offload_blocks(net, torch.device("cpu")) == weights
    most: list[int] = []
    blocks = list(blocks_of(net))
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: most.append(bytes_on_device(blocks)))
    found = gradients(net)
    assert expected.keys() == found.keys() and all(
        torch.equal(found[name], gradient) for name, gradient in expected.items()
    )
    assert len(most) == 2 * len(blocks) and bytes_on_device(blocks) == 0
    assert max(most) <= max(
        sum(p.nbytes for p in block.parameters() if not p.requires_grad) for block in blocks_of(prepared())
    )


def bytes_on_device(blocks: list[nn.Module]) -> int:
    """Bytes of frozen weights on the device."""
    return sum(parameter.nbytes for block in blocks for parameter in block.parameters() if not parameter.requires_grad)


def test_offload_blocks_of_a_unet_is_refused() -> None:
    with pytest.raises(UserError, match="a UNet's blocks are nested"):
        load_recipe("lora/sd15", ["train.offload_blocks=true", "train.gradient_checkpointing=true"])


# -- tiles ----------------------------------------------------------------------------------------------------------------


def test_tiled_vae_processes_tiles_with_nearly_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    section = load_recipe("lora/sd15", ["model.vae_tiling=true"]).model
    monkeypatch.setattr(apply, "TILE", 64)
    vae: Any = AutoencoderKL.from_pretrained(ASSETS / "base" / "vae", torch_dtype=torch.float32)
    emoji = [to_tensor(numpy.asarray(decode(file.read(), "white"))) for file in [*bundled("emoji/noto").values()][:4]]
    pixels = torch.cat([torch.cat(emoji[:2], dim=2), torch.cat(emoji[2:], dim=2)], dim=1)[None]
    sides: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
    images = []
    for _ in range(2):
        latents = vae.encode(pixels).latent_dist.mean
        images.append(vae.decode(latents).sample.detach())
        apply.tile(vae, section)
    assert sides[0] == 128 // 4 and max(sides[1:]) == 64 // 4
    assert 0 < relative_error(images[1], images[0]) < 0.1


# -- the optimizer's step -------------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_unbiased() -> None:
    """Rounds up with the probability of the truncated fraction; exact values, zeros and infinities do not change."""
    generator = torch.Generator().manual_seed(0)
    below, above = 1.0, 1.0 + 2**-7  # neighbors in bfloat16
    for share in (0.0, 1 / 3, 0.5, 0.999):
        for sign in (1, -1):
            values = torch.full((40_000,), sign * (below + share * (above - below)))
            found = rounded(values, generator).float()
            assert {abs(value) for value in found.tolist()} <= {below, above}
            deviation = (share * (1 - share) / len(values)) ** 0.5  # of the fraction that is rounded up
            assert abs(float((found.abs() - below).mean()) / (above - below) - share) <= 5 * deviation
    still = torch.tensor([0.0, -0.0, 1.5, float("inf"), -float("inf"), float("nan"), 3.0e38])
    assert str(rounded(still, generator)) == str(still.bfloat16())


def test_updates_below_bfloat16_resolution_accumulate_on_average() -> None:
    """A thousand steps of a tenth of the bfloat16 spacing: rounding to nearest would drop them all."""
    weight = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
    optimizer = TensorByTensor(torch.optim.SGD([widened(weight)], lr=2**-7 / 10), [weight], (0, "turn"))
    for step in range(1000):
        optimizer.begin(step)
        weight.grad = torch.full_like(weight, -1.0)
        optimizer.step()
    assert float(weight.detach().float().mean()) == pytest.approx(1 + 1000 * 2**-7 / 10, rel=0.01)


def trained(folder: Path, *overrides: str, steps: int = 3, resume: bool = False, taken: bool = True) -> Job:
    """A tiny SD 1.5 after some steps of full fine-tuning, or before them."""
    common = ("sample.prompts=[]", "train.checkpoint_every=2", "data.caption_dropout=0", "optimizer.schedule=constant")
    job = tiny.prepare(tiny.recipe("sd15", "full", *common, f"train.steps={steps}", *overrides, folder=folder), resume)
    if taken:
        job.trainer.train()
    return job


def weights(job: Job) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in job.model.trained().items()}


@pytest.mark.parametrize(
    ("name", "clip"), [("adamw", "optimizer.clip_norm=null"), ("adamw8bit", "optimizer.clip=tensor")]
)
def test_fused_backward_takes_the_same_steps(name: str, clip: str, tmp_path: Path) -> None:
    """Bit-identical, with at most one gradient at a time."""
    setting = (f"optimizer.name={name}", clip, "optimizer.clip_norm=0.01" if "tensor" in clip else clip)
    after = trained(tmp_path / "after", *setting)
    inside = trained(tmp_path / "inside", *setting, "train.fused_backward=true", taken=False)
    counts: list[int] = []
    parameters = inside.trainer.state.parameters[0]
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda _: counts.append(sum(one.grad is not None for one in parameters))
        )
    norms = [inside.trainer.train_step(step)["gradient.denoiser"] for step in range(3)]
    lines = (after.run.folder / "metrics.jsonl").read_text().splitlines()
    assert norms == pytest.approx([json.loads(line)["gradient.denoiser"] for line in lines], rel=1e-5)
    expected = weights(after)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(inside).items())
    assert len(counts) == 3 * len(parameters) and max(counts) == 0


@pytest.mark.parametrize("name", ["adamw8bit", "adafactor"])
def test_bfloat16_weights_learn_and_resume_exactly(name: str, tmp_path: Path) -> None:
    setting = (
        "train.weights=bfloat16",
        f"optimizer.name={name}",
        "train.fused_backward=true",
        "optimizer.clip=tensor",
        "train.ema=0.9",
    )
    whole = trained(tmp_path / "whole", *setting, steps=4)
    assert {tensor.dtype for tensor in weights(whole).values()} == {torch.bfloat16}
    assert whole.trainer.state.ema is not None and {
        tensor.dtype for tensor in whole.trainer.state.ema.averages.values()
    } == {torch.float32}
    trained(tmp_path / "broken", *setting, steps=2)
    again = trained(tmp_path / "broken", *setting, steps=4, resume=True)
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(again).items())
    losses = [
        json.loads(line)["loss.denoiser"] for line in (whole.run.folder / "metrics.jsonl").read_text().splitlines()
    ]
    exact = trained(tmp_path / "exact", *setting[1:], "train.weights=float32", steps=4)
    for loss, line in zip(losses, (exact.run.folder / "metrics.jsonl").read_text().splitlines(), strict=True):
        assert loss == pytest.approx(json.loads(line)["loss.denoiser"], rel=0.03)
    tiny.finish(whole)
    saved = load_file(whole.run.folder / "final" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}

"""`--init` reads LoRAs of other programs: the same layers with the same change, whatever the file calls them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.adapters.lora_file import look
from finetune.errors import UserError
from finetune.kernels import ADAPTER_NAME
from tests.helpers import tiny

RANK, ALPHA = 2, 3.0
TEXT = "model.train_text_encoder=true"


def prepared(name: str, file: Path, folder: Path, *overrides: str) -> Any:
    return tiny.prepare(
        tiny.recipe(name, "lora", f"adapter.init_lora={file}", "sample.prompts=[]", *overrides, folder=folder)
    )


def change(net: nn.Module, path: str) -> Tensor:
    """What the LoRA adds to a layer's weight."""
    layer: Any = net.get_submodule(path)
    up, down = layer.lora_B[ADAPTER_NAME].weight, layer.lora_A[ADAPTER_NAME].weight
    found: Tensor = layer.scaling[ADAPTER_NAME] * (up.flatten(1) @ down.flatten(1)).detach()
    return found


def pair(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator)


def kohya(layer: str, down: Tensor, up: Tensor, alpha: Tensor | None = None) -> dict[str, Tensor]:
    found = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
    return found | ({f"{layer}.alpha": alpha} if alpha is not None else {})


UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
ALPHAS = [torch.tensor(3, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)]


@pytest.mark.parametrize("alpha", [*ALPHAS, torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.bfloat16)])
def test_alphas_of_any_dtype_are_read(alpha: Tensor, tmp_path: Path) -> None:
    down, up = pair(16, 16, 1)
    save_file(kohya("lora_unet_" + UNET.replace(".", "_"), down, up, alpha), tmp_path / "a.safetensors")
    job = prepared("sd15", tmp_path / "a.safetensors", tmp_path / "run")
    assert look(str(tmp_path / "a.safetensors")).alpha == ALPHA
    assert torch.allclose(change(job.model.denoiser, UNET), ALPHA / RANK * up @ down, atol=1e-5)


def test_words_in_the_file_are_skipped_and_named(tmp_path: Path) -> None:
    down, up = pair(16, 16, 1)
    words = {"bundle_emb.fox.clip_l": torch.ones(1, 32), "bundle_emb.hat.string_to_param.*": torch.ones(2, 32)}
    layer = kohya("lora_unet_" + UNET.replace(".", "_"), down, up, torch.tensor(ALPHA))
    save_file(layer | words, tmp_path / "a.safetensors")
    job = prepared("sd15", tmp_path / "a.safetensors", tmp_path / "run")
    assert any("not read from the file: the words fox, hat" in note for note in job.plan.notes)
    assert torch.allclose(change(job.model.denoiser, UNET), ALPHA / RANK * up @ down, atol=1e-5)


@pytest.mark.parametrize(("name", "path"), [("sd15", UNET), ("sd3", "transformer_blocks.0.attn.to_q")])
def test_pefts_prefix_is_read(name: str, path: str, tmp_path: Path) -> None:
    net = prepared_net(name)
    weight: Any = net.get_submodule(path).weight
    down, up = pair(weight.shape[0], weight.shape[1], 1)
    layer = {f"base_model.model.{path}.lora_A.weight": down, f"base_model.model.{path}.lora_B.weight": up}
    save_file(layer, tmp_path / "a.safetensors")
    job = prepared(name, tmp_path / "a.safetensors", tmp_path / "run")
    assert torch.allclose(change(job.model.denoiser, path), up @ down, atol=1e-5)


def prepared_net(name: str) -> nn.Module:
    import diffusers

    folder = tiny.pipeline(name)
    entry = json.loads((folder / "model_index.json").read_text())
    part = "unet" if "unet" in entry else "transformer"
    net: nn.Module = getattr(diffusers, entry[part][1]).from_pretrained(folder / part)
    return net


def test_onetrainers_text_projection_is_read(tmp_path: Path) -> None:
    down, up = pair(24, 32, 1)
    q, same = pair(32, 32, 2), pair(32, 32, 2)
    layers = kohya("lora_te2_text_projection", down, up, torch.tensor(ALPHA))
    layers |= kohya("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", *q, torch.tensor(1.0))
    layers |= kohya("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", *same, torch.tensor(2.0))
    save_file(layers, tmp_path / "a.safetensors")
    job = prepared("sdxl", tmp_path / "a.safetensors", tmp_path / "run", TEXT)
    first, second = job.model.pipeline.text_encoder, job.model.pipeline.text_encoder_2
    assert torch.allclose(change(second, "text_projection"), ALPHA / RANK * up @ down, atol=1e-5)
    inner = "encoder.layers.0.self_attn.q_proj"
    for net, alpha in ((first, 2.0), (second, 1.0)):
        path = inner if not hasattr(net, "text_model") else f"text_model.{inner}"
        assert torch.allclose(change(net, path), alpha / RANK * q[1] @ q[0], atol=1e-5)


@pytest.mark.parametrize("name", tiny.FLOWS)
def test_onetrainers_transformer_names_are_read(name: str, tmp_path: Path) -> None:
    paths = [path for path, module in prepared_net(name).named_modules() if path.endswith((".to_q", ".to_v"))][:2]
    net, layers, wanted = prepared_net(name), dict[str, Tensor](), dict[str, Tensor]()
    for number, path in enumerate(paths):
        weight: Any = net.get_submodule(path).weight
        down, up = pair(weight.shape[0], weight.shape[1], number)
        alpha = torch.tensor(float(number + 1))
        layers |= kohya("lora_transformer_" + path.replace(".", "_"), down, up, alpha)
        wanted[path] = float(alpha) / RANK * up @ down
    save_file(layers, tmp_path / "a.safetensors")
    job = prepared(name, tmp_path / "a.safetensors", tmp_path / "run")
    assert len(wanted) == 2
    assert all(torch.allclose(change(job.model.denoiser, path), delta, atol=1e-5) for path, delta in wanted.items())


@pytest.mark.parametrize(
    ("name", "layer", "members"),
    [
        ("sd3", "lora_unet_joint_blocks_0_x_block_attn_qkv", "transformer_blocks.0.attn.to_{}"),
        ("sd3", "lora_unet_joint_blocks_0_context_block_attn_qkv", "transformer_blocks.0.attn.add_{}_proj"),
        ("z-image", "diffusion_model.layers.0.attention.qkv", "layers.0.attention.to_{}"),
    ],
)
def test_fused_layers_of_the_original_code_are_split(name: str, layer: str, members: str, tmp_path: Path) -> None:
    net = prepared_net(name)
    weight: Any = net.get_submodule(members.format("q")).weight
    rows, columns = weight.shape
    down, up = pair(3 * rows, columns, 1)
    save_file(kohya(layer, down, up, torch.tensor(ALPHA)), tmp_path / "a.safetensors")
    job = prepared(name, tmp_path / "a.safetensors", tmp_path / "run")
    whole = ALPHA / RANK * up @ down
    for number, part in enumerate("qkv"):
        delta = change(job.model.denoiser, members.format(part))
        assert torch.allclose(delta, whole[number * rows : (number + 1) * rows], atol=1e-5)


def test_single_layers_of_the_original_code_are_renamed(tmp_path: Path) -> None:
    for name, layer, path in (
        ("sd3", "lora_unet_joint_blocks_0_x_block_mlp_fc1", "transformer_blocks.0.ff.net.0.proj"),
        ("sd3", "lora_unet_joint_blocks_0_x_block_attn_proj", "transformer_blocks.0.attn.to_out.0"),
        ("z-image", "diffusion_model.layers.0.attention.out", "layers.0.attention.to_out.0"),
        ("z-image", "diffusion_model.layers.0.feed_forward.w1", "layers.0.feed_forward.w1"),
    ):
        weight: Any = prepared_net(name).get_submodule(path).weight
        down, up = pair(weight.shape[0], weight.shape[1], 1)
        save_file(kohya(layer, down, up), tmp_path / "a.safetensors")
        job = prepared(name, tmp_path / "a.safetensors", tmp_path / f"run-{path}")
        assert torch.allclose(change(job.model.denoiser, path), up @ down, atol=1e-5)


def refused(name: str, tensors: dict[str, Tensor], folder: Path) -> str:
    save_file(tensors, folder / "a.safetensors")
    with pytest.raises(UserError) as caught:
        prepared(name, folder / "a.safetensors", folder / "run")
    return caught.value.problem


@pytest.mark.parametrize("name", ["flux1", "chroma", "qwen-image", "sd3", "z-image"])
@pytest.mark.parametrize("prefix", ["lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"])
def test_a_file_of_another_width_is_refused_by_name(name: str, prefix: str, tmp_path: Path) -> None:
    if name not in tiny.FLOWS:
        pytest.skip("no tiny pipeline")
    assert "is a LoRA of another base" in refused(name, kohya(prefix, *pair(7, 5, 1)), tmp_path)


def test_a_layer_that_the_base_lacks_is_named(tmp_path: Path) -> None:
    said = refused("sd3", kohya("lora_transformer_transformer_blocks_99_attn_to_q", *pair(16, 16, 1)), tmp_path)
    assert "lora_transformer_transformer_blocks_99_attn_to_q" in said


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_a_lora_is_refused_by_name(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    down, up = pair(16, 16, 1)
    up[3, 1] = value
    layer = "lora_unet_" + UNET.replace(".", "_")
    said = refused("sd15", {name: tensor.to(dtype) for name, tensor in kohya(layer, down, up).items()}, tmp_path)
    problem = "a.safetensors contains NaN or infinite values in 1 of its 2 tensors, such as"
    assert said == f"{problem} {layer}.lora_up.weight"


def test_our_own_files_are_still_read_by_their_own_names(tmp_path: Path) -> None:
    job = tiny.train(tiny.recipe("z-image", "lora", "sample.prompts=[]", folder=tmp_path / "one"))
    again = prepared("z-image", look(str(tmp_path / "one")).file, tmp_path / "two")
    before, now = tiny.trained(job), tiny.trained(again)
    assert all(torch.equal(before[name], now[name]) for name in before)
    assert load_file(look(str(tmp_path / "one")).file)

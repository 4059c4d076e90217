"""A LoRA as one file by the conventions of kohya-ss/sd-scripts, which ComfyUI and A1111 read.

Layers are named by their path with underscores, after `lora_unet_`, `lora_te_` (SDXL: `lora_te1_`, `lora_te2_`); the scale
is alpha / rank, layer by layer (networks/lora.py). SDXL's UNet goes by the names of the original SGM code, as sd-scripts
trains it (library/sdxl_model_util.py, make_unet_conversion_map); SD 1.x's and 2.x's go by diffusers' names.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from finetune.errors import UserError
from finetune.export.folder import cast, read
from finetune.models.loading import LORA_FILE
from finetune.models.single_file import BY_WIDTH
from finetune.recipe import Recipe

SDXL_LAYERS = 2  # resnets a level of SDXL's UNet on the way down; one more on the way up
# diffusers writes three spellings of the same, by the layer's kind.
PIECE = re.compile(
    r"(?P<net>unet|text_encoder|text_encoder_2)\.(?P<path>.+?)"
    r"\.(?P<piece>lora_A|lora_B|lora(?:_linear_layer)?\.(?:down|up)|lora_magnitude_vector)(\.weight)?"
)
UP = ("lora_B", "lora.up", "lora_linear_layer.up")
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
}
OUTSIDE_BLOCKS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def write_kohya(final: Path, recipe: Recipe, dtype: str | None, target: Path) -> None:
    """Write the LoRA in `final` as `target`.

    DoRA's magnitudes go in as `dora_scale`, one a row of the weight. ComfyUI reads them so; A1111 takes scales a column,
    and diffusers drops them, so these two would draw another picture: a merged pipeline is for them.

    Raises:
        UserError: the LoRA has a layer that this format has no name for.
    """
    tensors, metadata = read(final / LORA_FILE)
    settings = json.loads(metadata["lora_adapter_metadata"])
    sdxl = recipe.model.family == "sdxl"
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = PIECE.fullmatch(name)
        if match is None:
            raise UserError(
                f'the kohya format has no name for "{name}"', where=str(final / LORA_FILE), remedy="export it with --format diffusers, or --merge"
            )
        net, path, piece = match["net"], match["path"], match["piece"]
        layer = layer_name(net, path, sdxl)
        if piece == "lora_magnitude_vector":
            # PEFT: [rows] for a matrix, [1, rows, 1, 1] for a convolution.
            found[f"{layer}.dora_scale"] = tensor.flatten().view(-1, *[1] * max(1, tensor.dim() - 1)).contiguous()
        elif piece in UP:
            found[f"{layer}.lora_up.weight"] = tensor
        else:
            found[f"{layer}.lora_down.weight"] = tensor
            found[f"{layer}.alpha"] = torch.tensor(folded_alpha(settings, net))
    if dtype is not None:
        found = cast(found, dtype, final / LORA_FILE)
    if any(name.endswith(".dora_scale") for name in found):
        print("a DoRA in this format is for ComfyUI; A1111 and diffusers would draw another picture from it: give them --merge")
    header = describe(recipe, found)
    save_file(found, target, header | {"sshs_model_hash": tensor_hash(found)})


def folded_alpha(settings: dict[str, Any], net: str) -> float:
    """The alpha that gives the trained scale when divided by the rank: rsLoRA's alpha / √rank becomes alpha·√rank / rank."""
    alpha, rank = float(settings[f"{net}.lora_alpha"]), int(settings[f"{net}.r"])
    return alpha * math.sqrt(rank) if settings.get(f"{net}.use_rslora") else alpha


def layer_name(net: str, path: str, sdxl: bool) -> str:
    """`unet`, `mid_block.attentions.0.proj_in` → `lora_unet_mid_block_attentions_0_proj_in` (SDXL: `…_middle_block_1_proj_in`)."""
    if net == "unet":
        return "lora_unet_" + (sgm_path(path) if sdxl else path).replace(".", "_")
    prefix = {"text_encoder": "lora_te1_" if sdxl else "lora_te_", "text_encoder_2": "lora_te2_"}[net]
    # Newer transformers have no `text_model` around CLIP's text encoder; the format has.
    path = path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"
    return prefix + path.replace(".", "_")


def sgm_path(path: str) -> str:
    """A layer of SDXL's UNet: diffusers' path → the original code's, `down_blocks.1.attentions.0` → `input_blocks.4.1`."""
    if path in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[path]
    parts = path.split(".")
    if parts[0] == "mid_block":
        kind, inner, rest = parts[1], int(parts[2]), parts[3:]
        place = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * inner}"
    else:
        level, kind, inner, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        if kind == "downsamplers":
            return f"input_blocks.{(SDXL_LAYERS + 1) * (level + 1)}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{(SDXL_LAYERS + 1) * level + SDXL_LAYERS}.2.conv"
        number = (SDXL_LAYERS + 1) * level + inner
        block = f"input_blocks.{number + 1}" if parts[0] == "down_blocks" else f"output_blocks.{number}"
        place = f"{block}.{1 if kind == 'attentions' else 0}"
    if kind == "resnets":
        rest = [RESNET[rest[0]], *rest[1:]]
    return ".".join([place, *rest])


def describe(recipe: Recipe, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The file's metadata: sd-scripts' `ss_` keys that programs show or filter by, and ModelSpec's required keys.

    ModelSpec: https://github.com/Stability-AI/ModelSpec. Which Stable Diffusion it is, the width of the text conditions
    tells; the keys that would say it are left out if no adapted layer reads them.
    """
    downs = {name: tensor for name, tensor in tensors.items() if name.endswith(".lora_down.weight")}
    ranks = {tensor.shape[0] for tensor in downs.values()}
    alphas = {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")}
    widths = {tensor.shape[1] for name, tensor in downs.items() if "attn2_to_k" in name or "attn2_to_v" in name}
    size = recipe.data.resolution
    predicts_v = recipe.model.prediction != "epsilon"
    base, architecture = {
        "sd15": ("sd_v1", "stable-diffusion-v1"),
        "sd21": ("sd_v2_v", "stable-diffusion-v2-768-v") if predicts_v else ("sd_v2", "stable-diffusion-v2-512"),
        "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    }.get("sdxl" if recipe.model.family == "sdxl" else BY_WIDTH.get(next(iter(widths), 0), ""), ("", ""))
    found = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(max(alphas)),
        "ss_base_model_version": base,
        "ss_v2": str(base.startswith("sd_v2")) if base else "",
        "ss_resolution": str((size, size)),
        "ss_output_name": recipe.name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora" if architecture else "",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if recipe.model.family == "sdxl" else "diffusers",
        "modelspec.title": recipe.name,
        "modelspec.resolution": f"{size}x{size}",
    }
    return {key: value for key, value in found.items() if value}


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a safetensors file's bytes after its header (sd-scripts, library/train_util.py, addnet_hash_safetensors)."""
    content = save(tensors)
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()

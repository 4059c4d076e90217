"""Write a LoRA in the format of kohya-ss/sd-scripts, which ComfyUI and A1111 read.

Layers are named by their path with underscores, after `lora_unet_`, `lora_te_` (SDXL: `lora_te1_`, `lora_te2_`); the
scale is alpha / rank, layer by layer (networks/lora.py). SDXL's UNet uses the names of the original SGM code, as
sd-scripts trains it (library/sdxl_model_util.py, make_unet_conversion_map); SD 1.x and 2.x use diffusers' names.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.adapters.formats.metadata import PEFT, describe, folded_alpha, settings_of
from finetune.adapters.formats.safetensors_io import cast, hashes, read
from finetune.adapters.lora_file import LORA_FILE
from finetune.config.schema import Recipe
from finetune.errors import UserError

log = logging.getLogger(__name__)

SDXL_LAYERS = 2  # residual blocks per level of SDXL's UNet on the way down; one more on the way up
# diffusers has three spellings, depending on the kind of layer.
PIECE = re.compile(
    r"(?P<net>unet|text_encoder|text_encoder_2)\.(?P<path>.+?)"
    r"\.(?P<piece>lora_A|lora_B|lora(?:_linear_layer)?\.(?:down|up)|lora_magnitude_vector)(\.weight)?"
)
WEIGHTS = (  # ends of the names of A and B
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
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
    """Write the LoRA in `final` to the file `target`.

    DoRA's magnitudes are written as `dora_scale`, one per row of the weight. ComfyUI divides by ‖W‖ where PEFT
    divides by ‖W + s B A‖, so its result differs by up to 2 % of the change; A1111 expects one scale per column, and
    diffusers drops them. For these two, merge the LoRA instead.

    Raises:
        UserError: the format has no name for a layer.
    """
    tensors, metadata = read(final / LORA_FILE)
    settings = settings_of(metadata)
    sdxl = recipe.model.family == "sdxl"
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = PIECE.fullmatch(name)
        if match is None:
            raise UserError(
                f'the kohya format has no name for "{name}"',
                where=str(final / LORA_FILE),
                remedy="export it with --format diffusers, or --merge",
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
            found[f"{layer}.alpha"] = torch.tensor(folded_alpha(settings, net, path, len(tensor)))
    found = with_one_alpha(found)
    alpha = float(next(tensor for name, tensor in found.items() if name.endswith(".alpha")))
    if dtype is not None:
        found = cast(found, dtype, final / LORA_FILE)
    if any(name.endswith(".dora_scale") for name in found):
        log.warning("DoRA in this format is for ComfyUI; A1111 and diffusers read it differently: use --merge for them")
    training = {
        key: value for key, value in metadata.items() if key != PEFT
    }  # how it was trained, if the file has that
    header = training | describe(recipe, tensors, settings) | {"ss_network_alpha": f"{alpha:g}"}
    save_file(found, target, header | hashes(found))


def with_one_alpha(tensors: Mapping[str, Tensor], alpha: float | None = None) -> dict[str, Tensor]:
    """The same LoRA with the same alpha in every layer.

    A layer adds (alpha / rank) B A. What its own alpha has beyond the common one is multiplied into B. All programs
    read such a file alike, but diffusers 0.42 reads alphas that differ by layer as if all were the most frequent one:
    the keys of the `alpha_pattern` that it makes of them match no layer.

    Args:
        tensors: by layer, weights of either naming and `.alpha`; a layer without alpha has its rank as alpha.
        alpha: the common one; None: the most frequent one.
    """
    layers: dict[str, tuple[str, float]] = {}  # layer → (name of B, alpha)
    for name, tensor in tensors.items():
        for down, up in WEIGHTS:
            if name.endswith(down) and (layer := name.removesuffix(down)) + up in tensors:
                layers[layer] = layer + up, float(tensors.get(f"{layer}.alpha", len(tensor)))
    if alpha is None:
        alpha = Counter(own for _, own in layers.values()).most_common(1)[0][0]
    result = dict(tensors)
    for layer, (up, own) in layers.items():
        if own != alpha:
            result[up] = (tensors[up].float() * (own / alpha)).to(tensors[up].dtype)
        if own != alpha or f"{layer}.alpha" not in tensors:
            result[f"{layer}.alpha"] = torch.tensor(alpha)
    return result


def layer_name(net: str, path: str, sdxl: bool) -> str:
    """kohya's name of a layer.

    `unet`, `mid_block.attentions.0.proj_in` → `lora_unet_mid_block_attentions_0_proj_in`, or with SDXL
    `lora_unet_middle_block_1_proj_in`.
    """
    if net == "unet":
        return "lora_unet_" + (sgm_path(path) if sdxl else path).replace(".", "_")
    prefix = {"text_encoder": "lora_te1_" if sdxl else "lora_te_", "text_encoder_2": "lora_te2_"}[net]
    # Newer transformers have no `text_model` around CLIP's text encoder; the format has.
    path = path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"
    return prefix + path.replace(".", "_")


def sgm_path(path: str) -> str:
    """The original code's path for a layer of SDXL's UNet: `down_blocks.1.attentions.0` → `input_blocks.4.1`."""
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

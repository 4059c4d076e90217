"""Write and read a transformer's LoRA under other programs' layer names.

`kohya`: `lora_unet_` and the path with underscores, as sd-scripts (networks/lora_flux.py) and musubi-tuner
(convert_lora.py) write. `comfyui`: dots, and `lora_A`, `lora_B`. Both use the names of the model's original code
where the tables below have them, and otherwise diffusers' names. Sources: ComfyUI, comfy/lora.py,
model_lora_keys_unet (`transformer.` + diffusers' path for SD 3, FLUX.1, Qwen-Image, PixArt and, through
z_image_to_diffusers, Z-Image; `diffusion_model.` + its own path for every model); diffusers,
loaders/lora_conversion_utils.py, which reads all of these back except as the families' records say (`lora_formats`).
`by_diffusers_names` reads whatever has dots.

Where the original code computes several of diffusers' layers at once (q, k and v), their LoRAs are joined: A's are
stacked, B's are placed along a diagonal, B A = diag(B_q, B_k, B_v) [A_q; A_k; A_v]. A scale other than 1 is
multiplied into B, since programs differ in how they read alpha.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.adapters.formats.metadata import PEFT, describe, folded_alpha, settings_of
from finetune.adapters.formats.safetensors_io import cast, hashes, read
from finetune.adapters.lora_file import LORA_FILE, PEFT_FILE
from finetune.adapters.peft import read_peft
from finetune.config.schema import Recipe
from finetune.errors import UserError
from finetune.models import registry
from finetune.models.spec import FamilySpec

NET, CODE = "transformer", "diffusion_model"  # first part of paths: diffusers', the original code's
Shares = tuple[tuple[str, int], ...]  # members of a fused layer, in order, and their relative widths


@dataclass(frozen=True)
class Block:
    """One kind of block.

    Attributes:
        name: in the original code.
        layers: diffusers' names → the original names.
        fused: original names of layers that are several of diffusers' → those.
    """

    name: str
    layers: Mapping[str, str]
    fused: Mapping[str, Shares] = field(default_factory=dict)


@dataclass(frozen=True)
class KeyMap:
    """Layer names: `blocks` by diffusers' names, `outside` the layers outside of blocks."""

    blocks: Mapping[str, Block]
    outside: Mapping[str, str] = field(default_factory=dict)


_ATTENTION = {"attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj"}
_QKV = {
    "img_attn.qkv": (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1)),
    "txt_attn.qkv": (("attn.add_q_proj", 1), ("attn.add_k_proj", 1), ("attn.add_v_proj", 1)),
}
FLUX = KeyMap(
    {
        "transformer_blocks": Block(
            "double_blocks",
            _ATTENTION
            | {
                "ff.net.0.proj": "img_mlp.0",
                "ff.net.2": "img_mlp.2",
                "ff_context.net.0.proj": "txt_mlp.0",
                "ff_context.net.2": "txt_mlp.2",
            }
            | {"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin"},
            _QKV,
        ),
        "single_transformer_blocks": Block(
            "single_blocks",
            {"proj_out": "linear2", "norm.linear": "modulation.lin"},
            {"linear1": (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1), ("proj_mlp", 4))},
        ),
    },
    {"x_embedder": "img_in", "context_embedder": "txt_in"},
)
FLUX2 = KeyMap(
    {
        "transformer_blocks": Block(
            "double_blocks",
            _ATTENTION
            | {
                "ff.linear_in": "img_mlp.0",
                "ff.linear_out": "img_mlp.2",
                "ff_context.linear_in": "txt_mlp.0",
                "ff_context.linear_out": "txt_mlp.2",
            },
            _QKV,
        ),
        "single_transformer_blocks": Block(
            "single_blocks", {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
        ),
    },
    {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"},
)
_LUMINA2_BLOCK = {
    "attn.to_out.0": "attention.out",
    "norm1.linear": "adaLN_modulation.1",
    **{f"feed_forward.linear_{number}": f"feed_forward.w{number}" for number in (1, 2, 3)},
}
LUMINA2 = KeyMap(
    {
        name: Block(name, _LUMINA2_BLOCK, {"attention.qkv": (("attn.to_q", 3), ("attn.to_k", 1), ("attn.to_v", 1))})
        for name in ("layers", "noise_refiner", "context_refiner")
    }
)

# sd-scripts' SD 3 (networks/lora_sd3.py) and ComfyUI. The context's norms are left out: in the last block, the original
# code orders their rows differently.
SD3 = KeyMap(
    {
        "transformer_blocks": Block(
            "joint_blocks",
            {
                "attn.to_out.0": "x_block.attn.proj",
                "attn2.to_out.0": "x_block.attn2.proj",
                "attn.to_add_out": "context_block.attn.proj",
                "ff.net.0.proj": "x_block.mlp.fc1",
                "ff.net.2": "x_block.mlp.fc2",
                "ff_context.net.0.proj": "context_block.mlp.fc1",
                "ff_context.net.2": "context_block.mlp.fc2",
                "norm1.linear": "x_block.adaLN_modulation.1",
            },
            {
                "x_block.attn.qkv": (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1)),
                "x_block.attn2.qkv": (("attn2.to_q", 1), ("attn2.to_k", 1), ("attn2.to_v", 1)),
                "context_block.attn.qkv": (("attn.add_q_proj", 1), ("attn.add_k_proj", 1), ("attn.add_v_proj", 1)),
            },
        )
    }
)
Z_IMAGE = KeyMap(
    {
        name: Block(
            name,
            {"attention.to_out.0": "attention.out"},
            {"attention.qkv": (("attention.to_q", 1), ("attention.to_k", 1), ("attention.to_v", 1))},
        )
        for name in ("layers", "noise_refiner", "context_refiner")
    }
)


def key_map(spec: FamilySpec, layout: str) -> KeyMap | None:
    """How a format renames a family's layers; None where it uses diffusers' own names, or does not know the family."""
    target = spec.lora_formats.get(layout)
    return registry.load(target) if target else None


def write_transformer(final: Path, recipe: Recipe, layout: str, dtype: str | None, target: Path) -> None:
    """Write the LoRA in `final` to the file `target` in the format `layout`.

    Raises:
        UserError: the format has no name for a layer, or it is a DoRA.
    """
    file = final / LORA_FILE
    if file.is_file():
        tensors, metadata = read(file)
        settings = settings_of(metadata)
    else:  # of a pipeline that loads no LoRA
        file = final / NET / PEFT_FILE
        (tensors, settings), metadata = read_peft(file, NET), read(file)[1]
    names = key_map(registry.spec_of(recipe.model.family), layout)
    plain, parts = dict[str, tuple[Tensor, Tensor]](), dict[tuple[str, Shares], dict[str, tuple[Tensor, Tensor]]]()
    for path, pair in _pairs(tensors, settings, file).items():
        name, shares = (path, ()) if names is None else _renamed(path, names, file)
        if shares:
            parts.setdefault((name, shares), {})[
                next(member for member, _ in shares if path.endswith(f".{member}"))
            ] = pair
        else:
            plain[name] = pair
    plain |= {name: _fused(pairs, shares) for (name, shares), pairs in parts.items()}
    found = _spelled(plain, layout, CODE if names is not None else NET)
    if dtype is not None:
        found = cast(found, dtype, file)
    training = {key: value for key, value in metadata.items() if key != PEFT}
    header = training | describe(recipe, tensors, settings)
    save_file(
        found, target, header | {"ss_network_alpha": header["ss_network_dim"]} | hashes(found)
    )  # the scale is in the weights


def _pairs(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of each layer → (A [r, in], scale · B [out, r])."""
    found = {}
    for name, down in tensors.items():
        match = re.fullmatch(rf"{NET}\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight", name)
        if match is None:
            raise UserError(
                f'this format has no name for "{name}"',
                where=str(file),
                remedy="export it with --format diffusers, or --merge",
            )
        if match["side"] == "A":
            up = tensors[f"{NET}.{match['path']}.lora_B.weight"]
            scale = folded_alpha(settings, NET, match["path"], len(down)) / len(down)
            found[match["path"]] = (down, up if scale == 1 else (up.float() * scale).to(up.dtype))
    return found


def _renamed(path: str, names: KeyMap, file: Path) -> tuple[str, Shares]:
    """The original path for one of diffusers', and the shares of the fused layer that it is part of (empty: none)."""
    if path in names.outside:
        return names.outside[path], ()
    kind, _, rest = path.partition(".")
    number, _, layer = rest.partition(".")
    block = names.blocks.get(kind)
    if block is not None and layer in block.layers:
        return f"{block.name}.{number}.{block.layers[layer]}", ()
    for name, shares in block.fused.items() if block is not None else ():
        if block is not None and layer in dict(shares):
            return f"{block.name}.{number}.{name}", shares
    raise UserError(
        f'this format has no name for the layer "{path}"',
        where=str(file),
        remedy="export it with --format diffusers, or --merge",
    )


def by_diffusers_names(tensors: Mapping[str, Tensor], names: KeyMap) -> dict[str, Tensor]:
    """Rename a LoRA from the original names (with dots) to diffusers', with its scale multiplied into B, [out, r].

    Fused layers are split: each member gets its rows of B, and the rows of A that these multiply. The inverse of
    `_fused`.

    Raises:
        KeyError: the key map lacks a layer.
    """
    kinds = {block.name: (kind, block) for kind, block in names.blocks.items()}
    outside = {theirs: ours for ours, theirs in names.outside.items()}
    found: dict[str, Tensor] = {}
    for path in sorted({name.removeprefix(f"{CODE}.").partition(".lora_")[0] for name in tensors if ".lora_" in name}):
        down, up = (
            _one_of(tensors, f"{CODE}.{path}", ends) for ends in (("lora_A", "lora_down"), ("lora_B", "lora_up"))
        )
        if (alpha := tensors.get(f"{CODE}.{path}.alpha")) is not None and float(alpha) != len(down):
            up = (up.float() * (float(alpha) / len(down))).to(up.dtype)
        name, _, rest = path.partition(".")
        number, _, layer = rest.partition(".")
        kind, block = kinds.get(name, ("", None))
        if path in outside:
            parts = {outside[path]: (down, up)}
        elif block is not None and layer in block.fused:
            parts = {
                f"{kind}.{number}.{member}": pair
                for member, pair in split_members(down, up, block.fused[layer]).items()
            }
        elif block is not None:
            parts = {f"{kind}.{number}.{ {theirs: ours for ours, theirs in block.layers.items()}[layer] }": (down, up)}
        else:
            raise KeyError(path)
        for ours, (a, b) in parts.items():
            found |= {f"{NET}.{ours}.lora_A.weight": a, f"{NET}.{ours}.lora_B.weight": b}
    return found


def _one_of(tensors: Mapping[str, Tensor], path: str, ends: tuple[str, ...]) -> Tensor:
    for end in ends:
        if f"{path}.{end}.weight" in tensors:
            return tensors[f"{path}.{end}.weight"]
    raise KeyError(path)


def split_members(down: Tensor, up: Tensor, shares: Shares) -> dict[str, tuple[Tensor, Tensor]]:
    """Member → (A, B), of members that the LoRA of a fused layer changes."""
    width, row = len(up) // sum(share for _, share in shares), 0
    found = {}
    for member, share in shares:
        part = up[row : row + share * width]
        row += share * width
        used = part.any(0)
        if used.any():
            found[member] = (down[used].contiguous(), part[:, used].contiguous())
    return found


def _fused(pairs: Mapping[str, tuple[Tensor, Tensor]], shares: Shares) -> tuple[Tensor, Tensor]:
    """(A, B) of a fused layer; rows of members without a LoRA are zero."""
    width = next(len(up) // share for member, share in shares if member in pairs for up in [pairs[member][1]])
    present = [pairs[member] for member, _ in shares if member in pairs]
    down = torch.cat([pair[0] for pair in present])
    up = torch.zeros(sum(share for _, share in shares) * width, len(down), dtype=present[0][1].dtype)
    row = column = 0
    for member, share in shares:
        if member in pairs:
            part = pairs[member][1]
            up[row : row + len(part), column : column + part.shape[1]] = part
            column += part.shape[1]
        row += share * width
    return down.contiguous(), up


def _spelled(pairs: Mapping[str, tuple[Tensor, Tensor]], layout: str, prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, (down, up) in pairs.items():
        if layout == "kohya":
            name = "lora_unet_" + path.replace(".", "_")
            found |= {
                f"{name}.lora_down.weight": down,
                f"{name}.lora_up.weight": up,
                f"{name}.alpha": torch.tensor(float(len(down))),
            }
        else:
            found |= {f"{prefix}.{path}.lora_A.weight": down, f"{prefix}.{path}.lora_B.weight": up}
    return found

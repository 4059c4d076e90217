"""Read a LoRA whatever program named its layers: names are compared with the layers that the networks really have.

Programs write a layer's path with dots (PEFT, diffusers, ComfyUI) or with underscores (kohya's sd-scripts, OneTrainer),
after a prefix for the network, and call layers as diffusers or as the model's original code does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from finetune.adapters.formats.key_maps import KeyMap, Shares, split_members
from finetune.adapters.formats.kohya import sgm_path
from finetune.adapters.lora_file import EMBEDDINGS
from finetune.adapters.peft import ADAPTED

PIECE = re.compile(
    r"(?P<layer>.+?)\.(?P<piece>lora_A|lora_B|lora_down|lora_up|lora(?:_linear_layer)?\.(?:down|up)|alpha)"
    r"(?:\.default)?(?:\.weight)?"
)
DOWN = ("lora_A", "lora_down", "lora.down", "lora_linear_layer.down")
# Prefix → number of the text encoder, 0 for the denoiser. The first that fits counts.
PREFIXES = {
    "lora_unet_": 0,
    "lora_transformer_": 0,
    "model.diffusion_model.": 0,
    "diffusion_model.": 0,
    "transformer.": 0,
    "unet.": 0,
    "lora_te1_": 1,
    "lora_te2_": 2,
    "lora_te3_": 3,
    "lora_te_": 1,
    "text_encoder_2.": 2,
    "text_encoder_3.": 3,
    "text_encoder.": 1,
}
PEFT_PREFIX = "base_model.model."


@dataclass
class _Layer:
    """One layer of the file."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None


@dataclass
class Weights:
    """A LoRA under PEFT's names, such as `unet.….lora_A.weight`; `alphas` by layer, of layers that have one."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)


def read_by_modules(
    tensors: Mapping[str, Tensor], nets: Mapping[str, nn.Module], denoiser: str, names: KeyMap | None
) -> Weights:
    """The LoRA in `tensors`, under the names of the layers in `nets`.

    Args:
        nets: the pipeline's networks by name.
        denoiser: the name of the denoiser among them.
        names: the key map of the original code, if the denoiser has other names there.

    Raises:
        KeyError: the networks have no such layer.
        ValueError: half of a pair is missing, or a tensor is no part of a LoRA.
    """
    layers: dict[str, _Layer] = {}
    for name, tensor in tensors.items():
        if name.startswith(EMBEDDINGS):
            continue
        match = PIECE.fullmatch(name)
        if match is None:
            raise ValueError(f'"{name}" is no part of a LoRA')
        layer = layers.setdefault(match["layer"], _Layer())
        if match["piece"] == "alpha":
            layer.alpha = float(tensor)
        elif match["piece"] in DOWN:
            layer.down = tensor
        else:
            layer.up = tensor
    plain = {part: _flat_names(part, net, part == denoiser) for part, net in nets.items()}
    fused = _fused_names(nets[denoiser], names) if names is not None else {}
    found = Weights()
    for given, layer in layers.items():
        if layer.down is None or layer.up is None:
            raise ValueError(f'"{given}" has only one of its two matrices')
        part, flat = _part(given, denoiser)
        if flat in plain.get(part, {}):
            _add(found, f"{part}.{plain[part][flat]}", layer.down, layer.up, layer.alpha)
        elif part == denoiser and flat in fused:
            block, shares = fused[flat]
            scale = 1.0 if layer.alpha is None else layer.alpha / len(layer.down)
            up = layer.up if scale == 1 else (layer.up.float() * scale).to(layer.up.dtype)
            for member, (a, b) in split_members(layer.down, up, shares).items():
                _add(found, f"{part}.{block}.{member}", a, b, None)
        else:
            raise KeyError(f'the {part} has no layer "{given}"')
    return found


def _add(found: Weights, path: str, down: Tensor, up: Tensor, alpha: float | None) -> None:
    found.tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    found.alphas[path] = float(len(down)) if alpha is None else alpha


def _part(name: str, denoiser: str) -> tuple[str, str]:
    """The network that a layer's name means, and the rest of the name with underscores."""
    rest = name.removeprefix(PEFT_PREFIX)
    for prefix, number in PREFIXES.items():
        if rest.startswith(prefix):
            part = denoiser if not number else "text_encoder" if number == 1 else f"text_encoder_{number}"
            return part, rest.removeprefix(prefix).replace(".", "_")
    return denoiser, rest.replace(".", "_")


def _adaptable(net: nn.Module) -> Iterable[str]:
    return [name for name, module in net.named_modules() if isinstance(module, ADAPTED)]


def _flat_names(part: str, net: nn.Module, is_denoiser: bool) -> dict[str, str]:
    """Names with underscores → paths: diffusers' own, CLIP's with and without `text_model`, SDXL's original ones."""
    found: dict[str, str] = {}
    for path in _adaptable(net):
        found[path.replace(".", "_")] = path
        if not is_denoiser:
            found.setdefault("text_model_" + path.replace(".", "_"), path)
        elif part == "unet":
            try:
                found.setdefault(sgm_path(path).replace(".", "_"), path)
            except (LookupError, ValueError):
                continue  # a layer that SDXL does not have
    return found


def _fused_names(net: nn.Module, names: KeyMap) -> dict[str, tuple[str, Shares]]:
    """Original names with underscores → (diffusers' block, shares of its layers); layers that are not fused have one."""
    found: dict[str, tuple[str, Shares]] = {}
    for path in _adaptable(net):
        kind, _, rest = path.partition(".")
        number, _, layer = rest.partition(".")
        block = names.blocks.get(kind)
        if block is None:
            continue
        if layer in block.layers:
            original: str | None = block.layers[layer]
            shares: Shares = ((layer, 1),)
        else:
            original, shares = next(((name, of) for name, of in block.fused.items() if layer in dict(of)), (None, ()))
        if original is not None:
            found[f"{block.name}.{number}.{original}".replace(".", "_")] = (f"{kind}.{number}", shares)
    return found

"""Read what a LoRA file contains from its header: format, ranks and alphas. Torch-free; weights are not read.

diffusers names a matrix pair `….lora_A.weight`, `….lora_B.weight` (formerly also `….lora.down.weight` and others) and
stores alpha in its metadata; without, alpha is the rank. kohya's sd-scripts name it `….lora_down.weight`,
`….lora_up.weight` and store alpha as a tensor beside each pair (networks/lora.py). PEFT's folder for a network has
diffusers' names, and alpha in `adapter_config.json`.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.schema import Recipe
from finetune.errors import UserError
from finetune.paths import public_name

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DOWN = (
    ".lora_A.weight",
    ".lora_down.weight",
    ".lora.down.weight",
    "_lora.down.weight",
    ".lora_linear_layer.down.weight",
)
OTHER_KINDS = {".hada_": "LoHa", ".lokr_": "LoKr", ".oft_": "OFT", ".dora_scale": "DoRA in kohya's format"}
KEY, LARGEST_HEADER = "adapter.init_lora", 100 << 20  # bytes; safetensors itself allows no larger one
SCALARS = {"F32": "<f", "F16": "<e", "F64": "<d"}


@dataclass(frozen=True)
class Initial:
    """A LoRA file to continue from.

    Attributes:
        format: diffusers, kohya or PEFT.
        ranks: number of layers by rank.
        alphas: number of layers by alpha, of layers that have one.
        settings: PEFT's configuration, in files that have it, such as `unet.r`.
    """

    file: Path
    format: str
    ranks: Counter[int]
    alphas: Counter[float]
    settings: dict[str, Any]

    @property
    def layers(self) -> int:
        """Number of adapted layers."""
        return self.ranks.total()

    @property
    def rank(self) -> int:
        """That of most layers."""
        return self.ranks.most_common(1)[0][0]

    @property
    def alpha(self) -> float:
        """That of most layers."""
        return self.alphas.most_common(1)[0][0] if self.alphas else float(self.rank)

    def setting(self, name: str) -> Any:
        """The first value of a PEFT setting, over all networks, that is not empty; None if there is none."""
        return next((value for key, value in self.settings.items() if key.endswith(f".{name}") and value), None)


def find(given: str) -> Path:
    """Find the LoRA file at a path: the file, a folder with it, a run, or a folder of PEFT's folders for each network.

    Raises:
        UserError: there is none, or it is not a .safetensors file.
    """
    path = Path(given).expanduser()
    of_peft = (
        found
        for folder in (path, path / "final")
        for found in sorted([*folder.glob(PEFT_FILE), *folder.glob(f"*/{PEFT_FILE}")])
    )
    for place in (path, path / LORA_FILE, path / "final" / LORA_FILE, *of_peft):
        if place.is_file():
            if place.suffix != ".safetensors":
                raise UserError(
                    f"{place.name} is not a .safetensors file; other formats can run code when they are loaded",
                    where=KEY,
                    remedy="convert it to .safetensors",
                )
            return place
    raise UserError(
        f"there is no LoRA at {given}", where=KEY, remedy="give a .safetensors file, or the folder or run that holds it"
    )


def look(given: str) -> Initial:
    """Read a LoRA's header, and in kohya's files the scalars that hold alpha.

    Raises:
        UserError: it is not a LoRA, or of a kind that training cannot continue from.
    """
    file = find(given)
    try:
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size > LARGEST_HEADER:
                raise ValueError("its header is too large")
            header = json.loads(opened.read(size))
            metadata = header.pop("__metadata__", {})
            alphas = [_scalar(opened, 8 + size, entry) for name, entry in header.items() if name.endswith(".alpha")]
            shapes = {name: list(entry["shape"]) for name, entry in header.items()}
            settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        if file.name == PEFT_FILE and (beside := file.with_name(PEFT_CONFIG)).is_file():
            settings = {
                f"{file.parent.name}.{key}": value
                for key, value in json.loads(beside.read_text(encoding="utf-8")).items()
            }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(
            f"{file.name} cannot be read: {error}", where=str(file), remedy="copy or download it again"
        ) from error
    for sign, kind in OTHER_KINDS.items():
        if any(sign in name for name in shapes):
            raise UserError(
                f"{file.name} is a {kind}, and training can only continue from a LoRA",
                where=str(file),
                remedy="give a LoRA, or remove --init",
            )
    ranks = Counter(shape[0] for name, shape in shapes.items() if name.endswith(DOWN))
    if not ranks:
        raise UserError(
            f"{file.name} contains no LoRA",
            where=str(file),
            remedy="give a LoRA in diffusers' or kohya's format; a base model belongs in model.path",
        )
    known = Counter(float(value) for key, value in settings.items() if key.endswith(".lora_alpha")) or Counter(alphas)
    kohya = any(name.endswith(".lora_down.weight") for name in shapes)
    return Initial(
        file, "kohya" if kohya else "PEFT" if file.name == PEFT_FILE else "diffusers", ranks, known, settings
    )


def _scalar(opened: Any, start: int, entry: dict[str, Any]) -> float:
    begin, end = entry["data_offsets"]
    opened.seek(start + begin)
    content = opened.read(end - begin)
    if entry["dtype"] == "BF16":  # the upper half of a float32
        return float(struct.unpack("<f", b"\0\0" + content[:2])[0])
    return float(struct.unpack_from(SCALARS[entry["dtype"]], content)[0])


def initialized(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """Return the recipe with the rank, alpha and kind of its `adapter.init_lora`, and notes for the user.

    Raises:
        UserError: as in `look`.
    """
    adapter = recipe.adapter
    if adapter is None or adapter.init_lora is None:
        return recipe, ()
    found = look(adapter.init_lora)
    of_file: dict[str, Any] = {"rank": found.rank, "alpha": found.alpha, "rslora": bool(found.setting("use_rslora"))}
    of_file |= {"dora": bool(found.setting("use_dora"))}
    of_file |= {"kind": "lora", "pissa": False, "rank_pattern": {}, "alpha_pattern": {}}
    ranks = ", ".join(f"{count} layers of rank {rank}" for rank, count in sorted(found.ranks.items()))
    notes = [f"continues from {public_name(str(found.file))} ({found.format} format, {ranks}); targets are the file's"]
    for name, value in of_file.items():
        if f"adapter.{name}" in recipe.lines and getattr(adapter, name) not in (None, value):
            own, other = _text(getattr(adapter, name)), _text(value)
            notes.append(f"adapter.{name}: using {other}, as in the file, instead of the recipe's {own}")
    whole = dataclasses.replace(adapter, **of_file)
    return dataclasses.replace(recipe, adapter=whole), tuple(notes)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() or "nothing"

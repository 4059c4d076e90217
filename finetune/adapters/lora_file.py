"""Read what a LoRA file contains from its header: format, ranks and alphas. Torch-free; weights are not read.

diffusers names a matrix pair `….lora_A.weight`, `….lora_B.weight` (formerly also `….lora.down.weight` and others) and
stores alpha in its metadata; without, alpha is the rank. kohya's sd-scripts name it `….lora_down.weight`,
`….lora_up.weight` and store alpha as a tensor beside each pair (networks/lora.py). PEFT's folder for a network has
diffusers' names, and alpha in `adapter_config.json`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
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
SCALARS = {"F32": "<f", "F16": "<e", "F64": "<d", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}
SCALARS |= {"U16": "<H", "U32": "<I", "U64": "<Q"}
EMBEDDINGS = "bundle_emb."  # new words that OneTrainer and A1111 store in the file; they are not part of the LoRA


@dataclass(frozen=True)
class Initial:
    """A LoRA file to continue from.

    Attributes:
        format: diffusers, kohya or PEFT.
        ranks: number of layers by rank.
        alphas: number of layers by alpha, of layers that have one.
        settings: PEFT's configuration, in files that have it, such as `unet.r`.
        words: new words in the file, which are not read.
    """

    file: Path
    format: str
    ranks: Counter[int]
    alphas: Counter[float]
    settings: dict[str, Any]
    words: tuple[str, ...] = ()

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
            _check_header(header, metadata, file.stat().st_size - 8 - size)
            words = tuple(sorted({name.split(".")[1] for name in header if name.startswith(EMBEDDINGS)}))
            header = {name: entry for name, entry in header.items() if not name.startswith(EMBEDDINGS)}
            alphas = [
                _scalar(opened, 8 + size, name, entry) for name, entry in header.items() if name.endswith(".alpha")
            ]
            shapes: dict[str, list[int]] = {name: entry["shape"] for name, entry in header.items()}
            settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        if file.name == PEFT_FILE and (beside := file.with_name(PEFT_CONFIG)).is_file():
            settings = {
                f"{file.parent.name}.{key}": value
                for key, value in json.loads(beside.read_text(encoding="utf-8")).items()
            }
        _check_settings(settings)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
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
    flat = next(
        (name for name, shape in shapes.items() if name.endswith(DOWN) and (len(shape) < 2 or 0 in shape)), None
    )
    if flat is not None:
        raise UserError(
            f'{file.name} is damaged: "{flat}" has the shape {shapes[flat]}, and the weights of a LoRA are matrices',
            where=str(file),
            remedy="copy or download it again",
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
        file, "kohya" if kohya else "PEFT" if file.name == PEFT_FILE else "diffusers", ranks, known, settings, words
    )


def _check_header(header: Any, metadata: Any, content: int) -> None:
    """Raise ValueError unless a header is one that safetensors writes; `content` is the number of bytes after it."""
    if not isinstance(header, dict) or not isinstance(metadata, dict):
        raise ValueError("its header is not as safetensors writes it")
    if wrong := [key for key, value in metadata.items() if not isinstance(value, str)]:
        raise ValueError(f'"{wrong[0]}" in its metadata is not text')
    for name, entry in header.items():
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)) or len(offsets) != 2:
            raise ValueError(f'the header of "{name}" holds something other than whole numbers')
        if not offsets[0] <= offsets[1] <= content:
            raise ValueError(f'"{name}" ends after the file')
        if not isinstance(entry["dtype"], str):
            raise ValueError(f'the dtype of "{name}" is not text')


def _check_settings(settings: Any) -> None:
    """Raise ValueError unless PEFT's settings have the types that PEFT writes."""
    if not isinstance(settings, dict):
        raise ValueError("its PEFT configuration is not an object")
    for key, value in settings.items():
        name = key.rpartition(".")[2]
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if name == "lora_alpha" and not (number and value > 0):
            raise ValueError(f"its PEFT configuration says {key}: {json.dumps(value)}, which is not a positive number")
        if name == "r" and not (number and isinstance(value, int) and value > 0):
            raise ValueError(f"its PEFT configuration says {key}: {json.dumps(value)}, which is not a rank")
        if name in ("use_rslora", "use_dora") and not isinstance(value, bool | None):
            raise ValueError(f"its PEFT configuration says {key}: {json.dumps(value)}, which is neither true nor false")
        if name in ("rank_pattern", "alpha_pattern"):
            values = value.values() if isinstance(value, dict) else [None] * (value is not None)
            if not all(isinstance(entry, int | float) and math.isfinite(entry) and entry > 0 for entry in values):
                raise ValueError(f"its PEFT configuration has a {key} of something other than positive numbers")


def _scalar(opened: Any, start: int, name: str, entry: dict[str, Any]) -> float:
    begin, end = entry["data_offsets"]
    opened.seek(start + begin)
    content = opened.read(min(8, end - begin))
    if entry["dtype"] == "BF16":  # the upper half of a float32
        value = float(struct.unpack("<f", b"\0\0" + content[:2])[0])
    elif entry["dtype"] in SCALARS:
        value = float(struct.unpack_from(SCALARS[entry["dtype"]], content)[0])
    else:
        raise ValueError(f'"{name}" is stored as {entry["dtype"]}, which is no dtype of an alpha')
    if not math.isfinite(value):
        raise ValueError(f'"{name}" is {value:g}')
    return value


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
    notes = [f"continues from {public_name(str(found.file))} ({found.format} format, {ranks})"]
    if found.words:
        notes.append(f"not read from the file: the words {', '.join(found.words)} ({EMBEDDINGS}*); the LoRA itself is")
    for name, value in of_file.items():
        if f"adapter.{name}" in recipe.lines and getattr(adapter, name) not in (None, value):
            own, other = _text(getattr(adapter, name)), _text(value)
            notes.append(f"adapter.{name}: using {other}, as in the file, instead of the recipe's {own}")
    if "adapter.targets" in recipe.lines:
        notes.append("adapter.targets: adapting the layers of the file instead of the recipe's")
    whole = dataclasses.replace(adapter, **of_file)
    return dataclasses.replace(recipe, adapter=whole), tuple(notes)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(item)}" for name, item in value.items()) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() or "none"

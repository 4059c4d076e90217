"""Find the architecture that a recipe trains from the location of its model, without loading it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from finetune.config.loader import bundled_recipes, load_recipe
from finetune.config.schema import Model
from finetune.errors import UserError
from finetune.models.registry import spec_of, text_widths, variants
from finetune.paths import ASSETS, embedded, run_of

CONFIGS = ASSETS / "configs"
DENOISERS = ASSETS / "denoisers"  # architectures without a family here yet: class, configuration, source
HEADER_MOST = 100 << 20  # bytes of a safetensors header: the format's own limit


def configs_of(section: Model) -> tuple[Path, str]:
    """The folder with the pipeline's configuration for `model.path`, and the name of its cost profile.

    Raises:
        UserError: `model.path` is a repository that is not known.
    """
    given, spec = section.path or "", spec_of(section.family)
    path = Path(embedded(given)).expanduser()
    path = path / "final" if (path / "final").is_dir() else path
    if given == "embedded:base" or path == ASSETS / "base":
        return ASSETS / "base", "base"
    if path.is_file():
        name = text_widths().get(_width_of_file(path), "")
        if name:
            return CONFIGS / name, name
    elif (path / "model_index.json").is_file():
        if (path / "transformer" / "config.json").is_file():
            return path, _named_transformer(_read(path / "transformer" / "config.json"))
        return path, _named(_read(path / "unet" / "config.json") if (path / "unet").is_dir() else {})
    elif spec.one_architecture:
        name = next(iter(spec.variants))
        return CONFIGS / name, name
    elif given in (known := _repositories()):
        return CONFIGS / known[given], known[given]
    raise UserError(
        f'the architecture of "{given}" is unknown',
        where="model.path",
        remedy=(
            "give its folder or .safetensors file; known on the hub are all of family sdxl, and "
            f"{', '.join(sorted(_repositories()))}"
        ),
    )


def _repositories() -> dict[str, str]:
    """Name on the hub → the variant whose architecture it has."""
    return {repository: name for name, (_, variant) in variants().items() for repository in variant.hub}


def _named(config: dict[str, Any]) -> str:
    """The profile whose UNet has exactly this configuration; "" if none has."""
    for name in text_widths().values():
        known = json.loads((CONFIGS / name / "unet" / "config.json").read_text(encoding="utf-8"))
        shape = (
            "block_out_channels",
            "cross_attention_dim",
            "transformer_layers_per_block",
            "layers_per_block",
            "in_channels",
            "attention_head_dim",
        )
        if all(config.get(key, known.get(key)) == known.get(key) for key in shape) and config.get("block_out_channels"):
            return name
    base = json.loads((ASSETS / "base" / "unet" / "config.json").read_text(encoding="utf-8"))
    return (
        "base"
        if all(
            config.get(key) == base.get(key)
            for key in ("block_out_channels", "cross_attention_dim", "layers_per_block")
        )
        else ""
    )


def _named_transformer(config: dict[str, Any]) -> str:
    """The architecture whose transformer has exactly this configuration (missing keys have the class's default); ""
    if none.
    """
    for name in sorted(name for name, (spec, _) in variants().items() if spec.denoiser == "transformer"):
        known = _read(CONFIGS / name / "transformer" / "config.json")
        if all(config.get(key, known[key]) == known[key] for key in known):
            return name
    return ""


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _width_of_file(path: Path) -> int:
    """The width of cross-attention, from the header of a .safetensors file; 0 if there is none."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if length > HEADER_MOST:
            return 0
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return 0
    return next((int(entry["shape"][1]) for key, entry in header.items() if key.endswith("attn2.to_k.weight")), 0)


def vae_config(given: str) -> dict[str, Any]:
    """The configuration of the VAE that `model.vae` names; for a repository SDXL's, since all have its shape.

    Raises:
        UserError: the path does not exist, and no bundled recipe creates it.
    """
    path = Path(embedded(given)).expanduser()
    for folder in (path / "final" / "vae", path / "vae", path / "final", path):
        if (folder / "config.json").is_file():
            found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return found
    for name in bundled_recipes():
        if given == run_of(name):
            return load_recipe(name).model.build
    if given.count("/") != 1 or given.startswith((".", "~", "runs/")):
        raise UserError(
            f"there is no VAE at {given}", where="model.vae", remedy="train it first, or name an existing one"
        )
    shared: dict[str, Any] = json.loads((CONFIGS / "sdxl" / "vae" / "config.json").read_text(encoding="utf-8"))
    return shared

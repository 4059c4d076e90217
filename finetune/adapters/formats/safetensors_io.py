"""Copy a run's result, and read, cast and hash .safetensors files."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from finetune.errors import UserError
from finetune.paths import public_name

HASH = "sshs_model_hash"


def copy_folder(source: Path, dtype: str | None, target: Path) -> None:
    """Copy `source` to `target`, with the floating-point tensors of every .safetensors file cast to `dtype`.

    Files are cast one by one, not loaded as a pipeline, so metadata and other files stay as they are. Configurations
    keep the dtype of training, so all networks load in float32 unless asked otherwise.
    """
    for path in sorted(source.rglob("*")):
        destination = target / path.relative_to(source)
        if path.is_dir():
            destination.mkdir(parents=True)
            continue
        destination.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors" and dtype is not None:
            tensors, metadata = read(path)
            tensors = cast(tensors, dtype, path)
            save_file(tensors, destination, metadata | (hashes(tensors) if HASH in metadata else {}))
        else:
            shutil.copyfile(path, destination)
    remove_local_paths(target)


def remove_local_paths(folder: Path) -> None:
    """Remove paths of this machine from every configuration in `folder`; names on the hub stay."""
    for path in folder.rglob("*.json"):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(found, dict) and (
            named := [key for key in ("_name_or_path", "name_or_path") if _is_local(found.get(key))]
        ):
            kept = {key: value for key, value in found.items() if key not in named}
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_local(name: object) -> bool:
    return isinstance(name, str) and public_name(name) != name


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a .safetensors file, and its metadata."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()  # not a mapping
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def cast(tensors: dict[str, Tensor], dtype: str, where: Path) -> dict[str, Tensor]:
    """Cast the floating-point tensors to `dtype`.

    Raises:
        UserError: a finite weight would become infinite (float16 ends at 65,504).
    """
    wanted: torch.dtype = getattr(torch, dtype)
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.to(wanted) if tensor.is_floating_point() else tensor
        if tensor.isfinite().all() and not found[name].isfinite().all():
            raise UserError(
                f"{name} has weights too large for {dtype}", where=str(where), remedy="export it as bfloat16 or float32"
            )
    return found


def hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    """SHA-256 of a safetensors file's bytes after its header, as both sd-scripts and ModelSpec name it."""
    content = save(tensors)
    found = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    return {HASH: found, "modelspec.hash_sha256": f"0x{found}"}

"""What a run leaves, in the form that other programs load. Importing this package imports no torch."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal, get_args

from finetune.errors import UserError, did_you_mean
from finetune.recipe import Precision, Recipe, load_recipe

Format = Literal["diffusers", "kohya"]


def export(run: Path, format: str = "diffusers", merge: bool = False, dtype: str | None = None, out: Path | None = None) -> list[Path]:
    """Write a finished run's artefact anew, whole or not at all; nothing that exists is overwritten.

    Args:
        run: the run's folder.
        format: `diffusers` (a LoRA file or a pipeline's folder) or `kohya` (one LoRA file for ComfyUI and A1111).
        merge: a LoRA's whole pipeline, the LoRA added to its weights.
        dtype: float32, float16 or bfloat16 for every weight; none keeps them as they are.
        out: the folder to make, or for kohya the `.safetensors` file; none: inside the run, under `export/`.

    Returns:
        The weight files written.

    Raises:
        UserError: the run is not there or not finished, `out` exists, or the run cannot be written in this form.
    """
    from safetensors import SafetensorError

    recipe = _finished(run)
    _check(recipe, format, merge, dtype)
    name = "-".join(part for part in ("merged" if merge else format, dtype) if part)
    suffix = ".safetensors" if format == "kohya" else ""
    target = out or run / "export" / f"{recipe.name}-{name}{suffix}"
    if target.exists():
        raise UserError(
            f"{target} exists already; nothing in it was touched", where="--out", remedy="choose another place with --out, or remove it yourself"
        )
    if suffix and target.suffix != suffix:
        raise UserError(f'a kohya LoRA is one file, and "{target.name}" does not end in {suffix}', where="--out", remedy=f"--out {target}{suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            _write(run, recipe, format, merge, dtype, aside / target.name)
            os.replace(aside / target.name, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # the second is what safetensors makes of a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{target} could not be written: {reason}", where="--out", remedy="free some space, or choose another place with --out"
        ) from error
    files = [target] if target.is_file() else sorted(target.rglob("*.safetensors"))
    for file in files:
        file.chmod(0o644)  # safetensors writes for the owner alone, and these are made to be given away
    return files


def _write(run: Path, recipe: Recipe, format: str, merge: bool, dtype: str | None, target: Path) -> None:
    if format == "kohya":
        from finetune.export.kohya import write_kohya

        write_kohya(run / "final", recipe, dtype, target)
    elif merge:
        from finetune.export.merge import write_merged

        write_merged(run / "final", recipe, dtype, target)
    else:
        from finetune.export.folder import copy_folder

        copy_folder(run / "final", dtype, target)


def _finished(run: Path) -> Recipe:
    """The recipe of a run whose artefact is there."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is no run's folder: it has no recipe.yaml", remedy="give the folder that `ft train` made, such as runs/lora-emoji")
    if not any((run / "final").rglob("*.safetensors")):
        raise UserError(f"{run} has no final weights yet", remedy=f"finish it: ft train {run / 'recipe.yaml'} --resume")
    return load_recipe(run / "recipe.yaml")


def _check(recipe: Recipe, format: str, merge: bool, dtype: str | None) -> None:
    if format not in get_args(Format):
        raise UserError(f'there is no format "{format}"', where="--format", remedy=did_you_mean(format, get_args(Format)))
    if dtype is not None and dtype not in get_args(Precision):
        raise UserError(f'there is no dtype "{dtype}"', where="--dtype", remedy=did_you_mean(dtype, get_args(Precision)))
    if recipe.method != "lora" and (merge or format == "kohya"):
        raise UserError(
            f"this run is of method {recipe.method}: its weights are whole, there is no LoRA in it",
            remedy="export it without --merge and --format kohya",
        )
    if merge and format == "kohya":
        raise UserError(
            "a merged model is a diffusers folder, and kohya's format is for LoRAs", where="--merge, --format kohya", remedy="leave one of them out"
        )

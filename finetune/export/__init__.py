"""What a run leaves, in the form that other programs load. Importing this package imports no torch."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal, get_args

from finetune.adapters.kinds import kind_of
from finetune.config.loader import load_recipe
from finetune.config.schema import Precision, Recipe
from finetune.errors import UserError, did_you_mean
from finetune.models.registry import has_unet, spec_of

Format = Literal["diffusers", "kohya", "comfyui"]


def export(
    run: Path,
    format: str = "diffusers",
    merge: bool = False,
    dtype: str | None = None,
    out: Path | None = None,
    checkpoint: str | None = None,
) -> list[Path]:
    """Write a run's artifact anew, whole or not at all; nothing that exists is overwritten.

    Args:
        run: the run's folder.
        format: `diffusers` (a LoRA file or a pipeline's folder), or one LoRA file by the names of `kohya` or of `comfyui`.
        merge: a LoRA's whole pipeline, the LoRA added to its weights.
        dtype: float32, float16 or bfloat16 for every weight; none keeps them as they are.
        out: the folder to make, or for the others the `.safetensors` file; none: inside the run, under `export/`.
        checkpoint: `best` (by validation loss), or the steps that the run had taken; none: its end.

    Returns:
        The weight files written.

    Raises:
        UserError: the run is not there or not finished, has no such checkpoint, `out` exists, or the run cannot be written in this form.
    """
    from safetensors import SafetensorError

    recipe = _recipe(run)
    _check(recipe, format, merge, dtype)
    chosen = _chosen(run, checkpoint)
    name = "-".join(part for part in (chosen.name if checkpoint else "", "merged" if merge else format, dtype) if part)
    suffix = "" if format == "diffusers" else ".safetensors"
    target = out or run / "export" / f"{recipe.name}-{name}{suffix}"
    if target.exists():
        raise UserError(
            f"{target} exists already; nothing in it was touched",
            where="--out",
            remedy="choose another place with --out, or remove it yourself",
        )
    if suffix and target.suffix != suffix:
        raise UserError(
            f'a LoRA of this format is one file, and "{target.name}" does not end in {suffix}',
            where="--out",
            remedy=f"--out {target}{suffix}",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            if checkpoint:
                from finetune.export.checkpoint import write_artefact

                chosen, path = Path(tempfile.mkdtemp(dir=aside)), chosen
                write_artefact(run, path, chosen)
            _write(chosen, recipe, format, merge, dtype, aside / target.name)
            os.replace(aside / target.name, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # the second is what safetensors makes of a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{target} could not be written: {reason}",
            where="--out",
            remedy="free some space, or choose another place with --out",
        ) from error
    files = [target] if target.is_file() else sorted(target.rglob("*.safetensors"))
    for file in files:
        file.chmod(0o644)  # safetensors writes for the owner alone, and these are made to be given away
    return files


def _write(final: Path, recipe: Recipe, format: str, merge: bool, dtype: str | None, target: Path) -> None:
    if format != "diffusers" and has_unet(recipe.model.family):  # ComfyUI knows their layers by kohya's names
        from finetune.adapters.formats.kohya import write_kohya

        write_kohya(final, recipe, dtype, target)
    elif format != "diffusers":
        from finetune.adapters.formats.key_maps import write_transformer

        write_transformer(final, recipe, format, dtype, target)
    elif merge:
        from finetune.adapters.merge import write_merged

        write_merged(final, recipe, dtype, target)
    else:
        from finetune.adapters.formats.safetensors_io import copy_folder

        copy_folder(final, dtype, target)


def _recipe(run: Path) -> Recipe:
    if not (run / "recipe.yaml").is_file():
        raise UserError(
            f"{run} is no run's folder: it has no recipe.yaml",
            remedy="give the folder that `ft train` made, such as runs/lora-emoji",
        )
    return load_recipe(run / "recipe.yaml")


def _chosen(run: Path, checkpoint: str | None) -> Path:
    """The folder of the run's artifact, or of a checkpoint."""
    if checkpoint:
        from finetune.export.checkpoint import choose

        return choose(run, checkpoint)
    if not any((run / "final").rglob("*.safetensors")):
        remedy = f"finish it: ft train {run / 'recipe.yaml'} --resume; or export a --checkpoint"
        raise UserError(f"{run} has no final weights yet", remedy=remedy)
    return run / "final"


def _check(recipe: Recipe, format: str, merge: bool, dtype: str | None) -> None:
    if format not in get_args(Format):
        raise UserError(
            f'there is no format "{format}"', where="--format", remedy=did_you_mean(format, get_args(Format))
        )
    if dtype is not None and dtype not in get_args(Precision):
        raise UserError(
            f'there is no dtype "{dtype}"', where="--dtype", remedy=did_you_mean(dtype, get_args(Precision))
        )
    if recipe.method != "lora" and (merge or format != "diffusers"):
        raise UserError(
            f"this run is of method {recipe.method}: its weights are whole, there is no LoRA in it",
            remedy=f"export it without --merge and --format {format}",
        )
    if format != "diffusers" and recipe.adapter is not None and not (kind := kind_of(recipe.adapter)).has_lora_file:
        problem = f"{format}'s format is for LoRAs, and this run trained {kind.title}"
        raise UserError(problem, where="--format", remedy="export it with --merge, or as diffusers")
    known = tuple(spec_of(recipe.model.family).lora_formats)
    if format not in ("diffusers", *known):
        problem = f"{format} has no names for the layers of {recipe.model.family}"
        raise UserError(
            problem, where="--format", remedy=f"export it as {' or '.join(('diffusers', *known))}, or with --merge"
        )
    if merge and format != "diffusers":
        problem = f"a merged model is a diffusers folder, and {format}'s format is for LoRAs"
        raise UserError(problem, where=f"--merge, --format {format}", remedy="leave one of them out")

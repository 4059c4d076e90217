"""Export a run's result in formats that other programs load. Importing this package imports no torch."""

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
# Format → where the programs that read it look for LoRAs.
WHERE = {
    "comfyui": "To use it in ComfyUI, copy the file to ComfyUI/models/loras and load it with a Load LoRA node.",
    "kohya": "To use it, copy the file to models/Lora (A1111, Forge) or to models/loras (ComfyUI).",
}


def export(
    run: Path,
    format: str = "diffusers",
    merge: bool = False,
    dtype: str | None = None,
    out: Path | None = None,
    checkpoint: str | None = None,
) -> list[Path]:
    """Write a run's result in another format.

    Nothing that exists is overwritten, and a failed export leaves nothing behind.

    Args:
        run: the run's folder.
        format: `diffusers` (a LoRA file or a pipeline's folder), or `kohya` or `comfyui` (one LoRA file).
        merge: write the whole pipeline with the LoRA merged into its weights.
        dtype: float32, float16 or bfloat16 for every weight; None keeps their dtypes.
        out: the folder, or the `.safetensors` file; None: inside the run, under `export/`.
        checkpoint: `best` (lowest validation loss) or a number of steps; None: the end of the run.

    Returns:
        The weight files written.

    Raises:
        UserError: the run does not exist, is not finished or has no such checkpoint; `out` exists; or the format
            does not exist for this run.
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
            f"{target} already exists; it was not changed",
            where="--out",
            remedy="choose another path with --out, or remove it",
        )
    if suffix and target.suffix != suffix:
        raise UserError(
            f'this format is one file, and "{target.name}" does not end in {suffix}',
            where="--out",
            remedy=f"--out {target}{suffix}",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            if checkpoint:
                from finetune.export.checkpoint import write_artifact

                chosen, path = Path(tempfile.mkdtemp(dir=aside)), chosen
                write_artifact(run, path, chosen)
            _write(chosen, recipe, format, merge, dtype, aside / target.name)
            os.replace(aside / target.name, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error when the disk is full
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{target} could not be written: {reason}",
            where="--out",
            remedy="free some space, or choose another path with --out",
        ) from error
    files = [target] if target.is_file() else sorted(target.rglob("*.safetensors"))
    for file in files:
        file.chmod(0o644)  # safetensors makes files readable by the owner only, and exports are made to be shared
    return files


def _write(final: Path, recipe: Recipe, format: str, merge: bool, dtype: str | None, target: Path) -> None:
    if format != "diffusers" and has_unet(recipe.model.family):  # ComfyUI uses kohya's names for them
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
            f"{run} is not a run's folder: it has no recipe.yaml",
            remedy="give a folder written by `ft train`, such as runs/lora-emoji",
        )
    return load_recipe(run / "recipe.yaml")


def _chosen(run: Path, checkpoint: str | None) -> Path:
    """The folder with the run's final weights, or of a checkpoint."""
    if checkpoint:
        from finetune.export.checkpoint import choose

        return choose(run, checkpoint)
    if not any((run / "final").rglob("*.safetensors")):
        remedy = f"finish it (ft train {run / 'recipe.yaml'} --resume), or export a checkpoint (--checkpoint best)"
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
            f"a run of method {recipe.method} trains all weights and contains no LoRA",
            remedy=f"export it without --merge and without --format {format}",
        )
    if format != "diffusers" and recipe.adapter is not None and not (kind := kind_of(recipe.adapter)).has_lora_file:
        problem = f"the {format} format is for LoRA only, and this run trained {kind.title}"
        raise UserError(problem, where="--format", remedy="export it with --merge, or as diffusers")
    known = tuple(spec_of(recipe.model.family).lora_formats)
    if format not in ("diffusers", *known):
        problem = f"the {format} format does not exist for family {recipe.model.family}"
        raise UserError(
            problem, where="--format", remedy=f"export it as {' or '.join(('diffusers', *known))}, or with --merge"
        )
    if merge and format != "diffusers":
        problem = f"a merged model is a diffusers folder, and the {format} format is for LoRA only"
        raise UserError(problem, where=f"--merge, --format {format}", remedy="use one of the two")

"""What can be refused before torch is imported: a mistake should cost a second, not half a minute."""

from __future__ import annotations

from pathlib import Path

from finetune.config.loader import error_location
from finetune.config.schema import Recipe
from finetune.data.sources import refuse_missing
from finetune.errors import UserError
from finetune.models.pretrained import check
from finetune.paths import embedded
from finetune.planning import folder_of
from finetune.training.run_folder import refuse_existing


def refuse_early(recipe: Recipe, resume: bool = True) -> None:
    """Refuse a model or a data folder that is not there and, without `resume`, a run folder that is.

    Raises:
        UserError: with the file and line of the key.
    """
    with error_location(recipe):
        check.check(recipe)
        refuse_missing(recipe.data)
        if not resume:
            refuse_existing(folder_of(recipe))


def refuse_missing_run(run: str) -> None:
    """Refuse a run, or a model's folder, that is not there.

    Raises:
        UserError: with what may be given.
    """
    if not Path(embedded(run)).expanduser().is_dir():
        raise UserError(
            f'there is no run "{run}"',
            remedy="give a run's folder (`ft runs` lists them), a diffusers folder, or embedded:base",
        )


def refuse_existing_output(out: Path | None) -> None:
    """Refuse to write to a file, or to a folder with content, that is already there.

    Raises:
        UserError: it names `--out`.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out} already exists; nothing in it was changed", where="--out", remedy="choose another place with --out"
        )

"""What can be refused before torch is imported: a mistake should cost a second, not half a minute."""

from __future__ import annotations

from finetune.config.loader import located
from finetune.config.schema import Recipe
from finetune.data.sources import refuse_missing
from finetune.models.pretrained import check
from finetune.planning import folder_of
from finetune.training.run_folder import refuse_existing


def refuse_early(recipe: Recipe, resume: bool = True) -> None:
    """Refuse a model or a data folder that is not there and, without `resume`, a run folder that is.

    Raises:
        UserError: with the file and line of the key.
    """
    with located(recipe):
        check.check(recipe)
        refuse_missing(recipe.data)
        if not resume:
            refuse_existing(folder_of(recipe))

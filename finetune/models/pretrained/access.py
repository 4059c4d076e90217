"""Check that a base model can be opened, from headers and folder listings: no weight is loaded.

`ft train` refuses the same when it opens the model; here it takes a second, and `ft check` says it too.
"""

from __future__ import annotations

from typing import Any

from safetensors import safe_open

from finetune.config.schema import Recipe
from finetune.models.pretrained import loading
from finetune.models.pretrained.single_file import identify, require_class
from finetune.models.registry import spec_of

NETWORKS = ("unet", "transformer", "vae", "text_encoder")  # beginnings of the names of a pipeline's networks
SAFETY_CHECKER = ("safety_checker", "feature_extractor", "image_encoder")  # of a pipeline; not loaded


def check(recipe: Recipe) -> int | None:
    """Check the files of the base model, and access to the Hub where it is not in the local cache.

    Returns:
        Bytes of the model's local files; None for a model on the Hub, 0 where no base is needed.

    Raises:
        UserError: it does not exist, is incomplete or of another class, or the Hub cannot be reached or refuses it.
    """
    section = recipe.model
    if section.path is None or recipe.method == "scratch" or not spec_of(section.family).pretrained:
        return 0
    given, wanted = section.path, spec_of(section.family).pipeline
    path = loading.place(given, "model.path")
    with loading.explained(given, "model.path"):
        if path is not None and path.is_file():
            identify(path, wanted, has_vae=section.vae is not None)
            return path.stat().st_size
        index = loading.read_index(path or loading.hub_folder(given))
        require_class(index["_class_name"], wanted, given)
        loading.refuse_foreign(index, given)
        replaced: dict[str, Any] = dict.fromkeys(SAFETY_CHECKER) if wanted == "StableDiffusionPipeline" else {}
        replaced |= {name: None for name in ("vae", "transformer") if getattr(section, name) is not None}
        if path is None:
            _check_hub(given, [name for name in index if name.startswith(NETWORKS) and name not in replaced])
            return None
        loading.require_pieces(path, index, replaced)
        files = [file for name in index if name not in replaced for file in (path / name).glob("*.safetensors")]
        for file in files:
            with safe_open(file, framework="pt"):  # compares the header with the file's size
                pass
        return sum(file.stat().st_size for file in files)


def _check_hub(given: str, networks: list[str]) -> None:
    """Raise as the Hub's client does if the weights are neither in the local cache nor to be had."""
    folder = loading.hub_folder(given)
    if all(any((folder / name).glob("*.safetensors")) for name in networks):
        return
    loading.ask_hub(given)

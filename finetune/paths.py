"""Where bundled files live: assets, recipes, and the default run folder."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import UserError

_PACKAGE = Path(__file__).resolve().parent


ASSETS = _PACKAGE / "assets"


# An installed package carries the recipes inside; in a checkout they lie beside it.
RECIPES = next(folder for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if folder.is_dir())


def embedded(path: str) -> str:
    """`embedded:base` → the folder inside the package, `embedded:emoji/noto` → its archive; anything else as it is.

    Raises:
        UserError: it would lead out of the package.
    """
    if not path.startswith("embedded:"):
        return path
    inside = ASSETS / path.removeprefix("embedded:")
    if not inside.resolve().is_relative_to(ASSETS):
        raise UserError(f"{path} leads out of the package", remedy="give the folder's own path")
    archive = inside.with_name(f"{inside.name}.tar")
    return str(archive if archive.is_file() else inside)


def public_name(path: str) -> str:
    """Return the name of a model or folder for published files: a Hub or embedded name, or a local path's last part."""
    given = Path(path).expanduser()
    if path.startswith("embedded:") or (
        path.count("/") == 1 and not path.startswith((".", "/", "~")) and not given.exists()
    ):
        return path
    return given.stem if given.suffix == ".safetensors" else given.name


def run_of(name: str) -> str:
    """Return the default folder of a bundled recipe's run."""
    return f"runs/{name.replace('/', '-')}"

"""The folder of the project's caches. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(setting: str | None) -> Path:
    """The recipe's `data.cache`, else $FT_CACHE, else the user's cache folder."""
    if setting:
        return Path(setting).expanduser()
    if os.environ.get("FT_CACHE"):
        return Path(os.environ["FT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "finetune"

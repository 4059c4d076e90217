"""Where the project keeps on a machine what it computes once. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(wanted: str | None) -> Path:
    """The recipe's `data.cache`, else $FT_CACHE, else the user's cache folder."""
    if wanted:
        return Path(wanted).expanduser()
    if os.environ.get("FT_CACHE"):
        return Path(os.environ["FT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "finetune"

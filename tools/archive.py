"""Write and read WebDataset shards of bundled images. Equal contents give equal bytes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from finetune.config.schema import Data, Source
from finetune.data.sources import entries
from finetune.data.sources.entry import Entry
from finetune.paths import embedded


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write (name, content) pairs in the given order, without times and owners."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def bundled(name: str) -> dict[str, Entry]:
    """The images of a bundled dataset, such as `emoji/noto`, by name, in their order."""
    shard = embedded(f"embedded:{name}")
    found = (entry for entry in entries(Source(shard), Data()) if isinstance(entry, Entry))
    return {entry.name.removeprefix(f"{shard}/"): entry for entry in found}

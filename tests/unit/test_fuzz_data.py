"""Any bytes in a caption, metadata file, image, shard or cache give a value or a clear error."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from finetune.config.schema import Data
from finetune.data.audit.inspect import inspect
from finetune.data.latent_cache import Store, _header, _read
from finetune.data.media.image import Unreadable
from finetune.data.sources.captions import Captions
from finetune.data.sources.entry import Entry, Problem
from finetune.data.sources.webdataset import samples
from finetune.errors import UserError
from tests.helpers import corpus
from tests.unit.test_cache import tensors
from tests.unit.test_shards import shard

# FT_FUZZ=20 runs twenty times as many examples.
many = settings(deadline=None, max_examples=250 * int(os.environ.get("FT_FUZZ", "1")))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def damaged(whole: bytes, cut: int, changes: list[tuple[int, int]]) -> bytes:
    """`whole` with some bytes changed, and perhaps with its end cut off."""
    content = bytearray(whole)
    for place, value in changes:
        content[place % len(content)] = value
    return bytes(content[: cut % (len(content) + 1)] if cut else content)


changes = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=6)
cuts = st.one_of(st.just(0), st.integers(0, 1 << 20))


@example(content=b"\xef")  # half a byte order mark
@given(
    content=st.one_of(
        st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
    )
)
@many
def test_captions_of_any_bytes_are_decoded_or_reported(folder: Path, content: bytes) -> None:
    (folder / "a.txt").write_bytes(content)
    found = Captions(folder, ["a.png", "a.txt"], "text").of("a.png")
    if found.problem:
        assert "not UTF-8" in found.problem
    else:
        assert found.text is not None
        assert found.text == " ".join(content.decode("utf-8-sig").split())


names = st.one_of(
    st.sampled_from(["a.png", "./a.png", "../a.png", "/etc/passwd", "x/../../a.png", "a.png\0", ""]),
    st.text(max_size=12),
    st.integers(),
    st.none(),
)
values = st.one_of(
    st.text(max_size=12),
    st.integers(),
    st.floats(),
    st.none(),
    st.lists(st.text(max_size=3), max_size=2),
    st.booleans(),
)
rows = st.dictionaries(st.sampled_from(["file_name", "text", "other"]), st.one_of(names, values), max_size=3)
jsonl = st.lists(st.one_of(rows.map(json.dumps), st.text(max_size=30)), max_size=5).map("\n".join)
deep = st.integers(1, 3000).map(lambda depth: '{"file_name": ' + "[" * depth)
table = st.lists(
    st.lists(st.text(alphabet='ab",;\n\r\0é ', max_size=6), min_size=1, max_size=3).map(",".join), max_size=4
).map("\n".join)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@given(data=st.data())
@many
def test_metadata_of_any_bytes_is_read_or_refused(folder: Path, kind: str, data: st.DataObject) -> None:
    text = data.draw(
        st.one_of(jsonl, deep) if kind == "jsonl" else st.one_of(table, table.map("file_name,text\n{}".format))
    )
    content = data.draw(st.one_of(st.just(text.encode("utf-8", "surrogatepass")), st.binary(max_size=60)))
    inside = folder / kind
    inside.mkdir(exist_ok=True)
    file = inside / f"metadata.{kind}"
    file.write_bytes(content)
    try:
        found = Captions(inside, ["a.png", file.name], "text")
        caption = found.of("a.png")
        told = list(found.unused())
    except UserError as error:
        assert error.where.startswith(str(file))
        assert error.remedy
        return
    assert caption.text is None or isinstance(caption.text, str)
    assert all("does not exist" in why or "outside" in why for _, why, _ in told)


WHOLE = {
    "png": corpus.saved(corpus.halves(), "PNG"),
    "palette": corpus.saved(corpus.halves().convert("P"), "PNG", transparency=0),
    "jpeg": corpus.saved(corpus.halves(), "JPEG"),
    "cmyk": corpus.saved(corpus.halves().convert("CMYK"), "JPEG"),
    "gif": corpus.saved(corpus.halves(), "GIF", save_all=True, append_images=[corpus.halves((64, 64))]),
    "tiff": corpus.saved(corpus.halves(), "TIFF", compression="tiff_lzw"),
    "webp": corpus.saved(corpus.halves(), "WEBP"),
    "bmp": corpus.saved(corpus.halves(), "BMP"),
    "avif": corpus.saved(corpus.halves(), "AVIF"),
    "exif": corpus.saved(
        corpus.halves(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    ),
}


@given(kind=st.sampled_from(sorted(WHOLE)), cut=cuts, changes=changes)
@settings(many, max_examples=2 * many.max_examples)
@example(kind="png", cut=30, changes=[])
def test_damaged_image_is_read_or_refused(kind: str, cut: int, changes: list[tuple[int, int]]) -> None:
    try:
        found = inspect(damaged(WHOLE[kind], cut, changes), "#ffffff")
    except Unreadable as error:
        assert str(error)
    else:
        assert min(found.size) >= 1
        assert len(found.fingerprint) == 28


@given(cut=cuts, changes=changes)
@many
def test_damaged_shard_gives_entries_or_problems(folder: Path, cut: int, changes: list[tuple[int, int]]) -> None:
    whole = folder / "whole.tar"
    if not whole.exists():
        shard(
            whole,
            [
                ("a/b.png", WHOLE["png"]),
                ("a/b.txt", b"words"),
                ("../c.jpg", WHOLE["jpeg"]),
                ("../c.json", b'{"text": "more"}'),
            ],
        )
    broken = folder / "broken.tar"
    broken.write_bytes(damaged(whole.read_bytes(), cut, changes))
    size = broken.stat().st_size
    for found in samples(broken, "broken.tar", Data(path="."), {".png", ".jpg"}):
        assert isinstance(found, Entry | Problem)
        if isinstance(found, Entry):
            assert len(found.read()) <= size  # read from this file only


@given(cut=cuts, changes=changes)
@many
def test_damaged_cache_shard_is_read_or_refused(folder: Path, cut: int, changes: list[tuple[int, int]]) -> None:
    """An arbitrary header is refused, or read within the bounds of the file."""
    store = folder / "store"
    if not store.exists():
        filled = Store(store)
        filled.put("key", tensors(1))
        filled.flush()
    whole = next(store.glob("*.safetensors"))
    broken = folder / "broken.safetensors"
    broken.write_bytes(damaged(whole.read_bytes(), cut, changes))
    try:
        for entry in _header(broken).values():
            _read(broken, entry)
    except (ValueError, OSError, SafetensorError):
        pass


def test_cache_shard_with_a_changed_header_is_not_read(folder: Path) -> None:
    """The name of a shard is the hash of its bytes, so a changed header makes it invalid."""
    store = folder / "named"
    filled = Store(store)
    filled.put("key", tensors(1))
    filled.flush()
    file = next(store.glob("*.safetensors"))
    file.write_bytes(file.read_bytes().replace(b'"key|ids"', b'"kez|ids"'))
    assert "key" not in Store(store)
    assert "kez" not in Store(store)

"""Data beyond one disk: shards read in place, streams read in order; untrusted data sets cannot reach other files."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from finetune.config.schema import Data
from finetune.data.audit.audit import scan
from finetune.data.media.image import Unreadable
from finetune.data.sampler import Order
from finetune.data.sources import huggingface
from finetune.errors import UserError
from finetune.rng import Draw
from tests.unit.test_data import data, problems, snapshot
from tests.unit.test_dataset import Counting, opened
from tools.archive import bundled


def png(number: int, size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 50, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def member(name: str, **changes: Any) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    for key, value in changes.items():
        setattr(found, key, value)
    return found


def shard(path: Path, files: list[tuple[str, bytes]], *special: tarfile.TarInfo) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            archive.addfile(member(name, size=len(content)), io.BytesIO(content))
        for one in special:
            archive.addfile(one)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Seven images in three shards; the same images lie in a folder next to them."""
    (tmp_path / "plain").mkdir()
    for number in range(7):
        (tmp_path / "plain" / f"{number}.png").write_bytes(png(number))
        (tmp_path / "plain" / f"{number}.txt").write_text(f"number {number}")
    for start in (0, 3, 6):
        files = [
            (f"{n}.{kind}", (tmp_path / "plain" / f"{n}.{kind}").read_bytes())
            for n in range(start, min(start + 3, 7))
            for kind in ("png", "txt")
        ]
        shard(tmp_path / "shards" / f"{start}.tar", files)
    return tmp_path / "shards"


def test_shards_give_the_images_and_captions_of_the_folder(shards: Path) -> None:
    before = snapshot(shards)
    found, plain = scan(data(shards)), scan(data(shards.parent / "plain"))
    assert [(p.digest, p.caption, p.crop) for p in found.images] == [
        (p.digest, p.caption, p.crop) for p in plain.images
    ]
    assert [p.read() for p in reversed(found.images)] == [p.read() for p in reversed(plain.images)]
    assert found.images[4].name == str(shards / "3.tar/4.png")
    assert found.problems == ()
    assert [p.caption for p in scan(data(shards / "3.tar")).images] == ["number 3", "number 4", "number 5"]
    assert snapshot(shards) == before


def test_batches_from_shards_match_those_from_the_folder(shards: Path) -> None:
    both = [opened(folder, Counting(cached=False)) for folder in (shards, shards.parent / "plain")]
    for step in (0, 1, 2, 30, 31, 5):  # including jumps, as after a resume
        ours, theirs = (each.batch(step, range(4), Draw(3, step, range(4))) for each in both)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_shard_captions_in_json_are_read_and_other_files_reported(tmp_path: Path) -> None:
    words = {"a": {"text": "from  json"}, "b": {"text": 3}, "c": {}, "d": "no object"}
    files = [
        (f"{key}.{kind}", png(number) if kind == "jpg" else json.dumps(words[key]).encode())
        for number, key in enumerate(words)
        for kind in ("jpg", "json")
    ]
    files += [
        ("e.png", png(9)),
        ("e.txt", b"a caf\xe9"),
        ("f.txt", b"alone"),
        ("g.png", png(8)),
        ("g.seg.png", b"mask"),
        ("g.cls", b"3"),
        (".hidden.png", b""),
    ]
    shard(tmp_path / "s" / "a.tar", files)
    audit = scan(data(tmp_path / "s", missing_captions="skip"))
    assert [p.caption for p in audit.images] == ["from json"]
    assert {name: detail.split(":")[0] for name, (_, detail) in problems(audit).items()} == {
        "b.jpg": '"text" in b.json is not text',
        "c.jpg": "it has no caption, so it is not used",
        "d.jpg": '"text" in d.json is not text',
        "e.png": "e.txt is not UTF-8 (byte 5)",
        "f.txt": "no image has this name",
        "g.png": "it has no caption, so it is not used",
        "g.seg.png": 'files ".seg.png" in shards are not read',
        "g.cls": 'files ".cls" in shards are not read',
    }


def test_shard_images_in_folders_take_the_folder_as_class(tmp_path: Path) -> None:
    files = [("cat/a.png", png(1)), ("x/dog/b.png", png(2)), ("x/dog/b.txt", b"not read"), ("c.png", png(3))]
    found = scan(data(shard(tmp_path / "a.tar", files), classes="folders"))
    assert [(p.name.rpartition("/")[2], p.caption) for p in found.images] == [("a.png", "cat"), ("b.png", "dog")]
    assert [(p.kind, p.stops) for p in found.problems] == [("missing class", True)]


def test_bundled_archives_are_read_in_place() -> None:
    digits = scan(Data(path="embedded:digits/validation", resolution=8, buckets=False, classes="folders"))
    assert len(digits.images) == 350 and {p.caption for p in digits.images} == set("0123456789")
    rocket = next(entry for name, entry in bundled("emoji/noto").items() if name == "rocket.webp")
    assert rocket.caption == "rocket"
    # Equal to the digest of the same images in a folder, as runs from before the archives store it.
    noto = scan(Data(path="embedded:emoji/noto", resolution=64))
    assert noto.digest() == "3823d07cefc9930df597b9cbf4fdeff97a85b1088ad5631ee6607e765daa52ce"


def test_damaged_shards_and_special_files_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    good = [("a.png", png(1)), ("a.txt", b"a"), ("b.png", png(2)), ("b.txt", b"b")]
    whole = shard(folder / "1.tar", good).read_bytes()
    (folder / "2.tar").write_bytes(whole[: 512 * 5 + 10])  # within b.png
    (folder / "3.tar").write_bytes(whole[: 512 * 4])  # between two files: only the end mark is missing
    (folder / "4.tar").write_bytes(whole[: 512 * 4] + b"\xff" * 512 + whole[512 * 5 :])  # b.png's header
    (folder / "5.tar").write_bytes(b"no tar at all")
    (folder / "6.tar").write_bytes(b"")
    links = [
        member("out.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("hard.png", type=tarfile.LNKTYPE, linkname="a.png"),
    ]
    shard(
        folder / "7.tar",
        [("../../up.png", png(3)), ("../../up.txt", b"up"), ("/etc/abs.png", png(4))],
        *links,
        member("fifo.png", type=tarfile.FIFOTYPE),
    )
    (folder / "8.tar").symlink_to(shard(tmp_path / "outside.tar", good))
    audit = scan(data(folder, unreadable_images="skip", missing_captions="empty"))
    assert [(Path(p.name).parts[-1], p.caption) for p in audit.images] == [
        *[("a.png", "a")] * 1,
        ("b.png", "b"),
        *[("a.png", "a")] * 3,
        ("up.png", "up"),
        ("abs.png", ""),
    ]
    kinds = [(Path(p.name).name, p.kind) for p in audit.problems if p.kind != "missing caption"]
    assert kinds == [
        ("b.png", "damaged shard"),
        *[(f"{n}.tar", "damaged shard") for n in (3, 4, 5, 6)],
        *[(name, "unreadable image") for name in ("out.png", "hard.png", "fifo.png")],
        ("8.tar", "damaged shard"),
    ]
    with pytest.raises(UserError, match="6 damaged shards and 3 unreadable images"):
        scan(data(folder, missing_captions="empty")).raise_if_stopped()


def test_shards_among_images_are_reported_as_unused(shards: Path) -> None:
    (shards / "sub").mkdir()
    (shards / "sub" / "a.png").write_bytes(png(1))
    (shards / "sub" / "a.txt").write_text("a")
    audit = scan(data(shards))
    assert [p.caption for p in audit.images] == ["a"]
    assert [(Path(p.name).name, p.kind) for p in audit.problems] == [(f"{n}.tar", "unused shard") for n in (0, 3, 6)]


def test_order_over_shards_is_shuffled_globally() -> None:
    """A pass is a uniform permutation, so neighbors come from the same one of ten shards with probability 1/10."""
    order = Order([range(5000)], 10, 500, 4)
    drawn = numpy.array(list(itertools.chain.from_iterable(order.batch(step) for step in range(500))))
    assert sorted(drawn) == list(range(5000))
    same = (drawn[1:] // 500 == drawn[:-1] // 500).mean()
    assert abs(same - 0.1) < 4 * (0.1 * 0.9 / 4999) ** 0.5
    assert abs(numpy.corrcoef(drawn, numpy.arange(5000))[0, 1]) < 4 / 5000**0.5


# -- Hugging Face data sets -----------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Nine rows in three files."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    (tmp_path / "rows" / "data").mkdir(parents=True)
    for start in (0, 3, 6):
        cells = {
            "image": [{"bytes": png(n), "path": None} for n in range(start, start + 3)],
            "text": [f"number {n}" for n in range(start, start + 3)],
        }
        datasets.Dataset.from_dict(cells, features=features).to_parquet(
            str(tmp_path / "rows" / "data" / f"train-{start}-of-9.parquet")
        )
    return tmp_path / "rows"


def test_stream_gives_the_same_examples_as_the_data_set(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "RECENT_ROWS", 2)
    monkeypatch.setattr(huggingface, "STATE_ROWS", 2)
    streamed, whole = scan(data(parquet, streaming=True)), scan(data(parquet))
    assert list(streamed.images) == list(whole.images)
    assert [p.caption for p in streamed.images] == [f"number {n}" for n in range(9)]
    sent, table = (
        pickle.loads(pickle.dumps(audit)) for audit in (streamed, whole)
    )  # as one process sends them to the others
    assert list(sent.images) == list(whole.images) and sent.findings == streamed.findings
    for number in (8, 0, 7, 7, 3, 4, 5, 1, 8):
        assert streamed.images[number].read() == whole.images[number].read()
        assert sent.images[number].read() == table.images[number].read() == whole.images[number].read()


@pytest.mark.parametrize("cached", [True, False])
def test_stream_is_read_once_for_the_audit_and_once_for_the_cache(
    parquet: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ready(streaming: bool) -> Any:
        found = opened(
            parquet, Counting(cached=cached, caption_key="caption" if cached else ""), data={"streaming": streaming}
        )
        found.encode()
        return found

    streamed, whole = ready(True), ready(False)
    monkeypatch.setattr(huggingface._Stream, "read", lambda self, number, column: pytest.fail("asked the stream again"))
    for step in (0, 1, 7, 3):
        ours, theirs = (each.batch(step, range(4), Draw(3, step, range(4))) for each in (streamed, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_encode_with_shares_splits_the_work_between_processes(shards: Path) -> None:
    encoders = [Counting(), Counting()]
    both = [opened(shards, each, processes=2) for each in encoders]
    for number, each in enumerate(both):
        each.encode(share=(number, 2))
    assert [each.images for each in encoders] == [3, 4]
    assert not any(each.released for each in encoders)
    for each in both:
        each.encode()
    assert [each.images for each in encoders] == [3, 4]
    assert all(each.released for each in encoders)


# -- trust ----------------------------------------------------------------------------------------------------------------


def secret(tmp_path: Path) -> Path:
    """A data set in another folder, which must stay out of reach."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(1), "path": None}], "text": ["secret"]}, features=features
    )
    table.save_to_disk(str(tmp_path / "secret"))
    table.to_parquet(str(tmp_path / "secret.parquet"))
    return tmp_path / "secret"


@pytest.mark.parametrize("way", ["data file", "split", "link"])
def test_data_set_that_names_files_outside_its_folder_is_refused(tmp_path: Path, parquet: Path, way: str) -> None:
    hidden, folder = secret(tmp_path), tmp_path / "stranger"
    folder.mkdir()
    if way == "data file":
        arrow = next(hidden.glob("*.arrow")).name
        (folder / "dataset_info.json").write_bytes((hidden / "dataset_info.json").read_bytes())
        (folder / "state.json").write_text((hidden / "state.json").read_text().replace(arrow, f"../secret/{arrow}"))
    elif way == "split":
        (folder / "dataset_dict.json").write_text('{"splits": ["../secret"]}')
    else:
        (folder / "train.parquet").symlink_to(tmp_path / "secret.parquet")
    with pytest.raises(UserError, match="outside its folder"):
        scan(data(folder))


def test_data_set_code_is_not_run_and_its_readme_is_ignored(tmp_path: Path, parquet: Path) -> None:
    secret(tmp_path)
    canary = tmp_path / "ran"
    for name in (parquet.name, "dataset", "train"):
        (parquet / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')")
    (parquet / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ../secret.parquet\n---\n")
    assert [p.caption for p in scan(data(parquet)).images] == [f"number {n}" for n in range(9)]
    assert not canary.exists()


def test_hub_data_set_that_names_foreign_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    secret(tmp_path)

    def of(files: str, module: str = "datasets.packaged_modules.parquet.parquet") -> Any:
        return type("Builder", (SimpleNamespace,), {"__module__": module})(
            config=SimpleNamespace(data_files={"train": [files]})
        )

    for files in (
        str(tmp_path / "secret.parquet"),
        "https://elsewhere/x.parquet",
        "hf://datasets/other/one@1/x.parquet",
        "hf://datasets/a/b@1/../x",
    ):
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, files=files: of(files))
        with pytest.raises(UserError, match="refers to a file outside its repository"):
            scan(Data(path="a/b"))
    monkeypatch.setattr(
        datasets,
        "load_dataset_builder",
        lambda name: of("hf://datasets/a/b@1/x.pkl", "datasets.packaged_modules.pandas.pandas"),
    )
    with pytest.raises(UserError, match="pandas files, which are not supported"):
        scan(Data(path="a/b"))


def test_hub_row_that_names_a_local_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "mine.png").write_bytes(png(1))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "theirs.png").write_bytes(png(2))
    (tmp_path / "cache" / "link.png").symlink_to(tmp_path / "mine.png")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    place = huggingface._Place(None, "a/b")
    assert place.bytes_of({"bytes": None, "path": str(tmp_path / "cache" / "theirs.png")}) == png(2)
    for path in (
        tmp_path / "mine.png",
        tmp_path / "cache" / ".." / "mine.png",
        tmp_path / "cache" / "link.png",
        os.path.relpath(tmp_path / "mine.png"),
    ):
        with pytest.raises(Unreadable, match="outside"):
            place.bytes_of({"bytes": None, "path": str(path)})
    assert huggingface.on_hub("zip://a.png::hf://datasets/a/b@1/x.zip", "a/b")
    assert not huggingface.on_hub("zip://a.png::https://elsewhere/hf://datasets/a/b@1/x.zip", "a/b")
    assert not huggingface.on_hub("hf://datasets/a/b-other@1/x.zip", "a/b")

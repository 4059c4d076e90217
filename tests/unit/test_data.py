"""Images, captions and the audit: what trains, what does not and why; the user's folder is never written."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.config.schema import Data, Source
from finetune.data.audit.audit import Audit, scan
from finetune.data.audit.index import Index
from finetune.data.buckets import fit
from finetune.data.example import Example
from finetune.data.media.image import decode, upright
from finetune.data.shape import ImageShape
from finetune.errors import UserError
from finetune.report import tables

# -- the audit of folders ---------------------------------------------------------------------------------------------


def put(
    folder: Path, name: str, color: str = "red", size: tuple[int, int] = (16, 16), caption: str | None = None
) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return file


def data(path: Path, **changes: Any) -> Data:
    return Data(**{"path": str(path), "resolution": 16, "bucket_step": 8, **changes})


def captions(audit: Audit) -> dict[str, str]:
    return {Path(image.name).name: image.caption for image in audit.images}


def problems(audit: Audit) -> dict[str, tuple[str, str]]:
    return {Path(problem.name).name: (problem.kind, problem.detail) for problem in audit.problems}


def test_text_files_beside_nested_images_are_their_captions(tmp_path: Path) -> None:
    put(tmp_path, "a.png", caption="\ufeff one \n two\t")
    put(tmp_path, "b/c.d.JPG", caption="deep")
    put(tmp_path, ".hidden/e.png")
    put(tmp_path, "._f.png")
    audit = scan(data(tmp_path))
    assert captions(audit) == {"a.png": "one two", "c.d.JPG": "deep"}
    assert not audit.problems


def test_audit_orders_images_by_path(tmp_path: Path) -> None:
    """A resumed run needs the same order."""
    names = ("b.png", "a.png", "a/z.png", "a/B.png", "a/c/d.png", "a-b.png", "ab/0.png", "Z.png", "a/c.png")
    for name in names:
        put(tmp_path, name, "red", (32, 32), caption="x")
    expected = sorted(tmp_path / name for name in names)
    assert [Path(image.name) for image in scan(data(tmp_path)).images] == expected


def test_several_sources_apply_repeats_and_prefix(tmp_path: Path) -> None:
    put(tmp_path / "one", "a.png", "red", caption="a cat")
    put(tmp_path / "one", "b.png", "blue")
    put(tmp_path / "two", "c.png", "green", (32, 8), caption="a dog")
    sources = (Source(str(tmp_path / "one"), repeats=3, prefix="sks style,"), Source(str(tmp_path / "two")))
    audit = scan(Data(sources=sources, resolution=32, bucket_step=8, missing_captions="empty"))
    assert captions(audit) == {"a.png": "sks style, a cat", "b.png": "sks style,", "c.png": "a dog"}
    assert [image.repeats for image in audit.images] == [3, 3, 1]
    assert audit.bucket_counts() == {ImageShape(32, 32): 6, ImageShape(24, 40): 1}
    assert [(found.count, found.examples) for found in audit.findings if found.kind == "no caption"] == [(1, ((1,),))]
    assert not audit.problems


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "data", tmp_path / "elsewhere"
    put(inside, "a.png", caption="mine")
    secret = put(outside, "secret.png", "blue", caption="secret")
    (inside / "out.png").symlink_to(secret)
    (inside / "out.txt").symlink_to(outside / "secret.txt")
    (inside / "folder").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    (inside / "broken.png").symlink_to(inside / "nothing.png")
    (inside / "again.png").symlink_to(inside / "a.png")
    (inside / "again.txt").symlink_to("a.txt")
    os.mkfifo(inside / "pipe.png")
    audit = scan(data(inside, unreadable_images="skip"))
    assert captions(audit) == {"a.png": "mine", "again.png": "mine"}
    found = problems(audit)
    assert found.keys() == {"out.png", "out.txt", "folder", "loop", "broken.png", "pipe.png"}
    assert {kind for kind, _ in found.values()} == {"unreadable image"}
    assert all(
        "link" in detail for name, (_, detail) in found.items() if name in ("out.png", "out.txt", "folder", "loop")
    )
    with pytest.raises(UserError, match="6 unreadable images"):
        scan(data(inside)).raise_if_stopped()


def test_unreadable_images_stop_the_run_or_are_skipped_by_name(tmp_path: Path) -> None:
    put(tmp_path, "fine.png", caption="fine")
    jpeg = put(tmp_path, "cut.jpg", size=(64, 64), caption="cut")
    jpeg.write_bytes(jpeg.read_bytes()[:-20])
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "phone.txt").write_text("from a phone")
    put(tmp_path, "nothing.png", caption="nothing").write_bytes(b"")
    audit = scan(data(tmp_path, unreadable_images="skip"))
    assert captions(audit) == {"fine.png": "fine"}
    assert {name: kind for name, (kind, _) in problems(audit).items()} == dict.fromkeys(
        ("cut.jpg", "phone.heic", "nothing.png"), "unreadable image"
    )
    shown = tables.data(audit)
    assert "1 image" in shown
    assert all(name in shown for name in ("cut.jpg", "phone.heic", "nothing.png", "truncated", "empty"))
    with pytest.raises(UserError, match="3 unreadable images") as caught:
        scan(data(tmp_path)).raise_if_stopped()
    assert all(name in caught.value.where for name in ("cut.jpg", "phone.heic", "nothing.png"))
    assert "unreadable_images: skip" in caught.value.remedy


@pytest.fixture
def read_counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often images were read and decoded; new files count as settled."""
    found: Counter[str] = Counter()
    read_bytes = Path.read_bytes

    def counting_read(self: Path) -> bytes:
        if self.suffix == ".png":
            found["read"] += 1
        return read_bytes(self)

    def counting_decode(image: Image.Image, background: str) -> Image.Image:
        found["decoded"] += 1
        return upright(image, background)

    monkeypatch.setattr(Path, "read_bytes", counting_read)
    monkeypatch.setattr("finetune.data.audit.inspect.upright", counting_decode)
    monkeypatch.setattr("finetune.data.audit.cache.SETTLED_SECONDS", -1)
    return found


def test_scan_reads_each_image_once_and_reports_progress(tmp_path: Path, read_counts: Counter[str]) -> None:
    for number in range(4):
        put(tmp_path / "data", f"{number}.png", f"rgb({number}, 7, 7)", caption="x")
    told: list[tuple[int, str]] = []
    scan(
        data(tmp_path / "data", cache=str(tmp_path / "cache")), lambda seen, name: told.append((seen, Path(name).name))
    )
    assert read_counts == {"read": 4, "decoded": 4}
    assert told == [(number, f"{number}.png") for number in range(4)]


def test_second_scan_reads_only_new_files(tmp_path: Path, read_counts: Counter[str]) -> None:
    folder = tmp_path / "data"
    for number in range(3):
        put(folder, f"{number}.png", f"rgb({number}, 7, 7)", (16 + number, 16), caption="x")
    put(folder, "broken.png", caption="x").write_bytes(b"broken")
    recipe = data(folder, cache=str(tmp_path / "cache"), unreadable_images="skip")

    def rescan() -> tuple[Audit, dict[str, int]]:
        read_counts.clear()
        return scan(recipe), dict(read_counts)

    first, _ = rescan()
    second, cost = rescan()
    assert cost == {}
    assert (list(second.images), second.problems, second.findings) == (
        list(first.images),
        first.problems,
        first.findings,
    )
    # The same size, and the old modification time restored: only the change time differs.
    times = (folder / "1.png").stat()
    put(folder, "1.png", "rgb(9, 7, 7)", (17, 16))
    os.utime(folder / "1.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    (folder / "2.png").rename(folder / "3.png")
    (folder / "2.txt").rename(folder / "3.txt")
    third, cost = rescan()
    assert cost == {"read": 2, "decoded": 1}  # a renamed file is recognized by its bytes
    assert [p.digest for p in third.images] != [p.digest for p in first.images]
    assert third.images[1].digest == hashlib.sha256((folder / "1.png").read_bytes()).hexdigest()
    # Another background is another image; a damaged cache file is replaced.
    scan(dataclasses.replace(recipe, background="black"))
    assert read_counts["decoded"] == 4
    for damage in (b"no data base", b""):
        for file in (tmp_path / "cache").glob("audit.sqlite*"):
            file.write_bytes(damage)
        assert list(rescan()[0].images) == list(third.images)
    assert rescan()[1] == {}


def test_scan_of_a_recently_written_file_reads_it_again(
    tmp_path: Path, read_counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change again within one tick of the clock."""
    put(tmp_path / "data", "a.png", "rgb(1, 7, 7)", caption="x")
    monkeypatch.setattr("finetune.data.audit.cache.SETTLED_SECONDS", 3600)
    recipe = data(tmp_path / "data", cache=str(tmp_path / "cache"))
    scan(recipe)
    scan(recipe)
    assert read_counts == {"read": 2, "decoded": 1}


def test_names_that_are_not_utf8_are_printable(tmp_path: Path) -> None:
    put(tmp_path, os.fsdecode(b"caf\xe9.png"), caption="x")
    assert tables.data(scan(data(tmp_path))).encode("utf-8")


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Bytes, mode, inode, links, owner, size, and times of modification and change of every file and folder."""
    found: dict[str, tuple[object, ...]] = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        times = (status.st_mtime_ns, status.st_ctime_ns)
        found[str(path)] = (
            content,
            status.st_mode,
            status.st_ino,
            status.st_nlink,
            status.st_uid,
            status.st_size,
            *times,
        )
    return found


def test_scan_and_read_never_write_to_the_data_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    put(tmp_path / "folder", "sub/a.png", caption="a")
    put(tmp_path / "folder", "b.jpg")
    (tmp_path / "folder" / "b.jpg").write_bytes(b"broken")
    hugging_face(datasets, {"train": ["red", "blue"]})["train"].save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    hugging_face(datasets, {"train": ["red"]})["train"].to_parquet(str(tmp_path / "parquet" / "train-00000.parquet"))
    before = snapshot(tmp_path)
    for name in ("folder", "saved", "parquet"):
        for image in scan(data(tmp_path / name, missing_captions="empty", unreadable_images="skip")).images:
            image.read()
    assert snapshot(tmp_path) == before


@given(
    st.sets(st.binary(min_size=32, max_size=32), min_size=2, max_size=30),
    st.floats(0.01, 0.5),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=30)
def test_held_out_images_depend_only_on_their_bytes(digests: set[bytes], share: float, random: Any) -> None:
    crop, count = fit((16, 16), [ImageShape(16, 16)]), len(digests)
    images = [
        Example(f"{n}.png", "", digest.hex(), crop, 1, False, 1.0, bytes) for n, digest in enumerate(sorted(digests))
    ]
    random.shuffle(images)

    def held_out(images: list[Example], share: float) -> list[str]:
        index = Index()
        for image in images:
            index.append(image)
        index.hold_out(share)
        assert [p.digest for p in index if p.held_out] == [p.digest for p in index.part(held_out=True)]
        return [image.digest for image in index if image.held_out]

    held = set(held_out(images, share))
    assert 1 <= len(held) < count
    assert abs(len(held) - share * count) <= 1
    renamed = [dataclasses.replace(p, name=f"x{n}.png") for n, p in enumerate(random.sample(images, count))]
    assert set(held_out(renamed, share)) == held
    assert sorted(held_out([*images, *images], share)) == sorted([*held, *held])
    # One more image displaces at most one other.
    more = held_out([*images, dataclasses.replace(images[0], digest="0" * 64)], share)
    assert len(set(more) ^ held) <= 2
    assert held_out(images, 0.0) == []


def test_held_out_images_are_reported(tmp_path: Path) -> None:
    for number, color in enumerate(("red", "green", "blue", "black")):
        put(tmp_path, f"{number}.png", color, caption=color)
    audit = scan(data(tmp_path, held_out=0.25))
    assert (len(audit.training), len(audit.held_out)) == (3, 1)
    shown = tables.data(audit)
    assert "3 images" in shown
    assert re.search("1 images?, for the validation loss", shown)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("color", ["whit", "#12", "transparent", "rgb(300, 0, 0)", "#ffffff80", ""])
def test_background_that_is_not_an_opaque_color_is_refused(color: str) -> None:
    with pytest.raises(UserError) as caught:
        scan(Data(path="anywhere", background=color))
    assert caught.value.where == "data.background"


# -- Hugging Face data sets -------------------------------------------------------------------------------------------


def hugging_face(datasets: Any, splits: dict[str, list[str]]) -> Any:
    """A `DatasetDict` of one small image for each color, with captions "a <color>"."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": [Image.new("RGB", (16, 16), c) for c in colors], "text": [f"a {c}" for c in colors]},
                features=features,
            )
            for split, colors in splits.items()
        }
    )


def test_hugging_face_dataset_on_disk_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    both = hugging_face(datasets, {"train": ["red", "blue"], "test": ["green"]})
    both.save_to_disk(str(tmp_path / "dict"))
    both["train"].save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    both["train"].to_parquet(str(tmp_path / "parquet" / "data" / "train-00000.parquet"))
    for name in ("dict", "saved", "parquet"):
        audit = scan(data(tmp_path / name))
        assert [image.caption for image in audit.training] == ["a red", "a blue"]
        assert [decode(image.read(), "#ffffff").getpixel((0, 0)) for image in audit.training] == [
            (255, 0, 0),
            (0, 0, 255),
        ]
        assert [problem.kind for problem in audit.problems] == (["unused split"] if name == "dict" else [])
    with pytest.raises(UserError, match='no column "prompt"') as caught:
        scan(data(tmp_path / "saved", caption_column="prompt"))
    assert (caught.value.where, caught.value.remedy) == ("data.caption_column", "its columns are: image, text")
    datasets.Dataset.from_dict({"image": [1, 2], "text": ["a", "b"]}).save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(UserError, match="does not contain images"):
        scan(data(tmp_path / "numbers"))


def test_dataset_rows_without_image_or_text_are_reported(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    secret = put(tmp_path, "secret.png")
    good = encoded(Image.new("RGB", (16, 16)))
    cells = [
        {"bytes": good, "path": None},
        None,
        {"bytes": None, "path": str(secret)},
        {"bytes": b"junk", "path": None},
    ]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "text": datasets.List(datasets.Value("string"))}
    )
    datasets.Dataset.from_dict({"image": cells, "text": [["a", "b"]] * 4}, features=features).save_to_disk(
        str(tmp_path / "lists")
    )
    assert [p.kind for p in scan(data(tmp_path / "lists")).problems] == ["unreadable caption"] * 4
    features["text"] = datasets.Value("string")
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict({"image": cells, "text": ["x"] * 4}, features=features).to_parquet(
        str(tmp_path / "rows" / "train.parquet")
    )
    audit = scan(data(tmp_path / "rows"))
    assert len(audit.images) == 1
    assert [problem.detail.split(":")[0] for problem in audit.problems] == [
        "the row has no image",
        "the row refers to a file outside the dataset, which is not read",
        "not a supported image format; supported",
    ]


def test_hub_name_without_a_network_is_refused_in_one_line() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UserError) as caught:
        scan(Data(path="nobody/no-such-data"))
    assert caught.value.problem.startswith(
        'there is no folder "nobody/no-such-data", and no dataset of that name could be loaded from the Hub: '
    )
    assert "\n" not in caught.value.problem
    assert "network" in caught.value.remedy

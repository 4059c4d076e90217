"""Captions in folders: text files and tables, in the encodings, line ends and lengths found in practice."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from finetune.data.audit.audit import scan
from finetune.data.sources import table
from finetune.data.sources.captions import Caption, Captions
from finetune.errors import UserError
from finetune.report import tables
from finetune.report.data_page import MAX_NAMES, summary
from tests.unit.test_data import captions, data, problems, put


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_file_assigns_captions_and_reports_unused_files(tmp_path: Path, name: str) -> None:
    for image in ("a.png", "deep/b.png", "unnamed.png", "blank.png"):
        put(tmp_path, image)
    (tmp_path / "unnamed.txt").write_text("not read")
    (tmp_path / "README.txt").write_text("about")
    rows = [
        ("a.png", "a, \u2028 red  one"),
        ("./deep//b.png", "below"),
        ("gone.png", "nowhere"),
        ("../outside.png", "never"),
        ("blank.png", " "),
    ]
    put(tmp_path.parent, "outside.png")
    if name.endswith("jsonl"):
        (tmp_path / name).write_text(
            "\n".join(json.dumps({"file_name": file, "text": text}, ensure_ascii=False) for file, text in rows),
            encoding="utf-8",
        )
    else:
        (tmp_path / name).write_text(
            "file_name,text\n" + "".join(f'{file},"{text}"\n' for file, text in rows), encoding="utf-8"
        )
    audit = scan(data(tmp_path, missing_captions="skip", unreadable_images="skip"))
    assert captions(audit) == {"a.png": "a, red one", "b.png": "below"}
    first = 1 if name.endswith("jsonl") else 2
    assert problems(audit) == {
        "unnamed.png": ("missing caption", "it has no caption, so it is not used"),
        "blank.png": ("missing caption", "its caption is empty, so it is not used"),
        f'{name}:{first + 2} ("gone.png")': ("missing image", "the image does not exist"),
        'outside.png")': ("missing image", "is outside the folder, so it is not read"),
        "unnamed.txt": ("unused caption", "not read: a metadata file covers its image"),
        "README.txt": ("unused caption", "no image has this name"),
    }
    with pytest.raises(UserError, match="2 missing captions and 2 missing images") as caught:
        scan(data(tmp_path)).raise_if_stopped()
    assert "gone.png" in caught.value.where
    assert "outside.png" in caught.value.where


def test_metadata_file_in_the_nearest_folder_wins(tmp_path: Path) -> None:
    put(tmp_path, "a.png", caption="beside")
    put(tmp_path, "sub/b.png")
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,text\nb.png,from the table\n")
    assert captions(scan(data(tmp_path))) == {"a.png": "beside", "b.png": "from the table"}


@pytest.mark.parametrize(
    ("name", "content", "said", "line"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{oops', "not a JSON object", 2),
        ("metadata.jsonl", b"\n[1]", "not a JSON object", 2),
        ("metadata.jsonl", b'{"file_name": "a.png"}', r'no "text" \(its columns: file_name\)', 1),
        (
            "metadata.jsonl",
            b'{"file_name": "a.png", "text": "x"}\n{"file_name": "./a.png", "text": "y"}',
            "listed twice",
            2,
        ),
        ("metadata.csv", b"file_name;text\na.png;x\n", r'no "file_name" \(its columns: file_name;text\)', 2),
        ("metadata.csv", b'file_name,text\na.png,"x\n', "not a valid CSV file", 2),
        ("metadata.csv", "file_name,text\na.png,é\n".encode("latin-1"), r"not UTF-8 text \(byte 21\)", None),
        ("metadata.csv", "file_name,text\na.png,x\n".encode("utf-16"), r"not UTF-8 text \(byte 0\)", None),
        ("metadata.parquet", b"PAR1", "metadata.parquet", None),
    ],
)
def test_unreadable_metadata_file_is_refused_with_its_line(
    tmp_path: Path, name: str, content: bytes, said: str, line: int | None
) -> None:
    put(tmp_path, "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        scan(data(tmp_path))
    assert caught.value.where == str(tmp_path / name) + (f":{line}" if line else "")
    assert caught.value.remedy


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_metadata_csv_accepts_any_line_ending(tmp_path: Path, end: str) -> None:
    for name in "ab":
        put(tmp_path, f"{name}.png")
    content = f'\ufefffile_name,text{end}a.png,"one{end}two"{end}b.png,three'
    (tmp_path / "metadata.csv").write_bytes(content.encode())
    assert captions(scan(data(tmp_path))) == {"a.png": "one two", "b.png": "three"}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_long_metadata_file_uses_bounded_memory(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "IN_MEMORY_BYTES", 1 << 12)
    names = [f"{number:05d}.png" for number in range(10_000)]
    words = "words " * 20
    lines = [
        json.dumps({"file_name": file, "text": words + file}) if name.endswith("jsonl") else f"{file},{words}{file}"
        for file in names
    ]
    (tmp_path / name).write_text("\n".join([*([] if name.endswith("jsonl") else ["file_name,text"]), *lines]))

    def read_all() -> None:
        found = Captions(tmp_path, [*names, name], "text")
        assert all(found.of(file) == Caption(words + file) for file in reversed(names))
        assert not list(found.unused())

    read_all()  # once before measuring: imports, and names that pathlib interns
    tracemalloc.start()
    try:
        read_all()
        assert tracemalloc.get_traced_memory()[1] < 60 * len(names)  # the captions themselves take three times as much
    finally:
        tracemalloc.stop()


def test_two_metadata_files_in_a_folder_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="two metadata files"):
        scan(data(tmp_path))


def test_caption_in_another_encoding_is_refused_with_file_and_byte(tmp_path: Path) -> None:
    put(tmp_path, "a.png").with_suffix(".txt").write_bytes("a café".encode("latin-1"))
    with pytest.raises(UserError, match="1 unreadable caption") as caught:
        scan(data(tmp_path, missing_captions="empty")).raise_if_stopped()
    assert "a.txt is not UTF-8 (byte 5)" in caught.value.where


def test_caption_that_is_not_text_is_refused_with_its_line(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["one", "two"]}')
    with pytest.raises(UserError, match="1 unreadable caption") as caught:
        scan(data(tmp_path)).raise_if_stopped()
    assert "metadata.jsonl:1 is not text" in caught.value.where


def test_problems_beyond_the_display_limit_are_all_in_the_json(tmp_path: Path) -> None:
    """`data.json` and `ft data check --json` name every image.

    Tables and pages name some and say that there are more.
    """
    put(tmp_path, "a.png", caption="x")
    for number in range(MAX_NAMES + 5):
        (tmp_path / f"{number:02d}.png").write_bytes(b"")
    found = tables.facts(scan(data(tmp_path, unreadable_images="skip", missing_captions="empty")))
    (problem,) = found["problems"]
    assert problem["names"] == [str(tmp_path / f"{number:02d}.png") for number in range(MAX_NAMES + 5)]
    (note,) = summary(found)["notes"]
    page = note["names"]
    assert f"{MAX_NAMES - 1:02d}.png, …" in page and f"{MAX_NAMES:02d}.png" not in page

"""A folder with everything odd at once.

Each file trains correctly or is refused by name, and the folder stays unchanged.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path

import pytest

from finetune.config.schema import Data
from finetune.data.audit.audit import Audit, scan
from finetune.data.decoding import decode_role
from finetune.errors import UserError
from finetune.report import tables
from tests.helpers import corpus
from tests.unit.test_data import put, snapshot
from tests.unit.test_dataset import Counting, opened


def recipe(folder: Path, **changes: object) -> Data:
    settings = {
        "path": str(folder),
        "resolution": 64,
        "bucket_step": 16,
        "missing_captions": "skip",
        "unreadable_images": "skip",
    }
    return Data(**settings | {"cache": str(folder.parent / "cache")} | changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.make(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def audit(folder: Path) -> Audit:
    before = snapshot(folder)
    found = scan(recipe(folder))
    assert snapshot(folder) == before
    return found


def relative(path: str, folder: Path) -> str:
    return path.removeprefix(f"{folder}/").replace("sub/metadata", "metadata")


def printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def test_corpus_audit_accepts_and_refuses_exactly_the_expected_files(audit: Audit, folder: Path) -> None:
    assert {relative(p.name, folder) for p in audit.images} == {printable(name) for name in corpus.TRAINS}
    told = {relative(p.name, folder): p.detail for p in audit.problems}
    assert told.keys() == corpus.REFUSED.keys()
    for name, reason in corpus.REFUSED.items():
        assert reason in told[name], name


def test_corpus_audit_reports_oddities_and_duplicates(audit: Audit, folder: Path) -> None:
    told = defaultdict(set)
    for finding in audit.findings:
        assert finding.count >= sum(map(len, finding.examples))
        for place in (place for group in finding.examples for place in group):
            told[relative(audit.images[place].name, folder)].add(finding.kind)
    odd = {
        name: kinds - {"exact duplicate", "near duplicate"}
        for name, kinds in told.items()
        if kinds - {"exact duplicate", "near duplicate"}
    }
    assert odd == {printable(name): set(kinds) for name, kinds in corpus.TRAINS.items() if kinds}
    assert {name for name, kinds in told.items() if "exact duplicate" in kinds} == {"plain.png", "copy.png"}
    assert {"plain.png", "again.jpg", "copy.png"} <= {name for name, kinds in told.items() if "near duplicate" in kinds}


def test_corpus_images_are_decoded_as_intended(audit: Audit, folder: Path) -> None:
    """Red on the left, blue on the right; 16-bit gray has the brightness of red and blue."""
    data = opened(
        folder,
        Counting(cached=False),
        data={"resolution": 64, "missing_captions": "skip", "unreadable_images": "skip"},
    )
    for image in data.images:
        pixels = ((decode_role(image, "target", audit.background, False) + 1) * 127.5).round()
        left, right = pixels[:, 32, 4].tolist(), pixels[:, 32, 60].tolist()
        if image.name.endswith("deep.tif"):
            assert (left, right) == ([76] * 3, [29] * 3)
        else:
            assert left == pytest.approx(corpus.RED, abs=6), image.name
            assert right == pytest.approx(corpus.BLUE, abs=6), image.name


def test_corpus_audit_output_is_free_of_control_characters(audit: Audit) -> None:
    """Names and captions cannot control a terminal."""
    shown = tables.data(audit)
    assert shown.encode("utf-8")
    assert not any(character < " " and character != "\n" for character in shown)
    assert tables.facts(audit)["training"] == len(corpus.TRAINS)
    assert '(metadata.jsonl:2 ("../plain.png"), metadata.jsonl:3 ("/etc/passwd"))' in shown


def test_corpus_audit_with_defaults_stops_the_run(folder: Path) -> None:
    with pytest.raises(UserError, match=r"missing captions and .* unreadable") as caught:
        scan(recipe(folder, missing_captions="stop", unreadable_images="stop")).raise_if_stopped()
    assert "more" in caught.value.where


def test_audit_while_files_are_rewritten_sees_complete_images(tmp_path: Path) -> None:
    """With a concurrent writer, each scan sees a complete image or reports a problem.

    Later scans see the last version.
    """
    files = [put(tmp_path / "data", f"{number}.png", "red", (64, 64), caption="x") for number in range(6)]
    contents = [corpus.saved(corpus.halves((64, side)), "PNG") for side in (64, 80, 96)]
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for file in files:
                for content in contents:
                    file.write_bytes(content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(12):
            audit = scan(recipe(tmp_path / "data"))
            assert len(audit.images) + len(audit.problems) == 6
            assert {p.crop.original for p in audit.images} <= {(64, 64), (64, 80), (64, 96)}
    finally:
        stop.set()
        writer.join()
    assert {p.crop.original for p in scan(recipe(tmp_path / "data")).images} == {(64, 96)}

"""Examples with several roles and other media, from audit to report, with two tiny families."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune.config.loader import parse_recipe
from finetune.config.schema import Recipe
from finetune.data.audit.audit import scan
from finetune.data.media.sample import open_sample
from finetune.data.media.video import VideoSample
from finetune.data.shape import VideoShape
from finetune.errors import UserError
from finetune.models import registry
from finetune.planning import load_plan
from tests.helpers import tiny
from tests.helpers.families.paired import PairEncoder

CACHED = (registry.modules, registry.specs, registry.aliases, registry.variants)


@pytest.fixture(autouse=True)
def _families(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the registry find the two families."""
    monkeypatch.setattr(registry, "PACKAGES", (*registry.PACKAGES, "tests.helpers.families"))
    for function in CACHED:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in CACHED:
        function.cache_clear()


def color(number: int) -> tuple[int, int, int]:
    return (40 * number, 200 - 30 * number, 128)


def pairs(folder: Path, layout: str) -> Path:
    """Six pairs of images; the target is the reference upside down."""
    (folder / "target").mkdir(parents=True)
    (folder / "reference").mkdir()
    rows = []
    for number in range(6):
        image = Image.new("RGB", (24, 16), color(number))
        image.paste("white", (0, 0, 24, 6 + number))
        target, reference = {
            "folders": (folder / "target" / f"{number}.png", folder / "reference" / f"{number}.png"),
            "beside": (folder / f"{number}.png", folder / f"{number}.reference.png"),
        }[layout]
        image.save(reference)
        image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(target)
        rows.append({"file_name": str(target.relative_to(folder)), "text": "turn it over"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def clips(folder: Path) -> Path:
    """Five clips of six frames: animated WebP, GIF, and a folder of frames."""
    folder.mkdir()
    for number in range(5):
        frames = [Image.new("RGB", (16, 16), color(number)) for _ in range(6)]
        for place, frame in enumerate(frames):
            frame.paste("white", (2 * place, 0, 2 * place + 4, 16))
        if number == 4:
            (folder / "4.frames").mkdir()
            for place, frame in enumerate(frames):
                frame.save(folder / "4.frames" / f"{place}.png")
        else:
            suffix = ".gif" if number % 2 else ".webp"
            VideoSample(frames).save(folder / f"{number}{suffix}") if suffix == ".webp" else frames[0].save(
                folder / f"{number}{suffix}", save_all=True, append_images=frames[1:], duration=100
            )
        (folder / f"{number}.txt").write_text(f"a bar on color {number}")
    return folder


def recipe(family: str, data: dict[str, Any], sample: dict[str, Any], folder: Path) -> Recipe:
    sections = {
        "model": {"family": family, "build": {"kernel": 3}},
        "data": {"resolution": 16, "buckets": False, "held_out": 0.2, "cache": str(folder.parent / "cache")} | data,
        "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "validate_every": 2},
        "optimizer": {"lr": 0.01},
        "sample": {"every": 2, "steps": 1, "guidance": 1} | sample,
        "output": {"folder": str(folder)},
    }
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in sections.items())
    return parse_recipe(f"method: scratch\n{lines}", "tiny.yaml", "tiny")


def resume_copy(asked: Recipe, whole: Path) -> None:
    """Resume a copy of the run in `whole`, as if it had been killed after its checkpoint of step 2."""
    folder = Path(asked.output.folder or "")
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step-0000004")
    shutil.rmtree(folder / "final")
    tiny.train(asked, resume=True)


def final(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "final" / "model.safetensors")
    return found


@pytest.mark.parametrize("layout", ["folders", "beside"])
def test_paired_images_train_report_and_resume_exactly(layout: str, tmp_path: Path) -> None:
    data = pairs(tmp_path / "data", layout)
    reference = data / ("reference/0.png" if layout == "folders" else "0.reference.png")
    sample = {"prompts": ["turn it over", "leave it"], "references": [str(reference)]}
    whole, parts = (
        recipe("tiny-editor", {"path": str(data)}, sample, tmp_path / name) for name in ("whole", "resumed")
    )
    job = tiny.train(whole)
    assert job.audit is not None and [*job.audit.images[0].others] == ["reference"]
    assert len(job.audit.images) == 6
    resume_copy(parts, tmp_path / "whole")
    for name, tensor in final(tmp_path / "whole").items():
        assert torch.equal(tensor, final(tmp_path / "resumed")[name]), name
    losses = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in losses] == [1, 2, 3, 4] and "validation" in losses[1]
    assert (tmp_path / "whole" / "samples" / "step-0000004" / "01.png").is_file()
    assert "turn it over" in (tmp_path / "whole" / "report.html").read_text()


def test_references_are_encoded_once_with_each_caption(tmp_path: Path) -> None:
    data = pairs(tmp_path / "data", "beside")
    asked = recipe("tiny-editor", {"path": str(data)}, {}, tmp_path / "run")
    job = tiny.prepare(asked)
    assert isinstance(job.data.encoder, PairEncoder)
    calls = job.data.encoder.calls
    assert calls.count(("target",)) == 6
    assert calls.count(("caption", "reference")) == 12, "once with the caption, once with the empty caption of dropout"
    again = tiny.prepare(recipe("tiny-editor", {"path": str(data)}, {}, tmp_path / "again"))
    assert isinstance(again.data.encoder, PairEncoder) and again.data.encoder.calls == []


def test_missing_unreadable_and_unused_partners_are_reported(tmp_path: Path) -> None:
    data = pairs(tmp_path / "data", "folders")
    (data / "reference" / "3.png").unlink()
    Image.new("RGB", (8, 8)).save(data / "reference" / "lonely.png")
    (data / "reference" / "4.png").write_bytes(b"no image")
    asked = recipe("tiny-editor", {"path": str(data)}, {}, tmp_path / "run")
    audit = scan(asked.data, family=registry.specs()["tiny-editor"])
    problems = {(Path(p.name).name, p.kind, p.stops) for p in audit.problems}
    assert problems == {
        ("3.png", "missing partner", True),
        ("4.png", "unreadable partner", True),
        ("lonely.png", "unused partner", False),
    }
    with pytest.raises(UserError, match="1 missing partner and 1 unreadable partner"):
        audit.raise_if_stopped()


def test_clips_train_report_and_resume_exactly(tmp_path: Path) -> None:
    data = clips(tmp_path / "data")
    sample = {"prompts": ["a bar", "a wide bar"]}
    given = {"path": str(data), "frames": 4}
    whole, parts = (recipe("tiny-clips", given, sample, tmp_path / name) for name in ("whole", "resumed"))
    tiny.train(whole)
    resume_copy(parts, tmp_path / "whole")
    for name, tensor in final(tmp_path / "whole").items():
        assert torch.equal(tensor, final(tmp_path / "resumed")[name]), name
    plan = load_plan(tmp_path / "whole")
    assert plan.data.buckets == ((VideoShape(4, 16, 16), 4),)
    assert str(plan.data.buckets[0][0]) == "4×16×16"
    file = tmp_path / "whole" / "samples" / "step-0000004" / "00.webp"
    clip, about = open_sample(file)
    assert isinstance(clip, VideoSample) and len(clip.frames) == 4 and about["prompt"] == "a bar"
    assert clip.frames[0].size == (16, 16)
    assert "data:image/webp" in (tmp_path / "whole" / "report.html").read_text()


def test_clip_with_too_few_frames_is_reported(tmp_path: Path) -> None:
    asked = recipe("tiny-clips", {"path": str(clips(tmp_path / "data")), "frames": 9}, {}, tmp_path / "run")
    audit = scan(asked.data, family=registry.specs()["tiny-clips"])
    assert not audit.images
    assert all("6 frames, too few for 9" in problem.detail for problem in audit.problems)
    sampled = recipe("tiny-clips", {"path": str(tmp_path / "data"), "frames": 3, "fps": 5}, {}, tmp_path / "run")
    assert len(scan(sampled.data, family=registry.specs()["tiny-clips"]).images) == 5, (
        "at half the frame rate, every second frame is used"
    )


def test_frames_for_an_image_family_is_refused(tmp_path: Path) -> None:
    asked = recipe("tiny-editor", {"path": str(pairs(tmp_path / "d", "beside")), "frames": 4}, {}, tmp_path / "run")
    with pytest.raises(UserError, match="trains on images, not clips"):
        scan(asked.data, family=registry.specs()["tiny-editor"])

"""DreamBooth: class images drawn by the base before training, once, into the cache, and counted from the first table on."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from PIL import Image

from finetune import job
from finetune.config.schema import Recipe
from finetune.data.shape import ImageShape
from finetune.inference import class_images
from finetune.inference.sample import sample
from finetune.rng import Draw, mix
from tests.helpers import tiny

CLASS = "a blue square on white"


def recipe(tmp_path: Path, run: str, *overrides: str, images: int = 3) -> Recipe:
    section = f"prior={{prompt: {CLASS}, images: {images}, weight: 0.5}}"
    given = (section, f"data.cache={tmp_path / 'cache'}", "sample.prompts=[]", "train.batch_size=8", *overrides)
    return tiny.recipe("sd15", "lora", *given, folder=tmp_path / run)


def folder(asked: Recipe) -> Path:
    assert asked.prior is not None
    return class_images.folder_of(asked, asked.prior)


def test_class_images_are_the_bases_and_train_with_their_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tiny.images().rglob("*"))
    asked = recipe(tmp_path, "run")
    planned = job.plan(asked)
    assert not folder(asked).exists(), "a plan draws nothing"
    assert (planned.data.images, planned.data.examples, planned.data.buckets) == (8, 8, ((ImageShape(32, 32), 8),))
    assert any("first generates 3 images" in note for note in planned.notes)

    done = tiny.train(asked)
    assert done.plan.arithmetic == planned.arithmetic
    assert not any("first generates" in note for note in done.plan.notes)
    drawn = sorted(folder(asked).glob("*.png"))
    assert len(drawn) == 3
    by_hand = sample(
        tiny.pipeline("sd15"), [CLASS], seeds=[mix(0, "class", 1)], steps=2, guidance=3, out=tmp_path / "by-hand"
    )
    assert (numpy.asarray(Image.open(drawn[1])) == numpy.asarray(Image.open(by_hand[0]))).all()
    assert sorted(tiny.images().rglob("*")) == before

    batch = done.data.batch(0, range(8), Draw(0, 0, range(8)))
    assert sorted(batch["weight"].tolist()) == [0.5] * 3 + [1.0] * 5
    weighed = [
        image.weight for image in done.data.images if image.caption == CLASS and image.name.endswith(drawn[0].name)
    ]
    assert weighed == [0.5]
    assert "drawn by the base, × 0.5" in capsys.readouterr().out


def test_they_are_drawn_once_and_more_of_them_on_top(tmp_path: Path) -> None:
    tiny.prepare(recipe(tmp_path, "first"))
    place = folder(recipe(tmp_path, "first"))
    stamps = {file: file.stat().st_mtime_ns for file in place.glob("*.png")}
    more = recipe(tmp_path, "second", images=4)
    assert class_images.missing(more) == [3]
    assert tiny.prepare(more).plan.data.images == 9
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    fewer = tiny.prepare(recipe(tmp_path, "third", images=2)).plan
    assert fewer.data.images == 7
    assert folder(recipe(tmp_path, "x", "sample.steps=3")) != place


def test_a_resumed_run_draws_what_the_cache_has_lost(tmp_path: Path) -> None:
    steps = ("train.steps=1", "optimizer.schedule=constant")
    tiny.train(recipe(tmp_path, "run", *steps))
    place = folder(recipe(tmp_path, "run"))
    content = (place / "00001.png").read_bytes()
    (place / "00001.png").unlink()
    tiny.train(recipe(tmp_path, "run", "train.steps=2"), resume=True)
    assert (place / "00001.png").read_bytes() == content


def test_a_share_that_dreambooth_would_not_take_is_said(tmp_path: Path) -> None:
    many = job.plan(recipe(tmp_path, "run", images=40))
    assert any("40 class images and 5 examples of the subject" in note and "8 times" in note for note in many.notes)

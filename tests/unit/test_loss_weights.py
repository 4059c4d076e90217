"""Loss weights: weights of sources, and masks, from the folder to the gradient."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image, ImageDraw

from finetune.config.schema import Data
from finetune.data.audit.audit import scan
from finetune.data.sources import masks
from finetune.errors import UserError
from finetune.rng import Draw
from tests.helpers import tiny


def folder_with_masks(tmp_path: Path) -> Path:
    """The tiny images with masks beside three of them, one of half its image's size; the left half is white."""
    folder = tmp_path / "data"
    shutil.copytree(tiny.images(), folder)
    for name, size in (("zero", (32, 32)), ("one", (48, 32)), ("three", (32, 32))):
        mask = Image.new("L", size, 0)
        ImageDraw.Draw(mask).rectangle((0, 0, size[0] // 2 - 1, size[1]), fill=255)
        mask.save(folder / f"{name}.mask.png")
    return folder


def prepared(folder: Path, *overrides: str) -> Any:
    return tiny.prepare(
        tiny.recipe("sd15", "lora", "data.caption_dropout=0", "sample.prompts=[]", *overrides, folder=folder)
    )


def test_masks_are_cropped_with_their_images_and_stored_at_latent_resolution(tmp_path: Path) -> None:
    job = prepared(
        tmp_path / "run",
        f"data.path={folder_with_masks(tmp_path)}",
        "data.masks=beside",
        "data.unmasked_weight=0.25",
        "data.flip=true",
    )
    assert job.plan.data.images == 5, "masks must not count as images"
    names = [Path(image.name).name for image in job.data.images]
    image = job.data.images[names.index("zero.png")]
    left = job.data._encoding.mask(image, False)["mask"]
    assert left.shape == (1, 8, 8)
    assert left[0, 0].tolist() == [1.0] * 4 + [0.25] * 4
    assert torch.equal(job.data._encoding.mask(image, True)["mask"], left.flip(-1))
    assert (job.data._encoding.mask(job.data.images[names.index("four.jpg")], False)["mask"] == 1).all()
    # 48×32 is cropped to its central square: 16 of the 24 white columns remain.
    assert (
        job.data._encoding.mask(job.data.images[names.index("one.png")], False)["mask"][0, 0].tolist()
        == [1.0] * 4 + [0.25] * 4
    )
    assert {finding.kind: finding.count for finding in job.audit.findings}["no mask"] == 2


SOURCES = ("metadata.jsonl", "metadata.csv", "shard", "saved", "parquet", "stream")


def as_source(kind: str, folder: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The images and masks of `folder` as another kind of source, and the recipe keys that it needs."""
    names = [path.name for path in sorted(folder.glob("*.*")) if path.suffix != ".txt" and ".mask" not in path.name]
    captions = {name: (folder / name).with_suffix(".txt").read_text() for name in names}
    masked = {name: path for name in names if (path := folder / f"{Path(name).stem}.mask.png").is_file()}
    target = tmp_path / kind
    if kind == "shard":
        with tarfile.open(tmp_path / "one.tar", "w") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name)
        return tmp_path / "one.tar", {}
    if kind.startswith("metadata"):
        (target / "masks").mkdir(parents=True)
        rows = []
        for name in names:
            shutil.copy(folder / name, target / name)
            if name in masked:
                shutil.copy(masked[name], target / "masks" / name)
            rows.append({"file_name": name, "text": captions[name], "where": f"masks/{name}" if name in masked else ""})
        with open(target / kind, "w", encoding="utf-8", newline="") as file:
            if kind.endswith("csv"):
                writer = csv.DictWriter(file, ["file_name", "text", "where"])
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        return target, {"mask_column": "where"}
    datasets = pytest.importorskip("datasets")
    cells: dict[str, list[Any]] = {
        "image": [{"bytes": (folder / name).read_bytes(), "path": None} for name in names],
        "text": [captions[name] for name in names],
        "mask": [{"bytes": masked[name].read_bytes(), "path": None} if name in masked else None for name in names],
    }
    image = datasets.Image(decode=False)
    table = datasets.Dataset.from_dict(
        cells, features=datasets.Features({"image": image, "text": datasets.Value("string"), "mask": image})
    )
    if kind == "saved":
        table.save_to_disk(str(target))
    else:
        target.mkdir()
        table.to_parquet(str(target / "train.parquet"))
    return target, {"streaming": kind == "stream"}


@pytest.mark.parametrize("kind", SOURCES)
def test_masks_of_every_kind_of_source_match_those_of_a_folder(kind: str, tmp_path: Path) -> None:
    folder = folder_with_masks(tmp_path)
    place, more = as_source(kind, folder, tmp_path)
    plain: dict[str, Any] = {"resolution": 32, "buckets": False, "masks": "beside"}
    expected, found = scan(Data(path=str(folder), **plain)), scan(Data(path=str(place), **plain, **more))
    assert not [problem for problem in found.problems if problem.kind != "unused caption"]
    digests, wanted = (
        {image.digest: image.others["mask"].digest for image in audit.images if "mask" in image.others}
        for audit in (found, expected)
    )
    assert digests == wanted
    assert {finding.kind: finding.count for finding in found.findings}["no mask"] == 2
    for image in pickle.loads(pickle.dumps(found)).images:  # as one process sends them to the others
        if "mask" in image.others:
            assert masks.read(image, False)[:, :12].min() == 1 and masks.read(image, False)[:, 20:].max() == 0


def test_masks_outside_the_folder_or_of_an_unsupported_source_are_refused(tmp_path: Path) -> None:
    place, more = as_source("metadata.jsonl", folder_with_masks(tmp_path), tmp_path)
    plain = {"path": str(place), "resolution": 32, "buckets": False, "masks": "beside", **more}
    text = (place / "metadata.jsonl").read_text()
    shutil.copy(place / "masks" / "zero.png", tmp_path / "outside.png")
    for mask, detail in (("../outside.png", "outside the folder"), ("masks/nowhere.png", "cannot be read")):
        (place / "metadata.jsonl").write_text(text.replace("masks/zero.png", mask))
        problems = [problem for problem in scan(Data(**plain)).problems if problem.kind == "unreadable mask"]
        assert [detail in problem.detail and problem.stops for problem in problems] == [True]
    (place / "metadata.jsonl").write_text(text.replace('"masks/zero.png"', "7"))
    assert any("is not a file name" in problem.detail for problem in scan(Data(**plain)).problems if problem.stops)
    for kind in ("shard", "parquet"):
        other, _ = as_source(kind, tmp_path / "data", tmp_path)
        with pytest.raises(UserError, match="a folder of masks needs a folder of images"):
            scan(Data(path=str(other), masks=str(place / "masks")))


def test_black_mask_gives_no_loss(tmp_path: Path) -> None:
    data = f"data.path={folder_with_masks(tmp_path)}"
    job = prepared(tmp_path / "run", data, "data.masks=beside", "train.batch_size=5")
    train_step, places = job.model.train_steps()[0], range(5)
    draw = Draw(0, 0, places)
    batch = job.data.batch(0, list(places), draw)
    assert batch["mask"].shape == (5, 1, 8, 8)

    def loss(**changes: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = train_step.loss(batch | changes, draw)
        return found

    mean = batch["mean"] + 0
    noised = train_step.objective.noise(mean + batch["deviation"] * draw.normal("posterior", mean.shape[1:]), draw)
    predicted = train_step.net(noised.sample, noised.timestep, batch)
    by_hand = ((predicted - noised.target).square() * batch["mask"]).mean((1, 2, 3))
    torch.testing.assert_close(loss(), by_hand)
    whole, black = loss(mask=torch.ones(5, 1, 8, 8)), loss(mask=torch.zeros(5, 1, 8, 8))
    assert (loss() <= whole).all() and (loss() < whole).sum() == 3 and (black == 0).all()


def test_source_weight_scales_its_gradient(tmp_path: Path) -> None:
    """One step on two sources: the gradient is the weighted sum of the gradients of each source alone."""

    def gradients(name: str, first: float, second: float) -> dict[str, torch.Tensor]:
        sources = f'data.sources=[{{path: "{tiny.one_image()}", weight: {first}}}, {{path: "{tiny.images()}", limit: 1, weight: {second}}}]'
        job = prepared(
            tmp_path / name,
            "data.path=null",
            sources,
            "train.batch_size=2",
            "optimizer.clip_norm=null",
            "train.steps=1",
        )
        assert job.plan.data.images == 2
        kept: dict[str, torch.Tensor] = {}
        optimizer = job.trainer.state.optimizers[0]
        step = optimizer.step
        named = job.model.trained()

        def record_and_step() -> None:
            kept.update({key: parameter.grad.clone() for key, parameter in named.items()})
            step()

        optimizer.step = record_and_step
        job.trainer.train_step(0)
        return kept

    both, first, second = gradients("both", 0.25, 3), gradients("first", 1, 1e-30), gradients("second", 1e-30, 1)
    assert any(gradient.abs().max() > 0 for gradient in both.values())
    for key, gradient in both.items():
        torch.testing.assert_close(gradient, 0.25 * first[key] + 3 * second[key], rtol=1e-4, atol=1e-7)


def test_folder_of_masks_is_used_and_invalid_masks_are_refused(tmp_path: Path) -> None:
    folder = folder_with_masks(tmp_path)
    apart = tmp_path / "masks"
    apart.mkdir()
    for file in folder.glob("*.mask.png"):
        file.rename(apart / file.name.replace(".mask", ""))
    data = Data(path=str(folder), resolution=32, buckets=False, masks=str(apart))
    plain, masked = scan(Data(path=str(folder), resolution=32, buckets=False)), scan(data)
    assert sorted(Path(image.name).stem for image in masked.images if "mask" in image.others) == [
        "one",
        "three",
        "zero",
    ]
    assert plain.digest() != masked.digest()
    Image.new("L", (10, 32)).save(apart / "one.png")
    (problem,) = [problem for problem in scan(data).problems if problem.stops]
    assert (problem.kind, problem.detail) == (
        "unreadable mask",
        "its mask is 10×32, but the image 48×32: the aspect ratios must be equal",
    )
    with pytest.raises(UserError, match="no folder"):
        scan(Data(path=str(folder), resolution=32, buckets=False, masks=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="no image has a mask"):
        scan(Data(path=str(folder), resolution=32, buckets=False, masks="beside"))


def test_mask_changed_after_the_audit_is_refused(tmp_path: Path) -> None:
    folder = folder_with_masks(tmp_path)
    job = prepared(tmp_path / "run", f"data.path={folder}", "data.masks=beside", f"data.cache={tmp_path / 'cache'}")
    Image.fromarray(numpy.full((32, 32), 7, numpy.uint8)).save(folder / "zero.mask.png")
    image = next(image for image in job.data.images if image.name.endswith("zero.png"))
    with pytest.raises(UserError, match="its mask has changed"):
        masks.read(image, False)

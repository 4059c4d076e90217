"""The data set encodes only what is new, and assembles the batch of each step."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune.config.loader import parse_recipe
from finetune.config.machine import Machine
from finetune.data import example_store
from finetune.data.audit.audit import scan
from finetune.data.batch import Batch, Encoder, ImageTextEncoder
from finetune.data.dataset import Dataset
from finetune.errors import UserError
from finetune.planning import make_plan
from finetune.rng import Draw


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


class Counting(ImageTextEncoder):
    """An encoder that counts its calls: an image becomes its pixels, a caption its bytes; it reads eight tokens."""

    def __init__(self, image_key: str = "image", caption_key: str = "caption", cached: bool = True) -> None:
        self.image_key, self.caption_key, self.cached = image_key, caption_key, cached
        self.images, self.captions, self.released = 0, list[str](), False

    def encode_image(self, pixels: Tensor) -> Batch:
        assert not self.released
        self.images += 1
        return {"pixels": pixels}

    def encode_caption(self, caption: str) -> Batch:
        assert not self.released
        self.captions.append(caption)
        return {"text": torch.tensor([*caption.encode()[:40].ljust(40)])}

    def caption_tokens(self, caption: str) -> tuple[int, int]:
        return len(caption.split()), 8

    def release(self) -> None:
        self.released = True


def text(batch: Batch) -> list[str]:
    return [bytes(row.tolist()).decode().strip() for row in batch["text"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        add(tmp_path / "data", number)
    return tmp_path / "data"


def add(folder: Path, number: int) -> None:
    """An image whose left and right differ, with its number as the caption."""
    folder.mkdir(exist_ok=True)
    image = Image.new("RGB", (16, 16), (number, 0, 0))
    image.paste((0, number, 255), (8, 0, 16, 16))
    image.save(folder / f"{number}.png")
    (folder / f"{number}.txt").write_text(f"number {number}")


def opened(folder: Path, encoders: Encoder, processes: int = 1, **sections: dict[str, Any]) -> Dataset:
    """The data set of `folder`, not yet encoded; its cache is beside it."""
    content = {
        "model": {"family": "autoencoder-kl", "build": {"layers_per_block": 1}},
        "data": {"path": str(folder), "resolution": 16, "buckets": False, "cache": str(folder.parent / "cache")}
        | sections.pop("data", {}),
        "train": {"steps": 400, "batch_size": 4, "seed": 3} | sections.pop("train", {}),
    }
    recipe = parse_recipe(
        "method: scratch\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in content.items()),
        "test.yaml",
        "test",
    )
    audit = scan(recipe.data)
    return Dataset(make_plan(recipe, audit, Machine("cpu", "test", processes, 1, False, 1 << 30)), audit, encoders)


def encoded(folder: Path, encoders: Counting | None = None, **sections: dict[str, Any]) -> tuple[Dataset, Counting]:
    encoders = encoders or Counting()
    data = opened(folder, encoders, 1, **sections)
    data.encode()
    return data, encoders


def test_encode_computes_only_new_images_and_captions(folder: Path) -> None:
    _, first = encoded(folder)
    assert (first.images, sorted(first.captions)) == (6, ["", *(f"number {n}" for n in range(6))])
    assert first.released
    _, again = encoded(folder)
    assert (again.images, again.captions) == (0, [])
    add(folder, 6)
    _, one_more = encoded(folder)
    assert (one_more.images, one_more.captions) == (1, ["number 6"])
    (folder / "2.txt").write_text("two")
    _, edited = encoded(folder)
    assert (edited.images, edited.captions) == (0, ["two"])
    (folder / "2.png").rename(folder / "renamed.png")
    (folder / "2.txt").rename(folder / "renamed.txt")
    _, renamed = encoded(folder)
    assert (renamed.images, renamed.captions) == (0, [])
    Image.new("RGB", (16, 16), "white").save(folder / "1.png")
    _, repainted = encoded(folder)
    assert (repainted.images, repainted.captions) == (1, [])


@pytest.mark.parametrize(
    ("changes", "images", "captions"),
    [
        ({"data": {"background": "#ffffff"}}, 0, 0),  # the same color by another name
        ({"data": {"background": "black"}}, 6, 0),
        ({"data": {"resolution": 8}}, 6, 0),
        ({"data": {"flip": True}}, 6, 0),
        ({"encoders": Counting(image_key="another VAE")}, 6, 0),
        ({"encoders": Counting(caption_key="another text encoder")}, 0, 7),
        ({"train": {"batch_size": 1, "seed": 9}}, 0, 0),
    ],
)
def test_cache_key_covers_everything_that_changes_the_encoding(
    folder: Path, changes: dict[str, Any], images: int, captions: int
) -> None:
    encoded(folder)
    _, found = encoded(folder, **changes)
    assert (found.images, len(found.captions)) == (images, captions)


def test_cache_content_does_not_depend_on_the_batch_size(folder: Path, tmp_path: Path) -> None:
    for batch in (1, 4):
        encoded(folder, data={"cache": str(tmp_path / str(batch))}, train={"batch_size": batch})
    held = [
        {path.relative_to(tmp_path / batch): path.read_bytes() for path in (tmp_path / batch).rglob("*.safetensors")}
        for batch in ("1", "4")
    ]
    assert len(held[0]) == 2
    assert held[0] == held[1]


def test_waiting_process_uses_what_the_first_encoded(folder: Path) -> None:
    first, waiting = Counting(), Counting()
    both = [
        opened(folder, first, processes=2),
        opened(folder, waiting, processes=2),
    ]  # both built before either encodes
    for data in both:
        data.encode()
    assert (first.images, waiting.images, waiting.captions) == (6, 0, [])


def test_encode_after_an_interruption_keeps_finished_entries(folder: Path) -> None:
    class Interrupted(Counting):
        def encode_image(self, pixels: Tensor) -> Batch:
            if self.images == 4:
                raise KeyboardInterrupt
            return super().encode_image(pixels)

    with pytest.raises(KeyboardInterrupt):
        encoded(folder, Interrupted())
    _, rest = encoded(folder)
    assert (rest.images, rest.captions) == (2, [])


def test_damaged_cache_is_computed_again(folder: Path) -> None:
    data, _ = encoded(folder)
    for shard in (folder.parent / "cache").rglob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1] + b"\xaa")
    repaired, encoders = encoded(folder)
    assert (encoders.images, len(encoders.captions)) == (6, 7)
    draw = Draw(3, 0, [0, 1, 2, 3])
    assert same(repaired.batch(0, range(4), draw), data.batch(0, range(4), draw))


def test_cache_damaged_during_a_run_is_reported(folder: Path) -> None:
    data, _ = encoded(folder)
    for shard in (folder.parent / "cache").rglob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(UserError, match="lost or damaged") as caught:
        data.batch(0, range(4), Draw(3, 0, range(4)))
    assert "--resume" in caught.value.remedy
    assert encoded(folder)[1].images == 6


def test_image_changed_after_the_audit_is_refused(folder: Path) -> None:
    data = opened(folder, Counting())
    Image.new("RGB", (16, 16), "white").save(folder / "5.png")
    with pytest.raises(UserError, match="has changed") as caught:
        data.encode()
    assert caught.value.where == str(folder / "5.png")
    data = opened(folder, Counting())
    (folder / "5.png").unlink()
    with pytest.raises(UserError, match="can no longer be read"):
        data.encode()


def batches(data: Dataset, steps: int) -> Iterator[tuple[int, Batch]]:
    for step in range(steps):
        yield step, data.batch(step, range(4), Draw(3, step, range(4)))


def test_batch_holds_the_images_and_captions_of_its_step(folder: Path) -> None:
    data, _ = encoded(folder, data={"caption_dropout": 0})
    for step, batch in batches(data, 6):
        numbers = [int(Path(name).stem) for name in data.names(step)]
        assert text(batch) == [f"number {number}" for number in numbers]
        assert batch["pixels"].shape == (4, 3, 16, 16)
        red = (batch["pixels"][:, 0, 0, 0] + 1) * 127.5
        assert red.round().tolist() == numbers
        assert (
            batch["geometry"].tolist() == [[16, 16, 0, 0, 16, 16]] * 4
        )  # height and width, top and left, height and width


def test_dataset_with_repeats_shows_an_image_that_many_times_a_pass(folder: Path) -> None:
    add(folder.parent / "often", 9)
    sources = [{"path": str(folder)}, {"path": str(folder.parent / "often"), "repeats": 2}]
    data = opened(folder, Counting(), data={"path": None, "sources": sources})
    shown = Counter(Path(name).stem for step in range(2) for name in data.names(step))  # 2 steps of 4: one pass
    assert shown == {**{str(number): 1 for number in range(6)}, "9": 2}


def test_geometry_is_height_first_with_the_crop_after_scaling(folder: Path) -> None:
    for file in folder.glob("*.png"):
        file.unlink()
    Image.new("RGB", (64, 32)).save(folder / "0.png")
    data, _ = encoded(folder)
    assert data.batch(0, [0], Draw(3, 0, [0]))["geometry"].tolist() == [[32, 64, 0, 8, 16, 16]]


def test_examples_loaded_alone_match_the_whole_batch(folder: Path) -> None:
    data, _ = encoded(folder, data={"flip": True, "caption_dropout": 0.5})
    for step, whole in batches(data, 8):
        alone = [data.batch(step, [place], Draw(3, step, [place])) for place in range(4)]
        assert all(torch.equal(whole[name], torch.cat([batch[name] for batch in alone])) for name in whole)


def test_flip_mirrors_half_of_the_examples(folder: Path) -> None:
    data, encoders = encoded(folder, data={"flip": True})
    assert encoders.images == 12
    mirrored = total = 0
    for step, batch in batches(data, 100):
        for image, name in zip(batch["pixels"], data.names(step), strict=True):
            number = int(Path(name).stem)
            left, right = ((corner[[0, 2]] + 1) * 127.5 for corner in (image[:, 0, 0], image[:, 0, -1]))
            plain = left.round().tolist() == [number, 0]
            assert plain or right.round().tolist() == [number, 0]
            assert not plain or right.round().tolist() == [0, 255]
            mirrored, total = mirrored + (not plain), total + 1
    assert 0.4 < mirrored / total < 0.6  # 0.5 ± 4 standard deviations of 400 samples
    assert encoders.images == 12


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_caption_dropout_drops_the_requested_share(folder: Path, share: float) -> None:
    data, _ = encoded(folder, data={"caption_dropout": share})
    captions = list(itertools.chain(*(text(batch) for _, batch in batches(data, 150))))
    assert abs(captions.count("") / len(captions) - share) <= (
        0.08 if 0 < share < 1 else 0
    )  # ± 4 standard deviations of 600 samples


def test_validation_is_repeatable_and_never_trains(folder: Path) -> None:
    data, _ = encoded(folder, data={"held_out": 0.34, "flip": True, "caption_dropout": 1.0})
    held = {Path(p.name).stem for p in data.images if p.held_out}
    assert data.has_validation
    assert len(held) == 2
    assert not held & {Path(name).stem for step in range(20) for name in data.names(step)}
    looks = [list(data.validation()) for _ in range(2)]
    assert {text(batch)[0] for batch, _ in looks[0]} == {f"number {stem}" for stem in held}
    for (batch, draw), (batch_again, draw_again) in zip(*looks, strict=True):
        assert same(batch, batch_again)
        assert torch.equal(draw.normal("noise", (4,)), draw_again.normal("noise", (4,)))
    assert len({draw.normal("noise", (1,)).item() for _, draw in looks[0]}) == 2
    assert not encoded(folder)[0].has_validation


def test_example_store_beyond_its_memory_limit_reads_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = encoded(folder)
    expected = [batch for _, batch in batches(whole, 12)]
    monkeypatch.setattr(example_store, "MEMORY_BYTES", 7000)  # two images of 3072 bytes
    data, encoders = encoded(folder)
    for (_, batch), wanted in zip(batches(data, 12), expected, strict=True):
        assert same(batch, wanted)
        assert sum(t.nbytes for entry in data._encoding._store._memory.values() for t in entry.values()) <= 7000
    assert (encoders.images, encoders.captions) == (0, [])


def test_uncached_encoder_writes_nothing_and_is_not_released(folder: Path) -> None:
    data, encoders = encoded(folder, Counting(caption_key="", cached=False))
    assert (encoders.images, encoders.captions, encoders.released) == (0, [], False)
    assert "text" not in data.batch(0, range(4), Draw(3, 0, range(4)))
    assert not list((folder.parent / "cache").rglob("*.safetensors"))


def test_captions_longer_than_the_model_reads_are_refused_or_truncated(folder: Path) -> None:
    assert opened(folder, Counting()).long_captions() == ""
    (folder / "3.txt").write_text("one two three four five six seven eight nine")
    data = opened(folder, Counting())
    with pytest.raises(UserError, match="longer than the 8 tokens") as caught:
        data.long_captions()
    assert caught.value.where == f"{folder / '3.png'}: 9 tokens"
    assert "long_captions: truncate" in caught.value.remedy
    said = opened(folder, Counting(), data={"long_captions": "truncate"}).long_captions()
    assert "3.png: 9 tokens" in said
    assert "they are truncated" in said
    with_prefix = {
        "path": None,
        "sources": [{"path": str(folder), "prefix": "seven words more than there are before,"}],
        "long_captions": "truncate",
    }
    assert opened(folder, Counting(), data=with_prefix).long_captions().count("6 of 6") == 1


def test_validation_over_two_processes_takes_equal_steps(folder: Path) -> None:
    data, _ = encoded(folder, data={"held_out": 0.5})
    alone = [text(batch)[0] for batch, _ in data.validation()]
    assert len(alone) == data.held_out_count == 3
    first, second = ([text(batch)[0] for batch, _ in data.validation(rank, 2)] for rank in (0, 1))
    assert first == [alone[0], alone[2]] and second == [alone[1], alone[2]], (
        "the last example fills the second rank's round"
    )

"""Whether training steps wait for images, and how many images per second are read, cropped and scaled.

    python benchmarks/bench_loader.py [--images 48] [--batch 8] [--steps 12] [--rounds 3]

JPEG photographs of 1600×1200, generated here, are prepared at 512² in three ways that alternate in one process: this
project's `Dataset`; a plain torch `Dataset` with Pillow behind a `DataLoader` with as many workers as this project
has threads; and the same without workers. The images are compared first: they are equal. Nothing is cached, so every
access reads and decodes. Then simulated GPU steps leave the CPU idle for half as long again as a batch takes to load;
the share of wall time spent waiting for a batch is printed, also for batches from the latent cache.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.config.loader import parse_recipe
from finetune.config.machine import Machine
from finetune.data import dataset as ours
from finetune.data import example_store
from finetune.data.audit.audit import scan
from finetune.data.batch import Batch, ImageTextEncoder
from finetune.data.decoding import decode_role
from finetune.data.prefetch import threads
from finetune.planning import make_plan
from finetune.rng import Draw

SIZE, RESOLUTION = (1600, 1200), 512
STEPS_OF_A_RUN = 100_000
READY = 2 * threads() + 2  # batches that a way may have ready


class AsTheyAre(ImageTextEncoder):
    image_key, caption_key = "as they are", ""

    def __init__(self, cached: bool) -> None:
        self.cached = cached

    def encode_image(self, pixels: Tensor) -> Batch:
        return {"pixels": pixels}

    def encode_caption(self, caption: str) -> Batch:
        return {}

    def release(self) -> None:
        """Nothing is held."""


class Plain(TorchDataset[Tensor]):
    """The usual way: a list of files, Pillow, a tensor."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> Tensor:
        with Image.open(self.files[place]) as opened:
            image = opened.convert("RGB")
        scale = RESOLUTION / min(image.size)
        whole = [round(side * scale) for side in image.size]
        left, upper = ((side - RESOLUTION) // 2 / side * full for side, full in zip(whole, image.size, strict=True))
        box = (
            left,
            upper,
            left + RESOLUTION / whole[0] * image.width,
            upper + RESOLUTION / whole[1] * image.height,
        )
        image = image.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS, box=box)
        return torch.from_numpy(numpy.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


def photographs(folder: Path, count: int) -> None:
    """JPEGs with the detail of photographs: coarse and fine noise."""
    generator = numpy.random.default_rng(0)
    for number in range(count):
        fine = generator.normal(0, 12, (*SIZE[::-1], 3))
        coarse = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=numpy.uint8)).resize(
            SIZE, Image.Resampling.BICUBIC
        )
        buffer = io.BytesIO()
        Image.fromarray((numpy.asarray(coarse) + fine).clip(0, 255).astype(numpy.uint8)).save(
            buffer, "JPEG", quality=90
        )
        (folder / f"{number}.jpg").write_bytes(buffer.getvalue())
        (folder / f"{number}.txt").write_text("a photograph")


def opened(folder: Path, batch: int, cached: bool) -> ours.Dataset:
    sections = {
        "model": {"family": "sd", "path": "none"},
        "adapter": {},
        "data": {
            "path": str(folder / "data"),
            "resolution": RESOLUTION,
            "buckets": False,
            "cache": str(folder / "cache"),
        },
        "train": {"steps": STEPS_OF_A_RUN, "batch_size": batch},
    }
    recipe = parse_recipe(
        "method: lora\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in sections.items()),
        "bench.yaml",
        "bench",
    )
    audit = scan(recipe.data)
    found = ours.Dataset(
        make_plan(recipe, audit, Machine("cpu", "bench", 1, 1, False, 1 << 34)), audit, AsTheyAre(cached)
    )
    found.encode()
    return found


def by_steps(data: ours.Dataset, batch: int) -> Iterator[Tensor]:
    places = range(batch)
    for step in range(STEPS_OF_A_RUN):
        yield data.batch(step, places, Draw(0, step, places))["pixels"]


def by_torch(files: list[str], batch: int, workers: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        Plain(files),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=generator,
    )
    while True:
        yield from loader


def taken(batches: Iterator[Tensor], steps: int, seconds: float = 0.0) -> tuple[float, float]:
    """(wall seconds, of them waiting for batches) of `steps` steps that take `seconds` each."""
    start, waited = time.perf_counter(), 0.0
    for _ in range(steps):
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        time.sleep(seconds)
    return time.perf_counter() - start, waited


def in_turns(
    ways: dict[str, Iterator[Tensor]], rounds: int, measure: Callable[[Iterator[Tensor]], float]
) -> dict[str, float]:
    """The median of what is measured of each way, once it has used up what it got ready while others had their turn."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, batches in ways.items():
            taken(batches, READY)
            found[name].append(measure(batches))
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 48), ("batch", 8), ("steps", 12), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    example_store.MEMORY_BYTES = 0  # every draw is a new one
    with tempfile.TemporaryDirectory(prefix="ft-loader-") as name:
        folder = Path(name)
        (folder / "data").mkdir()
        photographs(folder / "data", given.images)
        data = opened(folder, given.batch, cached=False)
        files = [image.name for image in data.images]
        plain = Plain(files)
        apart = max(
            float((decode_role(image, "target", "white", False) - plain[place]).abs().max())
            for place, image in enumerate(data.images)
        )
        print(f"largest difference between the two ways' images: {apart * 127.5:.3f} of 255 levels")
        ways = {
            f"this project, {threads()} threads": by_steps(data, given.batch),
            f"torch, {threads()} workers": by_torch(files, given.batch, threads()),
            "torch, no workers": by_torch(files, given.batch, 0),
        }
        for batches in ways.values():
            next(batches)  # workers start
        speed = in_turns(ways, given.rounds, lambda batches: given.steps * given.batch / taken(batches, given.steps)[0])
        first = next(iter(speed.values()))
        for way, rate in speed.items():
            print(f"{way:<26} {rate:6.1f} images/s   this project is {first / rate:.2f} times as fast")
        length = 1.5 * given.batch / first
        ways["this project, from its cache"] = by_steps(opened(folder, given.batch, cached=True), given.batch)
        next(ways["this project, from its cache"])

        def share(batches: Iterator[Tensor]) -> float:
            wall, waited = taken(batches, given.steps, length)
            return waited / wall

        for way, part in in_turns(ways, given.rounds, share).items():
            print(f"{way:<28} waits for {part:6.1%} of the time, at steps of {length:.2f} s")


if __name__ == "__main__":
    main()

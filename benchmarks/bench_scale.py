"""The cost of a million images: seconds and peak memory to audit, bucket, cache and train, at 10 k, 100 k and 1 M.

    python benchmarks/bench_scale.py [--entries 10000 100000 1000000] [--uncached | --synthetic] [--folder FOLDER]

Writes shards of tiny captioned images in four shapes (4 GB for a million, deleted afterwards). For each size, a
process of its own goes through a run: the audit; the audit again, as on a second start; plan and order; encoding
everything into the cache with an encoder that costs nothing; opening the cache again; 300 steps of a small network on
batches of 16 from it (--uncached: from the shards, without encoding). --synthetic writes no shards: it reads a table
of captions, fills an index with images created on access, and searches them for duplicates and near duplicates.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import random
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.config.loader import parse_recipe
from finetune.config.machine import Machine
from finetune.config.schema import Data
from finetune.data.audit import duplicates, inspect
from finetune.data.audit.audit import Audit, scan
from finetune.data.audit.index import Index
from finetune.data.batch import Batch, ImageTextEncoder
from finetune.data.buckets import buckets, fit
from finetune.data.dataset import Dataset
from finetune.data.example import Example
from finetune.data.media.image import canonical_color
from finetune.data.sources.captions import TABLES, Captions
from finetune.planning import make_plan
from finetune.rng import Draw

SHAPES = ((24, 24), (32, 16), (16, 32), (28, 20))  # widths are multiples of four: a bitmap pads its rows to that
SHARD = 10_000
STEPS, BATCH = 300, 16


class Means(ImageTextEncoder):
    """An image becomes the means of its 4×4 patches in half precision, a caption its length."""

    image_key, caption_key = "means", "length"

    def __init__(self, cached: bool) -> None:
        self.cached = cached

    def encode_image(self, pixels: Tensor) -> Batch:
        return {"mean": nn.functional.adaptive_avg_pool2d(pixels, 4).half()}

    def encode_caption(self, caption: str) -> Batch:
        return {"length": torch.tensor([float(len(caption))])}

    def release(self) -> None:
        """Nothing is held."""


def make(folder: Path, entries: int) -> None:
    """Write shards of `entries` different images."""
    folder.mkdir()
    for start in range(0, entries, SHARD):
        with tarfile.open(folder / f"{start // SHARD:05d}.tar", "w") as archive:
            for number in range(start, min(start + SHARD, entries)):
                for name, content in (
                    (f"{number:07d}.bmp", bitmap(number)),
                    (f"{number:07d}.txt", f"image number {number}".encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def bitmap(number: int) -> bytes:
    """A Windows bitmap of 4×4 patches, each with its own color."""
    width, height = SHAPES[number % len(SHAPES)]
    patches = numpy.frombuffer(random.Random(number).randbytes(48), numpy.uint8).reshape(4, 4, 3)
    pixels = patches.repeat(-(-height // 4), 0)[:height].repeat(-(-width // 4), 1)[:, :width].tobytes()
    return (
        struct.pack(
            "<2sIHHIIIIHHIIIIII",
            b"BM",
            54 + len(pixels),
            0,
            0,
            54,
            40,
            width,
            height,
            1,
            24,
            0,
            len(pixels),
            2835,
            2835,
            0,
            0,
        )
        + pixels
    )


def made(folder: Path, entries: int, data: Data, lap: Callable[[str], None]) -> Audit:
    """The audit of images that are nowhere, each made when it is read, with captions from one table and fingerprints
    at random.
    """
    folder.mkdir(parents=True)
    with open(folder / TABLES[0], "w", encoding="utf-8") as table:
        for number in range(entries):
            table.write(
                json.dumps(
                    {
                        "file_name": f"{number // SHARD:05d}/{number:07d}.bmp",
                        data.caption_column: f"image number {number}",
                    }
                )
                + "\n"
            )
    lap("write the table")
    captions = Captions(folder, [TABLES[0]], data.caption_column)
    lap("read the table")
    index, choices, fingerprints = (
        Index(),
        buckets(data.resolution, data.bucket_step, data.maximum_aspect, several=True),
        bytearray(),
    )
    crops = [fit(shape, choices) for shape in SHAPES]
    for number in range(entries):
        if number % SHARD == 0:
            below = folder / f"{number // SHARD:05d}"
            beside = Captions(below, [], data.caption_column, captions)
        digest, name, read = (
            hashlib.sha256(bitmap(number)).digest(),
            f"{number:07d}.bmp",
            functools.partial(bitmap, number),
        )
        caption = beside.of(name).text or ""
        index.append(Example(str(below / name), caption, digest.hex(), crops[number % len(crops)], 1, False, 1.0, read))
        fingerprints += digest[: inspect.FINGERPRINT_BYTES]
    lap("index")
    twice = [*duplicates.groups(index.copies()), *duplicates.groups(duplicates.near(fingerprints))]
    lap("duplicates")
    assert not twice and not list(captions.unused())
    return Audit(index, (), (), canonical_color(data.background))


def measure(shards: Path, cache: Path, cached: bool, synthetic: int) -> None:
    """Take the way of a run and print {phase: [seconds, peak bytes]}; of so many images that are nowhere, if any."""
    found: dict[str, tuple[float, int]] = {}
    last = time.perf_counter()

    def lap(phase: str) -> None:
        nonlocal last
        now = time.perf_counter()
        print(f"{phase}: {now - last:.1f} s", file=sys.stderr, flush=True)
        found[phase] = (now - last, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        last = now

    sections = {
        "model": {"family": "sd", "path": "none"},
        "adapter": {},
        "data": {"path": str(shards), "resolution": 24, "bucket_step": 8, "cache": str(cache)},
        "train": {"steps": STEPS, "batch_size": BATCH},
    }
    recipe = parse_recipe(
        "method: lora\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in sections.items()),
        "bench.yaml",
        "bench",
    )
    lap("start")
    if synthetic:
        audit = made(shards, synthetic, recipe.data, lap)
    else:
        scan(recipe.data)
        lap("audit")
        audit = scan(recipe.data)
        lap("audit again")
    plan = make_plan(recipe, audit, Machine("cpu", "bench", 1, 1, False, 1 << 34))
    data = Dataset(plan, audit, Means(cached))
    lap("plan and order")
    if cached:
        data.encode()
        lap("encode")
        data = Dataset(plan, audit, Means(cached))
        data.encode()
        lap("encode again")
    train(data)
    lap(f"{STEPS} steps")
    print(json.dumps({"buckets": len(plan.data.buckets), "images": plan.data.images, "phases": found}))


def train(data: Dataset) -> None:
    net = nn.Linear(48, 1)
    optimizer = torch.optim.AdamW(net.parameters())
    for step in range(STEPS):
        batch = data.batch(step, range(BATCH), Draw(0, step, range(BATCH)))
        nn.functional.mse_loss(net(batch["mean"].float().flatten(1)), batch["length"]).backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--uncached", action="store_true", help="read training batches from the shards, not encoded")
    parser.add_argument("--synthetic", action="store_true", help="create images on access instead of writing shards")
    parser.add_argument(
        "--folder", type=Path, help="folder of the shards and the cache; default: the system's temporary folder"
    )
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        torch.set_num_threads(1)
        measure(
            given.measure[0],
            given.measure[1],
            not (given.uncached or given.synthetic),
            given.entries[0] if given.synthetic else 0,
        )
        return
    for entries in given.entries:
        folder = Path(tempfile.mkdtemp(prefix="ft-scale-", dir=given.folder))
        try:
            if not given.synthetic:
                make(folder / "shards", entries)
            command = [sys.executable, __file__, "--measure", str(folder / "shards"), str(folder / "cache")]
            command += (
                ["--uncached"]
                if given.uncached
                else ["--synthetic", "--entries", str(entries)]
                if given.synthetic
                else []
            )
            measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{measured['images']:,} images in {measured['buckets']} buckets")
        for phase, (seconds, peak) in measured["phases"].items():
            print(f"  {phase:<15} {seconds:8.1f} s   peak {peak / 2**20:6.0f} MiB", flush=True)


if __name__ == "__main__":
    main()

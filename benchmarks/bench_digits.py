"""Likelihood of handwritten digits: bits/dim of our families on scikit-learn's 8×8 digits, 17 levels.

    python benchmarks/bench_digits.py                       # all, three seeds each, in runs/digits; resumes
    python benchmarks/bench_digits.py --only vae --seeds 1
    python benchmarks/bench_digits.py --validate vae --set net.width=64   # try settings without the test images

Each model trains by its recipe in `recipes/scratch/` on the first 1,000 images. The checkpoint with the best likelihood
on the next 350 is scored once on the last 447. Bits/dim are exact for autoregressive models and upper bounds for VAEs
(−IWAE with 256 samples, next to the −ELBO) and flows (−log of the mean over 64 dequantizations). The baselines without
a network are computed from the training images.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.config.loader import load_recipe
from finetune.config.schema import Data
from finetune.data.audit.audit import scan
from finetune.data.example import Example
from finetune.evaluation.likelihood import nats
from finetune.job import prepare
from finetune.models.scratch.base import LikelihoodModel, Space
from finetune.planning import Plan

DIMENSIONS, LEVELS = 64, 17
FIXED = (
    *(
        "data.path=embedded:digits/train",
        "data.resolution=8",
        "data.grayscale=true",
        f"data.levels={LEVELS}",
        "data.missing_captions=empty",
    ),
    *(
        "sample.prompts=['1','2','3','4']",
        "sample.every=100000",
        "train.checkpoint_every=100",
        "train.keep_checkpoints=1000",
    ),
)
VAE = (
    *("net.halvings=2", "net.width=32", "net.latent=16", "net.distribution=categorical", "net.dropout=0.1"),
    *("train.steps=800", "train.batch_size=64"),
)
AUTOREGRESSIVE = (
    *("net.dilation=1", "net.width=48", "net.blocks=4", "net.distribution=categorical", "net.dropout=0.5"),
    *("train.steps=600", "train.batch_size=32"),
)
FLOW = (
    *(
        "net.scales=2",
        "net.steps=4",
        "net.width=48",
        "net.coupling=mixture",
        "net.mixtures=4",
        "net.dequantization=variational",
    ),
    *("net.dropout=0.2", "net.margin=0.0", "train.steps=1000", "train.batch_size=64", "optimizer.lr=1e-3"),
)
# name → (family in words, goal in bits/dim, recipe, what of it is set for so little data)
CONTENDERS: dict[str, tuple[str, float, str, tuple[str, ...]]] = {
    "vae": ("VAE", 2.17, "scratch/vae", VAE),
    "ar": ("autoregressive", 1.95, "scratch/pixelcnn++", AUTOREGRESSIVE),
    "flow": ("flow", 2.40, "scratch/glow", FLOW),
}
PARTICLES = 256


def images_of(split: str) -> Sequence[Example]:
    data = Data(path=f"embedded:digits/{split}", resolution=8, buckets=False, missing_captions="empty")
    return scan(data).images


def bits(of_images: Tensor) -> float:
    """Mean nats of images → bits/dim."""
    return float(of_images.mean()) / (DIMENSIONS * math.log(2))


def levels_of(images: Sequence[Example]) -> Tensor:
    """[N, 64] int64."""
    import io

    import numpy
    from PIL import Image

    space = Space(1, 8, 8, LEVELS)
    pixels = [
        torch.from_numpy(numpy.array(Image.open(io.BytesIO(p.read())).convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
        for p in images
    ]
    return torch.stack([space.levels_of(one).flatten().long() for one in pixels])


def references(split: str) -> dict[str, float]:
    """Bits/dim of what needs no network: all levels alike; each pixel by its own histogram, every level counted once
    more.
    """
    training, others = levels_of(images_of("train")), levels_of(images_of(split))
    counts = torch.nn.functional.one_hot(training, LEVELS).sum(0).double() + 1
    chosen = (
        (counts / counts.sum(1, keepdim=True)).log().expand(len(others), -1, -1).gather(2, others[..., None]).squeeze(2)
    )
    return {"uniform": math.log2(LEVELS), "pixel histogram": bits(-chosen.sum(1))}


def with_checkpoint(model: LikelihoodModel, folder: Path) -> None:
    """Put a checkpoint's averaged weights (its weights, where there are no averages) into the model."""
    found = load_file(folder / "weights.safetensors")
    if (folder / "ema.safetensors").is_file():
        found |= load_file(folder / "ema.safetensors")
    with torch.no_grad():
        for name, tensor in model.state().items():
            tensor.copy_(found[name])
    model.net.eval()


def run(folder: Path, name: str, seed: int, overrides: Sequence[str], test: bool) -> dict[str, Any]:
    """Train one contender from one seed, choose its checkpoint, and score it; read back, if that was done before."""
    done = folder / "result.json"
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    _, _, recipe, own = CONTENDERS[name]
    asked = load_recipe(recipe, [*FIXED, *own, *overrides, f"train.seed={seed}", f"output.folder={folder}"])
    before, wall = time.process_time(), time.perf_counter()
    job = prepare(asked, resume=folder.exists())
    job.trainer.train()
    seconds = time.process_time() - before
    model = job.model
    assert isinstance(model, LikelihoodModel)
    by_step = {}
    for place in sorted((folder / "checkpoints").glob("step-*")):
        with_checkpoint(model, place)
        by_step[place.name] = bits(nats(model, images_of("validation")))
    best = min(by_step, key=by_step.__getitem__)
    with_checkpoint(model, folder / "checkpoints" / best)
    found = {
        "validation": by_step[best],
        "step": int(best.removeprefix("step-")),
        "cpu_seconds": seconds,
        "wall_seconds": time.perf_counter() - wall,
    }
    found |= {
        "parameters": sum(p.numel() for p in model.trained().values()),
        "validations": by_step,
        "steps": _steps(job.plan),
    }
    if test:
        found["test"] = bits(nats(model, images_of("test")))
        found["test_tight"] = (
            bits(nats(model, images_of("test"), particles=PARTICLES)) if not model.exact else found["test"]
        )
    done.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _steps(plan: Plan) -> int:
    return plan.steps


def table(folder: Path, names: Sequence[str], seeds: int) -> None:
    rows = [
        f"{'':28}{'parameters':>12}{'validation':>12}{'test':>8}{'by one draw':>13}{'± seeds':>9}{'goal':>7}"
        f"{'CPU min':>9}"
    ]
    validation, test = references("validation"), references("test")
    rows += [f"{name:28}{'–':>12}{validation[name]:12.3f}{test[name]:8.3f}" for name in test]
    for name in names:
        found = [run(folder / f"{name}-{seed}", name, seed, (), test=True) for seed in range(seeds)]
        mean = {
            key: statistics.mean(one[key] for one in found)
            for key in ("validation", "test", "test_tight", "cpu_seconds")
        }
        spread = statistics.stdev(one["test_tight"] for one in found) if seeds > 1 else 0.0
        words, goal, recipe, _ = CONTENDERS[name]
        rows.append(
            f"{words + ', ' + recipe:28}{found[0]['parameters']:12,}{mean['validation']:12.3f}"
            f"{mean['test_tight']:8.3f}{mean['test']:13.3f}"
            f"{spread:9.3f}{goal:7.2f}{mean['cpu_seconds'] / 60:9.1f}"
        )
        print("\n".join(rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/digits"))
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--validate", choices=CONTENDERS, help="train one with --set and print only its validation likelihood"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.validate:
        found = run(given.folder, given.validate, 0, given.set, test=False)
        print(json.dumps(found, indent=1))
    else:
        table(given.folder, given.only, given.seeds)


if __name__ == "__main__":
    main()

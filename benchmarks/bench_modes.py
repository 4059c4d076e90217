"""How many modes our GANs cover where the answer is known: rings and grids of Gaussians, and stacked digits.

    python benchmarks/bench_modes.py points [--seeds 3]     # 8 Gaussians on a ring, 25 on a grid, with each loss
    python benchmarks/bench_modes.py digits [--minutes 2]   # three stacked digits, 1,000 modes, with each GAN recipe

Both resume (runs/modes). Next to each count are the share of samples within three deviations of a mode, and the reverse
KL divergence of the samples' modes from uniform, in nats. Published rows are from the PacGAN paper (Lin et al. 2018,
arXiv:1712.04086), which has other network sizes and budgets.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from finetune.config.loader import load_recipe
from finetune.config.nets.gan import Adversarial as Section
from finetune.job import prepare
from finetune.models.base import SampleRequest
from finetune.models.scratch.base import PixelModel, Space, open_model
from finetune.models.scratch.gan.base import (
    Discriminator,
    DiscriminatorBody,
    DiscriminatorStep,
    Generator,
    GeneratorStep,
)
from finetune.rng import Draw, mix
from finetune.training.optimizers import Ema
from tools.archive import bundled

# -- points -----------------------------------------------------------------------------------------------------------

RING = torch.tensor([[math.cos(n * math.pi / 4), math.sin(n * math.pi / 4)] for n in range(8)])
GRID = torch.tensor([[x, y] for x in range(-4, 5, 2) for y in range(-4, 5, 2)]).float()
# name → (centers, standard deviation), as in the PacGAN paper, but for the grid's unit, a quarter of its: the same
# penalties suit both
TASKS = {"ring": (RING, 0.01), "grid": (GRID / 4, 0.05 / 4)}
STEPS, BATCH, WIDTH, DEPTH, DRAWN = 4000, 64, 128, 3, 2500
RATE = 1e-3  # falls to nothing: what is left of it decides how sharp a mode becomes
SLOPE = 1e-3  # γ of R1 and R2: a mode is a hundredth wide, so that a critic that is to see it must be steep
# name → what the section says
LOSSES: dict[str, dict[str, Any]] = {
    "logistic": {},
    "logistic, minibatch discrimination": {"minibatch": "discrimination"},
    "logistic, unrolled 5": {"unroll": 5, "unroll_lr": SLOPE},  # of plain descent on a critic so steep
    "logistic, R1": {"r1": SLOPE},
    "hinge, R1": {"objective": "hinge", "r1": SLOPE},
    "wasserstein, gradient penalty": {"objective": "wasserstein", "gradient_penalty": 0.1, "discriminator_steps": 5},
    "relativistic, R1 + R2": {"objective": "relativistic", "r1": SLOPE, "r2": SLOPE},
}
PUBLISHED_POINTS = {
    "GAN": ("6.3", "98.2 %", "0.45", "17.3"),
    "ALI": ("6.6", "97.6 %", "0.36", "24.1"),
    "PacGAN2": ("7.9", "95.6 %", "0.07", "23.8"),
    "PacGAN4": ("7.8", "95.9 %", "0.07", "24.8"),
}


@dataclass(frozen=True)
class Points(Section):
    """A section for points instead of images."""


@final
class Plane:
    """Stands for a `Space`: points are images [1, 1, 2], and their levels the points themselves."""

    channels, height, width, classes = 1, 1, 2, ()

    def scaled(self, levels: Tensor) -> Tensor:
        return levels


@final
class Together(Draw):
    """All positions share one generator: much faster, and a benchmark's batch is never split."""

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(mix(self._seed, self.step, purpose))

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        return torch.randn(len(self.batch_indices), *shape, generator=self._generator(purpose))

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        return torch.rand(len(self.batch_indices), *shape, generator=self._generator(purpose))

    def apart(self, use: str) -> Together:
        return Together(mix(self._seed, use), self.step, self.batch_indices)


def layers(inputs: int, outputs: int | None) -> nn.Sequential:
    """ReLU, not leaky: its flat halves make edges as sharp as modes so narrow need."""
    sizes = [inputs, *[WIDTH] * DEPTH]
    hidden = [layer for before, after in itertools.pairwise(sizes) for layer in (nn.Linear(before, after), nn.ReLU())]
    return nn.Sequential(*hidden, *([nn.Linear(WIDTH, outputs)] if outputs else []))


@final
class PointGenerator(Generator):
    def __init__(self, latent: int) -> None:
        super().__init__()
        self.layers = layers(latent, 2)

    def forward(self, latent: Tensor, classes: Tensor | None, draw: Draw, truncation: float = 1.0) -> Tensor:
        found: Tensor = self.layers(latent)
        return found.view(-1, 1, 1, 2)


@final
class PointReader(DiscriminatorBody):
    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(2, None)

    def forward(self, images: Tensor, draw: Draw) -> Tensor:
        found: Tensor = self.layers(images.flatten(1))
        return found[..., None, None]


def play(section: Section, centres: Tensor, deviation: float, seed: int) -> dict[str, float]:
    """Train generator and discriminator with our GANs' train steps, average the generator, and count its modes."""
    torch.manual_seed(seed)
    space = cast(Space, Plane())
    generator = PointGenerator(section.latent)
    discriminator = Discriminator(space, section, PointReader(), WIDTH, lambda channels: (nn.Flatten(), channels))
    train_steps = (
        DiscriminatorStep(discriminator, generator, space, section),
        GeneratorStep(generator, discriminator, space, section, None),
    )
    optimizers = [
        torch.optim.Adam(train_step.parameters(), lr=RATE, betas=(0.0, 0.99), fused=True) for train_step in train_steps
    ]
    average = Ema(dict(generator.named_parameters()), 0.995)
    started = time.process_time()
    for step in range(STEPS):
        draw = Together(seed, step, range(BATCH))
        which = (draw.uniform("mode") * len(centres)).long()
        batch = {"pixels": (centres[which] + deviation * draw.normal("data", (2,))).view(-1, 1, 1, 2)}
        for train_step, optimizer in zip(train_steps, optimizers, strict=True):
            if step % train_step.every:
                continue
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - step / STEPS)
            optimizer.zero_grad()
            train_step.loss(batch, draw).mean().backward()
            optimizer.step()
        average.update(step)
    average.swap()
    seconds = time.process_time() - started
    with torch.no_grad():
        draw = Together(seed, "sample", range(DRAWN))
        points = generator(draw.normal("latent", (section.latent,)), None, draw).view(-1, 2)
    distance, nearest = torch.cdist(points, centres).min(1)
    good = distance < 3 * deviation
    found = {"modes": float(len(nearest[good].unique())), "good": float(good.float().mean())}
    return found | {"reverse_kl": reverse_kl(nearest, len(centres)), "seconds": seconds}


def reverse_kl(modes: Tensor, count: int) -> float:
    """KL divergence of the modes' frequencies from uniform, in nats: 0 if uniform, log(count) for a single mode."""
    shares = torch.bincount(modes, minlength=count).double() / len(modes)
    return math.log(count) - float(torch.special.entr(shares).sum())


def points(folder: Path, seeds: int, only: Sequence[str]) -> None:
    head = (
        f"{'':38}" + "".join(f"{f'{task}: modes':>15}{'good':>8}{'reverse KL':>12}" for task in TASKS) + f"{'CPU s':>8}"
    )
    deviations = ", ".join(f"{task} {deviation:g}" for task, (_, deviation) in TASKS.items())
    print(
        f"{STEPS} steps of batch {BATCH}, {DEPTH} layers of {WIDTH}, {seeds} seeds, {DRAWN} samples; deviations: "
        f"{deviations}\n{head}",
        flush=True,
    )
    for name in only:
        section = Points(latent=2, **LOSSES[name])
        line, spent = f"{name:38}", 0.0
        for task, (centres, deviation) in TASKS.items():
            found = []
            for seed in range(seeds):
                file = folder / "points" / f"{task}, {name}, {seed}.json"
                found.append(kept(file, functools.partial(play, section, centres, deviation, seed)))
            mean = {key: statistics.mean(one[key] for one in found) for key in found[0]}
            line += f"{mean['modes']:15.1f}{mean['good']:8.1%}{mean['reverse_kl']:12.2f}"
            spent += sum(one["seconds"] for one in found)
        print(f"{line}{spent:8.0f}", flush=True)
    print("published, PacGAN's table (ring: modes, good, reverse KL; grid: modes)")
    for name, (modes, good, divergence, grid) in PUBLISHED_POINTS.items():
        print(f"{name:38}{modes:>15}{good:>8}{divergence:>12}{grid:>15}")


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` found, written down; read back, if that was done before."""
    if file.is_file():
        before: dict[str, Any] = json.loads(file.read_text())
        return before
    found = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(found) + "\n")
    aside.replace(file)
    return found


# -- stacked digits ---------------------------------------------------------------------------------------------------

LEVELS, STACKED, SCORED = 17, 10_000, 26_000  # 26,000 samples are scored, as by the PacGAN paper's code
FIXED = (
    *("data.resolution=8", f"data.levels={LEVELS}", "net.halvings=2", "sample.prompts=[]", "train.batch_size=64"),
    *(
        "train.checkpoint_every=200",
        "net.ada_target=0",
        "optimizer.schedule=constant",
        "sample.collapse_check_every=null",
    ),
    "net.width=32",  # as wide where the nets begin as the recipes are at 32², which halve once more
)
# Radford et al. 2015, arXiv:1511.06434, §4: batch norm in both nets, nothing else holds the critic; its rate and
# momentum.
PLAIN = (
    *("net.generator_norm=batch", "net.discriminator_norm=batch", "net.minibatch=none", "net.r1=0"),
    *("optimizer.lr=2.0e-4", "optimizer.betas=[0.5,0.999]"),
)
# name → (recipe, what of it is set): γ twenty times the recipes', by which they find more here
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "dcgan, as in its paper": ("scratch/dcgan", PLAIN),
    "dcgan": ("scratch/dcgan", ("net.r1=2",)),
    "wgan-gp": ("scratch/wgan-gp", ()),
    "r3gan": ("scratch/r3gan", ("net.r1=10", "net.r2=10")),
    "stylegan2": ("scratch/stylegan2", ("net.r1=2",)),
}
PUBLISHED_DIGITS = {
    "DCGAN": (99.0, 3.40),
    "DCGAN, PacGAN's own run": (78.9, 4.50),
    "ALI": (16.0, 5.40),
    "Unrolled GAN": (48.7, 4.32),
    "VEEGAN": (150.0, 2.95),
    "PacDCGAN2": (1000.0, 0.06),
    "PacDCGAN4": (1000.0, 0.07),
}


def digits_of(split: str) -> tuple[Tensor, Tensor]:
    """(levels [N, 8, 8] uint8, digits [N] int64) of the embedded digits."""
    files = bundled(f"digits/{split}")
    space = Space(1, 8, 8, LEVELS)
    pixels = [
        torch.from_numpy(numpy.array(Image.open(io.BytesIO(file.read())).convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
        for file in files.values()
    ]
    return torch.stack([space.levels_of(one)[0] for one in pixels]), torch.tensor(
        [int(name.partition("/")[0]) for name in files]
    )


def stacked(folder: Path) -> Path:
    """A folder of images of three random digits each, one per color channel."""
    target = folder / "stacked"
    if target.is_dir():
        return target
    levels, _ = digits_of("train")
    dice, aside, space = random.Random(0), folder / "stacked.part", Space(3, 8, 8, LEVELS)
    aside.mkdir(parents=True, exist_ok=True)
    for number in range(STACKED):
        three = torch.stack([levels[dice.randrange(len(levels))] for _ in range(3)])
        space.images(three[None])[0].save(aside / f"{number:05d}.png")
    aside.rename(target)
    return target


@final
class Reading(nn.Module):
    """Which digit: levels [N, 8, 8] → [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, 10)),
        )

    def forward(self, levels: Tensor) -> Tensor:
        found: Tensor = self.layers(levels[:, None].float() / 8 - 1)
        return found


def learn_to_read() -> tuple[Reading, float]:
    """A classifier of the training digits, and its share of the test digits that it gets right."""
    torch.manual_seed(0)
    net, (levels, labels) = Reading(), digits_of("train")
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for step in range(600):
        chosen = torch.randint(len(levels), (64,))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / 600)
        optimizer.zero_grad()
        functional.cross_entropy(net(levels[chosen]), labels[chosen]).backward()
        optimizer.step()
    net.eval()
    levels, labels = digits_of("test")
    with torch.no_grad():
        return net, float((net(levels).argmax(1) == labels).float().mean())


@torch.no_grad()
def modes_of(net: Reading, levels: Tensor) -> Tensor:
    """[N, 3, 8, 8] → 0 … 999, [N]."""
    digits = net(levels.flatten(0, 1)).argmax(1).view(-1, 3)
    found: Tensor = (digits * torch.tensor([100, 10, 1])).sum(1)
    return found


@torch.no_grad()
def drawn(model: PixelModel, count: int) -> Tensor:
    """Levels [count, 3, 8, 8]."""
    found = []
    for start in range(0, count, 500):
        seeds = tuple(range(start, min(count, start + 500)))
        found.append(model.generate(None, Draw(0, "modes", seeds), SampleRequest(("",) * len(seeds), seeds, 1, 1.0)))
    return torch.cat(found)


def seconds_of(recipe: str, overrides: Sequence[str], folder: Path) -> float:
    """Processor time of a step, by a dozen of them in a run that is not kept."""
    job = prepare(
        load_recipe(recipe, [*overrides, "train.steps=20", f"output.folder={folder}"]), resume=folder.exists()
    )
    for step in range(2):
        job.trainer.train_step(step)
    before = time.process_time()
    for step in range(2, 14):
        job.trainer.train_step(step)
    return (time.process_time() - before) / 12


def train(name: str, folder: Path, data: Path, minutes: float, reading: Reading) -> dict[str, Any]:
    recipe, own = RECIPES[name]
    overrides = [*FIXED, *own, f"data.path={data}"]
    budget = kept(folder / "budget.json", lambda: {"seconds_a_step": seconds_of(recipe, overrides, folder / "timed")})
    steps = max(10, int(60 * minutes / budget["seconds_a_step"]))
    print(f"{name}: {steps} steps in {minutes:g} CPU minutes", flush=True)
    run = folder / f"run-{minutes:g}"
    before = time.process_time()
    job = prepare(
        load_recipe(recipe, [*overrides, f"train.steps={steps}", f"output.folder={run}"]), resume=run.exists()
    )
    job.trainer.train()
    seconds = time.process_time() - before
    with job.trainer.state.averaged():
        assert isinstance(job.model, PixelModel)
        job.model.save(run / "final")
    modes = modes_of(reading, drawn(open_model(run), SCORED))
    found = {"modes": len(modes.unique()), "reverse_kl": reverse_kl(modes, 1000), "steps": steps, "seconds": seconds}
    return found | {"parameters": sum(parameter.numel() for parameter in job.model.trained().values())}


def digits(folder: Path, minutes: float, only: Sequence[str]) -> None:
    data = stacked(folder)
    reading, right = learn_to_read()
    levels, labels = digits_of("train")
    dice = torch.Generator().manual_seed(1)
    true = levels[torch.randint(len(levels), (SCORED, 3), generator=dice)]
    seen = modes_of(reading, true)
    print(
        f"the reader gets {right:.1%} of the test digits right; {len(levels)} digits, {len(labels.unique())} kinds",
        flush=True,
    )
    rows = [f"{'':28}{'modes of 1000':>15}{'reverse KL':>12}{'steps':>9}{'parameters':>12}{'CPU min':>9}"]
    rows += [f"{'true images':28}{len(seen.unique()):>15}{reverse_kl(seen, 1000):12.2f}"]
    for name in only:
        place = folder / name.replace(", ", "-").replace(" ", "-")
        found = kept(place / f"result-{minutes:g}.json", functools.partial(train, name, place, data, minutes, reading))
        rows.append(
            f"{name:28}{found['modes']:>15}{found['reverse_kl']:12.2f}{found['steps']:>9}"
            f"{found['parameters']:>12,}{found['seconds'] / 60:9.1f}"
        )
        print("\n".join(rows), flush=True)
    print("published, of 28×28 digits, PacGAN's table")
    for name, (count, divergence) in PUBLISHED_DIGITS.items():
        print(f"{name:28}{count:>15g}{divergence:12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("points", "digits"))
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/modes"))
    parser.add_argument("--seeds", type=int, default=3, help="of points")
    parser.add_argument("--minutes", type=float, default=2, help="of digits: processor time for each recipe")
    parser.add_argument("--only", nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = list(LOSSES if given.what == "points" else RECIPES)
    if unknown := set(given.only or ()) - set(known):
        parser.error(f"--only knows {', '.join(known)}, and not {', '.join(unknown)}")
    if given.what == "points":
        points(given.folder, given.seeds, given.only or known)
    else:
        digits(given.folder, given.minutes, given.only or known)


if __name__ == "__main__":
    main()

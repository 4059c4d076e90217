"""Kill real runs at random moments, resume them, and compare the results bit for bit with uninterrupted runs.

    python benchmarks/torture.py [--kills 200] [--victims lora full scratch/NAME RECIPE.yaml …] [--seed 0]

A victim is a tiny version of a recipe (`lora`, `full`; `scratch` or `scratch/NAME`, trained from scratch), or any
recipe file as it is. By default the third and the fourth are GANs, which have two train steps. Each attempt is a
process of its own, forked from this one, which has imported everything and computed nothing; each kill is a SIGKILL.
The current phase is read from the run's `status/0.json`, before the kill to aim at a phase, and after it to count it.
A kill before anything was encoded or any step finished does not count. A run is killed a dozen times at most and then
finishes: weights, EMA, optimizer state, the files of `final/` and every recorded loss must equal those of the
uninterrupted run. Prints survived kills by victim and phase; the exit code is 1 if anything differs, or if a phase
was hit too rarely.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from PIL import Image
from safetensors.torch import load_file

from finetune import job
from finetune.config.loader import load_recipe
from finetune.config.schema import Recipe
from finetune.training import checkpoint
from finetune.training.run_status import Status, read
from tests.helpers import scratch, tiny

AIMED = ("caching", "training", "saving", "sampling")
NAMES = {"encoding": "caching"}  # as the issue of this script calls them; the others go by the run's own words
SHORTEST = {
    "caching": 0.1,
    "training": 0.0,
    "saving": 0.0,
    "sampling": 0.0,
}  # seconds: what is in pixels caches next to nothing
FEWEST = 20  # kills of each phase, of 200
LIVES = 12  # of one run, before it is left to finish
IMAGES = 192  # more than one shard of the cache
PATIENCE = 120.0  # seconds that a life may take
EVENTFUL = (
    "train.steps=24",
    "train.checkpoint_every=3",
    "sample.every=5",
    "data.held_out=0.1",
    "train.validate_every=4",
)


@dataclass
class Victim:
    """A recipe, its uninterrupted run, and the outcomes of its kills."""

    name: str
    make: Callable[[Path, Path], Recipe]  # the run's folder and the cache's
    reference: Path
    lasts: dict[str, float]  # seconds of each of its phases, at a time
    survived: collections.Counter[str] = field(default_factory=collections.Counter)
    uncounted: int = 0
    runs: int = 0
    differing: list[str] = field(default_factory=list)

    @property
    def phases(self) -> list[str]:
        """Those that its runs come to, and that last long enough to be aimed at."""
        return [phase for phase in AIMED if self.lasts.get(phase, 0) > SHORTEST[phase]]


def recipe_of(name: str, images: Path) -> Callable[[Path, Path], Recipe]:
    """How to make the recipe of a victim for a run's folder and a cache."""
    common = (f"data.path={images}", *EVENTFUL)
    if name in ("lora", "full"):
        more = {"lora": ("train.ema=0.9", "model.train_text_encoder=true"), "full": ("optimizer.name=adamw8bit",)}[name]
        return lambda folder, cache: tiny.recipe("sd15", name, *common, *more, f"data.cache={cache}", folder=folder)
    if name == "scratch":
        return lambda folder, cache: tiny.recipe("sd", "scratch", *common, f"data.cache={cache}", folder=folder)
    if (short := name.removeprefix("scratch/")) in scratch.CASES:
        return lambda folder, cache: scratch.recipe(short, folder, *EVENTFUL, f"data.cache={cache}")
    return lambda folder, cache: load_recipe(name, (f"output.folder={folder}", f"data.cache={cache}"))


def draw_images(folder: Path, count: int) -> Path:
    """Captioned images."""
    folder.mkdir()
    for number in range(count):
        color = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
        Image.effect_noise((40, 40), 20 + number).convert("RGB").point(lambda v, c=color: (v + c[0]) % 256).save(
            folder / f"{number:03d}.png"
        )
        (folder / f"{number:03d}.txt").write_text(f"a red circle {number}")
    return folder


def live(recipe: Recipe, resume: bool, log: Path) -> int:
    """Start one attempt of a run in its own process; returns the process id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        job.train(recipe, resume)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def status_of(folder: Path, process: int) -> Status | None:
    """The phase that the process reports; None before its first report."""
    found = [status for status in read(folder) if status.pid == process]
    return found[0] if found else None


def phase_of(status: Status | None) -> str:
    return NAMES.get(status.phase, status.phase or "between") if status is not None else "loading"


def whole_life(recipe: Recipe, resume: bool, log: Path) -> dict[str, float]:
    """Run without a kill; returns the seconds that each phase lasted at a time."""
    folder = Path(recipe.output.folder or "")
    process, since, was = live(recipe, resume, log), time.monotonic(), "loading"
    lasted: dict[str, list[float]] = {}
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if (now := phase_of(status_of(folder, process))) != was:
            lasted.setdefault(was, []).append(time.monotonic() - since)
            since, was = time.monotonic(), now
        time.sleep(0.001)
    if ended[1]:
        raise RuntimeError(
            f"a life of {folder} ended with {os.waitstatus_to_exitcode(ended[1])}:\n{log.read_text()[-4000:]}"
        )
    return {phase: statistics.mean(seconds) for phase, seconds in lasted.items()}


def kill_once(victim: Victim, recipe: Recipe, log: Path, aim: str, dice: random.Random) -> tuple[str, bool] | None:
    """One life, ended by SIGKILL in phase `aim` if it comes to it; returns (phase, whether it had done anything), or
    None if it finished.
    """
    folder = Path(recipe.output.folder or "")
    initialized = checkpointed(folder), records_of(folder)
    process, started = live(recipe, folder.exists(), log), time.monotonic()
    entries, delay = (
        dice.choice((1, 1, 2, 3)) if aim != "caching" else 1,
        dice.random() * victim.lasts.get(aim, 0) * (0.5 if aim == "caching" else 1),
    )
    was = ""

    def has_done() -> bool:
        """Whether this life has. A resumed run first writes its records anew, cut back to its checkpoint: till then
        they are older.
        """
        status, (file, steps) = status_of(folder, process), records_of(folder)
        return status is not None and (status.done > 0 or (file != initialized[1][0] and steps > initialized[0]))

    while time.monotonic() - started < PATIENCE:
        if os.waitpid(process, os.WNOHANG)[0]:
            return None
        if (now := phase_of(status_of(folder, process))) != was:
            entries, was = entries - (now == aim), now
        if aim == "caching" and now == "training":  # what was to be cached was there too soon
            aim, entries = dice.choice(AIMED[1:]), 1
        if entries <= 0 and now == aim and (aim not in ("caching", "training") or has_done()):
            time.sleep(delay)
            break
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return phase_of(status_of(folder, process)), has_done()


def records_of(folder: Path) -> tuple[int, int]:
    """Which file `metrics.jsonl` is now, and of how many steps."""
    with contextlib.suppress(OSError), open(folder / "metrics.jsonl", "rb") as opened:
        return os.fstat(opened.fileno()).st_ino, opened.read().count(b"\n")
    return 0, 0


def checkpointed(folder: Path) -> int:
    """Finished steps of the newest checkpoint."""
    return max(
        (int(path.name.rpartition("-")[2]) for path in checkpoint.checkpoints(folder / "checkpoints")), default=0
    )


def torture(victim: Victim, kills: int, place: Path, dice: random.Random, say: Callable[[str], None]) -> None:
    """Kill runs of the victim until `kills` have been counted, each left to finish in the end and compared."""
    while victim.survived.total() < kills and not victim.differing:
        victim.runs += 1
        folder, cache, log = (
            place / f"{victim.name.replace('/', '-')}-{victim.runs}{ending}" for ending in ("", "-cache", ".log")
        )
        recipe = victim.make(folder, cache)
        hit: collections.Counter[str] = collections.Counter()
        for _ in range(LIVES):
            if hit.total() + victim.survived.total() >= kills:
                break
            # What is cached stays so: a run's first lives alone come to it. After that, the phase that was hit least.
            counts, young = victim.survived + hit, not hit.keys() - {"caching"}
            caches = young and "caching" in victim.phases and hit["caching"] < LIVES // len(AIMED)
            aim = (
                "caching"
                if caches
                else min(set(victim.phases) - {"caching"}, key=lambda phase: (counts[phase], dice.random()))
            )
            found = kill_once(victim, recipe, log, aim, dice)
            if found is None:
                break
            if found[1]:
                hit[found[0]] += 1
            else:
                victim.uncounted += 1
        whole_life(recipe, folder.exists(), log)
        if differs := difference(victim.reference, folder):
            victim.differing.append(f"{folder}: {differs}")
        else:  # only now: a kill is survived when what came after is what would have come
            victim.survived += hit
            for path in (folder, cache):
                shutil.rmtree(path, ignore_errors=True)
        say(f"{victim.name}: run {victim.runs}, {dict(hit)} {'DIFFERS' if victim.differing else 'the same bits'}")


def difference(whole: Path, killed: Path) -> str:
    """The difference between the killed and the uninterrupted run; "" if there is none."""
    ours, theirs = (checkpoint.load(checkpoint.checkpoints(run / "checkpoints")[-1]) for run in (killed, whole))
    for name in ("weights", "averages", "optimizers", "facts", "step"):
        if not _equal(getattr(ours, name), getattr(theirs, name)):
            return f"{name} of the last checkpoint"
    files = [
        sorted(path.relative_to(run) for path in (run / "final").rglob("*.safetensors")) for run in (killed, whole)
    ]
    if files[0] != files[1] or not files[0]:
        return f"the files of final/: {files[0]}"
    for file in files[0]:
        if not _equal(load_file(killed / file), load_file(whole / file)):
            return f"the tensors of {file}"
    ours_said, theirs_said = (list(_losses(run)) for run in (killed, whole))
    return "" if ours_said == theirs_said else "the recorded losses"


def _losses(run: Path) -> Iterator[dict[str, float]]:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        yield {key: value for key, value in json.loads(line).items() if key != "seconds"}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def table(victims: list[Victim]) -> str:
    """Print the survived kills by victim and phase."""
    phases = [*AIMED, *sorted({phase for victim in victims for phase in victim.survived} - set(AIMED))]
    width = max(len(victim.name) for victim in victims) + 2
    lines = [
        f"{'kills survived':<{width}}"
        + "".join(f"{phase:>12}" for phase in phases)
        + f"{'all':>8}{'runs':>8}{'not counted':>14}"
    ]
    for victim in victims:
        counts = "".join(f"{victim.survived[phase]:>12}" for phase in phases)
        lines.append(
            f"{victim.name:<{width}}{counts}{victim.survived.total():>8}{victim.runs:>8}{victim.uncounted:>14}"
        )
    whole = sum((victim.survived for victim in victims), collections.Counter[str]())
    lines.append(f"{'':<{width}}" + "".join(f"{whole[phase]:>12}" for phase in phases) + f"{whole.total():>8}")
    return "\n".join(lines)


def run(
    names: list[str], kills: int, seed: int, place: Path, say: Callable[[str], None] = print, images: int = IMAGES
) -> list[Victim]:
    """Torture each of the victims named, `kills` in all."""
    dice = random.Random(seed)
    drawn = draw_images(place / "images", images)
    victims = []
    for number, name in enumerate(names):
        make = recipe_of(name, drawn)
        folder = place / f"whole-{number}"
        lasts = whole_life(make(folder, place / f"whole-{number}-cache"), False, place / f"whole-{number}.log")
        victims.append(Victim(name, make, folder, lasts))
        torture(victims[-1], kills // len(names) + (number < kills % len(names)), place, dice, say)
    return victims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--victims", nargs="+", default=["lora", "full", "scratch/vqgan", "scratch/r3gan"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        victims = run(given.victims, given.kills, given.seed, Path(folder), lambda line: print(line, flush=True))
        print(f"\n{table(victims)}\n\nin {time.monotonic() - started:.0f} s")
        wrong = [line for victim in victims for line in victim.differing]
        counts = sum((victim.survived for victim in victims), collections.Counter[str]())
        come_to = {phase for victim in victims for phase in victim.phases}
        wrong += [
            f"{phase} was hit {counts[phase]} times"
            for phase in AIMED
            if phase in come_to and counts[phase] < FEWEST * given.kills // 200
        ]
        print("\n".join(wrong) or "what was killed and resumed came out bit for bit as what was not")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

"""The five families from scratch at equal CPU time on the bundled 32-pixel emoji: a table, and images of each.

    python benchmarks/bench_families.py --minutes 10 --folder /tmp/families    # within three hours on two cores
    python benchmarks/bench_families.py --minutes 0.2 --seeds 0 --images 32 --folder /tmp/quick --only vae glow

Each trains by its recipe and the project's own loop on one thread, at a constant learning rate (a schedule would need
the number of steps), until its process has used its CPU time; a tenth of the images is held out for bits/dim. Then
`ft eval` measures it. A run counts as stable if its losses stay finite, its loss has fallen (a GAN's says nothing),
and its images have at least half of the real ones' diversity; that is measured on further, shorter runs with other
seeds. Finished work is kept, and interrupted runs resume from their last checkpoint. --write saves the table that `ft
estimate --goal` quotes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.config.loader import bundled_recipes, load_recipe
from finetune.errors import Stopped, UserError
from finetune.estimate.benchmarks import MEASURED
from finetune.evaluation.evaluate import evaluate, request_for
from finetune.inference import sample
from finetune.job import Job, export_result, prepare
from finetune.models.registry import spec_of
from finetune.report.images import sheet
from finetune.terminal import silence_libraries
from finetune.training.samples import request_of

CONTENDERS = (
    "vae",
    "dcgan",
    "flow-matching",
    "pixelcnn++",
    "glow",
)  # one of each family; --only takes any recipe in pixel space
FIXED = (
    *(
        "data.path=embedded:emoji/noto",
        "data.resolution=32",
        "data.held_out=0.1",
        "optimizer.schedule=constant",
        "train.epochs=null",
    ),
    *(
        "train.steps=10000000",
        "train.checkpoint_every=10000000",
        "train.validate_every=10000000",
        "sample.collapse_check_every=null",
    ),
)
NOTED_EVERY = 100  # steps between two checkpoints, and notes of the CPU time that they took
SCORED = 64  # held-out images whose bits/dim are taken: flow matching follows each through 80 passes
LOOKED_AT = 128  # images of a run whose stability is judged
HEALTHY = 0.5  # of the real images' diversity
SHOWN = 12
COLUMNS = (
    ("parameters", "parameters", ",d"),
    ("steps", "steps", ",d"),
    ("cpu_seconds_per_step", "s/step", ".3f"),
    ("cpu_seconds_per_image", "s/image", ".2g"),
    ("frechet_distance", "Fréchet", ".2f"),
    ("kernel_distance", "kernel", ".4f"),
    ("precision", "precision", ".0%"),
    ("recall", "recall", ".0%"),
    ("density", "density", ".2f"),
    ("coverage", "coverage", ".0%"),
    ("diversity", "diversity", ".2f"),
    ("copied", "copied", ".0%"),
    ("bits_per_dimension", "bits/dim", ".2f"),
    ("stable", "stable", "s"),
)


def train(name: str, folder: Path, seed: int, minutes: float) -> dict[str, Any]:
    """A finished run: CPU minutes, steps and parameters.

    `failed` is the reason why it ended early, if it did.
    """
    done = folder / "trained.json"
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    note = folder / "spent.json"
    spent = float(json.loads(note.read_text())) if note.is_file() else 0.0
    recipe = load_recipe(
        f"scratch/{name}", [*FIXED, f"train.seed={seed}", f"output.folder={folder}", f"sample.every={NOTED_EVERY}"]
    )
    job = prepare(recipe, resume=folder.exists())
    failed = ""
    try:
        _until(job, note, spent, 60 * minutes)
    except UserError as error:
        failed = error.problem
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not failed:
        export_result(job)
    losses = [
        record[f"loss.{job.model.train_steps()[0].name}"]
        for record in records
        if f"loss.{job.model.train_steps()[0].name}" in record
    ]
    found = {
        "steps": len(records),
        "cpu_seconds_per_step": float(json.loads(note.read_text())) / max(1, len(records)),
        "parameters": sum(parameter.numel() for parameter in job.model.trained().values()),
        "failed": failed,
        "losses": [
            statistics.fmean(part) for part in (losses[: 1 + len(losses) // 10], losses[-1 - len(losses) // 10 :])
        ]
        if losses
        else [],
    }
    done.write_text(json.dumps(found) + "\n")
    return found


def _until(job: Job, note: Path, spent: float, budget: float) -> None:
    """Train until the process has had `budget` CPU seconds, `spent` ones before it began; a timer of its CPU time
    ends it as Ctrl-C would.
    """
    initialized, over = time.process_time(), False

    def write(done: int = 0) -> None:
        note.write_text(json.dumps(spent + time.process_time() - initialized))

    def ended(number: int, frame: FrameType | None) -> None:
        nonlocal over
        over = True
        os.kill(os.getpid(), signal.SIGTERM)

    job.trainer.observe = write
    before = signal.signal(signal.SIGPROF, ended)
    signal.setitimer(signal.ITIMER_PROF, max(0.01, budget - spent))
    try:
        job.trainer.train()
    except Stopped:
        write()
        if not over:
            raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def measured(name: str, folder: Path, seed: int, minutes: float, images: int, scored: int) -> dict[str, Any]:
    """The figures of one run: of its training, and of `ft eval`."""
    found = train(name, folder, seed, minutes)
    if found["failed"]:
        return found
    figures = folder / "measured" / "figures.json"
    evaluation = (
        json.loads(figures.read_text())
        if figures.is_file()
        else asdict(evaluate(folder, images=images, out=figures.parent, scored=scored))
    )
    likelihood = evaluation["likelihood"] or {"bits_per_dimension": None, "exact": None}
    own = {key: evaluation[key] for key in ("cpu_seconds_per_image", "features")}
    own |= {"itself": evaluation["reference"], "drawn": evaluation["generated"]}  # the names in families.json
    found |= evaluation["closeness"] | own | {key: likelihood[key] for key in ("bits_per_dimension", "exact")}
    return found


def stable(name: str, found: dict[str, Any]) -> bool:
    """Whether a run's losses and diversity stayed healthy."""
    fell = spec_of(load_recipe(f"scratch/{name}").model.family).kind == "GAN" or found["losses"][1] < found["losses"][0]
    return not found["failed"] and all(map(math.isfinite, found["losses"])) and fell and found["diversity"] >= HEALTHY


@torch.no_grad()
def shown(folder: Path) -> list[Image.Image]:
    """A row of images."""
    from finetune.planning import load_plan

    plan = load_plan(folder)
    opened = sample.open_run(folder, plan)
    drawn = sample.generate(opened, request_for(request_of(plan), opened, [""], SHOWN), SHOWN)
    return [image.thumbnail().resize((96, 96), Image.Resampling.NEAREST) for image in drawn]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, a line a family and one for the data itself."""
    lines = [f"| | {' | '.join(title for _, title, _ in COLUMNS)} |", "|---|" + "--:|" * len(COLUMNS)]
    for name, row in rows.items():
        cells = ["–" if row.get(field) is None else format(row[field], form) for field, _, form in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="folder of the runs, outside the checkout; existing runs are resumed",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="CPU time of each")
    parser.add_argument("--seeds", type=int, default=5, help="further runs of each that measure stability; 0: none")
    parser.add_argument("--seed-minutes", type=float, default=2.0, help="CPU time of each of those")
    parser.add_argument("--images", type=int, default=500, help="images of each that are generated and measured")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), metavar="RECIPE")
    parser.add_argument("--write", action="store_true", help=f"keep the table in {MEASURED.name}")
    given = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)
    there = set(bundled_recipes())
    names = [name for name in given.only if f"scratch/{name}" in there]
    for name in sorted(set(given.only) - set(names)):
        print(f"there is no recipe scratch/{name} yet: it is left out")
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        row = measured(name, given.folder / f"{name}-0", 0, given.minutes, given.images, SCORED)
        row["stable"] = None
        healthy = 0
        for seed in range(1, given.seeds + 1):
            place = given.folder / f"{name}-stable-{seed}"
            healthy += stable(name, measured(name, place, seed, given.seed_minutes, LOOKED_AT, 0))
            row["stable"] = f"{healthy}/{seed}"
        rows[name] = row
        if row.get("itself"):
            rows["real images"] = rows.pop("real images", row["itself"])
        print(table(rows), flush=True)
    drawn = [name for name in names if not rows[name]["failed"]]
    if drawn:
        images = [image for name in drawn for image in shown(given.folder / f"{name}-0")]
        title = f"after {given.minutes:g} CPU minutes each"
        sheet(images, drawn, [str(number + 1) for number in range(SHOWN)], title).save(given.folder / "families.png")
    kept = {
        "minutes": given.minutes,
        "seed_minutes": given.seed_minutes,
        "images": given.images,
        "rows": {name: rows[name] for name in drawn},
    }
    text = json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
    (given.folder / "families.json").write_text(text, encoding="utf-8")
    if given.write:
        MEASURED.write_text(text, encoding="utf-8")
    print(f"images and figures are in {given.folder}")


if __name__ == "__main__":
    main()

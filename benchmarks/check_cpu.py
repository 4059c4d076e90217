"""Compare training steps on this machine's CPU with their estimates, after a two-second calibration in the same run.

    python benchmarks/check_cpu.py [NAME …]

Times are CPU times of the calling thread, so other programs do not count. With --default, the calibration is also
written to finetune/assets/cpu.json: the speed per core that is assumed for CPUs that are not calibrated.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import cast

import click
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.config.loader import load_recipe
from finetune.data.audit.audit import scan
from finetune.data.dataset import Dataset
from finetune.estimate.forecast import forecast
from finetune.estimate.hardware.calibrate import calibrate
from finetune.estimate.hardware.cpu import FILE, Calibration, plain, threads
from finetune.estimate.hardware.gpus import this_cpu
from finetune.estimate.tracing.skeletons import skeletons
from finetune.estimate.tracing.traced_run import FakeDataset, TracedRun
from finetune.paths import ASSETS
from finetune.training.pace import WARM_UP, typical
from finetune.training.run_folder import Run
from finetune.training.trainer import Trainer

# Of the families from scratch, and of each other method.
RECIPES = (
    *("scratch/vae", "scratch/vqvae", "scratch/realnvp", "scratch/glow", "scratch/pixelcnn++", "scratch/imagegpt"),
    *("scratch/dcgan", "scratch/wgan-gp", "scratch/r3gan", "scratch/stylegan2"),
    *("scratch/ddpm", "scratch/flow-matching", "scratch/edm", "scratch/emoji-diffusion"),
    *("lora/emoji", "full/emoji"),
)
STEPS = 5  # or cycles of steps, once all is warm


@click.command()
@click.argument("names", nargs=-1)
@click.option("--write", is_flag=True, help="Write the errors to finetune/assets/accuracy.json.")
@click.option("--default", is_flag=True, help="Write the calibration, of one thread, to finetune/assets/cpu.json.")
def main(names: tuple[str, ...], write: bool, default: bool) -> None:
    """Run a few steps of each recipe, and compare them with its estimate."""
    torch.set_num_threads(1 if default else threads())
    start = time.perf_counter()
    found = calibrate(patience=math.inf)
    print(f"{found.name}, {found.threads} threads, calibrated in {time.perf_counter() - start:.1f} s", flush=True)
    if default:
        (ASSETS / FILE).write_text(json.dumps([plain(found)], indent=1) + "\n", encoding="utf-8")
    off = [compared(name, found) for name in names or RECIPES]
    errors = sorted(abs(one) for one in off)
    print(f"{'median':<28} {statistics.median(errors):.0%}, most {errors[-1]:.0%}")
    if write:
        file = ASSETS / "accuracy.json"
        known = json.loads(file.read_text(encoding="utf-8"))
        known["s/step on a CPU"] = {"median": statistics.median(errors), "most": errors[-1], "rows": len(errors)}
        file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def compared(name: str, found: Calibration) -> float:
    """Print one line; predicted ÷ measured − 1."""
    recipe = load_recipe(name, ["sample.prompts=[]"])
    one = forecast(recipe, name, dataclasses.replace(this_cpu(), calibration=found), 3000)
    seconds = typical(taken(name, WARM_UP + STEPS * one.variant.cycle), one.variant.cycle)
    off = one.speed.seconds / seconds - 1
    print(f"{name:<28} {seconds:.3f} s, predicted {one.speed.seconds:.3f} ({off:+.0%})", flush=True)
    return off


def taken(name: str, steps: int) -> list[float]:
    """Seconds of `steps` real steps, on images of zeros."""
    recipe = load_recipe(name)
    subject = TracedRun(
        recipe,
        "float32",
        (recipe.data.resolution,) * 2,
        scan(recipe.data) if recipe.method == "scratch" else None,
        device="cpu",
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    with skeletons():
        model = subject.build()
        _, example = subject.encode(model)
        made_up = cast(Dataset, FakeDataset(example, torch.zeros))
        trainer = Trainer(subject.plan, model, made_up, cast(Run, None), Accelerator(cpu=True))
        found = []
        for step in range(steps):
            start = time.thread_time()
            trainer.train_step(step)
            found.append(time.thread_time() - start)
    return found


if __name__ == "__main__":
    main()

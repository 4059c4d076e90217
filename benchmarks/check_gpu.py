"""Compare this machine's GPU with the estimates. Takes a few minutes on a GPU; without one, prints what it would run.

Each recipe that fits takes a few real steps with the project's own data pipeline, model and Trainer, on noise images.
If a base model's weights are not on this machine, its networks are built from the bundled configurations with random
weights: neither memory nor time depends on their values. Nothing is downloaded. Prints estimated and measured
figures, one row per run, in the columns of finetune/assets/gpu_runs.tsv, which holds past runs. --details writes one
JSON line per run with the data to fit a model of memory and time: the peaks of each phase, the seconds of each step,
and calls and device time of every operator in one more step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import io
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import click
import torch
from PIL import Image
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.cli.process import report_errors
from finetune.config.loader import bundled_recipes, load_recipe
from finetune.errors import UserError
from finetune.estimate.advice import sets
from finetune.estimate.constants import CONTEXT, GIB
from finetune.estimate.forecast import Forecast, fitting, forecast
from finetune.estimate.hardware.gpus import Gpu, find
from finetune.estimate.tracing.recorder import NO_LAUNCH
from finetune.paths import ASSETS
from finetune.terminal import silence_libraries, table
from finetune.training.device import forget_peak, this_machine
from finetune.training.pace import WARM_UP, typical
from finetune.training.trainer import Trainer

BASE = ("lora/emoji", "full/emoji")
IMAGES, LEAST_SIDE = 16, 64


class Ran(NamedTuple):
    """Measurements of a run: bytes reserved while training and at most, seconds and operators of a step, weights.

    Runs on a GPU have more details.
    """

    training: int | None
    peak: int | None
    seconds: float
    operators: int
    weights: str
    precision: str
    details: dict[str, Any]


@final
class Operators(TorchDispatchMode):
    """Counts the operators that run inside, as a trace does: without views and operators that launch no kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten" and not func.is_view and func._overloadpacket.__name__ not in NO_LAUNCH
        return func(*args, **(kwargs or {}))


@click.command()
@click.argument("names", nargs=-1)
@click.option("--gpu", "gpu_name", help="The GPU to estimate for; default: this machine's, else rtx3090.")
@click.option(
    "--cpu", is_flag=True, help="Run on the CPU, by default the recipes of the bundled base model, without memory."
)
@click.option("--steps", type=click.IntRange(min=WARM_UP + 1), default=12, show_default=True, help="Of each run.")
@click.option("overrides", "--set", multiple=True, metavar="KEY=VALUE", help="Override one value of every recipe.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.tsv", help="Also add the rows to this file.")
@click.option(
    "--details", type=click.Path(path_type=Path), metavar="FILE.jsonl", help="Add each GPU run's details to this file."
)
@click.option("--minutes", type=float, default=math.inf, help="Start no run after this time.")
def main(
    names: tuple[str, ...],
    gpu_name: str | None,
    cpu: bool,
    steps: int,
    overrides: tuple[str, ...],
    out: Path | None,
    details: Path | None,
    minutes: float,
) -> None:
    """Run the recipes NAMES, or all that start from a pretrained model, and print estimates and measurements."""
    initialized = time.monotonic()
    with report_errors(), tempfile.TemporaryDirectory() as temporary:
        if cpu:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        machine, folder = this_machine(), Path(temporary)
        gpu = find(gpu_name or (machine.name if machine.device == "cuda" else "rtx3090"))
        if machine.device == "cuda":
            gpu = dataclasses.replace(gpu, visible_gib=machine.memory_bytes / GIB)
        elif not cpu:
            print(f"no CUDA GPU is here; on one {gpu.name} this would run:")
        if cpu:
            print(
                f"measured on {machine.name}, and estimated for one {gpu.name}: what can be held against each "
                "other are the operators"
            )
        for name in names or (BASE if cpu else [name for name in bundled_recipes() if not name.startswith("scratch/")]):
            if time.monotonic() - initialized > 60 * minutes:
                print(f"{name} is left out: {minutes:g} minutes are over")
                continue
            try:
                one = _settings(name, gpu, folder, steps, overrides)
            except UserError as error:
                print(f"\n{name} is left out: {error.problem}")
                continue
            print(_title(one), flush=True)
            if not one.fits or not (cpu or machine.device == "cuda"):
                print(table("estimated", _estimated(one)))
                continue
            if (ran := _run(one, folder, steps)) is not None:
                row = _row(one, ran, overrides)
                print(table("estimated and measured", _compared(one, ran)), row, sep="\n", flush=True)
                _add(out, row)
                _add(details, json.dumps({"name": one.name, "edits": sets(one), "gpu": gpu.name} | ran.details))


def _add(file: Path | None, line: str) -> None:
    if file:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(line + "\n")


def _settings(name: str, gpu: Gpu, folder: Path, steps: int, overrides: tuple[str, ...]) -> Forecast:
    """The recipe, on images of noise, as it fits: with the cheapest edits where it does not by itself."""
    short = [
        "train.epochs=null",
        f"train.steps={steps + 2}",
        "optimizer.warmup_steps=0",
        "data.held_out=0",
        "data.buckets=false",
    ]
    short += [
        "sample.prompts=[noise]",
        "sample.steps=2",
        f"data.path={folder / 'images'}",
        f"data.cache={folder / 'cache'}",
    ]
    one = forecast(load_recipe(name, [*short, f"output.folder={folder / name}", *overrides]), name, gpu, IMAGES)
    found = [one] if one.fits else fitting(one)
    return found[0] if found else one


def _title(one: Forecast) -> str:
    fits = "" if one.fits else f": does not fit in {one.gpu.name}'s memory even with every memory option"
    return f"\n{one.name} {sets(one)}".rstrip() + fits


def _run(one: Forecast, folder: Path, steps: int) -> Ran | None:
    """Train a few steps and generate an image; None, with a message, if memory ran out."""
    silence_libraries()
    (folder / "images").mkdir(exist_ok=True)
    side = max(LEAST_SIDE, one.recipe.data.resolution)
    for number in range(IMAGES):
        Image.effect_noise((side, side), 64).convert("RGB").save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(f"noise {number}", encoding="utf-8")
    try:
        return _trained(one, steps)
    except UserError as error:
        print(f"   {error}", flush=True)
        return None
    except torch.OutOfMemoryError as error:
        print(
            f"   memory ran out, and {one.memory.peak / GIB:.2f} of {one.limit / GIB:.2f} GiB were estimated: {error}",
            flush=True,
        )
        return None
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _trained(one: Forecast, steps: int) -> Ran:
    from finetune.estimate.tracing.skeletons import skeletons
    from finetune.job import prepare

    weights = "its own weights"
    with contextlib.redirect_stdout(io.StringIO()):  # the tables of data and plan
        try:
            job = prepare(one.recipe, force=True)
        except UserError:
            weights = "random weights"
            with skeletons(torch.device("cuda") if torch.cuda.is_available() and one.gpu.calibration is None else None):
                job = prepare(one.recipe, force=True)
    trainer, device = job.trainer, job.accelerator.device
    peaks = {"encoding": _peak(device)}
    seconds = [trainer.train_step(step)["seconds"] for step in range(steps)]
    peaks["training"] = _peak(device)
    with Operators() as counted:
        trainer.train_step(steps)
    details = {"seconds": seconds} | (_profiled(trainer, steps + 1) if device.type == "cuda" else {})
    assert trainer.observe is not None
    with trainer.state.averaged():
        trainer.observe(steps)
    peaks["sampling"] = _peak(device)
    reserved = [peak["reserved"] for peak in peaks.values() if peak]
    training = peaks["training"].get("reserved")
    return Ran(
        training,
        max(reserved, default=None),
        typical(seconds, one.variant.cycle),
        counted.count,
        weights,
        job.plan.precision,
        details | {"peaks": peaks},
    )


def _peak(device: torch.device) -> dict[str, int]:
    """The most bytes that were allocated and reserved on a GPU since this was asked last; what a process on a CPU
    holds is something else.
    """
    if device.type != "cuda":
        return {}
    found = {
        name: torch.cuda.memory_stats()[f"{name}_bytes.all.peak"] for name in ("allocated", "reserved", "requested")
    }
    forget_peak()
    return found


def _profiled(trainer: Trainer, step: int) -> dict[str, Any]:
    """Of one more step, each operator's and kernel's calls and microseconds of the device and of the host."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        trainer.train_step(step)
    averages = profiled.key_averages()
    found = [one for one in averages if one.self_device_time_total or one.self_cpu_time_total]
    kernels = [one for one in averages if one.device_type == DeviceType.CUDA and not one.is_user_annotation]
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "kernels": sum(one.self_device_time_total for one in kernels) / 1e6,
        "operators": {
            one.key: (one.count, round(one.self_device_time_total), round(one.self_cpu_time_total)) for one in found
        },
    }


def _estimated(one: Forecast) -> list[tuple[str, str]]:
    return [
        ("training", f"{(one.memory.phases['train'] - CONTEXT) / GIB:.2f} GiB reserved"),
        (
            "whole run",
            f"{(one.memory.peak - CONTEXT) / GIB:.2f} GiB reserved, and CUDA's context; {one.limit / GIB:.2f} GiB "
            "are there",
        ),
        ("a step", f"{one.speed.seconds:.3f} s"),
        ("operators", f"{one.speed.operators:,}"),
    ]


def _compared(one: Forecast, ran: Ran) -> list[tuple[str, str]]:
    found = [
        (f"{(ran.training or 0) / GIB:.2f}", one.memory.phases["train"] - CONTEXT, ran.training),
        (f"{(ran.peak or 0) / GIB:.2f}", one.memory.peak - CONTEXT, ran.peak),
        (f"{ran.seconds:.3f}", one.speed.seconds, ran.seconds),
        (f"{ran.operators:,}", one.speed.operators, ran.operators),
    ]
    said = [
        f"{text} measured ({estimated / measured - 1:+.0%})" if measured else "not counted"
        for text, estimated, measured in found
    ]
    return [
        *(
            (name, f"{estimated}; {measured}")
            for (name, estimated), measured in zip(_estimated(one), said, strict=True)
        ),
        ("nets", ran.weights),
    ]


def _row(one: Forecast, ran: Ran, overrides: tuple[str, ...]) -> str:
    """The run as a line of gpu_runs.tsv."""
    training, seconds = ran.details["peaks"]["training"], ran.details.get("kernels")
    values = {
        "recipe": one.name,
        "set": " ".join([*overrides, *sets(one).replace("--set ", "").split()]),
        "gpu": one.gpu.name if training else "CPU",
        "torch": torch.__version__,
        "precision": ran.precision,
        "weights": ran.weights,
        "allocated_gib": f"{training['allocated'] / GIB:.2f}" if training else "-",
        "reserved_gib": f"{training['reserved'] / GIB:.2f}" if training else "-",
        "whole_gib": f"{ran.peak / GIB:.2f}" if ran.peak else "-",
        "seconds": f"{ran.seconds:.3f}",
        "kernel_seconds": f"{seconds:.4f}" if seconds else "-",
        "operators": str(ran.operators),
        "date": str(datetime.date.today()),
    }
    header = (ASSETS / "gpu_runs.tsv").read_text(encoding="utf-8").partition("\n")[0]
    return "\t".join(values[column] for column in header.split("\t"))


if __name__ == "__main__":
    main()

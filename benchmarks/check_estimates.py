"""Compare estimates with published runs: errors of memory and time, and the best-fitting constants.

The runs are finetune/assets/published_runs.tsv, each with its source. Rows that cannot be described are listed with the
reason.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.config.loader import load_recipe
from finetune.estimate.constants import CONTEXT, GIB, PACE, Pace
from finetune.estimate.forecast import forecast
from finetune.estimate.hardware.gpus import find
from finetune.estimate.memory import around
from finetune.estimate.profiles import Work
from finetune.estimate.step_time import step
from finetune.paths import ASSETS
from tools import published

IMAGES = 16  # of benchmarks/check_gpu.py's runs
ALL_OF_IT = "nvidia-smi"  # in the notes: what was measured holds CUDA's context too


class Found(NamedTuple):
    """A published run and its prediction: GiB and seconds per step; 0 if not published."""

    row: dict[str, str]
    micro: tuple[Work, ...]
    update: tuple[Work, ...]
    measured: float
    predicted: float
    measured_seconds: float
    parameters_only: float
    formula: float

    def seconds(self, pace: Pace = PACE) -> float:
        return step(self.micro, self.update, 1, find(published.GPUS[self.row["gpu"]]), pace).seconds


@click.command()
@click.option(
    "--traces",
    type=click.Path(path_type=Path),
    help="Save the traces in this file, and read them from it next time.",
)
@click.option("--only", default="", help="Only the rows whose id contains this word.")
@click.option(
    "--write",
    is_flag=True,
    help="Write the errors to finetune/assets/accuracy.json, from which ft estimate takes its error margins.",
)
def main(traces: Path | None, only: str, write: bool) -> None:
    """Predict every published run, and print predictions and measurements."""
    lines = (ASSETS / "published_runs.tsv").read_text(encoding="utf-8").splitlines()
    header = lines[0].split("\t")
    rows = [row for line in lines[1:] if only in (row := dict(zip(header, line.split("\t"), strict=False)))["id"]]
    known: dict[str, Any] = json.loads(traces.read_text()) if traces is not None and traces.exists() else {}
    found, left = [], Counter[str]()
    for row in rows:
        if reason := published.why_not(row):
            left[reason] += 1
            continue
        key = " ".join(row[name] for name in KEY)
        if key not in known:
            known[key] = traced(row)
            if traces is not None:
                traces.write_text(json.dumps(known))
        found.append(beside(row, known[key]))
        print(line_of(found[-1]), flush=True)
    print(f"\n{len(found)} of {len(rows)} rows; not predicted:")
    print("\n".join(f"  {count:>3}  {reason}" for reason, count in left.most_common()))
    found_errors = errors(found) | (ours() if not only else {})
    if write:
        file = ASSETS / "accuracy.json"
        file.write_text(
            json.dumps(json.loads(file.read_text(encoding="utf-8")) | found_errors, indent=1) + "\n", encoding="utf-8"
        )


KEY = (
    "model",
    "method",
    "resolution",
    "batch_per_gpu",
    "rank",
    "weights_dtype",
    "compute_dtype",
    "optimizer",
    "grad_ckpt",
)


def traced(row: dict[str, str]) -> dict[str, Any]:
    """Memory reserved and allocated by the step of a published run, and its operators."""
    from finetune.config.loader import load_recipe
    from finetune.estimate.allocator.caching import replay
    from finetune.estimate.tracing.denoiser import DenoiserModel
    from finetune.estimate.tracing.traced_run import TracedRun
    from finetune.replaceable import patched
    from finetune.training import state

    run = published.described(row)
    sets = [f"train.batch_size={run.batch}", "train.accumulation=1", "train.ema=null", "optimizer.name=adamw"]
    sets += [f"train.gradient_checkpointing={str(run.checkpointed == (1, 1)).lower()}"]
    recipe = load_recipe("full/sd15" if run.full else "lora/sd15", sets)
    subject = TracedRun(
        recipe,
        "bfloat16",
        run.size,
        trained_dtype=run.trained,
        build=lambda plan: DenoiserModel(plan, run.denoiser, run.size, run.adapt),
        autocast=run.autocast,
        steps=run.steps,
    )
    with patched(state, "make_optimizer", lambda section, parameters, device: run.optimizer(parameters)):
        phase = subject.phases(only_training=True)["train"]
    last = max(number for number, section in enumerate(phase.sections) if section.name == "batch")
    parts = {"micro": ("batch", "forward", "backward"), "update": ("optimizer",)}
    works = {
        part: Counter(
            tuple(operator)
            for section in phase.sections[last:]
            if section.name in names
            for operator in section.operators
        )
        for part, names in parts.items()
    }
    replayed = replay(phase.events)
    return {
        "reserved": replayed.peak_reserved,
        "allocated": replayed.peak_allocated,
        "held": phase.held,
        **{part: [[*operator, count] for operator, count in counted.items()] for part, counted in works.items()},
    }


def beside(row: dict[str, str], trace: dict[str, Any]) -> Found:
    gpu = find(published.GPUS[row["gpu"]])
    batch, sides = int(row["batch_per_gpu"]), [int(side) for side in re.findall(r"\d+", row["resolution"])][-2:]
    context = CONTEXT if ALL_OF_IT in row["notes"] else 0
    pace = re.search(r"\(([\d.]+) per GPU\)", row["seconds_per_step_or_its"])
    said = row["seconds_per_step_or_its"].split()[0]
    area = sides[0] * sides[-1] / 512**2
    return Found(
        row=row,
        micro=(*works_of(trace["micro"]), Work("other", 2, True, (0, 0), (0, 0), published.sdnq_operators(row))),
        update=works_of(trace["update"]),
        measured=0.0 if row["peak_vram_gb"] == "-" else float(row["peak_vram_gb"]),
        predicted=(trace["reserved"] + around(gpu)["cuBLAS workspace"] + context) / GIB,
        measured_seconds=batch / float(pace[1]) if pace else 0.0 if said == "-" else float(said),
        parameters_only=(trace["held"]["weights"] + trace["held"]["trained"] * 4) / GIB,
        formula=(24 if row["method"].startswith(("full", "from")) else 16 if row["method"] == "dora" else 12)
        * batch
        * area
        * 1e9
        / GIB,
    )


def works_of(lines: list[list[Any]]) -> tuple[Work, ...]:
    return tuple(
        Work(kind, width, eager, (flops, 0), (moved, 0), count) for kind, flops, moved, width, eager, count in lines
    )


def line_of(one: Found) -> str:
    memory = (
        f"{one.measured:>6.2f} GiB, predicted {one.predicted:>6.2f} ({one.predicted / one.measured - 1:+6.1%})"
        if one.measured
        else " " * 38
    )
    pace = ""
    if one.measured_seconds:
        said = one.seconds()
        pace = f"{one.measured_seconds:.3f} s, predicted {said:.3f} ({said / one.measured_seconds - 1:+.0%})"
    return f"{one.row['id']:<42} {memory}   {pace}"


def errors(found: list[Found]) -> dict[str, dict[str, float]]:
    """Medians and 90th percentiles of |predicted ÷ measured − 1|, of all runs and of those with torch's own operators.

    Only on the latter are constants fit; "its model left out" are the errors when they are fit without the row's own
    model.
    """
    memory = [one for one in found if one.measured]
    timed = [one for one in found if one.measured_seconds]
    own = [one for one in timed if published.own_kernels(one.row)]
    table = {
        "memory": [one.predicted / one.measured for one in memory],
        "memory, torch's operators": [one.predicted / one.measured for one in memory if published.own_kernels(one.row)],
        "s/step": [one.seconds() / one.measured_seconds for one in timed],
        "s/step, torch's operators": [one.seconds() / one.measured_seconds for one in own],
        "s/step, its model left out": left_out(own),
        "parameters × bytes": [one.parameters_only / one.measured for one in memory],
        "{24, 12, 16} × batch × area": [one.formula / one.measured for one in memory],
    }
    print("\nerrors                        median    90 %   rows")
    said = {}
    for title, ratios in table.items():
        if off := sorted(abs(ratio - 1) for ratio in ratios):
            said[title] = {
                "median": statistics.median(off),
                "90 %": off[min(len(off) - 1, int(0.9 * len(off)))],
                "rows": len(off),
            }
            print(f"  {title:<28}{said[title]['median']:>6.1%} {said[title]['90 %']:>7.1%}   {len(off):>4}")
    return said


def ours() -> dict[str, dict[str, float]]:
    """Print the runs that benchmarks/check_gpu.py measured, with their estimates from profiles and the errors.

    Constants are not fit on them: their GPU waited for its host, a virtual machine's, most of the time.
    """
    lines = (ASSETS / "gpu_runs.tsv").read_text(encoding="utf-8").splitlines()
    memory, time = [], []
    print("\nruns of ours")
    for line in lines[1:]:
        row = dict(zip(lines[0].split("\t"), line.split("\t"), strict=True))
        one = forecast(load_recipe(row["recipe"], row["set"].split()), row["recipe"], find(row["gpu"]), IMAGES)
        reserved, kernels = (one.memory.phases["train"] - CONTEXT) / GIB, one.speed.compute + one.speed.bandwidth
        memory.append(reserved / float(row["reserved_gib"]) - 1)
        time.append(one.speed.seconds / float(row["seconds"]) - 1)
        print(
            f"  {row['recipe']:<18} {row['set']:<22} {row['reserved_gib']:>6} GiB, predicted {reserved:>6.2f} "
            f"({memory[-1]:+4.0%})"
            f"   {row['seconds']} s, predicted {one.speed.seconds:.3f} ({time[-1]:+.0%}); kernels "
            f"{row['kernel_seconds']} s, predicted {kernels:.4f}"
        )
    said = {"our runs, memory": memory, "our runs, s/step": time}
    return {
        name: {"median": statistics.median(map(abs, off)), "least": min(off), "most": max(off), "rows": len(off)}
        for name, off in said.items()
    }


# -- the fit
# ------------------------------------------------------------------------------------------------------------


def left_out(found: list[Found]) -> list[float]:
    """predicted ÷ measured of every row, with constants fit on the rows of all other models; the fit on all of them
    is printed.
    """
    ratios: list[float] = []
    models = sorted({one.row["model"] for one in found})
    if len(models) < 2:
        return ratios
    for model in models:
        pace = fit([one for one in found if one.row["model"] != model])
        ratios += [one.seconds(pace) / one.measured_seconds for one in found if one.row["model"] == model]
    print("  fit:", {name: float(f"{value:.3g}") for name, value in vars(fit(found)).items()})
    return ratios


def fit(found: Sequence[Found]) -> Pace:
    """Coordinate descent on the mean of |log(predicted ÷ measured)|, in steps that shrink. A share is at most 1."""
    best, step = PACE, 0.4

    def loss(pace: Pace) -> float:
        return statistics.mean(abs(math.log(one.seconds(pace) / one.measured_seconds)) for one in found)

    least = loss(best)
    while step > 0.02:
        tried = [
            replace(best, **{key: min(1.0, value * factor)})
            for key, value in vars(best).items()
            for factor in (1 + step, 1 / (1 + step))
        ]
        now, pace = min(((loss(pace), pace) for pace in tried), key=lambda pair: pair[0])
        if now < least - 1e-5:
            least, best = now, pace
        else:
            step /= 2
    return best


if __name__ == "__main__":
    main()

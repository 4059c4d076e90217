"""`report.html`: one run on one self-contained page, also for a run that has not finished."""

from __future__ import annotations

import functools
import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from finetune.data.media.sample import open_sample
from finetune.estimate import monitor
from finetune.evaluation import mode_collapse
from finetune.export.usage import usage
from finetune.paths import embedded
from finetune.planning import Plan, load_plan
from finetune.report import data_page, images, svg_charts, tables
from finetune.report.html import render
from finetune.report.svg_charts import Line
from finetune.terminal import duration
from finetune.training.run_list import read_json, read_records

MAX_SAMPLE_STEPS = 8  # columns of the sample table: the first step, the last one and some in between
MAX_PAIRS = 12
LARGE_SIDE, SMALL_SIDE = 512, 256  # pixels of an image in before/after and in the sample table
Picture = Callable[[images.SampleFile, int], dict[str, Any]]
METHODS = {"lora": "LoRA", "full": "Full fine-tuning", "scratch": "Training from scratch"}


@dataclass(frozen=True)
class _RunFiles:
    """The contents of a run's folder."""

    folder: Path
    plan: Plan
    records: list[dict[str, float]]
    data: dict[str, Any] | None
    estimate: dict[str, Any] | None
    versions: dict[str, str]
    files: list[Path]  # in final/

    @functools.cached_property
    def samples(self) -> dict[int, list[images.SampleFile]]:
        return images.sample_files(self.folder, self.plan.recipe.sample.prompts)

    @property
    def done(self) -> int:
        return int(self.records[-1]["step"]) if self.records else 0

    @property
    def train_steps(self) -> list[str]:
        """Names of the train steps that logged a loss, such as `denoiser`."""
        return sorted(
            {key.removeprefix("loss.") for record in self.records for key in record if key.startswith("loss.")}
        )

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever `key` was logged and is finite."""
        return [(record["step"], record[key]) for record in self.records if math.isfinite(record.get(key, math.nan))]


def write_report(run_folder: Path) -> Path:
    """Write `report.html` and `before-after.png` into a run's folder from its current contents.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder is not a run.
    """
    run = _read(run_folder)
    page = render("run.html.j2", **{name: build() for name, build in _builders(run, embedded_picture).items()})
    images.write_before_after(run_folder, run.samples)
    path = run_folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def sections(
    run_folder: Path, names: Sequence[str], picture: Picture, memory_bytes: int | None = None
) -> dict[str, Any]:
    """Some variables of `run.html.j2`, for pages that show a part of it.

    Args:
        run_folder: the run's folder, of a finished or a running run.
        names: of the variables.
        picture: returns the variables of the macro `image` for a sample and its largest side in pixels.
        memory_bytes: of a running run, what it takes now; its median step is read from its records.

    Raises:
        UserError: the folder is not a run.
    """
    run = _read(run_folder)
    if run.estimate is not None:  # a run writes what it measured when it ends
        seconds = [second for _, second in run.series("seconds")]
        live = {"memory_bytes": memory_bytes, "seconds_per_step": statistics.median(seconds) if seconds else None}
        for key, value in live.items():
            if run.estimate[key]["measured"] is None:
                run.estimate[key]["measured"] = value
    builders = _builders(run, picture)
    return {name: builders[name]() for name in names}


def _builders(run: _RunFiles, picture: Picture) -> dict[str, Callable[[], Any]]:
    return {
        "title": lambda: f"{run.plan.recipe.name} · {run.plan.recipe.method}",
        "head": lambda: _head(run),
        "comparison": lambda: _comparison(run, picture),
        "data": lambda: None if run.data is None else data_page.summary(run.data),
        "plan": lambda: _plan(run),
        "training": lambda: _training(run),
        "estimate": lambda: _estimate(run),
        "samples": lambda: _samples(run, picture),
        "result": lambda: _result(run),
    }


def _read(folder: Path) -> _RunFiles:
    plan = load_plan(folder)
    data, estimate, versions = (folder / name for name in ("data.json", "estimate.json", "versions.json"))
    files = sorted(path for path in (folder / "final").rglob("*") if path.is_file())
    return _RunFiles(
        folder,
        plan,
        read_records(folder / "metrics.jsonl"),
        read_json(data),
        read_json(estimate),
        read_json(versions) or {},
        files,
    )


# -- sections, each a dictionary for the template --------------------------------------------------------------------


def _head(run: _RunFiles) -> dict[str, Any]:
    plan, recipe = run.plan, run.plan.recipe
    finished = bool(run.files)
    facts = [
        ("images", f"{plan.data.images:,}"),
        ("steps", f"{run.done:,}" if finished else f"{run.done:,} / {plan.steps:,}"),
    ]
    if seconds := [second for _, second in run.series("seconds")]:
        facts += [("training", duration(sum(seconds))), ("per step", f"{statistics.median(seconds):.2g} s")]
    for train_step in run.train_steps:
        name = "loss" if len(run.train_steps) == 1 else f"{_label(run, train_step)} loss"
        facts.append((name, f"{svg_charts.smoothed(run.series(f'loss.{train_step}'))[-1][1]:.3g}"))
    if run.files:
        name = "file" if len(run.files) == 1 else f"{len(run.files)} files"
        facts.append((name, file_size(sum(path.stat().st_size for path in run.files))))
    base = f" on {recipe.model.path}" if recipe.model.path else ""
    return {
        "name": recipe.name,
        "method": f"{METHODS[recipe.method]} of {recipe.model.family}{base}",
        "finished": finished,
        "state": "finished" if finished else "not finished",
        "progress": f" after {run.done} steps" if finished else f", step {run.done} of {plan.steps}",
        "facts": facts,
    }


def _comparison(run: _RunFiles, picture: Picture) -> dict[str, Any]:
    pairs = images.before_and_after(run.samples)[:MAX_PAIRS]
    if not pairs:
        return {"pairs": []}
    first, last = min(run.samples), max(run.samples)
    names = (
        "before" if first == 0 else f"step {first:,}",
        "after" if run.files and last == run.done else f"step {last:,}",
    )
    return {
        "pairs": [
            {
                "prompt": pair[1].prompt,
                "images": [(name, picture(sample, LARGE_SIDE)) for name, sample in zip(names, pair, strict=True)],
            }
            for pair in pairs
        ]
    }


def _plan(run: _RunFiles) -> dict[str, Any]:
    rows = tables.plan_rows(run.plan)
    return {"steps": dict(rows)["steps"], "rows": [row for row in rows if row[0] != "steps"]}


def _training(run: _RunFiles) -> dict[str, Any]:
    if not run.train_steps:
        return {"lead": "No step has been taken yet.", "charts": []}
    last = float(run.plan.steps)
    seconds, rate = run.series("seconds"), run.series("lr")
    gradient = [line for train_step in run.train_steps for line in _raw_and_smoothed(run, f"gradient.{train_step}")]
    typical = svg_charts.smoothed(seconds, statistics.median)
    clipped = "before clipping" if run.plan.recipe.optimizer.clip_norm else ""
    charts = (
        svg_charts.chart("Loss", _loss_lines(run), last=last),
        svg_charts.chart(
            "Seconds per step", [Line(seconds, "raw"), Line(typical, "smooth")], from_zero=True, last=last
        ),
        svg_charts.chart("Learning rate", [Line(rate, "smooth")], from_zero=True, last=last),
        svg_charts.chart("Gradient norm", gradient, clipped, last=last),
        _mode_chart(run, last),
    )
    return {"lead": f"{run.done} of {run.plan.steps} steps.", "charts": charts}


def _loss_lines(run: _RunFiles) -> list[Line]:
    lines, several = [], len(run.train_steps) > 1
    for number, train_step in enumerate(run.train_steps):
        raw = run.series(f"loss.{train_step}")
        lines.append(Line(raw, "raw", "" if several else "each step"))
        style = "other" if number else "smooth"
        lines.append(Line(svg_charts.smoothed(raw), style, _label(run, train_step) if several else "smoothed"))
    if validation := run.series("validation"):
        lines.append(Line(validation, "dots", "held-out images"))
    return lines


def _mode_chart(run: _RunFiles, last: float) -> Markup:
    """Diversity and coverage of the samples, for runs that are monitored for mode collapse."""
    checks = mode_collapse.checks(run.records)
    collapsed = [
        str(checks[number - 1].step)
        for number in range(1, len(checks) + 1)
        if mode_collapse.problem(checks[:number], run.plan.steps)
    ]
    summary = f"mode collapse at step {', '.join(collapsed)}" if collapsed else "relative to the real images"
    diversity = [(float(check.step), check.diversity) for check in checks]
    coverage = [(float(check.step), check.coverage) for check in checks]
    lines = [Line(diversity, "smooth", "diversity"), Line(coverage, "dots", "coverage")]
    return svg_charts.chart("Modes", lines, summary, from_zero=True, last=last)


def _raw_and_smoothed(run: _RunFiles, key: str) -> list[Line]:
    points = run.series(key)
    return [Line(points, "raw"), Line(svg_charts.smoothed(points), "smooth")]


def _estimate(run: _RunFiles) -> dict[str, Any] | None:
    if run.estimate is None:
        return None
    gpu, reason = run.estimate["gpu"], run.estimate["no_estimate"]
    lead = (
        f"The estimate for {gpu} before the first step, and what the run measured."
        if gpu
        else f"There was no estimate: {reason}."
    )
    return {"lead": lead, "rows": monitor.rows(run.estimate)}


def _samples(run: _RunFiles, picture: Picture) -> dict[str, Any] | None:
    """Rows are the prompts of the last sampled step, columns are steps."""
    if not run.samples:
        return None
    steps = sorted(run.samples)
    if len(steps) > MAX_SAMPLE_STEPS:
        spread = (round(number * (len(steps) - 1) / (MAX_SAMPLE_STEPS - 1)) for number in range(MAX_SAMPLE_STEPS))
        steps = sorted({steps[index] for index in spread})
    at = {step: {(sample.prompt, sample.seed): sample for sample in run.samples[step]} for step in steps}
    rows = []
    for row in run.samples[steps[-1]]:
        cells = [(step, at[step].get((row.prompt, row.seed))) for step in steps]
        shown = [(f"{step:,}", picture(cell, SMALL_SIDE) if cell else None) for step, cell in cells]
        rows.append({"prompt": row.prompt, "images": shown})
    lead = "Each row keeps its prompt and seed; only the weights change."
    if run.plan.recipe.model.family == "autoencoder-kl":
        lead = "In each pair, a training image (top) and its reconstruction (bottom)."
    return {"lead": lead, "steps": [f"{step:,}" for step in steps], "rows": rows}


def _result(run: _RunFiles) -> dict[str, Any]:
    folder = shlex.quote(str(run.folder))
    recipe = shlex.quote(str(run.folder / "recipe.yaml"))
    base = embedded(run.plan.recipe.model.path or "")
    versions = [f"{name} {version}" for name, version in run.versions.items() if version != "absent"]
    return {
        "folder": str(run.folder),
        "files": [(str(path.relative_to(run.folder)), file_size(path.stat().st_size)) for path in run.files],
        "usage": usage(run.plan, base, str(run.folder / "final")) if run.files else "",
        "resume": f"ft train {recipe} --set output.folder={folder} --resume",
        "environment": [f"seed {run.plan.recipe.train.seed}", *versions],
    }


# -- small parts -----------------------------------------------------------------------------------------------------


def _label(run: _RunFiles, train_step: str) -> str:
    """A train step's name for people: metrics of every GAN are logged as `critic`, which is a WGAN's term."""
    wasserstein = getattr(run.plan.recipe.net, "objective", "") == "wasserstein"
    return "discriminator" if train_step == "critic" and not wasserstein else train_step


def embedded_picture(sample: images.SampleFile, side: int) -> dict[str, Any]:
    """A sample as a data URI."""
    return open_sample(sample.path)[0].player(side)


def file_size(count: int) -> str:
    """`312 KB`, `22.4 MB`, `4.27 GB`, in powers of ten as file managers show them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{max(1, round(count / 1000))} KB"

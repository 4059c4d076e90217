"""`report.html`: a run on one page that stands alone, to look at and to hand on. Also good for a run that is not finished.

Prompts, captions, names and paths are other people's text: whatever goes into the page passes through `text`.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import terminal
from finetune.estimate import monitor
from finetune.evaluation import mode_collapse
from finetune.export.usage import usage
from finetune.paths import embedded
from finetune.planning import Plan, load_plan
from finetune.report import images, svg_charts, tables
from finetune.report.data_page import data_section
from finetune.report.html import document, image, section, text
from finetune.terminal import duration

MOST_LOOKS = 8  # columns of the samples through time: the first, the last, and some spread between
MOST_PAIRS = 12
LARGE_SIDE, SMALL_SIDE = 512, 256  # pixels of an image before/after and in the samples through time


@dataclass(frozen=True)
class _Seen:
    """What a run's folder holds, read."""

    folder: Path
    plan: Plan
    records: list[dict[str, float]]
    data: dict[str, Any] | None
    estimate: dict[str, Any] | None
    versions: dict[str, str]
    looks: dict[int, list[images.Drawn]]
    files: list[Path]  # of final/

    @property
    def done(self) -> int:
        return int(self.records[-1]["step"]) if self.records else 0

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever `key` was measured and is a number."""
        return [(record["step"], record[key]) for record in self.records if math.isfinite(record.get(key, math.nan))]


def write_report(run_folder: Path) -> Path:
    """Write `report.html` (and `before-after.png`) into a run's folder from what is there now; returns the page's path.

    Raises:
        UserError: the folder is no run.
    """
    seen = _read(run_folder)
    sections = (
        _head(seen),
        _before_after(seen),
        _data(seen),
        _plan(seen),
        _curves(seen),
        _estimate(seen),
        _samples(seen),
        _results(seen),
    )
    page = document(f"{seen.plan.recipe.name} · {seen.plan.recipe.method}", *sections)
    images.write_before_after(run_folder, seen.looks)
    path = run_folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _read(folder: Path) -> _Seen:
    plan = load_plan(folder)
    data, estimate, versions = (folder / name for name in ("data.json", "estimate.json", "versions.json"))
    files = sorted(path for path in (folder / "final").rglob("*") if path.is_file())
    return _Seen(
        folder,
        plan,
        _records(folder / "metrics.jsonl"),
        json.loads(data.read_text(encoding="utf-8")) if data.is_file() else None,
        json.loads(estimate.read_text(encoding="utf-8")) if estimate.is_file() else None,
        json.loads(versions.read_text(encoding="utf-8")) if versions.is_file() else {},
        images.looks(folder, plan.recipe.sample.prompts),
        files,
    )


def _records(path: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`; the last may still be in the writing."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


# -- sections -------------------------------------------------------------------------------------------------------------


def _head(seen: _Seen) -> str:
    plan, recipe = seen.plan, seen.plan.recipe
    method = {"lora": "LoRA", "full": "Full fine-tuning", "scratch": "Training from scratch"}[recipe.method]
    what = f"{method} of {recipe.model.family}" + (f" on {recipe.model.path}" if recipe.model.path else "")
    finished = bool(seen.files)
    state = (
        f"<b>finished</b> after {seen.done} steps"
        if finished
        else f'<b class="open">not finished</b>, step {seen.done} of {plan.steps}'
    )
    seconds = [second for _, second in seen.series("seconds")]
    facts = [
        ("images", f"{plan.data.images:,}"),
        ("steps", f"{seen.done:,}" if finished else f"{seen.done:,} / {plan.steps:,}"),
    ]
    if seconds:
        facts += [("training", duration(sum(seconds))), ("a step", f"{statistics.median(seconds):.2g} s")]
    for train_step in _turns(seen):
        facts.append(
            (
                "loss" if len(_turns(seen)) == 1 else f"{train_step} loss",
                f"{svg_charts.smoothed(seen.series(f'loss.{train_step}'))[-1][1]:.3g}",
            )
        )
    if seen.files:
        facts.append(
            (
                "file" if len(seen.files) == 1 else f"{len(seen.files)} files",
                _bytes(sum(path.stat().st_size for path in seen.files)),
            )
        )
    tiles = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts)
    return f'<header>\n<h1>{text(recipe.name)}</h1>\n<p class="state">{text(what)} · {state}</p>\n<dl class="tiles">{tiles}</dl>\n</header>'


def _before_after(seen: _Seen) -> str:
    pairs = images.before_and_after(seen.looks)[:MOST_PAIRS]
    if not pairs:
        return ""
    first, last = min(seen.looks), max(seen.looks)
    names = (
        "before" if first == 0 else f"step {first:,}",
        "after" if seen.files and last == seen.done else f"step {last:,}",
    )
    cards = []
    for pair in pairs:
        two = "".join(
            f"<div><small>{name}</small>{_image(drawn, LARGE_SIDE, name)}</div>"
            for name, drawn in zip(names, pair, strict=True)
        )
        prompt = text(pair[1].prompt)
        cards.append(
            f'<figure class="card"><div class="two">{two}</div><figcaption title="{prompt}">{prompt}</figcaption></figure>'
        )
    return f'<section id="before-after" aria-label="before and after">\n<div class="pairs">\n{chr(10).join(cards)}\n</div>\n</section>'


def _data(seen: _Seen) -> str:
    return "" if seen.data is None else data_section(seen.data)


def _plan(seen: _Seen) -> str:
    rows = tables.plan_rows(seen.plan)
    lead = dict(rows)["steps"]
    return section(
        "plan", "The plan", lead, f'<div class="card">{_rows(row for row in rows if row[0] != "steps")}</div>'
    )


def _turns(seen: _Seen) -> list[str]:
    return sorted({key.removeprefix("loss.") for record in seen.records for key in record if key.startswith("loss.")})


def _curves(seen: _Seen) -> str:
    last = float(seen.plan.steps)
    loss, train_steps = [], _turns(seen)
    for number, train_step in enumerate(train_steps):
        raw = seen.series(f"loss.{train_step}")
        several = len(train_steps) > 1
        loss.append(svg_charts.Line(raw, "raw", "" if several else "each step"))
        loss.append(
            svg_charts.Line(
                svg_charts.smoothed(raw), "other" if number else "smooth", train_step if several else "smoothed"
            )
        )
    if validation := seen.series("validation"):
        loss.append(svg_charts.Line(validation, "dots", "held-out images"))
    watched = mode_collapse.looks(seen.records)
    kinds = [
        (name, [(float(look.step), getattr(look, name)) for look in watched]) for name in ("diversity", "coverage")
    ]
    alarms = [number for number in range(1, len(watched) + 1) if mode_collapse.lost(watched[:number], seen.plan.steps)]
    said = (
        f"lost at step {', '.join(str(watched[number - 1].step) for number in alarms)}"
        if alarms
        else "of the real images'"
    )
    if not loss:
        return section("curves", "The training", "No step was taken yet.")
    seconds, rate = seen.series("seconds"), seen.series("lr")
    gradient = [line for train_step in train_steps for line in _raw_and_smoothed(seen.series(f"gradient.{train_step}"))]
    typical = svg_charts.smoothed(seconds, statistics.median)
    clipped = "before clipping" if seen.plan.recipe.optimizer.clip_norm else ""
    drawn = (
        svg_charts.chart("Loss", loss, last=last),
        svg_charts.chart(
            "Seconds a step",
            [svg_charts.Line(seconds, "raw"), svg_charts.Line(typical, "smooth")],
            from_zero=True,
            last=last,
        ),
        svg_charts.chart("Learning rate", [svg_charts.Line(rate, "smooth")], from_zero=True, last=last),
        svg_charts.chart("Gradient norm", gradient, clipped, last=last),
        svg_charts.chart(
            "Modes",
            [svg_charts.Line(points, "dots" if name == "coverage" else "smooth", name) for name, points in kinds],
            said,
            True,
            last,
        ),
    )
    body = "\n".join(filter(None, drawn))
    return section(
        "curves", "The training", f"{seen.done} of {seen.plan.steps} steps.", f'<div class="charts">\n{body}\n</div>'
    )


def _raw_and_smoothed(points: list[tuple[float, float]]) -> list[svg_charts.Line]:
    return [svg_charts.Line(points, "raw"), svg_charts.Line(svg_charts.smoothed(points), "smooth")]


def _estimate(seen: _Seen) -> str:
    if seen.estimate is None:
        return ""
    head = "".join(f'<td class="amount soft">{name}</td>' for name in ("estimated", "measured", "off by"))
    body = "".join(
        f"<tr><th>{name}</th>" + "".join(f'<td class="amount">{text(words)}</td>' for words in texts) + "</tr>"
        for name, *texts in monitor.rows(seen.estimate)
    )
    gpu, reason = seen.estimate["gpu"], seen.estimate["no_estimate"]
    lead = (
        f"What was said before the first step for {gpu}, and what the run then took."
        if gpu
        else f"There was no estimate: {reason}."
    )
    return section(
        "estimate",
        "Estimated and measured",
        lead,
        f'<div class="card"><table class="rows"><tr><th></th>{head}</tr>{body}</table></div>',
    )


def _samples(seen: _Seen) -> str:
    """Rows are the prompts of the last look, columns steps."""
    if not seen.looks:
        return ""
    steps = sorted(seen.looks)
    if len(steps) > MOST_LOOKS:
        steps = sorted({steps[round(number * (len(steps) - 1) / (MOST_LOOKS - 1))] for number in range(MOST_LOOKS)})
    at = {step: {(drawn.prompt, drawn.seed): drawn for drawn in seen.looks[step]} for step in steps}
    head = "".join(f"<th>step {step:,}</th>" for step in steps)
    body = []
    for row in seen.looks[steps[-1]]:
        cells = [at[step].get((row.prompt, row.seed)) for step in steps]
        shown = "".join(
            f"<td>{_image(cell, SMALL_SIDE, f'step {step}') if cell else ''}</td>"
            for step, cell in zip(steps, cells, strict=True)
        )
        body.append(f'<tr><th><div title="{text(row.prompt)}">{text(row.prompt)}</div></th>{shown}</tr>')
    table = f'<div class="card strip"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    lead = "The same prompt and seed at every look: only the weights change."
    if seen.plan.recipe.model.family == "autoencoder-kl":
        lead = "In each pair a training image above, what came back from its latent below."
    return section("samples", "The samples through time", lead, table)


def _results(seen: _Seen) -> str:
    files = [(str(path.relative_to(seen.folder)), _bytes(path.stat().st_size)) for path in seen.files]
    listed = "".join(f'<tr><td>{text(name)}</td><td class="amount soft">{size}</td></tr>' for name, size in files)
    if not files:
        place = shlex.quote(str(seen.folder))
        resume = f"ft train {shlex.quote(str(seen.folder / 'recipe.yaml'))} --set output.folder={place} --resume"
        parts = [
            "<p>Nothing was written yet. This goes on with the run:</p>",
            f'<div class="card"><pre>{text(resume)}</pre></div>',
        ]
    else:
        parts = [f'<div class="card"><table class="rows">{listed}</table></div>', "<h3>To draw with it</h3>"]
        lines = usage(seen.plan, embedded(seen.plan.recipe.model.path or ""), str(seen.folder / "final"))
        parts.append(f'<div class="card"><pre>{text(lines)}</pre></div>')
    made = [
        f"seed {seen.plan.recipe.train.seed}",
        *(f"{name} {version}" for name, version in seen.versions.items() if version != "absent"),
    ]
    return section(
        "results",
        "The result",
        f"In {seen.folder}",
        *parts,
        f'<h3>Made with</h3><p class="soft">{text(" · ".join(made))}</p>',
    )


# -- small parts ----------------------------------------------------------------------------------------------------------


def _rows(rows: Iterable[terminal.Row]) -> str:
    return (
        '<table class="rows">'
        + "".join(f"<tr><th>{text(name)}</th><td>{text(words)}</td></tr>" for name, words in rows)
        + "</table>"
    )


def _image(drawn: images.Drawn, side: int, name: str) -> str:
    from PIL import Image

    with Image.open(drawn.path) as shown_image:
        return image(
            images.inside_page(shown_image, side),
            f"{drawn.prompt}, {name}",
            small=max(shown_image.size) <= images.LOSSLESS_SIDE,
        )


def _bytes(count: int) -> str:
    """`312 KB`, `22.4 MB`, `4.27 GB`, in powers of ten as file managers show them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{max(1, round(count / 1000))} KB"

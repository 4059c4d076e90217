"""The data of a run on a page: a section of `report.html`, and the page that `ft data check --html` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data.audit.audit import Audit
from finetune.data.sources.entry import REMEDIES, Problem
from finetune.report import images, tables
from finetune.report.html import render

MAX_IMAGES = 300  # training images on the page of `ft data check`; of more, an evenly spaced sample
MAX_PROBLEM_IMAGES = 60  # images of one kind of problem
MAX_GROUPS = 12  # examples of one kind of warning
MAX_GROUP_IMAGES = 4  # images of one example: of duplicates, those that belong together
MAX_NAMES = 20  # file names of one kind of problem; `data.json` lists all

# Settings that let training start although there are such problems.
FLAGS = {
    "unreadable image": "--set data.unreadable_images=skip",
    "missing image": "--set data.unreadable_images=skip",
    "unreadable mask": "--set data.unreadable_images=skip",
    "missing caption": "--set data.missing_captions=skip",
    "missing class": "--set data.classes=captions",
}


def summary(facts: dict[str, Any]) -> dict[str, Any]:
    """The template's variables for the section on data.

    Args:
        facts: what `tables.facts` returns, or the `data.json` of a run.
    """
    most = max((bucket["examples"] for bucket in facts["buckets"]), default=1)
    buckets = [
        {
            "size": tables.size_of(bucket),
            "percent": f"{55 * bucket['examples'] / most:.1f}",
            "examples": f"{bucket['examples']:,}",
            "crop": tables.crop_loss(bucket) if bucket["worst"] >= 0.005 else "",
        }
        for bucket in facts["buckets"]
    ]
    notes = []
    for finding in facts.get("findings", []):  # runs of earlier versions have none
        groups = [" = ".join(group) for group in finding["groups"]]
        notes.append(_note("warning", finding, groups, sum(map(len, finding["groups"]))))
    for problem in facts["problems"]:
        notes.append(_note("problem", problem, problem["names"][:MAX_NAMES], MAX_NAMES))
    shown, total = facts.get("images", ()), facts["training"]
    return {
        "lead": "Every image and caption was checked"
        + (". Nothing was left out." if not facts["problems"] else "; some are not used."),
        "counts": [row for row in tables.data_rows(facts) if row[0] in ("train", "held out", "enlarged")],
        "buckets": buckets,
        "notes": notes,
        "images": [{"caption": each["caption"], "tokens": each.get("tokens")} | _stored(each) for each in shown],
        "shown": f"All {total:,} training images as the model sees them"
        if len(shown) == total
        else f"A sample of the training images as the model sees them: {len(shown):,} of {total:,}, evenly spaced",
    }


def _note(level: str, found: dict[str, Any], names: Sequence[str], shown: int) -> dict[str, str]:
    return {
        "level": level,
        "summary": tables.counted(found),
        "names": ", ".join(names) + (", …" if found["count"] > shown else ""),
    }


def _stored(shown: dict[str, Any]) -> dict[str, Any]:
    """A thumbnail of `data.json`."""
    return {"source": shown["image"], "small": True}


def write_page(audit: Audit, facts: dict[str, Any], source: str, path: Path) -> None:
    """Write the page of `ft data check`.

    From top to bottom: whether training can start and the fixes if not, the images that are not used, the warnings, all
    counts, and the training images (at most `MAX_IMAGES`, evenly spaced).

    Args:
        audit: the audit of the data.
        facts: what `tables.facts` returns for it.
        source: the data's folder or name, as the user gave it.
        path: the page's file.
    """
    tokens = {shown["name"]: shown["tokens"] for shown in facts.get("images", ()) if shown.get("tokens")}
    thumbnails = [shown | {"tokens": tokens.get(shown["name"])} for shown in tables.thumbnails(audit, MAX_IMAGES)]
    page = render(
        "data_check.html.j2",
        title=f"{source} · ft data check",
        name=tables.short(source.rstrip("/")),
        source=source,
        verdict=verdict(audit, facts),
        problems=[problem(kind, problems) for kind, problems in by_kind(audit).items()],
        warnings=[warning(audit, finding) for finding in audit.findings],
        data=summary(facts | {"images": thumbnails}),
    )
    path.write_text(page, encoding="utf-8")


def verdict(audit: Audit, facts: dict[str, Any]) -> dict[str, Any]:
    """Whether training can start on this data, why not, and what to do."""
    stopping = sorted({problem.kind for problem in audit.problems if problem.stops})
    details = [
        tables.count(len(group), kind) + ("" if kind in stopping else " (ignored)")
        for kind, group in by_kind(audit).items()
    ]
    if facts.get("cut_captions"):
        details.append(f"{tables.count(facts['cut_captions'], 'caption')} longer than the text encoder reads")
    ready = f"Ready to train on {tables.count(facts['training'], 'image')}."
    if stopping:
        level, headline = "bad", "Not ready: training would stop at these problems."
    elif not facts["training"]:
        level, headline = "bad", "Not ready: there is no image to train on."
    elif facts["problems"]:
        level, headline = "warn", f"{ready} Some files are not used."
    else:
        level, headline = "good", ready + (" Some images have warnings." if audit.findings else "")
    return {
        "level": level,
        "headline": headline,
        "details": details,
        "fixes": [{"kind": kind, "advice": f"{REMEDIES[kind]}."} for kind in stopping],
        "flags": " ".join(dict.fromkeys(FLAGS[kind] for kind in stopping if kind in FLAGS)),
    }


def by_kind(audit: Audit) -> dict[str, list[Problem]]:
    found: dict[str, list[Problem]] = {}
    for problem in audit.problems:
        found.setdefault(problem.kind, []).append(problem)
    return found


def problem(kind: str, problems: Sequence[Problem]) -> dict[str, Any]:
    """One kind of problem: a preview of each image as far as it can be decoded, and the names of other files."""
    shown, others = [], []
    for problem in problems[:MAX_PROBLEM_IMAGES]:
        preview = images.preview(Path(problem.name))
        if preview is None and kind != "unreadable image":
            others.append({"name": problem.name, "detail": problem.detail})
        else:
            label = {"path": problem.name, "name": tables.short(problem.name), "detail": problem.detail, "source": ""}
            shown.append(label | (preview or {}))
    left = len(problems) - MAX_PROBLEM_IMAGES
    return {
        "title": tables.count(len(problems), kind),
        "images": shown,
        "others": others,
        "more": f"and {left:,} more; `ft data check --json` names all" if left > 0 else "",
    }


def warning(audit: Audit, finding: Any) -> dict[str, Any]:
    groups = []
    for places in finding.examples[:MAX_GROUPS]:
        records = [audit.images[place] for place in places[:MAX_GROUP_IMAGES]]
        groups.append(
            {
                "images": [
                    {"source": images.of_training(record, audit.background), "small": True, "name": record.name}
                    for record in records
                ],
                "names": " = ".join(tables.short(record.name) for record in records),
            }
        )
    return {"title": f"{finding.count} × {finding.kind}: {finding.detail}", "groups": groups}

"""The tab Result: before and after, checkpoints and strengths side by side, exports, and the model card."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse, Response
from starlette.routing import Route

from finetune.data.media.sample import open_sample
from finetune.errors import UserError
from finetune.export import WHERE
from finetune.models.registry import spec_of
from finetune.planning import load_plan
from finetune.report import html_report
from finetune.report.images import SampleFile
from finetune.training.run_list import look
from finetune.ui.site import Site, fragment, moved, page, posted, shown, url
from finetune.ui.tabs.train import picture_of
from finetune.ui.tasks import Tasks

STRENGTHS = (0, 0.5, 0.75, 1, 1.25)  # of the sheet; 0 is the base, 1 as it was trained
SHEET_PROMPTS = 4
SWEEP = "sweep"  # beginning of the sheet's folder in `drawn`
CELL = re.compile(r"(\d+)-step-(\d+)-strength-([\d.]+)\.png")
FORMATS = {"comfyui": "ComfyUI", "kohya": "kohya (A1111, Forge)", "diffusers": "diffusers"}


def overview(site: Site, query: Mapping[str, str]) -> Response:
    """The whole tab."""
    runs = [site.name_of(seen.folder) for seen in site.queue.seen()]
    finished = [site.name_of(seen.folder) for seen in site.queue.seen() if seen.state == "finished"]
    name = query.get("run", "") or next(iter(finished or runs), "")
    if not name:
        return page(site, "result", "result.html.j2", title="Result", run="", runs=[], exports=None, sheet=None)
    folder = site.run_folder(name)
    return page(
        site,
        "result",
        "result.html.j2",
        title="Result",
        run=name,
        runs=runs,
        report=(folder / "report.html").is_file(),
        card=_card(folder),
        exports=_exports(site, name),
        sheet=_sheet(site, name),
        **html_report.sections(folder, ("head", "comparison", "result"), picture_of(name)),
    )


def exports(site: Site, query: Mapping[str, str]) -> Response:
    """The exported files and the running export."""
    return _changed(query, "_exports.html.j2", _exports(site, query.get("run", "")))


def sheet(site: Site, query: Mapping[str, str]) -> Response:
    """Checkpoints and strengths."""
    return _changed(query, "_sheet.html.j2", _sheet(site, query.get("run", "")))


def export(site: Site, form: Mapping[str, str]) -> Response:
    """Write a file for another program."""
    name, layout, checkpoint = form.get("run", ""), form.get("format", ""), form.get("checkpoint", "")
    folder = site.run_folder(name)
    if layout not in _formats(folder):
        raise UserError(f'there is no format "{layout}" for this run', remedy="reload the page")
    if checkpoint and checkpoint != "best" and not checkpoint.isdecimal():
        raise UserError(f'there is no checkpoint "{checkpoint}"', remedy="reload the page")
    arguments = ["export", str(folder), "--format", layout, *(["--checkpoint", checkpoint] if checkpoint else [])]
    _tasks(site).start(f"export {name}", f"Exporting for {FORMATS[layout]}", arguments)
    return moved("/result", run=name)


def sweep(site: Site, form: Mapping[str, str]) -> Response:
    """Sample every checkpoint at every strength."""
    name = form.get("run", "")
    folder = site.run_folder(name)
    target = folder / "drawn" / f"{SWEEP}-{time.strftime('%Y%m%d-%H%M%S')}"
    strengths = ",".join(f"{strength:g}" for strength in STRENGTHS)
    prompts = [part for prompt in _prompts(folder)[:SHEET_PROMPTS] for part in ("--prompt", prompt)]
    arguments = [
        "sample",
        str(folder),
        "--strengths",
        strengths,
        "--checkpoints",
        "all",
        "--out",
        str(target),
        *prompts,
    ]
    _tasks(site).start(f"sweep {name}", "Sampling every checkpoint at every strength", arguments)
    return moved("/result", run=name)


def download(site: Site, query: Mapping[str, str]) -> Response:
    """An exported file, or the run's report."""
    folder, name = site.run_folder(query.get("run", "")), query.get("file", "")
    file = (folder / name).resolve()
    allowed = name == "report.html" or (name.startswith("export/") and file.is_relative_to(folder / "export"))
    if not allowed or not file.is_relative_to(folder) or not file.is_file():
        return Response("not found\n", 404)
    if name == "report.html":
        return FileResponse(file)
    return FileResponse(file, filename=file.name, media_type="application/octet-stream")


ROUTES = [
    Route("/result", shown(overview)),
    Route("/result/exports", shown(exports)),
    Route("/result/sheet", shown(sheet)),
    Route("/result/file", shown(download)),
    Route("/result/export", posted(export), methods=["POST"]),
    Route("/result/sweep", posted(sweep), methods=["POST"]),
]


# -- parts ------------------------------------------------------------------------------------------------------------


def _changed(query: Mapping[str, str], template: str, context: dict[str, Any]) -> Response:
    if query.get("version") == context["version"]:
        return Response(status_code=204)
    return fragment(template, **context)


def _tasks(site: Site) -> Tasks:
    tasks: Tasks = site.memory.setdefault("tasks", Tasks())
    return tasks


def _task(site: Site, key: str) -> dict[str, Any] | None:
    """A task that runs or failed; one that has succeeded shows in its result."""
    task = _tasks(site).of(key)
    if task is None or (task.done and not task.failed):
        return None
    return {"title": task.title, "failed": task.failed, "output": task.output if task.failed else ""}


def _exports(site: Site, name: str) -> dict[str, Any]:
    folder = site.run_folder(name)
    seen = look(folder)
    files = [
        {
            "name": path.relative_to(folder / "export").as_posix(),
            "size": html_report.file_size(path.stat().st_size),
            "address": url("/result/file", run=name, file=path.relative_to(folder).as_posix()),
            "where": next((text for key, text in WHERE.items() if f"-{key}" in path.name), ""),
        }
        for path in sorted((folder / "export").rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.suffix == ".safetensors"
    ]
    checkpoints = [("", "end of the run")] if any((folder / "final").rglob("*.safetensors")) else []
    if seen.best is not None:
        checkpoints.append(("best", f"best: step {seen.best[0]:,}"))
    checkpoints += [(str(step), f"step {step:,}") for step in seen.saved]
    context = {
        "run": name,
        "folder": str(folder / "export"),
        "files": files,
        "formats": _formats(folder),
        "checkpoints": checkpoints,
        "task": _task(site, f"export {name}"),
    }
    return context | {"version": _version(context)}


def _formats(folder: Path) -> dict[str, str]:
    """The formats that `ft export` can write for this run, ComfyUI's first."""
    recipe = load_plan(folder).recipe
    known = spec_of(recipe.model.family).lora_formats if recipe.method == "lora" else ()
    return {key: text for key, text in FORMATS.items() if key == "diffusers" or key in known}


def _sheet(site: Site, name: str) -> dict[str, Any]:
    """Prompts with the address of their image for each checkpoint and strength, from the newest sweep."""
    folder = site.run_folder(name)
    drawn = sorted(path for path in (folder / "drawn").glob(f"{SWEEP}-*") if (path / "sheet-00.png").is_file())
    picture = picture_of(name)
    prompts: dict[str, dict[str, str]] = {}
    steps, strengths = set[int](), set[float]()
    small = False
    for file in sorted(drawn[-1].iterdir()) if drawn else ():
        if (cell := CELL.fullmatch(file.name)) is None:
            continue
        shown_as = picture(SampleFile(file, "", ""), 0)
        small = shown_as["small"]
        prompts.setdefault(cell[1], {})[f"{cell[2]} {cell[3]}"] = shown_as["source"]
        steps.add(int(cell[2]))
        strengths.add(float(cell[3]))
    recipe, texts = load_plan(folder).recipe, _prompts(folder)
    entries = [
        {"prompt": texts[int(key)] if int(key) < len(texts) else key, "cells": json.dumps(cells), "at": cells}
        for key, cells in prompts.items()
    ]
    context = {
        "run": name,
        "possible": recipe.method == "lora" and bool(look(folder).saved),
        "prompts": entries,
        "small": small,
        "steps": sorted(steps),
        "strengths": [f"{strength:g}" for strength in sorted(strengths)],
        "task": _task(site, f"sweep {name}"),
    }
    return context | {"version": _version(context)}


def _prompts(folder: Path) -> list[str]:
    """The recipe's prompts, else those of the run's last samples, which are taken from captions."""
    if prompts := load_plan(folder).recipe.sample.prompts:
        return list(prompts)
    newest = sorted((folder / "samples").glob("step-*"), key=lambda path: path.stat().st_mtime)
    files = sorted(path for path in newest[-1].glob("*.png") if path.stem.isdigit()) if newest else []
    return [open_sample(file)[1].get("prompt", file.stem) for file in files]


def _version(context: Mapping[str, Any]) -> str:
    return f"{abs(hash(repr(context))):x}"


def _card(folder: Path) -> str:
    """The model card without its front matter; "" before the run has ended."""
    file = folder / "final" / "README.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return re.sub(r"\A---\n.*?\n---\n+", "", text, count=1, flags=re.DOTALL)

"""The tab Train: the queue, the runs, and one run while it trains."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse, Response
from starlette.routing import Route

from finetune.config.loader import bundled_recipes, load_recipe
from finetune.data.media.sample import SUFFIXES
from finetune.errors import UserError
from finetune.report import html_report
from finetune.report.images import SampleFile
from finetune.terminal import duration
from finetune.training.run_list import Seen, look
from finetune.ui.site import Site, fragment, moved, page, posted, shown, url

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")
MIB = 2**20
SMALL = 160  # pixels; smaller images are enlarged without smoothing


def overview(site: Site, query: Mapping[str, str]) -> Response:
    """The whole tab: the form, the queue, all runs, and one of them."""
    runs = site.queue.seen()
    name = query.get("run", "")
    if name:
        site.run_folder(name)
    elif runs:
        name = site.name_of(next((run for run in runs if run.state == "running"), runs[0]).folder)
    return page(
        site,
        "train",
        "train.html.j2",
        title="Train",
        run=name,
        listed=_listed(site, name),
        live=_live(site, name) if name else None,
        strip=_strip(site, name) if name else None,
        recipes=_recipes(site),
        recipe=query.get("recipe", ""),
        suggested=query.get("name", ""),
    )


def listing(site: Site, query: Mapping[str, str]) -> Response:
    """The queue and the runs."""
    return _changed(query, "_runs.html.j2", **_listed(site, query.get("run", "")))


def live(site: Site, query: Mapping[str, str]) -> Response:
    """State, curves and the estimate of one run."""
    return _changed(query, "_live.html.j2", **_live(site, query["run"]))


def strip(site: Site, query: Mapping[str, str]) -> Response:
    """The samples of one run, by step."""
    return _changed(query, "_strip.html.j2", **_strip(site, query["run"], query.get("version", "")))


def sample(site: Site, query: Mapping[str, str]) -> Response:
    """One sample's file."""
    folder = site.run_folder(query.get("run", ""))
    name = query.get("file", "")
    if not re.fullmatch(r"(samples|drawn)/[A-Za-z0-9_-]+/[A-Za-z0-9._-]+", name) or Path(name).suffix not in SUFFIXES:
        raise UserError(f'"{name}" is not a sample of this run', remedy="reload the page")
    file = (folder / name).resolve()
    if not file.is_relative_to(folder) or not file.is_file():
        return Response("not found\n", 404)
    return FileResponse(file, headers={"cache-control": "private, max-age=31536000, immutable"})


def start(site: Site, form: Mapping[str, str]) -> Response:
    """Put a recipe into the queue."""
    recipe, name = form.get("recipe", ""), form.get("name", "").strip()
    if recipe not in bundled_recipes():
        recipe = str(site.folders.checked(recipe))
        if not recipe.endswith((".yaml", ".yml")):
            raise UserError(f'"{recipe}" is not a recipe', remedy="choose a .yaml file")
    name = name or f"{load_recipe(recipe).method}-{Path(recipe).stem}"
    if not NAME.fullmatch(name):
        raise UserError(f'"{name}" cannot be a run\'s name', remedy="use letters, digits, dots and dashes")
    load_recipe(recipe)  # mistakes are shown before the queue
    site.queue.add(recipe, name)
    return moved("/train")


def stop(site: Site, form: Mapping[str, str]) -> Response:
    """Let a run finish its step, save and stop."""
    name = form.get("run", "")
    site.run_folder(name)
    site.queue.stop(name)
    return moved("/train", run=name)


def resume(site: Site, form: Mapping[str, str]) -> Response:
    """Continue a stopped run after its last checkpoint."""
    name = form.get("run", "")
    folder = site.run_folder(name)
    site.queue.add(str(folder / "recipe.yaml"), name, resume=True)
    return moved("/train", run=name)


def remove(site: Site, form: Mapping[str, str]) -> Response:
    """Take an entry out of the queue."""
    number = form.get("job", "")
    site.queue.remove(int(number) if number.isdecimal() else 0)
    return moved("/train")


ROUTES = [
    Route("/train", shown(overview)),
    Route("/train/runs", shown(listing)),
    Route("/train/live", shown(live)),
    Route("/train/strip", shown(strip)),
    Route("/train/sample", shown(sample)),
    Route("/train/start", posted(start), methods=["POST"]),
    Route("/train/stop", posted(stop), methods=["POST"]),
    Route("/train/resume", posted(resume), methods=["POST"]),
    Route("/train/remove", posted(remove), methods=["POST"]),
]


# -- parts of the page ------------------------------------------------------------------------------------------------


def _changed(query: Mapping[str, str], template: str, **context: Any) -> Response:
    """The fragment, or 204 if the page has this version already."""
    if query.get("version") == context["version"]:
        return Response(status_code=204)
    return fragment(template, **context)


def _listed(site: Site, chosen: str) -> dict[str, Any]:
    jobs = [job for job in site.queue.jobs() if job.state in ("waiting", "failed") or _starting(job.state, job.folder)]
    runs = [
        {
            "name": site.name_of(seen.folder),
            "state": seen.state,
            "text": _state(seen),
            "percent": round(100 * seen.step / seen.steps) if seen.steps else 0,
            "steps": f"{seen.step:,} / {seen.steps:,}",
        }
        for seen in site.queue.seen()
    ]
    entries = [{"number": job.number, "name": job.name, "state": job.state, "error": job.error} for job in jobs]
    return {"jobs": entries, "runs": runs, "run": chosen, "version": _version(entries, runs)}


def _starting(state: str, folder: Path) -> bool:
    return state == "running" and not (folder / "plan.json").is_file()


def _live(site: Site, name: str) -> dict[str, Any]:
    folder = site.run_folder(name)
    seen = look(folder)
    names = ("head", "training", "estimate")
    sections = html_report.sections(folder, names, picture_of(name), _memory(seen))
    facts = [fact for fact in sections["head"]["facts"] if fact[0] != "per step"]
    if seen.seconds_left:
        facts.insert(2, ("left", duration(seen.seconds_left)))
    if isinstance(held_out := seen.record.get("validation"), float):
        facts.append(("held-out loss", f"{held_out:.3g}"))
    if seen.best is not None:
        facts.append(("best checkpoint", f"step {seen.best[0]:,}"))
    failed = seen.state in ("failed", "killed")
    context: dict[str, Any] = {
        "run": name,
        "state": seen.state,
        "text": _state(seen),
        "percent": round(100 * seen.step / seen.steps) if seen.steps else 0,
        "log": site.queue.log(name) if failed else [],
        **sections,
    }
    context["head"]["facts"] = facts
    return context | {
        "version": _version(seen.state, seen.phase, seen.step, facts, _counted(seen), context["estimate"])
    }


def _strip(site: Site, name: str, version: str = "") -> dict[str, Any]:
    folder = site.run_folder(name)
    now = _version(sorted(path.name for path in (folder / "samples").glob("step-*/grid.png")))
    if version == now:  # nothing to read
        return {"version": now}
    return {"run": name, "version": now} | html_report.sections(folder, ("samples",), picture_of(name))


def _version(*values: object) -> str:
    return f"{abs(hash(repr(values))):x}"


def _counted(seen: Seen) -> str:
    """`encoding 40 of 400`, of the first process."""
    first = seen.processes[0] if seen.processes else None
    return f" {first.done:,} of {first.total:,}" if first is not None and first.total else ""


def _state(seen: Seen) -> str:
    if seen.state == "running":
        return f"{seen.phase or 'starting'}{_counted(seen)}" + (
            f" · {duration(seen.seconds_left)} left" if seen.seconds_left else ""
        )
    return f"{seen.state}: {seen.reason}" if seen.reason and seen.state != "finished" else seen.state


def picture_of(run: str) -> html_report.Picture:
    """Samples as addresses of this server, so that browsers keep them."""

    def picture(drawn: SampleFile, side: int) -> dict[str, Any]:
        file = "/".join(drawn.path.parts[-3:])
        stamp = drawn.path.stat().st_mtime_ns
        found = {"source": url("/train/sample", run=run, file=file, at=stamp), "small": _is_small(drawn.path, stamp)}
        return found | ({"element": "audio"} if drawn.path.suffix == ".wav" else {})

    return picture


@functools.lru_cache(4096)
def _is_small(path: Path, stamp: int) -> bool:
    from PIL import Image

    with contextlib.suppress(OSError), Image.open(path) as image:
        return max(image.size) <= SMALL
    return False


def _memory(seen: Seen) -> int | None:
    """Bytes that a running run takes now: on the GPU if it uses one, else of the process."""
    if seen.state != "running" or not seen.processes:
        return None
    pid = seen.processes[0].pid
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        for line in subprocess.run(query, capture_output=True, text=True, timeout=5).stdout.splitlines():
            process, used = line.split(",")
            if int(process) == pid:
                return int(used) * MIB
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def _recipes(site: Site) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of recipes that can be started as they are: (value, text) of each."""
    own = sorted({file for folder in (site.queue.runs, *site.folders.allowed) for file in folder.glob("*.yaml")})
    groups = [("Your recipes", [(str(file), file.name) for file in own])]
    return [*groups, ("With bundled data", [(name, name) for name in _bundled()])]


@functools.cache
def _bundled() -> tuple[str, ...]:
    """Bundled recipes whose images are bundled too."""
    return tuple(name for name in bundled_recipes() if (load_recipe(name).data.path or "").startswith("embedded:"))

"""The tab Data: every image of a folder as the model sees it, its caption, and what is wrong with it.

The folder is never written. Edited captions go into a metadata file in the folder of the runs, which recipes name as
`data.captions`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from starlette.responses import Response
from starlette.routing import Route

from finetune.config.loader import bundled_recipes, load_recipe, parse_recipe
from finetune.config.schema import Recipe
from finetune.data.audit.audit import Audit, scan
from finetune.data.example import Example
from finetune.data.sources.captions import one_line
from finetune.data.sources.files import write_aside
from finetune.errors import UserError
from finetune.paths import embedded
from finetune.report import data_page, tables
from finetune.ui.site import Site, fragment, moved, page, posted, shown

# Used without a recipe: only the defaults of its `data` section matter.
PLAIN = "method: lora\nmodel: {family: sd, path: none}\nadapter: {}\ntrain: {steps: 1}\ndata: {}\n"
PER_PAGE = 48
KEPT_SCANS = 4
READ_SECONDS = 20.0  # that an image waits for the look at its folder
SIDE = 480  # pixels of an image on the page
QUALITY = 84
LONGEST_CAPTION = 10_000  # characters


@final
@dataclass
class Scan:
    """One look at a folder, in a thread of its own."""

    folder: Path
    source: str  # as the user gave it
    recipe: Recipe
    base: str
    resolution: str
    seen: int = 0
    audit: Audit | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    reader: Any = None
    without: dict[int, str] = field(default_factory=dict)  # place → name of images without a caption
    order: list[int] = field(default_factory=list)  # of images on the page: those without a caption first
    tokens: dict[str, tuple[int, int]] = field(default_factory=dict)  # caption → its tokens, those that are read
    error: UserError | None = None
    tokens_unknown: str = ""
    finished: threading.Event = field(default_factory=threading.Event)

    @property
    def address(self) -> dict[str, str]:
        """The query that names this look."""
        return {"folder": self.source, "base": self.base, "resolution": self.resolution}

    def run(self) -> None:
        """Read every image and caption."""
        try:
            audit = scan(self.recipe.data, lambda done, name: setattr(self, "seen", done + 1))
            self.facts = tables.facts(audit, 0)
            self.without = {
                place: _relative(self, image) for place, image in enumerate(audit.images) if not image.caption
            }
            self.order = [*self.without, *(place for place in range(len(audit.images)) if place not in self.without)]
            self._count_tokens(audit)
            self.audit = audit
        except UserError as error:
            self.error = error
        except Exception as error:  # the thread must not die silently
            self.error = UserError(f"the folder could not be read: {type(error).__name__}: {error}")
        finally:
            self.finished.set()

    def count(self, caption: str) -> tuple[int, int] | None:
        """Tokens of a caption and how many of them the model reads; None without a base."""
        if self.reader is None:
            return None
        if caption not in self.tokens:
            self.tokens[caption] = self.reader.count(caption)
        return self.tokens[caption]

    def _count_tokens(self, audit: Audit) -> None:
        if not self.base:
            return
        from finetune.models.pretrained.loading import open_reader  # imports torch

        try:
            self.reader = open_reader(self.recipe, (image.caption for image in audit.training))
        except UserError as error:
            self.tokens_unknown = error.problem
            return
        counts = [self.count(image.caption) for image in audit.images]
        self.facts["cut_captions"] = sum(1 for count in counts if count is not None and count[0] > count[1])


def overview(site: Site, query: Mapping[str, str]) -> Response:
    """The whole tab."""
    given = query.get("folder", "").strip()
    context: dict[str, Any] = {
        "title": "Data",
        "folder": given,
        "base": query.get("base", ""),
        "resolution": query.get("resolution", ""),
        "bases": _bases(),
        "allowed": [str(folder) for folder in site.folders.allowed],
        "result": None,
    }
    if given:
        context["result"] = _result(site, _scan(site, query), query)
    return page(site, "data", "data.html.j2", **context)


def progress(site: Site, query: Mapping[str, str]) -> Response:
    """How far the look is; the whole result once it is there."""
    result = _result(site, _scan(site, query), query)
    if query.get("version") == result["version"]:
        return Response(status_code=204)
    return fragment("_data.html.j2", result=result)


def picture(site: Site, query: Mapping[str, str]) -> Response:
    """One image: `kind` is `whole` (upright, as in the file) or `seen` (scaled and cropped, as the model sees it)."""
    audit = _finished(_scan(site, query))
    number = query.get("n", "")
    if not number.isdecimal() or int(number) >= len(audit.images):
        return Response("not found\n", 404)
    content = _webp(audit.images[int(number)], audit.background, query.get("kind") == "seen")
    return Response(content, media_type="image/webp", headers={"cache-control": "private, max-age=3600"})


def edit(site: Site, form: Mapping[str, str]) -> Response:
    """Write a caption into the metadata file; the folder is not touched."""
    looked = _scan(site, form)
    audit = _finished(looked)
    number, text = form.get("n", ""), one_line(form.get("text", ""))
    if not number.isdecimal() or int(number) >= len(audit.images):
        raise UserError("there is no such image", remedy="reload the page")
    if len(text) > LONGEST_CAPTION:
        raise UserError("the caption is too long", remedy=f"write at most {LONGEST_CAPTION:,} characters")
    name = _relative(looked, audit.images[int(number)])
    file = captions_file(site, looked.folder)
    edited = read_captions(file) | {name: text}
    lines = [json.dumps({"file_name": key, "text": value}, ensure_ascii=False) for key, value in edited.items()]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(file, "".join(line + "\n" for line in lines).encode())
    if form.get("fragment"):
        return fragment("_image.html.j2", image=_image(site, looked, int(number), edited))
    return moved("/data", page=form.get("page", ""), **looked.address)


ROUTES = [
    Route("/data", shown(overview)),
    Route("/data/progress", shown(progress)),
    Route("/data/image", shown(picture)),
    Route("/data/caption", posted(edit), methods=["POST"]),
]


def captions_file(site: Site, folder: Path) -> Path:
    """The metadata file for captions edited on the page: beside the runs, named after the folder."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).strip("-.") or "images"
    return site.queue.runs / f"{name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}.captions.jsonl"


def read_captions(file: Path) -> dict[str, str]:
    """File name → caption of a metadata file that this page wrote; empty if there is none."""
    if not file.is_file():
        return {}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {row["file_name"]: row["text"] for row in rows}


def checked_folder(site: Site, given: str) -> Path:
    """The folder of images that a form names.

    Raises:
        UserError: it lies outside the allowed folders, or is not there.
    """
    if given.startswith("embedded:"):
        return Path(embedded(given))
    folder = site.folders.checked(given)
    if not folder.is_dir():
        raise UserError(f'there is no folder "{given}"', remedy="check its name; relative ones start where ft ui runs")
    return folder


# -- parts ------------------------------------------------------------------------------------------------------------


def _scan(site: Site, query: Mapping[str, str]) -> Scan:
    """The look at the folder that the query names; starts it the first time, and when `again` is set."""
    source = query.get("folder", "").strip()
    folder, base, resolution = checked_folder(site, source), query.get("base", ""), query.get("resolution", "")
    key = (str(folder), base, resolution)
    scans: dict[tuple[str, str, str], Scan] = site.memory.setdefault("scans", {})
    lock: threading.Lock = site.memory.setdefault("scans lock", threading.Lock())
    with lock:
        if key in scans and not query.get("again"):
            return scans[key]
        overrides = [
            f"data.path={json.dumps(source if source.startswith('embedded:') else str(folder), ensure_ascii=False)}"
        ]
        if resolution:
            if not resolution.isdecimal():
                raise UserError(f'"{resolution}" is no resolution', remedy="write a number of pixels, such as 512")
            overrides.append(f"data.resolution={resolution}")
        overrides.append("data.missing_captions=empty")  # so that they can be written on the page
        if base and base not in bundled_recipes():
            raise UserError(f'there is no recipe "{base}"', remedy="choose one of the list")
        file = captions_file(site, folder)
        if file.is_file():
            overrides.append(f"data.captions={json.dumps(str(file), ensure_ascii=False)}")
        recipe = load_recipe(base, overrides) if base else parse_recipe(PLAIN, "ft ui", "data", overrides)
        while len(scans) >= KEPT_SCANS:
            scans.pop(next(iter(scans)))
        scans[key] = started = Scan(folder, source, recipe, base, resolution)
        threading.Thread(target=started.run, name="ft-scan", daemon=True).start()
    started.finished.wait(0.5)  # a small folder needs no second request
    return started


def _finished(looked: Scan) -> Audit:
    looked.finished.wait(READ_SECONDS)  # images are asked for in parallel, also after a restart of the server
    if looked.error is not None:
        raise looked.error
    if looked.audit is None:
        raise UserError("the folder is still being read", remedy="wait a moment")
    return looked.audit


def _result(site: Site, looked: Scan, query: Mapping[str, str]) -> dict[str, Any]:
    """The template's variables: progress, or verdict, problems, warnings and a page of images."""
    address = looked.address
    if not looked.finished.is_set():
        return {"address": address, "seen": looked.seen, "version": f"seen-{looked.seen}", "images": None}
    if looked.error is not None:
        raise looked.error
    audit = _finished(looked)
    pages = max(1, math.ceil(len(audit.images) / PER_PAGE))
    number = min(max(1, int(query["page"]) if query.get("page", "").isdecimal() else 1), pages)
    file = captions_file(site, looked.folder)
    edited = read_captions(file)
    places = looked.order[(number - 1) * PER_PAGE : number * PER_PAGE]
    missing = sum(1 for name in looked.without.values() if not edited.get(name))
    return {
        "address": address,
        "version": "done",
        "verdict": _verdict(looked, audit, missing),
        "problems": [data_page.problem(kind, group) for kind, group in data_page.by_kind(audit).items()],
        "warnings": [data_page.warning(audit, finding) for finding in audit.findings if finding.kind != "no caption"],
        "data": data_page.summary(looked.facts),
        "images": [_image(site, looked, place, edited) for place in places],
        "count": tables.count(len(audit.images), "image"),
        "page": number,
        "pages": pages,
        "captions": str(file) if edited else "",
        "edited": len(edited),
        "tokens_unknown": looked.tokens_unknown,
        "ready": not missing and not any(problem.stops for problem in audit.problems) and bool(len(audit.training)),
    }


def _verdict(looked: Scan, audit: Audit, missing: int) -> dict[str, Any]:
    """The verdict of `ft data check`, and what training does about images without a caption."""
    found = data_page.verdict(audit, looked.facts)
    if not missing:
        return found
    fix = {"kind": "missing caption", "advice": "write it below; these images come first."}
    ready = found["level"] != "bad"
    return found | {
        "level": "bad",
        "headline": "Not ready: training would stop at images without a caption." if ready else found["headline"],
        "details": [tables.count(missing, "missing caption"), *found["details"]],
        "fixes": [fix, *found["fixes"]],
        "flags": f"{found['flags']} --set data.missing_captions=skip".strip(),
    }


def _image(site: Site, looked: Scan, place: int, edited: Mapping[str, str]) -> dict[str, Any]:
    """One image's variables: its crop in percent of the upright original, and its caption."""
    example = _finished(looked).images[place]
    name, crop = _relative(looked, example), example.crop
    width, height = crop.scaled
    caption = edited.get(name, example.caption)
    tokens = looked.count(caption)
    loss = crop.share_lost
    return {
        "n": place,
        "page": looked.order.index(place) // PER_PAGE + 1,
        "address": looked.address,
        "name": name,
        "size": f"{crop.original[0]}×{crop.original[1]} → {crop.shape.width}×{crop.shape.height}",
        "aspect": f"{crop.original[0]} / {crop.original[1]}",
        "cropped": loss >= 0.005,
        "lost": f"{loss:.0%} cropped away" if loss >= 0.005 else "",
        "box": {
            "left": f"{100 * crop.left / width:.2f}",
            "top": f"{100 * crop.top / height:.2f}",
            "width": f"{100 * crop.shape.width / width:.2f}",
            "height": f"{100 * crop.shape.height / height:.2f}",
        },
        "enlarged": f"enlarged {crop.scaled[0] / crop.original[0]:.1f} times" if crop.upscaled else "",
        "small": max(crop.original) <= SIDE // 2,
        "held_out": example.held_out,
        "caption": caption,
        "edited": name in edited,
        "tokens": None if tokens is None else {"read": min(tokens), "cut": max(0, tokens[0] - tokens[1])},
    }


def _relative(looked: Scan, example: Example) -> str:
    """An image's name in a metadata file: relative to the folder, with slashes."""
    path = Path(example.name)
    return path.relative_to(looked.folder).as_posix() if path.is_relative_to(looked.folder) else example.name


def _webp(example: Example, background: str, seen: bool) -> bytes:
    from finetune.data.media.image import apply, decode
    from finetune.data.media.video import first_frame

    image = decode(first_frame(example.read()) if example.medium == "video" else example.read(), background)
    image = apply(image, example.crop) if seen else image
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small = max(image.size) <= SIDE // 2
    image.convert("RGB").save(buffer, "WEBP", lossless=small, quality=QUALITY, method=2)
    return buffer.getvalue()


def _bases() -> list[str]:
    """Recipes whose base's tokenizer and sizes can be used."""
    return [name for name in bundled_recipes() if name.startswith("lora/")]

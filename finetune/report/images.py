"""Images for people: labeled grids, before and after, and images inside a page. Pillow is imported where it is used."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

    from finetune.data.audit import audit

CELL = 192  # pixels: smaller images are enlarged by the whole number that fits, so that one sees something
LARGEST_CELL = 512  # wider ones are scaled down: a grid is to look at, the images lie beside it
COLUMNS = 8  # pairs of a before/after in one row
TEXT = 14  # pixels
LOSSLESS_SIDE = 160  # up to this an image goes into a page as it is


@dataclass(frozen=True)
class Drawn:
    """A sample on disk and what it was drawn from."""

    path: Path
    prompt: str
    seed: str


def looks(run_folder: Path, prompts: Sequence[str]) -> dict[int, list[Drawn]]:
    """Every look at the samples of a run, by finished steps; `prompts` name images that do not say theirs themselves."""
    found = {}
    for folder in sorted((run_folder / "samples").glob("step-*")):
        files = sorted(path for path in folder.glob("*.png") if path.stem.isdigit())
        if files and folder.name.removeprefix("step-").isdigit():
            found[int(folder.name.removeprefix("step-"))] = [_drawn(path, prompts) for path in files]
    return found


def _drawn(path: Path, prompts: Sequence[str]) -> Drawn:
    from PIL import Image

    number = int(path.stem)
    with Image.open(path) as image:
        prompt, seed = image.info.get("prompt"), image.info.get("seed", "")
    return Drawn(
        path, prompt if prompt is not None else prompts[number] if number < len(prompts) else str(number), seed
    )


def before_and_after(found: dict[int, list[Drawn]]) -> list[tuple[Drawn, Drawn]]:
    """For each prompt and seed of the last look its sample of the first look and of the last; empty with fewer than two looks."""
    if len(found) < 2:
        return []
    first = {(drawn.prompt, drawn.seed): drawn for drawn in found[min(found)]}
    return [
        (first[drawn.prompt, drawn.seed], drawn) for drawn in found[max(found)] if (drawn.prompt, drawn.seed) in first
    ]


def write_before_after(run_folder: Path, found: dict[int, list[Drawn]]) -> Path | None:
    """`before-after.png` in the run's folder: each prompt's first sample above its last; None where there are not two looks."""
    from PIL import Image

    pairs = before_and_after(found)
    if not pairs:
        return None
    stacked = []
    for pair in pairs:
        above, below = (enlarged(Image.open(drawn.path).convert("RGB")) for drawn in pair)
        both = Image.new("RGB", (max(above.width, below.width), above.height + below.height + 2), "white")
        both.paste(above, (0, 0))
        both.paste(below, (0, above.height + 2))
        stacked.append(both)
    title = f"above: {'before training' if min(found) == 0 else f'after {min(found)} steps'}   below: after {max(found)} steps"
    path = run_folder / "before-after.png"
    grid(stacked, [after.prompt for _, after in pairs], columns=min(COLUMNS, len(pairs)), title=title).save(path)
    return path


def enlarged(image: PilImage) -> PilImage:
    """Small images ×2, ×3 … without smoothing, large ones scaled down."""
    from PIL import Image

    factor = CELL // max(1, image.width)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if image.width > LARGEST_CELL:
        return image.resize(
            (LARGEST_CELL, max(1, round(image.height * LARGEST_CELL / image.width))), Image.Resampling.LANCZOS
        )
    return image


def grid(
    images: Sequence[PilImage], labels: Sequence[str] = (), columns: int | None = None, title: str = "", gap: int = 8
) -> PilImage:
    """Images side by side on white, `columns` a row (as square as possible if not given), a label of at most two lines under each."""
    from PIL import Image, ImageDraw, ImageFont

    columns = columns or max(1, round(len(images) ** 0.5 + 0.49))
    rows = -(-len(images) // columns)
    width, height = max(p.width for p in images), max(p.height for p in images)
    font = ImageFont.load_default(TEXT)
    line = TEXT + 4
    texts = [_wrapped(label, width, font.getlength) for label in labels]
    below = max((len(text) for text in texts), default=0) * line
    top = line + gap if title else 0
    sheet = Image.new("RGB", (columns * (width + gap) + gap, top + rows * (height + below + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((gap, gap), title, "#111111", font)
    for number, image in enumerate(images):
        left, upper = gap + number % columns * (width + gap), top + gap + number // columns * (height + below + gap)
        sheet.paste(image, (left, upper))
        for place, text in enumerate(texts[number] if number < len(texts) else ()):
            pen.text((left, upper + height + 2 + place * line), text, "#444444", font)
    return sheet


def sheet(
    images: Sequence[PilImage], rows: Sequence[str], columns: Sequence[str], title: str, gap: int = 8
) -> PilImage:
    """A table of images, row after row, on white: a title over it, the name of each row left of it and of each column above."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(TEXT)
    width, height, line = max(p.width for p in images), max(p.height for p in images), TEXT + 4
    left, top = gap + round(max(map(font.getlength, rows))) + gap, gap + 2 * line + gap
    made = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), "white")
    pen = ImageDraw.Draw(made)
    pen.text((gap, gap), _wrapped(title, made.width - 2 * gap, font.getlength)[0], "#111111", font)
    for number, name in enumerate(columns):
        pen.text((left + number * (width + gap), gap + line), name, "#444444", font)
    for number, name in enumerate(rows):
        pen.text((gap, top + number * (height + gap) + height // 2 - TEXT // 2), name, "#444444", font)
    for number, image in enumerate(images):
        row, column = divmod(number, len(columns))
        made.paste(image, (left + column * (width + gap), top + row * (height + gap)))
    return made


def _wrapped(text: str, width: int, length: Callable[[str], float]) -> list[str]:
    """`text` in at most two lines no wider than `width` pixels, cut with … where it is longer."""
    lines: list[str] = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if length(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = lines[:2]
    if len(lines) > 2:
        shown[1] += " …"
    for number, line in enumerate(shown):
        while length(line) > width and len(line) > 1:
            line = line.removesuffix("…").rstrip()[:-1] + "…"
        shown[number] = line
    return shown


def inside_page(image: PilImage, side: int) -> str:
    """A data URI: up to `LOSSLESS_SIDE` the image as it is, else scaled to fit `side` × `side`; WebP."""
    buffer = io.BytesIO()
    image = image.convert("RGB")
    if max(image.size) <= LOSSLESS_SIDE:
        image.save(buffer, "WEBP", lossless=True, method=2)  # a quarter of the default's time, and no larger
    else:
        image.thumbnail((side, side))
        image.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def of_training(image: audit.ImageRecord, background: str) -> str:
    """An image of the data as the model sees it, as a data URI."""
    from finetune.data.media.image import apply, decode

    return inside_page(apply(decode(image.read(), background), image.crop), LOSSLESS_SIDE)

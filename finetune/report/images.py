"""Image grids, before/after sheets and images embedded in pages. Pillow is imported where it is used."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.media.image import LOSSLESS_SIDE, ImageSample, embedded_webp
from finetune.data.media.sample import SUFFIXES, open_sample

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

    from finetune.data.example import Example

log = logging.getLogger(__name__)

CELL = 192  # pixels; smaller images are enlarged by the largest integer factor that fits
LARGEST_CELL = 512  # pixels; wider images are scaled down (the originals lie next to the grid)
COLUMNS = 8  # before/after pairs in one row
TEXT = 14  # pixels
MAX_PREVIEW_PIXELS = 100_000_000  # larger damaged images get no preview


@dataclass(frozen=True)
class SampleFile:
    """A sample on disk with its prompt and seed."""

    path: Path
    prompt: str
    seed: str


def sample_files(run_folder: Path, prompts: Sequence[str]) -> dict[int, list[SampleFile]]:
    """The samples of a run by the number of finished steps.

    Args:
        run_folder: the run's folder.
        prompts: the recipe's prompts, for images that do not store their own.
    """
    samples = {}
    for folder in sorted((run_folder / "samples").glob("step-*")):
        if not (folder.is_dir() and folder.name.removeprefix("step-").isdigit()):
            continue
        files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.stem.isdigit())
        if readable := [sample for path in files if (sample := _sample_file(path, prompts)) is not None]:
            samples[int(folder.name.removeprefix("step-"))] = readable
    return samples


def _sample_file(path: Path, prompts: Sequence[str]) -> SampleFile | None:
    """The sample in a file; None if it is damaged."""
    try:
        number, about = int(path.stem), open_sample(path)[1]
    except Exception as error:  # readers of images, video and audio raise many kinds of errors on damaged files
        log.warning(f"the sample {path} cannot be read and is left out: {str(error).partition(chr(10))[0]}")
        return None
    fallback = prompts[number] if number < len(prompts) else str(number)
    return SampleFile(path, about.get("prompt", fallback), about.get("seed", ""))


def before_and_after(samples: dict[int, list[SampleFile]]) -> list[tuple[SampleFile, SampleFile]]:
    """Pairs of the first and the last sample of each prompt and seed; empty with fewer than two sampled steps."""
    if len(samples) < 2:
        return []
    first = {(sample.prompt, sample.seed): sample for sample in samples[min(samples)]}
    last = samples[max(samples)]
    return [(first[sample.prompt, sample.seed], sample) for sample in last if (sample.prompt, sample.seed) in first]


def write_before_after(run_folder: Path, samples: dict[int, list[SampleFile]]) -> Path | None:
    """Write `before-after.png` into the run's folder, each prompt's first sample above its last one.

    Returns:
        The file, or None with fewer than two sampled steps.
    """
    from PIL import Image

    pairs = before_and_after(samples)
    if not pairs:
        return None
    stacked = []
    for pair in pairs:
        above, below = (enlarged(open_sample(sample.path)[0].thumbnail()) for sample in pair)
        both = Image.new("RGB", (max(above.width, below.width), above.height + below.height + 2), "white")
        both.paste(above, (0, 0))
        both.paste(below, (0, above.height + 2))
        stacked.append(both)
    start = "before training" if min(samples) == 0 else f"after {min(samples)} steps"
    title = f"top: {start}   bottom: after {max(samples)} steps"
    path = run_folder / "before-after.png"
    grid(stacked, [after.prompt for _, after in pairs], columns=min(COLUMNS, len(pairs)), title=title).save(path)
    return path


def enlarged(image: PilImage) -> PilImage:
    """Enlarge a small image ×2, ×3 … without smoothing; scale a large one down."""
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
    """Arrange images in a grid on white.

    Args:
        images: the cells, row by row.
        labels: text under each image, at most two lines.
        columns: images per row; None: about as many columns as rows.
        title: text above the grid.
        gap: pixels between images.
    """
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
    """Arrange images in a table on white, row by row, with names left of the rows and above the columns."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(TEXT)
    width, height, line = max(p.width for p in images), max(p.height for p in images), TEXT + 4
    left, top = gap + round(max(map(font.getlength, rows))) + gap, gap + 2 * line + gap
    canvas = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((gap, gap), _wrapped(title, canvas.width - 2 * gap, font.getlength)[0], "#111111", font)
    for number, name in enumerate(columns):
        pen.text((left + number * (width + gap), gap + line), name, "#444444", font)
    for number, name in enumerate(rows):
        pen.text((gap, top + number * (height + gap) + height // 2 - TEXT // 2), name, "#444444", font)
    for number, image in enumerate(images):
        row, column = divmod(number, len(columns))
        canvas.paste(image, (left + column * (width + gap), top + row * (height + gap)))
    return canvas


def _wrapped(text: str, width: int, length: Callable[[str], float]) -> list[str]:
    """Wrap `text` into at most two lines of `width` pixels, cut with … where it is longer."""
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


def of_training(image: Example, background: str) -> str:
    """A training image as the model sees it (scaled and cropped), as a data URI."""
    from finetune.data.media.image import apply, decode
    from finetune.data.media.video import first_frame

    return embedded_webp(
        apply(decode(first_frame(image.read()) if image.medium == "video" else image.read(), background), image.crop),
        LOSSLESS_SIDE,
    )


def preview(path: Path) -> dict[str, Any] | None:
    """A thumbnail of an image file as far as it can be decoded, or None: truncated files show their first rows."""
    from PIL import Image, ImageFile

    if path.is_symlink() or not path.is_file():  # links are not followed, as in the audit
        return None
    strict = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if image.width * image.height > MAX_PREVIEW_PIXELS:
                return None
            image.draft("RGB", (2 * LOSSLESS_SIDE, 2 * LOSSLESS_SIDE))
            return ImageSample(image.copy()).player(LOSSLESS_SIDE)
    except Exception:  # Pillow's readers raise many kinds of errors on damaged files
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = strict

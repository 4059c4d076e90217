"""Sample grids: the same prompts and seeds at every look, so that only the weights change."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from finetune.engine.progress import Progress
from finetune.models.turn import Model, SampleRequest
from finetune.planning import Plan


def draw_samples(plan: Plan, model: Model, folder: Path, done: int) -> None:
    """Draw the recipe's prompts after `done` steps into `samples/step-N/`; a failure is told, and training goes on."""
    sample = plan.recipe.sample
    if not sample.prompts:
        return
    request = SampleRequest(
        prompts=sample.prompts,
        seeds=tuple(range(sample.seed, sample.seed + len(sample.prompts))),
        steps=sample.steps,
        guidance=sample.guidance,
        negative=sample.negative,
        size=plan.data.buckets[0][:2] if len(plan.data.buckets) == 1 else None,
    )
    target = folder / "samples" / f"step-{done:07d}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        drawing = Progress("samples")
        pictures = model.sample(request)
        drawing.end()
        for number, picture in enumerate(pictures):
            picture.save(target / f"{number:02d}.png")
        grid(pictures).save(target / "grid.png")
    except Exception:  # whatever goes wrong in a look must not cost the training
        traceback.print_exc()
        print(f"the samples of step {done} could not be drawn (see above); training goes on", flush=True)


def grid(pictures: Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """Pictures side by side on white, `columns` a row (as square as possible if not given)."""
    columns = columns or max(1, round(len(pictures) ** 0.5 + 0.49))
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * (width + gap), number // columns * (height + gap)))
    return sheet

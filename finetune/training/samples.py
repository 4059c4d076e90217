"""Samples while training: the same prompts and seeds at every look, so that only the weights change."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from finetune.models.base import Model, SampleRequest
from finetune.planning import Plan
from finetune.report.images import enlarged, grid
from finetune.terminal import Progress

GRID = "grid.png"


def request_of(plan: Plan) -> SampleRequest:
    """What the plan wants drawn at every look."""
    sample = plan.recipe.sample
    return SampleRequest(
        prompts=sample.prompts,
        seeds=tuple(range(sample.seed, sample.seed + len(sample.prompts))),
        steps=sample.steps,
        guidance=sample.guidance,
        negative=sample.negative,
        sampler=sample.sampler,
        eta=sample.eta,
        truncation=sample.truncation,
        size=plan.data.buckets[0][:2] if len(plan.data.buckets) == 1 else (plan.recipe.data.resolution,) * 2,
    )


def draw_samples(plan: Plan, opened: Callable[[], Model], folder: Path, done: int) -> None:
    """Draw the recipe's prompts after `done` steps into `samples/step-N/`, unless a run that was stopped there has.

    A failure is told, and training goes on.

    Args:
        opened: gives the model, called if there is something to draw.
    """
    request = request_of(plan)
    target = folder / "samples" / f"step-{done:07d}"
    if not request.prompts or (done and (target / GRID).is_file()):
        return
    drawing = Progress("samples")
    try:
        target.mkdir(parents=True, exist_ok=True)
        model, images = opened(), []
        for number, (prompt, seed) in enumerate(zip(request.prompts, request.seeds, strict=True)):
            drawing.show(number, len(request.prompts), prompt)
            images += model.sample(replace(request, prompts=(prompt,), seeds=(seed,)))
        write_images(images, request, target)
        for name, image in model.diagnostic_images().items():
            enlarged(image).save(target / f"{name}.png")
    except Exception:  # whatever goes wrong in a look must not cost the training
        traceback.print_exc()
        print(f"the samples of step {done} could not be drawn (see above); training goes on", flush=True)
    drawing.end()


def write_images(images: Sequence[Image], request: SampleRequest, folder: Path) -> list[Path]:
    """Write `NN.png`, each with what it was drawn from in its text chunks, and the labeled `grid.png`; returns the single files."""
    files = []
    for number, (image, prompt, seed) in enumerate(zip(images, request.prompts, request.seeds, strict=True)):
        said = PngInfo()
        values = {
            "prompt": prompt,
            "negative": request.negative,
            "seed": seed,
            "steps": request.steps,
            "guidance": request.guidance,
        }
        values |= {"sampler": request.sampler} if request.sampler else {}
        if request.truncation != 1:
            values["truncation"] = request.truncation
        for key, value in values.items():
            said.add_itxt(key, str(value))
        files.append(folder / f"{number:02d}.png")
        image.save(files[-1], pnginfo=said)
    aside = folder / f".{GRID}"  # there once all is there
    grid([enlarged(image) for image in images], request.prompts).save(aside)
    os.replace(aside, folder / GRID)
    return files

"""Samples during training: always the same prompts and seeds, so that only the weights change."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from finetune.data.media.sample import Sample
from finetune.data.shape import Frame
from finetune.errors import UserError
from finetune.models.base import Model, SampleRequest
from finetune.planning import Plan
from finetune.report.images import enlarged, grid
from finetune.terminal import Progress

GRID = "grid.png"

log = logging.getLogger(__name__)


def request_of(plan: Plan) -> SampleRequest:
    """What the plan samples each time."""
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
        size=_size(plan),
        references=references_of(sample.references, len(sample.prompts)),
    )


def references_of(files: Sequence[str], count: int) -> tuple[Path, ...]:
    """The reference of each of `count` prompts.

    Raises:
        UserError: there is neither one for each nor one for all, or a file does not exist.
    """
    if len(files) not in (0, 1, count):
        problem = f"{len(files)} references for {count} prompts"
        raise UserError(problem, where="sample.references", remedy="give one for each prompt, or one for all")
    found = tuple(Path(file).expanduser() for file in (files if len(files) != 1 else tuple(files) * count))
    for file in found:
        if not file.is_file():
            raise UserError(f"there is no file {file}", where="sample.references", remedy="correct the path")
    return found


def _size(plan: Plan) -> tuple[int, int]:
    """(width, height): the training size where there is one, else a square."""
    shapes = [shape for shape, _ in plan.data.buckets if isinstance(shape, Frame)]
    return (shapes[0].width, shapes[0].height) if len(shapes) == 1 else (plan.recipe.data.resolution,) * 2


def grid_of(folder: Path, done: int) -> Path:
    """Where the sample grid after `done` steps is, in a run's folder."""
    return folder / "samples" / f"step-{done:07d}" / GRID


def sample_prompts(plan: Plan, open_model: Callable[[], Model], folder: Path, done: int) -> None:
    """Sample the recipe's prompts after `done` steps into `samples/step-N/`, unless they are there already.

    A failure is logged, and training continues.

    Args:
        open_model: returns the model; called only if there is something to sample.
    """
    request = request_of(plan)
    target = grid_of(folder, done).parent
    if not request.prompts or (done and (target / GRID).is_file()):
        return
    with Progress("samples") as progress:
        try:
            target.mkdir(parents=True, exist_ok=True)
            model, samples = open_model(), []
            for number, prompt in enumerate(request.prompts):
                progress.show(number, len(request.prompts), prompt)
                samples += model.sample(request.part(slice(number, number + 1)))
            write_samples(samples, request, target)
            for name, image in model.diagnostic_images().items():
                enlarged(image).save(target / f"{name}.png")
        except Exception:  # a failure to sample must not end the training
            log.warning("the samples of step %d failed; training continues", done, exc_info=True)


def write_samples(samples: Sequence[Sample], request: SampleRequest, folder: Path) -> list[Path]:
    """Write each sample with what it was generated from, `NN.png` and so on, and the labeled `grid.png`.

    Returns:
        The single files.
    """
    files = []
    for number, (sample, prompt, seed) in enumerate(zip(samples, request.prompts, request.seeds, strict=True)):
        about = {
            "prompt": prompt,
            "negative": request.negative,
            "seed": str(seed),
            "steps": str(request.steps),
            "guidance": str(request.guidance),
        }
        about |= {"sampler": request.sampler} if request.sampler else {}
        about |= {"truncation": str(request.truncation)} if request.truncation != 1 else {}
        files.append(folder / f"{number:02d}{sample.suffix}")
        sample.save(files[-1], about)
    aside = folder / f".{GRID}"  # renamed once everything is written
    grid([enlarged(sample.thumbnail()) for sample in samples], request.prompts).save(aside)
    os.replace(aside, folder / GRID)
    return files

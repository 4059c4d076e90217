"""Sample from a run's final files, loaded by diffusers as any other program would load them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finetune.adapters import peft
from finetune.config import samplers
from finetune.config.schema import Model, Precision, Recipe, Sample
from finetune.data.media.sample import Sample as Generated
from finetune.errors import UserError
from finetune.memory import apply
from finetune.models.base import SampleRequest
from finetune.models.pretrained import textual_inversion
from finetune.models.pretrained.check import pipeline_class
from finetune.models.pretrained.family import Family, family_of
from finetune.models.pretrained.loading import open_pipeline
from finetune.models.pretrained.model import DTYPES, generate_from_prompt, set_schedule
from finetune.models.registry import family_of_pipeline, pipelines, spec_of
from finetune.models.scratch.base import CONFIG, WEIGHTS, PixelModel, open_model
from finetune.models.scratch.gan.base import Adversarial
from finetune.paths import embedded
from finetune.planning import Plan, load_plan
from finetune.terminal import Progress
from finetune.training.device import this_machine
from finetune.training.samples import request_of, write_samples

Opened = PixelModel | tuple[Family, Any]  # what draws: a model in pixel space, or a pipeline with its family


def sample(
    run: str | Path,
    prompts: Sequence[str],
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    out: Path | None = None,
    sampler: str | None = None,
    eta: float | None = None,
    truncation: float | None = None,
) -> list[Path]:
    """Draw every prompt with every seed, each image from its own generator, so that it does not depend on the others.

    Args:
        run: a run's folder, a diffusers folder, or `embedded:base`.
        prompts: what to draw; none: the prompts of the run's recipe.
        seeds: none: prompt n has the recipe's seed + n, which draws the run's last samples again.
        steps, guidance, negative, sampler, eta, truncation: none: as the run's recipe says.
        out: where `NN.png` and `grid.png` go, a new or empty folder; none: `drawn/1`, `drawn/2` … in the run (of what is no
            run, in the working directory).

    Returns:
        The single images, prompt by prompt.

    Raises:
        UserError: nothing there to draw with, nothing to draw, nothing to truncate, or `out` holds something.
    """
    place = Path(embedded(str(run))).expanduser()
    plan = load_plan(place) if (place / "recipe.yaml").is_file() else None
    request = request_for(plan, prompts, seeds, steps, guidance, negative, sampler, eta, truncation)
    target = free_folder(out, place if plan is not None else Path())
    opened = open_run(place, plan) if plan is not None else _open_folder(place, str(run))
    if request.truncation != 1 and not isinstance(opened, Adversarial):
        raise UserError(
            "only a GAN's images can be drawn nearer to the mean", where="--truncation", remedy="leave it out"
        )
    images = draw(opened, request)
    try:
        target.mkdir(parents=True, exist_ok=out is not None)
        return write_samples(images, request, target)
    except OSError as error:
        raise UserError(
            f"the images cannot be written: {error.strerror}",
            where=str(target),
            remedy="choose another place with --out",
        ) from error


def request_for(
    plan: Plan | None,
    prompts: Sequence[str],
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    sampler: str | None = None,
    eta: float | None = None,
    truncation: float | None = None,
) -> SampleRequest:
    """What is asked for, completed by what the run's recipe says; for the arguments see `sample`.

    Raises:
        UserError: neither names anything to draw.
    """
    defaults = request_of(plan) if plan is not None else SampleRequest((), (), Sample().steps, Sample().guidance)
    first_seed = plan.recipe.sample.seed if plan is not None else Sample().seed
    asked = tuple(prompts) or defaults.prompts
    if not asked:
        raise UserError(
            "there is nothing to draw: no prompt was given, and no recipe names one", remedy='add --prompt "…"'
        )
    if seeds is not None:
        wanted = [(prompt, seed) for prompt in asked for seed in seeds]
    else:
        wanted = [(prompt, first_seed + number) for number, prompt in enumerate(asked)]
    return replace(
        defaults,
        prompts=tuple(prompt for prompt, _ in wanted),
        seeds=tuple(seed for _, seed in wanted),
        references=defaults.references if tuple(prompt for prompt, _ in wanted) == defaults.prompts else (),
        steps=defaults.steps if steps is None else steps,
        guidance=defaults.guidance if guidance is None else guidance,
        negative=defaults.negative if negative is None else negative,
        sampler=defaults.sampler if sampler is None else sampler,
        eta=defaults.eta if eta is None else eta,
        truncation=defaults.truncation if truncation is None else truncation,
    )


@torch.no_grad()
def drawn_by_base(recipe: Recipe, prompt: str, seeds: Sequence[int]) -> Iterator[Generated]:
    """Squares that the recipe's base draws before anything is trained, one for each seed."""
    sample, size, family = recipe.sample, recipe.data.resolution, family_of(recipe.model.family)
    request = SampleRequest((prompt,), (0,), sample.steps, sample.guidance, sample.negative, (size, size))
    pipeline: Any = placed(open_pipeline(recipe.model, family.spec.pipeline, dtype_of(recipe.train.precision)))
    set_schedule(pipeline, recipe)
    for seed in seeds:
        yield generate_from_prompt(family, pipeline, request, prompt, seed)


@torch.no_grad()
def draw(opened: Opened, request: SampleRequest, at_once: int = 1) -> list[Generated]:
    """The images asked for. One after the other: batched, their last bits depend on the company they are in.

    Args:
        at_once: models in pixel space draw so many, for those whom the last bits do not matter to.
    """
    if isinstance(opened, PixelModel):
        samplers.check(opened.section, opened.family, request.sampler, request.eta, "--sampler, --eta")
    else:
        samplers.check(None, opened[0].spec.slug, request.sampler, request.eta, "--sampler, --eta")
    images: list[Generated] = []
    drawing = Progress("drawing")
    while (number := len(images)) < len(request.prompts):
        drawing.show(number, len(request.prompts), request.prompts[number])
        if isinstance(opened, PixelModel):
            some = slice(number, number + at_once)
            images += opened.sample(request.part(some))
        else:
            images.append(generate_from_prompt(*opened, request, request.prompts[number], request.seeds[number]))
    drawing.show(len(images), len(images))
    drawing.end()
    return images


def open_run(folder: Path, plan: Plan) -> Opened:
    """The pipeline that a run trained, with the schedule it was trained with; or its model in pixel space."""
    recipe, final = plan.recipe, folder / "final"
    name = recipe.model.family
    if not spec_of(name).pretrained and recipe.net is None:
        raise UserError(
            f"a run of family {name} draws no prompts", where=str(folder), remedy=f"look at {folder / 'report.html'}"
        )
    if not any(final.rglob("*.safetensors")):
        remedy = f"finish it: ft train {folder / 'recipe.yaml'} --set output.folder={folder} --resume"
        raise UserError("this run has no final weights yet", where=str(final), remedy=remedy)
    if recipe.net is not None:
        return _opened(final)
    family = family_of(name)
    if recipe.method != "lora":
        return family, placed(
            open_pipeline(Model(name, str(final)), family.spec.pipeline, dtype_of(plan.precision)), recipe
        )
    pipeline: Any = placed(open_pipeline(recipe.model, family.spec.pipeline, dtype_of(plan.precision)), recipe)
    set_schedule(pipeline, recipe)
    peft.load(pipeline, final)
    textual_inversion.load(pipeline, final, recipe)
    return family, pipeline


def _open_folder(folder: Path, given: str) -> Opened:
    if not folder.is_dir():
        raise UserError(
            f"there is no run {given}",
            remedy="give the folder that `ft train` made, a diffusers folder, or embedded:base",
        )
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        return _opened(folder)
    class_name = pipeline_class(folder / "model_index.json", given)
    spec = family_of_pipeline(class_name)
    if spec is None:
        known = ", ".join(pipelines().values())
        raise UserError(f"{given} holds a {class_name}, which no family here is", remedy=f"known here: {known}")
    return family_of(spec.slug), placed(open_pipeline(Model(spec.slug, str(folder)), class_name, dtype_of(None)))


def _opened(folder: Path) -> PixelModel:
    model = open_model(folder)
    model.net.to(this_machine().device)
    return model


def placed(pipeline: Any, recipe: Recipe | None = None) -> Any:
    """The pipeline on the device that draws, silent; as small there as the run's recipe made it for training."""
    pipeline.set_progress_bar_config(disable=True)
    if recipe is not None:
        apply.fit_drawing(pipeline, recipe, torch.device(this_machine().device))
    return pipeline.to(this_machine().device)


def dtype_of(precision: Precision | None) -> torch.dtype:
    """On a CPU float32, which shows the weights as they are; elsewhere the run's, or what the device is good at."""
    machine = this_machine()
    if machine.device == "cpu":
        return torch.float32
    return DTYPES[precision or ("bfloat16" if machine.bfloat16 else "float16")]


def free_folder(out: Path | None, beside: Path, name: str = "drawn") -> Path:
    """Where to write, not made yet: `out`, or `name`/1, 2 … beside; nothing that is there will be touched."""
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(
                f"{out} exists already; nothing in it was touched",
                where="--out",
                remedy="choose a new folder with --out",
            )
        return out
    number = 1
    while (beside / name / str(number)).exists():
        number += 1
    return beside / name / str(number)

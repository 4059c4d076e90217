"""Sample from the final files of a run, which are loaded with diffusers as any other program would load them."""

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

Opened = PixelModel | tuple[Family, Any]  # a model in pixel space, or a family and its pipeline


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
    """Generate every prompt with every seed. Each image has its own generator, so it does not depend on the others.

    Args:
        run: a run's folder, a diffusers folder, or `embedded:base`.
        prompts: if empty, the prompts of the run's recipe.
        seeds: if None, prompt n has the recipe's seed + n, which repeats the last samples of the run.
        steps, guidance, negative, sampler, eta, truncation: if None, the settings of the run's recipe.
        out: a new or empty folder for `NN.png` and `grid.png`. If None, `drawn/1`, `drawn/2` … in the run's folder, or
            in the working directory if `run` is not a run.

    Returns:
        The files of the single images, prompt by prompt.

    Raises:
        UserError: there is no model, no prompt, the model does not support truncation, or `out` is not empty.
    """
    place = Path(embedded(str(run))).expanduser()
    plan = load_plan(place) if (place / "recipe.yaml").is_file() else None
    request = request_for(plan, prompts, seeds, steps, guidance, negative, sampler, eta, truncation)
    target = free_folder(out, place if plan is not None else Path())
    opened = open_run(place, plan) if plan is not None else _open_folder(place, str(run))
    if request.truncation != 1 and not isinstance(opened, Adversarial):
        raise UserError("truncation is only supported for GANs", where="--truncation", remedy="leave out --truncation")
    images = generate(opened, request)
    try:
        target.mkdir(parents=True, exist_ok=out is not None)
        return write_samples(images, request, target)
    except OSError as error:
        raise UserError(
            f"the images cannot be written: {error.strerror}",
            where=str(target),
            remedy="choose another folder with --out",
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
    """The request, with missing settings taken from the run's recipe; for the arguments see `sample`.

    Raises:
        UserError: there is no prompt.
    """
    defaults = request_of(plan) if plan is not None else SampleRequest((), (), Sample().steps, Sample().guidance)
    first_seed = plan.recipe.sample.seed if plan is not None else Sample().seed
    requested = tuple(prompts) or defaults.prompts
    if not requested:
        raise UserError("there is no prompt to sample: none was given or set in a recipe", remedy='add --prompt "…"')
    if seeds is not None:
        pairs = [(prompt, seed) for prompt in requested for seed in seeds]
    else:
        pairs = [(prompt, first_seed + number) for number, prompt in enumerate(requested)]
    return replace(
        defaults,
        prompts=tuple(prompt for prompt, _ in pairs),
        seeds=tuple(seed for _, seed in pairs),
        references=defaults.references if tuple(prompt for prompt, _ in pairs) == defaults.prompts else (),
        steps=defaults.steps if steps is None else steps,
        guidance=defaults.guidance if guidance is None else guidance,
        negative=defaults.negative if negative is None else negative,
        sampler=defaults.sampler if sampler is None else sampler,
        eta=defaults.eta if eta is None else eta,
        truncation=defaults.truncation if truncation is None else truncation,
    )


@torch.no_grad()
def generate_with_base(recipe: Recipe, prompt: str, seeds: Sequence[int]) -> Iterator[Generated]:
    """Yield square images generated by the recipe's untrained base model, one for each seed."""
    sample, size, family = recipe.sample, recipe.data.resolution, family_of(recipe.model.family)
    request = SampleRequest((prompt,), (0,), sample.steps, sample.guidance, sample.negative, (size, size))
    pipeline: Any = placed(open_pipeline(recipe.model, family.spec.pipeline, dtype_of(recipe.train.precision)))
    set_schedule(pipeline, recipe)
    for seed in seeds:
        yield generate_from_prompt(family, pipeline, request, prompt, seed)


@torch.no_grad()
def generate(opened: Opened, request: SampleRequest, batch_size: int = 1) -> list[Generated]:
    """Generate the requested images. In batches, the last bits of an image depend on the others.

    Args:
        batch_size: of models in pixel space; pipelines always generate one image at a time.
    """
    if isinstance(opened, PixelModel):
        samplers.check(opened.section, opened.family, request.sampler, request.eta, "--sampler, --eta")
    else:
        samplers.check(None, opened[0].spec.slug, request.sampler, request.eta, "--sampler, --eta")
    images: list[Generated] = []
    progress = Progress("sampling")
    while (number := len(images)) < len(request.prompts):
        progress.show(number, len(request.prompts), request.prompts[number])
        if isinstance(opened, PixelModel):
            images += opened.sample(request.part(slice(number, number + batch_size)))
        else:
            images.append(generate_from_prompt(*opened, request, request.prompts[number], request.seeds[number]))
    progress.show(len(images), len(images))
    progress.end()
    return images


def open_run(folder: Path, plan: Plan) -> Opened:
    """The pipeline that a run trained, with its training schedule, or its model in pixel space."""
    recipe, final = plan.recipe, folder / "final"
    name = recipe.model.family
    if not spec_of(name).pretrained and recipe.net is None:
        raise UserError(
            f"family {name} does not generate images from prompts",
            where=str(folder),
            remedy=f"see {folder / 'report.html'}",
        )
    if not any(final.rglob("*.safetensors")):
        remedy = f"finish the run: ft train {folder / 'recipe.yaml'} --set output.folder={folder} --resume"
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
            remedy="give the folder of a run, a diffusers folder, or embedded:base",
        )
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        return _opened(folder)
    class_name = pipeline_class(folder / "model_index.json", given)
    spec = family_of_pipeline(class_name)
    if spec is None:
        known = ", ".join(pipelines().values())
        raise UserError(f"{given} contains a {class_name}, which is not supported", remedy=f"supported: {known}")
    return family_of(spec.slug), placed(open_pipeline(Model(spec.slug, str(folder)), class_name, dtype_of(None)))


def _opened(folder: Path) -> PixelModel:
    model = open_model(folder)
    model.net.to(this_machine().device)
    return model


def placed(pipeline: Any, recipe: Recipe | None = None) -> Any:
    """Move the pipeline to this machine's device, with the memory options of the run's recipe and no progress bars."""
    pipeline.set_progress_bar_config(disable=True)
    if recipe is not None:
        apply.prepare_for_sampling(pipeline, recipe, torch.device(this_machine().device))
    return pipeline.to(this_machine().device)


def dtype_of(precision: Precision | None) -> torch.dtype:
    """float32 on a CPU, for exact results; elsewhere the run's precision, or else the device's best 16-bit type."""
    machine = this_machine()
    if machine.device == "cpu":
        return torch.float32
    return DTYPES[precision or ("bfloat16" if machine.bfloat16 else "float16")]


def free_folder(out: Path | None, parent: Path, name: str = "drawn") -> Path:
    """The folder to write to, not created yet: `out`, else the first unused of `name`/1, `name`/2 … in `parent`."""
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(
                f"{out} already exists and was not changed",
                where="--out",
                remedy="choose a new folder with --out",
            )
        return out
    number = 1
    while (parent / name / str(number)).exists():
        number += 1
    return parent / name / str(number)

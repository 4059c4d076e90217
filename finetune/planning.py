"""`Plan`: recipe, data and machine resolved to every number of the run. Printed before training; the trainer reads only it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.lora_file import initialized
from finetune.config import training_length, validation
from finetune.config.loader import load_recipe, to_dict
from finetune.config.machine import Machine
from finetune.config.schema import Precision, Recipe, Train, trigger_words
from finetune.data.buckets import buckets, fit
from finetune.data.shape import Shape, shape_of
from finetune.data.sources.captions import without_trigger
from finetune.errors import UserError
from finetune.models.registry import spec_of
from finetune.terminal import plural

if TYPE_CHECKING:
    from finetune.data.audit.audit import Audit

MOST_CAPTIONS_READ = 1_000  # of images with few different captions


@dataclass(frozen=True)
class DataFacts:
    """Counts of the audit: `examples` are images × repeats, `buckets` are (shape, examples).

    `digest` is a hash over every image's bytes, crop, caption and repeats, in their order.
    """

    images: int
    examples: int
    held_out: int
    buckets: tuple[tuple[Shape, int], ...]
    digest: str


@dataclass(frozen=True)
class Plan:
    """Every number of a run; the trainer and the estimate take theirs from here."""

    recipe: Recipe
    data: DataFacts
    machine: Machine
    precision: Precision  # of the activations; what trains stays float32
    global_batch: int  # examples per optimizer step: batch × accumulation × processes
    steps_per_epoch: float
    steps: int
    folder: str
    notes: tuple[str, ...]

    @property
    def arithmetic(self) -> str:
        """How the number of steps comes about."""
        data = self.data
        return step_arithmetic(data.images, data.examples, self.recipe.train, self.steps, self.machine.processes)


def step_arithmetic(
    images: int, examples: int, train: Train, steps: int, devices: int = 1, device_noun: str = "processes"
) -> str:
    """The arithmetic from images to steps, such as `380 images / batch 4 = 95 steps per epoch; 300 steps = 3.158 epochs`.

    Args:
        examples: images × repeats.
        devices: how many processes or GPUs train, each on batches of its own.
    """
    parts = [plural(images, "image")]
    if examples != images:
        parts[0] += f" with repeats = {examples:,} examples"
    parts.append(f"batch {train.batch_size}")
    if train.accumulation > 1:
        parts.append(f"accumulation {train.accumulation}")
    if devices > 1:
        parts.append(f"{devices} {device_noun}")
    per_epoch = examples / (train.batch_size * train.accumulation * devices)
    epoch = f"{per_epoch:.6g} step{'' if per_epoch == 1 else 's'} per epoch"
    length = plural(steps, "step")
    length = f"{train.epochs:g} epochs = {length}" if train.epochs else f"{length} = {steps / per_epoch:.4g} epochs"
    return f"{' / '.join(parts)} = {epoch}; {length}"


def make_plan(recipe: Recipe, audit: Audit, machine: Machine, to_generate: int = 0) -> Plan:
    """Resolve everything that the recipe left open.

    Args:
        to_generate: class images that the base model has yet to generate: they count, and are not in the audit.

    Raises:
        UserError: a rule about the recipe or the machine is broken.
    """
    recipe, init_notes = initialized(recipe)
    validation.check(recipe)
    data = _facts(recipe, audit, to_generate)
    global_batch = recipe.train.batch_size * recipe.train.accumulation * machine.processes
    steps_per_epoch = data.examples / global_batch
    facts = _length_facts(recipe, data, global_batch)
    given = recipe
    recipe, steps, length_notes = training_length.resolve(_with_prompts(recipe, audit), facts, steps_per_epoch)
    if seen := training_length.remark(given, facts, steps):
        length_notes += (seen,)
    precision, precision_notes = _precision(recipe, machine)
    validation.check_machine(recipe, machine, precision, steps)
    return Plan(
        recipe=recipe,
        data=data,
        machine=machine,
        precision=precision,
        global_batch=global_batch,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        folder=folder_of(recipe),
        notes=(
            *length_notes,
            *precision_notes,
            *init_notes,
            *validation.notes(recipe, machine, precision, steps),
            *_prior_notes(recipe, data, to_generate),
        ),
    )


def _length_facts(recipe: Recipe, data: DataFacts, global_batch: int) -> training_length.Facts:
    """Images and examples without the class images, which do not count as images of the subject."""
    of_class = recipe.prior.images if recipe.prior is not None else 0
    share = training_length.share(recipe, data.examples - of_class)
    return training_length.Facts(max(1, data.images - of_class), global_batch, share)


def _with_prompts(recipe: Recipe, audit: Audit) -> Recipe:
    """The recipe with prompts from the captions, if it fine-tunes a text-to-image model and says nothing about prompts."""
    sample, spec = recipe.sample, spec_of(recipe.model.family)
    if sample.prompts or "sample.prompts" in recipe.lines or sample.every == 0 or recipe.method == "scratch":
        return recipe
    if spec.medium != "image" or spec.required_roles:
        return recipe
    of_class = recipe.prior.prompt if recipe.prior is not None else None
    captions: dict[str, None] = {}
    for part in (audit.held_out, audit.training):
        for number in range(min(len(part), MOST_CAPTIONS_READ)):
            if len(captions) == training_length.PROMPTS:
                break
            if (caption := part[number].caption) and caption != of_class:
                captions[caption] = None
    prompts = list(captions)
    plain = next((without for one in prompts if (without := _without_trigger(one, recipe)) != one and without), None)
    if plain is not None:
        prompts = [*prompts[: training_length.PROMPTS - 1], plain]
    return dataclasses.replace(recipe, sample=dataclasses.replace(sample, prompts=tuple(prompts)))


def _without_trigger(caption: str, recipe: Recipe) -> str:
    """The caption without any trigger word of the recipe."""
    for words in trigger_words(recipe):
        caption = without_trigger(caption, words)
    return caption


def folder_of(recipe: Recipe) -> str:
    """The run's folder: `output.folder`, or `runs/METHOD-NAME`."""
    return recipe.output.folder or f"runs/{recipe.method}-{recipe.name}"


def _facts(recipe: Recipe, audit: Audit, to_generate: int) -> DataFacts:
    """The audit's counts, plus the class images that are still to be generated, which will be squares."""
    counts = audit.bucket_counts()
    if to_generate:
        data = recipe.data
        square = fit(
            (data.resolution, data.resolution),
            buckets(data.resolution, data.bucket_step, data.maximum_aspect, data.buckets),
        ).shape
        counts[square] = counts.get(square, 0) + to_generate
    return DataFacts(
        images=len(audit.training) + to_generate,
        examples=sum(counts.values()),
        held_out=len(audit.held_out),
        buckets=tuple(counts.items()),
        digest=audit.digest(),
    )


def _prior_notes(recipe: Recipe, data: DataFacts, to_generate: int) -> tuple[str, ...]:
    """Notes on the class images: that they will be generated, and that they outnumber the subject's, or the reverse."""
    prior = recipe.prior
    if prior is None:
        return ()
    notes = []
    if to_generate:
        notes.append(f'the base model first generates {to_generate} images of "{prior.prompt}"; they are counted above')
    own = data.examples - prior.images
    if own and not 0.5 <= prior.images / own <= 2:
        times = max(1, round(prior.images / (own or 1)))
        fix = f"set repeats to {times} times its value" if prior.images > own else f"set prior.images: {own}"
        notes.append(
            f"there are {prior.images} class images and {own} examples of the subject; DreamBooth uses equal numbers: {fix}"
        )
    return tuple(notes)


def _precision(recipe: Recipe, machine: Machine) -> tuple[Precision, tuple[str, ...]]:
    """Resolve the precision: the launcher's first, then the recipe's, then the device's best."""
    wanted = machine.launcher_precision or recipe.train.precision
    if wanted == "float16" and machine.device == "cpu":
        return "float32", ("float16 is not available on CPUs: training in float32",)
    if wanted == "bfloat16" and machine.device == "cuda" and not machine.bfloat16:
        return "float16", (f"{machine.name} has no bfloat16: training in float16",)
    if wanted is not None:
        return wanted, ()
    if recipe.train.weights == "bfloat16" and (machine.device == "cpu" or machine.bfloat16):
        return "bfloat16", ()
    if machine.device == "cuda":
        return ("bfloat16" if machine.bfloat16 else "float16"), ()
    return "float32", ()


def describe(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values, for `plan.json` and the report."""
    numbers = {field.name: getattr(plan, field.name) for field in fields(plan)}
    return numbers | {
        "recipe": to_dict(plan.recipe),
        "data": {field.name: getattr(plan.data, field.name) for field in fields(DataFacts)}
        | {"buckets": [_plain_bucket(shape, count) for shape, count in plan.data.buckets]},
        "machine": asdict(plan.machine),
        "arithmetic": plan.arithmetic,
    }


def _plain_bucket(shape: Shape, count: int) -> list[Any]:
    """A bucket in `plan.json`: [width, height, examples] of images, [shape, examples] of other media."""
    plain = shape.plain()
    return [*plain, count] if isinstance(plain, list) else [plain, count]


def _bucket_of(plain: list[Any]) -> tuple[Shape, int]:
    """What `_plain_bucket` wrote."""
    *shape, count = plain
    return shape_of(shape if len(shape) == 2 else shape[0]), int(count)


def load_plan(folder: Path) -> Plan:
    """The plan of a run from its folder: `describe` read back.

    Raises:
        UserError: the folder is no run, or one of the two files is damaged.
    """
    if not (folder / "plan.json").is_file() or not (folder / "recipe.yaml").is_file():
        raise UserError(
            f"{folder} is no run's folder: it has no plan.json",
            remedy="give the folder that `ft train` made, such as runs/lora-emoji",
        )
    recipe = load_recipe(folder / "recipe.yaml")
    try:
        found = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        numbers: dict[str, Any] = {field.name: found[field.name] for field in fields(Plan)}
        numbers["recipe"] = recipe
        facts = dict(found["data"])
        if "pictures" in facts:  # runs of version 0.1
            facts["images"] = facts.pop("pictures")
        numbers["data"] = DataFacts(**facts | {"buckets": tuple(map(_bucket_of, facts["buckets"]))})
        numbers["machine"] = Machine(**found["machine"])
        numbers["notes"] = tuple(found["notes"])
        return Plan(**numbers)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"plan.json of this run is damaged: {str(error) or type(error).__name__}",
            where=str(folder / "plan.json"),
            remedy=f"write it again: ft train {folder / 'recipe.yaml'} --set output.folder={folder} --resume",
        ) from error

"""`Plan`: recipe + data + machine, resolved to every number of the run. Printed before training; the trainer reads nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.lora_file import initialized
from finetune.config import memory_options, validation
from finetune.config.loader import load_recipe, to_dict
from finetune.config.machine import Machine
from finetune.config.schema import Precision, Recipe
from finetune.data.buckets import buckets, fit
from finetune.data.shape import Shape, shape_of
from finetune.errors import UserError
from finetune.terminal import plural

if TYPE_CHECKING:
    from finetune.data.audit.audit import Audit


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
    """Every number of a run. Trainer and estimate take theirs from here alone."""

    recipe: Recipe
    data: DataFacts
    machine: Machine
    precision: Precision  # of the activations; what trains stays float32
    global_batch: int  # examples an optimizer step: batch × accumulation × processes
    steps_per_epoch: float
    steps: int
    folder: str
    notes: tuple[str, ...]

    @property
    def arithmetic(self) -> str:
        """How the number of steps comes about, in one line that a person can check."""
        train, machine = self.recipe.train, self.machine
        processes = f" ÷ {plural(machine.processes, 'process', 'processes')}" if machine.processes > 1 else ""
        length = f"→ {plural(self.steps, 'step')} = {self.steps / self.steps_per_epoch:.4g} epochs"
        if train.epochs:
            length = f"× {train.epochs:g} epochs = {plural(self.steps, 'step')}"
        repeats = "" if self.data.examples == self.data.images else f" with repeats = {self.data.examples} examples"
        an_epoch = f"{self.steps_per_epoch:g} step{'' if self.steps_per_epoch == 1 else 's'} an epoch"
        return (
            f"{plural(self.data.images, 'image')}{repeats} ÷ batch {train.batch_size}"
            f" ÷ accumulation {train.accumulation}{processes} = {an_epoch} {length}"
        )


def make_plan(recipe: Recipe, audit: Audit, machine: Machine, to_draw: int = 0) -> Plan:
    """Resolve everything that the recipe left open.

    Args:
        to_draw: class images that count, and are not in the audit since the base has not drawn them yet.
    """
    recipe, begun_from = initialized(recipe)
    data = _facts(recipe, audit, to_draw)
    train = recipe.train
    global_batch = train.batch_size * train.accumulation * machine.processes
    steps_per_epoch = data.examples / global_batch
    steps = train.steps or math.ceil(steps_per_epoch * (train.epochs or 0) - 1e-9)
    precision, notes = _precision(recipe, machine)
    memory_options.check_machine(recipe, machine, precision)
    if machine.sharded:
        validation.check_sharded(recipe, precision)
    notes += begun_from + memory_options.notes(recipe, machine)
    if recipe.optimizer.warmup_steps >= steps:
        notes += (
            f"warm-up takes {recipe.optimizer.warmup_steps} of {steps} steps: the full learning rate is never reached",
        )
    notes += _optimizer_notes(recipe) + _class_notes(recipe, data, to_draw)
    diffusion = recipe.diffusion
    if diffusion is not None and diffusion.zero_terminal_snr and diffusion.min_snr_gamma is not None:
        notes += (
            "min-SNR gives no weight to pure noise, which zero_terminal_snr adds: without min_snr_gamma it is learned",
        )
    return Plan(
        recipe=recipe,
        data=data,
        machine=machine,
        precision=precision,
        global_batch=global_batch,
        steps_per_epoch=steps_per_epoch,
        steps=max(1, steps),
        folder=folder_of(recipe),
        notes=notes,
    )


def folder_of(recipe: Recipe) -> str:
    """Where the run's folder is: `output.folder`, or `runs/METHOD-NAME`."""
    return recipe.output.folder or f"runs/{recipe.method}-{recipe.name}"


def _facts(recipe: Recipe, audit: Audit, to_draw: int) -> DataFacts:
    """What the audit counted, and the class images that are still to be drawn, which will be squares."""
    counts = audit.bucket_counts()
    if to_draw:
        data = recipe.data
        square = fit(
            (data.resolution, data.resolution),
            buckets(data.resolution, data.bucket_step, data.maximum_aspect, data.buckets),
        ).shape
        counts[square] = counts.get(square, 0) + to_draw
    return DataFacts(
        images=len(audit.training) + to_draw,
        examples=sum(counts.values()),
        held_out=len(audit.held_out),
        buckets=tuple(counts.items()),
        digest=audit.digest(),
    )


def _class_notes(recipe: Recipe, data: DataFacts, to_draw: int) -> tuple[str, ...]:
    """What is to be known of the class images: that they will be drawn, and whether they outnumber the subject's."""
    prior = recipe.prior
    if prior is None:
        return ()
    said = [f'{to_draw} images of "{prior.prompt}" are drawn by the base first, and are counted in'] if to_draw else []
    own = data.examples - prior.images
    if own and not 0.5 <= prior.images / own <= 2:
        times = max(1, round(prior.images / (own or 1)))
        mend = f"repeats {times} times as many" if prior.images > own else f"prior.images: {own}"
        said.append(
            f"{prior.images} class images stand beside {own} examples of the subject; DreamBooth takes as many of each: {mend}"
        )
    return tuple(said)


def _optimizer_notes(recipe: Recipe) -> tuple[str, ...]:
    """Settings that an optimizer takes and that are hardly meant."""
    optimizer = recipe.optimizer
    if optimizer.name == "prodigy" and optimizer.lr != 1:
        return (
            f"Prodigy finds the learning rate itself: optimizer.lr multiplies it, and {optimizer.lr:g} is given where 1 is usual",
        )
    if optimizer.name == "schedulefree" and optimizer.schedule != "constant":
        return (
            f"schedule-free AdamW averages instead of lowering the rate: with schedule {optimizer.schedule} the late steps count less still",
        )
    return ()


def _precision(recipe: Recipe, machine: Machine) -> tuple[Precision, tuple[str, ...]]:
    """The launcher's word goes first, then the recipe's, then what the device is good at."""
    wanted = machine.launcher_precision or recipe.train.precision
    if wanted == "float16" and machine.device == "cpu":
        return "float32", ("float16 was asked for, but a CPU trains in float32",)
    if wanted == "bfloat16" and machine.device == "cuda" and not machine.bfloat16:
        return "float16", (f"bfloat16 was asked for, but {machine.name} has none: float16",)
    if wanted is not None:
        return wanted, ()
    if recipe.train.weights == "bfloat16" and (machine.device == "cpu" or machine.bfloat16):
        return "bfloat16", ()
    if machine.device == "cuda":
        return ("bfloat16" if machine.bfloat16 else "float16"), ()
    return "float32", ()


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, for `plan.json` and the report."""
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
        UserError: the folder is no run.
    """
    if not (folder / "plan.json").is_file() or not (folder / "recipe.yaml").is_file():
        raise UserError(
            f"{folder} is no run's folder: it has no plan.json",
            remedy="give the folder that `ft train` made, such as runs/lora-emoji",
        )
    found = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    numbers: dict[str, Any] = {field.name: found[field.name] for field in fields(Plan)}
    numbers["recipe"] = load_recipe(folder / "recipe.yaml")
    facts = dict(found["data"])
    if "pictures" in facts:  # runs of version 0.1
        facts["images"] = facts.pop("pictures")
    numbers["data"] = DataFacts(**facts | {"buckets": tuple(map(_bucket_of, facts["buckets"]))})
    numbers["machine"] = Machine(**found["machine"])
    numbers["notes"] = tuple(found["notes"])
    return Plan(**numbers)

"""`Plan`: recipe + data + machine, resolved to every number of the run. Printed before training; the trainer reads nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.recipe import Precision, Recipe, to_dict

if TYPE_CHECKING:
    from finetune.data.scan import Audit


@dataclass(frozen=True)
class DataFacts:
    """Counts of the audit: `examples` are pictures × repeats, `buckets` are (width, height, examples)."""

    pictures: int
    examples: int
    held_out: int
    buckets: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Machine:
    """What trains: `device` is cpu, cuda or mps; `threads` are torch's on a CPU; memory in bytes, of one device."""

    device: str
    name: str
    processes: int
    threads: int
    bfloat16: bool
    memory_bytes: int
    launcher_precision: Precision | None = None  # given to `accelerate launch --mixed_precision`


@dataclass(frozen=True)
class Plan:
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
        processes = f" ÷ {machine.processes} processes" if machine.processes > 1 else ""
        length = f"× {train.epochs:g} epochs = {self.steps} steps" if train.epochs else f"→ {self.steps} steps = {self.steps / self.steps_per_epoch:.4g} epochs"
        repeats = "" if self.data.examples == self.data.pictures else f" with repeats = {self.data.examples} examples"
        return (
            f"{self.data.pictures} pictures{repeats} ÷ batch {train.batch_size} ÷ accumulation {train.accumulation}{processes}"
            f" = {self.steps_per_epoch:g} steps an epoch {length}"
        )


def make_plan(recipe: Recipe, audit: Audit, machine: Machine) -> Plan:
    """Resolve everything that the recipe left open."""
    counts = audit.bucket_counts()
    data = DataFacts(
        pictures=len(audit.training),
        examples=sum(counts.values()),
        held_out=len(audit.held_out),
        buckets=tuple((bucket.width, bucket.height, count) for bucket, count in counts.items()),
    )
    train = recipe.train
    global_batch = train.batch_size * train.accumulation * machine.processes
    steps_per_epoch = data.examples / global_batch
    steps = train.steps or math.ceil(steps_per_epoch * (train.epochs or 0) - 1e-9)
    precision, notes = _precision(recipe, machine)
    if recipe.optimizer.warmup_steps >= steps:
        notes += (f"warm-up takes {recipe.optimizer.warmup_steps} of {steps} steps: the full learning rate is never reached",)
    return Plan(
        recipe=recipe,
        data=data,
        machine=machine,
        precision=precision,
        global_batch=global_batch,
        steps_per_epoch=steps_per_epoch,
        steps=max(1, steps),
        folder=recipe.output.folder or f"runs/{recipe.method}-{recipe.name}",
        notes=notes,
    )


def _precision(recipe: Recipe, machine: Machine) -> tuple[Precision, tuple[str, ...]]:
    """The launcher's word goes first, then the recipe's, then what the device is good at."""
    wanted = machine.launcher_precision or recipe.train.precision
    if wanted == "float16" and machine.device == "cpu":
        return "float32", ("float16 was asked for, but a CPU trains in float32",)
    if wanted == "bfloat16" and machine.device == "cuda" and not machine.bfloat16:
        return "float16", (f"bfloat16 was asked for, but {machine.name} has none: float16",)
    if wanted is not None:
        return wanted, ()
    if machine.device == "cuda":
        return ("bfloat16" if machine.bfloat16 else "float16"), ()
    return "float32", ()


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, for `plan.json` and the report."""
    import dataclasses

    return {**{f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name not in ("recipe", "data", "machine")}, "recipe": to_dict(plan.recipe), "data": dataclasses.asdict(plan.data), "machine": dataclasses.asdict(plan.machine), "arithmetic": plan.arithmetic}

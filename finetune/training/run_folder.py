"""A run's folder: the recipe, the plan, what happened, and the results.

recipe.yaml  plan.json  versions.json  data.json  metrics.jsonl  samples/step-N/*.png  checkpoints/step-N/  trackers/
status/  final/  estimate.json  before-after.png  report.html
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from finetune.config.loader import parse_recipe, to_dict
from finetune.config.schema import Recipe
from finetune.data.sources.files import try_to_create, write_aside
from finetune.distributed import rank
from finetune.errors import UserError
from finetune.planning import Plan, describe, load_plan
from finetune.terminal import plural
from finetune.training import base_files
from finetune.training.run_list import newest_facts, parse_records, read_json
from finetune.training.run_status import Reporter, refuse_locked

# Keys that may change when a run is resumed: all others would change the weights.
FREE_TO_CHANGE = {
    "output": None,
    "sample": None,
    "name": None,
    "train": {
        "checkpoint_every",
        "keep_checkpoints",
        "validate_every",
        "purpose",  # the length that follows from it is in `steps`
        "batch_size",  # these two together: see `_refuse_other_batch`
        "accumulation",
    },
    "data": {"cache"},
}
log = logging.getLogger(__name__)

MOST_NAMED = 5  # changed files that an error names
LIBRARIES = (
    *("torch", "diffusers", "peft", "accelerate", "transformers", "datasets", "bitsandbytes", "pytorch-optimizer"),
    *("safetensors", "numpy", "pillow"),
)


class Run:
    """A run's folder.

    Args:
        plan: of this run.
        resume: continue in an existing folder.
        data_complete: False while class images are still to be generated: the data is compared once they are there.
        force: resume also if all checkpoints are damaged (from step 0), or if the files that say what the run was
            started with are.

    Raises:
        UserError: the folder exists and `resume` is not set; or it cannot be used; or the recipe or the data has
            changed in a way that would change the weights.
    """

    def __init__(self, plan: Plan, resume: bool, force: bool = False, data_complete: bool = True) -> None:
        self.plan, self.folder, self.force = plan, Path(plan.folder), force
        self.status = Reporter(self.folder, rank(), plan.steps)
        self.base: dict[str, str] = {}
        if not resume:
            refuse_existing(self.folder)
        refuse_locked(self.folder)
        if rank() == 0:  # it creates and removes folders
            refuse_unusable(self.folder)
        if resume:
            facts = newest_facts(self.folder / "checkpoints") or {}
            if before := _started_with(self.folder, facts, force):
                _refuse_changes(before.recipe, plan.recipe, self.folder / "recipe.yaml")
                _refuse_other_batch(before, plan)
                if data_complete and before.data != plan.data.digest:
                    raise _other_data(plan)
            if facts:
                self.read_base()
                self.check_base(facts)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint records of the run, so that resuming needs no other file of the folder."""
        # Without the places of the run and its cache: equal runs in different folders write equal checkpoints.
        recipe = {section: value for section, value in to_dict(self.plan.recipe).items() if section != "output"}
        recipe["data"] = {key: value for key, value in recipe["data"].items() if key != "cache"}
        started = {"recipe": recipe, "global_batch": self.plan.global_batch, "data": self.plan.data.digest}
        return {"base": self.base, "run": started}

    def read_base(self) -> None:
        """Compute the digest of each file of the base model: once before, and once after it may be downloaded."""
        self.base = base_files.digest(self.plan.recipe)

    def check_base(self, facts: Mapping[str, Any]) -> list[str]:
        """Compare the base model with that of a checkpoint; returns a note if the checkpoint does not record it.

        Raises:
            UserError: it is another one; the error names the files.
        """
        before = facts.get("base")
        if before is None:
            if not self.base:
                return []
            return ["this run's checkpoint does not record its base model: whether the base has changed is not checked"]
        now = self.base
        if not now and before:
            return []  # a model on the Hub that has to be downloaded again; it is compared once it is there
        if changed := base_files.changes(before, now):
            more = f", and {plural(len(changed) - MOST_NAMED, 'more file')}" if len(changed) > MOST_NAMED else ""
            raise UserError(
                f"the base model has changed since this run was started: {', '.join(changed[:MOST_NAMED])}{more}",
                where=", ".join(f"{key}: {value}" for key, value in base_files.named(self.plan.recipe).items()),
                remedy="restore those files, or start a new run on this base: --set output.folder=…",
            )
        return []

    def create(self) -> None:
        """Create and lock the folder, and write what is known before the first step; the main process calls this.

        Raises:
            UserError: the folder cannot be written, or another process trains in it.
        """
        try:
            self.status.lock()
            for left in self.folder.glob(".*.part"):  # by a process killed while writing
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            self.write("recipe.yaml", yaml.safe_dump(to_dict(self.plan.recipe), sort_keys=False, allow_unicode=True))
            self.write_json("plan.json", describe(self.plan))
            self.write_json("versions.json", versions())
        except OSError as error:
            raise _unusable(self.folder, error) from error

    def write(self, name: str, text: str) -> Path:
        """Write one text file whole or not at all.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            write_aside(self.folder / name, text.encode())
        except OSError as error:
            raise _unusable(self.folder, error) from error
        return self.folder / name

    def write_json(self, name: str, value: Any) -> Path:
        """Write `value` as JSON, whole or not at all; types that JSON lacks become strings. Returns the file."""
        return self.write(name, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`; every record names its `step`."""
        try:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(
                f"the record of step {record['step']} could not be written: {error.strerror}",
                where=str(self.folder / "metrics.jsonl"),
                remedy="free some disk space and continue with --resume: checkpoints are untouched",
            ) from error

    def forget_after(self, step: int) -> None:
        """Drop the records of steps that a resumed run repeats."""
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            records, damaged = parse_records(path.read_bytes())
            if damaged > 1:  # one is the line that was being written when the run ended
                log.info(f"{plural(damaged, 'line')} of metrics.jsonl cannot be read and are dropped")
            kept = [record for record in records if record["step"] <= step]
            self.write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))


@dataclass(frozen=True)
class Started:
    """What a run was started with."""

    recipe: Recipe
    global_batch: int
    processes: int
    data: str


def _started_with(folder: Path, facts: Mapping[str, Any], force: bool) -> Started | None:
    """From `recipe.yaml` and `plan.json`, or, if one is damaged, from a checkpoint; None if there is nothing to resume.

    Args:
        facts: of the newest checkpoint.
        force: return None also if nothing says what the run was started with.

    Raises:
        UserError: nothing says it, and there are checkpoints.
    """
    there = [name for name in ("recipe.yaml", "plan.json") if (folder / name).is_file()]
    any_checkpoint = any((folder / "checkpoints").glob("step-*"))
    if not there and not any_checkpoint:
        return None
    try:
        plan = load_plan(folder)
        return Started(plan.recipe, plan.global_batch, plan.machine.processes, plan.data.digest)
    except UserError as error:
        try:
            run = facts["run"]
            recipe = parse_recipe(json.dumps(run["recipe"]), str(folder / "checkpoints"), run["recipe"]["name"])
            started = Started(recipe, int(run["global_batch"]), int(facts["processes"]), str(run["data"]))
        except (KeyError, TypeError, ValueError, UserError):
            started = None
        if started is None and any_checkpoint and not force:
            raise UserError(
                f"it is not known what this run was started with: {error.problem}",
                where=error.where or str(folder),
                remedy="restore recipe.yaml and plan.json from a backup; or, if neither the recipe nor the images have"
                " changed, resume without this check: --resume --force",
            ) from error
        if rank() == 0:
            source = "taken from the newest checkpoint" if started else "not known"
            log.warning(f"{error.problem}; what the run was started with is {source}. The file is written again")
        return started


def restored_recipe(folder: Path) -> Path | None:
    """Write the recipe of a run whose `recipe.yaml` is damaged beside it; None if no other file has it.

    `plan.json` and checkpoints have it too.
    """
    of_checkpoint = (newest_facts(folder / "checkpoints") or {}).get("run")
    for source in (read_json(folder / "plan.json"), of_checkpoint):
        if isinstance(source, dict) and isinstance(recipe := source.get("recipe"), dict):
            recipe = recipe | {"output": {**(recipe.get("output") or {}), "folder": str(folder)}}
            target = folder / "recipe.restored.yaml"
            with contextlib.suppress(OSError):
                write_aside(target, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode())
                return target
    return None


def _other_data(plan: Plan) -> UserError:
    return UserError(
        "the images or captions have changed since this run was started, so it cannot be resumed",
        where=", ".join(source.path for source in plan.recipe.data.sources) or str(plan.recipe.data.path),
        remedy=f"restore them, or {_way_on(plan.recipe, Path(plan.folder), ()).partition(', or ')[2]}"
        if any((Path(plan.folder) / "final").rglob("*.safetensors"))
        else "restore them, or start a new run: --set output.folder=…",
    )


def refuse_existing(folder: str | Path) -> None:
    """Raise if a new run's folder has content already."""
    folder = Path(folder)
    try:
        exists = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise _unusable(folder, error) from error
    if exists:
        raise UserError(
            f"{folder} already exists; nothing in it was changed",
            remedy="add --resume to continue that run, or choose another folder: --set output.folder=…",
        )


def refuse_unusable(folder: str | Path) -> None:
    """Raise if a run's folder cannot be created here; nothing is left behind.

    Raises:
        UserError: a parent is not a folder, the name is too long, the disk is full or it may not be written.
    """
    folder = Path(folder)
    try:
        try_to_create(folder)
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = (
        "free some disk space and continue with --resume" if full else "choose another folder: --set output.folder=…"
    )
    return UserError(f"the run's folder cannot be used: {error.strerror}", where=str(folder), remedy=remedy)


def versions() -> dict[str, str]:
    """Versions of Python, the system and the libraries that training depends on."""
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "absent"
    found["threads"] = os.environ.get("OMP_NUM_THREADS", "torch's default")
    return found


def _refuse_other_batch(before: Started, now: Plan) -> None:
    """Processes, batch size and accumulation may change together: noise depends on the global batch's index only."""
    if before.global_batch == now.global_batch:
        return
    train, processes = now.recipe.train, now.machine.processes
    accumulation, rest = divmod(before.global_batch, train.batch_size * processes)
    remedy = (
        f"--set train.accumulation={accumulation}"
        if not rest
        else f"resume with {plural(before.processes, 'process', 'processes')} and the unchanged recipe"
    )
    raise UserError(
        f"this run takes {plural(before.global_batch, 'image')} a step, but {plural(processes, 'process', 'processes')}"
        f" × batch {train.batch_size} × accumulation {train.accumulation} would take {now.global_batch}",
        where=now.folder,
        remedy=f"{remedy}, or start a new run: --set output.folder=…",
    )


def _way_on(recipe: Recipe, folder: Path, changed: Sequence[str]) -> str:
    """How to train further with other settings: a new run that starts from this one's result."""
    unchanged = f"use the recipe it was started with ({folder / 'recipe.yaml'})"
    new = f"--set output.folder={folder}-2"
    if recipe.method == "lora" and not any((folder / "final").rglob("*.safetensors")):
        start = f"{folder}-start"
        unchanged += f"; or export its last checkpoint (ft export {folder} --checkpoint STEP --out {start}) and"
        return f"{unchanged} start a new run from it: ft train RECIPE --init {start} {new}"
    if recipe.method == "lora":
        return f"{unchanged}, or start a new run from this one's LoRA: ft train RECIPE --init {folder} {new}"
    if recipe.method == "full":
        way = f"ft train RECIPE --set model.path={folder} {new}"
        return f"{unchanged}, or, once it has finished, start a new run from its result: {way}"
    more = "; with optimizer.schedule: constant, a run may be resumed with more steps" if _only_length(changed) else ""
    return f"{unchanged}, or start a new run: {new}{more}"


def _only_length(changed: Sequence[str]) -> bool:
    return set(changed) <= {"train.steps", "train.epochs"}


def _refuse_changes(before: Recipe, now: Recipe, where: Path) -> None:
    """Raise if a key that affects the weights differs from the recipe that the run was started with.

    With a constant learning rate, no step depends on the number of steps: such a run may be extended.
    """
    changed = []
    endless = before.optimizer.schedule == "constant"
    old, new = to_dict(before), to_dict(now)
    for section in sorted(old.keys() | new.keys()):
        free = FREE_TO_CHANGE.get(section, set())
        if section == "train" and free is not None and endless:
            free = free | {"steps", "epochs"}
        if free is None or old.get(section) == new.get(section):
            continue
        if not isinstance(old.get(section), dict) or not isinstance(new.get(section), dict):
            changed.append(section)
            continue
        changed += [
            f"{section}.{key}" for key in old[section] if key not in free and old[section][key] != new[section].get(key)
        ]
    if changed:
        raise UserError(
            f"this run was started with another {', '.join(changed)}, so it cannot be resumed with this recipe",
            where=str(where),
            remedy=_way_on(now, where.parent, changed),
        )

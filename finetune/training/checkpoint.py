"""Checkpoints: all that a run needs to go on bit for bit, written so that one is there whole or not at all.

A checkpoint is a folder `step-N`: `weights.safetensors` (what trains, and the nets' buffers), `ema.safetensors`,
`optimizer-<turn>.pt`, `state.json` (with the validation loss, where there is one), and last `manifest.json` with the size
and SHA-256 of each. It is written beside its place, synced and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.errors import UserError
from finetune.training.run_list import validations

MANIFEST = "manifest.json"
NAME = "step-{:07d}"


@dataclass
class Checkpoint:
    """`step` counts finished steps. `facts` are plain values (threads, processes, the gradient scaler's state)."""

    step: int
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]
    optimizers: dict[str, dict[str, Any]]
    facts: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `checkpoint` under `folder` and delete all but the newest `keep` and the best by validation loss.

    Raises:
        UserError: the disk is too full; nothing that was there is lost.
    """
    target = folder / NAME.format(checkpoint.step)
    aside = folder / f".{target.name}.part"
    for left in folder.glob(".step-*.part"):  # by a kill in the middle of saving
        shutil.rmtree(left, ignore_errors=True)
    _check_space(folder, checkpoint)
    try:
        aside.mkdir(parents=True)
        save_file(checkpoint.weights, aside / "weights.safetensors")
        if checkpoint.averages:
            save_file(checkpoint.averages, aside / "ema.safetensors")
        for name, state in checkpoint.optimizers.items():
            torch.save(state, aside / f"optimizer-{name}.pt")
        (aside / "state.json").write_text(json.dumps({"step": checkpoint.step, **checkpoint.facts}, indent=1))
        files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps(files, indent=1))
        publish(aside, target)
    except (
        OSError,
        SafetensorError,
        RuntimeError,
    ) as error:  # a full disk is the second for safetensors, the third for torch.save
        shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(
            f"the checkpoint of step {checkpoint.step} could not be written: {reason}",
            where=str(folder),
            remedy="free some space and go on with --resume: earlier checkpoints are untouched",
        ) from error
    for old in set(checkpoints(folder)[:-keep]) - {best(folder)}:
        os.replace(old, aside)  # first, so that a kill leaves no half of one
        shutil.rmtree(aside)
    return target


def publish(aside: Path, target: Path) -> None:
    """Put the folder `aside` in the place of `target`, all of it on the disk before it has that name."""
    for path in (*aside.rglob("*"), aside):
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    _sync(target.parent)


def best(folder: Path) -> Path | None:
    """The finished checkpoint with the least validation loss, the newer of two equals; None if none was validated."""
    known = [(loss, -step) for step, loss in validations(folder).items() if loss is not None]
    return folder / NAME.format(-min(known)[1]) if known else None


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).is_file())


def kept(run: Path, steps: Sequence[int] | None, where: str) -> list[Path]:
    """The checkpoints of a run after so many steps, or all that it keeps, in the order of training.

    Raises:
        UserError: one is not there, or none is; `where` is the option that asked.
    """
    there = {int(path.name.removeprefix("step-")): path for path in checkpoints(run / "checkpoints")}
    known = ", ".join(map(str, there)) or "none"
    if missing := [number for number in steps or () if number not in there]:
        more = "train with a larger train.keep_checkpoints to have more"
        raise UserError(
            f"there is no checkpoint of step {missing[0]}", where=where, remedy=f"kept here: {known}; {more}"
        )
    if not there:
        raise UserError(
            "this run has no checkpoint yet",
            where=str(run),
            remedy=f"go on with it: ft train {run / 'recipe.yaml'} --resume",
        )
    return [path for number, path in there.items() if steps is None or number in steps]


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence for each damaged one passed over."""
    said: list[str] = []
    for path in reversed(checkpoints(folder)):
        damage = _damage(path)
        if not damage:
            return load(path), said
        said.append(f"checkpoint {path.name} is damaged ({damage}): the one before is used")
    return None, said


def load_whole(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        UserError: it is damaged.
    """
    if damage := _damage(path):
        raise UserError(f"checkpoint {path.name} is damaged ({damage})", where=str(path), remedy="take another")
    return load(path)


def load(path: Path) -> Checkpoint:
    """Read one checkpoint, into the machine's own memory: on a GPU there is no room for the weights twice."""
    state = json.loads((path / "state.json").read_text())
    averages = path / "ema.safetensors"
    return Checkpoint(
        step=state.pop("step"),
        weights=load_file(path / "weights.safetensors"),
        averages=load_file(averages) if averages.is_file() else {},
        optimizers={
            file.stem.removeprefix("optimizer-"): torch.load(file, map_location="cpu", weights_only=True)
            for file in path.glob("optimizer-*.pt")
        },
        facts=state,
    )


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint's files, "" if nothing."""
    try:
        for name, expected in json.loads((path / MANIFEST).read_text()).items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
                return f"{name} has changed"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    return ""


def _check_space(folder: Path, checkpoint: Checkpoint) -> None:
    optimizers = {name: state["state"] for name, state in checkpoint.optimizers.items()}
    needed = _bytes(checkpoint.weights) + _bytes(checkpoint.averages) + _bytes(optimizers) + (1 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"a checkpoint takes {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free",
            where=str(folder),
            remedy="free some space and go on with --resume: earlier checkpoints are untouched",
        )


def _bytes(value: Any) -> int:
    """Of a tensor, a plain number, or a dict of these, nested as bitsandbytes nests its state."""
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 8


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

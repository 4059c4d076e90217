"""Checkpoints: everything a run needs to resume bit for bit, written whole or not at all.

A checkpoint is a folder `step-N`: `weights.safetensors` (trained weights and the networks' buffers), `ema.safetensors`,
`optimizer-<train step>.pt`, `state.json` (with the held-out loss, if there is one), and last `manifest.json` with the
size and SHA-256 of each. It is written under a temporary name, synced and renamed.
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
    """The state of a run after `step` finished steps; `facts` are plain values (threads, processes, …)."""

    step: int
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]
    optimizers: dict[str, dict[str, Any]]
    facts: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `checkpoint` under `folder`; delete all but the newest `keep` and the one with the lowest held-out loss.

    Raises:
        UserError: the disk is full; earlier checkpoints are untouched.
    """
    target = folder / NAME.format(checkpoint.step)
    aside = folder / f".{target.name}.part"
    for left in folder.glob(".step-*.part"):  # by a process killed while saving
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
    ) as error:  # a full disk raises the second from safetensors, the third from torch.save
        shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(
            f"the checkpoint of step {checkpoint.step} could not be written: {reason}",
            where=str(folder),
            remedy="free some disk space and continue with --resume: earlier checkpoints are untouched",
        ) from error
    for old in set(checkpoints(folder)[:-keep]) - {best(folder)}:
        os.replace(old, aside)  # renamed first: a kill must not leave half a checkpoint
        shutil.rmtree(aside)
    return target


def publish(aside: Path, target: Path) -> None:
    """Move the folder `aside` to `target`, with everything on disk before it gets that name."""
    share(aside)
    for path in (*aside.rglob("*"), aside):
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    _sync(target.parent)


def share(folder: Path) -> None:
    """Give the files in `folder` the modes that the umask grants: safetensors writes them for their owner only."""
    mode = folder.stat().st_mode & 0o666  # a new folder's mode follows the umask
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def best(folder: Path) -> Path | None:
    """The finished checkpoint with the lowest held-out loss, the newer of two equals; None if none was validated."""
    known = [(loss, -step) for step, loss in validations(folder).items() if loss is not None]
    return folder / NAME.format(-min(known)[1]) if known else None


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return [path for path in _folders(folder) if (path / MANIFEST).is_file()]


def _folders(folder: Path) -> list[Path]:
    """Folders of checkpoints, oldest first. None is unfinished: a manifest that is missing has been lost."""
    return sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal())


def kept(run: Path, steps: Sequence[int] | None, where: str) -> list[Path]:
    """The checkpoints of a run at `steps`, or all, in the order of training.

    Args:
        where: the option to name in errors.

    Raises:
        UserError: one of them does not exist, or none at all.
    """
    there = {int(path.name.removeprefix("step-")): path for path in checkpoints(run / "checkpoints")}
    known = ", ".join(map(str, there)) or "none"
    if missing := [number for number in steps or () if number not in there]:
        more = "set a larger train.keep_checkpoints to keep more"
        raise UserError(
            f"there is no checkpoint of step {missing[0]}", where=where, remedy=f"use one of: {known}; {more}"
        )
    if not there:
        raise UserError(
            "this run has no checkpoint yet",
            where=str(run),
            remedy=f"resume it: ft train {run / 'recipe.yaml'} --resume",
        )
    return [path for number, path in there.items() if steps is None or number in steps]


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint, and a message for each damaged one that was skipped."""
    skipped: list[str] = []
    for path in reversed(_folders(folder)):
        damage = _damage(path)
        if not damage:
            return load(path), skipped
        skipped.append(f"checkpoint {path.name} is damaged ({damage}) and is skipped")
    return None, skipped


def load_whole(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        UserError: it is damaged.
    """
    if damage := _damage(path):
        raise UserError(
            f"checkpoint {path.name} is damaged ({damage})", where=str(path), remedy="use another checkpoint"
        )
    return load(path)


def load(path: Path) -> Checkpoint:
    """Read one checkpoint into host memory: a GPU has no room for the weights twice."""
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
    """What is wrong with a checkpoint's files; "" if nothing."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name in ("state.json", "weights.safetensors"):
            if name not in manifest:
                return f"its manifest lacks {name}"
        for name, expected in manifest.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
                return f"{name} has changed"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "its manifest cannot be read"
    return ""


def _check_space(folder: Path, checkpoint: Checkpoint) -> None:
    optimizers = {name: state["state"] for name, state in checkpoint.optimizers.items()}
    needed = _bytes(checkpoint.weights) + _bytes(checkpoint.averages) + _bytes(optimizers) + (1 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"a checkpoint needs {needed / 1e6:.0f} MB of disk space, and {free / 1e6:.0f} MB are free",
            where=str(folder),
            remedy="free some disk space and continue with --resume: earlier checkpoints are untouched",
        )


def _bytes(value: Any) -> int:
    """Size of a tensor, a number, or a nested dict of them, as bitsandbytes nests its state."""
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

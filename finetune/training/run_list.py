"""The state of runs, read from their folders: progress, checkpoints, time left. Torch is not imported here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import socket
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from finetune.errors import UserError
from finetune.training.run_status import Status, is_locked, read

log = logging.getLogger(__name__)

PLAN = "plan.json"
_JSON = json.JSONDecoder()
TAIL_BYTES = 16 << 10  # of `metrics.jsonl`: a few dozen lines
FRESH = 60.0  # seconds after its last beat that a run on another machine, whose lock is not visible, counts as alive


@final
@dataclass(frozen=True)
class Seen:
    """A run's folder at one moment.

    Attributes:
        state: running, finished, stopped (by the user), failed (by an error), or killed (it ended without a message).
        step: of the last record in `metrics.jsonl`.
        seconds_left: of training, from its last steps; None if it is not running or has taken too few.
        saved: steps of the existing checkpoints, oldest first; `--resume` continues after the last.
        best: (step, held-out loss) of the best of them; None without validation.
        record: the last record in `metrics.jsonl`.
    """

    folder: Path
    method: str
    family: str
    state: str
    phase: str
    reason: str
    step: int
    steps: int
    seconds_left: float | None
    saved: tuple[int, ...]
    best: tuple[int, float] | None
    record: dict[str, Any]
    processes: tuple[Status, ...]


def all_runs(folder: Path) -> list[Seen]:
    """The runs in `folder` and up to two levels below, newest first."""
    places = [path.parent for pattern in (PLAN, f"*/{PLAN}", f"*/*/{PLAN}") for path in folder.glob(pattern)]
    found = []
    for place in sorted(places, key=lambda place: (place / PLAN).stat().st_mtime, reverse=True):
        try:
            found.append(look(place))
        except UserError as error:
            log.warning(f"{error.problem}; the run is left out")
    return found


def look(folder: Path) -> Seen:
    """The run in `folder`.

    Raises:
        UserError: the folder is not a run.
    """
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        steps, method, family = (
            int(plan["steps"]),
            str(plan["recipe"]["method"]),
            str(plan["recipe"]["model"]["family"]),
        )
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a run's folder: it has no {PLAN}", remedy="choose one that `ft runs` lists"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / PLAN} cannot be read: {error}",
            remedy="resume the run with its recipe.yaml and --resume, which writes the file again",
        ) from error
    processes = tuple(read(folder))
    records = _records(folder / "metrics.jsonl")
    last = records[-1] if records else {}
    step = int(last.get("step", 0))
    state, reason = _state(folder, processes)
    seconds = [record["seconds"] for record in records[-20:] if isinstance(record.get("seconds"), float)]
    left = statistics.median(seconds) * (steps - step) if state == "running" and seconds else None
    losses = validations(folder / "checkpoints")
    known = [(loss, saved) for saved, loss in losses.items() if loss is not None]
    best = min(known)[::-1] if known else None
    phase = processes[0].phase if processes and state == "running" else ""
    return Seen(folder, method, family, state, phase, reason, step, steps, left, tuple(losses), best, last, processes)


def _state(folder: Path, processes: tuple[Status, ...]) -> tuple[str, str]:
    """State and reason. Only a lock, or a fresh status from another machine, shows that a run is alive."""
    first = processes[0] if processes else None
    away = first is not None and first.host != socket.gethostname() and time.time() - first.beat < FRESH
    if is_locked(folder) or (away and first is not None and first.state == "running"):
        return "running", ""
    if first is None:  # of a version without status files
        return ("finished" if (folder / "final").is_dir() else "stopped"), ""
    if first.state != "running":
        return first.state, first.reason
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(first.beat))
    return "killed", f"it ended without a message while {first.phase or 'starting'}, {when}"


def validations(folder: Path) -> dict[int, float | None]:
    """Step → held-out loss of each finished checkpoint, oldest first; None if there is none or it is not finite."""
    found: dict[int, float | None] = {}
    for path in sorted(folder.glob("step-*/manifest.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            state = json.loads((path.parent / "state.json").read_text(encoding="utf-8"))
            loss = state.get("validation")
            found[int(state["step"])] = loss if isinstance(loss, float) and math.isfinite(loss) else None
    return found


def newest_facts(folder: Path) -> dict[str, Any] | None:
    """The content of `state.json` of the newest checkpoint in which that file is intact; None if there is none."""
    for path in sorted(folder.glob("step-*/manifest.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = (path.parent / "state.json").read_bytes()
            expected = json.loads(path.read_text(encoding="utf-8"))["state.json"]["sha256"]
            facts = json.loads(content)
            if hashlib.sha256(content).hexdigest() == expected and isinstance(facts, dict):
                return facts
    return None


def _records(path: Path) -> list[dict[str, Any]]:
    """The last records of `metrics.jsonl`, whose last line may be incomplete."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - TAIL_BYTES))
        return parse_records(file.read())[0]
    return []


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every readable record of `metrics.jsonl`; none if there is no such file."""
    try:
        return parse_records(path.read_bytes())[0]
    except OSError:
        return []


def parse_records(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records in lines of JSON, and the number of lines that are not records, or not only.

    Of lines that are merged, cut or overwritten, the whole records are kept.
    """
    found: list[dict[str, Any]] = []
    damaged = 0
    for line in content.decode("utf-8", "replace").split("\n"):
        if not line.strip():
            continue
        whole, start = 0, line.find("{")
        while start >= 0:
            try:
                record, end = _JSON.raw_decode(line, start)
            except (ValueError, RecursionError):
                start = line.find("{", start + 1)
                continue
            if _is_record(record):
                found.append(record)
                whole += end - start
            start = line.find("{", end)
        damaged += whole != len(line.strip())
    return found, damaged


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("step")) is int
        and all(isinstance(number, int | float) for number in value.values())
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file of a run; None if there is no such file, or it is damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else None
    return None

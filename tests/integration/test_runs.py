"""Runs and how they end: status, listing, the watchdog, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.cli import runs as command
from finetune.cli.main import main
from finetune.errors import Stopped, UserError
from finetune.job import Job
from finetune.training import checkpoint, run_list, run_status, watchdog
from tests.helpers import tiny

CHECKOUT = Path(__file__).resolve().parents[2]


def prepared(folder: Path, *overrides: str, resume: bool = False) -> Job:
    return tiny.prepare(
        tiny.recipe("sd15", "lora", "train.steps=6", "train.checkpoint_every=4", *overrides, folder=folder), resume
    )


def weights(job: Job) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in job.model.trained().items()}


def at_step(job: Job, step: int, then: Callable[[], None]) -> None:
    """Make the trainer call `then` in the middle of `step`, counted from 0."""
    take = job.trainer.train_step

    def taken(number: int) -> dict[str, float]:
        if number == step:
            then()
        return take(number)

    job.trainer.train_step = taken  # type: ignore[method-assign, assignment]


def send(*numbers: int) -> Callable[[], None]:
    def sent() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return sent


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [(signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM)])
def test_signal_finishes_the_step_saves_and_stops(numbers: tuple[int, ...], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    job = prepared(tmp_path / "run")
    at_step(job, 2, send(*numbers))
    with pytest.raises(Stopped, match="stopped after step 3, which is saved; --resume") as stopped:
        job.trainer.train()
    assert stopped.value.number == numbers[0]
    seen = run_list.look(tmp_path / "run")
    assert (seen.state, seen.step, seen.saved, seen.reason) == ("stopped", 3, (3,), str(stopped.value))
    again = prepared(tmp_path / "run", resume=True)
    again.trainer.train()
    whole = prepared(tmp_path / "whole")
    whole.trainer.train()
    theirs = weights(again)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(whole).items())
    assert signal.getsignal(signal.SIGTERM) == before


def test_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    job = prepared(tmp_path / "run")
    at_step(job, 5, send(signal.SIGINT, signal.SIGINT))
    with pytest.raises(Stopped, match="stopped at once"):
        job.trainer.train()
    assert run_list.look(tmp_path / "run").saved == (4,)


def test_signal_during_samples_stops_and_resume_generates_them(tmp_path: Path) -> None:
    """The signal comes during step 3's samples: one more step is taken, and no samples are lost."""
    job = prepared(tmp_path / "run", "sample.every=3")
    drawn, observe = list[int](), job.trainer.observe
    assert observe is not None

    def look(done: int) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("not reached")
        drawn.append(done)

    job.trainer.observe = look
    with pytest.raises(Stopped, match="after step 4"):
        job.trainer.train()
    assert drawn == [0] and run_list.look(tmp_path / "run").saved == (3, 4)
    (
        tmp_path / "run" / "checkpoints" / "step-0000004" / "manifest.json"
    ).unlink()  # as if it had been killed while generating samples
    prepared(tmp_path / "run", "sample.every=3", resume=True).trainer.train()
    assert [path.parent.name for path in sorted((tmp_path / "run" / "samples").glob("*/grid.png"))] == [
        "step-0000003",
        "step-0000006",
    ]


def test_checkpoint_is_saved_before_samples_and_their_failure_is_tolerated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepared(tmp_path / "run", "sample.every=5")
    found: list[tuple[int, ...]] = []

    def fail(request: object) -> None:
        found.append(run_list.look(tmp_path / "run").saved)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(job.model, "sample", fail)
    job.trainer.train()
    assert found == [(), (4, 5), (5, 6)]
    assert run_list.look(tmp_path / "run").step == 6


# -- the watchdog -----------------------------------------------------------------------------------------------------


def test_watchdog_reports_a_stalled_step_once(tmp_path: Path) -> None:
    job = prepared(tmp_path / "run")
    said: list[str] = []
    freeze = threading.Event()
    job.trainer.data._batch = lambda *arguments: freeze.wait() and None  # type: ignore[method-assign, assignment]

    def watch() -> None:
        guard = watchdog.Watchdog(job.run.status, job.trainer.clock, said.append, beat=0.02, patience=0.1)
        with job.run.status.phase("training"), guard, pytest.raises(AttributeError):
            job.trainer.train_step(0)

    thread = threading.Thread(target=watch)
    thread.start()
    time.sleep(0.5)
    seen = run_list.look(tmp_path / "run").processes[0]
    freeze.set()
    thread.join()
    assert len(said) == 1 and said[0].startswith("no progress for 0 s in step 1: the run is at data/prefetch.py:")
    assert seen.quiet > 0.1 and seen.at in said[0] and not seen.waits


def test_stall_names_the_rank_that_does_not_wait() -> None:
    def one(rank: int, waits: bool) -> run_status.Status:
        return run_status.Status(
            "running", "training", 11, 20, rank, "host", 1, 0.0, 0.0, 0.0, 400.0, f"file.py:{rank}", waits
        )

    assert watchdog.stall([one(0, True), one(1, False)], 400) == (
        "no progress for 6 min 40 s in step 12: rank 1 on host is at file.py:1; the other rank waits for it"
    )
    assert "rank 0 on host is at file.py:0; rank 1 on host" in watchdog.stall([one(0, True), one(1, True)], 400)


def test_place_of_distinguishes_waiting_from_work() -> None:
    import torch.distributed as distributed

    found: list[tuple[str, bool]] = []

    def inside() -> None:
        found.append(watchdog.place_of(sys._getframe()))

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(context: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(context: object, gradient: torch.Tensor) -> torch.Tensor:
            inside()
            return gradient

    inside()
    Waits.apply(torch.ones(1, requires_grad=True)).backward()  # type: ignore[no-untyped-call]
    assert [waits for _, waits in found] == [False, True]
    assert "torch/distributed/" in distributed.__file__, "place_of() looks for this path"


# -- seen from other processes ----------------------------------------------------------------------------------------


def test_run_folder_is_locked_by_its_process(tmp_path: Path) -> None:
    holder = f"""
import sys
from pathlib import Path
from finetune.training.run_status import Reporter
reporter = Reporter(Path({str(tmp_path)!r}), 0, 10)
reporter.lock()
with reporter.phase("training"):
    print("locked", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", holder], cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        assert run_status.is_locked(tmp_path)
        with pytest.raises(UserError, match="another process is training in this run's folder"):
            run_status.Reporter(tmp_path, 0, 10).lock()
        process.kill()
    assert not run_status.is_locked(tmp_path)
    assert run_status.read(tmp_path)[0].state == "running", "the last recorded state"
    run_status.Reporter(tmp_path, 0, 10).lock()


def test_runs_lists_states_and_shows_details(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepared(tmp_path / "runs" / "done", "data.held_out=0.2", "train.validate_every=2")
    job.trainer.train()
    tiny.finish(job)
    failing = prepared(tmp_path / "runs" / "failing")

    def fail() -> None:
        raise UserError("the disk is gone")

    at_step(failing, 2, fail)
    with pytest.raises(UserError):
        failing.trainer.train()
    killed = prepared(tmp_path / "runs" / "killed")
    killed.run.status._write(phase="saving")
    monkeypatch.setattr(run_list, "is_locked", lambda folder: folder.name == "alive")
    alive = prepared(tmp_path / "runs" / "alive")
    alive.run.status._write(phase="training", done=0, total=0, quiet=400.0, at="data/dataset.py:1 in batch")
    alive.run.log({"step": 2, "seconds": 2.0, "loss.denoiser": 0.5})

    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["runs", "--folder", str(tmp_path / "runs")])
    lines = {line.split()[1].rpartition("/")[2]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["done"].startswith("✓") and lines["done"].endswith("6/6  finished")
    assert lines["failing"].startswith("✗") and lines["failing"].endswith("2/6  failed: the disk is gone")
    assert lines["killed"].startswith("†") and "killed: it ended without a message while saving, 20" in lines["killed"]
    assert lines["alive"].startswith("▸") and lines["alive"].endswith("2/6  training · 8 s left")

    for name, expected in {
        "done": ["2 checkpoints, after steps 4, 6", ", held-out loss"],
        "failing": [
            "failed: the disk is gone",
            f"--set output.folder={tmp_path / 'runs' / 'failing'} --resume",
            "no checkpoint yet",
        ],
        "alive": [
            "rank 0  training on",
            "no progress for 6 min 40 s, at data/dataset.py:1 in batch",
            "denoiser 0.5, 2 s/step",
        ],
    }.items():
        with pytest.raises(SystemExit):
            main(["runs", "show", str(tmp_path / "runs" / name)])
        shown = capsys.readouterr().out
        assert all(part in shown for part in expected), shown
    with pytest.raises(SystemExit):
        main(["runs", "--folder", str(tmp_path / "runs"), "--json"])
    assert {Path(run["folder"]).name: run["state"] for run in json.loads(capsys.readouterr().out)}["killed"] == "killed"
    away = replace(alive.run.status.now, host="elsewhere", beat=time.time())
    monkeypatch.undo()
    assert run_list._state(tmp_path, (away,))[0] == "running"
    assert run_list._state(tmp_path, (replace(away, beat=time.time() - 100),))[0] == "killed"
    assert command.MARKS.keys() == {"running", "finished", "stopped", "killed", "failed"}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"steps": null}'])
def test_look_at_a_folder_without_a_run_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError):
        run_list.look(tmp_path)
    assert checkpoint.checkpoints(tmp_path) == []

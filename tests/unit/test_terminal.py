"""Messages, tables and progress, on terminals and elsewhere."""

from __future__ import annotations

import ast
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import terminal
from finetune.training.progress import Smoothed, TrainingProgress
from tests.helpers.commands import CHECKOUT, python

# Programs whose purpose is standard output: commands, and a script that another process reads.
MAY_PRINT = {"cli", "terminal.py"}


def test_library_code_never_prints() -> None:
    found = []
    for file in sorted((CHECKOUT / "finetune").rglob("*.py")):
        if file.relative_to(CHECKOUT / "finetune").parts[0] in MAY_PRINT:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("print", "traceback.print_exc") or called.endswith("accelerator.print"):
                    found.append(f"{file.relative_to(CHECKOUT)}:{node.lineno}")
    assert not found, "use logging.getLogger(__name__)"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 images"), (1, "1 image"), (2, "2 images"), (12345, "12,345 images")]
)
def test_plural_follows_the_count(count: int, text: str) -> None:
    assert terminal.plural(count, "image") == text
    assert terminal.plural(2, "loss", "losses") == "2 losses"


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (45.4, "45 s"), (80, "1 min 20 s"), (3600 * 2 + 300, "2 h 05 min")]
)
def test_duration_has_two_units(seconds: float, text: str) -> None:
    assert terminal.duration(seconds) == text


def test_table_replaces_control_characters() -> None:
    shown = terminal.table("captions\x1b[2J", [("a", "red\x1b[31m\nfox"), ("longer", "x")])
    assert shown.splitlines()[1:] == ["   a       red\ufffd[31m\ufffdfox", "   longer  x"]
    assert "\x1b" not in shown and shown.startswith("── captions\ufffd[2J ─")


PRINTING_PROGRAM = """
import logging, sys
from finetune import terminal
terminal.configure()
log = logging.getLogger("finetune.test")
log.info(terminal.table("data — 5 × é", [("size", "64×64 ██ → 95 % … 😀")]))
log.warning("careful")
for number in range(20000):
    log.info("a line that is long enough to fill the buffers of a pipe, number %d", number)
sys.stderr.write("finished\\n")
"""


def test_ascii_terminal_gets_ascii(tmp_path: Path) -> None:
    done = python("-c", PRINTING_PROGRAM, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == "warning: careful\nfinished\n"
    assert done.stdout.startswith("-- data - 5 x e -") and "size  64x64 ## -> 95 % ... ?\n" in done.stdout


@pytest.mark.parametrize("command", [["gpus"], ["recipes"], ["estimate", "--images", "20", "--gpu", "rtx3060"]])
def test_ascii_terminal_gets_every_table(command: list[str], tmp_path: Path) -> None:
    done = python("-m", "finetune", *command, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and len(done.stdout) > 200


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_closed_pipe_does_not_end_the_program(stream: str, tmp_path: Path) -> None:
    """As with `| head`; the other stream still receives its output."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    code = PRINTING_PROGRAM.replace("sys.stderr", "sys.stdout") if stream == "stderr" else PRINTING_PROGRAM
    if stream == "stderr":
        code = code.replace("log.info(", "log.warning(")
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True, **streams) as process:  # type: ignore[call-overload]
        closed, other = (process.stdout, process.stderr) if stream == "stdout" else (process.stderr, process.stdout)
        closed.readline()
        closed.close()
        assert other.read().endswith("finished\n")
        assert process.wait(60) == 0


def test_full_disk_does_not_end_the_program(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        done = subprocess.run(
            [sys.executable, "-c", PRINTING_PROGRAM],
            cwd=tmp_path,
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (0, "warning: careful\nfinished\n")


def test_only_the_main_process_shows_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.configure()
    log = logging.getLogger("finetune.test")
    log.info("for all")
    monkeypatch.setenv("RANK", "1")
    log.info("once")
    log.warning("once more")
    log.error("broken")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("for all\n", "error: broken\n")


def test_progress_writes_plain_lines_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("finetune.terminal.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = terminal.Progress("step", stream)
    for done in range(301):
        progress.show(done, 300, "0.18 s/step · loss 0.41")
        now[0] += 0.5
    progress.end()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 4/300 · 0.18 s/step · loss 0.41 · ETA 2 min 28 s"
    assert lines[-1] == "step 300/300 · 0.18 s/step · loss 0.41 · ETA 0 s"
    assert len(lines) == 1 + 150 // 10, "one line every ten seconds"


def test_progress_redraws_on_a_terminal() -> None:
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Tty()
    with terminal.Progress("step", stream) as progress:
        progress.show(1, 2, "loss 0.5", "samples: grid.png")
        terminal.echo("to stdout, which is not a terminal here")
        progress.show(2, 2, "loss 0.25")
    text = stream.getvalue()
    assert "1/2" in text and "samples: grid.png" in text and "2/2" in text and not terminal._live
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor is visible again"


def test_smoothed_loss_starts_at_the_first_value_and_forgets_it() -> None:
    smoothed = Smoothed(0.5)
    assert smoothed.update(4.0) == 4.0
    assert smoothed.update(1.0) == pytest.approx((0.25 * 4 + 0.5 * 1) / 0.75)
    assert [smoothed.update(1.0) for _ in range(40)][-1] == pytest.approx(1.0)


def test_training_progress_shows_the_best_held_out_loss(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = TrainingProgress(3, enabled=True)
    progress.step({"step": 1, "seconds": 0.1, "loss.denoiser": 0.5, "validation": 0.4})
    progress.step({"step": 2, "seconds": 0.1, "loss.denoiser": 0.5, "validation": 0.5})
    progress.sampled(2, Path("run/samples/step-0000002/grid.png"))
    progress.step({"step": 3, "seconds": 0.1, "loss.denoiser": 0.5})
    assert caplog.messages == [
        "step 1 · held-out loss 0.4 (best so far)",
        "step 2 · held-out loss 0.5 (best 0.4 at step 1)",
        "step 2 · samples: run/samples/step-0000002/grid.png",
    ]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("step 3/3 · 0.10 s/step · loss 0.5 · held-out 0.5 (best 0.4 at step 1)")

"""Run commands in this process or, as users do, in one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli.main import main

CHECKOUT = Path(__file__).resolve().parents[2]


def ft(*arguments: str) -> int:
    """`ft …` in this process; returns the exit code."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    code = ended.value.code
    assert code is None or isinstance(code, int)
    return code or 0


def shell(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, which finds this checkout by PYTHONPATH only."""
    everything = {**os.environ, **environment}
    return subprocess.run(
        list(map(str, arguments)), cwd=cwd, env=everything, capture_output=True, text=True, timeout=300
    )


def python(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return shell(sys.executable, *arguments, cwd=cwd, **{"PYTHONPATH": str(CHECKOUT), **environment})

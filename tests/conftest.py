"""The environment of every test: no network, one thread, no file outside temporary folders, a fixed CPU calibration."""

from __future__ import annotations

import os
import signal
import tempfile

# Set before any library reads them. One thread, so that floating-point sums have the same order on every machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["FT_CACHE"] = tempfile.mkdtemp(prefix="ft-cache-")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="ft-hub-")
for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
    os.environ.pop(name, None)

# A background job of a shell ignores SIGINT, and so would the commands that the tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import atexit
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from finetune.paths import ASSETS
from finetune.system.cpu_info import cpu_name

# A calibration of this CPU as the assets have it, so that no test measures the machine it runs on.
_calibrations = json.loads((ASSETS / "cpu.json").read_text(encoding="utf-8"))
(Path(os.environ["FT_CACHE"]) / "cpu.json").write_text(
    json.dumps([entry | {"name": cpu_name()} for entry in _calibrations]), encoding="utf-8"
)

torch.set_num_threads(1)
logging.getLogger("finetune").setLevel(logging.INFO)  # for caplog
for name in ("FT_CACHE", "HF_HOME"):
    atexit.register(shutil.rmtree, os.environ[name], ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_log_handlers() -> Iterator[None]:
    """Remove the handler that a command adds to the library's logger: the next test would print through it."""
    log = logging.getLogger("finetune")
    before = list(log.handlers)
    yield
    log.handlers[:] = before
    log.setLevel(logging.INFO)

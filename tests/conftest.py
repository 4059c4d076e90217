"""What every test stands on: no network, one thread, no file outside a temporary folder."""

from __future__ import annotations

import os
import signal
import tempfile

# Before any library reads them. One thread, so that sums run in one order wherever the tests run.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["FT_CACHE"] = tempfile.mkdtemp(prefix="ft-cache-")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="ft-hub-")
for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
    os.environ.pop(name, None)

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # as in a shell's background job: what is tested would be deaf to Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

import atexit
import logging
import shutil

import torch

torch.set_num_threads(1)
logging.getLogger("finetune").setLevel(logging.INFO)  # for caplog
for name in ("FT_CACHE", "HF_HOME"):
    atexit.register(shutil.rmtree, os.environ[name], ignore_errors=True)

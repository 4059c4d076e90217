"""The commands and Python examples of README.md and docs/, run on the bundled data with few steps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import CHECKOUT
from tests.helpers.docs import Block, blocks, pages, sample_images

# Options added to the commands, for the same training in a few steps; the pages show what users type.
WRAPPER = """#!/bin/sh
command="$1"
case "$command" in
train) set -- "$@" --set train.steps=4 --set train.epochs=null --set train.batch_size=4 --set train.checkpoint_every=2 \\
    --set train.validate_every=2 --set sample.every=4 --set sample.steps=1 --set optimizer.warmup_steps=0 ;;
sample) set -- "$@" --steps 1 ;;
eval) set -- "$@" --images 4 ;;
esac
exec "{python}" -m finetune "$@"
"""
FEWER_IN_PYTHON = '"train.steps=2", "train.batch_size=2", "sample.steps=1", "sample.every=2", "output.folder'


def _run(block: Block, folder: Path) -> None:
    """Run one block in `folder`; fails with its output."""
    if block.language == "python":
        command = [sys.executable, "-c", block.text.replace('"train.steps=20", "output.folder', FEWER_IN_PYTHON)]
    else:
        command = ["sh", "-e", "-c", block.text]
    path = f"{folder.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{block.where}\n{block.text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", [name for name in pages() if any(block.runs for block in blocks(name))])
def test_docs_page_commands_run(page: str, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    sample_images(folder / "my-images")
    shutil.copytree(CHECKOUT / "scripts", folder / "scripts")
    program = tmp_path / "bin" / "ft"
    program.parent.mkdir()
    program.write_text(WRAPPER.format(python=sys.executable))
    program.chmod(0o755)
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text)
        elif block.runs:
            _run(block, folder)
    if page == "README.md":
        assert (folder / "runs" / "lora-mine" / "report.html").is_file()
        assert (folder / "mine.safetensors").is_file()
        assert len(list((folder / "runs" / "try").rglob("grid.png"))) >= 2

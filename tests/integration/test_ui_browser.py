"""A whole tiny run through `ft ui` in Chromium: look at images, write a caption, train, and see the result."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.helpers import tiny
from tests.helpers.browser import Browser, chromium

pytestmark = pytest.mark.skipif(chromium() is None, reason="Chromium is not installed")
WIDTHS = (1400, 400)
RUN_SECONDS = 240.0


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address that `ft ui` prints, with images and a recipe in its folders."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        Image.new("RGB", (48, 32), (60 * number, 90, 30)).save(photos / f"{number}.png")
        if number:
            (photos / f"{number}.txt").write_text("a plain color")
    recipe = {
        "method": "lora",
        "model": {"family": "sd", "path": str(tiny.pipeline("sd15"))},
        "adapter": {"rank": 2},
        "data": {"path": str(photos), "resolution": 32, "bucket_step": 8, "missing_captions": "empty"},
        "train": {"steps": 4, "batch_size": 1, "checkpoint_every": 2},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0},
        "sample": {"prompts": ["a plain color"], "every": 2, "steps": 2},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "finetune", "ui", "--no-open", "--folder", "runs", "--allow", "."],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    try:
        yield line
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        process.stdout.close()


def test_a_tiny_run_goes_from_images_to_a_result(address: str, tmp_path: Path) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=\S{32}", address)
    root = address.partition("/?")[0]
    with Browser() as browser:
        browser.open(root + "/data")
        assert "contains the token" in browser.do("document.body.innerText")
        browser.open(address)
        browser.wait("document.querySelector('nav.tabs') && !location.search.includes('token')")

        browser.submit("#folder", folder=str(tmp_path / "photos"))
        browser.wait("document.querySelectorAll('.picture').length == 4")
        assert "1 missing caption" in browser.do("document.querySelector('.verdict').innerText")
        _fits(browser)
        browser.submit(".picture form", text="a black rectangle")
        browser.wait("document.querySelector('.picture').innerText.includes('edited')")
        assert len(list((tmp_path / "runs").glob("*.captions.jsonl"))) == 1
        assert len(list((tmp_path / "photos").iterdir())) == 7

        browser.open(root + "/train")
        browser.submit("#start form", recipe=str(tmp_path / "tiny.yaml"), name="mine")
        browser.wait("document.querySelector('.run').innerText.includes('mine')")
        for _ in range(2):  # the run's page exists once its folder does
            browser.wait("document.querySelector('a.run')", RUN_SECONDS)
            browser.open(root + "/train?run=mine")
        browser.wait("document.querySelector('.state b.finished')", RUN_SECONDS)
        browser.wait("document.querySelectorAll('#samples img').length == 3")
        assert "4 / 4" in browser.do("document.querySelector('a.run').innerText")
        assert browser.do("document.querySelectorAll('.chart svg').length") >= 3
        assert "measured" in browser.do("document.querySelector('#estimate').innerText")
        browser.do("document.querySelectorAll('img').forEach(image => { image.loading = 'eager'; })")
        browser.wait("[...document.images].every(image => image.complete && image.naturalWidth)")
        _fits(browser)

        browser.open(root + "/result?run=mine")
        browser.wait("document.querySelectorAll('#before-after img').length == 2")
        browser.do("document.querySelector('#export button').click()")
        browser.wait("document.querySelector('#export table')", RUN_SECONDS)
        assert "ComfyUI/models/loras" in browser.do("document.querySelector('#export table').innerText")
        _fits(browser)
    assert list((tmp_path / "runs" / "mine" / "export").glob("*comfyui*.safetensors"))


def _fits(browser: Browser) -> None:
    """The page does not scroll sideways, neither on a screen nor on a phone."""
    for width in WIDTHS:
        assert browser.width(width) <= width

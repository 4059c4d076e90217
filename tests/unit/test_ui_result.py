"""The tab Result without a browser: before and after, the sheet with its sliders, exports, the card."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import web
from tests.helpers.ui_run import finished_run


def test_result_page_without_runs_points_to_train(tmp_path: Path) -> None:
    assert 'href="/train"' in web.client(web.site(tmp_path)).get("/result").text


def test_result_page_shows_the_newest_finished_run(tmp_path: Path) -> None:
    finished_run(tmp_path / "runs" / "mine", steps=40)
    text = web.client(web.site(tmp_path)).get("/result").text
    for shown in ("<h1>mine</h1>", "before", "after", "Export for ComfyUI", "best: step 20", "A LoRA of the base."):
        assert shown in text, shown
    assert "tags: [lora]" not in text  # front matter
    assert text.index("Export for ComfyUI") < text.index("Export for diffusers")


def test_result_sheet_has_the_right_image_in_every_cell(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    finished_run(run, steps=40)
    folder = run / "drawn" / "sweep-20260101-000000"
    folder.mkdir(parents=True)
    for name in (
        "sheet-00.png",
        *(f"00-step-{step}-strength-{by}.png" for step in (20, 40) for by in ("0", "0.5", "1")),
    ):
        Image.new("RGB", (64, 64)).save(folder / name)
    client = web.client(web.site(tmp_path))
    text = client.get("/result", params={"run": "mine"}).text
    assert 'data-values="20 40"' in text and 'data-values="0 0.5 1"' in text
    cells = json.loads(unescape(re.findall(r'data-cells="([^"]*)"', text)[0]))
    assert set(cells) == {f"{step} {by}" for step in (20, 40) for by in ("0", "0.5", "1")}
    assert all(client.get(address).status_code == 200 for address in cells.values())


def test_exported_files_are_downloadable_with_installation_notes(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    finished_run(run, steps=40)
    (run / "export").mkdir()
    (run / "export" / "emoji-comfyui.safetensors").write_bytes(b"weights")
    client = web.client(web.site(tmp_path))
    text = client.get("/result", params={"run": "mine"}).text
    assert "ComfyUI/models/loras" in text
    answer = client.get("/result/file", params={"run": "mine", "file": "export/emoji-comfyui.safetensors"})
    assert answer.content == b"weights" and "attachment" in answer.headers["content-disposition"]


@pytest.mark.parametrize("file", ["recipe.yaml", "../secret", "export/../plan.json", "export/link", "/etc/passwd", ""])
def test_download_outside_the_exports_is_refused(tmp_path: Path, file: str) -> None:
    run = tmp_path / "runs" / "mine"
    finished_run(run, steps=40)
    (tmp_path / "runs" / "secret").write_text("secret")
    (run / "export").mkdir()
    (run / "export" / "link").symlink_to("/etc/passwd")
    answer = web.client(web.site(tmp_path)).get("/result/file", params={"run": "mine", "file": file})
    assert answer.status_code == 404


def test_export_in_an_unavailable_format_or_checkpoint_is_refused(tmp_path: Path) -> None:
    finished_run(tmp_path / "runs" / "mine", steps=40)
    client = web.client(web.site(tmp_path))
    for form in ({"format": "exe"}, {"format": "comfyui", "checkpoint": "--help"}, {}):
        assert client.post("/result/export", data={"run": "mine"} | form).status_code == 400

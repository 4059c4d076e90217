"""The tab Data without a browser: the verdict, every image, and captions that are edited beside the runs."""

from __future__ import annotations

import io
import json
import re
import time
from html import unescape
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from finetune.config.loader import parse_recipe
from finetune.data.audit.audit import scan
from finetune.ui.tabs.data import PLAIN, captions_file
from tests.helpers import web

SIZES = {"wide.png": (120, 40), "tall.jpg": (40, 80), "square.png": (64, 64)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of which one has no caption."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in SIZES.items():
        Image.new("RGB", size, "red").save(folder / name)
        if name != "square.png":
            (folder / name).with_suffix(".txt").write_text(f"a {Path(name).stem} image\n")
    return folder


def look(client: TestClient, folder: Path, **query: str) -> str:
    """The page once the folder has been read."""
    for _ in range(200):
        answer = client.get("/data", params={"folder": str(folder)} | query)
        assert answer.status_code == 200, answer.text
        if "Reading images" not in answer.text:
            return answer.text
        time.sleep(0.05)
    raise AssertionError("the folder is still being read")


def test_data_page_shows_the_verdict_first_and_every_image(tmp_path: Path, photos: Path) -> None:
    text = look(web.client(web.site(tmp_path, photos)), photos)
    assert text.index("Not ready: training would stop at images without a caption") < text.index("square.png")
    assert "--set data.missing_captions=skip" in text
    assert all(name in text for name in SIZES) and "a wide image" in text
    assert text.index("square.png") < text.index("tall.jpg")  # without a caption: first
    assert text.count('class="crop"') == 2  # the square is not cropped


def test_data_page_marks_the_training_crop(tmp_path: Path, photos: Path) -> None:
    text = look(web.client(web.site(tmp_path, photos)), photos)
    data = parse_recipe(PLAIN, "test", "test", [f"data.path={photos}", "data.missing_captions=empty"]).data
    crop = next(image.crop for image in scan(data).images if image.name.endswith("wide.png"))
    left = 100 * crop.left / crop.scaled[0]
    assert left > 1 and f'style="left:{left:.2f}%;top:{100 * crop.top / crop.scaled[1]:.2f}%' in text


def test_data_page_serves_images_whole_and_as_the_model_sees_them(tmp_path: Path, photos: Path) -> None:
    client = web.client(web.site(tmp_path, photos))
    look(client, photos)
    sizes = {}
    for kind in ("whole", "seen"):
        answer = client.get("/data/image", params={"folder": str(photos), "n": "2", "kind": kind})
        sizes[kind] = Image.open(io.BytesIO(answer.content)).size
    assert sizes["whole"] == SIZES["wide.png"] and sizes["seen"] != SIZES["wide.png"]
    assert client.get("/data/image", params={"folder": str(photos), "n": "3"}).status_code == 404
    assert client.get("/data/image", params={"folder": str(photos), "n": "-1"}).status_code == 404


def test_edited_caption_is_stored_with_the_runs_not_in_the_data_folder(tmp_path: Path, photos: Path) -> None:
    state = web.site(tmp_path, photos)
    client = web.client(state)
    look(client, photos)
    before = {path.name: path.read_bytes() for path in photos.iterdir()}
    form = {"folder": str(photos), "n": "0", "text": "a red\nsquare 😀 <b>", "fragment": "1"}
    answer = client.post("/data/caption", data=form)
    assert answer.status_code == 200 and "a red square 😀 &lt;b&gt;" in answer.text and "edited" in answer.text
    assert {path.name: path.read_bytes() for path in photos.iterdir()} == before
    file = captions_file(state, photos.resolve())
    assert file.parent == state.queue.runs
    assert json.loads(file.read_text(encoding="utf-8")) == {"file_name": "square.png", "text": "a red square 😀 <b>"}
    text = look(client, photos)
    assert "Ready to train on 3 images" in text and "1 edited caption in" in text
    text = look(client, photos, again="1")
    assert "Ready to train on 3 images" in text


def test_training_uses_edited_captions(tmp_path: Path, photos: Path) -> None:
    file = tmp_path / "mine.jsonl"
    lines = [{"file_name": "square.png", "text": "new"}, {"file_name": "wide.png", "text": "other"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"file_name": "gone.png", "text": "x"}]))
    audit = scan(parse_recipe(PLAIN, "test", "test", [f"data.path={photos}", f"data.captions={file}"]).data)
    captions = {Path(image.name).name: image.caption for image in audit.images}
    assert captions == {"square.png": "new", "wide.png": "other", "tall.jpg": "a tall image"}
    assert [(problem.kind, problem.stops) for problem in audit.problems] == [("unused caption", False)]


@pytest.mark.parametrize("path", ["/etc", "..", "~", "photos-link", "embedded:../..", "/proc/self", "\0"])
def test_data_folder_outside_the_allowed_folders_is_refused(tmp_path: Path, photos: Path, path: str) -> None:
    (photos / "photos-link").symlink_to("/etc")
    client = web.client(web.site(tmp_path, photos))
    given = str(photos / path) if path == "photos-link" else path
    for address in ("/data", "/data/progress", "/data/image"):
        answer = client.get(address, params={"folder": given, "n": "0"})
        assert answer.status_code in (400, 403) and "root:" not in answer.text, address
    assert client.post("/data/caption", data={"folder": given, "n": "0", "text": "x"}).status_code in (400, 403)


def test_data_page_with_a_base_counts_tokens(tmp_path: Path, photos: Path) -> None:
    (photos / "wide.txt").write_text("word " * 200)
    text = look(web.client(web.site(tmp_path, photos)), photos, base="lora/emoji")
    assert "tokens, <b" in text and " cut</b>" in text and "1 caption longer than the text encoder reads" in text


def test_data_images_and_forms_name_one_look(tmp_path: Path, photos: Path) -> None:
    state = web.site(tmp_path, photos)
    client = web.client(state)
    text = look(client, photos, resolution="256")
    addresses = re.findall(r'<img src="(/[^"]*)"', text)
    assert len(addresses) == 3 and all(client.get(unescape(one)).status_code == 200 for one in addresses)
    assert text.count('name="resolution" value="256"') == 4
    assert len(state.memory["scans"]) == 1


def test_data_form_with_mistakes_shows_them(tmp_path: Path, photos: Path) -> None:
    client = web.client(web.site(tmp_path, photos))
    for query in ({"resolution": "big"}, {"base": "lora/none"}, {"folder": str(photos / "none")}):
        answer = client.get("/data", params={"folder": str(photos)} | query)
        assert answer.status_code == 400 and 'class="card verdict bad"' in answer.text

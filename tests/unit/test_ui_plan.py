"""The tab Plan without a browser: three choices for a folder, and a recipe that `ft train` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from finetune.config.loader import load_recipe
from finetune.ui.tabs.data import captions_file
from finetune.ui.tabs.plan import count_images
from tests.helpers import web


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty images."""
    folder = tmp_path / "my dog"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    (folder / "notes.pdf").write_text("")
    (folder / ".hidden.png").write_text("")
    return folder


def test_the_form_lists_this_machine_and_gpus_with_prices(tmp_path: Path) -> None:
    text = web.client(web.site(tmp_path)).get("/plan").text
    assert "this machine: " in text and "RTX 3090, 24 GB, $" in text and "one person, animal or object" in text


def test_three_choices_have_memory_time_money_and_license(tmp_path: Path, photos: Path) -> None:
    client = web.client(web.site(tmp_path, photos))
    text = client.get("/plan", params={"folder": str(photos), "device": "rtx3090"}).text
    assert text.count("Write the recipe") in (2, 3) and text.count("recommended</small>") == 1
    for shown in ("20 images", "GiB", "$", "memory", "time", "license", "RAM"):
        assert shown in text, shown


def test_a_written_recipe_is_valid_and_has_what_the_form_says(tmp_path: Path, photos: Path) -> None:
    state = web.site(tmp_path, photos)
    captions_file(state, photos.resolve()).write_text(json.dumps({"file_name": "0.png", "text": "x"}) + "\n")
    form = {"folder": str(photos), "device": "rtx3060", "purpose": "style", "trigger": "sks dog", "choice": "best"}
    answer = web.client(state).post("/plan/write", data=form | {"name": "dog"})
    assert answer.status_code == 303 and answer.headers["location"].startswith("/train?recipe=")
    file = state.queue.runs / "dog.yaml"
    recipe = load_recipe(str(file))
    assert (recipe.data.path, recipe.data.trigger, recipe.train.purpose) == (str(photos.resolve()), "sks dog", "style")
    assert recipe.data.captions == str(captions_file(state, photos.resolve()))
    assert recipe.sample.prompts == () and "steps" not in yaml.safe_load(file.read_text())["train"]
    assert len(file.read_text().splitlines()) <= 40
    assert web.client(state).post("/plan/write", data=form | {"name": "dog"}).status_code == 400  # is not overwritten
    assert "dog.yaml" in web.client(state).get("/train").text


def test_mistakes_in_the_form_are_shown(tmp_path: Path, photos: Path) -> None:
    client = web.client(web.site(tmp_path, photos))
    for query in (
        {"hours": "x"},
        {"budget": "-1"},
        {"device": "gtx9"},
        {"purpose": "x"},
        {"folder": str(tmp_path / "no")},
    ):
        answer = client.get("/plan", params={"folder": str(photos)} | query)
        assert answer.status_code in (400, 403) and 'class="card verdict bad"' in answer.text
    for form in ({"choice": "none"}, {"choice": "best", "name": "../x"}):
        answer = client.post("/plan/write", data={"folder": str(photos), "device": "rtx3090"} | form)
        assert answer.status_code == 400
    assert client.post("/plan/write", data={"folder": "/etc", "choice": "best"}).status_code == 403


def test_images_are_counted_by_name(tmp_path: Path, photos: Path) -> None:
    assert count_images(photos) == 20

"""`ft start FOLDER`: questions, choices, recipe."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from finetune.cli import start
from finetune.cli.main import ft
from finetune.config.loader import load_recipe
from finetune.estimate.forecast import Forecast
from tests.helpers import tiny
from tests.helpers.commands import ft as run_ft


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "My Dog"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.png").write_bytes(b"not read")
    return folder


def run(*arguments: str, answers: str | None = None) -> Result:
    return CliRunner().invoke(ft, ["start", "My Dog", "--gpu", "rtx3060", *arguments], input=answers)


def test_without_a_terminal_it_takes_defaults_and_writes_a_short_recipe() -> None:
    ended = run()
    assert ended.exit_code == 0, ended.output
    text = Path("my-dog.yaml").read_text()
    assert len(text.splitlines()) <= 15 and text in ended.output
    assert ended.output.splitlines()[-1] == "Start: ft train my-dog.yaml"
    assert all(f" {choice} " in ended.output for choice in ("best", "fastest", "cheapest"))
    recipe = load_recipe("my-dog.yaml")
    assert (recipe.train.purpose, recipe.data.trigger, recipe.data.path) == ("subject", "my dog", "My Dog")


def test_three_questions_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "interactive", lambda: True)
    ended = run("--out", "mine.yaml", answers="style\nspeed\nbrush ink\n")
    assert ended.exit_code == 0, ended.output
    assert [ended.output.count(words) for words in ("show?", "speed?", "word?")] == [1, 1, 1]
    recipe = load_recipe("mine.yaml")
    assert (recipe.train.purpose, recipe.data.trigger) == ("style", "brush ink")


def test_flags_leave_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "interactive", lambda: True)
    ended = run("--kind", "person", "--prefer", "quality", "--trigger", "")
    assert ended.exit_code == 0 and "?" not in ended.output
    assert load_recipe("my-dog.yaml").data.trigger == ""


def test_json_holds_choices_recipe_and_command() -> None:
    values = json.loads(run("--json").output)
    assert values["start"] == "ft train my-dog.yaml" and values["images"] == 20
    assert set(values["choices"]) == {"best", "fastest", "cheapest"}


@pytest.mark.parametrize("gpu", ["rtx3060", "rtx4090", "a100-80gb", "cpu"])
def test_written_recipe_is_the_chosen_one(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Forecast] = []
    text = start.recipe_text

    def recording(one: Forecast, folder: Path, trigger: str, images: int) -> str:
        chosen.append(one)
        return text(one, folder, trigger, images)

    monkeypatch.setattr(start, "recipe_text", recording)
    ended = CliRunner().invoke(ft, ["start", "My Dog", "--gpu", gpu, "--yes"])
    assert ended.exit_code == 0, ended.output
    written, asked = load_recipe("my-dog.yaml"), chosen[0].recipe
    assert dataclasses.replace(written, data=asked.data, name="", lines={}) == dataclasses.replace(
        asked, name="", lines={}
    )
    data = dataclasses.replace(asked.data, path="My Dog", trigger="my dog", missing_captions="empty")
    assert written.data == data


def test_an_existing_recipe_and_an_empty_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my-dog.yaml").write_text("mine")
    assert run_ft("start", "My Dog", "--gpu", "rtx3060") == 2
    assert "already exists" in capsys.readouterr().err and Path("my-dog.yaml").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert run_ft("start", "empty") == 2
    assert "holds no image" in capsys.readouterr().err
    assert run_ft("start", "nowhere") == 2
    assert 'there is no folder "nowhere"' in capsys.readouterr().err


def test_masks_are_not_counted(photos: Path) -> None:
    (photos / "1.mask.png").touch()
    assert start.count_images(photos) == 20
    assert start.count_images(tiny.images()) == 5

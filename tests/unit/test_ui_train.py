"""The tab Train without a browser: runs from their folders, forms, and fragments that change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.config.loader import load_recipe
from finetune.errors import UserError
from tests.helpers import web
from tests.helpers.ui_run import finished_run


def test_train_page_without_runs_explains_how_to_start(tmp_path: Path) -> None:
    text = web.client(web.site(tmp_path)).get("/train").text
    assert "Nothing has been trained yet" in text and "lora/emoji" in text


def test_train_page_shows_a_run_from_its_folder(tmp_path: Path) -> None:
    state = web.site(tmp_path)
    finished_run(tmp_path / "runs" / "mine", steps=40)
    text = web.client(state).get("/train").text
    assert "<h1>mine</h1>" in text
    for shown in ("best checkpoint", "step 20", "held-out images", "smoothed", "estimated", "1.50 GiB", "0.25 s"):
        assert shown in text, shown
    assert "step 40" in text and "/train/sample?run=mine" in text


def test_fragment_is_sent_only_when_something_changed(tmp_path: Path) -> None:
    client, run = web.client(web.site(tmp_path)), tmp_path / "runs" / "mine"
    finished_run(run, steps=40)
    for address in ("/train/live?run=mine", "/train/strip?run=mine", "/train/runs?run=mine"):
        text = client.get(address).text
        version = text.partition('data-version="')[2].partition('"')[0]
        assert version and client.get(f"{address}&version={version}").status_code == 204
    version = client.get("/train/live?run=mine").text.partition('data-version="')[2].partition('"')[0]
    web.write_metrics(run, 30)
    assert client.get(f"/train/live?run=mine&version={version}").status_code == 200


def test_sample_is_served_unchanged(tmp_path: Path) -> None:
    client, run = web.client(web.site(tmp_path)), tmp_path / "runs" / "mine"
    finished_run(run, steps=40)
    answer = client.get("/train/sample", params={"run": "mine", "file": "samples/step-40/00.png"})
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    assert answer.content == (run / "samples" / "step-40" / "00.png").read_bytes()


def test_train_page_escapes_foreign_text(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    finished_run(run, steps=40, prompt="<script>alert(1)</script>")
    text = web.client(web.site(tmp_path)).get("/train").text
    assert "<script>alert(1)" not in text and "&lt;script&gt;alert(1)" in text


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "-x", "a b", "x" * 100])
def test_run_name_that_is_not_a_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    state = web.site(tmp_path)
    answer = web.client(state).post("/train/start", data={"recipe": "lora/emoji", "name": name})
    assert answer.status_code == 400 and state.queue.jobs() == []


def test_recipe_with_a_mistake_is_refused_before_queueing(tmp_path: Path) -> None:
    state = web.site(tmp_path, tmp_path)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "method: lora\nmodel: {family: sd, path: embedded:base}\ndata: {path: embedded:emoji/noto, resolutoin: 64}\n"
    )
    answer = web.client(state).post("/train/start", data={"recipe": str(recipe), "name": "mine"})
    assert answer.status_code == 400 and "resolutoin" in answer.text and "mine.yaml:3" in answer.text
    assert state.queue.jobs() == []


def test_run_that_exists_or_is_queued_is_not_queued_again(tmp_path: Path) -> None:
    state = web.site(tmp_path)
    state.queue.close()  # nothing starts
    state.queue.add("lora/emoji", "one")
    with pytest.raises(UserError, match="in the queue already"):
        state.queue.add("lora/emoji", "one")
    (tmp_path / "runs" / "two").mkdir()
    with pytest.raises(UserError, match="exists already"):
        state.queue.add("lora/emoji", "two")
    client = web.client(state)
    assert "in the queue" in client.get("/train").text
    client.post("/train/remove", data={"job": "1"})
    assert state.queue.jobs() == []


def test_stop_of_a_finished_run_is_refused(tmp_path: Path) -> None:
    finished_run(tmp_path / "runs" / "mine", steps=40)
    answer = web.client(web.site(tmp_path)).post("/train/stop", data={"run": "mine"})
    assert answer.status_code == 400 and "is not training on this machine" in answer.text


def test_job_command_names_folder_and_resume(tmp_path: Path) -> None:
    state = web.site(tmp_path)
    state.queue.close()
    job = state.queue.add("lora/emoji", "one", ("train.steps=3",))
    assert job.command() == [
        *("train", "lora/emoji", "--set", f"output.folder={tmp_path / 'runs' / 'one'}", "--set", "train.steps=3")
    ]
    finished_run(tmp_path / "runs" / "mine", steps=40)
    assert state.queue.add("r.yaml", "mine", resume=True).command()[-1] == "--resume"


def test_the_helpers_plan_is_one_that_is_read(tmp_path: Path) -> None:
    finished_run(tmp_path / "mine", steps=40)
    plan = json.loads((tmp_path / "mine" / "plan.json").read_text())
    assert plan["steps"] == 40 and load_recipe(tmp_path / "mine" / "recipe.yaml").method == "lora"

"""Runs with damaged files: `--resume` ends with an undisturbed run's weights or an error, never a traceback."""

from __future__ import annotations

import functools
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune import job
from finetune.config.loader import load_recipe
from finetune.config.schema import Recipe
from finetune.errors import UserError
from finetune.training import run_list
from finetune.training.run_list import all_runs, look, parse_records
from tests.helpers import scratch, tiny
from tests.helpers.commands import ft

STEPS = ("train.checkpoint_every=1", "train.keep_checkpoints=2", "sample.every=1")
NEWEST = "checkpoints/step-0000003"


def recipe(folder: Path, steps: int = 4) -> Recipe:
    return scratch.recipe("vae", folder, f"train.steps={steps}", *STEPS)


@functools.cache
def undisturbed() -> dict[str, torch.Tensor]:
    folder = tiny.root() / "undisturbed"
    job.run(recipe(folder))
    return tiny.final_weights(folder)


@functools.cache
def stopped() -> Path:
    """A run of four steps that was killed after the third."""
    folder = tiny.root() / "stopped"
    work = job.prepare(recipe(folder))
    for step in range(3):
        record = work.trainer.train_step(step)
        work.run.log(record)
        work.trainer.save(step + 1)
        assert work.trainer.observe is not None
        work.trainer.observe(step + 1)
    work.run.status._end("stopped", "by a test")
    return folder


def copy(folder: Path) -> Path:
    shutil.copytree(stopped(), folder)
    for name in ("recipe.yaml", "plan.json"):  # as if it had been started here
        text = (folder / name).read_text().replace(str(stopped()), str(folder))
        (folder / name).write_text(text)
    return folder


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def merged(content: bytes) -> bytes:
    return content.replace(b"\n", b"") if b"\n" in content else content + content


def noise(content: bytes) -> bytes:
    return random.Random(1).randbytes(max(64, len(content)))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": cut,
    "merged": merged,
    "random": noise,
}
FILES = (
    *("recipe.yaml", "plan.json", "versions.json", "data.json", "metrics.jsonl", "status/0.json", "status/lock"),
    *(f"{NEWEST}/{name}" for name in ("manifest.json", "state.json", "weights.safetensors", "optimizer-network.pt")),
    *("samples/step-0000003/00.png", "samples/step-0000003/grid.png"),
)


def damage(folder: Path, name: str, how: str) -> None:
    file = folder / name
    if not file.exists():
        (file,) = folder.glob(str(Path(name).with_name("optimizer-*.pt")))
    file.write_bytes(DAMAGE[how](file.read_bytes()))


def is_continued(folder: Path) -> None:
    """Resume the run, and check that it ends as the undisturbed one."""
    job.run(recipe(folder), resume=True)
    now = tiny.final_weights(folder)
    assert now.keys() == undisturbed().keys()
    assert all(torch.equal(tensor, now[name]) for name, tensor in undisturbed().items())
    assert look(folder).state == "finished"


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_resume_with_one_damaged_file_repeats_at_most_one_step(
    name: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy(tmp_path / "run")
    damage(folder, name, how)
    all_runs(tmp_path)
    is_continued(folder)
    assert "Traceback" not in caplog.text
    assert "could not be written" not in caplog.text
    same = name.endswith("manifest.json") and how == "merged"  # valid JSON without its line breaks
    step = 2 if name.startswith(NEWEST) and not same else 3
    assert f"resuming after step {step}" in caplog.text


@pytest.mark.parametrize(
    ("one", "other"), list(itertools.combinations(("recipe.yaml", "plan.json", "metrics.jsonl"), 2))
)
def test_resume_with_two_damaged_files_ends_as_undisturbed(one: str, other: str, tmp_path: Path) -> None:
    folder = copy(tmp_path / "run")
    damage(folder, one, "random")
    damage(folder, other, "empty")
    is_continued(folder)


def test_resume_with_a_damaged_plan_still_refuses_another_recipe(tmp_path: Path) -> None:
    folder = copy(tmp_path / "run")
    for name in ("recipe.yaml", "plan.json"):
        (folder / name).write_bytes(b"")
    other = scratch.recipe("vae", folder, "train.steps=4", *STEPS, "optimizer.lr=0.5")
    with pytest.raises(UserError, match=r"another optimizer\.lr"):
        job.prepare(other, resume=True)


def test_resume_without_any_record_of_the_recipe_is_refused(tmp_path: Path) -> None:
    """Checkpoints of older versions do not contain the recipe."""
    folder = copy(tmp_path / "run")
    (folder / "plan.json").write_bytes(b"")
    for state in folder.glob("checkpoints/*/state.json"):
        facts = json.loads(state.read_text())
        state.write_text(json.dumps({key: value for key, value in facts.items() if key not in ("run", "base")}))
    with pytest.raises(UserError, match=r"not known what this run was started with: plan\.json of this run is damaged"):
        job.prepare(recipe(folder), resume=True)


@pytest.mark.parametrize("how", DAMAGE)
def test_resume_with_all_checkpoints_damaged_is_refused_without_force(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy(tmp_path / "run")
    for path in sorted(folder.glob("checkpoints/step-*")):
        damage(folder, f"{path.relative_to(folder)}/weights.safetensors", how)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        job.run(recipe(folder), resume=True)
    assert caught.value.problem == "this run cannot be resumed: all its checkpoints are damaged"
    assert "step-0000003 is damaged (weights.safetensors has changed)" in caught.value.where
    assert "--resume --force" in caught.value.remedy
    assert (folder / "metrics.jsonl").read_bytes() == before
    job.run(recipe(folder), resume=True, force=True)
    assert "starting from step 0 (--force)" in caplog.text
    now = tiny.final_weights(folder)
    assert all(torch.equal(tensor, now[name]) for name, tensor in undisturbed().items())


def test_resume_with_missing_manifests_is_refused(tmp_path: Path) -> None:
    folder = copy(tmp_path / "run")
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(UserError, match=r"step-0000003 is damaged \(manifest\.json is missing\)"):
        job.run(recipe(folder), resume=True)


@pytest.mark.parametrize("how", ["empty", "cut", "random"])
def test_resume_with_a_damaged_recipe_names_the_restored_copy(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(tmp_path / "run")
    started = load_recipe(folder / "recipe.yaml")
    damage(folder, "recipe.yaml", how)
    assert ft("train", str(folder / "recipe.yaml"), "--resume") == 2
    assert f"ft train {folder / 'recipe.restored.yaml'} --resume" in capsys.readouterr().err
    restored = load_recipe(folder / "recipe.restored.yaml")
    assert (restored.train, restored.optimizer, restored.model) == (started.train, started.optimizer, started.model)
    assert restored.output.folder == str(folder)


def test_parse_records_keeps_whole_records_of_damaged_lines() -> None:
    content = b'{"step": 1, "a": 1}{"step": 2, "a": NaN}\n{"step": 3, "a"\n\xff\xfe{"step": 4}\n[1]\n{"step": "5"}\n'
    records, damaged = parse_records(content)
    assert [record["step"] for record in records] == [1, 2, 4]
    assert damaged == 4


def test_resume_with_every_file_damaged_is_refused_with_a_message(tmp_path: Path) -> None:
    folder = copy(tmp_path / "run")
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        file.write_bytes(noise(b""))
    with pytest.raises(UserError, match="not known what this run was started with"):
        job.run(recipe(folder), resume=True)
    with pytest.raises(UserError, match="cannot be read"):
        look(folder)
    assert run_list.read_records(folder / "metrics.jsonl") == []

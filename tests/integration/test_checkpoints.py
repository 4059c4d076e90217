"""Checkpoints: exact resume, extension of runs, retention, damage, and full disks."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import UserError
from finetune.training import checkpoint
from tests.helpers import tiny


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adafactor", "prodigy", "schedulefree", "lion", "came"])
def test_resume_with_each_optimizer_is_exact(optimizer: str, tmp_path: Path) -> None:
    """Also when only one of the two runs used its averaged weights in between."""
    recipe = tiny.recipe(
        "sd21", "full", f"optimizer.name={optimizer}", "train.steps=3", "sample.prompts=[]", folder=tmp_path / "run"
    )
    job = tiny.prepare(recipe)
    for step in range(2):
        job.trainer.train_step(step)
    job.trainer.save(2)
    before = {name: tensor.clone() for name, tensor in tiny.trained(job).items()}
    with job.trainer.state.averaged():
        assert any(not torch.equal(tensor, before[name]) for name, tensor in tiny.trained(job).items()) == (
            optimizer == "schedulefree"
        )
    job.trainer.train_step(2)
    again = tiny.prepare(recipe, resume=True)
    assert again.trainer.resume() == 2
    again.trainer.train_step(2)
    theirs = tiny.trained(again)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tiny.trained(job).items())


def test_resume_with_more_steps_at_a_constant_rate_is_exact(tmp_path: Path) -> None:
    """2 steps, then 4 in the same folder, equal 4 at once bit for bit.

    Fewer steps, or a cosine schedule, are refused.
    """
    asked = {
        steps: tiny.recipe("sd15", "lora", f"train.steps={steps}", "sample.prompts=[]", folder=tmp_path / "run")
        for steps in (1, 2, 4)
    }
    tiny.train(asked[2])
    tiny.train(asked[4], resume=True)
    tiny.train(tiny.recipe("sd15", "lora", "train.steps=4", "sample.prompts=[]", folder=tmp_path / "at-once"))
    longer, at_once = tiny.final_weights(tmp_path / "run"), tiny.final_weights(tmp_path / "at-once")
    assert all(torch.equal(tensor, longer[name]) for name, tensor in at_once.items())
    with pytest.raises(UserError, match="has taken 4 steps, and the recipe asks for 1"):
        tiny.train(asked[1], resume=True)
    cosine = [
        tiny.recipe(
            "sd15",
            "lora",
            "optimizer.schedule=cosine",
            f"train.steps={steps}",
            "sample.prompts=[]",
            folder=tmp_path / "cosine",
        )
        for steps in (1, 2)
    ]
    tiny.train(cosine[0])
    with pytest.raises(UserError, match=r"another train\.steps") as caught:
        tiny.prepare(cosine[1], resume=True)
    folder = tmp_path / "cosine"
    way = f"start a new run from this one's LoRA: ft train RECIPE --init {folder} --set output.folder={folder}-2"
    assert way in caught.value.remedy
    more = tiny.recipe("sd15", "lora", f"adapter.init_lora={folder}", "sample.prompts=[]", folder=tmp_path / "cosine-2")
    tiny.prepare(more)


def test_resume_on_other_data_is_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny.images(), tmp_path / "images")
    asked = tiny.recipe(
        "sd15", "lora", f"data.path={tmp_path / 'images'}", "sample.prompts=[]", folder=tmp_path / "run"
    )
    tiny.prepare(asked).trainer.train_step(0)
    tiny.prepare(asked, resume=True)
    caption = next((tmp_path / "images").glob("*.txt"))
    caption.write_text("another caption")
    with pytest.raises(UserError, match="have changed since this run was started"):
        tiny.prepare(asked, resume=True)


def test_resume_that_is_not_bit_exact_gives_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = tiny.recipe("sd15", "lora", "sample.prompts=[]", folder=tmp_path / "run")
    job = tiny.prepare(recipe)
    job.trainer.train_step(0)
    job.trainer.save(1)
    torch.set_num_threads(2)
    try:
        tiny.prepare(recipe, resume=True).trainer.resume()
    finally:
        torch.set_num_threads(1)
    assert "1 thread before, 2 now" in caplog.text
    changed = tiny.prepare(recipe, resume=True)
    changed.trainer.state._tensors.popitem()
    with pytest.raises(UserError, match="does not hold the weights that this recipe trains"):
        changed.trainer.resume()


def checkpoint_of(step: int) -> checkpoint.Checkpoint:
    return checkpoint.Checkpoint(
        step, {"w": torch.full((4,), float(step))}, {}, {"turn": {"state": {}, "param_groups": []}}, {"threads": 1}
    )


def test_damaged_checkpoint_is_skipped_and_old_ones_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, checkpoint_of(step), keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-0000002", "step-0000003"]
    file = tmp_path / "step-0000003" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found, said = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.step, float(found.weights["w"][0]), found.facts) == (2, 2.0, {"threads": 1})
    assert said == ["checkpoint step-0000003 is damaged (weights.safetensors has changed) and is skipped"]


def test_save_on_a_full_disk_keeps_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, checkpoint_of(1), keep=1)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="MB are free"):
        checkpoint.save(tmp_path, checkpoint_of(2), keep=1)
    monkeypatch.undo()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        checkpoint.save(tmp_path, checkpoint_of(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


def test_best_checkpoint_is_kept_besides_the_newest(tmp_path: Path) -> None:
    losses = {1: 0.5, 2: 0.3, 3: 0.4, 4: None, 5: float("nan"), 6: 0.6}
    for step, loss in losses.items():
        found = checkpoint_of(step)
        found.facts["validation"] = loss
        (tmp_path / ".step-0000099.part").mkdir()
        checkpoint.save(tmp_path, found, keep=2)
        assert not list(tmp_path.glob(".*")), "leftovers of a killed run must be removed"
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-0000002", "step-0000005", "step-0000006"]
    assert checkpoint.best(tmp_path) == tmp_path / "step-0000002"


def test_disk_that_fills_up_during_a_save_stops_the_run_and_resume_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real full disk, filled after the check of free space.

    With space again, the resumed run matches an undisturbed one.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        asked = [
            tiny.recipe("sd15", "lora", "train.steps=4", "train.checkpoint_every=2", folder=at / "run")
            for at in (disk, tmp_path)
        ]
        job = tiny.prepare(asked[0])
        check = checkpoint._check_space

        def then_fill(folder: Path, found: checkpoint.Checkpoint) -> None:
            check(folder, found)
            if found.step == 4:
                with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
                    while file.write(b"0" * 4096):
                        pass

        monkeypatch.setattr(checkpoint, "_check_space", then_fill)
        with pytest.raises(UserError, match=r"the checkpoint of step 4 could not be written: .*No space"):
            job.trainer.train()
        monkeypatch.undo()
        assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == ["step-0000002"]
        with pytest.raises(UserError, match="No space left on device"):
            tiny.prepare(asked[0], resume=True).trainer.train()
        (disk / "filler").unlink()
        tiny.prepare(asked[0], resume=True).trainer.train()
        ours = tiny.final_weights(disk / "run")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)  # lazily: this process still holds the run's lock open
    tiny.prepare(asked[1]).trainer.train()
    assert all(torch.equal(ours[name], tensor) for name, tensor in tiny.final_weights(tmp_path / "run").items())

"""`ft check` and `ft data check --recipe` refuse what `ft train` would refuse. Most cases are in test_bad_*.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from finetune import job
from finetune.config.loader import load_recipe
from finetune.errors import UserError
from finetune.estimate import monitor
from finetune.estimate.monitor import Expected
from finetune.paths import embedded
from finetune.training.run_status import Reporter
from tests.helpers import tiny
from tests.helpers.commands import ft, python
from tests.helpers.scenes import Scene, message_of, scene

__all__ = ["scene"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert ft(*arguments) == 2
    return message_of(capsys.readouterr().err)


def test_check_data_check_and_train_refuse_long_captions_alike(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    (scene.data / "one.txt").write_text("blue " * 40)
    recipe, *overrides = scene.arguments()
    messages = {
        refusal(capsys, "train", recipe, *overrides),
        refusal(capsys, "check", recipe, *overrides),
        refusal(capsys, "data", "check", "--recipe", recipe, *overrides),
    }
    assert len(messages) == 1 and "longer than the 16 tokens" in messages.pop()


def test_long_captions_may_be_cut(scene: Scene) -> None:
    (scene.data / "one.txt").write_text("blue " * 40)
    assert ft("check", *scene.arguments(), "--set", "data.long_captions=truncate") == 0


def test_check_refuses_an_existing_run_folder_unless_it_resumes(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.run.mkdir()
    (scene.run / "note.txt").write_text("mine")
    assert "already exists" in refusal(capsys, "check", *scene.arguments())
    assert ft("check", *scene.arguments(), "--resume") == 0


def test_check_refuses_a_folder_that_another_process_trains_in(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = Reporter(scene.run, 0, 1)
    reporter.lock()
    command = ["-m", "finetune", "check", *scene.arguments(), "--resume"]
    ended = python(*command, cwd=scene.folder)  # locks do not keep the own process out
    assert ended.returncode == 2
    assert "another process is training in this run's folder" in message_of(ended.stderr)


def test_a_run_of_weeks_on_a_cpu_needs_force(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "hours_on_cpu", lambda plan, expected: 24 * 30)
    recipe = load_recipe(str(scene.recipe), scene.overrides)
    with pytest.raises(UserError, match="this run would take 30 days") as refused:
        job.check(recipe, quiet=True)
    assert "--force" in refused.value.remedy
    job.check(recipe, force=True, quiet=True)


def test_hours_on_a_cpu_are_bounded_by_arithmetic_without_an_estimate(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(
        "lora/sdxl", [f"data.path={tiny.images()}", "train.steps=20000", "train.precision=float32", "train.epochs=null"]
    )
    plan = job.audit_and_plan(recipe, quiet=True)[1]
    expected = monitor.expect(plan)
    assert expected.forecast is None
    assert monitor.hours_on_cpu(plan, expected) > job.LONGEST_ON_CPU
    unknown = job.audit_and_plan(load_recipe(str(scene.recipe), scene.overrides), quiet=True)[1]
    assert monitor.hours_on_cpu(unknown, Expected(None)) == 0


def test_init_works_on_a_copy_of_the_emoji_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = adapter_of_the_embedded_base(tmp_path)
    copy = tmp_path / "mine.yaml"
    assert ft("recipes", "copy", "lora/emoji", str(copy)) == 0
    assert (
        ft("check", str(copy), "--set", f"adapter.init_lora={adapter}", "--set", f"output.folder={tmp_path / 'run'}")
        == 0
    )
    shown = capsys.readouterr().out
    assert "adapter.rank_pattern: using none, as in the file, instead of the recipe's conv_out: 8" in shown
    assert "adapter.targets: adapting the layers of the file instead of the recipe's" in shown


def adapter_of_the_embedded_base(folder: Path) -> Path:
    """A LoRA of one layer of the embedded base, as kohya's scripts name it."""
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    unet = UNet2DConditionModel.from_pretrained(embedded("embedded:base"), subfolder="unet")
    width, name = unet.get_submodule(layer).in_features, f"lora_unet_{layer.replace('.', '_')}"
    file = folder / "before.safetensors"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.zeros(width, 2)}
    save_file(tensors, file)
    return file

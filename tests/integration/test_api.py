"""The Python API, and the tables that a run prints."""

from __future__ import annotations

from pathlib import Path

import pytest

import finetune
from finetune import job
from finetune.config.schema import Recipe
from finetune.errors import UserError
from tests.helpers import tiny


def test_public_api_is_complete_and_documented() -> None:
    assert set(finetune.__all__) == set(dir(finetune)) and all(
        getattr(finetune, name).__doc__ for name in finetune.__all__
    )
    with pytest.raises(AttributeError, match="'trian'"):
        _ = finetune.trian


def test_train_from_python_survives_a_failing_report(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(folder: Path) -> Path:
        raise OSError("no space")

    monkeypatch.setattr("finetune.report.html_report.write_report", fail)
    recipe: Recipe = tiny.recipe("sd15", "full", folder=tmp_path / "run")
    planned = finetune.plan(recipe)
    assert planned.arithmetic == "5 images / batch 2 = 2.5 steps per epoch; 2 steps = 0.8 epochs"
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    assert finetune.train(recipe) == tmp_path / "run"
    shown = capsys.readouterr()
    assert "the report could not be written" in caplog.text and "no space" in caplog.text and not shown.out
    assert (
        tmp_path / "run" / "final" / "model_index.json"
    ).is_file() and f"   model  {tmp_path / 'run' / 'final'}" in caplog.text
    with pytest.raises(UserError, match="already exists"):
        job.prepare(recipe)


def test_model_summary_counts_adapted_layers() -> None:
    """Counts as in diffusers: 2 attentions × 4 and 2 MLP layers for each transformer block of the tiny UNet."""
    from finetune.report import model_summary

    recipe = tiny.recipe(
        "sd15", "lora", "adapter.targets=attention+mlp", "optimizer.name=adamw", folder=Path("never-made")
    )
    audit, planned = job.audit_and_plan(recipe, quiet=True)
    from finetune.models import registry

    model = registry.build(planned, audit)
    unet = model.train_steps()[0].net.get_submodule("denoiser")
    blocks = [name for name, module in unet.named_modules() if type(module).__name__ == "BasicTransformerBlock"]
    adapters = model_summary.adapted(model)
    assert f"adapter: {10 * len(blocks)} layers, " in adapters
    assert f"{len(blocks)} × ff.net.0.proj" in model_summary.adapted_layers(model)
    lora = sum(p.numel() for name, p in unet.named_parameters() if "lora_" in name)
    assert f"({lora / sum(p.numel() for p in unet.parameters()):.1%})" in adapters
    assert "GiB" in model_summary.whole(model, planned) and "Denoiser" not in model_summary.built(model)

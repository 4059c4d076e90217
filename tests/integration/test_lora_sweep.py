"""Sheets of LoRA strengths and checkpoints: each image is correct and in its cell."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from finetune.cli.main import main
from finetune.errors import UserError
from finetune.inference.lora_sweep import compare
from finetune.inference.sample import sample
from tests.helpers import tiny

PROMPT = "a red circle"


@cache
def run() -> Path:
    """Six steps with a checkpoint every two, EMA, a trained text encoder, and a scale other than 1."""
    folder = tiny.root() / "strengths"
    kept = ("train.steps=6", "train.checkpoint_every=2", "train.keep_checkpoints=9", "train.ema=0.5")
    more = (
        "adapter.rslora=true",
        "adapter.alpha=3",
        "model.train_text_encoder=true",
        "optimizer.lr=0.02",
        "sample.seed=7",
    )
    tiny.train(tiny.recipe("sd15", "lora", *kept, *more, folder=folder))
    return folder


def pixels(file: Path) -> numpy.ndarray:
    with Image.open(file) as image:
        return numpy.asarray(image.convert("RGB")).astype(int)


def test_lora_sweep_images_match_sample_and_diffusers(tmp_path: Path) -> None:
    (sheet,) = compare(run(), [0, 0.5, 1], [2, 6], out=tmp_path / "out")
    drawn = {file.stem: pixels(file) for file in (tmp_path / "out").glob("00-*.png")}
    assert drawn.keys() == {f"00-step-{step}-strength-{strength}" for step in (2, 6) for strength in ("0", "0.5", "1")}

    (final,) = sample(run(), [PROMPT], out=tmp_path / "final")
    assert abs(drawn["00-step-6-strength-1"] - pixels(final)).max() <= 1, (
        "the last checkpoint at full strength equals the run's result"
    )
    (base,) = sample(tiny.pipeline("sd15"), [PROMPT], seeds=[7], steps=2, guidance=3, out=tmp_path / "base")
    assert (drawn["00-step-2-strength-0"] == drawn["00-step-6-strength-0"]).all()
    assert abs(drawn["00-step-6-strength-0"] - pixels(base)).max() <= 1
    assert abs(drawn["00-step-2-strength-1"] - drawn["00-step-6-strength-1"]).max() > 5

    pipeline = StableDiffusionPipeline.from_pretrained(tiny.pipeline("sd15"))
    pipeline.load_lora_weights(run() / "final", adapter_name="mine")
    pipeline.set_adapters("mine", 0.5)
    half = pipeline(
        PROMPT, num_inference_steps=2, guidance_scale=3, generator=torch.Generator().manual_seed(7), width=32, height=32
    ).images[0]
    assert abs(drawn["00-step-6-strength-0.5"] - numpy.asarray(half).astype(int)).max() <= 1

    shown, cell = pixels(sheet), 32 * 6  # small images are enlarged sixfold
    rows = [shown[-(cell + 8) * number :][:cell] for number in (2, 1)]
    for row, step in zip(rows, (2, 6), strict=True):
        for column, strength in enumerate(("0", "0.5", "1")):
            right = shown.shape[1] - (3 - column) * (cell + 8)
            assert (row[3::6, right + 3 : right + cell : 6] == drawn[f"00-step-{step}-strength-{strength}"]).all()


def test_lora_sweep_of_pissa_goes_from_the_base_to_the_result(tmp_path: Path) -> None:
    """PiSSA starts with a part of the base's weights, which the strength must not scale."""
    folder = tmp_path / "run"
    more = ("adapter.pissa=true", "adapter.alpha=8", "optimizer.lr=0.02", "train.steps=2", "sample.seed=7")
    tiny.train(tiny.recipe("sd15", "lora", *more, folder=folder))
    compare(folder, [1, 0, 0.5, 1], [2], out=tmp_path / "out")
    drawn = {
        strength: pixels(tmp_path / "out" / f"00-step-2-strength-{strength}.png") for strength in ("0", "0.5", "1")
    }
    (final,) = sample(folder, [PROMPT], out=tmp_path / "final")
    (base,) = sample(tiny.pipeline("sd15"), [PROMPT], seeds=[7], steps=2, guidance=3, out=tmp_path / "base")
    assert abs(drawn["0"] - pixels(base)).max() <= 1
    assert abs(drawn["1"] - pixels(final)).max() <= 1
    assert abs(drawn["0.5"] - drawn["0"]).max() > 1 and abs(drawn["0.5"] - drawn["1"]).max() > 1


def test_lora_sweep_of_a_schedule_free_run_uses_the_averages(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = (
        "optimizer.name=schedulefree",
        "optimizer.lr=0.05",
        "model.train_text_encoder=true",
        "train.steps=4",
        "sample.seed=7",
    )
    tiny.train(tiny.recipe("sd15", "lora", *more, folder=folder))
    compare(folder, [1], [4], out=tmp_path / "out")
    (final,) = sample(folder, [PROMPT], out=tmp_path / "final")
    assert abs(pixels(tmp_path / "out" / "00-step-4-strength-1.png") - pixels(final)).max() <= 1


def test_sample_strengths_command_writes_sheets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = ["--prompt", PROMPT, "--prompt", "green triangle", "--steps", "1"]
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(run()), "--strengths", "1", "--checkpoints", "all", *two, "--out", str(tmp_path / "out")])
    assert not ended.value.code
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / f"sheet-0{number}.png") for number in (0, 1)]
    assert len(list((tmp_path / "out").glob("0?-step-*.png"))) == 6


def test_lora_sweep_with_invalid_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"no checkpoint of step 3[\s\S]*use one of: 2, 4, 6"):
        compare(run(), [1], [3])
    with pytest.raises(UserError, match="no run's folder"):
        compare(tmp_path, [1])
    for name in ("plan.json", "recipe.yaml"):
        (tmp_path / name).write_text((run() / name).read_text())
    with pytest.raises(UserError, match=r"no checkpoint yet[\s\S]*--resume"):
        compare(tmp_path, [1])
    (tmp_path / "recipe.yaml").write_text(tiny.text("sd15", "full", tmp_path))
    with pytest.raises(UserError, match="only a LoRA has a strength"):
        compare(tmp_path, [1])
    for wrong in (["--strengths", "strong"], ["--checkpoints", "last"], ["--strengths", "nan"]):
        with pytest.raises(SystemExit) as ended:
            main(["sample", str(run()), *wrong])
        assert ended.value.code == 2 and "write --" in capsys.readouterr().err

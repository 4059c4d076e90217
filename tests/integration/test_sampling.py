"""`ft sample` in a fresh process repeats the trainer's last samples; invalid input is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from PIL import Image

from finetune.errors import UserError
from finetune.inference.sample import sample
from tests.helpers import tiny

# Name → pipeline, method, overrides: a schedule not stored in the LoRA's file, scales other than 1, several networks.
RUNS = {
    "rslora": (
        "sd21",
        "lora",
        "diffusion.zero_terminal_snr=true",
        "adapter.rslora=true",
        "adapter.alpha=3",
        "model.train_text_encoder=true",
    ),
    "dora": ("sdxl", "lora", "adapter.dora=true", "adapter.alpha=8"),
    "full": ("sd15", "full", "sample.negative=blue"),
}
STEPS = 4
PROMPTS = ["a red circle", "green triangle"]
# Run by a fresh Python: samples of each run, then an image by the code that the report shows.
FRESH = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from finetune.planning import load_plan
from finetune.export.usage import usage
from finetune.inference.sample import sample
root = Path(sys.argv[1])
for name in sys.argv[2:]:
    for file in sample(root / name, []):
        print(file)
    plan = load_plan(root / name)
    lines = usage(plan, plan.recipe.model.path, str(root / name / "final")).splitlines()
    assert lines[-1].startswith("pipeline(")
    scope = {}
    exec("\\n".join(lines[:-1]), scope)
    wanted = plan.recipe.sample
    image = scope["pipeline"](
        wanted.prompts[0], negative_prompt=wanted.negative, guidance_scale=wanted.guidance, num_inference_steps=wanted.steps,
        width=32, height=32, generator=torch.Generator().manual_seed(wanted.seed),
    ).images[0]
    image.save(root / f"{name}-plain.png")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three trained runs; a fresh process has written drawn/1 in each."""
    root = tmp_path_factory.mktemp("runs")
    for name, (pipeline, method, *overrides) in RUNS.items():
        sampled = (
            f"sample.prompts={json.dumps(PROMPTS)}",
            "sample.seed=7",
            f"train.steps={STEPS}",
            "optimizer.lr=0.02",
        )
        tiny.train(tiny.recipe(pipeline, method, *sampled, *overrides, folder=root / name))
    command = [sys.executable, "-c", FRESH, str(root), *RUNS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(root / name / "drawn" / "1" / f"{number:02d}.png") for name in RUNS for number in range(2)
    ]
    return root


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def difference(one: Path, other: Path) -> int:
    """The largest difference of any channel of any pixel, 0–255."""
    first, second = (numpy.asarray(opened(path), numpy.int16) for path in (one, other))
    return int(abs(first - second).max())


@pytest.mark.parametrize("name", RUNS)
def test_sample_repeats_the_trainers_last_samples(runs: Path, name: str) -> None:
    last, first = runs / name / "samples" / f"step-{STEPS:07d}", runs / name / "samples" / "step-0000000"
    for number in range(2):
        assert difference(runs / name / "drawn" / "1" / f"{number:02d}.png", last / f"{number:02d}.png") <= 1
        assert (
            difference(first / f"{number:02d}.png", last / f"{number:02d}.png") > 8
        )  # large enough to notice if the trained weights were not used
    assert (runs / name / "drawn" / "1" / "grid.png").is_file()


@pytest.mark.parametrize("name", RUNS)
def test_usage_code_of_the_report_repeats_the_last_sample(runs: Path, name: str) -> None:
    assert difference(runs / f"{name}-plain.png", runs / name / "samples" / f"step-{STEPS:07d}" / "00.png") <= 1


def test_sample_options_override_the_recipe(runs: Path, tmp_path: Path) -> None:
    files = sample(
        runs / "rslora",
        ["a red circle", "two black stripes"],
        seeds=[7, 8],
        steps=3,
        guidance=1.5,
        out=tmp_path / "out",
    )
    assert [file.name for file in files] == ["00.png", "01.png", "02.png", "03.png"]
    said = [opened(file).info for file in files]
    assert [(info["prompt"], info["seed"]) for info in said] == [
        ("a red circle", "7"), ("a red circle", "8"), ("two black stripes", "7"), ("two black stripes", "8"),
    ]  # fmt: skip
    assert (said[0]["steps"], said[0]["guidance"], said[0]["negative"]) == ("3", "1.5", "")
    assert difference(files[0], files[1]) > 8
    assert difference(files[0], runs / "rslora" / "drawn" / "1" / "00.png") > 0
    with pytest.raises(UserError, match="already exists"):
        sample(runs / "rslora", ["a red circle"], out=tmp_path / "out")


def test_sample_does_not_depend_on_other_images_and_never_overwrites(runs: Path) -> None:
    (alone,) = sample(runs / "full", [PROMPTS[1]], seeds=[8])
    assert alone == runs / "full" / "drawn" / "2" / "00.png"
    assert difference(alone, runs / "full" / "drawn" / "1" / "01.png") == 0


def test_sample_from_a_diffusers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tiny.pipeline("sd15").rglob("*"))
    assert sample(tiny.pipeline("sd15"), ["a red circle"], steps=2) == [Path("drawn/1/00.png")]
    assert sorted(tiny.pipeline("sd15").rglob("*")) == before
    assert opened(Path("drawn/1/00.png")).size == (32, 32)


def test_sample_with_invalid_input_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run"):
        sample(tmp_path / "nothing", ["a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"not a diffusers folder"):
        sample(tmp_path / "empty", ["a"])
    with pytest.raises(UserError, match="no prompt to sample"):
        sample(tiny.pipeline("sd15"), [])
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs / "rslora", unfinished, ignore=shutil.ignore_patterns("final"))
    with pytest.raises(UserError, match=r"no final weights[\s\S]*--resume"):
        sample(unfinished, ["a"])
    plan = json.loads((unfinished / "plan.json").read_text())
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "plan.json").write_text(json.dumps(plan))
    (vae / "recipe.yaml").write_text(tiny.text("vae", "scratch", vae))
    with pytest.raises(UserError, match="family autoencoder-kl does not generate images from prompts"):
        sample(vae, ["a"])
    (vae / "recipe.yaml").unlink()
    with pytest.raises(UserError, match="not a diffusers folder"):
        sample(vae, ["a"])

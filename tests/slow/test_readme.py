"""What the README tells people to type is typed here, on the bundled base model; only the steps are fewer."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from finetune.config.loader import bundled_recipes
from tools.archive import bundled

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
FEWER = ["--set", "train.steps=2", "--set", "train.batch_size=2", "--set", "sample.steps=2", "--set", "data.held_out=0"]


def block(after: str, language: str = "") -> str:
    """The first code block of a language after a heading."""
    found = re.search(rf"^## {re.escape(after)}$.*?^```{language}$\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found.group(1)


def run(arguments: list[str], folder: Path) -> None:
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with `my-images`: four emoji, their captions beside them."""
    found = tmp_path_factory.mktemp("readme")
    (found / "my-images").mkdir()
    for name in ("rocket", "fire", "pizza", "bus"):
        with Image.open(io.BytesIO(bundled("emoji/noto")[f"{name}.webp"].read())) as image:
            image.save(found / "my-images" / f"{name}.png")
        (found / "my-images" / f"{name}.txt").write_text(name)
    return found


def test_the_commands_for_ones_own_images(folder: Path) -> None:
    lines = [shlex.split(line, comments=True) for line in block("Your own images").splitlines()]
    assert [line[:2] for line in lines if line[0] == "ft"] == [
        ["ft", c] for c in ("doctor", "recipes", "recipes", "check", "train", "sample", "export")
    ]
    for line in lines[1:]:  # tests/test_doctor.py runs the first
        more = FEWER if line[1] == "train" else ["--steps", "2"] if line[1] == "sample" else []
        run([sys.executable, "-m", "finetune.cli.main", *line[1:], *more], folder)
    assert (folder / "runs" / "lora-mine" / "report.html").is_file()
    assert (folder / "mine.safetensors").is_file()


def test_the_python_example(folder: Path) -> None:
    fewer = '"train.steps=1", "sample.steps=1", "data.path=my-images", "data.held_out=0"'
    code = block("Your own images", "python").replace('"train.steps=20"', fewer)
    run([sys.executable, "-c", code], folder)
    assert len(list((folder / "runs" / "try" / "drawn").rglob("grid.png"))) == 1


def test_the_table_of_recipes_names_each() -> None:
    assert set(re.findall(r"`((?:lora|full|scratch)/[a-z0-9+-]+)`", block_of_table())) == set(bundled_recipes())


def block_of_table() -> str:
    """The lines of the first table under Recipes."""
    return "\n".join(
        line
        for line in README.partition("\n## Recipes\n")[2].partition("\n## ")[0].splitlines()
        if line.startswith("|")
    )


def test_every_image_is_there() -> None:
    images = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert images and all((Path(__file__).resolve().parents[2] / image).is_file() for image in images)


def test_both_scripts_can_be_run() -> None:
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    assert all(shutil.which(str(scripts / name)) for name in ("demo", "test"))

"""Installation: the wheel, the environments made by the scripts, the pinned versions."""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from finetune.config.loader import bundled_recipes
from tests.helpers.commands import CHECKOUT, python, shell


def test_wheel_contains_recipes_and_assets(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(CHECKOUT / "finetune", source / "finetune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CHECKOUT / "recipes", source / "recipes")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(CHECKOUT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q"]
    built = python("-m", "pip", "wheel", *options, "-w", tmp_path, source, cwd=tmp_path, PYTHONPATH="")
    assert built.returncode == 0, built.stderr
    wheel = next(tmp_path.glob("ft_image-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    inside = tmp_path / "installed" / "finetune"
    recipes = {f"recipes/{name}.yaml" for name in bundled_recipes()} | {"recipes/recipe.schema.json"}
    assert recipes <= _files(inside)
    assert _files(inside) - recipes == _files(source / "finetune")
    elsewhere = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path / "installed")}
    listed = python("-m", "finetune.cli.main", "recipes", **elsewhere)  # type: ignore[arg-type]
    assert [line.split()[0] for line in listed.stdout.splitlines()] == bundled_recipes()
    script = python(
        "-c",
        "from finetune.cli.launcher import launch_arguments; print(launch_arguments('full', 1, False)[1][-1])",
        **elsewhere,  # type: ignore[arg-type]
    )
    assert script.stdout.strip() == str(inside / "full.py")
    refused = shell(sys.executable, inside / "full.py", "lora/emoji", cwd=tmp_path, PYTHONPATH="")
    assert refused.returncode == 2 and "this recipe's method is lora, not full" in refused.stderr


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _scripts(tmp_path: Path, version: str) -> tuple[Path, dict[str, str]]:
    """A checkout with only what `scripts/install` reads, and a PATH with Pythons of `version` only."""
    root = tmp_path / "checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "scripts/install", "scripts/constraints.txt"):
        shutil.copy(CHECKOUT / name, root / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        answers = f'--version) echo "Python {version}";; *version_info*) exit {int(version < "3.11")};; *) exit 1;;'
        (programs / name).write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
        (programs / name).chmod(0o755)
    return root, {"PATH": f"{programs}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("3.10.9", "ft needs Python 3.11 or later, but found Python 3.10.9"),
        ("3.12.1", "Python 3.12.1 has no venv module"),
    ],
)
def test_install_with_an_unsuitable_python_fails_in_one_line(version: str, says: str, tmp_path: Path) -> None:
    root, environment = _scripts(tmp_path, version)
    found = shell("sh", "scripts/install", cwd=root, **environment)
    assert found.returncode == 2 and says in found.stderr and found.stderr.count("\n") == 1


def test_install_leaves_an_up_to_date_environment_alone(tmp_path: Path) -> None:
    root, environment = _scripts(tmp_path, "3.10.9")
    (root / ".venv").mkdir()
    state = shell(
        "sh",
        "-c",
        'printf "%s" "$(pwd) $(cat pyproject.toml scripts/constraints.txt | cksum)" > .venv/installed-dev',
        cwd=root,
    )
    assert state.returncode == 0
    assert shell("sh", "scripts/install", cwd=root, **environment).returncode == 0, "dev includes what the demo needs"
    (root / "pyproject.toml").write_text("changed")
    assert shell("sh", "scripts/install", cwd=root, **environment).returncode == 2


def test_constraints_pin_every_dependency() -> None:
    import tomllib

    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["test"],
        *project["optional-dependencies"]["docs"],
        *project["optional-dependencies"]["dev"],
    ]
    names = {re.split(r"[>=\[;]", line)[0].strip().lower().replace("_", "-") for line in wanted} - {"ft-image"}
    lines = (CHECKOUT / "scripts" / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")}
    assert names <= pinned, names - pinned
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.]*", line) for line in lines if not line.startswith("#"))

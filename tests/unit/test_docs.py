"""README and documentation against the code: commands, options and recipe keys exist, links resolve, pages are current."""

from __future__ import annotations

import dataclasses
import re
import shutil
import typing
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from finetune.cli.main import ft
from finetune.config.loader import bundled_recipes, load_recipe
from finetune.config.schema import Recipe
from tests.helpers.commands import CHECKOUT
from tests.helpers.docs import Block, blocks, pages
from tools import generate_docs

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[Block]:
    return [block for page in pages() for block in blocks(page) if block.language == language]


def test_readme_fits_in_150_lines() -> None:
    assert len(README.splitlines()) <= 150


def test_readme_model_tables_name_every_bundled_recipe() -> None:
    section = README.partition("\n## Models\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`((?:lora|full|scratch)/[a-z0-9+-]+)`", section)) == set(bundled_recipes())


def test_readme_commands_cover_the_whole_path() -> None:
    used = {command[1] for block in blocks("README.md") for command in block.commands}
    assert {"doctor", "recipes", "data", "check", "estimate", "train", "sample", "export"} <= used


def test_readme_images_and_links_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", README)
    local = [target for target in targets if not target.startswith("http")]
    assert local and all((CHECKOUT / target).is_file() for target in local), local


def test_scripts_are_executable() -> None:
    assert all(shutil.which(str(CHECKOUT / "scripts" / name)) for name in ("install", "demo", "test", "check"))


@pytest.mark.parametrize("block", [pytest.param(block, id=block.where) for block in _blocks("sh") if block.commands])
def test_documented_commands_have_existing_options(block: Block) -> None:
    for words in block.commands:
        context = click.Context(ft, info_name="ft")
        command: click.Command = ft
        rest = words[1:]
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            below = command.get_command(context, rest[0])
            assert below is not None, words
            command, context, rest = below, click.Context(below, info_name=rest[0], parent=context), rest[1:]
        if not isinstance(command, click.Group):
            command.make_parser(context).parse_args(list(rest))


@pytest.mark.parametrize("page", pages())
def test_documented_overrides_load(page: str) -> None:
    """Every `--set` of a bundled recipe, or of a copy of one, names an existing key with a valid value."""
    copies: dict[str, str] = {}
    for words in (words for block in blocks(page) for words in block.commands):
        if words[1:3] == ["recipes", "copy"]:
            copies[words[4]] = words[3]
        if words[1] not in ("train", "check", "estimate") or len(words) < 3 or words[2].startswith("-"):
            continue
        overrides = [words[number + 1] for number, word in enumerate(words) if word == "--set"]
        name = copies.get(words[2], words[2])
        if name in bundled_recipes():
            load_recipe(name, overrides)


@pytest.mark.parametrize("page", pages())
def test_documented_recipe_names_exist(page: str) -> None:
    text = (CHECKOUT / page).read_text(encoding="utf-8")
    names = set(re.findall(r"\b(?:lora|full|scratch)/[a-z][a-z0-9+-]*(?![\w./*<])", text))
    assert names <= set(bundled_recipes()), names - set(bundled_recipes())


def _check_keys(value: Any, declared: Any, where: str) -> None:
    """Fail if a mapping in a YAML block has a key that the schema does not declare."""
    options = [option for option in (declared, *typing.get_args(declared)) if dataclasses.is_dataclass(option)]
    if isinstance(value, list):
        for item in value:
            _check_keys(item, declared, where)
    elif isinstance(value, dict) and options:
        hints = typing.get_type_hints(options[0])
        for key, below in value.items():
            assert key in hints, f"{where}: there is no key {key}"
            _check_keys(below, hints[key], where)


@pytest.mark.parametrize("block", [pytest.param(block, id=block.where) for block in _blocks("yaml")])
def test_documented_yaml_has_existing_keys(block: Block) -> None:
    _check_keys(yaml.safe_load(block.text), Recipe, block.where)


def test_documented_keys_in_prose_exist() -> None:
    """`section.key` in backquotes is a key of the recipe."""
    hints = typing.get_type_hints(Recipe)
    sections = {
        name: option
        for name, hint in hints.items()
        for option in (hint, *typing.get_args(hint))
        if dataclasses.is_dataclass(option)
    }
    for page in pages():
        # The first columns of tables about other trainers hold their keys, not ours.
        text = (CHECKOUT / page).read_text(encoding="utf-8")
        if page.endswith("other-trainers.md"):
            text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
        for section, key in re.findall(r"`(\w+)\.(\w+)[:=` ]", text):
            if section in sections and key not in ("json", "yaml"):
                assert key in typing.get_type_hints(sections[section]), f"{page}: {section}.{key}"


@pytest.mark.parametrize("name", generate_docs.PAGES)
def test_generated_page_is_current(name: str) -> None:
    path, generate = generate_docs.PAGES[name]
    assert (CHECKOUT / path).read_text(encoding="utf-8") == generate(), f"run: python tools/generate_docs.py {name}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (CHECKOUT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    names = [Path(page).relative_to("docs").as_posix() for page in pages() if page.startswith("docs/")]
    assert [name for name in names if f": {name}" not in navigation] == []

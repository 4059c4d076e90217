"""The recipe reference, the JSON Schema and the recipes' first lines, all generated from the sections' metadata."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from finetune.cli.recipes import command
from finetune.config import json_schema, nets, reference
from finetune.config.loader import bundled_recipes, load_recipe, to_dict
from finetune.errors import UserError
from finetune.paths import RECIPES

DOCS = Path(__file__).parent.parent.parent / "docs"
VALIDATOR = jsonschema.Draft7Validator(json_schema.json_schema())


def first_error(recipe: dict[str, Any]) -> str:
    error = next(iter(VALIDATOR.iter_errors(recipe)), None)
    return "" if error is None else f"{'.'.join(map(str, error.absolute_path))}: {error.message}"


def plain(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    return loaded


def test_recipe_reference_page_is_current() -> None:
    assert (DOCS / "reference" / "recipe.md").read_text(encoding="utf-8") == reference.markdown(), (
        "run python tools/generate_docs.py recipe"
    )


def test_recipe_schema_file_is_current() -> None:
    assert (RECIPES / "recipe.schema.json").read_text(encoding="utf-8") == json_schema.text(), (
        "run python tools/generate_docs.py schema"
    )
    jsonschema.Draft7Validator.check_schema(json.loads(json_schema.text()))


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipe_names_the_schema_and_conforms_to_it(name: str) -> None:
    file = RECIPES / f"{name}.yaml"
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    assert first.startswith(json_schema.HEADER)
    assert (file.parent / first.removeprefix(json_schema.HEADER)).resolve() == RECIPES / "recipe.schema.json"
    assert first_error(plain(name)) == ""
    assert first_error(json.loads(json.dumps(to_dict(load_recipe(name))))) == "", "the resolved recipe of a run"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "batch_size", 0),
        ("train", "batch_size", 1.5),
        ("train", "bacth_size", 1),
        ("train", "ema", 1.0),
        ("optimizer", "name", "adam"),
        ("adapter", "rank_pattern", {"to_q": 0}),
        ("sample", "prompts", "a cat"),
        ("model", "family", "sdlx"),
        ("net", "width", 64),
    ],
)
def test_schema_refuses_what_the_loader_refuses(section: str, key: str, value: Any) -> None:
    recipe = plain("lora/emoji")
    recipe.setdefault(section, {})[key] = value
    assert first_error(recipe)


def test_schema_has_the_net_section_of_each_family() -> None:
    recipe = plain("scratch/dcgan")
    recipe["net"]["scales"] = 2
    assert "scales" in first_error(recipe)
    recipe["model"]["family"] = "glow"
    recipe["net"] = {"scales": 2}
    assert first_error(recipe) == ""


def test_schema_accepts_old_names() -> None:
    recipe = plain("lora/emoji")
    recipe["adapter"]["preserve_every"] = 5
    recipe["model"]["encoders"] = "whole"
    assert first_error(recipe) == ""


def test_every_recipe_key_is_documented() -> None:
    found = reference.sections()
    assert {f"net.{family}" for family in nets.families()} < found.keys()
    assert [f"{key.section}.{key.name}" for section in found.values() for key in section.keys if not key.help] == []
    assert [section.name for section in found.values() if not section.title] == []


def test_every_choice_of_a_key_is_explained() -> None:
    for section in reference.sections().values():
        for key in section.keys:
            if key.type.startswith("one of") and key.choices:
                listed = key.type.removeprefix("one of ").partition(" or null")[0].partition(" (")[0]
                assert [one.strip("`") for one in listed.split(", ")] == list(key.choices), f"{key.section}.{key.name}"


def keys(*arguments: str) -> str:
    result = CliRunner().invoke(command, ["keys", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_recipes_keys_prints_type_range_default_meaning_and_since() -> None:
    printed = keys("adapter")
    assert "adapter.rank: whole number, between 1 and 8,192; default 16\n" in printed
    assert "      Rank of the update; of OFT the side of a block. Higher learns more detail" in printed
    assert "Since 0.1 as `preserve_every`; 0.2 by this name." in printed
    assert keys("adapter.rank").count("adapter.") == 1
    assert keys("dcgan") == keys("net.dcgan")
    assert "discriminator_norm" in keys("net.dcgan")
    assert "gradient_checkpointing" in keys(), "without an argument: all sections with their keys"


def test_recipes_keys_of_an_unknown_name_suggests_one() -> None:
    with pytest.raises(UserError, match="no section or key") as caught:
        reference.find("adapter.rnak")
    assert caught.value.remedy == 'did you mean "adapter.rank"?'


def test_copied_recipe_names_the_schema_by_its_new_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    assert CliRunner().invoke(command, ["copy", "lora/emoji", str(file)]).exit_code == 0
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    assert (tmp_path / first.removeprefix(json_schema.HEADER)).resolve() == RECIPES / "recipe.schema.json"
    assert dataclasses.replace(load_recipe(file), name="emoji") == load_recipe("lora/emoji")


def test_recipes_are_listed_with_their_first_comment() -> None:
    printed = CliRunner().invoke(command, []).output
    assert "yaml-language-server" not in printed
    assert all(line.split("  ", 1)[1].strip() for line in printed.splitlines() if "/" in line.split(" ")[0])

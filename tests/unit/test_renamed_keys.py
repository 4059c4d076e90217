"""Recipe keys with a new name: the old ones work for one release, and `ft recipes migrate` rewrites them."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from finetune.cli.recipes import command
from finetune.config import nets, renamed, schema, yaml_reader
from finetune.config.loader import load_recipe, parse_recipe
from finetune.config.schema import Recipe
from finetune.errors import UserError
from finetune.models.scratch.base import model_from_config

# Every key of version 0.1 (commit 2aad7ad) with its default, by section; `net` by family.
KEYS = json.loads((Path(__file__).parent.parent / "helpers" / "keys_0_1.json").read_text())
SECTIONS = {
    "model": schema.Model,
    "data": schema.Data,
    "prior": schema.Prior,
    "tokens": schema.Token,
    "adapter": schema.Adapter,
    "diffusion": schema.Diffusion,
    "flow": schema.Flow,
    "autoencoder": schema.Autoencoder,
    "optimizer": schema.Optimizer,
    "train": schema.Train,
    "sample": schema.Sample,
    "output": schema.Output,
    "source": schema.Source,
}
OLD = """# My own recipe.
method: lora
model: {family: sd, path: "embedded:base", encoders: 'whole'}  # encoders: as they were
adapter:
    preserve_every:   5   # keep
    init: null
tokens:
- {token: <it>, init: dog, rate: 3}
data:
  path: 😀
  outside_mask: 0.5
  grey: false
train: {steps: 3}
sample:
  watch_every: null
"""


def built(section: str, declared: type, values: dict[str, Any]) -> Any:
    return yaml_reader.build(
        declared, renamed.current_section(section, yaml_reader.of_plain(values, "old.yaml")), section
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_of_version_0_1_is_accepted(section: str) -> None:
    """Each is given its default value, which must still be the default."""
    given = KEYS[section]
    found = built(section, SECTIONS[section], given)
    for key, value in given.items():
        new = renamed.KEYS.get(section, {}).get(key, key)
        now = getattr(found, new)
        assert renamed.VALUES.get(section, {}).get(new, {}).get(value if isinstance(value, str) else "", value) == (
            list(now) if isinstance(now, tuple) else now
        )


@pytest.mark.parametrize("family", KEYS["net"])
def test_every_net_key_of_version_0_1_is_accepted(family: str) -> None:
    declared = nets.section(family)
    assert declared is not None
    given = KEYS["net"][family]
    assert built("net", declared, given) == declared()
    assert nets.from_config(declared, given, "config.json") == declared()


def test_every_section_of_version_0_1_is_accepted() -> None:
    now = {field.name for field in dataclasses.fields(Recipe) if not field.metadata.get("internal")}
    assert set(KEYS["recipe"]) <= now


def test_renamed_keys_are_known_and_do_not_collide_with_old_ones() -> None:
    for section, names in renamed.KEYS.items():
        declared = (
            [SECTIONS[section]] if section != "net" else [found for f in nets.families() if (found := nets.section(f))]
        )
        known = {field.name for one in declared for field in dataclasses.fields(one)}
        assert set(names.values()) <= known
        assert not set(names) & known


def test_old_key_names_load_with_one_note_each(caplog: pytest.LogCaptureFixture) -> None:
    renamed._noted.clear()
    with caplog.at_level(logging.WARNING, "finetune"):
        recipe = parse_recipe(OLD, "old.yaml", "old", ["adapter.preserve_every=7"])
        parse_recipe(OLD, "old.yaml", "old")
    assert recipe.adapter is not None
    assert recipe.adapter.distill_every == 7
    assert recipe.model.text_encoder_placement == "device"
    assert (recipe.data.unmasked_weight, recipe.tokens[0].init_word, recipe.tokens[0].lr_multiplier) == (0.5, "dog", 3)
    assert caplog.messages.count("adapter.preserve_every is now adapter.distill_every") == 1
    assert len(caplog.messages) == len(set(caplog.messages)) == 9


def test_old_and_new_key_name_together_are_refused() -> None:
    with pytest.raises(UserError, match=r"adapter.preserve_every is the old name of adapter.distill_every") as caught:
        parse_recipe(OLD.replace("    init: null", "    distill_every: 5"), "old.yaml", "old")
    assert caught.value.where == "old.yaml:5, adapter.preserve_every"


def test_recipes_migrate_keeps_comments_and_layout(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(OLD.replace("\n", "\r\n").encode())
    result = CliRunner().invoke(command, ["migrate", str(file)])
    assert result.exit_code == 0, result.output
    assert "adapter.preserve_every → adapter.distill_every" in result.output
    assert file.read_bytes().decode().replace("\r\n", "\n") == (
        OLD.replace("encoders: 'whole'", "text_encoder_placement: device")
        .replace("preserve_every:   5", "distill_every:   5")
        .replace("    init:", "    init_lora:")
        .replace("init: dog, rate: 3", "init_word: dog, lr_multiplier: 3")
        .replace("outside_mask", "unmasked_weight")
        .replace("grey", "grayscale")
        .replace("watch_every", "collapse_check_every")
    )
    assert load_recipe(file) == parse_recipe(OLD, "old.yaml", "mine")
    assert "nothing to rename" in CliRunner().invoke(command, ["migrate", str(file)]).output


def test_saved_model_of_version_0_1_opens() -> None:
    """Its config.json has the old keys."""
    config = {
        "family": "dcgan",
        "space": {"channels": 3, "height": 8, "width": 8, "levels": 256, "classes": []},
        "net": KEYS["net"]["dcgan"] | {"width": 4, "halvings": 1, "critic_norm": "spectral"},
    }
    model = model_from_config(config)
    assert model.section.discriminator_norm == "spectral"  # type: ignore[attr-defined]

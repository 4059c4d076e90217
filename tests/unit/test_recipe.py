"""Recipes: what is accepted, what is refused, and the error messages."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.loader import bundled_recipes, error_location, load_recipe, parse_recipe, to_dict
from finetune.config.schema import Recipe
from finetune.errors import UserError
from finetune.models.pretrained import check
from finetune.paths import RECIPES, embedded
from tools.archive import bundled

MINIMAL = """\
method: lora
model:
  family: sd
  path: some/model
adapter:
  rank: 4
data:
  path: images
train:
  steps: 10
"""


def parse(text: str = MINIMAL, *overrides: str) -> Recipe:
    return parse_recipe(text, "my.yaml", "my", overrides)


def refusal(text: str = MINIMAL, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        parse(text, *overrides)
    return caught.value


def refusal_of(action: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        action()
    return caught.value


def added(section: str, line: str) -> str:
    """MINIMAL with one more line at the top of a section, which may be new."""
    if f"\n{section}:\n" in MINIMAL:
        return MINIMAL.replace(f"\n{section}:\n", f"\n{section}:\n  {line}\n")
    return f"{MINIMAL}{section}:\n  {line}\n"


def test_parse_recipe_applies_defaults_and_types() -> None:
    recipe = parse(added("optimizer", "lr: 1e-4"))
    assert recipe.optimizer.lr == 1e-4, "PyYAML itself reads 1e-4 as text"
    assert recipe.adapter is not None and recipe.adapter.rank == 4 and isinstance(recipe.adapter.rank, int)
    assert recipe.data.resolution == 512 and recipe.sample.prompts == () and recipe.diffusion is None
    assert recipe.name == "my"


@pytest.mark.parametrize("written", ["no", "on", "null", "~", "1.0", "2024-01-01", "0x10", "1_000", "NaN", "'no'"])
def test_text_that_yaml_would_convert_stays_text(written: str) -> None:
    """In YAML `no` is False, `1.0` a number, `2024-01-01` a date and `~` null; in a prompt each is text."""
    assert parse(added("sample", f"prompts: [{written}]")).sample.prompts == (written.strip("'"),)


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("train.batch_size", "8", 8),
        ("train.batch_size", "1e1", 10),
        ("train.steps", "10_000", 10_000),
        ("optimizer.lr", "3", 3.0),
        ("optimizer.betas", "[0.8, .99]", (0.8, 0.99)),
        ("adapter.rank_pattern", "{to_q: 8, 'mid_block.*to_k': 2}", {"to_q": 8, "mid_block.*to_k": 2}),
        ("data.flip", "yes", True),
        ("data.flip", "OFF", False),
        ("optimizer.clip_norm", "null", None),
        ("optimizer.clip_norm", "", None),
        ("output.trackers", "[tensorboard]", ("tensorboard",)),
        ("sample.prompts", "['a, b', c]", ("a, b", "c")),
        ("train.precision", "float16", "float16"),
        ("data", "{path: other, flip: true}", None),
    ],
)
def test_set_overrides_scalars_lists_and_sections(key: str, written: str, value: object) -> None:
    recipe = parse(MINIMAL, f"{key}={written}")
    if key == "data":
        assert recipe.data.path == "other" and recipe.data.flip
        return
    section, name = key.split(".")
    found = getattr(getattr(recipe, section), name)
    assert found == value and type(found) is type(value)


def test_set_creates_a_section_and_replaces_sources() -> None:
    assert parse(MINIMAL, "diffusion.huber=0.1").diffusion is not None
    listed = MINIMAL.replace(
        "  path: images", "  sources:\n    - path: one\n    - {path: two, repeats: 3, prefix: a cat}"
    )
    assert [source.repeats for source in parse(listed).data.sources] == [1, 3]
    assert parse(listed, "data.path=three").data == dataclasses.replace(parse().data, path="three")
    assert parse(MINIMAL, "train.batch_size=2", "train.batch_size=3").train.batch_size == 3, "the last one counts"


@pytest.mark.parametrize(
    ("text", "line", "says", "remedy"),
    [
        (added("train", "bacth_size: 2"), 10, 'unknown key "bacth_size" in train', 'did you mean "batch_size"?'),
        (MINIMAL.replace("adapter:", "adaptor:"), 5, 'unknown key "adaptor"', 'did you mean "adapter"?'),
        (
            MINIMAL.replace("method: lora", "method: lara"),
            1,
            '"lara" is not a choice of method',
            'did you mean "lora"?',
        ),
        (
            added("train", "batch_size: two"),
            10,
            'train.batch_size must be a whole number, not "two"',
            "write a whole number",
        ),
        (added("train", "batch_size: 1.5"), 10, "must be a whole number", "write"),
        (
            added("train", "batch_size: 0"),
            10,
            "train.batch_size must be between 1 and 16,384, not 0",
            "set train.batch_size to a value between 1 and 16,384",
        ),
        (added("train", "batch_size: [1]"), 10, "must be one value, not a list", "write"),
        (added("train", "batch_size:"), 10, "must be a value", "write"),
        (added("train", "ema: 1.0"), 10, "train.ema must be greater than 0 and less than 1, not 1", "set"),
        (added("optimizer", "lr: 0"), 12, "optimizer.lr must be greater than 0 and at most 1,000, not 0", "set"),
        (added("optimizer", "lr: .inf"), 12, "optimizer.lr must be", "write"),
        (added("optimizer", "lr: nan"), 12, "optimizer.lr must be a finite number", "write"),
        (added("data", "flip: maybe"), 8, 'data.flip must be true or false, not "maybe"', "write true or false"),
        (added("data", "held_out: 0.9"), 8, "data.held_out must be between 0 and 0.5, not 0.9", "set"),
        (added("sample", "prompts: rocket"), 12, "sample.prompts must be a list", "write a list"),
        (added("adapter", "dropout: 1"), 6, "adapter.dropout must be at least 0 and less than 1, not 1", "set"),
        (MINIMAL.replace("train:\n  steps: 10", "train: 10"), 9, "train must be a section", "write a section"),
        (
            MINIMAL.replace("model:\n  family: sd", "model:"),
            2,
            '"model.family" is missing',
            "add a line `family: …` under model",
        ),
        (MINIMAL.replace("method: lora\n", ""), 1, '"method" is missing', "add a line `method: …`"),
        (added("train", "steps: 20"), 11, '"steps" is given twice', "keep one"),
        (MINIMAL + "data:\n  path: b\n", 11, '"data" is given twice', "keep one"),
        (added("data", "cache: &here x"), 8, "anchors and aliases", "write the value out"),
        (MINIMAL + "output: *here\n", 11, "anchors and aliases", "write the value out"),
        (added("data", "cache: !!python/name:os.system x"), 8, "tags such as", "write the plain value"),
        (MINIMAL + "a: [1\n", 12, "not valid YAML", "check the indentation"),
        (MINIMAL + "\ttabbed: 1\n", 11, "a line is indented with a tab", "replace the tab with spaces"),
        (MINIMAL + "? [a, b]\n: 1\n", 11, "a key must be a plain word", ""),
        ("- a\n- b\n", None, "a recipe is a list of `key: value` lines", "see `ft recipes show"),
        ("", None, "a recipe is a list of `key: value` lines", ""),
        (added("model", "build: " + "{a: " * 20 + "1" + "}" * 20), 3, "nested deeper than", ""),
    ],
)
def test_recipe_with_a_mistake_is_refused_with_line_and_fix(
    text: str, line: int | None, says: str, remedy: str
) -> None:
    error = refusal(text)
    assert says in error.problem
    assert error.where.split(",")[0] == ("my.yaml" if line is None else f"my.yaml:{line}")
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("train.batch_size", "--set needs KEY=VALUE"),
        ("=3", "--set needs KEY=VALUE"),
        ("train..steps=3", "--set needs KEY=VALUE"),
        ("train.step=3", 'unknown key "step" in train'),
        ("train.steps=[", "not valid YAML"),
        ("train.steps=&a 3", "anchors and aliases"),
        ("train.steps=!!int 3", "tags such as"),
        ("train={steps: 3, steps: 4}", '"steps" is given twice'),
        ("method.x=3", "method must be one value"),
    ],
)
def test_set_with_a_mistake_is_refused(assignment: str, says: str) -> None:
    error = refusal(MINIMAL, assignment)
    assert says in error.problem
    assert assignment in error.problem or error.where.startswith("--set ") or error.where.startswith("my.yaml:1")


def test_error_location_adds_the_line_of_a_key() -> None:
    """Keys that the file leaves out, and names that are not keys, have no line."""
    for where, expected in (
        ("model.family", "my.yaml:3, model.family"),
        ("data.cache", "data.cache"),
        ("a.png", "a.png"),
    ):
        with pytest.raises(UserError) as caught, error_location(parse()):
            raise UserError("wrong", where=where)
        assert caught.value.where == expected


def test_free_mapping_keeps_yaml_types_and_reads_1e_4_as_a_number() -> None:
    build = '{a: 1, b: 1e-4, c: true, d: no, e: [1, 2.5, x], f: "1", g: null, h: {i: ~}}'
    text = MINIMAL.replace("method: lora", "method: scratch").replace(
        "  path: some/model\nadapter:\n  rank: 4\n", f"  build: {build}\n"
    )
    assert parse(text).model.build == {
        "a": 1,
        "b": 1e-4,
        "c": True,
        "d": "no",
        "e": [1, 2.5, "x"],
        "f": "1",
        "g": None,
        "h": {"i": None},
    }


@pytest.mark.parametrize("name", bundled_recipes())
def test_resolved_recipe_reads_back_equal(name: str) -> None:
    recipe = load_recipe(
        name, ["sample.prompts=['no', 'null', '1e-4', ' a: b # c']", "sample.negative=''", "optimizer.clip_norm=null"]
    )
    assert (
        parse_recipe(yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True), "resolved.yaml", "other")
        == recipe
    )


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_bundled_recipe_is_short_and_begins_with_its_audience(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("# yaml-language-server: ")
    assert lines[1].startswith("# For ")
    assert load_recipe(path).method == path.parent.name


def test_demo_prompts_are_not_among_the_training_captions() -> None:
    recipe = load_recipe("lora/emoji")
    captions = {}
    for name in ("twemoji-train", "twemoji-unseen", "noto"):
        captions[name] = {entry.caption for entry in bundled(f"emoji/{name}").values()}
    drawn = {prompt: [name for name, texts in captions.items() if prompt in texts] for prompt in recipe.sample.prompts}
    assert drawn and all(found == ["twemoji-unseen", "noto"] for found in drawn.values()), drawn


def test_load_recipe_finds_files_and_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(MINIMAL)
    assert load_recipe(file).name == "mine"
    assert load_recipe("lora/emoji") == load_recipe("recipes/lora/emoji.yaml")
    with pytest.raises(UserError, match='did you mean "lora/emoji"') as caught:
        load_recipe("lora/emojy")
    assert "ft recipes" in caught.value.remedy
    file.write_bytes(MINIMAL.encode("utf-16"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(file)


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 200_000,
        "? " * 50_000,
        "- " * 100_000,
        "\n".join(" " * depth + "a:" for depth in range(600)),
        "a: " + "9" * 1_000_000,
    ],
    ids=["brackets", "keys", "lists", "sections", "length"],
)
def test_recipe_that_would_overwhelm_the_parser_is_refused_quickly(text: str) -> None:
    """libyaml itself takes minutes for the first, and crashes the process on the second."""
    start = time.perf_counter()
    assert "deeper than" in (said := refusal(text).problem) or "longer than" in said
    assert time.perf_counter() - start < 2
    laughs = "a: &a [x, x]\n" + "\n".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]" for n in range(9)
    )
    assert "anchors and aliases" in refusal(laughs).problem
    assert "--set needs" in refusal(MINIMAL, ".".join("a" * 50_000) + "=1").problem


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!x y", "!!binary aGk="]
)
def test_yaml_tag_is_refused(tag: str) -> None:
    assert "tags such as" in refusal(added("model", f"vae: {tag}")).problem


def test_recipe_values_cannot_name_places_outside_their_folders() -> None:
    assert "leads out of" in refusal_of(lambda: embedded("embedded:../../../etc")).problem
    assert "must not contain slashes" in refusal(MINIMAL + "name: ../../elsewhere\n").problem
    for family in ("os", "../x", "models.sd", "text_to_image", "__init__"):
        assert (
            "no model family"
            in refusal_of(lambda family=family: check.check(parse(MINIMAL, f"model.family={family}"))).problem  # type: ignore[misc]
        )


# Strings close to YAML and to recipes: keys, punctuation and odd characters in any order.
_WORDS = [
    "method",
    "lora",
    "model",
    "train",
    "data",
    "adapter",
    "steps",
    "1e999",
    "-1",
    "0x1F",
    "1_0",
    "null",
    "---",
    "...",
    "!!set",
    "&a",
    "*a",
]
_MARKS = [":", ": ", "\n", "\n  ", "- ", "? ", *"[]{}'\"|>#%@`~=.,", "\t", "\x00", "\ufeff", "\ud7ff", "é"]
_TEXT = st.sampled_from(_WORDS + _MARKS) | st.text(max_size=4)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(_TEXT, max_size=30).map("".join))
def test_any_text_is_read_or_refused_with_a_message(text: str) -> None:
    for whole in (text, MINIMAL + text, MINIMAL.replace("some/model", text)):
        try:
            parse(whole)
        except UserError as error:
            assert error.problem


_LINES = [
    line
    for name in ("lora/sdxl", "scratch/emoji-diffusion", "full/emoji")
    for line in (RECIPES / f"{name}.yaml").read_text().splitlines()
]
_PLACES = st.integers(0, 99)
_EDITS = st.tuples(
    st.sampled_from(["drop", "twice", "swap", "indent", "value", "cut"]), _PLACES, _PLACES, st.lists(_TEXT, max_size=3)
)


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(st.integers(0, len(_LINES) - 1), st.integers(5, 60), st.lists(_EDITS, min_size=1, max_size=6))
def test_any_edited_recipe_is_read_or_refused(
    start: int, count: int, edits: list[tuple[str, int, int, list[str]]]
) -> None:
    lines = _LINES[start : start + count]
    for edit, at, to, words in edits:
        at, to = at % len(lines), to % len(lines)
        if edit == "drop":
            lines[at] = ""
        elif edit == "twice":
            lines.insert(to, lines[at])
        elif edit == "swap":
            lines[at], lines[to] = lines[to], lines[at]
        elif edit == "indent":
            lines[at] = " " * to + lines[at]
        elif edit == "value":
            lines[at] = lines[at].partition(":")[0] + ": " + "".join(words)
        else:
            lines[at] = lines[at][:to]
    try:
        recipe = parse("\n".join(lines))
    except UserError as error:
        assert error.problem and error.lines()
    else:
        assert parse(yaml.safe_dump(to_dict(recipe))) == recipe


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(["train.steps", "data", "adapter.alpha", "sample.prompts", "model.build", "x"]),
    st.lists(_TEXT, max_size=8).map("".join),
)
def test_any_override_is_read_or_refused_with_a_message(key: str, text: str) -> None:
    for assignment in (f"{key}={text}", text):
        try:
            parse(MINIMAL, assignment)
        except UserError as error:
            assert error.problem


@pytest.mark.parametrize(("written", "every"), [("true", 1), ("false", 0), ("1", 1), ("3", 3)])
def test_gradient_checkpointing_accepts_every_block_or_every_nth(written: str, every: int) -> None:
    recipe = parse(added("train", f"gradient_checkpointing: {written}"))
    assert recipe.train.checkpointed == every
    assert parse(yaml.safe_dump(to_dict(recipe))).train == recipe.train


@pytest.mark.parametrize(
    ("written", "said"),
    [("0", "between 1 and 10,000"), ("maybe", "true or false, or a whole number"), ("1.5", "a whole number")],
)
def test_gradient_checkpointing_with_an_invalid_value_is_refused(written: str, said: str) -> None:
    assert said in str(refusal(added("train", f"gradient_checkpointing: {written}")))

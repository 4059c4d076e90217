"""Values of a recipe: every number has a range and is never changed silently; `--set` takes text literally."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.config import fields, nets, yaml_reader
from finetune.config.loader import load_recipe, parse_recipe
from finetune.config.schema import Recipe
from finetune.errors import UserError

MINIMAL = "method: lora\nmodel: {family: sd, path: some/model}\nadapter: {rank: 4}\ndata: {path: images}\ntrain: {steps: 10}\n"


def parse(*overrides: str) -> Recipe:
    return parse_recipe(MINIMAL, "my.yaml", "my", overrides)


def sections(declared: type, name: str = "") -> Iterator[tuple[str, type, dataclasses.Field[Any]]]:
    """(dotted key, declared type, field) of every key below a section."""
    for key, kind in yaml_reader.hints_of(declared).items():
        (field,) = (one for one in dataclasses.fields(declared) if one.name == key)
        dotted = f"{name}.{key}" if name else key
        inner = [kind, *typing.get_args(kind)]
        nested = [one for one in inner if dataclasses.is_dataclass(one)]
        if nested:
            yield from sections(typing.cast(type, nested[0]), dotted)
        else:
            yield dotted, kind, field


def every_key() -> Iterator[tuple[str, type, dataclasses.Field[Any]]]:
    yield from sections(Recipe)
    for family in nets.families():
        declared = nets.section(family)
        assert declared is not None
        yield from sections(declared, f"net ({family})")


def test_every_number_has_a_lower_and_an_upper_bound() -> None:
    missing = []
    for key, kind, field in every_key():
        kinds = {
            kind,
            *typing.get_args(kind),
            *(one for part in typing.get_args(kind) for one in typing.get_args(part)),
        }
        if kinds & {int, float} and not (
            {"minimum", "above"} & field.metadata.keys() and {"maximum", "below"} & field.metadata.keys()
        ):
            missing.append(key)
    assert not missing


def test_every_default_is_within_its_range() -> None:
    for key, _, field in every_key():
        if field.default is not dataclasses.MISSING:
            assert fields.outside(field.default, field.metadata) is None, key


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "train.seed=9223372036854775808",
            "train.seed must be between 0 and 9,223,372,036,854,775,807, not 9223372036854775808",
        ),
        ("train.seed=-1", "train.seed must be between 0 and 9,223,372,036,854,775,807, not -1"),
        ("sample.seed=1e19", "sample.seed must be between 0 and 9,223,372,036,854,775,807, not 10000000000000000000"),
        ("train.batch_size=1e30", "train.batch_size must be between 1 and 16,384, not 1e+30"),
        ("train.batch_size=100000", "train.batch_size must be between 1 and 16,384, not 100000"),
        ("train.batch_size=1e999999999", "train.batch_size must be a whole number of at most 40 digits"),
        ("train.steps=1e15", "train.steps must be between 1 and 1,000,000,000, not 1000000000000000"),
        ("adapter.alpha=1e308", "adapter.alpha must be greater than 0 and at most 1,000,000, not 1e+308"),
        ("adapter.rank_pattern={to_q: 0}", "adapter.rank_pattern must be between 1 and 8,192, not 0"),
        ("optimizer.eps=1e308", "optimizer.eps must be greater than 0 and at most 1, not 1e+308"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas must be at least 0 and less than 1, not 1"),
        ("train.epochs=1e9", "train.epochs must be greater than 0 and at most 1,000,000, not 1e+09"),
        ("train.batch_size=2.5", 'train.batch_size must be a whole number, not "2.5"'),
        ("optimizer.lr=1e400", 'optimizer.lr must be a finite number, not "1e400"'),
    ],
)
def test_number_out_of_range_is_refused_with_the_range(assignment: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(assignment)
    key = assignment.partition("=")[0]
    assert caught.value.problem.startswith(message)
    assert caught.value.where == f"--set {key}, {key}"
    assert caught.value.remedy


@pytest.mark.parametrize("seed", [2**53 + 1, 2**62 + 1, 2**63 - 1])
def test_whole_numbers_are_not_rounded(seed: int) -> None:
    assert parse(f"train.seed={seed}").train.seed == seed
    assert parse(f"train.seed={seed}.0").train.seed == seed


@pytest.mark.parametrize(
    "text",
    [
        "D/cats #2",
        "a: b",
        "@x",
        "'a",
        "[a] b",
        "[a",
        "{a}",
        "*a",
        "&a",
        "!a",
        "%a",
        "a, b",
        " leading and trailing ",
        "emo😀",
        "C:\\Users\\me",
        "a=b",
        "no",
        "1e5",
        "- a",
        "|",
        "'a' and 'b'",
        "tab\there",
    ],
)
def test_set_takes_text_literally(text: str) -> None:
    recipe = parse(f"data.path={text}", f"output.folder={text}", f"model.path={text}", f"sample.negative={text}")
    assert (recipe.data.path, recipe.output.folder) == (text, text)
    assert (recipe.model.path, recipe.sample.negative) == (text, text)


def test_set_unquotes_a_quoted_value() -> None:
    assert parse('data.path="D/cats #2"').data.path == "D/cats #2"
    assert parse("data.path='it''s'").data.path == "it's"
    assert parse("data.path='null'").data.path == "null"


def test_set_null_is_none_only_where_none_is_allowed() -> None:
    assert parse("output.folder=null").output.folder is None
    assert parse("adapter.init_lora=").adapter.init_lora is None  # type: ignore[union-attr]
    assert parse("sample.negative=null").sample.negative == "null"


def test_set_reads_other_values_as_yaml() -> None:
    assert parse("sample.prompts=[a cat, 'a: b', emo😀]").sample.prompts == ("a cat", "a: b", "emo😀")
    assert parse("train.ema=null").train.ema is None
    assert parse("data.path=", "data.sources=[{path: 'D/cats #2', repeats: 2}]").data.sources[0].path == "D/cats #2"


def test_recipe_named_without_its_ending_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(MINIMAL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_recipe("mine")
    assert caught.value.remedy == 'did you mean the file "mine.yaml"?'
    with pytest.raises(UserError) as caught:
        load_recipe("zzz")
    assert caught.value.remedy == "`ft recipes` lists them"

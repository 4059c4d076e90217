"""The recipe reference (`ft recipes keys`, docs/reference/recipe.md), from the sections' metadata. Torch-free."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune.config import fields, nets, renamed, yaml_reader
from finetune.config.schema import Recipe
from finetune.errors import UserError, did_you_mean
from finetune.models import registry

FIRST_VERSION = "0.1"
RENAMED_IN = "0.2"
WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Any: "any value"}


@dataclass(frozen=True)
class Key:
    """One key of a section.

    Attributes:
        section: dotted, such as `adapter`, `data.sources` or `net`.
        type: in words, with the choices of a choice.
        default: as YAML; "required" if the key has none.
        since: the version that introduced it; for a renamed key also the old name.
    """

    section: str
    name: str
    type: str
    default: str
    range: str
    help: str
    effect: str
    choices: dict[str, str]
    since: str

    @property
    def meaning(self) -> str:
        """The meaning and the effect, in sentences."""
        return " ".join(part for part in (self.help, self.effect) if part)


@dataclass(frozen=True)
class Section:
    """A section of the recipe, or the `net` section of one family; `name` is what `ft recipes keys` calls it."""

    name: str
    title: str
    keys: tuple[Key, ...]


def sections() -> dict[str, Section]:
    """All sections by name, in the order of the schema; the `net` section of a family as `net.FAMILY`."""
    by_name: dict[str, Section] = {"recipe": _section("recipe", Recipe, "")}
    for name, kind in yaml_reader.hints_of(Recipe).items():
        if name == "net":
            by_name |= {f"net.{family}": _section(f"net.{family}", _net(family), "net") for family in nets.families()}
        elif (declared := _dataclass_in(kind)) is not None:
            by_name[name] = _section(name, declared, name)
            if name == "data":
                sources = typing.cast(type, _dataclass_in(yaml_reader.hints_of(declared)["sources"]))
                by_name["data.sources"] = _section("data.sources", sources, "data.sources")
    return by_name


def find(name: str) -> list[Section]:
    """The sections that `name` selects.

    Args:
        name: `adapter`, `net` (all families), `net.dcgan`, `dcgan` or a key such as `adapter.rank`.

    Raises:
        UserError: there is no such section or key.
    """
    known = sections()
    if name in known:
        return [known[name]]
    if name == "net":
        return [section for title, section in known.items() if title.startswith("net.")]
    if f"net.{name}" in known:
        return [known[f"net.{name}"]]
    title, _, key = name.rpartition(".")
    keys = tuple(one for one in known[title].keys if one.name == key) if title in known else ()
    if keys:
        return [dataclasses.replace(known[title], keys=keys)]
    candidates = [*known, *(f"{title}.{one.name}" for title, section in known.items() for one in section.keys)]
    remedy = did_you_mean(name, candidates) if title in known or title == "" else "`ft recipes keys` lists the sections"
    raise UserError(f'no section or key of a recipe is called "{name}"', remedy=remedy)


def _net(family: str) -> type:
    declared = nets.section(family)
    assert declared is not None, family
    return declared


def _section(name: str, declared: type, prefix: str) -> Section:
    hints, by_name = yaml_reader.hints_of(declared), {one.name: one for one in dataclasses.fields(declared)}
    keys = tuple(
        _key(prefix, by_name[key], kind)
        for key, kind in hints.items()
        if prefix or (_dataclass_in(kind) is None and key != "net")
    )
    if prefix == "net":
        title = f"The network of {registry.spec_of(name.removeprefix('net.')).title}."
    elif declared is Recipe:
        title = "The top level of a recipe."
    else:
        title = " ".join((declared.__doc__ or "").partition("\n\n")[0].split())
    return Section(name, title, keys)


def _key(section: str, field: dataclasses.Field[Any], kind: Any) -> Key:
    data = field.metadata
    table = "tokens" if section == "tokens" else section
    old = [name for name, new in renamed.KEYS.get(table, {}).items() if new == field.name]
    since = data.get("since", FIRST_VERSION)
    if old:
        since = f"{since} as {' or '.join(f'`{name}`' for name in old)}; {RENAMED_IN} by this name"
    words = " or ".join([_type_words(kind), *(f"`{word}`" for word in data.get("words", {}))])
    if data.get("unit"):
        words += f" ({data['unit']})"
    return Key(
        section=section,
        name=field.name,
        type=words,
        default=_default(field),
        range=fields.range_words(data),
        help=data.get("help", ""),
        effect=data.get("effect", ""),
        choices=dict(data.get("choices", {})),
        since=since,
    )


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "{}"
    value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, str):
        return value or '""'
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_words(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if one is types.NoneType else _type_words(one) for one in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(f"`{one}`" for one in arguments)
    if origin is tuple:
        return "list of sections" if dataclasses.is_dataclass(arguments[0]) else f"list of: {_type_words(arguments[0])}"
    if origin is dict:
        return f"section of: {_type_words(arguments[1])}"
    return "section" if dataclasses.is_dataclass(kind) else WORDS[kind]


def _dataclass_in(kind: Any) -> type | None:
    """The section within a declared type: `Adapter` of `Adapter | None`, `Source` of `tuple[Source, ...]`."""
    return next(
        (one for one in (kind, *typing.get_args(kind)) if isinstance(one, type) and dataclasses.is_dataclass(one)), None
    )


# -- text -------------------------------------------------------------------------------------------------------------


def text(chosen: list[Section]) -> str:
    """Sections as plain text, for the terminal."""
    return "\n\n".join("\n".join(_section_lines(section)) for section in chosen)


def _section_lines(section: Section) -> Iterator[str]:
    yield f"{section.name}: {section.title}" if section.title else section.name
    for key in section.keys:
        limits = f", {key.range}" if key.range else ""
        default = "required" if key.default == "required" else f"default {key.default}"
        yield ""
        yield f"  {_dotted(key)}: {key.type}{limits}; {default}"
        yield f"      {key.meaning}"
        yield from (f"      - {choice}: {meaning}" for choice, meaning in key.choices.items())
        yield f"      Since {key.since}."


def _dotted(key: Key) -> str:
    return f"{key.section}.{key.name}" if key.section else key.name


def overview() -> str:
    """The sections and the names of their keys, as plain text."""
    lines = []
    for section in sections().values():
        lines += [f"{section.name}: {section.title}".rstrip(": "), f"    {', '.join(key.name for key in section.keys)}"]
    return "\n".join(lines)


# -- Markdown ---------------------------------------------------------------------------------------------------------


def markdown() -> str:
    """docs/reference/recipe.md."""
    parts = [
        "# Recipe reference",
        "This page is generated from `finetune/config/` by `python tools/generate_docs.py recipe`. "
        "`ft recipes keys SECTION` prints the same in a terminal, and editors that know the YAML language server "
        "complete and check keys by `recipe.schema.json`, which the first line of each bundled recipe names.",
        "A recipe is a YAML file. Every key has one type; unknown keys, wrong types and values out of range are "
        "errors with file and line. `--set section.key=value` sets a key on the command line. Where a key is text, "
        "`--set` takes the "
        "value as it stands; other values are YAML. Old names of keys are accepted until version 0.3; "
        "`ft recipes migrate FILE` rewrites them.",
    ]
    for section in sections().values():
        parts += [f"## `{section.name}`", *([_prose(section.title)] if section.title else []), _table(section)]
    return "\n\n".join(parts) + "\n"


def _table(section: Section) -> str:
    head = ["| Key | Type | Default | Meaning and effect | Since |", "|---|---|---|---|---|"]
    rows = []
    for key in section.keys:
        kind = _prose(key.type + (f"; {key.range}" if key.range else ""))
        choices = "".join(f"<br>`{choice}`: {_prose(meaning)}" for choice, meaning in key.choices.items())
        default = key.default if key.default == "required" else f"`{key.default}`"
        rows.append(f"| `{_dotted(key)}` | {kind} | {default} | {_prose(key.meaning)}{choices} | {key.since} |")
    return "\n".join(head + rows)


def _prose(words: str) -> str:
    return words.replace("|", "\\|")

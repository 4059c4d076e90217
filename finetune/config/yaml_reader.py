"""YAML read by declared types: the reader behind `Recipe`.

PyYAML's implicit typing surprises people: `lr: 1e-4` is a *string*, `prompt: no` is False. So nothing implicit is used:
the file is composed to nodes, each scalar keeps the text that was written and the line it stands on, and `build` turns
the text into what the dataclass declares. Unknown and repeated keys, wrong types and values out of range are errors
that name file, line and key. Anchors, aliases and tags are not read: a recipe is as long as it looks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import decimal
import functools
import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from finetune.config import fields
from finetune.errors import UserError, did_you_mean

MAXIMUM_DEPTH = 12
MAXIMUM_LENGTH = 1 << 18  # characters: a recipe has some hundreds
LOADER = getattr(
    yaml, "CSafeLoader", yaml.SafeLoader
)  # the same nodes; in C, where PyYAML was built with it, ten times sooner
MAX_DIGITS = 40  # of a whole number: beyond every range, and short enough to handle
NULLS = {"null", "~", ""}
TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Node:
    """One value of the file: `content` is a str (scalar), a list of Nodes or a dict of name → Node."""

    content: str | list[Node] | dict[str, Node]
    where: str
    quoted: bool = False

    @property
    def empty(self) -> bool:
        """Whether it is one of YAML's words for nothing, unquoted."""
        return isinstance(self.content, str) and not self.quoted and self.content.lower() in NULLS


def read(text: str, name: str, what: str = "a recipe", example: str = "see `ft recipes show lora/emoji`") -> Node:
    """Parse `text` to a tree of Nodes.

    Args:
        name: of the file, for errors.
        what: the kind of file, for errors.
        example: where to see a correct one, for errors.

    Raises:
        UserError: not YAML, an alias or a tag, a repeated key, nested too deep, or not a mapping at the top.
    """
    root = _compose(text, name)
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{what} is a list of `key: value` lines", where=name, remedy=example)
    return _node(root, name)


def of_plain(values: dict[str, Any], name: str) -> Node:
    """The Node of plain values, such as JSON gives: what was written by a program and not by a person."""
    return read(json.dumps(values), name)


def _compose(text: str, name: str) -> yaml.Node | None:
    """PyYAML's nodes; aliases and tags are errors.

    The parser's events are checked first: on deep nesting, libyaml's composer overflows the stack, and its parser takes
    minutes.
    """
    if len(text) > MAXIMUM_LENGTH:
        raise UserError(
            f"longer than {MAXIMUM_LENGTH:,} characters", where=name, remedy="give a file that a person wrote"
        )
    depth = 0
    try:
        for event in yaml.parse(text, Loader=LOADER):
            where = f"{name}:{_line(event.start_mark)}"
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAXIMUM_DEPTH + 1:
                raise UserError(f"nested deeper than {MAXIMUM_DEPTH} levels", where=where)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise UserError(
                    "anchors and aliases (& and *) are not read here", where=where, remedy="write the value out"
                )
            if (tag := getattr(event, "tag", None)) not in (None, "!"):
                raise UserError(f"tags such as {tag} are not read here", where=where, remedy="write the plain value")
        return yaml.compose(text, Loader=LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
        if "\t" in line[: len(line) - len(line.lstrip())]:
            raise UserError(
                "a line is indented with a tab; YAML allows only spaces",
                where=f"{name}:{_line(mark)}",
                remedy="replace the tab with spaces",
            ) from error
        raise UserError(
            f"not valid YAML: {error.problem or error.context}",
            where=f"{name}:{_line(mark)}" if mark else name,
            remedy="check the indentation and quotes of this line and the one before",
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"not valid YAML: {error}", where=name) from error


def _line(mark: Any) -> int:
    """Counted from 1. (`Any`: PyYAML's types allow for marks that it never leaves out.)"""
    return int(mark.line) + 1


def _node(node: yaml.Node, name: str) -> Node:
    where = f"{name}:{_line(node.start_mark)}"
    if isinstance(node, yaml.SequenceNode):
        return Node([_node(child, name) for child in node.value], where)
    if isinstance(node, yaml.MappingNode):
        children: dict[str, Node] = {}
        for key, value in node.value:
            line = f"{name}:{_line(key.start_mark)}"
            if not isinstance(key, yaml.ScalarNode):
                raise UserError("a key must be a plain word", where=line)
            if key.value in children:
                raise UserError(f'"{key.value}" is given twice', where=line, remedy="keep one of the two lines")
            # A value that stands on a later line than its key is pointed at by its key.
            children[key.value] = dataclasses.replace(_node(value, name), where=line)
        return Node(children, where)
    return Node(node.value, where, quoted=getattr(node, "style", None) in ("'", '"', "|", ">"))


def override(
    root: Node, assignment: str, declared: Any = None, rename: Callable[[list[str]], list[str]] = list
) -> Node:
    """Apply one `--set section.key=value`.

    Where the key's declared type is text, the value is taken as it stands: `data.path=D/cats #2` names that folder.
    Text in matching quotes is unquoted, and `null` is None where the type allows it. Other values are read as YAML, so
    lists and sections can be given too.

    Args:
        declared: the dataclass of the whole file, which knows the keys' types; None: every value is YAML.
        rename: gives the key's current name, from its parts and to its parts.
    """
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or len(keys) > MAXIMUM_DEPTH:
        raise UserError(f"--set needs KEY=VALUE, not {assignment!r}", remedy="for example: --set train.batch_size=2")
    where, keys = f"--set {path.strip()}", rename(keys)
    if _is_text(declared, keys):
        quoted = _unquoted(text)
        value = Node(text if quoted is None else quoted, where, quoted=quoted is not None)
    else:
        composed = _compose(text, where)
        value = Node("", where) if composed is None else dataclasses.replace(_node(composed, where), where=where)
    return _with(root, keys, value, where)


def _is_text(declared: Any, keys: list[str]) -> bool:
    """Whether the value at a dotted key is declared as `str` or `str | None`."""
    for key in keys:
        kinds = [kind for kind in (typing.get_args(declared) or (declared,)) if kind is not types.NoneType]
        section = kinds[0] if len(kinds) == 1 else None
        if not dataclasses.is_dataclass(section) or key not in (hints := hints_of(typing.cast(type, section))):
            return False
        declared = hints[key]
    return declared is str or set(typing.get_args(declared)) == {str, types.NoneType}


def _unquoted(text: str) -> str | None:
    """The content of a text that is one quoted YAML scalar as a whole; None: it is none."""
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    return node.value if isinstance(node, yaml.ScalarNode) and node.style == text[0] else None


def _with(node: Node, keys: list[str], value: Node, where: str) -> Node:
    if not keys:
        return value
    children = dict(node.content) if isinstance(node.content, dict) else {}
    children[keys[0]] = _with(children.get(keys[0], Node({}, where)), keys[1:], value, where)
    return Node(children, node.where)


def lines(node: Node, key: str = "") -> dict[str, str]:
    """The place of each value: dotted key → `file:line`."""
    by_key = {key: node.where} if key else {}
    if isinstance(node.content, dict):
        for name, child in node.content.items():
            by_key |= lines(child, f"{key}.{name}" if key else name)
    return by_key


def build(declared: Any, node: Node, key: str = "") -> Any:
    """The value of `node` as the declared type: a frozen dataclass, X | None, tuple[X, ...], dict, Literal or a scalar.

    Raises:
        UserError: naming `node.where` and `key` (dotted, such as `train.batch_size`).
    """
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin in (typing.Union, types.UnionType):
        if node.empty and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        return build(kinds[0], node, key) if len(kinds) == 1 else _either(kinds, node, key)
    if dataclasses.is_dataclass(declared):
        return _build_dataclass(typing.cast(type, declared), node, key)
    if origin is tuple:
        if not isinstance(node.content, list):
            raise _wrong(node, key, "a list, one `- value` a line or [a, b]")
        return tuple(build(arguments[0], child, f"{key}[{i}]") for i, child in enumerate(node.content))
    if origin is dict:
        return _untyped_mapping(node, key) if arguments[1] is Any else _mapping(arguments[1], node, key)
    if not isinstance(node.content, str):
        raise _wrong(node, key, "one value")
    if origin is typing.Literal:
        if node.content not in arguments:
            raise UserError(
                f'"{node.content}" is not a choice of {key}',
                where=f"{node.where}, {key}",
                remedy=did_you_mean(node.content, arguments),
            )
        return node.content
    return _scalar(declared, node, key)


def _either(kinds: list[Any], node: Node, key: str) -> Any:
    """The value as the first of several scalar types that it is."""
    for kind in kinds:
        with contextlib.suppress(UserError):
            return build(kind, node, key)
    raise _wrong(node, key, ", or ".join(_name(kind) for kind in kinds))


@functools.cache
def hints_of(declared: type) -> dict[str, Any]:
    """The types of what a section may say, by name."""
    types_by_name = typing.get_type_hints(declared)
    return {
        field.name: types_by_name[field.name]
        for field in dataclasses.fields(declared)
        if not field.metadata.get("internal")
    }


def _build_dataclass(declared: type, node: Node, key: str) -> Any:
    if not isinstance(node.content, dict):
        raise _wrong(node, key, "a section of `key: value` lines")
    hints = hints_of(declared)
    prefix = f"{key}." if key else ""
    for name, child in node.content.items():
        if name not in hints:
            raise UserError(
                f'unknown key "{name}"{f" in {key}" if key else ""}',
                where=f"{child.where}, {prefix}{name}",
                remedy=did_you_mean(name, hints),
            )
    values = {}
    for field in dataclasses.fields(declared):
        if field.name in node.content:
            child = node.content[field.name]
            words = field.metadata.get("words", {})
            if isinstance(child.content, str) and child.content.lower() in words:
                values[field.name] = words[child.content.lower()]
                continue
            value = build(hints[field.name], child, prefix + field.name)
            _check_range(value, field, child, prefix + field.name)
            values[field.name] = value
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            remedy = f"add a line `{field.name}: …`" + (f" under {key}" if key else "")
            raise UserError(f'"{prefix}{field.name}" is missing', where=node.where, remedy=remedy)
    return declared(**values)


def _check_range(value: Any, field: dataclasses.Field[Any], node: Node, key: str) -> None:
    wrong = fields.outside(value, field.metadata)
    if wrong is not None:
        allowed = fields.range_words(field.metadata)
        raise UserError(
            f"{key} must be {allowed}, not {_given(wrong)}",
            where=f"{node.where}, {key}",
            remedy=f"set {key} to a value {allowed}",
        )


def _given(number: int | float) -> str:
    """A number out of range, short: `1e30` and not 31 digits."""
    return f"{number:g}" if isinstance(number, float) or abs(number) >= 10**20 else str(number)


def _scalar(declared: Any, node: Node, key: str) -> Any:
    text = typing.cast(str, node.content)
    if declared is str:
        return text
    if node.empty:
        raise _wrong(node, key, f"a value ({_name(declared)})")
    if declared is bool:
        if text.lower() not in TRUTHS:
            raise _wrong(node, key, "true or false")
        return TRUTHS[text.lower()]
    return _whole(node, key) if declared is int else _finite(node, key)


def _whole(node: Node, key: str) -> int:
    """A whole number, exactly as written: `9007199254740993` is not rounded to a float on the way."""
    text = typing.cast(str, node.content).strip().replace("_", "")
    try:
        number = decimal.Decimal(text)
    except decimal.InvalidOperation:
        raise _wrong(node, key, _name(int)) from None
    if not number.is_finite() or (number.adjusted() < MAX_DIGITS and number != number.to_integral_value()):
        raise _wrong(node, key, _name(int))
    if number.adjusted() >= MAX_DIGITS:
        raise _wrong(node, key, f"a whole number of at most {MAX_DIGITS} digits")
    return int(number)


def _finite(node: Node, key: str) -> float:
    text = typing.cast(str, node.content)
    try:
        number = float(text.replace("_", ""))
    except ValueError:
        raise _wrong(node, key, _name(float)) from None
    if not math.isfinite(number):
        raise _wrong(node, key, "a finite number")
    return number


def _mapping(declared: Any, node: Node, key: str) -> dict[str, Any]:
    if not isinstance(node.content, dict):
        raise _wrong(node, key, "a section of `key: value` lines")
    return {name: build(declared, child, f"{key}.{name}") for name, child in node.content.items()}


def _untyped_mapping(node: Node, key: str) -> dict[str, Any]:
    """A free mapping for the arguments of another library's class: scalars by YAML's rules, but 1e-4 is a number."""
    if not isinstance(node.content, dict):
        raise _wrong(node, key, "a section of `key: value` lines")
    return {name: _untyped(child, f"{key}.{name}") for name, child in node.content.items()}


def _untyped(node: Node, key: str) -> Any:
    if isinstance(node.content, dict):
        return _untyped_mapping(node, key)
    if isinstance(node.content, list):
        return [_untyped(child, key) for child in node.content]
    if node.quoted:
        return node.content
    if node.empty:
        return None
    if node.content.lower() in ("true", "false"):
        return node.content.lower() == "true"
    for kind in (int, float):
        try:
            return kind(node.content)
        except ValueError:
            continue
    return node.content


def _name(declared: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(declared, str(declared))


def _wrong(node: Node, key: str, wanted: str) -> UserError:
    given = (
        f'"{node.content}"'
        if isinstance(node.content, str)
        else "a list"
        if isinstance(node.content, list)
        else "a section"
    )
    where = f"{node.where}, {key}" if key else node.where
    return UserError(f"{key or 'the recipe'} must be {wanted}, not {given}", where=where, remedy=f"write {wanted}")

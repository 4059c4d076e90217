"""Fields of a recipe's sections: each carries its documentation and its allowed range as metadata. Torch-free.

`finetune.config.reference` generates the recipe reference, `ft recipes keys` and the JSON Schema from this metadata.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

BOUNDS = ("minimum", "above", "maximum", "below")  # `minimum` and `maximum` are allowed values, `above` and `below` not
MAX_COUNT = 1_000_000_000  # of steps and the like: more is a typing error
MAX_SEED = 2**63 - 1  # torch's and NumPy's generators take 64 bits, JSON readers often 63


def field(default: Any, help: str, **metadata: Any) -> Any:
    """A documented dataclass field.

    Args:
        default: the value when the recipe leaves the key out; `dict` stands for an empty dictionary.
        help: what the key means, in one sentence.
        metadata: `effect` (what a larger value or another choice does), `unit`, `choices` (value → meaning), `since`
            (the version that introduced the key, if not 0.1), `words` (words that stand for a value, such as auto),
            and the range: `minimum` or `above`, `maximum` or `below`.
    """
    described = describe(help, **metadata)
    if default is dict:
        return dataclasses.field(default_factory=dict, metadata=described)
    return dataclasses.field(default=default, metadata=described)


def describe(help: str, **metadata: Any) -> dict[str, Any]:
    """The metadata of a field, for fields without a default: `dataclasses.field(metadata=describe(…))`."""
    unknown = metadata.keys() - {"effect", "unit", "choices", "since", "words", *BOUNDS}
    if unknown:
        raise TypeError(f"unknown metadata of a field: {', '.join(sorted(unknown))}")
    return {"help": help, **metadata}


def outside(value: Any, metadata: Mapping[str, Any]) -> Any | None:
    """The first number in `value` (a number, or a tuple or dictionary of them) outside the field's range, or None."""
    return next((one for one in _numbers(value) if not _within(one, metadata)), None)


def range_words(metadata: Mapping[str, Any]) -> str:
    """The allowed range in words: `between 1 and 16`, `greater than 0 and at most 1000`; "" if there is none."""
    low, high = metadata.get("minimum"), metadata.get("maximum")
    if low is not None and high is not None:
        return f"between {_shown(low)} and {_shown(high)}"
    words = {"minimum": "at least", "above": "greater than", "maximum": "at most", "below": "less than"}
    return " and ".join(f"{words[name]} {_shown(metadata[name])}" for name in BOUNDS if name in metadata)


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, dict):
        value = tuple(value.values())
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, int | float) and not isinstance(one, bool):
            yield one


def _within(value: int | float, metadata: Mapping[str, Any]) -> bool:
    return (
        metadata.get("minimum", value) <= value <= metadata.get("maximum", value)
        and ("above" not in metadata or value > metadata["above"])
        and ("below" not in metadata or value < metadata["below"])
    )


def _shown(bound: int | float) -> str:
    return f"{int(bound):,}" if bound == int(bound) else f"{bound:g}"


def replaced(section: type, name: str, default: Any) -> Any:
    """The field `name` of another section with another default."""
    (found,) = (one for one in dataclasses.fields(section) if one.name == name)
    return dataclasses.field(default=default, metadata=dict(found.metadata))

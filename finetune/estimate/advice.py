"""Advice for a run that does not fit: memory options in words and as `--set` arguments, for `ft estimate` and `ft
train`.
"""

from __future__ import annotations

import shlex

from finetune.estimate.constants import GIB
from finetune.estimate.forecast import Forecast, MemoryOption, exhausted, fitting, memory_options

MOST_WAYS = 4  # combinations of memory options that are listed


def advice(one: Forecast) -> list[tuple[str, str]]:
    """For a run that does not fit: rows (memory saved, time and quality cost with the `--set` arguments), fastest
    first.
    """
    if len(one.profile.variants) == 1:  # a trace covers this configuration only
        return [(assignment(option), f"not traced; {option.cost}") for option in memory_options(one.recipe)]
    found = fitting(one)[:MOST_WAYS]
    if not found:
        if exhausted(one):
            return [("none", "does not fit even with every memory option: use a larger GPU or a smaller model")]
        return [("none", "the memory options that the cost profile covers are not enough: try others with --trace")]
    rows = []
    for edited in found:
        saved, slower = (one.memory.peak - edited.memory.peak) / GIB, edited.hours / one.hours - 1
        rows.append(
            (
                f"−{saved:.1f} GiB",
                f"{slower:+.0%} time  {sets(edited)}  ({'; '.join(option.cost for option in edited.edits)})",
            )
        )
    return rows


def sets(one: Forecast) -> str:
    """The `--set` arguments for a forecast's memory options, with the accumulation that makes up for a smaller batch."""
    made = dict(edit for option in one.edits for edit in ((option.key, option.value), *option.also))
    if {"train.batch_size", "train.accumulation"} & made.keys():
        made["train.accumulation"] = one.recipe.train.accumulation
    return " ".join(f"--set {shlex.quote(_yaml(key, value))}" for key, value in made.items())


def assignment(option: MemoryOption) -> str:
    """`key=value` in YAML for everything that the option sets."""
    return " ".join(_yaml(key, value) for key, value in ((option.key, option.value), *option.also))


def _yaml(key: str, value: object) -> str:
    text = (
        "null"
        if value is None
        else str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else value
    )
    return f"{key}={text}"

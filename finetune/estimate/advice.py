"""The edits that bring a run into a GPU's memory, in words and as `--set` takes them: the same in `ft estimate` and `ft train`."""

from __future__ import annotations

import shlex

from finetune.estimate.constants import GIB
from finetune.estimate.forecast import Forecast, MemoryOption, fitting, memory_options

MOST_WAYS = 4  # to make it fit, that are named


def advice(one: Forecast) -> list[tuple[str, str]]:
    """For a run that does not fit: what each way to make it fit saves, and what it costs; cheapest in time first."""
    if len(one.profile.variants) == 1:  # a trace of this configuration says nothing of others
        return [(assignment(option), f"not traced; {option.cost}") for option in memory_options(one.recipe)]
    found = fitting(one)[:MOST_WAYS]
    if not found:
        return [("none", "nothing in the recipe makes it fit: a larger GPU, or a smaller model")]
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
    """The `--set`s that make the edits of this forecast; a smaller batch brings the accumulation that makes up for it."""
    made = dict(edit for option in one.edits for edit in ((option.key, option.value), *option.also))
    if {"train.batch_size", "train.accumulation"} & made.keys():
        made["train.accumulation"] = one.recipe.train.accumulation
    return " ".join(f"--set {shlex.quote(_as_read(key, value))}" for key, value in made.items())


def assignment(option: MemoryOption) -> str:
    """`key=value` as a recipe's YAML reads it, of all that the option sets."""
    return " ".join(_as_read(key, value) for key, value in ((option.key, option.value), *option.also))


def _as_read(key: str, value: object) -> str:
    said = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
    return f"{key}={said}"

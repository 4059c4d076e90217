"""Captions that are longer than a model reads. Torch-free: the caller counts the tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Literal

from finetune.data.example import Example
from finetune.errors import UserError

NAMED = 5  # images that the message names


def long_captions(
    images: Iterable[Example],
    count_tokens: Callable[[str], tuple[int, int] | None],
    long: Literal["stop", "truncate"],
) -> str:
    """One sentence about captions that are longer than the model reads, naming images; "" if there is none.

    Args:
        count_tokens: caption → (its tokens, most tokens that are read); None for a model that reads no captions.
        long: the recipe's `data.long_captions`.

    Raises:
        UserError: there are some, and `long` is stop.
    """
    tokens = functools.lru_cache(1024)(count_tokens)
    seen, count, most, named = 0, 0, 0, list[str]()
    for image in images:
        seen += 1
        length = tokens(image.caption)
        if length is None:
            return ""
        if length[0] > length[1]:
            count, most = count + 1, length[1]
            named += [f"{image.name}: {length[0]} tokens"] if count <= NAMED else []
    if not count:
        return ""
    names = ", ".join(named) + (f", and {count - NAMED} more" if count > NAMED else "")
    problem = f"captions longer than the {most} tokens that this model reads: {count} of {seen}"
    if long == "truncate":
        return f"{problem}; they are truncated ({names})"
    raise UserError(problem, where=names, remedy="shorten them, or set data.long_captions: truncate")

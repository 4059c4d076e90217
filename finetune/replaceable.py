"""Functions whose implementation can be exchanged for a while.

The estimate runs the real training step on fake tensors (`finetune/estimate/tracing`). What reads files or runs a
kernel of its own then needs another implementation: such a function is marked `@replaceable` where it is defined, and
`function.replaced_by(other)` exchanges it for all callers, however they imported it. For the few functions of other
libraries that offer no such hook there is `patched`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Generic, ParamSpec, TypeVar, final

P = ParamSpec("P")
R = TypeVar("R")


@final
class Replaceable(Generic[P, R]):
    """A function that calls its current implementation.

    Attributes:
        original: the function as it was defined.
    """

    def __init__(self, original: Callable[P, R]) -> None:
        functools.update_wrapper(self, original)
        self.original = original
        self._current = original

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._current(*args, **kwargs)

    @contextlib.contextmanager
    def replaced_by(self, implementation: Callable[P, R]) -> Iterator[None]:
        """Within, calls go to `implementation`."""
        before, self._current = self._current, implementation
        try:
            yield
        finally:
            self._current = before


def replaceable(function: Callable[P, R]) -> Replaceable[P, R]:
    """Mark a function as one that can be exchanged (a decorator)."""
    return Replaceable(function)


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within, `owner.name` of another library is `value`.

    Raises:
        RuntimeError: `owner` has no such attribute in the installed release.
    """
    label = f"{getattr(owner, '__name__', owner)}.{name}"
    if not hasattr(owner, name):
        raise RuntimeError(f"the installed release has no {label}, which tracing replaces: use a supported release")
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)

"""Errors meant for people: what is wrong, where, and the edit that mends it. They end a command with exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave, told without a traceback.

    Args:
        problem: one sentence that says what is wrong.
        where: the place to look at, such as `my.yaml:12, train.batch_size` or the path of an image.
        remedy: the edit or the command that mends it.
    """

    def __init__(self, problem: str, *, where: str = "", remedy: str = "") -> None:
        self.problem, self.where, self.remedy = problem, where, remedy
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """The message, one line a part, as the terminal shows it."""
        found = [f"error: {self.problem}"]
        if self.where:
            found.append(f"  where: {self.where}")
        if self.remedy:
            found.append(f"  fix:  {self.remedy}")
        return found


class Stopped(KeyboardInterrupt):
    """A signal ended what was running, as its user wished: no failure.

    Args:
        words: what was stopped, and how to go on.
        number: of the signal; a command ends with 128 + `number`.
    """

    def __init__(self, words: str, number: int) -> None:
        self.number = number
        super().__init__(words)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean "x"?` for the nearest known word, else the list of what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f'did you mean "{near[0]}"?'
    return "known here: " + ", ".join(known)

"""Errors for users: what is wrong, where, and the edit that fixes it. They end a command with exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the user's input, reported without a traceback.

    Args:
        problem: what is wrong, in one sentence.
        where: the place to look at, such as `my.yaml:12, train.batch_size` or the path of an image.
        remedy: the edit or the command that fixes it.
    """

    def __init__(self, problem: str, *, where: str = "", remedy: str = "") -> None:
        self.problem, self.where, self.remedy = problem, where, remedy
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """Return the message as the terminal shows it: the problem, the place and the fix, one line each."""
        lines = [f"error: {self.problem}"]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  fix:  {self.remedy}")
        return lines


class Stopped(KeyboardInterrupt):
    """A signal stopped the command, as the user wished. This is not a failure.

    Args:
        message: what was stopped, and how to resume it.
        number: of the signal; the command ends with exit code 128 + `number`.
    """

    def __init__(self, message: str, number: int) -> None:
        self.number = number
        super().__init__(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean "x"?` with the most similar known word, or the list of known words if none is similar."""
    known = sorted(known)
    similar = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if similar:
        return f'did you mean "{similar[0]}"?'
    return "known here: " + ", ".join(known)

"""Lost modes: when diversity and coverage, watched while training, call for an alarm, and what helps. Torch is not imported here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

LOW = 0.3  # of the real images' diversity: below, most drawn images look alike
AT_FIRST = 0.2  # of the steps, in which a net that knows nothing yet draws the same gray again and again
LOST = 0.5  # of the best value before
HAD_DIVERSITY, HAD_COVERAGE = 0.5, 0.1  # below these there was nothing yet to lose

REMEDIES = {
    "GAN": "net.minibatch: stddev, which shows the critic how alike images are; net.r1 or net.discriminator_norm: spectral, which hold it back;"
    " net.ada_target for few images; a lower optimizer.lr",
    "VAE": "lower net.beta, or give it more steps: latents that carry nothing draw the same image",
}
OTHERWISE = "lower optimizer.lr, go back to an earlier checkpoint, or give it more steps"


@final
@dataclass(frozen=True)
class Look:
    """At a run's images after `step` steps: their diversity ÷ the real ones', and the share of those that has one near it."""

    step: int
    diversity: float
    coverage: float

    @property
    def record(self) -> dict[str, float]:
        """For `metrics.jsonl`."""
        return {"watch.diversity": self.diversity, "watch.coverage": self.coverage}


def looks(records: Sequence[Mapping[str, Any]]) -> list[Look]:
    """Those among the records of `metrics.jsonl`."""
    return [
        Look(int(one["step"]), one["watch.diversity"], one["watch.coverage"])
        for one in records
        if "watch.diversity" in one
    ]


def lost(found: Sequence[Look], steps: int) -> str:
    """What is wrong at the last look, in words, or "" if nothing is; `steps` is how many the run will take."""
    last, before = found[-1], found[:-1]
    best_diversity, best_coverage = (
        max((getattr(look, name) for look in before), default=0.0) for name in ("diversity", "coverage")
    )
    if last.diversity < LOW and last.step >= AT_FIRST * steps:
        return f"drawn images are nearly all alike: {last.diversity:.0%} of the real ones' diversity"
    if best_diversity >= HAD_DIVERSITY and last.diversity < LOST * best_diversity:
        return f"drawn images become alike: diversity fell from {best_diversity:.0%} to {last.diversity:.0%} of the real ones'"
    if best_coverage >= HAD_COVERAGE and last.coverage < LOST * best_coverage:
        return f"kinds of images are being lost: coverage fell from {best_coverage:.0%} to {last.coverage:.0%}"
    return ""


def alarm(found: Sequence[Look], steps: int, kind: str) -> str:
    """`lost` as a sentence for the log with what helps a model of `kind` (`FamilySpec.kind`), or ""."""
    problem = lost(found, steps)
    return f"step {found[-1].step}: {problem}. What helps: {REMEDIES.get(kind, OTHERWISE)}" if problem else ""

"""Mode collapse: when diversity and coverage during training call for a warning, and what helps. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

LOW_DIVERSITY = 0.3  # of the real images' diversity; below this, most generated images look alike
GRACE = 0.2  # of the steps: an untrained network generates the same gray image again and again
DROP = 0.5  # a warning is due below this fraction of the best earlier value
MIN_DIVERSITY, MIN_COVERAGE = 0.5, 0.1  # best values below these are too low for a drop to mean anything

REMEDIES = {
    "GAN": "net.minibatch: stddev, which lets the discriminator see how similar a batch is; net.r1 or"
    " net.discriminator_norm: spectral, which regularize it; net.ada_target for few images; a lower optimizer.lr",
    "VAE": "a lower net.beta or more steps: latents without information all decode to the same image",
}
DEFAULT_REMEDY = "a lower optimizer.lr, an earlier checkpoint, or more steps"


@final
@dataclass(frozen=True)
class Check:
    """Diversity and coverage of a run's samples after `step` steps.

    Attributes:
        step: number of finished steps.
        diversity: of the samples, relative to that of the real images.
        coverage: the share of real images with a sample nearby.
    """

    step: int
    diversity: float
    coverage: float

    @property
    def record(self) -> dict[str, float]:
        """The values as `metrics.jsonl` stores them."""
        return {"watch.diversity": self.diversity, "watch.coverage": self.coverage}


def checks(records: Sequence[Mapping[str, Any]]) -> list[Check]:
    """The checks among the records of `metrics.jsonl`."""
    return [
        Check(int(record["step"]), record["watch.diversity"], record["watch.coverage"])
        for record in records
        if "watch.diversity" in record
    ]


def problem(history: Sequence[Check], steps: int) -> str:
    """Describe what is wrong at the last check, or return "".

    Args:
        history: all checks so far.
        steps: the length of the run.
    """
    last, before = history[-1], history[:-1]
    best_diversity, best_coverage = (
        max((getattr(check, name) for check in before), default=0.0) for name in ("diversity", "coverage")
    )
    if last.diversity < LOW_DIVERSITY and last.step >= GRACE * steps:
        return f"the samples are nearly all alike: {last.diversity:.0%} of the real images' diversity"
    if best_diversity >= MIN_DIVERSITY and last.diversity < DROP * best_diversity:
        fell = f"diversity fell from {best_diversity:.0%} to {last.diversity:.0%} of the real images'"
        return f"the samples are becoming alike: {fell}"
    if best_coverage >= MIN_COVERAGE and last.coverage < DROP * best_coverage:
        fell = f"coverage fell from {best_coverage:.0%} to {last.coverage:.0%}"
        return f"some kinds of images are no longer generated: {fell}"
    return ""


def warning(history: Sequence[Check], steps: int, kind: str) -> str:
    """`problem` as a message for the log with what helps a model of `kind` (`FamilySpec.kind`), or ""."""
    found = problem(history, steps)
    remedy = REMEDIES.get(kind, DEFAULT_REMEDY)
    return f"step {history[-1].step}: {found}. What helps: {remedy}" if found else ""

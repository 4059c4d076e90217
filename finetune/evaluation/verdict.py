"""The verdict of `ft eval` in words: realism, variety and copying, compared with other real images. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GOOD, FAIR = 0.8, 0.5  # of the value that other real images reach; lower is poor
ALL_ALIKE = 0.3  # diversity relative to the real images; lower is a mode collapse
COPIED_MORE = 0.2  # a share of close copies this much above that of other real images indicates copying
COPIED_SHARE = 0.8  # the same without other real images to compare with
EXPECTED_DENSITY, EXPECTED_COVERAGE = 1.0, 1 - 2.0**-5  # of equal distributions (Naeem et al. 2020, §3.3)
FEW_IMAGES = 50  # with fewer, all of this is noisy


def verdict(generated: int, closeness: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    """Summarize the metrics in a line.

    Args:
        generated: the number of generated images.
        closeness: the metrics of the generated images (fields of `evaluate.Closeness`).
        reference: the same metrics of other real images, the best a generator can reach; None: too few images.
    """
    parts = [_realism(closeness, reference), _variety(closeness, reference), _copying(closeness, reference)]
    noisy = f" Only {generated} images: treat this as a rough guide." if generated < FEW_IMAGES else ""
    return " ".join(parts) + noisy


def _grade(value: float, reachable: float) -> str:
    ratio = value / max(reachable, 1e-9)
    return "good" if ratio >= GOOD else "fair" if ratio >= FAIR else "poor"


def _realism(closeness: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    reachable = EXPECTED_DENSITY if reference is None else reference["density"]
    grade = _grade(closeness["density"], reachable)
    if grade == "good":
        return "Realism: good."
    return f"Realism: {grade} (density {closeness['density']:.2f}; real images reach {reachable:.2f})."


def _variety(closeness: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    if closeness["diversity"] < ALL_ALIKE:
        return "Variety: poor (the generated images are nearly all alike)."
    reachable = EXPECTED_COVERAGE if reference is None else reference["coverage"]
    grade = _grade(closeness["coverage"], reachable)
    if grade == "good":
        return "Variety: good."
    covered = f"{closeness['coverage']:.0%} of the real images have a similar generated one"
    return f"Variety: {grade} ({covered}; real images reach {reachable:.0%})."


def _copying(closeness: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    copied = closeness["copied"]
    usual = None if reference is None else reference["copied"]
    if copied is None:
        return "Copying: not checked (the training images are not available)."
    if copied <= (COPIED_SHARE if usual is None else usual + COPIED_MORE):
        return "Copying: no sign of it."
    others = "" if usual is None else f"; of other real images {usual:.0%}"
    return f"Copying: likely ({copied:.0%} are close copies of training images{others}). See nearest.png."

"""What a person sees of a training run: smoothed losses, the held-out loss with the best so far, the newest samples."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import final

from finetune.terminal import Progress

SMOOTHING = 0.98  # of the shown loss: an average over about the last 50 steps

log = logging.getLogger(__name__)


@final
class Smoothed:
    """Exponential moving average whose start is corrected for, as Adam's moments are: the first value counts fully."""

    def __init__(self, decay: float = SMOOTHING) -> None:
        self._decay, self._sum, self._weight = decay, 0.0, 0.0

    def update(self, value: float) -> float:
        """Add a value; returns the average."""
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)
        return self._sum / self._weight


@final
class TrainingProgress:
    """The progress line of a run: `step 40/300 · 0.18 s/step · loss 0.41 · held-out 0.39 (best so far) · ETA 1 min`.

    Args:
        steps: that the run takes in all.
        enabled: on the main process only.
    """

    def __init__(self, steps: int, enabled: bool) -> None:
        self.best: tuple[int, float] | None = None  # (step, held-out loss)
        self._steps, self._enabled = steps, enabled
        self._progress = Progress("step", enabled=enabled)
        self._losses: dict[str, Smoothed] = {}
        self._held_out = self._grid = ""

    def step(self, record: dict[str, float]) -> None:
        """Show a finished step; `record` is its line of `metrics.jsonl`."""
        losses = {key.partition(".")[2]: value for key, value in record.items() if key.startswith("loss.")}
        shown = []
        for name, value in losses.items():
            smooth = self._losses.setdefault(name, Smoothed()).update(value)
            shown.append(f"{name + ' ' if len(losses) > 1 else ''}loss {smooth:.4g}")
        if "validation" in record:
            self._validated(int(record["step"]), record["validation"])
        note = " · ".join([f"{record['seconds']:.2f} s/step", *shown, *([self._held_out] if self._held_out else [])])
        self._progress.show(int(record["step"]), self._steps, note, f"samples: {self._grid}" if self._grid else "")

    def _validated(self, step: int, loss: float) -> None:
        if self.best is None or loss <= self.best[1]:
            self.best = (step, loss)
        best = "best so far" if self.best[0] == step else f"best {self.best[1]:.4g} at step {self.best[0]}"
        self._held_out = f"held-out {loss:.4g} ({best})"
        if self._enabled:
            log.info("step %d · held-out loss %.4g (%s)", step, loss, best)

    def sampled(self, step: int, grid: Path) -> None:
        """Show where the samples of a step are."""
        self._grid = str(grid)
        if self._enabled:
            log.info("step %d · samples: %s", step, grid)

    def end(self) -> None:
        """Leave the last state on the terminal."""
        self._progress.end()

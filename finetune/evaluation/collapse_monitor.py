"""Monitoring of mode collapse during training: every few steps, sample some images and compare them with real ones."""

from __future__ import annotations

from pathlib import Path
from typing import final

from torch import Tensor

from finetune.evaluation.evaluate import as_generated, evenly_spaced, mode_metrics, request_for
from finetune.evaluation.features import extractor
from finetune.evaluation.mode_collapse import Check, checks, warning
from finetune.inference import sample
from finetune.models.registry import spec_of
from finetune.models.scratch.base import PixelModel
from finetune.planning import Plan
from finetune.training.run_list import read_records
from finetune.training.samples import request_of

IMAGES = 128  # sampled per check, and as many real ones: with fewer, coverage is too noisy
BATCH = 64


@final
class CollapseMonitor:
    """Samples from the model during training and measures diversity and coverage.

    Every check uses the same prompts and seeds, so only the weights differ. Earlier checks are read from the run's
    `metrics.jsonl`.

    Args:
        plan: the plan of the run.
        model: the model that trains.
        folder: the run's folder.
    """

    def __init__(self, plan: Plan, model: PixelModel, folder: Path) -> None:
        self._plan, self._model, self._records = plan, model, folder / "metrics.jsonl"
        self._extractor = extractor()
        self._real: Tensor | None = None

    def __call__(self, done: int) -> tuple[dict[str, float], str]:
        """Check the model after `done` steps.

        Returns:
            The values for `metrics.jsonl`, and a warning or "".
        """
        audit = self._model.training_audit()
        records = evenly_spaced(audit.training, min(IMAGES, len(audit.training)))
        if self._real is None:
            self._real = self._extractor.features(as_generated(records, audit.background, self._model.space))
        request = request_for(request_of(self._plan), self._model, [image.caption for image in records], IMAGES)
        generated = [image.thumbnail() for image in sample.generate(self._model, request, BATCH)]
        features = self._extractor.features(generated)
        check = Check(done, **mode_metrics(features, self._real))
        history = [*checks(read_records(self._records)), check]
        return check.record, warning(history, self._plan.steps, spec_of(self._plan.recipe.model.family).kind)

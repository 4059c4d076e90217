"""Lost modes are watched while training: now and then some images are drawn and compared with real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import final

from torch import Tensor

from finetune.evaluation.evaluate import as_drawn, compared, request_for, spread
from finetune.evaluation.features import extractor
from finetune.evaluation.mode_collapse import Look, alarm, looks
from finetune.inference import sample
from finetune.models.registry import spec_of
from finetune.models.scratch.base import PixelModel
from finetune.planning import Plan
from finetune.training.samples import request_of

IMAGES = 128  # drawn at a look, and real ones: with fewer, coverage says little
AT_ONCE = 64


@final
class Watch:
    """Called with the count of finished steps: draws with the model as it is then, and says what it saw.

    The images are the same at every look but for the weights. What was seen before stands in the run's `metrics.jsonl`.
    """

    def __init__(self, plan: Plan, model: PixelModel, folder: Path) -> None:
        self._plan, self._model, self._records = plan, model, folder / "metrics.jsonl"
        self._extractor = extractor()
        self._real: Tensor | None = None

    def __call__(self, done: int) -> tuple[dict[str, float], str]:
        """(what `metrics.jsonl` is told, an alarm or "")."""
        audit = self._model.seen()
        some = spread(audit.training, min(IMAGES, len(audit.training)))
        if self._real is None:
            self._real = self._extractor.features(as_drawn(some, audit.background, self._model.space))
        request = request_for(request_of(self._plan), self._model, [image.caption for image in some], IMAGES)
        look = Look(done, **compared(self._extractor.features(sample.draw(self._model, request, AT_ONCE)), self._real))
        before = self._records.read_text(encoding="utf-8").splitlines() if self._records.is_file() else []
        found = [*looks([json.loads(line) for line in before]), look]
        return look.record, alarm(found, self._plan.steps, spec_of(self._plan.recipe.model.family).kind)

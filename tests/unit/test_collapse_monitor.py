"""The collapse monitor warns of a collapsing generator during training, and only of that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

from finetune.evaluation import collapse_monitor
from finetune.evaluation.mode_collapse import Check, problem, warning
from finetune.job import Job
from finetune.models.base import SampleRequest
from finetune.models.scratch.base import PixelModel
from finetune.report.html_report import write_report
from finetune.rng import Draw
from tests.helpers import scratch, tiny

MONITORED_IMAGES = 24
GOOD = (Check(10, 0.9, 0.4), Check(20, 1.0, 0.5))


@pytest.fixture(autouse=True)
def _monitor_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collapse_monitor, "IMAGES", MONITORED_IMAGES)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ((Check(10, 0.02, 0.0),), ""),  # the network has not learned anything yet
        ((Check(10, 0.02, 0.0), Check(30, 0.05, 0.0)), "nearly all alike: 5%"),
        (GOOD, ""),
        ((*GOOD, Check(30, 0.45, 0.4)), "diversity fell from 100% to 45%"),
        ((*GOOD, Check(30, 0.9, 0.2)), "coverage fell from 50% to 20%"),
        ((*GOOD, Check(30, 0.7, 0.3)), ""),
        ((Check(10, 0.4, 0.04), Check(20, 0.31, 0.01)), ""),  # there was no diversity to lose yet
    ],
)
def test_problem_is_reported_only_when_modes_collapse(found: tuple[Check, ...], told: str) -> None:
    assert told in problem(found, 100) and bool(told) == bool(problem(found, 100))


def test_warning_names_step_and_remedy() -> None:
    said = warning([*GOOD, Check(30, 0.1, 0.0)], 100, "GAN")
    assert said.startswith("step 30: ") and "net.minibatch" in said
    assert warning(GOOD, 100, "GAN") == ""


def monitored_run(folder: Path, *drawn: str, steps: int = 4) -> Job:
    """An untrained run checked every second step; its n-th check sees samples as the n-th of `drawn` says."""
    job = tiny.prepare(scratch.recipe("dcgan", folder, f"train.steps={steps}", "sample.collapse_check_every=2"))
    model = job.model
    assert isinstance(model, PixelModel)
    images, asked = model.examples(12)["pixels"], 0

    def generate(classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor:
        nonlocal asked
        how, asked = drawn[asked // MONITORED_IMAGES], asked + len(draw.batch_indices)
        return images[[place % 12 if how == "healthy" else 0 for place in draw.batch_indices]]

    model.generate = generate  # type: ignore[method-assign]
    job.trainer.observe = None
    return job


def records(job: Job) -> list[dict[str, float]]:
    return [json.loads(line) for line in (job.run.folder / "metrics.jsonl").read_text().splitlines()]


def test_collapse_monitor_of_a_healthy_generator_does_not_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = monitored_run(tmp_path / "run", "healthy", "healthy")
    job.trainer.train()
    assert "What helps" not in caplog.text
    first, second, third, last = records(job)
    assert "watch.diversity" not in first | third
    assert second["watch.diversity"] == last["watch.diversity"] == pytest.approx(1, abs=0.1)
    assert last["watch.coverage"] == 1
    page = write_report(job.run.folder).read_text()
    assert "Modes" in page and "mode collapse at step" not in page


def test_collapse_monitor_of_a_collapsed_generator_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = monitored_run(tmp_path / "run", "healthy", "collapsed")
    job.trainer.train()
    said = caplog.text
    assert (
        "step 4: the samples are nearly all alike: 0% of the real images' diversity. What helps: net.minibatch" in said
        and "step 2: " not in said
    )
    assert records(job)[-1]["watch.diversity"] == 0
    assert "mode collapse at step 4" in write_report(job.run.folder).read_text()


def test_collapse_monitor_after_resume_compares_with_earlier_checks(tmp_path: Path) -> None:
    job = monitored_run(tmp_path / "run", "collapsed", "collapsed", steps=40)
    look = job.trainer.watch
    assert look is not None
    assert look(4) == ({"watch.diversity": 0.0, "watch.coverage": pytest.approx(0.5, abs=0.5)}, ""), (
        "too early: there is nothing to lose yet"
    )
    job.run.log({"step": 2, "watch.diversity": 1.0, "watch.coverage": 0.5})
    assert "diversity fell from 100% to 0%" in look(4)[1]

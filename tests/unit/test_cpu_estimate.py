"""Estimates for this machine's CPU.

How it is calibrated, how long a calibration is kept, and what is derived from it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from finetune import job
from finetune.cli import estimate
from finetune.config.loader import load_recipe
from finetune.errors import UserError
from finetune.estimate.forecast import forecast
from finetune.estimate.hardware import calibrate, cpu
from finetune.estimate.hardware.gpus import this_cpu
from finetune.estimate.monitor import Expected
from finetune.system.cpu_info import cpu_name
from finetune.training.pace import FAR, FEWEST, WARM_UP, Pace, warning
from tests.helpers import tiny
from tests.helpers.estimates import forecast_of, ft


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty at first."""
    monkeypatch.setenv("FT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_keep_freed_memory_reuses_pages_in_the_next_step() -> None:
    def pages() -> int:
        """Page faults so far, after 64 MiB have been allocated and freed."""
        _ = [torch.ones(1 << 22) for _ in range(4)]
        del _
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    cpu.keep_freed_memory()
    taken = [pages() for _ in range(6)]  # at first, small allocations may end up between the large ones
    assert (
        min(later - earlier for earlier, later in itertools.pairwise(taken))
        < (64 << 20) // resource.getpagesize() // 10
    )


# -- calibration ------------------------------------------------------------------------------------------------------


class FakeTime:
    """A clock that advances only in `run`: by (seconds of the thread, seconds in which others have the processor)."""

    def __init__(self, *taken: tuple[float, float]) -> None:
        self._taken: Iterator[tuple[float, float]] = iter(taken)
        self.own = self.away = 0.0

    def thread_time(self) -> float:
        return self.own

    def perf_counter(self) -> float:
        return self.own + self.away

    def run(self) -> None:
        own, away = next(self._taken)
        self.own, self.away = self.own + own, self.away + away


def typical(monkeypatch: pytest.MonkeyPatch, *taken: tuple[float, float]) -> float:
    """The typical seconds of runs that take `taken`; the first is a warm-up."""
    time = FakeTime(*taken)
    monkeypatch.setattr(calibrate, "time", time)
    return calibrate.Clock(sum(map(sum, taken[1:])), patience=1.0).typical(time.run)


def test_calibration_clock_ignores_runs_that_others_disturb(monkeypatch: pytest.MonkeyPatch) -> None:
    assert typical(monkeypatch, (9.0, 0.0), (3.0, 0.0), (1.0, 0.0), (2.0, 0.0)) == 2.0
    # Threads that wait for a preempted one spin, so their own time is longer too.
    assert typical(monkeypatch, (9.0, 0.0), (5.0, 0.2), (1.0, 0.0), (5.0, 0.2), (2.0, 0.0), (5.0, 0.2)) == 1.5
    assert typical(monkeypatch, (9.0, 0.0), (5.0, 0.2), (4.0, 0.3), (6.0, 0.2)) == 4.0


def test_calibration_clock_on_a_busy_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"too busy to calibrate: other programs used it for 1\.2 of 2\.2 s") as refused:
        typical(monkeypatch, *[(0.25, 0.3)] * 9)
    assert "ft estimate --calibrate" in refused.value.remedy


def test_calibration_is_kept_for_each_thread_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_CACHE", str(tmp_path / "cache"))
    count = torch.get_num_threads()
    assert not cpu.calibration(count).measured
    found = calibrate.calibrate(seconds=0.05, patience=math.inf)
    cpu.keep(dataclasses.replace(found, threads=count + 1))
    assert cpu.keep(found).is_relative_to(tmp_path)
    assert cpu.calibration(count) == found and cpu.calibration(count + 1).threads == count + 1
    for kind in cpu.KINDS:
        curve = getattr(found, kind)
        assert all(one[0] < two[0] and 0 < one[1] <= two[1] for one, two in itertools.pairwise(curve.points))
    (tmp_path / "cache" / cpu.FILE).write_text("[{")
    assert not cpu.calibration(count).measured


# -- how long a calibration is kept -----------------------------------------------------------------------------------


def test_calibration_on_a_busy_processor_stops_no_run_and_is_not_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy() -> cpu.Calibration:
        raise UserError("the processor is too busy to be measured")

    monkeypatch.setattr(job, "calibrate", busy)
    tiny.prepare(tiny.recipe("sd15", "lora", folder=tmp_path / "run"))
    assert "the processor is too busy to be measured; the estimate assumes the speed" in caplog.text
    assert not (cache / cpu.FILE).exists()


def pace_on_this_cpu(off: float, steps: int = WARM_UP + FEWEST, measured: bool = True) -> Pace:
    """A pace whose steps take `off` times the estimate for this CPU."""
    known = dataclasses.replace(cpu.calibration(torch.get_num_threads()), measured=measured)
    one = forecast_of("lora/emoji", gpu=dataclasses.replace(this_cpu(), calibration=known))
    pace = Pace(Expected(one), lambda: None)
    pace.seconds = [off * one.speed.seconds] * steps
    return pace


def test_pace_disproves_a_measurement_that_is_far_off() -> None:
    least, most = 0.99 / FAR, 1.01 * FAR
    assert all(pace_on_this_cpu(off).disproved() for off in (least, most))
    assert not any(pace_on_this_cpu(off).disproved() for off in (1.01 / FAR, 1.0, 0.99 * FAR))
    assert not pace_on_this_cpu(most, steps=WARM_UP + FEWEST - 1).disproved()  # too few steps
    assert not pace_on_this_cpu(most, measured=False).disproved()  # nothing was measured
    assert not Pace(Expected(None, "no profile"), lambda: None).disproved()
    on_gpu = forecast_of("lora/emoji")
    pace = Pace(Expected(on_gpu), lambda: None)
    pace.seconds = [most * on_gpu.speed.seconds] * (WARM_UP + FEWEST)
    assert not pace.disproved()


def test_disproved_calibration_is_discarded_and_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    threads = torch.get_num_threads()
    bundled = dataclasses.replace(cpu.calibration(threads), name=cpu_name(), measured=True)
    monkeypatch.setattr(job, "calibrate", lambda: bundled)  # here it may be busy, or a launch may take 0 s
    run = tiny.prepare(tiny.recipe("sd15", "lora", folder=tmp_path / "run"))
    run.trainer.pace = pace_on_this_cpu(2 * FAR)
    wrong = run.trainer.pace.disproved()
    assert wrong is not None
    for one in (
        wrong,
        dataclasses.replace(wrong, threads=wrong.threads + 1),
        dataclasses.replace(wrong, name="another"),
    ):
        cpu.keep(one)
    tiny.finish(run)
    assert caplog.text.count("`ft estimate --calibrate`") == 1 and "has been discarded" in caplog.text
    assert not cpu.calibration(wrong.threads).measured and cpu.calibration(wrong.threads + 1).measured
    cpu.keep(newer := dataclasses.replace(wrong, launch=wrong.launch + 1e-6))
    tiny.finish(run)  # a newer measurement is kept
    assert cpu.calibration(wrong.threads) == newer


def test_pace_warning_on_a_slow_cpu_suggests_other_programs_and_calibration() -> None:
    one = pace_on_this_cpu(1.0).expected.forecast
    assert one is not None
    said = warning(one, 2.5 * one.speed.seconds, None)
    assert (
        " on CPU (" in said
        and "estimated" in said
        and "other programs" in said
        and "`ft estimate --calibrate`" in said
        and "GPU" not in said
    )


# -- estimates --------------------------------------------------------------------------------------------------------


def test_cpu_curve_interpolates_its_points() -> None:
    curve = cpu.Curve(((10.0, 1.0), (1000.0, 100.0)))
    assert [curve.seconds(amount) for amount in (1, 10, 100, 1000, 5000)] == pytest.approx([1, 1, 10, 100, 500])


def test_estimate_without_a_gpu_uses_the_cpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "local_gpu", lambda: None)
    assert ft("--images", "3000") == 0
    said = capsys.readouterr().out
    assert (
        "images on this CPU (" in said
        and "Recommended: lora/emoji: the bundled base is the one that a CPU fine-tunes" in said
    )
    assert ft("scratch/emoji-vae", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpu"] == "cpu" and found["parts"]["Python, PyTorch"] > 0 and "CUDA context" not in found["parts"]


def test_cpu_step_time_is_the_sum_of_its_kernels() -> None:
    """Twice the batch takes longer, but at most twice as long."""
    here = this_cpu()
    once, twice = (
        forecast(load_recipe("scratch/emoji-vae", [f"train.batch_size={batch}"]), "", here, 3000) for batch in (8, 16)
    )
    assert once.speed.seconds == pytest.approx(once.speed.compute + once.speed.bandwidth + once.speed.launch)
    assert once.speed.seconds < twice.speed.seconds <= 2.05 * once.speed.seconds
    assert once.memory.phases["train"] < twice.memory.phases["train"]

"""Two processes equal one with twice the batch: every method, in a single launch, since imports take seconds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from finetune.cli.launcher import launch_arguments
from finetune.config.loader import to_dict
from finetune.config.schema import Recipe
from finetune.errors import UserError
from finetune.paths import RECIPES
from finetune.training import checkpoint
from tests.helpers import scratch, tiny

SCRIPT = Path(__file__).parents[1] / "helpers" / "two_processes.py"
STEPS = 3
# A larger ε keeps Adam from magnifying rounding errors of gradients near zero, so that runs can be compared.
COMPARABLE = (
    "optimizer.eps=1e-4",
    "optimizer.lr=1e-2",
    "optimizer.schedule=constant",
    f"train.steps={STEPS}",
    "sample.prompts=[]",
)
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 5e-5}  # float32: the order of sums, over three steps of Adam


def _tiny(name: str, method: str, *more: str) -> Callable[..., Recipe]:
    return lambda folder, *overrides: tiny.recipe(name, method, *COMPARABLE, *more, *overrides, folder=folder)


def _scratch(name: str) -> Callable[..., Recipe]:
    # Dropout is the one thing that depends on how the batch is split: its masks are for a process's whole batch.
    undropped = ("net.dropout=0",) if "\n  dropout:" in (RECIPES / "scratch" / f"{name}.yaml").read_text() else ()
    return lambda folder, *overrides: scratch.recipe(name, folder, *COMPARABLE, *undropped, *overrides)


CASES: dict[str, Callable[..., Recipe]] = {
    # With LoRAs on the text encoders and validation: a parameter without a gradient would block the exchange.
    "lora-sdxl": _tiny("sdxl", "lora", "model.train_text_encoder=true", "data.held_out=0.2"),
    "full-sd15": _tiny("sd15", "full", "train.ema=0.9", "train.gradient_checkpointing=true"),
    "scratch-sd": _tiny("sd", "scratch"),
    "scratch-vae": _tiny("vae", "scratch"),
    **{f"scratch-{name}": _scratch(name) for name, case in scratch.CASES.items() if not case.unequal},
    "fsdp-lora": _tiny("sd15", "lora", "train.accumulation=2", "optimizer.clip=tensor", "data.held_out=0.2"),
}
# With EMA and checkpointed blocks, which are gathered again for recomputation; it continues a run of one process.
SHARDED = _tiny(
    "flux2",
    "full",
    "train.ema=0.9",
    "train.gradient_checkpointing=true",
    "sample.prompts=[a red circle]",
    "sample.steps=1",
)


def write_recipe(name: str, recipe: Recipe, folder: Path) -> str:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(to_dict(recipe)), encoding="utf-8")
    return str(file)


@dataclass
class Launched:
    """The result of the launch: each case's run is in `folder`/two/CASE, its reference in `folder`/one/CASE."""

    folder: Path
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("processes")
    files = [
        write_recipe(name, case(folder / "two" / name, "train.batch_size=2"), folder) for name, case in CASES.items()
    ]
    initialized = tiny.prepare(CASES["full-sd15"](folder / "two" / "resumed", "train.batch_size=4", "train.steps=2"))
    initialized.trainer.train()  # by one process; two processes continue it
    initialized.run.status.finished()
    files.append(write_recipe("resumed", CASES["full-sd15"](folder / "two" / "resumed", "train.batch_size=2"), folder))
    for name, steps in (("unbroken", STEPS), ("broken", 2), ("broken", STEPS)):
        place = folder / "two" / f"fsdp-{name}"
        if not place.is_dir():
            first = tiny.prepare(SHARDED(place, "train.batch_size=4", "train.steps=1"))
            first.trainer.train()
            first.run.status.finished()
        files.append(
            write_recipe(f"fsdp-{name}-{steps}", SHARDED(place, "train.batch_size=2", f"train.steps={steps}"), folder)
        )
    files.append(write_recipe("breaks", CASES["scratch-vae"](folder / "two" / "breaks"), folder))

    environment, arguments = launch_arguments("lora", None, False, "many-gpus")
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments[:-1], str(SCRIPT), *files]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=500
    )
    return Launched(folder, done.returncode, done.stdout, done.stderr)


def weights(run: Path) -> dict[str, Tensor]:
    found = checkpoint.checkpoints(run / "checkpoints")[-1]
    averages = found / "ema.safetensors"
    both: dict[str, Tensor] = load_file(found / "weights.safetensors") | (
        {f"average {name}": tensor for name, tensor in load_file(averages).items()} if averages.is_file() else {}
    )
    return both


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_with_twice_the_batch(name: str, launched: Launched) -> None:
    assert f"{name}: 2 × {'FSDP' if name.startswith('fsdp') else 'MULTI_CPU'}, machines: 1\n" in launched.out, (
        launched.err[-3000:]
    )
    compare_with_one(name, launched.folder / "two" / name, launched.folder / "one" / name)


def compare_with_one(name: str, two: Path, one: Path) -> None:
    """Compare the run of two processes in `two` with one process's run of twice the batch, trained in `one`."""
    tiny.prepare(CASES[name](one, "train.batch_size=4")).trainer.train()
    plan = json.loads((two / "plan.json").read_text())
    assert (plan["machine"]["processes"], plan["global_batch"]) == (2, 4 * plan["recipe"]["train"]["accumulation"])
    theirs = weights(two)
    for key, tensor in weights(one).items():
        torch.testing.assert_close(theirs[key], tensor, **TOLERANCE)
    for ours, their in zip(metrics(one), metrics(two), strict=True):
        losses = {key for key in ours if key.startswith("loss.") or key == "validation"}
        assert losses and {key: their[key] for key in losses} == pytest.approx(
            {key: ours[key] for key in losses}, rel=1e-4
        )


def test_two_machines_equal_one_with_twice_the_batch_and_end_together(tmp_path: Path) -> None:
    """Two launchers with one process each find each other by the first's address.

    At the end the second's process fails.
    """
    name = "scratch-vae"
    files = [write_recipe(run, CASES[name](tmp_path / run, "train.batch_size=2"), tmp_path) for run in (name, "breaks")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(2):
        environment, arguments = launch_arguments(
            "scratch", 2, False, "many-machines", (f"machine_rank={rank}", f"main_process_port={port}")
        )
        command = [sys.executable, "-m", "accelerate.commands.launch", *arguments[:-1], str(SCRIPT), *files]
        running.append(
            subprocess.Popen(
                command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    told = [process.communicate(timeout=500) for process in running]
    assert f"{name}: 2 × MULTI_CPU, machines: 2\n" in told[0][0], told[0][1][-3000:]
    compare_with_one(name, tmp_path / name, tmp_path / "one")
    assert [process.returncode for process in running] == [1, 1] and "ValueError: rank 1 has had enough" in told[1][1]


def test_fsdp_resumes_exactly_and_writes_whole_files(launched: Launched) -> None:
    """One process starts, two with sharded weights continue, one takes over; all files are as without FSDP."""
    two, one = launched.folder / "two", launched.folder / "one" / "fsdp"
    unbroken, broken = weights(two / "fsdp-unbroken"), weights(two / "fsdp-broken")
    assert (
        launched.out.count("resuming after step 1\n1 process before, 2 now") == 2
        and "resuming after step 2\n" in launched.out
    )
    assert unbroken.keys() == broken.keys() and all(
        torch.equal(unbroken[key], tensor) for key, tensor in broken.items()
    )
    states = [
        torch.load(two / name / "checkpoints/step-0000003/optimizer-denoiser.pt")
        for name in ("fsdp-unbroken", "fsdp-broken")
    ]
    assert all(
        torch.equal(one, other)
        for place, state in states[0]["state"].items()
        for one, other in _pairs(state, states[1]["state"][place])
    )

    tiny.train(SHARDED(one, "train.batch_size=4"))
    for key, tensor in weights(one).items():
        torch.testing.assert_close(unbroken[key], tensor, **TOLERANCE)
    finals = [one / "final", two / "fsdp-unbroken" / "final"]
    names = [{str(file.relative_to(final)) for file in final.rglob("*")} for final in finals]
    assert names[0] == names[1] and "transformer/config.json" in names[0]
    for name in names[0]:
        if name.endswith(".safetensors"):
            write_recipe = load_file(finals[1] / name)
            for key, tensor in load_file(finals[0] / name).items():
                torch.testing.assert_close(write_recipe[key], tensor, **TOLERANCE)
        elif name.endswith("config.json"):
            assert (finals[0] / name).read_text() == (finals[1] / name).read_text()
    drawn = [
        numpy.asarray(Image.open(place / "samples/step-0000003/00.png"), dtype=float)
        for place in (one, two / "fsdp-unbroken")
    ]
    assert abs(drawn[0] - drawn[1]).max() <= 2

    for place, batch in ((one, "train.batch_size=4"), (two / "fsdp-unbroken", "train.batch_size=4")):
        tiny.prepare(SHARDED(place, batch, "train.steps=4"), resume=True).trainer.train()
    whole = weights(one)
    for key, tensor in weights(two / "fsdp-unbroken").items():
        torch.testing.assert_close(whole[key], tensor, **TOLERANCE)


def _pairs(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    assert one.keys() == other.keys() == {"step", "exp_avg", "exp_avg_sq"}
    return [(one[key], other[key]) for key in one]


def test_checkpoint_of_one_process_resumes_on_two_and_back(launched: Launched) -> None:
    assert "resuming after step 2\n1 process before, 2 now: the same images a step" in launched.out
    resumed, whole = launched.folder / "two" / "resumed", launched.folder / "whole"
    case = CASES["full-sd15"]
    with pytest.raises(
        UserError, match="takes 4 images a step, but 1 process × batch 2 × accumulation 1 would take 2"
    ) as refused:
        tiny.prepare(case(resumed, "train.batch_size=2"), resume=True)
    assert "--set train.accumulation=2" in refused.value.remedy
    tiny.prepare(
        case(resumed, "train.batch_size=2", "train.accumulation=2", "train.steps=4"), resume=True
    ).trainer.train()
    tiny.prepare(case(whole, "train.batch_size=4", "train.steps=4")).trainer.train()
    theirs = weights(resumed)
    for key, tensor in weights(whole).items():
        torch.testing.assert_close(theirs[key], tensor, **TOLERANCE)


def test_failing_rank_ends_all_with_its_error_shown(launched: Launched) -> None:
    assert launched.code == 1
    assert "ValueError: rank 1 has had enough" in launched.err
    assert not [
        process for process in psutil.process_iter(["cmdline"]) if str(SCRIPT) in (process.info["cmdline"] or [])
    ]

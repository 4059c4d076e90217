"""Every recipe from scratch: its loss falls, all parameters train, it samples, and its saved model opens."""

from __future__ import annotations

import functools
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from finetune.config import nets
from finetune.config.loader import bundled_recipes, load_recipe
from finetune.errors import UserError
from finetune.estimate.tracing.cuda_mode import cuda, fake_tensors
from finetune.estimate.tracing.measure import MICRO, operators, works
from finetune.estimate.tracing.skeletons import skeletons
from finetune.estimate.tracing.traced_run import TracedRun
from finetune.inference.sample import sample
from finetune.job import Job
from finetune.models import registry
from finetune.models.base import SampleRequest
from finetune.models.registry import spec_of
from finetune.models.scratch.base import PixelModel, Space, open_model
from finetune.rng import Draw
from tests.helpers import scratch, tiny
from tests.helpers.scratch import CASES

SEEDS = (3, 4)


def test_every_scratch_recipe_has_a_case() -> None:
    in_pixels = {
        name.partition("/")[2] for name in bundled_recipes() if load_recipe(name).model.family in nets.families()
    }
    assert in_pixels == set(CASES)


@dataclass
class Trained:
    job: Job
    losses: tuple[float, float]
    before: dict[str, Tensor]


def fixed_loss(job: Job) -> float:
    """The mean loss of the first train step on fixed noise of twelve images.

    For a GAN, its samples' distance to them.
    """
    draw = Draw(99, 0, range(12))
    batch = job.data.batch(0, [place % 4 for place in range(12)], draw)
    with torch.no_grad(), job.trainer.state.averaged():
        if spec_of(job.plan.recipe.model.family).kind != "GAN":
            return float(job.model.train_steps()[0].loss(batch, draw).mean())
        model = job.model
        assert isinstance(model, PixelModel)
        made = model.generate(
            batch["class"], Draw(99, "sample", range(12)), SampleRequest(("",) * 12, tuple(range(12)), 1, 1.0)
        )
        return energy(*(model.space.scaled(levels).flatten(1) for levels in (batch["pixels"], made)))


def energy(some: Tensor, others: Tensor) -> float:
    """The energy distance of samples [N, D] (Székely & Rizzo 2013): 2 E|x − y| − E|x − x′| − E|y − y′|; 0 if equal."""
    within = sum(torch.pdist(sample).mean() for sample in (some, others))
    return float(2 * torch.cdist(some, others).mean() - within)


@functools.cache
def trained(name: str) -> Trained:
    rate = (
        "optimizer.lr=3e-3",
        "optimizer.schedule=constant",
        "train.checkpoint_every=1",
        "train.keep_checkpoints=99",
        "sample.every=1000",
    )
    job = tiny.prepare(scratch.recipe(name, tiny.root() / "scratch" / name, *rate))
    before = {key: tensor.detach().clone() for key, tensor in job.model.state().items()}
    first = fixed_loss(job)
    job.trainer.train()
    found = Trained(job, (first, fixed_loss(job)), before)
    tiny.finish(job)
    return found


def pixel_model(name: str) -> PixelModel:
    model = trained(name).job.model
    assert isinstance(model, PixelModel)
    model.net.eval()
    return model


def generate(model: PixelModel, seeds: tuple[int, ...] = SEEDS) -> Tensor:
    request = SampleRequest(("0",) * len(seeds), seeds, steps=2, guidance=1.0)
    with torch.no_grad():
        return model.generate(torch.zeros(len(seeds), dtype=torch.long), Draw(0, "sample", seeds), request)


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "checkpoints" / f"step-{step:07d}" / "weights.safetensors")
    return found


@pytest.mark.parametrize("name", CASES)
def test_scratch_recipe_loss_falls_and_every_parameter_trains(name: str) -> None:
    run = trained(name)
    assert run.losses[1] < run.losses[0]
    third = weights(run.job.run.folder, 3)
    parameters = run.job.model.trained()
    still = {
        key
        for key in parameters
        if torch.equal(third[key], run.before[key]) and not key.endswith(CASES[name].unchanged or ("-",))
    }
    assert not still, "no gradient reached these parameters within three steps"


@pytest.mark.parametrize("name", CASES)
def test_scratch_samples_are_levels_that_depend_only_on_their_seed(name: str) -> None:
    model = pixel_model(name)
    both = generate(model)
    assert both.shape == (2, *model.space.shape) and both.dtype == torch.uint8 and int(both.max()) < model.space.levels
    assert torch.equal(both, generate(model)), "equal seeds must give equal samples"
    assert not torch.equal(both[0], both[1])
    assert torch.equal(both[1:], generate(model, SEEDS[1:])), "an image depends on its batch"


@pytest.mark.parametrize("name", CASES)
def test_scratch_saved_model_opens_equal(name: str) -> None:
    folder = trained(name).job.run.folder
    model, opened = pixel_model(name), open_model(folder)
    assert (opened.space, opened.section) == (model.space, model.section)
    assert all(torch.equal(tensor, opened.net.state_dict()[key]) for key, tensor in model.net.state_dict().items())
    assert torch.equal(generate(opened), generate(model))
    step = trained(name).job.plan.steps
    for number, file in enumerate(sample(folder, [])):
        shown = folder / "samples" / f"step-{step:07d}" / f"{number:02d}.png"
        assert file.name == shown.name and numpy.array_equal(_pixels(file), _pixels(shown))


def _pixels(file: Path) -> numpy.ndarray:
    with Image.open(file) as image:
        return numpy.array(image)


@pytest.mark.parametrize("name", CASES)
def test_scratch_resume_is_exact(name: str, tmp_path: Path) -> None:
    whole = trained(name).job.run.folder

    class Killed(Exception):
        pass

    def kill(done: int) -> None:
        if done == 2:
            raise Killed

    rate = ("optimizer.lr=3e-3", "optimizer.schedule=constant", "train.checkpoint_every=1")
    broken = tiny.prepare(scratch.recipe(name, tmp_path / "run", *rate, "sample.every=2"))
    broken.trainer.observe = kill
    with pytest.raises(Killed):
        broken.trainer.train()
    resumed = tiny.prepare(scratch.recipe(name, tmp_path / "run", *rate, "train.steps=3"), resume=True)
    resumed.trainer.observe = None
    resumed.trainer.train()
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
    ]
    once = weights(whole, 3)
    assert all(torch.equal(tensor, once[key]) for key, tensor in weights(tmp_path / "run", 3).items())


@pytest.mark.parametrize("name", CASES)
def test_scratch_train_step_runs_on_fake_tensors(name: str) -> None:
    """As traced for estimates, in float32 and with CUDA's autocast: no shape or branch depends on a value."""
    job = trained(name).job
    real = job.data.batch(0, [0], Draw(0, 0, [0]))
    with fake_tensors(), skeletons(), cuda() as mode:
        model = registry.build(job.plan, job.model.audit)  # type: ignore[attr-defined]
        batch = {key: torch.zeros(4, *tensor.shape[1:], dtype=tensor.dtype) for key, tensor in real.items()}
        for train_step, dtype in itertools.product(model.train_steps(), (None, torch.bfloat16)):
            with mode.autocast(dtype):
                loss = train_step.loss(batch, Draw(0, 0, range(4)))
            assert loss.shape == (4,) and isinstance(loss, FakeTensor)
            loss.mean().backward()


def test_wgan_gp_generator_trains_only_every_nth_step() -> None:
    folder = trained("wgan-gp").job.run.folder
    taken = {
        r["step"]
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if "loss.generator" in (r := json.loads(line))
    }
    assert taken == set(range(1, 21, 2))


def test_scratch_run_is_traced() -> None:
    job = trained("vae").job
    phases = TracedRun(job.plan.recipe, "float32", (8, 8), job.model.audit, device="cpu").phases(only_training=True)  # type: ignore[attr-defined]
    assert phases["train"].held["trained"] == sum(parameter.numel() for parameter in job.model.trained().values()) * 4
    assert any(operator.flops for section in phases["train"].sections for operator in section.operators)


class Products(TorchDispatchMode):
    """Counts FLOPs. (torch's own counter also follows modules, and fails where gradients are differentiated.)"""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("name", ["wgan-gp", "stylegan2"])
def test_gan_estimate_is_the_mean_of_its_step_cycle(name: str, tmp_path: Path) -> None:
    """Some steps train the generator or add penalties, others do not; a full cycle computes as much as estimated."""
    job = tiny.prepare(scratch.recipe(name, tmp_path / "run"))
    phase = TracedRun(job.plan.recipe, "float32", (8, 8), job.model.audit, device="cpu").phases(only_training=True)[  # type: ignore[attr-defined]
        "train"
    ]
    found = operators(phase, MICRO)
    with Products() as real:  # type: ignore[no-untyped-call]
        for step in range(phase.cycle):
            job.trainer.train_step(step)
    assert phase.cycle > 1 and sum(operator.flops for operator in found) == real.flops > 0
    assert sum(count for *_, count in works("cpu", found, found, phase.cycle)) == pytest.approx(
        len(found) / phase.cycle
    )


def test_space_images_and_levels_are_inverse() -> None:
    for levels in (2, 17, 256):
        space = Space(3, 2, 3, levels)
        some = torch.randint(levels, (5, 3, 2, 3), dtype=torch.uint8)
        pixels = torch.stack([torch.from_numpy(numpy.array(image)).permute(2, 0, 1) for image in space.images(some)])
        assert torch.equal(torch.stack([space.levels_of(one.float() / 127.5 - 1) for one in pixels]), some)
        assert torch.equal(space.quantized(space.scaled(some)), some)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["net.latnet=4"], r"net\.latnet[\s\S]*latent"),
        (["net.latent=0"], r"net\.latent must be between 1 and"),
        (["net.halvings=4"], r"cannot be halved 4 times"),
        (["data.resolution=16"], r"12 images are smaller than the model's 16×16"),
        (
            [
                "data.classes=null",
                f"data.path={tiny.images()}",
                "data.resolution=32",
                "data.bucket_step=8",
                "data.buckets=true",
            ],
            r"of one size",
        ),
        (["model.build={a: 1}"], r"remove model.build"),
        (["model.family=sd"], r'family "sd" has no `net` section'),
    ],
)
def test_scratch_recipe_with_invalid_values_is_refused(overrides: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        tiny.prepare(scratch.recipe("vae", tmp_path / "run", *overrides))
    assert re.search(told, "\n".join(caught.value.lines()))


def test_scratch_with_too_few_images_is_refused(tmp_path: Path) -> None:
    one, lonely = tmp_path / "one" / "0", tmp_path / "lonely"
    one.mkdir(parents=True)
    files = sorted(scratch.digits().rglob("*.png"))
    (one / "a.png").write_bytes(files[0].read_bytes())
    for name, images in (("0", files[:2]), ("1", files[2:3])):
        (lonely / name).mkdir(parents=True)
        for number, file in enumerate(images):
            (lonely / name / f"{number}.png").write_bytes(file.read_bytes())
    (lonely / "stray.png").write_bytes(files[0].read_bytes())
    with pytest.raises(UserError, match="only one distinct image"):
        tiny.prepare(scratch.recipe("vae", tmp_path / "a", f"data.path={tmp_path / 'one'}"))
    with pytest.raises(UserError, match="not in a class folder"):
        tiny.prepare(scratch.recipe("vae", tmp_path / "b", f"data.path={lonely}"))
    (lonely / "stray.png").unlink()
    with pytest.raises(UserError, match="1 of 2 classes have only one image"):
        tiny.prepare(scratch.recipe("vae", tmp_path / "c", f"data.path={lonely}"))

"""Diffusion in pixel space: paths against diffusers' schedulers and the papers' tables, samplers on Gaussian data, where the net is closed form."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune.engine.draw import Draw
from finetune.errors import UserError
from finetune.models import change, edm, rectifiedflow
from finetune.models.ddpm import create
from finetune.models.observation import log_mass
from finetune.models.paths import Exploding, Preconditioned, Preserving, Straight, alphas_cumprod
from finetune.models.paths import Path as NoisePath
from finetune.models.pixels import Space
from finetune.models.samplers import SAMPLERS, Level, Options, posterior
from finetune.models.turn import SampleRequest
from finetune.nets.ddpm import Net
from finetune.nets.edm import Net as EdmNet
from finetune.nets.rectifiedflow import Net as FlowNet
from finetune.recipe import load_recipe
from finetune.sampling import sample
from tests import scratch, tiny

MEAN, DEVIATION = 0.7, 0.25  # of the Gaussian data
EDM = Preconditioned(0.5, -1.2, 1.2)
PREDICTIONS: tuple[Any, ...] = ("epsilon", "sample", "v_prediction")


def spread(level: Level) -> float:
    """Of x, where x_0 is the Gaussian data."""
    return math.hypot(level.alpha * DEVIATION, level.sigma)


def oracle(noisy: Tensor, level: Level) -> Tensor:
    """E[x_0 | x]."""
    return MEAN + DEVIATION**2 * level.alpha / spread(level) ** 2 * (noisy - level.alpha * MEAN)


def carried(noisy: Tensor, first: Level, last: Level) -> Tensor:
    """Where the flow's differential equation takes x: how many deviations it lies from the mean stays."""
    return last.alpha * MEAN + spread(last) / spread(first) * (noisy - first.alpha * MEAN)


def no_chance(number: int) -> Tensor:
    raise AssertionError("nothing is to be drawn on the way")


@functools.cache
def scheduler(prediction: str = "epsilon", **keys: Any) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(prediction_type=prediction, clip_sample=False, timestep_spacing="trailing", **keys)


def test_noise_step_by_step_is_noise_at_once() -> None:
    """x_t = √(1 − β) x + √β ε, T times; the schedules are diffusers', and fewer steps end in noise as well."""
    for schedule, name in (("linear", "linear"), ("cosine", "squaredcos_cap_v2")):
        bars = torch.tensor(alphas_cumprod(1000, schedule), dtype=torch.float64)  # type: ignore[arg-type]
        torch.testing.assert_close(bars.float(), scheduler(beta_schedule=name).alphas_cumprod, rtol=2e-4, atol=1e-9)
        signal, variance = 1.0, 0.0
        for before, after in itertools.pairwise([1.0, *bars.tolist()]):
            beta = 1 - after / before
            signal, variance = math.sqrt(1 - beta) * signal, (1 - beta) * variance + beta
            assert (signal**2, variance) == pytest.approx((after, 1 - after), abs=1e-12)
    assert alphas_cumprod(1000, "linear")[-1] == pytest.approx(4.036e-5, rel=1e-3)
    assert [alphas_cumprod(steps, "linear")[-1] < 5e-5 for steps in (30, 100, 4000)] == [True] * 3


@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_step_is_diffusers_own(prediction: Any, variance: Any) -> None:
    """Mean and noise of `DDPMScheduler.step`, between neighbours and 20 apart.

    Its last step of 50 adds the large variance's noise to what should be the picture; Ho et al.'s algorithm 2 adds none, nor do we.
    """
    path, theirs = Preserving(1000, "linear", prediction), scheduler(prediction, variance_type=f"fixed_{variance}")
    noisy, said = torch.randn(2, 1, 3, 5, 5, generator=torch.Generator().manual_seed(0))

    def denoise(noisy: Tensor, level: Level) -> Tensor:
        return path.clean(said, noisy, level)

    def chance(seed: int, number: int) -> Tensor:
        return torch.randn(noisy.shape, generator=torch.Generator().manual_seed(seed))

    for steps, every in ((1000, 83), (50, 7)):
        theirs.set_timesteps(steps)
        levels = path.levels(steps)
        assert [level.told for level in levels[:-1]] == theirs.timesteps.tolist()
        for place in [*range(0, steps - 1, every), *([steps - 1] if steps == 1000 or variance == "small" else [])]:
            now, then = levels[place : place + 2]
            expected = theirs.step(said, int(now.told), noisy, generator=torch.Generator().manual_seed(place)).prev_sample
            ours = SAMPLERS["ddpm"](denoise, noisy, [now, then], functools.partial(chance, place), Options(variance=variance))
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", [*(Preserving(1000, "cosine", one) for one in PREDICTIONS), Straight(3.0), Exploding(EDM, 0.002, 80, 7)])
def test_what_the_net_should_say_gives_the_picture_back(path: NoisePath) -> None:
    """Targets of the loss, read as drawing reads what the net says, are x_0; and x is what drawing would have given the net."""
    clean, draw = torch.randn(6, 2, 3, 3), Draw(1, 2, range(6))
    noised, noise = path.objective.noise(clean, draw), draw.normal("noise", (2, 3, 3))
    for number in range(6):
        told = float(noised.timestep[number])
        if isinstance(path, Preserving):
            level = path.level(int(told))
        else:
            level = path.level(math.exp(4 * told) if isinstance(path, Exploding) else told / 1000)  # type: ignore[attr-defined]
        assert level.told == pytest.approx(told, rel=1e-4, abs=1e-6)
        noisy = level.alpha * clean[number] + level.sigma * noise[number]
        torch.testing.assert_close(path.read(noisy, level), noised.sample[number], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(path.clean(noised.target[number], noisy, level), clean[number], rtol=1e-3, atol=2e-3)
    assert torch.equal(noised.weight, torch.ones(6))


def test_edm_is_preconditioned_as_its_table_says() -> None:
    """c_skip, c_out, c_in, c_noise and λ at σ = 0.7 by hand; the net's input and target have variance 1 at every level, the loss is λ |D − x_0|²."""
    skip, out, in_, told = EDM.scales(torch.tensor([0.7], dtype=torch.float64))
    assert [float(one) for one in (skip, out, in_, told)] == pytest.approx(
        [0.25 / 0.74, 0.35 / math.sqrt(0.74), 1 / math.sqrt(0.74), math.log(0.7) / 4]
    )
    assert 0.74 / 0.35**2 * float(out) ** 2 == pytest.approx(1), "λ c_out² = 1"
    noised = EDM.noise(0.5 * torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)), Draw(0, 0, range(4000)))
    assert (float(noised.sample.std()), float(noised.target.std())) == pytest.approx((1, 1), abs=0.02)
    sigma = (4 * noised.timestep).exp()
    assert (float(sigma.log().mean()), float(sigma.log().std())) == pytest.approx((-1.2, 1.2), abs=0.05)
    levels = Exploding(EDM, 0.002, 80, 7).levels(18)
    assert [levels[0].sigma, levels[17].sigma, levels[18].sigma] == pytest.approx([80, 0.002, 0])
    assert levels[5].sigma == pytest.approx((80 ** (1 / 7) + 5 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)


def angle(time: float) -> Level:
    return Level(math.cos(time), math.sin(time), time, -math.sin(time), math.cos(time), 0)


# Continuous times, from much noise to little.
GRIDS: dict[str, tuple[Callable[[float], Level], float, float]] = {
    "preserving": (angle, 1.5, 0.1),
    "straight": (Straight().level, 0.97, 0.05),
    "exploding": (Exploding(EDM, 0.002, 80, 7).level, 3.0, 0.05),
}


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpm++", 2)])
@pytest.mark.parametrize("grid", GRIDS)
def test_samplers_converge_at_their_order(grid: str, sampler: str, order: int) -> None:
    at, first, last = GRIDS[grid]
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def error(steps: int) -> float:
        ratio = (last / first) ** (1 / steps)
        levels = [at(first * ratio**number) for number in range(steps + 1)]
        return float((SAMPLERS[sampler](oracle, start, levels, no_chance, Options()) - carried(start, levels[0], levels[-1])).abs().max())

    errors = [error(steps) for steps in (80, 160, 320)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.12)


@pytest.mark.parametrize("path", [Preserving(1000, "linear", "epsilon"), Straight(), Exploding(EDM, 0.002, 80, 7)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_drawn_is_distributed_as_the_data(path: NoisePath, sampler: str) -> None:
    """From the path's own noise down to σ = 0, at once for 4000 numbers; the integer steps of a discrete path too."""
    start = path.spread * torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def chance(number: int) -> Tensor:
        return torch.randn(4000, generator=torch.Generator().manual_seed(number + 1), dtype=torch.float64)

    drawn = SAMPLERS[sampler](oracle, start, path.levels(200), chance, Options())
    assert (float(drawn.mean()), float(drawn.std())) == pytest.approx((MEAN, DEVIATION), abs=0.02)


def test_eta_is_how_much_chance_there_is() -> None:
    """At 0 none; at 1 DDPM's own steps with the posterior's variance, on every path."""
    paths: Sequence[NoisePath] = (Preserving(1000, "linear", "epsilon"), Straight(), Exploding(EDM, 0.002, 80, 7))
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def chance(number: int) -> Tensor:
        return torch.randn(9, generator=torch.Generator().manual_seed(number), dtype=torch.float64)

    for path in paths:
        levels = path.levels(20)
        SAMPLERS["ddim"](oracle, start, levels, no_chance, Options(eta=0))
        one, ancestral = (SAMPLERS[name](oracle, start, levels, chance, Options(eta=1)) for name in ("ddim", "ddpm"))
        torch.testing.assert_close(one, ancestral)
        half = SAMPLERS["ddim"](oracle, start, levels, chance, Options(eta=0.5))
        assert not torch.allclose(half, one)
    now, then = paths[0].levels(1000)[400:402]
    beta, bar, before = 1 - now.alpha**2 / then.alpha**2, now.alpha**2, then.alpha**2
    assert posterior(now, then).small == pytest.approx((1 - before) / (1 - bar) * beta)
    assert posterior(now, then).large == pytest.approx(beta)


def test_guidance_of_one_is_the_class_itself() -> None:
    torch.manual_seed(0)
    model = create(Space(1, 4, 4, 17, ("a", "b")), Net(width=8, multiples=(1,), prediction="v_prediction"))
    torch.nn.init.normal_(model.net.unet.conv_out.weight, std=0.02)
    model.net.eval()
    noisy, classes, level = torch.randn(3, 1, 4, 4) * 0.1, torch.tensor([0, 1, 2]), model.path.level(400)  # type: ignore[attr-defined]
    with torch.no_grad():
        told = torch.full((3,), 400.0)
        of_class = model.path.clean(model.net(noisy, told, classes), noisy, level)
        free = model.path.clean(model.net(noisy, told, torch.full((3,), 2)), noisy, level)
        found = {s: model.denoised(noisy, level, classes, s) for s in (0.0, 1.0, 3.0)}
        assert torch.equal(found[1.0], of_class)
        torch.testing.assert_close(found[0.0], free)
        torch.testing.assert_close(found[3.0], free + 3 * (of_class - free))
        assert not torch.allclose(found[3.0][:2], of_class[:2]) and torch.allclose(found[3.0][2], of_class[2]), "no class is not guided"
        assert float(model.denoised(50 * noisy, level, classes, 30.0).abs().max()) == 1, "expectations of pixels lie within their range"


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_a_normal_distribution_cut_into_levels_adds_up_to_one(levels: int) -> None:
    """Narrow and wide, far from all levels too, where only one tail is left; and it is the difference of cumulatives where that can be told."""
    space, everything = Space(1, 1, 1, levels), torch.arange(levels, dtype=torch.uint8)[:, None]
    mean, deviation = (
        torch.tensor([0.0, 0.31, -0.99, 2.5, -40.0], dtype=torch.float64),
        torch.tensor([0.3, 0.004, 1.0, 0.05, 0.01], dtype=torch.float64),
    )
    found = log_mass(space, everything.expand(-1, 5), mean, deviation)
    assert found.isfinite().all()
    torch.testing.assert_close(found.exp().sum(0), torch.ones(5, dtype=torch.float64))
    edges = space.scaled(everything).double()
    inside = torch.special.ndtr((edges + 1 / (levels - 1) - mean) / deviation) - torch.special.ndtr((edges - 1 / (levels - 1) - mean) / deviation)
    torch.testing.assert_close(found.exp()[1:-1], inside[1:-1], rtol=0, atol=1e-12)


class OracleNet(torch.nn.Module):
    """Says ε of Gaussian data of mean 0.1 and deviation 0.2, in place of a trained net."""

    def __init__(self, path: Preserving) -> None:
        super().__init__()
        self._levels = [path.level(step) for step in range(len(path))]

    def forward(self, noisy: Tensor, told: Tensor, classes: Tensor | None) -> Tensor:
        alpha, sigma = (torch.tensor([getattr(self._levels[int(one)], name) for one in told]).view(-1, 1, 1, 1) for name in ("alpha", "sigma"))
        clean = 0.1 + 0.04 * alpha / (0.04 * alpha**2 + sigma**2) * (noisy - 0.1 * alpha)
        return (noisy - alpha * clean) / sigma


@pytest.mark.parametrize("variance", ["large", "small"])
def test_the_bound_is_the_entropy_and_what_each_step_loses(variance: Any) -> None:
    """On Gaussian data with the exact net all is closed form: a step loses KL(q(x'|x) ‖ p(x'|x)) between normals of one mean.

    q's variance is the posterior's and what x leaves open of x_0; the prior loses KL(q(x_T) ‖ N(0, 1)).
    """
    space, steps, draw = Space(1, 32, 32, 256), 30, Draw(1, 0, range(64))
    torch.manual_seed(0)
    model = create(space, Net(width=8, multiples=(1,), timesteps=steps, variance=variance))
    path: Any = model.path
    model.net = OracleNet(path)  # type: ignore[assignment]

    def lost(true: float, modelled: float) -> float:
        return 0.5 * (math.log(modelled / true) + true / modelled - 1)

    expected = 0.5 * math.log(2 * math.pi * math.e * 0.04) - math.log(2 / 255)  # the entropy of what the levels hold
    last = path.level(steps - 1)
    expected += 0.5 * (last.alpha**2 * (0.04 + 0.01) + last.sigma**2 - 1 - math.log(last.alpha**2 * 0.04 + last.sigma**2))
    for step in range(steps):
        now = path.level(step)
        between = posterior(path.level(max(step, 1)), path.level(max(step, 1) - 1))
        open_ = 0.04 * now.sigma**2 / (now.alpha**2 * 0.04 + now.sigma**2)  # Var(x_0 | x)
        true = between.small + between.clean**2 * open_ if step else open_
        expected += lost(true, getattr(between, variance) if step else between.small)
    pictures = space.quantised(0.1 + 0.2 * torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(1)))
    whole, sampled = (model.nats({"pixels": pictures}, draw, particles) for particles in (steps - 1, 4))
    assert float(whole.mean()) / space.dimensions == pytest.approx(expected, rel=3e-3)
    assert float(sampled.mean()) == pytest.approx(float(whole.mean()), rel=0.05)
    assert torch.equal(sampled[3:5], model.nats({"pixels": pictures[3:5]}, Draw(1, 0, range(3, 5)), 4)), "a picture's chance is its own"
    assert float(model.bits_per_dimension({"pixels": pictures}, draw, steps - 1).mean()) == pytest.approx(expected / math.log(2), rel=3e-3)


def test_a_flow_gives_the_density_of_gaussian_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each number goes its own way, a probe of ±1 tells the trace exactly; what is left is the steps' error, of second order."""
    clean = torch.tensor([[0.2, 0.7], [1.1, 0.65]], dtype=torch.float64)
    probe = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    expected, errors = torch.distributions.Normal(MEAN, DEVIATION).log_prob(clean).sum(1), []
    for steps in (20, 40, 80):
        monkeypatch.setattr(change, "STEPS", steps)
        found = change.log_density(lambda values, at: oracle(values, angle(at)), clean, change.angles(math.pi / 2), probe)
        errors.append(float((found - expected).abs().max()))
    assert errors[-1] < 2e-3
    assert [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)] == pytest.approx([2, 2], abs=0.1)
    for family, keys in ((edm, EdmNet), (rectifiedflow, FlowNet)):
        model = family.create(Space(1, 4, 4, 17), keys(width=8, multiples=(1,)))
        for at in (0.001, 0.4, model.most()):
            level = model.at_angle(at)
            assert math.atan2(level.sigma, level.alpha) == pytest.approx(at)
        assert model.at_angle(model.most()).sigma == pytest.approx(model.path.spread)


class SilentNet(torch.nn.Module):
    """Says 0, as a new net does."""

    def forward(self, noisy: Tensor, told: Tensor, classes: Tensor | None, beside: Tensor | None) -> Tensor:
        return torch.zeros_like(noisy)


def test_a_flows_bits_are_those_of_a_histogram() -> None:
    """A new EDM says D = c_skip x: that its pixels are N(0, 0.5²), whose mass over each level is known; drawn pictures have its entropy."""
    space = Space(1, 4, 4, 65)
    model = edm.create(space, EdmNet(width=8, multiples=(1,)))
    model.net = SilentNet()  # type: ignore[assignment]
    levels = torch.arange(65, dtype=torch.uint8).repeat(16)[:1024].view(64, 1, 4, 4)
    zero, deviation = torch.zeros((), dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    inside = (levels > 0) & (levels < 64)
    levels = torch.where(inside, levels, 32)
    expected = -log_mass(space, levels, zero, deviation).flatten(1).sum(1)
    found = model.nats({"pixels": levels}, Draw(0, 0, range(64)), 2).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.5)
    assert torch.equal(found[5:7].float(), model.nats({"pixels": levels[5:7]}, Draw(0, 0, range(5, 7)), 2))


def test_latents_are_measured_and_not_cut(tmp_path: Path) -> None:
    model: Any = tiny.prepare(scratch.recipe("latent-diffusion", tmp_path / "run")).model
    read = model.canvas.read(model.examples(99)["pixels"])
    assert (read.mean((0, 2, 3)).abs() < 1e-5).all() and torch.allclose(read.std((0, 2, 3)), torch.ones(read.shape[1]), atol=1e-4)
    assert torch.equal(model.canvas.within(1e3 * read), 1e3 * read)
    pixels = model.space.scaled(model.examples(4)["pixels"])
    expected = model.net.first.vae.decode(model.net.first.vae.encode(pixels).latent_dist.mode()).sample
    found = model.canvas.write(model.canvas.read(model.examples(4)["pixels"]))
    assert (found.int() - model.space.quantised(expected).int()).abs().max() <= 1


def test_a_cascade_noises_what_it_enlarges_and_draws_through_both_stages(tmp_path: Path) -> None:
    model: Any = tiny.prepare(scratch.recipe("cascade", tmp_path / "run")).model
    condition, levels, draw = model._condition, model.examples(4)["pixels"], Draw(0, 7, range(4))
    beside = condition.of_pictures(levels, draw)
    share = 0.5 * draw.uniform("augmentation")
    assert torch.equal(beside[:, 1], share.view(-1, 1, 1).expand(-1, 8, 8))
    small = torch.nn.functional.avg_pool2d(model.space.scaled(levels), 2)
    clean = condition.beside(small, torch.zeros(4), torch.randn_like(small))
    torch.testing.assert_close(clean[:, :1], torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear"))
    noise = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        condition.beside(small, torch.ones(4), noise)[:, :1], torch.nn.functional.interpolate(noise, size=(8, 8), mode="bilinear")
    )
    request = SampleRequest((), (), 3, 1.0)
    first = model.first.draw(torch.zeros(2, dtype=torch.long), Draw(0, "low", (5, 6)), request)
    told = condition.drawn(torch.zeros(2, dtype=torch.long), Draw(0, "sample", (5, 6)), request)
    noise = Draw(0, "sample", (5, 6)).normal("augmentation noise", (1, 4, 4))
    torch.testing.assert_close(told, condition.beside(model.space.scaled(first), torch.full((2,), 0.1), noise))


@pytest.mark.parametrize(
    ("name", "overrides", "told"),
    [
        ("ddpm", ["sample.sampler=ddmi"], r'no sampler is called "ddmi"[\s\S]*did you mean "dd'),
        ("vae", ["sample.sampler=ddim"], r"family betavae has no samplers to choose from"),
        ("edm", ["sample.eta=0.5"], r"eta is DDIM's"),
        ("ddpm", ["net.multiples=[1,2,2,2,2]"], r"8×8 pixels cannot be halved 4 times[\s\S]*fewer numbers"),
        ("ddpm", ["net.multiples=[]"], r"at least one size"),
        ("ddpm", ["net.width=10"], r"a multiple of 4"),
        ("ddpm", ["diffusion={zero_terminal_snr: true}"], r"end in noise"),
        ("ddpm", ["model.prediction=epsilon"], r"remove model.prediction"),
        ("flow-matching", ["flow.shift=3"], r"set net.shift"),
        ("flow-matching", ["diffusion={huber: 0.1}"], r"is for families with a noise schedule"),
        ("edm", ["net.least=90"], r"set net.least below net.most"),
        ("cascade", ["model.low=null"], r"needs a first[\s\S]*scratch/cascade-low"),
        ("cascade", ["data.resolution=4"], r"4×4 are no multiple"),
        ("cascade", ["data.levels=5"], r"other colours, levels or classes"),
        ("ddpm", ["model.low=runs/x"], r"draws its pictures from nothing"),
        ("latent-diffusion", ["model.vae=null"], r"train scratch/emoji-vae first"),
        ("latent-diffusion", ["data.grey=true"], r"reads 3 channels[\s\S]*data.grey: false"),
        ("latent-diffusion", ["diffusion={zero_terminal_snr: true}"], r"end in noise"),
    ],
)
def test_mistakes(name: str, overrides: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        tiny.prepare(scratch.recipe(name, tmp_path / "run", *overrides))
    assert re.search(told, "\n".join(caught.value.lines()))


def test_a_sampler_is_chosen_at_drawing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny.train(scratch.recipe("ddpm", run, "train.steps=6", "optimizer.lr=1e-2", "sample.prompts=['0']"))
    drawn = {}
    for name in SAMPLERS:
        (file,) = sample(run, [], sampler=name, steps=4, out=tmp_path / name.strip("+"))
        drawn[name] = Image.open(file).tobytes()
    assert len(set(drawn.values())) == len(SAMPLERS)
    (again,) = sample(run, [], sampler="ddim", steps=4, eta=1.0, out=tmp_path / "eta")
    assert Image.open(again).tobytes() != drawn["ddim"]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"sampler": "euller"}, "no sampler is called"),
        ({"sampler": "heun", "eta": 0.5}, "eta is DDIM's"),
        ({"steps": 51}, "more than the 50"),
    ]
    for keys, told in refused:
        with pytest.raises(UserError, match=told):
            sample(run, [], **keys)
    assert load_recipe("scratch/ddpm").sample.sampler == "ddim"

"""Diffusion in pixel space: guidance, likelihoods against closed forms, latents, cascades, and invalid recipes."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune.config.loader import load_recipe
from finetune.config.nets.ddpm import Net
from finetune.config.nets.edm import Net as EdmNet
from finetune.config.nets.flow_matching import Net as FlowNet
from finetune.errors import UserError
from finetune.inference.sample import sample
from finetune.models.base import SampleRequest
from finetune.models.objectives import ode_likelihood
from finetune.models.objectives.noise_paths import VariancePreserving
from finetune.models.objectives.samplers import SAMPLERS, posterior
from finetune.models.scratch.base import Space
from finetune.models.scratch.diffusion import edm, flow_matching
from finetune.models.scratch.diffusion.ddpm import create
from finetune.models.scratch.distributions import log_mass
from finetune.rng import Draw
from tests.helpers import scratch, tiny
from tests.helpers.gaussian import DEVIATION, MEAN, angle, oracle


def test_guidance_of_one_is_the_conditional_prediction() -> None:
    torch.manual_seed(0)
    model = create(Space(1, 4, 4, 17, ("a", "b")), Net(width=8, channel_multipliers=(1,), prediction="v_prediction"))
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
        assert not torch.allclose(found[3.0][:2], of_class[:2]) and torch.allclose(found[3.0][2], of_class[2]), (
            "the unconditional prediction must not be guided"
        )
        assert float(model.denoised(50 * noisy, level, classes, 30.0).abs().max()) == 1, (
            "predicted pixels must stay within their range"
        )


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_log_mass_of_a_discretized_normal_is_normalized(levels: int) -> None:
    """Narrow and wide, also far from all levels, where only one tail remains.

    Where that is accurate, it is a difference of CDFs.
    """
    space, everything = Space(1, 1, 1, levels), torch.arange(levels, dtype=torch.uint8)[:, None]
    mean, deviation = (
        torch.tensor([0.0, 0.31, -0.99, 2.5, -40.0], dtype=torch.float64),
        torch.tensor([0.3, 0.004, 1.0, 0.05, 0.01], dtype=torch.float64),
    )
    found = log_mass(space, everything.expand(-1, 5), mean, deviation)
    assert found.isfinite().all()
    torch.testing.assert_close(found.exp().sum(0), torch.ones(5, dtype=torch.float64))
    edges = space.scaled(everything).double()
    inside = torch.special.ndtr((edges + 1 / (levels - 1) - mean) / deviation) - torch.special.ndtr(
        (edges - 1 / (levels - 1) - mean) / deviation
    )
    torch.testing.assert_close(found.exp()[1:-1], inside[1:-1], rtol=0, atol=1e-12)


class OracleNet(torch.nn.Module):
    """Predicts ε of Gaussian data with mean 0.1 and standard deviation 0.2, in place of a trained network."""

    def __init__(self, path: VariancePreserving) -> None:
        super().__init__()
        self._levels = [path.level(step) for step in range(len(path))]

    def forward(self, noisy: Tensor, told: Tensor, classes: Tensor | None) -> Tensor:
        alpha, sigma = (
            torch.tensor([getattr(self._levels[int(one)], name) for one in told]).view(-1, 1, 1, 1)
            for name in ("alpha", "sigma")
        )
        clean = 0.1 + 0.04 * alpha / (0.04 * alpha**2 + sigma**2) * (noisy - 0.1 * alpha)
        return (noisy - alpha * clean) / sigma


@pytest.mark.parametrize("variance", ["large", "small"])
def test_diffusion_bound_of_gaussian_data_has_its_closed_form(variance: Any) -> None:
    """With the exact network, a step loses KL(q(x'|x) ‖ p(x'|x)) between normals of the same mean.

    q's variance is the posterior's plus the uncertainty of x_0 given x; the prior loses KL(q(x_T) ‖ N(0, 1)).
    """
    space, steps, draw = Space(1, 32, 32, 256), 30, Draw(1, 0, range(64))
    torch.manual_seed(0)
    model = create(space, Net(width=8, channel_multipliers=(1,), timesteps=steps, variance=variance))
    path: Any = model.path
    model.net = OracleNet(path)  # type: ignore[assignment]

    def lost(true: float, modelled: float) -> float:
        return 0.5 * (math.log(modelled / true) + true / modelled - 1)

    expected = 0.5 * math.log(2 * math.pi * math.e * 0.04) - math.log(2 / 255)  # the entropy of the discretized data
    last = path.level(steps - 1)
    expected += 0.5 * (
        last.alpha**2 * (0.04 + 0.01) + last.sigma**2 - 1 - math.log(last.alpha**2 * 0.04 + last.sigma**2)
    )
    for step in range(steps):
        now = path.level(step)
        between = posterior(path.level(max(step, 1)), path.level(max(step, 1) - 1))
        open_ = 0.04 * now.sigma**2 / (now.alpha**2 * 0.04 + now.sigma**2)  # Var(x_0 | x)
        true = between.small + between.clean**2 * open_ if step else open_
        expected += lost(true, getattr(between, variance) if step else between.small)
    images = space.quantized(0.1 + 0.2 * torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(1)))
    whole, sampled = (model.nats({"pixels": images}, draw, particles) for particles in (steps - 1, 4))
    assert float(whole.mean()) / space.dimensions == pytest.approx(expected, rel=3e-3)
    assert float(sampled.mean()) == pytest.approx(float(whole.mean()), rel=0.05)
    assert torch.equal(sampled[3:5], model.nats({"pixels": images[3:5]}, Draw(1, 0, range(3, 5)), 4)), (
        "an image's likelihood must not depend on its batch"
    )
    assert float(model.bits_per_dimension({"pixels": images}, draw, steps - 1).mean()) == pytest.approx(
        expected / math.log(2), rel=3e-3
    )


def test_ode_likelihood_of_gaussian_data_converges_to_its_density(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each dimension is independent, so a probe of ±1 gives the exact trace.

    The rest is the second-order error of the steps.
    """
    clean = torch.tensor([[0.2, 0.7], [1.1, 0.65]], dtype=torch.float64)
    probe = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    expected, errors = torch.distributions.Normal(MEAN, DEVIATION).log_prob(clean).sum(1), []
    for steps in (20, 40, 80):
        monkeypatch.setattr(ode_likelihood, "STEPS", steps)
        found = ode_likelihood.log_density(
            lambda values, at: oracle(values, angle(at)), clean, ode_likelihood.angles(math.pi / 2), probe
        )
        errors.append(float((found - expected).abs().max()))
    assert errors[-1] < 2e-3
    assert [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)] == pytest.approx([2, 2], abs=0.1)
    for family, keys in ((edm, EdmNet), (flow_matching, FlowNet)):
        model = family.create(Space(1, 4, 4, 17), keys(width=8, channel_multipliers=(1,)))
        for at in (0.001, 0.4, model.max_angle()):
            level = model.at_angle(at)
            assert math.atan2(level.sigma, level.alpha) == pytest.approx(at)
        assert model.at_angle(model.max_angle()).sigma == pytest.approx(model.path.initial_std)


class ZeroNet(torch.nn.Module):
    """Predicts 0, as a new network does."""

    def forward(self, noisy: Tensor, told: Tensor, classes: Tensor | None, beside: Tensor | None) -> Tensor:
        return torch.zeros_like(noisy)


def test_edm_likelihood_of_a_new_model_is_that_of_its_gaussian() -> None:
    """A new EDM predicts D = c_skip x: its pixels are N(0, 0.5²), whose mass over each level is known."""
    space = Space(1, 4, 4, 65)
    model = edm.create(space, EdmNet(width=8, channel_multipliers=(1,)))
    model.net = ZeroNet()  # type: ignore[assignment]
    levels = torch.arange(65, dtype=torch.uint8).repeat(16)[:1024].view(64, 1, 4, 4)
    zero, deviation = torch.zeros((), dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    inside = (levels > 0) & (levels < 64)
    levels = torch.where(inside, levels, 32)
    expected = -log_mass(space, levels, zero, deviation).flatten(1).sum(1)
    found = model.nats({"pixels": levels}, Draw(0, 0, range(64)), 2).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.5)
    assert torch.equal(found[5:7].float(), model.nats({"pixels": levels[5:7]}, Draw(0, 0, range(5, 7)), 2))


def test_latent_canvas_normalizes_and_does_not_clamp_latents(tmp_path: Path) -> None:
    model: Any = tiny.prepare(scratch.recipe("latent-diffusion", tmp_path / "run")).model
    read = model.canvas.encode(model.examples(99)["pixels"])
    assert (read.mean((0, 2, 3)).abs() < 1e-5).all() and torch.allclose(
        read.std((0, 2, 3)), torch.ones(read.shape[1]), atol=1e-4
    )
    assert torch.equal(model.canvas.clamp(1e3 * read), 1e3 * read)
    pixels = model.space.scaled(model.examples(4)["pixels"])
    expected = model.net.first.vae.decode(model.net.first.vae.encode(pixels).latent_dist.mode()).sample
    found = model.canvas.decode(model.canvas.encode(model.examples(4)["pixels"]))
    assert (found.int() - model.space.quantized(expected).int()).abs().max() <= 1


def test_cascade_adds_noise_to_its_condition_and_samples_through_both_stages(tmp_path: Path) -> None:
    model: Any = tiny.prepare(scratch.recipe("cascade", tmp_path / "run")).model
    condition, levels, draw = model._condition, model.examples(4)["pixels"], Draw(0, 7, range(4))
    beside = condition.for_training(levels, draw)
    share = 0.5 * draw.uniform("augmentation")
    assert torch.equal(beside[:, 1], share.view(-1, 1, 1).expand(-1, 8, 8))
    small = torch.nn.functional.avg_pool2d(model.space.scaled(levels), 2)
    clean = condition.beside(small, torch.zeros(4), torch.randn_like(small))
    torch.testing.assert_close(clean[:, :1], torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear"))
    noise = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        condition.beside(small, torch.ones(4), noise)[:, :1],
        torch.nn.functional.interpolate(noise, size=(8, 8), mode="bilinear"),
    )
    request = SampleRequest((), (), 3, 1.0)
    first = model.first.generate(torch.zeros(2, dtype=torch.long), Draw(0, "low", (5, 6)), request)
    told = condition.for_sampling(torch.zeros(2, dtype=torch.long), Draw(0, "sample", (5, 6)), request)
    noise = Draw(0, "sample", (5, 6)).normal("augmentation noise", (1, 4, 4))
    torch.testing.assert_close(told, condition.beside(model.space.scaled(first), torch.full((2,), 0.1), noise))


@pytest.mark.parametrize(
    ("name", "overrides", "told"),
    [
        ("ddpm", ["sample.sampler=ddmi"], r'no sampler is called "ddmi"[\s\S]*did you mean "dd'),
        ("vae", ["sample.sampler=ddim"], r"family beta-vae has no samplers to choose from"),
        ("edm", ["sample.eta=0.5"], r"eta is DDIM's"),
        (
            "ddpm",
            ["net.channel_multipliers=[1,2,2,2,2]"],
            r"8×8 pixels cannot be halved 4 times[\s\S]*fewer net.channel_multipliers",
        ),
        ("ddpm", ["net.channel_multipliers=[]"], r"at least one number"),
        ("ddpm", ["net.width=10"], r"a multiple of 4"),
        ("ddpm", ["diffusion={zero_terminal_snr: true}"], r"already end in noise"),
        ("ddpm", ["model.prediction=epsilon"], r"remove model.prediction"),
        ("flow-matching", ["flow.shift=3"], r"set net.shift"),
        ("flow-matching", ["diffusion={huber: 0.1}"], r"is for families with a noise schedule"),
        ("edm", ["net.sigma_min=90"], r"net.sigma_min must be less than net.sigma_max"),
        ("cascade", ["model.base_run=null"], r"needs a first[\s\S]*scratch/cascade-low"),
        ("cascade", ["data.resolution=4"], r"4×4 is not a multiple"),
        ("cascade", ["data.levels=5"], r"other channels, levels or classes"),
        ("ddpm", ["model.base_run=runs/x"], r"generates images from noise alone"),
        ("latent-diffusion", ["model.vae=null"], r"train scratch/emoji-vae first"),
        ("latent-diffusion", ["data.grayscale=true"], r"has 3 input channels[\s\S]*data.grayscale: false"),
        ("latent-diffusion", ["diffusion={zero_terminal_snr: true}"], r"already end in noise"),
    ],
)
def test_diffusion_recipe_with_invalid_values_is_refused(
    name: str, overrides: list[str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        tiny.prepare(scratch.recipe(name, tmp_path / "run", *overrides))
    assert re.search(told, "\n".join(caught.value.lines()))


def test_sample_with_another_sampler_gives_another_image(tmp_path: Path) -> None:
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
        ({"steps": 51}, "exceed the 50 steps"),
    ]
    for keys, told in refused:
        with pytest.raises(UserError, match=told):
            sample(run, [], **keys)
    assert load_recipe("scratch/ddpm").sample.sampler == "ddim"

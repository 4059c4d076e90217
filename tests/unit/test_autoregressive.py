"""Autoregressive families: what each pixel depends on, normalized probabilities, and samples that follow them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.config.nets import section
from finetune.models.base import SampleRequest
from finetune.models.registry import load_implementation
from finetune.models.scratch.base import LikelihoodModel, Space
from finetune.models.scratch.distributions import Categorical, Logistics
from finetune.rng import Draw

REQUEST = SampleRequest((), (), 1, 1.0)


def model_of(family: str, space: Space, seed: int = 0, **keys: Any) -> Any:
    torch.manual_seed(seed)
    model = load_implementation(family).create(space, section(family)(**keys))  # type: ignore[misc]
    with torch.no_grad():  # layers initialized to zero would hide mistakes
        for parameter in model.net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.net.eval()
    return model


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_logistic_mixture_is_normalized(levels: int) -> None:
    """Including far tails and the smallest scale (−7)."""
    space = Space(1, 1, 1, levels)
    mixture = Logistics(space, 3)
    torch.manual_seed(0)
    parameters = torch.randn(40, mixture.parameters, 1, 1) * 2
    parameters[:10, 6:] = -9.0
    parameters[10:20, 3:6] = 1.7
    everything = torch.arange(levels, dtype=torch.uint8).view(-1, 1, 1, 1)
    total = sum(mixture.log_prob(parameters, one.expand(40, -1, -1, -1)).double().exp() for one in everything.split(1))
    assert torch.allclose(torch.as_tensor(total), torch.ones((), dtype=torch.float64), atol=2e-5)


def test_logistic_mixture_is_the_cdf_difference_between_bin_edges() -> None:
    """Compared with the CDF in float64; a channel's mean depends on the channels before it, not on those after."""
    space, k = Space(3, 1, 1, 256), 2
    mixture = Logistics(space, k)
    torch.manual_seed(1)
    parameters = torch.randn(1, mixture.parameters, 1, 1)
    levels = torch.tensor([0, 131, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    logits, means, scales, coefficients = (
        part.flatten().double() for part in parameters.flatten().split([k, 3 * k, 3 * k, 3 * k])
    )
    x = levels.flatten().double() / 127.5 - 1
    tanh = coefficients.view(3, k).tanh()
    total = torch.zeros((), dtype=torch.float64)
    for component in range(k):
        m = means.view(3, k)[:, component]
        mean = [m[0], m[1] + tanh[0, component] * x[0], m[2] + tanh[1, component] * x[0] + tanh[2, component] * x[1]]
        probability = logits.softmax(0)[component]
        for channel, (low, high) in enumerate(
            ((-math.inf, x[0] + 1 / 255), (x[1] - 1 / 255, x[1] + 1 / 255), (x[2] - 1 / 255, math.inf))
        ):
            s = scales.view(3, k)[channel, component].exp()
            probability = probability * (
                torch.sigmoid((high - mean[channel]) / s) - torch.sigmoid((low - mean[channel]) / s)
            )
        total = total + probability
    assert float(mixture.log_prob(parameters, levels)) == pytest.approx(float(total.log()), abs=2e-5)


@pytest.mark.parametrize("observation", [Categorical(Space(3, 1, 1, 5)), Logistics(Space(3, 1, 1, 5), 2)])
def test_distribution_sample_frequencies_match_probabilities(observation: Any) -> None:
    torch.manual_seed(2)
    parameters, count = torch.randn(1, observation.parameters, 1, 1), 20_000
    every = torch.tensor(list(itertools.product(range(5), repeat=3)), dtype=torch.uint8)[:, :, None, None]
    expected = observation.log_prob(parameters.expand(len(every), -1, -1, -1), every).flatten().double().exp()
    assert float(expected.sum()) == pytest.approx(1, abs=1e-5)
    drawn = (
        observation.sample(parameters.expand(count, -1, -1, -1), torch.rand(count, observation.draws, 1, 1))
        .flatten(1)
        .long()
    )
    _chi_squared((drawn * torch.tensor([25, 5, 1])).sum(1), expected)


def _chi_squared(places: Tensor, expected: Tensor) -> None:
    """Pearson's statistic is at most five standard deviations above its mean.

    Bins with fewer than 5 expected are pooled.
    """
    found, wanted = torch.bincount(places, minlength=len(expected)).double(), expected * len(places)
    rare = wanted < 5
    found, wanted = (torch.cat([values[~rare], values[rare].sum()[None]]) for values in (found, wanted))
    statistic, freedom = float(((found - wanted).square() / wanted.clamp(min=1e-9)).sum()), len(found) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), statistic


FAMILIES = {
    "pixelcnn++": {"width": 8, "blocks": 4, "dilation": 2, "mixtures": 2},
    "imagegpt": {"width": 8, "layers": 1, "heads": 2},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_autoregressive_model_is_normalized_and_samples_follow_its_probabilities(name: str) -> None:
    """Enumerates all 81 images of 2×2 pixels with 3 levels."""
    space = Space(1, 2, 2, 3)
    model: LikelihoodModel = model_of(name, space, **FAMILIES[name])
    every = torch.tensor(list(itertools.product(range(3), repeat=4)), dtype=torch.uint8).view(-1, 1, 2, 2)
    probabilities = (-model.nats({"pixels": every}, Draw(0, 0, range(81)))).double().exp()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        drawn = model.generate(None, Draw(0, "sample", range(8000)), REQUEST).flatten(1).long()
    _chi_squared((drawn * torch.tensor([27, 9, 3, 1])).sum(1), probabilities)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("classes", [(), ("a", "b")])
def test_autoregressive_sampling_with_caches_matches_uncached(name: str, classes: tuple[str, ...]) -> None:
    space = Space(1, 5, 6, 7, classes)
    model = model_of(name, space, **FAMILIES[name])
    which = torch.tensor([0, 1, 2]) if classes else None
    draw = Draw(0, "sample", range(3))
    with torch.no_grad():
        assert torch.equal(model.generate(which, draw, REQUEST), model.generate_uncached(which, draw))


def test_imagegpt_token_depends_on_exactly_the_earlier_tokens() -> None:
    """Edits each token in turn; a pixel has three channels, in the order of `tokens`."""
    space = Space(3, 2, 2, 4)
    net = model_of("imagegpt", space, width=8, layers=1, heads=2).net
    levels = torch.randint(4, (1, 3, 2, 2), dtype=torch.uint8)
    tokens = net.tokens(levels)
    assert torch.equal(net.levels(tokens), levels)
    assert tokens[0, :4].tolist() == [*levels[0, :, 0, 0].tolist(), levels[0, 0, 0, 1]]
    with torch.no_grad():
        before = net.transformer(tokens, None)
        for place in range(12):
            edited = tokens.clone()
            edited[0, place] = (edited[0, place] + 1) % 4
            moved = (net.transformer(edited, None) - before).abs().amax(-1)[0]
            assert torch.equal(moved > 1e-7, torch.arange(12) > place)


def test_imagegpt_palette_finds_the_colors_of_the_data() -> None:
    from finetune.models.scratch.autoregressive.imagegpt import k_means

    colors = torch.tensor([[0.0, 0, 0], [250, 0, 0], [0, 250, 0], [9, 9, 250]])
    found = k_means(colors.repeat_interleave(torch.tensor([50, 3, 2, 1]), 0) + torch.rand(56, 3), 4)
    assert torch.cdist(colors, found).amin(1).max() < 2
    assert len(k_means(colors, 6)) == 6


def test_pixelcnn_pixel_depends_on_exactly_the_earlier_pixels() -> None:
    """By the gradient of every pair of pixels, so there is no blind spot."""
    space = Space(3, 5, 7, 256)
    model = model_of("pixelcnn++", space, width=8, blocks=4, dilation=2, mixtures=1)
    scaled = torch.randn(1, 3, 5, 7, requires_grad=True)
    out = model.net.cnn(scaled, None)
    seen = torch.zeros(35, 35, dtype=torch.bool)
    for place in range(35):
        (gradient,) = torch.autograd.grad(out.flatten(2)[0, :, place].square().sum(), scaled, retain_graph=True)
        seen[place] = (gradient[0].abs() > 0).any(0).flatten()
    assert torch.equal(seen, torch.ones(35, 35, dtype=torch.bool).tril(-1))

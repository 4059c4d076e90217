"""Flows: inverses and determinants by autograd and another library, and the bound of dequantization."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.config.nets.glow import Net as GlowNet
from finetune.config.nets.realnvp import Net as RealNvpNet
from finetune.models.scratch.base import Space
from finetune.models.scratch.flows import glow, realnvp
from finetune.models.scratch.flows.bijections import (
    ActNorm,
    Affine,
    Bijection,
    Checkerboard,
    InvertibleConv,
    LearnedPrior,
    Logit,
    MixtureCdf,
    Squeeze,
)
from finetune.rng import Draw

PARTS: dict[str, tuple[Bijection, tuple[int, int, int]]] = {
    "logit": (Logit(0.05), (2, 2, 2)),
    "centered": (Logit(0.0), (2, 2, 2)),
    "squeeze": (Squeeze(), (1, 4, 2)),
    "checkerboard": (Checkerboard(), (1, 2, 4)),
    "checkerboard undone": (Checkerboard(inverted=True), (4, 2, 1)),
    "actnorm": (ActNorm(3), (3, 2, 1)),
    "1×1": (InvertibleConv(4), (4, 2, 1)),
    "affine": (Affine(4, False, (6, 1, 0.0)), (4, 2, 2)),
    "mixture": (MixtureCdf(4, True, (6, 0, 0.0), 3), (4, 2, 2)),
    "rest": (LearnedPrior(4, 6), (4, 2, 2)),
}


def perturbed(module: torch.nn.Module, much: float = 0.2) -> torch.nn.Module:
    """In float64, with weights moved away from their initial values, at which many maps are the identity."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(torch.randn_like(parameter) * much)
    return module.eval()


def determinant(forward: Any, values: Tensor) -> Tensor:
    """log |det| of the full Jacobian of one example, by autograd."""

    def flat(one: Tensor) -> Tensor:
        found: Tensor = forward(one.view_as(values))[0].flatten()
        return found

    found: Tensor = torch.linalg.slogdet(torch.autograd.functional.jacobian(flat, values.flatten()))[1]
    return found


@pytest.mark.parametrize("name", PARTS)
def test_bijection_has_the_right_inverse_and_determinant(name: str) -> None:
    part, shape = PARTS[name]
    perturbed(part)
    values = torch.rand(1, *shape, dtype=torch.float64) * 0.9 + 0.05
    mapped, change = part(values)
    assert change.shape == (1,)
    torch.testing.assert_close(part.inverse(mapped), values, rtol=0, atol=1e-9)
    torch.testing.assert_close(change[0], determinant(part, values), rtol=0, atol=1e-9)


def flow_model(family: str, dequantization: Any = "uniform", coupling: Any = "affine", much: float = 0.2) -> Any:
    keys: dict[str, Any] = {
        "scales": 2,
        "steps": 2,
        "width": 6,
        "blocks": 1,
        "mixtures": 2,
        "coupling": coupling,
        "dequantization": dequantization,
    }
    space = Space(1, 4, 4, 5)
    model = glow.create(space, GlowNet(**keys)) if family == "glow" else realnvp.create(space, RealNvpNet(**keys))
    perturbed(model.net, much)
    return model


@pytest.mark.parametrize("coupling", ["affine", "mixture"])
@pytest.mark.parametrize("family", ["glow", "realnvp"])
def test_whole_flow_has_the_right_inverse_and_determinant(family: str, coupling: str) -> None:
    """From pixels to latents: logit, squeezes, splits, normalization, convolutions and couplings in one Jacobian."""
    model = flow_model(family, coupling=coupling)
    values = torch.rand(1, 1, 4, 4, dtype=torch.float64) * 0.9 + 0.05
    latent, change = model.net.flow(values)
    assert latent.shape == (1, 16)
    torch.testing.assert_close(change[0], determinant(model.net.flow, values), rtol=0, atol=1e-8)
    torch.testing.assert_close(model.net.flow.inverse(latent), values, rtol=0, atol=1e-8)
    # In float32 the error grows with the maps' scale: here it is that of a model after some training.
    flow = flow_model(family, coupling=coupling, much=0.05).net.float().flow
    torch.testing.assert_close(flow.inverse(flow(values.float())[0]), values.float(), rtol=0, atol=1e-5)


def test_variational_dequantization_noise_has_its_declared_density() -> None:
    net = flow_model("glow", "variational").net.noise
    levels, normal = torch.randint(5, (1, 1, 4, 4), dtype=torch.uint8), torch.randn(1, 1, 4, 4, dtype=torch.float64)
    u, log_q = net(levels, normal)
    assert ((u > 0) & (u < 1)).all()
    density = (-0.5 * (normal.square() + math.log(2 * math.pi))).sum() - determinant(
        lambda one: net(levels, one), normal
    )
    torch.testing.assert_close(log_q[0], density, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dequantization", ["uniform", "variational"])
def test_dequantization_bound_converges_to_the_probability_of_levels(dequantization: str) -> None:
    """One pixel of three levels over a density known in closed form: the bound converges to its mass between edges.

    Detects known mistakes: noise of half the width, normal noise, a wrong number of levels, a missing determinant.
    """
    space = Space(1, 2, 2, 3)
    model = glow.create(space, GlowNet(scales=1, steps=1, width=4, blocks=0, margin=0.0, dequantization=dequantization))  # type: ignore[arg-type]
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.net.flow.named_parameters():
            if name.endswith(("lower", "upper", "log_diagonal")):
                parameter.zero_()  # the 1×1 convolution becomes a signed permutation
            elif name.endswith("log_scale"):
                parameter.fill_(math.log(2.5))
        if model.net.noise is not None:
            for parameter in model.net.noise.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    normal = torch.distributions.Normal(0.0, 1.0)
    edges = normal.cdf((torch.arange(4) / 3 - 0.5) * 2.5)
    mass = (edges[1:] - edges[:-1]).log()
    every = torch.tensor(list(itertools.product(range(3), repeat=4)), dtype=torch.uint8).view(-1, 1, 2, 2)
    exact = -mass[every.long()].flatten(1).sum(1)
    one, many = (model.nats({"pixels": every}, Draw(0, 0, range(81)), particles) for particles in (1, 80))
    assert float(one.mean()) > float(exact.mean())
    if dequantization == "uniform":
        torch.testing.assert_close(many, exact, rtol=0, atol=0.3)
        assert float((many - exact).mean()) == pytest.approx(0, abs=0.03)
    else:  # untrained noise rarely falls where it matters most: many samples come close, from above
        assert float(exact.mean()) - 0.02 < float(many.mean()) < min(float(one.mean()), float(exact.mean()) + 0.5)


def test_actnorm_initialization_normalizes_the_data() -> None:
    norm = ActNorm(2)
    norm.initializing = True
    mapped, _ = norm(torch.randn(64, 2, 4, 4) * torch.tensor([3.0, 0.1])[:, None, None] + 5)
    deviation, mean = torch.std_mean(mapped, (0, 2, 3))
    torch.testing.assert_close(deviation, torch.ones(2), rtol=0, atol=1e-3)
    torch.testing.assert_close(mean, torch.zeros(2), rtol=0, atol=1e-3)


def test_affine_coupling_matches_normflows() -> None:
    flows = pytest.importorskip("normflows")
    ours = perturbed(Affine(4, True, (6, 0, 0.0))).float()
    theirs = flows.flows.AffineCoupling(Interleaved(ours), scale=True, scale_map="exp")
    kept, changing = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2)
    (_, changed), change = theirs([kept, changing])
    mapped, our_change = ours(torch.cat([kept, changing], 1))
    torch.testing.assert_close(mapped, torch.cat([kept, changed], 1))
    torch.testing.assert_close(our_change, change)


class Interleaved(torch.nn.Module):
    """Our coupling's network as normflows reads one: shift and log-scale interleaved."""

    def __init__(self, coupling: torch.nn.Module) -> None:
        super().__init__()
        self.coupling = coupling

    def forward(self, kept: Tensor) -> Tensor:
        log_scale, shift = self.coupling.conditioner(kept).chunk(2, 1)  # type: ignore[operator]
        return torch.stack([shift, 3 * (log_scale / 3).tanh()], 2).flatten(1, 2)

"""Autoencoders from scratch: bounds against quadrature, losses as sums, and the gradients of codebooks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.config.nets.vae import Net as VaeNet
from finetune.config.nets.vqvae import Net as VqNet
from finetune.models.scratch.base import Space
from finetune.models.scratch.vae import vae
from finetune.models.scratch.vae.vae import gaussian_kl, log_normal
from finetune.models.scratch.vq import vqvae
from finetune.models.scratch.vq.vqvae import Quantizer, perplexity
from finetune.rng import Draw

SPACE = Space(1, 4, 4, 5)


def vae_of(**keys: Any) -> Any:
    torch.manual_seed(0)
    model = vae.create(SPACE, VaeNet(**{"width": 8, "halvings": 1, "latent": 1, "mixtures": 2, **keys}))
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.net.eval()
    return model


def random_levels(count: int, seed: int = 1) -> Tensor:
    return torch.randint(
        SPACE.levels, (count, *SPACE.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("observation", ["categorical", "logistics"])
def test_importance_weighted_bound_is_below_log_p_and_converges_to_it(observation: str) -> None:
    """With one latent dimension, log p(x) = log ∫ N(z; 0, 1) p(x|z) dz by the trapezoid rule on 801 points."""
    model = vae_of(distribution=observation)
    levels = random_levels(6)
    z = torch.linspace(-8, 8, 801)
    with torch.no_grad():
        parameters = model.net.decode(z[:, None], None)
        given = torch.stack(
            [model._distribution.log_prob(parameters, one.expand(801, -1, -1, -1)).flatten(1).sum(1) for one in levels]
        )
    exact = (given + log_normal(z)).double().logsumexp(1) + math.log(16 / 800)
    bounds = []
    for particles in (1, 5, 50, 1000):
        images = levels.repeat_interleave(40 if particles < 1000 else 2, 0)
        found = -model.nats({"pixels": images}, Draw(0, 0, range(len(images))), particles)
        bounds.append(float(found.mean()))
    assert bounds[0] < bounds[1] < bounds[2] < float(exact.mean()) + 0.02
    assert bounds[3] == pytest.approx(float(exact.mean()), abs=0.02)


def test_vae_loss_sums_over_pixels_and_latent_dimensions() -> None:
    """β scales only the KL term; the loss of an image does not depend on the others in its batch."""
    levels, draw = random_levels(3), Draw(0, 0, range(3))
    losses = {}
    for beta in (0.0, 1.0, 3.0):
        model = vae_of(latent=4, beta=beta)
        (train_step,) = model.train_steps()
        with torch.no_grad():
            losses[beta] = train_step.loss({"pixels": levels}, draw)
            mean, logvar = model.net.encode(levels, None)
    kl = gaussian_kl(mean, logvar)
    torch.testing.assert_close(losses[1.0] - losses[0.0], kl.sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses[3.0] - losses[0.0], 3 * kl.sum(1), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        latent = mean + (0.5 * logvar).exp() * draw.normal("posterior", (1, 4))[:, 0]
        pixels = model._distribution.log_prob(model.net.decode(latent, None), levels)
        torch.testing.assert_close(losses[0.0], -pixels.flatten(1).sum(1))
        alone = train_step.loss({"pixels": levels[2:]}, Draw(0, 0, [2]))
    torch.testing.assert_close(alone[0], losses[3.0][2])
    torch.testing.assert_close(model.kl_by_dimension({"pixels": levels}), kl.mean(0))


def test_gaussian_kl_matches_a_monte_carlo_estimate() -> None:
    mean, logvar = torch.tensor([[0.7, -1.2, 0.0]]), torch.tensor([[0.3, -2.0, 0.0]])
    drawn = mean + (0.5 * logvar).exp() * torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0))
    sampled = (log_normal(drawn, mean, logvar) - log_normal(drawn)).mean(0)
    torch.testing.assert_close(gaussian_kl(mean, logvar)[0], sampled, rtol=0, atol=0.01)


def test_vae_reconstruction_interpolation_and_arithmetic_are_consistent() -> None:
    model, images = vae_of(latent=4), random_levels(4)
    batch = {"pixels": images}
    rebuilt = model.reconstructions(batch)
    way = model.interpolation(batch, 5)
    assert way.shape == (5, *SPACE.shape)
    assert torch.equal(way[0], rebuilt[0]) and torch.equal(way[-1], rebuilt[1])
    assert torch.equal(model.arithmetic(batch, batch, batch), rebuilt), "adding and subtracting one vector changes it"
    first, second = {"pixels": images[:1]}, {"pixels": images[1:2]}
    assert torch.equal(model.arithmetic(first, second, first), rebuilt[1:2])


def test_quantizer_gradient_is_straight_through() -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(7, 3, 100)
    latent, seen = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)
    vectors, to_book, to_latent = quantizer(latent)
    assert torch.equal(vectors, quantizer.vectors(quantizer.indices(latent)))
    (gradient,) = torch.autograd.grad((vectors * seen).sum(), latent, retain_graph=True)
    assert torch.equal(gradient, seen)
    distance = (latent - vectors).detach()
    torch.testing.assert_close(to_book, distance.square().flatten(1).sum(1))
    torch.testing.assert_close(to_latent, to_book)
    nearest = torch.cdist(latent.movedim(1, -1).flatten(0, 2), quantizer.book).argmin(1)
    assert torch.equal(quantizer.indices(latent).flatten(), nearest)


def test_vqvae_beta_scales_only_the_encoder_gradient() -> None:
    """The encoder's gradient toward its codes is 2β(z − e); the codebook's is 2(e − z) for every β."""
    found = {}
    for beta in (0.25, 1.0):
        torch.manual_seed(0)
        quantizer = Quantizer(5, 2, 100)
        latent = torch.randn(1, 2, 3, 3, requires_grad=True)
        _, to_book, to_latent = quantizer(latent)
        found[beta] = torch.autograd.grad((to_book + beta * to_latent).sum(), (latent, quantizer.book))
    torch.testing.assert_close(found[0.25][0], 0.25 * found[1.0][0])
    torch.testing.assert_close(found[0.25][1], found[1.0][1])
    with torch.no_grad():
        torch.testing.assert_close(found[1.0][0], 2 * (latent - quantizer.vectors(quantizer.indices(latent))))
    # The model's loss combines them with this β.
    model = vqvae.create(SPACE, VqNet(width=4, halvings=1, codebook_size=5, code_dim=2, beta=0.25))
    levels = random_levels(2)
    model.net.eval()
    parameters, to_book, to_latent = model.net(levels)
    expected = -model._distribution.log_prob(parameters, levels).flatten(1).sum(1) + to_book + 0.25 * to_latent
    torch.testing.assert_close(model.train_steps()[0].loss({"pixels": levels}, Draw(0, 0, range(2))), expected)


def test_perplexity_counts_used_codes() -> None:
    assert float(perplexity(torch.arange(8).repeat(3), 8)) == pytest.approx(8)
    assert float(perplexity(torch.full((10,), 3), 8)) == pytest.approx(1)


def test_quantizer_with_dead_codes_restarts_them_at_poorly_coded_latents() -> None:
    quantizer = Quantizer(4, 2, 3)
    with torch.no_grad():
        quantizer.book.copy_(torch.tensor([[0.0, 0], [50, 50], [60, 60], [70, 70]]))
    latent = torch.tensor([[0.1, 0.0], [0.0, 0.2], [8.0, 8.0], [9.0, -9.0]]).T.view(1, 2, 4, 1)
    for _ in range(2):
        quantizer(latent)
        assert perplexity(quantizer.indices(latent), 4) == pytest.approx(1)
    quantizer(latent)
    assert set(quantizer.indices(latent).flatten().tolist()) == {0, 1, 2, 3}
    assert quantizer.book[1].tolist() == [9.0, -9.0], "the first dead code takes the latent with the largest error"
    quantizer.eval()
    before = quantizer.idle.clone()
    quantizer(latent * 0)
    assert torch.equal(quantizer.idle, before), "evaluation mode must not update the counters"


def test_vqgan_train_step_trains_only_its_own_network() -> None:
    torch.manual_seed(0)
    model = vqvae.create(SPACE, VqNet(width=4, halvings=1, codebook_size=5, code_dim=2, discriminator_weight=0.5))
    batch, draw = {"pixels": random_levels(2)}, Draw(0, 0, range(2))
    autoencoder, critic = model.train_steps()
    plain = vqvae.create(SPACE, VqNet(width=4, halvings=1, codebook_size=5, code_dim=2))
    plain.net.load_state_dict(model.net.state_dict())
    autoencoder.loss(batch, draw).mean().backward()
    assert all(parameter.grad is None for parameter in critic.net.parameters())
    model.net.zero_grad(set_to_none=True)
    # The discriminator's share of the gradient at the last layer is `discriminator_weight` times the reconstruction's.
    last = list(model.net.decoder.parameters())[-2]
    (whole,) = torch.autograd.grad(autoencoder.loss(batch, draw).mean(), last)
    other = list(plain.net.decoder.parameters())[-2]
    (without,) = torch.autograd.grad(plain.train_steps()[0].loss(batch, draw).mean(), other)
    assert float((whole - without).norm()) == pytest.approx(0.5 * float(without.norm()), rel=0.02)
    critic.loss(batch, draw).mean().backward()
    assert all(parameter.grad is None for parameter in model.net.parameters())
    assert all(parameter.grad is not None for parameter in critic.net.parameters())

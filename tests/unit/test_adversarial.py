"""GANs: losses, penalties, minibatch statistics, unrolling, progressive growing, augmentation and training steps."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from benchmarks import bench_modes
from finetune.config.nets.dcgan import Net
from finetune.config.nets.r3gan import Net as R3Net
from finetune.errors import UserError
from finetune.models.objectives.gan_losses import ADVERSARIAL_LOSSES, one_centered_penalty, zero_centered_penalty
from finetune.models.scratch.base import Space
from finetune.models.scratch.gan import dcgan, r3gan
from finetune.models.scratch.gan.ada import MAX_PROBABILITY, Augmentation
from finetune.models.scratch.gan.base import DiscriminatorStep, GeneratorStep
from finetune.models.scratch.gan.dcgan import Dcgan, Growth
from finetune.models.scratch.gan.minibatch_stats import MinibatchDiscrimination, stddev
from finetune.rng import Draw
from tests.helpers import scratch, tiny

SPACE = Space(3, 8, 8, 256)
SMALL = Net(width=8, halvings=2, latent=4, discriminator_norm="none", generator_norm="none")


def make(**changes: Any) -> Dcgan:
    torch.manual_seed(0)
    return dcgan.create(SPACE, dataclasses.replace(SMALL, **changes))


def make_batch(count: int = 4) -> dict[str, Tensor]:
    return {
        "pixels": torch.randint(
            256, (count, *SPACE.shape), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
        )
    }


def train_steps(model: Dcgan) -> tuple[DiscriminatorStep, GeneratorStep]:
    discriminator, generator = model.train_steps()
    assert isinstance(discriminator, DiscriminatorStep) and isinstance(generator, GeneratorStep)
    return discriminator, generator


def test_adversarial_losses_match_the_papers_and_stay_finite() -> None:
    true, made = torch.linspace(-9, 9, 7, dtype=torch.float64), torch.linspace(5, -7, 7, dtype=torch.float64)
    logistic, relativistic = ADVERSARIAL_LOSSES["logistic"], ADVERSARIAL_LOSSES["relativistic"]
    torch.testing.assert_close(logistic.discriminator(true, made), -true.sigmoid().log() - (1 - made.sigmoid()).log())
    torch.testing.assert_close(logistic.generator(true, made), -made.sigmoid().log())
    torch.testing.assert_close(relativistic.discriminator(true, made), -(true - made).sigmoid().log())
    torch.testing.assert_close(relativistic.generator(true, made), -(made - true).sigmoid().log())
    torch.testing.assert_close(
        ADVERSARIAL_LOSSES["hinge"].discriminator(true, made), (1 - true).clamp(min=0) + (1 + made).clamp(min=0)
    )
    torch.testing.assert_close(ADVERSARIAL_LOSSES["wasserstein"].discriminator(true, made), made - true)
    for objective in ADVERSARIAL_LOSSES.values():
        for logit in (-200.0, 200.0):
            of_true, of_made = (torch.full((1,), sign * logit, requires_grad=True) for sign in (1, -1))
            for loss in (objective.discriminator(of_true, of_made), objective.generator(of_true, of_made)):
                gradients = torch.autograd.grad(loss.sum(), (of_true, of_made), allow_unused=True)
                assert loss.isfinite().all() and all(g is None or g.isfinite().all() for g in gradients)
    lost = torch.tensor([-20.0], requires_grad=True)  # log(1 − σ) would give a gradient of 2e-9
    assert torch.autograd.grad(logistic.generator(lost, lost).sum(), lost)[0].item() == pytest.approx(-1, abs=1e-6)


def test_gradient_penalty_of_a_linear_critic_has_its_closed_form() -> None:
    weight = torch.randn(3, 5, 7, dtype=torch.float64)
    weight *= 1.337 / weight.norm()
    images = torch.randn(4, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    logits = (images * weight).flatten(1).sum(1)
    assert one_centered_penalty(logits, images).tolist() == pytest.approx([0.337**2] * 4)
    assert zero_centered_penalty(logits, images).tolist() == pytest.approx([1.337**2 / 2] * 4)
    dead = nn.Linear(2, 1)
    nn.init.zeros_(dead.weight)
    places = torch.zeros(3, 2, requires_grad=True)
    one_centered_penalty(dead(places).squeeze(1), places).sum().backward()
    assert dead.weight.grad is not None and dead.weight.grad.isfinite().all(), (
        "the gradient is 0, and its norm must not give NaN"
    )


@pytest.mark.parametrize(("key", "weight"), [("r1", 3.0), ("r2", 3.0), ("gradient_penalty", 10.0)])
def test_lazy_penalty_is_weighted_by_its_interval(key: str, weight: float) -> None:
    plain, each, lazy = (
        train_steps(make(**more))[0] for more in ({}, {key: weight}, {key: weight, "penalty_every": 4})
    )
    batch = make_batch()

    def loss(train_step: DiscriminatorStep, step: int) -> Tensor:
        return train_step.loss(batch, Draw(0, step, range(4))).detach()

    once = loss(each, 0) - loss(plain, 0)
    assert (once > 0).all()
    torch.testing.assert_close(loss(lazy, 0) - loss(plain, 0), 4 * once)
    assert torch.equal(loss(lazy, 3), loss(plain, 3)) and not torch.equal(loss(lazy, 4), loss(plain, 4))


def test_gan_train_step_trains_only_its_own_network() -> None:
    model = make(objective="relativistic", r1=1.0, r2=1.0, ada_target=0.6)
    discriminator, generator = train_steps(model)
    for train_step, still in ((discriminator, model.net), (generator, model.discriminator)):
        before = {name: tensor.clone() for name, tensor in still.state_dict().items()}
        train_step.loss(make_batch(), Draw(0, 0, range(4))).mean().backward()
        assert all(parameter.grad is None for parameter in still.parameters())
        assert all(parameter.grad is not None for parameter in train_step.net.parameters())
        if train_step is generator:
            assert all(torch.equal(tensor, before[name]) for name, tensor in still.state_dict().items())
        train_step.net.zero_grad()


def test_minibatch_stddev_of_a_known_batch_has_the_expected_value() -> None:
    maps = torch.tensor([0, 0, 0, 0, 1, 2, 3, 4, 100, 200, 300, 400], dtype=torch.float64).view(12, 1, 1, 1)
    found = stddev(maps, 4)
    assert found.shape == (12, 2, 1, 1) and torch.equal(found[:, :1], maps)
    assert found[:, 1, 0, 0].tolist() == pytest.approx([99.51, 149.18, 188.86] * 4, abs=0.005)
    assert stddev(torch.randn(1, 3, 2, 2), 4)[0, 3].abs().max() == 0, "one image has no deviation"
    alike = torch.ones(4, 3, 2, 2, requires_grad=True)
    stddev(alike, 4).sum().backward()
    assert alike.grad is not None and alike.grad.isfinite().all()


def test_minibatch_discrimination_matches_a_loop() -> None:
    layer, features = MinibatchDiscrimination(6, kernels=3, width=2), torch.randn(5, 6)
    rows = [torch.stack([features[n] @ layer.tensor[:, kernel] for kernel in range(3)]) for n in range(5)]
    found = layer(features)[:, 6:]
    for n in range(5):
        for kernel in range(3):
            expected = sum(torch.exp(-(rows[n][kernel] - rows[m][kernel]).abs().sum()) for m in range(5) if m != n)
            torch.testing.assert_close(found[n, kernel], expected)


def test_spectral_norm_bounds_the_largest_singular_value_by_1() -> None:
    model = make(discriminator_norm="spectral")
    train_step = train_steps(model)[0]
    for step in range(30):
        train_step.loss(make_batch(), Draw(0, step, range(4)))
    model.discriminator.eval()
    layers = [module for module in model.discriminator.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    largest = [torch.linalg.svdvals(layer.weight.detach().flatten(1))[0].item() for layer in layers]
    assert len(layers) == 4 and largest == pytest.approx([1.0] * 4, abs=0.02)


def test_unrolled_generator_loss_differentiates_through_discriminator_steps() -> None:
    model, batch, draw = make(unroll=2, unroll_lr=0.5), make_batch(), Draw(0, 0, range(4))
    train_step = train_steps(model)[1]
    with torch.no_grad():
        for parameter in model.discriminator.parameters():
            parameter.mul_(1.7)  # with the initial weights, a step hardly changes the discriminator
    objective, true = ADVERSARIAL_LOSSES["logistic"], SPACE.scaled(batch["pixels"])
    made = model.net(draw.apart("generator").normal("latent", (4,)), None, draw).detach()
    weights = {
        name: parameter.detach().clone().requires_grad_() for name, parameter in model.discriminator.named_parameters()
    }
    for _ in range(2):
        of_true, of_made = (
            functional_call(model.discriminator, weights, (images, None, draw)) for images in (true, made)
        )
        gradients = torch.autograd.grad(objective.discriminator(of_true, of_made).mean(), list(weights.values()))
        weights = {
            name: (weight - 0.5 * slope).detach().requires_grad_()
            for (name, weight), slope in zip(weights.items(), gradients, strict=True)
        }
    judged = functional_call(model.discriminator, weights, (made, None, draw))
    before = {name: tensor.clone() for name, tensor in model.discriminator.state_dict().items()}
    loss = train_step.loss(batch, draw)
    torch.testing.assert_close(loss, objective.generator(judged, judged))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.discriminator.state_dict().items())

    weight = model.net.get_parameter("begin.weight")
    (gradient,) = torch.autograd.grad(loss.mean(), weight)
    again = model.net(draw.apart("generator").normal("latent", (4,)), None, draw)
    as_it_is = objective.generator(judged, functional_call(model.discriminator, weights, (again, None, draw))).mean()
    (at_once,) = torch.autograd.grad(as_it_is, weight)
    step = 0.01 * gradient / gradient.norm()
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            weight.add_(sign * step)
        ends.append(train_step.loss(batch, draw).mean().item())
    measured = (ends[0] - ends[1]) / 0.02
    assert measured == pytest.approx(gradient.norm().item(), rel=0.02)
    assert (at_once * step).sum().item() / 0.01 != pytest.approx(measured, rel=0.1), (
        "the gradient through the discriminator's steps is missing"
    )


def test_progressive_growing_fades_in_each_size() -> None:
    assert [Growth(10, 2).at(step) for step in (0, 9, 10, 15, 20, 29, 35, 40, 999)] == [0, 0, 0, 0.5, 1, 1, 1.5, 2, 2]
    model = make(grow_steps=10, generator_norm="pixel")
    generator, reader = model.net, model.discriminator.reader
    latent, images = torch.randn(3, 4), torch.randn(3, *SPACE.shape)
    drawn = {step: generator(latent, None, Draw(0, step, range(3))) for step in (0, 10, 11, 20, 40)}
    assert torch.equal(drawn[10], drawn[0]) and not torch.equal(drawn[11], drawn[0])
    for step, side in ((0, 2), (20, 4)):
        size = functional.avg_pool2d(drawn[step], 8 // side)
        assert (functional.interpolate(size, scale_factor=8 // side) - drawn[step]).abs().max() < 1e-6
    read = {step: reader(images, Draw(0, step, range(3))) for step in (0, 10, 11)}
    assert torch.equal(read[10], read[0]) and not torch.equal(read[11], read[0])
    generator.eval()
    assert torch.equal(generator(latent, None, Draw(0, "sample", range(3))), drawn[40]), (
        "samples have the size of the last step"
    )
    generator.train()
    for train_step in train_steps(model):
        train_step.loss(make_batch(), Draw(0, 0, range(4))).mean().backward()
        assert all(parameter.grad is not None for parameter in train_step.net.parameters()), (
            "DDP waits for a gradient of each parameter"
        )


def test_r3gan_initialization_gives_outputs_at_image_scale() -> None:
    torch.manual_seed(0)
    model = r3gan.create(Space(3, 32, 32, 256), R3Net(width=8, halvings=3, blocks=1))
    draw = Draw(0, 0, range(32))
    with torch.no_grad():
        made = model.net(draw.normal("latent", (64,)), None, draw)
        logits = model.discriminator(draw.normal("color", (3, 1, 1)).expand(-1, -1, 32, 32), None, draw)
    assert 0.4 < made.std() < 2 and 0.4 < logits.std() < 2, "no normalization layer corrects a wrong initial scale"


def test_augmentation_probability_follows_the_logits_and_starts_as_the_identity() -> None:
    layer, images, draw = Augmentation(0.6, 100), torch.rand(64, 3, 6, 8) * 2 - 1, Draw(0, 0, range(64))
    assert torch.equal(layer(images, draw), images)
    layer.steer(torch.ones(20))
    assert layer.probability.item() == pytest.approx(0.2)
    layer.steer(torch.tensor([1.0, 1, 1, -1]))  # a mean of 0.5 is below the target of 0.6
    assert layer.probability.item() == pytest.approx(0.16)
    for _ in range(9):
        layer.steer(torch.ones(20))
    assert layer.probability.item() == pytest.approx(MAX_PROBABILITY)
    moved = layer(images.requires_grad_(), draw)
    assert torch.equal(moved, layer(images, draw)) and not any(
        torch.equal(one, other) for one, other in zip(moved, images, strict=True)
    )
    moved.sum().backward()
    assert images.grad is not None and (images.grad.flatten(1).abs().sum(1) > 0).all()


def test_augmentation_with_fixed_parameters_gives_the_expected_images(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, image = Augmentation(0.6, 100), torch.rand(1, 3, 4, 4)

    def only(**values: float) -> Tensor:
        def drawn(_: Any, draw: Draw, name: str, neutral: float, given: Tensor) -> Tensor:
            return torch.full_like(given, values.get(name.replace(" ", "_"), neutral))

        monkeypatch.setattr(Augmentation, "_drawn", drawn)
        found: Tensor = layer(image, Draw(0, 0, [0]))
        return found

    torch.testing.assert_close(only(flip=-1), image.flip(3))
    torch.testing.assert_close(only(quarters=1), image.rot90(1, (2, 3)))
    torch.testing.assert_close(only(shift_0=0.25)[..., :3], image[..., 1:])
    torch.testing.assert_close(only(shift_1=0.25)[..., :3, :], image[..., 1:, :])
    torch.testing.assert_close(only(brightness=0.3), image + 0.3)
    torch.testing.assert_close(only(contrast=0.5), image / 2)
    assert only(saturation=0).std(1).max() < 1e-6


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["net.latent=0"], r"net\.latent must be between 1 and"),
        (["net.halvings=4"], r"cannot be halved 4 times"),
        (["net.discriminator_norm=batch"], r"gradient penalties are incompatible with batch normalization"),
        (
            ["net.minibatch=stddev", "net.stddev_group=3"],
            r"3 does not divide 4[\s\S]*train\.batch_size: 3",
        ),
        (
            ["net.minibatch=discrimination", "train.batch_size=1"],
            r"discrimination compares the images of a batch, and train.batch_size is 1",
        ),
        (["net.objective=minimax"], r"net\.objective"),
    ],
)
def test_gan_recipe_with_invalid_values_is_refused(overrides: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        tiny.prepare(scratch.recipe("wgan-gp", tmp_path / "run", *overrides))
    assert re.search(told, "\n".join(caught.value.lines()))


def test_bench_modes_reverse_kl_distinguishes_uniform_from_collapsed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_modes.reverse_kl(torch.arange(8).repeat(5), 8) == pytest.approx(0, abs=1e-12)
    assert bench_modes.reverse_kl(torch.zeros(40, dtype=torch.long), 8) == pytest.approx(math.log(8))
    monkeypatch.setattr(bench_modes, "STEPS", 2)
    monkeypatch.setattr(bench_modes, "BATCH", 8)
    for name, keys in bench_modes.LOSSES.items():
        found = bench_modes.play(bench_modes.Points(latent=2, **keys), *bench_modes.TASKS["ring"], seed=0)
        assert 0 <= found["reverse_kl"] <= math.log(8) and 0 <= found["good"] <= 1, name

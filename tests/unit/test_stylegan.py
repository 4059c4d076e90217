"""StyleGAN2's layers against loops and closed forms, and the equivariance of StyleGAN3's layers."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from finetune.config.loader import load_recipe
from finetune.config.nets.stylegan2 import Net
from finetune.errors import UserError
from finetune.models.base import SampleRequest
from finetune.models.scratch.base import Space
from finetune.models.scratch.gan import stylegan2, stylegan3
from finetune.models.scratch.gan.stylegan2 import PathLength, Styled, StyleGan2, path_lengths
from finetune.models.scratch.gan.stylegan3 import AliasFreeGenerator, downsampled, equivariance, low_pass, upsampled
from finetune.models.scratch.gan.stylegan_layers import EqualConv, Modulated, doubled, mixed, resampled
from finetune.rng import Draw

SPACE = Space(3, 16, 16, 256)
SMALL = Net(width=4, halvings=2, latent=5, style_dim=6, mapping_layers=2)


def make(**changes: Any) -> StyleGan2:
    torch.manual_seed(0)
    return stylegan2.create(SPACE, dataclasses.replace(SMALL, **changes))


@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_convolution_matches_per_image_weights(demodulate: bool) -> None:
    """Equations 1 and 3: outputs, gradients, and gradients of the gradients' squares, as penalties use them."""
    torch.manual_seed(0)
    layer = Modulated(4, 6, 3, 5, demodulate).double()
    maps, styles = (torch.randn(3, *shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 7, 8), (5,)))

    def explicit() -> Tensor:
        weights = layer.weight * layer.style(styles)[:, None, :, None, None] / (4 * 9) ** 0.5
        if demodulate:
            weights = weights / (weights.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
        return torch.stack(
            [functional.conv2d(one, weight, padding=1) for one, weight in zip(maps, weights, strict=True)]
        )

    leaves = [maps, styles, *layer.parameters()]
    directions = torch.randn(3, 6, 7, 8, dtype=torch.float64)
    for found, expected in zip(
        *(_differentiated(one, leaves, directions) for one in (layer(maps, styles), explicit())), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def _differentiated(out: Tensor, leaves: list[Any], directions: Tensor) -> list[Tensor]:
    """The outputs, their gradients, and the gradients of those gradients' squares."""
    input_gradients = torch.autograd.grad((out * directions).sum(), leaves, create_graph=True)
    return [
        out,
        *input_gradients,
        *torch.autograd.grad(torch.stack([slope.square().sum() for slope in input_gradients]).sum(), leaves),
    ]


@pytest.mark.parametrize(("up", "down", "padding"), [(1, 1, (2, 2)), (1, 2, (1, 1)), (2, 1, (2, 1)), (4, 1, (3, 0))])
def test_resampled_matches_a_depthwise_convolution(up: int, down: int, padding: tuple[int, int]) -> None:
    maps, kernel = torch.randn(2, 3, 6, 8), torch.randn(4)
    spread = torch.zeros(2, 3, 6 * up, 8 * up)
    spread[..., ::up, ::up] = maps
    square = torch.outer(kernel, kernel).expand(3, 1, 4, 4)
    expected = functional.conv2d(functional.pad(spread, padding * 2), square, stride=down, groups=3)
    torch.testing.assert_close(resampled(maps, kernel, padding, up, down), expected)


def test_resampling_preserves_positions_and_brightness() -> None:
    flat, ramp = torch.ones(1, 2, 8, 8), torch.arange(8.0).expand(1, 1, 8, 8)
    assert doubled(flat).shape == (1, 2, 16, 16)
    torch.testing.assert_close(doubled(flat)[..., 2:-2, 2:-2], torch.ones(1, 2, 12, 12))
    # The center of pixel n comes to lie between pixels 2n and 2n + 1.
    torch.testing.assert_close(doubled(ramp)[0, 0, 4, 3:-3], torch.arange(3, 13) / 2 - 0.25)
    for side in (1, 3):
        assert EqualConv(2, 5, side, halving=True)(flat).shape == (1, 5, 4, 4)
    kernel, other = low_pass(stylegan3.SAFE, 2), low_pass(stylegan3.SAFE, 4)
    wide = torch.arange(32.0).expand(1, 1, 32, 32)
    torch.testing.assert_close(
        upsampled(wide, kernel, 2)[0, 0, 32, 12:-12], torch.arange(12, 52) / 2 - 0.25, rtol=0, atol=5e-3
    )
    torch.testing.assert_close(
        upsampled(wide, other, 4)[0, 0, 64, 24:-24], torch.arange(24, 104) / 4 - 0.375, rtol=6e-3, atol=0
    )
    torch.testing.assert_close(
        downsampled(wide, kernel)[0, 0, 8, 4:-4], torch.arange(4, 12) * 2 + 0.5, rtol=0, atol=5e-3
    )


def test_style_mixing_switches_styles_at_a_layer() -> None:
    first, second = torch.zeros(3, 2), torch.ones(3, 2)
    assert mixed((first, second), 4, torch.tensor([1, 3, 4]))[..., 0].tolist() == [
        [0, 1, 1, 1],
        [0, 0, 0, 1],
        [0, 0, 0, 0],
    ]
    generator, latent, draw = make(style_mixing=1.0).net, torch.randn(8, 5), Draw(0, 0, range(8))
    assert isinstance(generator, Styled)
    styles = generator.styles(latent, None, draw)
    assert styles.shape == (8, generator.layers, 6) and all(len(one.unique(dim=0)) == 2 for one in styles)
    generator.eval()
    assert all(len(one.unique(dim=0)) == 1 for one in generator.styles(latent, None, draw))


@final
class Linear(Styled):
    """Images that are linear in their styles, [2, S] → [1, 4, 4]."""

    layers = 2

    def __init__(self) -> None:
        super().__init__(SPACE, SMALL)
        self.matrix = torch.randn(16, 12)

    def synthesis(self, styles: Tensor, draw: Draw) -> Tensor:
        return (styles.flatten(1) @ self.matrix.T).view(-1, 1, 4, 4)


def test_path_lengths_match_the_jacobian() -> None:
    torch.manual_seed(1)
    generator, draw = Linear(), Draw(0, 0, range(5))
    styles = torch.randn(5, 2, 6, requires_grad=True)
    directions = draw.normal("direction", (1, 4, 4)).flatten(1) / 4
    expected = ((directions @ generator.matrix).view(5, 2, 6).square().sum(2).mean(1)).sqrt()
    torch.testing.assert_close(path_lengths(generator, styles, draw), expected)
    penalty = PathLength(generator, dataclasses.replace(SMALL, path_length=3.0))
    first = penalty(draw, None)
    lengths = path_lengths(generator, generator.styles(draw.normal("latent", (5,)), None, draw), draw)
    torch.testing.assert_close(generator.path_mean, 0.01 * lengths.mean())
    torch.testing.assert_close(first, 3 * (lengths - generator.path_mean).square())


def test_truncation_interpolates_to_the_mean_style() -> None:
    model = make()
    for step in range(3):  # the mean of the styles during training
        model.net(torch.randn(4, 5), None, Draw(0, step, range(4)))
    model.net.eval()
    with torch.no_grad():
        whole, half, mean = (
            model.net.styles(
                torch.randn(3, 5, generator=torch.Generator().manual_seed(2)), None, Draw(0, 0, range(3)), share
            )  # type: ignore[operator]
            for share in (1.0, 0.5, 0.0)
        )
    torch.testing.assert_close(half, (whole + mean) / 2)
    assert torch.equal(mean[0], mean[1]) and not torch.equal(whole[0], whole[1])
    request = SampleRequest(("",) * 2, (0, 1), 1, 1.0)
    drawn = {
        share: model.generate(None, Draw(0, "sample", (0, 1)), dataclasses.replace(request, truncation=share))
        for share in (1.0, 0.3)
    }
    assert not torch.equal(drawn[1.0], drawn[0.3])
    with pytest.raises(UserError, match=r"sample\.truncation is for GANs, and beta-vae is not one"):
        load_recipe("scratch/vae", ["sample.truncation=0.7"])


def test_alias_free_generator_is_equivariant_to_translation(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whole pixels, each an eighth of a pixel of the smallest map: in dB, with the filters and without."""
    generator = make(alias_free=True, style_mixing=0.0, width=8).net.eval()
    assert isinstance(generator, AliasFreeGenerator)
    styles, draw = generator.styles(torch.randn(2, 5), None, Draw(0, 0, range(2))), Draw(0, 0, range(2))
    with_filters = [equivariance(generator, styles, draw, pixels) for pixels in (1, 2, 3)]
    monkeypatch.setattr(
        stylegan3, "upsampled", lambda maps, _, factor: functional.interpolate(maps, scale_factor=factor)
    )
    monkeypatch.setattr(stylegan3, "downsampled", lambda maps, _: maps[..., ::2, ::2])
    without = [equivariance(generator, styles, draw, pixels) for pixels in (1, 2, 3)]
    print(f"equivariance {with_filters} dB, without filters {without} dB")
    assert min(with_filters) > 40 and max(without) < 30


def test_alias_free_generator_gives_gradients_to_all_parameters() -> None:
    model = make(alias_free=True, margin=2)
    batch = {"pixels": torch.randint(256, (4, *SPACE.shape), dtype=torch.uint8)}
    for train_step in model.train_steps():
        loss = train_step.loss(batch, Draw(0, 0, range(4)))
        loss.mean().backward()
        assert loss.shape == (4,) and loss.isfinite().all()
        assert all(parameter.grad is not None for parameter in train_step.net.parameters())
        train_step.net.zero_grad()

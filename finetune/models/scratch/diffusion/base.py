"""What all diffusion models in pixel space share; each family chooses its noise path (`objectives.noise_paths`).

The network is diffusers' UNet2DModel. With classes, `data.caption_dropout` trains the unconditional case too, and
sampling uses classifier-free guidance: D = D(no class) + s (D(class) − D(no class)), where s = 1 is no guidance (Ho &
Salimans 2022, arXiv:2207.12598, with s = 1 + w).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, final

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from finetune.config.nets.unet import UNet as Section
from finetune.data.batch import Batch
from finetune.models.base import SampleRequest, TrainStep
from finetune.models.objectives.noise_paths import Path
from finetune.models.objectives.samplers import SAMPLERS, Level, Options
from finetune.models.scratch.base import PixelModel, Space, levels_and_classes
from finetune.models.scratch.blocks import halved
from finetune.rng import Draw


class Canvas(ABC):
    """The representation of images that is noised (pixels or latents), with values of magnitude 1.

    Attributes:
        shape: its shape [channels, height, width].
    """

    shape: tuple[int, int, int]

    @abstractmethod
    def encode(self, levels: Tensor) -> Tensor:
        """Levels [B, C, H, W] → values [B, *shape] float32."""

    @abstractmethod
    def decode(self, numbers: Tensor) -> Tensor:
        """Values [B, *shape] → levels [B, C, H, W] uint8."""

    @abstractmethod
    def clamp(self, numbers: Tensor) -> Tensor:
        """Clamp a prediction of x_0 to the range of valid values."""


@final
class PixelCanvas(Canvas):
    """Pixels in [-1, 1]; predictions outside (also by guidance) are clamped."""

    def __init__(self, space: Space) -> None:
        self._space, self.shape = space, space.shape

    def encode(self, levels: Tensor) -> Tensor:
        return self._space.scaled(levels)

    def decode(self, numbers: Tensor) -> Tensor:
        return self._space.quantized(numbers)

    def clamp(self, numbers: Tensor) -> Tensor:
        return numbers.clamp(-1, 1)


class Condition(ABC):
    """Additional input channels of the network, which are not noised.

    Attributes:
        channels: their number.
    """

    channels: int

    @abstractmethod
    def for_training(self, levels: Tensor, draw: Draw) -> Tensor | None:
        """The channels [B, channels, H, W] for training images."""

    @abstractmethod
    def for_sampling(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor | None:
        """The channels for images to be generated."""


@final
class NoCondition(Condition):
    """No additional input channels."""

    channels = 0

    def for_training(self, levels: Tensor, draw: Draw) -> Tensor | None:
        return None

    def for_sampling(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor | None:
        return None


@final
class Denoiser(nn.Module):
    """The network: (x [B, C, H, W], timestep [B], classes [B] or None, condition) → prediction [B, C, H, W].

    Args:
        shape: shape [C, H, W] of x.
        section: the recipe's `net` section.
        classes: number of classes; 0 if there are none.
        beside: number of channels of the condition.
        first: the frozen network of an earlier stage, so that one file holds all that generates images.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        section: Section,
        classes: int,
        beside: int = 0,
        first: nn.Module | None = None,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        _check(height, width, section)
        sizes = len(section.channel_multipliers)
        kinds = ["Attn" if number >= sizes - section.attention_levels else "" for number in range(sizes)]
        self.unet = UNet2DModel(
            sample_size=(height, width),
            in_channels=channels + beside,
            out_channels=channels,
            block_out_channels=tuple(section.width * multiple for multiple in section.channel_multipliers),
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in kinds[::-1]),
            layers_per_block=section.blocks,
            dropout=section.dropout,
            attention_head_dim=section.width,
            norm_num_groups=section.width // 4,
            add_attention=section.attention_levels > 0,
            num_class_embeds=classes + 1 if classes else None,
        )
        self.first = None if first is None else first.requires_grad_(False).eval()
        for parameter in self.unet.conv_out.parameters():  # a new network predicts 0, the mean
            nn.init.zeros_(parameter)
        for name, parameter in self.unet.named_parameters():
            if name.endswith("to_k.bias"):  # shifts all logits of the softmax equally, so it has no effect
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Denoiser:
        super().train(mode)
        if self.first is not None:
            self.first.eval()
        return self

    def forward(self, noisy: Tensor, timestep: Tensor, classes: Tensor | None, beside: Tensor | None = None) -> Tensor:
        read = noisy if beside is None else torch.cat([noisy, beside], 1)
        result: Tensor = self.unet(read, timestep, class_labels=classes, return_dict=False)[0]
        return result


def _check(height: int, width: int, section: Section) -> None:
    """Raise a UserError if the network cannot be built."""
    halved(
        height,
        width,
        len(section.channel_multipliers) - 1,
        "net.channel_multipliers",
        "use fewer net.channel_multipliers",
    )


@final
class DenoisingStep(TrainStep):
    """Trains a denoiser on noised images."""

    name = "denoiser"

    def __init__(self, net: Denoiser, path: Path, canvas: Canvas, condition: Condition) -> None:
        self.net, self._path, self._canvas, self._condition = net, path, canvas, condition

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        levels, classes = levels_and_classes(batch)
        noised = self._path.objective.noise(self._canvas.encode(levels), draw)
        predicted = self.net(noised.sample, noised.timestep, classes, self._condition.for_training(levels, draw))
        return self._path.objective.error(predicted, noised)


class DiffusionModel(PixelModel):
    """A denoiser on a noise path.

    Args:
        space: the images.
        section: the recipe's `net` section.
        path: the noise path.
        variance: the variance of DDPM's sampling steps.
        canvas: what is noised; None: pixels.
        condition: additional input channels; None: none.
        first: the frozen network of an earlier stage.
    """

    net: Denoiser
    section: Section

    def __init__(
        self,
        space: Space,
        section: Section,
        path: Path,
        variance: Literal["large", "small"] = "small",
        canvas: Canvas | None = None,
        condition: Condition | None = None,
        first: nn.Module | None = None,
    ) -> None:
        super().__init__(space, section)
        self.path, self.canvas, self._condition, self._variance = (
            path,
            canvas or PixelCanvas(space),
            condition or NoCondition(),
            variance,
        )
        self.net = Denoiser(self.canvas.shape, section, len(space.classes), self._condition.channels, first)
        self._step = DenoisingStep(self.net, path, self.canvas, self._condition)

    def train_steps(self) -> tuple[TrainStep, ...]:
        return (self._step,)

    def predict_clean(
        self, noisy: Tensor, level: Level, classes: Tensor | None, beside: Tensor | None = None
    ) -> Tensor:
        """D(x) from the network's prediction, [B, *shape] float32."""
        timestep = torch.full((len(noisy),), level.timestep, device=noisy.device)
        return self.path.clean(
            self.net(self.path.scale_input(noisy, level), timestep, classes, beside).float(), noisy, level
        )

    def denoised(
        self, noisy: Tensor, level: Level, classes: Tensor | None, guidance: float = 1.0, beside: Tensor | None = None
    ) -> Tensor:
        """D(x) with guidance, clamped to valid values."""
        result = self.predict_clean(noisy, level, classes, beside)
        if classes is not None and guidance != 1:
            free = self.predict_clean(noisy, level, torch.full_like(classes, len(self.space.classes)), beside)
            result = free + guidance * (result - free)
        return self.canvas.clamp(result)

    def generate(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor:
        """Generate levels [B, C, H, W] uint8 with the request's sampler, or the recipe's."""
        beside = self._condition.for_sampling(classes, draw, request)

        def denoise(noisy: Tensor, level: Level) -> Tensor:
            return self.denoised(noisy, level, classes, request.guidance, beside)

        def step_noise(number: int) -> Tensor:
            return draw.normal(f"step {number}", self.canvas.shape)

        options = Options(request.eta, self._variance)
        start = self.path.initial_std * draw.normal("start", self.canvas.shape)
        sampler = SAMPLERS[request.sampler or self.section.sampler]
        return self.canvas.decode(sampler(denoise, start, self.path.levels(request.steps), step_noise, options))

"""Diffusion in pixel space: what its families share. A family's own file says which path (`paths`) its images take to noise.

The net is diffusers' UNet2DModel. With classes, `data.caption_dropout` has it learn the images of no class too, and drawing is
guided: D = D(no class) + s (D(class) − D(no class)), so that s = 1 is the class as it is (Ho & Salimans 2022, arXiv:2207.12598, where
s is 1 + w).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, final

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from finetune.config.nets.unet import UNet as Section
from finetune.data.batch import Batch
from finetune.errors import UserError
from finetune.models.base import SampleRequest, TrainStep
from finetune.models.objectives.noise_paths import Path
from finetune.models.objectives.samplers import SAMPLERS, Level, Options
from finetune.models.scratch.base import PixelModel, Space, levels_and_classes
from finetune.models.scratch.blocks import halved
from finetune.rng import Draw


class Canvas(ABC):
    """What is noised: numbers of about the size 1, and images as such numbers.

    Attributes:
        shape: [channels, height, width] of the numbers.
    """

    shape: tuple[int, int, int]

    @abstractmethod
    def encode(self, levels: Tensor) -> Tensor:
        """Levels [B, C, H, W] → numbers [B, *shape] float32."""

    @abstractmethod
    def decode(self, numbers: Tensor) -> Tensor:
        """The other way round: uint8."""

    @abstractmethod
    def clamp(self, numbers: Tensor) -> Tensor:
        """Numbers held to where expectations of what is noised can lie."""


@final
class PixelCanvas(Canvas):
    """Pixels in [-1, 1]: so are their expectations, and what a net says beyond it (or guidance makes of it) is cut."""

    def __init__(self, space: Space) -> None:
        self._space, self.shape = space, space.shape

    def encode(self, levels: Tensor) -> Tensor:
        return self._space.scaled(levels)

    def decode(self, numbers: Tensor) -> Tensor:
        return self._space.quantized(numbers)

    def clamp(self, numbers: Tensor) -> Tensor:
        return numbers.clamp(-1, 1)


class Condition(ABC):
    """What the net reads beside x: channels that are not noised with it.

    Attributes:
        channels: how many.
    """

    channels: int

    @abstractmethod
    def for_training(self, levels: Tensor, draw: Draw) -> Tensor | None:
        """While training, [B, channels, H, W] of the images themselves."""

    @abstractmethod
    def for_sampling(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor | None:
        """For images that are to be drawn."""


@final
class NoCondition(Condition):
    channels = 0

    def for_training(self, levels: Tensor, draw: Draw) -> Tensor | None:
        return None

    def for_sampling(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor | None:
        return None


@final
class Denoiser(nn.Module):
    """(x [B, C, H, W], how the level is told [B], classes [B] or None, what is read beside x) → what the net says, [B, C, H, W].

    Args:
        beside: channels that are read beside x.
        first: the net of an earlier stage, which draws too and is frozen: one file then holds all that draws.
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
        for parameter in self.unet.conv_out.parameters():  # a new net says 0: no worse than knowing nothing
            nn.init.zeros_(parameter)
        for name, parameter in self.unet.named_parameters():
            if name.endswith("to_k.bias"):  # adds the same to all that a softmax weighs: it changes nothing
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
    """Raise if the net cannot be built."""
    if section.width % 4:
        raise UserError(
            f"{section.width} channels cannot be shared out to groups of 4", where="net.width", remedy="a multiple of 4"
        )
    if not section.channel_multipliers or min(section.channel_multipliers) < 1:
        raise UserError(
            "a net has at least one size, and channels at each",
            where="net.channel_multipliers",
            remedy="such as [1, 2, 2]",
        )
    halved(
        height,
        width,
        len(section.channel_multipliers) - 1,
        "net.channel_multipliers",
        "set net.channel_multipliers to fewer numbers",
    )


@final
class DenoisingStep(TrainStep):
    name = "denoiser"

    def __init__(self, net: Denoiser, path: Path, canvas: Canvas, condition: Condition) -> None:
        self.net, self._path, self._canvas, self._condition = net, path, canvas, condition

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        levels, classes = levels_and_classes(batch)
        noised = self._path.objective.noise(self._canvas.encode(levels), draw)
        predicted = self.net(noised.sample, noised.timestep, classes, self._condition.for_training(levels, draw))
        return self._path.objective.error(predicted, noised)


class DiffusionModel(PixelModel):
    """A denoiser on a path.

    Args:
        variance: of DDPM's steps.
        canvas: what is noised; none: the pixels.
        condition: what the net reads beside it.
        first: the net of an earlier stage.
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
        """D(x) as the net says it, [B, *shape] float32."""
        timestep = torch.full((len(noisy),), level.timestep, device=noisy.device)
        return self.path.clean(
            self.net(self.path.scale_input(noisy, level), timestep, classes, beside).float(), noisy, level
        )

    def denoised(
        self, noisy: Tensor, level: Level, classes: Tensor | None, guidance: float = 1.0, beside: Tensor | None = None
    ) -> Tensor:
        """D(x), guided, and held to where it can lie."""
        result = self.predict_clean(noisy, level, classes, beside)
        if classes is not None and guidance != 1:
            free = self.predict_clean(noisy, level, torch.full_like(classes, len(self.space.classes)), beside)
            result = free + guidance * (result - free)
        return self.canvas.clamp(result)

    def generate(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor:
        """Images uint8, [B, C, H, W], by the request's sampler, or the recipe's."""
        beside = self._condition.for_sampling(classes, draw, request)

        def denoise(noisy: Tensor, level: Level) -> Tensor:
            return self.denoised(noisy, level, classes, request.guidance, beside)

        def step_noise(number: int) -> Tensor:
            return draw.normal(f"step {number}", self.canvas.shape)

        options = Options(request.eta, self._variance)
        start = self.path.initial_std * draw.normal("start", self.canvas.shape)
        sampler = SAMPLERS[request.sampler or self.section.sampler]
        return self.canvas.decode(sampler(denoise, start, self.path.levels(request.steps), step_noise, options))

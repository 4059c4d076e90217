"""Text-to-video in miniature: a convolutional 3-D VAE of clips, and a denoiser of its latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.data.batch import Batch, Encoder, Inputs, Part
from finetune.data.decoding import to_bytes
from finetune.data.media.sample import Sample
from finetune.data.media.video import VideoSample, rate_of
from finetune.data.shape import VideoShape
from finetune.models.base import Model, SampleRequest, TrainStep
from finetune.models.spec import FamilySpec
from finetune.rng import Draw

SPEC = FamilySpec(
    slug="tiny-clips",
    title="Tiny clips",
    implementation="tests.helpers.families.clips",
    medium="video",
    tasks=("text-to-video",),
    optional_roles=("caption",),
)
CHANNELS, FACTOR, TIME_FACTOR = 4, 4, 3


class Vae3d(nn.Module):
    """[B, 3, 1 + 3 t, 4 h, 4 w] ↔ [B, 4, 1 + t, h, w]; causal: the first frame has its own latent frame."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(3, CHANNELS, (3, 4, 4), (3, 4, 4))
        self.up = nn.ConvTranspose3d(CHANNELS, 3, (3, 4, 4), (3, 4, 4))

    def encode(self, clip: Tensor) -> Tensor:
        first = clip[:, :, :1].expand(-1, -1, TIME_FACTOR - 1, -1, -1)
        latents: Tensor = self.down(torch.cat([first, clip], 2))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        clip: Tensor = self.up(latents)[:, :, TIME_FACTOR - 1 :]
        return clip


class ClipEncoder(Encoder):
    def __init__(self, vae: Vae3d) -> None:
        self._vae = vae

    @property
    def parts(self) -> tuple[Part, ...]:
        return Part(("target",), "tiny clips' latents"), Part(("caption",), "tiny clips' caption")

    @torch.no_grad()
    def encode(self, inputs: Inputs) -> Batch:
        found: Batch = {}
        if isinstance(clip := inputs.get("target"), Tensor):
            found["latents"] = self._vae.encode(clip[None])[0]
        if "caption" in inputs:
            found["words"] = torch.tensor(len(str(inputs["caption"]).split()) / 10)
        return found

    def release(self) -> None:
        pass


class Step(TrainStep):
    name = "denoiser"

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Flow matching at one noise level: predict noise − latents halfway between the two."""
        latents = batch["latents"]
        noise = draw.normal("noise", latents.shape[1:])
        words = batch["words"].view(-1, 1, 1, 1, 1).expand_as(latents[:, :1])
        predicted = self.net(torch.cat([(latents + noise) / 2, words], 1))
        error: Tensor = (predicted - (noise - latents)).square().flatten(1).mean(1)
        return error


class Clips(Model):
    def __init__(self, plan: Any) -> None:
        torch.manual_seed(plan.recipe.train.seed)
        self.vae = Vae3d().requires_grad_(False)
        self._steps = (Step(nn.Conv3d(CHANNELS + 1, CHANNELS, 3, padding=1)),)
        shape, _ = plan.data.buckets[0]
        assert isinstance(shape, VideoShape)
        self._shape = shape

    def train_steps(self) -> tuple[TrainStep, ...]:
        return self._steps

    def encoder(self) -> Encoder:
        return ClipEncoder(self.vae)

    @torch.no_grad()
    def sample(self, request: SampleRequest) -> list[Sample]:
        found: list[Sample] = []
        for prompt, seed in zip(request.prompts, request.seeds, strict=True):
            size = (1, CHANNELS, *self._shape.latent(FACTOR, TIME_FACTOR))
            latents = torch.randn(size, generator=torch.Generator().manual_seed(seed))
            words = torch.full_like(latents[:, :1], len(prompt.split()) / 10)
            latents = latents - self._steps[0].net(torch.cat([latents, words], 1))
            pixels = to_bytes(self.vae.decode(latents)[0].clamp(-1, 1)).permute(1, 2, 3, 0)
            frames = [Image.fromarray(frame.numpy()) for frame in pixels]
            found.append(VideoSample(frames, rate_of(self._shape)))
        return found

    def save(self, folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self._steps[0].net.state_dict()), folder / "model.safetensors")
        return [folder / "model.safetensors"]


def build(plan: Any, audit: Any) -> Model:
    return Clips(plan)

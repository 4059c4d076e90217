"""Image editing in miniature: a convolution predicts the target from a reference, noise and the caption's length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.data.batch import Batch, Encoder, Inputs, Part
from finetune.data.decoding import decode_file, to_bytes
from finetune.data.media.image import ImageSample
from finetune.data.media.sample import Sample
from finetune.data.shape import ImageShape
from finetune.models.base import Model, SampleRequest, TrainStep
from finetune.models.spec import FamilySpec
from finetune.rng import Draw

SPEC = FamilySpec(
    slug="tiny-editor",
    title="Tiny image editor",
    implementation="tests.helpers.families.paired",
    tasks=("image-editing",),
    required_roles=("reference",),
    optional_roles=("caption",),
)


class PairEncoder(Encoder):
    """Encodes the target alone, and the reference together with the caption, as multimodal text encoders do."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    @property
    def parts(self) -> tuple[Part, ...]:
        return Part(("target",), "tiny editor's target"), Part(("caption", "reference"), "tiny editor's condition")

    def encode(self, inputs: Inputs) -> Batch:
        self.calls.append(tuple(sorted(inputs)))
        found: Batch = {}
        if isinstance(target := inputs.get("target"), Tensor):
            found["target"] = target
        if isinstance(reference := inputs.get("reference"), Tensor):
            words = torch.full_like(reference[:1], len(str(inputs["caption"]).split()) / 10)
            found["condition"] = torch.cat([reference, words])
        return found

    def release(self) -> None:
        pass


class Step(TrainStep):
    name = "editor"

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        noise = draw.normal("noise", batch["target"].shape[1:])
        predicted = self.net(torch.cat([batch["condition"], noise], 1))
        error: Tensor = (predicted - batch["target"]).square().flatten(1).mean(1)
        return error


class Editor(Model):
    def __init__(self, plan: Any) -> None:
        torch.manual_seed(plan.recipe.train.seed)
        self._steps = (Step(nn.Conv2d(7, 3, 3, padding=1)),)
        self._encoder = PairEncoder()

    def train_steps(self) -> tuple[TrainStep, ...]:
        return self._steps

    def encoder(self) -> Encoder:
        return self._encoder

    @torch.no_grad()
    def sample(self, request: SampleRequest) -> list[Sample]:
        found: list[Sample] = []
        assert request.size is not None
        for prompt, seed, file in zip(request.prompts, request.seeds, request.references, strict=True):
            reference = decode_file(file.read_bytes(), ImageShape(request.size[1], request.size[0]), "white")
            condition = PairEncoder().encode({"caption": prompt, "reference": reference})["condition"]
            noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed))
            image = self._steps[0].net(torch.cat([condition, noise])[None])[0].clamp(-1, 1)
            found.append(ImageSample(Image.fromarray(to_bytes(image).permute(1, 2, 0).numpy())))
        return found

    def save(self, folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self._steps[0].net.state_dict()), folder / "model.safetensors")
        return [folder / "model.safetensors"]


def build(plan: Any, audit: Any) -> Model:
    return Editor(plan)

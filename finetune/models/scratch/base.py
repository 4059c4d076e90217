"""The base classes of models that are trained from scratch in pixel space.

Images are grids of integer levels, 0 … levels − 1 per channel. A family's module defines a model over a `Space` and a
function `create(space, section)` that builds it from the space and the recipe's `net` section alone, so a run's files
are enough to open it again:

    model = finetune.open_model("runs/scratch-vae")      # or the run's final/, or the result of `ft export`
    images = model.sample(SampleRequest(prompts=("",) * 4, seeds=(0, 1, 2, 3), steps=1, guidance=1.0))
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from finetune.config import nets
from finetune.data.audit.audit import Audit
from finetune.data.batch import Batch, Encoder, ImageTextEncoder, stack
from finetune.data.decoding import to_tensor
from finetune.data.example import Example
from finetune.data.media.image import ImageSample, apply, decode
from finetune.data.media.sample import Sample
from finetune.data.shape import ImageShape
from finetune.errors import UserError, did_you_mean
from finetune.models.base import Model, SampleRequest
from finetune.models.registry import family_of_module, load_implementation
from finetune.planning import Plan
from finetune.replaceable import replaceable
from finetune.rng import Draw

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HIGHEST = 255  # value of a channel in an image file


@dataclass(frozen=True)
class Space:
    """The images to model: their shape [channels, height, width], number of levels, and class names (if any)."""

    channels: int
    height: int
    width: int
    levels: int
    classes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.height, self.width

    @property
    def dimensions(self) -> int:
        """The number of values in an image, which bits/dim are relative to."""
        return self.channels * self.height * self.width

    def levels_of(self, pixels: Tensor) -> Tensor:
        """Convert pixels [3, H, W] in [-1, 1] to levels [channels, H, W] uint8; gray is ITU-R 601 luma as in Pillow."""
        if self.channels == 1:
            pixels = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
        return pixels.add(1).mul((self.levels - 1) / 2).round().clamp(0, self.levels - 1).to(torch.uint8)

    def scaled(self, levels: Tensor) -> Tensor:
        """Scale levels to float32 in [-1, 1]: the lowest to −1, the highest to 1."""
        return levels.float() * (2 / (self.levels - 1)) - 1

    def quantized(self, scaled: Tensor) -> Tensor:
        """Round values in [-1, 1] to the nearest levels, uint8: the inverse of `scaled`."""
        return scaled.add(1).mul((self.levels - 1) / 2).round().clamp(0, self.levels - 1).to(torch.uint8)

    def images(self, levels: Tensor) -> list[Image.Image]:
        """Convert levels [B, channels, H, W] to RGB images."""
        bytes_ = levels.float().mul(HIGHEST / (self.levels - 1)).round().to(torch.uint8).expand(-1, 3, -1, -1)
        return [Image.fromarray(numpy.ascontiguousarray(one.permute(1, 2, 0).cpu().numpy())) for one in bytes_]

    def class_of(self, caption: str) -> int:
        """The index of a class; for the empty caption, the index of "no class", one past the last.

        Raises:
            UserError: there is no class of this name.
        """
        if not caption:
            return len(self.classes)
        if caption not in self.classes:
            raise UserError(
                f'there is no class "{caption}"', where="sample.prompts", remedy=did_you_mean(caption, self.classes)
            )
        return self.classes.index(caption)


def space_of(plan: Plan, audit: Audit) -> Space:
    """The space of a plan's images.

    Raises:
        UserError: the images have several sizes, are smaller than the model's resolution, or there are too few.
    """
    data, training = plan.recipe.data, audit.training
    if len(plan.data.buckets) > 1:
        raise UserError(
            "a model in pixel space generates images of one size",
            where="data.buckets",
            remedy="set data.buckets: false",
        )
    shape, _ = plan.data.buckets[0]
    assert isinstance(shape, ImageShape)
    width, height = shape.width, shape.height
    small = [image for image in training if image.crop.upscaled]
    if small:
        least = min(min(image.crop.original) for image in small)
        raise UserError(
            f"{len(small)} images are smaller than the model's {width}×{height}, such as {small[0].name}",
            where="data.resolution",
            remedy=f"set data.resolution: {least}, or remove them: the model would learn the blur of enlarged images",
        )
    if len({image.digest for image in training}) < 2:
        raise UserError(
            "there is only one distinct image",
            where="data.path",
            remedy="provide at least two different images",
        )
    counts = Counter(image.caption for image in training if image.caption) if data.classes else Counter[str]()
    alone = [name for name, count in counts.items() if count < 2]
    if alone:
        raise UserError(
            f'{len(alone)} of {len(counts)} classes have only one image, such as "{alone[0]}"',
            where="data.classes",
            remedy="add images to these classes, or set data.classes: null",
        )
    return Space(1 if data.grayscale else 3, height, width, data.levels, tuple(sorted(counts)))


class LevelEncoder(ImageTextEncoder):
    """Encodes images as levels, `pixels` [C, H, W] uint8, and class names as indices, `class` [] int64."""

    image_key, cached = "levels", False

    def __init__(self, space: Space) -> None:
        self._space = space
        self.caption_key = "class" if space.classes else ""

    def encode_image(self, pixels: Tensor) -> Batch:
        return {"pixels": self._space.levels_of(pixels)}

    def encode_caption(self, caption: str) -> Batch:
        return {"class": torch.tensor(self._space.class_of(caption))} if self._space.classes else {}

    def release(self) -> None:
        """Do nothing: there is no model to release."""


class PixelModel(Model):
    """A model in pixel space.

    Attributes:
        net: the network that generates images; its weights are what a run saves.
        audit: the run's training images; None for a model opened from a file.
    """

    net: nn.Module
    audit: Audit | None = None

    def __init__(self, space: Space, section: nets.Section) -> None:
        self.space, self.section = space, section

    @abstractmethod
    def generate(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor:
        """Generate images: levels [B, C, H, W] uint8, a deterministic function of the arguments.

        Args:
            classes: class indices [B] int64; None for a space without classes.
            draw: the source of random numbers.
            request: sampling steps, guidance and other settings.
        """

    def start(self) -> None:
        """Initialize weights that depend on the data from training images: the same in every process, before EMA."""

    def encoder(self) -> Encoder:
        return LevelEncoder(self.space)

    @property
    def family(self) -> str:
        """The family's slug, as in `model.family`."""
        return family_of_module(type(self).__module__)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.net.parameters()).device

    @torch.no_grad()
    def sample(self, request: SampleRequest) -> list[Sample]:
        """Generate images; a prompt is a class name or "" (no class), and is ignored if there are no classes."""
        draw = Draw(0, "sample", request.seeds, self.device)
        classes = (
            torch.tensor([self.space.class_of(prompt) for prompt in request.prompts], device=self.device)
            if self.space.classes
            else None
        )
        return [ImageSample(image) for image in self.space.images(self.generate(classes, draw, request))]

    def save(self, folder: Path) -> list[Path]:
        """Write `config.json` and `model.safetensors` for `open_model`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in self.net.state_dict().items()}, folder / WEIGHTS
        )
        return [folder / CONFIG, folder / WEIGHTS]

    def examples(self, count: int) -> Batch:
        """At most `count` training images, evenly spaced, as a batch."""
        audit = self.training_audit()
        return self.batch_of(audit.training[:: max(1, len(audit.training) // count)][:count], audit.background)

    def examples_by_class(self, count: int = 8) -> dict[str, Batch]:
        """Some training images of each class, by class name."""
        audit = self.training_audit()
        return {
            name: self.batch_of([p for p in audit.training if p.caption == name][:count], audit.background)
            for name in self.space.classes
        }

    def training_audit(self) -> Audit:
        """The audit of the run's training images."""
        if self.audit is None:
            raise ValueError("a model opened from a file has no training images")
        return self.audit

    def batch_of(self, images: Sequence[Example], background: str) -> Batch:
        """Encode images of an audit as a batch."""
        encoder, result = self.encoder(), []
        for image in images:
            pixels = apply(decode(image.read(), background), image.crop)
            result.append(encoder.encode({"target": to_tensor(numpy.asarray(pixels)), "caption": image.caption}))
        return {key: tensor.to(self.device) for key, tensor in stack(result).items()}

    def grid(self, rows: Sequence[Tensor], columns: int) -> Image.Image:
        """Arrange rows of levels, [≤ columns, C, H, W] each, in one image without labels."""
        width, height = self.space.width, self.space.height
        result = Image.new("RGB", (columns * width, len(rows) * height), "white")
        for number, row in enumerate(rows):
            for place, image in enumerate(self.space.images(row)):
                result.paste(image, (place * width, number * height))
        return result

    def config(self) -> dict[str, Any]:
        """Everything but the weights, as plain values for `model_from_config`."""
        return {
            "family": self.family,
            "space": dataclasses.asdict(self.space),
            "net": dataclasses.asdict(self.section),  # type: ignore[call-overload]
        } | self.parts()

    def parts(self) -> dict[str, Any]:
        """Further plain values that `restore` needs, such as the configuration of a first stage."""
        return {}


class LikelihoodModel(PixelModel):
    """A model with a likelihood: exact if `exact`, else an upper bound on −log p."""

    exact: ClassVar[bool]

    @abstractmethod
    def nats(self, batch: Batch, draw: Draw, particles: int = 1) -> Tensor:
        """−log p of each image or an upper bound on it, in nats, [B]; bounds use `particles` samples per image."""

    def bits_per_dimension(self, batch: Batch, draw: Draw, particles: int = 1) -> Tensor:
        """`nats` in bits per dimension (a dimension is one channel of one pixel), [B]."""
        return self.nats(batch, draw, particles) / (self.space.dimensions * math.log(2))


def build_from_scratch(plan: Plan, audit: Audit) -> Model:
    """Build the plan's model with random weights from the run's seed: the default `build` of a family's module."""
    space = space_of(plan, audit)
    return initialize(plan, audit, lambda: _module(plan.recipe.model.family).create(space, plan.recipe.net))


def initialize(plan: Plan, audit: Audit, make: Callable[[], PixelModel]) -> PixelModel:
    """Call `make` with the run's seed, then initialize the weights that depend on the data."""
    torch.manual_seed(plan.recipe.train.seed)
    made = _to_channels_last(make())
    made.audit = audit
    if not isinstance(next(made.net.parameters()), FakeTensor):  # a fake tensor has no values to initialize from
        made.start()
    return made


@replaceable
def open_model(path: str | Path) -> PixelModel:
    """Open a trained model in pixel space, ready to generate images.

    Args:
        path: a run's folder, its `final/`, or a folder written by `ft export`.

    Raises:
        UserError: there is no model, or its files do not match.
    """
    folder = Path(path).expanduser()
    folder = folder / "final" if (folder / "recipe.yaml").is_file() else folder
    try:
        model = model_from_config(json.loads((folder / CONFIG).read_text(encoding="utf-8")), str(folder / CONFIG))
        if not isinstance(next(model.net.parameters()), FakeTensor):
            model.net.load_state_dict(load_file(folder / WEIGHTS))
    except FileNotFoundError:
        remedy = "name a finished run or a folder written by `ft export`"
        raise UserError(f"{path} does not contain a trained model", where=str(folder), remedy=remedy) from None
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"cannot open the model in {folder}: {error}", where=str(folder / CONFIG), remedy="export it again"
        ) from error
    model.net.eval()
    return model


def model_from_config(config: dict[str, Any], name: str = CONFIG) -> PixelModel:
    """Build an untrained model from a `PixelModel.config`; `name` is the file that errors name."""
    space = Space(**config["space"] | {"classes": tuple(config["space"]["classes"])})
    declared = nets.section(config["family"])
    if declared is None:
        raise KeyError(config["family"])
    section, module = (
        nets.from_config(declared, config["net"], name),
        _module(config["family"]),
    )
    return _to_channels_last(
        module.restore(space, section, config) if hasattr(module, "restore") else module.create(space, section)
    )


def _to_channels_last(model: PixelModel) -> PixelModel:
    """Convert the networks to channels-last, which makes the steps of most families 4–15 % faster on a CPU."""
    for train_step in model.train_steps():
        net: Any = train_step.net  # torch's type stubs lack this overload
        net.to(memory_format=torch.channels_last)
    return model


def _module(family: str) -> Any:
    return load_implementation(family)


def class_embedding(space: Space, width: int) -> nn.Embedding | None:
    """An embedding of the classes plus "no class"; None for a space without classes."""
    return nn.Embedding(len(space.classes) + 1, width) if space.classes else None


def levels_and_classes(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The levels [B, C, H, W] uint8 and classes [B] (or None) of a batch."""
    return batch["pixels"], batch.get("class")

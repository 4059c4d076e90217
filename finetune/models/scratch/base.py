"""Models in pixel space, from scratch: what all such families share, whatever they do with pixels.

An image is a grid of levels, 0 … levels − 1 a channel. A family's module has a `Model` over a `Space`, which `create`
makes from the space and the recipe's `net` section alone, so that a run's files suffice to open it again:

    model = finetune.open_model("runs/scratch-vae")      # or the run's final/, or what `ft export` wrote
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
from finetune.data.audit.audit import Audit, ImageRecord
from finetune.data.batch import Batch, Encoder, ImageTextEncoder, stack
from finetune.data.dataset import to_tensor
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
HIGHEST = 255  # of an image file's channel


@dataclass(frozen=True)
class Space:
    """What there is to model: images [channels, height, width] of `levels` values, and the names of their classes, if any."""

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
        """Numbers of an image, which nats are divided by for bits/dim."""
        return self.channels * self.height * self.width

    def levels_of(self, pixels: Tensor) -> Tensor:
        """[3, H, W] float32 in [-1, 1] → levels [channels, H, W] uint8. Gray is ITU-R 601's luma, as Pillow's."""
        if self.channels == 1:
            pixels = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
        return pixels.add(1).mul((self.levels - 1) / 2).round().clamp(0, self.levels - 1).to(torch.uint8)

    def scaled(self, levels: Tensor) -> Tensor:
        """Levels → float32 in [-1, 1], the lowest at −1 and the highest at 1."""
        return levels.float() * (2 / (self.levels - 1)) - 1

    def quantized(self, scaled: Tensor) -> Tensor:
        """Numbers about [-1, 1] → the nearest levels, uint8: `scaled` undone."""
        return scaled.add(1).mul((self.levels - 1) / 2).round().clamp(0, self.levels - 1).to(torch.uint8)

    def images(self, levels: Tensor) -> list[Image.Image]:
        """Levels [B, channels, H, W] → RGB images."""
        bytes_ = levels.float().mul(HIGHEST / (self.levels - 1)).round().to(torch.uint8).expand(-1, 3, -1, -1)
        return [Image.fromarray(numpy.ascontiguousarray(one.permute(1, 2, 0).cpu().numpy())) for one in bytes_]

    def class_of(self, caption: str) -> int:
        """The class's index; of the empty caption, that of no class, one past the last.

        Raises:
            UserError: no class has this name.
        """
        if not caption:
            return len(self.classes)
        if caption not in self.classes:
            raise UserError(
                f'no class is called "{caption}"', where="sample.prompts", remedy=did_you_mean(caption, self.classes)
            )
        return self.classes.index(caption)


def space_of(plan: Plan, audit: Audit) -> Space:
    """The space of a plan's images.

    Raises:
        UserError: they have several sizes, are smaller than the model's, or are too few to learn from.
    """
    data, training = plan.recipe.data, audit.training
    if len(plan.data.buckets) > 1:
        raise UserError(
            "a model in pixel space draws images of one size", where="data.buckets", remedy="set data.buckets: false"
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
            remedy=f"set data.resolution: {least}, or leave them out: scaled up, the model would learn their blur",
        )
    if len({image.digest for image in training}) < 2:
        raise UserError(
            "there is one image only: nothing tells what may vary",
            where="data.path",
            remedy="give at least two images",
        )
    counts = Counter(image.caption for image in training if image.caption) if data.classes else Counter[str]()
    alone = [name for name, count in counts.items() if count < 2]
    if alone:
        raise UserError(
            f'{len(alone)} of {len(counts)} classes have one image only, such as "{alone[0]}"',
            where="data.classes",
            remedy="give each class more, or set data.classes: null",
        )
    return Space(1 if data.grayscale else 3, height, width, data.levels, tuple(sorted(counts)))


class LevelEncoder(ImageTextEncoder):
    """Images as levels, `pixels` [C, H, W] uint8, and the index of their class, `class` [] int64, where there are classes."""

    image_key, cached = "levels", False

    def __init__(self, space: Space) -> None:
        self._space = space
        self.caption_key = "class" if space.classes else ""

    def encode_image(self, pixels: Tensor) -> Batch:
        return {"pixels": self._space.levels_of(pixels)}

    def encode_caption(self, caption: str) -> Batch:
        return {"class": torch.tensor(self._space.class_of(caption))} if self._space.classes else {}

    def release(self) -> None:
        """Nothing is held."""


class PixelModel(Model):
    """A family in pixel space. `net` is what draws: its weights are the artifact."""

    net: nn.Module
    audit: Audit | None = None  # of a run's images, some of which a look shows; an opened model has none

    def __init__(self, space: Space, section: nets.Section) -> None:
        self.space, self.section = space, section

    @abstractmethod
    def generate(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor:
        """Images of `classes` ([B] int64; None where the space has none), by `draw` alone: levels [B, C, H, W] uint8."""

    def start(self) -> None:
        """Set the weights that start by the data, from some training images: the same in every process, and before averages are kept."""

    def encoder(self) -> Encoder:
        return LevelEncoder(self.space)

    @property
    def family(self) -> str:
        """Slug of the family, as `model.family` names it: that of the class's module."""
        return family_of_module(type(self).__module__)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.net.parameters()).device

    @torch.no_grad()
    def sample(self, request: SampleRequest) -> list[Sample]:
        """A prompt is the name of a class, "" is none; where there are no classes, prompts are not read."""
        draw = Draw(0, "sample", request.seeds, self.device)
        classes = (
            torch.tensor([self.space.class_of(prompt) for prompt in request.prompts], device=self.device)
            if self.space.classes
            else None
        )
        return [ImageSample(image) for image in self.space.images(self.generate(classes, draw, request))]

    def save(self, folder: Path) -> list[Path]:
        """Write `config.json` and `model.safetensors`, which `open_model` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in self.net.state_dict().items()}, folder / WEIGHTS
        )
        return [folder / CONFIG, folder / WEIGHTS]

    def examples(self, count: int) -> Batch:
        """`count` images that the run trains on (fewer if it has fewer), spread over its data, as a batch."""
        audit = self.training_audit()
        return self.batch_of(audit.training[:: max(1, len(audit.training) // count)][:count], audit.background)

    def examples_by_class(self, count: int = 8) -> dict[str, Batch]:
        """Some images of each class, by its name."""
        audit = self.training_audit()
        return {
            name: self.batch_of([p for p in audit.training if p.caption == name][:count], audit.background)
            for name in self.space.classes
        }

    def training_audit(self) -> Audit:
        """The audit of the run's images."""
        if self.audit is None:
            raise ValueError("an opened model has no training images")
        return self.audit

    def batch_of(self, images: Sequence[ImageRecord], background: str) -> Batch:
        """Images of an audit as a batch."""
        encoder, result = self.encoder(), []
        for image in images:
            pixels = apply(decode(image.read(), background), image.crop)
            result.append(encoder.encode({"target": to_tensor(numpy.asarray(pixels)), "caption": image.caption}))
        return {key: tensor.to(self.device) for key, tensor in stack(result).items()}

    def grid(self, rows: Sequence[Tensor], columns: int) -> Image.Image:
        """Levels [≤ columns, C, H, W] a row → one image, unlabelled."""
        width, height = self.space.width, self.space.height
        result = Image.new("RGB", (columns * width, len(rows) * height), "white")
        for number, row in enumerate(rows):
            for place, image in enumerate(self.space.images(row)):
                result.paste(image, (place * width, number * height))
        return result

    def config(self) -> dict[str, Any]:
        """All but the weights, as plain values: `of_config` makes the model of it."""
        return {
            "family": self.family,
            "space": dataclasses.asdict(self.space),
            "net": dataclasses.asdict(self.section),  # type: ignore[call-overload]
        } | self.parts()

    def parts(self) -> dict[str, Any]:
        """What `create` needs besides space and section, as plain values."""
        return {}


class LikelihoodModel(PixelModel):
    """A family that says how probable an image is. `exact`: it does so exactly; else it gives a bound."""

    exact: ClassVar[bool]

    @abstractmethod
    def nats(self, batch: Batch, draw: Draw, particles: int = 1) -> Tensor:
        """−log p of each image, or an upper bound on it, in nats, [B]; what a bound needs it draws so many times an image."""

    def bits_per_dimension(self, batch: Batch, draw: Draw, particles: int = 1) -> Tensor:
        """`nats`, as bits a channel of a pixel, [B]."""
        return self.nats(batch, draw, particles) / (self.space.dimensions * math.log(2))


def build_from_scratch(plan: Plan, audit: Audit) -> Model:
    """The family's model with weights at random, by the run's seed; what its module calls `build`."""
    space = space_of(plan, audit)
    return initialize(plan, audit, lambda: _module(plan.recipe.model.family).create(space, plan.recipe.net))


def initialize(plan: Plan, audit: Audit, make: Callable[[], PixelModel]) -> PixelModel:
    """What `make` makes, its weights at random by the run's seed, and those that start by the data set by it."""
    torch.manual_seed(plan.recipe.train.seed)
    made = _to_channels_last(make())
    made.audit = audit
    if not isinstance(next(made.net.parameters()), FakeTensor):  # which has no values to start by
        made.start()
    return made


@replaceable
def open_model(path: str | Path) -> PixelModel:
    """A trained model of a family in pixel space, from its run, its `final/`, or what `ft export` made of it; ready to draw.

    Raises:
        UserError: there is none, or its files do not belong together.
    """
    folder = Path(path).expanduser()
    folder = folder / "final" if (folder / "recipe.yaml").is_file() else folder
    try:
        model = model_from_config(json.loads((folder / CONFIG).read_text(encoding="utf-8")), str(folder / CONFIG))
        if not isinstance(next(model.net.parameters()), FakeTensor):
            model.net.load_state_dict(load_file(folder / WEIGHTS))
    except FileNotFoundError:
        remedy = "give a finished run, or the folder that `ft export` wrote"
        raise UserError(f"{path} holds no trained model", where=str(folder), remedy=remedy) from None
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"the model in {folder} cannot be opened: {error}", where=str(folder / CONFIG), remedy="export it again"
        ) from error
    model.net.eval()
    return model


def model_from_config(config: dict[str, Any], name: str = CONFIG) -> PixelModel:
    """The model of a `PixelModel.config`, its weights as a new one's; `name` is what errors call it."""
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
    """Channels beside each other in memory, as convolutions like them: steps of most families are 4 to 15 % quicker on a CPU."""
    for train_step in model.train_steps():
        net: Any = train_step.net  # torch's types know no layout here
        net.to(memory_format=torch.channels_last)
    return model


def _module(family: str) -> Any:
    return load_implementation(family)


def class_embedding(space: Space, width: int) -> nn.Embedding | None:
    """One row a class and one for none, or None where the space has no classes."""
    return nn.Embedding(len(space.classes) + 1, width) if space.classes else None


def levels_and_classes(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """(levels [B, C, H, W] uint8, classes [B] or None) of a batch."""
    return batch["pixels"], batch.get("class")

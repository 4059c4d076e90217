"""The very run that a recipe describes, on fake tensors: its own `Model`, its own `Trainer`, phase by phase.

Nothing is rebuilt here. What differs from a real run: nets come from their configurations, without weights; the batch
is made up, in the shapes that the encoders give; and, unless the run is traced as a CPU's, Accelerate's autocast is
CUDA's (`emulate`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, final

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from finetune.config.loader import bundled_recipes, load_recipe
from finetune.config.machine import Machine
from finetune.config.schema import Model as ModelSection
from finetune.config.schema import Precision, Recipe
from finetune.data import latent_cache
from finetune.data.audit.audit import Audit, scan
from finetune.data.batch import Batch
from finetune.data.dataset import Dataset
from finetune.data.shape import ImageShape
from finetune.estimate.allocator.caching import Event
from finetune.estimate.tracing import stubs
from finetune.estimate.tracing.cuda_mode import Cuda, cuda, fake_tensors
from finetune.estimate.tracing.fake_inputs import MadeUpSteps, MadeUpTokenizer
from finetune.estimate.tracing.recorder import Recorder, Section, reading, tensors_of
from finetune.memory.offload import blocks_of
from finetune.memory.quantization import quantizable
from finetune.models import registry
from finetune.models.base import Model, SampleRequest
from finetune.models.pretrained import loading
from finetune.models.pretrained.model import DTYPES, TextToImage
from finetune.models.scratch import base
from finetune.paths import run_of
from finetune.planning import DataFacts, Plan
from finetune.rng import Draw
from finetune.training.optimizer_step import Fused
from finetune.training.run_folder import Run
from finetune.training.trainer import Trainer

STEPS = 2  # the first makes the optimizer's state, the second is as all that follow
OF_TEXT_ENCODERS = ("text encoders' blocks", "text encoders' largest block", "text encoders' quantizable")  # parameters
DENOISING_STEPS = 2  # of a sample: each is as the last


@final
@dataclass
class Phase:
    """What one phase of a run allocates from an empty cache on, and its operators.

    Attributes:
        events: every allocation and release, in order.
        sections: where its parts begin among the events, and each part's operators.
        held: bytes that were there when the phase began, by what they are.
        cycle: of training's steps, so many at its end come again and again.
    """

    events: list[Event]
    sections: list[Section]
    held: dict[str, int] = field(default_factory=dict)
    cycle: int = 1


@final
class Host(Accelerator):  # type: ignore[misc]
    """Accelerate on one process, whose autocast is the emulated CUDA's, if any; it tells the recorder where a step's parts begin."""

    def __init__(self, mode: Cuda | None, dtype: torch.dtype | None, recorder: Recorder) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        super().__init__(cpu=True, mixed_precision="no")
        self._mode, self._dtype, self._recorder = mode, dtype, recorder

    @contextlib.contextmanager
    def autocast(self, autocast_handler: Any = None) -> Iterator[None]:
        self._recorder.section("forward")
        with (
            self._mode.autocast(self._dtype)
            if self._mode
            else torch.autocast("cpu", self._dtype, enabled=self._dtype is not None)
        ):
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        self._recorder.section("backward")
        super().backward(loss, **kwargs)

    def unscale_gradients(self, optimizer: Any = None) -> None:
        self._recorder.section("optimizer")
        super().unscale_gradients(optimizer)


@final
class MadeUp:
    """Stands for the run's `Dataset`: batches in the shapes that the encoders give, each tensor made by `make`."""

    has_validation = False

    def __init__(self, example: Batch, make: Callable[..., Tensor] = torch.empty) -> None:
        self._example, self._make = example, make

    def batch(self, step: int, places: tuple[int, ...], draw: Draw) -> Batch:
        return {
            name: self._make((len(places), *tensor.shape), dtype=tensor.dtype) for name, tensor in self._example.items()
        }

    def names(self, step: int) -> list[str]:
        return []


def plan_for(recipe: Recipe, precision: Precision, size: tuple[int, int]) -> Plan:
    """A plan whose numbers are the recipe's, for images of one size (width, height)."""
    facts = DataFacts(images=1, examples=1, held_out=0, buckets=((ImageShape(size[1], size[0]), 1),), digest="")
    machine = Machine(device="cpu", name="traced", processes=1, threads=1, bfloat16=True, memory_bytes=0)
    batch = recipe.train.batch_size * recipe.train.accumulation
    return Plan(recipe, facts, machine, precision, batch, 1.0, STEPS, "", ())


@final
class Subject:
    """A recipe's run, ready to be traced.

    Args:
        recipe: as it would train.
        precision: of the activations, as the plan resolves it for the GPU.
        size: width and height of the images.
        audit: of the data; only what is built from scratch reads it (its captions give the tokenizer).
        trained_dtype: of what trains in other trainers' runs, which estimates are checked against; none: as the recipe says.
        build: makes the model of a plan, where it is no family of `models/`.
        autocast: other trainers' runs may compute in `precision` without it.
        device: whose autocast, kernels and optimizers are traced.
        steps: that are, or more: where turns compute more in some steps than in others, all that differ.
    """

    def __init__(
        self,
        recipe: Recipe,
        precision: Precision,
        size: tuple[int, int],
        audit: Audit | None = None,
        trained_dtype: torch.dtype | None = None,
        build: Callable[[Plan], Model] | None = None,
        autocast: bool = True,
        device: stubs.Device = "cuda",
        steps: int = STEPS,
    ) -> None:
        recipe = dataclasses.replace(recipe, sample=dataclasses.replace(recipe.sample, prompts=("",), negative=""))
        self.plan, self.size = plan_for(recipe, precision, size), size
        self._audit, self._trained_dtype = cast(Audit, audit), trained_dtype
        self._make = build or self._family
        self._autocast = DTYPES[precision] if autocast and precision != "float32" else None
        self._device, self._steps = device, steps
        self.example: Batch = {}

    def phases(self, only_training: bool = False, example: Batch | None = None) -> dict[str, Phase]:
        """encode, train, sample: each from an empty cache on, as the loop empties it between encoding and training.

        Args:
            example: what encoding gave another run with these encoders and this size (`self.example`): it is then left out.
        """
        with (
            fake_tensors(),
            skeletons(),
            stubs.in_place(self._device),
            cuda() if self._device == "cuda" else contextlib.nullcontext() as mode,
        ):
            model = self.build()
            # Nets that read a caption's length are given that of a full one.
            with (
                reading(model.family.tokens)
                if isinstance(model, TextToImage) and model.family.spec.objective == "flow"
                else contextlib.nullcontext()
            ):
                encode, self.example = (None, example) if example is not None else self.encode(model)
                found = {"encode": encode} if encode is not None else {}
                found["train"] = self._train(model, self.example, mode)
                if isinstance(model, TextToImage) and not only_training:
                    found["sample"] = self._sample(model)
        return found

    def build(self) -> Model:
        """The recipe's model; within `skeletons` from configurations alone."""
        found = self._make(self.plan)
        if self._trained_dtype is not None:
            for parameter in found.trained().values():
                parameter.data = parameter.data.to(self._trained_dtype)
        return found

    def _family(self, plan: Plan) -> Model:
        return registry.build(plan, self._audit)

    def encode(self, model: Model) -> tuple[Phase | None, Batch]:
        """What encoding takes, and an example of its outcome; the text encoders are then released."""
        encoders = model.encoder()
        width, height = self.size
        pixels = torch.empty(3, height, width)
        geometry = {"geometry": torch.empty(6)}
        if not isinstance(model, TextToImage):
            return None, encoders.encode({"target": pixels, "caption": ""}) | geometry
        gc.collect()
        with Recorder() as recorder, torch.no_grad():
            held = {
                "vae": recorder.adopt(tensors_of(model.pipeline.vae)),
                "text encoders": 0,
                **dict.fromkeys(("vae parameters", "text encoders parameters", *OF_TEXT_ENCODERS), 0),
            }
            held["vae parameters"] = _parameters(model.pipeline.vae)
            if not (
                self.plan.recipe.model.train_text_encoder or self.plan.recipe.tokens
            ):  # of encoders that wait in host memory, what does not wait
                texts = list(encoders.text_encoders.values())  # type: ignore[attr-defined]
                held["text encoders"] = sum(recorder.adopt(tensors_of(net)) for net in texts)
                held["text encoders parameters"] = sum(_parameters(net) for net in texts)
                blocks = [_parameters(block) for net in texts for block in blocks_of(net)]
                held |= {"text encoders' blocks": sum(blocks), "text encoders' largest block": max(blocks, default=0)}
                held["text encoders' quantizable"] = sum(
                    net.get_parameter(f"{name}.weight").numel() for net in texts for name in quantizable(net)
                )
            recorder.section("encode text")
            caption = encoders.encode({"caption": ""})
            recorder.section("encode images")
            image = encoders.encode({"target": pixels})
        encoders.release()
        return Phase(recorder.events, recorder.sections, held), image | caption | geometry

    def _train(self, model: Model, example: Batch, mode: Cuda | None) -> Phase:
        gc.collect()
        with stubs.recorder(self._device) as recorder:
            trained = {id(parameter) for parameter in model.trained().values()}
            tensors = [tensor for train_step in model.train_steps() for tensor in tensors_of(train_step.net)]
            held = {
                "weights": sum(
                    tensor.numel() * tensor.element_size() for tensor in _once(tensors) if id(tensor) not in trained
                ),
                "trained": sum(
                    tensor.numel() * tensor.element_size() for tensor in _once(tensors) if id(tensor) in trained
                ),
            }
            held["trained parameters"] = sum(parameter.numel() for parameter in model.trained().values())
            parameters = [parameter for train_step in model.train_steps() for parameter in train_step.net.parameters()]
            frozen = sum(parameter.numel() for parameter in _once(parameters) if not parameter.requires_grad)
            held["parameters"] = (
                frozen
                if self.plan.recipe.method == "lora"
                else sum(parameter.numel() for parameter in _once(parameters))
            )
            held |= _units(model)
            held["waiting"] = sum(
                getattr(module, "waiting_bytes", 0)
                for train_step in model.train_steps()
                for module in train_step.net.modules()
            )
            recorder.adopt(tensors)
            recorder.section("state")
            trainer = Trainer(
                self.plan, model, cast(Dataset, MadeUp(example)), cast(Run, None), Host(mode, self._autocast, recorder)
            )
            for update in trainer.state.updates:
                if isinstance(update, Fused):
                    update.watch(recorder.section)
            cycle = math.lcm(*(train_step.cycle for train_step in model.train_steps()))
            for step in range(self._steps - 1 + cycle):
                recorder.section("batch")
                trainer.train_step(step)
            recorder.section("end")
            held["averages"] = (
                sum(_bytes(tensor) for tensor in trainer.state.ema.averages.values()) if trainer.state.ema else 0
            )
            held["optimizer"] = sum(
                _bytes(value) for optimizer in trainer.state.optimizers for value in _state(optimizer)
            )
        return Phase(recorder.events, recorder.sections, held, cycle)

    def _sample(self, model: TextToImage) -> Phase:
        """With the trained nets in place; what training keeps besides them (optimizer, averages) is added by who reports."""
        gc.collect()
        model.pipeline.image_processor = _NoImage()
        # Any scheduler's step is a few operators on latents; some others read values, which fake tensors have not.
        config = model.pipeline.scheduler.config
        flow = model.family.spec.objective == "flow"
        model.pipeline.scheduler = MadeUpSteps(config) if flow else diffusers.DDIMScheduler.from_config(config)
        guidance = max(self.plan.recipe.sample.guidance, 1.0)
        with Recorder() as recorder:
            recorder.adopt(tensor for train_step in model.train_steps() for tensor in tensors_of(train_step.net))
            held = {"vae": recorder.adopt(tensors_of(model.pipeline.vae))}
            recorder.section("sample")
            model.sample(SampleRequest(("",), (0,), DENOISING_STEPS, guidance, size=self.size))
            recorder.section("end")
        return Phase(recorder.events, recorder.sections, held)


class _NoImage:
    """Stands for the pipeline's image processor: fake pixels make no image."""

    def postprocess(self, pixels: Tensor, **_: Any) -> Tensor:
        return pixels


def _once(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _units(model: Model) -> dict[str, int]:
    """Parameters of the largest of the units that Accelerate's FSDP would wrap (a net's `_no_split_modules`), and of what is in none."""
    nets = [
        module
        for train_step in model.train_steps()
        for module in train_step.net.modules()
        if getattr(module, "_no_split_modules", None)
    ]
    names = {name for net in nets for name in cast(list[str], net._no_split_modules)}
    sizes, unit_of = (
        {0: 0},
        dict.fromkeys(
            (id(parameter) for train_step in model.train_steps() for parameter in train_step.net.parameters()), 0
        ),
    )
    for module in (
        module for net in nets for module in net.modules() if type(module).__name__ in names
    ):  # inner ones come after outer ones
        unit_of |= dict.fromkeys((id(parameter) for parameter in module.parameters()), id(module))
    for parameter in _once(
        [parameter for train_step in model.train_steps() for parameter in train_step.net.parameters()]
    ):
        sizes[unit_of[id(parameter)]] = sizes.get(unit_of[id(parameter)], 0) + parameter.numel()
    return {"outside units": sizes.pop(0), "largest unit": max(sizes.values(), default=0)}


def _parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _state(optimizer: Any) -> Iterator[Tensor]:
    for values in optimizer.state.values():
        yield from (value for value in values.values() if isinstance(value, Tensor))


@contextlib.contextmanager
def skeletons(device: torch.device | None = None) -> Iterator[None]:
    """Within, what a recipe names to start from is built from configurations, without weights.

    Args:
        device: where real nets draw their random values, for a CPU takes minutes over billions; they then wait in host memory, as read ones do.
    """
    with (
        loading.open_pipeline.replaced_by(functools.partial(_pipeline, device=device)),
        loading.open_vae.replaced_by(_vae),
        base.open_model.replaced_by(_first_stage),
        latent_cache.fingerprint.replaced_by(lambda tensors: ""),  # no cache is kept of what has no values
    ):
        yield


def _pipeline(
    section: ModelSection,
    class_name: str,
    dtype: torch.dtype,
    own: Mapping[str, torch.dtype] = MappingProxyType({}),
    device: torch.device | None = None,
) -> Any:
    """`loading.open_pipeline` without weights."""
    from finetune.estimate.architecture import configs_of
    from finetune.models.pretrained.single_file import clip_tokenizer

    folder, name = configs_of(section)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts: dict[str, Any] = {}
    known = registry.variants()
    for key, entry in index.items():
        if (
            not isinstance(entry, list)
            or entry[0] is None
            or key in ("safety_checker", "feature_extractor", "image_encoder")
        ):
            continue
        if entry[0] == "transformers" and "Tokenizer" in entry[1]:
            local = folder / key
            padding = known[name][1].padding.get(key) if name in known else None
            if local.is_dir():
                parts[key] = transformers.AutoTokenizer.from_pretrained(str(local))
            else:
                parts[key] = clip_tokenizer(padding) if padding else MadeUpTokenizer()
        elif entry[0] == "transformers":
            cls = getattr(transformers, entry[1])
            parts[key] = _net(
                functools.partial(cls, cls.config_class.from_pretrained(str(folder / key))), own.get(key, dtype), device
            )
        elif key == "scheduler":
            cls = getattr(diffusers, entry[1])
            with unset_fake_temporarily():  # it reads its own values, and they are few
                parts[key] = cls.from_config(cls.load_config(str(folder / key)))
        else:
            cls = getattr(diffusers, entry[1])
            kept = torch.float32 if key == "vae" else own.get(key, dtype)
            parts[key] = _net(functools.partial(cls.from_config, cls.load_config(str(folder / key))), kept, device)
    if class_name == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if section.vae:
        parts["vae"] = _vae(section.vae)
    return getattr(diffusers, class_name)(**parts)


def _net(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device | None) -> nn.Module:
    # nn.Module's own `to`: diffusers' warns of what from_pretrained would do better.
    if device is None:
        return nn.Module.to(make(), dtype).eval()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # twenty billion values in float32 are more than most devices hold
    try:
        with device:
            return nn.Module.to(make(), "cpu", dtype).eval()
    finally:
        torch.set_default_dtype(before)


def _vae(given: str, class_name: str = "") -> Any:
    from finetune.estimate.architecture import vae_config

    return diffusers.AutoencoderKL.from_config(vae_config(given)).eval()


def _first_stage(path: str | Path) -> base.PixelModel:
    """`open_model`; for a bundled recipe that has not run yet, the model that it will make."""
    name = next((name for name in bundled_recipes() if path == run_of(name)), "")
    if not name or Path(path).exists():
        return base.open_model.original(path)
    recipe = load_recipe(name)
    found = registry.build(plan_for(recipe, "float32", (recipe.data.resolution,) * 2), scan(recipe.data))
    assert isinstance(found, base.PixelModel)
    return found

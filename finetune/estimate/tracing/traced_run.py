"""Run a recipe on fake tensors, phase by phase, with its own `Model` and `Trainer`.

Differences from a real run: networks are built from configurations, without weights (`skeletons`); the batch is fake,
with the shapes that the encoders return; and, unless a CPU is traced, Accelerate's autocast is CUDA's (`cuda_mode`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, final

import diffusers
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from finetune.config.schema import Precision, Recipe
from finetune.data.audit.audit import Audit
from finetune.data.batch import Batch
from finetune.data.dataset import Dataset
from finetune.estimate.allocator.caching import Event
from finetune.estimate.tracing import stubs
from finetune.estimate.tracing.cuda_mode import Cuda, cuda, fake_tensors
from finetune.estimate.tracing.fake_inputs import FakeScheduler
from finetune.estimate.tracing.recorder import Recorder, Section, reading, tensors_of
from finetune.estimate.tracing.skeletons import STEPS, plan_for, skeletons
from finetune.memory.offload import blocks_of
from finetune.memory.quantization import quantizable
from finetune.models import registry
from finetune.models.base import Model, SampleRequest
from finetune.models.pretrained.model import DTYPES, TextToImage
from finetune.planning import Plan
from finetune.rng import Draw
from finetune.training.optimizer_step import Fused
from finetune.training.run_folder import Run
from finetune.training.trainer import Trainer

OF_TEXT_ENCODERS = ("text encoders' blocks", "text encoders' largest block", "text encoders' quantizable")  # parameters
DENOISING_STEPS = 2  # per sample; all are alike


@final
@dataclass
class Phase:
    """The allocations of one phase of a run, starting from an empty cache, and its operators.

    Attributes:
        events: every allocation and release, in order.
        sections: the parts of the phase: index of the first event, and operators.
        held: bytes allocated before the phase, by kind.
        cycle: the number of steps after which training repeats.
    """

    events: list[Event]
    sections: list[Section]
    held: dict[str, int] = field(default_factory=dict)
    cycle: int = 1


@final
class Host(Accelerator):  # type: ignore[misc]
    """Accelerate on one process, with the emulated CUDA autocast if there is one; marks the parts of a step for the
    recorder.
    """

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
class FakeDataset:
    """Replaces the run's `Dataset`: batches with the shapes that the encoders return, each tensor created by `make`."""

    has_validation = False

    def __init__(self, example: Batch, make: Callable[..., Tensor] = torch.empty) -> None:
        self._example, self._make = example, make

    def batch(self, step: int, places: tuple[int, ...], draw: Draw) -> Batch:
        return {
            name: self._make((len(places), *tensor.shape), dtype=tensor.dtype) for name, tensor in self._example.items()
        }

    def names(self, step: int) -> list[str]:
        return []


@final
class TracedRun:
    """The run of a recipe on fake tensors.

    Args:
        recipe: the recipe to trace.
        precision: of activations, as the plan resolves it for the GPU.
        size: width and height of the images.
        audit: of the dataset; read only by models from scratch, whose tokenizer comes from its captions.
        trained_dtype: dtype of trained weights, for runs of other trainers; None: the recipe's.
        build: builds the model of a plan; None: the recipe's family.
        autocast: False for runs of other trainers that compute in `precision` without it.
        device: whose autocast, kernels and optimizers are traced.
        steps: number of steps at least; more if steps differ, until all kinds are included.
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
        """Trace the phases encode, train and sample, each from an empty cache, as in a real run.

        Args:
            example: the result of encoding in another run with the same encoders and size; encoding is then skipped.
        """
        with (
            fake_tensors(),
            skeletons(),
            stubs.in_place(self._device),
            cuda() if self._device == "cuda" else contextlib.nullcontext() as mode,
        ):
            model = self.build()
            # Networks that read a caption's length get that of a full one.
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
        """The recipe's model; inside `skeletons`, without weights."""
        found = self._make(self.plan)
        if self._trained_dtype is not None:
            for parameter in found.trained().values():
                parameter.data = parameter.data.to(self._trained_dtype)
        return found

    def _family(self, plan: Plan) -> Model:
        return registry.build(plan, self._audit)

    def encode(self, model: Model) -> tuple[Phase | None, Batch]:
        """Trace encoding; returns the phase and an encoded example. Releases the text encoders."""
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
            ):  # for offloaded encoders, what stays on the GPU
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
                self.plan,
                model,
                cast(Dataset, FakeDataset(example)),
                cast(Run, None),
                Host(mode, self._autocast, recorder),
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
        """Trace sampling with the trained networks; optimizer state and averages are added by the caller."""
        gc.collect()
        model.pipeline.image_processor = _NoImage()
        # Any scheduler's step is a few operators on latents; some read values, which fake tensors do not have.
        config = model.pipeline.scheduler.config
        flow = model.family.spec.objective == "flow"
        model.pipeline.scheduler = FakeScheduler(config) if flow else diffusers.DDIMScheduler.from_config(config)
        guidance = max(self.plan.recipe.sample.guidance, 1.0)
        with Recorder() as recorder:
            recorder.adopt(tensor for train_step in model.train_steps() for tensor in tensors_of(train_step.net))
            held = {"vae": recorder.adopt(tensors_of(model.pipeline.vae))}
            recorder.section("sample")
            model.sample(SampleRequest(("",), (0,), DENOISING_STEPS, guidance, size=self.size))
            recorder.section("end")
        return Phase(recorder.events, recorder.sections, held)


class _NoImage:
    """Replaces the pipeline's image processor, since fake pixels make no image."""

    def postprocess(self, pixels: Tensor, **_: Any) -> Tensor:
        return pixels


def _once(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _units(model: Model) -> dict[str, int]:
    """Parameters of the largest unit that Accelerate's FSDP would wrap (`_no_split_modules`), and of those outside
    any unit.
    """
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
    ):  # inner modules come after outer ones
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

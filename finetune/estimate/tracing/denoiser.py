"""Trace any diffusers denoiser: its class and configuration, fake inputs, and an adapter.

For architectures without a family in `models/`, and for `ft estimate --denoiser CONFIG.json`. Text encoders and VAE
are not included, so only the training phase is traced.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, final

import diffusers
import torch
from torch import Tensor, nn

from finetune.data.batch import Batch, Encoder, ImageTextEncoder
from finetune.errors import UserError
from finetune.estimate.architecture import DENOISERS
from finetune.estimate.tracing.cuda_mode import Routing
from finetune.estimate.tracing.denoiser_inputs import INPUTS, Config, Inputs
from finetune.estimate.tracing.recorder import reading
from finetune.memory.quantization import dtype_of
from finetune.models.base import Model, SampleRequest, TrainStep
from finetune.models.pretrained.model import DTYPES
from finetune.models.pretrained.trainable import Trainable, make_trainable
from finetune.planning import Plan
from finetune.rng import Draw


@final
@dataclass(frozen=True)
class Denoiser:
    """A diffusers class with its configuration.

    Attributes:
        config: as in the model's `config.json`, with `_class_name`.
        tokens: length of caption embeddings.
        frames: latent frames of a video model.
    """

    title: str
    config: Config
    resolution: int
    tokens: int = 0
    frames: int = 1

    def net(self) -> nn.Module:
        """Built without weights, float32.

        Raises:
            UserError: the class is not supported.
        """
        name = self.config.get("_class_name")
        if name not in INPUTS:
            raise UserError(
                f"{name} cannot be traced" if name else "the file has no _class_name",
                where="--denoiser",
                remedy=f"use the config.json of one of: {', '.join(sorted(INPUTS))}",
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers' own classes use parts that diffusers deprecates
            net: nn.Module = getattr(diffusers, name).from_config(self.config)
            return Controlled(net, self.config) if name == "ControlNetModel" else net

    def inputs(self, size: tuple[int, int]) -> Inputs:
        """The denoiser's inputs for images of (width, height)."""
        return INPUTS[self.config["_class_name"]](_Defaults(self), *size)


def load(given: str) -> Denoiser:
    """Load a denoiser by its name in assets/denoisers, or from a configuration file.

    Raises:
        UserError: the file cannot be read or is not a JSON object.
    """
    path = DENOISERS / f"{given}.json" if (DENOISERS / f"{given}.json").is_file() else Path(given).expanduser()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in DENOISERS.glob("*.json")))
        raise UserError(
            f"{path} cannot be read: {error.strerror}",
            where="--denoiser",
            remedy=f"give a config.json, or one of: {known}",
        ) from None
    except ValueError:
        raise UserError(
            f"{path} is not a JSON object", where="--denoiser", remedy="give a denoiser's config.json"
        ) from None
    if "config" not in found:  # as written by diffusers
        found = {
            "title": found.get("_class_name", path.stem),
            "config": found,
            "resolution": 1024,
            "tokens": found.get("max_text_seq_length", 256),
        }
    return Denoiser(
        **{key: found[key] for key in ("title", "config", "resolution", "tokens", "frames") if key in found}
    )


class _Defaults:
    """A denoiser's configuration, completed with the class's defaults."""

    def __init__(self, denoiser: Denoiser) -> None:
        cls = getattr(diffusers, denoiser.config["_class_name"])
        signature = inspect.signature(cls.__init__).parameters
        self._values = {key: parameter.default for key, parameter in signature.items()} | denoiser.config
        self.tokens, self.frames = denoiser.tokens, denoiser.frames

    def __getattr__(self, name: str) -> Any:
        return self._values[name]


# -- the model
# ----------------------------------------------------------------------------------------------------------


@final
class Controlled(nn.Module):
    """A ControlNet (arXiv:2302.05543) with the frozen UNet that it controls; only the ControlNet trains."""

    def __init__(self, control: nn.Module, config: Config) -> None:
        super().__init__()
        shared = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
        self.control = control
        self.unet = diffusers.UNet2DConditionModel.from_config(
            {key: value for key, value in config.items() if key in shared}
        )

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, controlnet_cond: Tensor, **given: Any
    ) -> Any:
        """UNet2DConditionModel.forward with a control image."""
        down, middle = self.control(sample, timestep, encoder_hidden_states, controlnet_cond, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(sample, timestep, encoder_hidden_states, **residuals, **given)

    def requires_grad_(self, requires_grad: bool = True) -> Controlled:
        self.control.requires_grad_(requires_grad)
        self.unet.requires_grad_(False)
        return self

    def enable_gradient_checkpointing(self, function: Any) -> None:
        """Enable it in both: the backward pass runs through the UNet's second half."""
        self.control.enable_gradient_checkpointing(function)  # type: ignore[operator]
        self.unet.enable_gradient_checkpointing(function)


@final
class DenoiserTrainStep(TrainStep):
    """x_t = (1 − t) x₀ + t ε, with the denoiser's loss."""

    name = "denoiser"

    def __init__(self, net: nn.Module, inputs: Inputs) -> None:
        self.net, self._inputs = net, inputs
        for module in net.modules():
            if inputs.experts > 1 and hasattr(module, "experts"):  # hooks, since the backward pass recomputes blocks
                routing = Routing(inputs.experts)
                module.register_forward_pre_hook(routing.begin)
                module.register_forward_hook(routing.end, always_call=True)

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """The loss per image, [B] float32."""
        latents = batch["latents"]
        noise, time = draw.normal("noise", latents.shape[1:]), draw.uniform("time")
        names, fixed = self._inputs.names, self._inputs.fixed(len(latents))
        dtype = dtype_of(self.net)
        given = {name: _typed(batch[name], dtype) for name in self._inputs.conditions} | fixed
        if latents.is_floating_point():
            share = time.view(-1, *(1,) * (latents.ndim - 1))
            given[names[0]] = ((1 - share) * latents + share * noise).to(dtype)
        else:  # tokens: some become mask tokens
            given[names[0]] = torch.where(noise > 0, latents, torch.zeros_like(latents))
        if names[1]:
            given[names[1]] = time
        if "encoder_hidden_states_llama3" in given:  # layers come first
            given["encoder_hidden_states_llama3"] = given["encoder_hidden_states_llama3"].transpose(0, 1)
        with reading(self._inputs.integers):
            returned = (
                self.net(**given)
                if isinstance(self.net, diffusers.UVit2DModel)
                else self.net(**given, return_dict=False)[0]
            )
        return self._inputs.loss(returned, noise, latents)


def _typed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@final
class DenoiserModel(Model):
    """A denoiser trained with an adapter or fully, by the plan's recipe.

    Args:
        adapt: adds an adapter to the network; default: the recipe's.
    """

    def __init__(
        self, plan: Plan, denoiser: Denoiser, size: tuple[int, int], adapt: Callable[[nn.Module], object] | None = None
    ) -> None:
        recipe = plan.recipe
        net, full = denoiser.net(), recipe.method != "lora"
        self._inputs = denoiser.inputs(size)
        nn.Module.to(net, DTYPES[recipe.train.weights if full else plan.precision])
        if recipe.train.checkpointed and isinstance(net, diffusers.UVit2DModel):
            raise UserError(
                "UVit2DModel does not support gradient checkpointing: diffusers 0.42 passes keyword arguments "
                "that it rejects",
                where="train.gradient_checkpointing",
                remedy="--set train.gradient_checkpointing=false",
            )
        model = Trainable(recipe, {"denoiser": net}, "denoiser", DTYPES[plan.precision], torch.device("cpu"))
        if adapt is None:
            make_trainable(model)
        else:
            make_trainable(model, only=("freeze", "unfreeze", "quantize"))
            adapt(net)
            make_trainable(model, only=("activation_checkpointing", "offload"))
        self._turn = DenoiserTrainStep(net, self._inputs)

    def train_steps(self) -> tuple[TrainStep, ...]:
        return (self._turn,)

    def encoder(self) -> Encoder:
        return _FakeEncoder(self._inputs)

    def sample(self, request: SampleRequest) -> NoReturn:
        raise NotImplementedError("a denoiser alone cannot generate images")

    def save(self, folder: Path) -> NoReturn:
        raise NotImplementedError("it is traced, not trained")


@final
class _FakeEncoder(ImageTextEncoder):
    """Returns fake inputs in place of encoded examples."""

    image_key = caption_key = "made up"

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def encode_image(self, pixels: Tensor) -> Batch:
        return {"latents": self._inputs.latents}

    def encode_caption(self, caption: str) -> Batch:
        return self._inputs.conditions

    def release(self) -> None:
        pass

"""Any denoiser of diffusers as something to trace: its class and configuration, made-up inputs, and an adapter.

For architectures that have no family in `models/` yet, and for `ft estimate --denoiser CONFIG.json`. What surrounds a
denoiser (its text encoders, its VAE) is not part of it: only the training phase comes out.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, final

import diffusers
import torch
from torch import Tensor, nn

from finetune.engine.draw import Draw
from finetune.errors import UserError
from finetune.estimate.architecture import DENOISERS
from finetune.estimate.trace import reading
from finetune.models import smaller
from finetune.models.adapters import add_adapter
from finetune.models.checkpointing import checkpoint_activations
from finetune.models.quantized import dtype_of
from finetune.models.text_to_image import DTYPES
from finetune.models.turn import Batch, Encoders, Model, SampleRequest, Turn
from finetune.planning import Plan

Config = dict[str, Any]


@final
@dataclass(frozen=True)
class Inputs:
    """What a denoiser is called with.

    Attributes:
        latents: of one picture, without a batch dimension.
        conditions: of one picture, by the name of forward's argument.
        fixed: arguments that do not grow with the batch, or a function of the batch that makes them.
        names: of forward's arguments for the noisy latents and the timesteps.
        integers: what reading an integer from a tensor gives (fake tensors have no values), such as a caption's length.
    """

    latents: Tensor
    conditions: Batch = field(default_factory=dict)
    fixed: Callable[[int], dict[str, Any]] = lambda batch: {}
    names: tuple[str, str] = ("hidden_states", "timestep")
    integers: int = 1


@final
@dataclass(frozen=True)
class Denoiser:
    """A diffusers class with its configuration.

    Attributes:
        config: as in the model's `config.json`, with `_class_name`.
        tokens: length of a caption's embeddings.
        frames: latent frames, of a video model.
    """

    title: str
    config: Config
    resolution: int
    tokens: int = 0
    frames: int = 1

    def net(self) -> nn.Module:
        """Built without weights, float32.

        Raises:
            UserError: the configuration is of no denoiser that can be called here.
        """
        name = self.config.get("_class_name")
        if name not in INPUTS:
            raise UserError(
                f"{name or 'a file without _class_name'} is no denoiser that can be traced",
                where="--denoiser",
                remedy=f"give the config.json of one of: {', '.join(sorted(INPUTS))}",
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers' own classes use parts that diffusers deprecates
            return getattr(diffusers, name).from_config(self.config)  # type: ignore[no-any-return]

    def inputs(self, size: tuple[int, int]) -> Inputs:
        return INPUTS[self.config["_class_name"]](_Defaults(self), *size)


def load(given: str) -> Denoiser:
    """A denoiser by the name of one in assets/denoisers, or by the path of a configuration file.

    Raises:
        UserError: there is neither, or the file is no JSON object.
    """
    path = DENOISERS / f"{given}.json" if (DENOISERS / f"{given}.json").is_file() else Path(given).expanduser()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in DENOISERS.glob("*.json")))
        raise UserError(f"{path} cannot be read: {error.strerror}", where="--denoiser", remedy=f"give a config.json, or one of: {known}") from None
    except ValueError:
        raise UserError(f"{path} holds no JSON object", where="--denoiser", remedy="give a denoiser's config.json") from None
    if "config" not in found:  # as diffusers wrote it
        found = {"title": found.get("_class_name", path.stem), "config": found, "resolution": 1024, "tokens": found.get("max_text_seq_length", 256)}
    return Denoiser(**{key: found[key] for key in ("title", "config", "resolution", "tokens", "frames") if key in found})


class _Defaults:
    """A denoiser's configuration with the class's own values for what it leaves out."""

    def __init__(self, denoiser: Denoiser) -> None:
        cls = getattr(diffusers, denoiser.config["_class_name"])
        signature = inspect.signature(cls.__init__).parameters
        self._values = {key: parameter.default for key, parameter in signature.items()} | denoiser.config
        self.tokens, self.frames = denoiser.tokens, denoiser.frames

    def __getattr__(self, name: str) -> Any:
        return self._values[name]


# -- what each class is called with: (configuration, width, height) → inputs ---------------------------------------------


def _flux(config: Any, width: int, height: int) -> Inputs:
    """Latents in 2 × 2 patches under an 8-fold VAE: [L, C]; position ids of three axes, FLUX.2's of four."""
    axes = 4 if config._class_name == "Flux2Transformer2DModel" else 3
    length = (width // 16) * (height // 16)
    conditions = {"encoder_hidden_states": torch.empty(config.tokens, config.joint_attention_dim)}
    if config._class_name == "FluxTransformer2DModel":
        conditions["pooled_projections"] = torch.empty(config.pooled_projection_dim)
    if config._class_name in ("FluxTransformer2DModel", "Flux2Transformer2DModel") and config.guidance_embeds:
        conditions["guidance"] = torch.empty(())
    if config._class_name == "ChromaTransformer2DModel":
        conditions["attention_mask"] = torch.empty(config.tokens + length)
    return Inputs(
        torch.empty(length, config.in_channels),
        conditions,
        lambda batch: {"img_ids": torch.empty(length, axes), "txt_ids": torch.empty(config.tokens, axes)},
    )


def _qwen(config: Any, width: int, height: int) -> Inputs:
    tall, wide = height // 16, width // 16
    return Inputs(
        torch.empty(tall * wide, config.in_channels),
        {"encoder_hidden_states": torch.empty(config.tokens, config.joint_attention_dim)},
        lambda batch: {"img_shapes": [[(1, tall, wide)]] * batch},
    )


def _krea(config: Any, width: int, height: int) -> Inputs:
    length = (width // 16) * (height // 16)
    return Inputs(
        torch.empty(length, config.in_channels),
        {"encoder_hidden_states": torch.empty(config.tokens, config.num_text_layers, config.text_hidden_dim)},
        lambda batch: {"position_ids": torch.empty(config.tokens + length, 3)},
    )


def _sd3(config: Any, width: int, height: int) -> Inputs:
    conditions = {"encoder_hidden_states": torch.empty(config.tokens, config.joint_attention_dim)}
    if config._class_name == "SD3Transformer2DModel":
        conditions["pooled_projections"] = torch.empty(config.pooled_projection_dim)
    return Inputs(torch.empty(config.in_channels, height // 8, width // 8), conditions)


def _lumina(config: Any, width: int, height: int) -> Inputs:
    """It reads each caption's length: full ones here."""
    conditions = {
        "encoder_hidden_states": torch.empty(config.tokens, config.cap_feat_dim),
        "encoder_attention_mask": torch.empty(config.tokens, dtype=torch.int64),
    }
    return Inputs(torch.empty(config.in_channels, height // 8, width // 8), conditions, integers=config.tokens)


def _pixart(config: Any, width: int, height: int) -> Inputs:
    conditions = {
        "encoder_hidden_states": torch.empty(config.tokens, config.caption_channels),
        "encoder_attention_mask": torch.empty(config.tokens),
    }
    return Inputs(
        torch.empty(config.in_channels, height // 8, width // 8),
        conditions,
        lambda batch: {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    )


def _sana(config: Any, width: int, height: int) -> Inputs:
    """Under DC-AE's 32-fold compression."""
    conditions = {
        "encoder_hidden_states": torch.empty(config.tokens, config.caption_channels),
        "encoder_attention_mask": torch.empty(config.tokens),
    }
    return Inputs(torch.empty(config.in_channels, height // 32, width // 32), conditions)


def _cogvideox(config: Any, width: int, height: int) -> Inputs:
    fixed: dict[str, Any] = {}
    if config.use_rotary_positional_embeddings:
        length = config.frames * (height // 16) * (width // 16)
        fixed = {"image_rotary_emb": (torch.empty(length, config.attention_head_dim), torch.empty(length, config.attention_head_dim))}
    return Inputs(
        torch.empty(config.frames, config.in_channels, height // 8, width // 8),
        {"encoder_hidden_states": torch.empty(config.max_text_seq_length, config.text_embed_dim)},
        lambda batch: fixed,
    )


def _unet(config: Any, width: int, height: int) -> Inputs:
    """SDXL's six sizes and its pooled text are told by `addition_embed_type`."""

    def fixed(batch: int) -> dict[str, Any]:
        if config.addition_embed_type != "text_time":
            return {}
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {"added_cond_kwargs": {"text_embeds": torch.empty(batch, pooled), "time_ids": torch.empty(batch, 6)}}

    conditions = {"encoder_hidden_states": torch.empty(config.tokens, config.cross_attention_dim)}
    return Inputs(torch.empty(config.in_channels, height // 8, width // 8), conditions, fixed, names=("sample", "timestep"))


INPUTS: dict[str, Callable[[Any, int, int], Inputs]] = {
    "AuraFlowTransformer2DModel": _sd3,
    "ChromaTransformer2DModel": _flux,
    "CogVideoXTransformer3DModel": _cogvideox,
    "Flux2Transformer2DModel": _flux,
    "FluxTransformer2DModel": _flux,
    "Krea2Transformer2DModel": _krea,
    "LongCatImageTransformer2DModel": _flux,
    "Lumina2Transformer2DModel": _lumina,
    "PixArtTransformer2DModel": _pixart,
    "QwenImageTransformer2DModel": _qwen,
    "SD3Transformer2DModel": _sd3,
    "SanaTransformer2DModel": _sana,
    "UNet2DConditionModel": _unet,
}


# -- the model ----------------------------------------------------------------------------------------------------------


@final
class DenoiserTurn(Turn):
    """Flow matching: x_t = (1 − t) x₀ + t ε, and the net predicts ε − x₀."""

    name = "denoiser"

    def __init__(self, net: nn.Module, inputs: Inputs) -> None:
        self.net, self._inputs = net, inputs

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Mean squared error of each picture's predicted velocity, [B] float32."""
        latents = batch["latents"]
        noise, time = draw.normal("noise", latents.shape[1:]), draw.uniform("time")
        share = time.view(-1, *(1,) * (latents.ndim - 1))
        noisy = (1 - share) * latents + share * noise
        names, fixed = self._inputs.names, self._inputs.fixed(len(latents))
        dtype = dtype_of(self.net)
        given = {name: _typed(batch[name], dtype) for name in self._inputs.conditions} | fixed
        with reading(self._inputs.integers):
            predicted: Tensor = self.net(**{names[0]: noisy.to(dtype), names[1]: time}, **given, return_dict=False)[0]
        return (predicted[:, : latents.shape[1]].float() - (noise - latents)).square().flatten(1).mean(1)


def _typed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@final
class DenoiserModel(Model):
    """A denoiser with an adapter, or as a whole, as the plan's recipe trains it.

    Args:
        adapt: puts an adapter on the net; by default the recipe's.
    """

    def __init__(self, plan: Plan, denoiser: Denoiser, size: tuple[int, int], adapt: Callable[[nn.Module], object] | None = None) -> None:
        recipe = plan.recipe
        net, full = denoiser.net(), recipe.method != "lora"
        self._inputs = denoiser.inputs(size)
        nn.Module.to(net, DTYPES[recipe.train.weights if full else plan.precision])
        net.requires_grad_(full)
        smaller.quantize_base(net, recipe, DTYPES[plan.precision], torch.device("cpu"))
        if adapt is not None:
            adapt(net)
        elif recipe.adapter is not None:
            add_adapter(net, recipe.adapter)
        checkpoint_activations(net, recipe.train.checkpointed)
        smaller.offload_base(net, recipe, torch.device("cpu"))
        self._turn = DenoiserTurn(net, self._inputs)

    def turns(self) -> tuple[Turn, ...]:
        return (self._turn,)

    def encoders(self) -> Encoders:
        return _MadeUpEncoders(self._inputs)

    def sample(self, request: SampleRequest) -> NoReturn:
        raise NotImplementedError("a denoiser alone draws nothing")

    def save(self, folder: Path) -> NoReturn:
        raise NotImplementedError("it is traced, not trained")


@final
class _MadeUpEncoders(Encoders):
    """The inputs that stand for what a family's encoders would give."""

    picture_key = caption_key = "made up"

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def encode_picture(self, pixels: Tensor) -> Batch:
        return {"latents": self._inputs.latents}

    def encode_caption(self, caption: str) -> Batch:
        return self._inputs.conditions

    def release(self) -> None:
        pass

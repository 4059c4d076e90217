"""Continue from a LoRA: load it into the networks that train, with the ranks, alphas and layers of its file.

diffusers' own loader reads it, except: PEFT's folders, pipelines that load no LoRA (PixArt-Σ's), and original layer
names with dots, of which diffusers needs every layer or none (Lumina 2).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.adapters.formats.by_modules import PEFT_PREFIX, Weights, read_by_modules
from finetune.adapters.formats.key_maps import CODE, NET, by_diffusers_names, key_map
from finetune.adapters.formats.kohya import with_one_alpha
from finetune.adapters.lora_file import EMBEDDINGS, KEY, PEFT_FILE, Initial, look
from finetune.adapters.peft import read_peft
from finetune.config.schema import Adapter
from finetune.errors import UserError
from finetune.kernels import ADAPTER_NAME
from finetune.models.registry import family_of_pipeline, load
from finetune.paths import public_name

END = ".lora_A.weight"


def load_initial_lora(pipeline: Any, nets: Mapping[str, nn.Module], adapter: Adapter) -> dict[str, list[str]]:
    """Load the LoRA of `adapter.init_lora` into the pipeline, in place; only it trains, in float32.

    Returns the adapted layers by network.

    Args:
        pipeline: the base.
        nets: the networks that train, by their names in the pipeline.
        adapter: the recipe's section.

    Raises:
        UserError: it is a LoRA of another base, or it adapts a network that does not train.
    """
    assert adapter.init_lora is not None
    found = look(adapter.init_lora)
    name = public_name(str(found.file))
    try:
        with _silence():
            _refuse_not_finite(found)
            alphas: dict[str, float] | None = None
            state: dict[str, Tensor] | None
            if (read := _read_by_modules(pipeline, found)) is not None:
                state, alphas = read.tensors, read.alphas
            else:
                state = _read_here(pipeline, found)
            if state is not None:
                _inject(pipeline, state, found, alphas)
            else:
                source = _with_one_alpha(found)
                state = _state_dict(pipeline, source)
                pipeline.load_lora_weights(source, adapter_name=ADAPTER_NAME)
    except UserError:
        raise
    except Exception as error:  # diffusers' and PEFT's converters raise many kinds, also AssertionError
        raise _another_base(name, " ".join(str(error).split())[:160], pipeline) from error
    adapted = {part: _adapted(net) for part, net in pipeline.components.items() if isinstance(net, nn.Module)}
    for part, layers in adapted.items():
        if layers and part not in nets:
            remedy = (
                "set model.train_text_encoder: true"
                if hasattr(pipeline, "unet")
                else f"give a LoRA of the {NET} alone: text encoders of this family cannot be trained"
            )
            raise UserError(
                f"{name} also adapts the {part}, which this recipe does not train", where=KEY, remedy=remedy
            )
    if sum(map(len, adapted.values())) < found.layers:
        raise _another_base(
            name,
            f"{found.layers - sum(map(len, adapted.values()))} of its {found.layers} layers are missing",
            pipeline,
        )
    for part, net in nets.items():
        _make_trainable(
            net,
            {key.removeprefix(f"{part}."): tensor for key, tensor in state.items() if key.startswith(f"{part}.")},
            adapter,
        )
    return {part: layers for part, layers in adapted.items() if layers}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Within, the libraries neither log nor warn: they would report mismatches layer by layer, and one error does."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _refuse_not_finite(found: Initial) -> None:
    """Raise if a weight is NaN or infinite.

    Raises:
        UserError: it names the first such tensor.
    """
    tensors: dict[str, Tensor] = load_file(found.file)
    if bad := [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]:
        raise UserError(
            f"{found.file.name} contains NaN or infinite values in {len(bad)} of its {len(tensors)} tensors,"
            f" such as {bad[0]}",
            where=KEY,
            remedy="give another copy, or an earlier checkpoint of the run that wrote it: its training diverged",
        )


def _read_by_modules(pipeline: Any, found: Initial) -> Weights | None:
    """Weights of files whose names diffusers' loader does not know; None for other files."""
    spec = family_of_pipeline(type(pipeline).__name__)
    if spec is None:
        return None
    tensors: dict[str, Tensor] = load_file(found.file)
    foreign = [PEFT_PREFIX, "lora_transformer_", EMBEDDINGS, "lora_te2_text_projection"]
    if spec.lora_original:
        foreign += ["lora_unet_", "diffusion_model.", "model.diffusion_model."]
    if not any(name.startswith(tuple(foreign)) for name in tensors) or (
        found.file.name == PEFT_FILE and spec.denoiser == NET
    ):
        return None
    original = spec.lora_original or spec.lora_formats.get("kohya") or spec.lora_formats.get("comfyui")
    nets = {name: net for name, net in pipeline.components.items() if isinstance(net, nn.Module) and name != "vae"}
    return read_by_modules(tensors, nets, spec.denoiser, load(original) if original else None)


def _read_here(pipeline: Any, found: Initial) -> dict[str, Tensor] | None:
    """Weights under diffusers' names, of a file that its loader cannot read; None for other files."""
    if found.file.name == PEFT_FILE:
        return read_peft(found.file, NET)[0]
    spec = family_of_pipeline(type(pipeline).__name__)
    names = key_map(spec, "comfyui") if spec is not None else None
    if names is None and hasattr(pipeline, "load_lora_weights"):
        return None
    tensors: dict[str, Tensor] = load_file(found.file)
    if names is None:
        return tensors
    return by_diffusers_names(tensors, names) if all(name.startswith(f"{CODE}.") for name in tensors) else None


def _inject(pipeline: Any, state: Mapping[str, Tensor], found: Initial, alphas: Mapping[str, float] | None) -> None:
    """Inject `state` into the networks that its names begin with, as PEFT does.

    Args:
        alphas: by layer; None: PEFT's settings, or, without any, each layer's rank.
    """
    for part in dict.fromkeys(name.partition(".")[0] for name in state):
        own = {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}
        of_part = {path.removeprefix(f"{part}."): alpha for path, alpha in (alphas or {}).items()}
        _inject_into(getattr(pipeline, part), own, found, of_part or None)


def _inject_into(net: Any, state: Mapping[str, Tensor], found: Initial, by_layer: Mapping[str, float] | None) -> None:
    ranks = {name.removesuffix(END): len(tensor) for name, tensor in state.items() if name.endswith(END)}
    alphas = found.setting("alpha_pattern") or {} if found.settings else by_layer or ranks
    config = LoraConfig(
        r=found.rank,
        lora_alpha=found.alpha,
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=bool(found.setting("use_rslora")),
        use_dora=bool(found.setting("use_dora")),
    )
    inject_adapter_in_model(config, net, adapter_name=ADAPTER_NAME)
    set_peft_model_state_dict(net, dict(state), adapter_name=ADAPTER_NAME)


def _with_one_alpha(found: Initial) -> str | dict[str, Tensor]:
    """The file's name, or its weights with one alpha where alphas differ by layer, which diffusers reads wrongly."""
    alphas, layers = found.alphas, found.ranks.total()
    missing = alphas.total() < layers  # a layer without alpha has its rank as alpha
    if found.settings or not alphas or (len(alphas) == 1 and not missing):
        return str(found.file)
    return with_one_alpha(load_file(found.file), found.alpha)


def _state_dict(pipeline: Any, source: str | dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's weights under diffusers' names. (Its loader rounds them to the base's dtype.)"""
    more = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    source = dict(source) if isinstance(source, dict) else source  # diffusers empties it
    found = type(pipeline).lora_state_dict(source, **more)
    state: dict[str, Tensor] = found[0] if isinstance(found, tuple) else found
    return state


def _adapted(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, LoraLayer)]


@torch.no_grad()
def _make_trainable(net: nn.Module, state: Mapping[str, Tensor], adapter: Adapter) -> None:
    for module in net.modules():
        if isinstance(module, LoraLayer) and adapter.dropout:
            module.lora_dropout[ADAPTER_NAME] = nn.Dropout(adapter.dropout)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            key = name.replace(f".{ADAPTER_NAME}", "")
            exact = state.get(
                key, state.get(f"text_model.{key}", parameter.data)
            )  # of a net or a layer that files call otherwise, as it was loaded
            parameter.data = (
                (exact if exact.shape == parameter.shape else parameter.data)
                .to(parameter.device, torch.float32)
                .clone()
            )


def _another_base(name: str, detail: str, pipeline: Any) -> UserError:
    base = type(pipeline).__name__.removesuffix("Pipeline")
    return UserError(
        f"{name} does not match this {base}: it is a LoRA of another base ({detail})",
        where=KEY,
        remedy="give a LoRA of this base in adapter.init_lora, or its base in model.path and model.family",
    )

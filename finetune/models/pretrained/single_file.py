"""One .safetensors checkpoint in the original layout (CompVis' LDM, Stability's SGM), as ComfyUI and A1111 use them.

The architecture is detected from names and shapes of the tensors, not from the file name. The pipelines' configurations
and CLIP's tokenizer are in `assets/configs`, so nothing is downloaded. The file of a transformer replaces the
transformer of another pipeline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors import safe_open
from transformers import CLIPTokenizer

from finetune.errors import UserError
from finetune.models.registry import family_of_pipeline, spec_of, specs, text_widths, variants
from finetune.paths import ASSETS

CONFIGS = ASSETS / "configs"
BY_WIDTH = text_widths()
SCALED = (".scale_weight", ".weight_scale", "scaled_fp8")  # name endings that only files quantized for ComfyUI have
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", ("cond_stage_model.", "conditioner.embedders.")
# `modelspec.prediction_type`, in small letters and digits only → diffusers' name.
_TARGETS = {"v": "v_prediction", "vpred": "v_prediction", "vprediction": "v_prediction", "velocity": "v_prediction"}
_TARGETS |= {"e": "epsilon", "eps": "epsilon", "epsilon": "epsilon"}
V_BIAS = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"


def open_single_file(path: Path, class_name: str, dtype: torch.dtype, vae: AutoencoderKL | None) -> DiffusionPipeline:
    """Open the pipeline of class `class_name` in `path`, its weights in `dtype`, the VAE in float32 (or as given).

    Raises:
        UserError: the file holds something else, or only a part of a pipeline.
    """
    shapes, name = identify(path, class_name, has_vae=vae is not None)
    schedule = prediction(path, shapes, name)
    pipeline: DiffusionPipeline = getattr(diffusers, class_name).from_single_file(
        str(path),
        config=str(CONFIGS / name),
        dtype=dtype,
        local_files_only=True,
        vae=vae or open_single_vae(path, class_name),
        **{key: clip_tokenizer(padding) for key, padding in variants()[name][1].padding.items()},
    )
    for key, net in pipeline.components.items():
        # diffusers leaves missing weights of a text encoder on the meta device silently (and fails for a UNet's).
        if isinstance(net, torch.nn.Module) and (
            unset := [name for name, weight in net.named_parameters() if weight.is_meta]
        ):
            raise UserError(
                f"{path.name} lacks some weights of its {key}, such as {unset[0]}",
                where=str(path),
                remedy="download it again",
            )
    pipeline.scheduler = type(pipeline.scheduler).from_config({**pipeline.scheduler.config, **schedule})
    return pipeline


def identify(path: Path, class_name: str, has_vae: bool) -> tuple[dict[str, tuple[int, ...]], str]:
    """Read a checkpoint's header: (shapes of its tensors, name of its variant).

    Args:
        has_vae: whether the recipe names a VAE of its own.

    Raises:
        UserError: the file holds something else than a pipeline of class `class_name`, or only a part of it.
    """
    shapes = read_shapes(path)
    name = architecture(shapes, path)
    require_class(json.loads((CONFIGS / name / "model_index.json").read_text())["_class_name"], class_name, path)
    if not any(key.startswith(TEXT) for key in shapes):
        raise UserError(
            f"{path.name} has no text encoder: it contains only a UNet",
            where=str(path),
            remedy="give a full checkpoint (UNet, text encoder and VAE in one file)",
        )
    if not has_vae and not any(key.startswith(VAE) for key in shapes):
        raise UserError(
            f"{path.name} has no VAE",
            where=str(path),
            remedy="name one in model.vae: a folder, a .safetensors file, or a hub name",
        )
    return shapes, name


def open_transformer(path: Path, wanted: str, cls: Any, source: str, dtype: torch.dtype) -> torch.nn.Module:
    """Open the transformer in `path`, alone or in a full checkpoint, in `dtype`.

    Args:
        wanted: the recipe's family.
        cls: class of its transformer in diffusers, which converts the file.
        source: the pipeline's folder or name on the Hub, with the transformer's configuration.

    Raises:
        UserError: it belongs to another family, is quantized or incomplete; or diffusers cannot read such a file.
    """
    shapes, where = read_shapes(path), str(path)
    found = transformer_family(shapes)
    if is_lora(shapes):
        raise UserError(
            f"{path.name} is a LoRA, not a transformer",
            where=where,
            remedy="to continue from a LoRA, set adapter.init_lora",
        )
    if found not in (None, wanted):
        problem = f"{path.name} contains a transformer of family {found}, but the recipe's family is {wanted}"
        raise UserError(
            problem,
            where=where,
            remedy=f"give a file of {wanted}, or set model.family: {found} and model.path to match",
        )
    if not hasattr(cls, "from_single_file"):
        raise UserError(
            f"diffusers cannot read single files of family {wanted}",
            where="model.transformer",
            remedy="give a diffusers folder in model.path",
        )
    if any(name.endswith(SCALED) for name in shapes):
        remedy = "give the file in bfloat16 or float16; model.quantize then makes it just as small"
        raise UserError(f"{path.name} is quantized in a format of ComfyUI", where=where, remedy=remedy)
    inside = any(name.startswith(UNET) for name in shapes)  # a full checkpoint; its text encoders and VAE are not used
    with safe_open(path, framework="pt") as file:
        tensors = {
            name.removeprefix(UNET): file.get_tensor(name) for name in shapes if name.startswith(UNET) or not inside
        }
    try:
        net: torch.nn.Module = cls.from_single_file(tensors, config=source, subfolder="transformer", dtype=dtype)
        return net
    # The converter misses a weight, or the network does.
    except (KeyError, IndexError, NotImplementedError) as error:
        remedy = "download it again, or give the file that matches model.path"
        raise UserError(
            f"{path.name} lacks some weights of {wanted}'s transformer", where=where, remedy=remedy
        ) from error


def transformer_family(shapes: Iterable[str]) -> str | None:
    """The family of a transformer in the original layout, or None if it is not recognized."""
    names = list(shapes)
    return next(
        (
            slug
            for slug, spec in specs().items()
            if (keys := spec.single_file_keys) and all(any(name.endswith(key) for name in names) for key in keys)
        ),
        None,
    )


def open_single_vae(path: Path, class_name: str) -> AutoencoderKL:
    """Open the VAE in `path` (alone or in a full checkpoint) in float32, with the family's latent scale."""
    spec = family_of_pipeline(class_name)
    config = CONFIGS / (next(iter(spec.variants)) if spec is not None and spec.denoiser == "unet" else "sd15")
    found: AutoencoderKL = AutoencoderKL.from_single_file(
        str(path), config=str(config), subfolder="vae", dtype=torch.float32, local_files_only=True
    )
    return found


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, from the file's header."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def architecture(shapes: Mapping[str, tuple[int, ...]], path: Path) -> str:
    """`sd15`, `sd21` or `sdxl`, by the width of the UNet's cross-attention.

    Raises:
        UserError: it is none of them; the error says what it is, if it is recognized.
    """
    if is_lora(shapes):
        raise UserError(
            f"{path.name} is a LoRA, not a base model",
            where=str(path),
            remedy="give the checkpoint or folder that it was trained on",
        )
    if (family := transformer_family(shapes)) is not None:
        whole = "the model's diffusers folder or its name on the Hub"
        alone = f"set model.transformer to this file, and model.path to {whole}: text encoders and VAE come from there"
        raise UserError(
            f"{path.name} contains only a transformer of family {family}, and model.path needs a complete pipeline",
            where=str(path),
            remedy=alone if spec_of(family).single_transformer else f"give {whole}",
        )
    entry = shapes.get(UNET + "input_blocks.0.0.weight", (0, 4))
    widths = {
        shape[1] for name, shape in shapes.items() if name.startswith(UNET) and name.endswith("attn2.to_k.weight")
    }
    if entry[1] != 4:
        raise UserError(
            f"{path.name} is a model for inpainting or editing: its UNet takes {entry[1]} channels",
            where=str(path),
            remedy="give the text-to-image checkpoint",
        )
    if len(widths) != 1 or not (widths <= BY_WIDTH.keys()):
        seen = (
            f"the width of its cross-attention is {', '.join(map(str, sorted(widths)))}"
            if widths
            else "it contains no such UNet"
        )
        raise UserError(
            f"{path.name} is not a checkpoint of SD 1.5, SD 2.1 or SDXL in the original layout: {seen}",
            where=str(path),
            remedy="give one of these, or a diffusers folder",
        )
    return BY_WIDTH[widths.pop()]


def prediction(path: Path, shapes: Iterable[str], name: str) -> dict[str, Any]:
    """What the file says about its noise schedule, as entries of the scheduler's configuration.

    Fine-tunes that predict v contain an empty tensor `v_pred` (and `ztsnr` with zero terminal SNR), or say so in their
    metadata (https://github.com/Stability-AI/ModelSpec). ε and v models of SD 2.x differ only in values: ComfyUI tells
    them apart by the standard deviation of one bias, above 0.09 for v (comfy/supported_models.py, SD20.model_type).

    Raises:
        UserError: the model was trained for a target other than ε and v: EDM (`edm_mean`, as in Playground 2.5, or
            `edm_vpred.sigma_max`, ComfyUI's SDXL.model_type), rectified flow, or the sample.
    """
    with safe_open(path, framework="pt") as file:
        stated = (file.metadata() or {}).get("modelspec.prediction_type")
        target = _TARGETS.get(re.sub(r"[^a-z0-9]", "", (stated or "").lower()), stated)
        if marks := [key for key in shapes if key.rpartition("model.")[2].startswith(("edm_", "edm_vpred."))]:
            raise _other_target(path, "EDM (arXiv:2206.00364)", f'it contains the tensor "{marks[0]}"')
        v, zero = ("v_pred" in shapes or target == "v_prediction"), "ztsnr" in shapes
        if stated is not None and target not in ("epsilon", "v_prediction") and "v_pred" not in shapes:
            raise _other_target(path, f'"{stated}"', "its metadata say so (modelspec.prediction_type)")
        if zero and not v and (target == "epsilon" or name != "sd21"):
            raise _other_target(path, "zero terminal SNR without v", 'it contains the tensor "ztsnr" and no "v_pred"')
        if v or zero:
            return {"prediction_type": "v_prediction"} | (
                {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero else {}
            )
        if stated is not None:
            return {"prediction_type": target}
        if name == "sd21" and V_BIAS in shapes:
            spread = float(file.get_tensor(V_BIAS).float().std(unbiased=False))
            return {"prediction_type": "v_prediction" if spread > 0.09 else "epsilon"}
    return {}


def _other_target(path: Path, target: str, why: str) -> UserError:
    return UserError(
        f"{path.name} was trained for another target than ε or v: {target}; {why}",
        where=str(path),
        remedy="give a checkpoint that predicts ε or v: training this one for them would spoil it",
    )


def refuse_other_schedule(pipeline: Any, given: str) -> None:
    """Raise if a UNet pipeline's scheduler is for another target than ε and v, such as EDM's or a flow's."""
    name, config = type(pipeline.scheduler).__name__, pipeline.scheduler.config
    target = config.get("prediction_type", "epsilon")
    if (
        name.startswith(("EDM", "FlowMatch"))
        or config.get("use_flow_sigmas")
        or target not in ("epsilon", "v_prediction")
    ):
        raise UserError(
            f"{given} was trained for another target than ε or v: its scheduler is {name}, prediction type {target}",
            where="model.path, scheduler/scheduler_config.json",
            remedy="give a model that predicts ε or v: training this one for them would spoil it",
        )


def clip_tokenizer(padding: str) -> CLIPTokenizer:
    """CLIP's tokenizer from its merges: 256 bytes, the same at a word's end, 48,894 merges, two special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    merges = [tuple(line.split(" ")) for line in (CONFIGS / "merges.txt").read_text(encoding="utf-8").splitlines()]
    entries = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *("".join(pair) for pair in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=padding, model_max_length=77)


def is_lora(names: Iterable[str]) -> bool:
    """Whether a file's tensor names are those of a LoRA, in any of the usual formats."""
    return any("lora_" in name or ".lora." in name for name in names)


def require_class(found: str, wanted: str, where: Path | str) -> None:
    """Raise if a pipeline's class is not that of the recipe's family; the error names the family that matches."""
    if found != wanted:
        fitting, ours = family_of_pipeline(found), family_of_pipeline(wanted)
        raise UserError(
            f"this is a {found}, and family {ours.slug if ours else wanted} needs a {wanted}",
            where=str(where),
            remedy=f"set model.family: {fitting.slug}"
            if fitting
            else "give a text-to-image model of the recipe's family",
        )

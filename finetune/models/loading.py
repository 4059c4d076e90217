"""Where a pipeline comes from: the hub, a diffusers folder, one .safetensors file, or, from scratch, the recipe."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from finetune.data.scan import Audit
from finetune.errors import UserError, did_you_mean
from finetune.planning import Plan
from finetune.recipe import Model as ModelSection
from finetune.recipe import embedded

if TYPE_CHECKING:
    from finetune.models.text_to_image import Family


def open_pipeline(section: ModelSection, class_name: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The pretrained pipeline that `model.path` names, its weights in `dtype`.

    Raises:
        UserError: it is not there, not reachable, or not of this class.
    """
    path = Path(embedded(section.path or "")).expanduser()
    cls = getattr(diffusers, class_name)
    optional: dict[str, Any] = {"vae": _open_vae(section.vae, dtype)} if section.vae else {}
    if class_name == "StableDiffusionPipeline":
        optional |= {"safety_checker": None, "requires_safety_checker": False}
    source = str(path) if path.exists() else str(section.path)
    try:
        found: DiffusionPipeline = cls.from_pretrained(source, torch_dtype=dtype, **optional)
    except OSError as error:
        raise UserError(
            f'the model "{section.path}" could not be loaded: {str(error).splitlines()[0]}',
            where="model.path",
            remedy="give a diffusers folder, a .safetensors checkpoint, or a hub name that this machine can reach (gated ones need `hf auth login`)",
        ) from error
    return found


def vae_factor(vae: AutoencoderKL) -> int:
    """Picture pixels a latent pixel, along one side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _open_vae(path: str, dtype: torch.dtype) -> AutoencoderKL:
    folder = Path(embedded(path)).expanduser()
    if (folder / "final").is_dir():  # a run of this project
        folder = folder / "final"
    try:
        found: AutoencoderKL = AutoencoderKL.from_pretrained(str(folder) if folder.exists() else path, torch_dtype=dtype)
    except OSError as error:
        raise UserError(f'the VAE "{path}" could not be loaded: {str(error).splitlines()[0]}', where="model.vae", remedy="give a folder, a run, or a hub name") from error
    return found


def assemble(plan: Plan, audit: Audit, family: Family) -> DiffusionPipeline:
    """A new Stable Diffusion pipeline from `model.build`: its nets at random, its tokenizer learned from the captions.

    Keys of `model.build`: `unet` (arguments of UNet2DConditionModel), `text_encoder` (of CLIPTextConfig), `tokenizer`
    (`vocabulary`: entries; `length`: tokens a caption), `scheduler` (of DDIMScheduler). The VAE is `model.vae`.
    """
    section = plan.recipe.model
    if family.pipeline != "StableDiffusionPipeline":
        raise UserError("from scratch, this project builds family sd", where="model.family", remedy="set model.family: sd")
    if section.vae is None:
        raise UserError("a latent diffusion model needs a VAE", where="model.vae", remedy="train recipes/scratch/emoji-vae.yaml first and name its run")
    parts = section.build
    for key in parts.keys() - {"unet", "text_encoder", "tokenizer", "scheduler"}:
        raise UserError(f'unknown key "{key}"', where="model.build", remedy=did_you_mean(key, ["unet", "text_encoder", "tokenizer", "scheduler"]))
    vae = _open_vae(section.vae, torch.float32)
    words = parts.get("tokenizer", {})
    tokenizer = CLIPTokenizer(model_max_length=words.get("length", 77)).train_new_from_iterator(
        [p.caption for p in audit.training], words.get("vocabulary", 4096)
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            **checked(CLIPTextConfig, parts.get("text_encoder", {}), "model.build.text_encoder"),
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        sample_size=plan.recipe.data.resolution // vae_factor(vae),
        cross_attention_dim=text_encoder.config.hidden_size,
        **checked(UNet2DConditionModel, parts.get("unet", {}), "model.build.unet"),
    )
    scheduler = DDIMScheduler(**checked(DDIMScheduler, parts.get("scheduler", {}), "model.build.scheduler"))
    return diffusers.StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def checked(cls: type, arguments: dict[str, Any], key: str) -> dict[str, Any]:
    """`arguments`, if the class takes each of them by name.

    Raises:
        UserError: with the nearest name.
    """
    known = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"} | set(getattr(cls, "__annotations__", ()))
    for name in arguments:
        if name not in known:
            raise UserError(f'{cls.__name__} has no argument "{name}"', where=key, remedy=did_you_mean(name, known))
    return arguments

"""Tiny pipelines built from each family's real classes, saved to disk, and captioned images to train on.

Everything is made once per process, at the first call, in a temporary folder that is removed when the process ends:

    from tests.helpers import tiny
    tiny.images()              a folder of five captioned images of several sizes and formats
    tiny.pipeline("sdxl")        a diffusers folder: sd15, sd21, sdxl or emoji
    tiny.recipe("sd15", "lora", "train.steps=3", folder=tmp_path / "run")
    tiny.train(recipe)           prepares, trains and finishes a run in this process; returns the job
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from finetune.config.loader import parse_recipe
from finetune.config.schema import Recipe
from tests.helpers import tiny_pipelines

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.job import Job

PIPELINES = ("sd15", "sd21", "sdxl", "emoji")
FLOWS = tiny_pipelines.names()  # slugs of the transformer families; built in `tiny_pipelines`
SIZE = 32  # pixels; latents are 8×8
CAPTIONS = ("a red circle", "a blue square on white", "green triangle", "yellow ring, thick", "two black stripes")

_VAE = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
_UNET: dict[str, Any] = {
    "sample_size": SIZE // 4,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": [2, 4],
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
}
# The embedded base in miniature: three levels, with attention on the middle one only.
_UNET_OF_EMOJI = _UNET | {
    "block_out_channels": [16, 16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [2, 2, 4],
}
_UNET_OF_SDXL = _UNET | {
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 24,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
}
_VELOCITY = {"prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False}


@functools.cache
def root() -> Path:
    """The temporary folder of this process."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def images() -> Path:
    """Five captioned images: three formats, several sizes and aspect ratios, one with transparency."""
    folder = root() / "images"
    folder.mkdir()
    sizes = ((32, 32), (48, 32), (32, 64), (64, 64), (40, 40))
    for number, (caption, (width, height)) in enumerate(zip(CAPTIONS, sizes, strict=True)):
        image = Image.new("RGBA", (width, height), (255, 255, 255, 0 if number == 3 else 255))
        draw = ImageDraw.Draw(image)
        box = (width // 5, height // 5, 4 * width // 5, 4 * height // 5)
        if number == 0:
            draw.ellipse(box, fill="red")
        elif number == 1:
            draw.rectangle(box, fill="blue")
        elif number == 2:
            draw.polygon([(box[0], box[3]), (box[2], box[3]), (width // 2, box[1])], fill="green")
        elif number == 3:
            draw.ellipse(box, outline="yellow", width=8)
        else:
            draw.rectangle((0, 0, width, height // 4), fill="black")
            draw.rectangle((0, height // 2, width, 3 * height // 4), fill="black")
        if number == 4:
            image.convert("RGB").save(folder / "four.jpg", quality=95)
        else:
            image.save(
                folder / f"{('zero', 'one', 'two', 'three')[number]}.{'webp' if number == 3 else 'png'}", lossless=True
            )
        (folder / f"{('zero', 'one', 'two', 'three', 'four')[number]}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


@functools.cache
def one_image() -> Path:
    """A folder with one captioned image, to overfit."""
    folder = root() / "one"
    folder.mkdir()
    for name in ("zero.png", "zero.txt"):
        shutil.copy(images() / name, folder / name)
    return folder


@functools.cache
def vae() -> Path:
    """An AutoencoderKL, 32×32 images ↔ 8×8 latents, as a diffusers folder."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    AutoencoderKL(**_VAE, scaling_factor=0.8).save_pretrained(root() / "vae")
    return root() / "vae"


@functools.cache
def pipeline(name: str) -> Path:
    """The diffusers folder of one of `PIPELINES` or `FLOWS`, with random weights that are the same each time."""
    folder = root() / name
    if name in FLOWS:
        tiny_pipelines.save(name, CAPTIONS, folder)
        return folder
    import torch
    from diffusers import AutoencoderKL

    from finetune.models.pretrained.tokenizer import learn_tokenizer

    autoencoder = AutoencoderKL.from_pretrained(vae())
    torch.manual_seed(PIPELINES.index(name))
    tokenizer = learn_tokenizer(CAPTIONS, 540, 16)
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**_TEXT, "vocab_size": len(tokenizer), **ends}
    made = _sdxl(autoencoder, tokenizer, text) if name == "sdxl" else _sd(name, autoencoder, tokenizer, text)
    made.save_pretrained(folder)
    return folder


def _sd(name: str, autoencoder: Any, tokenizer: Any, text: dict[str, Any]) -> Any:
    from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet, activation, scheduler = {
        "sd15": (_UNET, {"hidden_act": "quick_gelu"}, PNDMScheduler(**_NOISE, skip_prk_steps=True)),
        "sd21": (_UNET | {"use_linear_projection": True}, {"hidden_act": "gelu"}, DDIMScheduler(**_NOISE, **_VELOCITY)),
        "emoji": (
            _UNET_OF_EMOJI,
            {},
            DDIMScheduler(**_NOISE, **_VELOCITY, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        ),
    }[name]
    net, encoder = UNet2DConditionModel(**unet), CLIPTextModel(CLIPTextConfig(**text, **activation))
    return StableDiffusionPipeline(
        autoencoder, encoder, tokenizer, net, scheduler, None, None, requires_safety_checker=False
    )


def _sdxl(autoencoder: Any, tokenizer: Any, text: dict[str, Any]) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    net = UNet2DConditionModel(**_UNET_OF_SDXL)
    first = CLIPTextModel(CLIPTextConfig(**text, hidden_act="quick_gelu"))
    second = CLIPTextModelWithProjection(CLIPTextConfig(**text, hidden_act="gelu", projection_dim=24))
    scheduler = EulerDiscreteScheduler(**_NOISE, timestep_spacing="leading")
    return StableDiffusionXLPipeline(autoencoder, first, second, tokenizer, tokenizer, net, scheduler)


def family(name: str) -> str:
    """The family of a tiny pipeline."""
    return name if name in ("sdxl", *FLOWS) else "sd"


def text(name: str, method: str, folder: Path) -> str:
    """The YAML of `recipe`, for tests that need it in a file."""
    model: dict[str, Any]
    if method == "scratch" and name == "vae":
        model = {"family": "autoencoder-kl", "build": _VAE}
    elif method == "scratch":
        build = {
            "tokenizer": {"vocabulary": 540, "length": 16},
            "text_encoder": {key: value for key, value in _TEXT.items() if key != "max_position_embeddings"},
            "unet": {key: value for key, value in _UNET.items() if key not in ("sample_size", "cross_attention_dim")},
            "scheduler": {**_NOISE, "prediction_type": "v_prediction", "clip_sample": False},
        }
        model = {"family": "sd", "vae": str(vae()), "build": build}
    else:
        model = {"family": family(name), "path": str(pipeline(name))}
    sections: dict[str, Any] = {
        "model": model,
        "data": {"path": str(images()), "resolution": SIZE, "buckets": False},
        "train": {"steps": 2, "batch_size": 2},
        "optimizer": {"lr": 1e-3},
        "sample": {"prompts": [CAPTIONS[0]], "steps": 2, "guidance": 3, "every": 1000},
        "output": {"folder": str(folder)},
    }
    if method == "lora":
        sections["adapter"] = {"rank": 4}
    return f"method: {method}\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in sections.items())


def recipe(name: str, method: str, *overrides: str, folder: Path) -> Recipe:
    """A recipe for a tiny pipeline (or for the scratch families `vae` and `sd`); `overrides` as for `--set`."""
    return parse_recipe(text(name, method, folder), "tiny.yaml", "tiny", overrides)


def train(asked: Recipe, resume: bool = False) -> Job:
    """Prepare, train and finish a run in this process."""
    job = prepare(asked, resume)
    job.trainer.train()
    finish(job)
    return job


def prepare(asked: Recipe, resume: bool = False) -> Job:
    """Prepare a run up to its first step."""
    from finetune import job

    return job.prepare(asked, resume)


def finish(job: Job) -> None:
    """Write the final weights into the run's folder."""
    from finetune import job as jobs

    jobs.export_result(job)


def trained(job: Job) -> dict[str, Tensor]:
    """Copies of the parameters that the first train step trains, by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in job.model.train_steps()[0].net.named_parameters()
        if parameter.requires_grad
    }


def final_weights(run: Path) -> dict[str, Tensor]:
    """The weights in the newest checkpoint."""
    from safetensors.torch import load_file

    from finetune.training import checkpoint

    found: dict[str, Tensor] = load_file(checkpoint.checkpoints(run / "checkpoints")[-1] / "weights.safetensors")
    return found

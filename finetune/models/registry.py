"""Every model family and the module that implements it. Torch is not imported until a family is built."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

_PRETRAINED = "finetune.models.pretrained.families"
_SCRATCH = "finetune.models.scratch"

MODULES: dict[str, str] = {
    "betavae": f"{_SCRATCH}.vae.vae",
    "cascade": f"{_SCRATCH}.diffusion.cascade",
    "dcgan": f"{_SCRATCH}.gan.dcgan",
    "ddpm": f"{_SCRATCH}.diffusion.ddpm",
    "edm": f"{_SCRATCH}.diffusion.edm",
    "flux": f"{_PRETRAINED}.flux",
    "flux2": f"{_PRETRAINED}.flux2",
    "glow": f"{_SCRATCH}.flows.glow",
    "imagegpt": f"{_SCRATCH}.autoregressive.imagegpt",
    "latentdiffusion": f"{_SCRATCH}.diffusion.latent_diffusion",
    "lumina2": f"{_PRETRAINED}.lumina2",
    "pixart": f"{_PRETRAINED}.pixart",
    "pixelcnnpp": f"{_SCRATCH}.autoregressive.pixelcnnpp",
    "qwen_image": f"{_PRETRAINED}.qwen_image",
    "r3gan": f"{_SCRATCH}.gan.r3gan",
    "realnvp": f"{_SCRATCH}.flows.realnvp",
    "rectifiedflow": f"{_SCRATCH}.diffusion.flow_matching",
    "sana": f"{_PRETRAINED}.sana",
    "sd": f"{_PRETRAINED}.sd",
    "sd3": f"{_PRETRAINED}.sd3",
    "sdxl": f"{_PRETRAINED}.sdxl",
    "stylegan2": f"{_SCRATCH}.gan.stylegan2",
    "vae": f"{_SCRATCH}.vae.autoencoder_kl",
    "vqpixelcnn": f"{_SCRATCH}.vq.vq_pixelcnn",
    "vqtransformer": f"{_SCRATCH}.vq.vq_transformer",
    "vqvae": f"{_SCRATCH}.vq.vqvae",
    "z_image": f"{_PRETRAINED}.z_image",
}
# Stable Diffusion: the width of the text features in cross-attention → the base model, which names its configuration folder.
BY_WIDTH = {768: "sd15", 1024: "sd21", 2048: "sdxl"}


def load_module(family: str) -> ModuleType:
    """Import the module of `family`. It offers `build(plan, audit) -> Model`."""
    return importlib.import_module(MODULES[family])


def family_in(module: str) -> str:
    """The family that a module implements: the inverse of `MODULES`."""
    return next(family for family, name in MODULES.items() if name == module)


def pipelines() -> dict[str, str]:
    """Family → class of its pipeline in diffusers ("" if it has none)."""
    return named("pipeline")


def named(attribute: str) -> dict[str, str]:
    """Family → the value of a class attribute ("" if it has none), read from the module's text: importing it takes seconds."""
    found = {}
    for family, module in MODULES.items():
        text = (Path(__file__).parents[2] / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        said = re.search(rf'^    {attribute} = "(\w+)"', text, re.MULTILINE)
        found[family] = said[1] if said else ""
    return found

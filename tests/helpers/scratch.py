"""Every recipe of a scratch family, made small for the tests that run all of them.

from tests.helpers import scratch
scratch.recipe("vae", tmp_path / "run", "train.steps=4")    # a recipe of `recipes/scratch/`, on a dozen 8×8 digits
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from finetune.config.loader import load_recipe
from finetune.config.schema import Recipe
from tests.helpers import tiny
from tools.archive import bundled

DIGITS = ("data.resolution=8", "data.grayscale=true", "data.levels=17", "data.classes=folders")
COMMON = (
    "train.batch_size=4",
    "train.epochs=null",
    "sample.prompts=['0', '1']",
    "sample.collapse_check_every=null",
    "train.ema=null",
    "optimizer.warmup_steps=0",
)


@dataclass(frozen=True)
class Case:
    """A recipe of `family`. `small` makes the recipe's network tiny; its loss falls within `steps`.

    Attributes:
        unequal: why two processes do not equal one with twice the batch; "" if they do.
        unchanged: endings of parameters that may stay equal in three steps, such as a codebook updated by averages.
        first: for two stages, the key that names the first stage's run, and its recipe (default: diffusers' VAE).
    """

    family: str
    small: tuple[str, ...]
    steps: int = 6
    unequal: str = ""
    unchanged: tuple[str, ...] = ()
    first: tuple[str, ...] = ()


UNET = ("net.width=8", "net.channel_multipliers=[1,2]", "net.attention_levels=1", "sample.steps=3")
CASES = {
    "vae": Case("beta-vae", ("net.width=8", "net.halvings=2", "net.latent=4", "net.mixtures=2")),
    "pixelcnn++": Case(
        "pixelcnn++", ("net.width=8", "net.blocks=2", "net.dilation=2", "net.mixtures=2", "net.dropout=0")
    ),
    "realnvp": Case("realnvp", ("net.scales=2", "net.steps=2", "net.width=8", "net.blocks=0")),
    "glow": Case(
        "glow",
        (
            "net.scales=2",
            "net.steps=1",
            "net.width=8",
            "net.coupling=mixture",
            "net.mixtures=2",
            "net.dequantization=variational",
        ),
    ),
    "imagegpt": Case("imagegpt", ("net.width=8", "net.layers=1", "net.heads=2", "net.palette=5", "net.dropout=0")),
    "vqvae": Case(
        "vqvae",
        (
            "net.width=8",
            "net.halvings=1",
            "net.codebook_size=6",
            "net.code_dim=3",
            "net.revive_after=2",
            "data.classes=null",
        ),
    ),
    "vqgan": Case(
        "vqvae",
        ("net.width=8", "net.halvings=1", "net.codebook_size=6", "net.revive_after=1"),
        unequal="each process weighs the critic by its own images",
        unchanged=("critic.net.5.bias",),  # within the hinge's margins, real and reconstructed images pull it equally
    ),
    "vq-pixelcnn": Case(
        "vq-pixelcnn", ("net.width=8", "net.blocks=1", "net.embedding_dim=3", "net.dropout=0"), first=("vae", "vqvae")
    ),
    "vq-transformer": Case(
        "vq-transformer", ("net.width=8", "net.layers=1", "net.heads=2", "net.dropout=0"), first=("vae", "vqgan")
    ),
    "dcgan": Case(
        "dcgan",
        ("net.width=8", "net.halvings=1", "net.latent=4", "net.ada_images=40", "net.generator_norm=batch"),
        steps=40,
        unequal="batch norm and the deviation within groups are of each process's own images",
    ),
    "wgan-gp": Case(
        "dcgan",
        ("net.width=8", "net.halvings=1", "net.latent=4", "net.discriminator_steps=2"),
        steps=20,
        unequal="the generator's batch norm is of each process's own images",
        unchanged=("critic.logit.bias",),  # it shifts all logits equally, and only their differences matter
    ),
    "r3gan": Case(
        "r3gan",
        ("net.width=8", "net.halvings=1", "net.latent=4", "net.ada_images=40"),
        steps=20,
        unchanged=("critic.logit.bias",),  # as for WGAN-GP
    ),
    "stylegan2": Case(
        "stylegan2",
        (
            "net.width=4",
            "net.halvings=1",
            "net.latent=4",
            "net.style_dim=6",
            "net.mapping_layers=2",
            "net.penalty_every=2",
            "net.ada_target=0",
        ),
        steps=50,
        unequal="the deviation within groups is of each process's own images",
    ),
    "beta-vae": Case(
        "beta-vae", ("net.width=8", "net.halvings=1", "net.latent=3", "net.distribution=categorical"), steps=20
    ),
    "ddpm": Case("ddpm", (*UNET, "net.timesteps=50", "net.prediction=v_prediction", "sample.sampler=ddpm")),
    "flow-matching": Case("flow-matching", UNET),
    "edm": Case("edm", UNET),
    "latent-diffusion": Case(
        "latent-diffusion",
        (*UNET, "net.channel_multipliers=[1]", "net.timesteps=50", "data.grayscale=false"),
        first=("vae",),
    ),
    "cascade-low": Case("ddpm", (*UNET, "data.resolution=4", "net.channel_multipliers=[1]", "net.timesteps=50")),
    "cascade": Case("cascade", (*UNET, "net.timesteps=50"), first=("base_run", "cascade-low")),
}


@functools.cache
def digits() -> Path:
    """Twelve digits of two classes, one folder per class."""
    folder = tiny.root() / "digits"
    for name in ("0", "1"):
        (folder / name).mkdir(parents=True)
        for file in [file for file in bundled("digits/train") if file.startswith(f"{name}/")][:6]:
            (folder / file).write_bytes(bundled("digits/train")[file].read())
    return folder


def recipe(name: str, folder: Path, *overrides: str) -> Recipe:
    """The recipe `recipes/scratch/NAME.yaml`, made small, with its run in `folder`."""
    case = CASES[name]
    first = (
        (f"model.{case.first[0]}={first_stage(case.first[1]) if case.first[1:] else tiny.vae()}",) if case.first else ()
    )
    given = (
        f"data.path={digits()}",
        f"output.folder={folder}",
        f"train.steps={case.steps}",
        *DIGITS,
        *COMMON,
        *case.small,
        *first,
        *overrides,
    )
    return load_recipe(f"scratch/{name}", given)


@functools.cache
def first_stage(name: str) -> Path:
    """A finished run of that recipe."""
    folder = tiny.root() / "first" / name
    tiny.train(recipe(name, folder, "train.steps=12", "optimizer.lr=1e-2", "optimizer.schedule=constant"))
    return folder

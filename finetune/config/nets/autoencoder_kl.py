"""The VAE of latent diffusion, diffusers' AutoencoderKL. It has no `net` section: `model.build` describes it."""

from __future__ import annotations

from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="autoencoder-kl",
    title="AutoencoderKL (the VAE of latent diffusion)",
    implementation="finetune.models.scratch.vae.autoencoder_kl",
    aliases=("vae",),
    kind="VAE",
    tasks=("autoencoding",),
    paper="2112.10752",
)

"""The sections `diffusion`, `flow` and `autoencoder` of a recipe: the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.fields import field


@dataclass(frozen=True)
class Diffusion:
    """The denoising loss, for families with a noise schedule."""

    min_snr_gamma: float | None = field(
        None,
        "γ of min-SNR weighting (arXiv:2303.09556); null: off.",
        effect="Down-weights low noise levels and converges sooner; 5 is usual.",
        above=0,
        maximum=1_000_000.0,
    )
    noise_offset: float = field(
        0.0,
        "Strength of a per-channel offset added to the noise.",
        effect="Lets the model learn very dark and very bright images; 0.05–0.1 is usual.",
        minimum=0,
        maximum=10.0,
    )
    zero_terminal_snr: bool = field(
        False, "Rescale the schedule so that the last step is pure noise (arXiv:2305.08891); needs v_prediction."
    )
    huber: float | None = field(
        None,
        "δ of the pseudo-Huber loss; null: squared error.",
        effect="Smaller is more robust to outliers.",
        above=0,
        maximum=1000.0,
    )
    shift: float = field(
        1.0,
        "Shift of the training timesteps.",
        effect="Above 1, noisy steps are trained more often: composition over detail.",
        above=0,
        maximum=1000.0,
    )


@dataclass(frozen=True)
class Flow:
    """The flow-matching loss (arXiv:2403.03206) of families that predict a velocity; null: as in their pretraining."""

    sampling: Literal["logit_normal", "mode", "uniform"] | None = field(
        None,
        "Distribution of the noise levels, before the shift; null: the family's own.",
        choices={
            "logit_normal": "the sigmoid of a normal variable: the middle levels most",
            "mode": "mode sampling with heavy tails (arXiv:2403.03206, eq. 20)",
            "uniform": "all levels equally often",
        },
    )
    mean: float = field(
        0.0,
        "Mean of the normal variable of logit_normal.",
        effect="Above 0 trains noisier levels, below 0 cleaner ones.",
        minimum=-100.0,
        maximum=100.0,
    )
    std: float = field(
        1.0,
        "Standard deviation of the normal variable of logit_normal.",
        effect="Smaller concentrates on the middle levels.",
        above=0,
        maximum=100.0,
    )
    mode_scale: float = field(
        1.29,
        "Scale of mode sampling.",
        effect="Above 0 favors the middle levels, below 0 the ends.",
        minimum=-1,
        maximum=1.75,
    )
    shift: float | None = field(
        None,
        "Shift of the noise levels; null: the checkpoint's scheduler's.",
        effect="Above 1 trains noisier levels: for larger images.",
        above=0,
        maximum=1000.0,
    )
    weighting: Literal["none", "cosmap", "sigma_sqrt"] = field(
        "none",
        "Weight of the loss by noise level.",
        choices={
            "none": "all levels equally",
            "cosmap": "2 / (π (1 − 2σ + 2σ²)): a cosine schedule's",
            "sigma_sqrt": "1 / σ²: fine detail most",
        },
    )
    guidance: float | None = field(
        None,
        "Guidance value embedded during training, for networks that take one (FLUX.1-dev); null: 1.",
        minimum=0,
        maximum=1000.0,
    )


@dataclass(frozen=True)
class Autoencoder:
    """The VAE's loss: reconstruction + kl_weight × KL, each a mean over the elements of the image or the latent."""

    reconstruction: Literal["l1", "l2"] = field(
        "l1",
        "Reconstruction error.",
        choices={"l1": "absolute error: sharper edges", "l2": "squared error: higher PSNR, softer edges"},
    )
    color_weight: float = field(
        1.0,
        "Weight of color errors relative to brightness errors.",
        effect="Above 1, colors are learned sooner.",
        minimum=1,
        maximum=1000.0,
    )
    coarse_weight: float = field(
        0.0,
        "Weight of the error between images averaged over a latent pixel.",
        effect="Larger learns large areas and their colors first.",
        minimum=0,
        maximum=1000.0,
    )
    kl_weight: float = field(
        1e-4,
        "Weight of the KL divergence to the normal prior.",
        effect="Higher makes latents smoother and reconstructions blurrier.",
        minimum=0,
        maximum=1_000_000.0,
    )

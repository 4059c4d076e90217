"""Several GPUs that train together: what each holds and exchanges per step. All figures are bytes per GPU.

DDP (PyTorch's DistributedDataParallel) keeps everything on each GPU. FSDP (its FullyShardedDataParallel,
`FULL_SHARD`) is stage 3 of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): each of n GPUs keeps 1/n of weights,
gradients and optimizer state (section 5.3); the weights of a unit are gathered before each use and freed after it,
forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from finetune.config.schema import Recipe
from finetune.estimate.profiles import Profile

Sharding = Literal["ddp", "fsdp"]
GATHERED = 2  # bytes of a gathered weight: `MixedPrecision(param_dtype=torch.bfloat16)`
PREFETCHED = 2  # units at once: the next is gathered while one computes (`BackwardPrefetch.BACKWARD_PRE`, the default)


@final
@dataclass(frozen=True)
class Group:
    """`count` GPUs that train together with DDP or FSDP."""

    count: int = 1
    sharding: Sharding = "ddp"

    @property
    def sharded(self) -> bool:
        """Whether each GPU keeps only a shard of weights, gradients and optimizer state."""
        return self.sharding == "fsdp" and self.count > 1

    @property
    def share(self) -> float:
        """The fraction of weights, gradients and optimizer state that each GPU keeps."""
        return 1 / self.count if self.sharded else 1.0

    def gathered(self, profile: Profile) -> float:
        """Peak of gathered weights: those outside any unit, which stay, and twice the largest unit."""
        return (
            GATHERED * (profile.parameters["outside units"] + PREFETCHED * profile.parameters["largest unit"])
            if self.sharded
            else 0.0
        )

    def spared(self, recipe: Recipe, trained: float) -> float:
        """The 16-bit copies of trained weights that autocast would keep through a step: FSDP units gather 16 bits and
        free them.
        """
        return GATHERED * trained if self.sharded and recipe.method != "lora" else 0.0

    def exchanged(self, profile: Profile, recipe: Recipe, trained: float) -> float:
        """Bytes that each GPU sends per step.

        A ring all-reduce sends each gradient 2 (n − 1) / n times per step. Stage 3 gathers all weights twice for each
        accumulated batch, forward and backward, and reduce-scatters the gradients: (n − 1) / n times each
        (arXiv:1910.02054, section 7.2.2: 1.5 times as much).
        """
        passed = (self.count - 1) / self.count
        if not self.sharded:
            return 2 * passed * 4 * trained
        weights = profile.parameters["denoiser"] if recipe.method == "lora" else trained
        gathers = 2 * GATHERED * weights * recipe.train.accumulation
        return passed * (gathers + 4 * trained * recipe.train.accumulation)


ALONE = Group()

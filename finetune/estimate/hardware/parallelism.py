"""Several GPUs that train together: what each keeps, and what they exchange in a step. All figures are bytes of one of them.

DDP (PyTorch's DistributedDataParallel) keeps all on each. FSDP (its FullyShardedDataParallel, `FULL_SHARD`) is stage 3 of ZeRO
(Rajbhandari et al. 2020, arXiv:1910.02054): each of n keeps 1/n of weights, gradients and optimizer state (section 5.3), and a unit's weights
are gathered before they are used and freed behind it, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from finetune.config.schema import Recipe
from finetune.estimate.profiles import Profile

Sharding = Literal["ddp", "fsdp"]
GATHERED = 2  # bytes of a gathered weight: `MixedPrecision(param_dtype=torch.bfloat16)`
PREFETCHED = (
    2  # units at once: the next is gathered while one computes (FSDP's `BackwardPrefetch.BACKWARD_PRE`, its default)
)


@final
@dataclass(frozen=True)
class Group:
    """`count` GPUs that share the work by `sharding`."""

    count: int = 1
    sharding: Sharding = "ddp"

    @property
    def sharded(self) -> bool:
        """Whether each keeps a part only of weights, gradients and optimizer state."""
        return self.sharding == "fsdp" and self.count > 1

    @property
    def share(self) -> float:
        """Of weights, gradients and optimizer state, what each keeps."""
        return 1 / self.count if self.sharded else 1.0

    def gathered(self, profile: Profile) -> float:
        """The most gathered weights at once: what belongs to no unit, which stays, and the largest unit twice."""
        return (
            GATHERED * (profile.parameters["outside units"] + PREFETCHED * profile.parameters["largest unit"])
            if self.sharded
            else 0.0
        )

    def spared(self, recipe: Recipe, trained: float) -> float:
        """The 16-bit copies of all trained weights that autocast keeps through a step, where units gather 16 bits and free them."""
        return GATHERED * trained if self.sharded and recipe.method != "lora" else 0.0

    def exchanged(self, profile: Profile, recipe: Recipe, trained: float) -> float:
        """Bytes that each GPU sends in a step.

        A ring all-reduce sends each gradient 2 (n − 1) / n times, once a step. Stage 3 gathers all weights twice for each accumulated
        batch, forward and backward, and reduce-scatters the gradients: (n − 1) / n times each (arXiv:1910.02054, section 7.2.2: 1.5 times as much).
        """
        passed = (self.count - 1) / self.count
        if not self.sharded:
            return 2 * passed * 4 * trained
        weights = profile.parameters["denoiser"] if recipe.method == "lora" else trained
        gathers = 2 * GATHERED * weights * recipe.train.accumulation
        return passed * (gathers + 4 * trained * recipe.train.accumulation)


ALONE = Group()

"""Every sampler, in one table: what it is, and for which models it is valid. Torch-free.

From scratch, `finetune.models.objectives.samplers` implements them by these names. Pretrained pipelines use diffusers'
schedulers (`finetune.models.pretrained.schedulers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

from finetune.errors import UserError, did_you_mean
from finetune.models import registry


@final
@dataclass(frozen=True)
class Sampler:
    """One way from noise to an image.

    Attributes:
        description: for people.
        order: of the solver: the error of a step falls with this power of its length, plus one.
        calls: of the network per step.
        noise, flow: scheduler class in diffusers for pipelines that predict noise, and a velocity; "": not valid for
            them.
        scratch: whether the diffusion families that are trained from scratch have it.
        paper: arXiv number.
    """

    description: str
    order: int
    calls: int = 1
    noise: str = ""
    flow: str = ""
    scratch: bool = True
    paper: str = ""


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddpm": Sampler("ancestral sampling, random", 1, noise="DDPMScheduler", paper="2006.11239"),
        "ddim": Sampler("deterministic; eta adds noise", 1, noise="DDIMScheduler", paper="2010.02502"),
        "dpm++": Sampler(
            "DPM-Solver++ 2M, multistep",
            2,
            noise="DPMSolverMultistepScheduler",
            flow="DPMSolverMultistepScheduler",
            paper="2211.01095",
        ),
        "heun": Sampler(
            "Heun's method",
            2,
            calls=2,
            noise="HeunDiscreteScheduler",
            flow="FlowMatchHeunDiscreteScheduler",
            paper="2206.00364",
        ),
        "euler": Sampler(
            "Euler's method",
            1,
            noise="EulerDiscreteScheduler",
            flow="FlowMatchEulerDiscreteScheduler",
            paper="2206.00364",
        ),
        "euler-a": Sampler(
            "Euler's method with fresh noise in each step", 1, noise="EulerAncestralDiscreteScheduler", scratch=False
        ),
        "unipc": Sampler(
            "UniPC, multistep predictor-corrector",
            2,
            noise="UniPCMultistepScheduler",
            flow="UniPCMultistepScheduler",
            scratch=False,
            paper="2302.04867",
        ),
    }
)


def valid_for(family: str) -> tuple[str, ...]:
    """Names of the samplers that are valid for a pretrained family's objective."""
    spec = registry.spec_of(family)
    if not (spec.pretrained and spec.objective):
        return ()
    return tuple(name for name, sampler in SAMPLERS.items() if getattr(sampler, spec.objective))


def check(section: object, family: str, sampler: str | None, eta: float, where: str) -> None:
    """Refuse a sampler that a family does not have.

    Args:
        section: the family's `net` section, None if it has none.
        family: slug.
        sampler, eta: as `Sample` of the recipe.
        where: what an error calls the place that names them.

    Raises:
        UserError: no sampler has this name, it is not valid for the family, the family has only one way to sample, or
            eta is given with another sampler than DDIM.
    """
    known: tuple[str, ...] = getattr(section, "samplers", ()) if section is not None else valid_for(family)
    if sampler is not None and not known:
        raise UserError(f"family {family} has no samplers to choose from", where=where, remedy="remove it")
    if sampler is not None and sampler not in known:
        if sampler in SAMPLERS:
            problem = f"the sampler {sampler} is not valid for family {family}"
            raise UserError(problem, where=where, remedy=f"choose one of {', '.join(known)}")
        raise UserError(f'no sampler is called "{sampler}"', where=where, remedy=did_you_mean(sampler, known))
    if eta and (sampler or getattr(section, "sampler", "")) != "ddim":
        raise UserError(
            "eta is DDIM's: no other sampler reads it", where=where, remedy="set sample.sampler: ddim, or remove eta"
        )

"""Every model family: its record, found without importing torch, and its implementation, imported when it is needed.

A record is the name `SPEC` in a module of `models/pretrained/families` (fine-tuned through diffusers) or of
`config/nets` (trained from scratch). A new module there is a new family; there is no table to extend.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError, did_you_mean
from finetune.models.spec import FamilySpec, Variant

if TYPE_CHECKING:
    from finetune.data.audit.audit import Audit
    from finetune.models.base import Model
    from finetune.planning import Plan

PACKAGES = ("finetune.models.pretrained.families", "finetune.config.nets")


@functools.cache
def modules() -> Mapping[str, str]:
    """Slug → the module that holds the family's `SPEC`."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            if (spec := getattr(importlib.import_module(module.name), "SPEC", None)) is not None:
                found[spec.slug] = module.name
    return MappingProxyType(dict(sorted(found.items())))


@functools.cache
def specs() -> Mapping[str, FamilySpec]:
    """Slug → record, of every family."""
    return MappingProxyType({slug: importlib.import_module(module).SPEC for slug, module in modules().items()})


@functools.cache
def aliases() -> Mapping[str, str]:
    """Earlier name of a family → its slug."""
    return MappingProxyType({alias: spec.slug for spec in specs().values() for alias in spec.aliases})


def slug_of(name: str) -> str:
    """The slug of a family that is given by its slug or an earlier name; any other name as it is."""
    return aliases().get(name, name)


def spec_of(name: str) -> FamilySpec:
    """The record of a family, by its slug or an earlier name.

    Raises:
        UserError: there is no such family.
    """
    found = specs().get(slug_of(name))
    if found is None:
        raise UserError(
            f'there is no model family "{name}"', where="model.family", remedy=did_you_mean(name, list(specs()))
        )
    return found


@functools.cache
def variants() -> Mapping[str, tuple[FamilySpec, Variant]]:
    """Name of a variant → its family's record and its own."""
    return MappingProxyType(
        {name: (spec, variant) for spec in specs().values() for name, variant in spec.variants.items()}
    )


def text_widths() -> dict[int, str]:
    """Width of the text conditions in a UNet's cross-attention → the variant that has it."""
    return {variant.text_width: name for name, (_, variant) in variants().items() if variant.text_width}


def has_unet(name: str) -> bool:
    """Whether a family's denoiser is a UNet of diffusers."""
    spec = specs().get(slug_of(name))
    return spec is not None and spec.denoiser == "unet"


def pipelines() -> dict[str, str]:
    """Slug → class of the family's diffusers pipeline, of families that have one."""
    return {slug: spec.pipeline for slug, spec in specs().items() if spec.pretrained}


def family_of_pipeline(class_name: str) -> FamilySpec | None:
    """The record of the family that a class of diffusers pipelines belongs to."""
    return next((spec for spec in specs().values() if spec.pipeline and spec.pipeline == class_name), None)


def family_of_module(name: str) -> str:
    """The slug of the family that a module implements."""
    return next(slug for slug, spec in specs().items() if spec.implementation.partition(":")[0] == name)


def load(target: str) -> Any:
    """Import what `module:NAME` or `module` names."""
    module, _, name = target.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


def load_implementation(name: str) -> Any:
    """Import a family's implementation: the `Family` class of a pretrained one, the module of one from scratch."""
    return load(spec_of(name).implementation)


def build(plan: Plan, audit: Audit) -> Model:
    """Build the model that a plan trains."""
    name = plan.recipe.model.family
    module = load("finetune.models.pretrained.model") if spec_of(name).pretrained else load_implementation(name)
    found: Model = module.build(plan, audit)
    return found

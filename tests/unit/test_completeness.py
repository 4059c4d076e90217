"""Every family has all that users expect; a failure names what is missing (the checklist of docs/adding-a-model.md)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

from finetune.adapters.formats import key_maps
from finetune.config import nets, renamed
from finetune.config.loader import bundled_recipes, load_recipe, parse_recipe
from finetune.estimate import profiles
from finetune.models import registry
from finetune.models.pretrained.family import Family
from finetune.models.spec import FamilySpec
from finetune.paths import ASSETS
from tests.helpers import scratch, tiny

ROOT = Path(__file__).resolve().parents[2]
FORMATS = {"kohya", "comfyui"}
# ComfyUI and sd-scripts have no names for these families' layers.
WITHOUT_LORA_FORMAT = {"sana"}
# Checkpoints that share the recipes and the cost profile of another variant of their family.
LIKE_ANOTHER = {"sd3-medium": "sd35-medium"}


def missing_parts(spec: FamilySpec) -> list[str]:
    """Descriptions of what a family lacks."""
    found = []
    recipes = [name for name in bundled_recipes() if load_recipe(name).model.family == spec.slug]
    if not recipes:
        found.append("a recipe in recipes/")
    if f"`{spec.slug}`" not in (ROOT / "docs" / "models.md").read_text(encoding="utf-8"):
        found.append("a row in docs/models.md: run python tools/generate_docs.py models")
    return found + (_missing_pretrained_parts(spec) if spec.pretrained else _missing_scratch_parts(spec, recipes))


def _missing_pretrained_parts(spec: FamilySpec) -> list[str]:
    found = [] if spec.variants else ["a variant in its record"]
    for name in spec.variants:
        folder = ASSETS / "configs" / name
        if not (folder / "model_index.json").is_file():
            found.append(f"the configuration assets/configs/{name}/model_index.json")
            continue
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        if index["_class_name"] != spec.pipeline:
            found.append(f"a configuration of a {spec.pipeline} in assets/configs/{name}")
        found += [
            f"the configuration assets/configs/{name}/{part}"
            for part, entry in index.items()
            if isinstance(entry, list) and entry[0] and "okenizer" not in part and not (folder / part).is_dir()
            if part not in ("safety_checker", "feature_extractor", "image_encoder")
        ]
        if LIKE_ANOTHER.get(name, name) not in profiles.known():
            found.append(f"the cost profile assets/profiles/{name}.json: run python tools/measure_profiles.py {name}")
    if not hasattr(diffusers, spec.denoiser_class):
        found.append(f"a denoiser: diffusers has no {spec.denoiser_class}")
    if not set(spec.lora_formats) <= FORMATS or not (spec.lora_formats or spec.slug in WITHOUT_LORA_FORMAT):
        found.append("a LoRA format in its record (`lora_formats`)")
    if spec.lora_formats and not spec.modelspec and spec.slug != "pixart":
        found.append("the names of its base in LoRA metadata (`modelspec`)")
    if spec.slug not in (*tiny.FLOWS, *map(tiny.family, tiny.PIPELINES)):
        found.append(f"a tiny pipeline in tests/helpers/tiny_pipelines/{spec.slug.replace('-', '_')}.py")
    return found


def _missing_scratch_parts(spec: FamilySpec, recipes: list[str]) -> list[str]:
    found = [
        f"the cost profile assets/profiles/scratch-{name.partition('/')[2]}.json"
        for name in recipes
        if f"scratch-{name.partition('/')[2]}" not in profiles.known()
    ]
    section = nets.section(spec.slug)
    if section is not None and spec.slug not in {case.family for case in scratch.CASES.values()}:
        found.append("a case in tests/helpers/scratch.py")
    return found


@pytest.mark.parametrize("slug", registry.specs())
def test_family_has_every_required_part(slug: str) -> None:
    missing = missing_parts(registry.specs()[slug])
    assert not missing, f"{slug} lacks " + "; ".join(missing)


@pytest.mark.parametrize("slug", registry.specs())
def test_family_implementation_matches_its_spec(slug: str) -> None:
    spec = registry.specs()[slug]
    implementation = registry.load_implementation(slug)
    if spec.pretrained:
        assert issubclass(implementation, Family) and implementation.spec is spec
        assert hasattr(diffusers, spec.pipeline)
        for layout in spec.lora_formats:
            key_map = key_maps.key_map(spec, layout)
            assert key_map is None or isinstance(key_map, key_maps.KeyMap)
    else:
        assert callable(implementation.build)
        assert registry.family_of_module(implementation.__name__) == slug


def test_family_and_variant_names_are_unique() -> None:
    slugs = list(registry.specs())
    names = [*slugs, *registry.aliases()]
    assert len(names) == len(set(names))
    variants = [name for spec in registry.specs().values() for name in spec.variants]
    assert len(variants) == len(set(variants)) == len(registry.variants())
    repositories = [hub for _, variant in registry.variants().values() for hub in variant.hub]
    assert len(repositories) == len(set(repositories))


@pytest.mark.parametrize(("alias", "slug"), registry.aliases().items())
def test_family_alias_in_a_recipe_is_read_as_the_slug(alias: str, slug: str, tmp_path: Path) -> None:
    """Old recipes, and the recipe.yaml of old runs, compare equal to the new ones and resume."""
    name = next(name for name in bundled_recipes() if load_recipe(name).model.family == slug)
    text = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    old = text.replace(f"family: {slug}", f"family: {alias}", 1)
    assert old != text
    parsed = parse_recipe(old, "old.yaml", name.partition("/")[2])
    assert parsed == load_recipe(name) and parsed.model.family == slug


def test_family_specs_load_without_torch() -> None:
    code = "import sys, finetune.models.registry as r; r.specs(); print({'torch', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_models_page_is_current() -> None:
    from tools.generate_docs import models

    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == models()


def test_bundled_recipe_names_begin_with_a_family_or_variant() -> None:
    for name in bundled_recipes():
        recipe = load_recipe(name)
        spec, stem = registry.spec_of(recipe.model.family), name.partition("/")[2]
        if recipe.method != "scratch" and recipe.model.path != "embedded:base":
            assert any(stem == slug or stem.startswith(f"{slug}-") for slug in (spec.slug, *spec.variants)), name
    assert all(load_recipe(old) == load_recipe(new) for old, new in renamed.RECIPES.items() if new in bundled_recipes())


def test_family_alias_in_a_saved_model_loads_the_family() -> None:
    """The `config.json` of a saved model names its family as it was called then."""
    for alias, slug in registry.aliases().items():
        assert registry.load_implementation(alias) is registry.load_implementation(slug)
        assert nets.section(alias) is nets.section(slug)

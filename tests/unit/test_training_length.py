"""How long a run is: from purpose and number of images, by the table; and what `ft check` says about a length that is given."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest

from finetune import planning
from finetune.config import training_length, training_table, validation
from finetune.config.loader import bundled_recipes, load_recipe, parse_recipe
from finetune.config.machine import Machine
from finetune.config.schema import Recipe
from finetune.config.training_length import Facts
from finetune.data.audit.audit import scan
from finetune.data.audit.index import held_out_of
from finetune.data.sources.captions import with_trigger, without_trigger
from finetune.errors import UserError
from finetune.estimate.forecast import forecast
from finetune.estimate.hardware.gpus import find
from tests.helpers import tiny

AUTOMATIC = [
    name for name in bundled_recipes() if not name.startswith("scratch/") and name not in ("lora/emoji", "full/emoji")
]
COUNTS = (10, 20, 100, 1_000, 10_000)
CPU = Machine("cpu", "a CPU", 1, 1, True, 1 << 40)
LORA = """
method: lora
model: {family: sdxl, path: stabilityai/stable-diffusion-xl-base-1.0}
adapter: {rank: 16}
data: {path: images}
train: {batch_size: 1}
"""


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(LORA, "my.yaml", "my", overrides)


def resolved(one: Recipe, images: int, batch: int | None = None) -> tuple[Recipe, int, tuple[str, ...]]:
    batch = batch or one.train.batch_size * one.train.accumulation
    return training_length.resolve(one, Facts(images, batch), images / batch)


@pytest.mark.parametrize("images", COUNTS)
@pytest.mark.parametrize("name", AUTOMATIC)
def test_bundled_recipe_trains_within_the_bounds_of_the_table(name: str, images: int) -> None:
    """Updates, passes per image, warm-up, samples and checkpoints of every recipe that gives no length, for any data."""
    loaded = load_recipe(name)
    assert loaded.train.steps is None and loaded.train.epochs is None
    for purpose in training_table.PURPOSES:
        one = dataclasses.replace(loaded, train=dataclasses.replace(loaded.train, purpose=purpose))
        batch = one.train.batch_size * one.train.accumulation
        whole, steps, (words,) = resolved(one, images)
        base = training_length.base_of(one)
        least, most = training_length.published(purpose, images, base.factor)
        updates = training_table.LEAST_UPDATES[one.method]
        assert whole.train.steps == steps >= updates
        assert least <= steps * batch <= max(most, updates * batch) + batch, (purpose, steps)
        assert steps * batch >= images, "every image is seen"
        assert 0 < whole.optimizer.warmup_steps <= 0.1 * steps
        grids = steps // (whole.sample.every or steps + 1)
        assert 7 <= grids <= 8, "samples come every eighth of the run"
        saved = steps // (whole.train.checkpoint_every or steps + 1)
        assert saved >= grids and (whole.train.checkpoint_every or 0) <= 1_000
        assert steps // (whole.train.validate_every or steps + 1) == grids
        assert words.startswith(f"{steps:,} steps: {images:,} images of ")
        facts = Facts(images, batch)
        overfits = training_length.remark(one, facts, steps) if (purpose, images > 200) != ("subject", True) else ""
        assert not overfits or "lower train.batch_size" in overfits, "only where the batch is large for the images"


@pytest.mark.parametrize("name", AUTOMATIC)
def test_bundled_recipe_has_the_learning_rate_of_the_table(name: str) -> None:
    loaded = load_recipe(name)
    base = training_length.base_of(loaded)
    assert base is not training_table.ANY_BASE
    assert loaded.optimizer.lr == (base.lora_lr if loaded.method == "lora" else base.full_lr)
    assert loaded.optimizer.warmup == training_table.WARMUP and not loaded.optimizer.warmup_steps
    if loaded.adapter:
        assert loaded.adapter.rank == training_table.ADVICE["subject"].rank
        assert loaded.adapter.alpha in (None, loaded.adapter.rank)


@pytest.mark.parametrize("images", [10, 20, 30, 40])
@pytest.mark.parametrize("name", [name for name in AUTOMATIC if name.startswith("lora/")])
def test_one_subject_takes_1000_to_2000_updates_at_batch_1(name: str, images: int) -> None:
    loaded = load_recipe(name, ["train.batch_size=1"])
    assert 1_000 <= resolved(loaded, images)[1] <= 2_000


@pytest.mark.parametrize("purpose", ["style", "general"])
def test_3000_images_take_3000_to_6000_passes_by_lora(purpose: str) -> None:
    assert 3_000 <= resolved(recipe(f"train.purpose={purpose}"), 3_000)[1] <= 6_000


def test_length_is_in_words_with_the_purpose() -> None:
    _, steps, words = resolved(load_recipe("lora/sdxl-12gb"), 20)
    assert steps == 1_500
    assert words == ("1,500 steps: 20 images of one subject, 75 passes each (table in docs/how-to/choose-settings.md)",)


def test_purpose_is_inferred_from_the_number_of_images() -> None:
    assert "of one subject" in resolved(recipe(), 20)[2][0]
    assert "of a large or mixed set" in resolved(recipe(), 500)[2][0]


def test_large_batches_still_take_some_hundred_updates() -> None:
    assert resolved(recipe("train.purpose=subject"), 20, batch=64)[1] == 400


def test_class_images_do_not_shorten_the_training_of_the_subject() -> None:
    alone = training_length.updates(recipe(), Facts(20, 1))
    assert training_length.updates(recipe(), Facts(20, 1, share=0.5)) == 2 * alone


@pytest.mark.parametrize(("override", "steps"), [("train.steps=77", 77), ("train.epochs=3", 60)])
def test_explicit_length_wins(override: str, steps: int) -> None:
    whole, taken, words = resolved(recipe("train.purpose=style", override), 20)
    assert (taken, words) == (steps, ())
    assert whole.train.epochs == (3 if "epochs" in override else None), (
        "kept as it was given: runs compare it on resume"
    )


def test_words_for_automatic_values() -> None:
    one = recipe("train.steps=auto", "sample.every=never", "train.checkpoint_every=auto", "train.validate_every=7")
    assert (one.train.steps, one.sample.every, one.train.checkpoint_every, one.train.validate_every) == (
        None,
        0,
        None,
        7,
    )
    whole, steps, _ = resolved(one, 20)
    assert (whole.sample.every, whole.train.checkpoint_every, whole.train.validate_every) == (
        0,
        math.ceil(steps / 8),
        7,
    )
    assert recipe("sample.every=0").sample.every == 0


def test_scratch_needs_a_length() -> None:
    with pytest.raises(UserError, match=r"training from scratch needs train\.steps or train\.epochs"):
        load_recipe("scratch/vae", ["train.steps=null", "train.epochs=null"])


def test_resolved_recipe_is_resolved_to_itself() -> None:
    """A run's recipe.yaml names every number; resuming it changes none."""
    whole, steps, _ = resolved(load_recipe("lora/sdxl"), 20)
    assert resolved(whole, 20)[:2] == (whole, steps)


def remarks(*overrides: str, images: int = 20) -> str:
    one = recipe(*overrides)
    facts = Facts(images, one.train.batch_size * one.train.accumulation)
    whole, steps, _ = training_length.resolve(one, facts, images / facts.batch)
    notes = validation.notes(whole, CPU, "float32", steps)
    return " | ".join([training_length.remark(one, facts, steps), *notes])


def test_too_few_passes_are_reported_for_explicit_lengths() -> None:
    assert "each image is seen 15 times, which is too few for a subject; 75 times is usual" in remarks(
        "train.epochs=15"
    )
    assert "too few for a style" in remarks("train.purpose=style", "train.steps=100", images=100)
    assert "usually overfits" in remarks("train.steps=30000")
    for quiet in (("train.steps=1500",), (), ("model.path=embedded:base", "model.family=sd", "train.steps=10")):
        assert "each image is seen" not in remarks(*quiet)


def test_many_images_of_one_subject_ask_for_another_purpose() -> None:
    assert "3,000 images are many for one subject: set train.purpose to style" in remarks(
        "train.purpose=subject", images=3_000
    )
    assert "many" not in remarks("train.purpose=subject", images=200)


def test_long_warmup_is_reported() -> None:
    assert "the warm-up is 67% of the run (50 of 75 steps)" in remarks("train.steps=75", "optimizer.warmup_steps=50")
    assert "warm-up" not in remarks("train.steps=75", "optimizer.warmup=0.1")


def test_run_without_a_sample_before_its_end_is_reported() -> None:
    prompts = "sample.prompts=[a dog]"
    assert "no sample before the end of training" in remarks("train.steps=75", "sample.every=250", prompts)
    assert "no sample" not in remarks("train.steps=75", "sample.every=never", prompts)
    assert "no sample" not in remarks("train.steps=75", prompts)


def test_note_of_the_emoji_base_warns_about_photographs() -> None:
    note = "the bundled base is trained on emoji at 64×64; it cannot learn photographs"
    own = load_recipe("lora/emoji", ["data.path=photos"])
    assert note in " ".join(validation.notes(own, CPU, "float32", 1_200))
    assert note not in " ".join(validation.notes(load_recipe("lora/emoji"), CPU, "float32", 1_200))


@pytest.mark.parametrize("images", [10, 20, 51, 100])
@pytest.mark.parametrize("name", ["lora/sdxl-12gb", "full/sd15", "lora/emoji"])
def test_estimate_takes_the_steps_of_the_plan(name: str, images: int) -> None:
    one = load_recipe(name)
    held_out = held_out_of(one.data.held_out, images)
    facts = Facts(images - held_out, one.train.batch_size * one.train.accumulation)
    steps = training_length.resolve(one, facts, facts.images / facts.batch)[1]
    assert forecast(one, name, find("rtx4090"), images).steps == steps


# -- the plan: captions as prompts, trigger word ----------------------------------------------------------------------


def planned(folder: Path, *overrides: str) -> planning.Plan:
    one = load_recipe("lora/emoji", [f"data.path={folder}", "data.resolution=32", *overrides])
    return planning.make_plan(one, scan(one.data), CPU)


def test_prompts_are_the_captions_held_out_first() -> None:
    plan = planned(tiny.images(), "data.held_out=0.2")
    (held_out,) = scan(plan.recipe.data).held_out
    prompts = plan.recipe.sample.prompts
    assert len(prompts) == 4 and set(prompts) <= set(tiny.CAPTIONS)
    assert prompts[0] == held_out.caption
    assert any("cannot learn photographs" in note for note in plan.notes)


def test_last_prompt_lacks_the_trigger_word() -> None:
    plan = planned(tiny.images(), "data.trigger=sks")
    *first, last = plan.recipe.sample.prompts
    assert all(prompt.startswith("sks ") for prompt in first) and len(first) == 3
    assert f"sks {last}" in [*first, *(f"sks {caption}" for caption in tiny.CAPTIONS)]


def test_given_prompts_are_kept_and_none_means_none() -> None:
    assert planned(tiny.images(), "sample.prompts=[mine]").recipe.sample.prompts == ("mine",)
    assert planned(tiny.images(), "sample.prompts=[]").recipe.sample.prompts == ()
    assert planned(tiny.images(), "sample.every=never").recipe.sample.prompts == ()
    assert load_recipe("lora/emoji").sample.prompts[0] == "rocket", "of the bundled images"
    assert load_recipe("lora/emoji", ["sample.prompts=[x]", "data.path=photos"]).sample.prompts == ("x",)


def test_trigger_word_is_put_before_captions_that_lack_it() -> None:
    assert with_trigger("a dog", "sks dog") == "sks dog a dog"
    assert with_trigger("a photo of SKS dog", "sks dog") == "a photo of SKS dog"
    assert with_trigger("a sksy cat", "sks") == "sks a sksy cat"
    assert with_trigger("", "sks") == "sks" and with_trigger("a dog", "") == "a dog"
    assert without_trigger("a photo of sks dog on a beach", "sks dog") == "a photo of dog on a beach"
    assert without_trigger("sks, a house", "sks") == "a house"


def test_table_names_its_sources() -> None:
    rows = [row.sources for row in training_table.LENGTHS.values()]
    rows += [row.sources for row in training_table.BASES.values()]
    used = {key for row in rows for key in re.findall(r"\b([A-Z]\d?)\b", row)}
    assert used == training_table.SOURCES.keys()

"""`ft estimate`: the traced step, the cards made of it, what is said of a run, and the choice between runs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from finetune import nets
from finetune.errors import UserError
from finetune.estimate import cards, choose, families, standins
from finetune.estimate.advice import assignment
from finetune.estimate.allocator import replay
from finetune.estimate.architecture import DENOISERS
from finetune.estimate.choose import PROMISE
from finetune.estimate.constants import GIB, INTERCONNECT
from finetune.estimate.denoiser import Denoiser, DenoiserModel, load
from finetune.estimate.emulate import cuda, fake_tensors
from finetune.estimate.forecast import fitting, forecast, levers, pulled, told_levers
from finetune.estimate.gpus import described, find
from finetune.estimate.group import Group
from finetune.estimate.measure import BATCHES, variant
from finetune.estimate.memory import memory
from finetune.estimate.subject import Subject, skeletons
from finetune.estimate.trace import Recorder
from finetune.recipe import Recipe, bundled_recipes, load_recipe
from tests.estimates import ft, of, traced

# -- the emulation ----------------------------------------------------------------------------------------------------


def test_autocast_casts_as_cuda_does() -> None:
    """Linear layers in bfloat16, norms and powers in float32 (PyTorch's "CUDA Ops that autocast to float32")."""
    with fake_tensors(), cuda() as mode, mode.autocast(torch.bfloat16):
        values = torch.empty(2, 8)
        assert torch.nn.functional.linear(values, torch.empty(4, 8)).dtype == torch.bfloat16
        assert torch.nn.functional.layer_norm(values.bfloat16(), (8,)).dtype == torch.float32
        assert (values.bfloat16() ** 2).dtype == torch.float32
        assert torch.nn.functional.softmax(values.bfloat16(), -1).dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert torch.nn.functional.linear(values, torch.empty(4, 8)).dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "masked", "kernel"), [(torch.bfloat16, False, "flash"), (torch.float32, False, "efficient"), (torch.bfloat16, True, "efficient")]
)
def test_attention_keeps_no_scores(dtype: torch.dtype, masked: bool, kernel: str) -> None:
    with fake_tensors(), cuda(), Recorder() as recorder:
        query = torch.empty(1, 2, 512, 64, dtype=dtype)
        mask = torch.empty(1, 1, 512, 512, dtype=dtype) if masked else None
        recorder.section("attention")
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    assert out.shape == query.shape
    assert [operator.kind for operator in recorder.sections[0].operators] == ["attention"]
    # Scores of 512 × 512 for two heads would be 4 bytes each on top.
    assert sum(event.size or 0 for event in recorder.events) < query.numel() * query.element_size() * 3 + 2 * 512 * 512


def test_an_rms_norm_is_one_kernel() -> None:
    with fake_tensors(), cuda() as mode, Recorder() as recorder, mode.autocast(torch.bfloat16):
        net, values = torch.nn.RMSNorm(64), torch.empty(2, 8, 64)
        recorder.section("norm")
        norm = net(values)
    assert norm.dtype == torch.float32 and [operator.kind for operator in recorder.sections[-1].operators] == ["other"]


def test_eight_bit_state_is_laid_out_as_the_real_one() -> None:
    shapes = [(64, 64), (63, 65), (4096,), (4095,), (1, 300, 20)]
    bytes_of: dict[Any, dict[tuple[int, str], tuple[int, torch.dtype]]] = {}
    for kind in (bitsandbytes.optim.AdamW8bit, standins.AdamW8bit):
        parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = kind(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        found: dict[tuple[int, str], tuple[int, torch.dtype]] = {}
        for number, parameter in enumerate(parameters):
            state = optimizer.state[parameter]
            found |= {
                (number, key): (value.numel(), value.dtype) for key, value in state.items() if isinstance(value, torch.Tensor) and value.numel() > 1
            }
        bytes_of[kind] = found
    real, standin = bytes_of.values()
    assert standin == real


def test_gradients_do_not_outlive_their_step() -> None:
    with fake_tensors(), cuda(), Recorder() as recorder:
        parameters = [torch.nn.Parameter(torch.empty(100, 100)) for _ in range(2)]
        for _ in range(2):
            sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            torch.optim.SGD(parameters).zero_grad()
        living = {event.identifier for event in recorder.events if event.size} - {event.identifier for event in recorder.events if event.size is None}
    assert len(living) == 2


# -- any denoiser -----------------------------------------------------------------------------------------------------

# Parameters as published: model cards and papers (FLUX.2: PEFT's own measurement; Sana: arXiv:2410.10629; PixArt-Σ: arXiv:2403.04692).
PUBLISHED = {
    "amused-256": 603e6,
    "auraflow": 6.8e9,
    "chroma": 8.9e9,
    "cogvideox-2b": 1.7e9,
    "controlnet-sd15": 361.3e6 + 859.5e6,
    "flux1-dev": 11.9e9,
    "flux2-klein-4b": 3_875_544_576,
    "hidream-i1": 17.1e9,
    "kolors": 2.58e9,
    "krea2": 12.8e9,
    "longcat-image": 6.27e9,
    "ltx-video": 1.92e9,
    "lumina2": 2.61e9,
    "pixart-900m": 0.91e9,
    "pixart-sigma": 0.61e9,
    "qwen-image": 20.4e9,
    "sana-1600m": 1.6e9,
    "sd3-medium": 2.03e9,
    "sd35-medium": 2.24e9,
}
DEPTHS = ("num_layers", "num_single_layers", "num_mmdit_layers", "num_single_dit_layers", "num_hidden_layers")


def test_every_denoiser_has_its_published_count() -> None:
    assert {path.stem for path in DENOISERS.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_denoiser_traces(name: str) -> None:
    """Its parameters are as many as published; one layer of it takes a step with LoRA, and every adapter gets its gradient."""
    given = load(name)
    with fake_tensors():
        assert sum(parameter.numel() for parameter in given.net().parameters()) == pytest.approx(PUBLISHED[name], rel=0.01)
    cut = dict.fromkeys(DEPTHS, 1) | ({"dual_attention_layers": [0]} if "sd35" in name else {"llama_layers": [0, 1]} if "hidream" in name else {})
    small = dataclasses.replace(given, config=given.config | {key: value for key, value in cut.items() if key in signature_of(given)})
    checkpointing = f"train.gradient_checkpointing={str('amused' not in name).lower()}"
    recipe = load_recipe("lora/sdxl", ["train.batch_size=2", "train.accumulation=1", "data.resolution=256", checkpointing])
    subject = Subject(recipe, "bfloat16", (256, 256), build=lambda plan: DenoiserModel(plan, small, (256, 256)))
    train = subject.phases()["train"]
    backward = [operator for section in train.sections if section.name == "backward" for operator in section.operators]
    assert sum(operator.kind == "matmul" for operator in backward) >= 2
    # Nothing reads what the text attends to in Qwen-Image's last block: one of its eight adapters has no gradient.
    idle = 1 / 8 if name == "qwen-image" else 0
    assert train.held["optimizer"] >= 8 * (1 - idle) * train.held["trained"] / 4


def signature_of(given: Denoiser) -> set[str]:
    import diffusers

    return set(inspect.signature(getattr(diffusers, given.config["_class_name"]).__init__).parameters)


# -- the trace and its cards ------------------------------------------------------------------------------------------


def _load_measure_cards() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("measure_cards", Path(__file__).parent.parent / "scripts" / "measure_cards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_card_holds_what_the_bundled_recipes_ask_for() -> None:
    """A recipe, a lever or a key that came later makes cards stale: scripts/measure_cards.py."""
    measure, lacking = _load_measure_cards(), set()
    for card_name, recipes in measure.cards().items():
        card = cards.load(card_name) if card_name in cards.known() else None
        for name in recipes:
            asked = list(measure.wanted(card_name, load_recipe(name)))
            held = [(one.device, one.settings) for one in card.variants] if card else []
            if any((device, cards.settings_of(recipe)) not in held for device, recipe in asked):
                lacking.add(name)
            assert card is None or not card.build or card.build == cards.build_key(asked[0][1]), name
    assert not lacking


@pytest.mark.parametrize(("name", "device"), [("lora/emoji", "cuda"), ("full/emoji", "cuda"), ("scratch/vae", "cpu")])
def test_cards_are_not_stale(name: str, device: cards.Device) -> None:
    """Measured again, a variant is what its card holds. If not: scripts/measure_cards.py."""
    measure = _load_measure_cards()
    recipe = measure.varied(load_recipe(name), {"train.gradient_checkpointing": "false"})
    times = (1,) if recipe.method == "lora" else (1, 2)
    low, high = ([measure.traced(recipe, device, batch, accumulation) for accumulation in times] for batch in BATCHES)
    found = variant(recipe, device, low, high, None)
    card = next(one for one, recipes in measure.cards().items() if name in recipes)
    held = json.loads(cards.path_of(card).read_text())
    entry = next(one for one in held["variants"] if all(one[key] == found[key] for key in ("device", "settings")))
    assert {key: entry[key] for key in found if key != "rank_bytes"} == {key: found[key] for key in found if key != "rank_bytes"}


def test_card_answers_between_its_points_as_the_trace_does() -> None:
    """At a batch, a resolution and a rank that were not measured, reserved memory is within 6 % (the base's is a few MiB, in segments of 2)."""
    overrides = ("train.batch_size=6", "data.resolution=96", "adapter.rank=32")
    reserved = replay(traced("lora/emoji", *overrides)["train"].events).peak_reserved
    recipe = load_recipe("lora/emoji", overrides)
    card = cards.load("base")
    said = memory(card, cards.variant_of(card, recipe), recipe, find("rtx3090"))
    around = said.parts["cuBLAS workspace"] + said.parts["CUDA context"]
    assert said.phases["train"] - around == pytest.approx(reserved, rel=0.06)


# Edits, and the batch at which they tell: weights and gradients weigh beside few activations, activations beside many.
LEVERS = {
    "checkpointing": (16, "train.gradient_checkpointing=true"),
    "every second block": (8, "train.gradient_checkpointing=2"),
    "a smaller batch": (16, "train.batch_size=2"),
    "8-bit AdamW": (16, "optimizer.name=adamw8bit"),
    "paged": (16, "optimizer.name=adamw8bit", "optimizer.paged=true"),
    "no averages": (16, "train.ema=null"),
    "bfloat16 weights": (4, "train.weights=bfloat16"),
    "fused backward": (4, "train.fused_backward=true", "optimizer.clip=tensor"),
}


@functools.cache
def reserved(*overrides: str) -> int:
    return replay(traced("full/emoji", *overrides)["train"].events).peak_reserved


@pytest.mark.parametrize("name", LEVERS)
def test_levers_are_true_on_the_trace(name: str) -> None:
    """Each lever that the advice names saves what it promises: the estimate falls as the traced step does."""
    batch, *edits = LEVERS[name]
    without = ("train.ema=null",) if batch == 4 else ()  # the card's own batch: all but averages is as it was measured
    settings = [(f"train.batch_size={batch}", *without, *more) for more in ((), edits)]
    before, after = (of("full/emoji", *setting) for setting in settings)
    real = [reserved(*setting) for setting in settings]
    promised, seen = before.memory.phases["train"] - after.memory.phases["train"], real[0] - real[1]
    assert seen > 0
    assert promised == pytest.approx(seen, rel=0.15, abs=6 << 20)


@pytest.mark.parametrize("name", cards.known())
def test_parameters_on_cards(name: str) -> None:
    """Denoisers' published counts: 860 M, 866 M and 2.6 B (arXiv:2307.01952, table 1, says 860 M, 865 M and 2.6 B)."""
    published = {"sd15": 859.5e6, "sd21": 865.9e6, "sdxl": 2567.5e6}
    if name in published:
        assert cards.load(name).parameters["denoiser"] == pytest.approx(published[name], rel=1e-3)


def test_sd15_takes_what_was_published() -> None:
    """SimpleTuner measured 2.83 GiB on an L40S (bfloat16 adapters; ours are float32) without checkpointing and 1.93 with it."""
    for checkpointing, published in (("false", 2.83), ("true", 1.93)):
        found = of("lora/sd15", "train.batch_size=1", f"train.gradient_checkpointing={checkpointing}", gpu=find("l40s"))
        reserved = found.memory.phases["train"] - found.memory.parts["CUDA context"]
        assert reserved / GIB == pytest.approx(published, rel=0.05)


# -- what is said -----------------------------------------------------------------------------------------------------


def test_parts_add_up_to_the_peak_of_training() -> None:
    for name in ("lora/sd15", "full/sd15"):
        found = of(name)
        assert sum(found.memory.parts.values()) == pytest.approx(found.memory.phases["train"], abs=16)
        assert all(value > 0 for value in found.memory.parts.values())


def test_steps_and_hours_follow_the_pictures() -> None:
    once, twice = of("lora/sd15", images=1000), of("lora/sd15", images=2000)
    assert twice.steps == 2 * once.steps
    assert once.hours < twice.hours < 2 * once.hours  # the first sample costs the same


def test_accumulation_keeps_gradients_and_takes_time() -> None:
    """The second accumulated batch finds the gradients of the first: they weigh nothing beside an adapter, and 3.2 GiB beside SD 1.5's weights."""
    once, twice = of("lora/sd15", "train.accumulation=1"), of("lora/sd15", "train.accumulation=2")
    assert twice.memory == once.memory
    assert once.speed.seconds < twice.speed.seconds <= 2 * once.speed.seconds
    once, twice = (of("full/sd15", f"train.accumulation={count}", "train.gradient_checkpointing=false") for count in (1, 2))
    assert once.memory.peak < twice.memory.peak <= once.memory.peak + 4.2 * once.variant.trained


def test_several_gpus_share_the_pictures() -> None:
    """Each takes its own batches: half the steps, gradients once more in buckets, the exchange on top of each step."""
    one, two = of("full/sd15"), forecast(load_recipe("full/sd15"), "full/sd15", find("rtx3090"), 3000, group=Group(2))
    assert two.steps == pytest.approx(one.steps / 2, abs=1)
    assert two.memory.parts["gradient buckets"] == 4 * one.variant.trained
    assert two.speed.seconds == one.speed.seconds + two.speed.exchange
    assert two.usd is not None and one.usd is not None
    assert two.usd[0] == pytest.approx(one.usd[0] * two.hours * 2 / one.hours)


def test_what_does_not_fit_is_mended_and_then_fits() -> None:
    small = described(2.9, 40, 500)
    first = of("lora/sd15", gpu=small)
    assert not first.fits
    for mended in fitting(first):
        assert mended.fits
        assert pulled(first.recipe, mended.edits) == mended.recipe
        batches = [recipe.train.batch_size * recipe.train.accumulation for recipe in (first.recipe, mended.recipe)]
        assert batches[0] == batches[1]


def test_every_lever_saves_memory() -> None:
    for name in ("lora/sd15", "full/sd15"):
        first = of(name, "train.gradient_checkpointing=false", "optimizer.name=adamw")
        for lever in told_levers(first):
            after = forecast(pulled(first.recipe, (lever,)), name, first.gpu, 3000).memory.phases
            assert any(size < first.memory.phases[phase] for phase, size in after.items()), lever


def test_every_lever_can_be_set_in_a_recipe() -> None:
    """What the advice names with `--set`, all of it, a recipe takes."""
    for name in ("lora/sd15", "full/sd15", "lora/emoji", "full/emoji"):
        recipe = load_recipe(name, ["train.gradient_checkpointing=false", "optimizer.name=adamw", "train.accumulation=2"])
        for lever in levers(recipe):
            assert getattr(load_recipe(name, ["train.accumulation=2", *assignment(lever).split()]), lever.key.partition(".")[0])


@pytest.mark.parametrize("edit", ["model.encoders=nf4", "model.encoders=offload", "model.vae_tiling=true"])
def test_what_encodes_takes_what_its_card_says(edit: str) -> None:
    """Text encoders quantised or waiting in host memory, and a VAE in tiles, are arithmetic on the card."""
    recipe = load_recipe("lora/sd21", [edit])
    subject = Subject(recipe, "bfloat16", (768, 768))
    with fake_tensors(), skeletons(), cuda():
        phase, _ = subject.encode(subject.build())
    assert phase is not None
    said, whole = of("lora/sd21", edit).memory, of("lora/sd21").memory
    promised = said.phases["encode"] - said.parts["cuBLAS workspace"] - said.parts["CUDA context"]
    assert promised == pytest.approx(replay(phase.events).peak_reserved, rel=0.02)
    assert promised < whole.phases["encode"] - 0.3 * GIB


def test_sharding_shares_out_what_zero_shares_out() -> None:
    """Stage 3 of ZeRO (arXiv:1910.02054): 1/n of weights, gradients and state; 1.5 times DDP's exchange, in 16 bits for the weights."""
    recipe = load_recipe("full/sd15", ["train.ema=null", "train.accumulation=1"])
    one, ddp, fsdp = (forecast(recipe, "full/sd15", find("a100-80gb"), 3000, group=Group(*of)) for of in ((1,), (4,), (4, "fsdp")))
    for part in ("trained weights", "gradients", "optimizer (adamw8bit)"):
        assert fsdp.memory.parts[part] == pytest.approx(one.memory.parts[part] / 4, abs=1)
    assert "gradient buckets" not in fsdp.memory.parts and fsdp.memory.parts["gathered weights"] > 0
    assert fsdp.memory.phases["train"] < one.memory.phases["train"] < ddp.memory.phases["train"]
    trained = one.variant.trained
    assert ddp.speed.exchange == pytest.approx(2 * 0.75 * 4 * trained / INTERCONNECT)
    assert fsdp.speed.exchange == pytest.approx(0.75 * (2 + 2 + 4) * trained / INTERCONNECT)


# -- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "method"), [(50, "lora"), (3000, "lora"), (50_000, "full")])
def test_choice_follows_the_pictures(images: int, method: str) -> None:
    found = [of(name, images=images, gpu=find("a100-80gb")) for name in ("lora/sd15", "full/sd15")]
    assert choose.choose(found, images, None, None, "quality").forecast.recipe.method == method


def test_rules_leave_no_gap() -> None:
    for rules in (choose.BY_IMAGES, choose.BY_BUDGET):
        assert all(one.most == following.least for one, following in itertools.pairwise(rules))
        assert rules[-1].most == float("inf")
        assert all(one.reason and one.methods for one in rules)


def test_every_recipe_is_of_a_kind_that_the_goals_know() -> None:
    kinds = {nets.kind(load_recipe(name).model.family) for name in bundled_recipes()}
    assert kinds <= {kind for goal in choose.GOALS.values() for kind in goal.kinds}


def test_little_money_goes_before_many_pictures() -> None:
    found = [of(name, images=20_000, gpu=find("a100-80gb")) for name in ("lora/sd15", "full/sd15")]
    choice = choose.choose(found, 20_000, 60, None, "quality")
    assert choice.forecast.recipe.method == "lora" and "tens of dollars" in choice.reason


def test_small_pictures_are_learned_from_scratch(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("--images", "3000", "--gpu", "rtx3060", "--data", "small-images") == 0
    said = capsys.readouterr().out
    assert "Recommended: scratch/emoji-diffusion, because small pictures" in said
    assert "First:       ft train scratch/emoji-vae" in said and "lora/" not in said


def test_a_latent_space_is_a_vae(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("--images", "3000", "--gpu", "rtx3060", "--goal", "latent") == 0
    said = capsys.readouterr().out
    assert "because a latent space: a VAE" in said and "emoji-diffusion" not in said


@pytest.mark.parametrize("goal", families.DECISIVE)
def test_what_was_measured_decides_between_recipes_of_a_goal(goal: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("--images", "2000", "--gpu", "rtx3060", "--data", "small-images", "--goal", goal) == 0
    serving = {"speed": "dcgan", "likelihood": "glow"}
    assert families.quoted(goal).startswith(serving[goal]) and f"Recommended: scratch/{serving[goal]}, because" in capsys.readouterr().out


def test_an_autoregressive_model_never_draws_large_pictures() -> None:
    one = of("lora/sd15")
    large = dataclasses.replace(one, recipe=dataclasses.replace(one.recipe, model=dataclasses.replace(one.recipe.model, family="pixelcnnpp")))
    with pytest.raises(UserError, match="never draws large pictures"):
        choose.choose([large], 3000, None, None, "likelihood")


FOR_PICTURES = {name for name in bundled_recipes() if not name.startswith("scratch/") and not name.endswith("/emoji") and not PROMISE.search(name)}


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("--images", "3000", "--gpu", "rtx3090") == 0
    said = capsys.readouterr().out
    assert "3,000 pictures on one RTX 3090" in said
    assert "Recommended: lora/" in said
    assert "ft train lora/" in said
    assert all(name in said for name in FOR_PICTURES)
    assert sum("lora/flux2-klein " in line for line in said.splitlines()) == 2 and "with model.quantize: nf4" in said, "QLoRA has a row of its own"


def test_of_several_recipes_for_one_base_the_largest_that_fits_stands_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    for gpu, name in (("rtx3060", "lora/flux1-12gb"), ("rtx3090", "lora/flux1"), ("h100-sxm", "lora/flux1-80gb")):
        assert ft("--images", "3000", "--gpu", gpu, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert {one["recipe"] for one in found["forecasts"] if "flux1" in one["recipe"]} == {name}


def test_json_holds_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("--images", "3000", "--gpu", "rtx3090", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    names = [one["recipe"] for one in found["forecasts"]]
    assert {*names, *(name for left in found["not covered"].values() for name in left)} == FOR_PICTURES
    assert found["recommended"] in names


# -- one run ----------------------------------------------------------------------------------------------------------


def test_recipes_from_scratch_are_known_by_what_they_build() -> None:
    found = cards.card_of_build(load_recipe("scratch/emoji-vae", ["autoencoder.kl_weight=1e-3", "train.batch_size=4"]))
    assert found is not None and found.name == "scratch-emoji-vae"
    assert cards.card_of_build(load_recipe("scratch/emoji-vae", ["model.build.latent_channels=4"])) is None


def test_one_recipe_taken_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("lora/emoji", "--gpu", "rtx3060") == 0
    said = capsys.readouterr().out
    assert "fits" in said
    assert "380 pictures ÷ batch 8" in said  # counted in the folder, those held out taken off
    assert "CUDA context" in said


def test_trace_says_what_the_card_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = []
    for more in ([], ["--trace", "--plot", str(tmp_path / "plot.html")]):
        assert ft("lora/emoji", "--gpu", "rtx3090", "--json", *more) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[1]["phases"]["train"] == pytest.approx(said[0]["phases"]["train"], rel=0.02)
    assert said[1]["seconds_per_step"] == pytest.approx(said[0]["seconds_per_step"], rel=0.05)
    assert "<polyline" in (tmp_path / "plot.html").read_text(encoding="utf-8")


def test_a_denoiser_that_someone_points_at(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}))
    assert ft("--denoiser", str(file), "--gpu", "rtx3090", "--images", "10", "--resolution", "256") == 0
    assert "FluxTransformer2DModel" in file.read_text() and "fits" in capsys.readouterr().out


def test_recommended_recipe_is_written_and_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    assert ft("--images", "3000", "--gpu", "rtx3090", "--write", str(file)) == 0
    assert isinstance(load_recipe(file), Recipe)
    assert ft("--images", "3000", "--gpu", "rtx3090", "--write", str(file)) == 2
    assert "exists already" in capsys.readouterr().err


BAD = {
    "an unknown GPU": (["--images", "10", "--gpu", "rtx3091"], "no GPU here is called"),
    "half a description": (["--images", "10", "--vram", "16"], "three figures"),
    "named and described": (["--images", "10", "--gpu", "t4", "--vram", "16"], "named and described"),
    "no pictures": (["--images", "0", "--gpu", "t4"], "nothing to train on"),
    "a billion pictures": (["--images", "1000000000", "--gpu", "t4"], "nothing to train on"),
    "no number of pictures": (["--gpu", "t4"], "how many pictures"),
    "too little money": (["--images", "3000", "--gpu", "rtx3090", "--budget", "0.01"], "the least is"),
    "too little time": (["--images", "3000", "--gpu", "rtx3090", "--hours", "0.01"], "the least is"),
    "too small a GPU": (["--images", "3000", "--vram", "1", "--tflops", "10", "--bandwidth", "100"], "the least is"),
    "not on a card": (["lora/sd15", "--images", "10", "--gpu", "t4", "--set", "adapter.targets=to_q"], "does not cover"),
    "from scratch, another net": (["scratch/emoji-vae", "--gpu", "t4", "--set", "model.build.latent_channels=4"], "no card covers"),
    "several CPUs": (["scratch/emoji-vae", "--gpu", "cpu", "--gpus", "2"], "one CPU"),
    "an unknown repository": (["lora/sd15", "--images", "10", "--gpu", "t4", "--set", "model.path=someone/something"], "cannot be told"),
    "a file that is no denoiser": (["--denoiser", "no-denoiser.json", "--images", "10", "--gpu", "t4"], "no denoiser"),
    "a file that is no JSON": (["--denoiser", "no-json.json", "--images", "10", "--gpu", "t4"], "no JSON object"),
    "a denoiser that is not there": (["--denoiser", "missing.json", "--images", "10", "--gpu", "t4"], "cannot be read"),
    "a trace of nothing": (["--trace", "--images", "10", "--gpu", "t4"], "which run"),
    "pictures that are not there": (["lora/sd15", "--gpu", "t4"], "no pictures at data.path"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_a_sentence(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no-denoiser.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "no-json.json").write_text("here is no JSON")
    arguments, words = BAD[name]
    assert ft(*arguments) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "mend:" in told
    assert "Traceback" not in told


def test_no_torch_is_imported() -> None:
    program = "import sys; from finetune import cli\ntry: cli.main(['estimate', '--images', '3000', '--gpu', 'rtx3090'])\nexcept SystemExit: pass\n"
    program += "sys.exit(', '.join({'torch', 'numpy', 'diffusers', 'transformers', 'PIL'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr


def test_a_budget_that_is_too_small_says_the_least() -> None:
    found = [of("lora/sd15")]
    with pytest.raises(UserError, match="the least is lora/sd15"):
        choose.choose(found, 3000, 0.01, None, "quality")

"""`ft estimate`: estimates of a run, and the choice between recipes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.config.loader import bundled_recipes, load_recipe
from finetune.config.schema import Recipe
from finetune.errors import UserError
from finetune.estimate import benchmarks, profiles, recommend
from finetune.estimate.advice import assignment, sets
from finetune.estimate.allocator.caching import replay
from finetune.estimate.constants import GIB, INTERCONNECT
from finetune.estimate.forecast import apply_options, covered_options, fitting, forecast, memory_options
from finetune.estimate.hardware.gpus import described, find
from finetune.estimate.hardware.host import host_memory_of
from finetune.estimate.hardware.parallelism import Group
from finetune.estimate.recommend import PROMISE, Question
from finetune.estimate.text import host_note
from finetune.estimate.tracing.cuda_mode import cuda, fake_tensors
from finetune.estimate.tracing.skeletons import skeletons
from finetune.estimate.tracing.traced_run import TracedRun
from finetune.models.registry import spec_of
from tests.helpers.estimates import forecast_of, ft

# -- estimates --------------------------------------------------------------------------------------------------------


def test_memory_parts_add_up_to_the_peak_of_training() -> None:
    for name in ("lora/sd15", "full/sd15"):
        found = forecast_of(name)
        assert sum(found.memory.parts.values()) == pytest.approx(found.memory.phases["train"], abs=16)
        assert all(value > 0 for value in found.memory.parts.values())


def test_steps_and_hours_scale_with_the_images() -> None:
    once, twice = (forecast_of("lora/sd15", "train.epochs=20", images=images) for images in (1000, 2000))
    assert twice.steps == 2 * once.steps
    assert once.hours < twice.hours < 2 * once.hours  # the first sample costs the same


def test_accumulation_adds_gradients_and_time() -> None:
    """The first batch's gradients stay during the second: negligible for an adapter, 3.2 GiB for SD 1.5's weights."""
    once, twice = forecast_of("lora/sd15", "train.accumulation=1"), forecast_of("lora/sd15", "train.accumulation=2")
    assert twice.memory == once.memory
    assert once.speed.seconds < twice.speed.seconds <= 2 * once.speed.seconds
    once, twice = (
        forecast_of("full/sd15", f"train.accumulation={count}", "train.gradient_checkpointing=false")
        for count in (1, 2)
    )
    assert once.memory.peak < twice.memory.peak <= once.memory.peak + 4.2 * once.variant.trained


def test_several_gpus_divide_the_steps() -> None:
    """Each takes its own batches: half the steps, gradient buckets in memory, and communication added to each step."""
    one, two = (
        forecast_of("full/sd15"),
        forecast(load_recipe("full/sd15"), "full/sd15", find("rtx3090"), 3000, group=Group(2)),
    )
    assert two.steps == pytest.approx(one.steps / 2, abs=1)
    assert two.memory.parts["gradient buckets"] == 4 * one.variant.trained
    assert two.speed.seconds == one.speed.seconds + two.speed.exchange
    assert two.usd is not None and one.usd is not None
    assert two.usd[0] == pytest.approx(one.usd[0] * two.hours * 2 / one.hours)


def test_memory_fix_for_a_small_gpu_fits_and_keeps_the_batch() -> None:
    small = described(2.9, 40, 500)
    first = forecast_of("lora/sd15", gpu=small)
    assert not first.fits
    for fixed in fitting(first):
        assert fixed.fits
        assert apply_options(first.recipe, fixed.edits) == fixed.recipe
        batches = [recipe.train.batch_size * recipe.train.accumulation for recipe in (first.recipe, fixed.recipe)]
        assert batches[0] == batches[1]


def test_every_memory_option_saves_memory() -> None:
    for name in ("lora/sd15", "full/sd15"):
        first = forecast_of(name, "train.gradient_checkpointing=false", "optimizer.name=adamw")
        for option in covered_options(first):
            after = forecast(apply_options(first.recipe, (option,)), name, first.gpu, 3000).memory.phases
            assert any(size < first.memory.phases[phase] for phase, size in after.items()), option


def test_every_memory_option_can_be_set_in_a_recipe() -> None:
    """The recipe accepts everything that the advice names with `--set`."""
    for name in ("lora/sd15", "full/sd15", "lora/emoji", "full/emoji"):
        recipe = load_recipe(
            name, ["train.gradient_checkpointing=false", "optimizer.name=adamw", "train.accumulation=2"]
        )
        for option in memory_options(recipe):
            assert getattr(
                load_recipe(name, ["train.accumulation=2", *assignment(option).split()]), option.key.partition(".")[0]
            )


@pytest.mark.parametrize(
    "edit", ["model.text_encoder_placement=nf4", "model.text_encoder_placement=offload", "model.vae_tiling=true"]
)
def test_encoding_estimate_matches_the_trace(edit: str) -> None:
    """Quantized or offloaded text encoders, and a tiled VAE, are computed from the profile."""
    recipe = load_recipe("lora/sd21", [edit])
    subject = TracedRun(recipe, "bfloat16", (768, 768))
    with fake_tensors(), skeletons(), cuda():
        phase, _ = subject.encode(subject.build())
    assert phase is not None
    said, whole = forecast_of("lora/sd21", edit).memory, forecast_of("lora/sd21").memory
    promised = said.phases["encode"] - said.parts["cuBLAS workspace"] - said.parts["CUDA context"]
    assert promised == pytest.approx(replay(phase.events).peak_reserved, rel=0.02)
    assert promised < whole.phases["encode"] - 0.3 * GIB


def test_fsdp_divides_what_zero_stage_3_divides() -> None:
    """ZeRO stage 3 (arXiv:1910.02054): 1/n of weights, gradients and state.

    Communication is 1.5 × DDP's, in 16 bits for the weights.
    """
    recipe = load_recipe("full/sd15", ["train.ema=null", "train.accumulation=1"])
    one, ddp, fsdp = (
        forecast(recipe, "full/sd15", find("a100-80gb"), 3000, group=Group(*gpus)) for gpus in ((1,), (4,), (4, "fsdp"))
    )
    for part in ("trained weights", "gradients", "optimizer (adamw8bit)"):
        assert fsdp.memory.parts[part] == pytest.approx(one.memory.parts[part] / 4, abs=1)
    assert "gradient buckets" not in fsdp.memory.parts and fsdp.memory.parts["gathered weights"] > 0
    assert fsdp.memory.phases["train"] < one.memory.phases["train"] < ddp.memory.phases["train"]
    trained = one.variant.trained
    assert ddp.speed.exchange == pytest.approx(2 * 0.75 * 4 * trained / INTERCONNECT)
    assert fsdp.speed.exchange == pytest.approx(0.75 * (2 + 2 + 4) * trained / INTERCONNECT)


# -- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "method"), [(50, "lora"), (3000, "lora"), (50_000, "full")])
def test_choice_by_number_of_images(images: int, method: str) -> None:
    found = [forecast_of(name, images=images, gpu=find("a100-80gb")) for name in ("lora/sd15", "full/sd15")]
    asked = Question(images, find("a100-80gb"), rent=False)
    assert recommend.choose(found, asked).choice.forecast.recipe.method == method


def test_answer_has_no_step_in_the_number_of_images() -> None:
    """What a method costs in points is continuous, so nothing changes at a round number of images for all bases."""
    for name in ("lora/sd15", "full/sd15"):
        for images in (200, 1_000, 10_000, 100_000):
            below, above = (
                recommend.cost_in_points(forecast_of(name, images=n), Question(n, find("rtx3090")))[0]
                for n in (images - 1, images + 1)
            )
            assert below == pytest.approx(above, abs=0.5)


def test_recommendation_rules_leave_no_gap() -> None:
    rules = recommend.BY_IMAGES
    assert all(one.most == following.least for one, following in itertools.pairwise(rules))
    assert rules[0].least == 1 and rules[-1].most == float("inf")
    assert all(one.reason for one in rules)


def test_every_recipe_kind_belongs_to_a_goal() -> None:
    kinds = {spec_of(load_recipe(name).model.family).kind for name in bundled_recipes()}
    assert kinds <= {kind for goal in recommend.GOALS.values() for kind in goal.kinds}


def test_budget_limits_what_is_recommended() -> None:
    gpu = find("a100-80gb")
    found = [forecast_of(name, images=20_000, gpu=gpu) for name in ("lora/sd15", "full/sd15")]
    free = recommend.choose(found, Question(20_000, gpu, hours=100, rent=False)).choice.forecast
    assert free.name == "full/sd15" and free.usd is not None
    low = min(one.usd[1] for one in found if one.usd)
    limited = recommend.choose(found, Question(20_000, gpu, hours=100, budget=low, rent=False)).choice.forecast
    assert limited.usd is not None and limited.usd[1] == low


def test_small_images_recommend_a_scratch_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("--images", "3000", "--gpu", "rtx3060", "--data", "small-images") == 0
    said = capsys.readouterr().out
    assert "Recommended: scratch/emoji-diffusion: small images" in said
    assert "First:       ft train scratch/emoji-vae" in said and "lora/" not in said


def test_goal_latent_recommends_a_vae(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("--images", "3000", "--gpu", "rtx3060", "--goal", "latent") == 0
    said = capsys.readouterr().out
    assert ": a VAE has a latent space" in said and "emoji-diffusion" not in said


@pytest.mark.parametrize("goal", benchmarks.DECISIVE)
def test_goal_with_benchmarks_recommends_the_best_measured(goal: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("--images", "2000", "--gpu", "rtx3060", "--data", "small-images", "--goal", goal) == 0
    serving = {"sampling-speed": "dcgan", "likelihood": "glow"}
    assert (
        benchmarks.quoted(goal).startswith(serving[goal])
        and f"Recommended: scratch/{serving[goal]}: " in capsys.readouterr().out
    )


def test_autoregressive_model_for_large_images_is_refused() -> None:
    one = forecast_of("lora/sd15")
    large = dataclasses.replace(
        one, recipe=dataclasses.replace(one.recipe, model=dataclasses.replace(one.recipe.model, family="pixelcnn++"))
    )
    with pytest.raises(UserError, match="too slow for large images"):
        recommend.choose([large], Question(3000, find("rtx3090"), goal="likelihood"))


FOR_IMAGES = {
    name
    for name in bundled_recipes()
    if not name.startswith("scratch/") and not name.endswith("/emoji") and not PROMISE.search(name)
}


def test_table_lists_every_recipe_for_large_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("--images", "3000", "--gpu", "rtx3090", "--all") == 0
    said = capsys.readouterr().out
    assert "3,000 images on one RTX 3090" in said
    assert "Recommended: lora/" in said
    assert "ft train lora/" in said
    assert all(name in said for name in FOR_IMAGES)
    assert (
        sum("lora/flux2-klein-4b " in line and "█" in line for line in said.splitlines()) == 2
        and "model.quantize: nf4" in said
    ), "QLoRA must have its own row"


def test_table_shows_the_largest_fitting_recipe_of_a_base(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for gpu, name in (("rtx3060", "lora/flux1-12gb"), ("rtx3090", "lora/flux1"), ("h100-sxm", "lora/flux1-80gb")):
        assert ft("--images", "3000", "--gpu", gpu, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert {one["recipe"] for one in found["forecasts"] if "flux1" in one["recipe"]} == {name}


def test_json_holds_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("--images", "3000", "--gpu", "rtx3090", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    names = [one["recipe"] for one in found["forecasts"]]
    assert {*names, *(name for left in found["not covered"].values() for name in left)} == FOR_IMAGES
    assert found["recommended"] in names


def test_three_choices_and_one_recommended(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("--images", "20", "--gpu", "rtx3060") == 0
    plain = capsys.readouterr().out
    lines = plain.splitlines()
    assert [line.split()[0] for line in lines[1:7:2]] == ["▸", "fastest", "cheapest"]
    assert lines[1].split()[1] == "best" and len(lines) <= 16
    assert ft("--images", "20", "--gpu", "rtx3060", "--hours", "2", "--budget", "1") == 0
    assert len(capsys.readouterr().out.splitlines()) <= len(lines), "limits make the answer no longer"


@pytest.mark.parametrize("images", [20, 150, 900, 3_000, 9_999, 10_000, 100_000])
@pytest.mark.parametrize("gpu", ["rtx3070", "rtx3060", "rtx3090", "a100-80gb"])
def test_no_run_that_the_rules_exclude(images: int, gpu: str) -> None:
    found = recommend.answer(Question(images, find(gpu), rent=False))
    for one in found.forecasts:
        assert one.recipe.method != "scratch" and not one.name.endswith("/emoji")
        assert one.recipe.method == "lora" or images >= recommend.FULL_FROM
        if one.recipe.adapter and images >= recommend.HIGHER_RANK_FROM:
            assert one.recipe.adapter.rank == recommend.HIGHER_RANK or not one.fits or "adapter.rank" in sets(one)
    choice = found.choice.forecast
    assert choice.fits and (choice.hours <= recommend.OVERNIGHT or found.limit == float("inf"))
    timely = [one for one in found.forecasts if one.fits and one.hours <= found.limit / recommend.SLOWER]
    assert choice is min(timely, key=lambda one: recommend.cost_in_points(one, Question(images, find(gpu))))


def test_cpu_fine_tunes_the_bundled_base_first(capsys: pytest.CaptureFixture[str]) -> None:
    for images in ("20", "2000"):
        assert ft("--images", images, "--gpu", "cpu") == 0
        said = capsys.readouterr().out
        assert "Recommended: lora/emoji: " in said and "64×64" in said
        assert "for photographs, rent a GPU" in said


def test_commercial_leaves_out_bases_that_forbid_it() -> None:
    gpu = find("rtx3090")
    everything, allowed = (
        {one.profile.name for one in recommend.answer(Question(20, gpu, commercial=flag, rent=False)).forecasts}
        for flag in (False, True)
    )
    assert everything - allowed == {"flux1-dev", "sana-1600m"}


def test_memory_alone_suffices(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("--images", "20", "--vram", "12") == 0
    said = capsys.readouterr().out
    assert "time unknown" in said and "GiB" in said and "ft train lora/" in said
    best = said.splitlines()[1]
    assert " min" not in best and " h " not in best


def test_a_recipe_without_images_shows_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("lora/sd15", "--gpu", "t4") == 0
    said = capsys.readouterr().out
    assert "fits: 4.2 of 14.6 GiB" in said and "add --images N" in said and "time and cost" not in said
    assert ft("lora/sd15", "--gpu", "t4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hours"] is None and found["peak_bytes"] > 0


def test_a_mac_gets_memory_and_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("--images", "20", "--gpu", "Apple M2") == 0
    said = capsys.readouterr().out
    assert "18.0 GiB" in said and "time unknown" in said and "ft has not been run on this kind of GPU" in said
    assert "quantize" not in said.splitlines()[-2]
    assert ft("--images", "20", "--gpu", "m2", "--vram", "8") in (0, 2)


def test_host_memory_follows_the_weights() -> None:
    for name, low, high in (("lora/sdxl", 8, 12), ("lora/flux1", 31, 42), ("lora/qwen-image", 52, 64)):
        one = forecast_of(name)
        assert low * GIB < host_memory_of(one.profile, one.variant, one.recipe).needed < high * GIB
    one = forecast_of("lora/flux1")
    assert host_note(one, 64 * 2**30) == "" and "16 GiB of RAM" in host_note(one, 16 * 2**30)


# -- the command ------------------------------------------------------------------------------------------------------


def test_profile_of_a_scratch_recipe_is_found_by_its_network() -> None:
    found = profiles.profile_of_build(
        load_recipe("scratch/emoji-vae", ["autoencoder.kl_weight=1e-3", "train.batch_size=4"])
    )
    assert found is not None and found.name == "scratch-emoji-vae"
    assert profiles.profile_of_build(load_recipe("scratch/emoji-vae", ["model.build.latent_channels=4"])) is None


def test_estimate_of_one_recipe_shows_details(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("lora/emoji", "--gpu", "rtx3060") == 0
    said = capsys.readouterr().out
    assert "fits" in said
    assert "380 images / batch 8" in said  # counted in the folder, without the held-out ones
    assert "CUDA context" in said


def test_trace_agrees_with_the_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = []
    for more in ([], ["--trace", "--plot", str(tmp_path / "plot.html")]):
        assert ft("lora/emoji", "--gpu", "rtx3090", "--json", *more) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[1]["phases"]["train"] == pytest.approx(said[0]["phases"]["train"], rel=0.02)
    assert said[1]["seconds_per_step"] == pytest.approx(said[0]["seconds_per_step"], rel=0.05)
    assert "<polyline" in (tmp_path / "plot.html").read_text(encoding="utf-8")


def test_denoiser_config_file_is_traced(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps(
            {"_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
        )
    )
    assert ft("--denoiser", str(file), "--gpu", "rtx3090", "--images", "10", "--resolution", "256") == 0
    assert "FluxTransformer2DModel" in file.read_text() and "fits" in capsys.readouterr().out


def test_recommended_recipe_is_written_and_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    assert ft("--images", "3000", "--gpu", "rtx3090", "--write", str(file)) == 0
    assert isinstance(load_recipe(file), Recipe)
    assert ft("--images", "3000", "--gpu", "rtx3090", "--write", str(file)) == 2
    assert "already exists" in capsys.readouterr().err


BAD = {
    "an unknown GPU": (["--images", "10", "--gpu", "rtx3091"], "unknown GPU"),
    "half a description": (["--images", "10", "--vram", "16", "--tflops", "40"], "must be given together"),
    "named and described": (["--images", "10", "--gpu", "t4", "--vram", "16"], "cannot be combined"),
    "no images": (["--images", "0", "--gpu", "t4"], "--images must be between 1 and 100,000,000"),
    "a billion images": (["--images", "1000000000", "--gpu", "t4"], "--images must be between 1 and 100,000,000"),
    "no number of images": (["--gpu", "t4"], "needs a recipe or --images"),
    "too little money": (["--images", "3000", "--gpu", "rtx3090", "--budget", "0.01"], "the cheapest"),
    "too little time": (["--images", "3000", "--gpu", "rtx3090", "--hours", "0.01"], "the shortest"),
    "too small a GPU": (["--images", "3000", "--vram", "1", "--tflops", "10", "--bandwidth", "100"], "the smallest"),
    "not on a profile": (
        ["lora/sd15", "--images", "10", "--gpu", "t4", "--set", "adapter.targets=to_q"],
        "does not cover",
    ),
    "from scratch, another net": (
        ["scratch/emoji-vae", "--gpu", "t4", "--set", "model.build.latent_channels=4"],
        "no cost profile covers",
    ),
    "several CPUs": (["scratch/emoji-vae", "--gpu", "cpu", "--gpus", "2"], "do not apply to a CPU"),
    "an unknown repository": (
        ["lora/sd15", "--images", "10", "--gpu", "t4", "--set", "model.path=someone/something"],
        "is unknown",
    ),
    "a file that is no denoiser": (
        ["--denoiser", "no-denoiser.json", "--images", "10", "--gpu", "t4"],
        "cannot be traced",
    ),
    "a file that is no JSON": (["--denoiser", "no-json.json", "--images", "10", "--gpu", "t4"], "is not a JSON object"),
    "a denoiser that is not there": (["--denoiser", "missing.json", "--images", "10", "--gpu", "t4"], "cannot be read"),
    "a trace of nothing": (["--trace", "--images", "10", "--gpu", "t4"], "--trace needs a recipe"),
    "too few images from scratch": (["--images", "20", "--gpu", "t4", "--goal", "speed"], "about 400 images"),
}


@pytest.mark.parametrize("name", BAD)
def test_estimate_of_bad_input_is_refused_with_a_fix(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no-denoiser.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "no-json.json").write_text("here is no JSON")
    arguments, words = BAD[name]
    assert ft(*arguments) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "fix:" in told
    assert "Traceback" not in told


def test_estimate_imports_no_torch() -> None:
    program = "import sys; from finetune.cli import main\n"
    program += "try: main.main(['estimate', '--images', '3000', '--gpu', 'rtx3090'])\nexcept SystemExit: pass\n"
    program += "sys.exit(', '.join({'torch', 'numpy', 'diffusers', 'transformers', 'PIL'} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr


def test_budget_too_small_names_the_cheapest() -> None:
    found = [forecast_of("lora/sd15")]
    with pytest.raises(UserError, match="the cheapest, lora/sd15"):
        recommend.choose(found, Question(3000, find("rtx3090"), budget=0.01))

"""The training step's arithmetic against references: diffusers' schedulers and pipelines, torch, closed forms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor, nn
from transformers import get_scheduler

from finetune.adapters.peft import layers
from finetune.config.schema import Diffusion, Optimizer
from finetune.data.decoding import to_tensor
from finetune.data.media.image import apply, decode
from finetune.errors import UserError
from finetune.models.objectives.noise_prediction import Denoising, Prediction
from finetune.models.pretrained.tokenizer import learn_merges, learn_tokenizer
from finetune.rng import Draw
from finetune.training.optimizers import Ema, learning_rate, make_optimizer
from tests.helpers import tiny

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction")


def clean_latents(count: int = 64) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noised_sample_and_target_match_diffusers(prediction: Prediction) -> None:
    clean, draw = clean_latents(), Draw(0, 3, range(64))
    noised = Denoising(SCHEDULER.alphas_cumprod, prediction, Diffusion()).noise(clean, draw)
    noise = draw.normal("noise", (4, 8, 8))
    torch.testing.assert_close(noised.sample, SCHEDULER.add_noise(clean, noise, noised.timestep))
    target = noise if prediction == "epsilon" else SCHEDULER.get_velocity(clean, noise, noised.timestep)
    torch.testing.assert_close(noised.target, target)
    assert noised.timestep.min() < 100
    assert noised.timestep.max() > 900
    assert torch.equal(noised.weight, torch.ones(64))


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.5])
def test_shifted_timesteps_follow_the_inverse_shift(factor: float) -> None:
    """P(timestep < t) is the inverse shift u = t / (s − (s − 1) t); a factor of 1 changes nothing."""
    draw = Draw(0, 3, range(20000))
    drawn = (
        Denoising(SCHEDULER.alphas_cumprod, "epsilon", Diffusion(shift=factor))
        .noise(torch.zeros(20000, 1, 1, 1), draw)
        .timestep
    )
    if factor == 1:
        assert torch.equal(drawn, draw.integers("timestep", 1000))
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    for t in (0.2, 0.5, 0.8):
        assert float((drawn < 1000 * t).float().mean()) == pytest.approx(t / (factor - (factor - 1) * t), abs=0.015)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_timesteps_of_two_parts_follow_the_whole_distribution(factor: float) -> None:
    objective, draw = Denoising(SCHEDULER.alphas_cumprod, "epsilon", Diffusion(shift=factor)), Draw(0, 3, range(20000))
    whole, least, most = (
        objective.noise(torch.zeros(20000, 1, 1, 1), draw, part).timestep
        for part in ((0.0, 1.0), (0.0, 0.75), (0.75, 1.0))
    )
    border = whole.float().quantile(0.75)
    assert least.max() <= border + 1
    assert most.min() >= border - 10
    for share in (0.1, 0.5, 0.9):
        assert float(least.float().quantile(share)) == pytest.approx(
            float(whole.float().quantile(0.75 * share)), abs=15
        )
        assert float(most.float().quantile(share)) == pytest.approx(
            float(whole.float().quantile(0.75 + 0.25 * share)), abs=15
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_match_the_paper(prediction: Prediction) -> None:
    """Hang et al. 2023, §3.4, written with SNR = ᾱ/(1−ᾱ) in float64: min(SNR, γ)/SNR for ε, min(SNR, γ)/(SNR + 1) for v."""
    alphas = SCHEDULER.alphas_cumprod.double()
    snr = alphas / (1 - alphas)
    expected = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
    objective = Denoising(SCHEDULER.alphas_cumprod, prediction, Diffusion(min_snr_gamma=5))
    torch.testing.assert_close(objective.weight(torch.arange(1000)).double(), expected, rtol=1e-4, atol=1e-9)
    assert Denoising(torch.zeros(1), prediction, Diffusion(min_snr_gamma=5)).weight(torch.tensor([0])).isfinite().all()


def test_noise_offset_shifts_each_channel_as_a_whole() -> None:
    clean, draw = torch.zeros(256, 4, 8, 8), Draw(0, 0, range(256))
    plain = Denoising(SCHEDULER.alphas_cumprod, "epsilon", Diffusion()).noise(clean, draw)
    moved = Denoising(SCHEDULER.alphas_cumprod, "epsilon", Diffusion(noise_offset=0.1)).noise(clean, draw)
    offset = moved.target - plain.target
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), rtol=0, atol=1e-6)
    assert float(offset[:, :, 0, 0].std()) == pytest.approx(0.1, rel=0.1)
    sigma = (1 - SCHEDULER.alphas_cumprod[plain.timestep]).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(moved.sample - plain.sample, sigma * offset, rtol=1e-4, atol=1e-6)


def test_huber_loss_is_quadratic_for_small_and_linear_for_large_errors() -> None:
    noised = Denoising(SCHEDULER.alphas_cumprod, "epsilon", Diffusion()).noise(
        torch.zeros(4, 1, 2, 2), Draw(0, 0, range(4))
    )
    huber = Denoising(SCHEDULER.alphas_cumprod, "epsilon", Diffusion(huber=0.1))
    small, large = (huber.error(noised.target + error, noised) for error in (1e-3, 1e3))
    torch.testing.assert_close(small, torch.full((4,), 1e-6), rtol=1e-2, atol=0)
    torch.testing.assert_close(large, torch.full((4,), 2 * 0.1 * 1e3), rtol=1e-3, atol=0)


def test_zero_terminal_snr_matches_diffusers_and_is_refused_with_epsilon(tmp_path: Path) -> None:
    zero = "diffusion={zero_terminal_snr: true}"
    job = tiny.prepare(tiny.recipe("sd21", "lora", zero, folder=tmp_path / "v"))
    alphas = job.model.train_steps()[0].objective.alphas_cumprod  # type: ignore[attr-defined]
    torch.testing.assert_close(alphas, (1 - rescale_zero_terminal_snr(SCHEDULER.betas)).cumprod(0))
    assert alphas[-1] == 0
    config = job.model.pipeline.scheduler.config  # type: ignore[attr-defined]
    assert (config.timestep_spacing, config.rescale_betas_zero_snr, config.clip_sample) == ("trailing", True, False)
    with pytest.raises(UserError, match="predicts ε"):
        tiny.prepare(tiny.recipe("sd15", "lora", zero, folder=tmp_path / "e"))
    with pytest.raises(UserError, match="needs v_prediction"):
        tiny.recipe("sd15", "lora", zero, "model.prediction=epsilon", folder=tmp_path / "e")


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_pretrained_loss_matches_the_formula_with_diffusers_parts(name: str, tmp_path: Path) -> None:
    """Latents from the plain VAE, conditions from the pipeline's `encode_prompt`, noise and target from DDPMScheduler.

    The images are not square and are cropped by their bucket, so SDXL's size and crop conditions are not trivial.
    """
    wide = ("data.buckets=true", "data.bucket_step=8", "data.caption_dropout=0", "train.batch_size=1")
    job = tiny.prepare(tiny.recipe(name, "lora", *wide, folder=tmp_path / "run"))
    plain: Any = DiffusionPipeline.from_pretrained(tiny.pipeline(name))
    ours, reference = [], []
    for step in range(2):
        places = range(1)
        draw = Draw(0, step, places)
        batch = job.data.batch(step, places, draw)
        ours.append(job.model.train_steps()[0].loss(batch, draw))

        image = job.data.images[job.data.order.batch(step)[0]]
        pixels = to_tensor(numpy.asarray(apply(decode(image.read(), "white"), image.crop)))
        posterior = plain.vae.encode(pixels[None]).latent_dist
        clean = (
            posterior.mean + posterior.std * draw.normal("posterior", posterior.mean.shape[1:])
        ) * plain.vae.config.scaling_factor
        timestep, noise = draw.integers("timestep", 1000), draw.normal("noise", clean.shape[1:])
        scheduler = DDPMScheduler.from_config(plain.scheduler.config, clip_sample=False)
        noisy = scheduler.add_noise(clean, noise, timestep)
        target = (
            noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(clean, noise, timestep)
        )
        encoded = plain.encode_prompt(
            image.caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        added = {}
        if name == "sdxl":
            crop = image.crop
            sizes = (crop.original[::-1], (crop.top, crop.left), (crop.shape.height, crop.shape.width))
            ids = plain._get_add_time_ids(*sizes, torch.float32, plain.text_encoder_2.config.projection_dim)
            added = {"added_cond_kwargs": {"text_embeds": encoded[2], "time_ids": ids}}
        with torch.no_grad():
            predicted = plain.unet(noisy, timestep, encoded[0], **added).sample
        reference.append((predicted - target).square().mean().reshape(1))
    torch.testing.assert_close(torch.cat(ours).detach(), torch.cat(reference), rtol=1e-4, atol=1e-5)


def test_draw_depends_only_on_seed_step_index_and_purpose() -> None:
    together, alone = Draw(7, 2, [3, 1, 4]), Draw(7, 2, [4])
    kinds: list[Callable[[Draw], Tensor]] = [
        lambda d: d.normal("noise", (2, 3)),
        lambda d: d.uniform("u"),
        lambda d: d.integers("t", 1000),
    ]
    for of in kinds:
        assert torch.equal(of(together)[2], of(alone)[0])
        assert torch.equal(of(together), of(together))
        others = [Draw(8, 2, [4]), Draw(7, 3, [4]), Draw(7, 2, [5])]
        assert all(not torch.equal(of(other), of(alone)) for other in others)
    assert not torch.equal(alone.normal("a", (2,)), alone.normal("b", (2,)))


def test_draw_distributions_have_the_expected_moments() -> None:
    draw = Draw(0, 0, range(4000))
    normal, uniform, whole = draw.normal("n", (4,)), draw.uniform("u"), draw.integers("i", 10)
    # Bounds of about five standard errors.
    assert abs(float(normal.mean())) < 0.04
    assert float(normal.std()) == pytest.approx(1, abs=0.03)
    assert abs(float(torch.corrcoef(normal.T)[0, 1])) < 0.08
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.023)
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    expected = 400
    assert (
        float(((whole.bincount(minlength=10) - expected).double() ** 2 / expected).sum()) < 40
    )  # χ² of 9 degrees of freedom


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_lr_schedule_matches_transformers_except_for_the_first_step(schedule: str) -> None:
    """Theirs starts the warm-up at 0, which wastes a step.

    Ours starts at lr / warm-up, so each warm-up rate comes one step earlier.
    """
    section, steps = Optimizer(lr=1e-3, schedule=schedule, warmup_steps=5), 23  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = [learning_rate(section, step, steps) for step in range(steps)]
    assert ours[5:] == pytest.approx(rates[5:], rel=1e-9)
    assert ours[:4] == pytest.approx(rates[1:5], rel=1e-9)


def test_ema_follows_the_closed_form_and_swaps_back() -> None:
    weight = nn.Parameter(torch.randn(3, 5))
    ema = Ema({"weight": weight}, 0.5)
    expected = weight.detach().double()
    for step in range(12):
        with torch.no_grad():
            weight.add_(torch.randn(3, 5))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach().double()
        ema.update(step)
    torch.testing.assert_close(ema.averages["weight"].double(), expected, rtol=1e-5, atol=1e-6)
    average, last = ema.averages["weight"].clone(), weight.detach().clone()
    ema.swap()
    assert torch.equal(weight, average)
    ema.swap()
    assert torch.equal(weight, last)
    assert torch.equal(ema.averages["weight"], average)


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def stepped(make: Make | Optimizer, sizes: tuple[int, ...] = (64, 80)) -> tuple[Tensor, torch.optim.Optimizer]:
    """A weight after five steps on the same gradients, and its optimizer."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(*sizes, generator=generator))
    optimizer = make_optimizer(make, [weight], torch.device("cpu")) if isinstance(make, Optimizer) else make([weight])
    for _ in range(5):
        weight.grad = torch.randn(*sizes, generator=generator)
        optimizer.step()
    return weight.detach(), optimizer


def test_adamw_matches_torchs_unfused_adamw() -> None:
    section = Optimizer(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    plain = functools.partial(
        torch.optim.AdamW, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, fused=False, foreach=False
    )
    torch.testing.assert_close(stepped(section)[0], stepped(plain)[0], rtol=1e-5, atol=1e-6)


def test_adamw8bit_stores_8_bits_and_stays_close_to_adamw() -> None:
    weight, optimizer = stepped(Optimizer(name="adamw8bit", lr=1e-2))
    states = [tensor for state in optimizer.state.values() for tensor in state.values() if isinstance(tensor, Tensor)]
    assert sum(tensor.numel() for tensor in states if tensor.dtype == torch.uint8) == 2 * weight.numel()
    start = torch.randn(64, 80, generator=torch.Generator().manual_seed(0))
    moved, error = (stepped(Optimizer(lr=1e-2))[0] - start).norm(), (weight - stepped(Optimizer(lr=1e-2))[0]).norm()
    assert error < 0.1 * moved
    _, small = stepped(Optimizer(name="adamw8bit", lr=1e-2), sizes=(8, 8))
    moments = [tensor for state in small.state.values() for key, tensor in state.items() if key in ("state1", "state2")]
    assert [tensor.dtype for tensor in moments] == [torch.float32] * 2


def test_adafactor_stores_rows_and_columns_and_uses_the_recipes_rate() -> None:
    weight, optimizer = stepped(Optimizer(name="adafactor", lr=1e-2))
    kept = sum(
        tensor.numel() for state in optimizer.state.values() for tensor in state.values() if isinstance(tensor, Tensor)
    )
    assert kept < weight.numel() / 10
    slower, _ = stepped(Optimizer(name="adafactor", lr=1e-3))
    start = torch.randn(64, 80, generator=torch.Generator().manual_seed(0))
    assert float((weight - start).norm() / (slower - start).norm()) == pytest.approx(10, rel=0.05)


def test_lora_targets_select_layers() -> None:
    net: Any = DiffusionPipeline.from_pretrained(tiny.pipeline("sd15")).unet
    attention = [
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and (".attn1." in name or ".attn2." in name)
    ]
    assert layers(net, "attention") == attention
    assert {name for name in layers(net, "attention+mlp") if name not in attention} == {
        name for name, module in net.named_modules() if isinstance(module, nn.Linear) and ".ff." in name
    }
    assert layers(net, "all-linear") == [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    assert all(name.endswith(("to_q", "conv1")) for name in layers(net, "to_q, conv1"))
    with pytest.raises(UserError, match='did you mean "to_q"'):
        layers(net, "to_qq")


def test_learned_bpe_merges_match_the_papers_example() -> None:
    """Sennrich et al. 2016, algorithm 1, with their counts: low ×5, lower ×2, newest ×6, widest ×3."""
    merges = learn_merges({"low": 5, "lower": 2, "newest": 6, "widest": 3}, 4)
    assert [left + right for left, right in merges] == ["es", "est</w>", "lo", "ew"]
    captions = ["a red circle", "a blue square", "red red blue"]
    one, other = (learn_tokenizer(order, 530, 8) for order in (captions, captions[::-1]))
    assert one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    assert one("Été ☂").input_ids.count(one.eos_token_id) == 1, "text outside the vocabulary must not become <eos>"
    assert math.isclose(len(one), 530, abs_tol=2)

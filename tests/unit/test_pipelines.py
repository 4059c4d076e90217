"""Each family against its pipeline in diffusers: the same conditions, and a loss from the same prediction.

The pipeline runs a single step from noise, and its network's inputs and outputs are recorded: the family's `predict`
must pass the same inputs at that noise level, and the output is the velocity (or noise) in the loss.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.data.batch import stack
from finetune.models.objectives.noise_prediction import WHOLE, Noised, Part
from finetune.models.pretrained import loading
from finetune.models.pretrained.denoising import Denoiser, DenoiseStep, objective_of
from finetune.models.pretrained.family import Family, family_of
from finetune.models.pretrained.vae import decoded_exactly, latents_of
from finetune.rng import Draw
from tests.helpers import tiny, tiny_pipelines
from tests.helpers.redraw import make_masks_boolean

WORDS = ("a red circle", "two black stripes and a yellow ring")


@functools.cache
def opened(name: str) -> tuple[Family, Any]:
    family = family_of(name)
    pipeline: Any = loading.open_pipeline(
        tiny.recipe(name, "full", folder=tiny.root() / "unused").model, family.spec.pipeline, torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    return family, pipeline


def conditions(name: str, words: str, negative: bool = False) -> dict[str, Tensor]:
    family, pipeline = opened(name)
    with torch.no_grad():
        return family.conditions(pipeline, words, negative, torch.device("cpu"))


@pytest.mark.parametrize("name", tiny.FLOWS)
def test_conditions_give_the_pipelines_own_image(name: str) -> None:
    """From text and from our conditions, prompt and negative prompt, the pipeline generates the same image."""
    family, pipeline = opened(name)
    given = family.call(conditions(name, WORDS[0]), conditions(name, "", negative=True), 3.0)
    own = {key: value for key, value in given.items() if "embeds" not in key and "mask" not in key} | {
        "prompt": WORDS[0]
    }
    if tiny_pipelines.tiny_of(name).negative:
        own["negative_prompt"] = ""
    if tiny_pipelines.tiny_of(name).bool_masks:
        make_masks_boolean(pipeline)
    common = {"width": 32, "height": 32, "num_inference_steps": 2, "output_type": "pt"}
    ours, theirs = (
        pipeline(**arguments, **common, generator=torch.Generator().manual_seed(4)).images for arguments in (given, own)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", tiny.FLOWS)
def test_caption_tokens_counts_exactly_what_the_encoder_reads(name: str, tmp_path: Path) -> None:
    """Including templates and system prompts; `ft data check`, which loads no network, counts the same as training."""
    family, pipeline = opened(name)
    reader = loading.open_reader(tiny.recipe(name, "full", folder=tmp_path), ())
    assert reader is not None
    one, limit = family.caption_tokens(pipeline, "a")  # in these tokenizers each letter is a token
    longest = "a" * (limit - one)
    assert family.caption_tokens(pipeline, longest + "b") == (limit, limit)
    for caption in (longest + "b", *WORDS, ""):
        assert reader.count(caption) == family.caption_tokens(pipeline, caption)
    read, also = (conditions(name, longest + end)["prompt_embeds"] for end in "bc")
    assert not torch.equal(read, also)
    behind = longest + 40 * "a"  # a chat template continues after the caption
    read, also = (conditions(name, behind + end)["prompt_embeds"] for end in "bc")
    assert torch.equal(read, also)


@pytest.mark.parametrize("name", tiny.FLOWS)
def test_flow_loss_compares_the_pipelines_prediction_with_the_target(name: str) -> None:
    """One Euler step of the pipeline from pure noise gives its prediction as (x_1 − x_0) / (σ_1 − σ_0).

    At the same noise level, latents and caption, the loss must be the mean square of its difference to ε − x_0.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    family, pipeline = opened(name)
    if family.spec.objective != "flow":
        pytest.skip("its objective is tested against its scheduler in test_noise_prediction")
    before = pipeline.scheduler
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    seen: list[Tensor] = []

    def step(prediction: Tensor, timestep: Tensor, sample: Tensor, **_: Any) -> tuple[Tensor]:
        seen[:] = [prediction, sample]
        return (sample,)

    pipeline.scheduler.step = step
    try:
        arguments = family.call(
            conditions(name, WORDS[0]), conditions(name, "", negative=True), 0.0 if name == "z-image" else 1.0
        )
        with decoded_exactly(pipeline.vae):
            pipeline(
                **arguments, width=32, height=32, num_inference_steps=1, generator=torch.Generator().manual_seed(4)
            )
    finally:
        pipeline.scheduler = before
    velocity, noisy = (_as_grid(family, tensor) for tensor in seen)

    class FixedNoise:
        """Pure noise, σ = 1, as at the pipeline's first step: x_σ = ε; the clean latents are random."""

        def noise(self, clean: Tensor, draw: Draw, part: Part = WHOLE) -> Noised:
            return Noised(noisy, torch.full((1,), 1000.0), noisy - clean, torch.ones(1))

    net = Denoiser(
        family, pipeline.transformer, {}, 1.0 if pipeline.transformer.config.get("guidance_embeds") else None
    )
    objective = objective_of(family, before, tiny.recipe(name, "full", folder=tiny.root() / "unused"))
    objective.noise = FixedNoise().noise  # type: ignore[method-assign]
    clean = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(5))
    batch = stack([{"mean": clean[0], **{key: value[0] for key, value in conditions(name, WORDS[0]).items()}}])
    with torch.no_grad():
        loss = DenoiseStep(net, objective).loss(batch, Draw(0, 0, [0]))
    torch.testing.assert_close(loss, (velocity - (noisy - clean)).square().mean()[None], rtol=1e-4, atol=1e-5)


def _as_grid(family: Family, tensor: Tensor) -> Tensor:
    """A pipeline's sequence of 2×2 patches as latents [1, C, h, w]; FLUX.2's remain patches."""
    if tensor.dim() == 4:
        return tensor
    side = int(tensor.shape[1] ** 0.5)
    batch, _, channels = tensor.shape
    if family.patch == 1:
        return tensor.permute(0, 2, 1).reshape(batch, channels, side, side)
    return (
        tensor.view(batch, side, side, channels // 4, 2, 2)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(batch, channels // 4, 2 * side, 2 * side)
    )


@pytest.mark.parametrize("name", tiny.FLOWS)
def test_predict_of_a_batch_of_caption_lengths_matches_single_captions(name: str) -> None:
    family, pipeline = opened(name)
    channels = pipeline.vae.config.get("z_dim") or pipeline.vae.config.latent_channels
    latents = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(6))
    if name == "flux2":
        latents = latents.repeat(1, 4, 1, 1)[:, :, :4, :4]
    elif name == "lumina2":
        latents = latents[:, :, :4, :4]
    timestep = torch.tensor([700.0, 200.0])
    examples = [{key: value[0] for key, value in conditions(name, words).items()} for words in WORDS]
    guidance = {"guidance": torch.ones(2)} if pipeline.transformer.config.get("guidance_embeds") else {}
    with torch.no_grad():
        both = family.predict(pipeline.transformer, latents, timestep, stack(examples) | guidance)
        for place, example in enumerate(examples):
            one = {key: value[:1] for key, value in guidance.items()}
            alone = family.predict(
                pipeline.transformer, latents[place : place + 1], timestep[place : place + 1], stack([example]) | one
            )
            torch.testing.assert_close(both[place : place + 1], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", tiny.FLOWS)
def test_encoded_latents_are_what_the_pipeline_decodes(name: str) -> None:
    """With our latents and a scheduler that leaves them unchanged, the pipeline passes its VAE the same encoding."""
    family, pipeline = opened(name)
    latents = latents_of(pipeline.vae)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(7)) * 2 - 1
    with torch.no_grad():
        mean = latents.encode(pixels)["mean"]
        frame = pixels[:, :, None] if name == "qwen-image" else pixels
        encoded = pipeline.vae.encode(frame)
        raw = encoded.latent if name == "sana" else encoded.latent_dist.mode()
        seen: list[Tensor] = []
        decode = pipeline.vae.decode

        def recording_decode(given: Tensor, *arguments: Any, **named: Any) -> Any:
            seen.append(given)
            return decode(given, *arguments, **named)

        before, pipeline.vae.decode = pipeline.scheduler, recording_decode

        class IdentityScheduler(type(before)):  # type: ignore[misc]
            """Leaves the latents unchanged, whatever the prediction."""

            def step(self, prediction: Tensor, timestep: Tensor, sample: Tensor, **_: Any) -> tuple[Tensor]:
                return (sample,)

        pipeline.scheduler = IdentityScheduler.from_config(before.config)
        try:
            start = _as_the_pipeline_packs(name, mean)
            arguments = family.call(conditions(name, WORDS[0]), conditions(name, "", negative=True), 1.0)
            pipeline(**arguments, width=32, height=32, num_inference_steps=2, latents=start, output_type="pt")
        finally:
            pipeline.scheduler = before
            del pipeline.vae.decode
    torch.testing.assert_close(seen[0], raw, rtol=1e-4, atol=1e-4)


def _as_the_pipeline_packs(name: str, mean: Tensor) -> Tensor:
    if name in ("chroma", "flux1", "qwen-image"):
        _, channels, height, width = mean.shape
        split = mean.view(1, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return split.reshape(1, height * width // 4, 4 * channels)
    return mean

"""Text-to-image models of diffusers, trained in their latent space: what all such families share.

A family's own file says how its captions become conditions and how its denoiser is called (`family`). Loading,
encoding, adapters, the loss, sampling and saving are here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from finetune.adapters import peft
from finetune.adapters.formats.safetensors_io import remove_local_paths
from finetune.adapters.lora_file import LORA_FILE
from finetune.config.schema import Flow, Recipe
from finetune.config.schema import Model as ModelSection
from finetune.data.audit.audit import Audit
from finetune.data.batch import Batch, Encoder, ImageTextEncoder
from finetune.data.latent_cache import fingerprint
from finetune.data.media.image import ImageSample
from finetune.data.media.sample import Sample
from finetune.errors import UserError
from finetune.memory import apply
from finetune.memory.quantization import whole_weights
from finetune.models.base import Model, SampleRequest, TrainStep, check_sizes
from finetune.models.pretrained import loading, textual_inversion
from finetune.models.pretrained.denoising import Denoiser, DenoiseStep, objective_of
from finetune.models.pretrained.family import ClipFamily, Family, family_of
from finetune.models.pretrained.schedulers import sampling_with
from finetune.models.pretrained.single_file import refuse_other_schedule
from finetune.models.pretrained.tokenizer import spelled
from finetune.models.pretrained.trainable import Trainable, make_trainable
from finetune.models.pretrained.vae import decoded_exactly, latents_of
from finetune.planning import Plan
from finetune.rng import key_of
from finetune.training.device import empty_cache

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class CaptionAndLatent(ImageTextEncoder):
    """Encodes images as the VAE's posterior, and captions as conditions, or as token ids if text encoders train."""

    def __init__(
        self,
        family: Family,
        pipeline: DiffusionPipeline,
        device: torch.device,
        dtype: torch.dtype,
        section: ModelSection,
        tokens_only: bool,
    ) -> None:
        self._family, self._pipeline, self._device, self._tokens_only = family, pipeline, device, tokens_only
        self._kept_dtype = torch.float32 if dtype == torch.float32 else torch.float16
        tiles = ["in tiles"] if section.vae_tiling else []
        self._latents = latents_of(pipeline.vae.to(device))
        self.mask_factor = self._latents.factor
        config = json.dumps(dict(pipeline.vae.config), sort_keys=True, default=str)
        self.image_key = key_of("latent", fingerprint(pipeline.vae.state_dict()), config, str(self._kept_dtype), *tiles)
        tokenizers = [getattr(pipeline, name) for name, _ in family.encoders]
        vocabulary = [key_of(t.backend_tokenizer.to_str(), t.model_max_length) for t in tokenizers]
        weights = [] if tokens_only else [fingerprint(encoder.state_dict()) for encoder in self.text_encoders.values()]
        rounded = [section.text_encoder_placement] if section.text_encoder_placement in ("nf4", "int8") else []
        self.caption_key = key_of("conditions", type(family).__name__, str(dtype), *vocabulary, *weights, *rounded)
        if not tokens_only:
            apply.fit_encoders(self.text_encoders, section, device)

    @property
    def text_encoders(self) -> dict[str, Any]:
        return {name: getattr(self._pipeline, name) for _, name in self._family.encoders}

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Batch:
        # The VAE runs in float32 whatever the precision: SDXL's gives NaN in float16, and it runs once per image.
        found = self._latents.encode(pixels[None].to(self._device, torch.float32))
        return {name: tensor[0].to(self._kept_dtype) for name, tensor in found.items()}

    @torch.no_grad()
    def encode_caption(self, caption: str) -> Batch:
        """Encode a caption; an empty one as pipelines encode a negative prompt, from which guidance moves away."""
        if self._tokens_only and isinstance(self._family, ClipFamily):
            return self._family.token_ids(self._pipeline, caption)
        return {name: tensor[0].cpu() for name, tensor in self.conditions(caption, negative=not caption).items()}

    def conditions(self, caption: str, negative: bool) -> Batch:
        """Conditions of one caption, [1, …] each, on the device."""
        for encoder in self.text_encoders.values():
            encoder.to(self._device)
        return self._family.conditions(self._pipeline, caption, negative, self._device)

    def caption_tokens(self, caption: str) -> tuple[int, int] | None:
        return self._family.caption_tokens(self._pipeline, caption)

    def tokens(self, caption: str) -> list[str]:
        return spelled(getattr(self._pipeline, self._family.encoders[0][0]), caption)

    def release(self) -> None:
        if not self._tokens_only:
            for name in self.text_encoders:
                setattr(self._pipeline, name, None)
        self._pipeline.vae.to("cpu")
        empty_cache(self._device)


def changes_schedule(recipe: Recipe) -> bool:
    """Whether the recipe changes the base's noise schedule."""
    return recipe.model.prediction is not None or (recipe.diffusion is not None and recipe.diffusion.zero_terminal_snr)


def set_schedule(pipeline: DiffusionPipeline, recipe: Recipe) -> None:
    """Change the pipeline's scheduler as the recipe says, for training and for sampling from the result.

    Raises:
        UserError: the recipe asks for zero terminal SNR, and the model predicts the noise.
    """
    if recipe.model.prediction is not None:
        pipeline.scheduler.register_to_config(prediction_type=recipe.model.prediction)
    if recipe.diffusion is not None and recipe.diffusion.zero_terminal_snr:
        if pipeline.scheduler.config.prediction_type == "epsilon":
            raise UserError(
                "zero_terminal_snr needs a model that predicts v, and this checkpoint predicts ε",
                where="diffusion.zero_terminal_snr",
                remedy="remove it, or set model.prediction: v_prediction and train long enough for the model to adapt",
            )
        # DDIM clips samples by default, which is meant for pixels; schedulers that never clip do not have the setting.
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
        )


def generate(
    pipeline: Any, family: Family, request: SampleRequest, seed: int, positive: Batch, negative: Batch
) -> Sample:
    """Generate one image from its own seed, by the pipeline's own call: while training and afterwards alike.

    The VAE decodes in float32, as it encodes.
    """
    size = {"width": request.size[0], "height": request.size[1]} if request.size else {}
    noise = {"eta": request.eta} if request.eta else {}
    with sampling_with(pipeline, family.spec, request.sampler), decoded_exactly(pipeline.vae):
        image = pipeline(
            **family.call(positive, negative, request.guidance),
            **size,
            **noise,
            num_inference_steps=request.steps,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
    return ImageSample(image)


@torch.no_grad()
def generate_from_prompt(family: Family, pipeline: Any, request: SampleRequest, prompt: str, seed: int) -> Sample:
    """Encode the prompt and call `generate`."""
    positive, negative = (
        family.conditions(pipeline, text, role, pipeline.device)
        for text, role in ((prompt, False), (request.negative, True))
    )
    return generate(pipeline, family, request, seed, positive, negative)


class TextToImage(Model):
    """A pretrained text-to-image pipeline that trains.

    Args:
        family: its family's implementation.
    """

    def __init__(self, plan: Plan, audit: Audit, family: Family) -> None:
        recipe = plan.recipe
        if recipe.autoencoder is not None:
            raise UserError(
                "the `autoencoder` section is for family autoencoder-kl",
                where="autoencoder",
                remedy="remove the section",
            )
        if recipe.model.train_text_encoder and not isinstance(family, ClipFamily):
            raise UserError(
                f"the text encoders of family {recipe.model.family} cannot be trained",
                where="model.train_text_encoder",
                remedy="set it to false; the denoiser's LoRA learns new concepts too",
            )
        textual_inversion.check(recipe, family, audit)
        torch.manual_seed(recipe.train.seed)
        self.plan, self.family = plan, family
        self.device = torch.device(plan.machine.device)
        self.dtype = DTYPES[plan.precision]
        self._trains_text = recipe.model.train_text_encoder or recipe.method == "scratch" or bool(recipe.tokens)
        self.pipeline = self._open(recipe, audit)
        self.pipeline.set_progress_bar_config(disable=True)
        check_sizes(plan, latents_of(self.pipeline.vae).factor * family.patch)
        if family.spec.objective != "flow" and recipe.method != "scratch":
            refuse_other_schedule(self.pipeline, recipe.model.path or "")
        set_schedule(self.pipeline, recipe)
        self.denoiser: nn.Module = getattr(self.pipeline, family.spec.denoiser)
        self._tokens = textual_inversion.add(self.pipeline, family.encoders, recipe.tokens, recipe.train.seed)
        trained_encoders = (
            {name: getattr(self.pipeline, name) for _, name in family.encoders} if self._trains_text else {}
        )
        # With new tokens, only their embeddings train in the text encoders, unless `model.train_text_encoder` is set.
        whole = trained_encoders if not self._tokens or recipe.model.train_text_encoder else {}
        self.adapted = make_trainable(
            Trainable(
                recipe,
                {family.spec.denoiser: self.denoiser, **whole},
                family.spec.denoiser,
                self.dtype,
                self.device,
                self.pipeline,
                family,
                trained_encoders,
                tuple(self._tokens.values()),
            )
        )
        net = Denoiser(family, self.denoiser, trained_encoders, self._guidance(recipe.flow or Flow()))
        distill_every = recipe.adapter.distill_every if recipe.adapter else None
        self._train_steps = (DenoiseStep(net, objective_of(family, self.pipeline.scheduler, recipe), distill_every),)
        self._encoders = CaptionAndLatent(
            family, self.pipeline, self.device, self.dtype, recipe.model, tokens_only=self._trains_text
        )
        self._prompts: dict[tuple[str, bool], Batch] = {}

    def _open(self, recipe: Recipe, audit: Audit) -> DiffusionPipeline:
        """Open the base.

        In full fine-tuning the denoiser and CLIP encoders have the dtype of `train.weights`, all else that of the
        precision.
        """
        if recipe.method == "scratch":
            return loading.assemble(self.plan, audit, self.family)
        encoders = tuple(name for _, name in self.family.encoders) if isinstance(self.family, ClipFamily) else ()
        trained = (self.family.spec.denoiser, *encoders) if recipe.method == "full" else ()
        return loading.open_pipeline(
            recipe.model, self.family.spec.pipeline, self.dtype, dict.fromkeys(trained, DTYPES[recipe.train.weights])
        )

    def _guidance(self, flow: Flow) -> float | None:
        """Embedded guidance scale while training; None if the network embeds none.

        Raises:
            UserError: the recipe gives one, and the network embeds none.
        """
        config: Any = self.denoiser.config
        if config.get("guidance_embeds"):
            return 1.0 if flow.guidance is None else flow.guidance
        if flow.guidance is not None:
            raise UserError("this checkpoint embeds no guidance", where="flow.guidance", remedy="remove it")
        return None

    def train_steps(self) -> tuple[TrainStep, ...]:
        return self._train_steps

    def state(self) -> dict[str, Tensor]:
        """Only what trains: buffers are constants (SD 3.5's positions would add 0.9 GB to each checkpoint)."""
        return dict(self.trained())

    def encoder(self) -> Encoder:
        sample = self.plan.recipe.sample
        if not self._trains_text:  # the text encoders are released before sampling
            for prompt in (*((prompt, False) for prompt in sample.prompts), (sample.negative, True)):
                self._prompts[prompt] = self._conditions(*prompt)
        return self._encoders

    @torch.no_grad()
    def _conditions(self, prompt: str, negative: bool) -> Batch:
        """Conditions of one prompt, [1, …]."""
        return self._prompts.get((prompt, negative)) or self._encoders.conditions(prompt, negative)

    @torch.no_grad()
    def sample(self, request: SampleRequest) -> list[Sample]:
        """As in `Model`, by diffusers' own pipeline, one image at a time. The VAE is moved to the device for it."""
        request = replace(request, size=request.size or (self.plan.recipe.data.resolution,) * 2)
        images: list[Sample] = []
        self.pipeline.vae.to(self.device)
        try:
            # Sample with the unquantized base, on which the LoRA will be used.
            with (
                whole_weights(self.denoiser),
                torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32),
            ):
                for prompt, seed in zip(request.prompts, request.seeds, strict=True):
                    conditions = (
                        self._conditions(prompt, negative=False),
                        self._conditions(request.negative, negative=True),
                    )
                    images.append(generate(self.pipeline, self.family, request, seed, *conditions))
        finally:  # also when memory runs out, so that training can continue
            self.pipeline.vae.to("cpu")
        return images

    def save(self, folder: Path) -> list[Path]:
        """Write the result.

        LoRA: `pytorch_lora_weights.safetensors`, as `pipeline.load_lora_weights` reads it. Other adapters: PEFT's
        folder for each network. Both: new tokens in `embeddings/`, and `scheduler/` if the recipe changes the noise
        schedule. Otherwise: the whole pipeline.
        """
        if self.plan.recipe.method == "lora":
            return [
                *self._save_adapters(folder),
                *textual_inversion.save(folder, self.plan.recipe.tokens, self._tokens),
            ]
        recipe = self.plan.recipe
        whole = (
            self.pipeline
            if recipe.method == "scratch"
            else loading.open_pipeline(recipe.model, self.family.spec.pipeline, torch.float32)
        )
        for name in (
            self.family.spec.denoiser,
            "scheduler",
            *(name for _, name in self.family.encoders if self._trains_text),
        ):
            setattr(whole, name, getattr(self.pipeline, name))
        whole.save_pretrained(folder)
        if recipe.method == "scratch":  # under the names that other programs know
            for name, encoder in self._encoders.text_encoders.items():
                encoder.save_pretrained(folder / name, state_dict=peft.named_as_in_files(encoder, encoder.state_dict()))
        remove_local_paths(folder)
        return [folder / "model_index.json"]

    def _save_adapters(self, folder: Path) -> list[Path]:
        nets = {name: getattr(self.pipeline, name) for name in self.adapted}
        if changes_schedule(self.plan.recipe):  # with the base's own scheduler, the adapter would give other images
            self.pipeline.scheduler.save_pretrained(folder / "scheduler")
        adapter = self.plan.recipe.adapter
        if adapter is not None and peft.saved_as_folders(self.pipeline, adapter):
            return [peft.save_peft(net, folder / name) for name, net in nets.items()]
        arguments: dict[str, Any] = {}
        for name, net in nets.items():
            arguments |= {
                f"{name}_lora_layers": peft.lora_weights(net),
                f"{name}_lora_adapter_metadata": peft.lora_configuration(net),
            }
        type(self.pipeline).save_lora_weights(folder, **arguments)
        return [folder / LORA_FILE]


def build(plan: Plan, audit: Audit) -> Model:
    """Build the text-to-image model that a plan trains."""
    return TextToImage(plan, audit, family_of(plan.recipe.model.family))

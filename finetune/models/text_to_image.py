"""Text-to-image models of diffusers, trained in their latent space: what all such families share.

A family's own file says how its captions become conditions and how its denoiser is called (`Family`); loading, encoding
and caching, adapters, noise and loss, sampling and saving stand here, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from finetune.data.cache import fingerprint
from finetune.data.scan import Audit
from finetune.engine.draw import Draw
from finetune.errors import UserError
from finetune.models import adapters, loading, smaller
from finetune.models.checkpointing import checkpoint_activations
from finetune.models.denoise import Denoising
from finetune.models.initial import put_on
from finetune.models.quantized import dtype_of, whole_weights
from finetune.models.turn import Batch, Encoders, Model, SampleRequest, Turn, check_sizes
from finetune.models.vocabulary import spelled
from finetune.planning import Plan
from finetune.recipe import Adapter, Diffusion, Recipe
from finetune.recipe import Model as ModelSection
from finetune.seeds import key_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Family(ABC):
    """What is peculiar to one family. `encoders` are its (tokenizer, text encoder) pairs, by their names in the pipeline."""

    pipeline: ClassVar[str]
    denoiser: ClassVar[str] = "unet"
    encoders: ClassVar[tuple[tuple[str, str], ...]] = (("tokenizer", "text_encoder"),)

    @abstractmethod
    def conditions(self, encoders: Mapping[str, nn.Module], ids: Batch) -> Batch:
        """Token ids, {tokenizer: [B, length] int64} → what `predict` needs of the caption."""

    @abstractmethod
    def unread(self, encoders: Mapping[str, nn.Module]) -> list[nn.Module]:
        """Parts of the text encoders that `conditions` does not depend on: no gradient reaches them, so they do not train."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """The denoiser's output [B, C, h, w]. `batch` holds `conditions` and `geometry` [B, 6]."""

    @abstractmethod
    def prompt(self, positive: Batch, negative: Batch) -> dict[str, Tensor]:
        """Conditions as arguments of the pipeline's call."""


class Denoiser(nn.Module):
    """The denoiser, and the text encoders where they train too: one module, so that one wrapper (DDP) holds all."""

    def __init__(self, family: Family, denoiser: nn.Module, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.family, self.denoiser, self.encoders = family, denoiser, nn.ModuleDict(dict(encoders))

    def forward(self, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        if self.encoders:
            batch = batch | self.family.conditions(dict(self.encoders.items()), batch)
        dtype = dtype_of(self.denoiser)
        return self.family.predict(self.denoiser, noisy.to(dtype), timestep, batch)


class DenoiseTurn(Turn):
    name = "denoiser"

    def __init__(self, net: Denoiser, objective: Denoising) -> None:
        self.net = net
        self.objective = objective

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        mean, deviation = batch["mean"].float(), batch["deviation"].float()
        latents = mean + deviation * draw.normal("posterior", mean.shape[1:])
        noised = self.objective.noise(latents, draw)
        return self.objective.error(self.net(noised.sample, noised.timestep, batch), noised, batch.get("mask"))


class CaptionAndLatent(Encoders):
    """The VAE's posterior of a picture, and a caption's conditions, or its token ids where text encoders train."""

    def __init__(
        self, family: Family, pipeline: DiffusionPipeline, device: torch.device, dtype: torch.dtype, section: ModelSection, tokens_only: bool
    ) -> None:
        self._family, self._pipeline, self._device, self._tokens_only = family, pipeline, device, tokens_only
        self._kept_dtype = torch.float32 if dtype == torch.float32 else torch.float16
        vae = pipeline.vae.to(device)
        self.mask_factor = loading.vae_factor(vae)
        self._shift, self._scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
        tiles = ["in tiles"] if section.vae_tiling else []
        self.picture_key = key_of("latent", fingerprint(vae.state_dict()), f"{self._scale} {self._shift}", str(self._kept_dtype), *tiles)
        tokenizers = [getattr(pipeline, name) for name, _ in family.encoders]
        vocabulary = [key_of(t.backend_tokenizer.to_str(), t.model_max_length) for t in tokenizers]
        weights = [] if tokens_only else [fingerprint(encoder.state_dict()) for encoder in self.text_encoders.values()]
        rounded = [section.encoders] if section.encoders in ("nf4", "int8") else []
        self.caption_key = key_of("caption", type(family).__name__, str(dtype), *vocabulary, *weights, *rounded)
        if not tokens_only:
            smaller.fit_encoders(self.text_encoders, section, device)

    @property
    def text_encoders(self) -> dict[str, Any]:
        return {name: getattr(self._pipeline, name) for _, name in self._family.encoders}

    @torch.no_grad()
    def encode_picture(self, pixels: Tensor) -> Batch:
        # The VAE runs in float32 whatever the precision: SDXL's gives NaN in float16, and it runs once a picture.
        posterior = self._pipeline.vae.encode(pixels[None].to(self._device, torch.float32)).latent_dist
        mean, deviation = (posterior.mean[0] - self._shift) * self._scale, posterior.std[0] * self._scale
        return {"mean": mean.to(self._kept_dtype), "deviation": deviation.to(self._kept_dtype)}

    @torch.no_grad()
    def encode_caption(self, caption: str) -> Batch:
        ids = self.token_ids(caption)
        if self._tokens_only:
            return ids
        batch = {name: tensor[None].to(self._device) for name, tensor in ids.items()}
        encoders = {name: encoder.to(self._device) for name, encoder in self.text_encoders.items()}
        return {name: tensor[0].cpu() for name, tensor in self._family.conditions(encoders, batch).items()}

    def token_ids(self, caption: str) -> Batch:
        """{tokenizer: [length] int64}, padded and cut to the tokenizer's length."""
        found = {}
        for name, _ in self._family.encoders:
            tokenizer = getattr(self._pipeline, name)
            found[name] = tokenizer(
                caption, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
            ).input_ids[0]
        return found

    def caption_tokens(self, caption: str) -> tuple[int, int] | None:
        tokenizer = getattr(self._pipeline, self._family.encoders[0][0])
        return len(tokenizer(caption, verbose=False).input_ids), tokenizer.model_max_length

    def tokens(self, caption: str) -> list[str]:
        return spelled(getattr(self._pipeline, self._family.encoders[0][0]), caption)

    def release(self) -> None:
        if not self._tokens_only:
            for name in self.text_encoders:
                setattr(self._pipeline, name, None)
        self._pipeline.vae.to("cpu")
        if self._device.type == "cuda":  # untested where no GPU is at hand
            torch.cuda.empty_cache()


def changes_schedule(recipe: Recipe) -> bool:
    """Whether pictures are drawn with another scheduler than the base's own."""
    return recipe.model.prediction is not None or (recipe.diffusion is not None and recipe.diffusion.zero_terminal_snr)


def set_schedule(pipeline: DiffusionPipeline, recipe: Recipe) -> None:
    """Change the pipeline's scheduler as the recipe says; for training and for drawing with what was trained.

    Raises:
        UserError: zero terminal SNR is wanted of a model that predicts the noise.
    """
    if recipe.model.prediction is not None:
        pipeline.scheduler.register_to_config(prediction_type=recipe.model.prediction)
    if recipe.diffusion is not None and recipe.diffusion.zero_terminal_snr:
        if pipeline.scheduler.config.prediction_type == "epsilon":
            raise UserError(
                "zero_terminal_snr needs a model that predicts v, and this checkpoint predicts ε",
                where="diffusion.zero_terminal_snr",
                remedy="remove it, or set model.prediction: v_prediction and train long enough to turn the model over",
            )
        # Schedulers that never clip do not say so, and DDIM's default is to clip, which is meant for pixels.
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
        )


def decode(pipeline: DiffusionPipeline, latents: Tensor) -> Image.Image:
    """The picture of `latents` [1, C, h, w]; in float32 whatever the precision, as pictures are encoded."""
    vae = pipeline.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with torch.autocast(latents.device.type, enabled=False):
        pixels = vae.decode(latents.float() / vae.config.scaling_factor + shift, return_dict=False)[0]
    found: Image.Image = pipeline.image_processor.postprocess(pixels)[0]
    return found


def draw(pipeline: Any, request: SampleRequest, seed: int, **arguments: Any) -> Image.Image:
    """One picture from its own seed: while training and afterwards alike. `arguments` are the pipeline's: prompt or conditions, size."""
    latents = pipeline(
        **arguments,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images
    return decode(pipeline, latents)


class TextToImage(Model):
    """Args:
    family: what is peculiar to it.
    """

    def __init__(self, plan: Plan, audit: Audit, family: Family) -> None:
        recipe = plan.recipe
        if recipe.autoencoder is not None:
            raise UserError("the `autoencoder` section is for the family vae", where="autoencoder", remedy="remove the section")
        torch.manual_seed(recipe.train.seed)
        self.plan, self.family = plan, family
        self.device = torch.device(plan.machine.device)
        self.dtype = DTYPES[plan.precision]
        frozen_dtype = self.dtype if recipe.method == "lora" else DTYPES[recipe.train.weights]
        self.pipeline = (
            loading.assemble(plan, audit, family)
            if recipe.method == "scratch"
            else loading.open_pipeline(recipe.model, family.pipeline, frozen_dtype)
        )
        self.pipeline.set_progress_bar_config(disable=True)
        check_sizes(plan, loading.vae_factor(self.pipeline.vae))
        set_schedule(self.pipeline, recipe)
        self.denoiser: nn.Module = getattr(self.pipeline, family.denoiser).to(memory_format=torch.channels_last)
        self._trains_text = recipe.model.train_text_encoder or recipe.method == "scratch"
        trained_encoders = {name: getattr(self.pipeline, name) for _, name in family.encoders} if self._trains_text else {}
        self.adapted = self._choose_what_trains(recipe.adapter, trained_encoders)
        net = Denoiser(family, self.denoiser, trained_encoders)
        scheduler = self.pipeline.scheduler
        objective = Denoising(scheduler.alphas_cumprod, scheduler.config.prediction_type, recipe.diffusion or Diffusion())
        self._turns = (DenoiseTurn(net, objective),)
        smaller.tile(self.pipeline.vae, recipe.model)
        self._encoders = CaptionAndLatent(family, self.pipeline, self.device, self.dtype, recipe.model, tokens_only=self._trains_text)
        self._prompts: dict[str, Batch] = {}

    def _choose_what_trains(self, adapter: Adapter | None, encoders: Mapping[str, nn.Module]) -> dict[str, list[str]]:
        """Freeze all but what trains; returns the adapted layers by net."""
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False)
        trained = {self.family.denoiser: self.denoiser, **encoders}
        smaller.quantize_base(self.denoiser, self.plan.recipe, self.dtype, self.device)
        adapted = put_on(self.pipeline, trained, adapter) if adapter is not None and adapter.init else {}
        net: Any
        for name, net in trained.items():
            if adapter is not None and name not in adapted:
                adapted[name] = adapters.add_adapter(net, adapter)
            elif adapter is None:
                net.requires_grad_(True)
            checkpoint_activations(net, self.plan.recipe.train.checkpointed)
        if adapter is not None:
            adapters.check_patterns(adapter, [name for names in adapted.values() for name in names])
        smaller.offload_base(self.denoiser, self.plan.recipe, self.device)
        for part in self.family.unread(encoders) if encoders else ():
            part.requires_grad_(False)
        return adapted

    def turns(self) -> tuple[Turn, ...]:
        return self._turns

    def encoders(self) -> Encoders:
        sample = self.plan.recipe.sample
        if not self._trains_text:  # the text encoders will be gone when the samples are drawn
            self._prompts = {prompt: self._encoders.encode_caption(prompt) for prompt in {*sample.prompts, sample.negative}}
        return self._encoders

    def _conditions(self, prompt: str) -> Batch:
        """Conditions of one prompt, [1, …] on the device."""
        if prompt in self._prompts:
            return {name: tensor[None].to(self.device) for name, tensor in self._prompts[prompt].items()}
        ids = {name: tensor[None].to(self.device) for name, tensor in self._encoders.token_ids(prompt).items()}
        return self.family.conditions(self._encoders.text_encoders, ids)

    @torch.no_grad()
    def sample(self, request: SampleRequest) -> list[Image.Image]:
        width, height = request.size or (self.plan.recipe.data.resolution,) * 2
        found = []
        self.pipeline.vae.to(self.device)
        try:
            # A quantised base draws as the whole one does: on that, the LoRA will be used.
            with whole_weights(self.denoiser), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                for prompt, seed in zip(request.prompts, request.seeds, strict=True):
                    conditions = self.family.prompt(self._conditions(prompt), self._conditions(request.negative))
                    found.append(draw(self.pipeline, request, seed, width=width, height=height, **conditions))
        finally:  # also when memory ran out, so that training, which goes on, has it back
            self.pipeline.vae.to("cpu")
        return found

    def save(self, folder: Path) -> list[Path]:
        """LoRA: `pytorch_lora_weights.safetensors`, as `pipeline.load_lora_weights` reads it. Other adapters: PEFT's folder for each net.
        Else: the whole pipeline.

        Beside an adapter lies `scheduler/` if the recipe draws with another than the base's.
        """
        if self.plan.recipe.method == "lora":
            return self._save_adapters(folder)
        recipe = self.plan.recipe
        whole = self.pipeline if recipe.method == "scratch" else loading.open_pipeline(recipe.model, self.family.pipeline, torch.float32)
        for name in (self.family.denoiser, "scheduler", *(name for _, name in self.family.encoders if self._trains_text)):
            setattr(whole, name, getattr(self.pipeline, name))
        whole.save_pretrained(folder)
        if recipe.method == "scratch":  # what was loaded from a file is saved under that file's names
            for name, encoder in self._encoders.text_encoders.items():
                encoder.save_pretrained(folder / name, state_dict=adapters.named_as_in_files(encoder, encoder.state_dict()))
        return [folder / "model_index.json"]

    def _save_adapters(self, folder: Path) -> list[Path]:
        nets = {name: getattr(self.pipeline, name) for name in self.adapted}
        if changes_schedule(self.plan.recipe):  # with the base's own, this adapter would draw other pictures
            self.pipeline.scheduler.save_pretrained(folder / "scheduler")
        if self.plan.recipe.adapter is not None and self.plan.recipe.adapter.kind != "lora":
            return [adapters.save_peft(net, folder / name) for name, net in nets.items()]
        arguments: dict[str, Any] = {}
        for name, net in nets.items():
            arguments |= {f"{name}_lora_layers": adapters.lora_weights(net), f"{name}_lora_adapter_metadata": adapters.lora_configuration(net)}
        type(self.pipeline).save_lora_weights(folder, **arguments)
        return [folder / loading.LORA_FILE]

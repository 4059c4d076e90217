"""Python code that generates an image with a run's result, in plain diffusers. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.adapters.kinds import kind_of
from finetune.models.registry import load_implementation, spec_of
from finetune.paths import embedded
from finetune.planning import Plan


def usage(plan: Plan, base: str, weights: str) -> str:
    """The code; "" if diffusers has no pipeline for the family.

    Args:
        base: the base model of a LoRA, as the code shall name it.
        weights: the folder with the trained weights, likewise.
    """
    recipe = plan.recipe
    if recipe.model.family == "autoencoder-kl":
        return f"from diffusers import AutoencoderKL\n\nvae = AutoencoderKL.from_pretrained({weights!r})"
    name = spec_of(recipe.model.family).pipeline
    if not name:
        return ""
    prompt = recipe.sample.prompts[0] if recipe.sample.prompts else "…"
    draw = f"pipeline({prompt!r}, guidance_scale={recipe.sample.guidance:g}).images[0].save('image.png')"
    if recipe.method != "lora":
        return f"from diffusers import {name}\n\npipeline = {name}.from_pretrained({weights!r})\n{draw}"
    single = base.endswith((".safetensors", ".ckpt"))
    lines = [
        f"pipeline = {name}.from_{'single_file' if single else 'pretrained'}({base!r})",
        f"pipeline.load_lora_weights({weights!r})",
        draw,
    ]
    imported, more = name, ""
    # PEFT's folders, one per network, which PEFT changes in place.
    if recipe.adapter is not None and not kind_of(recipe.adapter).has_lora_file:
        more = "from pathlib import Path\n\nfrom peft import PeftModel\n"
        lines[1] = f"for config in Path({weights!r}).glob('*/adapter_config.json'):\n"
        lines[1] += "    PeftModel.from_pretrained(getattr(pipeline, config.parent.name), config.parent)"
    lines[2:2] = [
        line for new in recipe.tokens for line in _word(new.token, f"{weights}/{new.file}", recipe.model.family)
    ]
    if changes := _schedule(plan):  # a LoRA file cannot contain the noise schedule that it was trained with
        imported = f"DDIMScheduler, {name}"
        told = ", ".join(f"{key}={value!r}" for key, value in changes.items())
        lines.insert(1, f"pipeline.scheduler = DDIMScheduler.from_config(\n    pipeline.scheduler.config, {told}\n)")
    reads = "\nfrom safetensors.torch import load_file" if any("load_file" in line for line in lines) else ""
    return f"{more}from diffusers import {imported}{reads}\n\n" + "\n".join(lines)


def _word(token: str, file: str, family: str) -> list[str]:
    """Lines that load a new token; SDXL's two text encoders have separate embeddings."""
    if len(load_implementation(family).encoders) == 1:
        return [f"pipeline.load_textual_inversion({file!r}, token={token!r})"]
    first = "text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer"
    second = "text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2"
    return [
        f"words = load_file({file!r})",
        f"pipeline.load_textual_inversion(words['clip_l'], token={token!r}, {first})",
        f"pipeline.load_textual_inversion(words['clip_g'], token={token!r}, {second})",
    ]


def _schedule(plan: Plan) -> dict[str, object]:
    """Settings that the recipe changes in the base's scheduler; {} if a local base is known to have them already."""
    recipe = plan.recipe
    wanted: dict[str, object] = {"prediction_type": recipe.model.prediction} if recipe.model.prediction else {}
    if recipe.diffusion is not None and recipe.diffusion.zero_terminal_snr:
        wanted |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    file = Path(embedded(recipe.model.path or "")) / "scheduler" / "scheduler_config.json"
    there = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return wanted if any(there.get(key) != value for key, value in wanted.items()) else {}

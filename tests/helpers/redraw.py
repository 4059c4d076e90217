"""Generate samples from runs with plain diffusers and PEFT. Run in a fresh process; imports nothing of this project.

    python redraw.py JOBS.json

Each job: `artifact` (a LoRA's folder or a whole model), `base` (the LoRA's pipeline), `sample` (the trainer's last
image), `out` (the image to write), `prompt`, `seed`, `steps`, `arguments` (further arguments of the pipeline's call),
`bool_masks` (see `make_masks_boolean`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def redraw(job: dict[str, Any]) -> Any:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
    from peft import PeftModel

    if job["prompt"] is None:  # an autoencoder: the upper image is the input, the lower one its reconstruction
        import numpy
        from PIL import Image

        vae = AutoencoderKL.from_pretrained(job["artifact"])
        pair = torch.from_numpy(numpy.array(Image.open(job["sample"]))).permute(2, 0, 1)[None] / 127.5 - 1
        above = pair[:, :, : pair.shape[2] // 2]
        with torch.no_grad():
            below = vae.decode(vae.encode(above).latent_dist.mode()).sample.clamp(-1, 1)
        return Image.fromarray(
            torch.cat([above, below], 2)[0].add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
        )
    pipeline = DiffusionPipeline.from_pretrained(job["base"] or job["artifact"])
    if job["base"]:
        adapters = sorted(Path(job["artifact"]).glob("*/adapter_config.json"))
        for config in adapters:  # of a kind without a diffusers file: PEFT changes the network in place
            PeftModel.from_pretrained(getattr(pipeline, config.parent.name), config.parent)
        if not adapters:
            pipeline.load_lora_weights(job["artifact"])
        if (Path(job["artifact"]) / "scheduler").is_dir():
            pipeline.scheduler = DDIMScheduler.from_pretrained(job["artifact"], subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    if job.get("bool_masks"):
        make_masks_boolean(pipeline)
    return pipeline(
        prompt=job["prompt"],
        **job["arguments"],
        num_inference_steps=job["steps"],
        generator=torch.Generator().manual_seed(job["seed"]),
        height=32,
        width=32,
    ).images[0]


def make_masks_boolean(pipeline: Any) -> None:
    """Make float masks boolean: attention adds float masks to its scores as they are (huggingface/diffusers #13619)."""
    encode = pipeline.encode_prompt

    def with_masks(**arguments: Any) -> Any:
        return tuple(
            part.bool() if part is not None and part.dim() == 2 and len(part) == 1 else part
            for part in encode(**arguments)
        )

    pipeline.encode_prompt = with_masks


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        redraw(job).save(job["out"])
    assert not any(name.partition(".")[0] == "finetune" for name in sys.modules)


if __name__ == "__main__":
    main()

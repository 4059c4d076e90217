"""How fast the LoRA of the demo trains here, and what makes it so.

    python scripts/bench_train.py [--rounds 5] [--steps 4]

Prints, from one run: steps a second of `recipes/lora/emoji.yaml`; the share of a step's wall time spent outside forward,
backward and optimizer; the ratio to the same training written the usual way (diffusers' training example: pictures and
captions encoded at every step, torch's default optimizer and memory format, the same batch, resolution, layers, rank),
at the recipe's batch and at batch 1; and what each of our choices brings, by undoing it. Contenders take turns in rounds,
so that whatever else the machine does slows them alike; the median round counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.data.dataset import to_tensor
from finetune.data.pictures import apply, decode
from finetune.job import Job, prepare
from finetune.models import adapters
from finetune.models.loading import open_pipeline
from finetune.recipe import Recipe, load_recipe

TRAINING = ("forward", "backward", "optimizer")


def ours(recipe: Recipe, folder: Path) -> Job:
    """The project's own run, ready to step, its tables and progress kept quiet."""
    return prepare(dataclasses.replace(recipe, output=dataclasses.replace(recipe.output, folder=str(folder))))


def usual(recipe: Recipe, job: Job) -> Callable[[int], None]:
    """The same training as diffusers' text-to-image LoRA example writes it: nothing kept between steps."""
    pipeline = open_pipeline(recipe.model, "StableDiffusionPipeline", torch.float32)
    for net in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        net.requires_grad_(False)
    adapter = recipe.adapter
    assert adapter is not None
    names = adapters.layers(pipeline.unet, adapter.targets)
    alpha = adapter.alpha or adapter.rank
    pipeline.unet.add_adapter(LoraConfig(r=adapter.rank, lora_alpha=alpha, target_modules=names, init_lora_weights="gaussian"))
    trained = [p for p in pipeline.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.optimizer.lr)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    pictures = job.audit.training
    pipeline.unet.train()

    def step(number: int) -> None:
        size = recipe.train.batch_size
        chosen = [pictures[i % len(pictures)] for i in range(number * size, (number + 1) * size)]
        pixels = torch.stack([to_tensor(numpy.asarray(apply(decode(p.read(), "white"), p.crop))) for p in chosen])
        ids = pipeline.tokenizer([p.caption for p in chosen], padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
            hidden = pipeline.text_encoder(ids)[0]
        noise = torch.randn_like(latents)
        timestep = torch.randint(0, scheduler.config.num_train_timesteps, (size,))
        noisy = scheduler.add_noise(latents, noise, timestep)
        predicted = pipeline.unet(noisy, timestep, hidden).sample
        target: Tensor = scheduler.get_velocity(latents, noise, timestep)
        loss = torch.nn.functional.mse_loss(predicted, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def rounds(contenders: dict[str, Callable[[int], object]], count: int, steps: int) -> dict[str, float]:
    """Median seconds a step of each contender; they take turns. One untimed step each warms up."""
    for take_step in contenders.values():
        take_step(0)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(count):
        for name, take_step in contenders.items():
            start = time.perf_counter()
            for step in range(steps):
                take_step(1 + number * steps + step)
            seconds[name].append((time.perf_counter() - start) / steps)
    return {name: statistics.median(values) for name, values in seconds.items()}


def undone(job: Job, what: str) -> Job:
    """Our run with one choice taken back."""
    state = job.trainer.state
    if what == "channels_last":
        state.turns[0].net.get_submodule("denoiser").to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    elif what == "fused AdamW":
        for group in state.optimizers[0].optimizer.param_groups:
            group["fused"] = False
    return job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps a round")
    given = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for batch in (None, 1):
        recipe = load_recipe("lora/emoji", [f"train.batch_size={batch}"] if batch else [])
        with tempfile.TemporaryDirectory() as folder:
            job = ours(recipe, Path(folder) / "ours")
            contenders: dict[str, Callable[[int], object]] = {"ours": job.trainer.take, "the usual way": usual(recipe, job)}
            for what in ("channels_last", "fused AdamW"):
                contenders[f"ours without {what}"] = undone(ours(recipe, Path(folder) / what), what).trainer.take
            found = rounds(contenders, given.rounds, given.steps)
            outside = share_outside(job, given.rounds * given.steps)
        print(f"\nbatch {recipe.train.batch_size}: {1 / found['ours']:.2f} steps/s ({found['ours']:.3f} s a step)")
        print(f"  outside forward, backward and optimizer: {100 * outside:.1f} % of a step (goal ≤ 3 %)")
        for name, seconds in found.items():
            if name != "ours":
                print(f"  {name}: {seconds:.3f} s a step, ours is {seconds / found['ours']:.2f} × as fast")


def share_outside(job: Job, steps: int) -> float:
    """Share of wall time that the clock books on anything but forward, backward and optimizer, over steps taken in a row."""
    clock = job.trainer.clock
    clock.lap("before")
    clock.seconds.clear()
    for step in range(steps):
        job.trainer.take(step)
    return 1 - sum(clock.seconds[what] for what in TRAINING) / sum(clock.seconds.values())


if __name__ == "__main__":
    main()

"""Training speed of the demo's LoRA on this machine, and what each optimization contributes.

    python benchmarks/bench_train.py [--rounds 5] [--steps 4]

Prints: steps per second of `recipes/lora/emoji.yaml`, without self-distillation (`distill_every`), so that all steps
are like those of diffusers' example; the share of wall time outside forward, backward and optimizer; the speed
relative to the usual training script (diffusers' example: images and captions encoded at every step, torch's default
optimizer and memory format, with the same batch, resolution, layers and rank), at the recipe's batch size and at
batch 1; and the contribution of each optimization, by turning it off. Variants run in processes of their own and
alternate in rounds. Figures are the median round's ratio of CPU time of the training thread, since other programs
only affect wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, final

import numpy
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune import kernels
from finetune.adapters import peft
from finetune.config.loader import load_recipe
from finetune.config.schema import Recipe
from finetune.data.decoding import to_tensor
from finetune.data.media.image import apply, decode
from finetune.estimate.hardware import cpu
from finetune.job import Job, audit_and_plan, prepare
from finetune.models.pretrained.loading import open_pipeline

TRAINING = ("forward", "backward", "optimizer")
KERNELS = {"packed convolutions": "onednn_conv", "plain U-Net blocks": "unet_blocks", "fused LoRA layers": "fused_lora"}
UNDONE = ("memory kept", *KERNELS, "channels_last", "fused AdamW")
CONTENDERS: dict[str, str | None] = {"ours": "", "the usual way": None} | {
    f"ours without {what}": what for what in UNDONE
}


def usual(recipe: Recipe) -> Callable[[int], None]:
    """The same training as in diffusers' text-to-image LoRA example: nothing is cached between steps."""
    pipeline = open_pipeline(recipe.model, "StableDiffusionPipeline", torch.float32)
    for net in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        net.requires_grad_(False)
    adapter = recipe.adapter
    assert adapter is not None
    names = peft.layers(pipeline.unet, adapter.targets)
    alpha = adapter.alpha or adapter.rank
    pipeline.unet.add_adapter(
        LoraConfig(r=adapter.rank, lora_alpha=alpha, target_modules=names, init_lora_weights="gaussian")
    )
    trained = [p for p in pipeline.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.optimizer.lr)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    images = audit_and_plan(recipe, quiet=True)[0].training
    pipeline.unet.train()

    def step(number: int) -> None:
        size = recipe.train.batch_size
        chosen = [images[i % len(images)] for i in range(number * size, (number + 1) * size)]
        pixels = torch.stack([to_tensor(numpy.asarray(apply(decode(p.read(), "white"), p.crop))) for p in chosen])
        ids = pipeline.tokenizer(
            [p.caption for p in chosen], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
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


def ours(recipe: Recipe, folder: Path, without: str = "") -> Job:
    """The project's own run, ready to step, with one optimization turned off if given."""
    if without in KERNELS:  # this process trains nothing else
        os.environ[kernels.VARIABLE] = f"-{KERNELS[without]}"
    elif without == "memory kept":
        setattr(cpu, "ctypes", SimpleNamespace(CDLL=lambda name: None))  # noqa: B010 (this process does nothing else)
    job = prepare(dataclasses.replace(recipe, output=dataclasses.replace(recipe.output, folder=str(folder))))
    state = job.trainer.state
    if without == "channels_last":
        state.train_steps[0].net.get_submodule("denoiser").to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    elif without == "fused AdamW":
        for group in state.optimizers[0].optimizer.param_groups:
            group["fused"] = False
    return job


class Taken(NamedTuple):
    """Seconds that some steps took: of the wall clock; of them outside forward, backward and optimizer; of the
    processor, in this thread.
    """

    wall: float
    outside: float
    own: float


@final
class Contender:
    """One variant, in its own process, so that its memory does not affect the others."""

    def __init__(self, recipe: Recipe, without: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, recipe, without), daemon=True)
        self._process.start()
        self.take(1)

    def take(self, steps: int) -> Taken:
        self._ours.send(steps)
        found: Taken = self._ours.recv()
        return found

    def end(self) -> None:
        self._ours.close()
        self._process.join()


def _serve(connection: Connection, recipe: Recipe, without: str | None) -> None:
    """Train one variant. `without`: see `ours`; None is the usual training script."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(EOFError):
        job = ours(recipe, Path(folder), without) if without is not None else None
        take_step: Callable[[int], object] = job.trainer.train_step if job else usual(recipe)
        taken = 0
        while True:
            count = connection.recv()
            start, began, outside = time.perf_counter(), time.thread_time(), 0.0
            if job:
                job.trainer.clock.lap("waiting")
                job.trainer.clock.seconds.clear()
            for step in range(taken, taken + count):
                take_step(step)
            if job:
                outside = sum(seconds for what, seconds in job.trainer.clock.seconds.items() if what not in TRAINING)
            connection.send(Taken(time.perf_counter() - start, outside, time.thread_time() - began))
            taken += count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps a round")
    given = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for batch in (None, 1):
        recipe = load_recipe(
            "lora/emoji", ["adapter.distill_every=null", *([f"train.batch_size={batch}"] if batch else [])]
        )
        contenders = {name: Contender(recipe, without) for name, without in CONTENDERS.items()}
        taken: dict[str, list[Taken]] = {name: [] for name in contenders}
        for number in range(given.rounds):
            for name in list(contenders)[
                :: -1 if number % 2 else 1
            ]:  # there and back, so that none follows always the same one
                taken[name].append(contenders[name].take(given.steps))
        for contender in contenders.values():
            contender.end()
        mine = taken["ours"]
        seconds = statistics.median(one.wall for one in mine) / given.steps
        outside = sum(one.outside for one in mine) / sum(one.wall for one in mine)
        print(f"\nbatch {recipe.train.batch_size}: {1 / seconds:.2f} steps/s ({seconds:.3f} s a step)")
        print(f"  outside forward, backward and optimizer: {100 * outside:.1f} % of a step (goal ≤ 3 %)")
        for name, others in taken.items():
            if name != "ours":
                ratio = statistics.median(other.own / one.own for one, other in zip(mine, others, strict=True))
                print(f"  {name}: ours is {ratio:.2f} × as fast")


if __name__ == "__main__":
    main()

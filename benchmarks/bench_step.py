"""Launches, memory traffic and FLOPs of a LoRA step: ours against diffusers' training examples with PEFT.

    python benchmarks/bench_step.py

Counted on fake tensors as CUDA would run the step: needs no GPU and no weights. The examples are
train_text_to_image_lora_sdxl.py and train_dreambooth_lora_flux2_klein.py, starting from cached latents and embeddings,
with float32 adapters on a bfloat16 base model. Each further row adds one change; the last is what the trainer does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune import kernels
from finetune.config.loader import load_recipe
from finetune.config.schema import Recipe
from finetune.data.batch import Batch
from finetune.estimate.tracing import stubs
from finetune.estimate.tracing.cuda_mode import cuda, fake_tensors
from finetune.estimate.tracing.denoiser import DenoiserModel, DenoiserTrainStep, load
from finetune.estimate.tracing.recorder import Operator, Recorder, reading
from finetune.estimate.tracing.skeletons import skeletons
from finetune.estimate.tracing.traced_run import FakeDataset, TracedRun
from finetune.models.base import TrainStep
from finetune.models.objectives.noise_prediction import Denoising
from finetune.models.pretrained.denoising import DenoiseStep
from finetune.replaceable import patched
from finetune.terminal import silence_libraries

GOAL = 0.80  # of the examples' launches
PARTS = ("forward", "backward", "optimizer")
FLUX_TARGETS = "to_q, to_k, to_v, to_out.0, to_qkv_mlp_proj, single_transformer_blocks.*attn.to_out"  # as the example's


class Step(NamedTuple):
    """One step's operators, by part."""

    parts: dict[str, list[Operator]]

    @property
    def launches(self) -> int:
        return sum(map(len, self.parts.values()))

    def total(self, what: str) -> int:
        return sum(getattr(operator, what) for operators in self.parts.values() for operator in operators)


# -- the examples' step
# ---------------------------------------------------------------------------------------------------


def example(subject: TracedRun, trained: torch.dtype) -> Step:
    """The step of diffusers' examples on the same network that the recipe trains, with PEFT's layers."""
    with _as_on_cuda() as mode, kernels.without(*ALL):
        model = subject.build()
        train_step = model.train_steps()[0]
        _, made = subject.encode(model)
        batch = FakeDataset(made).batch(0, (0,) * subject.plan.recipe.train.batch_size, None)  # type: ignore[arg-type]
        parameters = train_step.parameters()
        for parameter in parameters:
            parameter.data = parameter.data.to(trained)
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True)  # AdamW's default on CUDA
        train_step.net.train()
        gc.collect()
        with Recorder() as recorder:
            for _ in range(2):  # the first makes the optimizer's state
                recorder.sections.clear()
                recorder.section("forward")
                with mode.autocast(torch.bfloat16):
                    loss = example_loss(train_step, batch)
                recorder.section("backward")
                loss.backward()
                recorder.section("optimizer")
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return Step({section.name: section.operators for section in recorder.sections})


def example_loss(train_step: TrainStep, batch: Batch) -> Tensor:
    """Noising, forward pass and loss as in the examples."""
    latents = batch["latents" if isinstance(train_step, DenoiserTrainStep) else "mean"].to(torch.bfloat16)
    noise = torch.randn_like(latents)
    if isinstance(train_step, DenoiseStep):
        assert isinstance(train_step.objective, Denoising)
        table, timesteps = (
            train_step.objective.alphas_cumprod.to(torch.bfloat16),
            torch.randint(0, 1000, (len(latents),)),
        )
        signal, sigma = table[timesteps] ** 0.5, (1 - table[timesteps]) ** 0.5  # DDPMScheduler.add_noise
        noisy = signal.view(-1, 1, 1, 1) * latents + sigma.view(-1, 1, 1, 1) * noise
        return nn.functional.mse_loss(train_step.net(noisy, timesteps, batch).float(), noise.float(), reduction="mean")
    assert isinstance(train_step, DenoiserTrainStep)
    sigmas = torch.rand(len(latents)).to(torch.bfloat16).view(-1, *(1,) * (latents.dim() - 1))
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    inputs = train_step._inputs
    given = {name: batch[name].to(torch.bfloat16) for name in inputs.conditions} | inputs.fixed(len(latents))
    with reading(inputs.integers):
        predicted = train_step.net(
            **{inputs.names[0]: noisy, inputs.names[1]: sigmas.flatten()}, **given, return_dict=False
        )[0]
    weighting, target = torch.ones_like(sigmas), noise - latents
    return torch.mean(
        (weighting.float() * (predicted.float() - target.float()) ** 2).reshape(len(target), -1), 1
    ).mean()


# -- ours, change by change
# -----------------------------------------------------------------------------------------------


def ours(subject: TracedRun, *off: str) -> Step:
    """The trainer's own step without the kernels and options `off`."""
    with kernels.without(*off):
        sections = subject.phases(only_training=True)["train"].sections
    last = max(number for number, section in enumerate(sections) if section.name == "forward")
    return Step({section.name: section.operators for section in sections[last:] if section.name in PARTS})


def without_casts(subject: TracedRun) -> Step:
    """The trainer's step with PEFT's layers, whose input stays in the base's precision: autocast would only cast it
    back.
    """

    def disable_casts(name: str, net: nn.Module) -> None:
        for module in net.modules():
            if isinstance(module, Linear):
                module.cast_input_dtype_enabled = False

    with patched(kernels, "apply", disable_casts):  # the step without kernels, but with this
        return ours(subject, *ALL)


ALL = tuple(kernels.KERNELS)
ROWS: dict[str, Callable[[TracedRun], Step]] = {
    "diffusers + PEFT": lambda subject: example(subject, torch.float32),
    "our loop: one fused AdamW, noise in float32": lambda subject: ours(subject, *ALL),
    "+ no input to float32 and back": without_casts,
    "+ B, scale and sum one product; A and B cast as one": lambda subject: ours(
        subject, "fused_lora.shared_input", "rope", "unet_blocks"
    ),
    "+ q, k and v share the cast and A's product": lambda subject: ours(subject, "rope", "unet_blocks"),
    "+ rotary embeddings as one complex product each": lambda subject: ours(subject, "rope.cast", "unet_blocks"),
    "+ queries and keys rounded before attention's cast": lambda subject: ours(subject, "unet_blocks"),
    "+ blocks without layouts and divisions that do nothing": ours,
    "for comparison: diffusers + PEFT, bfloat16 adapters": lambda subject: example(subject, torch.bfloat16),
}


@contextlib.contextmanager
def _as_on_cuda() -> Iterator[Any]:
    with fake_tensors(), skeletons(), stubs.in_place("cuda"), cuda() as mode:
        yield mode


def subjects(checkpointing: bool) -> dict[str, TracedRun]:
    """SDXL and FLUX.2 klein at 1024², batch 1, LoRA of rank 16 on the layers that the examples adapt."""
    more = ["train.accumulation=1", f"train.gradient_checkpointing={str(checkpointing).lower()}"]
    sdxl, klein = load_recipe("lora/sdxl", more), load("flux2-klein-4b")
    flux: Recipe = dataclasses.replace(sdxl, adapter=dataclasses.replace(sdxl.adapter, targets=FLUX_TARGETS))  # type: ignore[type-var]
    size = (1024, 1024)
    return {
        "SDXL": TracedRun(sdxl, "bfloat16", size),
        klein.title: TracedRun(flux, "bfloat16", size, build=lambda plan: DenoiserModel(plan, klein, size)),
    }


@click.command()
@click.option("--checkpointing", is_flag=True, help="With activation checkpointing of every block.")
@click.option("--only", type=click.Choice(["sdxl", "flux"]), help="One of the two.")
def main(checkpointing: bool, only: str | None) -> None:
    """Print a table for each network, with a row for each change."""
    silence_libraries()
    reached = True
    for title, subject in subjects(checkpointing).items():
        if only and only not in title.lower():
            continue
        print(f"\n{title}, 1024², batch 1, rank 16" + (", checkpointing" if checkpointing else ""))
        print(
            f"{'':54}{'launches':>9}{'of it':>7}{'share':>8}{'forward':>9}{'backward':>9}{'optimizer':>10}"
            f"{'GB moved':>10}{'TFLOPs':>8}"
        )
        first = before = 0
        for name, take in ROWS.items():
            step = take(subject)
            first = first or step.launches
            share = f"{(step.launches - before) / first:+.1%}" if before and not name.startswith("for") else ""
            parts = [len(step.parts[part]) for part in PARTS]
            numbers = (
                f"{parts[0]:>9,}{parts[1]:>9,}{parts[2]:>10,}{step.total('bytes') / 1e9:>10.1f}"
                f"{step.total('flops') / 1e12:>8.2f}"
            )
            print(f"{name:54}{step.launches:>9,}{step.launches / first:>7.1%}{share:>8}{numbers}", flush=True)
            if not name.startswith("for"):
                before = step.launches
        reached &= before <= GOAL * first
    print(f"\ngoal: ≤ {GOAL:.0%} of the launches: {'reached' if reached else 'not reached'}")
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()

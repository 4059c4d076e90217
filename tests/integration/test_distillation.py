"""`adapter.distill_every`: in one of n steps, the target is the base's prediction at the noisiest 1/n of the levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from finetune.job import prepare
from finetune.models.pretrained.denoising import DenoiseStep
from finetune.models.pretrained.model import TextToImage
from finetune.rng import Draw
from tests.helpers import tiny

CASES = {
    "sd15": ("adapter.targets='to_q, to_k, conv1'",),
    "sdxl": ("adapter.dora=true",),
    "sd21": ("adapter.kind=oft", "adapter.rank=8"),
    "flux2": (
        "model.quantize=int8",
        "adapter.targets=attention+mlp",
        "train.offload_blocks=true",
        "train.gradient_checkpointing=true",
    ),
    "sd3": ("flow={sampling: mode}", "data.held_out=0.3"),
}


def perturb(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Change the adapters, which start as zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", CASES)
def test_distillation_step_compares_adapter_and_base_at_high_noise(name: str, tmp_path: Path) -> None:
    """Its loss is the mean square of the adapter's effect, as given by PEFT's own switch.

    Other steps have the usual loss.
    """
    job = prepare(
        tiny.recipe(
            name, "lora", "adapter.distill_every=4", "train.batch_size=2", *CASES[name], folder=tmp_path / "run"
        )
    )
    model = cast(TextToImage, job.model)
    train_step = cast(DenoiseStep, model.train_steps()[0])
    trained = job.model.trained()
    batch = job.data.batch(0, (0, 1), Draw(0, 0, (0, 1)))
    assert train_step.cycle == 4
    torch.testing.assert_close(train_step.loss(batch, Draw(0, 3, (0, 1))), torch.zeros(2), atol=1e-9, rtol=0)
    perturb(trained)

    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    hook = train_step.net.register_forward_hook(lambda net, given, found: seen.append((given[0], given[1], found)))
    loss = train_step.loss(batch, Draw(0, 3, (0, 1)))
    (noisy, timestep, base), (again, _, said) = seen
    assert torch.equal(noisy, again)
    assert not base.requires_grad
    denoiser: Any = model.denoiser
    denoiser.disable_adapters()
    with torch.no_grad():
        torch.testing.assert_close(base, train_step.net(noisy, timestep, batch))
    denoiser.enable_adapters()
    torch.testing.assert_close(loss, (said - base).float().square().flatten(1).mean(1))
    assert float(loss.detach().min()) > 1e-6
    loss.sum().backward()
    assert all(parameter.grad is not None for parameter in trained.values())
    assert all(
        parameter.grad is None
        for key, parameter in train_step.net.named_parameters()
        if f"denoiser.{key}" not in trained
    )

    seen.clear()
    for step in range(3):
        train_step.loss(batch, Draw(0, step, (0, 1)))
    assert len(seen) == 3, "ordinary steps must not run the base"
    assert max(float(given.max()) for _, given, _ in seen) <= float(timestep.min()), (
        "ordinary steps take lower noise levels"
    )
    train_step.net.eval()
    seen.clear()
    train_step.loss(batch, Draw(0, 3, (0, 1)))
    assert len(seen) == 1, "validation must have the usual loss"
    hook.remove()

"""The training step on fake tensors as on a GPU: autocast, kernels, 8-bit state; and every denoiser config."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import bitsandbytes
import pytest
import torch

from finetune.config.loader import load_recipe
from finetune.estimate.architecture import DENOISERS
from finetune.estimate.tracing import stubs
from finetune.estimate.tracing.cuda_mode import cuda, fake_tensors
from finetune.estimate.tracing.denoiser import Denoiser, DenoiserModel, load
from finetune.estimate.tracing.recorder import Recorder
from finetune.estimate.tracing.traced_run import TracedRun

# -- the emulation ----------------------------------------------------------------------------------------------------


def test_emulated_autocast_casts_as_cuda_does() -> None:
    """Linear layers in bfloat16, norms and powers in float32 (PyTorch's "CUDA Ops that autocast to float32")."""
    with fake_tensors(), cuda() as mode, mode.autocast(torch.bfloat16):
        values = torch.empty(2, 8)
        assert torch.nn.functional.linear(values, torch.empty(4, 8)).dtype == torch.bfloat16
        assert torch.nn.functional.layer_norm(values.bfloat16(), (8,)).dtype == torch.float32
        assert (values.bfloat16() ** 2).dtype == torch.float32
        assert torch.nn.functional.softmax(values.bfloat16(), -1).dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert torch.nn.functional.linear(values, torch.empty(4, 8)).dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "masked", "kernel"),
    [(torch.bfloat16, False, "flash"), (torch.float32, False, "efficient"), (torch.bfloat16, True, "efficient")],
)
def test_emulated_attention_stores_no_scores(dtype: torch.dtype, masked: bool, kernel: str) -> None:
    with fake_tensors(), cuda(), Recorder() as recorder:
        query = torch.empty(1, 2, 512, 64, dtype=dtype)
        mask = torch.empty(1, 1, 512, 512, dtype=dtype) if masked else None
        recorder.section("attention")
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    assert out.shape == query.shape
    assert [operator.kind for operator in recorder.sections[0].operators] == ["attention"]
    # Scores of 512 × 512 for two heads would add 4 bytes each.
    assert sum(event.size or 0 for event in recorder.events) < query.numel() * query.element_size() * 3 + 2 * 512 * 512


def test_emulated_rms_norm_is_one_kernel() -> None:
    with fake_tensors(), cuda() as mode, Recorder() as recorder, mode.autocast(torch.bfloat16):
        net, values = torch.nn.RMSNorm(64), torch.empty(2, 8, 64)
        recorder.section("norm")
        norm = net(values)
    assert norm.dtype == torch.float32 and [operator.kind for operator in recorder.sections[-1].operators] == ["other"]


def test_stub_of_adamw8bit_has_the_real_state_layout() -> None:
    shapes = [(64, 64), (63, 65), (4096,), (4095,), (1, 300, 20)]
    bytes_of: dict[Any, dict[tuple[int, str], tuple[int, torch.dtype]]] = {}
    for kind in (bitsandbytes.optim.AdamW8bit, stubs.AdamW8bit):
        parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = kind(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        found: dict[tuple[int, str], tuple[int, torch.dtype]] = {}
        for number, parameter in enumerate(parameters):
            state = optimizer.state[parameter]
            found |= {
                (number, key): (value.numel(), value.dtype)
                for key, value in state.items()
                if isinstance(value, torch.Tensor) and value.numel() > 1
            }
        bytes_of[kind] = found
    real, standin = bytes_of.values()
    assert standin == real


def test_recorded_gradients_are_freed_after_their_step() -> None:
    with fake_tensors(), cuda(), Recorder() as recorder:
        parameters = [torch.nn.Parameter(torch.empty(100, 100)) for _ in range(2)]
        for _ in range(2):
            sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            torch.optim.SGD(parameters).zero_grad()
        living = {event.identifier for event in recorder.events if event.size} - {
            event.identifier for event in recorder.events if event.size is None
        }
    assert len(living) == 2


# -- any denoiser -----------------------------------------------------------------------------------------------------

# Published parameter counts: model cards and papers (FLUX.2: measured by PEFT; Sana: arXiv:2410.10629; PixArt-Σ:
# arXiv:2403.04692).
PUBLISHED = {
    "amused-256": 603e6,
    "auraflow": 6.8e9,
    "chroma": 8.9e9,
    "cogvideox-2b": 1.7e9,
    "controlnet-sd15": 361.3e6 + 859.5e6,
    "flux1-dev": 11.9e9,
    "flux2-klein-4b": 3_875_544_576,
    "hidream-i1": 17.1e9,
    "kolors": 2.58e9,
    "krea2": 12.8e9,
    "longcat-image": 6.27e9,
    "ltx-video": 1.92e9,
    "lumina2": 2.61e9,
    "pixart-900m": 0.91e9,
    "pixart-sigma": 0.61e9,
    "qwen-image": 20.4e9,
    "sana-1600m": 1.6e9,
    "sd3-medium": 2.03e9,
    "sd35-medium": 2.24e9,
}


DEPTHS = ("num_layers", "num_single_layers", "num_mmdit_layers", "num_single_dit_layers", "num_hidden_layers")


def test_every_denoiser_config_has_a_published_count() -> None:
    assert {path.stem for path in DENOISERS.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_denoiser_config_has_its_published_count_and_traces(name: str) -> None:
    """One layer takes a LoRA step, in which every adapter gets its gradient."""
    given = load(name)
    with fake_tensors():
        assert sum(parameter.numel() for parameter in given.net().parameters()) == pytest.approx(
            PUBLISHED[name], rel=0.01
        )
    cut = dict.fromkeys(DEPTHS, 1) | (
        {"dual_attention_layers": [0]} if "sd35" in name else {"llama_layers": [0, 1]} if "hidream" in name else {}
    )
    small = dataclasses.replace(
        given, config=given.config | {key: value for key, value in cut.items() if key in signature_of(given)}
    )
    checkpointing = f"train.gradient_checkpointing={str('amused' not in name).lower()}"
    recipe = load_recipe(
        "lora/sdxl", ["train.batch_size=2", "train.accumulation=1", "data.resolution=256", checkpointing]
    )
    subject = TracedRun(recipe, "bfloat16", (256, 256), build=lambda plan: DenoiserModel(plan, small, (256, 256)))
    train = subject.phases()["train"]
    backward = [operator for section in train.sections if section.name == "backward" for operator in section.operators]
    assert sum(operator.kind == "matmul" for operator in backward) >= 2
    # In Qwen-Image's last block, nothing reads the text stream's output: one of its eight adapters has no gradient.
    idle = 1 / 8 if name == "qwen-image" else 0
    assert train.held["optimizer"] >= 8 * (1 - idle) * train.held["trained"] / 4


def signature_of(given: Denoiser) -> set[str]:
    import diffusers

    return set(inspect.signature(getattr(diffusers, given.config["_class_name"]).__init__).parameters)

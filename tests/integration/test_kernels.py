"""Kernels: switches, and missing or changed classes in the installed libraries."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import finetune
from finetune import kernels
from finetune.adapters import peft
from finetune.config.schema import Adapter
from finetune.errors import UserError
from tests.helpers import tiny
from tests.unit.test_fused_lora import flux1, unet

# Renames what a kernel replaces, as a new release of diffusers or PEFT might, when the first kernel is applied: the
# pipeline is built by then, so the libraries' own code still works. Prints the losses of two steps and the log.
PROGRAM = """
import importlib, json, logging, sys
records = []
class Keep(logging.Handler):
    def emit(self, record): records.append(record.getMessage())
logging.getLogger("finetune.kernels").addHandler(Keep())
from finetune import kernels
from pathlib import Path
from tests.helpers import tiny
apply, renamed = kernels.apply, []
def rename_first(name, network):
    if not renamed:
        renamed.append(1)
        for path in filter(None, sys.argv[3:]):
            module, _, name_in_it = path.partition(":")
            module = importlib.import_module(module)
            getattr(module, name_in_it).__name__ = "Renamed"
            delattr(module, name_in_it)
    apply(name, network)
kernels.apply = rename_first
more = ["sample.prompts=[]", "train.steps=2"]
job = tiny.prepare(tiny.recipe(sys.argv[1], "lora", *more, folder=Path(sys.argv[2])))
job.trainer.train()
lines = (job.run.folder / "metrics.jsonl").read_text().splitlines()
losses = [json.loads(line).get("loss.denoiser") for line in lines]
print("FOUND", json.dumps([losses, records]))
"""
RENAMED = {
    "residual blocks": ("sd15", "diffusers.models.resnet:ResnetBlock2D", "unet_blocks"),
    "attention": ("sd15", "diffusers.models.attention_processor:Attention", "unet_blocks"),
    "attention's processor": ("sd15", "diffusers.models.attention_processor:AttnProcessor2_0", "unet_blocks"),
    "transformer blocks": ("sd15", "diffusers.models.transformers.transformer_2d:Transformer2DModel", "unet_blocks"),
    "linear LoRA layers": ("sd15", "peft.tuners.lora:Linear", "fused_lora"),
    "convolution LoRA layers": ("sd15", "peft.tuners.lora:Conv2d", "fused_lora"),
    "FLUX's attention": ("flux1", "diffusers.models.transformers.transformer_flux:FluxAttnProcessor", "rope"),
    "FLUX's attention in SD 1.5": ("sd15", "diffusers.models.transformers.transformer_flux:FluxAttnProcessor", None),
    "linear LoRA layers in FLUX": ("flux1", "peft.tuners.lora:Linear", "fused_lora"),
}


def train(pipeline: str, folder: Path, renamed: str = "", **environment: str) -> tuple[list[float], list[str]]:
    root = Path(finetune.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, pipeline, str(folder), renamed],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses, log = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))[5:])
    return losses, log


@functools.cache
def losses(pipeline: str) -> list[float]:
    """The losses of two steps with every kernel."""
    found, log = train(pipeline, tiny.root() / "runs" / f"kernels-{pipeline}")
    assert not log and len(found) == 2
    return found


@pytest.mark.parametrize("name", RENAMED)
def test_missing_library_class_disables_its_kernel_with_one_log_line(name: str, tmp_path: Path) -> None:
    pipeline, renamed, kernel = RENAMED[name]
    found, log = train(pipeline, tmp_path / "run", renamed)
    assert found == pytest.approx(losses(pipeline), rel=1e-4)
    if kernel is None:
        assert not log
    else:
        assert len(log) == 1 and log[0].startswith(f"{kernel} is off: ") and renamed.rpartition(":")[2] in log[0]


@pytest.mark.parametrize("pipeline", ["sd15", "flux1"])
def test_ft_kernels_off_gives_the_same_losses(pipeline: str, tmp_path: Path) -> None:
    found, log = train(pipeline, tmp_path / "run", FT_KERNELS="off")
    assert found == pytest.approx(losses(pipeline), rel=1e-4) and not log


def replaced(net: nn.Module) -> set[str]:
    parts = [part for module in net.modules() for part in (module, getattr(module, "processor", None))]
    return {type(part).__module__.rpartition(".")[2] for part in parts if "kernels" in type(part).__module__}


def patched(build: Any) -> Any:
    net, _ = build()
    net.requires_grad_(False)
    peft.add_adapter(net, Adapter(rank=4))
    for kernel in ("unet_blocks", "fused_lora", "rope"):
        kernels.apply(kernel, net)
    return net


@pytest.mark.parametrize(
    ("value", "in_unet", "in_flux"),
    [
        ("", {"unet_blocks", "fused_lora"}, {"fused_lora", "rope"}),
        ("all", {"unet_blocks", "fused_lora"}, {"fused_lora", "rope"}),
        ("off", set(), set()),
        ("rope", set(), {"rope"}),
        ("fused_lora,rope", {"fused_lora"}, {"fused_lora", "rope"}),
        ("-rope", {"unet_blocks", "fused_lora"}, {"fused_lora"}),
        ("-rope, -unet_blocks", {"fused_lora"}, {"fused_lora"}),
    ],
)
def test_ft_kernels_selects_kernels(
    value: str, in_unet: set[str], in_flux: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernels.VARIABLE, value)
    assert (replaced(patched(unet)), replaced(patched(flux1))) == (in_unet, in_flux)


def test_ft_kernels_with_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "-rop")
    with pytest.raises(UserError, match='no kernel "rop"') as caught:
        patched(flux1)
    assert caught.value.where == "FT_KERNELS" and '"rope"' in caught.value.remedy


def test_applying_a_kernel_twice_changes_nothing() -> None:
    for build in (unet, flux1):
        net = patched(build)
        before = [(type(module), type(getattr(module, "processor", None))) for module in net.modules()]
        for kernel in ("unet_blocks", "fused_lora", "rope"):
            kernels.apply(kernel, net)
        assert before == [(type(module), type(getattr(module, "processor", None))) for module in net.modules()]


def test_library_class_with_another_signature_is_not_patched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers.models import resnet

    def forward(self: Any, input_tensor: Any, temb: Any, scale: Any) -> None: ...

    forward.__qualname__ = "ResnetBlock2D.forward"

    monkeypatch.setattr(resnet.ResnetBlock2D, "forward", forward)
    monkeypatch.setattr(kernels, "_reported", set())
    for _ in range(2):
        net, _ = unet()
        kernels.apply("unet_blocks", net)
        assert not replaced(net)
    assert [record.getMessage() for record in caplog.records if record.name == "finetune.kernels"] == [
        "unet_blocks is off: diffusers' ResnetBlock2D.forward has another signature. "
        "Training uses diffusers' U-Net blocks and is slower."
    ]


def test_pytorch_without_onednn_operators_uses_its_own_convolution(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from finetune.kernels.onednn_conv import packed

    weight = nn.Parameter(torch.randn(6, 5, 3, 3), requires_grad=False)
    arguments = weight, ((1, 1), (1, 1), (1, 1)), torch.randn(2, 5, 8, 8).contiguous(memory_format=torch.channels_last)
    assert packed(*arguments) is not None
    with kernels.without("onednn_conv"):
        assert packed(*arguments) is None
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    monkeypatch.setattr(kernels, "_reported", set())
    assert packed(*arguments) is None and packed(*arguments) is None
    assert [record.getMessage() for record in caplog.records if record.name == "finetune.kernels"] == [
        "onednn_conv is off: this PyTorch has no torch.ops.mkldnn._convolution_pointwise. "
        "Training uses PyTorch's convolutions on a CPU and is slower."
    ]


def test_private_library_modules_are_imported_by_kernels_only() -> None:
    """At module level; classes in the public namespaces of diffusers and PEFT may be imported anywhere."""
    allowed = {"peft.utils", "peft.tuners.lora", "peft.tuners.tuners_utils", "transformers.cache_utils"}  # documented
    root = Path(finetune.__file__).parent
    found = []
    for path in root.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module and path.parent.name != "kernels":
                library, _, rest = node.module.partition(".")
                if library in ("diffusers", "peft", "transformers") and rest and node.module not in allowed:
                    found.append(f"{path.relative_to(root)}: {node.module}")
    assert not found

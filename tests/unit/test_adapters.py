"""Adapters: selection of layers, ranks, refused layers and the PiSSA initialization.

The runs are in tests/slow/test_families.py.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from diffusers import UNet2DConditionModel

from finetune.adapters import kinds, peft
from finetune.adapters.peft import add_adapter, check_patterns
from finetune.config.schema import Adapter
from finetune.errors import UserError
from tests.helpers import tiny


def unet() -> Any:
    return UNet2DConditionModel.from_pretrained(tiny.pipeline("sd15"), subfolder="unet")


def test_layers_target_is_a_regular_expression_anchored_at_a_dot() -> None:
    net = unet()
    assert peft.layers(net, "mid_block.*attn2.to_[kv]") == [
        f"mid_block.attentions.0.transformer_blocks.0.attn2.to_{letter}" for letter in ("k", "v")
    ]
    assert peft.layers(net, "o_q, conv_in") == ["conv_in"], "a target must begin at a dot"
    with pytest.raises(UserError, match="is not a regular expression"):
        peft.layers(net, "to_(q")


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_add_adapter_with_patterns_sets_rank_and_alpha_per_layer(alpha: float | None) -> None:
    net = unet()
    section = Adapter(
        rank=4, alpha=alpha, rank_pattern={"mid_block.*to_q": 8, "to_q": 2}, alpha_pattern={"attn2.to_k": 8}
    )
    names = add_adapter(net, section)
    check_patterns(section, names)
    for name in names:
        layer = net.get_submodule(name)
        rank = (8 if "mid_block" in name else 2) if name.endswith("to_q") else 4
        scale = 8 / 4 if name.endswith("attn2.to_k") else 1 if alpha is None else alpha / rank
        assert (layer.r["default"], layer.scaling["default"]) == (rank, scale)
    with pytest.raises(UserError, match='matches "to_qq"') as caught:
        check_patterns(Adapter(rank_pattern={"to_qq": 2}), names)
    assert '"to_q"' in caught.value.remedy


def test_pissa_initialization_keeps_the_base_output() -> None:
    """W′ + B₀ A₀ = W (arXiv:2404.02948, eq. 2–4); B₀ A₀ is the best approximation of its rank.

    The saved LoRA is 0 at first.
    """
    torch.manual_seed(0)  # seeds the subspace iteration
    net, base = unet(), unet()
    (name,) = add_adapter(net, Adapter(rank=4, alpha=2, targets="mid_block.*attn1.to_q", pissa=True))
    layer, weight = net.get_submodule(name), base.get_submodule(name).weight
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer.base_layer.weight + product, weight, atol=1e-6, rtol=0)
    left = torch.linalg.svdvals(weight.detach())[4:].square().sum().sqrt()
    torch.testing.assert_close(
        layer.base_layer.weight.detach().norm(), left, rtol=5e-3, atol=0
    )  # accuracy of 16 iterations
    down, up = peft.lora_weights(net).values()
    assert down.shape[0] == 8 and (up @ down).abs().max() < 1e-6
    assert peft.lora_configuration(net)["lora_alpha"] == 4, "alpha / rank has changed"


REFUSED = {
    "a rank above the width": (
        unet,
        Adapter(rank=17, targets="down_blocks.0.*to_q"),
        "above the width of down_blocks.0",
        "rank_pattern: {down_blocks",
    ),
    "PiSSA on a convolution": (
        unet,
        Adapter(rank=4, targets="conv1", pissa=True),
        "conv1 is a convolution",
        "adapter.targets",
    ),
    "OFT on a convolution": (
        unet,
        Adapter(rank=4, targets="conv1", kind="oft"),
        "OFT cannot be merged into a convolution",
        "adapter.targets",
    ),
    "OFT's blocks": (
        unet,
        Adapter(rank=7, targets="attention", kind="oft"),
        "does not divide the 16 inputs",
        "adapter.rank: 4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_add_adapter_to_an_unsupported_layer_is_refused(name: str) -> None:
    make, section, says, remedy = REFUSED[name]
    with pytest.raises(UserError, match=says) as caught:
        add_adapter(make(), section)
    assert remedy in caught.value.remedy


def test_adapter_kinds_declare_existing_keys_and_trained_parameters() -> None:
    assert tuple(kinds.KINDS) == get_args(kinds.KindName)
    fields = {field.name for field in dataclasses.fields(Adapter)}
    for kind in kinds.KINDS.values():
        assert set(kind.keys) <= fields and kind.title and kind.summary
        net = unet()
        section = Adapter(kind=kind.name, rank=4, targets="mid_block.*to_q")
        assert len(add_adapter(net, section)) == 2
        trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
        assert trained and all(f".{kind.parameters}" in name for name in trained)
    assert all(variant.key in fields for variant in kinds.VARIANTS)


@pytest.mark.parametrize(
    ("section", "text"),
    [
        (Adapter(rank=4), "LoRA on X: rank 4, alpha 4 (scale 4/4 = 1)"),
        (Adapter(rank=4, dora=True, dropout=0.1), "DoRA on X: rank 4, alpha 4 (scale 4/4 = 1), dropout 0.1"),
        (
            Adapter(rank=4, alpha=6, rslora=True, pissa=True, rank_pattern={"to_q": 2}),
            "LoRA, rank-stabilized, initialized by PiSSA on X: rank 4, alpha 6 (scale 6/√4 = 3); rank 2 on to_q",
        ),
        (Adapter(kind="lokr", rank=4, alpha=2), "LoKr on X: rank 4, alpha 2 (scale 2/4 = 0.5)"),
        (Adapter(kind="oft", rank=4), "OFT on X: block size 4"),
    ],
)
def test_adapter_kind_describe_names_rank_scale_and_options(section: Adapter, text: str) -> None:
    assert kinds.kind_of(section).describe(section, "X") == text


def test_adapter_kinds_import_without_torch() -> None:
    code = "import sys, finetune.adapters.kinds as k; list(k.KINDS); print({'torch', 'peft'} & sys.modules.keys() or 0)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "0"

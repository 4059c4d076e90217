"""Kinds of adapter and variants of LoRA: everything that depends on which one a recipe asks for. Torch-free to import.

`AdapterKind` says what a kind accepts, what it cannot be combined with, how PEFT builds it, in which files it exists
and how tables describe it. `LoraVariant` does the same for an option of LoRA that is one key in the recipe
(`adapter.dora`, …).

To add a kind: a subclass of `AdapterKind` here, its name in `KindName` and the class in `KINDS`. To add a LoRA
variant: a subclass of `LoraVariant`, listed in `VARIANTS`, and its key in `config.schema.Adapter`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from finetune.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig

    from finetune.config.schema import Adapter, Model

KindName = Literal["lora", "loha", "lokr", "oft"]
Rule = tuple[bool, str, str]  # (whether it is broken, what is wrong, the edit that fixes it)


@dataclass(frozen=True)
class Layer:
    """What an adapter needs to know of a layer, convolutions included."""

    name: str
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()  # empty: a linear layer

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution."""
        return bool(self.kernel)


@dataclass(frozen=True)
class Scales:
    """Ranks and alphas of the adapted layers, as PEFT's configurations take them."""

    names: Sequence[str]
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    @property
    def arguments(self) -> dict[str, Any]:
        """What the configurations of all kinds with a rank have in common."""
        return {
            "r": self.rank,
            "target_modules": list(self.names),
            "rank_pattern": dict(self.ranks),
            "alpha_pattern": dict(self.alphas),
        }


class LoraVariant:
    """An option of LoRA, switched by the key of the same name in the `adapter` section."""

    key: ClassVar[str]
    label: ClassVar[str] = ""  # added to "LoRA" in tables
    changes_base: ClassVar[bool] = False  # whether it rewrites the base's weights, so that a file is not B A alone

    def rules(self, adapter: Adapter, model: Model) -> Iterator[Rule]:
        """What it cannot be combined with."""
        yield from ()

    def arguments(self) -> dict[str, Any]:
        """Arguments of `peft.LoraConfig`."""
        raise NotImplementedError

    def check_layer(self, layer: Layer) -> None:
        """Raise UserError if the variant does not exist for `layer`."""


@final
class Dora(LoraVariant):
    """DoRA (arXiv:2402.09353) also trains the magnitude of each row of W + s B A."""

    key = "dora"

    def rules(self, adapter: Adapter, model: Model) -> Iterator[Rule]:
        yield (
            model.train_text_encoder,
            "DoRA cannot be used on text encoders: transformers drops its magnitudes when diffusers loads the file",
            "set adapter.dora: false, or model.train_text_encoder: false",
        )
        yield (
            adapter.pissa,
            "DoRA with PiSSA cannot be exported: its magnitudes are those of weights that PiSSA has changed",
            "set one of adapter.dora and adapter.pissa to false",
        )

    def arguments(self) -> dict[str, Any]:
        return {"use_dora": True}


@final
class RsLora(LoraVariant):
    """Rank-stabilized LoRA (arXiv:2312.03732): the scale is alpha / √rank."""

    key = "rslora"
    label = ", rank-stabilized"

    def arguments(self) -> dict[str, Any]:
        return {"use_rslora": True}


@final
class Pissa(LoraVariant):
    """PiSSA (arXiv:2404.02948): B A starts as the base's largest singular values, and the base as the rest."""

    key = "pissa"
    label = ", initialized by PiSSA"
    changes_base = True

    def rules(self, adapter: Adapter, model: Model) -> Iterator[Rule]:
        yield (
            adapter.distill_every is not None,
            "PiSSA changes the base's weights, so there is no base left to distill from",
            "set adapter.pissa: false, or remove adapter.distill_every",
        )

    def arguments(self) -> dict[str, Any]:
        # 16 rounds of subspace iteration (Halko et al. 2011): a full decomposition takes minutes for a large network.
        return {"init_lora_weights": "pissa_niter_16"}

    def check_layer(self, layer: Layer) -> None:
        if layer.is_conv:
            raise UserError(
                f"PiSSA decomposes matrices, and {layer.name} is a convolution",
                where="adapter.pissa",
                remedy="leave convolutions out of adapter.targets, or set adapter.pissa: false",
            )


VARIANTS: tuple[LoraVariant, ...] = (Dora(), RsLora(), Pissa())


class AdapterKind:
    """One value of `adapter.kind`.

    Attributes:
        name: in recipes.
        title: for people.
        summary: what it trains, for the recipe reference.
        parameters: what PEFT's names of its weights begin with.
        keys: keys of the `adapter` section that not every kind has.
        has_lora_file: whether diffusers has a file format for it. If not, it is saved as PEFT's folders, and merged or
            loaded by PEFT; exports to other programs' LoRA formats do not exist.
        has_strength: whether what it adds can be scaled.
        takes_quantized: whether PEFT can put it on quantized weights.
    """

    name: ClassVar[KindName]
    title: ClassVar[str]
    summary: ClassVar[str]
    parameters: ClassVar[str]
    keys: ClassVar[tuple[str, ...]] = ("alpha", "rank_pattern", "alpha_pattern")
    has_lora_file: ClassVar[bool] = False
    has_strength: ClassVar[bool] = True
    takes_quantized: ClassVar[bool] = True

    def rules(self, adapter: Adapter, model: Model) -> Iterator[Rule]:
        """What it cannot be combined with, besides the keys that it does not have."""
        yield from ()

    def config(self, adapter: Adapter, scales: Scales) -> PeftConfig:
        """PEFT's configuration."""
        raise NotImplementedError

    def check_layer(self, layer: Layer, adapter: Adapter, rank: int) -> None:
        """Raise UserError if PEFT cannot adapt `layer`, or would waste memory on it.

        A product of rank r through a narrower matrix has more weights than the matrix and can express no more.
        Convolutions may be narrower: those at a network's two ends have few channels and few weights.
        """
        if not layer.is_conv and rank > (width := min(layer.inputs, layer.outputs)):
            raise UserError(
                f"rank {rank} is above the width of {layer.name} ({layer.inputs} → {layer.outputs})",
                where="adapter.rank",
                remedy=f"set adapter.rank_pattern: {{{layer.name}: {width}}} or a lower adapter.rank, "
                "or leave the layer out of adapter.targets",
            )

    def label(self, adapter: Adapter) -> str:
        """Its name in tables, with variants."""
        return self.title

    def describe(self, adapter: Adapter, where: str) -> str:
        """What trains, for the plan table, such as `LoRA on attention: rank 16, alpha 16 (scale 16/16 = 1)`.

        Args:
            where: the networks, in words.
        """
        alpha = adapter.alpha if adapter.alpha is not None else adapter.rank
        root = "√" if adapter.rslora else ""
        scale = alpha / (math.sqrt(adapter.rank) if adapter.rslora else adapter.rank)
        text = f"{self.label(adapter)} on {where}: rank {adapter.rank}, "
        text += f"alpha {alpha:g} (scale {alpha:g}/{root}{adapter.rank} = {scale:.3g})"
        for name, pattern in (("rank", adapter.rank_pattern), ("alpha", adapter.alpha_pattern)):
            text += "".join(f"; {name} {value:g} on {end}" for end, value in pattern.items())
        return text + (f", dropout {adapter.dropout:g}" if adapter.dropout else "")


@final
class Lora(AdapterKind):
    """LoRA (arXiv:2106.09685): W + (alpha / rank) B A."""

    name = "lora"
    title = "LoRA"
    summary = "a product of two thin matrices is added (arXiv:2106.09685)"
    parameters = "lora_"
    keys = (*AdapterKind.keys, "dropout", "init_lora", *(variant.key for variant in VARIANTS))
    has_lora_file = True

    def rules(self, adapter: Adapter, model: Model) -> Iterator[Rule]:
        for variant in self.variants(adapter):
            yield from variant.rules(adapter, model)
        yield (
            model.quantize is not None and any(variant.changes_base for variant in self.variants(adapter)),
            f"PiSSA changes the base's weights, and {model.quantize} weights cannot be changed",
            "remove model.quantize, or set adapter.pissa: false",
        )
        yield (
            adapter.init_lora is not None and adapter.pissa,
            "adapter.init_lora takes ranks and alphas from its file, and adapter.pissa its start from the base",
            "remove adapter.pissa or adapter.init_lora",
        )

    def variants(self, adapter: Adapter) -> list[LoraVariant]:
        """The variants that the recipe switches on."""
        return [variant for variant in VARIANTS if getattr(adapter, variant.key)]

    def config(self, adapter: Adapter, scales: Scales) -> PeftConfig:
        from peft import LoraConfig

        arguments: dict[str, Any] = {"init_lora_weights": "gaussian"}
        for variant in self.variants(adapter):
            arguments |= variant.arguments()
        with warnings.catch_warnings():
            # PEFT warns that it cannot convert PiSSA with rsLoRA and patterns to a LoRA; `peft.lora_weights` does.
            warnings.simplefilter("ignore")
            return LoraConfig(lora_alpha=scales.alpha, lora_dropout=adapter.dropout, **(arguments | scales.arguments))

    def check_layer(self, layer: Layer, adapter: Adapter, rank: int) -> None:
        for variant in self.variants(adapter):
            variant.check_layer(layer)
        super().check_layer(layer, adapter, rank)

    def label(self, adapter: Adapter) -> str:
        return ("DoRA" if adapter.dora else self.title) + "".join(variant.label for variant in self.variants(adapter))


@final
class LoHa(AdapterKind):
    """LoHa (arXiv:2108.06098): W + (alpha / rank) (B₁ A₁) ⊙ (B₂ A₂)."""

    name = "loha"
    title = "LoHa"
    summary = "two such products, multiplied element by element, are added (arXiv:2108.06098)"
    parameters = "hada_"
    takes_quantized = False

    def config(self, adapter: Adapter, scales: Scales) -> PeftConfig:
        from peft import LoHaConfig

        return LoHaConfig(alpha=scales.alpha, **scales.arguments)


@final
class LoKr(AdapterKind):
    """LoKr (arXiv:2309.14859): W + (alpha / rank) C ⊗ (B A), with a small matrix C."""

    name = "lokr"
    title = "LoKr"
    summary = "a Kronecker product of a small matrix and such a product is added (arXiv:2309.14859)"
    parameters = "lokr_"
    takes_quantized = False

    def config(self, adapter: Adapter, scales: Scales) -> PeftConfig:
        from peft import LoKrConfig

        return LoKrConfig(alpha=scales.alpha, **scales.arguments)

    def check_layer(self, layer: Layer, adapter: Adapter, rank: int) -> None:
        """Any rank is fine: where it is too large, PEFT trains the second factor as one matrix."""


@final
class Oft(AdapterKind):
    """OFT (arXiv:2306.07280): W times a block-diagonal rotation; `rank` is the size of its blocks."""

    name = "oft"
    title = "OFT"
    summary = "W is multiplied by a block-diagonal rotation; `rank` is the block size (arXiv:2306.07280)"
    parameters = "oft_"
    keys = ()
    has_strength = False

    def config(self, adapter: Adapter, scales: Scales) -> PeftConfig:
        from peft import OFTConfig

        return OFTConfig(r=0, oft_block_size=adapter.rank, target_modules=list(scales.names))

    def check_layer(self, layer: Layer, adapter: Adapter, rank: int) -> None:
        if math.prod(layer.kernel) > 1:
            raise UserError(
                f"PEFT's OFT cannot be merged into a convolution larger than 1×1 ({layer.name})",
                where="adapter.kind",
                remedy="leave convolutions out of adapter.targets",
            )
        if layer.inputs % adapter.rank:
            size = max(size for size in range(1, adapter.rank + 1) if layer.inputs % size == 0)
            raise UserError(
                f"OFT's block size {adapter.rank} does not divide the {layer.inputs} inputs of {layer.name}",
                where="adapter.rank",
                remedy=f"set adapter.rank: {size}, or leave {layer.name} out of adapter.targets",
            )

    def describe(self, adapter: Adapter, where: str) -> str:
        return f"{self.title} on {where}: block size {adapter.rank}"


KINDS: dict[str, AdapterKind] = {kind.name: kind for kind in (Lora(), LoHa(), LoKr(), Oft())}


def kind_of(adapter: Adapter) -> AdapterKind:
    """The kind that a recipe's `adapter` section asks for."""
    return KINDS[adapter.kind]


def rules(adapter: Adapter, model: Model) -> Iterator[Rule]:
    """What the keys of the `adapter` section cannot be combined with, also in the `model` section."""
    kind = kind_of(adapter)
    optional = dict.fromkeys(key for other in KINDS.values() for key in other.keys)
    for key in optional:
        owners = [other.title for other in KINDS.values() if key in other.keys]
        yield (
            key not in kind.keys and bool(getattr(adapter, key)),
            f"adapter.{key} does not exist for {kind.title}, only for {', '.join(owners)}",
            f"remove adapter.{key}, or set another adapter.kind",
        )
    yield (
        model.quantize is not None and not kind.takes_quantized,
        f"PEFT's {kind.title} changes the layer's weights, and {model.quantize} weights cannot be changed",
        "remove model.quantize, or set adapter.kind: lora",
    )
    yield from kind.rules(adapter, model)
    yield (
        any(number <= 0 for number in (*adapter.rank_pattern.values(), *adapter.alpha_pattern.values())),
        "ranks and alphas must be above 0",
        "correct adapter.rank_pattern and adapter.alpha_pattern",
    )

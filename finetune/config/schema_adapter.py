"""The sections `adapter` and `tokens` of a recipe: what trains beside the frozen weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from dataclasses import field as plain_field

from finetune.adapters.kinds import KindName
from finetune.config.fields import describe, field


@dataclass(frozen=True)
class Token:
    """A new token of CLIP text encoders, trained with the LoRA (textual inversion, arXiv:2208.01618)."""

    token: str = plain_field(metadata=describe("The token as captions and prompts write it, such as `<my-dog>`."))
    init_word: str = field("", "A word whose embedding the token starts from, such as `dog`; empty: random.")
    vectors: int = field(
        1,
        "Number of embedding vectors the token stands for.",
        unit="vectors",
        effect="More hold more detail and use up as many of the tokens a caption may have.",
        minimum=1,
        maximum=16,
    )
    lr_multiplier: float = field(
        10.0, "The embeddings' learning rate as a multiple of optimizer.lr.", unit="times", above=0, maximum=10_000.0
    )

    @property
    def file(self) -> str:
        """Where its vectors lie below an artifact's folder."""
        return f"embeddings/{re.sub('[^A-Za-z0-9_-]+', '', self.token) or 'word'}.safetensors"


@dataclass(frozen=True)
class Adapter:
    """What trains instead of the weights W; names and meanings are PEFT's.

    LoRA (arXiv:2106.09685): W + (alpha / rank) B A. LoHa (arXiv:2108.06098): the elementwise product of two such
    products. LoKr (arXiv:2309.14859): a Kronecker product of a small matrix and such a product. OFT (arXiv:2306.07280):
    W times a block-diagonal rotation whose blocks have the side `rank`.
    """

    kind: KindName = field(
        "lora",
        "Type of adapter.",
        choices={
            "lora": "low-rank update (arXiv:2106.09685)",
            "loha": "Hadamard product of two low-rank updates (arXiv:2108.06098)",
            "lokr": "Kronecker product (arXiv:2309.14859)",
            "oft": "block-diagonal rotation (arXiv:2306.07280)",
        },
    )
    rank: int = field(
        16,
        "Rank of the update; of OFT the side of a block.",
        effect="Higher learns more detail and makes a larger file.",
        minimum=1,
        maximum=8192,
    )
    alpha: float | None = field(
        None,
        "Scale of the update: alpha / rank; null: alpha = rank, a scale of 1.",
        above=0,
        maximum=1_000_000.0,
    )
    rank_pattern: dict[str, int] = field(
        dict,
        "Ranks of single layers: end of a layer's name (a regular expression) → rank.",
        minimum=1,
        maximum=8192,
    )
    alpha_pattern: dict[str, float] = field(
        dict,
        "Alphas of single layers: end of a layer's name (a regular expression) → alpha.",
        above=0,
        maximum=1_000_000.0,
    )
    dropout: float = field(0.0, "Dropout on the adapter's input.", minimum=0, below=1)
    targets: str = field(
        "attention",
        "Which layers get an adapter: `attention`, `attention+mlp`, `all-linear`, or ends of layer names (regular "
        "expressions), comma-separated.",
        effect="More layers learn more and take more memory.",
    )
    rslora: bool = field(
        False,
        "Rank-stabilized LoRA (arXiv:2312.03732): scale alpha / √rank.",
        effect="Keeps the update's size when the rank grows.",
    )
    dora: bool = field(
        False,
        "DoRA (arXiv:2402.09353): also learn each output's magnitude.",
        effect="Slower and larger, often closer to full fine-tuning.",
    )
    pissa: bool = field(
        False,
        "PiSSA (arXiv:2404.02948): start from the weights' largest singular vectors.",
        effect="Learns faster; the exported file has twice the rank.",
    )
    distill_every: int | None = field(
        None,
        "Every n-th step is a self-distillation step on the noisiest 1/n of the noise levels: the adapter is held "
        "to the base model's prediction there; null: off.",
        unit="steps",
        effect="Keeps the base model's composition and vocabulary while the other steps learn the style; try 5.",
        minimum=2,
        maximum=1_000_000,
    )
    init_lora: str | None = field(
        None,
        "A LoRA file to continue from, in diffusers' or kohya's format; its rank, alpha and layers replace this "
        "section's.",
    )

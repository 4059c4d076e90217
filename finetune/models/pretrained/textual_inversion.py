"""New tokens for CLIP text encoders: textual inversion together with a LoRA (pivotal tuning).

Gal et al. 2022, arXiv:2208.01618.

A token of several vectors is written once in captions and expands to `<it>`, `<it>_1`, …, as diffusers' pipelines do
(`maybe_convert_prompt`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.config.schema import Recipe, Token
from finetune.data.audit.audit import Audit
from finetune.errors import UserError
from finetune.models.pretrained.family import ClipFamily, Family
from finetune.rng import Draw

# Text encoder → its name in SDXL's embedding files (ComfyUI, A1111). With one encoder, the token is the name.
NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class NewTokens(nn.Module):
    """An embedding with added rows: start + rate · offset, where only the offset trains.

    The size of Adam's steps does not depend on that of the gradient, so the rate multiplies the learning rate of these
    rows without a parameter group of their own.

    Args:
        embedding: frozen, [V, D].
        start: initial values of the new rows, [N, D]; their ids are V … V + N − 1.
        rates: [N].
    """

    def __init__(self, embedding: nn.Embedding, start: Tensor, rates: Tensor) -> None:
        super().__init__()
        self.embedding = embedding
        self.register_buffer("start", start.float(), persistent=False)
        self.register_buffer("rates", rates.float()[:, None], persistent=False)
        self.offset = nn.Parameter(torch.zeros_like(start, dtype=torch.float32))

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def rows(self) -> Tensor:
        """The new rows, [N, D] float32."""
        start, rates = self.get_buffer("start"), self.get_buffer("rates")
        return start + rates * self.offset

    def forward(self, ids: Tensor) -> Tensor:
        known = self.embedding.num_embeddings
        old: Tensor = self.embedding(ids.clamp(max=known - 1))
        new = self.rows()[(ids - known).clamp(min=0)].to(old.dtype)
        return torch.where((ids >= known)[..., None], new, old)


def check(recipe: Recipe, family: Family, audit: Audit) -> None:
    """Refuse tokens that cannot be trained.

    Raises:
        UserError: the family has no CLIP text encoders that can train, or no caption contains the token.
    """
    if recipe.tokens and not isinstance(family, ClipFamily):
        problem = (
            f"the text encoders of family {recipe.model.family} cannot be trained, so they cannot learn new tokens"
        )
        raise UserError(
            problem,
            where="tokens",
            remedy="remove `tokens`, and use a rare word or a name in the captions: the LoRA learns it",
        )
    for token in recipe.tokens:
        if not any(token.token in image.caption for image in audit.training):
            problem = f'no caption contains the token "{token.token}"'
            raise UserError(
                problem,
                where="tokens",
                remedy=f'add it to the captions, or set data.sources[].prefix: "{token.token}"',
            )


def spelled(token: Token) -> list[str]:
    """Tokenizer entries of a token, as diffusers names them."""
    return [token.token, *(f"{token.token}_{number}" for number in range(1, token.vectors))]


def add(pipeline: Any, pairs: Sequence[tuple[str, str]], tokens: Sequence[Token], seed: int) -> dict[str, NewTokens]:
    """Add the tokens to every (tokenizer, text encoder) of `pairs`; returns the new rows by the encoder's name.

    Raises:
        UserError: a tokenizer has the token already.
    """
    found: dict[str, NewTokens] = {}
    for tokenizer_name, encoder_name in pairs if tokens else ():
        tokenizer, encoder = getattr(pipeline, tokenizer_name), getattr(pipeline, encoder_name)
        embedding: nn.Embedding = encoder.get_input_embeddings()
        entries = [entry for token in tokens for entry in spelled(token)]
        if known := [entry for entry in entries if entry in tokenizer.get_vocab()]:
            raise UserError(
                f'the tokenizer already has the token "{known[0]}"',
                where="tokens",
                remedy="choose a new one, such as <my-dog>",
            )
        if len(tokenizer) > embedding.num_embeddings:
            raise UserError(
                "the tokenizer of this base has more tokens than its text encoder has embeddings",
                where="tokens",
                remedy="use another base",
            )
        start = torch.cat([_start(token, tokenizer, embedding, seed) for token in tokens])
        # New ids follow the tokenizer's; additional rows of a padded table would shift them.
        ids = len(tokenizer)
        tokenizer.add_tokens(entries)
        rates = torch.tensor([token.lr_multiplier for token in tokens for _ in range(token.vectors)])
        found[encoder_name] = NewTokens(
            _cut(embedding, ids), start.to(embedding.weight.device), rates.to(embedding.weight.device)
        )
        encoder.set_input_embeddings(found[encoder_name])
    return found


def _cut(embedding: nn.Embedding, rows: int) -> nn.Embedding:
    return embedding if embedding.num_embeddings == rows else nn.Embedding.from_pretrained(embedding.weight.data[:rows])


def _start(token: Token, tokenizer: Any, embedding: nn.Embedding, seed: int) -> Tensor:
    """Initial vectors, [vectors, D]: the mean embedding of `init`, or random like the table's without it."""
    table = embedding.weight.detach().float().cpu()
    if not token.init_word:
        return table.mean(0) + table.std(0) * Draw(seed, 0, range(token.vectors)).normal(
            f"token {token.token}", (table.shape[1],)
        )
    ids = tokenizer(token.init_word, add_special_tokens=False).input_ids
    return table[ids].mean(0).expand(token.vectors, -1).clone()


def save(folder: Path, tokens: Sequence[Token], rows: Mapping[str, NewTokens]) -> list[Path]:
    """Write each token's vectors, [vectors, D], in the format of diffusers, ComfyUI and A1111; returns the files."""
    files, begin = [], 0
    for token in tokens:
        file = folder / token.file
        file.parent.mkdir(parents=True, exist_ok=True)
        part = slice(begin, begin + token.vectors)
        named = {
            NAMES[name] if len(rows) > 1 else token.token: new.rows()[part].detach().cpu().contiguous()
            for name, new in rows.items()
        }
        save_file(named, file, {"format": "pt"})
        files.append(file)
        begin += token.vectors
    return files


def load(pipeline: Any, folder: Path, recipe: Recipe) -> None:
    """Load the tokens in an artifact into a pipeline, with diffusers' own loader."""
    for token in recipe.tokens:
        state = load_file(folder / token.file)
        if len(state) == 1:
            pipeline.load_textual_inversion(state, token=token.token)
            continue
        for encoder, name in NAMES.items():
            tokenizer = getattr(pipeline, encoder.replace("text_encoder", "tokenizer"))
            pipeline.load_textual_inversion(
                state[name], token=token.token, text_encoder=getattr(pipeline, encoder), tokenizer=tokenizer
            )

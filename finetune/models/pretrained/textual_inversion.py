"""New words for CLIP text encoders: textual inversion (Gal et al. 2022, arXiv:2208.01618) together with a LoRA, pivotal tuning.

A token of several vectors is written once and read as `<it>`, `<it>_1`, …: diffusers' pipelines spell it out so themselves
(`maybe_convert_prompt`), in training and in drawing alike.
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

# Text encoder → its name in files for SDXL, which ComfyUI and A1111 know too; for a single encoder the token itself is the name.
NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class NewTokens(nn.Module):
    """An embedding with rows added: start + rate · offset, of which the offset trains.

    Adam's steps are as long as the learning rate whatever the gradient; so the rate makes the rows learn that many times
    faster than all else, without a parameter group of their own.

    Args:
        embedding: frozen, [V, D].
        start: [N, D], where the new rows begin; ids V … V + N − 1.
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
        """[N, D] float32."""
        start, rates = self.get_buffer("start"), self.get_buffer("rates")
        return start + rates * self.offset

    def forward(self, ids: Tensor) -> Tensor:
        known = self.embedding.num_embeddings
        old: Tensor = self.embedding(ids.clamp(max=known - 1))
        new = self.rows()[(ids - known).clamp(min=0)].to(old.dtype)
        return torch.where((ids >= known)[..., None], new, old)


def check(recipe: Recipe, family: Family, audit: Audit) -> None:
    """Refuse words that cannot be learned: by this family, or from these captions.

    Raises:
        UserError: the family has no CLIP text encoders that train, or no caption has the word.
    """
    if recipe.tokens and not isinstance(family, ClipFamily):
        problem = f"the text encoders of family {recipe.model.family} are run once and learn no words here"
        raise UserError(
            problem, where="tokens", remedy="remove `tokens`; the LoRA learns a rare word or a name in its place"
        )
    for token in recipe.tokens:
        if not any(token.token in image.caption for image in audit.training):
            problem = f'no caption has the word "{token.token}"'
            raise UserError(
                problem,
                where="tokens",
                remedy=f'write it into the captions, or begin them with it: data.sources[].prefix: "{token.token}"',
            )


def spelled(token: Token) -> list[str]:
    """The entries of the tokenizer that a token takes, as diffusers names them."""
    return [token.token, *(f"{token.token}_{number}" for number in range(1, token.vectors))]


def add(pipeline: Any, pairs: Sequence[tuple[str, str]], tokens: Sequence[Token], seed: int) -> dict[str, NewTokens]:
    """Teach every (tokenizer, text encoder) of `pairs` the tokens; returns the new rows by the encoder's name.

    Raises:
        UserError: a tokenizer knows the word already.
    """
    found: dict[str, NewTokens] = {}
    for tokenizer_name, encoder_name in pairs if tokens else ():
        tokenizer, encoder = getattr(pipeline, tokenizer_name), getattr(pipeline, encoder_name)
        embedding: nn.Embedding = encoder.get_input_embeddings()
        entries = [entry for token in tokens for entry in spelled(token)]
        if known := [entry for entry in entries if entry in tokenizer.get_vocab()]:
            raise UserError(
                f'the tokenizer knows "{known[0]}" already',
                where="tokens",
                remedy="choose a word of your own, such as <my-dog>",
            )
        if len(tokenizer) > embedding.num_embeddings:
            raise UserError(
                "this base has had words added to its tokenizer, without rows in its text encoder",
                where="tokens",
                remedy="another base",
            )
        start = torch.cat([_start(token, tokenizer, embedding, seed) for token in tokens])
        # Ids follow on the tokenizer's; rows between (a padded table) would shift them.
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
    """[vectors, D]: the mean of the embeddings of `init`'s tokens; without it, at random as wide as the table's own."""
    table = embedding.weight.detach().float().cpu()
    if not token.init_word:
        return table.mean(0) + table.std(0) * Draw(seed, 0, range(token.vectors)).normal(
            f"token {token.token}", (table.shape[1],)
        )
    ids = tokenizer(token.init_word, add_special_tokens=False).input_ids
    return table[ids].mean(0).expand(token.vectors, -1).clone()


def save(folder: Path, tokens: Sequence[Token], rows: Mapping[str, NewTokens]) -> list[Path]:
    """Write each token's vectors [vectors, D] as diffusers, ComfyUI and A1111 read them; returns the files."""
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
    """Put an artifact's tokens on a pipeline, by diffusers' own loader."""
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

"""A CLIP tokenizer learned from captions: byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909, algorithm 1).

The same captions give the same tokenizer in every process: a resumed run builds it again, and other ids would break its
text encoder. (The tokenizers library numbers letters at word ends in the order of a hash table.)
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from finetune.errors import UserError

END = "</w>"  # marks a token that ends a word
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
Pair = tuple[str, str]


def learn_tokenizer(captions: Iterable[str], entries: int, length: int) -> CLIPTokenizer:
    """Learn a tokenizer with at most `entries` tokens that reads the first `length` tokens of a caption.

    Ids are ordered as CLIP's: 256 bytes, the same at a word's end, the merges, start and end of text. So any text can
    be tokenized.

    Raises:
        UserError: `entries` is too small for a single merge.
    """
    alphabet = sorted(ByteLevel.alphabet())
    letters = [*alphabet, *(letter + END for letter in alphabet)]
    room = entries - len(letters) - len(SPECIAL)
    if room < 1:
        least = entries - room + 1
        raise UserError(
            f"a vocabulary of {entries} tokens is too small",
            where="model.build.tokenizer.vocabulary",
            remedy=f"set it to {least} or more",
        )
    backend = CLIPTokenizer().backend_tokenizer
    words = Counter(
        word
        for caption in captions
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(caption))
    )
    merges = learn_merges(words, room)
    tokens = [*letters, *dict.fromkeys(left + right for left, right in merges), *SPECIAL]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=merges, model_max_length=length
    )


def spelled(tokenizer: Any, caption: str) -> list[str]:
    """A caption's tokens as text; a note replaces those that are not read."""
    ids = tokenizer(caption, verbose=False).input_ids
    found = [tokenizer.decode([number]).strip() for number in ids[: tokenizer.model_max_length]]
    return found + (["(the rest is not read)"] if len(ids) > len(found) else [])


def learn_merges(words: Mapping[str, int], count: int) -> list[Pair]:
    """The first `count` merges: always the most frequent pair of neighbors; ties are broken alphabetically.

    Args:
        words: word → its number of occurrences.
    """
    spelled = {word: [*word[:-1], word[-1] + END] for word in words}
    common: Counter[Pair] = Counter()
    holders: defaultdict[Pair, set[str]] = defaultdict(set)  # words that contain the pair, or did earlier
    for word, spelling in spelled.items():
        for pair in itertools.pairwise(spelling):
            common[pair] += words[word]
            holders[pair].add(word)
    queue = [(-number, pair) for pair, number in common.items()]
    heapq.heapify(queue)
    merges: list[Pair] = []
    while queue and len(merges) < count:
        number, best = heapq.heappop(queue)
        if -number != common[best] or not number:
            continue  # replaced by a later entry
        merges.append(best)
        changed: set[Pair] = set()
        for word in holders.pop(best):
            before, after = spelled[word], _merged(spelled[word], best)
            for spelling, sign in ((before, -1), (after, 1)):
                for pair in itertools.pairwise(spelling):
                    common[pair] += sign * words[word]
                    changed.add(pair)
                    if sign > 0:
                        holders[pair].add(word)
            spelled[word] = after
        for pair in changed:
            heapq.heappush(queue, (-common[pair], pair))
    return merges


def _merged(spelling: list[str], pair: Pair) -> list[str]:
    found: list[str] = []
    position = 0
    while position < len(spelling):
        if tuple(spelling[position : position + 2]) == pair:
            found.append(spelling[position] + spelling[position + 1])
            position += 2
        else:
            found.append(spelling[position])
            position += 1
    return found

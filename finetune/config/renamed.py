"""Renamed recipe keys and values. The old names are accepted until version 0.3, with one note each. Torch-free.

`current` renames them in a recipe that was read, `migrate` in the text of a recipe file.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from finetune.config.yaml_reader import Node
from finetune.errors import UserError
from finetune.models import registry

_log = logging.getLogger(__name__)

# Old key → new key of the same section. `net` sections share one table: no two families gave one key two meanings here.
KEYS: dict[str, dict[str, str]] = {
    "model": {"encoders": "text_encoder_placement", "low": "base_run"},
    "data": {
        "outside_mask": "unmasked_weight",
        "grey": "grayscale",
        "gray": "grayscale",
        "unreadable_pictures": "unreadable_images",
    },
    "prior": {"pictures": "images"},
    "tokens": {"init": "init_word", "rate": "lr_multiplier"},
    "adapter": {"preserve_every": "distill_every", "init": "init_lora"},
    "flow": {"deviation": "std"},
    "autoencoder": {"colour_weight": "color_weight"},
    "sample": {"watch_every": "collapse_check_every"},
    "net": {
        # GANs, and the discriminator of VQ-GAN
        "critic_norm": "discriminator_norm",
        "critic_steps": "discriminator_steps",
        "adversary": "discriminator_weight",
        "lazy": "penalty_every",
        "group": "stddev_group",
        "unroll_rate": "unroll_lr",
        "augment": "ada_target",
        "augment_images": "ada_images",
        "augment_pictures": "ada_images",
        "grouped": "group_width",
        "style": "style_dim",
        "mapping": "mapping_layers",
        "mixing": "style_mixing",
        # diffusion
        "multiples": "channel_multipliers",
        "attention": "attention_levels",
        "drawn_augmentation": "sampling_augmentation",
        "mean": "log_sigma_mean",
        "deviation": "log_sigma_std",
        "spread": "sigma_data",
        "least": "sigma_min",
        "most": "sigma_max",
        # autoencoders, autoregressive models, flows
        "observation": "distribution",
        "codes": "codebook_size",
        "code": "code_dim",
        "embedding": "embedding_dim",
        "dequantisation": "dequantization",
    },
}
# New key → old value → new value.
VALUES: dict[str, dict[str, dict[str, str]]] = {"model": {"text_encoder_placement": {"whole": "device"}}}
# Old name of a bundled recipe → its name.
RECIPES = {
    f"{method}/{old}": f"{method}/{new}"
    for method in ("lora", "full")
    for old, new in {
        "sd35": "sd35-medium",
        "flux2-klein": "flux2-klein-4b",
        "flux2-klein-12gb": "flux2-klein-4b-12gb",
    }.items()
}

_noted: set[str] = set()


def current(root: Node, quiet: bool = False) -> Node:
    """Rename the old keys and values of a recipe.

    Args:
        quiet: log nothing, for files that no person wrote.

    Raises:
        UserError: a key is given by its old and its new name.
    """
    if not isinstance(root.content, dict):
        return root
    sections = {name: current_section(name, section, quiet) for name, section in root.content.items()}
    return dataclasses.replace(root, content=sections)


def _values(section: str, key: str) -> Mapping[str, str]:
    """Old value → new value of a key. Earlier names of families are in the families' records."""
    return registry.aliases() if (section, key) == ("model", "family") else VALUES.get(section, {}).get(key, {})


def recipe_name(name: str) -> str:
    """The name of a bundled recipe that is given by its name or an earlier one."""
    if name in RECIPES:
        _note(f"the recipe {name} is now {RECIPES[name]}", quiet=False)
    return RECIPES.get(name, name)


def current_section(name: str, section: Node, quiet: bool = False) -> Node:
    """Rename the old keys and values of one section, or of each mapping in a list of them."""
    if isinstance(section.content, list):
        return dataclasses.replace(section, content=[current_section(name, one, quiet) for one in section.content])
    if not isinstance(section.content, dict) or name not in KEYS:
        return section
    children: dict[str, Node] = {}
    for old, node in section.content.items():
        key = KEYS[name].get(old, old)
        if key != old:
            if key in section.content or key in children:
                raise UserError(
                    f"{name}.{old} is the old name of {name}.{key}: both are given",
                    where=f"{node.where}, {name}.{old}",
                    remedy=f"remove {name}.{old}",
                )
            _note(f"{name}.{old} is now {name}.{key}", quiet)
        new = _values(name, key).get(node.content) if isinstance(node.content, str) else None
        if new is not None:
            _note(f"{name}.{key}: {node.content} is now {name}.{key}: {new}", quiet)
            node = dataclasses.replace(node, content=new)
        children[key] = node
    return dataclasses.replace(section, content=children)


def current_key(keys: list[str]) -> list[str]:
    """The dotted key of an override, split at its dots, with an old name renamed."""
    if len(keys) < 2 or keys[1] not in KEYS.get(keys[0], {}):
        return keys
    section, old, *rest = keys
    new = KEYS[section][old]
    _note(f"{section}.{old} is now {section}.{new}", quiet=False)
    return [section, new, *rest]


def migrate(text: str) -> tuple[str, list[str]]:
    """Rewrite the old names in the text of a recipe; comments, order and layout stay as they are.

    Returns:
        the new text, and one line for each name that changed.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)  # PyYAML's own loader: its marks count characters
    edits = sorted(_edits(root), key=lambda edit: edit[0].start_mark.index, reverse=True)
    for node, new, _ in edits:
        text = text[: node.start_mark.index] + new + text[node.end_mark.index :]
    return text, [line for _, _, line in reversed(edits)]


def _edits(root: Any) -> Iterator[tuple[yaml.ScalarNode, str, str]]:
    """The scalars to replace: (node, its new text, what to print)."""
    if not isinstance(root, yaml.MappingNode):
        return
    for title, section in root.value:
        name = title.value
        mappings = section.value if isinstance(section, yaml.SequenceNode) else [section]
        for mapping in mappings:
            if name not in KEYS or not isinstance(mapping, yaml.MappingNode):
                continue
            for key, value in mapping.value:
                new = KEYS[name].get(key.value, key.value)
                if new != key.value:
                    yield key, new, f"{name}.{key.value} → {name}.{new}"
                replaced = _values(name, new)
                if isinstance(value, yaml.ScalarNode) and value.value in replaced:
                    after = replaced[value.value]
                    yield value, after, f"{name}.{new}: {value.value} → {name}.{new}: {after}"


def _note(message: str, quiet: bool) -> None:
    """Log a renaming once per process."""
    if not quiet and message not in _noted:
        _noted.add(message)
        _log.warning("%s", message)

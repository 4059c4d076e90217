"""Cards: what one architecture's step needs, measured once by running it on fake tensors (`tools/measure_profiles.py`).

A profile answers without torch. It holds *variants*, the settings of a recipe that change what a step is made of (method, what carries
the adapter, checkpointing, optimizer, …), each measured at two batches; what a step allocates and each operator's FLOPs and
bytes are linear in batch × area, but for attention, whose FLOPs grow with the square of the area.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from finetune.config.schema import Recipe
from finetune.errors import UserError
from finetune.paths import ASSETS

PROFILES = ASSETS / "profiles"
Device = Literal["cuda", "cpu"]
# Keys of a recipe that tell variants apart, what goes without saying, and how the lack of a variant is told. All else (batch, resolution,
# rank, averages, …) is arithmetic.
KEYS: dict[str, tuple[Any, str]] = {
    "method": ("", "method {}"),
    "adapter.kind": ("lora", "adapters of kind {}"),
    "adapter.targets": ("", 'targets "{}"'),
    "adapter.rank_pattern": (None, "higher ranks by pattern"),
    "adapter.dora": (False, "DoRA"),
    "adapter.distill_every": (None, "adapter.distill_every: {}"),
    "model.train_text_encoder": (False, "a trained text encoder"),
    "tokens": (None, "words that are learned"),
    "model.quantize": (None, "a base in {}"),
    "train.offload_blocks": (False, "blocks that wait in host memory"),
    "train.fused_backward": (False, "steps inside the backward pass"),
    "train.weights": ("float32", "trained weights in {}"),
    "train.gradient_checkpointing": (False, "train.gradient_checkpointing: {}"),
    "optimizer.name": ("", "the optimizer {}"),
    "optimizer.paged": (False, "a paged state"),
}
# What an optimizer keeps adds up with the rest (`memory.state_bytes`), so one's measurement serves those without one.
ADDS_UP = ("optimizer.name", "optimizer.paged")
NOT_BUILT = (
    "data",
    "train",
    "optimizer",
    "sample",
    "output",
    "adapter",
    "name",
    "lines",
    "vae",
    "base_run",
)  # what says nothing of a net from scratch


@final
@dataclass(frozen=True)
class Work:
    """Operators of one kind that cost about the same.

    Attributes:
        kind: matmul, conv, attention, random or other.
        width: bytes of a factor: 2 is what tensor cores are fast at.
        eager: whether Python runs them and autograd records them; the host takes longer then.
        flops, bytes: each operator's, as (what does not grow, what one native image more adds).
        count: how many of them a step runs, on average.
    """

    kind: str
    width: int
    eager: bool
    flops: tuple[float, float]
    bytes: tuple[float, float]
    count: float


@final
@dataclass(frozen=True)
class Variant:
    """One way to train an architecture on one kind of device.

    Attributes:
        device: whose autocast, kernels and optimizers were traced: "cuda" in bfloat16, "cpu" in float32.
        settings: of the recipe: what it says for `KEYS`.
        rank: at which it was measured; 0 without an adapter.
        trained: parameters that train, at that rank.
        weights, adapters, state: bytes of what stays frozen, of what trains, and of the optimizer's state.
        allocated, reserved: peaks of a step, bytes, as (at batch 0, more for each native image): without averages.
        accumulating: (allocated, reserved) likewise, from the second accumulated batch on: the gradients of the first are there.
        rank_bytes: allocated bytes that one rank more adds (what is reserved jumps in segments).
        waiting: bytes of blocks that wait in host memory.
        cycle: steps over which operators are averaged: GANs have some that compute more than others.
        micro_lines: operators of a forward and a backward pass, as the profile's file holds them; `update_lines`: of what comes once a step.
    """

    device: Device
    settings: dict[str, Any]
    rank: int
    trained: int
    weights: int
    adapters: int
    state: int
    allocated: tuple[float, float]
    reserved: tuple[float, float]
    accumulating: tuple[tuple[float, float], tuple[float, float]]
    rank_bytes: float
    micro_lines: list[list[Any]]
    update_lines: list[list[Any]]
    waiting: int = 0
    cycle: int = 1

    @property
    def micro(self) -> Iterable[Work]:
        """Operators of a forward and a backward pass."""
        return _works(self.micro_lines)

    @property
    def update(self) -> Iterable[Work]:
        """Operators of what comes once a step."""
        return _works(self.update_lines)


@final
@dataclass(frozen=True)
class Outside:
    """What happens outside the loop on one kind of device.

    Attributes:
        encode, sample: peaks while encoding one image and while drawing one, bytes, as (held throughout, more at the native size).
        encode_flops, sample_flops: of one image, and of one denoising step of one image with guidance.
        encoders, tiled: `model.text_encoder_placement` and `model.vae_tiling` as they were.
    """

    encode: tuple[float, float]
    sample: tuple[float, float]
    encode_flops: float
    sample_flops: float
    encoders: str = "device"
    tiled: bool = False


@final
@dataclass(frozen=True)
class Profile:
    """One architecture.

    Attributes:
        name: of its configuration, or `scratch-` and the recipe's name.
        title: what people call it.
        family: the recipe's `model.family`.
        build: of a net from scratch: `build_key` of the recipe that it was measured with.
        resolution: what it was made for: the side of the native image, pixels.
        parameters: of each net.
        outside: by device.
        versions: of the libraries that it was measured with.
    """

    name: str
    title: str
    family: str
    build: str
    resolution: int
    parameters: dict[str, int]
    outside: dict[str, Outside]
    versions: dict[str, str]
    variants: tuple[Variant, ...]


def known() -> tuple[str, ...]:
    """Names of all profiles."""
    return tuple(sorted(path.stem for path in PROFILES.glob("*.json")))


@functools.cache
def load(name: str) -> Profile:
    """The profile of this name."""
    return parsed(json.loads(path_of(name).read_text(encoding="utf-8")))


def parsed(found: dict[str, Any]) -> Profile:
    """A profile from plain values, as its file holds them."""
    outside = {
        device: Outside(**of | {key: tuple(of[key]) for key in ("encode", "sample")})
        for device, of in found["outside"].items()
    }
    return Profile(**{**found, "outside": outside, "variants": tuple(_variant(entry) for entry in found["variants"])})


def _variant(entry: dict[str, Any]) -> Variant:
    lines = {"allocated": tuple(entry["allocated"]), "reserved": tuple(entry["reserved"])}
    works = {"micro_lines": entry["micro"], "update_lines": entry["update"]}
    kept = {key: value for key, value in entry.items() if key not in ("micro", "update")}
    return Variant(**{**kept, **works, **lines, "accumulating": tuple(tuple(line) for line in entry["accumulating"])})


def _works(lines: list[list[Any]]) -> Iterable[Work]:
    for kind, width, eager, f0, f1, b0, b1, count in lines:
        yield Work(kind, width, bool(eager), (f0, f1), (b0, b1), count)


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says for each of `KEYS`, where that does not go without saying."""
    found = {}
    for key, (usual, _) in KEYS.items():
        value: Any = recipe
        for name in key.split("."):
            value = getattr(value, name, None)
        if key == "adapter.rank_pattern" and recipe.adapter:  # lower ones take no more than is said
            value = {layer: rank for layer, rank in value.items() if rank > recipe.adapter.rank}
        if value and value != usual:
            found[key] = int(value) if isinstance(value, bool) else value
    return found


def build_key(recipe: Recipe) -> str:
    """A digest of all that says what net a recipe makes from scratch, and its loss. Weights of terms count as there or not."""

    def shape(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            said = {
                one.name: (shape(getattr(value, one.name)), shape(_usual(one)))
                for one in dataclasses.fields(value)
                if one.name not in NOT_BUILT
            }
            return {name: given for name, (given, usual) in said.items() if given != usual}
        if isinstance(value, dict):
            return {key: shape(one) for key, one in value.items()}
        return bool(value) if isinstance(value, float) else value

    return hashlib.sha256(json.dumps(shape(recipe), sort_keys=True, default=list).encode()).hexdigest()[:16]


def _usual(field: dataclasses.Field[Any]) -> Any:
    """What a field is where a recipe says nothing; keys that came later change no digest."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def profile_of_build(recipe: Recipe) -> Profile | None:
    """The profile of the net that a recipe makes from scratch."""
    first = f"scratch-{recipe.name}"
    key = build_key(recipe)
    for name in sorted((name for name in known() if name.startswith("scratch-")), key=lambda name: name != first):
        if (profile := load(name)).build == key:
            return profile
    return None


def variant_of(profile: Profile, recipe: Recipe, device: Device = "cuda") -> Variant:
    """The variant that a recipe trains.

    Raises:
        UserError: the profile does not hold it.
    """
    wanted = settings_of(recipe)
    there = [one for one in profile.variants if one.device == device]
    if not there:
        where = "a CPU" if device == "cpu" else "GPUs"
        raise UserError(f"the profile of {profile.title} does not cover {where}", remedy="add --trace")

    def differs(one: Variant, but: tuple[str, ...] = ()) -> list[str]:
        return [key for key in KEYS if key not in but and one.settings.get(key) != wanted.get(key)]

    if alike := [one for one in there if not differs(one, ADDS_UP)]:
        return min(alike, key=lambda one: [key in differs(one) for key in ADDS_UP])
    nearest = min((differs(one, ADDS_UP) for one in there), key=len)
    said = [key for key in nearest if wanted.get(key)] or nearest  # that a method has no adapter need not be told
    what = " and ".join(KEYS[key][1].format(wanted.get(key, KEYS[key][0])) for key in said)
    raise UserError(f"the profile of {profile.title} does not cover {what}", where=nearest[0], remedy="add --trace")


def path_of(name: str) -> Path:
    """The file of the profile called `name`, whether it is there or not."""
    return PROFILES / f"{name}.json"

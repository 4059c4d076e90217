"""Cost profiles: the cost of one architecture's training step, measured on fake tensors (`tools/measure_profiles.py`).

Reading a profile needs no torch. It holds *variants*: the recipe settings that change the operators of a step
(method, adapter targets, checkpointing, optimizer, …), each measured at two batch sizes. Allocations and each
operator's FLOPs and bytes are linear in batch × area, except for attention, whose FLOPs grow with the square of the
area.
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
# Recipe keys that distinguish variants, their defaults, and the words for an error if a profile lacks the variant.
# Everything else (batch, resolution, rank, averages, …) is arithmetic.
KEYS: dict[str, tuple[Any, str]] = {
    "method": ("", "method {}"),
    "adapter.kind": ("lora", "adapters of kind {}"),
    "adapter.targets": ("", 'targets "{}"'),
    "adapter.rank_pattern": (None, "higher ranks by pattern"),
    "adapter.dora": (False, "DoRA"),
    "adapter.distill_every": (None, "adapter.distill_every: {}"),
    "model.train_text_encoder": (False, "a trained text encoder"),
    "tokens": (None, "learned tokens"),
    "model.quantize": (None, "a base model in {}"),
    "train.offload_blocks": (False, "offloaded blocks"),
    "train.fused_backward": (False, "fused backward"),
    "train.weights": ("float32", "trained weights in {}"),
    "train.gradient_checkpointing": (False, "train.gradient_checkpointing: {}"),
    "optimizer.name": ("", "the optimizer {}"),
    "optimizer.paged": (False, "paged optimizer state"),
}
# Optimizer state is additive (`memory.state_bytes`), so a variant measured with one optimizer serves the others.
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
)  # do not change a network from scratch


@final
@dataclass(frozen=True)
class Work:
    """Operators of one kind that cost about the same.

    Attributes:
        kind: matmul, conv, attention, random or other.
        width: bytes per operand element; tensor cores are fast at 2.
        eager: whether Python runs them and autograd records them, which takes the host longer.
        flops, bytes: per operator, as (constant part, increase per image at the native resolution).
        count: average number of them in a step.
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
        settings: the recipe's values for `KEYS`, defaults left out.
        rank: LoRA rank of the measurement; 0 without an adapter.
        trained: number of trained parameters, at that rank.
        weights, adapters, state: bytes of frozen weights, trained weights and optimizer state.
        allocated, reserved: peak bytes of a step, as (at batch 0, increase per native image), without EMA.
        accumulating: (allocated, reserved) from the second accumulated batch on, when gradients exist already.
        rank_bytes: allocated bytes per additional rank (reserved bytes grow in segments).
        waiting: bytes of offloaded blocks.
        cycle: number of steps that operators are averaged over; in a GAN, some steps compute more than others.
        micro_lines, update_lines: operators of a forward and backward pass, and of the update, as stored in the file.
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
        """Operators of the update."""
        return _works(self.update_lines)


@final
@dataclass(frozen=True)
class Outside:
    """Encoding and sampling on one kind of device.

    Attributes:
        encode, sample: peak bytes while encoding or generating one image, as (constant, increase at the native size).
        encode_flops, sample_flops: FLOPs to encode one image, and of one denoising step with guidance.
        encoders, tiled: `model.text_encoder_placement` and `model.vae_tiling` of the measurement.
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
    """The cost profile of one architecture.

    Attributes:
        name: the name of its configuration, or `scratch-` and the recipe's name.
        title: the display name.
        family: the recipe's `model.family`.
        build: for a network from scratch, `build_key` of the measured recipe.
        resolution: the native image side in pixels.
        parameters: number of parameters per network.
        outside: encoding and sampling, per device.
        versions: library versions of the measurement.
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
    """The names of all bundled profiles."""
    return tuple(sorted(path.stem for path in PROFILES.glob("*.json")))


@functools.cache
def load(name: str) -> Profile:
    """Load the profile called `name`."""
    return parsed(json.loads(path_of(name).read_text(encoding="utf-8")))


def parsed(found: dict[str, Any]) -> Profile:
    """Build a profile from the plain values of its file."""
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
    """The recipe's values for `KEYS`, defaults left out."""
    found = {}
    for key, (usual, _) in KEYS.items():
        value: Any = recipe
        for name in key.split("."):
            value = getattr(value, name, None)
        if key == "adapter.rank_pattern" and recipe.adapter:  # lower ranks need no more memory
            value = {layer: rank for layer, rank in value.items() if rank > recipe.adapter.rank}
        if value and value != usual:
            found[key] = int(value) if isinstance(value, bool) else value
    return found


def build_key(recipe: Recipe) -> str:
    """A digest of the network that a recipe builds from scratch, and its loss. Of loss weights, only zero or not
    counts.
    """

    def shape(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            settings = {
                one.name: (shape(getattr(value, one.name)), shape(_usual(one)))
                for one in dataclasses.fields(value)
                if one.name not in NOT_BUILT
            }
            return {name: given for name, (given, usual) in settings.items() if given != usual}
        if isinstance(value, dict):
            return {key: shape(one) for key, one in value.items()}
        return bool(value) if isinstance(value, float) else value

    return hashlib.sha256(json.dumps(shape(recipe), sort_keys=True, default=list).encode()).hexdigest()[:16]


def _usual(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, so that new keys change no digest."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def profile_of_build(recipe: Recipe) -> Profile | None:
    """The profile of the network that a recipe builds from scratch; None if there is none."""
    first = f"scratch-{recipe.name}"
    key = build_key(recipe)
    for name in sorted((name for name in known() if name.startswith("scratch-")), key=lambda name: name != first):
        if (profile := load(name)).build == key:
            return profile
    return None


def variant_of(profile: Profile, recipe: Recipe, device: Device = "cuda") -> Variant:
    """The variant of `profile` that a recipe trains.

    Raises:
        UserError: the profile does not cover it.
    """
    wanted = settings_of(recipe)
    there = [one for one in profile.variants if one.device == device]
    if not there:
        where = "a CPU" if device == "cpu" else "GPUs"
        raise UserError(f"the cost profile of {profile.title} does not cover {where}", remedy="add --trace")

    def differs(one: Variant, but: tuple[str, ...] = ()) -> list[str]:
        return [key for key in KEYS if key not in but and one.settings.get(key) != wanted.get(key)]

    if alike := [one for one in there if not differs(one, ADDS_UP)]:
        return min(alike, key=lambda one: [key in differs(one) for key in ADDS_UP])
    nearest = min((differs(one, ADDS_UP) for one in there), key=len)
    mentioned = [key for key in nearest if wanted.get(key)] or nearest  # the lack of an adapter need not be mentioned
    what = " and ".join(KEYS[key][1].format(wanted.get(key, KEYS[key][0])) for key in mentioned)
    raise UserError(
        f"the cost profile of {profile.title} does not cover {what}", where=nearest[0], remedy="add --trace"
    )


def path_of(name: str) -> Path:
    """The file of the profile called `name`, which may not exist."""
    return PROFILES / f"{name}.json"

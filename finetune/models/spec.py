"""`FamilySpec`: everything that can be said about a model family without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, final

Kind = Literal["diffusion", "VAE", "GAN", "flow", "autoregressive"]
Objective = Literal["noise", "flow", ""]
NoiseLevels = Literal["logit_normal", "mode", "uniform"]


@final
@dataclass(frozen=True)
class Variant:
    """One published checkpoint of a family, or several of the same architecture.

    Its name is that of the configuration folder (`assets/configs`) and of the cost profile (`assets/profiles`).

    Attributes:
        hub: names on the Hugging Face Hub that have this architecture.
        resolution: side of the images it was trained on, pixels.
        released: year and month.
        license: of the weights.
        commercial: whether the license allows commercial use of the weights: yes, no, or on which condition.
        preference: rank of the base for `ft estimate`, smallest first; docs/explanation/recommendations.md has the list
            with its sources.
        text_width: width of the text conditions in a UNet's cross-attention, by which single files are told apart.
        padding: padding token of each CLIP tokenizer, where a single file is opened without its tokenizer's folder.
    """

    hub: tuple[str, ...]
    resolution: int
    released: str = ""
    license: str = ""
    commercial: str = "yes"
    preference: int = 1000
    text_width: int = 0
    padding: Mapping[str, str] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class ModelSpec:
    """How a LoRA's metadata name its base.

    Attributes:
        base: `ss_base_model_version` of kohya-ss/sd-scripts.
        architecture, implementation: of ModelSpec (https://github.com/Stability-AI/ModelSpec).
    """

    base: str
    architecture: str
    implementation: str = "diffusers"


@final
@dataclass(frozen=True)
class FamilySpec:
    """The record of one model family. `finetune.models.registry` finds the records.

    Attributes:
        slug: name of the family in recipes (`model.family`).
        title: name for people.
        implementation: pretrained families: `module:Class` of the `Family`; from scratch: the module with `build` and
            `create`.
        aliases: earlier names of the family; recipes and saved models with these still load.
        kind: what kind of generative model it is; `ft estimate --goal` chooses by it.
        medium: what it generates.
        required_roles: what an example must have besides its target, such as "reference" (see `finetune.data.example`).
        optional_roles: what else it may have.
        tasks: what it is trained for.
        paper: arXiv number or address of the publication.
        pipeline: class of the diffusers pipeline; "" for families that are only trained from scratch.
        objective: noise (a schedule; the network predicts ε or v), flow (it predicts a velocity), or "" (it denoises
            nothing).
        denoiser: name of the denoiser in the pipeline.
        denoiser_class: its class in diffusers.
        sampling: how noise levels were drawn in the original training (flow objectives).
        variants: published checkpoints by name.
        one_architecture: whether every checkpoint of the family on the hub has the architecture of its one variant.
        single_file_keys: ends of tensor names that, all together, only this family's single-file checkpoints have.
        single_transformer: whether diffusers opens the transformer alone from such a file (`model.transformer`).
        lora_formats: formats of a LoRA file besides diffusers' own → the key map (`module:NAME`), or "" if the format
            uses diffusers' layer names. ComfyUI and kohya-ss/sd-scripts share one writer for UNets.
        lora_original: key map of the original code's layer names, of formats that are read and not written.
        lora_targets: layer-name patterns (regular expressions) that this family's denoiser has besides the common ones,
            by the names of `adapter.targets`: "attention", "mlp".
        modelspec: how a LoRA's metadata name the base, by variant ("" for all variants).
    """

    slug: str
    title: str
    implementation: str
    aliases: tuple[str, ...] = ()
    kind: Kind = "diffusion"
    medium: Literal["image", "video", "audio"] = "image"
    required_roles: tuple[str, ...] = ()
    optional_roles: tuple[str, ...] = ("caption", "mask")
    tasks: tuple[str, ...] = ("text-to-image",)
    paper: str = ""
    pipeline: str = ""
    objective: Objective = ""
    denoiser: str = "transformer"
    denoiser_class: str = ""
    sampling: NoiseLevels = "logit_normal"
    variants: Mapping[str, Variant] = field(default_factory=dict)
    one_architecture: bool = False
    single_file_keys: tuple[str, ...] = ()
    single_transformer: bool = True
    lora_formats: Mapping[str, str] = field(default_factory=dict)
    lora_original: str = ""
    lora_targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    modelspec: Mapping[str, ModelSpec] = field(default_factory=dict)

    @property
    def pretrained(self) -> bool:
        """Whether pretrained checkpoints can be fine-tuned."""
        return bool(self.pipeline)

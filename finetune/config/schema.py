"""`Recipe`: everything a user can say about a run, as frozen dataclasses; `finetune.config.loader` reads it from YAML.

One unit for one thing: the length of a run is `steps` (of the optimizer) or `epochs` (passes over the images),
whichever the recipe names, or follows from the purpose and the number of images (`finetune.config.training_length`);
sizes are pixels; rates are per optimizer step. Every field carries its documentation and range as metadata
(`finetune.config.fields`). Torch is not imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as plain_field
from typing import Any, Literal, get_args

from finetune.config.fields import MAX_COUNT, MAX_SEED, describe, field
from finetune.config.schema_adapter import Adapter, Token
from finetune.config.schema_data import Data, Prior, Source
from finetune.config.schema_loss import Autoencoder, Diffusion, Flow
from finetune.config.training_table import PURPOSES, SUBJECT_UP_TO, Purpose

__all__ = [
    "METHODS",
    "Adapter",
    "Autoencoder",
    "Data",
    "Diffusion",
    "Flow",
    "Method",
    "Model",
    "Optimizer",
    "Output",
    "Precision",
    "Prior",
    "Purpose",
    "Quantization",
    "Recipe",
    "Sample",
    "Source",
    "Token",
    "Train",
    "trigger_words",
]

Method = Literal["lora", "full", "scratch"]
Precision = Literal["float32", "float16", "bfloat16"]
Quantization = Literal["nf4", "int8"]


@dataclass(frozen=True)
class Model:
    """Which network trains, and how its frozen parts are kept in memory."""

    family: str = plain_field(metadata=describe("Model family, such as `sdxl` or `dcgan`."))
    path: str | None = field(
        None,
        "Pretrained weights: a Hugging Face name, a diffusers folder, one .safetensors file, or `embedded:base`; null: "
        "from scratch.",
    )
    transformer: str | None = field(
        None, "Another transformer than the one at `path`: one .safetensors file, as ComfyUI keeps them."
    )
    vae: str | None = field(
        None, "Another VAE than the one at `path`: a Hugging Face name, a folder, or the run that trained it."
    )
    base_run: str | None = field(
        None, "Cascades: the run that trained the stage before, which generates the small images."
    )
    prediction: Literal["epsilon", "v_prediction"] | None = field(
        None,
        "What the denoiser predicts; null: what the checkpoint's scheduler says.",
        choices={"epsilon": "the noise", "v_prediction": "the velocity v (arXiv:2202.00512)"},
    )
    train_text_encoder: bool = field(
        False, "Also train the text encoders: with LoRA an adapter on them, else all their weights."
    )
    quantize: Quantization | None = field(
        None,
        "Quantize the frozen denoiser (QLoRA, arXiv:2305.14314); null: keep it in the run's precision.",
        choices={"nf4": "4 bits: about a quarter of the memory", "int8": "8 bits: about half"},
        effect="Less memory, slightly slower steps.",
    )
    text_encoder_placement: Literal["device", "offload", "nf4", "int8"] = field(
        "device",
        "How frozen text encoders are kept while they encode the captions.",
        choices={
            "device": "whole, on the training device",
            "offload": "in host memory, one layer at a time on the device",
            "nf4": "on the device in 4 bits",
            "int8": "on the device in 8 bits",
        },
    )
    vae_tiling: bool = field(
        False,
        "Run the VAE tile by tile.",
        effect="Less memory at large sizes; seams are hardly visible.",
    )
    build: dict[str, Any] = field(
        dict,
        "From scratch, for families without a `net` section: the arguments of the network's class.",
    )


@dataclass(frozen=True)
class Optimizer:
    """The optimizer, its learning rate and schedule."""

    name: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "schedulefree", "lion", "came"] = field(
        "adamw",
        "Optimizer.",
        choices={
            "adamw": "AdamW",
            "adamw8bit": "AdamW with 8-bit state (bitsandbytes): a quarter of the state's memory",
            "adafactor": "factored second moments: least state",
            "prodigy": "finds the learning rate itself; set lr: 1",
            "schedulefree": "schedule-free AdamW: averages weights instead of decaying the rate",
            "lion": "sign of the momentum: half of AdamW's state; a third to a tenth of its rate",
            "came": "confidence-guided Adafactor",
        },
    )
    lr: float = field(
        1e-4,
        "Learning rate at its highest; Prodigy multiplies the rate it finds by it.",
        effect="Too high forgets or diverges, too low learns nothing.",
        above=0,
        maximum=1000.0,
    )
    betas: tuple[float, ...] | None = field(
        None,
        "Decay rates of the first and second moment; null: [0.9, 0.999], of Lion [0.9, 0.99].",
        minimum=0,
        below=1,
    )
    eps: float = field(1e-8, "Term added to the denominator for numerical stability.", above=0, maximum=1.0)
    weight_decay: float = field(0.01, "Decoupled weight decay.", minimum=0, maximum=100.0)
    schedule: Literal["constant", "cosine", "linear"] = field(
        "constant",
        "Learning rate after the warm-up.",
        choices={
            "constant": "stays; such a run can be made longer on resume",
            "cosine": "falls to 0 along a half cosine",
            "linear": "falls to 0 linearly",
        },
    )
    warmup: float = field(
        0.0,
        "Share of the run over which the learning rate rises from 0, such as 0.05.",
        effect="The first steps of an adapter are its noisiest; more than a tenth of the run is lost time.",
        minimum=0,
        maximum=0.1,
        since="0.2",
    )
    warmup_steps: int = field(
        0,
        "Steps over which the learning rate rises from 0; instead of warmup.",
        unit="steps",
        minimum=0,
        maximum=MAX_COUNT,
    )
    clip_norm: float | None = field(
        1.0, "Largest gradient norm; larger gradients are scaled down; null: off.", above=0, maximum=1_000_000_000.0
    )
    clip: Literal["global", "tensor"] = field(
        "global",
        "Which norm clip_norm bounds.",
        choices={"global": "the norm of all gradients together", "tensor": "the norm of each tensor's gradient"},
    )
    paged: bool = field(
        False,
        "adamw8bit: move optimizer state to host memory when the GPU's is full, and back when it is used.",
    )

    @property
    def moments(self) -> tuple[float, ...]:
        """The betas, or the optimizer's defaults where the recipe gives none."""
        return self.betas if self.betas is not None else (0.9, 0.99) if self.name == "lion" else (0.9, 0.999)


@dataclass(frozen=True)
class Train:
    """Length of the run, batches, precision and checkpoints."""

    steps: int | None = field(
        None,
        "Length of the run in optimizer steps; auto: what train.purpose and the number of images call for. "
        "From scratch, give this or epochs.",
        unit="steps",
        words={"auto": None},
        minimum=1,
        maximum=MAX_COUNT,
    )
    epochs: float | None = field(
        None,
        "Length of the run in passes over the images, instead of steps.",
        unit="epochs",
        above=0,
        maximum=1e6,
    )
    purpose: Purpose | None = field(
        None,
        "What the images are of: it decides how long a run without steps and epochs is; null: a subject with up to "
        f"{SUBJECT_UP_TO} images, else general.",
        choices=PURPOSES,
        since="0.2",
    )
    batch_size: int = field(
        1,
        "Images per forward pass on each device.",
        unit="images",
        effect="Larger is steadier, takes more memory and longer steps.",
        minimum=1,
        maximum=16_384,
    )
    accumulation: int = field(
        1,
        "Batches whose gradients are accumulated before the optimizer steps.",
        unit="batches",
        effect="As steady as a larger batch at the memory of a small one.",
        minimum=1,
        maximum=16_384,
    )
    seed: int = field(
        0,
        "Seed of noise, timesteps, dropout and order; equal seeds give equal runs.",
        minimum=0,
        maximum=MAX_SEED,
    )
    precision: Precision | None = field(
        None,
        "Precision of activations; null: bfloat16 where the device has it, else float16 on CUDA, else float32.",
        choices={
            "float32": "exact; slow on GPUs",
            "float16": "with a loss scaler",
            "bfloat16": "the usual choice on GPUs since Ampere",
        },
    )
    weights: Literal["float32", "bfloat16"] = field(
        "float32",
        "Full fine-tuning: precision of the trained weights.",
        choices={"float32": "exact updates", "bfloat16": "half the memory, with stochastic rounding"},
    )
    gradient_checkpointing: bool | int = field(
        False,
        "Recompute blocks in the backward pass instead of keeping activations: true for every block, n for every n-th.",
        effect="Much less memory; steps take about a third longer.",
        minimum=1,
        maximum=10_000,
    )
    offload_blocks: bool = field(
        False,
        "LoRA on transformers: keep frozen blocks in host memory and copy each to the GPU when it is used.",
        effect="Far less GPU memory; each step copies the model twice.",
    )
    fused_backward: bool = field(
        False,
        "Full fine-tuning: step each weight as soon as its gradient is there, and free the gradient.",
        effect="Saves the memory of all gradients.",
    )
    ema: float | None = field(
        None,
        "Decay of an exponential moving average of the weights, which is saved and sampled; null: off.",
        effect="Closer to 1 averages longer: smoother images. Takes one copy of the weights.",
        above=0,
        below=1,
    )
    checkpoint_every: int | None = field(
        None,
        "Steps between checkpoints; auto: an eighth of the run, at most 1,000.",
        unit="steps",
        words={"auto": None},
        minimum=1,
        maximum=MAX_COUNT,
    )
    keep_checkpoints: int = field(2, "How many checkpoints to keep.", unit="checkpoints", minimum=1, maximum=1_000_000)
    validate_every: int | None = field(
        None,
        "Steps between validations; needs data.held_out; auto: an eighth of the run.",
        unit="steps",
        words={"auto": None},
        minimum=1,
        maximum=MAX_COUNT,
    )

    @property
    def checkpointed(self) -> int:
        """Every how many blocks one is recomputed in the backward pass; 0: none."""
        return int(self.gradient_checkpointing)


@dataclass(frozen=True)
class Sample:
    """Images generated during training, and how."""

    prompts: tuple[str, ...] = field(
        (),
        "One image is generated for each prompt. Without this key, fine-tuning takes four of your captions, "
        "held-out images' first, the last without the trigger word.",
    )
    references: tuple[str, ...] = field(
        (), "Image editing: the reference image of each prompt, or one for all prompts.", since="0.2"
    )
    negative: str = field("", "Negative prompt of all samples.")
    every: int | None = field(
        None,
        "Steps between sample grids; auto: an eighth of the run; never or 0: no samples.",
        unit="steps",
        words={"auto": None, "never": 0},
        minimum=0,
        maximum=MAX_COUNT,
    )
    collapse_check_every: int | None = field(
        None,
        "Models from scratch: steps between checks for mode collapse; null: off.",
        unit="steps",
        minimum=1,
        maximum=MAX_COUNT,
    )
    steps: int = field(25, "Denoising steps of a sample.", unit="steps", minimum=1, maximum=10_000)
    truncation: float = field(
        1.0,
        "GANs: distance from the mean latent (truncation trick).",
        effect="Below 1, images are better and more alike.",
        minimum=0,
        maximum=2,
    )
    guidance: float = field(
        7.0,
        "Classifier-free guidance scale, as the family's pipeline takes it; 1 is off (Z-Image: 0).",
        effect="Higher follows the prompt more closely and varies less.",
        minimum=0,
        maximum=1000.0,
    )
    sampler: str | None = field(
        None,
        "Sampler: `euler`, `euler-a`, `heun`, `dpm++` (2M), `unipc`, `ddim` or `ddpm`, as far as the family has it; "
        "null: the family's default.",
    )
    eta: float = field(0.0, "ddim: share of DDPM's noise added at each step.", minimum=0, maximum=1)
    seed: int = field(0, "Seed of the samples.", minimum=0, maximum=MAX_SEED)


@dataclass(frozen=True)
class Output:
    """Where results go."""

    folder: str | None = field(None, "Folder of the run; null: runs/METHOD-NAME.")
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = field((), "Also log to these trackers.")


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; `load_recipe` reads and checks it."""

    method: Method = plain_field(
        metadata=describe(
            "What trains.",
            choices={
                "lora": "an adapter on a pretrained model",
                "full": "all weights of a pretrained model",
                "scratch": "a new model",
            },
        )
    )
    model: Model
    data: Data
    train: Train
    adapter: Adapter | None = None
    prior: Prior | None = None
    tokens: tuple[Token, ...] = ()
    net: Any = None  # the family's own section, a `Net` of `finetune.config.nets`; None: it has none
    diffusion: Diffusion | None = None
    flow: Flow | None = None
    autoencoder: Autoencoder | None = None
    optimizer: Optimizer = plain_field(default_factory=Optimizer)
    sample: Sample = plain_field(default_factory=Sample)
    output: Output = plain_field(default_factory=Output)
    name: str = field("", "Name of the run, used in its folder's name; empty: the file's name without `.yaml`.")
    lines: dict[str, str] = plain_field(
        default_factory=dict, compare=False, repr=False, metadata={"internal": True}
    )  # dotted key → file:line


def trigger_words(recipe: Recipe) -> tuple[str, ...]:
    """`data.trigger` and the sources' caption prefixes, then new tokens that occur in none of them, each once."""
    prefixes = [words for words in (recipe.data.trigger, *(one.prefix for one in recipe.data.sources)) if words]
    return tuple(
        dict.fromkeys(
            [*prefixes, *(new.token for new in recipe.tokens if not any(new.token in prefix for prefix in prefixes))]
        )
    )


METHODS: tuple[str, ...] = get_args(Method)

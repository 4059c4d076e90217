"""`Recipe`: everything a person can say about a run, as frozen dataclasses, and the loader for its YAML.

One unit for one thing: lengths of a run are `steps` (of the optimizer) or `epochs` (passes over the images), whichever
the recipe names; sizes are pixels; rates are per optimizer step. Torch is not imported here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from finetune.adapters.kinds import KindName
from finetune.config import yaml_reader

Method = Literal["lora", "full", "scratch"]
Precision = Literal["float32", "float16", "bfloat16"]
Quantization = Literal["nf4", "int8"]


_number = yaml_reader.number


@dataclass(frozen=True)
class Model:
    """Which net. `family` is the module in `finetune/models/`."""

    family: str
    path: str | None = (
        None  # hub name, diffusers folder, one .safetensors file, or embedded:base; none when from scratch
    )
    transformer: str | None = (
        None  # another transformer than the one at `path`: one .safetensors file, as ComfyUI has them
    )
    vae: str | None = None  # another VAE than the one at `path`: a hub name, a folder, or the run that trained it
    base_run: str | None = None  # families that make small images large: the run that draws the small ones
    prediction: Literal["epsilon", "v_prediction"] | None = None  # none: as the checkpoint's scheduler says
    train_text_encoder: bool = False  # also trains the text encoder(s): LoRA on them, or all their weights
    quantize: Quantization | None = None  # the frozen denoiser's weights in 4 or 8 bits (QLoRA, arXiv:2305.14314)
    text_encoder_placement: Literal["device", "offload", "nf4", "int8"] = (
        "device"  # text encoders as they encode; offload: layer by layer from host memory
    )
    vae_tiling: bool = False  # the VAE works tile by tile: less memory at large sizes, and seams that are hardly seen
    build: dict[str, Any] = field(
        default_factory=dict
    )  # from scratch, of families without a `net` section: the arguments of each net's class


@dataclass(frozen=True)
class Source:
    """One folder of images or one Hugging Face data set."""

    path: str
    repeats: int = _number(1, minimum=1)  # each image counts so many times an epoch
    prefix: str = ""  # put before every caption: a trigger word
    weight: float = _number(1.0, above=0)  # factor on the loss of its images: below 1 for regularization
    limit: int | None = _number(None, minimum=1)  # only so many of its images, the first by name


@dataclass(frozen=True)
class Data:
    """The section `data`: what trains, and how images are cut to size."""

    path: str | None = None  # short for one source
    sources: tuple[Source, ...] = ()
    resolution: int = _number(512, minimum=4, maximum=4096)  # images train at about resolution² pixels
    buckets: bool = True  # keep each image's aspect ratio; false: crop all to a square
    bucket_step: int = _number(64, minimum=1)  # sides of buckets are multiples of this
    maximum_aspect: float = _number(2.0, minimum=1)  # the longest bucket's long side over its short side
    streaming: bool = False  # Hugging Face data sets: images are read where they are and never downloaded whole
    flip: bool = False  # also show each image mirrored
    background: str = "white"  # what transparent images are laid over: a CSS color
    image_column: str = "image"  # Hugging Face data sets: the column with the image
    caption_column: str = "text"  # metadata files and Hugging Face data sets: the column with the caption
    caption_dropout: float = _number(
        0.1, minimum=0, maximum=1
    )  # share of draws whose caption is emptied (for guidance)
    missing_captions: Literal["stop", "empty", "skip"] = "stop"
    unreadable_images: Literal["stop", "skip"] = "stop"
    long_captions: Literal["stop", "truncate"] = "stop"
    masks: str | None = (
        None  # where the loss counts: `beside` for NAME.mask.png beside each image, or a folder with masks of the same names
    )
    mask_column: str = "mask"  # with masks beside: the column with the mask, a file's name in metadata files, an image in Hugging Face data sets
    unmasked_weight: float = _number(0.0, minimum=0, below=1)  # how much the loss counts where a mask is black
    held_out: float = _number(0.0, minimum=0, maximum=0.5)  # share of images kept for the validation loss
    classes: Literal["captions", "folders"] | None = (
        None  # families that draw pixels: what an image's class is; none: they learn no condition
    )
    grayscale: bool = False  # families that draw pixels: one channel instead of three
    levels: int = _number(
        256, minimum=2, maximum=256
    )  # families that draw pixels: values that a channel takes, evenly spaced
    cache: str | None = None  # where latents and embeddings are kept; none: the user's cache folder


@dataclass(frozen=True)
class Prior:
    """DreamBooth's prior preservation (arXiv:2208.12242): images of the class, drawn by the base before training, train beside yours."""

    prompt: str  # what the class is called, such as `a photo of a dog`; also the caption of its images
    images: int = _number(200, minimum=1)
    weight: float = _number(1.0, above=0)  # factor on their loss


@dataclass(frozen=True)
class Token:
    """A new word for CLIP's text encoders, learned together with the LoRA: pivotal tuning by textual inversion (arXiv:2208.01618)."""

    token: str  # as captions and prompts write it, such as `<my-dog>`
    init_word: str = ""  # a word whose meaning it begins with, such as `dog`; "": at random
    vectors: int = _number(
        1, minimum=1, maximum=16
    )  # more hold more, and take as many of the tokens that a caption may have
    lr_multiplier: float = _number(10.0, above=0)  # how many times faster than all else it learns

    @property
    def file(self) -> str:
        """Where its vectors lie below an artifact's folder."""
        return f"embeddings/{re.sub('[^A-Za-z0-9_-]+', '', self.token) or 'word'}.safetensors"


@dataclass(frozen=True)
class Adapter:
    """What trains in place of the weights W, by PEFT's names and meanings.

    LoRA (arXiv:2106.09685): W + (alpha / rank) B A. LoHa (arXiv:2108.06098): two such products, multiplied element by element. LoKr
    (arXiv:2309.14859): a Kronecker product of a small matrix and such a product. OFT (arXiv:2306.07280): W times a rotation made of
    blocks, whose side is `rank`.
    """

    kind: KindName = "lora"
    rank: int = _number(16, minimum=1)
    alpha: float | None = _number(None, above=0)  # none: as the rank, a scale of 1
    rank_pattern: dict[str, int] = field(
        default_factory=dict
    )  # end of a layer's name, a regular expression → its own rank
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # likewise → its own alpha
    dropout: float = _number(0.0, minimum=0, below=1)
    targets: str = "attention"  # attention, attention+mlp, all-linear, or ends of layers' names, regular expressions, comma-separated
    rslora: bool = False  # scale alpha / √rank (arXiv:2312.03732)
    dora: bool = False  # also learn each row's magnitude (arXiv:2402.09353): dearer, often closer to full fine-tuning
    pissa: bool = False  # start from the weights' largest singular values (arXiv:2404.02948): learns faster, and the file has twice the rank
    # n: one of n steps takes the noisiest 1/n of the noise levels, and there has the adapter learn what the base says, not the images:
    # what is drawn where stays the base's, and names that are in no caption are kept; the other steps learn the style. 5 is a beginning.
    distill_every: int | None = _number(None, minimum=2)
    init_lora: str | None = (
        None  # a LoRA to go on from, in diffusers' or kohya's format: rank, alpha and targets are its own
    )


@dataclass(frozen=True)
class Diffusion:
    """The denoising loss, for families with a noise schedule."""

    min_snr_gamma: float | None = _number(None, above=0)  # weighs down easy steps (arXiv:2303.09556); 5 is usual
    noise_offset: float = _number(0.0, minimum=0)  # lets brightness be learned; 0.05–0.1 is usual
    zero_terminal_snr: bool = False  # noise goes to pure noise (arXiv:2305.08891); needs v_prediction
    huber: float | None = _number(None, above=0)  # pseudo-Huber's δ instead of squared error: outliers weigh less
    shift: float = _number(
        1.0, above=0
    )  # above 1 noisy steps are drawn more often: they learn what is where, the others how it is shaded


@dataclass(frozen=True)
class Flow:
    """The loss of flow matching (arXiv:2403.03206), for families that predict a velocity; none: as the family was trained."""

    sampling: Literal["logit_normal", "mode", "uniform"] | None = None  # how noise levels are drawn, before the shift
    mean: float = _number(0.0)  # logit-normal: above 0 more noise is seen, below 0 less
    std: float = _number(1.0, above=0)  # logit-normal: smaller sees the middle more, and the ends less
    mode_scale: float = _number(1.29, minimum=-1, maximum=1.75)  # mode: above 0 the middle is seen more
    shift: float | None = _number(
        None, above=0
    )  # moves noise levels up where above 1; none: as the checkpoint's scheduler says
    weighting: Literal["none", "cosmap", "sigma_sqrt"] = (
        "none"  # of the loss, by noise level; sigma_sqrt counts fine detail most
    )
    guidance: float | None = _number(
        None, minimum=0
    )  # embedded while training, for nets that read it; none: 1, no guidance


@dataclass(frozen=True)
class Autoencoder:
    """The VAE's loss: reconstruction + kl_weight · KL, each a mean over the image's or the latent's elements."""

    reconstruction: Literal["l1", "l2"] = "l1"
    color_weight: float = _number(1.0, minimum=1)  # above 1, color errors count more than errors of brightness
    coarse_weight: float = _number(
        0.0, minimum=0
    )  # also compare images averaged over a latent pixel: large areas and their colors come first
    kl_weight: float = _number(1e-4, minimum=0)


@dataclass(frozen=True)
class Optimizer:
    """The section `optimizer`."""

    name: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "schedulefree", "lion", "came"] = "adamw"
    lr: float = _number(1e-4, above=0)  # Prodigy finds its rate itself, and lr multiplies it: 1 is usual
    betas: tuple[float, ...] | None = None  # none: 0.9 and 0.999; Lion's: 0.9 and 0.99
    eps: float = _number(1e-8, above=0)
    weight_decay: float = _number(0.01, minimum=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = _number(0, minimum=0)
    clip_norm: float | None = _number(1.0, above=0)
    clip: Literal["global", "tensor"] = (
        "global"  # what clip_norm bounds: the norm of all gradients together, or of each tensor's alone
    )
    paged: bool = False  # 8-bit state moves to host memory when the GPU's is full, and back when it is used

    @property
    def moments(self) -> tuple[float, ...]:
        """The betas, the optimizer's own where the recipe gives none."""
        return self.betas if self.betas is not None else (0.9, 0.99) if self.name == "lion" else (0.9, 0.999)


@dataclass(frozen=True)
class Train:
    """The section `train`: how long, in which pieces, with which arithmetic."""

    steps: int | None = _number(None, minimum=1)
    epochs: float | None = _number(None, above=0)
    batch_size: int = _number(1, minimum=1)  # images at once on each device
    accumulation: int = _number(1, minimum=1)  # batches added up before the optimizer steps
    seed: int = _number(0, minimum=0)
    precision: Precision | None = None  # none: bfloat16 where the device has it, else float16 on CUDA, else float32
    weights: Literal["float32", "bfloat16"] = (
        "float32"  # that train whole; bfloat16 is half as large, and is rounded at random
    )
    # Less memory, about a third more time: true computes every block again in the backward pass, n every n-th.
    gradient_checkpointing: bool | int = _number(False, minimum=1)
    offload_blocks: bool = False  # frozen blocks of a transformer wait in host memory: far less on the GPU, and each step copies them twice
    fused_backward: bool = (
        False  # each weight steps as soon as its gradient is there, and the gradient goes; of full fine-tuning
    )
    ema: float | None = _number(None, above=0, below=1)  # decay of the averaged weights that are saved and sampled
    checkpoint_every: int = _number(500, minimum=1)
    keep_checkpoints: int = _number(2, minimum=1)
    validate_every: int = _number(200, minimum=1)

    @property
    def checkpointed(self) -> int:
        """Of how many blocks one is computed again in the backward pass; 0: of none."""
        return int(self.gradient_checkpointing)


@dataclass(frozen=True)
class Sample:
    """The section `sample`: what is drawn while training, and how."""

    prompts: tuple[str, ...] = ()
    negative: str = ""
    every: int = _number(500, minimum=1)  # training steps between sample grids
    collapse_check_every: int | None = _number(
        None, minimum=1
    )  # families that draw pixels: steps between looks for lost modes; none: no such looks
    steps: int = _number(25, minimum=1)  # denoising steps of a sample
    truncation: float = _number(
        1.0, minimum=0, maximum=2
    )  # of GANs: how far from the mean image one is; below 1 more alike and better made
    guidance: float = _number(7.0, minimum=0)  # as the family's pipeline takes it: mostly 1 is none, of Z-Image 0
    sampler: str | None = (
        None  # euler, euler-a, heun, dpm++ (2M), unipc, ddim or ddpm, as valid for the family; none: the base's own
    )
    eta: float = _number(0.0, minimum=0, maximum=1)  # ddim: 0 adds no noise on the way, 1 as much as ddpm
    seed: int = _number(0, minimum=0)


@dataclass(frozen=True)
class Output:
    """The section `output`."""

    folder: str | None = None  # none: runs/<method>-<name of the recipe>
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; `load_recipe` reads and checks it."""

    method: Method
    model: Model
    data: Data
    train: Train
    adapter: Adapter | None = None
    prior: Prior | None = None
    tokens: tuple[Token, ...] = ()
    net: Any = None  # the family's own section, a `Net` of `finetune.nets`; none: it has none
    diffusion: Diffusion | None = None
    flow: Flow | None = None
    autoencoder: Autoencoder | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    sample: Sample = field(default_factory=Sample)
    output: Output = field(default_factory=Output)
    name: str = ""  # filled by the loader: the file's name without `.yaml`
    places: dict[str, str] = field(
        default_factory=dict, compare=False, repr=False, metadata={"internal": True}
    )  # dotted key → file:line


def trigger_words(recipe: Recipe) -> tuple[str, ...]:
    """What the sources' captions begin with, and new words that do not stand there, each once."""
    prefixes = [source.prefix for source in recipe.data.sources if source.prefix]
    return tuple(
        dict.fromkeys(
            [*prefixes, *(new.token for new in recipe.tokens if not any(new.token in prefix for prefix in prefixes))]
        )
    )


METHODS: tuple[str, ...] = get_args(Method)

"""The sections `data` and `prior` of a recipe: what trains, and how images are read and cut to size."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as plain_field
from typing import Literal

from finetune.config.fields import MAX_COUNT, describe, field


@dataclass(frozen=True)
class Source:
    """One folder of images or one Hugging Face data set."""

    path: str = plain_field(
        metadata=describe(
            "A folder with images, a WebDataset shard pattern, a Hugging Face data set (`owner/name`), or "
            "`embedded:emoji/noto`."
        )
    )
    repeats: int = field(
        1,
        "How many times each image of this source counts in an epoch.",
        unit="times",
        effect="Balances a small source against a large one.",
        minimum=1,
        maximum=1_000_000,
    )
    prefix: str = field("", "Text put before every caption of this source, such as a trigger word.")
    weight: float = field(
        1.0,
        "Factor on the loss of this source's images.",
        effect="Below 1, the source only regularizes.",
        above=0,
        maximum=1000.0,
    )
    limit: int | None = field(
        None,
        "Use at most this many images, the first by name; null: all.",
        unit="images",
        minimum=1,
        maximum=MAX_COUNT,
    )
    generated: bool = plain_field(
        default=False, metadata={"internal": True}
    )  # class images, which take no trigger word


@dataclass(frozen=True)
class Data:
    """What trains, and how images are read and cut to size."""

    path: str | None = field(None, "The folder or data set to train on: short for `sources` with one entry.")
    sources: tuple[Source, ...] = field(
        (), "Several folders or data sets, each with its own repeats, prefix and weight."
    )
    trigger: str = field(
        "",
        "Trigger word: put before every caption that does not contain it, such as `sks dog`.",
        effect="The word later calls up what was trained.",
        since="0.2",
    )
    resolution: int = field(
        512,
        "Side of a square training image; other aspect ratios keep about this area.",
        unit="pixels",
        effect="Doubling it takes about four times the time and activation memory.",
        minimum=4,
        maximum=4096,
    )
    buckets: bool = field(
        True,
        "Keep each image's aspect ratio by sorting images into buckets of similar shape; false: crop all to a square.",
    )
    bucket_step: int = field(
        64,
        "Sides of buckets are multiples of this.",
        unit="pixels",
        effect="Smaller crops less and makes more buckets.",
        minimum=1,
        maximum=4096,
    )
    maximum_aspect: float = field(
        2.0,
        "Largest aspect ratio of a bucket: long side over short side.",
        effect="Longer images are cropped to it.",
        minimum=1,
        maximum=100.0,
    )
    frames: int = field(1, "Video families: frames of a clip.", unit="frames", minimum=1, maximum=10_000, since="0.2")
    fps: float = field(
        0.0,
        "Video families: frames per second at which clips are sampled; 0: every frame of the file.",
        minimum=0,
        maximum=1000.0,
        since="0.2",
    )
    streaming: bool = field(
        False,
        "Read a Hugging Face data set over the network while training instead of downloading it.",
        effect="Saves disk space; the first epoch is slower.",
    )
    flip: bool = field(
        False,
        "Also train on each image mirrored left to right.",
        effect="Twice the images; wrong where text or direction matters.",
    )
    background: str = field("white", "CSS color behind transparent images, such as `white` or `#202020`.")
    image_column: str = field("image", "Hugging Face data sets: the column with the image.")
    caption_column: str = field("text", "Metadata files and Hugging Face data sets: the column with the caption.")
    captions: str | None = field(
        None,
        "A .jsonl or .csv metadata file outside the folder whose captions replace the folder's, such as the one `ft "
        "ui` writes; `file_name` is relative to the folder.",
        since="0.2",
    )
    caption_dropout: float = field(
        0.1,
        "Share of training examples whose caption is replaced by an empty one.",
        effect="Teaches the unconditional prediction that classifier-free guidance needs.",
        minimum=0,
        maximum=1,
    )
    missing_captions: Literal["stop", "empty", "skip"] = field(
        "stop",
        "What to do with images that have no caption.",
        choices={
            "stop": "report them and stop",
            "empty": "train with an empty caption",
            "skip": "leave the image out",
        },
    )
    unreadable_images: Literal["stop", "skip"] = field(
        "stop",
        "What to do with files that cannot be decoded.",
        choices={"stop": "report them and stop", "skip": "leave the file out"},
    )
    long_captions: Literal["stop", "truncate"] = field(
        "stop",
        "What to do with captions longer than the text encoder reads.",
        choices={"stop": "report them and stop", "truncate": "train with the first tokens only"},
    )
    masks: str | None = field(
        None,
        "Where the loss counts: `beside` for NAME.mask.png next to each image, or a folder of masks with the same "
        "names.",
    )
    mask_column: str = field(
        "mask",
        "With `masks: beside`: the column with the mask, a file name in metadata files, an image in Hugging Face data "
        "sets.",
    )
    unmasked_weight: float = field(
        0.0,
        "Weight of the loss where a mask is black.",
        effect="0 ignores those pixels; 0.1 keeps the background plausible.",
        minimum=0,
        below=1,
    )
    held_out: float = field(
        0.0,
        "Share of the images kept for the validation loss and not trained on.",
        effect="Rising validation loss is the sign of overfitting.",
        minimum=0,
        maximum=0.5,
    )
    classes: Literal["captions", "folders"] | None = field(
        None,
        "Models from scratch: where an image's class label comes from; null: the model is unconditional.",
        choices={"captions": "each distinct caption is a class", "folders": "the name of the image's folder"},
    )
    grayscale: bool = field(False, "Models from scratch: train on one channel instead of three.")
    levels: int = field(
        256,
        "Models from scratch: number of evenly spaced values a channel takes.",
        unit="levels",
        effect="Fewer make likelihoods lower and images coarser.",
        minimum=2,
        maximum=256,
    )
    cache: str | None = field(None, "Folder for cached latents and text embeddings; null: the user's cache folder.")


@dataclass(frozen=True)
class Prior:
    """DreamBooth's prior preservation (arXiv:2208.12242): the run also trains on class images from the base model."""

    prompt: str = plain_field(
        metadata=describe("Prompt of the class images, such as `a photo of a dog`; also their caption.")
    )
    images: int = field(
        200,
        "How many class images the base model generates before training.",
        unit="images",
        minimum=1,
        maximum=1_000_000,
    )
    weight: float = field(1.0, "Factor on the loss of the class images.", above=0, maximum=1000.0)

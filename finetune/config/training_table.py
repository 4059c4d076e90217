"""How long to train, and with what settings: the table that recipes, `ft estimate` and `ft check` read. Torch-free data.

Lengths are image passes: updates × images per update. Ranges are the least and most that public sources use; the sources are
listed in `SOURCES`, and docs/how-to/choose-settings.md is generated from this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

Purpose = Literal["subject", "style", "concept", "general"]

PURPOSES: dict[Purpose, str] = {
    "subject": "one person, animal or object",
    "style": "one style",
    "concept": "one concept, such as a pose, a garment or a kind of scene",
    "general": "a large or mixed set",
}
NOUNS: dict[Purpose, str] = {
    "subject": "a subject",
    "style": "a style",
    "concept": "a concept",
    "general": "a large set",
}

FEW = 40  # images: up to here `Length.few` is the cap
SUBJECT_UP_TO = 50  # images: a recipe without train.purpose is taken to be about one subject up to here, else general
MOST_PASSES = 160_000  # of the largest sets: 10,000 updates at batch 16
LEAST_UPDATES = {"lora": 400, "full": 250}  # however large the batch
WARMUP = 0.05  # share of the run


@final
@dataclass(frozen=True)
class Length:
    """Image passes for one method and purpose.

    `per_image` passes over each image, at least `least` in total, at most `few` while there are few images; then
    `per_image_later` for each, at most `most`; and every image at least once.
    """

    per_image: int
    least: int
    few: int
    per_image_later: int
    most: int
    sources: str


LENGTHS: dict[tuple[str, Purpose], Length] = {
    ("lora", "subject"): Length(75, 1_000, 2_000, 30, 6_000, "D, A, C, R, F, G2, G4, G6, E"),
    ("lora", "style"): Length(40, 1_000, 4_000, 40, 6_000, "A, G2, G3, H3, H4"),
    ("lora", "concept"): Length(60, 2_000, 4_000, 60, 12_000, "A, D"),
    ("lora", "general"): Length(40, 2_000, 4_000, 40, 6_000, "A, S, L"),
    ("full", "subject"): Length(60, 800, 1_500, 30, 6_000, "D, H1, G1"),
    ("full", "style"): Length(100, 1_500, 4_000, 100, 20_000, "G1, G7"),
    ("full", "concept"): Length(100, 2_000, 4_000, 100, 40_000, "D, G7, K"),
    ("full", "general"): Length(60, 2_000, 4_000, 60, 40_000, "D, K, S, L"),
}

# Up to how many images → (least, most) image passes that public sources use; None: 1 to 10 passes over each image.
Range = tuple[int, int] | None
_LARGE: dict[int, Range] = {2_000: (6_000, 60_000)}
RANGES: dict[Purpose, dict[int, Range]] = {
    "subject": {14: (400, 3_000), 40: (1_000, 6_400), 200: (2_000, 8_000), **_LARGE},
    "style": {14: (500, 2_000), 40: (700, 4_000), 200: (1_200, 20_000), **_LARGE},
    "concept": {14: (400, 2_000), 40: (2_000, 4_000), 200: (4_000, 12_000), **_LARGE},
    "general": {14: (400, 2_000), 40: (2_000, 4_000), 200: (4_000, 12_000), **_LARGE},
}


@final
@dataclass(frozen=True)
class Base:
    """What training on one base differs by.

    Attributes:
        lora_lr: with AdamW and alpha = rank; the update scales with alpha / rank.
        full_lr: of all weights.
        factor: of all image passes but the least.
        note: what to know before training it.
    """

    lora_lr: float
    full_lr: float
    factor: float
    sources: str
    note: str = ""


BASES: dict[str, Base] = {
    "sd15": Base(1e-4, 1e-5, 1, "D, K, O, H1", "Subjects by full fine-tuning: 2e-6 to 5e-6."),
    "sd21": Base(1e-4, 1e-5, 1, "as SD 1.5; nothing else was published"),
    "sdxl": Base(1e-4, 5e-6, 1, "D, K, S, C, G1", "1e-5 if colors burn. A LoRA on the UNet alone is usual."),
    "sd35-medium": Base(1e-4, 1e-5, 1, "D, A, K, S", "Full fine-tuning: K uses 4e-6."),
    "flux1-dev": Base(1e-4, 1e-5, 1, "D, A, K, C, S", "1e-3 ruins it, 1e-5 learns next to nothing (S)."),
    "flux2-klein-4b": Base(1e-4, 1e-5, 0.5, "D, M, S, E, G2, G3", "Train the base, not the distilled klein."),
    "chroma": Base(1e-4, 1e-5, 1, "as FLUX.1; nothing else was published"),
    "qwen-image": Base(1e-4, 1e-5, 1, "A, S, M, O", "Artifacts: 5e-5."),
    "z-image": Base(1e-4, 1e-5, 1, "D, M, C, G4", "Train the base: Turbo loses its eight-step sampling."),
    "sana-1600m": Base(1e-4, 1e-5, 1, "D, S"),
    "pixart-sigma": Base(1e-4, 1e-5, 1, "O", "O trains LoRA at 1e-5 and rank 16, batch 4."),
    "lumina2": Base(1e-4, 1e-5, 0.75, "D, A, K, S", "Converges and overfits quickly."),
}
ANY_BASE = Base(1e-4, 1e-5, 1, "")


@final
@dataclass(frozen=True)
class Advice:
    """What a purpose asks of adapter and captions."""

    rank: int
    rank_range: str
    captions: str
    trigger: str


ADVICE: dict[Purpose, Advice] = {
    "subject": Advice(
        16,
        "8–16 for an object, 16–32 for a person",
        "the kind of thing, and what should stay free to vary: place, pose, light",
        "a rare word with the kind of thing: `sks dog`",
    ),
    "style": Advice(32, "16–32", "what is in the image, not its style", "one, or none to change the model as a whole"),
    "concept": Advice(32, "16–32", "everything in the image besides the concept", "one for each concept"),
    "general": Advice(32, "32–64, LoKr or full fine-tuning", "everything in the image", "none"),
}
EVEN_IMAGES = 200  # from here on a higher rank or full fine-tuning holds more

SOURCES: dict[str, str] = {
    "A": "ostris/ai-toolkit, `config/examples/`: 2,000 steps, “500–4,000 is a good range”",
    "C": "Civitai's training service, developer.civitai.com",
    "D": "huggingface/diffusers, `examples/dreambooth/`, `examples/text_to_image/` and their READMEs",
    "E": "huggingface/peft, `method_comparison/image-gen` (FLUX.2 klein, one subject)",
    "F": "cocktailpeanut/fluxgym, `app.py`: 10 repeats × 16 epochs",
    "G1": "docs.dreamlook.ai, SDXL guide: person 1,500 updates; style 100 per image",
    "G2": "stephen37/workshops, klein base LoRA: person 800–1,200 updates, style 500–800",
    "G3": "happyin.space, klein style LoRA (56 runs): max(500, 30 × images) at rank 32",
    "G4": "apatero.com, Z-Image Turbo character guide: 2,000–3,000 updates",
    "G6": "seaart.notion.site, SDXL LoRA: 100 passes per image",
    "G7": "civitai.com/articles/7521, SDXL full fine-tuning: 10–50 epochs over 600 images",
    "H1": "huggingface.co/blog/dreambooth: objects 400 updates at 2e-6, faces 800–1,200",
    "H3": "huggingface.co/blog/flux-qlora: style, 700 updates",
    "H4": "huggingface.co/blog/black-forest-labs/flux-2-klein-lora: 15–40 images of a style",
    "K": "kohya-ss/sd-scripts, `docs/`; `fine_tune`: 10,000 updates",
    "L": "LeX-Art issue 3: Lumina 2, 10,000 images, 10,000 updates",
    "M": "kohya-ss/musubi-tuner, `docs/`",
    "O": "Nerogar/OneTrainer, `training_presets/`",
    "R": "Replicate's FLUX trainer, configurations published with its models: 1,000 updates",
    "S": "bghira/SimpleTuner, `documentation/quickstart/`",
}

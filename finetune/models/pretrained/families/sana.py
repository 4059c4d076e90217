"""Sana (Xie et al. 2024, arXiv:2410.10629): linear attention, 32× smaller latents, Gemma 2 as text encoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from finetune.models.pretrained.family import Family
from finetune.models.spec import FamilySpec, Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from finetune.data.batch import Batch

SPEC = FamilySpec(
    slug="sana",
    title="Sana",
    implementation=f"{__name__}:Sana",
    paper="2410.10629",
    pipeline="SanaPipeline",
    objective="flow",
    denoiser_class="SanaTransformer2DModel",
    variants={
        "sana-1600m": Variant(
            hub=("Efficient-Large-Model/Sana_1600M_1024px_diffusers",),
            resolution=1024,
            released="2024-11",
            license="NVIDIA Open Model License",
            preference=80,
            commercial="no",
        )
    },
    single_file_keys=("blocks.0.mlp.inverted_conv.conv.weight",),
    lora_targets={"mlp": (r"ff\.conv_(inverted|point)",)},  # its MLP is convolutions
)


def instruction_of(pipeline: Any) -> list[str]:
    """What the pipeline puts before a prompt, as the original training did (§2.3, "complex human instruction")."""
    instruction: list[str] = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    return instruction


class Sana(Family):
    spec = SPEC
    tokens = 300  # the first one, the last one of the instruction, and the caption's
    patch = 1
    arguments: ClassVar[Mapping[str, Any]] = {
        "negative_prompt": None,
        "use_resolution_binning": False,
        "clean_caption": False,
    }

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """Last hidden states of the first and the last 299 tokens, and the mask of padding.

        A negative prompt has no instruction.
        """
        encoded = pipeline.encode_prompt(
            caption,
            negative,
            caption,
            device=device,
            max_sequence_length=self.tokens,
            complex_human_instruction=instruction_of(pipeline),
        )
        embeddings, mask = encoded[2:] if negative else encoded[:2]
        return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}

    def caption_tokens(self, pipeline: Any, caption: str) -> tuple[int, int]:
        """Tokens of the caption without the instruction."""
        instruction = "\n".join(instruction_of(pipeline))
        alone, both = (
            len(pipeline.tokenizer(text, verbose=False).input_ids)
            for text in (instruction, instruction + caption.lower().strip())
        )
        return both - alone, self.tokens - 2

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """As in `Family`. The network takes the timestep times its `timestep_scale`."""
        config: Any = denoiser.config
        predicted: Tensor = denoiser(
            noisy,
            encoder_hidden_states=batch["prompt_embeds"].to(noisy.dtype),
            encoder_attention_mask=batch["prompt_attention_mask"],
            timestep=timestep * config.timestep_scale,
            return_dict=False,
        )[0]
        return predicted

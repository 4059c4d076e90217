"""Train a LoRA on a pretrained model: recipe → plan → model → train → save.

accelerate launch finetune/lora.py recipes/lora/emoji.yaml [--set KEY=VALUE ...] [--resume] [--force]
"""

from __future__ import annotations

import sys
from pathlib import Path

# Launched as a file, Python puts this folder itself on the path: `import finetune` would fail, and modules here would
# shadow others. The checkout takes its place.
if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def main() -> None:
    """What `accelerate launch` runs in each process: the recipe and overrides of the command line."""
    from finetune.cli.process import arguments, launched, quiet_libraries

    with launched():
        recipe, resume, force = arguments("lora")  # what is asked; refused here, before anything that takes long
        quiet_libraries()
        from finetune.job import finish, prepare
        from finetune.report import model_summary

        job = prepare(
            recipe, resume, force
        )  # audited, planned, base loaded and frozen, adapters put on, images encoded
        job.accelerator.print(model_summary.adapted(job.model))
        job.trainer.train()  # the one loop; only the adapters have gradients
        finish(job)  # pytorch_lora_weights.safetensors, and the report


if __name__ == "__main__":
    main()

"""Train all weights of a pretrained model: recipe → plan → model → train → save.

accelerate launch finetune/full.py recipes/full/emoji.yaml [--set KEY=VALUE ...] [--resume] [--force]
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
        recipe, resume, force = arguments("full")  # what is asked; refused here, before anything that takes long
        quiet_libraries()
        from finetune.job import finish, prepare
        from finetune.report import model_summary

        job = prepare(recipe, resume, force)  # audited, planned, base loaded in float32, images encoded
        job.accelerator.print(model_summary.whole(job.model, job.plan))  # with the memory that this takes
        job.trainer.train()  # the one loop; the denoiser itself has gradients
        finish(job)  # a whole pipeline as diffusers loads it, and the report


if __name__ == "__main__":
    main()

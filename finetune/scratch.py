"""Train a model from scratch: recipe → plan → model → train → save.

    accelerate launch finetune/scratch.py recipes/scratch/emoji-vae.yaml [--set KEY=VALUE ...] [--resume]
"""

from __future__ import annotations

import sys
from pathlib import Path

# Launched as a file, Python puts this folder itself on the path: `import finetune` would fail, and modules here would
# shadow others. The checkout takes its place.
if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def main() -> None:
    from finetune.entry import arguments, told
    from finetune.job import finish, prepare

    with told():
        recipe, resume = arguments("scratch")  # what is asked
        job = prepare(recipe, resume)  # audited, planned, built, encoded; refused here if it cannot work
        job.trainer.train()  # the one loop
        finish(job)  # plain diffusers files


if __name__ == "__main__":
    main()

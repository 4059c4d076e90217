"""Fine-tune a whole pretrained model: audit → plan → estimate → build → encode → train → export (`finetune/job.py`).

    accelerate launch finetune/full.py [RECIPE] [--set KEY=VALUE ...] [--resume] [--force]

Without RECIPE, it trains `full/emoji`, whose base model and images come with this package.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this file's folder on the path, where its modules would shadow others: the checkout takes its place.
    if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
        sys.path[0] = str(Path(__file__).resolve().parents[1])

    from finetune.cli.launch_target import main

    raise SystemExit(main("full"))

"""Launched by `accelerate launch` with two processes: takes each recipe of its arguments to its end, in one import of everything.

A folder that is there already is gone on with. In the last run rank 1 breaks, and all must end with its error shown.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    from finetune.entry import launched, quiet_libraries
    from finetune.recipe import load_recipe

    with launched():
        quiet_libraries()
        from finetune import job

        for file in sys.argv[1:]:
            recipe = load_recipe(file)
            ready = job.prepare(recipe, resume=os.path.isdir(recipe.output.folder or ""))
            accelerator = ready.accelerator
            assert accelerator.num_processes == 2
            if accelerator.is_main_process:
                print(f"{Path(file).stem}: {accelerator.num_processes} × {accelerator.distributed_type.value}", flush=True)
            if file == sys.argv[-1] and accelerator.process_index == 1:
                raise ValueError("rank 1 has had enough")
            ready.trainer.train()


if __name__ == "__main__":
    main()

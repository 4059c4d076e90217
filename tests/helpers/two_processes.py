"""Run by `accelerate launch` with two processes: trains each recipe in its arguments, with one import of everything.

A run whose folder exists is resumed. Recipes whose names begin with `fsdp` train with sharded weights. In the run
`breaks`, rank 1 fails, and all processes must end with its error shown.
"""

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def allow_fsdp_on_cpus() -> None:
    """Accelerate shards on GPUs only, by one condition in `AcceleratorState.__init__`.

    The code behind it works on CPUs too.
    """
    from accelerate import Accelerator, DistributedType, PartialState

    from finetune import job

    class Sharing(Accelerator):  # type: ignore[misc]
        def __init__(self, *, fsdp_plugin: Any, **given: Any) -> None:
            known = PartialState._shared_state
            if known:  # left by the previous recipe
                known["distributed_type"] = DistributedType.MULTI_CPU
            super().__init__(fsdp_plugin=fsdp_plugin, **given)
            if fsdp_plugin is not None:
                known["distributed_type"] = self.state.distributed_type = DistributedType.FSDP
                self.state.fsdp_plugin = fsdp_plugin

    job.Accelerator = Sharing  # type: ignore[attr-defined]


def fail_on_second_scan(*given: object) -> NoReturn:
    raise AssertionError("only rank 0 may scan the images")


def main() -> None:
    from finetune import terminal
    from finetune.cli.process import training_process
    from finetune.config.loader import load_recipe

    with training_process():
        terminal.silence_libraries()
        from finetune import job

        if os.environ["RANK"] != "0":
            job.scan = fail_on_second_scan  # type: ignore[assignment,attr-defined]
        allow_fsdp_on_cpus()
        for file in sys.argv[1:]:
            recipe = load_recipe(file)
            os.environ["ACCELERATE_USE_FSDP"] = str(Path(file).stem.startswith("fsdp")).lower()
            ready = job.prepare(recipe, resume=os.path.isdir(recipe.output.folder or ""))
            accelerator = ready.accelerator
            assert accelerator.num_processes == 2
            if accelerator.is_main_process:
                machines = os.environ["GROUP_WORLD_SIZE"]  # torchrun: the number of launchers
                print(
                    f"{Path(file).stem}: {accelerator.num_processes} × {accelerator.distributed_type.value}, machines: {machines}",
                    flush=True,
                )
            if Path(file).stem == "breaks" and accelerator.process_index == 1:
                raise ValueError("rank 1 has had enough")
            ready.trainer.train()
            if accelerator.is_fsdp2:
                accelerator.end_training = lambda: None  # it would end the process group
                job.export_result(ready)


if __name__ == "__main__":
    main()

"""What changes as a run trains: weights, their averages, the optimizers and the gradient scaler, made ready by Accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.engine import sharding
from finetune.engine.checkpoint import Checkpoint
from finetune.engine.optim import Ema, make_optimizer, schedule_free
from finetune.engine.update import TensorByTensor, make_update, widened
from finetune.errors import UserError
from finetune.models.turn import Model
from finetune.planning import Plan


class TrainingState:
    """The nets on their device, with what trains them. `turns`, `parameters` and `optimizers` go side by side."""

    def __init__(self, plan: Plan, model: Model, accelerator: Accelerator) -> None:
        self._plan, self._accelerator = plan, accelerator
        self.turns = model.turns()
        for turn in self.turns:
            # To be shared out, weights lie as torch lays them, and come to the device block by block: there may be no room for all.
            turn.net.to(**{"memory_format": torch.contiguous_format} if accelerator.is_fsdp2 else {"device": accelerator.device})
            if accelerator.num_processes > 1:
                sharding.settle_strides(turn.net)
        # Taken after the move, which replaces buffers, and before Accelerate's wrapper, which lengthens names.
        self._tensors, trained = model.state(), model.trained()
        self.optimizers, self.updates = [], []
        for turn in self.turns:
            if accelerator.is_fsdp2:
                sharding.cut(accelerator, turn.net)
            # Moved once more, to a device that has a number ("cpu:0"), buffers would become copies, and those taken above stay as they began.
            placed = [False, True]
            turn.net, optimizer = accelerator.prepare(turn.net, self._optimizer(turn.name, turn.parameters()), device_placement=placed)
            turn.net.train()
            self.optimizers.append(optimizer)
            self.updates.append(make_update(plan.recipe, turn.parameters(), optimizer, accelerator))
        if accelerator.is_fsdp2:  # by the same names, each tensor is now a part of the one that was there
            self._tensors, trained = model.state(), model.trained()
        self.parameters = [turn.parameters() for turn in self.turns]
        self.ema = Ema(trained, plan.recipe.train.ema) if plan.recipe.train.ema else None

    def _optimizer(self, turn: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        recipe, device = self._plan.recipe, self._accelerator.device
        if recipe.train.weights == "float32" and not recipe.train.fused_backward:
            return make_optimizer(recipe.optimizer, parameters, device)
        inner = make_optimizer(recipe.optimizer, [widened(parameter) for parameter in parameters], device)
        return TensorByTensor(inner, parameters, (recipe.train.seed, turn))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the nets are in evaluation mode and hold their averaged weights, if the run or its optimizer keeps any."""
        for turn in self.turns:
            turn.net.eval()
        if self.ema is not None:
            self.ema.swap()
        try:
            with contextlib.ExitStack() as stack:
                for optimizer in self.optimizers:
                    stack.enter_context(schedule_free(optimizer))
                yield
        finally:
            if self.ema is not None:
                self.ema.swap()
            for turn in self.turns:
                turn.net.train()

    def live(self) -> dict[str, list[Tensor]]:
        """The tensors that stay from step to step, by part."""
        weights = [tensor for turn in self.turns for tensor in (*turn.net.parameters(), *turn.net.buffers())]
        trained = {id(parameter) for parameters in self.parameters for parameter in parameters}
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        found = {
            "frozen weights": [tensor for tensor in weights if id(tensor) not in trained],
            "weights that train": [tensor for tensor in weights if id(tensor) in trained],
            "gradients": [tensor.grad for tensor in weights if id(tensor) in trained and tensor.grad is not None],
            self._plan.recipe.optimizer.name: [value for state in states for value in state.values() if isinstance(value, Tensor)],
            "averages": list(self.ema.averages.values()) if self.ema is not None else [],
        }
        return {name: [sharding.part(tensor) for tensor in tensors] for name, tensors in found.items()}

    def checkpoint(self, step: int, validation: float | None = None) -> Checkpoint:
        """All that a run needs to go on after `step` finished steps; whole on the main process, while all call this together.

        Its tensors are the living ones where they are not shared out: write them at once.
        """
        scaler, kept = self._accelerator.scaler, self._accelerator.is_main_process
        return Checkpoint(
            step=step,
            weights=sharding.whole({name: tensor.detach().contiguous() for name, tensor in self._tensors.items()}, kept),
            averages=sharding.whole({name: tensor.contiguous() for name, tensor in self.ema.averages.items()}, kept) if self.ema is not None else {},
            optimizers={turn.name: sharding.whole(optimizer.state_dict(), kept) for turn, optimizer in zip(self.turns, self.optimizers, strict=True)},
            facts={
                "validation": validation,
                "threads": torch.get_num_threads(),
                "processes": self._plan.machine.processes,
                "precision": self._plan.precision,
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
        )

    @torch.no_grad()
    def restore(self, found: Checkpoint) -> list[str]:
        """Go back to `found`; returns a sentence for each reason why going on will not be exact.

        Raises:
            UserError: the checkpoint is of other weights.
        """
        facts, machine = found.facts, self._plan.machine
        if self._tensors.keys() != found.weights.keys():
            raise UserError("the checkpoint holds other weights than this recipe trains", where=self._plan.folder, remedy="start a new run")
        for name, tensor in self._tensors.items():
            tensor.copy_(sharding.shared(found.weights[name], tensor))
        if self.ema is not None:
            for name, average in self.ema.averages.items():
                average.copy_(sharding.shared(found.averages[name], average))
        for turn, optimizer, parameters in zip(self.turns, self.optimizers, self.parameters, strict=True):
            saved = found.optimizers[turn.name]
            states = {place: sharding.shared(state, parameters[place]) for place, state in saved["state"].items()}
            optimizer.load_state_dict(saved | {"state": states})
        if self._accelerator.scaler is not None and facts["scaler"]:
            self._accelerator.scaler.load_state_dict(facts["scaler"])
        said = []
        if facts["threads"] != (threads := torch.get_num_threads()):
            said.append(f"{facts['threads']} threads before, {threads} now: sums run in another order, so going on is exact no more")
        if facts["processes"] != machine.processes:
            said.append(f"{facts['processes']} processes before, {machine.processes} now: the same pictures a step, summed in another order")
        if facts["precision"] != self._plan.precision:
            said.append(f"{facts['precision']} before, {self._plan.precision} now: going on is exact no more")
        if machine.device != "cpu":
            said.append("a GPU adds up some gradients in no fixed order: going on is exact but for rounding")
        return said

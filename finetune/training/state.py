"""What changes during training: weights, their averages, optimizers and the gradient scaler, prepared by Accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.models.base import Model
from finetune.planning import Plan
from finetune.terminal import plural
from finetune.training import fsdp
from finetune.training.checkpoint import Checkpoint
from finetune.training.optimizer_step import TensorByTensor, make_update, widened
from finetune.training.optimizers import Ema, make_optimizer, schedule_free


class TrainingState:
    """The networks with their optimizers: `train_steps`, `parameters` and `optimizers` are parallel lists."""

    def __init__(self, plan: Plan, model: Model, accelerator: Accelerator) -> None:
        self._plan, self._accelerator = plan, accelerator
        self.train_steps = model.train_steps()
        for train_step in self.train_steps:
            # FSDP needs contiguous weights, and moves them to the device block by block: there may be no room for all.
            train_step.net.to(
                **{"memory_format": torch.contiguous_format} if accelerator.is_fsdp2 else {"device": accelerator.device}
            )
            if accelerator.num_processes > 1:
                fsdp.settle_strides(train_step.net)
        # After the move, which replaces buffers, and before Accelerate's wrapper, which changes names.
        self._tensors, trained = model.state(), model.trained()
        self.optimizers, self.updates = [], []
        for train_step in self.train_steps:
            if accelerator.is_fsdp2:
                fsdp.cut(accelerator, train_step.net)
            # A second move, to an indexed device ("cpu:0"), would copy buffers, and those above would go stale.
            placed = [False, True]
            train_step.net, optimizer = accelerator.prepare(
                train_step.net, self._optimizer(train_step.name, train_step.parameters()), device_placement=placed
            )
            train_step.net.train()
            self.optimizers.append(optimizer)
            self.updates.append(make_update(plan.recipe, train_step.parameters(), optimizer, accelerator))
        if accelerator.is_fsdp2:  # the same names now hold shards
            self._tensors, trained = model.state(), model.trained()
        self.parameters = [train_step.parameters() for train_step in self.train_steps]
        self.ema = Ema(trained, plan.recipe.train.ema) if plan.recipe.train.ema else None

    def _optimizer(self, train_step: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        recipe, device = self._plan.recipe, self._accelerator.device
        if recipe.train.weights == "float32" and not recipe.train.fused_backward:
            return make_optimizer(recipe.optimizer, parameters, device)
        inner = make_optimizer(recipe.optimizer, [widened(parameter) for parameter in parameters], device)
        return TensorByTensor(inner, parameters, (recipe.train.seed, train_step))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the networks are in evaluation mode with averaged weights, if the run or its optimizer keeps any."""
        for train_step in self.train_steps:
            train_step.net.eval()
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
            for train_step in self.train_steps:
                train_step.net.train()

    def live(self) -> dict[str, list[Tensor]]:
        """The tensors that persist from step to step, by part."""
        weights = [
            tensor
            for train_step in self.train_steps
            for tensor in (*train_step.net.parameters(), *train_step.net.buffers())
        ]
        trained = {id(parameter) for parameters in self.parameters for parameter in parameters}
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        found = {
            "frozen weights": [tensor for tensor in weights if id(tensor) not in trained],
            "weights that train": [tensor for tensor in weights if id(tensor) in trained],
            "gradients": [tensor.grad for tensor in weights if id(tensor) in trained and tensor.grad is not None],
            self._plan.recipe.optimizer.name: [
                value for state in states for value in state.values() if isinstance(value, Tensor)
            ],
            "averages": list(self.ema.averages.values()) if self.ema is not None else [],
        }
        return {name: [fsdp.part(tensor) for tensor in tensors] for name, tensors in found.items()}

    def checkpoint(self, step: int, validation: float | None = None) -> Checkpoint:
        """Everything a run needs to resume after `step` finished steps; all processes call this, the main one gets it.

        Unless they are sharded, its tensors are the live ones: write them at once.
        """
        scaler, kept = self._accelerator.scaler, self._accelerator.is_main_process
        return Checkpoint(
            step=step,
            weights=fsdp.whole({name: tensor.detach().contiguous() for name, tensor in self._tensors.items()}, kept),
            averages=fsdp.whole({name: tensor.contiguous() for name, tensor in self.ema.averages.items()}, kept)
            if self.ema is not None
            else {},
            optimizers={
                train_step.name: fsdp.whole(optimizer.state_dict(), kept)
                for train_step, optimizer in zip(self.train_steps, self.optimizers, strict=True)
            },
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
        """Load a checkpoint; returns a message for each reason why resuming is not bit-exact.

        Raises:
            UserError: the checkpoint holds other weights.
        """
        facts, machine = found.facts, self._plan.machine
        if self._tensors.keys() != found.weights.keys():
            raise UserError(
                "the checkpoint does not hold the weights that this recipe trains",
                where=self._plan.folder,
                remedy="start a new run",
            )
        for name, tensor in self._tensors.items():
            tensor.copy_(fsdp.shared(found.weights[name], tensor))
        if self.ema is not None:
            for name, average in self.ema.averages.items():
                average.copy_(fsdp.shared(found.averages[name], average))
        for train_step, optimizer, parameters in zip(self.train_steps, self.optimizers, self.parameters, strict=True):
            saved = found.optimizers[train_step.name]
            states = {place: fsdp.shared(state, parameters[place]) for place, state in saved["state"].items()}
            optimizer.load_state_dict(saved | {"state": states})
        if self._accelerator.scaler is not None and facts["scaler"]:
            self._accelerator.scaler.load_state_dict(facts["scaler"])
        notes = []
        if facts["threads"] != (threads := torch.get_num_threads()):
            notes.append(
                f"{plural(facts['threads'], 'thread')} before, {threads} now: resuming is not bit-exact,"
                " because sums are computed in another order"
            )
        if facts["processes"] != machine.processes:
            notes.append(
                f"{plural(facts['processes'], 'process', 'processes')} before, {machine.processes} now:"
                " the same images a step, summed in another order"
            )
        if facts["precision"] != self._plan.precision:
            notes.append(f"{facts['precision']} before, {self._plan.precision} now: resuming is not bit-exact")
        if machine.device != "cpu":
            notes.append("a GPU sums some gradients in no fixed order: resuming is exact except for rounding")
        return notes

"""The training loop: the only one in the project. It knows turns and losses, and nothing of any family."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import NoReturn

import torch
from accelerate import Accelerator

from finetune.data.dataset import Dataset
from finetune.engine import checkpoint
from finetune.engine.draw import Draw
from finetune.engine.optim import found_rate, learning_rate
from finetune.engine.progress import Progress
from finetune.engine.run import Run
from finetune.engine.state import TrainingState
from finetune.errors import UserError
from finetune.estimate.expect import Expected, Pace
from finetune.models.turn import Batch, Model, Turn
from finetune.planning import Plan
from finetune.seeds import mix


class Clock:
    """Wall seconds by what they went to. On a GPU they show when the host was busy, not when the kernels ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, what: str) -> None:
        """Book the time since the last call on `what`."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._last
        self._last = now


class Trainer:
    """One run.

    Args:
        observe: called with the number of finished steps when the recipe asks for samples, the averaged weights in place.
        pace: is told how long each step takes, and warns when that is far from the estimate.
    """

    def __init__(
        self,
        plan: Plan,
        model: Model,
        data: Dataset,
        run: Run,
        accelerator: Accelerator,
        observe: Callable[[int], None] | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.plan, self.data, self.run, self.accelerator, self.observe = plan, data, run, accelerator, observe
        self.state = TrainingState(plan, model, accelerator)
        self.pace = pace or Pace(Expected(None, "none was asked for"), lambda: None)
        self.clock = Clock()

    def train(self) -> None:
        """Take every step of the plan that is not yet taken."""
        train, sample, steps = self.plan.recipe.train, self.plan.recipe.sample, self.plan.steps
        done = self.resume()
        if done == 0:
            self._observe(0)
        progress = Progress("step", enabled=self.accelerator.is_main_process)
        for step in range(done, steps):
            record, done = self.take(step), step + 1
            if self.data.has_validation and (done % train.validate_every == 0 or done == steps):
                record["validation"] = self.validate()
            self._log(record, progress)
            if done % train.checkpoint_every == 0 or done == steps:
                self.save(done)
            if done % sample.every == 0 or done == steps:
                progress.end()
                self._observe(done)
        progress.end()

    def take(self, step: int) -> dict[str, float]:
        """Take one step (counted from 0): each turn in order. Returns its line of `metrics.jsonl`."""
        start = time.perf_counter()
        rate = learning_rate(self.plan.recipe.optimizer, step, self.plan.steps)
        record: dict[str, float] = {"step": step + 1, "lr": rate}
        for number, turn in enumerate(self.state.turns):
            record[f"loss.{turn.name}"], record[f"gradient.{turn.name}"] = self._turn(step, number, rate)
            record["lr"] = found_rate(self.state.optimizers[number])
        if self.state.ema is not None:
            self.state.ema.update(step)
        self.clock.lap("optimizer")
        return record | {"seconds": time.perf_counter() - start}

    def _turn(self, step: int, number: int, rate: float) -> tuple[float, float]:
        """One optimizer step of one turn; returns (mean loss, norm of the gradient before clipping).

        Raises:
            UserError: either is not finite; the weights are as they were before the step.
        """
        recipe, accelerator, state = self.plan.recipe, self.accelerator, self.state
        turn, parameters, optimizer = state.turns[number], state.parameters[number], state.optimizers[number]
        total = torch.zeros((), device=accelerator.device)
        for micro in range(recipe.train.accumulation):
            draw = Draw(recipe.train.seed, step, self.places(micro))
            batch = self._moved(self.data.batch(step, draw.places, draw))
            self.clock.lap("data")
            # Dropout inside the nets draws from torch's global generator: it too becomes a function of the step.
            torch.manual_seed(mix(recipe.train.seed, "dropout", step, draw.places[0]))
            last = micro == recipe.train.accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(turn.net):
                with accelerator.autocast():
                    loss = turn.loss(batch, draw.on(accelerator.device)).mean() / recipe.train.accumulation
                self.clock.lap("forward")
                accelerator.backward(loss)
            total += loss.detach()
            self.clock.lap("backward")
        norm = accelerator.clip_grad_norm_(parameters, recipe.optimizer.clip_norm or math.inf)
        mean, size = torch.stack([accelerator.reduce(total, "mean"), norm]).tolist()
        # A scaler skips float16's overflows by itself, and halves its scale; below 1 it is not the scale that overflows.
        finite = math.isfinite(size) or (accelerator.scaler is not None and accelerator.scaler.get_scale() >= 1)
        if not (math.isfinite(mean) and finite):
            self._stop(step, turn, mean, size)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return mean, size

    def places(self, micro: int) -> list[int]:
        """This process's places in the global batch, for one of its accumulated batches."""
        size = self.plan.recipe.train.batch_size
        start = (micro * self.plan.machine.processes + self.accelerator.process_index) * size
        return list(range(start, start + size))

    def _moved(self, batch: Batch) -> Batch:
        return {key: value.to(self.accelerator.device) for key, value in batch.items()}

    def _log(self, record: dict[str, float], progress: Progress) -> None:
        if self.accelerator.is_main_process:
            self.run.log(record)
        if self.plan.recipe.output.trackers:
            self.accelerator.log(record, step=int(record["step"]))
        losses = [f"{name.partition('.')[2]} loss {value:.4f}" for name, value in record.items() if name.startswith("loss.")]
        if warning := self.pace.took(record["seconds"]):
            progress.end()
            self.accelerator.print(warning, flush=True)
        progress.show(int(record["step"]), self.plan.steps, " · ".join([f"{record['seconds']:.2f} s/step", *losses]))
        self.clock.lap("log")

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the held-out pictures, with the same noise and timesteps at every validation, of the averaged weights."""
        turn, device = self.state.turns[0], self.accelerator.device
        with self.state.averaged(), self.accelerator.autocast():
            losses = [turn.loss(self._moved(batch), draw.on(device)).mean() for batch, draw in self.data.validation()]
        self.clock.lap("validation")
        return float(torch.stack(losses).mean())

    def save(self, done: int) -> None:
        """Write the checkpoint of `done` finished steps."""
        if self.accelerator.is_main_process:
            checkpoint.save(self.run.folder / "checkpoints", self.state.checkpoint(done), self.plan.recipe.train.keep_checkpoints)
        self.accelerator.wait_for_everyone()
        self.clock.lap("checkpoint")

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one; returns the number of finished steps."""
        found, said = checkpoint.newest(self.run.folder / "checkpoints", self.accelerator.device)
        if found is not None:
            said += [f"going on after step {found.step}", *self.state.restore(found)]
        for sentence in said:
            self.accelerator.print(sentence)
        done = found.step if found is not None else 0
        if done > self.plan.steps:
            raise UserError(
                f"the run has taken {done} steps, and {self.plan.steps} are asked for",
                where=str(self.run.folder),
                remedy=f"set train.steps: {done} or more",
            )
        if self.accelerator.is_main_process:
            self.run.forget_after(done)
        return done

    def _observe(self, done: int) -> None:
        """Draw samples, on the main process; the others wait at the next step's gradients."""
        if self.observe is None or not self.accelerator.is_main_process:
            return
        with self.state.averaged():
            self.observe(done)
        self.clock.lap("samples")

    def _stop(self, step: int, turn: Turn, loss: float, norm: float) -> NoReturn:
        before = checkpoint.checkpoints(self.run.folder / "checkpoints")
        raise UserError(
            f"step {step + 1}: the {turn.name} loss is {loss:g} and its gradient's norm {norm:g}; stopped before the weights took it",
            where="; ".join(self.data.names(step)),
            remedy=f"the last good checkpoint is {before[-1] if before else 'none yet'}; try a lower optimizer.lr or train.precision: float32",
        )

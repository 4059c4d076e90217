"""The training loop: the only one in the project. It knows turns and losses, and nothing of any family."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator

from finetune.data.batch import Batch
from finetune.data.dataset import Dataset
from finetune.errors import Stopped
from finetune.estimate.monitor import Expected
from finetune.models.base import Model
from finetune.planning import Plan
from finetune.rng import Draw, mix
from finetune.terminal import Progress
from finetune.training import checkpoint
from finetune.training.device import from_empty_cache, memory_live
from finetune.training.failures import memory_explained, not_finite, too_far
from finetune.training.optimizers import effective_lr, learning_rate
from finetune.training.pace import Pace
from finetune.training.run_folder import Run
from finetune.training.signals import Signals
from finetune.training.state import TrainingState
from finetune.training.watchdog import Clock, Watchdog


class Trainer:
    """One run.

    Args:
        observe: called with the number of finished steps when the recipe asks for samples, the averaged weights in place.
        pace: is told how long each step takes, and warns when that is far from the estimate.
        watch: called likewise when the recipe asks for it; returns what the step's record is told, and an alarm or "".
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
        watch: Callable[[int], tuple[dict[str, float], str]] | None = None,
    ) -> None:
        self.plan, self.data, self.run, self.accelerator, self.observe, self.watch = (
            plan,
            data,
            run,
            accelerator,
            observe,
            watch,
        )
        self.state = TrainingState(plan, model, accelerator)
        self.pace = pace or Pace(Expected(None, "none was asked for"), lambda: None)
        self.clock = Clock()
        self.progress = Progress("step", enabled=accelerator.is_main_process)

    def train(self) -> None:
        """Take every step of the plan that is not yet taken.

        Raises:
            Stopped: a signal came; the steps that were finished are saved.
            UserError: a loss, a gradient, a disk or a memory that training cannot go on with.
        """
        signals = Signals(self.accelerator)
        tight = memory_explained(
            self.plan.recipe, self.pace.expected, lambda: memory_live(self.accelerator.device, self.state.live())
        )
        with (
            self.run.status.phase("training"),
            Watchdog(self.run.status, self.clock, self._say),
            signals.heard(),
            tight,
        ):
            self._train(signals)

    def _train(self, signals: Signals) -> None:
        train, steps = self.plan.recipe.train, self.plan.steps
        done = self.resume()
        self._observe(done, signals)
        for step in range(done, steps):
            record, done = self.train_step(step), step + 1
            stopping = signals.agreed()
            saves = done % train.checkpoint_every == 0 or done == steps or self._draws(done) or stopping
            if self.data.has_validation and not stopping and (done % train.validate_every == 0 or saves):
                record["validation"] = self.validate()
            record |= self._watched(done, signals)
            self._log(record)
            if saves:
                self.save(done, record.get("validation"))
            if stopping:
                raise Stopped(f"stopped after step {done}, which is saved; --resume goes on from there", stopping)
            self._observe(done, signals)
        self.progress.end()

    def train_step(self, step: int) -> dict[str, float]:
        """Take one step (counted from 0): each turn in order. Returns its line of `metrics.jsonl`."""
        start = time.perf_counter()
        rate = learning_rate(self.plan.recipe.optimizer, step, self.plan.steps)
        record: dict[str, float] = {"step": step + 1, "lr": rate}
        for number, train_step in enumerate(self.state.train_steps):
            if step % train_step.every:
                continue
            record[f"loss.{train_step.name}"], record[f"gradient.{train_step.name}"] = self._run_phase(
                step, number, rate
            )
            record["lr"] = effective_lr(self.state.optimizers[number])
        if self.state.ema is not None:
            self.state.ema.update(step)
        self.clock.lap("optimizer")
        return record | {"seconds": time.perf_counter() - start}

    def _run_phase(self, step: int, number: int, rate: float) -> tuple[float, float]:
        """One optimizer step of one turn; returns (mean loss, norm of the gradient before clipping).

        Raises:
            UserError: either is not finite; the weights are as they were before the step, but where they step in the backward pass.
        """
        recipe, accelerator, state = self.plan.recipe, self.accelerator, self.state
        train_step, update = state.train_steps[number], state.updates[number]
        update.begin(step, rate)
        total = torch.zeros((), device=accelerator.device)
        for micro in range(recipe.train.accumulation):
            draw = Draw(recipe.train.seed, step, self.batch_indices(micro))
            batch = self._moved(self.data.batch(step, draw.places, draw))
            self.clock.lap("data")
            # Dropout inside the nets draws from torch's global generator: it too becomes a function of the step.
            torch.manual_seed(mix(recipe.train.seed, "dropout", step, draw.places[0]))
            last = micro == recipe.train.accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(train_step.net):
                with accelerator.autocast():
                    losses = train_step.loss(batch, draw.on(accelerator.device))
                    loss = (
                        losses * batch["weight"] if "weight" in batch else losses
                    ).mean() / recipe.train.accumulation
                self.clock.lap("forward")
                accelerator.backward(loss)
            total += loss.detach()
            self.clock.lap("backward")
        mean, size = torch.stack([accelerator.reduce(total, "mean"), update.clip()]).tolist()
        # A scaler skips float16's overflows by itself, and halves its scale; below 1 it is not the scale that overflows.
        finite = math.isfinite(size) or (accelerator.scaler is not None and accelerator.scaler.get_scale() >= 1)
        if not (math.isfinite(mean) and finite):
            raise not_finite(
                step,
                train_step.name,
                mean,
                size,
                self.data.names(step),
                self.run.folder,
                taken=recipe.train.fused_backward,
            )
        update.take()
        return mean, size

    def batch_indices(self, micro: int) -> list[int]:
        """This process's places in the global batch, for one of its accumulated batches."""
        size = self.plan.recipe.train.batch_size
        start = (micro * self.accelerator.num_processes + self.accelerator.process_index) * size
        return list(range(start, start + size))

    def _moved(self, batch: Batch) -> Batch:
        return {key: value.to(self.accelerator.device) for key, value in batch.items()}

    def _log(self, record: dict[str, float]) -> None:
        self.run.status.step(int(record["step"]))
        if self.accelerator.is_main_process:
            self.run.log(record)
        if self.plan.recipe.output.trackers:
            self.accelerator.log(record, step=int(record["step"]))
        losses = [
            f"{name.partition('.')[2]} loss {value:.4f}" for name, value in record.items() if name.startswith("loss.")
        ]
        if warning := self.pace.took(record["seconds"]):
            self._say(warning)
        self.progress.show(
            int(record["step"]), self.plan.steps, " · ".join([f"{record['seconds']:.2f} s/step", *losses])
        )
        self.clock.lap("log")

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the held-out images, with the same noise and timesteps at every validation, of the averaged weights."""
        train_step, device = self.state.train_steps[0], self.accelerator.device
        with self.run.status.phase("validating"), self.state.averaged(), self.accelerator.autocast():
            losses = [
                train_step.loss(self._moved(batch), draw.on(device)).mean() for batch, draw in self.data.validation()
            ]
        self.clock.lap("validation")
        return float(torch.stack(losses).mean())

    def save(self, done: int, validation: float | None = None) -> None:
        """Write the checkpoint of `done` finished steps, at which the validation loss was `validation`."""
        with self.run.status.phase("saving"):
            found = self.state.checkpoint(done, validation)
            if self.accelerator.is_main_process:
                checkpoint.save(self.run.folder / "checkpoints", found, self.plan.recipe.train.keep_checkpoints)
            self.accelerator.wait_for_everyone()
        self.clock.lap("checkpoint")

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one; returns the number of finished steps."""
        found, said = checkpoint.newest(self.run.folder / "checkpoints")
        if found is not None:
            said += [f"going on after step {found.step}", *self.state.restore(found)]
        for sentence in said:
            self.accelerator.print(sentence)
        done = found.step if found is not None else 0
        if done > self.plan.steps:
            raise too_far(done, self.plan.steps, self.run.folder)
        if self.accelerator.is_main_process:
            self.run.forget_after(done)
        self.run.status.step(done)
        return done

    def _draws(self, done: int) -> bool:
        return self.observe is not None and (done % self.plan.recipe.sample.every == 0 or done == self.plan.steps)

    def _observe(self, done: int, signals: Signals) -> None:
        """Draw samples when it is time, on the main process; the others wait at the next step's gradients."""
        observe = self.observe
        if observe is not None and self._draws(done) and self.accelerator.is_main_process:
            self.progress.end()
            with self.run.status.phase("sampling"), self.state.averaged(), from_empty_cache(self.accelerator.device):
                signals.cut_short(lambda: observe(done))
            self.clock.lap("samples")

    def _watched(self, done: int, signals: Signals) -> dict[str, float]:
        """What `watch` sees when it is time, on the main process; an alarm is said."""
        watch, every = self.watch, self.plan.recipe.sample.collapse_check_every
        found: dict[str, float] = {}
        if (
            watch is None
            or not every
            or (done % every and done != self.plan.steps)
            or not self.accelerator.is_main_process
        ):
            return found

        def look() -> None:
            seen, alarm = watch(done)
            found.update(seen)
            if alarm:
                self._say(alarm)

        with self.run.status.phase("watching"), self.state.averaged():
            signals.cut_short(look)
        self.clock.lap("watch")
        return found

    def _say(self, sentence: str) -> None:
        self.progress.end()
        self.accelerator.print(sentence, flush=True)

"""The training loop, the only one in the project. It knows train steps and losses, and nothing about any family."""

from __future__ import annotations

import contextlib
import logging
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
from finetune.training import checkpoint
from finetune.training.device import from_empty_cache, memory_live
from finetune.training.failures import all_damaged, memory_explained, not_finite, too_far
from finetune.training.optimizers import effective_lr, learning_rate
from finetune.training.pace import Pace
from finetune.training.progress import TrainingProgress
from finetune.training.run_folder import Run
from finetune.training.run_list import validations
from finetune.training.samples import grid_of
from finetune.training.signals import Signals
from finetune.training.state import TrainingState
from finetune.training.watchdog import Clock, Watchdog

log = logging.getLogger(__name__)


class Trainer:
    """One run.

    Args:
        observe: called with the number of finished steps when samples are due, with the averaged weights in place.
        pace: gets the time of each step, and warns when it is far from the estimate.
        watch: called when a collapse check is due; returns values for the step's record, and a warning or "".
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
        self.plan, self.data, self.run, self.accelerator = plan, data, run, accelerator
        self.observe, self.watch = observe, watch
        self.state = TrainingState(plan, model, accelerator)
        self.pace = pace or Pace(Expected(None, "none was requested"), lambda: None)
        self.clock = Clock()
        self.progress = TrainingProgress(plan.steps, enabled=accelerator.is_main_process)

    def train(self) -> None:
        """Take every step of the plan that has not been taken yet.

        Raises:
            Stopped: a signal came; the finished steps are saved.
            UserError: a loss or gradient is not finite, or the disk or the memory is full.
        """
        signals = Signals(self.accelerator)
        tight = memory_explained(
            self.plan.recipe, self.pace.expected, lambda: memory_live(self.accelerator.device, self.state.live())
        )
        with (
            self.run.status.phase("training"),
            Watchdog(self.run.status, self.clock, log.warning),
            signals.handled(),
            tight,
        ):
            try:
                self._train(signals)
            finally:
                self.progress.end()

    def _train(self, signals: Signals) -> None:
        train, steps = self.plan.recipe.train, self.plan.steps
        checkpoint_every, validate_every = train.checkpoint_every or steps, train.validate_every or steps
        done = self.resume()
        self._sample(done, signals)
        for step in range(done, steps):
            record, done = self.train_step(step), step + 1
            stopping = signals.agreed()
            saves = done % checkpoint_every == 0 or done == steps or self._samples_due(done) or stopping
            if self.data.has_validation and not stopping and (done % validate_every == 0 or saves):
                record["validation"] = self.validate()
            record |= self._check_collapse(done, signals)
            self._log(record)
            if saves:
                self.save(done, record.get("validation"))
            if stopping:
                raise Stopped(f"stopped after step {done}, which is saved; --resume continues from there", stopping)
            self._sample(done, signals)

    def train_step(self, step: int) -> dict[str, float]:
        """Take one step (counted from 0): each train step in order. Returns its line of `metrics.jsonl`."""
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
        """One optimizer step of one train step; returns (mean loss, norm of the gradient before clipping).

        Raises:
            UserError: either is not finite. The weights are as before the step, except with `train.fused_backward`.
        """
        recipe, accelerator, state = self.plan.recipe, self.accelerator, self.state
        train_step, update = state.train_steps[number], state.updates[number]
        update.begin(step, rate)
        total = torch.zeros((), device=accelerator.device)
        for micro in range(recipe.train.accumulation):
            draw = Draw(recipe.train.seed, step, self.batch_indices(micro))
            batch = self._moved(self.data.batch(step, draw.batch_indices, draw))
            self.clock.lap("data")
            # Dropout layers use torch's global generator: this makes them, too, a function of the step.
            torch.manual_seed(mix(recipe.train.seed, "dropout", step, draw.batch_indices[0]))
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
        # A scaler skips float16's overflows itself and halves its scale; below 1, it is not the scale that overflows.
        finite = math.isfinite(size) or (accelerator.scaler is not None and accelerator.scaler.get_scale() >= 1)
        if not (math.isfinite(mean) and finite):
            raise not_finite(
                step,
                train_step.name,
                mean,
                size,
                self.data.names(step),
                self.run.folder,
                applied=recipe.train.fused_backward,
            )
        update.apply()
        return mean, size

    def batch_indices(self, micro: int) -> list[int]:
        """This process's indices in the global batch, for one of its accumulated batches."""
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
        if warning := self.pace.took(record["seconds"]):
            log.warning(warning)
        self.progress.step(record)
        self.clock.lap("log")

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss of the averaged weights over the held-out images, with the same noise and timesteps each time."""
        train_step, accelerator, device = self.state.train_steps[0], self.accelerator, self.accelerator.device
        with self.run.status.phase("validating"), self.state.averaged(), accelerator.autocast():
            losses = [
                train_step.loss(self._moved(batch), draw.on(device)).mean()
                for batch, draw in self.data.validation(accelerator.process_index, accelerator.num_processes)
            ]
        # Example i was computed by process i mod P: put in order, and drop those that only filled the last round.
        of_all = accelerator.gather(torch.stack(losses)).view(accelerator.num_processes, -1).T.flatten()
        self.clock.lap("validation")
        return float(of_all[: self.data.held_out_count].mean())

    def save(self, done: int, validation: float | None = None) -> None:
        """Write the checkpoint of `done` finished steps, at which the validation loss was `validation`."""
        with self.run.status.phase("saving"):
            state = self.state.checkpoint(done, validation)
            state.facts |= self.run.identity()
            if self.accelerator.is_main_process:
                checkpoint.save(self.run.folder / "checkpoints", state, self.plan.recipe.train.keep_checkpoints)
            self.accelerator.wait_for_everyone()
        self.clock.lap("checkpoint")

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one; returns the number of finished steps."""
        folder = self.run.folder / "checkpoints"
        newest, notes = checkpoint.newest(folder)
        if newest is None and notes:
            if not self.run.force:
                raise all_damaged(notes, folder)
            notes.append("all checkpoints are damaged: starting from step 0 (--force)")
        if newest is not None:
            notes += self.run.check_base(newest.facts)
            notes += [f"resuming after step {newest.step}", *self.state.restore(newest)]
        for note in notes:
            log.info(note)
        done = newest.step if newest is not None else 0
        if done > self.plan.steps:
            raise too_far(done, self.plan.steps, self.run.folder)
        losses = [(loss, step) for step, loss in validations(folder).items() if loss is not None and step <= done]
        self.progress.best = min(losses)[::-1] if losses else None
        if self.accelerator.is_main_process:
            self.run.forget_after(done)
        self.run.status.step(done)
        return done

    def _samples_due(self, done: int) -> bool:
        every = self.plan.recipe.sample.every or self.plan.steps
        return self.observe is not None and (done % every == 0 or done == self.plan.steps)

    def _sample(self, done: int, signals: Signals) -> None:
        """Write samples when they are due, on the main process; the others wait at the next step's gradients."""
        observe = self.observe
        if observe is not None and self._samples_due(done) and self.accelerator.is_main_process:
            self.progress.end()
            with self.run.status.phase("sampling"), self.state.averaged(), from_empty_cache(self.accelerator.device):
                signals.cut_short(lambda: observe(done))
            if (grid := grid_of(self.run.folder, done)).is_file():
                self.progress.sampled(done, grid)
            self.clock.lap("samples")

    def _check_collapse(self, done: int, signals: Signals) -> dict[str, float]:
        """Run `watch` when it is due, on the main process; logs its warning and returns its values."""
        watch, every = self.watch, self.plan.recipe.sample.collapse_check_every
        values: dict[str, float] = {}
        due = every and (done % every == 0 or done == self.plan.steps)
        if watch is None or not due or not self.accelerator.is_main_process:
            return values

        def look() -> None:
            seen, warning = watch(done)
            values.update(seen)
            if warning:
                log.warning(warning)

        with self.run.status.phase("watching"), self.state.averaged():
            signals.cut_short(look)
        self.clock.lap("watch")
        return values

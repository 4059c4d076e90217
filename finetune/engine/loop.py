"""The training loop: the only one in the project. It knows turns and losses, and nothing of any family."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator

from finetune.data.dataset import Dataset
from finetune.engine import checkpoint
from finetune.engine.draw import Draw
from finetune.engine.optim import Ema, learning_rate, make_optimizer
from finetune.engine.progress import Progress
from finetune.engine.run import Run
from finetune.errors import UserError
from finetune.models.turn import Model, Turn
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
    """One run's nets, optimizers and averages, made ready by Accelerate.

    Args:
        observe: called after a checkpoint is due with (number of finished steps, "sample"): draws the samples.
    """

    def __init__(self, plan: Plan, model: Model, data: Dataset, run: Run, accelerator: Accelerator, observe: Callable[[int], None] | None = None) -> None:
        self.plan, self.model, self.data, self.run, self.accelerator, self.observe = plan, model, data, run, accelerator, observe
        self.state = model.state()
        trained = model.trained()
        self.clock = Clock()
        self.turns = model.turns()
        self.optimizers = []
        for turn in self.turns:
            turn.net.to(accelerator.device)
            optimizer = make_optimizer(plan.recipe.optimizer, turn.parameters(), accelerator.device)
            turn.net, prepared = accelerator.prepare(turn.net, optimizer)
            self.optimizers.append(prepared)
        self.ema = Ema(trained, plan.recipe.train.ema) if plan.recipe.train.ema else None

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Take every step of the plan that is not yet taken."""
        train, sample, steps = self.plan.recipe.train, self.plan.recipe.sample, self.plan.steps
        done = self.resume()
        if done == 0:
            self._observe(0)
        progress = Progress("step", enabled=self.accelerator.is_main_process)
        for step in range(done, steps):
            start = time.perf_counter()
            rate = learning_rate(self.plan.recipe.optimizer, step, steps)
            taken = {turn.name: self._turn(step, turn, optimizer, rate) for turn, optimizer in zip(self.turns, self.optimizers, strict=True)}
            if self.ema is not None:
                self.ema.update(step)
            self.clock.lap("optimizer")
            done, seconds = step + 1, time.perf_counter() - start
            record: dict[str, float] = {"step": done, "seconds": seconds, "lr": rate}
            for name, (loss, norm) in taken.items():
                record |= {f"loss.{name}": loss, f"gradient.{name}": norm}
            if self.data.has_validation and (done % train.validate_every == 0 or done == steps):
                record["validation"] = self.validate()
            if self.accelerator.is_main_process:
                self.run.log(record)
            if self.plan.recipe.output.trackers:
                self.accelerator.log(record, step=done)
            progress.show(done, steps, " · ".join([f"{seconds:.2f} s/step", *(f"{name} loss {loss:.4f}" for name, (loss, _) in taken.items())]))
            self.clock.lap("log")
            if done % train.checkpoint_every == 0 or done == steps:
                self.save(done)
            if done % sample.every == 0 or done == steps:
                progress.end()
                self._observe(done)
        progress.end()

    def _turn(self, step: int, turn: Turn, optimizer: torch.optim.Optimizer, rate: float) -> tuple[float, float]:
        """One optimizer step of one turn; returns (mean loss, norm of the gradient before clipping)."""
        recipe, accelerator = self.plan.recipe, self.accelerator
        total = torch.zeros((), device=accelerator.device)
        for micro in range(recipe.train.accumulation):
            places = self.places(micro)
            draw = Draw(recipe.train.seed, step, places, accelerator.device)
            batch = {key: value.to(accelerator.device) for key, value in self.data.batch(step, places, draw).items()}
            self.clock.lap("data")
            # Dropout inside the nets draws from torch's global generator: it too becomes a function of the step.
            torch.manual_seed(mix(recipe.train.seed, "dropout", step, places[0]))
            last = micro == recipe.train.accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(turn.net):
                with accelerator.autocast():
                    loss = turn.loss(batch, draw).mean() / recipe.train.accumulation
                self.clock.lap("forward")
                accelerator.backward(loss)
            total += loss.detach()
            self.clock.lap("backward")
        parameters = turn.parameters()
        norm = accelerator.clip_grad_norm_(parameters, recipe.optimizer.clip_norm or math.inf)
        mean = float(accelerator.reduce(total, "mean"))
        size = float(norm) if norm is not None else 0.0
        if not math.isfinite(mean) or (not math.isfinite(size) and accelerator.scaler is None):
            self._stop_at_nan(step, turn, mean)
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

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the held-out pictures, with the same noise and timesteps at every validation."""
        turn = self.turns[0]
        turn.net.eval()
        with self.accelerator.autocast():
            losses = [turn.loss({k: v.to(self.accelerator.device) for k, v in batch.items()}, draw).mean() for batch, draw in self.data.validation()]
        turn.net.train()
        return float(torch.stack(losses).mean())

    # -- what is kept -------------------------------------------------------------------------------------------------

    def save(self, done: int) -> None:
        """Write the checkpoint of `done` finished steps."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            facts = {
                "threads": torch.get_num_threads(),
                "processes": self.plan.machine.processes,
                "precision": self.plan.precision,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            found = checkpoint.Checkpoint(
                step=done,
                weights={name: tensor.detach().contiguous() for name, tensor in self.state.items()},
                averages={name: tensor.contiguous() for name, tensor in self.ema.averages.items()} if self.ema is not None else {},
                optimizers={turn.name: optimizer.state_dict() for turn, optimizer in zip(self.turns, self.optimizers, strict=True)},
                facts=facts,
            )
            checkpoint.save(self.run.folder / "checkpoints", found, self.plan.recipe.train.keep_checkpoints)
        self.accelerator.wait_for_everyone()
        self.clock.lap("checkpoint")

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one; returns the number of finished steps."""
        found, said = checkpoint.newest(self.run.folder / "checkpoints", self.accelerator.device)
        for sentence in said:
            self.accelerator.print(sentence)
        done = found.step if found is not None else 0
        if self.accelerator.is_main_process:
            self.run.forget_after(done)
        if found is None:
            return 0
        self._load(found)
        self.accelerator.print(f"going on after step {found.step}")
        threads = torch.get_num_threads()
        if found.facts["threads"] != threads:
            self.accelerator.print(f"{found.facts['threads']} threads before, {threads} now: sums run in another order, so going on is exact no more")
        return done

    @torch.no_grad()
    def _load(self, found: checkpoint.Checkpoint) -> None:
        if self.state.keys() != found.weights.keys():
            raise UserError("the checkpoint holds other weights than this recipe trains", where=str(self.run.folder), remedy="start a new run")
        for name, tensor in self.state.items():
            tensor.copy_(found.weights[name])
        if self.ema is not None:
            for name, average in self.ema.averages.items():
                average.copy_(found.averages[name])
        for turn, optimizer in zip(self.turns, self.optimizers, strict=True):
            optimizer.load_state_dict(found.optimizers[turn.name])
        if self.accelerator.scaler is not None and found.facts["scaler"]:
            self.accelerator.scaler.load_state_dict(found.facts["scaler"])

    def _observe(self, done: int) -> None:
        """Draw samples; a failure is told and does not end the run."""
        if self.observe is None or not self.accelerator.is_main_process:
            return
        with averaged(self):
            self.observe(done)
        self.clock.lap("samples")

    def _stop_at_nan(self, step: int, turn: Turn, loss: float) -> None:
        before = checkpoint.checkpoints(self.run.folder / "checkpoints")
        raise UserError(
            f"the {turn.name} loss of step {step + 1} is {loss}, or its gradient is not finite: stopped before the weights took it",
            where="; ".join(self.data.names(step)),
            remedy=f"the last good checkpoint is {before[-1] if before else 'none yet'}; try a lower optimizer.lr or train.precision: float32",
        )


@contextlib.contextmanager
def averaged(trainer: Trainer) -> Iterator[None]:
    """Within this context the nets are in evaluation mode and hold their averaged weights, if the run keeps any."""
    for turn in trainer.turns:
        turn.net.eval()
    if trainer.ema is not None:
        trainer.ema.swap()
    try:
        yield
    finally:
        if trainer.ema is not None:
            trainer.ema.swap()
        for turn in trainer.turns:
            turn.net.train()

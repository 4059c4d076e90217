"""A run from recipe to artifact, in phases: audit → plan → estimate → build → encode → train → export.

`ft train`, `ft check`, the launch targets `lora.py`, `full.py`, `scratch.py` and the Python API use these functions.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from safetensors import SafetensorError

from finetune import terminal
from finetune.config.loader import error_location
from finetune.config.schema import Recipe
from finetune.data import latent_cache
from finetune.data.audit.audit import Audit, scan
from finetune.data.cache_dir import cache_folder
from finetune.data.caption_length import long_captions
from finetune.data.dataset import Dataset
from finetune.data.sources import refuse_inside
from finetune.distributed import is_main_process
from finetune.errors import UserError
from finetune.estimate.hardware.calibrate import calibrate
from finetune.estimate.hardware.cpu import calibration, discard, keep, keep_freed_memory
from finetune.estimate.monitor import Expected, does_not_fit, expect, hours_on_cpu, takes_weeks
from finetune.export import from_checkpoint
from finetune.inference import class_images
from finetune.models.base import Model
from finetune.models.pretrained import access, loading
from finetune.models.pretrained import check as model_check
from finetune.models.registry import spec_of
from finetune.models.scratch.base import PixelModel
from finetune.planning import Plan, make_plan
from finetune.report import model_summary, tables
from finetune.terminal import Progress
from finetune.training import checkpoint, fsdp
from finetune.training.checkpoint import publish
from finetune.training.device import forget_peak, memory_left, memory_live, memory_peak, this_machine
from finetune.training.failures import memory_explained
from finetune.training.pace import Pace, measured_rows
from finetune.training.run_folder import Run
from finetune.training.samples import sample_prompts
from finetune.training.trainer import Trainer

_ACCELERATE_NAMES = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}

SMALL_MODEL = 1 << 30  # bytes of a base model's files that `ft check` loads: a few seconds
LONGEST_ON_CPU = 14 * 24  # hours; a longer run needs --force

log = logging.getLogger(__name__)


@dataclass(repr=False)
class Job:
    """One run; each phase below sets the fields that later phases read."""

    recipe: Recipe
    resume: bool = False
    force: bool = False
    quiet: bool = False  # no tables, no progress
    audit: Audit = field(init=False)
    plan: Plan = field(init=False)
    run: Run = field(init=False)
    expected: Expected = field(init=False)
    accelerator: Accelerator = field(init=False)
    model: Model = field(init=False)
    data: Dataset = field(init=False)
    trainer: Trainer = field(init=False)


def run(recipe: Recipe, resume: bool = False, force: bool = False) -> Path:
    """Take every phase of a run; returns its folder."""
    job = prepare(recipe, resume, force)
    train_model(job)
    return export_result(job)


def prepare(recipe: Recipe, resume: bool = False, force: bool = False) -> Job:
    """Every phase up to the first training step.

    Raises:
        UserError: for whatever cannot work, before anything is computed or written.
    """
    job = Job(recipe, resume, force, quiet=not is_main_process())
    with error_location(recipe):
        refuse_before_building(job)
        if class_images.missing(recipe):
            generate_class_images(job)
            estimate_run(job)
        build_model(job)
        encode_data(job)
    return job


def check(recipe: Recipe, resume: bool = False, force: bool = False, quiet: bool = False) -> Job:
    """Refuse everything that `prepare` would refuse, and write nothing: for `ft check` and `ft data check --recipe`.

    A model of up to `SMALL_MODEL` bytes is also built, as training builds it; of a larger one, headers are read.

    Raises:
        UserError: training would end with the same message.
    """
    job = Job(recipe, resume, force, quiet)
    with error_location(recipe):
        size = refuse_before_building(job)
        if size is not None and size <= SMALL_MODEL and not this_machine().sharded:
            model = from_checkpoint.build(job.plan, job.audit)
            if not force:
                _refuse_too_large(model, job.plan)
            Dataset(job.plan, job.audit, model.encoder())
    return job


def refuse_before_building(job: Job) -> int | None:
    """The phases before the model is built. Training and both checks take them, so that they refuse the same.

    Returns:
        Bytes of the base model's files; None if they are on the Hub.

    Raises:
        UserError: for whatever can be known from the recipe, the data, the machine and the headers of the model's files.
    """
    audit_data(job)
    plan_run(job)
    estimate_run(job)
    recipe = job.plan.recipe
    size = access.check(recipe)
    reader = loading.open_reader(recipe, (image.caption for image in job.audit.training))
    if reader is not None:
        long_captions(job.audit.images, reader.count, recipe.data.long_captions)
    if is_main_process():
        latent_cache.refuse_unusable(cache_folder(recipe.data.cache))
    return size


# -- audit, plan, estimate --------------------------------------------------------------------------------------------


def audit_data(job: Job) -> None:
    """Check the model's files and every image and caption.

    Raises:
        UserError: the model cannot be there, or the recipe does not allow such data.
    """
    recipe = job.recipe
    model_check.check(recipe)
    for tracker in recipe.output.trackers:  # Accelerate drops what is not installed without a word
        if importlib.util.find_spec(tracker) is None:
            raise UserError(
                f"{tracker} is not installed",
                where="output.trackers",
                remedy=f"pip install {tracker}, or remove it there",
            )
    with Progress("reading images", enabled=not job.quiet) as progress:
        data = class_images.with_class(recipe)
        job.audit = _in_main_process(
            lambda: scan(data, lambda done, name: progress.show(done, None, name), spec_of(recipe.model.family))
        )
    if not job.quiet:
        log.info(tables.data(job.audit))
    job.audit.raise_if_stopped()


def _in_main_process(work: Callable[[], Audit]) -> Audit:
    """The result of `work`, done by the main process, in every process of the run: the others read no images."""
    machine = this_machine()
    if machine.processes == 1:
        return work()
    # The process group, which `Accelerator` takes over. On GPUs, waiting processes would give up after ten minutes.
    PartialState(cpu=machine.device == "cpu", timeout=timedelta(days=7))
    results: list[Audit] = broadcast_object_list([work() if is_main_process() else None])
    return results[0]


def plan_run(job: Job) -> None:
    """Resolve every number of the run.

    Raises:
        UserError: the recipe and the data do not go together, or the run's folder lies inside the data.
    """
    recipe = job.recipe
    missing = recipe.prior.images if recipe.prior is not None and class_images.missing(recipe) else 0
    job.plan = make_plan(recipe, job.audit, this_machine(), missing)
    refuse_inside(Path(job.plan.folder), recipe.data, "output.folder")
    if not job.quiet:
        log.info(tables.plan(job.plan))


def audit_and_plan(recipe: Recipe, quiet: bool = False) -> tuple[Audit, Plan]:
    """The first two phases alone; logs both tables.

    Raises:
        UserError: for a model that cannot be there, or data that the recipe does not allow.
    """
    job = Job(recipe, quiet=quiet)
    with error_location(recipe):
        audit_data(job)
        plan_run(job)
    return job.audit, job.plan


def generate_class_images(job: Job) -> None:
    """Generate the class images of prior preservation that are missing, then audit and plan with them."""
    if not job.resume:
        Run(job.plan, resume=False)  # refuse an existing folder before any image is generated
    check_estimate(job.plan, job.force, quiet=True)
    class_images.generate(job.recipe, is_main_process())
    job.audit, job.plan = audit_and_plan(job.recipe, quiet=True)


def estimate_run(job: Job) -> None:
    """Check the run's folder, and estimate memory and time.

    Raises:
        UserError: the folder cannot be used, or the run does not fit into memory and is not forced.
    """
    job.run = Run(job.plan, job.resume, job.force, data_complete=not class_images.missing(job.recipe))
    machine = job.plan.machine
    if machine.device == "cpu":
        keep_freed_memory()
        if machine.processes == 1 and not calibration(machine.threads).measured:
            _calibrate()
    job.expected = check_estimate(job.plan, job.force, job.quiet)


def check_estimate(plan: Plan, force: bool = False, quiet: bool = False) -> Expected:
    """The estimate of the plan; logs it in one line.

    Raises:
        UserError: the run does not fit into memory or would take weeks on a CPU, and is not forced.
    """
    expected = expect(plan)
    if not quiet:
        log.info(expected.line)
    if force:
        return expected
    if expected.forecast is not None and not expected.forecast.fits:
        raise does_not_fit(expected.forecast)
    if plan.machine.device == "cpu" and (hours := hours_on_cpu(plan, expected)) > LONGEST_ON_CPU:
        raise takes_weeks(plan, hours)
    return expected


def _calibrate() -> None:
    """Measure this machine's CPU once, for three seconds. If it is busy, the estimate uses a default."""
    try:
        keep(calibrate())
    except UserError as error:
        log.info(f"{error.problem}; the estimate assumes the speed of the CPU that ft was developed on")


# -- build, encode, train ---------------------------------------------------------------------------------------------


def build_model(job: Job) -> None:
    """Build the model on Accelerate's device: weights loaded, frozen, quantized, adapters added; or from scratch.

    Raises:
        UserError: its files cannot be used, or it does not fit into the machine's memory and is not forced.
    """
    plan, folder = job.plan, job.run.folder
    forget_peak()  # of what this process did before
    AcceleratorState._reset_state()  # else a second run of this process would get the first one's precision
    job.accelerator = Accelerator(
        mixed_precision=_ACCELERATE_NAMES[plan.precision],
        cpu=plan.machine.device == "cpu",
        log_with=list(plan.recipe.output.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "trackers")),
        fsdp_plugin=fsdp.plugin(plan.precision) if plan.machine.sharded else None,
    )
    if plan.machine.sharded:
        fsdp.check(job.accelerator)
    job.model = from_checkpoint.build(plan, job.audit)
    job.run.read_base()
    if not job.force:
        _refuse_too_large(job.model, plan)
    job.accelerator.wait_for_everyone()  # every process has checked the folder before one creates it


def _refuse_too_large(model: Model, plan: Plan) -> None:
    """A GPU's memory is estimated; on other devices, what training needs in any case is added up."""
    needed, available = sum(model_summary.of_what_trains(model, plan).values()), plan.machine.memory_bytes
    if plan.machine.device != "cuda" and needed > available:
        raise UserError(
            f"weights, gradients and optimizer state take {model_summary.gigabytes(needed)},"
            f" and this machine has {model_summary.gigabytes(available)}",
            where="method" if plan.recipe.method == "full" else "model",
            remedy="train a LoRA or a smaller model; or --force to train anyway",
        )


def encode_data(job: Job) -> None:
    """Create the run's folder, encode images and captions into the cache, and set up the trainer."""
    recipe, accelerator = job.recipe, job.accelerator
    job.data = Dataset(job.plan, job.audit, job.model.encoder())
    captions = _captions(job)  # also counts those that are too long: the tokenizers are loaded only now
    if accelerator.is_main_process:
        if captions:
            log.info(terminal.table("captions as tokens", captions))
        job.run.create()
        job.run.write_json("data.json", tables.facts(job.audit))
    tight = memory_explained(recipe, job.expected, lambda: memory_live(accelerator.device, {}))
    progress = Progress("encoding", enabled=accelerator.is_main_process)

    def show(what: str, done: int, total: int) -> None:
        progress.show(done, total, what)
        job.run.status.progress(done, total)

    with job.run.status.phase("encoding"), tight, progress:
        if accelerator.num_processes > 1:  # a share each; what others encoded is then in the cache
            job.data.encode(show, (accelerator.process_index, accelerator.num_processes))
            accelerator.wait_for_everyone()
        job.data.encode(show)
    if accelerator.is_main_process:
        log.info(_model_summary(job))
    if recipe.output.trackers:
        accelerator.init_trackers("finetune", config={"recipe": recipe.name})
    job.trainer = _trainer(job)


def _captions(job: Job) -> list[terminal.Row]:
    """Some captions as the model's tokens, and how many are cut; nothing for a model that reads none."""
    too_long = job.data.long_captions()
    examples: list[dict[str, Any]] = [
        {"name": p.name, "caption": p.caption, "tokens": job.data.encoder.tokens(p.caption)}
        for p in job.audit.training[:3]
    ]
    shown = tables.caption_rows(examples) if examples[0]["tokens"] else []
    return shown + ([("cut", too_long)] if too_long else [])


def _model_summary(job: Job) -> str:
    """Which weights train."""
    if job.recipe.method == "lora":
        log.debug("adapted layers: %s", model_summary.adapted_layers(job.model))
        return model_summary.adapted(job.model)
    return model_summary.whole(job.model, job.plan) if job.recipe.method == "full" else model_summary.built(job.model)


def _trainer(job: Job) -> Trainer:
    plan, recipe, folder, device = job.plan, job.plan.recipe, job.run.folder, job.accelerator.device
    open_model = (lambda: _from_newest(job)) if plan.machine.sharded else lambda: job.model
    samples = recipe.sample.prompts and recipe.sample.every != 0
    observe = (lambda done: sample_prompts(plan, open_model, folder, done)) if samples else None
    monitor = None
    if recipe.sample.collapse_check_every and isinstance(job.model, PixelModel):
        from finetune.evaluation.collapse_monitor import CollapseMonitor  # torchvision and more, for GANs alone

        monitor = CollapseMonitor(plan, job.model, folder)
    return Trainer(
        plan,
        job.model,
        job.data,
        job.run,
        job.accelerator,
        observe,
        Pace(job.expected, lambda: memory_left(device)),
        monitor,
    )


def train_model(job: Job) -> None:
    """Take every training step, with checkpoints, validation and samples on the way."""
    if job.accelerator.is_main_process and not (job.run.folder / "estimate.json").exists():
        job.run.write_json("estimate.json", job.trainer.pace.compared(None))  # for pages that show a running run
    job.trainer.train()


# -- export -----------------------------------------------------------------------------------------------------------


def export_result(job: Job) -> Path:
    """Write the artifact (with averaged weights where the run keeps them) and the report; returns the run's folder."""
    with job.run.status.phase("writing"):
        if job.accelerator.is_main_process:
            _write(job)
        job.accelerator.wait_for_everyone()
    job.accelerator.end_training()
    job.run.status.finished()
    return job.run.folder


def _write(job: Job) -> None:
    folder = job.run.folder
    try:
        files, measured = _save(job), _compare(job)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk with its own error
        raise UserError(
            f"the trained weights could not be written: {error}",
            where=str(folder / "final"),
            remedy="free some disk space and continue with --resume: no step is repeated",
        ) from error
    written = [("adapter" if job.recipe.adapter else "model", str(files[0] if len(files) == 1 else folder / "final"))]
    report = _report(folder)
    if (folder / "before-after.png").is_file():
        written.append(("before and after", str(folder / "before-after.png")))
    if report is not None:
        written.append(("report", str(report)))
    if best := job.trainer.progress.best:
        measured.insert(0, ("best checkpoint", f"step {best[0]}, held-out loss {best[1]:.4g}"))
    if measured:
        log.info(terminal.table("result", measured))
    if wrong := job.trainer.pace.disproved():
        discard(wrong)
        log.warning(
            "this CPU's calibration was far off and has been discarded;"
            " the next run measures it again, and so does `ft estimate --calibrate`"
        )
    log.info(terminal.table("written", written))


def _save(job: Job) -> list[Path]:
    """Write `final/` whole or not at all: if the process is killed, the old content stays."""
    final, aside = job.run.folder / "final", job.run.folder / ".final.part"
    shutil.rmtree(aside, ignore_errors=True)
    if job.plan.machine.sharded:
        files = from_checkpoint.write_of(_from_newest(job), job.plan, job.plan.steps, job.run.folder, aside)
    else:
        with job.trainer.state.averaged():
            files = from_checkpoint.write_of(job.model, job.plan, job.plan.steps, job.run.folder, aside)
    publish(aside, final)
    return [final / file.relative_to(aside) for file in files]


def _from_newest(job: Job) -> Model:
    """The model rebuilt on one device with the newest checkpoint's weights, for samples and artifacts of sharded runs.

    A checkpoint precedes all samples and the end. If the device has no room for the whole model, sampling fails and
    the failure is logged.
    """
    newest = checkpoint.newest(job.run.folder / "checkpoints")[0]
    model = from_checkpoint.rebuilt(job.plan, job.audit, newest)
    model.encoder().release()  # the prompts are encoded
    for train_step in model.train_steps():
        train_step.net.to(job.plan.machine.device)
    return model


def _compare(job: Job) -> list[terminal.Row]:
    """Write `estimate.json`, if this process took any step; returns the rows that compare it with the estimate."""
    if not job.trainer.pace.seconds:
        return []
    values = job.trainer.pace.compared(memory_peak(job.accelerator.device))
    job.run.write_json("estimate.json", values)
    return measured_rows(values)


def _report(folder: Path) -> Path | None:
    """Write the run's report; a failure is logged and costs no finished training."""
    try:
        from finetune.report.html_report import write_report

        return write_report(folder)
    except Exception as error:
        reason = error.problem if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        log.warning(f"the report could not be written ({reason}); the trained weights are not affected")
        log.debug("the report could not be written", exc_info=True)
        return None


# -- Python API -------------------------------------------------------------------------------------------------------


def plan(recipe: Recipe) -> Plan:
    """Every number of the run that `recipe` describes, on this machine, after an audit of its images.

    Raises:
        UserError: for a recipe or data that cannot work.
    """
    return audit_and_plan(recipe, quiet=True)[1]


def train(recipe: Recipe, resume: bool = False, force: bool = False) -> Path:
    """Train `recipe` in this process, as `ft train` does; returns the run's folder.

    Args:
        recipe: from `finetune.load_recipe`.
        resume: continue the run in the recipe's folder, bit for bit.
        force: train even if the estimate says that it does not fit into memory.

    Raises:
        UserError: for whatever cannot work, before anything is computed or written; or for a loss that is not finite.
    """
    return run(recipe, resume, force)

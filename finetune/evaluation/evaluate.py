"""How good are a run's images? Drawn ones beside real ones, by their features: `ft eval`."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import final

import numpy
import torch
from PIL import Image
from torch import Tensor

from finetune.config.schema import Data
from finetune.data.audit.audit import Audit, ImageRecord, scan
from finetune.data.dataset import to_tensor
from finetune.data.media.image import apply, decode
from finetune.data.sources.files import write_aside
from finetune.errors import UserError
from finetune.evaluation import metrics
from finetune.evaluation.features import EMOJI_NET, extractor
from finetune.evaluation.likelihood import nats
from finetune.inference import sample
from finetune.models.base import SampleRequest
from finetune.models.scratch.base import LikelihoodModel, PixelModel, Space
from finetune.planning import Plan, load_plan
from finetune.report.images import enlarged, grid
from finetune.terminal import Progress
from finetune.training.samples import request_of

IMAGES = 500  # drawn unless asked otherwise
SCORED = (
    100  # images whose likelihood is taken unless asked otherwise: some families follow each through a hundred passes
)
AT_ONCE = 50  # drawn by models in pixel space
LOOKED_THROUGH = 10_000  # training images, at most, for the nearest to each drawn one
SHOWN = 24


@final
@dataclass(frozen=True)
class Closeness:
    """How close images come to real ones; for the measures see `distances`. `diversity` is that of the real ones' own; so are 1 and 0 equals."""

    frechet_distance: float
    kernel_distance: float
    precision: float
    recall: float
    density: float
    coverage: float
    diversity: float
    copied: float | None  # None where the training images are not there


@final
@dataclass(frozen=True)
class Likelihood:
    """Bits a channel of a pixel, mean over images, which are `of` some kind: exact, or an upper bound."""

    bits_per_dimension: float
    exact: bool
    of: str
    least: tuple[str, ...]  # names of the least likely, the least likely first: what the model finds odd


@final
@dataclass(frozen=True)
class Evaluation:
    """`itself` is how close other real images come to the same ones, as many: no generator does better, but by chance."""

    run: str
    features: str
    against: str
    drawn: int
    real: int
    seconds_per_image: float
    cpu_seconds_per_image: float
    closeness: Closeness
    itself: Closeness | None
    likelihood: Likelihood | None
    no_likelihood: str  # why there is none
    folder: str


def evaluate(
    run: Path,
    against: str | None = None,
    images: int | None = None,
    features: str = EMOJI_NET,
    out: Path | None = None,
    scored: int = SCORED,
) -> Evaluation:
    """Draw images with a run and compare them with real ones; writes `figures.json`, `samples.png`, `nearest.png` (drawn images above the
    training images that they come closest to), of models with a likelihood `unlikely.png`, and what else the family shows at a look.

    Args:
        run: the folder of a finished run.
        against: images to compare with, a folder or an embedded name; none: those that the run trained on.
        images: how many to draw; none: as many as there are real ones, 500 at most.
        features: emoji-net, or a DINOv2 by its folder or name on the hub.
        scored: of how many images the likelihood is taken, at most; 0: of none.
        out: a new folder; none: `evaluated/1`, `evaluated/2` … in the run's.

    Raises:
        UserError: the run has no final weights or cannot draw, or there are no images to compare with.
    """
    plan = load_plan(run)
    opened, seer = sample.open_run(run, plan), extractor(features)
    space = opened.space if isinstance(opened, PixelModel) else None
    trained, judged = _audits(plan, against)
    target = sample.free_folder(out, run, "evaluated")
    count = images or min(IMAGES, len(judged.training))
    real, other = _halves(judged.training, count)
    drawn, seconds, cpu_seconds = _drawn(plan, opened, [image.caption for image in real], count)

    def seen(these: Sequence[ImageRecord], audit: Audit) -> Tensor:
        return seer.features(as_drawn(these, audit.background, space))

    of_drawn, of_real = seer.features(drawn), seen(real, judged)
    known = spread(trained.training, min(LOOKED_THROUGH, len(trained.training))) if trained else []
    of_known = seen(known, trained) if trained else None
    likelihood, no_likelihood, odd = _likelihood(opened, trained, judged, against, scored)
    found = Evaluation(
        run=str(run),
        features=seer.name,
        against=against or "its training images",
        drawn=count,
        real=len(real),
        seconds_per_image=seconds,
        cpu_seconds_per_image=cpu_seconds,
        closeness=_closeness(of_drawn, of_real, of_known),
        itself=_itself(seen(other, judged), of_real, of_known, {one.digest for one in other}, known) if other else None,
        likelihood=likelihood,
        no_likelihood=no_likelihood,
        folder=str(target),
    )
    target.mkdir(parents=True, exist_ok=out is not None)
    write_aside(target / "figures.json", (json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n").encode())
    _sheet(drawn).save(target / "samples.png")
    if trained is not None and of_known is not None:
        _show_nearest(
            target / "nearest.png", drawn, of_drawn, of_known, list(as_drawn(known, trained.background, space))
        )
        _show_exhibits(target, opened, trained)
    if likelihood is not None:
        _sheet(as_drawn(odd, judged.background, space), likelihood.least).save(target / "unlikely.png")
    return found


def _drawn(
    plan: Plan, opened: sample.Opened, captions: Sequence[str], count: int
) -> tuple[list[Image.Image], float, float]:
    """(`count` squares; seconds that each took, by the clock on the wall and by the processor's)."""
    square = replace(request_of(plan), size=(plan.recipe.data.resolution,) * 2)
    request = request_for(square, opened, captions, count)
    initialized, before = time.perf_counter(), time.process_time()
    found = sample.draw(opened, request, AT_ONCE)
    return found, (time.perf_counter() - initialized) / count, (time.process_time() - before) / count


def _sheet(images: Iterable[Image.Image], labels: Sequence[str] = ()) -> Image.Image:
    """The first of them, beside each other."""
    return grid([enlarged(image) for image in itertools.islice(images, SHOWN)], labels)


def _show_exhibits(folder: Path, opened: object, trained: Audit) -> None:
    """Write what a family in pixel space shows at a look, of the images that it trained on."""
    if isinstance(opened, PixelModel):
        opened.audit = trained
        for name, image in opened.diagnostic_images().items():
            enlarged(image).save(folder / f"{name}.png")


def compared(drawn: Tensor, real: Tensor) -> dict[str, float]:
    """What tells of lost modes, of features [N, D]: diversity ÷ that of the real images, and coverage of them."""
    return {
        "diversity": metrics.diversity(drawn) / max(metrics.diversity(real), 1e-12),
        "coverage": metrics.neighbourhoods(real, drawn).coverage,
    }


def _closeness(drawn: Tensor, real: Tensor, known: Tensor | None) -> Closeness:
    return Closeness(
        frechet_distance=metrics.frechet_distance(drawn, real),
        kernel_distance=metrics.kernel_distance(drawn, real),
        **asdict(metrics.neighbourhoods(real, drawn)),
        diversity=compared(drawn, real)["diversity"],
        copied=metrics.copies(drawn, known)[2] if known is not None and len(known) > 1 else None,
    )


def _itself(
    other: Tensor, real: Tensor, known: Tensor | None, own: set[str], of_known: Sequence[ImageRecord]
) -> Closeness:
    """`_closeness` of other real images; to training images that they are not themselves."""
    rest = known[torch.tensor([image.digest not in own for image in of_known])] if known is not None else None
    return _closeness(other, real, rest)


def _audits(plan: Plan, against: str | None) -> tuple[Audit | None, Audit]:
    """(what the run trains on, or None if it is not there and need not be; what its images are compared with), cropped to squares."""
    own = replace(plan.recipe.data, buckets=False)
    judged = _audit(replace(own, path=against, sources=(), held_out=0.0, masks=None)) if against is not None else None
    try:
        trained = _audit(own)
    except UserError:
        if judged is None:
            raise
        return None, judged
    return trained, judged or trained


def _audit(data: Data) -> Audit:
    looking = Progress("looking at images")
    found = scan(data, lambda done, name: looking.show(done, done + 1, name))
    looking.end()
    found.raise_if_stopped()
    return found


def spread(images: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """`count` of them, evenly from first to last."""
    return [images[place * len(images) // count] for place in range(count)]


def _halves(images: Sequence[ImageRecord], count: int) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """(`count` images, or all if there are fewer; as many others, or none if there are not enough).

    Raises:
        UserError: there are not two.
    """
    if min(count, len(images)) < 2:
        raise UserError(
            "distances need two images at least", where="--images", remedy="draw more, or give more to compare with"
        )
    if len(images) >= 2 * count:
        both = spread(images, 2 * count)
        return both[::2], both[1::2]
    return spread(images, min(count, len(images))), []


def request_for(request: SampleRequest, opened: sample.Opened, captions: Sequence[str], count: int) -> SampleRequest:
    """`request` for `count` images: of the captions, over and over; of models in pixel space of those that name a class it knows, if any."""
    if isinstance(opened, PixelModel):
        classes = opened.space.classes
        captions = [caption for caption in captions if caption in classes] or classes or [""]
    return replace(
        request, prompts=tuple(captions[number % len(captions)] for number in range(count)), seeds=tuple(range(count))
    )


def as_drawn(images: Sequence[ImageRecord], background: str, space: Space | None = None) -> Iterator[Image.Image]:
    """Real images as a model would draw them at best: cropped to its size, and, in pixel space, in its levels and channels."""
    for image in images:
        drawn = apply(decode(image.read(), background), image.crop)
        yield drawn if space is None else space.images(space.levels_of(to_tensor(numpy.asarray(drawn)))[None])[0]


def _likelihood(
    opened: sample.Opened, trained: Audit | None, judged: Audit, against: str | None, count: int
) -> tuple[Likelihood | None, str, list[ImageRecord]]:
    """(bits/dim of the images compared with, without `against` of those that the run held out, if any; why there are none; the least likely)."""
    if not isinstance(opened, LikelihoodModel):
        return None, "this kind of model has none", []
    if not count:
        return None, "not asked for", []
    held_out = trained is not None and against is None and len(trained.held_out) > 0
    among = trained.held_out if trained is not None and held_out else judged.training
    some = spread(among, min(count, len(among)))
    try:
        found = nats(opened, some, judged.background)
    except UserError as error:
        return None, error.problem, []
    least = [some[place] for place in found.argsort(descending=True, stable=True)[:SHOWN].tolist()]
    bits = float(found.mean()) / (opened.space.dimensions * math.log(2))
    of = "held-out images" if held_out else against or "training images"
    return Likelihood(bits, opened.exact, of, tuple(image.name for image in least)), "", least


def _show_nearest(
    file: Path, drawn: Sequence[Image.Image], of_drawn: Tensor, of_known: Tensor, known: Sequence[Image.Image]
) -> None:
    """The drawn images that come closest to a training image, each above it."""
    nearest, far, _ = metrics.copies(of_drawn, of_known)
    pairs = []
    for place in far.argsort(stable=True)[:SHOWN].tolist():
        above, below = (enlarged(image) for image in (drawn[place], known[int(nearest[place])]))
        both = Image.new("RGB", (max(above.width, below.width), above.height + below.height + 2), "white")
        both.paste(above, (0, 0))
        both.paste(below, (0, above.height + 2))
        pairs.append(both)
    grid(pairs, columns=8, title="above: drawn, the closest first   below: the training image nearest to it").save(file)

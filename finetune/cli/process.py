"""What the entry scripts and `ft` share before anything is imported that takes long: arguments, errors told to people, quiet."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from finetune.config.loader import load_recipe
from finetune.config.schema import Method, Recipe
from finetune.distributed import is_main_process
from finetune.errors import Stopped, UserError

# The environment's name for the file in which a script started by `ft train` leaves its exit code and last words:
# `accelerate launch` turns every failure into 1, and with several processes talks at length itself. Beside that file,
# the script leaves one named by its process id: the signals that `ft train` receives go there.
LAST_WORDS = "FT_LAST_WORDS"
LAUNCHER = "FT_LAUNCHER"  # the process id of `ft train`
PATIENCE = 300.0  # seconds that a run whose launcher is gone has for its step and its checkpoint
GIVEN_WAY = 3.0  # seconds
FOREIGN = ("DEEPSPEED", "MEGATRON_LM")
MISTAKE = 2
_ending = threading.Event()  # this process has said its last words, or will
STOPPED = "stopped; --resume goes on from the last checkpoint"


def arguments(method: Method) -> tuple[Recipe, bool, bool]:
    """Read `RECIPE [--set KEY=VALUE ...] [--resume] [--force]`; returns (recipe, resume, force).

    Raises:
        UserError: among others, for a recipe of another method.
    """
    parser = argparse.ArgumentParser(description=f"Train by a recipe of method {method}.")
    parser.add_argument("recipe", help="a YAML file, or the name of a bundled recipe (`ft recipes` lists them)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the recipe"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the recipe's folder")
    parser.add_argument("--force", action="store_true", help="train even what the estimate says does not fit")
    given = parser.parse_args()
    refuse_foreign_engines()
    recipe = load_recipe(given.recipe, given.set)
    if recipe.method != method:
        remedy = f"launch finetune/{recipe.method}.py, or use `ft train`"
        raise UserError(f"this recipe is of method {recipe.method}", where=given.recipe, remedy=remedy)
    return recipe, given.resume, given.force


def foreign(engine: str) -> UserError:
    """For an engine that takes the optimizer and its step over, and keeps weights and state in pieces of its own."""
    return UserError(
        f"{engine} is not supported: it keeps optimizer state in pieces of its own, of which no checkpoint that goes on bit for bit is made here",
        where="the configuration of Accelerate, distributed_type",
        remedy="take FSDP2, which shares out the same: weights, gradients and optimizer state (`ft train --accelerate fsdp2`)",
    )


def refuse_foreign_engines() -> None:
    """Raise for the engines of Accelerate that the trainer cannot work with; the launcher says so in the environment."""

    def asked(engine: str) -> bool:
        return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"

    for engine in FOREIGN:
        if asked(engine):
            raise foreign(engine)
    if asked("FSDP") and os.environ.get("FSDP_VERSION") != "2":
        raise foreign("FSDP1")


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Show a user's mistake as its message, without a traceback, and end with exit code 2."""
    try:
        yield
    except UserError as error:
        _end(MISTAKE, "\n".join(error.lines()))
    except Stopped as stopped:
        _end(128 + stopped.number, f"\n{stopped}")
    except KeyboardInterrupt:
        _end(128 + signal.SIGINT, f"\n{STOPPED}")


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """`told`, for a training script, which SIGTERM stops as Ctrl-C does, and which does not outlive its launcher."""
    if place := os.environ.get(LAST_WORDS):
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # `ft train` starts the launcher deaf to it, and us with it
        Path(place).with_name(str(os.getpid())).touch()
    signal.signal(signal.SIGTERM, _interrupt)
    if place or "ACCELERATE_MIXED_PRECISION" in os.environ:  # our parent is Accelerate's launcher
        threading.Thread(
            target=_follow, args=(os.getppid(), int(os.environ.get(LAUNCHER, "0")), place), daemon=True
        ).start()
    with told():
        try:
            yield
        except UserError:
            raise
        except Exception:
            if (
                int(os.environ.get("WORLD_SIZE", "1")) > 1
            ):  # another process may have ended, and our exchange with it: then its words count
                _give_way()
            raise


def _follow(parent: int, launcher: int, last_words: str | None) -> None:
    """End as by SIGTERM once the process that started this one is gone, or `ft train` behind it: nobody could end it else.

    And end in silence once another process has said its last words: on GPUs, an exchange with it would wait for days.
    """
    while os.getppid() == parent and _is_there(launcher):
        if last_words and os.path.exists(last_words) and not _ending.is_set():
            os._exit(0)
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(128 + signal.SIGTERM)


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks; process 0 is our own group, which is there
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def quiet_libraries() -> None:
    """Silence bars and remarks on which a person cannot act. Errors, and the hub's download bars, stay."""
    # Read when the libraries are imported, so this comes first.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers remark on every fork
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # or it asks for kernels of 4-bit nets, which nothing here uses
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Stopped(STOPPED, number)


def _end(code: int, words: str) -> NoReturn:
    _ending.set()
    if place := os.environ.get(LAST_WORDS):
        with (
            contextlib.suppress(FileExistsError),
            open(place, "x", encoding="utf-8") as file,
        ):  # of several processes the first has the word
            file.write(f"{code}\n{words}")
        sys.exit(0)  # a launcher that sees a failure talks at length
    if not is_main_process():
        _give_way()  # the first process says it
    print(words, file=sys.stderr, flush=True)
    sys.exit(code)


def _give_way() -> None:
    """Wait for another process to be heard: where it has ended, its launcher ends this one, or it does so itself (`_follow`)."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(GIVEN_WAY)

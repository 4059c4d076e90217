"""What of this machine works, and what to do about the rest: `ft doctor`. Torch-free: what must import torch is `finetune.system.probe`'s.

Each finding is `works`, `limited` (training works, something else does not) or `fails` (`ft train` will not work).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from finetune.data.cache_dir import cache_folder

State = Literal["works", "limited", "fails"]
CHECKOUT = Path(__file__).resolve().parent.parent.parent
GIB, GB = 2**30, 10**9
PROBE_SECONDS = 120  # importing torch from a slow disk takes most of a minute
LEAST_MEMORY = 4 * GIB  # the bundled base trains in 1.5; torch and diffusers alone take one
MODELS_DISK, RUN_DISK = (
    20 * GB,
    2 * GB,
)  # SDXL in float16 is 7 GB and comes with float32 beside it; a LoRA's run is some hundred MB
INSTALL_TORCH = "install the build that https://pytorch.org/get-started/locally/ names for this machine"


@dataclass(frozen=True)
class Finding:
    """What was found of one part, in a sentence, and what mends it where something is to be mended."""

    name: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi says: the driver's version, and name and MiB of each GPU. No GPU is named where the tool is not there or fails."""

    version: str
    gpus: tuple[tuple[str, int], ...]


def examine() -> list[Finding]:
    """Look at everything. Never raises: what cannot be looked at is a finding."""
    probed = _probe("torch", "bitsandbytes") | _probe("hub")
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("Python", python_version),
        ("libraries", lambda: libraries(requirements(), tested())),
        ("torch", lambda: torch_build(probed["torch"])),
        ("GPU", lambda: gpus(driver(), probed["torch"])),
        ("bitsandbytes", lambda: bitsandbytes(probed["bitsandbytes"])),
        ("memory", memory),
        ("disk", lambda: disk(probed["hub"])),
        ("hub", lambda: hub(probed["hub"])),
    ]
    found = []
    for name, check in checks:
        try:
            found += check()
        except Exception as error:  # a machine in any state at all is looked at to its end
            found.append(
                Finding(
                    name,
                    "fails",
                    f"could not be looked at: {type(error).__name__}: {error}",
                    "tell us; the line above is all we need",
                )
            )
    return found


def _probe(*names: str) -> dict[str, dict[str, Any]]:
    """`finetune.system.probe`'s answers, or, of what its process died of, {"died": its last words}."""
    # -P: the script's own folder stays off the path, where its modules' names would shadow others'.
    command = [sys.executable, "-P", str(Path(__file__).with_name("probe.py")), *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        output, words, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        output, words, code = (error.stdout or b"").decode(), f"no answer in {PROBE_SECONDS} s", 1
    found: dict[str, dict[str, Any]] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    died = ([line for line in words.splitlines() if line.strip()] or [f"ended with code {code}"])[-1].strip()
    return {name: found.get(name, {"died": died}) for name in names}


# -- what Python stands on ------------------------------------------------------------------------------------------------


def python_version() -> list[Finding]:
    """Python, and the system that it runs on."""
    return [Finding("Python", "works", f"{platform.python_version()}, {platform.platform()}")]


def requirements() -> list[str]:
    """The ranges of versions that ft needs: a checkout's pyproject.toml, else as it was installed."""
    project = CHECKOUT / "pyproject.toml"
    if project.is_file():
        import tomllib

        found: list[str] = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
        return found
    return [line for line in metadata.requires("ft-image") or () if "extra ==" not in line]


def tested() -> dict[str, str]:
    """Library → the version that the tests pass with; empty where there is no checkout to read it from."""
    constraints = CHECKOUT / "scripts" / "constraints.txt"
    lines = constraints.read_text(encoding="utf-8").splitlines() if constraints.is_file() else []
    return {name.lower(): version for name, equals, version in (line.partition("==") for line in lines) if equals}


def libraries(needed: Sequence[str], passed: dict[str, str]) -> list[Finding]:
    """Installed versions against ranges, and against those that the tests pass with."""
    from packaging.requirements import Requirement

    wrong, other, right = [], [], 0
    for requirement in map(Requirement, needed):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append((str(requirement).partition(";")[0].strip(), f"{requirement.name} is not installed"))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(
                (
                    f"{requirement.name}{requirement.specifier}",
                    f"{requirement.name} is {version}, and {requirement.specifier} is needed",
                )
            )
            continue
        right += 1
        known = passed.get(requirement.name.lower())
        if known and version.partition("+")[0] != known:
            other.append(f"{requirement.name} {version} ({known})")
    if wrong:
        install = "pip install " + " ".join(f'"{wanted}"' for wanted, _ in wrong)
        return [Finding("libraries", "fails", "; ".join(said for _, said in wrong), install)]
    if other:
        said = f"{right} are in their ranges, and these are not the versions that were tested: {', '.join(other)}"
        return [
            Finding(
                "libraries",
                "works",
                said,
                "should something fail, install the tested ones: pip install -c scripts/constraints.txt -e .",
            )
        ]
    return [
        Finding(
            "libraries", "works", f"{right} are in their ranges" + (", all in the tested versions" if passed else "")
        )
    ]


# -- what computes --------------------------------------------------------------------------------------------------------


def torch_build(probed: dict[str, Any]) -> list[Finding]:
    """Whether torch can be imported, and what it was built for."""
    if "died" in probed:
        return [Finding("torch", "fails", f"cannot be imported: {probed['died']}", INSTALL_TORCH)]
    build = (
        f"CUDA {probed['cuda']}"
        if probed["cuda"]
        else f"ROCm {probed['hip']}"
        if probed["hip"]
        else "Apple's GPUs"
        if probed["mps"]
        else "CPU"
    )
    return [Finding("torch", "works", f"{probed['version']}, built for {build}, {probed['threads']} threads")]


def driver() -> Driver | None:
    """NVIDIA's driver; None where there is no sign of one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return (
            Driver("", ())
            if any(Path(device).exists() for device in ("/dev/nvidia0", "/proc/driver/nvidia/version"))
            else None
        )
    try:
        asked = [tool, "--query-gpu=driver_version,memory.total,name", "--format=csv,noheader,nounits"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return Driver("", ())
    rows = [[cell.strip() for cell in line.split(",", 2)] for line in done.stdout.splitlines() if line.count(",") >= 2]
    if done.returncode or not rows:
        return Driver("", ())
    return Driver(
        rows[0][0], tuple((name, int(float(size)) if size.replace(".", "").isdigit() else 0) for _, size, name in rows)
    )


def gpus(there: Driver | None, probed: dict[str, Any]) -> list[Finding]:
    """What the driver has, what torch sees of it, and whether it computes there."""
    if "died" in probed:
        return []
    if probed["gpus"]:
        version = f", driver {there.version}" if there is not None and there.version else ""
        return [_gpu(number, gpu, probed, version) for number, gpu in enumerate(probed["gpus"])]
    if probed["mps"]:
        return [
            Finding(
                "GPU",
                "limited",
                "an Apple GPU, on which ft was never tested",
                "accelerate launch --cpu … trains on the CPU instead",
            )
        ]
    if there is None:
        remedy = "for larger models rent or add an NVIDIA card: `ft estimate --images N` says which"
        return [
            Finding(
                "GPU", "limited", "there is none: the bundled base trains in minutes here, and SD 1.5 in days", remedy
            )
        ]
    names = ", ".join(f"{name} ({size / 1024:.0f} GiB)" for name, size in there.gpus) or "an NVIDIA device"
    version = f", driver {there.version}" if there.version else ", and nvidia-smi cannot speak to its driver"
    if probed["cuda"] is None:
        return [
            Finding(
                "GPU", "fails", f"{names}{version}; torch is a build without CUDA and does not see it", INSTALL_TORCH
            )
        ]
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return [
            Finding(
                "GPU",
                "fails",
                f"{names}{version}; the environment's CUDA_VISIBLE_DEVICES hides it",
                "unset CUDA_VISIBLE_DEVICES",
            )
        ]
    said = f" ({probed['warnings'][0]})" if probed["warnings"] else ""
    remedy = f"install a newer driver, or a torch built for an older CUDA than {probed['cuda']}; in a container, start it with --gpus all"
    return [Finding("GPU", "fails", f"{names}{version}; torch for CUDA {probed['cuda']} does not see it{said}", remedy)]


def _gpu(number: int, gpu: dict[str, Any], probed: dict[str, Any], version: str) -> Finding:
    name = f"GPU {number}" if len(probed["gpus"]) > 1 else "GPU"
    said = f"{gpu['name']}{version}, compute capability {'.'.join(map(str, gpu['capability']))}"
    if "error" in gpu or not gpu.get("computes"):
        own = f"sm_{gpu['capability'][0]}{gpu['capability'][1]}"
        old = probed["cuda"] and own not in probed["compiled_for"]
        cause = (
            f"torch was compiled for {', '.join(probed['compiled_for'])}, not for its {own}"
            if old
            else gpu.get("error", "sums come out wrong")
        )
        return Finding(
            name,
            "fails",
            f"{said}: it does not compute: {cause}",
            INSTALL_TORCH if old else "see nvidia-smi; restart the machine or its driver",
        )
    said += f", {gpu['free'] / GIB:.1f} of {gpu['total'] / GIB:.1f} GiB free, {'bfloat16' if gpu['bfloat16'] else 'float16 only, no bfloat16'}"
    if gpu["free"] < 0.85 * gpu["total"]:
        return Finding(
            name, "limited", said, "nvidia-smi names the programs that hold its memory; end those that you can"
        )
    return Finding(name, "works", said)


def bitsandbytes(probed: dict[str, Any]) -> list[Finding]:
    """Whether 4-bit layers and 8-bit AdamW compute."""
    name = "bitsandbytes"
    remedy = "pip install -U bitsandbytes; without it leave out adamw8bit and 4-bit bases"
    if "died" in probed:
        return [Finding(name, "limited", f"does not work here: {probed['died']}", remedy)]
    wrong = [
        what
        for what, right in (("4-bit layers", probed["four_bit"]), ("8-bit AdamW", probed["eight_bit"]))
        if not right
    ]
    if wrong:
        return [
            Finding(
                name,
                "limited",
                f"{probed['version']}, {' and '.join(wrong)} come out wrong on {probed['device']}",
                remedy,
            )
        ]
    return [Finding(name, "works", f"{probed['version']}, 4-bit layers and 8-bit AdamW compute on {probed['device']}")]


# -- where things are kept ------------------------------------------------------------------------------------------------


def memory() -> list[Finding]:
    """How much of the machine's own memory is free."""
    import psutil

    found = psutil.virtual_memory()
    said = f"{found.available / GIB:.1f} of {found.total / GIB:.1f} GiB of the machine's own are free"
    if found.available < LEAST_MEMORY:
        return [
            Finding(
                "memory",
                "limited",
                said,
                "close other programs: importing the libraries and loading a small model takes some 4 GiB",
            )
        ]
    return [Finding("memory", "works", said)]


def disk(probed: dict[str, Any]) -> list[Finding]:
    """Free space, and leave to write, where runs, encoded images and downloaded models go; the last place is as the hub's library says."""
    places: tuple[tuple[str, Path, int, State, str], ...] = (
        ("runs", Path("runs"), RUN_DISK, "fails", "start ft in another folder, or set output.folder"),
        (
            "cache",
            cache_folder(None),
            RUN_DISK,
            "fails",
            "name another place: the environment's FT_CACHE, or data.cache",
        ),
        (
            "models",
            Path(probed.get("cache", "~/.cache/huggingface/hub")).expanduser(),
            MODELS_DISK,
            "limited",
            "name another place for downloads: the environment's HF_HOME",
        ),
    )
    return [place(name, folder.absolute(), least, worst, remedy) for name, folder, least, worst, remedy in places]


def place(name: str, folder: Path, least: int, worst: State, remedy: str) -> Finding:
    """A folder, or where it would be made: the room there, and whether one may write."""
    there = next(above for above in (folder, *folder.parents) if above.exists())
    said = f"{folder}: {shutil.disk_usage(there).free / GB:,.0f} GB free"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(name, worst, f"{folder}: nothing can be written there", remedy)
    if shutil.disk_usage(there).free < least:
        return Finding(
            name, "limited", f"{said}, and {least / GB:.0f} are soon needed", f"free some space, or {remedy}"
        )
    return Finding(name, "works", said)


# -- the hub --------------------------------------------------------------------------------------------------------------


def hub(probed: dict[str, Any]) -> list[Finding]:
    """Whether models come from the hub by name, and whether gated ones can. A token is never shown."""
    offline = "models by hub name do not load unless they were downloaded before; folders and .safetensors files do"
    if "died" in probed:
        return [Finding("hub", "limited", f"cannot be asked: {probed['died']}", "pip install -U huggingface_hub")]
    if probed["offline"]:
        return [
            Finding("hub", "limited", f"HF_HUB_OFFLINE is set: {offline}", "unset HF_HUB_OFFLINE to download"),
            _token(probed),
        ]
    if not probed["answers"]:
        reason = probed.get("error", "its server has an error")
        remedy = "check the network, a proxy (HTTPS_PROXY) or a mirror (HF_ENDPOINT)"
        return [
            Finding("hub", "limited", f"{probed['endpoint']} does not answer ({reason}): {offline}", remedy),
            _token(probed),
        ]
    return [Finding("hub", "works", f"{probed['endpoint']} answers"), _token(probed)]


def _token(probed: dict[str, Any]) -> Finding:
    get = "accept the licence on the model's page, then `hf auth login` with a token from https://huggingface.co/settings/tokens"
    if not probed["token"]:
        return Finding(
            "token",
            "limited",
            "none is kept: models that ask for a licence (SD 3.5, FLUX.1-dev) cannot be downloaded",
            get,
        )
    if probed["answers"] and not probed["known"]:
        return Finding("token", "limited", "one is kept, and the hub does not accept it", get)
    return Finding(
        "token",
        "works",
        "one is kept" + (", and the hub knows it" if probed["known"] else ", unchecked while the hub is out of reach"),
    )


# -- told -----------------------------------------------------------------------------------------------------------------


def verdict(findings: Sequence[Finding]) -> str:
    """What all of it means for training, in one sentence."""
    failing = [finding.name for finding in findings if finding.state == "fails"]
    if failing:
        return f"ft train will not work here before this is mended: {', '.join(failing)}"
    return "ft train works here: try `ft train lora/emoji`"


def lines(findings: Sequence[Finding]) -> list[str]:
    """For a terminal: a sign and a sentence each, and under it what mends it."""
    width = max(len(finding.name) for finding in findings)
    signs = {"works": "✓", "limited": "!", "fails": "✗"}
    shown = []
    for finding in findings:
        shown.append(f" {signs[finding.state]} {finding.name:<{width}}  {finding.found}")
        if finding.remedy:
            shown.append(f"   {'':<{width}}  → {finding.remedy}")
    return [*shown, "", verdict(findings)]

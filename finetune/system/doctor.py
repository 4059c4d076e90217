"""`ft doctor`: checks this machine and says how to fix what does not work.

Torch-free: checks that import torch run in another process (`finetune.system.probe`).

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
LEAST_MEMORY = 4 * GIB  # the bundled base model trains in 1.5; torch and diffusers alone take one
MODELS_DISK = 20 * GB  # SDXL is 7 GB in float16, and downloads include a float32 copy
RUN_DISK = 2 * GB  # a LoRA run is a few hundred MB
INSTALL_TORCH = "install the build for this machine from https://pytorch.org/get-started/locally/"


@dataclass(frozen=True)
class Finding:
    """The result of one check in a sentence, and the fix if one is needed."""

    name: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi reports: the driver version, and name and MiB of each GPU; no GPUs if the tool is missing or
    fails.
    """

    version: str
    gpus: tuple[tuple[str, int], ...]


def examine() -> list[Finding]:
    """Run all checks. Never raises: a check that fails is a finding."""
    probed = _probe("torch", "bitsandbytes") | _probe("hub")
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("Python", python_version),
        ("package", package),
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
        except Exception as error:  # the remaining checks still run
            found.append(
                Finding(
                    name,
                    "fails",
                    f"the check failed: {type(error).__name__}: {error}",
                    "please report this line as a bug",
                )
            )
    return found


def _probe(*names: str) -> dict[str, dict[str, Any]]:
    """The results of `finetune.system.probe`, or {"died": the last line of its error output}."""
    # -P keeps the script's own folder off sys.path, where its modules would shadow others.
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


# -- Python and libraries
# -------------------------------------------------------------------------------------------------


def python_version() -> list[Finding]:
    """The versions of Python and the operating system."""
    return [Finding("Python", "works", f"{platform.python_version()}, {platform.platform()}")]


def package() -> list[Finding]:
    """Whether the unrelated PyPI package `finetune`, which has the same import name as `ft-image`, is installed."""
    if "finetune" not in metadata.packages_distributions().get("finetune", ()):
        return []
    version = metadata.version("finetune")
    return [
        Finding(
            "package",
            "fails",
            f"the unrelated PyPI package finetune {version} is installed: `import finetune` may import it instead "
            "of ft",
            "pip uninstall finetune, then reinstall ft: pip install --force-reinstall --no-deps ft-image",
        )
    ]


def requirements() -> list[str]:
    """The required version ranges, from the checkout's pyproject.toml or from the installed package."""
    project = CHECKOUT / "pyproject.toml"
    if project.is_file():
        import tomllib

        found: list[str] = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
        return found
    return [line for line in metadata.requires("ft-image") or () if "extra ==" not in line]


def tested() -> dict[str, str]:
    """Library → tested version, from the checkout; empty if there is none."""
    constraints = CHECKOUT / "scripts" / "constraints.txt"
    lines = constraints.read_text(encoding="utf-8").splitlines() if constraints.is_file() else []
    return {name.lower(): version for name, equals, version in (line.partition("==") for line in lines) if equals}


def libraries(needed: Sequence[str], passed: dict[str, str]) -> list[Finding]:
    """Compare installed versions with the required ranges and the tested versions."""
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
                    f"{requirement.name} is {version}, but {requirement.specifier} is required",
                )
            )
            continue
        right += 1
        known = passed.get(requirement.name.lower())
        if known and version.partition("+")[0] != known:
            other.append(f"{requirement.name} {version} ({known})")
    if wrong:
        install = "pip install " + " ".join(f'"{wanted}"' for wanted, _ in wrong)
        return [Finding("libraries", "fails", "; ".join(problem for _, problem in wrong), install)]
    if other:
        text = f"{right} in the required ranges; not the tested versions: {', '.join(other)}"
        return [
            Finding(
                "libraries",
                "works",
                text,
                "if something fails, install the tested versions: pip install -c scripts/constraints.txt -e .",
            )
        ]
    return [
        Finding(
            "libraries", "works", f"{right} in the required ranges" + (", all in the tested versions" if passed else "")
        )
    ]


# -- what computes
# --------------------------------------------------------------------------------------------------------


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
    """The NVIDIA driver; None if there is no sign of one."""
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
    """The GPUs that the driver and torch see, and whether torch computes on them."""
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
                "an Apple GPU, on which ft is untested",
                "to train on the CPU instead: accelerate launch --cpu …",
            )
        ]
    if there is None:
        remedy = "for larger models rent or add an NVIDIA GPU: `ft estimate --images N` recommends one"
        return [
            Finding(
                "GPU",
                "limited",
                "none found: the bundled base model trains in minutes on this CPU, SD 1.5 in days",
                remedy,
            )
        ]
    names = ", ".join(f"{name} ({size / 1024:.0f} GiB)" for name, size in there.gpus) or "an NVIDIA device"
    version = f", driver {there.version}" if there.version else ", and nvidia-smi cannot reach its driver"
    if probed["cuda"] is None:
        return [
            Finding("GPU", "fails", f"{names}{version}; torch is a build without CUDA and cannot use it", INSTALL_TORCH)
        ]
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return [
            Finding(
                "GPU",
                "fails",
                f"{names}{version}; the environment variable CUDA_VISIBLE_DEVICES hides it",
                "unset CUDA_VISIBLE_DEVICES",
            )
        ]
    text = f" ({probed['warnings'][0]})" if probed["warnings"] else ""
    remedy = (
        f"install a newer driver, or a torch built for an older CUDA than {probed['cuda']}; in a container, "
        "start it with --gpus all"
    )
    return [Finding("GPU", "fails", f"{names}{version}; torch for CUDA {probed['cuda']} does not see it{text}", remedy)]


def _gpu(number: int, gpu: dict[str, Any], probed: dict[str, Any], version: str) -> Finding:
    name = f"GPU {number}" if len(probed["gpus"]) > 1 else "GPU"
    text = f"{gpu['name']}{version}, compute capability {'.'.join(map(str, gpu['capability']))}"
    if "error" in gpu or not gpu.get("computes"):
        own = f"sm_{gpu['capability'][0]}{gpu['capability'][1]}"
        old = probed["cuda"] and own not in probed["compiled_for"]
        cause = (
            f"torch was compiled for {', '.join(probed['compiled_for'])}, not for its {own}"
            if old
            else gpu.get("error", "results are wrong")
        )
        return Finding(
            name,
            "fails",
            f"{text}: computing fails: {cause}",
            INSTALL_TORCH if old else "check nvidia-smi; restart the machine or the driver",
        )
    text += (
        f", {gpu['free'] / GIB:.1f} of {gpu['total'] / GIB:.1f} GiB free, "
        f"{'bfloat16' if gpu['bfloat16'] else 'float16 only, no bfloat16'}"
    )
    if gpu["free"] < 0.85 * gpu["total"]:
        return Finding(
            name, "limited", text, "nvidia-smi lists the programs that use GPU memory; close those you do not need"
        )
    return Finding(name, "works", text)


def bitsandbytes(probed: dict[str, Any]) -> list[Finding]:
    """Whether 4-bit layers and 8-bit AdamW work."""
    name = "bitsandbytes"
    remedy = "pip install -U bitsandbytes; without it, do not use adamw8bit or 4-bit base models"
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
                f"{probed['version']}, {' and '.join(wrong)} give wrong results on {probed['device']}",
                remedy,
            )
        ]
    return [Finding(name, "works", f"{probed['version']}, 4-bit layers and 8-bit AdamW work on {probed['device']}")]


# -- memory and disk
# ------------------------------------------------------------------------------------------------------


def memory() -> list[Finding]:
    """Free host memory."""
    import psutil

    found = psutil.virtual_memory()
    text = f"{found.available / GIB:.1f} of {found.total / GIB:.1f} GiB of host memory free"
    if found.available < LEAST_MEMORY:
        return [
            Finding(
                "memory",
                "limited",
                text,
                "close other programs: importing the libraries and loading a small model takes about 4 GiB",
            )
        ]
    return [Finding("memory", "works", text)]


def disk(probed: dict[str, Any]) -> list[Finding]:
    """Free space and write access where runs, encoded images and downloaded models are stored."""
    places: tuple[tuple[str, Path, int, State, str], ...] = (
        ("runs", Path("runs"), RUN_DISK, "fails", "start ft in another folder, or set output.folder"),
        (
            "cache",
            cache_folder(None),
            RUN_DISK,
            "fails",
            "set the environment variable FT_CACHE, or data.cache",
        ),
        (
            "models",
            Path(probed.get("cache", "~/.cache/huggingface/hub")).expanduser(),
            MODELS_DISK,
            "limited",
            "set the environment variable HF_HOME to another folder",
        ),
    )
    return [place(name, folder.absolute(), least, worst, remedy) for name, folder, least, worst, remedy in places]


def place(name: str, folder: Path, least: int, worst: State, remedy: str) -> Finding:
    """Free space and write access of a folder, or of the folder it would be created in."""
    there = next(above for above in (folder, *folder.parents) if above.exists())
    text = f"{folder}: {shutil.disk_usage(there).free / GB:,.0f} GB free"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(name, worst, f"{folder}: not writable", remedy)
    if shutil.disk_usage(there).free < least:
        return Finding(
            name, "limited", f"{text}; about {least / GB:.0f} GB are needed", f"free some space, or {remedy}"
        )
    return Finding(name, "works", text)


# -- the hub
# --------------------------------------------------------------------------------------------------------------


def hub(probed: dict[str, Any]) -> list[Finding]:
    """Whether models can be downloaded from the hub, including gated ones. Never shows a token."""
    offline = "models on the hub load only if already downloaded; folders and .safetensors files still load"
    if "died" in probed:
        return [Finding("hub", "limited", f"check failed: {probed['died']}", "pip install -U huggingface_hub")]
    if probed["offline"]:
        return [
            Finding("hub", "limited", f"HF_HUB_OFFLINE is set: {offline}", "unset HF_HUB_OFFLINE to download"),
            _token(probed),
        ]
    if not probed["answers"]:
        reason = probed.get("error", "server error")
        remedy = "check the network, a proxy (HTTPS_PROXY) or a mirror (HF_ENDPOINT)"
        return [
            Finding("hub", "limited", f"{probed['endpoint']} does not answer ({reason}): {offline}", remedy),
            _token(probed),
        ]
    return [Finding("hub", "works", f"{probed['endpoint']} answers"), _token(probed)]


def _token(probed: dict[str, Any]) -> Finding:
    get = (
        "accept the license on the model's page, then `hf auth login` with a token from "
        "https://huggingface.co/settings/tokens"
    )
    if not probed["token"]:
        return Finding(
            "token",
            "limited",
            "none stored: gated models (SD 3.5, FLUX.1-dev) cannot be downloaded",
            get,
        )
    if probed["answers"] and not probed["known"]:
        return Finding("token", "limited", "stored, but the hub does not accept it", get)
    return Finding(
        "token",
        "works",
        "stored" + (", accepted by the hub" if probed["known"] else ", not checked: the hub is unreachable"),
    )


# -- output
# ---------------------------------------------------------------------------------------------------------------


def verdict(findings: Sequence[Finding]) -> str:
    """The overall result in one sentence."""
    failing = [finding.name for finding in findings if finding.state == "fails"]
    if failing:
        return f"ft train will not work until this is fixed: {', '.join(failing)}"
    return "ft train works here: try `ft train lora/emoji`"


def lines(findings: Sequence[Finding]) -> list[str]:
    """Lines for a terminal: a sign and a sentence for each finding, and its fix below."""
    width = max(len(finding.name) for finding in findings)
    signs = {"works": "✓", "limited": "!", "fails": "✗"}
    shown = []
    for finding in findings:
        shown.append(f" {signs[finding.state]} {finding.name:<{width}}  {finding.found}")
        if finding.remedy:
            shown.append(f"   {'':<{width}}  → {finding.remedy}")
    return [*shown, "", verdict(findings)]

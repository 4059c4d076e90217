"""Checks that import the heavy libraries, run in a process of their own, which may crash: one line of JSON per check.

python -P finetune/system/probe.py NAME …       names: torch, bitsandbytes, hub
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from typing import Any


def torch() -> dict[str, Any]:
    """The torch build, its compile targets, and every visible GPU with its free memory and whether it computes."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "mps": torch.backends.mps.is_available(),
        "compiled_for": torch.cuda.get_arch_list(),
        "warnings": [" ".join(str(warning.message).split()) for warning in said],
        "threads": torch.get_num_threads(),
        "gpus": [],
    }
    for number in range(torch.cuda.device_count() if available else 0):  # untested without a GPU
        gpu: dict[str, Any] = {
            "name": torch.cuda.get_device_name(number),
            "capability": list(torch.cuda.get_device_capability(number)),
        }
        try:
            gpu["free"], gpu["total"] = torch.cuda.mem_get_info(number)
            gpu["bfloat16"] = torch.cuda.is_bf16_supported(including_emulation=False)
            ones = torch.ones(64, 64, device=f"cuda:{number}")
            gpu["computes"] = bool((ones @ ones == 64).all())
        except RuntimeError as error:  # CUDA errors, including out of memory
            gpu["error"] = str(error).strip().partition("\n")[0]
        found["gpus"].append(gpu)
    return found


def bitsandbytes() -> dict[str, Any]:
    """Whether a 4-bit layer and a step of 8-bit AdamW work, on the GPU if torch sees one."""
    import bitsandbytes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"version": bitsandbytes.__version__, "device": device}
    layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to(device)
    found["four_bit"] = bool(layer(torch.ones(1, 64, device=device)).isfinite().all())
    weight = torch.nn.Parameter(torch.ones(64, 128, device=device))  # smaller tensors keep float32 state
    optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    found["eight_bit"] = bool((weight < 1).all())
    return found


def hub() -> dict[str, Any]:
    """Whether the hub answers, whether a token is stored, and whether the hub accepts it. Never returns the token."""
    from huggingface_hub import constants, get_session, get_token, whoami

    token = get_token()
    found: dict[str, Any] = {
        "endpoint": _public(constants.ENDPOINT),
        "offline": constants.HF_HUB_OFFLINE,
        "cache": constants.HF_HUB_CACHE,
    }
    found |= {"token": token is not None, "answers": False, "known": False}
    if found["offline"]:
        return found
    # The library's HTTP client, and with it the error types, changes between versions: catch them all.
    try:
        found["answers"] = get_session().head(constants.ENDPOINT, timeout=10).status_code < 500
    except Exception as error:
        return found | {"error": _public(f"{type(error).__name__}: {error}")}
    if token is not None:
        try:
            found["known"] = bool(whoami(token))
        except Exception as error:
            found["error"] = type(error).__name__
    return found


def _public(text: str) -> str:
    """Remove a user name and password from URLs."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def main() -> None:
    """Print one line of JSON for each check named on the command line."""
    for name in sys.argv[1:]:
        found = {"torch": torch, "bitsandbytes": bitsandbytes, "hub": hub}[name]()
        sys.stdout.write(json.dumps({name: found}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

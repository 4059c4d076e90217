"""`ft doctor`: simulated machines in every state, this machine, and one with a broken torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.main import main
from finetune.system import doctor
from finetune.system.doctor import Driver, Finding

GPU = {
    "name": "RTX 3090",
    "capability": [8, 6],
    "free": 23 * 2**30,
    "total": 24 * 2**30,
    "bfloat16": True,
    "computes": True,
}
TORCH: dict[str, Any] = {
    "version": "2.13.0",
    "cuda": "12.6",
    "hip": None,
    "mps": False,
    "compiled_for": ["sm_80", "sm_86", "sm_90"],
    "warnings": [],
    "threads": 8,
    "gpus": [GPU],
}
DRIVER = Driver("580.10", (("RTX 3090", 24576),))
UNSEEN = TORCH | {"gpus": []}


@pytest.mark.parametrize(
    ("there", "probed", "state", "found", "remedy"),
    [
        (DRIVER, TORCH, "works", "driver 580.10, compute capability 8.6, 23.0 of 24.0 GiB free, bfloat16", ""),
        (
            DRIVER,
            TORCH | {"gpus": [GPU | {"free": 2**30}]},
            "limited",
            "1.0 of 24.0 GiB free",
            "nvidia-smi lists the programs",
        ),
        (None, UNSEEN, "limited", "none found", "ft estimate"),
        (None, UNSEEN | {"mps": True}, "limited", "Apple", "CPU"),
        (DRIVER, UNSEEN | {"cuda": None}, "fails", r"RTX 3090 \(24 GiB\).*without CUDA", "pytorch.org"),
        (DRIVER, UNSEEN | {"warnings": ["driver too old (found version 11040)"]}, "fails", "too old", "newer driver"),
        (Driver("", ()), UNSEEN, "fails", "nvidia-smi cannot reach", "newer driver"),
        (
            DRIVER,
            TORCH | {"gpus": [GPU | {"capability": [12, 0], "error": "no kernel image", "computes": False}]},
            "fails",
            "not for its sm_120",
            "pytorch.org",
        ),
        (DRIVER, TORCH | {"gpus": [GPU | {"error": "an ECC error"}]}, "fails", "an ECC error", "nvidia-smi"),
    ],
)
def test_gpu_finding_has_state_and_remedy(
    there: Driver | None, probed: dict[str, Any], state: str, found: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (finding,) = doctor.gpus(there, probed)
    assert finding.state == state
    assert_reports(finding, found, remedy)


def assert_reports(finding: Finding, found: str, remedy: str) -> None:
    import re

    assert re.search(found, finding.found), finding
    assert re.search(remedy, finding.remedy), finding
    assert bool(finding.remedy) == bool(remedy)


def test_gpu_hidden_by_cuda_visible_devices_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert_reports(doctor.gpus(DRIVER, UNSEEN)[0], "CUDA_VISIBLE_DEVICES hides it", "unset")


def test_libraries_with_wrong_versions_fail() -> None:
    (wrong,) = doctor.libraries(
        ["pytest>=999", "no-such-thing>=1", "click>=8; sys_platform == 'nowhere'", "numpy>=1"], {}
    )
    assert wrong.state == "fails"
    assert_reports(
        wrong,
        "pytest is .*but >=999 is required; no-such-thing is not installed",
        'pip install "pytest>=999" "no-such-thing>=1"',
    )
    (other,) = doctor.libraries(["numpy>=1"], {"numpy": "0.1"})
    assert other.state == "works"
    assert_reports(other, r"not the tested versions: numpy .*\(0.1\)", "constraints.txt")
    (right,) = doctor.libraries(doctor.requirements(), {})
    assert right.state == "works"


def test_package_of_another_project_with_the_same_import_name_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.package() == []
    info = tmp_path / "finetune-0.10.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: finetune\nVersion: 0.10.0\n")
    (info / "top_level.txt").write_text("finetune\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    (finding,) = doctor.package()

    assert finding.state == "fails"
    assert_reports(finding, r"unrelated PyPI package finetune 0\.10\.0", "pip uninstall finetune")


def test_hub_finding_reports_access_and_token() -> None:
    base = {
        "endpoint": "https://huggingface.co",
        "offline": False,
        "cache": "/c",
        "token": False,
        "answers": True,
        "known": False,
    }
    assert [finding.state for finding in doctor.hub(base)] == ["works", "limited"]
    assert_reports(doctor.hub(base | {"token": True})[1], "does not accept it", "hf auth login")
    assert [finding.state for finding in doctor.hub(base | {"token": True, "known": True})] == ["works", "works"]
    assert_reports(
        doctor.hub(base | {"answers": False, "error": "ConnectError"})[0],
        r"does not answer \(ConnectError\)",
        "HF_ENDPOINT",
    )


def test_place_reports_too_little_space_and_unusable_folders(tmp_path: Path) -> None:
    assert doctor.place("runs", tmp_path / "a" / "b", 1, "fails", "elsewhere").state == "works"
    assert_reports(
        doctor.place("runs", tmp_path / "a", 10**18, "fails", "elsewhere"),
        "GB free; about .* are needed",
        "free some space, or elsewhere",
    )
    (tmp_path / "file").write_text("")
    below = doctor.place("runs", tmp_path / "file" / "runs", 1, "fails", "elsewhere")
    assert (below.state, below.remedy) == ("fails", "elsewhere")


def ft_doctor(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *flags])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    assert isinstance(ended.value.code, int)
    return ended.value.code, shown.out


def test_doctor_works_here_and_never_shows_the_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    code, shown = ft_doctor(capsys, "--json")
    found = json.loads(shown)
    assert (code, found["works"]) == (0, True)
    states = {finding["name"]: finding["state"] for finding in found["findings"]}
    assert {
        "Python",
        "libraries",
        "torch",
        "GPU",
        "bitsandbytes",
        "memory",
        "runs",
        "cache",
        "models",
        "hub",
        "token",
    } <= states.keys()
    assert states["torch"] == states["bitsandbytes"] == states["token"] == "works"
    assert "verysecret" not in shown


def test_doctor_with_a_broken_torch_reports_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text('raise ImportError("libcudart.so.12: cannot open shared object file")\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, shown = ft_doctor(capsys)
    assert code == 1
    assert "✗ torch" in shown and "cannot be imported: ImportError: libcudart.so.12" in shown
    assert shown.rstrip().endswith("until this is fixed: torch")

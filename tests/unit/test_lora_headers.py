"""Headers of LoRA files, written by hand or damaged: a message that names the entry, never a traceback."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.adapters.lora_file import look
from finetune.data.media.image import Unreadable, decode
from finetune.errors import UserError

LAYER = "unet.mid_block.attentions.0.proj_in"
GOOD: dict[str, Any] = {
    f"{LAYER}.lora_A.weight": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
    f"{LAYER}.lora_B.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [32, 64]},
}


def write(folder: Path, header: Any, content: bytes = bytes(64)) -> Path:
    text = json.dumps(header).encode()
    (folder / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)
    return folder / "a.safetensors"


def with_settings(**values: Any) -> dict[str, Any]:
    return GOOD | {"__metadata__": {"lora_adapter_metadata": json.dumps(values)}}


def entry(**values: Any) -> dict[str, Any]:
    name = f"{LAYER}.lora_A.weight"
    return GOOD | {name: GOOD[name] | values}


def alpha(dtype: Any, content: bytes) -> tuple[dict[str, Any], bytes]:
    name = f"{LAYER}.alpha"
    return GOOD | {name: {"dtype": dtype, "shape": [], "data_offsets": [64, 64 + len(content)]}}, bytes(64) + content


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (entry(shape=[]), r"has the shape \[\], and the weights of a LoRA are matrices"),
        (entry(shape=[0, 4]), r"has the shape \[0, 4\]"),
        (entry(shape=[-1, 4]), "something other than whole numbers"),
        (entry(shape=["2", 4]), "something other than whole numbers"),
        (entry(shape=None), "cannot be read"),
        (entry(data_offsets=[0]), "something other than whole numbers"),
        (entry(data_offsets=[0, 4096]), "ends after the file"),
        (entry(dtype=None), "is not text"),
        ({**GOOD, "x.lora_A.weight": []}, "cannot be read"),
        ([], "cannot be read"),
        ({**GOOD, "__metadata__": []}, "not as safetensors writes it"),
        ({**GOOD, "__metadata__": {"a": 1}}, '"a" in its metadata is not text'),
        (with_settings(**{"unet.lora_alpha": None}), "unet.lora_alpha: null, which is not a positive number"),
        (with_settings(**{"unet.lora_alpha": "8"}), 'unet.lora_alpha: "8", which is not a positive number'),
        (with_settings(**{"unet.r": 2.5}), r"unet.r: 2.5, which is not a rank"),
        (with_settings(**{"unet.use_dora": "yes"}), "neither true nor false"),
        (with_settings(**{"unet.alpha_pattern": {"a": None}}), "alpha_pattern of something other than positive"),
        ({**GOOD, "__metadata__": {"lora_adapter_metadata": "[1]"}}, "not an object"),
        ({**GOOD, "__metadata__": {"lora_adapter_metadata": "{"}}, "cannot be read"),
    ],
)
def test_a_header_written_by_hand_is_refused_by_entry(header: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        look(str(write(tmp_path, header)))


@pytest.mark.parametrize(
    ("dtype", "content", "said"),
    [
        ("F8_E4M3", b"\0", "is stored as F8_E4M3, which is no dtype of an alpha"),
        ("F32", b"", "cannot be read"),
        ("F32", b"\0\0\xc0\x7f", 'alpha" is nan'),
        ("F64", b"\0\0\0\0\0\0\xf0\x7f", 'alpha" is inf'),
    ],
)
def test_an_alpha_that_is_no_number_is_refused(dtype: str, content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        look(str(write(tmp_path, *alpha(dtype, content))))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        *GOOD,
        f"{LAYER}.alpha",
        "lora_unet_x.lora_down.weight",
        "bundle_emb.fox",
        "bundle_emb.",
        "__metadata__",
        "x.dora_scale",
    ]
)
ENTRIES = ANY | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "?"]) | ANY,
        "shape": st.lists(st.integers(-2, 5), max_size=4) | ANY,
        "data_offsets": st.lists(st.integers(0, 80), max_size=3) | ANY,
    }
)
SETTINGS = st.dictionaries(
    st.sampled_from(["unet.r", "unet.lora_alpha", "unet.alpha_pattern", "unet.use_rslora", "unet.use_dora", "r"]), ANY
)
METADATA = ANY | st.builds(lambda values: {"lora_adapter_metadata": json.dumps(values)}, SETTINGS | ANY)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, ENTRIES, max_size=4), METADATA | st.none(), st.booleans())
def test_any_header_is_read_or_refused(
    tmp_path: Path, entries: dict[str, Any], metadata: Any, beside_good: bool
) -> None:
    header = (GOOD if beside_good else {}) | entries | ({"__metadata__": metadata} if metadata is not None else {})
    try:
        found = look(str(write(tmp_path, header)))
    except UserError as error:
        assert error.problem and error.remedy
        return
    assert found.rank > 0
    assert math.isfinite(found.alpha)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError):
        look(str(tmp_path / "a.safetensors"))


def tiff(values: numpy.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values.astype(numpy.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_float_image_with_nan_is_refused(value: float) -> None:
    values = numpy.linspace(0, 1, 12).reshape(3, 4)
    assert decode(tiff(values), "white").size == (4, 3)
    values[1, 2] = value
    with pytest.raises(Unreadable, match=r"^1 of its 12 values are NaN or infinite$"):
        decode(tiff(values), "white")

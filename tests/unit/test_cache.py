"""The cache of latents and text embeddings.

Complete, readable by later runs, and computed only where entries are missing.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune.data import latent_cache
from finetune.data.cache_dir import cache_folder
from finetune.data.latent_cache import Store, fingerprint
from finetune.errors import UserError

# -- the store --------------------------------------------------------------------------------------------------------------


def tensors(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {"mean": torch.randn(4, 8, 8, generator=generator).half(), "ids": torch.arange(number, number + 5)}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def filled(folder: Path, numbers: range) -> Store:
    store = Store(folder)
    for number in numbers:
        store.put(f"key{number}", tensors(number))
    store.flush()
    return store


def test_store_put_entries_are_read_after_flush(tmp_path: Path) -> None:
    store = filled(tmp_path, range(100))
    store.put("late", tensors(1))
    for found in (store, Store(tmp_path)):
        assert all(
            f"key{number}" in found and same(found.get(f"key{number}"), tensors(number)) for number in range(100)
        )
        assert "another" not in found
        with pytest.raises(KeyError):
            found.get("another")
    assert "late" in store
    assert "late" not in Store(tmp_path)  # not yet flushed


def test_store_put_views_are_stored_as_separate_tensors(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(2, 3, 4)
    first, second = whole.unbind(0)
    store = Store(tmp_path)
    store.put("views", {"first": first, "second": second.T, "again": first})
    whole.zero_()  # put() copied the tensors
    store.flush()
    kept = Store(tmp_path).get("views")
    assert torch.equal(kept["first"], torch.arange(12.0).view(3, 4))
    assert torch.equal(kept["second"], torch.arange(12.0, 24).view(3, 4).T)


def test_store_shards_are_bounded_in_entries_and_bytes_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    filled(tmp_path / "entries", range(2 * latent_cache.SHARD_ENTRIES + 1))
    assert len(list((tmp_path / "entries").iterdir())) == 3
    monkeypatch.setattr(latent_cache, "SHARD_BYTES", 2000)  # an entry has 552 bytes
    store = filled(tmp_path / "bytes", range(40))
    assert len(list((tmp_path / "bytes").iterdir())) == 10
    assert all(same(store.get(f"key{number}"), tensors(number)) for number in range(40))
    assert len(os.listdir("/proc/self/fd")) == open_before


@pytest.mark.parametrize("damage", ["a byte", "cut", "empty", "header"])
def test_store_with_a_damaged_shard_sets_it_aside_and_accepts_new_entries(tmp_path: Path, damage: str) -> None:
    filled(tmp_path, range(5))
    (broken,) = tmp_path.iterdir()
    filled(tmp_path, range(10, 12))
    content = bytearray(broken.read_bytes())
    content[-1 if damage == "a byte" else 3] ^= 0xFF
    broken.write_bytes({"cut": bytes(content[: len(content) // 2]), "empty": b""}.get(damage, bytes(content)))
    store = Store(tmp_path)
    assert not any(f"key{number}" in store for number in range(5))
    assert all(f"key{number}" in store for number in range(10, 12))
    assert broken.with_suffix(".damaged").exists()
    assert not broken.exists()
    for number in range(5):
        store.put(f"key{number}", tensors(number))
    store.flush()
    again = Store(tmp_path)
    assert all(
        f"key{number}" in again and same(again.get(f"key{number}"), tensors(number)) for number in (*range(5), 10, 11)
    )


def test_store_with_two_concurrent_writers_keeps_all_entries(tmp_path: Path) -> None:
    writers = [threading.Thread(target=filled, args=(tmp_path, numbers)) for numbers in (range(150), range(100, 250))]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    store = Store(tmp_path)
    assert all(f"key{number}" in store and same(store.get(f"key{number}"), tensors(number)) for number in range(250))


def test_store_after_a_killed_writer_has_only_complete_shards(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from pathlib import Path; from finetune.data.latent_cache import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "for number in range(10**9):\n"
        "    store.put(str(number), {'x': torch.full((40_000,), float(number))}); print(number, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(latent_cache.__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    ) as writer:
        assert writer.stdout is not None
        for _ in range(3 * latent_cache.SHARD_ENTRIES):
            writer.stdout.readline()
        time.sleep(0.02)
        writer.send_signal(signal.SIGKILL)
    store = Store(tmp_path)
    for number in range(2 * latent_cache.SHARD_ENTRIES):
        assert str(number) in store
        assert torch.equal(store.get(str(number))["x"], torch.full((40_000,), float(number)))
    assert not list(tmp_path.glob("*.damaged"))


def test_store_flush_with_a_full_disk_reports_it_and_keeps_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path, range(3))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    store.put("more", tensors(9))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device") as caught:
            store.flush()
    assert "data.cache" in caught.value.remedy
    assert "FT_CACHE" in caught.value.remedy
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    store.flush()  # space is available again
    assert same(Store(tmp_path).get("more"), tensors(9))


def test_store_in_an_impossible_folder_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="Not a directory") as caught:
        Store(tmp_path / "file" / "cache")
    assert caught.value.where == str(tmp_path / "file" / "cache")


def test_cache_folder_prefers_the_argument_then_ft_cache_then_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("FT_CACHE", "~/here")
    assert cache_folder("/given") == Path("/given")
    assert cache_folder(None) == Path("/home/someone/here")
    monkeypatch.delenv("FT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(None) == Path("/home/someone/.cache/finetune")


def test_fingerprint_changes_with_names_shapes_dtypes_and_values() -> None:
    weights = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    others: list[dict[str, Tensor]] = [
        {**weights, "a": torch.ones(3, 2)},
        {**weights, "a": torch.ones(2, 3).half()},
        {**weights, "a": torch.ones(2, 3) + 1e-7},
        {"a": weights["a"], "c": weights["b"]},
    ]
    assert fingerprint(weights) == fingerprint({"b": torch.zeros(4), "a": torch.ones(3, 2).T})
    assert len({fingerprint(weights), *map(fingerprint, others)}) == 5

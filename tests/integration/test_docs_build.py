"""The documentation as a site."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.commands import CHECKOUT, python


def test_mkdocs_build_strict_succeeds(tmp_path: Path) -> None:
    built = python("-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site", cwd=CHECKOUT)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "reference" / "cli" / "index.html").is_file()

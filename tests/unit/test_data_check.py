"""`ft data check`: as text, as JSON, and as a page that a real browser displays without errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from finetune.cli.main import ft
from finetune.errors import UserError
from tests.helpers import corpus, tiny
from tests.unit.test_data import snapshot

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
# Facts about the page once its images are loaded, left where --dump-dom shows them.
PROBE = """<script>
window.ran = [];
window.alert = what => window.ran.push(what);
addEventListener('error', event => window.ran.push(String(event.message)));
addEventListener('load', () => {
  const images = [...document.images];
  document.body.dataset.seen = JSON.stringify({
    images: images.length,
    broken: images.filter(image => !image.naturalWidth).length,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    height: document.body.scrollHeight,
    fetched: performance.getEntriesByType('resource').filter(entry => !entry.name.startsWith('data:')).map(entry => entry.name),
    ran: window.ran,
  });
});
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.make(tmp_path_factory.mktemp("check"))


def check(*arguments: object) -> Result:
    return CliRunner().invoke(ft, ["data", "check", *map(str, arguments)])


SETTINGS = ("--set", "data.resolution=64", "--set", "data.bucket_step=16")


def test_data_check_page_displays_without_errors_in_a_browser(folder: Path, tmp_path: Path) -> None:
    before = snapshot(folder)
    result = check(folder, *SETTINGS, "--html", tmp_path / "page.html")
    assert isinstance(result.exception, UserError)  # after the table and the page, what would stop a run
    assert "unreadable images" in result.exception.problem
    assert snapshot(folder) == before
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page  # a file's name
    assert set(re.findall(r'(?:src|href)="([^"]{5})', page)) == {"data:"}
    assert all(
        name in page for name in ("&lt;img src=x onerror=alert(1)&gt;.png", "rotated by EXIF", "exact duplicate")
    )
    if BROWSER is None:
        pytest.skip("no browser to display the page: install Chromium")
    seen = displayed(page, tmp_path)
    assert seen["images"] > 20
    assert {key: seen[key] for key in ("broken", "wide", "fetched", "ran")} == {
        "broken": 0,
        "wide": 0,
        "fetched": [],
        "ran": [],
    }
    assert seen["height"] > 1000


def displayed(page: str, folder: Path) -> dict[str, Any]:
    """Facts about the page in a headless browser."""
    page = page.replace("<head>", f"<head>{PROBE}").replace(
        'loading="lazy"', 'loading="eager"'
    )  # those far below might never be loaded
    (folder / "probed.html").write_text(page, encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
    ]
    place = [f"--user-data-dir={folder / 'profile'}", "--window-size=800,900", "--dump-dom"]
    done = subprocess.run(
        [str(BROWSER), *flags, *place, f"file://{folder / 'probed.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"data-seen=\"([^\"]*)\"", done.stdout)
    assert found is not None, done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(found[1].replace("&quot;", '"'))
    return seen


def test_data_check_json_holds_everything_in_the_table(folder: Path) -> None:
    result = check(folder, *SETTINGS, "--json")
    found = json.loads(result.output)
    assert found["training"] == len(corpus.TRAINS)
    assert {each["kind"] for each in found["findings"]} >= {
        "animated",
        "CMYK",
        "transparent",
        "exact duplicate",
        "near duplicate",
        "tiny",
    }
    assert {each["kind"] for each in found["problems"]} == {
        "unreadable image",
        "missing caption",
        "unreadable caption",
        "missing image",
        "unused caption",
    }
    assert all(set(each) == {"name", "caption"} for each in found["images"])


def test_data_check_with_a_recipe_shows_captions_as_tokens() -> None:
    result = check(tiny.images(), "--recipe", "lora/emoji")
    assert result.exception is None
    assert "green · triangle" in result.output
    assert "0 longer than the 24 tokens" in result.output
    without = check(tiny.images())
    assert any(f'"{caption}"' in without.output for caption in tiny.CAPTIONS)
    assert "--recipe RECIPE" in without.output


def test_data_check_without_data_or_with_an_invalid_page_is_refused(tmp_path: Path) -> None:
    assert "no data given" in str(check().exception)
    assert "which is never written to" in str(check(tiny.images(), "--html", tiny.images() / "page.html").exception)
    assert "cannot be written" in str(check(tiny.images(), "--html", tmp_path / "no" / "page.html").exception)

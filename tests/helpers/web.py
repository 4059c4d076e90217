"""`ft ui` without a browser: a server's application and a client that has its token."""

from __future__ import annotations

import json
from pathlib import Path

from starlette.testclient import TestClient

from finetune.ui.app import application
from finetune.ui.queue import Queue
from finetune.ui.security import Folders
from finetune.ui.site import Site

TOKEN = "a-token-that-is-long-enough"
ORIGIN = "http://127.0.0.1:8765"


def site(folder: Path, *allowed: Path) -> Site:
    """A server's state with its runs in `folder`/runs."""
    runs = folder / "runs"
    runs.mkdir(exist_ok=True)
    return Site(Folders([runs, *allowed]), Queue(runs))


def client(state: Site, token: str = TOKEN, **headers: str) -> TestClient:
    """A client that sends the token and the page's own Origin, as a browser does."""
    given = {"authorization": f"Bearer {token}", "origin": ORIGIN} | headers
    return TestClient(application(state, TOKEN), base_url=ORIGIN, headers=given, follow_redirects=False)


def write_metrics(run: Path, steps: int) -> None:
    """A loss that falls, with a validation every tenth step."""
    records = [
        {"step": step, "lr": 1e-3, "loss.denoiser": 1 / step, "gradient.denoiser": 0.5, "seconds": 0.25}
        | ({"validation": 0.5} if step % 10 == 0 else {})
        for step in range(1, steps + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

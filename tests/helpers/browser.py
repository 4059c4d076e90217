"""Chromium, driven over its DevTools protocol through pipes: no other package is needed.

    with Browser() as browser:
        browser.open("http://127.0.0.1:8765/")
        browser.wait("document.querySelector('h1')")
        browser.screenshot(path, width=400)

Protocol: https://chromedevtools.github.io/devtools-protocol/. `--remote-debugging-pipe` reads commands from descriptor 3
and writes answers to 4, as JSON that ends in a zero byte.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--hide-scrollbars", "--remote-debugging-pipe"),
)
# Put two descriptors at 3 and 4, and become the program. They are moved out of the way first: they may be 3 or 4 already.
PLACED = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 20) for number in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def chromium() -> str | None:
    """The path of Chromium; None if it is not installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page in a browser of its own.

    Args:
        timeout: seconds that any wait may take.
    """

    def __init__(self, timeout: float = 60.0) -> None:
        self._timeout = timeout

    def __enter__(self) -> Browser:
        program = chromium()
        assert program is not None
        self._profile = tempfile.mkdtemp(prefix="ft-chromium-")
        read_commands, self._out = os.pipe()
        self._in, write_answers = os.pipe()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-ISc", PLACED, str(read_commands), str(write_answers)),
                *(program, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"),
            ],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read_commands)
        os.close(write_answers)
        self._buffer, self._number, self._session = b"", 0, ""
        targets = self._send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self._send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self._send("Page.enable")
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, address: str) -> None:
        """Go to an address, and wait until it is loaded."""
        self._send("Page.navigate", url=address)
        self.wait("document.readyState == 'complete'")

    def do(self, script: str) -> Any:
        """Evaluate JavaScript in the page; promises are awaited. Returns the value."""
        answer = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float | None = None) -> None:
        """Wait until an expression is true, also across navigation."""
        end = time.monotonic() + (seconds or self._timeout)
        while True:
            with contextlib.suppress(RuntimeError, AssertionError):  # the page is being replaced
                if self.do(f"!!({condition})"):
                    return
            if time.monotonic() > end:
                text = self.do("document.body && document.body.innerText")
                raise AssertionError(f"still not true: {condition}\n{self.do('location.href')}\n{text}")
            time.sleep(0.1)

    def submit(self, form: str, **values: str) -> None:
        """Fill a form's fields and submit it with its button."""
        self.wait(f"document.querySelector({json.dumps(form)})")
        for name, value in values.items():
            field = f"document.querySelector({json.dumps(f'{form} [name={name}]')})"
            self.do(
                f"{field}.value = {json.dumps(value)}; {field}.dispatchEvent(new Event('change', {{bubbles: true}}))"
            )
        self.do(f"document.querySelector({json.dumps(form + ' button')}).click()")

    def screenshot(self, path: Path, width: int, height: int | None = None) -> None:
        """Write a PNG of the page at a width; the whole page without `height`."""
        self._send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height or 900, deviceScaleFactor=1, mobile=False
        )
        time.sleep(0.5)
        whole = height or min(6000, int(self.do("document.documentElement.scrollHeight")))
        clip = {"x": 0, "y": 0, "width": width, "height": whole, "scale": 1}
        shot = self._send("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=height is None)
        path.write_bytes(base64.b64decode(shot["data"]))

    def width(self, width: int) -> int:
        """Give the page a width; returns how wide its content is."""
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        time.sleep(0.3)
        return int(self.do("document.documentElement.scrollWidth"))

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + self._timeout
        while True:
            while b"\0" not in self._buffer:
                if not select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]:
                    raise AssertionError(f"Chromium does not answer {method}")
                content = os.read(self._in, 1 << 20)
                if not content:
                    raise AssertionError("Chromium has ended")
                self._buffer += content
            text, self._buffer = self._buffer.split(b"\0", 1)
            answer = json.loads(text)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

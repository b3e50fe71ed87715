"""A real browser for the tests: Chromium, driven through its DevTools pipe, no package needed.

    python tests/browser.py PAGE.html PICTURE.png [WIDTH]    take a picture, as README shows them
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ["--headless", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--remote-debugging-pipe", "about:blank"]
ANSWER_SECONDS = 30


def find() -> str | None:
    """Return the path of Chromium: $CHROMIUM, else the first that is installed, else None."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. `events` are all DevTools events since the last `open`."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="perfdb-browser-")
        theirs, self.to = os.pipe()
        self.back, mine = os.pipe()
        flags = FLAGS + ["--no-sandbox"] * (os.getuid() == 0)  # which root may not have
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{mine}', "bash", find(),
             f"--user-data-dir={self.directory}", *flags],
            pass_fds=(theirs, mine), stderr=subprocess.DEVNULL, start_new_session=True)
        os.close(theirs)
        os.close(mine)
        self.number, self.buffer, self.session, self.events = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)
        shutil.rmtree(self.directory, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda found: found.get("id") == self.number)
        assert "error" not in answer, answer
        return answer["result"]

    def _until(self, is_it: Any) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            while b"\0" in self.buffer:
                line, _, self.buffer = self.buffer.partition(b"\0")
                found = json.loads(line)
                if "method" in found:
                    self.events.append(found)
                if is_it(found):
                    return found
            left = deadline - time.monotonic()
            assert select.select([self.back], [], [], max(left, 0))[0], "no answer"
            self.buffer += os.read(self.back, 1 << 20)

    def open(self, page: Path, width: int, *, dark: bool = False) -> None:
        """Show a file in a window so wide, and wait until it has loaded."""
        self.events = []
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=page.as_uri())
        self._until(lambda found: found.get("method") == "Page.loadEventFired")

    def js(self, expression: str) -> Any:
        """Return what a JavaScript expression is worth in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def complaints(self) -> list[Any]:
        """Return errors and warnings of the console, exceptions and dialogs since `open`."""
        return [event for event in self.events if event["method"] in (
            "Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown",
            "Page.javascriptDialogOpening")]

    def requests(self) -> set[str]:
        return {event["params"]["request"]["url"] for event in self.events
                if event["method"] == "Network.requestWillBeSent"}

    def picture(self) -> bytes:
        """Return the whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "scale": 1, "width": size["width"], "height": size["height"]}
        return base64.b64decode(self.call("Page.captureScreenshot", clip=clip,
                                          captureBeyondViewport=True)["data"])


def main(page: str, target: str, width: str = "900") -> None:
    browser = Browser()
    try:
        browser.open(Path(page).resolve(), int(width))
        Path(target).write_bytes(browser.picture())
    finally:
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A real browser for the tests of pages: headless Chromium, spoken to over a pipe."""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --hide-scrollbars --remote-debugging-pipe"
).split()


class Browser:
    """One tab. `open` a page, `run` JavaScript in it (its policy does not bind this), `press` keys."""

    def __init__(self, folder: Path, timeout_s: float = 30):
        self.folder = folder  # downloads come here
        to_child, out = os.pipe()
        self.out = os.fdopen(out, "wb")
        self.into, from_child = os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_child, from_child)]  # clear of 3 and 4
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=lambda: [os.dup2(end, fd) for end, fd in zip(ends, (3, 4), strict=True)],
        )
        for fd in (to_child, from_child, *ends):
            os.close(fd)
        self.timeout_s, self.numbers, self.rest, self.events = timeout_s, itertools.count(1), b"", []
        self.session = None
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "DOM"):
            self.call(f"{domain}.enable")
        downloads = {"behavior": "allow", "downloadPath": str(folder), "eventsEnabled": True}
        self.call("Browser.setDownloadBehavior", **downloads)

    def call(self, method: str, **params) -> dict:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.out.write(json.dumps(message).encode() + b"\0")
        self.out.flush()
        while (answer := self.receive()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def receive(self) -> dict:
        until = time.monotonic() + self.timeout_s
        while b"\0" not in self.rest:
            ready = select.select([self.into], [], [], max(0, until - time.monotonic()))[0]
            assert ready, f"Chromium is silent for {self.timeout_s} s"
            self.rest += os.read(self.into, 1 << 16)
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def wait(self, event: str) -> dict:
        """The next event of a name, among those not yet taken."""
        while not (found := [m for m in self.events if m.get("method") == event]):
            self.events.append(self.receive())
        self.events.remove(found[0])
        return found[0]["params"]

    def open(self, url: str):
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait("Page.loadEventFired")

    def run(self, script: str):
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, *keys: str):
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def give_file(self, css: str, path: Path):
        """Choose a file in an <input type=file>."""
        node = self.call("Runtime.evaluate", expression=f"document.querySelector({css!r})")["result"]
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=node["objectId"])

    def screenshot(self, path: Path, width: int, height: int, dark: bool = False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)  # fmt: skip
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=self.timeout_s)
        self.out.close()
        os.close(self.into)

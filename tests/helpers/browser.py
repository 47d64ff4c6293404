"""A real Chromium without a window, driven through its own debugging pipe: clicks, drags, keys, touches, pictures."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-sync",
    "--mute-audio",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)
SECONDS = 30.0  # that a browser on a busy machine may take to answer
MODIFIERS = {"Alt": 1, "Ctrl": 2, "Meta": 4, "Shift": 8}
CODES = {
    "Enter": 13,
    "Tab": 9,
    "Escape": 27,
    "Delete": 46,
    "Backspace": 8,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "PageUp": 33,
    "PageDown": 34,
    " ": 32,
}


def find_chromium() -> str | None:
    """The browser's path, or None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, send: Any, target: str, session: str) -> None:
        self._send, self.target, self._session = send, target, session
        self.errors: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol."""
        return self._send(method, params, self._session)

    def goto(self, url: str) -> None:
        """Open an address and wait until the page says that it is ready."""
        self.call("Page.navigate", url=url)
        self.wait("document.body && document.body.dataset.ready === 'true'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = SECONDS) -> None:
        """Until a JavaScript expression holds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.evaluate(f"Boolean({expression})"):
                return
            time.sleep(0.01)
        raise AssertionError(f"never true within {seconds} s: {expression}; errors of the page: {self.errors}")

    def size(self, width: int, height: int, *, touch: bool = False, scale: float = 1) -> None:
        """The window's size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)

    def mouse(
        self, kind: str, x: float, y: float, *, button: str = "left", modifiers: int = 0, pointer: str = "mouse"
    ) -> None:
        """mousePressed, mouseMoved or mouseReleased, of a mouse or a pen."""
        pressed = {"left": 1, "right": 2, "middle": 4, "none": 0}[button]
        self.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x,
            y=y,
            button=button,
            clickCount=1,
            modifiers=modifiers,
            buttons=0 if kind == "mouseReleased" else pressed,
            pointerType=pointer,
        )

    def drag(
        self, start: Sequence[float], end: Sequence[float], *, steps: int = 4, button: str = "left", modifiers: int = 0
    ) -> None:
        """Press, move in steps, release."""
        self.mouse("mouseMoved", *start, button="none", modifiers=modifiers)
        self.mouse("mousePressed", *start, button=button, modifiers=modifiers)
        for k in range(1, steps + 1):
            self.mouse(
                "mouseMoved",
                start[0] + (end[0] - start[0]) * k / steps,
                start[1] + (end[1] - start[1]) * k / steps,
                button=button,
                modifiers=modifiers,
            )
        self.mouse("mouseReleased", *end, button=button, modifiers=modifiers)

    def click(self, x: float, y: float) -> None:
        """Press and release in one place."""
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def touch(self, kind: str, *points: Sequence[float]) -> None:
        """touchStart, touchMove or touchEnd with the fingers that are down."""
        self.call(
            "Input.dispatchTouchEvent",
            type=kind,
            touchPoints=[{"x": x, "y": y, "id": k} for k, (x, y) in enumerate(points)],
        )

    def key(self, name: str, *, repeat: int = 1) -> None:
        """A key with its modifiers: `a`, `Enter`, `Ctrl+z`, `Shift+ArrowLeft`."""
        *held, key = name.split("+") if name != "+" else ["+"]
        modifiers = sum(MODIFIERS[each] for each in held)
        letter = key.upper() if "Shift" in held and len(key) == 1 else key
        code = CODES.get(key, ord(key.upper()) if len(key) == 1 else 0)
        text = {"text": letter} if len(key) == 1 and not modifiers & 3 else {"text": "\r"} if key == "Enter" else {}
        common = {
            "key": letter,
            "windowsVirtualKeyCode": code,
            "modifiers": modifiers,
            "code": "Space" if key == " " else f"Key{key.upper()}" if key.isalpha() and len(key) == 1 else key,
        }
        for _ in range(repeat):
            self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **common, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, path: Path) -> None:
        """The page as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


class Browser:
    """A running Chromium.

    Args:
        binary: from `find_chromium`. folder: for its profile.
    """

    def __init__(self, binary: str, folder: Path) -> None:
        self._next, self._answers, self._pages = 0, {}, {}
        self._lock = threading.Lock()
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        flags = [*FLAGS, f"--user-data-dir={folder}", *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank"]
        # The browser reads commands from descriptor 3 and writes answers to 4.
        program = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$0" "$@"'
        with (folder / "chromium.log").open("wb") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", program, binary, *flags], stdout=log, stderr=log, pass_fds=(theirs_in, theirs_out)
            )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = os.fdopen(ours_out, "wb", buffering=0), os.fdopen(ours_in, "rb", buffering=0)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        rest = b""
        while chunk := self._in.read(1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            for message in messages:
                values = json.loads(message)
                if "id" in values:
                    self._answers.pop(values["id"]).put(values)
                elif values.get("method") == "Runtime.exceptionThrown" and values.get("sessionId") in self._pages:
                    details = values["params"]["exceptionDetails"]
                    said = details.get("exception", {}).get("description") or details["text"]
                    self._pages[values["sessionId"]].errors.append(said)

    def send(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        """One command, and its answer."""
        answer: Queue[dict[str, Any]] = Queue()
        with self._lock:
            self._next += 1
            number = self._next
            self._answers[number] = answer
            message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
            self._out.write(json.dumps(message).encode() + b"\0")
        try:
            found = answer.get(timeout=SECONDS)
        except Empty:
            raise AssertionError(f"the browser gave no answer to {method} within {SECONDS} s") from None
        if "error" in found:
            raise AssertionError(f"{method}: {found['error']}")
        return found["result"]

    def new_page(self, width: int = 1440, height: int = 900) -> Page:
        """A new page, in a window of its own: those behind others are not painted."""
        target = self.send("Target.createTarget", {"url": "about:blank", "newWindow": True})["targetId"]
        session = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = Page(self.send, target, session)
        self._pages[session] = page
        for domain in ("Page", "Runtime"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        page.size(width, height)
        return page

    def close(self) -> None:
        """End the browser."""
        try:
            self.send("Browser.close", {})
            self.process.wait(10)
        except (AssertionError, subprocess.TimeoutExpired, OSError):
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        self._out.close()
        self._in.close()


@contextmanager
def open_browser(binary: str, folder: Path) -> Iterator[Browser]:
    """A browser that ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    browser = Browser(binary, folder)
    try:
        yield browser
    finally:
        browser.close()

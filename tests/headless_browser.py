"""Chromium without a screen, driven over its debugging pipe: what a page does, and that it asks for nothing."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest


class Browser:
    """One page of a Chromium that may reach nothing: its proxy is a port of this machine that counts who comes."""

    def __init__(self, folder: Path) -> None:
        """folder: for its profile. Skips the test where there is no Chromium."""
        program = shutil.which("chromium")
        if program is None:
            pytest.skip("chromium is not installed")
        self._proxy = socket.create_server(("127.0.0.1", 0))
        self.connections: list[bytes] = []
        """What reached the proxy: the first bytes of each connection."""
        threading.Thread(target=self._count, daemon=True).start()
        to_read, to_write = os.pipe()
        from_read, from_write = os.pipe()
        switches = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-default-apps", "--disable-extensions", "--disable-domain-reliability",
            "--mute-audio", "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}",
            f"--proxy-server=127.0.0.1:{self._proxy.getsockname()[1]}", "--proxy-bypass-list=<-loopback>",
            "about:blank",
        ]  # fmt: skip
        # The pipe is expected at 3 (its input) and 4 (its output); dup puts both out of the way first.
        launch = (
            "import os, sys; read, write = (os.dup(os.dup(int(n))) for n in sys.argv[1:3]); "
            "os.dup2(read, 3); os.dup2(write, 4); os.execv(sys.argv[3], sys.argv[3:])"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", launch, str(to_read), str(from_write), program, *switches],
            pass_fds=(to_read, from_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        self._to, self._from = os.fdopen(to_write, "wb", 0), os.fdopen(from_read, "rb", 0)
        self._buffer = b""
        self._numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        """All that it told of itself."""
        self._session: str | None = None
        page = next(
            target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page"
        )
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._session = None
            self.call("Browser.close")
        except (OSError, RuntimeError):
            pass
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for file in (self._to, self._from):
            file.close()
        self._proxy.close()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Result of a command of the DevTools protocol; RuntimeError where it fails."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def open(
        self, path: Path, *, size: tuple[int, int] = (1280, 900), scheme: str = "light", scripts: bool = True
    ) -> None:
        """Shows a file in a window of that size, in a color scheme, with or without scripts; forgets the pages
        before."""
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression, awaited, as if the user had clicked."""
        result = self.call(
            "Runtime.evaluate",
            expression=expression,
            userGesture=True,
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 30.0) -> None:
        """Returns when an expression is true; AssertionError when it takes longer."""
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"{expression} is not true after {seconds:g} s"
            time.sleep(0.05)

    def press(self, key: str, code: str, number: int, text: str = "") -> None:
        """Presses and releases a key."""
        names = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **names)
        self.call("Input.dispatchKeyEvent", type="keyUp", **names)

    def screenshot(self, path: Path) -> None:
        """Writes a PNG of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(b64decode(shot["data"]))

    def requested(self) -> list[str]:
        """Addresses that the page asked for so far."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """Errors in the console of the page, broken rules of its policy among them."""
        logged = [
            event["params"]["entry"]["text"]
            for event in self.events
            if event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error"
        ]
        thrown = [
            str(event["params"]["exceptionDetails"])
            for event in self.events
            if event.get("method") == "Runtime.exceptionThrown"
        ]
        return logged + thrown

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = self._from.read(1 << 16)
            if not part:
                raise RuntimeError("the browser ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _count(self) -> None:
        while True:
            try:
                connection, _ = self._proxy.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(2)
                try:
                    self.connections.append(connection.recv(200))
                except OSError:
                    self.connections.append(b"")

"""An HTTP server on loopback that serves a folder and fails on demand."""

import re
import socket
import struct
import threading
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit


class FaultyServer:
    """Serves the files of a folder. As a context manager it runs inside the block.

    A file's faults are used up by one GET each, in order; `always` stays. Faults:
    `503`, `403`, `404`: that status. `reset`: half of the body, then the connection is reset. `cut`: half of the body,
    then the connection ends. `cut-unsaid`: the same without a Content-Length, so that the client cannot know. `stall`:
    half of the body, then nothing until the server ends. `endless`: no length, and the body again and again. `wrong`:
    one byte is another.
    """

    def __init__(self, folder: Path, *, port: int = 0, ranges: bool = True, says_length: bool = True) -> None:
        self.folder = folder
        self.ranges, self.says_length = ranges, says_length
        self.longest: int | None = None
        """Bytes after which any body is cut."""
        self.requests: list[tuple[str, str, str | None]] = []
        """(method, name, Range header)."""
        self.authorizations: list[str | None] = []
        self.faults: dict[str, deque[str]] = {}
        self.always: dict[str, str] = {}
        self.ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"fake": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def fail(self, name: str, *faults: str) -> None:
        self.faults.setdefault(name, deque()).extend(faults)

    def num_gets(self) -> Counter[str]:
        """By name."""
        return Counter(name for method, name, _ in list(self.requests) if method == "GET")

    def __enter__(self) -> "FaultyServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FaultyServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        fake, name = self.fake, unquote(urlsplit(self.path).path.lstrip("/"))
        wanted = self.headers.get("Range")
        fake.requests.append((self.command, name, wanted))
        fake.authorizations.append(self.headers.get("Authorization"))
        waiting = fake.faults.get(name)
        fault = fake.always.get(name, "") or (waiting.popleft() if waiting and body else "")
        path = fake.folder / name
        if path.is_dir():
            links = "".join(f'<a href="{quote(entry.name)}">x</a>' for entry in sorted(path.iterdir()))
            self._send(200, links.encode(), body, {"Content-Type": "text/html"})
            return
        if fault in ("503", "403", "404") or not path.is_file():
            self._send(int(fault or 404), b"no", body, {})
            return
        data, status, headers = path.read_bytes(), 200, {}
        if fault == "wrong":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fake.ranges and wanted:
            start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        self._send(status, data, body, headers, fault)

    def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str], fault: str = "") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.fake.says_length and fault not in ("cut-unsaid", "endless"):
            self.send_header("Content-Length", str(len(data)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if not body:
            return
        if self.fake.longest is not None and len(data) > self.fake.longest:
            self.wfile.write(data[: self.fake.longest])
            self.close_connection = True
            return
        while fault == "endless" and not self.fake.ended.is_set():
            self.wfile.write(data)
        if fault not in ("reset", "cut", "cut-unsaid", "stall"):
            self.wfile.write(data)
            return
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        if fault == "stall":
            self.fake.ended.wait()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True

    def finish(self) -> None:
        try:
            super().finish()
        except OSError:
            pass  # reset on purpose

    def log_message(self, *unused: object) -> None:
        pass

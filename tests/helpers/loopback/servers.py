"""Real web servers on the loopback interface: a folder by ranges, or as a server does that has a fault.

    with serving(folder, fails=lambda n: n % 3 == 0) as server: fmoe.load(server.url)

A hub answers as huggingface.co does: an API, commits, and redirects to another host for large files; with xet, it says
that they lie there in chunks.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import unquote, urlsplit


@dataclass
class Served:
    """What a server is like, and what it was asked. requests: (method, path, first byte, end) of every one.

    rate: bytes that it sends in a second, over all connections. latency: seconds before every answer.
    """

    root: Path
    url: str = ""
    ranges: bool = True
    tags: bool = True
    fails: Callable[[int], bool] = lambda n: False
    status: int = 503
    truncates: Callable[[int], bool] = lambda n: False
    rate: float = 0.0
    latency: float = 0.0
    hub: str = ""
    cdn: str = ""
    token: str = ""
    xet: bool = False
    requests: list[tuple[str, str, int, int]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    sent: int = 0
    data: int = 0
    free: float = 0.0
    lock: Lock = field(default_factory=Lock)

    def wait(self, size: int) -> None:
        """Until so many bytes more may go out."""
        if self.rate:
            with self.lock:
                self.free = max(self.free, time.monotonic()) + size / self.rate
                until = self.free
            time.sleep(max(0.0, until - time.monotonic()))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    served: Served

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        it, path = self.served, unquote(urlsplit(self.path).path)
        with it.lock:
            number = len(it.requests) + 1
            first, end = self._range()
            it.requests.append((self.command, path, first, end))
            it.headers.append(dict(self.headers))
        time.sleep(it.latency)
        if it.fails(number):
            return self._plain(it.status, b"")
        if it.hub and it.token and self.headers.get("Authorization") != f"Bearer {it.token}":
            return self._plain(401, b"")
        if it.hub and path.startswith("/api/models/"):
            return self._api(path, body)
        if it.hub:
            file = path.split("/resolve/")[1].partition("/")[2] if "/resolve/" in path else ""
            return self._file(it.root / file, body, number, redirect=True)
        self._file(it.root / path.lstrip("/"), body, number)

    def _range(self) -> tuple[int, int]:
        text = self.headers.get("Range", "")
        first, _, last = text.removeprefix("bytes=").partition("-")
        return (int(first), int(last) + 1) if first and last else (0, -1)

    def _api(self, path: str, body: bool) -> None:
        it = self.served
        files = sorted(str(p.relative_to(it.root)) for p in it.root.rglob("*") if p.is_file())
        found = [{"rfilename": n, "size": (it.root / n).stat().st_size, "blobId": _tag(it.root / n)} for n in files]
        told = {"id": it.hub, "modelId": it.hub, "sha": "c" * 40, "siblings": found, "tags": [], "private": False}
        self._plain(200, json.dumps(told).encode() if body else b"", "application/json")

    def _file(self, path: Path, body: bool, number: int, redirect: bool = False) -> None:
        it = self.served
        if not path.is_file():
            return self._plain(404, b"")
        size, (first, end) = path.stat().st_size, self._range()
        ranged = it.ranges and end >= 0
        if redirect and it.cdn and path.suffix == ".safetensors":
            self.send_response(302)
            self.send_header("Location", f"{it.cdn}/{path.relative_to(it.root)}?signature=secret")
            self.send_header("X-Linked-Size", str(size))
            self.send_header("X-Linked-ETag", f'"{_tag(path)}"')
            self.send_header("X-Repo-Commit", "c" * 40)
            if it.xet:
                self.send_header("X-Xet-Hash", "ab" * 32)
                self.send_header("X-Xet-Refresh-Route", f"{it.url}/api/models/{it.hub}/xet-read-token/main")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first, end = (first, min(end, size)) if ranged else (0, size)
        if ranged and first >= size:
            return self._plain(416, b"")
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(end - first))
        if ranged:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
        if it.tags:
            self.send_header("ETag", f'"{_tag(path)}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        if body:
            self._send(path, first, end, cut=it.truncates(number))

    def _send(self, path: Path, first: int, end: int, cut: bool) -> None:
        it = self.served
        with open(path, "rb") as file:
            file.seek(first)
            left = (end - first) // 2 if cut else end - first
            while left:
                block = file.read(min(left, 2**18))
                it.wait(len(block))
                with it.lock:  # counted before it is sent: who has it finds it counted
                    it.sent += len(block)
                    it.data += len(block) if path.suffix == ".safetensors" else 0
                try:
                    self.wfile.write(block)
                except OSError:
                    return
                left -= len(block)
        if cut:
            self.close_connection = True
            self.connection.close()

    def _plain(self, status: int, data: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args: object) -> None:
        pass


def _tag(path: Path) -> str:
    found = path.stat()
    return hashlib.sha256(f"{found.st_ino} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()


@contextmanager
def serving(root: Path, **how: object) -> Iterator[Served]:
    served = Served(root, **how)  # type: ignore[arg-type]
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": served}))
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()

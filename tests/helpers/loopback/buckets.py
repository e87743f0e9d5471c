"""A real S3 server on the loopback interface (moto's), in a process of its own kind: counted, and with faults.

with bucket(monkeypatch) as s3: fmoe.convert(folder, f"{s3.url}/model")
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "AKIAS3CRET", "AWS_SECRET_ACCESS_KEY": "s3cret", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class Bucket:
    """requests: (method, path) of every one. data: bytes of tensor files that were sent. fails: those that give 503."""

    url: str
    endpoint: str = ""
    fs: Any = None
    fails: Callable[[int], bool] = lambda n: False
    status: str = "503 Slow Down"
    requests: list[tuple[str, str]] = field(default_factory=list)
    data: int = 0
    lock: Lock = field(default_factory=Lock)

    def files(self, folder: str) -> dict[str, bytes]:
        root = f"{self.url}/{folder}".removeprefix("s3://")
        self.fs.invalidate_cache()
        return {str(p).removeprefix(f"{root}/"): self.fs.cat_file(p) for p in self.fs.find(root)}

    def put(self, source: Path, folder: str) -> str:
        for path in (p for p in source.rglob("*") if p.is_file()):
            self.fs.put_file(str(path), f"{self.url}/{folder}/{path.relative_to(source)}")
        return f"{self.url}/{folder}"

    def application(self, inner: Any) -> Any:
        def answer(environment: dict[str, Any], start: Any) -> Iterable[bytes]:
            with self.lock:
                self.requests.append((environment["REQUEST_METHOD"], environment["PATH_INFO"]))
                number = len(self.requests)
            if self.fails(number):
                environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
                start(self.status, [("Content-Length", "0")])
                return [b""]
            found = inner(environment, start)
            return self._counted(found, environment)

        return answer

    def _counted(self, blocks: Iterable[bytes], environment: dict[str, Any]) -> Iterator[bytes]:
        for block in blocks:
            if environment["REQUEST_METHOD"] == "GET" and environment["PATH_INFO"].endswith(".safetensors"):
                with self.lock:
                    self.data += len(block)
            yield block


@contextmanager
def bucket(name: str = "models") -> Iterator[Bucket]:
    """Served until the block ends; the environment says where it is, and who asks."""
    import s3fs
    from moto.s3.models import s3_backends
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    quiet = type("Quiet", (WSGIRequestHandler,), {"log": lambda *_: None, "protocol_version": "HTTP/1.1"})
    it = Bucket(f"s3://{name}")
    s3_backends.reset()  # what another served in this process
    application = it.application(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=quiet)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    it.endpoint = f"http://127.0.0.1:{server.server_port}"
    before = {n: os.environ.get(n) for n in (*KEYS, "AWS_ENDPOINT_URL")}
    os.environ.update(KEYS | {"AWS_ENDPOINT_URL": it.endpoint})
    s3fs.S3FileSystem.clear_instance_cache()
    it.fs = s3fs.S3FileSystem()
    try:
        it.fs.mkdir(name)
        yield it
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        for n, value in before.items():
            os.environ.pop(n) if value is None else os.environ.update({n: value})
        server.shutdown()
        server.server_close()
        thread.join()

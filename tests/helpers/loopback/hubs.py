"""A hub on the loopback interface that takes files as huggingface.co does: large ones as blobs, all in commits.

with hub("org/name", monkeypatch, folder) as it: fmoe.convert(source, "hf://org/name")
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

from servers import _Server


@dataclass
class Hub:
    """files: of the last commit. commits: (added, deleted) of each. blobs: large files, by sha256. fails: a status.

    chunks: the folder where hf_xet, the real one, puts large files: all that comes here of these are requests for
    tokens, and what `large` has. Without, huggingface_hub sends without xet.
    """

    repo: str
    token: str
    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*"})
    commits: list[tuple[set[str], set[str]]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    fails: Callable[[str], int] = lambda path: 0
    uploads: int = 0
    chunks: str = ""
    tokens: int = 0
    large: dict[str, tuple[str, int]] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        it = self.hub
        if it.chunks and "/xet-write-token/" in self.path:
            it.tokens += 1
            return self._told({"casUrl": f"local://{it.chunks}", "accessToken": "brief", "exp": 2**33})
        if "/resolve/" in self.path:
            return self._part(it.files[unquote(self.path).partition("/resolve/")[2].partition("/")[2]])
        sizes = {n: len(data) for n, data in it.files.items()} | {n: size for n, (_, size) in it.large.items()}
        files = [{"rfilename": n, "size": size, "blobId": "0" * 40} for n, size in sorted(sizes.items())]
        told = {"id": it.repo, "modelId": it.repo, "sha": "c" * 40, "siblings": files, "tags": [], "private": False}
        self._told(told)

    def _part(self, data: bytes) -> None:
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(len(data := data[int(first) : int(last) + 1])))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self) -> None:
        data, oid = self._body(), self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.blobs[oid] = data
        self.hub.uploads += 1
        self._told({})

    def do_POST(self) -> None:
        it, body, path = self.hub, self._body(), unquote(urlsplit(self.path).path)
        if "/preupload/" in path:
            large = lambda n: "lfs" if n.endswith(".safetensors") else "regular"
            files = json.loads(body)["files"]
            self._told(
                {"files": [{"path": f["path"], "uploadMode": large(f["path"]), "shouldIgnore": False} for f in files]}
            )
        elif path.endswith("/objects/batch"):
            self._told({"transfer": "basic", "objects": [self._object(o) for o in json.loads(body)["objects"]]})
        elif "/commit/" in path and not it.fails(path):
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._told({"errors": [], "warnings": []})

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        actions = {"actions": {"upload": {"href": f"{self.hub.url}/blobs/{asked['oid']}"}}}
        return {"oid": asked["oid"], "size": asked["size"]} | (actions if asked["oid"] not in self.hub.blobs else {})

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        it, added, gone = self.hub, set[str](), set[str]()
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                it.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and it.chunks:
                it.large[value["path"]] = value["oid"], value["size"]
            elif line["key"] == "lfsFile":
                it.files[value["path"]] = it.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del it.files[value["path"]]
                gone.add(value["path"])
            added |= {value["path"]} if line["key"] in ("file", "lfsFile") else set()
        it.commits.append((added, gone))
        told = {"commitUrl": f"{it.url}/{it.repo}/commit/{'d' * 40}", "commitOid": "d" * 40, "success": True}
        self._told(told)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _told(self, told: dict[str, Any]) -> None:
        path, status = urlsplit(self.path).path, 200
        authorised = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if not authorised and not path.startswith("/blobs/"):
            status = 401
        elif self.hub.repo not in path and not path.startswith(("/blobs/", "/api/validate-yaml")):
            status = 404
        status = self.hub.fails(path) or status
        data = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def hub(repo: str, monkeypatch: Any, cache: Path, chunks: str = "") -> Iterator[Hub]:
    """Served until the block ends; huggingface_hub asks there."""
    import huggingface_hub.constants as constants

    it = Hub(repo, "hf_s3cret", chunks=chunks)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": it}))
    it.url = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": not chunks,
        "ENDPOINT": it.url,
        "HF_HUB_CACHE": str(cache),
        "HUGGINGFACE_CO_URL_TEMPLATE": it.url + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", it.token)
    monkeypatch.setenv("no_proxy", "*")
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield it
    finally:
        server.shutdown()
        server.server_close()

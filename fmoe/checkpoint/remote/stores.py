"""Where files lie: a web server, or whatever fsspec has a driver for; each lists, tells and reads by ranges."""

import base64
import posixpath
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from fmoe.checkpoint.remote.trouble import Trouble, retried, shown
from fmoe.checkpoint.remote.web import TIME, Facts, Ranges, facts
from fmoe.types import AdapterError

AT_ONCE = 16  # requests, while headers are fetched
USUAL = ["config.json", "model.safetensors", "model.safetensors.index.json", "fmoe.json", "fmoe.journal"]
USUAL += ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"]
USUAL += ["merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "README.md", "LICENSE"]
USUAL += ["chat_template.json", "preprocessor_config.json", "processor_config.json", "vocab.txt", "tiktoken.model"]
USUAL += ["adapter_config.json"]
"""What is asked for by name where no folder can be listed."""


class Store(Protocol):
    """shown: its address, as messages may have it. listed: whether names() is all that there is."""

    shown: str
    listed: bool

    def names(self) -> list[str]: ...
    def facts(self, file: str) -> Facts | None: ...
    def read(self, file: str, view: memoryview, at: int) -> None: ...


class Web:
    """A folder of a web server; who asks is in the address, or nobody is named."""

    listed = False

    def __init__(self, url: str):
        self.shown, parts = shown(url), urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        self.url = urlunsplit(parts._replace(netloc=host, fragment=""))
        basic = base64.b64encode(unquote(user).encode()).decode()
        self.headers = {"Authorization": f"Basic {basic}"} if user else {}
        self.files: dict[str, Ranges] = {}

    def names(self) -> list[str]:
        return [n for n, found in all_facts(self, USUAL).items() if found is not None]

    def facts(self, file: str) -> Facts | None:
        try:
            return facts(self._at(file), self.headers)
        except Trouble as trouble:
            if "status 404" in str(trouble):
                return None
            raise

    def read(self, file: str, view: memoryview, at: int) -> None:
        if file not in self.files:
            found = facts(self._at(file), self.headers)
            self.files.setdefault(file, Ranges(found.size, found.tag))
        self.files[file].read(self._at(file), self.headers, view, at)

    def _at(self, file: str) -> str:
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=posixpath.join(parts.path.rstrip("/") + "/", quote(file))))


class Driven:
    """A folder of whatever fsspec has a driver for."""

    listed = True

    def __init__(self, url: str):
        import fsspec  # type: ignore[import-untyped]

        self.shown = shown(url)
        scheme = urlsplit(url).scheme
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except ImportError:
            raise AdapterError(
                f"{self.shown}: {scheme}:// needs its fsspec driver: pip install fsspec[{scheme}]"
            ) from None
        except ValueError:
            raise AdapterError(f"{self.shown}: fsspec knows no {scheme}://") from None
        self.root = str(self.root).rstrip("/")

    def names(self) -> list[str]:
        found = self.call(lambda: self.fs.find(self.root))
        return sorted(str(path)[len(self.root) :].lstrip("/") for path in found)

    def facts(self, file: str) -> Facts | None:
        def look() -> Any:
            self.fs.invalidate_cache()
            return self.fs.info(f"{self.root}/{file}")

        try:
            found = self.call(look)
        except Trouble as trouble:
            if "not found" in str(trouble):
                return None
            raise
        if found.get("type") == "directory":
            return None
        if tag := next((str(found[n]) for n in ("ETag", "etag", "md5Hash", "crc32c") if found.get(n)), ""):
            return Facts(int(found["size"]), tag)
        times = ("LastModified", "last_modified", "updated", "modified", "mtime", "created", "ino")
        told = [str(found[n]) for n in times if found.get(n)]
        return Facts(int(found["size"]), TIME + " ".join(told) if told else "")

    def read(self, file: str, view: memoryview, at: int) -> None:
        data = self.call(lambda: self.fs.cat_file(f"{self.root}/{file}", start=at, end=at + len(view)))
        view[: len(data)] = data[: len(view)]
        if len(data) < len(view):
            raise Trouble(f"the answer ended {len(view) - len(data):,} bytes early", again=True, done=len(data))

    def call(self, call: Any) -> Any:
        try:
            return call()
        except FileNotFoundError:
            raise Trouble("not found", again=False) from None
        except PermissionError:
            raise Trouble("forbidden: credentials?", again=False) from None
        except Exception as error:  # every driver has errors of its own
            code = getattr(error, "response", None)
            code = code.get("ResponseMetadata", {}).get("HTTPStatusCode", "") if isinstance(code, dict) else ""
            why = f"{type(error).__name__}{f', status {code}' if code else ''}"
            raise Trouble(why, again=code not in (401, 403, 404)) from None


def all_facts(store: Store, files: Iterable[str]) -> dict[str, Facts | None]:
    """Of each file, asked for in parallel."""
    files = list(files)
    ask = lambda f: retried(f"{store.shown}/{f}", lambda: store.facts(f))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(files, pool.map(ask, files), strict=True))


def local(path: str) -> Path | None:
    """The path of a file:// address."""
    parts = urlsplit(path)
    return Path(parts.path) if parts.scheme == "file" else None

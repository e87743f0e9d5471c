"""A file of a web server, by ranges: what it is, and bytes of it straight into memory."""

import http.client
import os
import tempfile
import threading
import urllib.error
import urllib.request
import weakref
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fmoe.checkpoint.remote.trouble import Trouble, status

SECONDS = 60.0
"""How long a server may be silent."""


class Facts(NamedTuple):
    """size: in bytes. tag: what changes when the file does; empty where the server says nothing of the kind.

    One that begins with `TIME` says when it was written, and so may be another file's too.
    """

    size: int
    tag: str


TIME = "written "


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Follows, and takes credentials to no other host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        made = super().redirect_request(req, fp, code, msg, headers, newurl)
        if made is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            made.headers = {n: v for n, v in made.headers.items() if n.lower() not in ("authorization", "cookie")}
        return made


_OPENER = urllib.request.build_opener(_Redirect)


def ask(url: str, headers: dict[str, str], method: str = "GET") -> http.client.HTTPResponse:
    """The answer, not read yet. Raises Trouble."""
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", **headers}, method=method)
    try:
        answer: http.client.HTTPResponse = _OPENER.open(request, timeout=SECONDS)
        return answer
    except urllib.error.HTTPError as error:
        error.close()
        raise status(error.code) from None
    except (OSError, http.client.HTTPException) as error:
        raise Trouble(f"no answer ({_why(error)})", again=True) from None


def facts(url: str, headers: dict[str, str]) -> Facts:
    """Of a file, without its bytes. Raises Trouble."""
    try:
        with ask(url, headers, "HEAD") as answer:
            if answer.headers["Content-Length"] is not None:
                return Facts(int(answer.headers["Content-Length"]), tag_of(answer))
    except Trouble as trouble:
        if "405" not in str(trouble) and "501" not in str(trouble):
            raise
    with ask(url, headers | {"Range": "bytes=0-0"}) as answer:
        whole = answer.headers["Content-Range"] or f"/{answer.headers['Content-Length'] or ''}"
        if not whole.rpartition("/")[2].isdecimal():
            raise Trouble("the server does not say how large it is", again=False)
        return Facts(int(whole.rpartition("/")[2]), tag_of(answer))


def tag_of(answer: http.client.HTTPResponse) -> str:
    if tag := answer.headers["ETag"]:
        return tag.removeprefix("W/").strip('"')
    return TIME + answer.headers["Last-Modified"] if answer.headers["Last-Modified"] else ""


class Ranges:
    """Reads one file of a web server by ranges; of a server that knows none, the whole file once, to a temporary one.

    tag: what every answer must bear, if it bears one. asked, received: requests, and bytes of their answers.
    """

    def __init__(self, size: int, tag: str = ""):
        self.size, self.tag, self.asked, self.received = size, tag, 0, 0
        self.direct: str | None = None  # where the last redirect led
        self._whole: int | None = None
        self._lock = threading.Lock()

    def read(self, url: str, headers: dict[str, str], view: memoryview, at: int) -> None:
        """view = the bytes from at on. Raises Trouble, which says how many had come."""
        if self._whole is not None:
            self._spooled(view, at)
            return
        where = self.direct or url
        ranged = {"Range": f"bytes={at}-{at + len(view) - 1}"}
        try:
            answer = ask(where, ({} if self.direct else headers) | ranged)
        except Trouble as trouble:
            if self.direct:  # it holds for a while only
                self.direct = None
                raise Trouble(str(trouble), again=True) from None
            raise
        self.asked += 1
        with answer:
            if answer.status == 200 and at:
                self._spool(answer)
            else:
                self._check(answer)
                if answer.status == 206 and not (answer.headers["Content-Range"] or f"bytes {at}-").startswith(
                    f"bytes {at}-"
                ):
                    raise Trouble("the answer is of another range", again=True)
                self._take(answer, view)
                if urlsplit(answer.url).netloc != urlsplit(url).netloc:
                    self.direct = answer.url
                return
        self._spooled(view, at)

    def _check(self, answer: http.client.HTTPResponse) -> None:
        total = (answer.headers["Content-Range"] or "").rpartition("/")[2]
        tag = tag_of(answer)
        if total.isdecimal() and int(total) != self.size or self.tag and tag and tag != self.tag:
            raise Trouble(
                "has changed since it was opened: nothing else may write to it; run again", again=False, bad=True
            )
        self.tag = self.tag or tag

    def _take(self, answer: http.client.HTTPResponse, view: memoryview) -> None:
        done = 0
        try:
            while done < len(view):
                got = answer.readinto(view[done:])
                if not got:
                    raise Trouble(f"the answer ended {len(view) - done:,} bytes early", again=True, done=done)
                done += got
                self.received += got
        except (OSError, http.client.HTTPException) as error:
            raise Trouble(f"the answer broke off ({_why(error)})", again=True, done=done) from None

    def _spool(self, answer: http.client.HTTPResponse) -> None:
        """The whole file, beside memory. Others wait for it."""
        with self._lock:
            if self._whole is not None:
                return
            self._check(answer)
            file, name = tempfile.mkstemp(prefix="fmoe-")
            os.unlink(name)
            weakref.finalize(self, os.close, file)
            done = 0
            try:
                while block := answer.read(2**20):
                    done += os.pwrite(file, block, done)
                    self.received += len(block)
            except (OSError, http.client.HTTPException) as error:
                raise Trouble(f"the answer broke off ({_why(error)})", again=True) from None
            if done != self.size:
                raise Trouble("the answer ended early", again=True)
            self._whole = file

    def _spooled(self, view: memoryview, at: int) -> None:
        assert self._whole is not None
        os.preadv(self._whole, [view], at)


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return getattr(reason, "strerror", None) or type(reason).__name__

"""What goes wrong with a server: tried again where that may help, told by file, range and status where not.

No message has an address's user, password, query or headers in it, and none quotes what a library said.
"""

import random
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from fmoe.types import AdapterError

TRIES, PAUSE, LONGEST = 8, 0.25, 20.0
"""How often at most, seconds before the second time (then twice as many), and at most."""
AGAIN = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524}
_Made = TypeVar("_Made")


class Unreadable(AdapterError):
    """A file that a system or a server did not let us read: nothing is wrong with what it holds, later it may go."""


class Trouble(Exception):
    """One attempt that failed. again: whether another one may not. done: bytes that came before. bad: what is there is
    wrong, and will be.
    """

    def __init__(self, why: str, *, again: bool, done: int = 0, bad: bool = False):
        super().__init__(why)
        self.again, self.done, self.bad = again, done, bad


def status(code: int) -> Trouble:
    names = {401: "unauthorised: a token?", 403: "forbidden: a token, or a licence to accept?", 404: "not found"}
    return Trouble(f"status {code}{f' ({names[code]})' if code in names else ''}", again=code in AGAIN)


def retried(what: str, attempt: Callable[[], _Made], sleep: Callable[[float], None] = time.sleep) -> _Made:
    """attempt(), again and again while it raises a Trouble that allows it and nothing has come of it TRIES times."""
    tries = 0
    while True:
        try:
            return attempt()
        except Trouble as trouble:
            tries = 1 if trouble.done else tries + 1
            if not trouble.again:
                raise (AdapterError if trouble.bad else Unreadable)(f"{what}: {trouble}") from None
            if tries >= TRIES:
                raise Unreadable(f"{what}: {trouble}, {TRIES} times in a row: run again to go on") from None
            sleep(min(LONGEST, PAUSE * 2 ** (tries - 1)) * random.uniform(0.5, 1))


def shown(url: str) -> str:
    """An address without what may be secret in it.

    >>> shown("https://me:pass@example.org/model?token=x")
    'https://example.org/model'
    """
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}".rstrip("/")

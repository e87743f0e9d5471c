"""What was fetched once and cannot have changed: headers, by address, tag and size, in a folder of the user's cache."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from fmoe.checkpoint.remote.address import Address
from fmoe.checkpoint.remote.web import TIME


def folder() -> Path:
    """The folder, which XDG_CACHE_HOME moves."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fmoe"


def kept(address: Address) -> bytes | None:
    with suppress(OSError):
        if place := _place(address):
            return place.read_bytes()
    return None


def keep(address: Address, data: bytes) -> None:
    """Where there is room for it, and a tag of what it holds to know it by."""
    with suppress(OSError):
        if place := _place(address):
            place.parent.mkdir(parents=True, exist_ok=True)
            part = place.with_suffix(f".{os.getpid()}")
            part.write_bytes(data)
            os.replace(part, place)


def _place(address: Address) -> Path | None:
    found = address.facts()
    if found is None or not found.tag or found.tag.startswith(TIME):
        return None
    key = hashlib.sha256(f"{address}\n{found.tag}\n{found.size}".encode()).hexdigest()
    return folder() / "headers" / key

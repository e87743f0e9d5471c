"""JSON as its specification has it: UTF-8, every key once, no NaN, no half surrogates. Python's own reader lets pass
all of these, keeps the last of two equal keys, and so reads another file than its neighbour does.
"""

import json
import re
from collections.abc import Callable
from reprlib import Repr
from typing import Any

from fmoe.checkpoint.files.disk import content
from fmoe.checkpoint.remote.address import Where
from fmoe.types import AdapterError

MOST = 100_000_000
"""Bytes of JSON that are read at all: what the safetensors library allows a header."""
NAME = 1_000
"""Characters of a tensor's name."""


def parse(text: bytes, *, infinite: bool = False) -> dict[str, Any]:
    """The object that text is. infinite: NaN and Infinity may stand for numbers, as Transformers writes some configs.

    Raises ValueError saying what is wrong and where.

    >>> parse(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key 'a' stands there twice
    """
    try:
        decoded = text.decode()
        whole: Callable[[str], int] | None = _whole if _MINUS_ZERO.search(decoded) else None
        constant = None if infinite else _refuse
        found = json.loads(decoded, parse_constant=constant, parse_int=whole)
        if not isinstance(found, dict) or decoded.count(":") != _keys(found):  # a key twice, or a colon in a text
            found = json.loads(decoded, object_pairs_hook=_once, parse_constant=constant, parse_int=whole)
        if "\\u" in decoded:
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start:,} is not UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("a text in it has half a surrogate pair (\\ud800 to \\udfff)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"JSON: {error}") from None
    except RecursionError:
        raise ValueError("JSON: nested too deeply") from None
    if not isinstance(found, dict):
        raise TypeError(f"holds a {type(found).__name__}, expected an object")
    return found


def read(path: Where, missing: str = "is not there", *, infinite: bool = False) -> tuple[dict[str, Any], str]:
    """What a file of JSON holds, and its text. missing: said if it is not there; infinite: as in `parse`.

    Raises AdapterError naming the file, for whatever cannot be read as one (see `disk`) or is no object.
    """
    text = content(path, missing, MOST)
    try:
        return parse(text, infinite=infinite), text.decode()
    except ValueError as error:
        raise AdapterError(f"{path} is no JSON: {error}") from None
    except TypeError as error:
        raise AdapterError(f"{path} {error}") from None


_SHORT = Repr()
_SHORT.maxlist = _SHORT.maxdict = 8
_SHORT.maxstring = 120


def short(value: object) -> str:
    """repr, cut to a length that fits a message; control characters are escaped."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a number of more digits than Python writes
        return f"a {type(value).__name__}"


def too_long(name: str) -> str:
    """Why a tensor cannot have this name: messages quote names. Empty if it can."""
    return f"is a name of {len(name):,} characters, expected at most {NAME:,}" if len(name) > NAME else ""


_MINUS_ZERO = re.compile(r"-0(?![.\d])")


def _whole(digits: str) -> int:
    if digits == "-0":
        raise ValueError("-0 is no whole number")
    return int(digits)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _keys(found: dict[str, Any]) -> int:
    """How many keys there are, of two levels; the text has at least as many colons as it has pairs."""
    return len(found) + sum(len(value) for value in found.values() if type(value) is dict)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(n for n, _ in pairs if n in seen or seen.add(n))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {short(twice)} stands there twice")
    return found

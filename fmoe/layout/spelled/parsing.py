"""Addresses read: what a user writes as text."""

import re
from functools import lru_cache

from fmoe.layout.spelled.address import Address, Atom, Capture
from fmoe.types import AdapterError, brief

_CAPTURE = re.compile(r"\{(\w+)(?::0([2-9]))?(?:=([^{}]*))?\}")
_AFFINE = re.compile(r"(\w+)\s*([+-])\s*([0-9]{1,9}|[A-Z])")
_ADDRESS = re.compile(r"(?P<name>[^\s\[\]]+)\s*(?:\[(?P<axes>[^\[\]]*)\])?")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED = re.compile(r"[\0\uE000-\uF8FF]")  # they stand for numbers and captures in templates


def parse(text: str) -> Address:
    """The address that a text spells: a name, then optionally its axes in brackets.

    >>> parse("layers.{l}.experts.{g=gate|up}.weight [e (g i)]").axes
    (('e',), ('g', 'i'))

    Raises AdapterError for unbalanced brackets or a capture that cannot be read.
    """
    found = _parsed(text) if isinstance(text, str) else None
    if found is None:
        raise AdapterError(f"cannot read address {brief(text)}: expected a name without blanks, then optionally [axes]")
    return found


@lru_cache(maxsize=1 << 12)
def _parsed(text: str) -> Address | None:
    match = _ADDRESS.fullmatch(text.strip())
    if not match or _RESERVED.search(text):
        return None
    parts: list[str | Capture] = []
    at = 0
    for found in _CAPTURE.finditer(match["name"]):
        parts += [match["name"][at : found.start()]] if found.start() > at else []
        parts.append(_capture(found[1], found[3], int(found[2] or 0), text))
        at = found.end()
    parts += [match["name"][at:]] if at < len(match["name"]) else []
    if any("{" in p or "}" in p for p in parts if isinstance(p, str)):
        raise AdapterError(f"cannot read address {text!r}: a capture is {{name}}, {{name=a|b}} or {{label=name+1}}")
    names = [p.name for p in parts if isinstance(p, Capture)]
    if len(set(names)) < len(names):
        raise AdapterError(f"cannot read address {text!r}: a name is captured twice in it")
    return Address(tuple(parts), None if match["axes"] is None else _dims(match["axes"], text))


def _capture(name: str, body: str | None, width: int, text: str) -> Capture:
    affine = _AFFINE.fullmatch(body or "")
    for word in (name, affine[1]) if affine else (name,):
        if not _WORD.fullmatch(word):
            raise AdapterError(f"cannot read address {text!r}: a capture is a word of letters, not {{{word}}}")
    if body is None:
        return Capture(name, width=width)
    if affine and affine[3].isalpha():
        if affine[2] == "-":
            raise AdapterError(f"cannot read address {text!r}: a size is added, as in {{k=e+E}}")
        return Capture(affine[1], label=name, by=affine[3], width=width)
    if affine:
        return Capture(affine[1], offset=int(affine[2] + affine[3]), label=name, width=width)
    choices = tuple(body.split("|"))
    if width:
        raise AdapterError(f"cannot read address {text!r}: choices have no width, as {{{name}:0{width}}} has")
    if len(set(choices)) < len(choices):
        raise AdapterError(f"cannot read address {text!r}: the choices of {{{name}}} must differ")
    return Capture(name, choices=choices)


def _dims(text: str, whole: str) -> tuple[tuple[Atom, ...], ...]:
    tokens = re.findall(r"\([^()]*\)|[\w|]+|\S", text)
    dims = tuple(tuple(t.strip("()").split()) for t in tokens)
    if not all(d and all(re.fullmatch(r"1|[A-Za-z_]\w*(\|[A-Za-z_]\w*)*", a) for a in d) for d in dims):
        raise AdapterError(f"cannot read axes [{text}] of {whole!r}: expected letters, 1, (a b) or (q|k|v)")
    return dims

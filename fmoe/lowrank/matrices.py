"""LoRA matrices that belong together, found by their names and held to their shapes, and the scale of each pair."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import NamedTuple

from torch import Tensor

from fmoe.layout.claims import some
from fmoe.lowrank.derive import NATIVE
from fmoe.lowrank.scales import Scale
from fmoe.types import AdapterError, Params, Problem

_WEIGHTS = {stem: bare for bare, stem in NATIVE.items()}
_LINEAR = ".lora_A.weight"
_ROWS = ".lora_embedding_A"
_HALF = re.compile(r"(?:^|\.)lora_(?:embedding_|gate_and_up_|down_)?([AB])(?:\.weight)?$")
_WITHIN = ".base_layer."
"""What PEFT puts before the whole tensors of an embedding or a head that it writes beside its matrices."""
_TWICE = ".base_layer.out_proj.lora_A.weight"
"""Of torch's MultiheadAttention PEFT adapts both weights, with these for the second, which it adds twice (0.21)."""
_WHOLE = "Fix: merge it with PEFT (merge_and_unload)"
_SOME = "Fix: save the adapter again; one of some experts alone, merge with PEFT (merge_and_unload)"


@contextmanager
def with_fixes() -> Iterator[None]:
    """What fits no rule is told with what to do about matrices, of which no part can be asked for."""
    try:
        yield
    except AdapterError as error:
        bare = {p: p.text.partition(". Fix: give it all")[0] for p in error.found}
        part = lambda text: text.startswith("missing ") or "stands alone" in text
        fix = {p: _SOME if part(text) else _WHOLE for p, text in bare.items()}
        told = [Problem(p.text if "Fix: " in bare[p] else f"{bare[p]}. {fix[p]}", p.keys) for p in error.found]
        raise AdapterError(told) from None


class Matrices(NamedTuple):
    """The names of a weight and of its A and B; `experts`: stacked, and multiplied from the right.

    rows: of an embedding [V, D], A [r, V] and B [D, r].
    """

    weight: str
    a: str
    b: str
    experts: bool
    rows: bool = False

    @property
    def stem(self) -> str:
        """The name of its module."""
        return self.a.removesuffix(_LINEAR).removesuffix(_ROWS)

    def turned(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors whose product lies as the weight does, that of a convolution flat: [out, in h w]."""
        return (A, B) if self.experts else (A.mT, B.mT) if self.rows else (B.flatten(1), A.flatten(1))

    def shaped(self, A: Tensor, B: Tensor) -> list[int]:
        """The shape of their product, as the weight has it."""
        one, other = self.turned(A, B)
        return [*one.shape[:-1], other.shape[-1]] if self.experts or self.rows else [B.shape[0], *A.shape[1:]]


def matrices(lora: Params) -> Iterator[Matrices]:
    """Every A with its B and its weight. Raises AdapterError for one that stands alone, fits no other, or is neither.

    >>> import torch
    >>> list(matrices({"q.lora_A.weight": torch.ones(2, 6), "q.lora_B.weight": torch.ones(5, 2)}))
    [Matrices(weight='q.weight', a='q.lora_A.weight', b='q.lora_B.weight', experts=False, rows=False)]
    """
    if problems := [*attention(lora), *halved(lora)]:
        raise AdapterError(problems)
    seen: set[str] = set()
    for name in lora:
        prefix, _, bare = name.rpartition(".")
        if bare.endswith("_A") and bare[:-2] in _WEIGHTS:
            pair = Matrices(f"{prefix}.{_WEIGHTS[bare[:-2]]}".lstrip("."), name, name[:-1] + "B", True)
        elif name.endswith(_LINEAR):
            stem = name.removesuffix(_LINEAR)
            pair = Matrices(stem + ".weight", name, stem + ".lora_B.weight", False)
        elif name.endswith(_ROWS):
            stem = name.removesuffix(_ROWS)
            pair = Matrices(stem + ".weight", name, name[:-1] + "B", False, rows=True)
        else:
            continue
        A, B = lora[pair.a].shape, lora[pair.b].shape
        if not _fit(A, B, pair.experts):
            kind = "[E, in, r] and [E, r, out]" if pair.experts else "[r, in] and [out, r]"
            text = f"lora: {pair.a!r} is {list(A)} and {pair.b!r} {list(B)}, expected {kind}. {_WHOLE}"
            raise AdapterError([Problem(text, (pair.a, pair.b))])
        seen |= {pair.a, pair.b}
        yield pair
    if other := tuple(n for n in lora if n not in seen and not is_copy(n, lora)):
        told = f"lora: {some(other)}: no matrix A or B of a pair, which cannot be merged. {_WHOLE}"
        raise AdapterError([Problem(told, other)])


def attention(lora: Params) -> Iterator[Problem]:
    """A problem for the matrices of a torch.nn.MultiheadAttention."""
    if names := tuple(n for n in lora if n.endswith(_TWICE)):
        stems = tuple(n.removesuffix(_TWICE) + _LINEAR for n in names)
        text = (
            f"lora: {some(names)}: of a MultiheadAttention, of whose out_proj PEFT adds the update twice, in training"
        )
        yield Problem(f"{text} too. {_WHOLE}, which does so", (*names, *stems))


def halved(lora: Iterable[str]) -> Iterator[Problem]:
    """A problem for each matrix A without its B, and each B without its A, in a file or natively.

    >>> [problem.text for problem in halved(["q.lora_A.weight", "k.lora_A.weight", "k.lora_B.weight"])]
    ["lora: 'q.lora_A.weight' stands alone, expected 'q.lora_B.weight' beside it"]
    """
    there = dict.fromkeys(lora)
    for name in there:
        if hit := _HALF.search(name):
            other = f"{name[: hit.start(1)]}{'B' if hit[1] == 'A' else 'A'}{name[hit.end(1) :]}"
            if other not in there:
                yield Problem(f"lora: {name!r} stands alone, expected {other!r} beside it", (name, other))


def is_copy(name: str, lora: Params) -> bool:
    """Whether a name is that of a whole tensor that stands beside the matrices of its module.

    >>> is_copy("head.base_layer.weight", {"head.lora_A.weight": 0}), is_copy("head.weight", {"head.lora_A.weight": 0})
    (True, False)
    """
    stem, _, rest = name.partition(_WITHIN)
    return bool(rest) and ".lora_" not in rest and not lora.keys().isdisjoint((stem + _LINEAR, stem + _ROWS))


def copies(lora: Params) -> dict[str, dict[str, str]]:
    """Whole tensors beside the matrices of their module: its name -> what stands for which."""
    made: dict[str, dict[str, str]] = {}
    for name in (n for n in lora if _WITHIN in n and is_copy(n, lora)):
        stem, _, rest = name.partition(_WITHIN)
        made.setdefault(stem, {})[name] = f"{stem}.{rest}"
    return made


def tied(lora: Params) -> Iterator[Problem]:
    """A problem for the matrices of an embedding, or a head, where both are one tensor: merged, both would change."""
    at = [p for p in matrices(lora) if p.rows or p.weight.endswith("lm_head.weight")]
    if names := tuple(n for p in at for n in (p.a, p.b)):
        text = f"{some(names)}: LoRA of an embedding that is its base's head too. Added to that one tensor, as PEFT's "
        text += "merge_and_unload does, it changes both: another model than the adapter's"
        fix = "Fix: untie the base first: write lm_head.weight, a copy of its embedding, and tie_word_embeddings=false"
        yield Problem(f"{text}. {fix} in its config.json", names)


def scale_of(scale: Scale, pair: Matrices) -> float:
    """The scale of a pair, of the one given or its own. Raises AdapterError where that is no finite number."""
    if isinstance(scale, Mapping) and pair.a not in scale:
        raise AdapterError(f"lora: no scale is given for {pair.a!r}")
    found = scale[pair.a] if isinstance(scale, Mapping) else scale
    plain = isinstance(found, Real) and not isinstance(found, bool) or isinstance(found, Tensor)
    try:
        made = float(found) if plain else math.nan
    except (ValueError, RuntimeError, OverflowError):
        made = math.nan
    if not math.isfinite(made):
        raise AdapterError(f"lora: the scale of {pair.a!r} is {found!r}, expected a finite number")
    return made


def _fit(A: tuple[int, ...], B: tuple[int, ...], experts: bool) -> bool:
    if not experts:
        return len(A) == len(B) >= 2 and A[0] == B[1] and {*B[2:]} <= {1}
    halves = len(A) == 3 or len(A) == 4 and A[2] == 2
    return halves and len(B) == 3 and A[0] == B[0] and A[-1] == B[1] and (len(A) == 3 or B[2] % 2 == 0)

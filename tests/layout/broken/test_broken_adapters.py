"""One class of adapters for each method that may be its own, and wrong: told by the law and by a name."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_broken_pairs import GOOD, SPECS
from torch import Tensor

from fmoe import Adapter
from fmoe.testing import assert_laws

SINGLE, ITER = Adapter.convert_single_tensor_to_hf, Adapter.iter_hf


def of_class(**methods: Any) -> Adapter:
    return type("Mine", (Adapter,), methods)(GOOD.stages, GOOD.moe, GOOD.config)


def whole(how: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in how.items() if not isinstance(v, range)}


class InSets(Adapter):
    """Each of its methods follows the hash seed."""

    def iter_hf(self, params: Any, **how: Any) -> Iterator[tuple[str, Tensor]]:
        made = dict(super().iter_hf(params, **how))
        return ((n, made[n]) for n in set(made)) if len(made) > 20 and len(how) < 2 else iter(made.items())

    def to_hf(self, params: Any, *args: Any, **how: Any) -> dict[str, Any]:
        made = super().to_hf(params, *args, **how)
        return {n: made[n] for n in set(made)} if len(made) > 20 else made


class ToSets(Adapter):
    """from_hf follows the hash seed."""

    def from_hf(self, hf: Any, *args: Any, **how: Any) -> dict[str, Any]:
        made = super().from_hf(hf, *args, **how)
        return {n: made[n] for n in set(made)}


def remembers(memory: dict[str, Any]) -> dict[str, Any]:
    def from_hf(self: Adapter, hf: Any, **how: Any) -> Any:
        memory["b"] = b if isinstance(b := hf.get("b.weight"), Tensor) else None
        return Adapter.from_hf(self, hf, **how)

    def to_hf(self: Adapter, params: Any, **how: Any) -> Any:
        made = Adapter.to_hf(self, params, **how)
        known = isinstance(made.get("b.weight"), Tensor) and memory.get("b") is not None
        return made | ({"b.weight": memory["b"]} if known else {})

    return dict(from_hf=from_hf, to_hf=to_hf)


def times(n: int, made: dict[str, Any]) -> dict[str, Any]:
    return {name: n * t if n > 1 else t for name, t in made.items()}


BROKEN: dict[str, tuple[Callable[[], Adapter], str]] = {
    "single: other values": (
        lambda: of_class(convert_single_tensor_to_hf=lambda *a, **k: [(n, 3 * t) for n, t in SINGLE(*a, **k)]),
        "^single: convert_single_tensor_to_hf.* gives '.*' with other values",
    ),
    "single: another name": (
        lambda: of_class(convert_single_tensor_to_hf=lambda s, n, t, **k: [(n, t)]),
        "^single: convert_single_tensor_to_hf.* other names",
    ),
    "single: another order": (
        lambda: of_class(convert_single_tensor_to_hf=lambda s, n, t, **k: SINGLE(s, n, t, **k)[::-1]),
        "^single: convert_single_tensor_to_hf.* returns its names in another order: found .",
    ),
    "single: no range": (
        lambda: of_class(convert_single_tensor_to_hf=lambda s, n, t, **k: SINGLE(s, n, t, **whole(k))),
        "^restriction: convert_single_tensor_to_hf.*, e=range.*'model",
    ),
    "iter_hf: no range": (
        lambda: of_class(iter_hf=lambda s, n, **k: ITER(s, n, **whole(k))),
        "^restriction: iter_hf of e=range.* '",
    ),
    "iter_hf: twice": (
        lambda: of_class(iter_hf=lambda s, n, **k: [*ITER(s, n, **k)] * (1 + ("e" in k))),
        "^restriction: iter_hf of e=range.* yields '.*' twice",
    ),
    "iter_hf: contiguous is not": (
        lambda: of_class(
            iter_hf=lambda s, n, **k: ((a, b * (1 + k.get("contiguous", False))) for a, b in ITER(s, n, **k))
        ),
        "^inverse: iter_hf.*contiguous=True.* '",
    ),
    "iter_hf: by the dict given": (
        lambda: of_class(iter_hf=lambda s, n, **k: sorted(ITER(s, n, **k), reverse=[*n][0] > [*n][-1])),
        "^order: iter_hf yields",
    ),
    "to_hf and single: of one tensor alone": (
        lambda: of_class(
            to_hf=lambda s, p, **k: times(1 + (len(p) == 1), Adapter.to_hf(s, p, **k)),
            convert_single_tensor_to_hf=lambda *a, **k: [*times(2, dict(SINGLE(*a, **k))).items()],
        ),
        "^single: to_hf of '.*' alone gives '.*' with other values",
    ),
    "to_hf: by the hash seed": (lambda: InSets(GOOD.stages), "^(order|hash seed): "),
    "from_hf: by the hash seed": (lambda: ToSets(GOOD.stages), "^(hash seed: from_hf, |order: ).*'"),
    "to_hf: a memory": (lambda: of_class(**remembers({})), "^(function|inverse): to_hf.* 'b.weight' with other values"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_each_fault_of_a_class_is_told_by_law_and_name(fault: str) -> None:
    make, told = BROKEN[fault]
    with pytest.raises(AssertionError, match=told):
        assert_laws(make(), SPECS)


class Plain(Adapter):
    """Nothing of its own."""


@pytest.mark.parametrize("kind", [Adapter, Plain, lambda *of: of_class()])
def test_good_classes_keep_every_law(kind: Any) -> None:
    assert_laws(kind(GOOD.stages, GOOD.moe, GOOD.config), SPECS)
    assert_laws(kind(GOOD.stages), {n: spec._replace(dtype=torch.int8) for n, spec in SPECS.items()})

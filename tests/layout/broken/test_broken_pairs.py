"""One pair of functions for each fault that `assert_laws` must tell: by the law, and by a name."""

import pickle
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import fmoe
from fmoe import TensorSpec
from fmoe.testing import apart, assert_laws

Params = dict[str, Tensor]
BLOCK = "{pre}layers.{l}.mlp.experts."
GOOD = (
    fmoe.rule(BLOCK + "{e}.{g=gate|up}_proj.weight [i d]", BLOCK + "gate_and_up_projs [e d (g i)]")
    | fmoe.rule(BLOCK + "{e}.down_proj.weight [d i]", BLOCK + "down_projs [e i d]")
    | fmoe.keep("{rest}")
)
E, D, I = 3, 4, 2
SHAPES = {"gate": (I, D), "up": (I, D), "down": (D, I)}
SPECS = {
    f"model.layers.{l}.mlp.experts.{e}.{p}_proj.weight": TensorSpec(shape, torch.float32)
    for l in range(2)
    for e in range(E)
    for p, shape in SHAPES.items()
} | {name: TensorSpec((5, D), torch.float32) for name in ("a.weight", "b.weight", "lm_head.weight")}
SEEN: dict[str, Params] = {}


def there(hf: Params) -> Params:
    return dict(GOOD.from_hf(hf))


def back(native: Params) -> Params:
    return dict(GOOD.to_hf(native))


def remembering(hf: Params) -> Params:
    SEEN["hf"] = {n: t.clone() for n, t in hf.items()}
    return there(hf)


def hiding(hf: Params) -> Params:
    SEEN["hf"] = dict(hf)
    return {n: t for n, t in there(hf).items() if n != "b.weight"}


def shuffled(made: Params) -> Params:
    return dict(random.sample([*made.items()], len(made)))


def by_argument(function: Callable[[Params], Params], given: Params) -> Params:
    made = function(given)
    return dict(sorted(made.items(), reverse=[*given][0] > [*given][-1]))


def set_order(made: Params) -> Params:
    return {n: made[n] for n in set(made)}


def there_by_set(hf: Params) -> Params:
    return set_order(there(hf))


def back_by_set(native: Params) -> Params:
    return set_order(back(native))


def stacked_by_set(hf: Params) -> Params:
    return {"w": torch.stack([hf[n] for n in {*sorted(hf)}])}


def unstacked_by_set(native: Params) -> Params:
    names = {f"w.{e}" for e in range(len(native["w"]))}
    return dict(sorted(zip(names, native["w"], strict=True)))


def remembered_later(native: Params) -> Params:
    """Only what from_hf has told of before is known here: in a process of its own nothing is."""
    return {n: t for n, t in back(native).items() if n in SEEN["hf"]}


STACKED = {f"w.{e}": TensorSpec((3,), torch.float32) for e in range(9)}
BROKEN = {
    "to_hf shuffles": (there, lambda n: shuffled(back(n)), "^order: to_hf of .* found .'.*, expected .'"),
    "from_hf shuffles": (lambda h: shuffled(there(h)), back, "^order: from_hf of .* found .'.*, expected .'"),
    "to_hf follows its dict": (there, partial(by_argument, back), "^order: to_hf of .* in another order .* found .'"),
    "from_hf follows its dict": (partial(by_argument, there), back, "^order: from_hf of .* in another order .* found"),
    "to_hf goes over a set": (there, back_by_set, "^hash seed: to_hf, in a process of .*, returns its .* found .'"),
    "from_hf goes over a set": (there_by_set, back, "^hash seed: from_hf, in a process of .*, returns its .* found .'"),
    "a stack in a set's order": (stacked_by_set, unstacked_by_set, "^hash seed: (from|to)_hf, .* gives 'w.*' with ot"),
    "to_hf gives what was given": (
        remembering,
        lambda n: dict(sorted(SEEN["hf"].items())),
        "^function: to_hf .* gives 'a.weight' wi",
    ),
    "a tensor by a closure": (hiding, lambda n: back(n | {"b.weight": SEEN["hf"]["b.weight"]}), "'b.weight' with oth"),
    "names by a closure": (remembering, remembered_later, "^function: to_hf raises KeyError.'hf'.* its argument$"),
    "-0.0 becomes 0.0": (there, lambda n: {k: t + 0.0 for k, t in back(n).items()}, "^inverse: .* of other bits, .* '"),
    "NaN becomes another": (
        lambda h: {k: torch.where(t.isnan(), torch.nan, t) for k, t in there(h).items()},
        back,
        "^inverse: .* of other bits, such as -0.0 and NaN, gives 'a.weight' with other values",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_each_fault_of_a_pair_is_told_by_law_and_name(fault: str) -> None:
    SEEN.clear()
    first, second, told = BROKEN[fault]
    with pytest.raises(AssertionError, match=told):
        assert_laws((first, second), STACKED if first is stacked_by_set else SPECS)


DTYPES = [torch.bfloat16, torch.float64, torch.complex64, torch.int16, torch.bool, torch.float8_e4m3fn]
PAIRS = {
    "an adapter's own": (GOOD.from_hf, GOOD.to_hf),
    "of this module": (there, back),
    "lambdas": (lambda h: there(h), lambda n: back(n)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_good_pairs_keep_every_law(pair: str, dtype: torch.dtype) -> None:
    assert_laws(PAIRS[pair], {n: spec._replace(dtype=dtype) for n, spec in SPECS.items()})


def test_what_other_processes_cannot_import_is_not_sent_and_they_outlive_what_fails() -> None:
    given = {"w": torch.ones(2)}
    for function in (lambda p: p, partial(by_argument, lambda p: p)):
        apart.assert_apart("f", function, given, {})  # nothing was compared
    with pytest.raises(AssertionError, match="^hash seed: f, .* gives other names: without .*'w'"):
        apart.assert_apart("f", there, {}, given)
    processes = apart._processes()
    assert len(processes) == 2 and all(process.poll() is None for process in processes)
    assert apart._asked(processes[0], (b"no pickle", given)) == ("lost", None)
    apart.assert_apart("f", there, given, given)


def test_such_a_process_starts_none_of_its_own() -> None:
    for process in apart._processes():
        said, found = apart._asked(process, (pickle.dumps(processes_there), []))
        assert said == "made" and list(apart._unpacked(found)) == ["0 processes"]


def processes_there(_: Params) -> Params:
    return {f"{len(apart._processes())} processes": torch.ones(1)}

"""One law over every eager twin, which is public too: what does not fit is refused by name, and computes nothing."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fmoe_kernels import reference
from kernel_calls import DAMAGE, LAYER, E, K, M, N, ends, ids, new
from torch import Tensor
from torch._subclasses import FakeTensorMode

T, U, E4M3 = N, 2 * M, torch.float8_e4m3fn
ROUTED = reference.route(ids(T, 1), new(T, 1), None, E)
FP8 = dict(q=new(N, K).to(E4M3), s=new(N, 1), w=new(E, K, M).to(E4M3), w_scale=new(E, 1, 1), offsets=ends(2, N))
CODES = dict(words=new(E, K, M).byte(), scale=new(E, K, M).byte())
r = dict(r=ROUTED)
GATED = dict(r=ROUTED, activation="swiglu")
ROWS: dict[str, tuple[Callable[..., Any], dict[str, Tensor], dict[str, Any]]] = {
    "route": (reference.route, dict(indices=ids(T, 2), weights=new(T, 2), mask=new(T) > 0), dict(n_experts=E)),
    "activate": (reference.activate, dict(z=new(N, U)), dict(activation="swiglu")),
    "gmm": (reference.gmm, dict(a=new(N, K), w=new(E, K, M), offsets=ends(2, N), bias=new(E, M)), {}),
    "quantize_rows": (reference.quantize_rows, dict(x=new(N, K)), {}),
    "gmm_fp8": (reference.gmm_fp8, FP8, {}),
    "up": (reference.up, dict(x=new(T, K), w=new(E, K, U), bias=new(E, U)), GATED | dict(k=1)),
    "dact": (reference.dact, dict(dy=new(T, K), w=new(E, M, K), z=new(N, U)), GATED),
    "dw": (reference.dw, dict(left=new(N, K), right=new(T, M)), r),
    "bias_gradient": (reference.bias_gradient, dict(rows=new(N, M)), r),
    "combine": (
        reference.combine,
        dict(rows=new(N, M), slot_ids=torch.arange(N).to(ids(1).device)),
        dict(n_tokens=T, k=1),
    ),
    "experts": (reference.experts, LAYER, {}),
    "decode": (reference.decode, CODES, dict(second=None, code="e4m3", block=(1, 1))),
}
FITS = (  # what remains a valid call
    "mask None", "b_up None", "b_down None", "bias None", "z a dimension less", "activate z first size",
    "gmm w last size", "gmm a first size", "gmm_fp8 w last size", "rows x first size", "rows x last size",
    "up x first size",    "dy first size", "rows last size", "right first size", "left last size", "right last size",
    "decode scale another kind",
)  # fmt: skip


def damaged() -> list[str]:
    made = [f"{name} {which} {how}" for name, (_, given, _) in ROWS.items() for which in given for how in DAMAGE]
    first = [f"{name} {next(iter(given))} elsewhere" for name, (_, given, _) in ROWS.items()]
    return [case for case in made if case not in first]


@pytest.mark.parametrize("case", damaged())
def test_what_does_not_fit_is_refused_by_name(case: str) -> None:
    name, which, how = case.split(" ", 2)
    function, given, more = ROWS[name]
    try:
        function(**given | {which: DAMAGE[how](given[which])}, **more)
    except ValueError as refused:
        told = [*given, "r"] if "size" in how else [which]
        names = tuple(f"reference.{name}: {n}" for n in told)
        assert str(refused).startswith(names), refused
    else:
        assert case.endswith(FITS)


BEYOND = {
    "gmm: offsets is [4, 2]": ("gmm", dict(offsets=ends(4, 2))),
    "gmm: offsets is [-3, 4]": ("gmm", dict(offsets=ends(-3, 4))),
    "gmm: offsets is [2, 400]": ("gmm", dict(offsets=ends(2, 400))),
    "gmm_fp8: offsets is [4, 2]": ("gmm_fp8", dict(offsets=ends(4, 2))),
    "gmm: w is torch.float64, expected torch.float32, as a": ("gmm", dict(w=new(E, K, M).double())),
    "experts: w_up is torch.float16, expected torch.float32": ("experts", dict(w_up=LAYER["w_up"].half())),
    "experts: start is -1": ("experts", dict(start=-1)),
    "experts: activation is 'nope', expected one of swiglu": ("experts", dict(activation="nope")),
    "experts: limit is 'x', expected a number": ("experts", dict(activation="swiglu_clamped", limit="x")),
    "experts: weight_after_down is 'x', expected True or False": ("experts", dict(weight_after_down="x")),
    "experts: mask is torch.int64 [5], expected bool [T]": ("experts", dict(mask=2 * ids(N))),
    "activate: activation is 'nope'": ("activate", dict(activation="nope")),
    "activate: activation is ['relu2']": ("activate", dict(activation=["relu2"])),
    "activate: z is [5, 3], expected an even number of columns": ("activate", dict(z=new(N, 3))),
    "activate: alpha is None": ("activate", dict(alpha=None)),
    "route: n_experts is 0, expected 1 or more": ("route", dict(n_experts=0)),
    "route: start is 1.5": ("route", dict(start=1.5)),
    "up: k is -1, expected 0 or more": ("up", dict(k=-1)),
    "up: r is of type tuple, expected what reference.route": ("up", dict(r=tuple(ROUTED))),
    "up: weighted is 1, expected True or False": ("up", dict(weighted=1)),
    "up: r.slot_ids is from 0 to 9, expected from 0 to 4": (
        "up",
        dict(r=ROUTED._replace(slot_ids=ends(0, 1, 2, 3, 9))),
    ),
    "dact: r.counts is [9, 0] beside offsets [5, 5]": ("dact", dict(r=ROUTED._replace(counts=ends(9, 0)))),
    "dw: offsets is [5, 4]": ("dw", dict(r=ROUTED._replace(offsets=ends(5, 4)))),
    "dw: r.token_ids is from -1 to -1": ("dw", dict(r=ROUTED._replace(token_ids=ids(N) - 1))),
    "bias_gradient: r.offsets is torch.int16": ("bias_gradient", dict(r=ROUTED._replace(offsets=ends(5, 5).short()))),
    "combine: slot_ids is from 7 to 7, expected from 0 to 4": ("combine", dict(slot_ids=ids(N) + 7)),
    "combine: n_tokens is -1": ("combine", dict(n_tokens=-1)),
    "combine: k is '1'": ("combine", dict(k="1")),
    "decode: code is 'nope', expected one of e4m3": ("decode", dict(code="nope")),
    "decode: block is (3, 1), expected powers of two": ("decode", dict(block=(3, 1))),
    "decode: late is 'x', expected True or False": ("decode", dict(late="x")),
    "decode: scale is [2, 4, 6], expected [E a b] = [2, 2, 6]": ("decode", dict(block=(2, 1))),
    "decode: second is [2, 2, 6], expected [E one M] = [2, 1, 6]": ("decode", dict(second=new(E, 2, M))),
}


@pytest.mark.parametrize("told", BEYOND)
def test_values_that_do_not_fit_are_refused_by_name(told: str) -> None:
    name, bad = BEYOND[told]
    function, given, more = ROWS[name]
    with pytest.raises(ValueError, match=f"^reference.{re.escape(told)}"):
        function(**given | more | bad)
    function(**given, **more)


def test_every_twin_is_held_to_it() -> None:
    assert {*ROWS} == {*reference.__all__} - {"Routed"}
    taken = lambda name: inspect.signature(getattr(reference, name)).parameters.keys()
    assert all({*given, *more} <= taken(name) for name, (_, given, more) in ROWS.items())


def test_of_no_slots_nothing_is_added() -> None:
    y = reference.experts(**LAYER | dict(indices=ids(N, 0), weights=new(N, 0)))
    assert torch.equal(y, torch.zeros_like(LAYER["x"]))
    none = {n: LAYER[n][:0] for n in ("x", "indices", "weights", "mask")}
    assert reference.experts(**LAYER | none).shape == (0, K)


def test_transforms_see_through_the_checks() -> None:
    x, w_up, w_down = (t.double() for t in (LAYER["x"], LAYER["w_up"], LAYER["w_down"]))
    loss = lambda x: reference.experts(x, LAYER["indices"], LAYER["weights"], None, w_up, w_down).square().sum()
    slope = torch.func.grad(loss)(x)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(torch.stack([x, x]))[1], slope)
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        whole = torch.compile(loss, backend="eager", fullgraph=True)
        torch.testing.assert_close(whole(x), loss(x))
    with pytest.raises(ValueError, match="reference.experts: activation is 'nope'"):
        torch.compile(reference.experts, backend="eager")(**LAYER, activation="nope")
    with torch.autocast(x.device.type, torch.bfloat16):
        mixed = reference.experts(**LAYER | {"w_up": LAYER["w_up"].bfloat16()})
    torch.testing.assert_close(mixed, reference.experts(**LAYER), rtol=0.02, atol=0.02)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (new(N, M), ids(N))]
        assert reference.combine(*fakes, T, 1).shape == (T, M)

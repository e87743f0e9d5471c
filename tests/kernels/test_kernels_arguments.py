"""One law over every public kernel: what does not fit is refused by name; offsets are clamped on the device.

Every tensor of every row is damaged in every way of `DAMAGE`.
"""

from collections.abc import Callable
from typing import Any

import fmoe_kernels
import kernel_cases  # switches the interpreter on, before Triton is imported
import pytest
import torch
from fmoe_kernels import products
from fmoe_kernels.host import check, launch
from fmoe_kernels.programs import fp8
from fmoe_kernels.programs.route import make_route
from kernel_calls import CALLS, DAMAGE, LAYER, E, N, ends, ids, new
from torch import Tensor
from torch._subclasses import FakeTensorMode

FITS = [  # what remains a valid call
    "mask None", "b_up None", "b_down None", "p None", "u a dimension more", "u a dimension less", "u last size",
    "u first size", "p a dimension less", "products.tgmm offsets first size", "products.tgmm offsets last size",
    "products.tgmm x last size", "y last size", "gmm x first size", "gmm w last size", "make_route indices last size",
    "gmm_codes x first size", "words last size",
]  # fmt: skip


def damaged() -> list[str]:
    every = [f"{name} {which} {how}" for name, (_, given) in CALLS.items() for which in given for how in DAMAGE]
    lone = [f"{name} x {how}" for name in ("fp8.quantize_rows",) for how in ("first size", "last size", "elsewhere")]
    first = [f"{name} {which} elsewhere" for name, (_, given) in CALLS.items() for which in list(given)[:1]]
    return [case for case in every if not case.endswith(tuple(FITS)) and case not in lone + first]


@pytest.mark.parametrize("case", damaged())
def test_what_does_not_fit_is_refused_by_name(case: str) -> None:
    name, which, how = case.split(" ", 2)
    function, arguments = CALLS[name]
    with pytest.raises(ValueError) as refused:
        function(**arguments | {which: DAMAGE[how](arguments[which])})
    # a size that two tensors share may be told of either
    told = arguments if "size" in how else [which]
    assert str(refused.value).startswith(tuple(f"{name}: {tensor} " for tensor in told)), refused.value


NUMBERS = {
    "start is": (dict(start=n) for n in (-1, 1.5, True, "1", 2**63)),
    "table is": (dict(table=n) for n in (3, None)),
    "activation is": (dict(activation=n) for n in (["swiglu"], None, "swish")),
    "alpha is": (dict(alpha=n) for n in (10**400, "1", None, float("nan"))),
    "limit is": (dict(activation="situ", limit=n) for n in (float("nan"), [1.0])),
}


@pytest.mark.parametrize(("told", "how"), [(told, how) for told, each in NUMBERS.items() for how in each], ids=str)
def test_numbers_and_names_that_do_not_fit_are_refused(told: str, how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"experts: {told}"):
        fmoe_kernels.experts(**LAYER | how)


@pytest.mark.parametrize("n", [0, -1, 2.0, 2**63, None])
def test_a_route_to_no_number_of_experts_is_refused(n: Any) -> None:
    for how in (dict(n_experts=n), dict(n_experts=E, start=-1 if n == 0 else n)):
        with pytest.raises(ValueError, match="make_route: (n_experts|start) is"):
            make_route(ids(N, 1), None, **how)


RAW = [n for n in CALLS if n.startswith(("products", "fp8"))]


LAID: dict[str, Callable[[Tensor], Tensor]] = {  # what a tensor of the same values may lie like, some repeated
    "negated lazily": lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag if t.is_floating_point() else t,
    "every other": lambda t: torch.stack([t, ~t if t.dtype == torch.bool else t - 9], -1)[..., 0],
    "columns of more": lambda t: torch.cat([t, t.new_full((*t.shape[:-1], 3), 1)], -1)[..., : t.shape[-1]],
    "turned": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "one of all": lambda t: t.flatten()[:1].view([1] * t.ndim).expand_as(t),
    "the first of all": lambda t: t[:1].expand_as(t),
    "the first column": lambda t: t[..., :1].expand_as(t),
}


COLUMN = {"a weighted sum": (products.tgmm, CALLS["products.tgmm"][1] | {"x": new(N, 1)})}


@pytest.mark.parametrize("how", LAID)
@pytest.mark.parametrize("name", [*CALLS, *COLUMN])
def test_however_a_tensor_lies_it_counts_as_its_values(name: str, how: str) -> None:
    function, arguments = (CALLS | COLUMN)[name]
    torch.manual_seed(0)
    drawn = {n: torch.rand_like(t) if t.dtype == torch.float32 else t for n, t in arguments.items()}

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        trains = lambda t: t.dtype == torch.float32 and name not in (*RAW, *COLUMN)
        learned = {n: t.detach().requires_grad_(trains(t)) for n, t in given.items()}
        made = function(**learned)
        made = [t for t in (made if isinstance(made, tuple) else (made,)) if isinstance(t, Tensor)]
        if made[0].requires_grad:
            made[0].square().sum().backward()
        return [t.float() for t in [*made, *(t.grad for t in learned.values() if t.grad is not None)]]

    for which, t in drawn.items():
        laid = LAID[how](t) if t.dtype != fp8.E4M3 else t  # which `stack` does not take
        if which == "offsets" and not torch.equal(laid, t):
            continue  # rows past the last end are unspecified
        dense = laid.clone(memory_format=torch.contiguous_format)
        for found, wanted in zip(run(drawn | {which: laid}), run(drawn | {which: dense}), strict=True):
            torch.testing.assert_close(found, wanted, msg=which)


@pytest.mark.parametrize("name", RAW)
def test_raw_products_refuse_what_has_no_data_of_its_own(name: str) -> None:
    function, arguments = CALLS[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {which: mode.from_tensor(t) for which, t in arguments.items()}
    for which in arguments:
        with pytest.raises(ValueError, match="is on meta or fake"):
            function(**arguments | {which: fakes[which]})
    call = lambda x: function(**arguments | {"x": x})
    for transformed in (lambda x: torch.vmap(call)(x[None]), lambda x: torch.func.vjp(call, x)):
        with pytest.raises(ValueError, match="is inside a transform of torch.func"):
            transformed(arguments["x"])


@pytest.mark.parametrize("name", CALLS)
def test_what_fits_is_taken(name: str) -> None:
    function, arguments = CALLS[name]
    function(**arguments)


ZERO = {"N": (0, 4, 6, 2), "K": (5, 0, 6, 2), "M": (5, 4, 0, 2), "E": (5, 4, 6, 0)}


@pytest.mark.parametrize("axis", ZERO)
def test_products_of_nothing_are_zeros(axis: str) -> None:
    N, K, M, E = ZERO[axis]
    last = torch.full((E,), N, device=kernel_cases.DEVICE)
    assert torch.equal(products.gmm(new(N, K), new(E, K, M), last), new(N, M) * 0)
    assert torch.equal(products.tgmm(new(N, K), new(N, M), last), 0 * new(E, K, M))
    fits = dict(w=new(E, K, M).to(fp8.E4M3), w_scale=new(E, -(-K // 128), -(-M // 128)))
    assert fp8.gmm(new(N, K), **fits, offsets=last).shape == (N, M)


@pytest.mark.parametrize("size", ["D", "I", "E"])
def test_a_layer_of_no_width_is_refused(size: str) -> None:
    E, D, I = (0 if size == letter else 3 for letter in "EDI")
    with pytest.raises(ValueError, match="experts: w_down is .* without a zero"):
        fmoe_kernels.experts(new(4, D), ids(4, 1), new(4, 1), None, new(E, D, 2 * I), new(E, I, D))


HOSTILE = {
    "past the rows": [2, 400],
    "far past": [10**6, 2**40],
    "falling": [4, 2],
    "negative": [-3, 4],
    "all past": [2**62, 2**62],
    "lowest": [-(2**63), 2],
}


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("name", ["products.gmm", "products.tgmm", "products.gmm_codes", "fp8.gmm"])
def test_offsets_that_do_not_fit_are_brought_where_they_fit(name: str, how: str) -> None:
    function, arguments = CALLS[name]
    torch.manual_seed(0)
    drawn = {
        n: t if n in ("offsets", "w", "w_scale", "words", "scale") else torch.randn_like(t)
        for n, t in arguments.items()
    }
    first, last = HOSTILE[how]
    start = min(max(first, 0), N)
    right = ends(start, min(max(last, start), N))
    found = function(**drawn | {"offsets": ends(first, last)})
    n = int(right[-1]) if "gmm" in name.split(".")[1][:3] else None
    assert torch.equal(found[:n], function(**drawn | {"offsets": right})[:n])


@pytest.mark.parametrize("wide", ["x", "w", "y"])
def test_fp64_is_refused_by_products(wide: str) -> None:
    for name in ("products.gmm", "products.tgmm", "fp8.gmm"):
        function, arguments = CALLS[name]
        if wide in arguments:
            with pytest.raises(ValueError, match=f"{name}: {wide} is torch.float64"):
                function(**arguments | {wide: arguments[wide].double()})


@pytest.mark.parametrize("dtype", check.INTEGERS, ids=str)
def test_every_integer_dtype_of_ids_is_right(dtype: torch.dtype) -> None:
    indices = torch.tensor([[0, 200], [100, 1], [1, 0], [127, 1]]).to(dtype)
    weights = torch.rand(4, 2)
    x, w_up, w_down = torch.randn(4, 4), torch.randn(2, 4, 6), torch.randn(2, 3, 4)
    x, weights, w_up, w_down, indices = (t.to(kernel_cases.DEVICE) for t in (x, weights, w_up, w_down, indices))
    found = fmoe_kernels.experts(x, indices, weights, None, w_up, w_down)
    assert torch.equal(found, fmoe_kernels.experts(x, indices.long(), weights, None, w_up, w_down))


def test_ids_at_the_ends_of_int64_go_nowhere() -> None:
    indices = torch.tensor([[2**63 - 1], [-(2**63)], [0], [-1], [2**32]], device=kernel_cases.DEVICE)
    x, w_up, w_down = (
        t.to(kernel_cases.DEVICE) for t in (torch.randn(5, 4), torch.randn(2, 4, 6), torch.randn(2, 3, 4))
    )
    for start in (0, 7):
        y = fmoe_kernels.experts(x, indices, torch.ones_like(indices).float(), None, w_up, w_down, start=start)
        assert y[[0, 1, 3, 4]].eq(0).all() and bool(y[2].any()) == (start == 0)


@pytest.mark.parametrize("name", CALLS)
def test_kernels_start_on_the_device_of_their_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the current device is: a launch elsewhere would be handed pointers that are not its own."""
    seen: list[str] = []

    class Guard:
        def __init__(self, index: int | None) -> None: ...
        def __enter__(self) -> None:
            seen.append("in")

        def __exit__(self, *_: object) -> None:
            seen.append("out")

    kind = type(launch._probe)
    real = kind.__getitem__
    monkeypatch.setattr(
        kind, "__getitem__", lambda self, grid: (seen.append("launch"), real(self, grid))[1], raising=False
    )
    monkeypatch.setattr(torch.accelerator, "device_index", Guard)
    function, arguments = CALLS[name]
    trained = {
        n: t.clone().requires_grad_() if t.dtype == torch.float32 and "fp8" not in name else t
        for n, t in arguments.items()
    }
    out = function(**trained)
    if isinstance(out, Tensor) and out.requires_grad:
        out.sum().backward()
    assert "launch" in seen
    assert seen == ["in", "launch", "out"] * seen.count("launch")

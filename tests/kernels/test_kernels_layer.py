"""The whole layer on kernels, forward and every gradient, against fp64: no worse than the eager twin."""

from dataclasses import replace
from pathlib import Path

import fmoe_kernels
import kernel_cases
import pytest
import torch
from fmoe_kernels import reference
from fmoe_kernels.programs import dact, dw, gmm, up
from fmoe_kernels.programs.scalars import SCALARS
from kernel_cases import DEVICE, Case, no_worse, run

DTYPES = pytest.mark.parametrize("dtype", kernel_cases.DTYPES, ids=str)

CASES = {name: Case(activation=name) for name in SCALARS} | {
    "clamped off": Case(activation="swiglu_oai", limit=0.0),
    "biases": Case(bias=True),
    "biases, interleaved, after down": Case(activation="quick_geglu", bias=True, after=True),
    "biases, not gated": Case(activation="relu2", bias=True),
    "after down": Case(after=True),
    "in out": Case(order="in out", bias=True),
    "interleaved, in out": Case(activation="quick_geglu", order="in out"),
    "one token": Case(T=1, masked=False, bias=True),
    "one expert": Case(E=1, routing="even"),
    "all to one": Case(routing="skew", T=40, bias=True),
    "none anywhere": Case(routing="none", bias=True),
    "no tokens": Case(T=0, bias=True),
    "odd sizes": Case(D=17, I=9, T=21, bias=True),
    "exact tiles": Case(D=32, I=32, T=32, K=2, E=2, routing="even", masked=False),
    "many experts": Case(E=40, T=30, K=4, D=16, I=16),
}


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_against_fp64(name: str, dtype: torch.dtype) -> None:
    no_worse(run(fmoe_kernels.experts, CASES[name], dtype), CASES[name], dtype)


@pytest.mark.parametrize("name", ["biases", "biases, interleaved, after down", "odd sizes"])
def test_bf16_against_fp64(name: str) -> None:
    no_worse(run(fmoe_kernels.experts, CASES[name], torch.bfloat16), CASES[name], torch.bfloat16)


@DTYPES
def test_on_average_errors_are_no_larger_than_the_twins(dtype: torch.dtype) -> None:
    """Without a factor: over draws of several layers, the mean square error of every tensor."""
    ours, theirs = ({name: 0.0 for name in kernel_cases.NAMES} for _ in range(2))
    for name in ("biases", "biases, interleaved, after down", "biases, not gated", "in out"):
        for seed in (1, 2):
            case = replace(CASES[name], seed=seed)
            exact, twin = (run(reference.experts, case, d) for d in (torch.float64, dtype))
            found = run(fmoe_kernels.experts, case, dtype)
            for n in exact:
                ours[n] += kernel_cases.error(found[n], exact[n]) ** 2
                theirs[n] += kernel_cases.error(twin[n], exact[n]) ** 2
    assert all(ours[n] <= theirs[n] for n in ours), {n: (ours[n] / theirs[n]) ** 0.5 for n in ours}


TILES = {
    "descriptors": dict(tma=True),
    "descriptors, cut epilogue": dict(tma=True, parts=2),
    "cut epilogue": dict(parts=4),
    "swapped": dict(swap=True),
    "swapped, descriptors": dict(swap=True, tma=True, parts=4),
}


@DTYPES
@pytest.mark.parametrize("name", TILES)
def test_every_path_is_no_worse(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    table = kernel_cases.table(tmp_path, **TILES[name])
    even = Case(D=24, I=16, bias=True)  # rows of 16 bytes: descriptors can be made
    for case in (even, replace(even, activation="quick_geglu", order="in out"), Case(activation="relu2", D=23, I=13)):
        no_worse(run(fmoe_kernels.experts, case, dtype, table=table), case, dtype)


def test_descriptors_are_made_where_rows_are_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for module in (up, gmm, dact, dw):
        real = module.run
        monkeypatch.setattr(module, "run", lambda *a, real=real, **k: (seen.append(k["TMA"]), real(*a, **k)))
    table = kernel_cases.table(tmp_path, tma=True)
    for D, expected in ((24, True), (23, False)):
        run(fmoe_kernels.experts, Case(D=D, I=16 if expected else 17), torch.float16, table=table)
        assert seen == [expected] * 6
        seen.clear()


@pytest.mark.parametrize("table", ["", "tma"])
def test_runs_repeat_to_the_bit(table: str, tmp_path: Path) -> None:
    case = Case(bias=True, activation="geglu", D=24, I=16)
    path = kernel_cases.table(tmp_path, tma=True) if table else ""
    first, second = (run(fmoe_kernels.experts, case, torch.float16, table=path) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_recompute_changes_no_bit() -> None:
    case = Case(bias=True, activation="quick_geglu")
    kept, again = (run(fmoe_kernels.experts, case, torch.float16, recompute=r) for r in (False, True))
    for name in kept:
        assert torch.equal(kept[name], again[name]), name


def test_batch_invariant_rows_do_not_depend_on_their_neighbours() -> None:
    case = Case(T=40, masked=False, routing="even")
    (x, weights, w_up, w_down, *_), indices, _ = kernel_cases.tensors(case, torch.float16, torch.float32)
    layer = lambda n: fmoe_kernels.experts(x[:n], indices[:n], weights[:n], None, w_up, w_down, batch_invariant=True)
    assert torch.equal(layer(40)[:3], layer(3))


def test_wide_result_is_not_rounded() -> None:
    (x, weights, w_up, w_down, *_), indices, mask = kernel_cases.tensors(Case(), torch.float16, torch.float32)
    wide = fmoe_kernels.experts(x, indices, weights, mask, w_up, w_down, wide=True)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.half(), fmoe_kernels.experts(x, indices, weights, mask, w_up, w_down))


def test_a_share_of_the_experts() -> None:
    (x, weights, w_up, w_down, *_), indices, mask = kernel_cases.tensors(Case(), torch.float32, torch.float32)
    layer = lambda a, b: fmoe_kernels.experts(x, indices, weights, mask, w_up[a:b], w_down[a:b], start=a)
    torch.testing.assert_close(layer(0, 2) + layer(2, 5), layer(0, 5))


def test_fp64_is_the_eager_twin() -> None:
    case = Case(bias=True)
    found, exact = (run(f, case, torch.float64) for f in (fmoe_kernels.experts, fmoe_kernels.reference.experts))
    for name in found:
        assert torch.equal(found[name], exact[name])


def test_weights_that_need_no_gradient_cost_none(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, weights, w_up, w_down, *_), indices, mask = kernel_cases.tensors(Case(), torch.float32, torch.float32)
    from fmoe_kernels.ops import custom as ops

    monkeypatch.setattr(ops, "dw", None)  # would fail if called
    x.requires_grad_()
    fmoe_kernels.experts(x, indices, weights, mask, w_up, w_down).nansum().backward()
    assert x.grad is not None and w_up.grad is None


def test_saved_for_backward_is_x_z_routing_and_weights() -> None:
    case = Case(masked=False, D=24, I=16, T=32)
    (x, weights, w_up, w_down, *_), indices, _ = kernel_cases.tensors(case, torch.float16, torch.float32)
    saved: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (w_up, w_down)}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    w_up.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        fmoe_kernels.experts(x, indices, weights, None, w_up, w_down)
    rows = case.T * case.K
    assert sum(saved.values()) <= 2 * case.T * case.D + 4 * rows * case.I + 24 * rows


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(activation="gelu"), "activation is 'gelu', expected one of swiglu, "),
        (dict(w_up=torch.ones(5, 24, 41, device=DEVICE)), r"w_up is \[5, 24, 41\], expected \[E D U\] = \[5, 24, 40\]"),
        (dict(mask=torch.ones(3, dtype=torch.bool, device=DEVICE)), r"mask is \[3\], expected \[T\] = \[13\]"),
        (dict(indices=torch.ones(13, 3, device=DEVICE)), "indices is torch.float32"),
        (dict(x=torch.ones(13, 24, dtype=torch.int32, device=DEVICE)), "x is torch.int32"),
    ],
)
def test_errors_name_what_is_wrong(change: dict, says: str) -> None:
    (x, weights, w_up, w_down, *_), indices, mask = kernel_cases.tensors(Case(), torch.float32, torch.float32)
    arguments = dict(x=x, indices=indices, weights=weights, mask=mask, w_up=w_up, w_down=w_down) | change
    with pytest.raises(ValueError, match=says):
        fmoe_kernels.experts(**arguments)

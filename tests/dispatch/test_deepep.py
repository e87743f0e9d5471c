"""The dispatcher `deepep`. L0: logic. L1: a strict simulator, on threads and processes. L2: published signatures.

L3, on a GPU with DeepEP itself (`gpu_deep_ep.py`), and L4, on several, have not been run.

The simulator's `exact` mode carries fp64 in rows of any width, so that parity is asked to 1e-12: it checks where rows
and gradients go. Everything else here is bf16 within all limits.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import dispatchers
import distributed
import naive
import published
import pytest
import test_dispatch
import threads
import torch
import torch.distributed as dist
from dispatchers import CASES, CONFIG, WAYS, Off, batch, grads, of_rank, share
from hypothesis import given, settings
from simulate_deep_ep import installed
from test_dispatch import Case, cases, laws
from torch import Tensor
from torch.utils import _pytree as pytree

import fmoe
from fmoe import MoEConfig, Routing
from fmoe.dispatch import deepep, deepep_wire
from fmoe.dispatch.deepep import Plan, _back, _forth, _plan
from fmoe.dispatch.local import local
from fmoe.dispatch.pair import pair

KINDS = ("buffer", "elastic")
each_kind = pytest.mark.parametrize("kind", KINDS)
PLAN = {"buffer": ["get_dispatch_layout", "dispatch"], "elastic": ["dispatch"]}
WIDE = MoEConfig(n_routed_experts=8, n_activated_experts=3, dim=256, moe_inter_dim=8, expert_bias=True)


def distinct(indices: Tensor) -> Tensor:
    """An expert that a token names again becomes -1."""
    K = indices.shape[1]
    before = torch.tril(torch.ones(K, K, dtype=torch.bool), -1)
    return indices.masked_fill(((indices[:, :, None] == indices[:, None]) & before).any(2), -1)


def once(change: Callable[..., None]) -> Callable[..., None]:
    def changed(x: Tensor, indices: Tensor, weights: Tensor, mask: Tensor) -> None:
        change(x, indices, weights, mask)
        indices.copy_(distinct(indices))

    return changed


# V2 takes no expert twice of one token; V1 does
DISTINCT = {f"{name}, once": (lengths, once(change)) for name, (lengths, change) in CASES.items()}
CASES_OF = {"buffer": CASES, "elastic": DISTINCT}


@pytest.fixture(autouse=True, scope="module")
def cases_by_name() -> Iterator[None]:
    dispatchers.CASES = CASES | DISTINCT
    yield
    dispatchers.CASES = CASES


def parity(kind: str, ways: tuple[str, ...] = tuple(WAYS)) -> list[Off]:
    """`dispatchers.parity`, of an installed simulator."""
    R, rank, found = dist.get_world_size(), dist.get_rank(), list[Off]()
    with deepep(None, CONFIG, max_tokens=32, api=kind) as d:
        for case, way in product(CASES_OF[kind], ways):
            lengths, x, routing, r = batch(case, R)
            params = share(naive.draw(CONFIG), R, rank)
            x, r, *routed = of_rank((x, r, *routing), lengths, rank)
            for key, t in grads(WAYS[way](d), params, x, Routing(*routed), r).items():
                whole = dispatchers.expected(case, R)[key]
                right = share({key: whole}, R, rank)[key] if key in params else of_rank([whole], lengths, rank)[0]
                size = max(float(right.abs().max()), 1.0) if t.numel() else 1.0
                found.append(Off(case, way, key, float((t - right).norm()) / size))
    return found


def parity_of_a_process(ways: tuple[str, ...]) -> list[Off]:
    dispatchers.CASES, found = CASES | DISTINCT, list[Off]()
    for kind in KINDS:
        with installed(kind, exact=True):
            found += parity(kind, ways)
    return found


def check(ranks: list[list[Off]], n_ways: int) -> None:
    for rank, found in enumerate(ranks):
        assert len(found) == len(CASES) * n_ways * (1 + 2 + 4)
        wrong = [off for off in found if not off.off <= 1e-12]
        assert not wrong, f"rank {rank}: {len(wrong)} of {len(found)}, such as {wrong[:3]}"


@each_kind
@pytest.mark.parametrize("R", [2, *(pytest.param(R, marks=pytest.mark.slow) for R in (4, 8))])
def test_L1_a_group_is_one_device(kind: str, R: int) -> None:
    with installed(kind, exact=True) as world:
        check(threads.run(parity, R, kind), len(WAYS))
    assert sorted(world.destroyed) == list(range(R))


@pytest.mark.parametrize("R, ways", [(2, ("plain", "recompute")), pytest.param(4, tuple(WAYS), marks=pytest.mark.slow)])
def test_L1_a_group_of_processes_is_one_device(R: int, ways: tuple[str, ...]) -> None:
    check(distributed.run(parity_of_a_process, R, ways, timeout=240), 2 * len(ways))


def test_L1_the_buffer_of_one_rank_which_a_gpu_alone_could_run() -> None:
    """What `gpu_deep_ep.py` does: V2 takes one rank, which `deepep` gives `local`."""

    def run() -> None:
        x, routing = lone(5)
        with pair(deepep_wire.Wire(None, WIDE, 8, "elastic", {}), Plan, _plan, _forth, _back) as d:
            plan, other = d.plan(routing, WIDE), local.plan(routing, WIDE)
            for mine, right in zip(
                d.dispatch(x, routing.weights, plan), local.dispatch(x, routing.weights, other), strict=True
            ):
                assert torch.equal(mine, right)

    with installed("elastic"):
        threads.run(run, 1)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws of `test_dispatch`, of a dispatcher that is made for a config."""

    def everywhere(kind: str, drawn: list[Case], law: Any) -> list[Any]:
        def run() -> Any:
            case = drawn[dist.get_rank()]
            K = case.routing.indices.shape[1]
            E = max(case.config.n_routed_experts, K)  # K may be more than E; a buffer is made for as many
            made = replace(case.config, n_activated_experts=min(K, E))
            with deepep(None, made, max_tokens=8, api=kind) as comm:
                return law(comm, case)

        with installed(kind, exact=True):
            return threads.run(run, len(drawn))

    monkeypatch.setattr(test_dispatch, "everywhere", everywhere)


def fits(draw: Callable[[int], list[Case]], kind: str) -> Callable[[int], list[Case]]:
    def one(case: Case) -> Case:
        (indices, weights, mask), config, x, _ = case
        E = config.n_routed_experts
        indices, weights = indices[:, :E], weights[:, :E]
        indices = distinct(indices) if kind == "elastic" else indices
        n = ((indices >= 0) & (indices < E) & (True if mask is None else mask[:, None])).sum(1)
        return Case(Routing(indices, weights, mask), config, x, n)

    return lambda R: [one(case) for case in draw(R)]


LAWS = ("transposes", "combine_of_dispatch_counts_the_copies", "rows_are_sorted_by_expert_and_carry_their_weight")


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("R", [2, 4])
@each_kind
@settings(laws, max_examples=20)
@given(draw=cases())
def test_L1_the_laws(kind: str, R: int, law: str, draw: Any) -> None:
    """Those of every dispatcher: transposes, copies counted, rows sorted in the order of one device."""
    getattr(test_dispatch, f"test_{law}").hypothesis.inner_test(kind, R, fits(draw, kind))


@pytest.mark.usefixtures("everywhere")
@each_kind
def test_L1_torch_func_grad_and_its_own_grad(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {kind: lambda group: deepep(group, CONFIG, max_tokens=8)}
    monkeypatch.setattr(test_dispatch, "DISPATCHERS", made)
    monkeypatch.setattr(test_dispatch, "batch", lambda name, R: batch(f"{name}, once", R))
    with installed(kind, exact=True):
        test_dispatch.test_func_grad_is_backward(kind)


def train(kind: str, way: str) -> list[str]:
    """The calls of rank 0 in one step."""

    def run() -> None:
        lengths, x, routing, r = batch("nowhere, once", 2)
        x, r, *routed = of_rank((x, r, *routing), lengths, dist.get_rank())
        with deepep(None, CONFIG, max_tokens=8) as d:
            grads(WAYS[way](d), share(naive.draw(CONFIG), 2, dist.get_rank()), x, Routing(*routed), r)

    with installed(kind, exact=True) as world:
        threads.run(run, 2)
    assert world.of(0) == world.of(1)
    return world.of(0)


@each_kind
@pytest.mark.parametrize("way", WAYS)
def test_L1_a_layout_is_made_once_and_every_step_replays_it(kind: str, way: str) -> None:
    again = {
        "recompute": ["cached", "combine"],
        "checkpoint": ["cached"],
        "checkpoint, reentrant": ["cached", "combine"],
    }
    forward = [*PLAN[kind], "cached", "combine"]
    assert train(kind, way) == [*forward, *again.get(way, []), "cached", "combine", "destroy"]


def lone(T: int, K: int = 3, seed: int = 0) -> tuple[Tensor, Routing]:
    generator = torch.Generator().manual_seed(seed + 17 * T)
    ids = torch.rand(T, WIDE.n_routed_experts, generator=generator).argsort(1)[:, :K]
    x = torch.randn(T, WIDE.dim, generator=generator).bfloat16()
    return x, Routing(ids, torch.rand(T, K, generator=generator), torch.rand(T, generator=generator) < 0.8)


@each_kind
@pytest.mark.parametrize("lengths", [(5, 3), (0, 4), (0, 0)])
def test_L1_in_bf16_within_every_limit(kind: str, lengths: tuple[int, ...]) -> None:
    """Rounded once per rank and once more: y and gradients to 1e-2 of those of one device, fp32 weights and all."""
    params = {name: p * 0.3 for name, p in naive.draw(WIDE, torch.float32).items()}
    batches = [lone(T, seed=rank) for rank, T in enumerate(lengths)]

    def run() -> dict[str, Tensor]:
        rank = dist.get_rank()
        x, routing = batches[rank]
        with deepep(None, WIDE, max_tokens=8) as d:
            layer = partial(fmoe.experts, config=WIDE, dispatcher=d, backend="loop")
            return grads(lambda p, x, r: layer(p, x, r), share(params, 2, rank), x, routing, torch.ones_like(x))

    with installed(kind):
        found = threads.run(run, 2)
    x, routing = (
        torch.cat([x for x, _ in batches]),
        Routing(*map(torch.cat, zip(*(r for _, r in batches), strict=True))),
    )
    layer = partial(fmoe.experts, config=WIDE, backend="loop")
    right = grads(lambda p, x, r: layer(p, x, r), params, x, routing, torch.ones_like(x))
    for name, t in right.items():
        mine = torch.cat([theirs[name] for theirs in found])
        assert mine.dtype == t.dtype and not mine.isnan().any()
        naive.near(mine, t, 1e-2)


@each_kind
def test_L1_weights_cross_bit_by_bit_and_foreign_ones_stay_unseen(kind: str) -> None:
    """fp32 weights of rows in bf16, none of them a weight of another rank's expert; sums of a rank in fp32."""

    def run() -> None:
        rank = dist.get_rank()
        x, routing = lone(6, seed=rank)
        with deepep(None, WIDE, max_tokens=8) as d:
            plan = d.plan(routing, WIDE)
            rows = d.dispatch(x, routing.weights, plan)
            assert rows.weights.dtype == torch.float32 and rows.x.dtype == torch.bfloat16
            everyone: list[Any] = [None, None]
            dist.all_gather_object(everyone, (x, routing))
            sent = [
                (int(e), float(w), xs[t].tolist())
                for xs, (ids, ws, mask) in everyone
                for t in range(6)
                for e, w in zip(ids[t], ws[t], strict=True)
                if mask[t] and e // 4 == rank
            ]
            expert = torch.arange(4).repeat_interleave(rows.counts) + 4 * rank
            got = list(zip(expert.tolist(), rows.weights.tolist(), rows.x.tolist(), strict=True))
            assert got == sorted(sent, key=lambda row: row[0])
            one = d.combine(torch.ones(len(rows.x), 256), plan)
            assert torch.equal(one[:, 0], 3.0 * routing.mask) and one.dtype == torch.float32

    with installed(kind):
        threads.run(run, 2)


@each_kind
def test_L1_sums_of_one_rank_are_fp32_in_both_directions(kind: str) -> None:
    """256 + 1 + 1 is 256 when bf16 rounds after every addition, 258 in fp32; 256.75 + 0.75, when it rounds before."""
    r = torch.tensor([[256.0], [1.0], [1.0]]).expand(3, 256).bfloat16()
    wide = torch.tensor([[256.75], [0.75], [0.0]]).expand(3, 256)

    def run() -> None:
        mine = dist.get_rank() == 0
        routing = Routing(torch.tensor([[0, 1, 2]])[: int(mine)], torch.ones(1, 3)[: int(mine)])
        x = torch.ones(int(mine), 256, dtype=torch.bfloat16, requires_grad=True)
        with deepep(None, WIDE, max_tokens=8) as d:
            plan = d.plan(routing, WIDE)
            rows = d.dispatch(x, routing.weights, plan)
            y = d.combine(r[: len(rows.x)], plan)
            before = d.combine(wide[: len(rows.x)], plan)
            (dx,) = torch.autograd.grad(rows.x, x, r[: len(rows.x)])
            assert not mine or (y[0, 0].item(), before[0, 0].item(), dx[0, 0].item()) == (258, 258, 258)

    with installed(kind):
        threads.run(run, 2)


@each_kind
def test_L1_a_plan_is_a_value(kind: str) -> None:
    """A pytree of integers that holds the handle: another of the same leaves gives the same rows, and no layout."""

    def run() -> None:
        x, routing = lone(6, seed=dist.get_rank())
        weights = routing.weights.requires_grad_()
        with deepep(None, WIDE, max_tokens=8) as d:
            plan, other = d.plan(routing, WIDE), d.plan(lone(5, seed=9)[1], WIDE)
            leaves, spec = pytree.tree_flatten(plan)
            assert all(isinstance(t, Tensor) and not t.is_floating_point() and not t.requires_grad for t in leaves)
            again = pytree.tree_unflatten([t.clone() for t in leaves], spec)
            first, second = (d.dispatch(x, weights, p) for p in (plan, again))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            assert torch.equal(d.combine(first.x, again), d.combine(first.x, plan))
            assert other.n_rows != plan.n_rows or not torch.equal(other.slot_ids, plan.slot_ids)

    with installed(kind) as world:
        threads.run(run, 2)
    assert world.of(0).count("dispatch") == 2


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "width, V2": ("elastic", dict(dim=2880), "rows of D=2880, expected a multiple of 256"),
    "width, V1": ("buffer", dict(dim=24), "rows of D=24, expected a multiple of 16"),
    "K": ("elastic", dict(n_activated_experts=33, n_routed_experts=64), "K=33, expected at most 32"),
    "E": ("buffer", dict(n_routed_experts=7), "7 experts on 2 ranks, expected E % ranks == 0"),
    "dtype": ("elastic", dict(dtype="float32"), "config.dtype torch.float32, expected torch.bfloat16"),
}


def said(f: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, RuntimeError, ImportError)) as error:
        f()
    return f"{error.type.__name__}: {error.value}"


@pytest.mark.parametrize("what", REFUSED)
def test_L1_limits_are_told_on_every_rank_before_anything_is_made(what: str) -> None:
    kind, change, told = REFUSED[what]
    with installed(kind) as world:
        for text in threads.run(lambda: said(lambda: deepep(None, replace(WIDE, **change))), 2):
            assert text.startswith("ValueError: deepep: V") and told in text and "all_to_all takes any" in text
    assert not world.calls


def test_L1_the_number_of_ranks_is_a_limit_of_v1() -> None:
    with installed("buffer"):
        for text in threads.run(lambda: said(lambda: deepep(None, replace(WIDE, n_routed_experts=6))), 3):
            assert "3 ranks, expected one of 2, 4, 8, 16, 24" in text
    with installed("elastic"):
        threads.run(lambda: deepep(None, replace(WIDE, n_routed_experts=6)).close(), 3)


@each_kind
def test_L1_what_a_buffer_was_not_made_for(kind: str) -> None:
    def run() -> dict[str, str]:
        x, routing = lone(4)
        twice = routing._replace(indices=routing.indices[:, :1].expand(-1, 3), mask=None)
        with deepep(None, WIDE, max_tokens=8) as d:
            plan = d.plan(routing, WIDE)
            rows = d.dispatch(x, routing.weights, plan)
            found = {
                "T is 9, expected at most max_tokens=8": said(lambda: d.plan(lone(9)[1], WIDE)),
                "K is 4, expected at most 3": said(lambda: d.plan(lone(4, 4)[1], WIDE)),
                "E is 16, expected 8": said(lambda: d.plan(routing, replace(WIDE, n_routed_experts=16))),
                "D is 512, expected 256": said(lambda: d.plan(routing, replace(WIDE, dim=512))),
                "weights are torch.float64": said(
                    lambda: d.plan(routing._replace(weights=routing.weights.double()), WIDE)
                ),
                "x is torch.float32 [4, 256], the plan was made for": said(
                    lambda: d.dispatch(x.float(), routing.weights, plan)
                ),
                "plan is a Plan of fmoe.dispatch.local": said(lambda: d.combine(rows.x, local.plan(routing, WIDE))),
            }
            if kind == "elastic":
                found["a token names an expert twice"] = said(lambda: d.plan(twice, WIDE))
            else:  # both ranks have sent the same
                assert d.plan(twice, WIDE).n_rows == 2 * int((twice.indices // 4 == dist.get_rank()).sum())
            assert d.dispatch(x, routing.weights, plan).x.equal(rows.x), "nothing of it harms the next step"
        closed = "it is closed: make another, or close it later"
        found[closed] = said(lambda: d.plan(routing, WIDE)).replace("RuntimeError", "ValueError", 1)
        d.close()
        return found

    with installed(kind) as world:
        for found in threads.run(run, 2):
            for told, text in found.items():
                assert text.startswith("ValueError: deepep: ") and told in text, text
    assert sorted(world.destroyed) == [0, 1], "freed once"


def test_L1_ranks_that_disagree_all_raise_and_so_they_do_for_one_that_cannot() -> None:
    def run(*configs: dict[str, Any]) -> str:
        rank = dist.get_rank()
        how = dict(configs[rank])
        return said(lambda: deepep(None, replace(WIDE, **how.pop("config", {})), **how))

    with installed("elastic", "buffer"):
        for text in threads.run(run, 2, {}, dict(max_tokens=64)):
            assert "ValueError: deepep: the ranks disagree, by rank, on max_tokens: [8192, 64]" in text
        for text in threads.run(run, 2, {}, dict(api="buffer", config=dict(dim=512))):
            assert "library: ['elastic', 'buffer'], and on D: [256, 512]" in text
        first, second = threads.run(run, 2, {}, dict(config=dict(dim=24)))
        assert first.startswith("RuntimeError: deepep: it cannot be made on rank 1: deepep: V2 (ElasticBuffer) cannot")
        assert second.startswith("ValueError: deepep: V2 (ElasticBuffer) cannot take rows of D=24")


def test_L1_the_generation_is_told_by_what_the_module_has() -> None:
    def made(**how: Any) -> None:
        deepep(None, WIDE, **how).close()

    for kinds, how, first in (
        (("buffer", "elastic"), {}, "ElasticBuffer.__init__"),
        (("buffer", "elastic"), dict(api="buffer"), "Buffer.__init__"),
        (("buffer",), {}, "Buffer.__init__"),
    ):
        with installed(*kinds) as world:
            threads.run(partial(made, deterministic=True) if first[0] == "E" else partial(made, **how), 2)
        assert world.calls[0][1] == first and world.calls[0][2].get("deterministic", True)
    for kinds, how, told in (
        (("buffer",), dict(api="elastic"), "ImportError: deepep: <module 'deep_ep'> has buffer; build it"),
        ((), {}, "has neither Buffer nor ElasticBuffer"),
        (("buffer",), dict(api="hybrid"), "'hybrid' (HybridEPBuffer), which is not supported: it drops rows"),
        (("buffer",), dict(api="v3"), "api is 'v3', expected 'elastic' (V2), 'buffer' (V1) or None"),
    ):
        with installed(*kinds):
            assert told in threads.run(lambda how=how: said(lambda: deepep(None, WIDE, **how)), 2)[0]


def test_L1_a_failed_call_ends_it_and_frees_nothing() -> None:
    def fails(self: Any, **_: Any) -> None:
        raise AssertionError("timed out")

    def run() -> tuple[str, str]:
        (x, routing), d = lone(4), deepep(None, WIDE, max_tokens=8)
        plan = d.plan(routing, WIDE)
        dist.barrier()
        sys.modules["deep_ep"].ElasticBuffer.dispatch = fails  # type: ignore[attr-defined]
        dist.barrier()
        first = said(lambda: d.dispatch(x, routing.weights, plan))
        second = said(lambda: d.plan(routing, WIDE))
        d.close()
        return first, second

    with installed("elastic") as world:
        for first, second in threads.run(run, 2):
            assert first.startswith("RuntimeError: deepep: dispatch: failed on rank ") and "timed out" in first
            assert "an earlier call failed on rank" in second
    assert not world.destroyed, "freeing waits for ranks that may be gone"


def test_L1_the_one_mode_of_torch_that_deepep_refuses() -> None:
    def run() -> str:
        with deepep(None, WIDE, max_tokens=8) as d:
            torch.utils.deterministic.fill_uninitialized_memory = True
            dist.barrier()
            text = said(lambda: d.plan(lone(4)[1], WIDE))
            dist.barrier()
            torch.utils.deterministic.fill_uninitialized_memory = False
            return text

    with installed("elastic"):
        assert torch.are_deterministic_algorithms_enabled()
        assert "fill_uninitialized_memory is on: set that to False" in threads.run(run, 2)[0]


@each_kind
def test_L2_every_call_binds_to_what_was_published(kind: str) -> None:
    """The simulator binds each call to the signature recorded from 2.1.0, and takes keywords alone."""

    def run() -> None:
        x, routing = lone(4, seed=dist.get_rank())
        with deepep(None, WIDE, max_tokens=8) as d:
            layer = partial(fmoe.experts, config=WIDE, dispatcher=d, backend="loop")
            grads(lambda p, x, r: layer(p, x, r), share(naive.draw(WIDE), 2, dist.get_rank()), x, routing, x)

    with installed(kind) as world:
        threads.run(run, 2)
    name = {"buffer": "Buffer.", "elastic": "ElasticBuffer."}[kind]
    recorded = {f for f in published.recorded()["sgl_deep_ep-0.1.2.post1"] if f.startswith(name) and "_config" not in f}
    assert {f for _, f, _ in world.calls} == recorded
    spec = find_spec("deep_ep")
    for root in map(Path, (spec.submodule_search_locations or ()) if spec else ()):  # nothing to read where it is not
        for file, names in published.CALLED["sgl_deep_ep"].items():
            theirs = published.parsed((root.parent / file).read_text(), names) if (root.parent / file).exists() else {}
            for _, f, how in world.calls:
                if f in theirs:
                    published.signature(theirs[f]).bind(**how)


@pytest.mark.parametrize("error", ["RuntimeError", "OSError", "AssertionError", "ImportError"])
def test_L0_the_reason_of_a_failed_import_is_kept(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep_ep.py").write_text(f"raise {error}('libcuda.so.1: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    text = said(deepep_wire.deep_ep)
    assert (
        text.startswith(f"ImportError: deepep cannot run here: {error}: libcuda") and "pip install sgl-deep-ep" in text
    )
    text = threads.run(lambda: said(lambda: deepep(None, WIDE)), 2)[1]
    assert text.startswith(f"ImportError: deepep cannot run here: {error}: libcuda")


def test_L0_one_rank_is_local_and_needs_nothing() -> None:
    assert "deep_ep" not in sys.modules
    assert threads.run(lambda: deepep(None, replace(CONFIG, dim=7)) is local, 1) == [True]
    assert said(lambda: deepep(None, CONFIG)).startswith("RuntimeError: deepep: no process group")


@pytest.mark.parametrize("D, K", [(2048, 8), (7168, 8), (2880, 4), (256, 1), (6, 3)])
def test_L0_rows_have_room_for_the_bits_of_their_weights(D: int, K: int) -> None:
    width = deepep_wire.columns(D, K)
    assert 0 <= width - (D + 2 * K) < 16 and width * 2 % 32 == 0

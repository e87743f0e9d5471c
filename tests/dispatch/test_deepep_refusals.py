"""The dispatcher `deepep`: limits, ranks that disagree, calls that fail, each told on every rank."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import threads
import torch
import torch.distributed as dist
from deepep_cases import WIDE, each_kind, lone, said
from simulate_deep_ep import installed

from fmoe.dispatch import deepep, deepep_wire
from fmoe.dispatch.local import local

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "width, V2": ("elastic", dict(dim=2880), "rows of D=2880, expected a multiple of 256"),
    "width, V1": ("buffer", dict(dim=24), "rows of D=24, expected a multiple of 16"),
    "K": ("elastic", dict(n_activated_experts=33, n_routed_experts=64), "K=33, expected at most 32"),
    "E": ("buffer", dict(n_routed_experts=7), "7 experts on 2 ranks, expected E % ranks == 0"),
    "dtype": ("elastic", dict(dtype="float32"), "config.dtype torch.float32, expected torch.bfloat16"),
}


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

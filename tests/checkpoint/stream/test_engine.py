"""Jobs of any size give the same bytes: what the plan gives, for rules of anyone's."""

import importlib
import tempfile
from pathlib import Path

import hf_synthetic as synthetic
import pytest
import tiny
import torch
from copies import by_engine
from drawn import adapters
from hypothesis import given, settings
from hypothesis import strategies as st
from test_flow import LAYOUTS, drawn
from tiny import CHOICES, FAMILIES

import fmoe
from fmoe.checkpoint.stream.arrange import ranges
from fmoe.checkpoint.stream.boxes import LARGE, Place, box, jobs
from fmoe.checkpoint.stream.engine import LIMIT
from fmoe.testing import checkpoints, family_checkpoints, rules, same, tensors

LIMITS = (8, 24, 64, 1000, LIMIT)


def agree(plan, held, limit=64, threads=1, shift=0):
    with tempfile.TemporaryDirectory() as folder:
        made, engine = by_engine(plan, held, Path(folder), limit, threads, shift)
    same(made, plan.run(held))
    return engine


@given(st.data())
def test_random_rules_in_jobs_of_any_size(data):
    dtype = data.draw(st.sampled_from([torch.int8, torch.bfloat16, torch.float32, torch.int64]))
    adapter = data.draw(rules())
    specs = {n: s._replace(dtype=dtype) for n, s in data.draw(checkpoints(adapter)).items()}
    held = tensors(specs)
    if data.draw(st.booleans()):
        held, adapter = adapter.from_hf(held, copy=True), adapter.inverse
    agree(adapter.plan(held), held, data.draw(st.sampled_from(LIMITS)), shift=data.draw(st.integers(0, 3)))


@given(st.data())
def test_whatever_a_user_builds_in_jobs_of_any_size(data):
    plan, held = drawn(data, data.draw(adapters()))
    agree(plan, held, data.draw(st.sampled_from(LIMITS)), shift=data.draw(st.integers(0, 3)))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10)
@given(data=st.data())
def test_every_family_in_jobs_of_any_size_both_ways(family, data):
    adapter, specs = data.draw(family_checkpoints(family, **CHOICES.get(family, {})))
    adapter, held = adapter.resolve(specs), tensors(specs)
    limit, shift = data.draw(st.sampled_from(LIMITS)), data.draw(st.integers(0, 3))
    agree(adapter.plan(held), held, limit, shift=shift)
    native = adapter.from_hf(held)
    agree(adapter.inverse.plan(native), native, limit, shift=shift)


OWN = {  # what no family does: stacked innermost, interleaved, in ragged parts, cut in the middle, whole axes apart
    "innermost": (fmoe.rule("w.{e} [d i]", "w [d i e]"), {f"w.{e}": (5, 7) for e in range(6)}),
    "innermost of vectors": (fmoe.rule("w.{e} [d]", "w [d e]"), {f"w.{e}": (3,) for e in range(70)}),
    "in the middle": (fmoe.rule("w.{e} [d i]", "w [i e d]"), {f"w.{e}": (5, 7) for e in range(6)}),
    "interleaved": (fmoe.rule("{g=a|b|c} [i d]", "w [d (i g)]"), dict.fromkeys("abc", (9, 5))),
    "ragged": (fmoe.rule("{p=q|k|v} [p d]", "w [d (q|k|v)]", q=7, k=3), {"q": (7, 6), "k": (3, 6), "v": (2, 6)}),
    "digits": (fmoe.rule("w [(a b) (c d)]", "v [(d b) (a c)]", a=3, c=4, d=7), {"w": (15, 28)}),
    "apart": (fmoe.rule("w [(g i) (e d)]", "w.{e}.{g=a|b} [d i]", e=3), {"w": (14, 33)}),
    "scalars": (fmoe.rule("w.{e} []", "w [e]"), {f"w.{e}": () for e in range(100)}),
    "nothing": (fmoe.rule("w.{e} [d i]", "w [d e i]") | fmoe.keep("{rest}"), {"w.0": (0, 7), "w.1": (0, 7), "n": ()}),
    "side by side": (fmoe.rule("a.{rest}", "b.{rest}"), {f"a.{i}": (i,) for i in range(9)}),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.float32, torch.float16, torch.float64],
    ids=str,
)
def test_rules_of_ones_own_in_jobs_of_any_size(name, dtype):
    adapter, shapes = OWN[name]
    held = tensors({n: fmoe.TensorSpec(shape, dtype) for n, shape in shapes.items()})
    native = adapter.from_hf(held)
    for limit in LIMITS:
        for shift in (0, 1):
            agree(adapter.plan(held), held, limit, shift=shift)
            agree(adapter.inverse.plan(native), native, limit, shift=shift)


def test_large_transpositions_in_jobs_of_any_size():
    """Sizes at which runs are worth a read of their own, and holes are not."""
    adapter = fmoe.rule("w.{e}.{g=a|b} [i d]", "w [e d (i g)]") | fmoe.rule("v [i d]", "v [d i]")
    held = tensors({f"w.{e}.{g}": fmoe.TensorSpec((200, 129), torch.float32) for e in range(2) for g in "ab"})
    held |= tensors({"v": fmoe.TensorSpec((9001, 5), torch.bfloat16)})
    native = adapter.from_hf(held)
    for limit in (20_000, 150_000, LIMIT):
        for there, given_ in ((adapter, held), (adapter.inverse, native)):
            engine = agree(there.plan(given_), given_, limit, threads=4)
            assert max(item.nbytes for item in engine.items) <= LARGE * limit


@pytest.mark.parametrize("family", LAYOUTS)
@settings(max_examples=10)
@given(data=st.data())
def test_one_layout_to_another_in_jobs_of_any_size(family, data):
    layouts = data.draw(st.permutations(LAYOUTS[family]))
    a, b = (fmoe.families.family(family).adapter(None, layout=layout) for layout in layouts)
    specs = {n: spec for n, spec in data.draw(checkpoints(a)).items() if not n.endswith("bias")}
    held = tensors(specs)
    agree((a >> b.inverse).plan(held), held, data.draw(st.sampled_from(LIMITS)))


def test_values_that_change_are_computed_for_what_takes_them_and_for_a_range():
    config, held = synthetic.deepseek_v3_fp8(**tiny.TINY | {"n_routed_experts": 4, "n_group": 2})
    adapter = fmoe.adapter(config["model_type"], config).resolve(held)
    for window in ({}, {"e": range(1, 3)}):
        for limit in (64, LIMIT):
            native = adapter.from_hf(held, **window)
            engine = agree(adapter.plan(held, **window), held, limit, threads=4)
            used = sum(len(job.steps) for job in engine.items)
            expected = [n for n in adapter.plan(held, **window).sources if n + "_scale_inv" in held]
            assert used == len(expected) == len({i for job in engine.items for i in job.steps})
            back = adapter.inverse._plan(native, window, frozenset(window))
            agree(back, native, limit, threads=4)
            # a job holds what one expert's matrices come to, and no more
            assert max(len(job.steps) for job in engine.items) <= 2


def test_jobs_are_the_same_every_time_and_cover_the_files_in_order():
    specs = {}
    for e in range(16):
        specs |= {f"l.0.mlp.experts.{e}.{p}_proj.weight": ((20, 12), torch.bfloat16) for p in ("gate", "up")}
        specs |= {f"l.0.mlp.experts.{e}.down_proj.weight": ((12, 20), torch.bfloat16)}
    adapter, held = fmoe.adapter("per_expert"), {n: fmoe.TensorSpec(*s) for n, s in specs.items()}
    with tempfile.TemporaryDirectory() as folder:
        first, again = (
            by_engine(adapter.plan(held), tensors(held), Path(folder) / str(i), 2000)[1].items for i in range(2)
        )
    assert first == again
    whole = [b for job in first for b in job.boxes]
    assert sum(b.nbytes for b in whole) == sum(job.nbytes for job in first)
    assert [min(b.at for b in job.boxes) for job in first if job.boxes[0].source.name == "0.safetensors"] == sorted(
        min(b.at for b in job.boxes) for job in first if job.boxes[0].source.name == "0.safetensors"
    )


def test_runs_that_lie_side_by_side_on_both_ends_are_one():
    a, b = Place("a"), Place("b")
    sizes = [5, 300, 2, 7, 100]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    runs = [box(a, b, (n,), at, (1,), 50 + at, (1,), 1) for n, at in zip(sizes, starts, strict=True)]
    (job,) = jobs(runs, 1000)
    assert job.boxes == (box(a, b, (sum(sizes),), 0, (1,), 50, (1,), 1),)
    cut = [b for job in jobs(runs, 100) for b in job.boxes]
    assert [(b.at, b.nbytes) for b in cut] == [(0, 100), (100, 100), (200, 100), (300, 100), (400, 14)]


def test_boxes_that_lie_among_each_other_are_one_job_and_one_write():
    a, b = Place("a"), Place("b")
    rows = lambda n, to_at: box(a, b, (n, 2), 100 * to_at, (2, 1), to_at, (4, 1), 1)
    nested = [rows(50, 0), rows(2, 2), rows(5, 150), box(a, b, (4, 2), 9000, (2, 1), 1000, (3, 1), 1)]
    first, last = sorted(jobs(nested, 10**6), key=lambda job: len(job.boxes))[::-1]
    assert {*first.boxes} == {*nested[:3]} and last.boxes == (nested[3],)
    found = list(ranges(nested, lambda b: (b.to, *b.to_span)))
    assert [(low, high, len(inside)) for low, high, inside in found] == [(0, 198, 3), (1000, 1011, 1)]


def test_an_interleaved_stack_is_read_once_and_written_with_few_calls(monkeypatch):
    module, calls = importlib.import_module("fmoe.checkpoint.stream.engine"), []
    write, read_ = module.write_at, module.disk.read_at
    monkeypatch.setattr(module, "write_at", lambda *args: (calls.append("write"), write(*args)))
    monkeypatch.setattr(module.disk, "read_at", lambda *args: (calls.append("read"), read_(*args)))
    adapter = fmoe.adapter("per_expert")
    shapes = {"gate": (30, 20), "up": (30, 20), "down": (20, 30)}
    held = {f"l.0.mlp.experts.{e}.{p}_proj.weight": torch.randn(s) for e in range(4) for p, s in shapes.items()}
    native = adapter.from_hf(held)
    engine = agree(adapter.plan(held), held, 10_000)  # which runs it twice, as it says
    assert calls.count("write") == 2 * 2 * 4 and engine.read == engine.written
    calls.clear()
    engine = agree(adapter.inverse.plan(native), native, 10_000)
    assert calls.count("read") <= 2 * 2 * 4 and engine.read == engine.written


def test_what_lies_among_what_is_left_out_is_taken_alone():
    adapter = fmoe.rule("w [d (i g)]", "{g=a|b|c} [i d]")
    held = {"w": torch.randn(20, 90)}
    for limit in (64, 4000, LIMIT):
        for window in ({"g": range(0, 2)}, {"g": range(1, 3)}, {"i": range(3, 11)}, {"d": range(4, 6)}):
            agree(adapter.plan(held, **window), held, limit)

"""The eager routing: golden vector C2 of the specification, and what holds for every routing."""

import torch
from fmoe_kernels import reference
from hypothesis import given, settings
from hypothesis import strategies as st


def test_golden_c2() -> None:
    indices = torch.tensor([[0, 5], [5, 4], [7, 5], [4, 6]])
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]])
    rows = reference.route(indices, weights, torch.tensor([1, 1, 0, 1]).bool(), n_experts=4, start=4)
    assert rows.token_ids.tolist() == [1, 3, 0, 1, 3]
    assert rows.slot_ids.tolist() == [3, 6, 1, 2, 7]
    torch.testing.assert_close(rows.weights, torch.tensor([0.4, 0.7, 0.2, 0.3, 0.8]))
    assert rows.counts.tolist() == [2, 2, 1, 0]
    assert rows.offsets.tolist() == [2, 4, 5, 5]
    dtypes = [t.dtype for t in rows]
    assert dtypes == [torch.int64, torch.int64, torch.float32, torch.int64, torch.int32]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_rows_are_the_kept_slots_in_stable_order(data: st.DataObject) -> None:
    T, K, E = (data.draw(st.integers(0, 5)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)))
    start = data.draw(st.integers(0, 3))
    ids = data.draw(st.lists(st.integers(-2, E + 4), min_size=T * K, max_size=T * K))
    keep = data.draw(st.lists(st.booleans(), min_size=T, max_size=T))
    dtype = data.draw(st.sampled_from([torch.int64, torch.int32, torch.int16]))
    weights = torch.arange(T * K, dtype=torch.float64).view(T, K)
    indices = torch.tensor(ids, dtype=dtype).view(T, K)
    rows = reference.route(indices, weights, torch.tensor(keep, dtype=torch.bool), E, start)

    kept = [s for s, e in enumerate(ids) if keep[s // K] and start <= e < start + E]
    slots = sorted(kept, key=lambda s: ids[s])  # python's sort is stable
    assert rows.slot_ids.tolist() == slots
    assert rows.token_ids.tolist() == [s // K for s in slots]
    assert rows.weights.dtype == torch.float64 and rows.weights.tolist() == slots
    assert rows.counts.tolist() == [sum(ids[s] == start + e for s in slots) for e in range(E)]
    assert rows.offsets.tolist() == rows.counts.cumsum(0).tolist()


def test_weights_widen_and_differentiate() -> None:
    weights = torch.rand(3, 2, dtype=torch.bfloat16, requires_grad=True)
    rows = reference.route(torch.tensor([[0, 1], [1, 9], [0, 0]]), weights, None, n_experts=2)
    assert rows.weights.dtype == torch.float32
    rows.weights.sum().backward()
    assert weights.grad is not None and weights.grad.tolist() == [[1, 1], [1, 0], [1, 1]]

"""Experts at the edges: nothing routed, few tokens, NaN where nobody should look, strides, dtypes, and errors."""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import draw, grads_of, near, tokens
from torch import Tensor

from fmoe.backends import BACKENDS
from fmoe.layer.experts import experts
from fmoe.types import MoEConfig, Routing

CONFIG = MoEConfig(n_routed_experts=5, n_activated_experts=3, dim=6, moe_inter_dim=4)
BIASED = replace(CONFIG, expert_bias=True)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
both_weightings = pytest.mark.parametrize("config", [BIASED, replace(BIASED, apply_router_weight_after_down=True)])

NO_ROWS = {
    "masked": lambda r: r._replace(mask=torch.zeros_like(r.mask)),
    "negative": lambda r: r._replace(indices=torch.full_like(r.indices, -1)),
    "foreign": lambda r: r._replace(indices=r.indices.abs() + 105),
}


@every_backend
@both_weightings
@pytest.mark.parametrize("why", NO_ROWS)
def test_no_rows_routed(why: str, config: MoEConfig, backend: str) -> None:
    params, (x, routing) = draw(config), tokens(config)
    y, grads = grads_of(experts, params, x.fill_(torch.nan), NO_ROWS[why](routing), config=config, backend=backend)
    assert torch.equal(y, torch.zeros_like(y))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())


@every_backend
@both_weightings
@pytest.mark.parametrize("T", [0, 1])
def test_few_tokens(T: int, config: MoEConfig, backend: str) -> None:
    params, (x, routing) = draw(config), tokens(config, T=T)
    y, grads = grads_of(experts, params, x, routing, config=config, backend=backend)
    assert y.shape == (T, 6)
    near(y, naive.experts(params, x, routing, config), 1e-13)
    assert T or not any(g.any() for g in grads.values())


@every_backend
@both_weightings
def test_unused_experts_have_zero_gradients_and_are_not_read(config: MoEConfig, backend: str) -> None:
    params, (x, routing) = draw(config), tokens(config)
    routing = routing._replace(indices=torch.full_like(routing.indices, 2))
    for p in params.values():
        p[3].fill_(torch.nan)
    y, grads = grads_of(experts, params, x, routing, config=config, backend=backend)
    near(y, naive.experts(params, x, routing, config), 1e-13)
    for name in params:
        assert grads[name][2].any()
        assert not grads[name][[0, 1, 3, 4]].any()


@every_backend
@both_weightings
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_routed_never_leaks(poison: float, config: MoEConfig, backend: str) -> None:
    """Rows 4 (masked) and 5 (foreign ids) and every weight that is not used: bitwise as if they were zero."""
    params, (x, routing) = draw(config), tokens(config)
    routing.indices[5] = torch.tensor([-1, 5, 105])
    unused = ~((routing.indices >= 0) & (routing.indices < 5) & routing.mask[:, None])

    def run(value: float) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.zeros(9, 1, dtype=torch.bool)
        rows[4:6] = True
        sent = routing._replace(weights=routing.weights.masked_fill(unused, value))
        return grads_of(experts, params, x.masked_fill(rows, value), sent, config=config, backend=backend)

    (y, grads), (clean, clean_grads) = run(poison), run(0.0)
    assert y.isfinite().all() and torch.equal(y, clean) and not y[4:6].any()
    for name in grads:
        assert grads[name].isfinite().all() and torch.equal(grads[name], clean_grads[name])
    assert not grads["x"][4:6].any() and not grads["weights"][unused].any()


@every_backend
@both_weightings
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_repetition_changes_no_bit_and_strides_nothing_but_rounding(
    dtype: torch.dtype, config: MoEConfig, backend: str
) -> None:
    config = replace(config, dim=128, moe_inter_dim=64)
    params, (x, routing) = draw(config, dtype), tokens(config, T=12, dtype=dtype)
    views = {name: p.mT.contiguous().mT if p.ndim == 3 else p for name, p in params.items()}
    assert not views["down_projs"].is_contiguous()
    run = lambda params: experts(MappingProxyType(params), x, routing, config, backend=backend)
    before = {name: p.clone() for name, p in params.items()}
    assert torch.equal(run(params), run(params)) and torch.equal(run(views), run(views))
    near(run(views), run(params), {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype])
    assert all(torch.equal(p, before[name]) for name, p in params.items())
    first, again = (grads_of(experts, views, x, routing, config=config, backend=backend)[1] for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@every_backend
@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(5)), seed=st.integers(0, 99), after=st.booleans())
def test_relabelling_experts_changes_nothing(backend: str, order: list[int], seed: int, after: bool) -> None:
    config = replace(BIASED, apply_router_weight_after_down=after)
    params, (x, routing) = draw(config, seed=seed), tokens(config, seed=seed)
    renamed = {name: p[order] for name, p in params.items()}
    where = torch.tensor(order).argsort()
    new = routing.indices.clone()
    own = (new >= 0) & (new < 5)
    new[own] = where[new[own]]
    y = experts(params, x, routing, config, backend=backend)
    torch.testing.assert_close(experts(renamed, x, routing._replace(indices=new), config, backend=backend), y)


@every_backend
@both_weightings
def test_mixed_dtypes_compute_in_that_of_x(config: MoEConfig, backend: str) -> None:
    """fp32 master weights under bf16 tokens are bf16 weights; bf16 weights under fp64 tokens are exact."""
    params, (x, routing) = draw(config, torch.float32), tokens(config, dtype=torch.bfloat16)
    cast = {name: p.bfloat16() for name, p in params.items()}
    run = lambda params, x: experts(params, x, routing, config, backend=backend)
    assert torch.equal(run(params, x), run(cast, x))
    near(run(cast, x.double()), naive.experts(cast, x, routing, config), 1e-13)
    assert grads_of(experts, params, x, routing, config=config, backend=backend)[1]["down_projs"].dtype == torch.float32


def test_routing_weights_are_fp32_and_sums_round_once() -> None:
    """With relu2(1) = 1 and down = 1: 0.5 + 256 + 1 is 256 if bf16 ever rounds on the way, 258 if at the end."""
    config = MoEConfig(n_routed_experts=3, n_activated_experts=3, dim=1, moe_inter_dim=1, expert_activation="relu2")
    params = {"gate_and_up_projs": torch.ones(3, 1, 1), "down_projs": torch.ones(3, 1, 1)}
    x, indices = torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([[0, 1, 2]])
    for after in (False, True):
        weights = torch.tensor([[256.0, 0.5, 1.0]])
        at = replace(config, apply_router_weight_after_down=after)
        assert experts(params, x, Routing(indices, weights), at).item() == 258
    # 1 + 2^-9 is no bf16: rounded with the activation by default, kept by weights after down; sums keep 2^-8 * 1.5
    weights = torch.tensor([[1 + 2**-9, 1 + 2**-9, 2**-8 * 1.5]])
    assert experts(params, x, Routing(indices, weights), config).item() == 2
    assert experts(params, x, Routing(indices, weights), at).item() == 2 + 2**-6


def test_backend_is_a_name_a_function_or_the_default() -> None:
    params, (x, routing) = draw(CONFIG), tokens(CONFIG)
    y = experts(params, x, routing, CONFIG)
    assert torch.equal(y, experts(params, x, routing, CONFIG, backend=None))
    assert torch.equal(y, experts(params, x, routing, CONFIG, backend=BACKENDS["loop"]))
    assert not experts(params, x, routing, CONFIG, backend=lambda params, rows, config: 0 * rows.x).any()
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of loop"):
        experts(params, x, routing, CONFIG, backend="cuda")


def wrong(match: str, params: dict[str, Tensor] | None = None, config: MoEConfig = CONFIG, **changes: Any) -> None:
    x, routing = tokens(CONFIG)
    routing = routing._replace(**{name: t for name, t in changes.items() if name != "x"})
    with pytest.raises(ValueError, match=match):
        experts(draw(CONFIG) if params is None else params, changes.get("x", x), routing, config)


def test_errors_name_the_parameter_what_was_found_and_what_was_expected() -> None:
    good = draw(CONFIG)
    wrong(
        r"unknown parameter 'lora_down', expected only gate_and_up_projs, down_projs",
        good | {"lora_down": torch.ones(5, 4, 2)},
    )
    wrong(
        r"'down_projs' is missing, expected shape \[E=5, I=4, D=6\]", {"gate_and_up_projs": good["gate_and_up_projs"]}
    )
    wrong(
        r"'down_projs' has shape \[5, 6, 4\], expected \[E=5, I=4, D=6\]", good | {"down_projs": good["down_projs"].mT}
    )
    wrong(
        r"'gate_and_up_projs' has shape \[5, 6, 8\], expected \[E=5, D=6, U=4\]",
        config=replace(CONFIG, expert_activation="relu2"),
    )
    wrong(r"'gate_up_proj_bias' is missing, expected shape \[E=5, U=8\]", config=BIASED)
    wrong(r"'down_proj_bias' has shape \[6\], expected \[E=5, D=6\]", good | {"down_proj_bias": torch.ones(6)})
    wrong(r"\[E=7, D=6, U=8\]", config=replace(CONFIG, n_routed_experts=7))
    with pytest.raises(ValueError, match="expert_activation is 'silu', expected one of swiglu"):
        replace(CONFIG, expert_activation="silu")
    wrong(r"x is float32 \[9, 5\], expected floating \[T, D=6\]", x=torch.ones(9, 5))
    wrong(r"x is float32 \[1, 9, 6\]", x=torch.ones(1, 9, 6))
    wrong(r"x is int64 \[9, 6\]", x=torch.ones(9, 6, dtype=torch.int64))
    wrong(
        r"routing.indices is int64 \[8, 3\], expected integer \[T=9, K\]", indices=torch.ones(8, 3, dtype=torch.int64)
    )
    wrong(r"routing.indices is float32", indices=torch.ones(9, 3))
    wrong(r"routing.weights is float32 \[9, 2\], expected floating \[9, 3\]", weights=torch.ones(9, 2))
    wrong(r"routing.mask is bool \[3\], expected bool \[T=9\]", mask=torch.ones(3, dtype=torch.bool))
    wrong(r"routing.mask is int64 \[9\]", mask=torch.ones(9, dtype=torch.int64))

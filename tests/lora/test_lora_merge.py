"""LoRA matrices as numbers: merged, differentiated, run, and drawn."""

from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive import tokens
from torch import Tensor

import fmoe
from fmoe.testing import same


def weights(dtype: torch.dtype, scale: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    made = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(s, generator=made, dtype=torch.float64)
    params = {
        "l.gate_and_up_projs": draw(3, 6, 8).mT.contiguous().mT,
        "l.down_projs": draw(3, 4, 6),
        "q.weight": draw(5, 6),
    }
    lora = {
        "l.lora_gate_and_up_A": draw(3, 6, 2),
        "l.lora_gate_and_up_B": draw(3, 2, 8),
        "l.lora_down_A": draw(3, 4, 2),
    }
    lora |= {"l.lora_down_B": draw(3, 2, 6), "q.lora_A.weight": draw(2, 6), "q.lora_B.weight": draw(5, 2)}
    cast = lambda d, by: {n: (by * t).to(dtype) for n, t in d.items()}
    return cast(params | {"norm": draw(6)}, 1.0), cast(lora, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@given(scale=st.sampled_from([0.5, -2.0, 1e-3, 37.0]))
def test_merge_is_rounded_once_and_unmerge_within_its_bound(dtype, scale):
    params, lora = weights(dtype)
    merged = fmoe.lora.merge(MappingProxyType(params), MappingProxyType(lora), scale)
    again = fmoe.lora.unmerge(merged, {f"base_model.model.{n}": t for n, t in lora.items()}, scale)
    pairs = {"l.gate_and_up_projs": "l.lora_gate_and_up_", "l.down_projs": "l.lora_down_"}
    deltas = {n: scale * lora[p + "A"].double() @ lora[p + "B"].double() for n, p in pairs.items()}
    deltas["q.weight"] = scale * lora["q.lora_B.weight"].double() @ lora["q.lora_A.weight"].double()
    assert merged["norm"] is params["norm"] and merged.keys() == params.keys()
    eps = torch.finfo(dtype).eps
    for n, delta in deltas.items():
        exact = params[n].double() + delta
        assert merged[n].dtype == dtype and merged[n].stride() == params[n].stride()
        wide = 2.0**-22 * (params[n].double().abs() + delta.abs() * 2 * lora["l.lora_down_A"].shape[-1])
        ulp = torch.maximum(exact.abs(), exact.abs()) * eps / 2 + (wide if dtype != torch.float32 else 2.0**-48)
        assert bool(((merged[n].double() - exact).abs() <= ulp + torch.finfo(dtype).smallest_normal).all())
        bound = eps * (params[n].double().abs() + delta.abs())
        assert bool(((again[n].double() - params[n].double()).abs() <= bound).all())
        assert not torch.equal(merged[n], params[n]) or abs(scale) < 1e-2
    same(params, weights(dtype)[0])


def test_merge_refuses_what_it_cannot_add():
    params, lora = weights(torch.float32)
    for wrong, text in (
        ({n: t for n, t in lora.items() if n != "l.lora_down_B"}, "stands alone, expected 'l.lora_down_B'"),
        ({n.replace("l.", "m."): t for n, t in lora.items() if "down" in n}, "has no weight 'm.down_projs'"),
        (lora | {"l.lora_down_A": torch.ones(3, 5, 2)}, "do not fit"),
        (lora | {"q.lora_magnitude_vector": torch.ones(2)}, "cannot be merged"),
        (lora | {"l.lora_down_A": torch.ones(3)}, r"'l.lora_down_A' is \[3\] and .*expected \[E, in, r\] and"),
        (lora | {"l.lora_down_B": torch.ones(3, 5, 6)}, r"\[3, 5, 6\], expected \[E, in, r\] and"),
        (lora | {"l.lora_down_B": torch.ones(2, 2, 6)}, r"\[2, 2, 6\], expected \[E, in, r\] and"),
        (lora | {"l.lora_gate_and_up_A": torch.ones(3, 6, 3, 2)}, r"expected \[E, in, r\] and"),
        (lora | {"q.lora_B.weight": torch.ones(5)}, r"\[5\], expected \[r, in\] and \[out, r\]"),
        (
            lora | {"l.lora_down_A": lora["l.lora_down_A"].to(torch.int8)},
            "'l.lora_down_A' is torch.int8, expected plain",
        ),
        (lora | {"l.lora_down_B": lora["l.lora_down_B"].to("meta")}, "'l.lora_down_B' is on meta, .*one device"),
        (lora | {"l.lora_down_A": "a name"}, "'l.lora_down_A'. is a str .*, expected Tensor"),
        ([], r"lora= is a list, expected Mapping\[str, Tensor\]"),
    ):
        with pytest.raises(fmoe.AdapterError, match=text):
            fmoe.lora.merge(params, wrong, 1.0)
    with pytest.raises(fmoe.AdapterError, match="'l.lora_gate_and_up_A' is .*, expected a finite number"):
        fmoe.lora.merge(params, lora, float("inf"))
    for wrong in (float("nan"), "1", None, True):
        with pytest.raises(fmoe.AdapterError, match="scale= is .*, expected float"):
            fmoe.lora.merge(params, lora, wrong)
    for r, told in ((0, "a positive int"), (-1, "a positive int"), ("2", "int"), (2.0, "int")):
        with pytest.raises(fmoe.AdapterError, match=f"r=? is .*, expected {told}"):
            fmoe.lora.init(params, r)
    with pytest.raises(fmoe.AdapterError, match=r"'down_projs' is \[2\], expected \[E, in, out\]"):
        fmoe.lora.init({"down_projs": torch.ones(2)}, 2)
    with pytest.raises(ValueError, match="torch.float8_e4m3fn, expected plain floats"):
        fmoe.lora.merge(params | {"l.down_projs": params["l.down_projs"].to(torch.float8_e4m3fn)}, lora, 1.0)
    with pytest.raises(ValueError, match="no scale is given for 'q.lora_A.weight'"):
        fmoe.lora.merge(params, lora, {n: 1.0 for n in lora if n.startswith("l.")})
    with pytest.raises(ValueError, match="kind is 'normal'"):
        fmoe.lora.init(params, 2, "normal")


@pytest.mark.parametrize("kind", ["xavier", "kaiming"])
def test_a_seed_draws_the_same_whatever_the_order_of_params(kind):
    stacks = {"gate_and_up_projs": (3, 4, 6), "down_projs": (3, 3, 4)}
    params = {f"layers.{l}.{n}": torch.ones(shape) for l in (0, 2, 10) for n, shape in stacks.items()}
    drawn = lambda names: fmoe.lora.init({n: params[n] for n in names}, 2, kind, generator=torch.manual_seed(0))
    want = drawn(params)
    for names in (sorted(params), list(params)[::-1]):
        made = drawn(names)
        assert list(made) == list(want) and all(torch.equal(t, want[n]) for n, t in made.items())


def test_merge_differentiates():
    params, lora = weights(torch.float32)
    f = lambda lora: sum(t.square().sum() for t in fmoe.lora.merge(params, lora, 0.5).values())
    names = {"l.gate_and_up_projs": "l.lora_gate_and_up", "l.down_projs": "l.lora_down"}
    g = lambda lora: sum((params[w] + 0.5 * lora[f"{n}_A"] @ lora[f"{n}_B"]).square().sum() for w, n in names.items())
    mine = {n: t for n, t in lora.items() if n.startswith("l.")}
    found, wanted = torch.func.grad(f)(mine), torch.func.grad(g)(mine)
    for n in wanted:
        torch.testing.assert_close(found[n], wanted[n])


CONFIG = fmoe.MoEConfig(n_routed_experts=5, n_activated_experts=3, dim=6, moe_inter_dim=4, expert_bias=True)


@pytest.mark.parametrize("act", ["swiglu", "quick_geglu", "relu2"])
def test_experts_with_lora_are_those_of_merged_weights(act):
    """Gate and up with matrices A of their own, a rank and a scale for each: `even` and `merge` agree, and experts."""
    from naive import draw

    config = replace(CONFIG, expert_activation=act)
    params, (x, routing) = draw(config), tokens(config)
    E, D, I, U = 5, 6, 4, 4 if act == "relu2" else 8
    made = torch.Generator().manual_seed(1)
    new = lambda *s: 0.3 * torch.randn(s, generator=made, dtype=torch.float64)
    A = new(E, D, 3) if act == "relu2" else new(E, D, 2, 3)
    lora = {
        "lora_gate_and_up_A": A,
        "lora_gate_and_up_B": new(E, 3, U),
        "lora_down_A": new(E, I, 2),
        "lora_down_B": new(E, 2, D),
    }
    scales = {"lora_gate_and_up_A": 2.0, "lora_down_A": 0.5}
    how = dict(interleaved=act == "quick_geglu")
    wanted = fmoe.experts(fmoe.lora.merge(params, lora, scales, **how), x, routing, config)
    even, alpha = fmoe.lora.even(lora, scales, **how)
    found = fmoe.experts(params | even, x, routing, config, lora_alpha=alpha)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    if act != "relu2":
        assert even["lora_gate_and_up_A"].shape == (E, D, 6) and even["lora_down_A"].shape == (E, I, 6)
        gate, up = (
            slice(0, None, 2) if how["interleaved"] else slice(0, I),
            slice(1, None, 2) if how["interleaved"] else slice(I, None),
        )
        whole = fmoe.lora.lift(lora, **how)
        delta = whole["lora_gate_and_up_A"] @ whole["lora_gate_and_up_B"]
        for k, columns in enumerate((gate, up)):
            assert torch.allclose(
                delta[..., columns], A[:, :, k] @ lora["lora_gate_and_up_B"][..., columns], rtol=1e-14
            )
        with pytest.raises(ValueError, match="fmoe.lora.even"):
            fmoe.experts(params | lora, x, routing, config)
        other = fmoe.lora.merge(params, lora, scales, interleaved=not how["interleaved"])
        assert not torch.allclose(fmoe.experts(other, x, routing, config), wanted)
    plain = {n: t for n, t in lora.items() if "down" in n}
    same(fmoe.lora.even(plain, 8.0)[0], plain)
    assert fmoe.lora.even(plain, 8.0)[1] == 16.0


def test_a_frozen_base_gives_gradients_for_lora_alone():
    from naive import draw

    params, (x, routing) = draw(CONFIG), tokens(CONFIG)
    lora = {
        n: t.requires_grad_() for n, t in fmoe.lora.init(params, 2, generator=torch.Generator().manual_seed(0)).items()
    }
    fmoe.experts(params | lora, x, routing, CONFIG).square().sum().backward()
    assert all(t.grad is None for t in params.values())
    for name, t in lora.items():
        assert t.grad is not None and bool(t.grad.abs().max() > 0) == name.endswith("_B")


@pytest.mark.parametrize("kind", ["xavier", "kaiming"])
def test_init_has_the_fans_of_one_expert(kind):
    params = {
        "a.gate_and_up_projs": torch.empty(40, 64, 32),
        "a.down_projs": torch.empty(40, 16, 64),
        "a.gate.weight": torch.empty(40, 64),
    }
    lora = fmoe.lora.init(params, 8, kind, torch.float32, torch.Generator().manual_seed(0))
    for name, n, out in ("gate_and_up", 64, 32), ("down", 16, 64):
        A, B = lora[f"a.lora_{name}_A"], lora[f"a.lora_{name}_B"]
        assert A.shape == (40, n, 8) and B.shape == (40, 8, out) and not B.any()
        std = (2 / (n + 8)) ** 0.5 if kind == "xavier" else (1 / 3 / n) ** 0.5
        assert abs(A.std() / std - 1) < 0.05 and (kind == "xavier" or A.abs().max() <= n**-0.5)
    assert len(lora) == 4
    with pytest.raises(ValueError, match="no parameter is called"):
        fmoe.lora.init({"norm": torch.ones(2)}, 2)

"""LoRA matrices in files: laws for every family and both forms, what must be refused, and the algebra of merging."""

from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive import tokens
from tiny import FAMILIES as KINDS
from torch import Tensor, einsum

import fmoe
from fmoe.families import FAMILIES
from fmoe.layout.names import Names, patterns
from fmoe.lowrank.derive import CURRENT
from fmoe.lowrank.stage import is_lora
from fmoe.lowrank.targets import table_of
from fmoe.testing import assert_laws, same
from fmoe.types import TensorSpec

SIZES = dict(E=3, D=10, I=7, r=2)
VERSIONS = ("0.18.1", "0.19.0", "0.19.1", CURRENT)
PREFIX = "base_model.model.model."


def sized(name: str, E: int, D: int, I: int, **_: int) -> dict[str, Any]:
    """A config that says these sizes under the family's own names."""
    fields, sizes = FAMILIES[name].fields, dict(n_routed_experts=E, dim=D, moe_inter_dim=I, n_activated_experts=1)
    said = {fields[f].split()[0]: n for f, n in sizes.items() if f in fields}
    return {f.partition(".")[0]: [n, n] if "." in f else n for f, n in said.items()}


@cache
def adapter_of(name: str, **choices: Any) -> fmoe.Adapter:
    return FAMILIES[name].adapter(sized(name, **SIZES), **{"lora_r": SIZES["r"]} | choices)


def forms(name: str) -> list[str]:
    return ["peft", "per-expert"] if table_of(adapter_of(name)).forms.wrappers else ["per-expert"]


@cache
def stems(name: str, form: str = "per-expert") -> tuple[tuple[str, bool], ...]:
    """The native prefixes that a form of a family's LoRA matrices goes to, for layer 3; and whether they are gated."""
    table = table_of(adapter_of(name))
    rules = table.forms.peft(CURRENT, "both") if form == "peft" else table.forms.per_expert
    found: dict[str, bool] = {}
    for rule in rules:
        pattern = patterns(rule)[1]
        if pattern.address.name.endswith("lora_gate_and_up_B"):
            values = {n: PREFIX if n == "pre" else 3 for n in pattern.address.captures}
            found[pattern.render(values).rpartition(".")[0]] = "g" in pattern.address.atoms
    return tuple(found.items())


def native(name: str, form: str = "per-expert", apart: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Drawn native LoRA matrices. apart: gate and up with matrices A of their own."""
    E, D, I, r = SIZES.values()
    made = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {f"{PREFIX}layers.3.self_attn.q_proj.lora_A.weight": torch.randn(r, D, generator=made)}
    for stem, gated in stems(name, form):
        shapes = {
            "gate_and_up_A": (E, D, 2, r) if apart and gated else (E, D, r),
            "gate_and_up_B": (E, r, I * (1 + gated)),
        }
        shapes |= {"down_A": (E, I, r), "down_B": (E, r, D)}
        found |= {f"{stem}.lora_{n}": torch.randn(s, generator=made) for n, s in shapes.items()}
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_from_hf_and_to_hf_are_inverse_in_every_form(name):
    """Drawn matrices, through each form and each orientation, and back: bit for bit, resolved and open, pure."""
    for form in forms(name):
        for version in VERSIONS if form == "peft" and name in KINDS else (CURRENT,):
            for apart in (False, True) if form == "per-expert" else (False,):
                params = MappingProxyType(native(name, form, apart))
                opened = adapter_of(name, peft_version=version)
                files = MappingProxyType(opened.choose(lora=form).to_hf(params))
                same(opened.from_hf(files), params)
                found = opened.resolve(files)
                same(found.to_hf(params), files)
                same(found.inverse.inverse.from_hf(files), params)
                assert (
                    opened.from_hf({n: TensorSpec(tuple(t.shape), t.dtype) for n, t in files.items()}).keys()
                    == params.keys()
                )
    default = adapter_of(name).to_hf(native(name, forms(name)[0]))
    same(default, adapter_of(name).choose(lora=forms(name)[0]).to_hf(native(name, forms(name)[0])))


@pytest.mark.parametrize("name", KINDS)
def test_every_law_of_adapters_holds_with_lora_tensors(name):
    for form in forms(name):
        for kind in ("shared", "separate") if form == "per-expert" and stems(name)[0][1] else (None,):
            adapter = adapter_of(name).choose(**({"lora_A": kind} if kind else {}))
            files = adapter.choose(lora=form).to_hf(native(name, form, apart=kind == "separate"))
            assert_laws(adapter, {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in files.items()})


@pytest.mark.parametrize("name", KINDS)
def test_every_mutation_is_an_error_that_names_the_key(name):
    for form in forms(name):
        for apart in (False, True) if form == "per-expert" and name == KINDS[0] else (False,):
            adapter = adapter_of(name)
            files = adapter.choose(lora=form).to_hf(native(name, form, apart))
            one_of_each = {template: rows.names[-1] for template, rows in Names(files).rows.items()}
            for key in (n for n in one_of_each.values() if "self_attn" not in n):
                tensor = files[key]
                others = {n: t for n, t in files.items() if n != key}
                wrongs = [others, others | {key: tensor.T}, others | {key: tensor.half()}, others | {key: tensor[:-1]}]
                wrongs += [others | {key.replace(".lora_", ".lore_"): tensor}, files | {key + "_too": tensor}]
                wrongs += [
                    others | {key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): tensor}
                ]
                for wrong in wrongs:
                    with pytest.raises(fmoe.AdapterError) as error:
                        adapter.from_hf(wrong)
                    named = set(error.value.keys)
                    assert key in named or named & (wrong.keys() - files.keys()), (key, error.value)


def test_lone_gates_lone_ups_and_experts_that_are_missing():
    adapter = adapter_of("qwen3_moe", lora="per-expert")
    files = adapter.to_hf(native("qwen3_moe"))
    for part in ("gate_proj", "up_proj"):
        for matrix in ("lora_A", "lora_B"):
            gone = [n for n in files if f"{part}.{matrix}" in n]
            with pytest.raises(fmoe.AdapterError, match="missing") as error:
                adapter.from_hf({n: t for n, t in files.items() if n not in gone})
            assert set(gone) <= set(error.value.keys)
    gone = [n for n in files if ".experts.2." in n]
    with pytest.raises(fmoe.AdapterError, match="missing") as error:
        adapter.from_hf({n: t for n, t in files.items() if n not in gone})
    assert {n for n in gone if "up_proj.lora_A" in n} <= set(error.value.keys)
    down = {n: t for n, t in files.items() if "down_proj" in n}
    assert {n.rpartition(".")[2] for n in adapter.from_hf(down)} == {"lora_down_A", "lora_down_B"}


def test_pairs_fit_and_forms_do_not_mix():
    adapter = adapter_of("qwen3_moe")
    stem = stems("qwen3_moe")[0][0]
    params = native("qwen3_moe")
    both = adapter.choose(lora="per-expert").to_hf(params) | adapter.to_hf(params)
    with pytest.raises(fmoe.AdapterError, match="two forms of LoRA at once"):
        adapter.from_hf(both)
    with pytest.raises(fmoe.AdapterError, match="two forms of LoRA at once"):
        adapter.resolve(both)
    for form in ("peft", "per-expert"):
        other = "peft" if form == "per-expert" else "per-expert"
        with pytest.raises(fmoe.AdapterError, match=f"the form '{form}', and lora='{other}' was chosen"):
            adapter.choose(lora=other).from_hf(adapter.choose(lora=form).to_hf(params))
        alone = {n: t for n, t in params.items() if not n.endswith("lora_down_B")}
        with pytest.raises(fmoe.AdapterError, match="stands without") as error:
            adapter.choose(lora=form).to_hf(alone)
        assert {f"{stem}.lora_down_A", f"{stem}.lora_down_B"} <= set(error.value.keys)
        wide = params | {f"{stem}.lora_down_B": torch.randn(3, 4, 10)}
        with pytest.raises(fmoe.AdapterError, match="rank 2 of 3 experts, and 4 of 3"):
            adapter.choose(lora=form).to_hf(wide)
    with pytest.raises(fmoe.AdapterError, match=r"fmoe.lora.lift\(params\) is exact"):
        adapter.to_hf(native("qwen3_moe", apart=True))
    for what, why in (dict(lora="vllm"), "lora='vllm'"), (dict(lora_A="both"), "lora_A='both'"):
        with pytest.raises(fmoe.AdapterError, match=why):
            adapter.choose(**what)
    loose = FAMILIES["qwen3_moe"].adapter()
    other = {n.replace("layers.3", "layers.4"): t[:2] for n, t in params.items() if "down" in n}
    files = loose.choose(lora="per-expert").to_hf({n: t for n, t in params.items() if "self_attn" not in n})
    with pytest.raises(fmoe.AdapterError, match="where .* has"):
        loose.from_hf(files | loose.choose(lora="per-expert").to_hf(other))


def test_values_settle_what_names_cannot_and_nothing_is_dropped():
    adapter = adapter_of("mixtral")
    files = adapter.choose(lora="per-expert").to_hf(native("mixtral"))
    stem = stems("mixtral")[0][0]
    ups = [n for n in files if ".w3.lora_A" in n]
    assert adapter.from_hf(files)[f"{stem}.lora_gate_and_up_A"].shape == (3, 10, 2)
    for change in (
        lambda t: t + 1,
        lambda t: torch.where(t == t.max(), torch.nan, t),
        lambda t: t.index_fill(0, torch.tensor(0), -0.0),
    ):
        zeros = {n: t.index_fill(0, torch.tensor(0), 0.0) if "lora_A" in n else t for n, t in files.items()}
        changed = zeros | {ups[1]: change(zeros[ups[1]])}
        params = adapter.from_hf(changed)
        assert params[f"{stem}.lora_gate_and_up_A"].shape == (3, 10, 2, 2)
        same(adapter.resolve(changed).to_hf(params), changed)
        with pytest.raises(fmoe.AdapterError, match="should be the same tensor") as error:
            adapter.choose(lora_A="shared").from_hf(changed)
        assert ups[1] in error.value.keys
    assert adapter.choose(lora_A="separate").from_hf(files)[f"{stem}.lora_gate_and_up_A"].shape == (3, 10, 2, 2)
    same(
        adapter.from_hf({n: t.to("meta") for n, t in files.items()}),
        {n: t.to("meta") for n, t in native("mixtral").items()},
    )


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text", "jetmoe"])
@pytest.mark.parametrize("version", VERSIONS)
def test_orientation_is_that_of_the_release(name, version):
    """delta = einsum(B, A) as that release has it, on square matrices too; computed here, not read off our rules."""
    sizes = dict(E=3, D=8, I=8, r=2) if name == "qwen3_moe" else SIZES
    adapter = FAMILIES[name].adapter(sized(name, **sizes), peft_version=version)
    params = {n: t for n, t in native(name, "peft").items() if "down" in n}
    E, D, I, r = sizes.values()
    if sizes is not SIZES:
        params = {n: torch.randn(E, I, r) if n.endswith("_A") else torch.randn(E, r, D) for n in params}
    delta = next(t for n, t in params.items() if n.endswith("_A")) @ next(
        t for n, t in params.items() if n.endswith("_B")
    )
    files = adapter.to_hf(params)
    A, B = (next(t for n, t in files.items() if f"lora_{m}" in n) for m in "AB")
    A, B = A.reshape(E, r, -1), B.reshape(-1, r, E)
    transposed = name in ("gpt_oss", "llama4_text")  # [experts, in, out]; Llama 4's module does not say so
    told = name == "gpt_oss"
    swap = {"0.18.1": False, "0.19.0": told}.get(version, not told)
    found = einsum("o r e, e r i -> e o i" if swap else "o r e, e r i -> e i o", B, A)
    torch.testing.assert_close(found, delta if transposed else delta.mT)


def test_versions_that_say_too_little_are_refused():
    for version in ("0.18.2.dev0@abc", "0.19.1.dev0", "new"):
        with pytest.raises(fmoe.AdapterError, match="peft_version"):
            adapter_of("qwen3_moe", peft_version=version)
    for version, like in ("0.18.0.rc0", "0.18.1"), ("0.19.2.dev0@1", CURRENT), ("1.0.0", CURRENT), ("0.17.1", "0.18.1"):
        params = native("qwen3_moe")
        same(*(adapter_of("qwen3_moe", peft_version=v).to_hf(params) for v in (version, like)))
    with pytest.raises(fmoe.AdapterError, match="expected names"):
        adapter_of("qwen3_moe", target_parameters="mlp.experts.down_proj")


def test_target_parameters_that_name_something_else():
    adapter = adapter_of("qwen3_moe")
    files = adapter.to_hf(native("qwen3_moe"))
    inner = {n for n in files if "base_layer" in n}
    for targets, why in (
        (["mlp.experts.down_proj"], "two wrappers, .* name down of its parameters"),
        (["mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj"], "wrap gate_up_proj_bias too"),
        (["other.down_proj"], "name none of its parameters"),
    ):
        given = dict(target_parameters=targets)
        if "two" in why:  # names prove it, and the config says otherwise
            given = dict(target_parameters=["layers.3.mlp.experts.down_proj"])
        with pytest.raises(fmoe.AdapterError, match=why) as error:
            adapter_of_fresh(**given).from_hf(
                files if "none" not in why else {n: t for n, t in files.items() if n not in inner}
            )
        assert error.value.keys


def adapter_of_fresh(**choices: Any) -> fmoe.Adapter:
    return FAMILIES["qwen3_moe"].adapter(sized("qwen3_moe", **SIZES), **choices)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_tensors_that_are_no_experts_pass_unchanged_and_nothing_is_quantised(name):
    """Reference item 55b: an export in FP8 leaves LoRA tensors, and their names, alone; so do the rules for weights."""
    ends = ("self_attn.q_proj", "mlp.gate_proj", "mlp.gate", "mlp.router", "mlp.shared_experts.up_proj", "norm_f")
    ends += ("mlp.shared_expert.up_proj", "block_sparse_moe.gate", "feed_forward.router", "mixer.in_proj", "moe.gate")
    heads = (PREFIX, "model.", "", "backbone.", "base_model.model.mtp.")
    made = {f"{h}layers.3.{e}.lora_{m}.weight": torch.randn(128, 128) for h in heads for e in ends for m in "AB"}
    made |= {f"{h}embed_tokens.lora_embedding_{m}": torch.randn(4, 4) for h in heads for m in "AB"}
    for form in forms(name)[:1]:
        params = native(name, form) | made
        adapter = adapter_of(name).choose(lora=form)
        plain = adapter.to_hf(params)
        for n, t in made.items():
            assert plain[n] is t
        same(adapter.from_hf(plain), params)
        if FAMILIES[name].fp8:
            same(adapter.to_hf(params, quantization=True), plain)


@pytest.mark.parametrize("form", ["peft", "per-expert"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "nemotron_h", "gpt_oss"])
def test_beside_base_weights(name, form):
    """One dict of both; the weights' layout and the matrices' form are found each for itself, and given back."""
    E, D, I, r = SIZES.values()
    adapter = adapter_of(name)
    stem, gated = stems(name)[0]
    weights = {"gate_and_up_projs": torch.randn(E, D, I * (1 + gated)), "down_projs": torch.randn(E, I, D)}
    weights |= (
        dict(gate_up_proj_bias=torch.randn(E, 2 * I), down_proj_bias=torch.randn(E, D)) if name == "gpt_oss" else {}
    )
    both = {f"{stem.removeprefix('base_model.model.')}.{n}": t for n, t in weights.items()} | native(name, form)
    layouts = next((o for s in adapter.stages for n, o in s.choices().items() if n == "layout"), (None,))
    for layout in layouts:
        files = adapter.choose(**({"layout": layout} if layout else {}), lora=form).to_hf(both)
        same(adapter.from_hf(files), both)
        same(adapter.resolve(files).to_hf(both), files)
        part = adapter.resolve(files).from_hf(files, e=range(1, 3))
        for n, t in part.items():
            assert torch.equal(t, both[n] if "self_attn" in n else both[n][1:3])


@pytest.mark.parametrize(("I", "part"), [(4, "gate_and_up"), (8, "down")])
def test_square_matrices_lie_as_declared(I, part):
    """U == D or I == D: the other release's A and B would fit, so only peft_version can say which they are."""
    E, D, r = 3, 8, 2
    shapes = dict(gate_and_up_A=(E, D, r), gate_and_up_B=(E, r, 2 * I), down_A=(E, I, r), down_B=(E, r, D))
    made = {f"{PREFIX}layers.0.mlp.experts.lora_{n}": torch.randn(s) for n, s in shapes.items() if part in n}
    told = [f"mlp.experts.{dict(gate_and_up='gate_up_proj', down='down_proj')[part]}"]
    config = sized("qwen3_moe", E, D, I)
    read = lambda v: FAMILIES["qwen3_moe"].adapter(config, peft_version=v, target_parameters=told)
    files = read("0.18.1").to_hf(made)
    same(read("0.18.1").from_hf(files), made)
    same(read("0.19.0").from_hf(files), made)
    other = read(CURRENT).from_hf(files)
    assert other.keys() == made.keys() and not any(torch.equal(t, made[n]) for n, t in other.items())


# merging


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
    ):
        with pytest.raises(ValueError, match=text):
            fmoe.lora.merge(params, wrong, 1.0)
    with pytest.raises(ValueError, match="torch.float8_e4m3fn, expected plain floats"):
        fmoe.lora.merge(params | {"l.down_projs": params["l.down_projs"].to(torch.float8_e4m3fn)}, lora, 1.0)
    with pytest.raises(ValueError, match="no scale is given for 'q.lora_A.weight'"):
        fmoe.lora.merge(params, lora, {n: 1.0 for n in lora if n.startswith("l.")})
    with pytest.raises(ValueError, match="kind is 'normal'"):
        fmoe.lora.init(params, 2, "normal")


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


# directories


def test_a_directory_is_checked_before_it_is_written_and_as_it_is_read(tmp_path):
    adapter = adapter_of("qwen3_moe")
    params = native("qwen3_moe") | {f"{PREFIX}layers.3.self_attn.q_proj.lora_B.weight": torch.randn(10, 2)}
    config = fmoe.lora.save(params, tmp_path / "a", adapter, lora_alpha=4, base="b")
    assert config.target_modules == ("model.layers.3.self_attn.q_proj",) and config.base == "b" and config.r == 2
    tuned = fmoe.lora.load(tmp_path / "a", adapter)
    same(tuned.params, params)
    assert tuned.config == replace(config, other=tuned.config.other)
    assert set(tuned.scales.values()) == {2.0} and len(tuned.scales) == 3
    with pytest.raises(fmoe.AdapterError, match="is there already: pass force=True"):
        fmoe.lora.save(params, tmp_path / "a", adapter)
    fmoe.lora.save(params, tmp_path / "a", adapter, config, force=True)
    same(fmoe.lora.load(tmp_path / "a", adapter).params, params)
    for wrong, how, why in (
        (params | {"model.norm.weight": torch.ones(2)}, {}, "no LoRA tensors"),
        (params, dict(config=replace(config, r=4)), "rank 2, and adapter_config.json says"),
        (params, dict(config=replace(config, target_parameters=())), "name none of its parameters"),
        ({n: t for n, t in params.items() if not n.endswith("_A")}, {}, "stands without"),
    ):
        with pytest.raises(fmoe.AdapterError, match=why):
            fmoe.lora.save(wrong, tmp_path / "c", adapter, **how)
        assert not (tmp_path / "c").exists()
    text = (tmp_path / "a" / "adapter_config.json").read_text()
    for old, new, why in (
        ('"LORA"', '"LOHA"', "peft_type 'LOHA'"),
        ('"r": 2', '"r": 3', "rank 2, and adapter_config.json says"),
        ('"r": 2', '"r": 0', "expected a positive int"),
        ('"bias"', '"use_dora": true, "bias"', "use_dora=True"),
        ('"r": 2', '"r": 2, "r": 2', "stands there twice"),
    ):
        (tmp_path / "a" / "adapter_config.json").write_text(text.replace(old, new))
        with pytest.raises(fmoe.AdapterError, match=why):
            fmoe.lora.load(tmp_path / "a", adapter)
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(fmoe.AdapterError, match="adapter_config.json is missing"):
        fmoe.lora.load(tmp_path / "a", adapter)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("version", ["0.18.1", CURRENT])
def test_every_family_through_a_directory(name, version, tmp_path):
    for form in forms(name):
        adapter = adapter_of(name, lora=form, peft_version=version)
        params = {n: t for n, t in native(name, form).items() if "self_attn" not in n}
        params = {n: t for n, t in params.items() if "gate_and_up" in n or form == "peft"}
        fmoe.lora.save(params, tmp_path / form, adapter)
        tuned = fmoe.lora.load(tmp_path / form, adapter_of(name))
        same(tuned.params, params)
        same(tuned.adapter.to_hf(tuned.params), adapter.to_hf(params))
        assert tuned.config.peft_version == version and set(tuned.scales.values()) == {16.0}


def test_is_lora():
    assert (
        is_lora("lora_down_A")
        and is_lora("a.lora_B.weight")
        and not is_lora("a.exploration_A")
        and not is_lora("lora.w")
    )
    with pytest.raises(fmoe.AdapterError, match="carries no LoRA matrices"):
        fmoe.lora.save({"a.lora_A.weight": torch.ones(1, 1)}, "nowhere", fmoe.keep("{rest}"))

"""LoRA matrices in files: laws for every family and both forms, orientations, and what passes beside them."""

from types import MappingProxyType

import pytest
import torch
from lora_cases import PREFIX, SIZES, adapter_of, forms, kinds, native, sized, stems
from tiny import FAMILIES as KINDS
from torch import einsum

from fmoe.families import FAMILIES
from fmoe.lowrank.derive import CURRENT
from fmoe.testing import assert_laws, same
from fmoe.types import TensorSpec

VERSIONS = ("0.18.1", "0.19.0", "0.19.1", CURRENT)


@pytest.mark.parametrize("name", FAMILIES)
def test_from_hf_and_to_hf_are_inverse_in_every_form(name):
    """Drawn matrices, through each form and each orientation, and back: bit for bit, resolved and open, pure."""
    for form in forms(name):
        for version in VERSIONS if form == "peft" and name in KINDS else (CURRENT,):
            for apart in kinds(name) if form == "per-expert" else (False,):
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
        for kind in ("shared", "separate") if form == "per-expert" and len(kinds(name)) > 1 else (None,):
            adapter = adapter_of(name).choose(**({"lora_A": kind} if kind else {}))
            files = adapter.choose(lora=form).to_hf(native(name, form, apart=kind == "separate"))
            assert_laws(adapter, {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in files.items()})


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

"""Gate and up with matrices A of their own: how their columns lie in B is known, or asked for, and never guessed."""

from dataclasses import replace

import pytest
import torch
from lora_cases import SIZES, adapter_of, kinds, native
from safetensors.torch import load_file

import fmoe
from fmoe.activations import is_interleaved
from fmoe.families import FAMILIES
from fmoe.lowrank.scales import Scales
from fmoe.testing import same

E, D, I, r = SIZES.values()


def zeros(tuned) -> dict[str, torch.Tensor]:
    """Native weights of 0 below every pair: what is merged into them is the update alone."""
    names = {n.removeprefix("base_model.model.").rpartition(".")[0] for n in tuned.params if ".lora_down_A" in n}
    U = next(t for n, t in tuned.params.items() if n.endswith("gate_and_up_B")).shape[-1]
    made = {f"{n}.gate_and_up_projs": torch.zeros(E, D, U) for n in names}
    made |= {f"{n}.down_projs": torch.zeros(E, I, D) for n in names}
    return made | {"model.layers.3.self_attn.q_proj.weight": torch.zeros(4, D)}


@pytest.mark.parametrize("name", FAMILIES)
def test_scales_of_every_family_say_how_its_activation_reads_b(name, tmp_path):
    for apart in kinds(name):
        lora = {n: t for n, t in native(name, apart=apart).items() if "self_attn" not in n}
        fmoe.lora.save(lora, tmp_path / str(apart), adapter_of(name, lora="per-expert"), lora_alpha=2 * r)
        tuned = fmoe.lora.load(tmp_path / str(apart), adapter_of(name))
        same(tuned.params, lora)
        act = adapter_of(name).moe_config.expert_activation
        both = {n for n in lora if n.endswith("gate_and_up_A")}
        assert tuned.scales.interleaved == (both if is_interleaved(act) else set())


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_merge_and_even_add_what_the_files_say(name, apart, tmp_path):
    """B @ A of each expert's gate and up, read from the file: their columns alternate in gpt-oss alone."""
    lora = {n: t for n, t in native(name, apart=apart).items() if "self_attn" not in n}
    fmoe.lora.save(lora, tmp_path, adapter_of(name, lora="per-expert"), lora_alpha=2 * r)
    tuned, files = fmoe.lora.load(tmp_path, adapter_of(name)), load_file(tmp_path / "adapter_model.safetensors")
    weights, scales = zeros(tuned), tuned.scales
    stem = next(n for n in weights if n.endswith("gate_and_up_projs"))
    trained = {n: t * 1 for n, t in tuned.params.items()}  # a dict of one's own: the scales still say it
    for merged in (fmoe.lora.merge(weights, tuned.params, scales), fmoe.lora.merge(weights, trained, scales)):
        for e in range(E):
            columns = merged[stem][e].T.unflatten(0, (I, 2) if name == "gpt_oss" else (2, I))
            for g, part in enumerate(("gate_proj", "up_proj")):
                key = f"experts.{e}.{part}.lora_"
                A, B = (next(t for n, t in files.items() if f"{key}{m}." in n) for m in "AB")
                torch.testing.assert_close(columns.select(1 if name == "gpt_oss" else 0, g), 2.0 * B @ A)
        even, alpha = fmoe.lora.even(tuned.params, scales)
        A, B = (next(t for n, t in even.items() if n.endswith(f"gate_and_up_{m}")) for m in "AB")
        torch.testing.assert_close(alpha / A.shape[-1] * A @ B, merged[stem])
    for name_, t in fmoe.lora.unmerge(merged, tuned.params, scales).items():
        torch.testing.assert_close(t, weights[name_])


def test_where_nothing_says_it_it_is_asked_for():
    """One shape, two orders: without the scales of a directory, an A for each is refused until it is said."""
    lora = {"lora_gate_and_up_A": torch.randn(E, D, 2, r), "lora_gate_and_up_B": torch.randn(E, r, 2 * I)}
    weights = {"gate_and_up_projs": torch.zeros(E, D, 2 * I)}
    calls = (
        lambda **how: fmoe.lora.merge(weights, lora, 2.0, **how),
        lambda **how: fmoe.lora.unmerge(weights, lora, {"lora_gate_and_up_A": 2.0}, **how),
        lambda **how: fmoe.lora.even(lora, 2.0, **how),
        lambda **how: fmoe.lora.lift(lora, **how),
    )
    for call in calls:
        with pytest.raises(fmoe.AdapterError, match="'lora_gate_and_up_A' .* nothing says how .* Fix: .*tuned.scales"):
            call()
        call(interleaved=True), call(interleaved=False)
    known = Scales({"lora_gate_and_up_A": 2.0}, interleaved=[])
    same(fmoe.lora.merge(weights, lora, known), fmoe.lora.merge(weights, lora, 2.0, interleaved=False))
    with pytest.raises(fmoe.AdapterError, match="interleaved=True, and its scales say .* side by side"):
        fmoe.lora.merge(weights, lora, known, interleaved=True)
    config = fmoe.MoEConfig(n_routed_experts=E, n_activated_experts=1, dim=D, moe_inter_dim=I)
    routing = fmoe.Routing(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
    for act, fix in (("swiglu", False), ("quick_geglu", True)):
        with pytest.raises(ValueError, match=rf"fmoe.lora.even\(lora, scale, interleaved={fix}\)"):
            fmoe.experts(
                weights | {"down_projs": torch.zeros(E, I, D)} | lora,
                torch.ones(1, D),
                routing,
                replace(config, expert_activation=act),
            )

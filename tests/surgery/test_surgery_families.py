"""Surgery of a block of every family whose block is ours: the formulas, without a file, in fp64."""

from dataclasses import replace
from typing import Any

import hf
import hf_zoo as zoo
import pytest
import torch
import transformers
from torch import Tensor

import fmoe
from fmoe import surgery
from fmoe.families import FAMILIES

AT = "model.layers.0.mlp"
WHOLE = [n for n in {**hf.MODELS, **zoo.MODELS} if n in FAMILIES and FAMILIES[n].verified == "block"]


def drawn(name: str) -> tuple[dict[str, Tensor], dict[str, Any], fmoe.MoEConfig]:
    """(native tensors of a layer, config, MoEConfig) in a tiny size."""
    arch, own = hf.MODELS[name] if name in hf.MODELS else zoo.MODELS[name]
    kind = getattr(transformers, arch)
    made = kind.config_class(**own) if name in hf.MODELS else zoo.config(kind, own)
    config = made.to_dict()
    moe = replace(fmoe.adapter(config["model_type"], config).moe_config, dtype="float64", gate_dtype="float64")
    layer = fmoe.nn.MoE(moe)
    generator = torch.Generator().manual_seed(0)
    for t in [*layer.parameters(), *layer.buffers()]:
        t.data.copy_(torch.randn(t.shape, generator=generator, dtype=torch.float64))
    return {f"{AT}.{n}": t for n, t in layer.state_dict().items()}, config, moe


def output(native: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    moe = fmoe.adapter(config["model_type"], config).moe_config
    x = torch.randn(20, moe.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        return fmoe.moe(fmoe.subtree(native, AT), x, moe)


@pytest.mark.parametrize("name", WHOLE)
def test_formulas(name: str) -> None:
    native, config, moe = drawn(name)
    before, E, G = output(native, config), moe.n_routed_experts, moe.n_expert_groups
    order = torch.arange(E).view(G, -1).flip(0, 1).flatten().tolist()
    same, told = surgery.permute(native, config, order)
    assert told == config
    torch.testing.assert_close(output(same, told), before)
    try:
        more, told = surgery.replicate(native, config, 3)
        off = 1e-5 if moe.norm_topk_eps > 1e-9 else 1e-7  # eps is added to a sum that is three times as large
        torch.testing.assert_close(output(more, told), before, rtol=off, atol=off)
        back, told = surgery.merge(more, told, [[3 * e, 3 * e + 1, 3 * e + 2] for e in range(E)])
        assert back[f"{AT}.experts.down_projs"].shape == native[f"{AT}.experts.down_projs"].shape
    except ValueError as refused:
        assert G > 1 or moe.n_zero_experts or moe.score_func == "sparsemixer" or moe.expert_norm_eps, refused
    size, least = E // G, max(-(-moe.n_activated_experts // moe.n_limited_groups), 2)
    half = [e for e in range(E) if e % size < max(size // 2, least)]
    few, told = surgery.select(native, config, half)
    assert fmoe.adapter(told["model_type"], told).moe_config.n_routed_experts == len(half)
    assert output(few, told).isfinite().all()
    bias = f"{AT}.gate.e_score_correction_bias"
    if bias in native and G == 1 and not moe.score_func.startswith("softmax"):  # the others never win
        lost = torch.tensor([e not in half for e in range(E)])
        restricted = native | {bias: native[bias].masked_fill(lost, -1e6)}
        torch.testing.assert_close(output(few, told), output(restricted, config))


def test_what_names_experts_goes_along_and_what_counts_them_elsewhere_is_refused() -> None:
    native, config, _ = drawn("mixtral")
    table = {f"{AT}.gate.tid2eid": torch.tensor([[2, 5], [5, 7]])}
    moved, _ = surgery.permute(native | table, config, range(7, -1, -1))
    assert moved[f"{AT}.gate.tid2eid"].tolist() == [[5, 2], [2, 0]]
    twice, _ = surgery.replicate(native | table, config, 2)
    assert twice[f"{AT}.gate.tid2eid"].tolist() == [[4, 5, 10, 11], [10, 11, 14, 15]]
    with pytest.raises(ValueError, match="tokens go to experts that are not kept"):
        surgery.select(native | table, config, [2, 5])
    attention = {"model.layers.0.self_attention.experts.input_linear.weight": torch.ones(8, 4, 4)}  # JetMoE's
    assert surgery.permute(native | attention, config, range(7, -1, -1))[1] == config
    for change in (lambda n: surgery.select(n, config, [2, 5]), lambda n: surgery.replicate(n, config, 2)):
        with pytest.raises(ValueError, match="self_attention.experts.*the config has one number for both"):
            change(native | attention)


def test_ids_without_values_are_refused():
    block = "model.layers.0.mlp.experts"
    native = {f"{block}.gate_and_up_projs": torch.ones(4, 2, 6), f"{block}.down_projs": torch.ones(4, 3, 2)}
    config = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    config |= {"hidden_size": 2, "moe_intermediate_size": 3}
    ids = torch.ones(4, dtype=torch.long, device="meta")
    for call in (surgery.select, surgery.permute, surgery.merge):
        for given in (ids, [*ids]):
            with pytest.raises(ValueError, match=f"{call.__name__}: .* is .*meta.*, expected"):
                call(native, config, given)

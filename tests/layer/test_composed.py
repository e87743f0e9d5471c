"""Blocks that one call of `fmoe.moe` is not: what a layer adds around it, and what a config says in words."""

from dataclasses import replace

import hf_zoo as zoo
import pytest
import torch
from hf_blocks import alone, assert_close, assert_parity
from torch import Tensor

import fmoe
from fmoe import MoEConfig


def native(name: str, **config) -> tuple:
    """A tiny model of a family with another config, its adapter and its native parameters."""
    arch, own = zoo.MODELS[name]
    cls = getattr(zoo.transformers, arch)
    torch.manual_seed(0)
    model = cls._from_config(zoo.config(cls, own | config), dtype=torch.float32, experts_implementation="eager").eval()
    zoo.hf.randomise(model, 0)
    adapter = fmoe.adapter(model.config.model_type, model.config)
    return model, adapter, adapter.from_hf(dict(model.state_dict()))


def tokens(dim: int = 32) -> Tensor:
    return torch.randn(2, 9, dim, generator=torch.Generator().manual_seed(7))


def test_gemma_4_routes_the_residual_and_gives_its_norm_to_the_experts():
    model, adapter, params = native("gemma4_text")
    layer, block = model.model.layers[1], fmoe.subtree(params, "model.layers.1.moe")
    seen = {}
    layer.router.register_forward_hook(lambda _, args, out: seen.update(residual=args[0]))
    layer.experts.register_forward_hook(lambda _, args, out: seen.update(y=out))
    with torch.no_grad():
        model(torch.arange(18).view(2, 9))
        residual = seen["residual"]
        normed = layer.pre_feedforward_layernorm_2(residual)
        routing = fmoe.route(block, residual, adapter.moe_config)
        assert_close(fmoe.moe(block, normed, adapter.moe_config, routing=routing), seen["y"])


def test_a_layer_of_ernie_vl_is_two_blocks_and_the_shared_experts():
    model, adapter, params = native("ernie4_5_vl_moe")
    layer, stem, x = model.model.language_model.layers[0].mlp, "model.language_model.layers.0.mlp", tokens()
    image = torch.arange(18).view(2, 9) % 3 == 0
    shared = {f"shared_experts.{n}": t for n, t in fmoe.subtree(params, stem + ".shared_experts").items()}
    text, vision = (fmoe.subtree(params, f"{stem}.{tower}") for tower in ("text_moe", "vision_moe"))
    config = adapter.moe_config
    small = replace(config, n_shared_experts=0, moe_inter_dim=vision["experts.down_projs"].shape[1])
    with torch.no_grad():
        expected = layer(x, image.int())
        found = fmoe.moe(text | shared, x, config, mask=~image) + fmoe.moe(vision, x, small, mask=image)
    assert_close(found, expected[0] if isinstance(expected, tuple) else expected)


COHERE = [
    dict(expert_selection_fn="sigmoid"),
    dict(expert_selection_fn="sigmoid", shared_expert_combination_strategy="sum"),
    dict(num_shared_experts=0),
]
OTHERS = [
    *(("cohere2_moe", c, "model.layers.1.mlp") for c in COHERE),
    ("axk2", dict(n_group=4, topk_group=1), "model.layers.1.mlp"),
    ("phimoe", dict(router_jitter_noise=0.3), "model.layers.1.mlp"),
    ("longcat_flash", dict(zero_expert_num=20), "model.layers.0.mlp"),
]


@pytest.mark.parametrize(("name", "config", "stem"), OTHERS, ids=str)
def test_a_block_of_another_config_is_that_of_transformers(name, config, stem):
    """Half of A.X-K2's losers win: their score of 0 beats a biased one."""
    arch, own = zoo.MODELS[name]
    cls = getattr(zoo.transformers, arch)
    model = cls._from_config(zoo.config(cls, own | config), dtype=torch.float32, experts_implementation="eager").eval()
    zoo.hf.randomise(model, 0)
    block = model.get_submodule(stem)
    if name == "axk2":
        block.gate.e_score_correction_bias.fill_(-1.0)
    kind = fmoe.families.FAMILIES[name]
    moe = kind.adapter(model.config).moe_config
    E = moe.n_routed_experts
    state = {n.replace("router.", "gate.").replace("classifier.", ""): t for n, t in block.state_dict().items()}
    params = {n: t for n, t in state.items() if not n.startswith("experts.")}
    params["experts.gate_and_up_projs"] = state["experts.gate_up_proj"][:E].mT
    params["experts.down_projs"] = state["experts.down_proj"].mT
    assert_parity(alone(block, params)[0], params, moe, moe.dim)


K3 = dict(
    num_experts=6, num_experts_per_token=2, hidden_size=8, moe_intermediate_size=5, routed_expert_hidden_size=4,
    num_shared_experts=2, moe_renormalize=True, routed_scaling_factor=2.5, num_expert_group=1, topk_group=1,
    hidden_act="situ", activation_situ_beta=4.0, activation_situ_linear_beta=25.0, latent_moe_use_norm=True,
    rms_norm_eps=1e-5,
)  # fmt: skip


@pytest.mark.parametrize("linear_beta", [25.0, 0.5, None])
def test_kimi_k3_is_what_its_published_code_says(linear_beta):
    """down, experts with SiTU weighted after, RMS norm of their sum, up; shared experts with SiTU; all in fp64."""
    config = fmoe.adapter("kimi_k3", K3 | dict(activation_situ_linear_beta=linear_beta)).moe_config
    made = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=made, dtype=torch.float64)
    params = {
        "gate.weight": rand(6, 8), "gate.e_score_correction_bias": rand(6),
        "experts.gate_and_up_projs": 3 * rand(6, 4, 10), "experts.down_projs": rand(6, 5, 4),
        "routed_expert_down_proj.weight": rand(4, 8), "routed_expert_up_proj.weight": rand(8, 4),
        "routed_expert_norm.weight": rand(4),
        "shared_experts.gate_proj.weight": rand(10, 8), "shared_experts.up_proj.weight": rand(10, 8),
        "shared_experts.down_proj.weight": rand(8, 10),
    }  # fmt: skip

    def situ(g: Tensor, v: Tensor) -> Tensor:
        v = v if linear_beta is None else linear_beta * torch.tanh(v / linear_beta)
        return 4 * torch.tanh(g / 4) / (1 + torch.exp(-g)) * v

    for scale in (1, 100):
        x, rows = scale * rand(5, 8), []
        for t in x:
            score = 1 / (1 + torch.exp(-params["gate.weight"] @ t))
            best = sorted(range(6), key=lambda e: -(score + params["gate.e_score_correction_bias"]).float()[e])[:2]
            h = params["routed_expert_down_proj.weight"] @ t
            y = torch.zeros(4, dtype=torch.float64)
            for e in best:
                g, v = (h @ params["experts.gate_and_up_projs"][e]).chunk(2)
                y += 2.5 * score[e] / score[best].sum() * (situ(g, v) @ params["experts.down_projs"][e])
            y = y / (y.square().mean() + 1e-5).sqrt() * params["routed_expert_norm.weight"]
            of = lambda part, h: params[f"shared_experts.{part}_proj.weight"] @ h
            rows.append(params["routed_expert_up_proj.weight"] @ y + of("down", situ(of("gate", t), of("up", t))))
        torch.testing.assert_close(fmoe.moe(params, x, config), torch.stack(rows))


SIZES = dict(num_experts=8, num_experts_per_tok=2, hidden_size=32, intermediate_size=24, expert_ffn_hidden_size=24)


def test_what_a_config_says_in_no_known_word_is_refused():
    for name, config in (
        ("longcat_flash", dict(zero_expert_type="drop")),
        ("cohere2_moe", dict(expert_selection_fn="other")),
        ("kimi_k3", dict(hidden_act="gelu")),
    ):
        with pytest.raises(fmoe.AdapterError, match="expected one of"):
            _ = fmoe.adapter(name, (K3 if name == "kimi_k3" else SIZES) | config).moe_config


def test_deepseek_v4_asks_for_the_experts_of_its_tokens():
    config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1)
    gate = {"gate.weight": torch.ones(2, 1), "gate.tid2eid": torch.tensor([[0], [1]])}
    with pytest.raises(ValueError, match="indices=params"):
        fmoe.route(gate, torch.ones(3, 1), config)
    assert fmoe.route(gate, torch.ones(3, 1), config, indices=gate["gate.tid2eid"][[1, 0, 1]]).indices.sum() == 2

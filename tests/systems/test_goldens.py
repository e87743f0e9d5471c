"""What the tables mean, against the same tensors made by hand: orders of rows, axes, values."""

import torch
from systems_zoo import model
from torch import cat, stack

import fmoe

L = "model.layers.0."


def made(system, name, **choices):
    config, hf = model(name)
    return config, hf, fmoe.adapter(name.split()[0], config, system=system, **choices).from_hf(hf)


def experts(hf, part, at=L + "mlp.experts."):
    names = [n for n in hf if n.startswith(at) and n.endswith(f"{part}.weight")]
    return stack([hf[f"{at}{e}.{part}.weight"] for e in range(len(names))])


def test_megatron_interleaves_groups_and_joins_gate_and_up():
    c, hf, there = made("megatron", "qwen3_moe alike")
    d, groups = c["head_dim"], c["num_key_value_heads"]
    q, k, v = (hf[f"{L}self_attn.{p}_proj.weight"].view(groups, -1, d, c["hidden_size"]) for p in "qkv")
    assert torch.equal(there["decoder.layers.0.self_attention.linear_qkv.weight"], cat([q, k, v], 1).flatten(0, 2))
    gate, up = (hf[f"{L}mlp.experts.3.{p}_proj.weight"] for p in ("gate", "up"))
    assert torch.equal(there["decoder.layers.0.mlp.experts.linear_fc1.weight3"], cat([gate, up]))
    assert torch.equal(
        there["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"], hf[L + "input_layernorm.weight"]
    )


def test_megatron_de_interleaves_gpt_oss():
    _, hf, there = made("megatron", "gpt_oss")
    both = hf[L + "mlp.experts.gate_up_proj"][1]  # [d (i g)]
    assert torch.equal(
        there["decoder.layers.0.mlp.experts.linear_fc1.weight1"], cat([both[:, 0::2], both[:, 1::2]], 1).T
    )
    assert torch.equal(there["decoder.layers.0.mlp.experts.linear_fc2.weight1"], hf[L + "mlp.experts.down_proj"][1].T)


def test_megatron_linear_attention_and_gated_queries():
    c, hf, there = made("megatron", "qwen3_next")
    g, m = c["linear_num_key_heads"], c["linear_num_value_heads"] // c["linear_num_key_heads"]
    k, v = c["linear_key_head_dim"], c["linear_value_head_dim"]
    at = next(n for n in hf if n.endswith("in_proj_qkvz.weight")).partition("linear_attn")[0]
    l = at.split(".")[2]
    rows = hf[at + "linear_attn.in_proj_qkvz.weight"].view(g, -1, c["hidden_size"]).split([k, k, m * v, m * v], 1)
    ba = hf[at + "linear_attn.in_proj_ba.weight"].view(g, 2 * m, -1).split([m, m], 1)
    want = cat([part.flatten(0, 1) for part in (*rows, *ba)])
    assert torch.equal(there[f"decoder.layers.{l}.self_attention.in_proj.weight"], want)
    norm = hf[at + "linear_attn.norm.weight"]
    assert torch.equal(there[f"decoder.layers.{l}.self_attention.out_norm.weight"], norm - 1)
    at = next(n for n in hf if n.endswith("q_proj.weight")).partition("self_attn")[0]
    h, d, width = c["num_key_value_heads"], c["head_dim"], c["hidden_size"]
    q, z = hf[at + "self_attn.q_proj.weight"].view(h, -1, 2, d, width).unbind(2)
    keys, values = (hf[f"{at}self_attn.{p}_proj.weight"].view(h, 1, d, width) for p in "kv")
    name = f"decoder.layers.{at.split('.')[2]}.self_attention.linear_qkv.weight"
    assert torch.equal(there[name], cat([q, z, keys, values], 1).flatten(0, 2))


def test_torch_dist_stacks_layers_and_experts():
    c, hf, there = made("megatron_dist", "qwen3_moe alike")
    one = stack([cat([experts(hf, p, f"model.layers.{l}.mlp.experts.") for p in ("gate_proj", "up_proj")], 1)
                 for l in range(c["num_hidden_layers"])])  # fmt: skip
    assert torch.equal(there["decoder.layers.mlp.experts.experts.linear_fc1.weight"], one)
    norms = stack([hf[f"model.layers.{l}.post_attention_layernorm.weight"] for l in range(c["num_hidden_layers"])])
    assert torch.equal(there["decoder.layers.pre_mlp_layernorm.weight"], norms)
    local = made("megatron_dist", "qwen3_moe alike", specs="local")[2]
    assert torch.equal(local["decoder.layers.mlp.linear_fc1.layer_norm_weight"], norms)


def test_torchtitan_stacks_experts_and_makes_the_balancing_bias():
    c, hf, there = made("torchtitan", "qwen3_moe alike")
    assert torch.equal(there["layers.0.moe.routed_experts.inner_experts.w3_EFD"], experts(hf, "up_proj"))
    bias = there["layers.0.moe.expert_bias_E"]
    assert bias.dtype == torch.float32 and bias.shape == (8,) and not bias.any()
    old = made("torchtitan", "qwen3_moe alike", names="0.2")[2]
    assert torch.equal(old["layers.0.moe.experts.w2"], experts(hf, "down_proj")) and "output.weight" in old


def test_gguf_permutes_mixtral_and_takes_kv_b_apart():
    c, hf, there = made("gguf", "mixtral")
    h, d = c["num_attention_heads"], c["head_dim"]
    q = hf[L + "self_attn.q_proj.weight"].view(h, 2, d // 2, -1).transpose(1, 2).flatten(0, 2)
    assert torch.equal(there["blk.0.attn_q.weight"], q)
    c, hf, there = made("gguf", "deepseek_v3")
    kv = hf[L + "self_attn.kv_b_proj.weight"].view(c["num_attention_heads"], -1, c["kv_lora_rank"])
    k, v = kv.split([c["qk_nope_head_dim"], c["v_head_dim"]], 1)
    assert torch.equal(there["blk.0.attn_k_b.weight"], k.mT) and torch.equal(there["blk.0.attn_v_b.weight"], v)


def test_gguf_values_of_qwen3_next_and_heads_of_qwen3_5():
    _, hf, there = made("gguf", "qwen3_next")
    assert torch.equal(there["blk.0.attn_norm.weight"], hf[L + "input_layernorm.weight"] + 1)
    assert torch.equal(there["blk.0.ssm_a"], -torch.exp(hf[L + "linear_attn.A_log"]))
    assert torch.equal(there["blk.0.ssm_norm.weight"], hf[L + "linear_attn.norm.weight"])
    c, hf, there = made("gguf", "qwen3_5_moe_text")
    g, m, v = (
        c["linear_num_key_heads"],
        c["linear_num_value_heads"] // c["linear_num_key_heads"],
        c["linear_value_head_dim"],
    )
    z = hf[L + "linear_attn.in_proj_z.weight"].view(g, m, v, -1).transpose(0, 1).flatten(0, 2)
    assert torch.equal(there["blk.0.attn_gate.weight"], z)
    keys = 2 * g * c["linear_key_head_dim"]
    qkv = hf[L + "linear_attn.in_proj_qkv.weight"]
    want = cat([qkv[:keys], qkv[keys:].view(g, m, v, -1).transpose(0, 1).flatten(0, 2)])
    assert torch.equal(there["blk.0.attn_qkv.weight"], want)


def test_vllm_joins_without_groups():
    c, hf, there = made("vllm", "deepseek_v3")
    want = cat([hf[L + f"self_attn.{p}.weight"] for p in ("q_a_proj", "kv_a_proj_with_mqa")])
    assert torch.equal(there[L + "self_attn.fused_qkv_a_proj.weight"], want)
    _, hf, there = made("vllm", "qwen3_moe alike")
    assert torch.equal(there[L + "mlp.experts.w13_weight"], cat([experts(hf, "gate_proj"), experts(hf, "up_proj")], 1))
    assert torch.equal(
        there[L + "self_attn.qkv_proj.weight"], cat([hf[f"{L}self_attn.{p}_proj.weight"] for p in "qkv"])
    )


def test_maxtext_scans_and_scales():
    c, hf, there = made("maxtext", "qwen3_moe alike", scan=True)
    want = stack(
        [experts(hf, "gate_proj", f"model.layers.{l}.mlp.experts.").mT for l in range(c["num_hidden_layers"])], 1
    )
    assert torch.equal(there["params-decoder-layers-moe_block-wi_0"], want)
    c, hf, there = made("maxtext", "mixtral")
    q = hf[L + "self_attn.q_proj.weight"].T.reshape(c["hidden_size"], c["num_attention_heads"], -1)
    assert torch.allclose(
        there["params-decoder-layers_0-self_attention-query-kernel"], q * c["head_dim"] ** -0.5, rtol=1e-6
    )
    c, hf, there = made("maxtext", "gpt_oss", scan=True)
    want = stack([hf["model.layers.1.mlp.experts.down_proj"]], 1)
    assert torch.equal(there["params-decoder-layers-layers_1-GptOssMlp-wo"], want)


def mxfp4():
    """gpt-oss with its experts as random blocks and scales."""
    config, hf = model("gpt_oss")
    made = torch.Generator().manual_seed(0)
    rest = {n: t for n, t in hf.items() if not n.endswith(("gate_up_proj", "down_proj"))}
    byte = lambda *shape: torch.randint(0, 256, shape, generator=made, dtype=torch.uint8)
    for l in range(config["num_hidden_layers"]):
        at = f"model.layers.{l}.mlp.experts."
        rest |= {at + "gate_up_proj_blocks": byte(8, 48, 1, 16), at + "gate_up_proj_scales": byte(8, 48, 1)}
        rest |= {at + "down_proj_blocks": byte(8, 32, 2, 16), at + "down_proj_scales": byte(8, 32, 2)}
    return config, rest


def test_mxfp4_moves_as_it_is():
    config, hf = mxfp4()
    blocks = hf[L + "mlp.experts.down_proj_blocks"]
    values = stack([blocks & 15, blocks >> 4], -1).flatten(-2)  # in order
    for system in ("gguf", "mlx", "gpt_oss_original"):
        adapter = fmoe.adapter("gpt_oss", config, system=system, quantized="keep")
        there = adapter.from_hf(hf)
        back = adapter.to_hf(there)
        assert back.keys() == hf.keys() and all(torch.equal(back[n], t) for n, t in hf.items()), system
        native = fmoe.adapter("gpt_oss", config, quantized="keep")
        part = (adapter.inverse >> native).from_hf(there, e=range(2, 5))
        want = native.from_hf(hf, e=range(2, 5))
        assert part.keys() == want.keys() and all(torch.equal(part[n], t) for n, t in want.items()), system
        if system == "gguf":
            found = there["blk.0.ffn_down_exps.weight"].view(8, 32, 2, 17)
            assert torch.equal(found[..., 0], hf[L + "mlp.experts.down_proj_scales"])
            assert torch.equal(cat([found[..., 1:] & 15, found[..., 1:] >> 4], -1), values)
            assert there["blk.0.ffn_gate_exps.weight"].shape == (8, 24, 17)
        if system == "mlx":
            assert there[L + "mlp.experts.down_proj.weight"].dtype == torch.uint32
            assert torch.equal(
                there[L + "mlp.experts.up_proj.scales"], hf[L + "mlp.experts.gate_up_proj_scales"][:, 1::2]
            )


def joined_rows(hf, at, kind="weight"):
    return cat([hf[f"{at}self_attn.{p}_proj.{kind}"] for p in "qkv"])


def test_gpt_oss_keeps_rows_interleaved_in_vllm_torchtitan_and_its_original():
    for system, qkv, up, down in (
        ("vllm", L + "attn.qkv", L + "mlp.experts.w13_weight", L + "mlp.experts.w2_weight"),
        ("gpt_oss_original", "block.0.attn.qkv", "block.0.mlp.mlp1_weight", "block.0.mlp.mlp2_weight"),
        ("torchtitan", "", f"{TITAN}.mlp1_weight_EGD", f"{TITAN}.mlp2_weight_EDF"),
    ):
        _, hf, there = made(system, "gpt_oss")
        assert torch.equal(there[up], hf[L + "mlp.experts.gate_up_proj"].mT), system
        assert torch.equal(there[down], hf[L + "mlp.experts.down_proj"].mT), system
        for kind in ("weight", "bias") if qkv else ():
            assert torch.equal(there[f"{qkv}.{kind}"], joined_rows(hf, L, kind)), system


TITAN = "layers.0.moe.routed_experts.inner_experts"


def test_deepseek_by_name_and_number():
    c, hf, there = made("deepseek", "deepseek_v3")
    l = c["first_k_dense_replace"]
    at, x = f"model.layers.{l}.", f"model.layers.{l}.mlp.experts."
    same = {
        f"layers.{l}.ffn.experts.2.w3.weight": f"{x}2.up_proj.weight",
        f"layers.{l}.ffn.gate.bias": f"{at}mlp.gate.e_score_correction_bias",
        f"layers.{l}.attn.q_norm.weight": f"{at}self_attn.q_a_layernorm.weight",
        "layers.0.ffn.w2.weight": "model.layers.0.mlp.down_proj.weight",
        "head.weight": "lm_head.weight",
    }
    assert all(torch.equal(there[a], hf[b]) for a, b in same.items())
    sglang = made("sglang", "deepseek_v3")[2]
    both = cat([hf[f"{at}self_attn.{p}.weight"] for p in ("q_a_proj", "kv_a_proj_with_mqa")])
    assert torch.equal(sglang[f"{at}self_attn.fused_qkv_a_proj_with_mqa.weight"], both)
    titan = made("torchtitan", "deepseek_v3")[2]
    assert torch.equal(titan[f"layers.{l}.moe.shared_experts.w3.weight"], hf[f"{at}mlp.shared_experts.up_proj.weight"])
    assert torch.equal(titan[f"layers.{l}.moe.expert_bias_E"], hf[f"{at}mlp.gate.e_score_correction_bias"])


def test_deepseek_in_megatron_and_in_maxtext_with_its_layers_numbered_by_kind():
    c, hf, there = made("megatron", "deepseek_v3")
    l = c["first_k_dense_replace"]
    at, d = f"model.layers.{l}.", "decoder.layers.0.mlp.linear_fc1"
    dense = [hf[f"model.layers.0.mlp.{p}_proj.weight"] for p in ("gate", "up")]
    assert torch.equal(there[f"{d}.weight"], cat(dense))
    assert torch.equal(there[f"{d}.layer_norm_weight"], hf["model.layers.0.post_attention_layernorm.weight"])
    norm = there[f"decoder.layers.{l}.self_attention.linear_kv_up_proj.layer_norm_weight"]
    assert torch.equal(norm, hf[f"{at}self_attn.kv_a_layernorm.weight"])
    kv = hf[f"{at}self_attn.kv_b_proj.weight"]
    moe = {False: ("moe_layers_0-", lambda t: t), True: ("moe_layers-", lambda t: t[:, 0])}
    for scan, (name, first) in moe.items():
        there = made("maxtext", "deepseek_v3", scan=scan)[2]
        laid = kv.T.reshape(kv.shape[1], c["num_attention_heads"], -1)
        assert torch.equal(first(there[f"params-decoder-{name}self_attention-wkv_b-kernel"]), laid)
        wo = there[f"params-decoder-{name}DeepSeekMoeBlock_0-MoeBlock_0-wo"]
        assert torch.equal(first(wo), experts(hf, "down_proj", f"{at}mlp.experts.").mT)


def test_prime_rl_and_mlx_stack_experts_by_projection():
    _, hf, there = made("prime_rl", "qwen3_moe alike")
    assert torch.equal(there[L + "mlp.experts.w3"], experts(hf, "up_proj"))
    assert torch.equal(there[L + "mlp.router.gate.weight"], hf[L + "mlp.gate.weight"])
    there = made("mlx", "qwen3_moe alike")[2]
    assert torch.equal(there[L + "mlp.switch_mlp.down_proj.weight"], experts(hf, "down_proj"))

"""Expressions that are refused, each with its reason; and the names that they use."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import fmoe

E, K, D, I, L = 4, 2, 8, 6, 2
SIZES = dict(num_hidden_layers=L, hidden_size=D, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K)
BLOCK = "model.layers.0.mlp.experts."
CODES = BLOCK + "0.up_proj.weight"
ATTENTION = "model.layers.0.self_attn.o_proj."
GROUPS = {ATTENTION + "weight_scale_gptq_int4": torch.ones(8, 2).half()}
GROUPS |= {ATTENTION + "weight_scale_gptq_int4_second": torch.ones(8, 2).byte()}
ORDERED = {ATTENTION + "qweight": torch.ones(2, 8).int(), ATTENTION + "qzeros": torch.ones(2, 1).int()}
ORDERED |= {ATTENTION + "scales": torch.ones(2, 8).half(), ATTENTION + "g_idx": torch.tensor([0, 1] * 8).int()}

CONFIGS = {
    "fmoe.adapter('qwen3_moe', SIZES | dict(num_local_experts=3))": "two counts of experts: either could be meant",
    "fmoe.adapter('qwen3_moe', SIZES | dict(num_experts=5)).from_hf(plain)": "the config counts more experts",
    "fmoe.adapter('qwen3_moe', SIZES | dict(moe_intermediate_size=5)).from_hf(plain)": "the config has other sizes",
    "fmoe.adapter('qwen3_moe', SIZES | dict(n_group=2)).moe_config": "the family's router knows no groups of experts",
    "fmoe.adapter('gpt_oss', SIZES | dict(intermediate_size=6, swiglu_limit=0)).moe_config": "a clamp at 0 is zero",
    "fmoe.adapter('qwen3_moe', dict(quantization_config=dict(weight_block_size=128)))": "a block has rows and columns",
    "fmoe.adapter('qwen3_moe', dict(quantization_config=dict(quant_method=['fp8'])))": "nobody knows what is meant",
    "fmoe.adapter('qwen3_moe', SIZES).from_hf(whole)": "whole numbers of nothing that is known",
    "fmoe.adapter('qwen3_moe', SIZES).from_hf(lone_scale)": "a scale without codes: a half of a pair is lost",
    "fmoe.adapter('qwen3_moe', SIZES).from_hf(lone_codes)": "codes without a scale are no weights",
    "fmoe.adapter('qwen3_moe', SIZES | IGNORES).from_hf(coded)": "who believes the list takes codes for weights",
    "fmoe.adapter('qwen3_moe', SIZES | HQQ).from_hf(hqq)": "a format that is not read: its codes are no weights",
    "fmoe.adapter('qwen3_moe', SIZES | GPTQ, quantized='keep').from_hf(ordered)": "kept codes have no order of columns",
    "fmoe.adapter('qwen3_moe', SIZES).from_hf(ordered)": "GPTQ has two versions, a zero point apart",
    "fmoe.adapter('qwen3_moe', SIZES | GPTQ).to_hf(merged)": "scales that calibration found cannot be made anew",
    "fmoe.adapter('qwen3_moe', SIZES).from_hf(zero)": "the codes could not be told from what they decode to",
    "fmoe.adapter('qwen3_moe', SIZES, quantize='fp7')": "no such format can be written",
    "fmoe.adapter('qwen3_moe', SIZES, quantize='mxfp4').to_hf(native)": "experts would be left plain",
    "fmoe.adapter('qwen3_moe', SIZES, dtype='int8')": "a whole number cannot hold a decoded one",
    "fmoe.adapter('qwen3_moe', SIZES).from_hf(unknown)": "experts that no rule knows would be left out of the stack",
}
LORA = {
    "load(modules_to_save=['lm_head'])": "whole weights are no matrices A and B: they would be lost",
    "load(trainable_token_indices=[5])": "rows of an embedding would be lost",
    "load(layer_replication=[[0, 2], [1, 3]])": "the layers of the adapter are not those of the base",
    "load(use_dora=True)": "the update is not a product of A and B alone",
    "load(bias='all')": "trained biases would be lost",
    "load(init_lora_weights='pissa')": "A and B belong to other base weights",
    "load(lora_B_layout='by_column')": "ranks and experts of B could be swapped",
    "load(r=3)": "alpha / r would be another scale",
    "load(peft_type='LOHA')": "not LoRA: another product of matrices",
    "load(target_parameters=['mlp.experts.gate_up_proj'])": "the file lacks the matrices that the config names",
    "fmoe.lora.merge(base, {}, 1.0)": "nothing would be merged, without a word",
    "fmoe.lora.merge(base, {n: t for n, t in pair.items() if n.endswith('_A')}, 1.0)": "half of a pair is lost",
    "fmoe.lora.merge(base, {'lm_head.weight': torch.ones(2, D)}, 1.0)": "a whole weight cannot be added to another",
    "fmoe.lora.merge({down: base[down].to(torch.float8_e4m3fn)}, pair, 1.0)": "codes are no numbers to add to",
}
LAYER = {
    "fmoe.experts(params | {'down_projs': params['down_projs'].to('meta')}, x, routing, config)": (
        "weights without data give numbers that mean nothing"
    ),
    "fmoe.experts(params | {'down_projs': params['down_projs'].to(torch.int8)}, x, routing, config)": (
        "codes without scales are no weights"
    ),
    "fmoe.experts(params | {'down_projs': params['down_projs'].to(torch.float8_e4m3fn).requires_grad_(),"
    " 'down_projs_scale_each': torch.ones(4, 1, 1)}, x, routing, config)": "codes have none: LoRA beside them has",
    "fmoe.experts(params | {'down_projs': params['down_projs'].to(torch.float8_e4m3fn), 'down_projs_scale_inv':"
    " torch.ones(4, 9, 9)}, x, routing, config)": "scales of another shape belong to other codes",
    "fmoe.experts(params | {'down_projs': params['down_projs'].mT}, x, routing, config)": "a matrix of another shape",
    "fmoe.experts({'down_projs': params['down_projs']}, x, routing, config)": "half of the experts is missing",
    "fmoe.experts(params | {'lora_down_A': torch.ones(4, 6, 1)}, x, routing, config)": "a matrix alone does nothing",
    "fmoe.experts(params, x, routing._replace(indices=routing.indices.float()), config)": "expert numbers are integers",
    "fmoe.experts(params, x, routing._replace(weights=routing.weights[:, :1]), config)": "a weight for each choice",
    "fmoe.experts(params, x.int(), routing, config)": "tokens are floating",
    "fmoe.experts(params, x[:, :7], routing, config)": "tokens of another width",
    "fmoe.experts(params, x, (x, x), config)": "a routing is indices, weights and a mask",
    "fmoe.experts(params, x, routing, config, backend='cuda')": "no such backend: none is chosen in its place",
    "fmoe.nn.MoE(replace(config, n_shared_experts=1)).to('meta')(x)": "no module computes with weights without data",
    "fmoe.nn.MoE(config).load_state_dict({'gate.weight': gate['gate.weight'].to(torch.int8)})": (
        "a copy would cast codes to numbers"
    ),
    "torch.jit.trace(fmoe.nn.MoE(config), x.bfloat16())": "one routing would become constants",
    "fmoe.route(gate, x, replace(config, score_func='relu'))": "no such score",
    "fmoe.route(gate, x, replace(config, score_func='sigmoid_with_bias'))": "the bias that it promises is not there",
    "fmoe.route(gate, x, replace(config, n_expert_groups=3))": "4 experts are no 3 groups",
    "replace(config, expert_activation='tanh')": "no such activation",
    "replace(config, n_activated_experts=5)": "more choices than experts",
    "replace(config, enable_routing_replay=True)": "it would do nothing here",
    "replace(config, aux_loss_coeff=-1.0)": "it would be ignored, as a rate of 0 is",
}
KERNELS = {
    "fmoe_kernels.experts(x, ids, weights, mask.int(), w_up, w_down)": "a mask of whole numbers would be read as bytes",
    "fmoe_kernels.experts(x, ids.float(), weights, None, w_up, w_down)": "ids of floats would be read as bytes",
    "fmoe_kernels.experts(x, ids, weights, None, w_up, w_down[:, :5])": "rows would be read out of bounds",
    "fmoe_kernels.experts(x, ids, weights, None, w_up.to('meta'), w_down)": "a pointer to nothing",
    "fmoe_kernels.experts(x, ids, weights, None, w_up[..., :0], w_down[:, :0])": "an expert of no width",
    "fmoe_kernels.products.gmm(x, w, offsets.int().float())": "offsets are whole numbers",
    "fmoe_kernels.products.gmm(x, w[:, :3], offsets)": "rows would be read out of bounds",
    "fmoe_kernels.products.gmm(x.double(), w, offsets)": "the products add up in fp32: digits would be lost",
    "fmoe_kernels.products.tgmm(x, y[:4], offsets)": "rows would be read out of bounds",
    "fmoe_kernels.activations.swiglu(u.tolist(), p)": "a kernel takes tensors",
}


def configs() -> dict[str, Any]:
    shapes = {"gate_proj": (I, D), "up_proj": (I, D), "down_proj": (D, I)}
    layers = [f"model.layers.{l}.mlp.experts.{e}.{p}.weight" for l in range(L) for e in range(E) for p in shapes]
    plain = {n: torch.ones(shapes[n.split(".")[-2]]) for n in layers}
    native = fmoe.adapter("qwen3_moe", SIZES).from_hf(plain)
    codes = {CODES: torch.ones(I, D).to(torch.float8_e4m3fn), CODES + "_scale_inv": torch.ones(1, 1)}
    return dict(
        fmoe=fmoe, SIZES=SIZES, plain=plain, native=native, whole=plain | {"lm_head.weight": torch.ones(9, D).int()},
        unknown=plain | {BLOCK + "0.mid_proj.weight": torch.ones(I, D)},
        lone_scale=plain | {CODES + "_scale_inv": torch.ones(1, 1)},
        lone_codes=plain | {CODES: codes[CODES]},
        IGNORES={"quantization_config": {"quant_method": "fp8", "ignored_layers": [BLOCK + "0.up_proj"]}},
        coded=_all(plain, codes),
        HQQ={"quantization_config": {"quant_method": "hqq"}}, GPTQ={"quantization_config": {"quant_method": "gptq"}},
        hqq={n: t for n, t in plain.items() if n != CODES} | {CODES[:-6] + "W_q": torch.ones(1, I).byte()},
        ordered=plain | ORDERED, merged=native | GROUPS | {ATTENTION + "weight": torch.full((8, 16), 99.0)},
        zero=_all(plain, codes) | {CODES + "_scale_inv": torch.zeros(1, 1)},
    )  # fmt: skip


def _all(plain: dict[str, Any], codes: dict[str, Any]) -> dict[str, Any]:
    scales = {n + "_scale_inv": torch.ones(1, 1) for n in plain}
    return {n: t.to(torch.float8_e4m3fn) for n, t in plain.items()} | scales | codes


def lora() -> dict[str, Any]:
    adapter = fmoe.adapter("qwen3_moe", SIZES)
    base = {f"model.layers.{l}.mlp.experts.down_projs": torch.ones(E, I, D) for l in range(L)}
    made = fmoe.lora.init(base, r=2)

    def load(**fields: Any) -> object:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter"
            said = fmoe.lora.save(made, path, adapter).json() | fields
            (path / "adapter_config.json").write_text(json.dumps(said))
            return fmoe.lora.load(path, adapter)

    down = next(iter(base))
    pair = {n: t for n, t in made.items() if n.startswith(down[: -len("down_projs")])}
    return dict(fmoe=fmoe, torch=torch, load=load, base=base, pair=pair, down=down, E=E, I=I, D=D)


def layer() -> dict[str, Any]:
    from dataclasses import replace

    config = fmoe.MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=I, dtype=torch.float32)
    params = {"gate_and_up_projs": torch.ones(E, D, 2 * I), "down_projs": torch.ones(E, I, D)}
    x, gate = torch.ones(3, D), {"gate.weight": torch.ones(E, D)}
    routing = fmoe.Routing(torch.zeros(3, K, dtype=torch.long), torch.ones(3, K), None)
    return dict(fmoe=fmoe, torch=torch, replace=replace, config=config, params=params, x=x, gate=gate, routing=routing)


def kernels() -> dict[str, Any]:
    import fmoe_kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    new = lambda *shape: torch.ones(shape, device=device)
    fit = dict(x=new(5, 4), weights=new(5, 1), mask=new(5) > 0, w_up=new(2, 4, 12), w_down=new(2, 6, 4), w=new(2, 4, 6))
    fit |= dict(y=new(5, 6), u=new(5, 4), p=new(5, 1), ids=new(5, 1).long() * 0, offsets=new(2).long() * 5)
    return dict(fit, fmoe_kernels=fmoe_kernels, torch=torch)

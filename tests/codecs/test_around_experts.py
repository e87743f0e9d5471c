"""What quantised checkpoints hold outside their experts: scales of activations, blocks that begin again."""

import pytest
import torch
from foreign_cases import checkpoint
from hf import save
from safetensors.torch import load_file

import fmoe
from fmoe.testing import same

Q = "model.layers.0.self_attn.q_proj"
PARTS = ("input_scale", "input_global_scale", "input_scale_ub", "k_scale", "v_scale")


def mixed() -> tuple[dict, dict[str, torch.Tensor]]:
    """Experts in NVFP4, attention in FP8 of one scale, as ModelOpt mixes them."""
    config, hf, _ = checkpoint("qwen3_moe", "nvfp4")
    hf |= {f"{Q}.weight": torch.ones(8, 8).to(torch.float8_e4m3fn), f"{Q}.weight_scale": torch.tensor(0.5)}
    return config, hf | {f"{Q}.{part}": torch.tensor(0.25) for part in PARTS}


@pytest.mark.parametrize("keep", [False, True])
def test_scales_of_activations_outside_the_experts_come_back(keep):
    config, hf = mixed()
    adapter = fmoe.adapter("qwen3_moe", config, **({"quantized": "keep"} if keep else {}))
    same(adapter.to_hf(adapter.from_hf(hf)), hf)


def test_what_is_decoded_takes_none_of_them_along(tmp_path):
    config, hf = mixed()
    save(config, hf, tmp_path / "hf")
    fmoe.convert(tmp_path / "hf", tmp_path / "plain", "hf", dtype="bfloat16", fsync=False)
    found = {n: t for f in (tmp_path / "plain").glob("*.safetensors") for n, t in load_file(f).items()}
    assert found.keys() == {n for n in hf if n.endswith(".weight")}
    assert torch.equal(found[f"{Q}.weight"].float(), torch.full((8, 8), 0.5))


HEADS = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=48, v_head_dim=32)
SLIDING = dict(swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=64, swa_v_head_dim=40)


@pytest.mark.parametrize(("rows", "shards"), [(8 * 48 + 4 * 80, 4), (4 * 64 + 2 * 104, 2)])
def test_blocks_of_fused_projections_begin_again_at_every_shard(rows, shards):
    """Row r belongs to the scale (r div s) * ceil(s / 128) + (r mod s) div 128, s the rows of a shard."""
    config = {"model_type": "mimo_v2", "torch_dtype": "float32", "quantization_config": {"quant_method": "fp8"}}
    name, s = "model.layers.0.self_attn.qkv_proj.weight", rows // shards
    torch.manual_seed(0)
    each = -(-s // 128)
    codes = torch.randn(rows, 160).to(torch.float8_e4m3fn)
    scale = 0.5 + torch.rand(shards * each, 2)
    hf = {name: codes, name + "_scale_inv": scale}
    adapter = fmoe.adapter("mimo_v2", config | HEADS | SLIDING)
    native = adapter.from_hf(hf)
    for r in range(rows):
        factor = scale[r // s * each + r % s // 128].repeat_interleave(128)[:160]
        assert torch.equal(native[name][r], codes[r].float() * factor), r
    same(adapter.to_hf(native), hf)
    kept = fmoe.adapter("mimo_v2", config | HEADS | SLIDING, quantized="keep")
    same(kept.to_hf(kept.from_hf(hf)), hf)
    changed = native | {name: native[name] * 3}
    near = adapter.from_hf(adapter.to_hf(changed))[name]
    assert bool(((near - changed[name]).abs() <= changed[name].abs() / 16 + 0.01).all())
    other = {name.replace("qkv_proj", "o_proj"): codes, name.replace("qkv_proj", "o_proj") + "_scale_inv": scale}
    if len(scale) == -(-rows // 128):  # as many as blocks that do not begin again: of any other matrix they do not
        whole = adapter.from_hf(other)[name.replace("qkv_proj", "o_proj")]
        assert torch.equal(whole[s], codes[s].float() * scale[s // 128].repeat_interleave(128)[:160])
    else:
        with pytest.raises(fmoe.AdapterError, match="one for each block"):
            adapter.from_hf(other)

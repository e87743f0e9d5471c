"""The numbers of the real thing: a block from native parameters against Transformers' own module, and its gradients.

A law cannot see gate and up exchanged: this can.
"""

import hf
import hf_synthetic as synthetic
import pytest
import torch
from hf_blocks import assert_parity
from safetensors.torch import load_file

import fmoe


@pytest.mark.parametrize("name", hf.MODELS)
def test_a_block_gives_what_transformers_gives(name, tmp_path):
    model = hf.write(name, tmp_path)
    adapter = fmoe.adapter(tmp_path)
    native = adapter.from_hf({n: t for f in tmp_path.glob("*.safetensors") for n, t in load_file(f).items()})
    blocks = hf.moe_blocks(model, save_original_format=False)
    assert blocks
    for prefix, block in blocks:
        assert_parity(block, fmoe.subtree(native, prefix), adapter.moe_config, adapter.moe_config.dim)


def test_a_step3p5_block_gives_what_transformers_gives():
    config, tensors = synthetic.step3p5(swiglu_limits=[0.0] * 5, swiglu_limits_shared=[0.0] * 5)
    adapter = fmoe.adapter("step3p5", config)
    native = {n: t.float() for n, t in adapter.from_hf(tensors).items()}
    blocks = hf.step3p5_blocks(config, tensors)
    assert blocks
    for prefix, block in blocks:
        shared = fmoe.subtree(native, f"{prefix}.share_expert")
        params = fmoe.subtree(native, f"{prefix}.moe") | {f"shared_experts.{n}": t for n, t in shared.items()}
        assert_parity(block, params, adapter.moe_config, config["hidden_size"])


def test_a_clamp_that_no_activation_has_is_refused_not_ignored():
    config, _ = synthetic.step3p5()
    with pytest.raises(fmoe.AdapterError, match="swiglu_limits.*clamps after silu"):
        _ = fmoe.adapter("step3p5", config).moe_config


def test_the_oracle_sees_gate_and_up_exchanged(tmp_path):
    model = hf.write("mixtral", tmp_path)
    adapter = fmoe.adapter(tmp_path)
    native = adapter.from_hf({n: t for f in tmp_path.glob("*.safetensors") for n, t in load_file(f).items()})
    prefix, block = hf.moe_blocks(model, save_original_format=False)[0]
    params = fmoe.subtree(native, prefix)
    gate, up = params["experts.gate_and_up_projs"].chunk(2, -1)
    with pytest.raises(AssertionError):
        assert_parity(block, params | {"experts.gate_and_up_projs": torch.cat([up, gate], -1)}, adapter.moe_config, 32)

"""HF -> native -> HF on checkpoints that Transformers wrote, and on published layouts: names, dtypes and bits."""

from pathlib import Path
from types import MappingProxyType

import hf
import hf_synthetic as synthetic
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fmoe
from fmoe.testing import assert_laws, same
from fmoe.types import TensorSpec


def load(path: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.mark.parametrize("original", [True, False], ids=["as-published", "as-in-memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", hf.MODELS)
def test_what_transformers_wrote_comes_back(name, dtype, original, tmp_path):
    model = hf.write(name, tmp_path, dtype=dtype, save_original_format=original)
    tensors = load(tmp_path)
    found = fmoe.adapter(tmp_path)
    native = found.from_hf(MappingProxyType(tensors))
    same(found.to_hf(MappingProxyType(native)), tensors)
    same(dict(found.views(native)), tensors)
    same(dict(found.iter_hf(native)), tensors)
    assert found.lossless
    by_type = fmoe.adapter(model.config.model_type, model.config)  # a Transformers config, still open
    same(by_type.from_hf(tensors), native)
    assert by_type.resolve(tensors) == found and by_type.moe_config == found.moe_config


@pytest.mark.parametrize("name", synthetic.CHECKPOINTS)
def test_published_layouts_come_back(name):
    config, tensors = synthetic.CHECKPOINTS[name]()
    found = fmoe.adapter(config["model_type"], config).resolve(tensors)
    native = found.from_hf(MappingProxyType(tensors))
    same(found.to_hf(native), tensors)
    assert found.lossless == ("fp8" not in name)
    opened = fmoe.adapter(config["model_type"], config)
    same(opened.from_hf(tensors), native)
    if "fp8" in name:
        same(opened.to_hf(native, quantization=True), tensors)
    else:
        assert_laws(found, {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()})


@pytest.mark.parametrize("choice, other", [("fused", "split"), ("split", "fused")])
def test_layouts_of_one_checkpoint_agree_and_convert_into_each_other(choice, other):
    config, here = synthetic.qwen3_5_moe(mtp=choice)
    _, there = synthetic.qwen3_5_moe(mtp=other)
    opened = fmoe.adapter("qwen3_5_moe", config)
    same(opened.from_hf(here), opened.from_hf(there))
    label = {"fused": "fused", "split": "per_expert"}[other]
    same(fmoe.adapter("qwen3_5_moe", config, mtp_layout=label).to_hf(opened.from_hf(here)), there)


def test_an_open_adapter_writes_the_published_layout(tmp_path):
    hf.write("qwen3_5_moe", tmp_path)  # Transformers writes experts one by one, the hub has them fused
    tensors = load(tmp_path)
    config = fmoe.checkpoint.open_checkpoint(tmp_path).config
    opened = fmoe.adapter("qwen3_5_moe", config)
    published = opened.to_hf(opened.from_hf(tensors))
    assert published["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (8, 48, 32)
    assert not any(".experts.0." in name for name in published)
    same(fmoe.adapter("qwen3_5_moe", config, layout="per_expert").to_hf(opened.from_hf(published)), tensors)


SIZES = [(3, 4), (4, 4), (4, 2), (2, 4), (4, 8), (8, 4)]


@pytest.mark.parametrize(("D", "I"), SIZES)
@pytest.mark.parametrize("layout", ["transposed", "fused"])
def test_layouts_of_the_same_names_are_told_apart_by_the_configs_sizes_however_square(layout, D, I, tmp_path):
    """Of gate_up [2I, D] and down [D, I] one at least is not square."""
    sizes = dict(hidden_size=D, moe_intermediate_size=I, num_experts=2, num_hidden_layers=1)
    config = dict(model_type="qwen3_vl_moe", text_config=sizes)
    native = {f"model.layers.0.mlp.experts.{n}": torch.randn(s) for n, s in
              [("gate_and_up_projs", (2, D, 2 * I)), ("down_projs", (2, I, D))]}  # fmt: skip
    tensors = fmoe.adapter("qwen3_vl_moe", config, layout=layout).to_hf(native)
    same(fmoe.adapter("qwen3_vl_moe", config).from_hf(tensors), native)
    hf.save(config, {n: t.contiguous() for n, t in tensors.items()}, tmp_path / "hf")
    assert fmoe.inspect(tmp_path / "hf")["layout"] == {"layout": layout}
    fmoe.convert(tmp_path / "hf", tmp_path / "native", fsync=False)
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", fsync=False)
    same(load(tmp_path / "back"), tensors)


def test_native_names_are_the_seeds():
    config, tensors = synthetic.qwen3_5_moe(mtp="split")
    native = fmoe.adapter("qwen3_5_moe", config).from_hf(tensors)
    for name in (
        "model.language_model.layers.0.mlp.experts.gate_and_up_projs",
        "mtp.layers.0.mlp.experts.down_projs",
        "model.language_model.layers.1.mlp.shared_experts.up_proj.weight",
        "mtp.layers.0.mlp.shared_experts.gate_proj.weight",
        "model.language_model.layers.0.linear_attn._fp32_params.A_log",
        "mtp.layers.0.eh_proj.weight",
        "mtp.layers.0.enorm.weight",
        "mtp.layers.0.hnorm.weight",
        "mtp.layers.0.final_layernorm.weight",
    ):
        assert name in native
    _, step = synthetic.step3p5()
    native = fmoe.adapter("step3p5").from_hf(step)
    assert native["model.layers.2.moe.gate.e_score_correction_bias"] is step["model.layers.2.moe.router_bias"]
    assert native["model.layers.2.moe.experts.gate_and_up_projs"].shape == (8, 32, 48)


def test_dtype_casts_merged_experts_and_nothing_else():
    config, tensors = synthetic.deepseek_v3()
    cast = fmoe.adapter("deepseek_v3", config, dtype=torch.float32)
    kept = fmoe.adapter("deepseek_v3", config)
    assert not cast.lossless and kept.lossless
    native, plain = cast.from_hf(tensors), kept.from_hf(tensors)
    for name, tensor in native.items():
        merged = name.endswith(("gate_and_up_projs", "down_projs"))
        assert tensor.dtype == (torch.float32 if merged else plain[name].dtype)
        assert torch.equal(tensor, plain[name].to(tensor.dtype))
    assert native["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert cast.to_hf(native)["model.layers.1.mlp.experts.0.up_proj.weight"].dtype == torch.float32


def test_an_aggregated_family_moves_no_byte_and_a_stacked_one_is_written_through():
    config, tensors = synthetic.qwen3_5_moe()
    native = fmoe.adapter("qwen3_5_moe", config).from_hf(tensors)
    given = {t.data_ptr() for t in tensors.values()}
    assert all(t.data_ptr() in given for t in native.values())
    fresh = fmoe.adapter("qwen3_5_moe", config).from_hf(tensors, copy=True)
    assert not any(t.data_ptr() in given for t in fresh.values())
    same(fresh, native)
    assert all(
        t.is_contiguous() for t in fmoe.adapter("qwen3_5_moe", config).from_hf(tensors, contiguous=True).values()
    )


def test_one_native_tensor_at_a_time():
    config, tensors = synthetic.deepseek_v3_fp8()
    found = fmoe.adapter("deepseek_v3", config).resolve(tensors)
    native = found.from_hf(tensors)
    lazily = found.iter_hf(native)
    first = next(lazily)
    same(dict([first, *lazily]), tensors)
    one = "model.layers.1.mlp.gate.weight"
    assert [n for n, _ in found.convert_single_tensor_to_hf(one, native[one])] == [one]
    kept = fmoe.adapter("deepseek_v3", config).resolve(synthetic.deepseek_v3()[1])
    stack = "model.layers.1.mlp.experts.down_projs"
    pairs = kept.convert_single_tensor_to_hf(stack, native[stack])
    assert [n for n, _ in pairs] == [f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(8)]
    assert (
        kept.convert_single_tensor_to_hf(stack, native[stack], exclude_key_regex=r".*\.[1-7]\.down")[0][0]
        == pairs[0][0]
    )


def test_exclude_key_regex_matches_hf_names_from_their_start():
    config, tensors = synthetic.step3p5()
    adapter = fmoe.adapter("step3p5", config)
    native = adapter.from_hf(tensors)
    left = adapter.to_hf(native, exclude_key_regex=r".*moe\.(gate|up)_proj")
    assert left.keys() == {n for n in tensors if "moe.gate_proj" not in n and "moe.up_proj" not in n}
    assert adapter.to_hf(native, exclude_key_regex=r"moe").keys() == tensors.keys()

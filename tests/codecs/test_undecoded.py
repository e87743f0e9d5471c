"""Formats that are not read: a checkpoint in one is refused, and the error has the format's name."""

import pytest
import torch
from codec_cases import MLP, PLAIN, config

import fmoe

U8, I16, I32, I8 = torch.uint8, torch.int16, torch.int32, torch.int8
X = f"{MLP}0.up_proj"
A = "model.layers.1.self_attn.q_proj"
# what a config says -> the format's name, and a tensor as its tool writes one
SAID = {
    "bitsandbytes": (dict(quant_method="bitsandbytes", load_in_4bit=True), {f"{X}.weight": (U8, 16384, 1)}),
    "bitsandbytes ": (dict(quant_method="bitsandbytes", load_in_8bit=True), {f"{A}.weight": (I8, 128, 128)}),
    "hqq": (dict(quant_method="hqq", quant_config={"weight_quant_params": {"nbits": 4}}), {f"{X}.W_q": (U8, 64, 128)}),
    "exl2": (dict(quant_method="exl2", bits=4.0), {f"{X}.q_weight": (I32, 16, 128)}),
    "exl3": (dict(quant_method="exl3", bits=4.0), {f"{X}.trellis": (I16, 8, 8, 64)}),
    "fp_quant": (dict(quant_method="fp_quant", forward_dtype="mxfp4"), {f"{X}.qweight": (U8, 128, 64)}),
    "aqlm": (dict(quant_method="aqlm", nbits_per_codebook=8), {f"{X}.codes": (I8, 128, 16, 1)}),
    "quip": (dict(quant_method="quip"), {f"{X}.Qidxs": (I16, 128, 16)}),
    "vptq": (dict(quant_method="vptq"), {f"{X}.indices": (I32, 1, 128, 4)}),
    "higgs": (dict(quant_method="higgs", bits=4), {f"{X}.weight": (I16, 32, 64)}),
    "spqr": (dict(quant_method="spqr", bits=3), {f"{X}.dense_weights": (torch.int32, 64, 1)}),
    "eetq": (dict(quant_method="eetq", weights="int8"), {f"{X}.weight": (I8, 128, 128)}),
    "torchao": (dict(quant_method="torchao"), {f"{X}.weight_qdata": (I8, 128, 128)}),
    "bitnet": (dict(quant_method="bitnet"), {f"{X}.weight": (U8, 32, 128)}),
    "auto-round": (dict(quant_method="auto-round", bits=4), {f"{X}.qweight": (I32, 16, 128)}),
    "quanto": (dict(quant_method="quanto", weights="int4"), {f"{A}.weight._data": (U8, 64, 128)}),
    "compressed-tensors marlin-24": (
        dict(quant_method="compressed-tensors", format="marlin-24"), {f"{X}.weight_packed": (I32, 8, 128)}),
    "compressed-tensors mxfp6-pack-quantized": (
        dict(quant_method="compressed-tensors", format="mxfp6-pack-quantized"), {f"{X}.weight_packed": (U8, 128, 96)}),
    "compressed-tensors of 3 bits": (
        dict(quant_method="compressed-tensors", format="pack-quantized",
             config_groups={"group_0": {"weights": {"num_bits": 3}}}), {f"{X}.weight_packed": (I32, 128, 12)}),
    "modelopt W4A16_AWQ": (dict(quant_method="modelopt", quant_algo="W4A16_AWQ"), {f"{X}.weight": (U8, 64, 128)}),
    "gptq of 3 bits": (dict(quant_method="gptq", bits=3, group_size=32), {f"{X}.qweight": (I32, 12, 128)}),
    "gptq marlin": (dict(quant_method="gptq", bits=4, checkpoint_format="marlin"), {f"{X}.B": (I32, 8, 256)}),
    "gptq gptq_p": (dict(quant_method="gptq", bits=4, checkpoint_format="gptq_p"), {f"{A}.qweight": (I32, 8, 256)}),
    "awq gemv": (dict(quant_method="awq", bits=4, version="gemv"), {f"{X}.qweight": (I32, 128, 16)}),
    "awq llm-awq": (dict(quant_method="awq", bits=4, version="llm-awq"), {f"{X}.qweight": (I16, 32, 128)}),
}  # fmt: skip


@pytest.mark.parametrize("keep", [False, True], ids=["decode", "keep"])
@pytest.mark.parametrize("name", SAID)
def test_what_the_config_says_and_no_format_reads_is_refused_by_name(name, keep):
    told, tensors = SAID[name]
    torch.manual_seed(0)
    hf = {n: t for n, t in PLAIN["deepseek_v3"](128, 128).items() if X not in n or not any(X in k for k in tensors)}
    hf |= {n: torch.ones(shape, dtype=dtype) for n, (dtype, *shape) in tensors.items()}
    adapter = fmoe.adapter(
        "deepseek_v3",
        config("deepseek_v3", 128, 128) | {"quantization_config": told},
        **({"quantized": "keep"} if keep else {}),
    )
    with pytest.raises(fmoe.AdapterError, match=f"quantization_config says {name.strip()}, a format that") as error:
        adapter.from_hf(hf)
    assert set(tensors) <= set(error.value.keys)


@pytest.mark.parametrize("name", ["bitsandbytes", "hqq", "torchao"])
def test_what_is_plain_or_in_a_format_that_is_read_is_no_matter_of_that_word(name):
    told, _ = SAID[name]
    hf = PLAIN["deepseek_v3"](128, 128) | {"model.position_ids": torch.arange(4)}
    adapter = fmoe.adapter("deepseek_v3", config("deepseek_v3", 128, 128) | {"quantization_config": told})
    adapter.to_hf(adapter.from_hf(hf))


def test_a_directory_is_refused_too_and_nothing_is_written(tmp_path):
    from hf import save

    told, tensors = SAID["bitsandbytes "]
    hf = PLAIN["deepseek_v3"](128, 128) | {n: torch.ones(s, dtype=d) for n, (d, *s) in tensors.items()}
    save(config("deepseek_v3", 128, 128) | {"quantization_config": told}, hf, tmp_path / "hf")
    calls = (
        lambda: fmoe.load(tmp_path / "hf"),
        lambda: fmoe.verify(tmp_path / "hf"),
        lambda: fmoe.convert(tmp_path / "hf", tmp_path / "out", fsync=False),
        lambda: fmoe.convert(tmp_path / "hf", tmp_path / "out", "hf", dtype="bfloat16", fsync=False),
    )
    for call in calls:
        with pytest.raises(fmoe.AdapterError, match="quantization_config says bitsandbytes, a format that"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [False, True], ids=["decode", "keep"])
@pytest.mark.parametrize("at", ["w13.", "w13_", "0.w13.", "0.gate_proj."])
def test_inklings_experts_under_names_that_are_not_its_own_are_refused_with_them(at, keep):
    """As tools that quantise modules may write them; the published files have w13_weight beside w13_weight_scale."""
    shape = (64, 32) if at[0] == "0" else (2, 64, 32)
    parts = {"weight_packed": torch.ones(shape).byte(), "weight_global_scale": torch.ones(*shape[:-2], 1)}
    parts["weight_scale"] = torch.ones(*shape[:-1], 4).to(torch.float8_e4m3fn)
    hf = {f"model.layers.0.mlp.experts.{at}{name}": t for name, t in parts.items()}
    with pytest.raises(fmoe.AdapterError, match="no rule claims it") as error:
        fmoe.adapter("inkling_text", {}, **({"quantized": "keep"} if keep else {})).from_hf(hf)
    assert {n for n in hf if "packed" not in n} <= {*error.value.keys} and "scale_scale" not in str(error.value)


@pytest.mark.parametrize("keep", [False, True], ids=["decode", "keep"])
def test_a_stack_whose_scales_are_of_no_format_is_refused_with_both_names(keep):
    """ModelOpt's blocks of 128x128 in five dimensions."""
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    hf = {name: torch.ones(2, 64, 192).to(torch.float8_e4m3fn), f"{name}_weight_scale": torch.ones(2, 2, 1, 1, 1)}
    adapter = fmoe.adapter("llama4_text", {}, **({"quantized": "keep"} if keep else {}))
    with pytest.raises(
        fmoe.AdapterError, match=r"_weight_scale' is \[2, 2, 1, 1, 1\] torch.float32, expected"
    ) as error:
        adapter.from_hf(hf)
    assert set(hf) <= set(error.value.keys)

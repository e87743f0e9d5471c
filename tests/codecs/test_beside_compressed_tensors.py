"""Beside compressed-tensors itself: what it compresses we decode as it does, bit for bit in fp32, and the other way."""

import pytest
import torch
from torch import Tensor

import fmoe
from fmoe.codecs.foreign import twofold
from fmoe.codecs.formats import FORMATS
from fmoe.codecs.parts import as_named
from fmoe.testing import same

theirs = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")

STEM = "model.layers.0.mlp.experts."
E, D, I = 2, 128, 256
INT = dict(type="int", strategy="group", symmetric=True)
FP8 = dict(type="float", num_bits=8, symmetric=True)
MX = dict(type="float", strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8)

# a name -> (their format, what their config says of weights, the shape of scales of [o, i])
CASES = {
    "int4 of 32": ("pack-quantized", INT | dict(num_bits=4, group_size=32), lambda o, i: (o, i // 32)),
    "int4 of 64": ("pack-quantized", INT | dict(num_bits=4, group_size=64), lambda o, i: (o, i // 64)),
    "int4 channel": ("pack-quantized", dict(INT, strategy="channel", num_bits=4), lambda o, i: (o, 1)),
    "int8 of 64": ("pack-quantized", INT | dict(num_bits=8, group_size=64), lambda o, i: (o, i // 64)),
    "int4 of 64 with zero points": (
        "pack-quantized",
        INT | dict(num_bits=4, group_size=64, symmetric=False),
        lambda o, i: (o, i // 64),
    ),
    "int8 of 32 with zero points": (
        "pack-quantized",
        INT | dict(num_bits=8, group_size=32, symmetric=False),
        lambda o, i: (o, i // 32),
    ),
    "int8 w8a8 with zero points": (
        "int-quantized",
        dict(INT, strategy="channel", num_bits=8, symmetric=False),
        lambda o, i: (o, 1),
    ),
    "int8 w8a8": ("int-quantized", dict(INT, strategy="channel", num_bits=8), lambda o, i: (o, 1)),
    "fp8 tensor": ("float-quantized", FP8 | dict(strategy="tensor"), lambda o, i: (1,)),
    "fp8 channel": ("float-quantized", FP8 | dict(strategy="channel"), lambda o, i: (o, 1)),
    "fp8 block": (
        "float-quantized",
        FP8 | dict(strategy="block", block_structure=[128, 128]),
        lambda o, i: (-(-o // 128), -(-i // 128)),
    ),
    "fp8 group of 64": ("float-quantized", FP8 | dict(strategy="group", group_size=64), lambda o, i: (o, i // 64)),
    "nvfp4": ("nvfp4-pack-quantized", dict(type="float", num_bits=4, strategy="tensor_group", group_size=16,
                                           symmetric=True), lambda o, i: (o, i // 16)),
    "mxfp4": ("mxfp4-pack-quantized", MX | dict(num_bits=4), lambda o, i: (o, i // 32)),
    "mxfp8": ("mxfp8-quantized", MX | dict(num_bits=8), lambda o, i: (o, i // 32)),
}  # fmt: skip
ALL = pytest.mark.parametrize("case", CASES)


def scheme(case: str):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    fmt, weights, _ = CASES[case]
    made = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=fmt)
    return theirs.BaseCompressor.get_value_from_registry(fmt), made


def decompressed(case: str, parts: dict[str, Tensor]) -> Tensor:
    """What they say a weight is, in fp32; their module for NVFP4 rounds that to bf16, which must agree."""
    compressor, how = scheme(case)
    found = compressor.decompress(dict(parts), how)["weight"]
    if case != "nvfp4":
        assert found.dtype == torch.float32 or case.startswith("mx")  # powers of two: bf16 holds what they say
        return found.float()
    from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    scale, codes = parts["weight_scale"].float(), parts["weight_packed"]
    codes = unpack_fp4_from_uint8(codes, codes.shape[0], codes.shape[1] * 2, dtype=torch.float32)
    whole = dequantize(codes, scale, args=how.weights, global_scale=parts["weight_global_scale"], dtype=torch.float32)
    assert torch.equal(whole.bfloat16(), found)
    return whole


def drawn(case: str, weight: Tensor) -> dict[str, Tensor]:
    """A weight and scales for it, in fp32, as their compressors take them."""
    fmt, weights, shape = CASES[case]
    sizes = shape(*weight.shape)
    scale = weight.abs().max() / {4: 6, 8: 100}[weights["num_bits"]] * (0.5 + torch.rand(sizes))
    if fmt == "nvfp4-pack-quantized":
        return {"weight_scale": (80 + 300 * torch.rand(sizes)).to(torch.float8_e4m3fn).float(),
                "weight_global_scale": torch.tensor([2000.0 / weight.abs().max().item()])}  # fmt: skip
    if fmt.startswith("mx"):
        return {"weight_scale": torch.exp2(torch.randint(-3, 2, sizes).float())}
    half = 2 ** (weights["num_bits"] - 1)
    points = {} if weights["symmetric"] else {"weight_zero_point": torch.randint(-half, half, sizes).to(torch.int8)}
    return {"weight_scale": scale.bfloat16().float() if "pack" in fmt else scale} | points


def checkpoint(case: str) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """(config, the parts that their compressor makes, what their decompressor makes of them in fp32)."""
    torch.manual_seed(0)
    compressor, how = scheme(case)
    hf, said = {}, {}
    for e in range(E):
        for part, sizes in (("gate_proj", (I, D)), ("up_proj", (I, D)), ("down_proj", (D, I))):
            weight = torch.randn(sizes)
            made = compressor.compress({"weight": weight} | drawn(case, weight), how)
            hf |= {f"{STEM}{e}.{part}.{n}": t for n, t in made.items()}
            said[f"{e}.{part}"] = decompressed(case, made)
    weights = {n: v for n, v in CASES[case][1].items() if n != "scale_dtype"}
    told = {"quant_method": "compressed-tensors", "format": CASES[case][0]}
    told["config_groups"] = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    config = dict(model_type="qwen3_moe", hidden_size=D, moe_intermediate_size=I, num_experts=E, num_hidden_layers=1)
    config |= dict(num_experts_per_tok=1, torch_dtype="float32", quantization_config=told)
    return config, hf, said


@ALL
def test_what_it_compresses_is_decoded_as_it_decompresses_and_comes_back(case):
    config, hf, said = checkpoint(case)
    adapter = fmoe.adapter("qwen3_moe", config)
    native = adapter.from_hf(hf)
    for e in range(E):
        up = torch.cat([said[f"{e}.gate_proj"], said[f"{e}.up_proj"]]).T
        assert torch.equal(native[STEM + "gate_and_up_projs"][e], up)
        assert torch.equal(native[STEM + "down_projs"][e], said[f"{e}.down_proj"].T)
    same(adapter.to_hf(native), hf)
    kept = fmoe.adapter("qwen3_moe", config, quantized="keep")
    same(kept.to_hf(kept.from_hf(hf)), hf)


ROWS = {"int4 of 32": "int4 pack", "int8 w8a8": "int8 channel", "fp8 tensor": "fp8 side one", "mxfp8": "mxfp8 side",
        "fp8 channel": "fp8 side channel", "fp8 block": "fp8 side blocks", "nvfp4": "nvfp4 packed",
        "mxfp4": "mxfp4 packed"}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_what_we_encode_it_decompresses_to_what_we_decode(case):
    torch.manual_seed(0)
    f, weight = FORMATS[ROWS[case]], torch.randn(160, 256)
    p = as_named("S.weight", f, (160, 256))
    if p.second:
        codes, scale, second = twofold.encode(f, weight)
        parts = {p.second[0]: second.reshape(1)}
        ours = f.decode(codes, scale, torch.float32, second=second)
    else:
        (codes, scale), parts = f.encode(weight), {}
        ours = f.decode(codes, scale, torch.float32)
        if CASES[case][0] == "pack-quantized":
            scale, parts = scale.float(), {p.extent: torch.tensor(weight.shape)}
    parts |= {p.codes: codes, p.scale: scale.reshape(f.spelled(tuple(scale.shape)))}
    found = decompressed(case, {n.removeprefix("S."): t for n, t in parts.items()})
    assert torch.equal(found, ours) and bool(ours.any())

"""Beside the packages that write GPTQ and AWQ: what they decode, we decode alike, bit for bit in fp32.

.ci/run installs them without what they ask for, other versions of torch and Transformers. AutoGPTQ's and AutoAWQ's
files are run alone, since those packages' own imports ask for libraries that are gone.
"""

import affine_cases
import pytest
import torch
from torch import Tensor

import fmoe

S = "model.layers.0.self_attn.q_proj"
O = I = 256


def alone(package: str, path: str):
    """A file of an installed package, without the rest of it."""
    from importlib.util import find_spec, module_from_spec, spec_from_file_location

    if (found := find_spec(package)) is None:
        pytest.skip(f"{package} is not installed")
    spec = spec_from_file_location(path.rpartition("/")[2], f"{found.submodule_search_locations[0]}/{path}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(fmt: str, order: list[int] | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """(parts, scales in fp32 so that theirs multiply in it; what fmoe decodes them to)"""
    hf, _ = affine_cases.parts(fmt, S, O, I, 32, order=order)
    hf = hf | {f"{S}.scales": hf[f"{S}.scales"].float()}
    config = {"torch_dtype": "float32", "quantization_config": affine_cases.config_of(fmt, 32)}
    ours = fmoe.adapter("qwen3_moe", config).from_hf(hf)[f"{S}.weight"]
    return {n.removeprefix(f"{S}."): t for n, t in hf.items()}, ours


ORDER = [c % 8 for c in range(I)]


@pytest.mark.parametrize("fmt", ["gptq int4", "gptq int8"])
def test_autogptq_decodes_alike(fmt):
    linear = alone("auto_gptq", "nn_modules/qlinear/qlinear_cuda_old").QuantLinear
    parts, ours = drawn(fmt)
    theirs = linear(8 if "int8" in fmt else 4, 32, I, O, False, use_cuda_fp16=False, kernel_switch_threshold=0)
    for name, tensor in parts.items():
        setattr(theirs, name, tensor)
    assert torch.equal(theirs(torch.eye(I)).T, ours)


def test_autoawq_decodes_alike():
    parts, ours = drawn("awq int4")
    how = alone("awq", "utils/packing_utils").dequantize_gemm
    assert torch.equal(how(parts["qweight"], parts["qzeros"], parts["scales"], 4, 32).T, ours)


@pytest.mark.parametrize("order", [None, ORDER], ids=["plain", "ordered"])
@pytest.mark.parametrize("fmt", ["gptq int4", "gptq int8", "gptq_v2 int4", "gptq_v2 int8"])
def test_gptqmodel_decodes_alike(fmt, order):
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import _correct_gptq_v1_qzeros

    parts, ours = drawn(fmt, order)
    bits = 8 if "int8" in fmt else 4
    how = dict(bits=bits, group_size=32, sym=False, desc_act=order is not None, in_features=I, out_features=O)
    theirs = TorchLinear(**how, bias=False, register_buffers=True)
    if "v2" not in fmt:
        parts["qzeros"] = _correct_gptq_v1_qzeros(parts["qzeros"].clone(), bits)
    for name, tensor in parts.items():
        setattr(theirs, name, tensor)
    assert torch.equal(theirs.dequantize_weight().T, ours)


def test_gptqmodel_decodes_awq_alike_in_fp16():
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    parts, ours = drawn("awq int4")
    how = dict(bits=4, group_size=32, sym=False, desc_act=False, in_features=I, out_features=O)
    theirs = AwqTorchLinear(**how, bias=False, register_buffers=True)
    for name, tensor in parts.items():
        setattr(theirs, name, tensor)
    theirs.post_init()
    assert torch.equal(theirs(torch.eye(I)).T.half(), ours.half())

"""Formats: scales and codes that say nothing, and shapes that do not fit, are refused."""

import math

import pytest
import torch
from format_cases import ALL, FORMATS, exactly, shape_of

from fmoe.codecs import values
from fmoe.types import bits

BAD = {"NaN": math.nan, "inf": math.inf, "negative": -1.0}


@ALL
@pytest.mark.parametrize("what", BAD)
def test_a_scale_that_is_no_scale_is_refused(name, what):
    f = FORMATS[name]
    shape = shape_of(f, 6, 6)
    codes, scale = f.encode(torch.ones(shape))
    if f.scales[0] in (torch.uint8, values.E8M0):
        if what != "NaN":
            scale.view(torch.uint8).view(-1)[-1] = 254  # its largest code is no number of bf16
        else:
            scale.view(torch.uint8).view(-1)[-1] = 255
    else:
        scale.view(-1)[-1] = BAD[what]
    with pytest.raises(ValueError, match="expected finite scales from 0"):
        f.decode(codes, scale)


@ALL
def test_codes_under_a_scale_that_hides_them_are_refused_and_zeros_are_not(name):
    f = FORMATS[name]
    shape = shape_of(f, 6, 6)
    codes, scale = f.encode(torch.ones(shape))
    tiny = torch.zeros_like(scale) if f.scales[0] not in (torch.uint8, values.E8M0) else \
        torch.zeros_like(scale.view(torch.uint8)).view(scale.dtype)  # fmt: skip
    if f.code == "e2m1":  # 2^-127 is a scale like any other
        exactly(f.encode(f.decode(codes, tiny), tiny), (codes, tiny))
        return
    with pytest.raises(ValueError, match="codes under a scale of"):
        f.decode(codes, tiny)
    nothing, _ = f.encode(torch.zeros(shape))
    negative = bits(nothing).view(nothing.dtype).view(nothing.shape)
    decoded = f.decode(nothing, tiny)
    assert not decoded.any()
    exactly(f.encode(decoded, tiny), (negative, tiny))
    if f.code not in ("int4", "int8"):
        nothing, _ = f.encode(-torch.zeros(shape))
        assert bits(nothing).any()
        exactly(f.encode(f.decode(nothing, tiny), tiny), (nothing, tiny))


@ALL
def test_what_no_code_says_and_shapes_that_do_not_fit_are_refused(name):
    f = FORMATS[name]
    shape = shape_of(f, 6, 6)
    for bad in (math.inf, -math.inf, math.nan):
        weight = torch.ones(shape)
        weight.view(-1)[3] = bad
        if f.code == "e4m3" and math.isnan(bad):
            codes, scale = f.encode(weight)
            assert f.decode(codes, scale).isnan().sum() == 1 and scale.float().isfinite().all()
            continue
        with pytest.raises(ValueError, match="expected finite values"):
            f.encode(weight)
    codes, scale = f.encode(torch.ones(shape))
    with pytest.raises(ValueError, match="expected"):
        f.decode(codes, torch.ones((*scale.shape, 1)).to(scale.dtype))
    with pytest.raises(ValueError, match="expected those of"):
        f.decode(codes.view(torch.uint8).float(), scale)
    if f.block[1] == 32:
        with pytest.raises(ValueError, match="whole groups"):
            f.encode(torch.ones(f.as_stored((2, 6, 33))))


@ALL
def test_shapes_alone_and_empty_tensors(name):
    f = FORMATS[name]
    shape = shape_of(f, 6, 6)
    codes, scale = f.encode(torch.ones(shape, device="meta"))
    real = f.encode(torch.ones(shape))
    assert [(t.shape, t.dtype) for t in (codes, scale)] == [(t.shape, t.dtype) for t in real]
    assert f.decode(codes, scale).shape == shape and f.decode(codes, scale).is_meta
    empty = (*shape[:-2], 0, shape[-1]) if not f.transposed else (*shape[:-1], 0)
    codes, scale = f.encode(torch.ones(empty))
    assert f.decode(codes, scale).shape == empty

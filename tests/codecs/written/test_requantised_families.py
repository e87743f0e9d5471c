"""A good checkpoint of any family becomes FP8 that fmoe reads, or is refused with what to do."""

import re

import hf
import hf_zoo as zoo
import pytest
import torch
from directories import load

import fmoe
from fmoe.codecs.scales import BLOCKS
from fmoe.families import FAMILIES

NO_FORM = r"fused experts have no form in|no tensor of this checkpoint can be written in|no rules for"
PLAIN = {
    "longcat_flash": r"experts\.(8|9|1\d)\.",
    "dots3_note": r"vision_encoder\.",
    "ernie4_5_vl_moe": r"experts\.(8|9|1\d)\.",
}
"""Experts that stay as they are: zero experts, a vision tower's, of which no rule has scales."""


@pytest.mark.parametrize("name", [*hf.MODELS, *zoo.MODELS])
def test_fp8_of_a_good_checkpoint_is_read_again(name, tmp_path):
    source = zoo.saved(name)[1]
    try:
        fmoe.convert(source, tmp_path / "codes", "hf", quantize="fp8", fsync=False)
    except fmoe.AdapterError as error:
        assert re.search(NO_FORM, str(error)) and name not in PLAIN, str(error)[:500]
        return
    fmoe.verify(tmp_path / "codes")
    coded = [n for n, t in load(tmp_path / "codes").items() if t.dtype == torch.float8_e4m3fn]
    assert coded and (name not in PLAIN or not any(re.search(PLAIN[name], n) for n in coded))
    if name in PLAIN:
        assert any(re.search(PLAIN[name], n) for n in load(source))


def test_no_family_has_a_letter_for_itself_that_scales_have():
    """The size that the config says of it would be that of blocks."""
    taken = {letter for letters in BLOCKS.values() for letter in letters.values()}
    assert not [(name, {*kind.sizes} & taken) for name, kind in FAMILIES.items() if {*kind.sizes} & taken]

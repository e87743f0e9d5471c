"""A bound on bytes a second holds over all threads, and changes no byte."""

import time

import pytest
from command import demo
from directories import files

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.stream.rate import Rate


def test_n_bytes_take_n_over_the_bandwidth():
    waited: list[float] = []
    rate = Rate(100, waited.append)
    for _ in range(4):
        rate.take(50)
    assert waited == pytest.approx([0.5, 1.0, 1.5, 2.0], abs=0.1)


def test_a_conversion_keeps_to_its_bandwidth(tmp_path):
    fmoe.convert(demo() / "hf", tmp_path / "free")
    began = time.monotonic()
    fmoe.convert(demo() / "hf", tmp_path / "slow", bandwidth="1MB")
    assert time.monotonic() - began >= 0.594 and files(tmp_path / "slow") == files(tmp_path / "free")
    with pytest.raises(AdapterError, match="bandwidth is 'fast'"):
        fmoe.convert(demo() / "hf", tmp_path / "out", bandwidth="fast")

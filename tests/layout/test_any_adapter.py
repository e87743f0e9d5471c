"""`checkpoints` and `assert_laws` hold for whatever a user can build: every builder, beside, after and backwards."""

import pytest
from drawn import adapters
from hypothesis import given
from hypothesis import strategies as st

import fmoe
from fmoe import rule
from fmoe.testing import assert_laws, checkpoints


@given(st.data())
def test_whatever_a_user_builds_draws_checkpoints_that_keep_every_law(data):
    adapter = data.draw(adapters())
    assert_laws(adapter, data.draw(checkpoints(adapter)))


def test_parts_of_unknown_length_are_asked_for():
    loose = rule("{p=q|k|v}.w [p d]", "qkv [(q|k|v) d]")

    @given(checkpoints(loose))
    def never(specs):
        raise AssertionError

    with pytest.raises(fmoe.AdapterError, match="bind q, k, v"):
        never()

"""Laws that every adapter keeps, and hypothesis strategies that draw checkpoints for one: for your own adapters too.

    @given(checkpoints(my_adapter))
    def test_my_adapter(specs):
        assert_laws(my_adapter, specs)

The strategies need hypothesis: `pip install fmoe[test]`.
"""

from fmoe.testing.laws import assert_laws, same, tensors
from fmoe.testing.strategies import checkpoints, family_checkpoints, rules

__all__ = ["assert_laws", "checkpoints", "family_checkpoints", "rules", "same", "tensors"]

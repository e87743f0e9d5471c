"""Laws that every adapter keeps, and hypothesis strategies that draw checkpoints for one: for your own adapters too.

    from hypothesis import given, settings

    @settings(deadline=None)  # the first example also loads torch
    @given(checkpoints(my_adapter))
    def test_my_adapter(specs):
        assert_laws(my_adapter, specs)

    assert_laws((from_hf, to_hf), specs)  # two functions of yours
    same(by_einops(my_adapter, hf), my_adapter.from_hf(hf))  # another reading of the same rules

The strategies need hypothesis: `pip install "fmoe[testing]"`. The laws do not.
"""

from typing import TYPE_CHECKING, Any

from fmoe.entrance import held
from fmoe.testing.compared import same, tensors
from fmoe.testing.laws import assert_laws
from fmoe.testing.naive import by_einops

if TYPE_CHECKING:
    from fmoe.testing.strategies import checkpoints, family_checkpoints, rules

__all__ = ["assert_laws", "by_einops", "checkpoints", "family_checkpoints", "rules", "same", "tensors"]


def __dir__() -> list[str]:
    return [*__all__]


def __getattr__(name: str) -> Any:
    if name not in ("checkpoints", "family_checkpoints", "rules"):
        raise AttributeError(f"module 'fmoe.testing' has no attribute {name!r}")
    try:
        from fmoe.testing import strategies
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ImportError(f'fmoe.testing.{name} needs hypothesis: pip install "fmoe[testing]"') from error
    return getattr(strategies, name)


held(globals(), "assert_laws by_einops same tensors")

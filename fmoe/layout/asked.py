"""What an error of a plan means where the other side's names were given."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fmoe.types import AdapterError


@contextmanager
def asked(other: Callable[[], object]) -> Iterator[None]:
    """Where native names are expected, an unclaimed one is told so, if `other`, the way from HF, takes them all."""
    try:
        yield
    except AdapterError as error:
        if not any("no rule claims it" in problem for problem in error.problems):
            raise
        try:
            other()
        except AdapterError:
            raise error from None
        fix = "Fix: adapter.from_hf(params) first, as in fmoe.save(adapter.from_hf(params), ...)"
        raise AdapterError(f"these are Hugging Face's names, expected native ones. {fix}") from None

"""What an error of a plan means where the other side's names were given, or experts as another's memory has them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from fmoe.layout.claims import some
from fmoe.layout.grouping import Specs
from fmoe.types import AdapterError, MoEConfig, Problem


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


@contextmanager
def with_zeros(moe: MoEConfig | str, specs: Specs) -> Iterator[None]:
    """Where a stack does not fit because it has zero experts too, the error says so."""
    try:
        yield
    except AdapterError as error:
        if not (told := _zeros_in_stacks(moe, specs, error.keys)):
            raise
        raise AdapterError([*told, *error.found], error.rest) from None


def _zeros_in_stacks(moe: MoEConfig | str, specs: Specs, wrong: Iterable[str]) -> list[Problem]:
    """Of tensors that do not fit, those of as many experts as there are with zero experts: what they are, and a fix."""
    if isinstance(moe, str) or not moe.n_zero_experts:
        return []
    count, zeros = moe.n_routed_experts, moe.n_zero_experts
    found = tuple(n for n in wrong if n in specs and len(specs[n].shape) == 3 and specs[n].shape[0] == count + zeros)
    told = f"{count} experts and {zeros} zero experts in one tensor, as Transformers has them in memory and writes with"
    fix = "Fix: save_pretrained without it, in the published format, which is read"
    return [Problem(f"{some(found)}: {told} save_original_format=False. {fix}", found)] if found else []

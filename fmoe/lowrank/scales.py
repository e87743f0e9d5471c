"""What multiplies A @ B, matrix by matrix; the weight it is added to; how gate and up lie in B, each with its own A."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from fmoe.types import AdapterError, Problem

Scale = float | Mapping[str, float]
_FIX = "fmoe.activations.is_interleaved(config.expert_activation): True for quick_geglu, else False"


class Stack(NamedTuple):
    """How PEFT's matrices of a stack [n, ..] lie: A [(n r) one], B [other (r n)]; last: A takes its last dimension."""

    r: int
    last: bool
    grouped: bool

    def turned(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors [n, .., r] and [n, r, ..], whose products lie as the stack does."""
        A, experts = A.unflatten(0, (-1, self.r)), B.unflatten(1, (-1, self.r)).permute(1, 0, 2)
        B = experts if self.grouped else B.unflatten(1, (self.r, -1)).permute(2, 0, 1)
        return (B, A) if self.last else (A.mT, B.mT)


class Scales(dict[str, float]):
    """alpha / r of every matrix A, by its name. interleaved: the A's in whose B gate and up columns alternate.

    weights: the names of native weights, of the A's that files name otherwise. parts: what an update of the file's
    weight is natively, of the A's whose weight a rule cuts or turns. alike: all names of a native weight, where a model
    in memory has others than its published files. stacks: how the matrices of a stack that is no expert's lie.

    >>> scales = Scales({"lora_gate_and_up_A": 2.0}, interleaved=["lora_gate_and_up_A"])
    >>> scales, alternates("lora_gate_and_up_A", scales, None)
    ({'lora_gate_and_up_A': 2.0}, True)
    """

    def __init__(
        self,
        scales: Mapping[str, float],
        interleaved: Iterable[str],
        weights: Mapping[str, str] | None = None,
        parts: Mapping[str, Callable[[Tensor], Mapping[str, Tensor]]] | None = None,
        alike: Callable[[str], Iterable[str]] = lambda name: [name],
        stacks: Mapping[str, Stack] | None = None,
    ) -> None:
        super().__init__(scales)
        self.alike, self.stacks = alike, dict(stacks or {})
        self.interleaved, self.weights, self.parts = frozenset(interleaved), dict(weights or {}), dict(parts or {})


def alternates(name: str, scale: Scale | None, interleaved: bool | None) -> bool:
    """Whether gate and up columns alternate in the B of this A [E, D, 2, r]: as `interleaved` or the scales say.

    Raises AdapterError where neither says it, since both orders have one shape, and where they contradict each other.
    """
    known = name in scale.interleaved if isinstance(scale, Scales) and name in scale else None
    if interleaved is None and known is None:
        found = f"lora: {name!r} has one matrix for gate and one for up, and nothing says how their columns lie in B"
        fix = f"Fix: pass the scales of fmoe.lora.load (tuned.scales) as they are, or interleaved={_FIX}"
        raise AdapterError([Problem(f"{found}. {fix}", (name,))])
    if known is not None and interleaved not in (None, known):
        lie = "alternate" if known else "lie side by side"
        told = f"lora: {name!r}: interleaved={interleaved}, and its scales say that gate and up {lie}"
        raise AdapterError([Problem(f"{told}. Fix: leave interleaved= out", (name,))])
    return bool(known if interleaved is None else interleaved)

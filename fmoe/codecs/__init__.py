"""Value formats. A codec is a stage that changes values: a pair of pure functions, and `lossless` is False.

encode(decode(q)) == q      for every q that the codec itself wrote, and for every q whose scales are carried along
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fmoe.shards import blockwise
from fmoe.types import AdapterError, Problem, TensorSpec

Change = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class CodecPlan:
    """`changes`: (sources, targets, function) for the tensors that change; all others pass through.

    block: of a DTensor, the changes take whole blocks of that many; None: single numbers.
    """

    targets: dict[str, TensorSpec]
    changes: tuple[tuple[list[str], list[str], Change], ...]
    what: str
    narrowed: frozenset[str] = frozenset()
    block: int | None = None

    @cached_property
    def _maker(self) -> dict[str, int]:
        return {t: i for i, (_, targets, _) in enumerate(self.changes) for t in targets}

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: spec.shape for n, spec in self.targets.items()}

    def units(self) -> Iterator[tuple[list[str], list[str]]]:
        for sources, targets, _ in self.changes:
            yield sources, targets
        for name in self.targets:
            if name not in self._maker:
                yield [name], [name]

    def run(
        self, params: Mapping[str, Tensor], only: Iterable[str] | None = None, *, views: bool = False
    ) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name in self.targets if only is None else only:
            at = self._maker.get(name)
            if at is None:
                made[name] = params[name]
            elif name not in made:
                if views:
                    raise AdapterError(
                        [Problem(f"{name!r}: no view of native storage, {self.what} computes it", (name,))]
                    )
                sources, _, change = self.changes[at]
                made |= blockwise(change, {n: params[n] for n in sources}, self._shapes, self.block)
        return made

    def __str__(self) -> str:
        return f"{len(self.changes):>8,} tensors: {self.what}" if self.changes else ""

"""What a stage is: one invertible step over Params, and the plan that it makes for given names, shapes and dtypes."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names
from fmoe.types import TensorSpec


class StagePlan(Protocol):
    """What one stage will do: `targets` come out of it."""

    @property
    def targets(self) -> dict[str, TensorSpec]: ...
    @property
    def narrowed(self) -> frozenset[str]: ...
    def units(self) -> Iterator[tuple[list[str], list[str]]]: ...
    def run(
        self, params: Mapping[str, Tensor], only: Iterable[str] | None = None, *, views: bool = False
    ) -> dict[str, Tensor]: ...


class Stage(Protocol):
    """One invertible step over Params: a table of rules, a codec, or two adapters side by side."""

    @property
    def inverse(self) -> "Stage": ...
    @property
    def lossless(self) -> bool: ...
    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> StagePlan:
        """What it does to these names, shapes and dtypes. Raises AdapterError with every problem."""

    def resolve(self, names: Names, *, default: bool) -> "Stage":
        """The stage with its open choices settled by names; with no evidence the published ones, if `default`."""

    def rename(self, names: Names) -> list[str]:
        """One name of every form that comes out."""

    def choose(self, choices: Mapping[str, Any]) -> "Stage":
        """The stage with choices of these names made; others are not its own."""

    def choices(self) -> dict[str, tuple[str, ...]]:
        """What is open: the name of each choice, and its options, the published one first."""

    def axes(self) -> frozenset[str]:
        """The letters of its rules that are axes, those of all options included: what a range can be asked of."""

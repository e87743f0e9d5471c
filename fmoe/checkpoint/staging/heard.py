"""What changes say of themselves while they are made, by the job that made them: whoever goes on with a work knows it.

A journal's lines keep it, each as JSON, beside the job that they count as done.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from fmoe.codecs.survival import Survival

_Result = TypeVar("_Result")


class Heard:
    """Called with what a change says; `during` gives what was said within one call, in its thread."""

    def __init__(self) -> None:
        self._here = threading.local()

    def __call__(self, each: Survival) -> None:
        self._here.found.append(each)

    def during(self, run: Callable[[], _Result]) -> tuple[list[Survival], _Result]:
        """What is said while `run()` runs, and its result.

        >>> heard = Heard()
        >>> [each.name for each in heard.during(lambda: heard(Survival("w")))[0]]
        ['w']
        """
        self._here.found = found = list[Survival]()
        return found, run()


def line_of(found: Iterable[Survival], sum_: int | None = None) -> dict[str, Any]:
    """What a journal's line has of a job: what was said, if anything was, and the sum of what it wrote.

    >>> line_of([]), line_of([Survival("w", 3)])
    ({}, {'heard': [('w', 3, (), 0.0, 0.0, 0.0)]})
    """
    said = [tuple(each) for each in found]
    return ({"heard": said} if said else {}) | ({} if sum_ is None else {"sum": sum_})


def heard_of(line: Mapping[str, Any]) -> list[Survival]:
    return [Survival(*each) for each in line.get("heard", ())]

"""What changes say of themselves while they are made, by the job that made them: whoever goes on with a work knows it.

A journal's lines keep it, each as JSON, beside the job that they count as done.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fmoe.codecs.survival import Survival


class Heard:
    """Called with what a change says; `during` gives what was said within one call, in its thread."""

    def __init__(self) -> None:
        self._here = threading.local()

    def __call__(self, each: Survival) -> None:
        self._here.found.append(each)

    def during(self, run: Callable[[], object]) -> list[Survival]:
        """What is said while `run()` runs.

        >>> heard = Heard()
        >>> [each.name for each in heard.during(lambda: heard(Survival("w")))]
        ['w']
        """
        self._here.found = found = list[Survival]()
        run()
        return found


def line_of(found: Iterable[Survival]) -> dict[str, Any]:
    """What a journal's line has of it, if anything was said.

    >>> line_of([]), line_of([Survival("w", 3)])
    ({}, {'heard': [('w', 3, 0.0, 0.0, 0.0, 0.0)]})
    """
    said = [tuple(each) for each in found]
    return {"heard": said} if said else {}


def heard_of(line: Mapping[str, Any]) -> list[Survival]:
    return [Survival(*each) for each in line.get("heard", ())]

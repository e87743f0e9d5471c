"""A tensor that is changed part by part is judged as one, as where it is changed at once."""

import threading
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fmoe.checkpoint.stream.flow import Step
from fmoe.codecs import Vanished


class Judge:
    """What a step makes. Where nothing is left of it, the other parts of its tensor are made too: until something is.

    Nothing is remembered but what was found, so that it is the same in every process, and in one that goes on.
    """

    def __init__(self, steps: Sequence[Step], make: Callable[[Step], Mapping[str, Tensor]]):
        self._steps, self._make = steps, make
        self._found: dict[range, Vanished | None] = {}
        self._looking = threading.Lock()

    def __call__(self, step: Step) -> Mapping[str, Tensor]:
        try:
            return self._make(step)
        except Vanished as gone:
            with self._looking:
                if step.parts not in self._found:
                    self._found[step.parts] = self._whole(step.parts)
            if (worst := self._found[step.parts]) is not None:
                raise worst from None
            return gone.made

    def _whole(self, parts: range) -> Vanished | None:
        """The worst of all parts, if nothing is left of any."""
        worst = None
        for step in (self._steps[i] for i in parts):
            try:
                if any(bool(t.any()) for t in self._make(step).values()):
                    return None
            except Vanished as gone:
                worst = gone if worst is None or gone.most > worst.most else worst
        return worst

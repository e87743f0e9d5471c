"""Native storage under HF names, for whoever loads a checkpoint in place."""

from collections.abc import Iterable

from torch import Tensor

from fmoe.layout.claims import some
from fmoe.types import AdapterError, Problem


class Views(dict[str, Tensor]):
    """HF name -> strided view into native storage: whoever writes into it has loaded the model.

    >>> import fmoe, torch
    >>> adapter = fmoe.rule("w.{e} [d]", "w [e d]")
    >>> native = {"w": torch.zeros(2, 3)}
    >>> views = adapter.views(native)
    >>> _ = views["w.1"].fill_(7)
    >>> native["w"][1].tolist(), views.written(["w.1"]), views.written(["w.0", "w.1"])
    ([7.0, 7.0, 7.0], (), ('w',))
    """

    units: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()

    def written(self, names: Iterable[str] | None = None) -> tuple[str, ...]:
        """The native names that are wholly written once these HF names (default: all) are.

        Raises AdapterError for a name that there is no view of.
        """
        done = set(self if names is None else names)
        if unknown := tuple(sorted(done - self.keys())):
            raise AdapterError([Problem(f"{some(unknown)}: no view has this name, expected a HF name", unknown)])
        return tuple(n for natives, hf in self.units if done.issuperset(hf) for n in natives)

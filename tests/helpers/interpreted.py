"""Triton's interpreter, watched: programs in any order, every access held to its tensors, and products of bf16.

The interpreter runs one program after the other and lets pointers go anywhere. A GPU does neither: so `watched` runs
programs in another order, notes which bytes each program reads and writes, and reports what two programs of one launch
share (`races`) and what lies in no argument of the launch (`outside`).
"""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

Addresses = tuple[np.ndarray, np.ndarray]  # where, and by which program


@dataclass
class Seen:
    """What launches did. stores: how many were noted; a test whose number is 0 has watched nothing."""

    races: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    stores: int = 0
    launches: int = 0


class _Launch:
    def __init__(self, name: str, arguments: Any, order: str) -> None:
        self.name, self.order = name, order
        self.reads: list[Addresses] = []
        self.writes: list[Addresses] = []
        tensors = [a.base if isinstance(a, TensorDescriptor) else a for a in arguments]
        tensors = [t for t in tensors if isinstance(t, torch.Tensor) and t.numel()]
        spans = [(t.data_ptr(), t.data_ptr() + t.itemsize * (1 + _last(t))) for t in tensors]
        self.starts, self.ends = (np.array(side, np.uint64) for side in zip(*sorted(spans), strict=True))
        self.ends = np.maximum.accumulate(self.ends)
        self.program, self.programs = 0, iter(())

    def grid(self, size: tuple[int, int, int]) -> None:
        programs = list(itertools.product(*map(range, size)))
        if self.order == "reversed":
            programs.reverse()
        elif self.order != "forward":
            random.Random(self.order).shuffle(programs)
        self.programs = enumerate(programs)

    def note(self, kept: list[Addresses], pointers: np.ndarray, mask: np.ndarray, seen: Seen) -> None:
        found = np.asarray(pointers)[np.asarray(mask).astype(bool)].astype(np.uint64).ravel()
        at = np.searchsorted(self.starts, found, side="right") - 1
        outside = (at < 0) | (found >= self.ends[at])
        if outside.any():
            seen.outside.append(f"{self.name}: {int(outside.sum())} addresses")
        kept.append((found, np.full(len(found), self.program)))

    def finish(self, seen: Seen) -> None:
        seen.launches += 1
        writes, by = _joined(self.writes)
        seen.stores += len(writes)
        if not len(writes):
            return
        if ((writes[1:] == writes[:-1]) & (by[1:] != by[:-1])).any():
            seen.races.append(f"{self.name}: two programs write one address")
        reads, reader = _joined(self.reads)
        left, right = (np.searchsorted(writes, reads, side) for side in ("left", "right"))
        hit = right > left
        if (hit & (by[np.minimum(left, len(by) - 1)] != reader)).any():
            seen.races.append(f"{self.name}: a program reads what another writes")


def _last(t: torch.Tensor) -> int:
    return sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))


def _joined(parts: list[Addresses]) -> Addresses:
    if not parts:
        return np.zeros(0, np.uint64), np.zeros(0, int)
    where, who = (np.concatenate(side) for side in zip(*parts, strict=True))
    order = np.lexsort((who, where))
    return where[order], who[order]


@contextmanager
def watched(order: str = "forward", trace: bool = True) -> Iterator[Seen]:
    """Launches inside run in this order (forward, reversed, or shuffled by the text) and, with trace, are noted."""
    seen, current = Seen(), []
    builder, memory, run = interpreter.interpreter_builder, interpreter._interpreter, interpreter.GridExecutor.__call__

    def launch(self: Any, *arguments: Any, **options: Any) -> None:
        current.append(_Launch(self.fn.__name__, [*arguments, *options.values()], order))
        try:
            run(self, *arguments, **options)
            current[-1].finish(seen)
        finally:
            current.pop()

    def set_grid_dim(*size: int) -> None:
        current[-1].grid(size)
        type(builder).set_grid_dim(builder, *size)

    def set_grid_idx(*_: int) -> None:
        current[-1].program, place = next(current[-1].programs)
        type(builder).set_grid_idx(builder, *place)

    class Memory:
        def __getattr__(self, name: str) -> Any:
            return getattr(memory, name)

        @staticmethod
        def load(pointers: Any, mask: Any, *rest: Any) -> Any:
            if trace:
                current[-1].note(current[-1].reads, pointers, mask, seen)
                mask = mask & ~_wild(current[-1], pointers)
            return memory.load(pointers, mask, *rest)

        @staticmethod
        def store(pointers: Any, value: Any, mask: Any) -> Any:
            if trace:
                current[-1].note(current[-1].writes, pointers, mask, seen)
                mask = mask & ~_wild(current[-1], pointers)
            return memory.store(pointers, value, mask)

    interpreter.GridExecutor.__call__, interpreter._interpreter = launch, Memory()
    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    try:
        yield seen
    finally:
        interpreter.GridExecutor.__call__, interpreter._interpreter = run, memory
        del builder.set_grid_dim, builder.set_grid_idx


def _wild(launch: _Launch, pointers: np.ndarray) -> np.ndarray:
    """Which pointers lie in no argument: noted, and not followed."""
    found = pointers.astype(np.uint64)
    at = np.searchsorted(launch.starts, found, side="right") - 1
    return (at < 0) | (found >= launch.ends[at])


def bf16_products() -> None:
    """Makes the interpreter multiply and cast bf16, whose bits it takes for integers: through fp32, which holds it."""
    builder = interpreter.InterpreterBuilder
    dot, cast, handle = builder.create_dot, builder.cast_impl, interpreter.TensorHandle
    if getattr(dot, "of_bf16", False):
        return
    wide = lambda t: handle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def narrow(t: Any) -> Any:
        bits = torch.from_numpy(np.ascontiguousarray(t.data)).to(torch.bfloat16).view(torch.int16).numpy()
        return handle(bits.view(np.uint16).reshape(t.data.shape), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (wide(t) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, *rest)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        a, b = source.dtype.scalar, to.scalar
        if a == b or tl.bfloat16 not in (a, b):
            return cast(self, source, to)
        if a == tl.bfloat16:
            return cast(self, wide(source), to) if b != tl.float32 else wide(source)
        return narrow(source if a == tl.float32 else cast(self, source, tl.float32))

    create_dot.of_bf16 = True
    builder.create_dot, builder.cast_impl = create_dot, cast_impl

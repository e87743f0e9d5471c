"""Jobs carried out between files: pread, arrange, pwrite, on a few threads and in a few buffers.

Every thread holds at most two buffers of about a job's size, so memory does not depend on the checkpoint's.
"""

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmoe.checkpoint.files import disk
from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.checkpoint.remote.address import Address, Where
from fmoe.checkpoint.remote.spans import Gate
from fmoe.checkpoint.stream.ahead import fetched
from fmoe.checkpoint.stream.arrange import frame, move, ranges
from fmoe.checkpoint.stream.boxes import Box, Job, Place, box_of, bundled, jobs
from fmoe.checkpoint.stream.flow import Step, flow
from fmoe.checkpoint.stream.judged import Judge
from fmoe.checkpoint.stream.rate import Rate
from fmoe.checkpoint.stream.written import sum_at, sum_of, write_at, writing
from fmoe.layout.pipeline import Plan
from fmoe.types import bits

LIMIT = 16 * 2**20
BUNDLE = LIMIT // 4  # of small jobs that are asked for at once, where every request costs
AHEAD, AHEAD_FAR = 16, 64  # items begun or done behind one that is not; far away one may be asked for again and again
FLIGHT = 16 * LIMIT  # bytes on their way from another machine, and what is made of them


class Unit(NamedTuple):
    """What only `Plan.run` can make, in memory."""

    sources: list[str]
    targets: list[str]
    nbytes: int


class Engine:
    """Carries out a plan from a checkpoint's files to files that exist already, item by item, in any order.

    starts: the file of each target, and where its bytes begin in it. read, written: bytes, counted as they pass.
    sums: `run` gives the sum of what an item has written.
    """

    def __init__(
        self,
        source: Checkpoint,
        plan: Plan,
        starts: Mapping[str, tuple[Path, int]],
        limit: int = LIMIT,
        *,
        sums: bool = False,
    ):
        self.source, self.plan, self.flow, self.starts = source, plan, flow(plan, source.pieces), starts
        home = os.path.commonpath({path.parent for path, _ in starts.values()}) if starts else ""
        self.named = {path: path.relative_to(home).as_posix() for path, _ in starts.values()}
        self.paths = {name: path for path, name in self.named.items()}
        self.limit, self.sums, self.read, self.written = limit, sums, 0, 0
        self.gate = Gate(FLIGHT)
        self.rate: Rate | None = None
        self._lock, self._alone = threading.Lock(), threading.Lock()
        self._judged = Judge(self.flow.steps, self._made)
        self._here = threading.local()  # a thread's buffers, and the files that its job has open
        boxes = []
        for copy, step in self.flow.moves:
            path, at = starts[copy.target]
            if step is None:
                place, start = Place(source.files[copy.source]), source.offsets[copy.source]
            else:
                place, start = Place(copy.source, step), 0
            boxes.append(box_of(copy, place, start, Place(self.named[path]), at))
        size = lambda targets: sum(plan.targets[t].nbytes for t in targets)
        units = [Unit(sources, targets, size(targets)) for sources, targets in self.flow.units]
        made = jobs((b for b in boxes if b.nbytes), limit)
        far = isinstance(source.path, Address)
        self.ahead = AHEAD_FAR if far else AHEAD
        self.items: list[Job | Unit] = [*(bundled(made, min(limit, BUNDLE)) if far else made), *units]

    def files(self, items: Iterable[int]) -> set[Path]:
        """Those that these items write to, as they are called in the making."""
        jobs = [self.items[i] for i in items]
        names = {b.to.name for job in jobs if isinstance(job, Job) for b in job.boxes}
        made = {self.starts[t][0] for job in jobs if isinstance(job, Unit) for t in job.targets}
        return made | {self.paths[n] for n in names}

    def run(self, item: Job | Unit) -> int | None:
        """Everything that an item moves; the sum of what it writes, if asked for, as `stream.again` finds it there.

        Raises AdapterError where a source file is not what it was; OSError.
        """
        self._here.opened, self._here.sum = {}, 0
        if self.rate is not None:
            self.rate.take(item.nbytes)
        try:
            if isinstance(item, Unit):
                self._make(item)
                return self._here.sum if self.sums else None
            with self.gate.passing(2 * item.nbytes) if isinstance(self.source.path, Address) else nullcontext():
                self._here.fetched = fetched(item, self.source, self.flow)
                self._move(item)
            return self._here.sum if self.sums else None
        finally:
            self._here.fetched = {}
            for _, stack in self._here.opened.values():
                stack.close()

    def _make(self, unit: Unit) -> None:
        with self._alone:  # it may be large
            made = self.plan.run(self.source.read(unit.sources), unit.targets)
            self._count(sum(self.source.specs[n].nbytes for n in unit.sources), 0)
            for name, tensor in made.items():
                path, at = self.starts[name]
                self._write(Place(self.named[path]), bits(tensor), at)

    def _move(self, job: Job) -> None:
        if not job.steps and all(b.plain for b in job.boxes):
            for b in job.boxes:
                self._pass(b)
            return
        given = sum(spec.nbytes for i in job.steps for spec in self.flow.steps[i].specs.values())
        with self._alone if max(job.nbytes, given) > self.limit else nullcontext():
            made = {Place(n, i): bits(t) for i in job.steps for n, t in self._judged(self.flow.steps[i]).items()}
            boxes = self._shared(job, made)
            for low, high, inside in ranges(boxes, lambda b: (b.to, *b.to_span)):
                self._fill(inside, made, low, high)

    def _shared(self, job: Job, made: dict[Place, Tensor]) -> list[Box]:
        """The boxes, those that lie among each other in a file now in memory: such a range is read once."""
        boxes = [b for b in job.boxes if b.source.step is not None]
        buffer, at = self._buffer("whole", job.nbytes), 0
        for low, high, inside in ranges([b for b in job.boxes if b.source.step is None], lambda b: (b.source, *b.span)):
            if len(inside) > 1 and sum(b.nbytes for b in inside) == high - low:
                place = Place(inside[0].source.name, -1 - at)  # negative, so that it is no step's
                made[place] = buffer[at : at + high - low]
                self._read(inside[0].source, made[place], low)
                inside, at = [b._replace(source=place, at=b.at - low) for b in inside], at + high - low
            boxes += inside
        return boxes

    def _made(self, step: Step) -> dict[str, Tensor]:
        """What a step makes, of inputs read whole."""
        given = {}
        for name, spec in step.specs.items():
            data = torch.empty(spec.nbytes, dtype=torch.uint8)
            for copy in step.gather[name]:
                place = Place(self.source.files[copy.source])
                self._take(box_of(copy, place, self.source.offsets[copy.source], Place(name, 0), 0), data)
            given[name] = data.view(spec.dtype).view(spec.shape)
        return step.change(given)

    def _fill(self, boxes: Sequence[Box], made: Mapping[Place, Tensor], low: int, high: int) -> None:
        """One range of a file, from boxes that lie in it: at once where they leave no hole, else run by run."""
        if sum(b.nbytes for b in boxes) == high - low:
            buffer = self._buffer("out", high - low)
            self._gather([b._replace(to_at=b.to_at - low) for b in boxes], made, buffer)
            self._write(boxes[0].to, buffer, low)
            return
        for b in boxes:
            runs, inner, strides = frame(b.shape, b.to_strides, b.item, whole=True)
            buffer = self._buffer("out", b.nbytes)
            self._gather([b._replace(to_at=0, to_strides=strides)], made, buffer)
            for i, at in enumerate(runs):
                self._write(b.to, buffer[i * inner : (i + 1) * inner], b.to_at + at)

    def _gather(self, boxes: list[Box], made: Mapping[Place, Tensor], into: Tensor) -> None:
        for b in boxes:
            if b.source in made:
                move(b, made[b.source], into)
            else:
                self._take(b, into)

    def _take(self, b: Box, into: Tensor) -> None:
        """One box read from its file: run by run, or with the little that lies between its runs."""
        runs, inner, strides = frame(b.shape, b.strides, b.item)
        buffer = self._buffer("in", inner * len(runs))
        for i, at in enumerate(runs):
            self._read(b.source, buffer[i * inner : (i + 1) * inner], b.at + at)
        move(b._replace(at=0, strides=strides), buffer, into)

    def _pass(self, b: Box) -> None:
        """A contiguous run: inside the kernel as far as it can, the rest through a buffer, which knows what failed."""
        done = 0
        try:
            while done < b.nbytes and isinstance(self.source.path, Path):
                ends = self._source(b.source), self._target(b.to)
                n = os.copy_file_range(*ends, b.nbytes - done, b.at + done, b.to_at + done)
                if not n:
                    break
                done += n
        except (OSError, AttributeError):
            pass
        self._count(done, done)
        before = self._here.sum
        if done < b.nbytes:
            buffer = self._buffer("out", b.nbytes - done)
            self._read(b.source, buffer, b.at + done)
            self._write(b.to, buffer, b.to_at + done)
        if done and self.sums:
            self._here.sum = before + sum_at(self.paths[b.to.name], self._target(b.to), b.to_at, b.nbytes)

    def _read(self, place: Place, into: Tensor, at: int) -> None:
        held, view = self._here.fetched.get(place.name), into.numpy().data
        if held is None or not held.read(view, at):
            disk.read_at(self.source.path / place.name, self._source(place), view, at)
        self._count(into.numel(), 0)

    def _write(self, place: Place, data: Tensor, at: int) -> None:
        write_at(self.paths[place.name], self._target(place), data, at)
        self._here.sum += sum_of(data, at) if self.sums else 0
        self._count(0, data.numel())

    def _source(self, place: Place) -> Any:
        path, stamp = self.source.path / place.name, self.source.stamps[place.name]
        return self._opened(path, lambda: disk.reading(path, stamp, parts=bool(self.plan.narrowed)))

    def _target(self, place: Place) -> Any:
        path = self.paths[place.name]
        return self._opened(path, lambda: writing(path))

    def _opened(self, path: Where, opening: Callable[[], AbstractContextManager[disk.Opened]]) -> disk.Opened:
        """This thread's descriptor of a file; it holds but a few, those that it used last."""
        opened: dict[Where, tuple[disk.Opened, ExitStack]] = self._here.opened
        if path in opened:
            opened[path] = opened.pop(path)
        else:
            if len(opened) >= 4:
                opened.pop(next(iter(opened)))[1].close()
            stack = ExitStack()
            opened[path] = (stack.enter_context(opening()), stack)
        return opened[path][0]

    def _count(self, read: int, written: int) -> None:
        with self._lock:
            self.read += read
            self.written += written

    def _buffer(self, name: str, size: int) -> Tensor:
        """This thread's buffer of a name, as large as asked; what it held before is lost."""
        held = getattr(self._here, name, None)
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=torch.uint8)
            setattr(self._here, name, held)
        return held[:size]

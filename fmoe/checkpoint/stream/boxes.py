"""Strided copies as byte boxes between files, gathered into jobs: what is read once, arranged in memory, written once.

Boxes whose bytes interleave in a file belong to one job (an expert's gate and up lie row by row in its native stack);
a job larger than the limit is cut along an axis. Runs that lie side by side on both ends become one.
"""

from collections.abc import Iterable, Iterator
from itertools import product
from math import isqrt, prod
from typing import NamedTuple

from fmoe.layout.axes import Copy

LARGE = 4  # times the limit that a part may have which can only be cut into short runs
RUN = 8192  # bytes from which on a contiguous run is worth a read or a write of its own


class Place(NamedTuple):
    """A file of a directory, or (with a step) a tensor in memory that the step takes or makes."""

    name: str
    step: int | None = None


class Box(NamedTuple):
    """to[to_at + i . to_strides] = source[at + i . strides] for every i < shape; places and strides in bytes.

    Axes come by falling `to_strides`, none has length 1, and none could be one with the next. item: bytes of a number.
    """

    source: Place
    to: Place
    shape: tuple[int, ...]
    at: int
    strides: tuple[int, ...]
    to_at: int
    to_strides: tuple[int, ...]
    item: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.item

    @property
    def plain(self) -> bool:
        """Whether it is one contiguous run on both ends."""
        return not self.shape or self.strides == self.to_strides == (self.item,)

    @property
    def span(self) -> tuple[int, int]:
        """The bytes of the source from its first to behind its last."""
        return self.at, self.at + extent(self.shape, self.strides, self.item)

    @property
    def to_span(self) -> tuple[int, int]:
        return self.to_at, self.to_at + extent(self.shape, self.to_strides, self.item)

    def cut(self, *ranges: tuple[int, int, int]) -> "Box":
        """The part with the indices first..last of an axis, for every (axis, first, last)."""
        shape, at, to_at = list(self.shape), self.at, self.to_at
        for axis, first, last in ranges:
            shape[axis] = last - first
            at, to_at = at + first * self.strides[axis], to_at + first * self.to_strides[axis]
        return box(self.source, self.to, shape, at, self.strides, to_at, self.to_strides, self.item)


class Job(NamedTuple):
    """Boxes to be copied together, and the steps whose results they take."""

    boxes: tuple[Box, ...]
    nbytes: int
    steps: tuple[int, ...] = ()


def extent(shape: Iterable[int], strides: Iterable[int], item: int) -> int:
    return sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + item


def box(
    source: Place,
    to: Place,
    shape: Iterable[int],
    at: int,
    strides: Iterable[int],
    to_at: int,
    to_strides: Iterable[int],
    item: int,
) -> Box:
    """A box in its normal form."""
    axes = sorted((t, s, n) for n, s, t in zip(shape, strides, to_strides, strict=True) if n != 1)
    merged: list[tuple[int, int, int]] = []
    for t, s, n in axes:  # from the innermost outwards
        inner = merged[-1] if merged else None
        if inner and (t, s) == (inner[0] * inner[2], inner[1] * inner[2]):
            merged[-1] = (inner[0], inner[1], inner[2] * n)
        else:
            merged.append((t, s, n))
    t_, s_, n_ = zip(*reversed(merged), strict=True) if merged else ((), (), ())
    return Box(source, to, n_, at, s_, to_at, t_, item)


def box_of(copy: Copy, place: Place, start: int, to: Place, to_start: int) -> Box:
    """A copy between tensors that begin at these bytes of their places."""
    item = copy.dtype.itemsize
    size = lambda strides: [n * item for n in strides]
    at, to_at = start + copy.source_offset * item, to_start + copy.target_offset * item
    return box(place, to, copy.shape, at, size(copy.source_strides), to_at, size(copy.target_strides), item)


def jobs(boxes: Iterable[Box], limit: int) -> list[Job]:
    """Boxes as jobs of at most about limit bytes, in the order in which the source files hold them."""
    plain: list[Box] = []
    strided: list[Box] = []
    for b in boxes:
        (plain if b.plain and b.source.step is None else strided).append(b)
    made = [Job(tuple(part), sum(b.nbytes for b in part)) for part in _runs(plain, limit)]
    for cluster in _clusters(strided):
        steps = tuple(sorted({b.source.step for b in cluster if b.source.step is not None}))
        for part in (cluster,) if steps else _cut(cluster, limit):
            made.append(Job(tuple(part), sum(b.nbytes for b in part), steps))
    return sorted(made, key=lambda job: min((b.source.step is not None, b.source.name, b.at) for b in job.boxes))


def bundled(made: Iterable[Job], limit: int) -> Iterator[Job]:
    """Jobs that follow each other as one, up to the limit, where they take nothing that a step makes."""
    last: Job | None = None
    for job in made:
        if last and not (last.steps or job.steps) and last.nbytes + job.nbytes <= limit:
            last = Job(last.boxes + job.boxes, last.nbytes + job.nbytes)
            continue
        if last:
            yield last
        last = job
    if last:
        yield last


def _runs(boxes: list[Box], limit: int) -> Iterator[list[Box]]:
    """Contiguous runs, those that lie side by side on both ends as one, cut and then bundled to the limit."""
    joined: list[Box] = []
    for b in sorted(boxes, key=lambda b: (b.source, b.to, b.at)):
        run = Box(b.source, b.to, (b.nbytes,), b.at, (1,), b.to_at, (1,), 1)
        last = joined[-1] if joined else None
        if last and (last.source, last.to, last.span[1], last.to_span[1]) == (run.source, run.to, run.at, run.to_at):
            joined[-1] = last._replace(shape=(last.nbytes + run.nbytes,))
        else:
            joined.append(run)
    pieces = (b.cut((0, i, min(i + limit, b.nbytes))) for b in joined for i in range(0, b.nbytes, limit))
    bundle: list[Box] = []
    size = 0
    for piece in sorted(pieces, key=lambda b: (b.source, b.at)):
        if bundle and size + piece.nbytes > limit:
            yield bundle
            bundle, size = [], 0
        bundle.append(piece)
        size += piece.nbytes
    if bundle:
        yield bundle


def _clusters(boxes: list[Box]) -> Iterator[list[Box]]:
    """Boxes whose spans overlap in a file that they read or write, or that take from the same step."""
    parent = list(range(len(boxes)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for spans in ([(b.source, *b.span) for b in boxes], [(b.to, *b.to_span) for b in boxes]):
        last, end = -1, 0
        for i in sorted(range(len(boxes)), key=lambda i: (spans[i][0].step or -1, spans[i][0].name, spans[i][1])):
            place, start, stop = spans[i]
            same = last >= 0 and spans[last][0] == place
            if same and start < end:
                parent[root(i)] = root(last)
            last, end = i, max(end, stop) if same else stop
    first: dict[int, int] = {}
    for i, b in enumerate(boxes):
        if b.source.step is not None:
            parent[root(i)] = root(first.setdefault(b.source.step, i))
    found: dict[int, list[Box]] = {}
    for i, b in enumerate(boxes):
        found.setdefault(root(i), []).append(b)
    yield from found.values()


def _cut(boxes: list[Box], limit: int) -> Iterator[list[Box]]:
    """The cluster in parts that fit: all boxes along the axis that is outermost where they go, if it is the same.

    Where that would leave short runs to be read one by one, the parts are large ones, of which one is moved at a time.
    """
    size = sum(b.nbytes for b in boxes)
    if size <= limit:
        yield boxes
        return
    alike = len({(b.shape[:1], b.to_strides[:1]) for b in boxes}) == 1 and boxes[0].shape
    if not alike or not all(_whole(b, size, limit) for b in boxes):
        for part in (boxes,) if size <= LARGE * limit else (tile for b in boxes for tile in _tiles(b, LARGE * limit)):
            yield part
        return
    n = boxes[0].shape[0]
    some = max(1, n * limit // size)
    for i in range(0, n, some):
        part = [b.cut((0, i, min(i + some, n))) for b in boxes]
        yield from _cut(part, limit) if some == 1 else [part]


def _whole(b: Box, size: int, limit: int) -> bool:
    """Whether a cut along the first axis leaves runs in the source that are worth reading."""
    return b.strides[0] == max(b.strides) or b.strides[0] * max(1, b.shape[0] * limit // size) >= RUN


def _tiles(b: Box, limit: int) -> Iterator[list[Box]]:
    """A box in parts that fit, cut on the outermost axis of either end alike, so that runs stay long on both."""
    if b.nbytes <= limit:
        yield [b]
        return
    far = max(range(len(b.shape)), key=lambda k: b.strides[k])
    axes = {0, far}
    inner = b.nbytes // prod(b.shape[k] for k in axes)
    side = max(1, limit // inner if far == 0 else isqrt(limit // inner))
    for starts in product(*(range(0, b.shape[k], side) for k in axes)):
        ranges = [(k, i, min(i + side, b.shape[k])) for k, i in zip(axes, starts, strict=True)]
        yield from _tiles(b.cut(*ranges), limit)

"""What jobs have written, as sums: whoever goes on with a work sees whether its files still hold that."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from fmoe.checkpoint.staging.unfinished import Staging
from fmoe.checkpoint.stream.arrange import frame, ranges
from fmoe.checkpoint.stream.boxes import Job
from fmoe.checkpoint.stream.carry import in_order, pool
from fmoe.checkpoint.stream.engine import Engine, Unit
from fmoe.checkpoint.stream.written import sum_at, writing


def written(engine: Engine, item: Job | Unit) -> int:
    """The sum of the bytes that an item writes, as its files have them now."""
    found = 0
    for path, spans in groupby(_spans(engine, item), lambda span: span[0]):
        with writing(path) as descriptor:
            found += sum(sum_at(path, descriptor, at, size) for _, at, size in spans)
    return found


def again(stage: Staging, engine: Engine) -> None:
    """Of the items that an earlier run has done, those whose bytes are no longer there count as not done."""
    name = lambda path: path.relative_to(stage.path).as_posix().removesuffix(".part")
    here = lambda i: stage.sent.isdisjoint(map(name, engine.files([i])))
    known = [i for i in sorted({*range(stage.done), *stage.also}) if i in stage.sums and here(i)]
    if stage.stale is not None or not known:
        return
    with pool(None) as executor:
        found = in_order(executor, lambda i: written(engine, engine.items[i]), known)
        stage.undone({i for i, now in found if now != stage.sums[i]})


def _spans(engine: Engine, item: Job | Unit) -> Iterator[tuple[Path, int, int]]:
    """(file, where, how many bytes) of all that an item writes; what leaves no holes as one; as the engine does."""
    if isinstance(item, Unit):
        yield from ((*engine.starts[n], engine.plan.targets[n].nbytes) for n in item.targets)
        return
    for low, high, boxes in ranges(item.boxes, lambda b: (b.to, *b.to_span)):
        path = engine.paths[boxes[0].to.name]
        if sum(b.nbytes for b in boxes) == high - low:
            yield path, low, high - low
            continue
        for b in boxes:
            runs, inner, _ = frame(b.shape, b.to_strides, b.item, whole=True)
            yield from ((path, b.to_at + at, inner) for at in runs)

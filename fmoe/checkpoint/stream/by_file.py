"""Items cut so that each writes to one file: whoever makes a file needs none of the others."""

from collections.abc import Iterator

from fmoe.checkpoint.stream.boxes import Job
from fmoe.checkpoint.stream.engine import Engine, Unit


def by_file(engine: Engine, item: Job | Unit) -> Iterator[Job | Unit]:
    """The item, in parts. What two parts take of one step, or what `Plan.run` makes for both, is made twice."""
    if isinstance(item, Unit):
        for path in sorted({engine.starts[t][0] for t in item.targets}):
            targets = [t for t in item.targets if engine.starts[t][0] == path]
            yield Unit(item.sources, targets, sum(engine.plan.targets[t].nbytes for t in targets))
        return
    for file in dict.fromkeys(b.to for b in item.boxes):
        boxes = tuple(b for b in item.boxes if b.to == file)
        steps = {b.source.step for b in boxes}
        yield Job(boxes, sum(b.nbytes for b in boxes), tuple(i for i in item.steps if i in steps))

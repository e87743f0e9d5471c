"""Which bytes of a file an engine will read: whoever makes that file first need make no others."""

from collections.abc import Iterator

from fmoe.checkpoint.stream.boxes import Job, Place, box_of
from fmoe.checkpoint.stream.engine import Engine


def needed(engine: Engine, file: str) -> list[tuple[int, int]]:
    """(where it begins, how many bytes) of every part, those that overlap or follow each other as one."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(_spans(engine, file)):
        if found and low <= sum(found[-1]):
            start, size = found.pop()
            low, high = start, max(high, start + size)
        found.append((low, high - low))
    return found


def _spans(engine: Engine, file: str) -> Iterator[tuple[int, int]]:
    source = engine.source
    for item in engine.items:
        if isinstance(item, Job):
            yield from (b.span for b in item.boxes if b.source == Place(file))
            for copy in (c for i in item.steps for cs in engine.flow.steps[i].gather.values() for c in cs):
                if source.files[copy.source] == file:
                    yield box_of(copy, Place(file), source.offsets[copy.source], Place(""), 0).span
        else:
            here = (n for n in item.sources if source.files[n] == file)
            yield from ((source.offsets[n], source.offsets[n] + source.specs[n].nbytes) for n in here)

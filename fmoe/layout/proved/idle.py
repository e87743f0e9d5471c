"""Rules of one's own that claim nothing: a rename, rule, keep or drop that matches no name is told."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fmoe.folding import listed, meant
from fmoe.layout.entries import Drop, Entry, Keep, Together
from fmoe.layout.names import Names, hits
from fmoe.layout.notation import Rule
from fmoe.layout.spelled.address import Address

REST = ".{rest}"


def idle(entries: Iterable[Entry], names: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each entry that matches none of these names, and of each drop that does: what is gone.

    `keep {rest}`, and what only comes back, is no news.

    >>> from fmoe.layout.build import rename
    >>> (table,) = rename("modle.", "policy.").stages
    >>> list(idle(table.entries, {"model.norm.weight": 0}))
    ["rule modle.{rest}  <->  policy.{rest} matches no name. Did you mean 'model'?"]
    """
    there = Names(names)
    found = {entry: any(True for _ in hits(rule, there)) for entry, rule in _told(entries)}
    sources = {_source(entry).name: fits for entry, fits in found.items()}
    for entry, fits in found.items():
        source = _source(entry).name
        kin = source.removesuffix(REST) if source.endswith(REST) else source + REST  # a rename of a path has both
        if fits and isinstance(entry, Drop):
            gone = [n for _, _, rows in hits(entry.rule, there) for n in rows.names]
            yield f"{listed(gone, 8)}: {why(entry)}, and nothing brings {'it' if len(gone) == 1 else 'them'} back"
        if fits or sources.get(kin) or (kin in sources and source.endswith(REST)):
            continue
        kind = "" if isinstance(entry, Keep | Drop) else "rule "
        yield f"{kind}{entry} matches no name{_fix(entry, names)}"


def why(entry: Drop) -> str:
    """What became of a name that a drop of one's own matches."""
    return f"dropped by your rule drop({str(entry.pattern)!r}, because={entry.because!r})"


def dropped(stages: Iterable[Any], names: Iterable[str]) -> dict[str, str]:
    """The names, of those that go into the first stage, that a drop takes in some stage; and which, in a sentence."""
    found: dict[str, str] = {}
    for name in names:
        at = [name]
        for stage in stages:
            drops = [e for e in getattr(stage, "entries", ()) if isinstance(e, Drop) and not e.flipped | e.refused]
            if mine := [e for e in drops if any(True for _ in hits(e.rule, Names(at)))]:
                found[name] = why(mine[0])
                break
            at = stage.resolve(Names(at), default=True).rename(Names(at))
    return found


def _told(entries: Iterable[Entry]) -> Iterator[tuple[Entry, Rule]]:
    for entry in entries:
        if isinstance(entry, Rule):
            yield entry, entry
        elif isinstance(entry, Together):
            yield from ((rule, rule) for rule in entry.rules)
        elif isinstance(entry, Keep) and entry.spelled.strip(".") or isinstance(entry, Drop) and not entry.flipped:
            if not (isinstance(entry, Drop) and entry.refused):
                yield entry, entry.rule


def _source(entry: Entry) -> Address:
    assert isinstance(entry, Rule | Keep | Drop)
    return entry.source if isinstance(entry, Rule) else entry.pattern


def _fix(entry: Entry, names: Mapping[str, Any]) -> str:
    """How names would be matched that have these words in their middle, or nearly these at their beginning."""
    source = _source(entry)
    first = source.parts[0] if source.parts else ""
    if not isinstance(first, str):
        return ""
    if any(f".{first}" in name for name in names):
        fix = f"{{pre}}{source}" + (f"  <->  {{pre}}{entry.target}" if isinstance(entry, Rule) else "")
        return f", but {first!r} is in the middle of some. Fix: {fix}"
    starts = {name.split(".")[0] for name in names}
    return meant(first.split(".")[0], starts - {first.split(".")[0]})

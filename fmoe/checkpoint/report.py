"""What a conversion or a verification did, as a value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fmoe.layout.adapter import Adapter
from fmoe.layout.eager.html import table
from fmoe.types import human

Progress = Callable[[int, int], None]
"""Called with how many bytes are done, and how many there are: (0, all) once it is known to convert."""


class CheckpointWarning(UserWarning):
    """What `fmoe.load` and `fmoe.dcp.load` warn of, once a load: something may be lost, or could not be compared.

    `fmoe.inspect` and `fmoe.verify` say it in their notes. It is an error where one asks for that, as everywhere:
    `warnings.simplefilter("error", fmoe.CheckpointWarning)`.
    """


@dataclass(frozen=True)
class Report:
    """What a conversion or a verification did. `print` shows a small table, a notebook too.

    tensors and nbytes: of the source. made: how many came out.
    files: how many hold what came out. read, written: bytes of tensors that passed. resumed: bytes that an earlier,
    interrupted run had written. checksums: path -> sha256 of all files of both sides, where asked for. lost: of a
    conversion to another family, what does not carry over. notes: what else one should know: files that were not taken
    along, or of the former model gone from or left in the directory; what a family assumes; what a proof is not of.
    sides: where another system is on either side, what both were found to be.

    >>> print(Report("out", "mixtral", 52, 1_200_000, 8, Adapter(), files=1, read=1_200_000, notes=("no tokenizer",)))
    path     out
    family   mixtral
    tensors  52 -> 8, in 1 file
    bytes    1.2 MB (read 1.2 MB, written 0 B)
    note     no tokenizer
    """

    path: str
    family: str
    tensors: int
    nbytes: int
    made: int
    adapter: Adapter = field(repr=False)
    files: int = 0
    read: int = 0
    written: int = 0
    resumed: int = 0
    checksums: Mapping[str, str] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sides: str = ""

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)

    def _repr_html_(self) -> str:
        return table(self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        files = f", in {self.files:,} file{'s' * (self.files != 1)}" if self.files else ""
        moved = f"read {human(self.read)}, written {human(self.written)}"
        moved += f", {human(self.resumed)} by an earlier run" if self.resumed else ""
        rows = [("path", self.path), ("family", self.family), ("tensors", f"{self.tensors:,} -> {self.made:,}{files}")]
        rows += [("bytes", f"{human(self.nbytes)} ({moved})"), *([("sides", self.sides)] if self.sides else [])]
        rows += [("lost", text) for text in self.lost] + [("note", text) for text in self.notes]
        return rows + [("sha256", f"{digest}  {path}") for path, digest in self.checksums.items()]

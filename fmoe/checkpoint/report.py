"""What a conversion or a verification did, as a value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fmoe.layout.adapter import Adapter

Progress = Callable[[int, int], None]
"""Called with how many bytes are done, and how many there are: (0, all) once it is known to convert."""


@dataclass(frozen=True)
class Report:
    """What a conversion or a verification did. tensors and nbytes: of the source; made: how many came out.

    files: how many hold what came out. read, written: bytes of tensors that passed. resumed: bytes that an earlier,
    interrupted run had written. checksums: path -> sha256 of all files of both sides, where asked for. lost: of a
    conversion to another family, what does not carry over. notes: what else one should know: files that were not taken
    along, or of the former model gone from or left in the directory; what a family assumes; what a proof is not of.
    sides: where another system is on either side, what both were found to be.
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

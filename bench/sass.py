"""What machine code of an NVIDIA GPU spends: instructions of the main loop, before it and after it, and waits by kind.

The main loop is the innermost one with matrix instructions; the loop around it (over tiles) gives what comes before and
after. Where both are one loop (`flatten`), what it jumps over in most steps is what comes after. Counts are those of
one thread.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

MATRIX = re.compile(r"^([HQ]G?MMA|IMMA|DMMA)")
JUMP = re.compile(r"\(?`?\(?(\.L_x_\d+)")


def disassembled(cubin: bytes) -> list[str]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout.splitlines()


def parsed(lines: list[str]) -> tuple[list[str], dict[str, int]]:
    """(instructions in order, label -> the place of the instruction behind it)."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, lines):
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(re.sub(r"^[{\s]*@!?U?P\w+\s+", "", found[1]).lstrip("{ "))
    return instructions, labels


def counts(cubin: bytes) -> dict[str, int]:
    """loop, prologue, epilogue: instructions; exponentials and waits of the whole code. Empty without such a loop.

    A wait of wgmma leaves products in flight where its number is above 0; all are counted, and those apart.
    """
    instructions, labels = parsed(disassembled(cubin))
    again = lambda at: any(text.startswith("SYNCS.PHASECHK") for text in instructions[max(at - 2, 0) : at])
    jumps = [  # but those of barriers that are tried again
        (at, labels[to[1]])
        for at, text in enumerate(instructions)
        if text.startswith("BRA") and (to := JUMP.search(text)) and to[1] in labels and not again(at)
    ]
    loops = [(to, at) for at, to in jumps if to <= at]
    inside = lambda loop: instructions[loop[0] : loop[1] + 1]
    main = [loop for loop in loops if any(MATRIX.match(text) for text in inside(loop))]
    if not main:
        return {}
    inner = min(main, key=lambda loop: loop[1] - loop[0])
    outer = max(main, key=lambda loop: loop[1] - loop[0])
    tile = outer if outer != inner else (0, inner[1])
    skipped = sum(to - at - 1 for at, to in jumps if inner[0] < at < to < inner[1]) if outer == inner else 0
    number = lambda pattern, where=instructions: sum(bool(re.search(pattern, text)) for text in where)
    return dict(
        loop=inner[1] - inner[0] + 1 - skipped,
        prologue=inner[0] - tile[0],
        epilogue=tile[1] - inner[1] + skipped,
        exponentials=number(r"^MUFU\.EX2"),
        waits_wgmma=number(r"^WARPGROUP\.DEPBAR"),
        waits_wgmma_in_flight=number(r"^WARPGROUP\.DEPBAR\S* gsb\d, 0x[1-9a-f]"),
        waits_barrier=number(r"^SYNCS\.PHASECHK") // 2,  # a first try, and another until it is true
        prefetches=number(r"^CCTL\.\S*PF"),
        waits_copy=number(r"^LDGDEPBAR|^DEPBAR\.LE SB"),
    )


def at_once(registers: int, shared: int, warps: int) -> int:
    """Programs that fit on a multiprocessor of Hopper, by registers (256 at a time a warp), shared memory, threads."""
    by_registers = 65536 // (warps * 256 * -(-registers * 32 // 256))
    return min(by_registers, 233472 // (shared + 1024), 64 // warps)

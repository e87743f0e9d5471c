"""Imports point one way: a module imports from floors below its own, and the floors are those of README's tree."""

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Lowest first. A name stands for a module or for all of a folder; what stands on one line may see each other.
# Every file belongs to the longest name that fits it.
KERNELS = """
host
reference
programs
ops
tools
"""
CHECKPOINTS = """
folding
types
entrance
sharding
layout.eager.html layout.spelled
layout.notation layout.templates
layout.names layout.spelled.parsing layout.spelled.alias
layout.entries layout.axes
layout.proved.suspects layout.spelled.copies
layout.claims layout.eager.converting layout.sharded.placements
layout.grouping layout.eager.kinds layout.sharded.shards
layout.proved
layout.plan layout.stage
layout.units
layout.pipeline layout.table
layout.planning layout.sharded.mesh
layout.eager
layout.beside layout.asked
layout.adapter
layout.build
codecs
lowrank
families
lowrank.layers
lowrank.lacking
systems
checkpoint.report
checkpoint.remote
checkpoint.files
checkpoint.staging
checkpoint.stream
checkpoint.remote.ranks
checkpoint.together
checkpoint.sending
checkpoint.apart checkpoint.told
checkpoint.whole
checkpoint.which
checkpoint.open
checkpoint.sides checkpoint.target
checkpoint.between
checkpoint.look
checkpoint.diff
checkpoint.inspect checkpoint.load checkpoint.lora
checkpoint.convert
checkpoint.save checkpoint.verify
checkpoint
lora
sync
dcp
"""
LAYERS = """
folding
types
entrance
sharding
codecs.values codecs.blocks codecs.stored codecs.format codecs.formats codecs.stacks
activations shapes parallel
dispatch
backends
routing
losses
layer
nn
"""
TOP = """
surgery
integrations
draw
testing
cli
docs
"""  # these see both columns


def floors(text: str) -> dict[str, int]:
    return {name: i for i, line in enumerate(text.strip().splitlines()) for name in line.split()}


def floor(column: dict[str, int], name: str) -> int | None:
    """The floor of a dotted name: that of the longest entry which it is, or lies in."""
    parts = name.split(".")
    known = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((column[entry] for entry in known if entry in column), None)


@cache
def imports(path: Path) -> set[str]:
    """Every module that a file imports, and every name it takes from one, in dots."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(package: str) -> dict[str, Path]:
    """Dotted names within a package, without its own."""
    folder = ROOT / package
    paths = (p.relative_to(folder).with_suffix("") for p in folder.rglob("*.py"))
    return {".".join(p.parts).removesuffix(".__init__"): folder / p.with_suffix(".py") for p in sorted(paths)}


FMOE, FMOE_KERNELS = files("fmoe"), files("kernels/fmoe_kernels")
COLUMNS = [floors(CHECKPOINTS), floors(LAYERS)]


READING = {n for n, path in FMOE.items() if re.search("^ *(import|from) ", path.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("name", sorted(READING - {"__init__", "__main__"}))
def test_arrows_point_one_way(name):
    theirs = {n.removeprefix("fmoe.") for n in imports(FMOE[name]) if n.startswith("fmoe.")}
    column = next((c for c in COLUMNS if floor(c, name) is not None), None)
    if column is None:
        above = floors(TOP)
        mine = floor(above, name)
        assert mine is not None, f"{name}: on which floor does it stand? add it in the order of README's tree"
        up = [n for n in theirs if (at := floor(above, n)) is not None and at > mine]
        assert not up, f"{name} imports {up}: that arrow points up"
        return
    mine = floor(column, name)
    for other in theirs:
        at = floor(column, other)
        assert at is not None, f"{name} imports {other}, which is not in its column"
        assert at <= mine, f"{name} imports {other}: that arrow points up"


@pytest.mark.parametrize("name", [n for n in FMOE_KERNELS if n != "__init__"])
def test_kernels_know_no_model_and_point_one_way(name):
    used, column = imports(FMOE_KERNELS[name]), floors(KERNELS)
    outside = {n.split(".")[0] for n in used} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "triton", "fmoe_kernels"}
    for other in (n.removeprefix("fmoe_kernels.") for n in used if n.startswith("fmoe_kernels.")):
        assert floor(column, other) is not None, f"on which floor does {other} stand?"
        assert floor(column, other) <= floor(column, name), f"{name} imports {other}: that arrow points up"


def test_only_backends_and_dispatch_import_kernels_and_vendors():
    for name, path in FMOE.items():
        used = {n.split(".")[0] for n in imports(path)}
        assert not used & {"triton", "transformer_engine", "deep_ep", "fmoe_kernels"} or name.split(".")[0] in (
            "backends",
            "dispatch",
        ), name


def test_the_floors_are_those_of_the_readme():
    """The rooms of README's tree stand in the order of the floors."""
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("\n## ")[0]
    captions = [line for line in tree.splitlines() if line.startswith("    ")]
    assert len(captions) <= 40, f"README's tree has {len(captions)} lines, expected at most 40"
    rooms = [n for n in re.findall(r"^ {6}(\w+)(?:/|\.py)", tree.split("kernels/fmoe_kernels")[0], flags=re.M)]
    for text in (CHECKPOINTS, LAYERS, TOP):
        listed = [n for n in dict.fromkeys(name.split(".")[0] for name in text.split()) if n in FMOE and n != "shapes"]
        told = [room for room in rooms if room in listed]
        assert told == listed, f"README's tree: found {told}, expected {listed}"


def test_importing_fmoe_needs_no_accelerator_library_and_no_test_library():
    code = (
        "import sys, fmoe; print(*(m for m in ('triton', 'transformers', 'hypothesis', 'pytest') if m in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_a_family_stays_a_short_file_of_data():
    for path in (ROOT / "fmoe" / "families").glob("*/*.py"):
        assert len(path.read_text().splitlines()) < 150, path


PARTS = [path for part in ("fmoe", "kernels", "tests", "bench") for path in sorted((ROOT / part).rglob("*.py"))]


def test_files_stay_short():
    for path in PARTS:
        lines = len(path.read_text().splitlines())
        assert lines <= 250, f"{path.relative_to(ROOT)} has {lines} lines, expected at most 250: is it one thing?"


def test_the_median_file_is_short():
    lines = sorted(len(path.read_text().splitlines()) for path in (*FMOE.values(), *FMOE_KERNELS.values()))
    assert lines[len(lines) // 2] <= 110, f"the median file has {lines[len(lines) // 2]} lines, expected at most 110"


def test_rooms_stay_small():
    """No folder has more than 18 files of code directly in it, `__init__.py` among them."""
    rooms = Counter(path.parent for path in PARTS)
    assert len(rooms) > 50
    for folder, n in rooms.items():
        assert n <= 18, f"{folder.relative_to(ROOT)} has {n} files: which of them belong together?"


def test_a_test_files_name_is_one_of_a_kind():
    names = Counter(path.name for path in PARTS if path.name.startswith("test_"))
    assert len(names) > 150 and not {name: n for name, n in names.items() if n > 1}

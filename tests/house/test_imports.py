"""Imports point one way: kernels <- backends <- experts, and types <- rules <- plan <- adapter <- families."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# lowest first: a module imports only from lines above its own (and from its own line)
CHECKPOINT = [
    "types",
    "rules",
    "names",
    "entries",
    "claims axes",
    "grouping",
    "sharding",
    "placements",
    "shards",
    "plan",
    "pipeline views",
    "mesh",
    "table",
    "beside",
    "adapter",
    "build",
    "codecs",
    "lora",
    "families",
    "cross",
    "checkpoint",
    "dcp",
]
COMPUTE = [
    "types",
    "sharding",
    "activations shapes recompute parallel",
    "dispatch",
    "backends",
    "experts routing",
    "moe nn",
]
TOP = ["demo testing", "integrations", "cli"]  # these may see both columns


def level(column: list[str], name: str) -> int | None:
    return next((i for i, line in enumerate(column) if name in line.split()), None)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def part(path: Path) -> str:
    return path.relative_to(ROOT / "fmoe").with_suffix("").parts[0]


FILES = sorted((ROOT / "fmoe").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    me = part(path)
    if me == "__init__":
        return
    theirs = {name.split(".")[1] for name in imports(path) if name.startswith("fmoe.")}
    for column in (CHECKPOINT, COMPUTE):
        mine = level(column, me)
        if mine is not None:
            break
    else:
        column, mine = TOP, level(TOP, me)
        assert mine is not None, f"{path}: which column does {me} belong to? add it here"
        assert all(level(CHECKPOINT + COMPUTE, t) is not None or level(TOP, t) <= mine for t in theirs)
        return
    for other in theirs - {me}:
        at = level(column, other)
        assert at is not None and at <= mine, f"{me} imports {other}: that arrow points the wrong way"


def test_only_backends_and_dispatch_import_kernels_and_kernels_import_nothing_of_ours():
    for path in FILES:
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & {"triton", "transformer_engine", "deep_ep"} or part(path) in ("backends", "dispatch")
        assert "fmoe_kernels" not in used or part(path) in ("backends", "dispatch"), path
    for path in (ROOT / "kernels").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "triton", "fmoe_kernels"}, path


def test_importing_fmoe_needs_no_accelerator_library_and_no_test_library():
    code = (
        "import sys, fmoe; print(*(m for m in ('triton', 'transformers', 'hypothesis', 'pytest') if m in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_a_family_stays_a_short_file_of_data():
    for path in (ROOT / "fmoe" / "families").glob("*/*.py"):
        assert len(path.read_text().splitlines()) < 150, path


def test_files_stay_short():
    for path in [*FILES, *(ROOT / "kernels").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 250, f"{path}: is it one thing?"

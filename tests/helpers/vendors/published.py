"""Signatures of published packages, parsed from their source and kept in `signatures/`: facts, and no line of code.

    python tests/published.py WHEEL.whl ...        writes signatures/<distribution>-<version>.json for each

A wheel is a zip: nothing of it is installed or imported. `parsed` reads the source of an installed package as well.
"""

import ast
import hashlib
import inspect
import json
import sys
import zipfile
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "signatures"
STATE = ("FP8GlobalStateManager.is_fp8_enabled", "FP8GlobalStateManager.get_fp8_recipe")
# by distribution: file -> the functions of it that we call
CALLED: dict[str, dict[str, tuple[str, ...]]] = {
    "transformer_engine": {
        "transformer_engine/pytorch/module/grouped_linear.py": ("GroupedLinear.__init__", "GroupedLinear.forward"),
        "transformer_engine/pytorch/quantization.py": ("autocast.__init__", *STATE),
        "transformer_engine/pytorch/fp8.py": ("fp8_autocast", *STATE),
        "transformer_engine/common/recipe/__init__.py": tuple(
            f"Recipe.{kind}" for kind in ("delayed", "custom", "mxfp8", "nvfp4")
        ),
    },
    "sgl_deep_ep": {
        "deep_ep/buffers/elastic.py": tuple(
            f"ElasticBuffer.{name}" for name in ("__init__", "dispatch", "combine", "destroy")
        ),
        "deep_ep/buffers/legacy.py": tuple(
            f"Buffer.{name}" for name in ("__init__", "get_dispatch_layout", "dispatch", "combine", "destroy")
        )
        + ("Buffer.get_dispatch_config", "Buffer.get_combine_config"),
    },
}


def parsed(source: str, names: tuple[str, ...]) -> dict[str, str]:
    """By name: the parameters of each, without annotations, self and cls, as in 'a, b=None, *, c=1'."""
    found = {}
    tree = ast.parse(source)
    spots = [("", node) for node in tree.body]
    spots += [(f"{c.name}.", n) for c in tree.body if isinstance(c, ast.ClassDef) for n in c.body]
    for prefix, node in spots:
        if isinstance(node, ast.FunctionDef) and prefix + node.name in names:
            for a in (*node.args.args, *node.args.kwonlyargs):
                a.annotation = None
            if node.args.args and node.args.args[0].arg in ("self", "cls"):
                node.args.args = node.args.args[1:]
            found[prefix + node.name] = ast.unparse(node.args)
    return found


def signature(text: str) -> inspect.Signature:
    """The signature that `parsed` wrote; its defaults are left as text."""
    made = ast.parse(f"def f({text}): pass").body[0]
    assert isinstance(made, ast.FunctionDef)
    a, kind = made.args, inspect.Parameter
    defaults = [None] * (len(a.args) - len(a.defaults)) + list(a.defaults)
    pairs = [(p, d, kind.POSITIONAL_OR_KEYWORD) for p, d in zip(a.args, defaults, strict=True)]
    pairs += [(p, d, kind.KEYWORD_ONLY) for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return inspect.Signature([kind(p.arg, k, default=kind.empty if d is None else ast.unparse(d)) for p, d, k in pairs])


@cache
def recorded() -> dict[str, dict[str, inspect.Signature]]:
    """By '<distribution>-<version>': the signature of each function."""
    found = {}
    for path in sorted(HERE.glob("*.json")):
        files = json.loads(path.read_text())["files"].values()
        found[path.stem] = {name: signature(text) for file in files for name, text in file["signatures"].items()}
    return found


def record(wheel: Path) -> dict[str, Any]:
    distribution, version = wheel.name.split("-")[:2]
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for name, wanted in CALLED[distribution].items():
            source = archive.read(name) if name in archive.namelist() else b""
            if signatures := parsed(source.decode(), wanted):
                files[name] = {"sha256": hashlib.sha256(source).hexdigest(), "signatures": signatures}
    whole = hashlib.sha256(wheel.read_bytes()).hexdigest()
    about = {"distribution": distribution, "version": version, "wheel": wheel.name, "wheel_sha256": whole}
    return about | {"recorded": date.today().isoformat(), "files": files}


if __name__ == "__main__":
    for arg in sys.argv[1:]:
        made = record(Path(arg))
        (HERE / f"{made['distribution']}-{made['version']}.json").write_text(json.dumps(made, indent=1) + "\n")

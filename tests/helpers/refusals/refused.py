"""`python tests/helpers/refusals/refused.py` writes `fmoe/docs/refused.md`: what is refused, its error, and why.

And in README a row of each section, the shortest.

Every row is run: those of the tests' tables (`REFUSED` of test_proof.py and test_checkpoint_refusals.py, `CALLS` of
test_only_adapter_errors.py), and the expressions of `refused_calls.py`. A row that is not refused, or has no reason,
is an error here; a page that is not what this writes is one in tests/house/test_refused.py.
"""

import ast
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parents[3]
LONG = 400  # characters of a line that are shown
PAGE = ROOT / "fmoe" / "docs" / "refused.md"
README = ROOT / "README.md"
TABLE = "| what one writes | the error | why |\n|---|---|---|"
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(ROOT / "tests" / room) for room in ("helpers", "layout", "checkpoint")]

import refused_calls as calls  # noqa: E402
import refused_why as why  # noqa: E402

import fmoe  # noqa: E402

HEAD = """# What is refused, and why

fmoe raises where a number could be wrong, or a tensor lost, without a word: `AdapterError` for checkpoints, rules and
LoRA, `ValueError` for layers and kernels (an `AdapterError` is one). Nothing is written before. Each row below is run
by the tests, and this page is what they print: `python tests/helpers/refusals/refused.py`.
"""


class Row(NamedTuple):
    """What one writes, in code or in words, and the reason that it is refused for; `run` raises."""

    what: str
    run: Callable[[], object]
    why: str


def reasons(table: dict[str, str], rows: list[str]) -> dict[str, str]:
    """The reason of every row, of a table of reasons and the rows that each is for, between bars."""
    found = {row.strip(): reason for reason, names in table.items() for row in names.split("|")}
    if odd := found.keys() ^ set(rows):
        raise ValueError(f"refused_why.py: rows without a reason, or reasons without a row: {sorted(odd)}")
    return found


def rules() -> Iterator[Row]:
    import test_proof

    given = reasons(why.RULES, [*test_proof.REFUSED])
    for name, (adapter, hf, _) in test_proof.REFUSED.items():
        what = f"{name}: {code(str(adapter))} on {', '.join(map(code, hf))}"
        yield Row(what, lambda adapter=adapter, hf=hf: adapter.from_hf(hf), given[name])


def on_adapters() -> Iterator[Row]:
    import test_only_adapter_errors as test

    given, written = reasons(why.CALLS, [*test.CALLS]), sources(test, "CALLS")
    for name, call in test.CALLS.items():
        yield Row(code(written[name]), call, given[name])


def sources(module: ModuleType, table: str) -> dict[str, str]:
    """The expressions of a dict of lambdas, as the module's file has them."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    assigned = next(
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == table
    )
    assert isinstance(assigned, ast.Dict)
    pairs = zip(assigned.keys, assigned.values, strict=True)
    return {ast.literal_eval(k): ast.unparse(v.body) for k, v in pairs if k and isinstance(v, ast.Lambda)}


def directories() -> Iterator[Row]:
    import test_checkpoint_refusals as test
    from directories import fill

    given = reasons(why.DIRECTORIES, [*test.REFUSED])
    for name, (change, _) in test.REFUSED.items():

        def run(change: Callable[[Path], object] = change) -> object:
            with tempfile.TemporaryDirectory() as folder:
                change(fill(Path(folder) / "source", "qwen3_moe-float32"))
                return fmoe.verify(Path(folder) / "source")

        yield Row(f"a directory with {name}" if name[:2] in ("a ", "an") else name, run, given[name])


def expressions(table: dict[str, str], names: Callable[[], dict[str, object]]) -> Callable[[], Iterator[Row]]:
    """Rows of expressions, each evaluated with these names."""

    def rows() -> Iterator[Row]:
        known = names()
        for text, reason in table.items():
            yield Row(code(text), lambda text=text: eval(text, dict(known)), reason)

    return rows


SECTIONS: dict[str, tuple[str, Callable[[], Iterator[Row]]]] = {
    "Rules that cannot be proved": (
        "A plan proves both directions for every name that it is given. Otherwise it is refused before data moves.",
        rules,
    ),
    "Calls of adapters": ("`keep`, `rule` and the others are those of `fmoe`; `ONE` is `torch.ones(2)`.", on_adapters),
    "Checkpoint directories": (
        "`convert`, `load` and `verify` read a Qwen3-MoE checkpoint of three shards that was changed so.",
        directories,
    ),
    "Configs and quantised formats": (
        "`SIZES` are those of a small model, `codes` its tensors with codes and scales in place of weights.",
        expressions(calls.CONFIGS, calls.configs),
    ),
    "LoRA": (
        "`load(**fields)` is `fmoe.lora.load` of a directory whose `adapter_config.json` has these fields; `down` is "
        "the name of a layer's down projections.",
        expressions(calls.LORA, calls.lora),
    ),
    "The layer": (
        "`params`, `x`, `routing` and `config` fit: 4 experts, 2 a token, 8 wide.",
        expressions(calls.LAYER, calls.layer),
    ),
    "Kernels": (
        "The arguments fit but for what is said: 5 tokens, 2 experts, widths 4 and 6. Offsets are clamped on the "
        "device, so that nothing is read out of bounds and nobody waits.",
        expressions(calls.KERNELS, calls.kernels),
    ),
}


def code(text: str) -> str:
    """Lines of code, in a cell of a table."""
    lines = (line.strip() for line in text.splitlines() if line.strip())
    return "<br>".join(f"`` {line} ``" if "`" in line else f"`{line}`" for line in lines)


def printed(error: BaseException) -> str:
    """An error's text, without the folders and file sizes of this run; of many problems the first, shortened."""
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/[^/\s']+(?=[/\s'])", "DIR", str(error)).replace("cuda:0", "cpu")
    text = re.sub(r"(?<![\d,])\d{1,3},\d{3}(?![\d,])", "N,NNN", text)
    lines = [line if len(line) <= LONG else f"{line[:LONG]}..." for line in text.splitlines()]
    return code("\n".join(lines if len(lines) <= 2 else [*lines[:2], "- ..."]))


def line(row: Row) -> str:
    """The row as Markdown. Raises AssertionError where the call is not refused, or with another kind of error."""
    try:
        row.run()
    except ValueError as error:
        cells = row.what, printed(error), row.why
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    raise AssertionError(f"not refused: {row.what}")


def pages() -> tuple[str, str]:
    """The whole page, and README with its short table."""
    made, short = [HEAD], list[str]()
    for title, (intro, rows) in SECTIONS.items():
        lines = [line(row) for row in rows()]
        short.append(min(lines, key=lambda text: (len(text), text)))
        made.append("\n".join([f"## {title}\n\n{intro}\n", TABLE, *lines, ""]))
    before, _, rest = README.read_text().partition(TABLE)
    return "\n".join(made), before + "\n".join([TABLE, *short, "", rest.partition("\n\n")[2]])


if __name__ == "__main__":
    for path, text in zip((PAGE, README), pages(), strict=True):
        path.write_text(text)

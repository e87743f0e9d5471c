"""The Typer application, and the options that several commands share. It imports no torch: help is quick."""

import sys
from importlib import import_module
from itertools import pairwise
from operator import attrgetter
from typing import Annotated, Any

import typer

import fmoe

HELP = """Mixture-of-Experts checkpoints: look into them, convert them, prove that nothing is lost.

    fmoe inspect DIR                   family, layout, sizes, problems
    fmoe convert DIR NATIVE            experts stacked, in bounded memory
    fmoe convert NATIVE BACK --to hf   byte for byte what DIR was
"""
DIRECTORY = "a checkpoint, Hugging Face's or native: its directory, or hf://ORG/NAME, https://..., s3://..."

UsageError: Any = typer.BadParameter.__mro__[1]  # of click, or of the copy that typer has

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[str, typer.Argument(metavar="DIR", help=DIRECTORY)]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output, and nothing else")]
Kept = Annotated[str | None, typer.Option("--quantized", help="keep: codes and scales move as they are; or decode")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bar")]
Own = Annotated[str | None, typer.Option("--adapter", help="your own adapter, as package.module:name")]
From = Annotated[str | None, typer.Option("--from", help="what it is, if names leave a doubt: `fmoe systems`")]
Given = Annotated[str | None, typer.Option("--config", help="a Hugging Face config (JSON, or its directory) for it")]
Trust = Annotated[
    bool, typer.Option("--trust-pickle", help="read Megatron's mp_rank_* pickles, as data: nothing of them runs")
]
Experts = Annotated[str | None, typer.Option(help="only these experts, as 0:16")]


def _version(asked: bool) -> None:
    if asked:
        print(f"fmoe {fmoe.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version, and nothing else")
    ] = False,
) -> None: ...


def run() -> int:
    """The exit code of the command in `sys.argv`. Raises UsageError, and what the command raises."""
    from fmoe.cli import change, compare, look  # noqa: F401  (they add their commands to `app`)

    for before, text in pairwise(sys.argv):
        if not text or text.startswith("--") and text.endswith("="):
            name = text.rstrip("=") or (before if before.startswith("-") else "an argument")
            raise typer.BadParameter(f"{name} is empty, expected a value. Fix: leave it out; is a variable unset?")
    try:
        return app(prog_name="fmoe", standalone_mode=False) or 0
    except typer.Abort:
        raise KeyboardInterrupt from None


def ranges(experts: str | None) -> dict[str, range]:
    """`--experts 0:16` as the range of axis e."""
    if experts is None:
        return {}
    start, colon, stop = experts.partition(":")
    numbers = start.isdecimal() and stop.isdecimal() and max(len(start), len(stop)) < 10
    if not (colon and numbers and int(start) < int(stop)):
        raise typer.BadParameter(f"--experts is {experts[:40]!r}, expected START:STOP, as 0:16")
    return {"e": range(int(start), int(stop))}


def own(name: str | None) -> dict[str, Any]:
    """`--adapter package.module:name` as the choice adapter=; modules of the current directory are found."""
    if name is None:
        return {}
    module, _, attribute = name.partition(":")
    sys.path.insert(0, "")
    try:
        found = import_module(module)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        if absent or not module or module.startswith("."):
            raise typer.BadParameter(f"--adapter is {name!r}, expected package.module:name: {error}") from None
        told = f"importing {module} raised {type(error).__name__}: {error}"
        raise typer.BadParameter(f"--adapter {name!r}: {told}") from None
    try:
        return {"adapter": attrgetter(attribute)(found)}
    except AttributeError as error:
        raise typer.BadParameter(f"--adapter is {name!r}, expected package.module:name: {error}") from None


def size(text: str, what: str = "--max-shard-size") -> int:
    """`--max-shard-size 200MB` in bytes."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.strip().isdecimal() or len(number) > 15 or not int(number):
        raise typer.BadParameter(f"{what} is {text[:40]!r}, expected a whole number and KB, MB, GB or TB")
    return int(number) * units[unit]


def count(n: int, noun: str) -> str:
    """`1 file`, `12,345 tensors`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def of_source(from_: str | None, config: str | None, trust: bool) -> dict[str, Any]:
    """The arguments that say what a directory is."""
    return {n: v for n, v in (("from_", from_), ("config", config), ("trust_pickle", trust)) if v}

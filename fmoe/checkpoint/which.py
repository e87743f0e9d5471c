"""Whose a directory is: Hugging Face's, ours, or another system's, by files and names; and whoever reads ours alone."""

from collections.abc import Mapping
from os.path import exists, isfile, realpath
from pathlib import Path
from typing import Any

from fmoe.checkpoint.files.containers.foreign import Foreign
from fmoe.checkpoint.files.containers.mp_rank import UNTRUSTED
from fmoe.checkpoint.files.containers.source import container_of, open_foreign
from fmoe.checkpoint.files.directory import MISSING, NATIVE, Checkpoint, open_checkpoint
from fmoe.checkpoint.files.strict import read
from fmoe.checkpoint.files.weights import ADAPTER
from fmoe.checkpoint.remote.address import Address, Where, place
from fmoe.families import FAMILIES
from fmoe.folding import meant
from fmoe.systems import SYSTEMS
from fmoe.types import EXPERT_TENSORS, AdapterError, Problem, brief

MATRICES = EXPERT_TENSORS[:2]  # the names that no Hugging Face checkpoint has
NO_CONFIG = "has no Hugging Face config. Fix: config=, or --config DIR_OR_JSON"


def of_systems(src: Where | str, to: str, config: Any, from_: str | None, own: bool = False) -> bool:
    """Whether another system is on either side. own: rules of one's own read the source, and know of none."""
    place(src)
    for name, said in (("to", to), ("from_", from_)):
        if not isinstance(said, str) and (said is not None or name == "to"):
            raise AdapterError(f"{name}={brief(said)}: expected the name of a layout or a system")
    if from_ is not None and from_ not in (known := ("native", "hf", *SYSTEMS)):
        raise AdapterError(f"from_={brief(from_)}: expected one of {', '.join(known)}{meant(from_, known)}")
    if own and to not in SYSTEMS and from_ not in SYSTEMS:
        return False
    there = not isinstance(src, Address) and "://" not in str(src)
    if to in SYSTEMS or from_ in SYSTEMS or config is not None or there and container_of(Path(src)):
        return True
    if not there or not Path(src).is_dir() or exists(Path(src) / NATIVE) or not isfile(Path(src) / "config.json"):
        return False
    try:
        return side(open_checkpoint(src)) in SYSTEMS
    except AdapterError:
        return False


def config_of(config: Any) -> dict[str, Any] | None:
    """A config from a dict, a Transformers config, a JSON file or the directory that holds one."""
    if config is None or isinstance(config, Mapping):
        return None if config is None else dict(config)
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if not isinstance(config, str | Path):
        raise AdapterError(f"config={brief(config)}: expected a dict, a Transformers config, a file or its directory")
    place(config)
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        return read(Path(realpath(path)), infinite=True)[0]  # a link that was asked for may lead anywhere
    except AdapterError as error:
        raise AdapterError(f"{path} is no config: {error}") from None


def open_source(
    src: Where | str, config: Any = None, own: bool = False, trust_pickle: bool = False, from_: str | None = None
) -> Checkpoint:
    """The checkpoint of a directory in any container that is read, with its own config or the one given.

    own: rules of one's own read it: as `open_checkpoint` has it. trust_pickle: whole training states too. from_: the
    system that it is said to be of, whose own directories have no config.
    """
    place(src)
    given = config_of(config)
    path = Path(str(src))
    if "://" in str(src) or not container_of(path):
        theirs = isinstance(from_, str) and from_ in SYSTEMS
        if theirs and given is None and path.is_dir() and not any(isfile(path / n) for n in ("config.json", ADAPTER)):
            raise AdapterError(f"{path} {NO_CONFIG}")
        return _opened(src, given, own)
    if container_of(path) == "mp_rank" and not trust_pickle:
        raise AdapterError(f"{path} {UNTRUSTED}")
    if given is None:
        beside = [p for p in (path, path.parent) if isfile(p / "config.json")]
        if not beside:
            raise AdapterError(f"{path} {NO_CONFIG}")
        given = config_of(beside[0])
    return open_foreign(path, given or {})


def open_ours(path: Where | str, verb: str, own: bool = False, config: Any = None) -> Checkpoint:
    """A checkpoint that is Hugging Face's or ours. own, config: as `open_source` has them; own rules know no system.

    Raises AdapterError for another system's, whose names or axes mean other things: it says whose, and to convert it.
    """
    ours_alone(path, verb)
    source = _opened(path, config_of(config), own)
    if not own:
        no_system(source, verb)
    return source


def _opened(src: Where | str, config: dict[str, Any] | None, own: bool) -> Checkpoint:
    """`open_checkpoint`, which is told apart by names alone where another system's directory has no config."""
    try:
        return open_checkpoint(src, config, own=own)
    except AdapterError as error:
        if config is not None or MISSING not in str(error):
            raise
        try:
            source = open_checkpoint(src, {})
        except AdapterError:
            raise error from None
        may = [s for s in SYSTEMS.values() if s.container in ("memory", "safetensors") and s.seen(source.specs)]
        found = {s.name: s.marked(source.specs)[0] for s in may}
        if stacked := _stacked(source):
            found["automodel"] = stacked[0]
        if not found:
            raise
        told = " or ".join(f"{name}'s, as is told by {n!r}" for name, n in found.items())
        how = f"fmoe convert {src} HF --to hf --from {next(iter(found))} --config DIR_OR_JSON"
        text = f"{source.path / 'config.json'} is missing, and the tensors are {told}. Fix: {how}"
        raise AdapterError([Problem(f"{text}, the config of the model on Hugging Face", (*found.values(),))]) from None


def ours_alone(path: Where | str, verb: str) -> None:
    """Raises AdapterError for another system's files, which a command does not read: convert them first."""
    if "://" not in str(path) and (container := container_of(Path(str(path)))):
        try:
            here = side(open_source(path))
        except AdapterError:  # no config, or names of several systems
            here = ""
        raise AdapterError(others(path, f"{here}'s" if here in SYSTEMS else f"in {container} files", verb))


def no_system(source: Checkpoint, verb: str) -> None:
    """Raises AdapterError for another system's names in safetensors files. Of an unknown family none are known."""
    if source.kind in FAMILIES and (here := side(source)) in SYSTEMS:
        names = SYSTEMS[here].marked(source.specs) or _stacked(source)
        whose = f"{here}'s, as is told by {names[0]!r}" + f" and {len(names) - 1} more" * (len(names) > 1)
        text = others(source.path, whose, verb, f" --from {here}" * isinstance(source.path, Address))
        raise AdapterError([Problem(text, names)])


def others(path: object, whose: str, verb: str, said: str = "") -> str:
    return f"{path} is {whose}. Fix: fmoe convert {path} HF --to hf{said}, then {verb} that"


def side(source: Checkpoint, from_: str | None = None) -> str:
    """What a source is: "native", "hf" or a system, by its names. Raises AdapterError where several fit."""
    if from_ is not None:
        if not isinstance(from_, str) or from_ not in ("hf", "native", *SYSTEMS):
            told = f"{', '.join(SYSTEMS)}{meant(from_, ('hf', 'native', *SYSTEMS))}"
            raise AdapterError(f"from {from_!r}: expected hf, native or one of {told}")
        return from_
    if source.native:
        return "native"
    container = source.container if isinstance(source, Foreign) else "safetensors"
    if container in ("gguf", "mp_rank"):
        return {"mp_rank": "megatron"}.get(container, container)
    fits = [s.name for s in SYSTEMS.values() if s.marks(source.specs, source.model_type)]
    fits = [n for n in fits if (container == "dcp") == (SYSTEMS[n].container == "dcp")] or fits
    if len(fits) > 1:
        raise AdapterError(f"{source.path} may be {' or '.join(fits)}. Fix: from_=, or --from SYSTEM")
    if fits:
        return fits[0]
    return "automodel" if _stacked(source) else "hf"  # our names without our fmoe.json: a trainer's


def _stacked(source: Checkpoint) -> tuple[str, ...]:
    return tuple(n for n in source.specs if n.rpartition(".")[2] in MATRICES)

"""A function run again in processes of other hash seeds, which have seen nothing of what this one has.

Python gives strings other hashes in every process, and a set of them another order. Only another process shows it.
"""

import atexit
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fmoe.testing.compared import assert_listed, same
from fmoe.types import bits, brief

INSIDE = "FMOE_TESTING_APART"
Packed = list[tuple[str, torch.dtype, tuple[int, ...], bytes]]
Function = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def assert_apart(what: str, function: Function, given: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
    """function(given) is `made` in other processes too, name after name.

    Of functions that can be pickled, and imported there: a lambda, one of `__main__`, or defined in another, is passed.
    """
    try:
        pickled = pickle.dumps(function)
    except Exception:  # whatever an object of the user's raises: then it cannot be sent
        return
    for process in _processes():
        said, found = _asked(process, (pickled, _packed(given)))
        if said == "raised":
            told = f"{what} raises {found} in a process of its own, where nothing ran before"
            raise AssertionError(f"function: {told}. Fix: take what it needs from its argument")
        if said == "made":
            there, told = _unpacked(found), f"hash seed: {what}, in a process of another hash seed,"
            same(there, made, told)
            assert_listed(told, list(there), list(made))


@lru_cache(maxsize=1)
def _processes() -> tuple["subprocess.Popen[bytes]", ...]:
    """Two processes, started once; each ends with this one, whose pipe it reads.

    In one of them there are none: it may import a module that asserts laws as it is imported.
    """
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    seeds = [s for s in ("1", "2", "3") if s != os.environ.get("PYTHONHASHSEED")][:2]
    command = [sys.executable, "-c", "from fmoe.testing.apart import serve; serve()"]
    made = []
    for seed in seeds if sys.executable and INSIDE not in os.environ else ():
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path, INSIDE: "1"}
        made.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        atexit.register(_end, made[-1])
    return tuple(made)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()


def _asked(process: "subprocess.Popen[bytes]", question: Any) -> tuple[str, Any]:
    try:
        pickle.dump(question, process.stdin)  # type: ignore[arg-type]
        process.stdin.flush()  # type: ignore[union-attr]
        answer: tuple[str, Any] = pickle.load(process.stdout)  # type: ignore[arg-type]
    except (OSError, EOFError, pickle.UnpicklingError):  # a function has ended it: nothing is known
        _processes.cache_clear()
        return "lost", None
    return answer


def _packed(params: Mapping[str, Tensor]) -> Packed:
    """Tensors as bytes: torch's own pickles know no tensors of some dtypes."""
    return [(n, t.dtype, tuple(t.shape), bits(t).numpy().tobytes()) for n, t in params.items()]


def _unpacked(packed: Packed) -> dict[str, Tensor]:
    read = lambda dtype, data: torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype) if data else None
    made = [(n, read(dtype, data), dtype, shape) for n, dtype, shape, data in packed]
    return {n: torch.empty(shape, dtype=dtype) if t is None else t.view(shape) for n, t, dtype, shape in made}


def serve() -> None:
    """Answers until nothing more is asked; what functions print goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            pickled, given = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            function: Function | None = pickle.loads(pickled)
        except Exception:  # it cannot be imported here
            function = None
        answer: tuple[str, Any] = ("lost", None)
        if function:
            try:
                answer = "made", _packed(function(_unpacked(given)))
            except Exception as error:
                answer = "raised", brief(error)
        pickle.dump(answer, answers)
        answers.flush()

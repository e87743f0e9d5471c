"""Settings for every test: repeatable hypothesis, NaN in memory that nobody has written, offline Transformers."""

import gc
import hashlib
import os
import sys
import time
from collections.abc import Iterator

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # of hundreds of processes, the first compiles fmoe for all
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core each

import pytest
import torch
from hypothesis import settings
from thorough import long_cases

UNTIL = float(os.environ.get("TESTS_UNTIL", "inf"))
"""Seconds since 1970: no test begins after that, and files come in another order each time."""

gc.disable()  # until all is collected: what is imported and collected stays to the end, and is walked once
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

collect_ignore = ["house/user_script.py"]  # what a user writes: for mypy, never run
# several modules of one name, and no examples in them; programs of their own, for whoever has Automodel
collect_ignore_glob = ["*conftest.py", "helpers/vendors/automodel_*.py"]

settings.register_profile("fmoe", deadline=None, derandomize=True, max_examples=40, print_blob=True)
settings.load_profile("fmoe")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that what is read before it is written shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_xdist_auto_num_workers() -> int:
    """Twice as many as there are cores: a third of the time, tests wait for disks, clocks and each other."""
    return 2 * (os.cpu_count() or 1)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Modules and thousands of tests stay to the end: no collection walks them again."""
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)  # of millions of small objects few are in cycles
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before any is deselected."""
    long = long_cases(item.nodeid for item in items)
    for item in items:
        if item.nodeid in long:
            item.add_marker("thorough")
    if UNTIL < float("inf"):
        items.sort(key=lambda item: hashlib.sha256(f"{UNTIL} {item.path}".encode()).digest())


def pytest_runtest_setup() -> None:
    if time.time() > UNTIL:
        pytest.skip("not begun: the time that TESTS_UNTIL gives is over")


def pytest_runtest_teardown() -> None:
    """No figure stays open: of many, Matplotlib warns the test that opens one more."""
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


def pytest_sessionfinish() -> None:
    gc.unfreeze()

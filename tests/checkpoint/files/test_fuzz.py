"""The fuzz run of bench/fuzz.py, shorter; headers of any JSON against the library; and that findings are found."""

import json
import os
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from damage import damaged, head_tokens, header, raw
from fuzz import JOBS, Outcome, case, run  # noqa: E402
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from tiny import bases

from fmoe import AdapterError
from fmoe.checkpoint.files.directory import read_header


@pytest.mark.parametrize("job, cases", [("read", 1000), ("convert", 200)])
def test_a_damaged_checkpoint_is_refused_or_gives_the_right_bytes(job, cases):
    found = [case(number, JOBS[job]) for number in range(cases)]
    assert [o for o in found if o.verdict == "finding"] == []
    assert {o.base for o in found} == set(bases())
    for verdict in ("refused", "right"):
        assert sum(o.verdict == verdict for o in found) > cases / 10


def test_what_is_not_damaged_is_right(monkeypatch):
    monkeypatch.setattr("fuzz.damaged", lambda rng, files: (files, []))
    assert [case(n, job).verdict for job in JOBS.values() for n in range(len(bases()))] == ["right"] * 2 * len(bases())


def test_the_same_number_is_the_same_case():
    for number in range(50):
        files = sorted(bases().items())[number % 4][1]
        first, again = (damaged(Random(number), files) for _ in range(2))
        assert first == again


STRICTER = ("stands there twice", "and nothing else", "characters, expected at most", "has dtype", "has shape")
"""All that is refused here and read by the library: keys twice, unknown fields, endless names, dtypes, ranks."""


def agree(path: Path, content: bytes) -> str:
    """Who reads it. We read nothing that the library refuses, and the same where both read."""
    path.write_bytes(content)
    theirs = None
    try:
        with safe_open(path, framework="pt") as opened:
            theirs = {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys()}
    except SafetensorError:
        pass
    try:
        ours = {n: spec.shape for n, spec in read_header(path).specs.items()}
    except AdapterError as error:
        assert all(text.isprintable() and str(path) in text for text in error.problems)
        assert theirs is None or any(reason in str(error) for reason in STRICTER), error
        return "nobody" if theirs is None else "the library"
    assert ours == theirs
    return "both"


def test_a_damaged_header_is_read_only_if_the_library_reads_it(tmp_path):
    who, shards = [], [c for files in bases().values() for n, c in files.items() if n.endswith(".safetensors")]
    for number in range(2000):
        rng = Random(number)
        content = rng.choice(shards)
        for _ in range(rng.choice([1, 1, 2])):
            content = rng.choice([header, header, header, head_tokens, raw])(rng, content)
        who.append(agree(tmp_path / "x.safetensors", content))
    assert min(who.count("both"), who.count("nobody")) > 200 and who.count("the library") < 200


SIZE = st.integers(0, 4) | st.sampled_from([-1, 2**31, 2**32, 2**63, 2**64, 2.0, True, None, "1"])
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
ANYTHING = st.recursive(LEAF, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3))
SHAPE = st.lists(SIZE, max_size=3) | ANYTHING
PLACE = st.lists(SIZE | st.integers(0, 32), min_size=2, max_size=2) | ANYTHING
DTYPE = st.sampled_from(["F32", "F16", "U8", "F8_E4M3", "F4", "BOOL", "F99"]) | ANYTHING
ENTRY = st.fixed_dictionaries({"dtype": DTYPE, "shape": SHAPE, "data_offsets": PLACE}) | ANYTHING
HEADER = st.dictionaries(st.sampled_from(["a", "b", "", "__metadata__"]) | st.text(max_size=3), ENTRY, max_size=3)


@settings(max_examples=400)
@given(header=HEADER | ANYTHING, size=st.integers(0, 40))
def test_any_json_is_a_header_only_if_it_is_one_to_the_library(header: Any, size: int):
    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as folder:
        agree(Path(folder) / "x.safetensors", len(text).to_bytes(8, "little") + text + bytes(size))


@settings(max_examples=300)
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(["F32", "F16", "U8"]), st.lists(st.integers(0, 3), max_size=3)), max_size=4
    ),
    order=st.randoms(use_true_random=False),
    by=st.sampled_from([0, 0, 0, 0, 1, -1, 4]),
)
def test_tensors_side_by_side_in_any_order_are_read_and_others_are_not(shapes, order, by):
    at, entries = 0, []
    for i, (dtype, shape) in enumerate(shapes):
        size = {"F32": 4, "F16": 2, "U8": 1}[dtype]
        for n in shape:
            size *= n
        entries.append((f"w{i}", {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}))
        at += size
    order.shuffle(entries)
    if by and entries:
        entries[0][1]["data_offsets"][order.randrange(2)] += by
    text = json.dumps(dict(entries)).encode()
    with tempfile.TemporaryDirectory() as folder:
        who = agree(Path(folder) / "x.safetensors", len(text).to_bytes(8, "little") + text + bytes(at))
    assert who == ("nobody" if by and entries else "both")


def hanging(path: Path, work: Path) -> str:
    time.sleep(600)
    return "right"


def crashing(path: Path, work: Path) -> str:
    os._exit(3)


def failing(path: Path, work: Path) -> str:
    raise KeyError("x")


def garbling(path: Path, work: Path) -> str:
    raise AdapterError("a\nb")


@pytest.mark.parametrize("job, why", [(failing, "KeyError in test_fuzz.py"), (garbling, "message: ")])
def test_other_exceptions_and_unprintable_messages_are_findings(job, why):
    found = case(0, job)
    assert found.verdict == "finding" and found.why.startswith(why)


@pytest.mark.parametrize("job, why, cases", [(hanging, "hang", 1), (crashing, "crash, exit code 3", 2)])
def test_the_runner_survives_a_hang_and_a_crash_and_goes_on(job, why, cases):
    found: list[Outcome] = []
    run(range(cases), job, workers=1, limit=1, tell=found.append)
    assert [(o.case, o.verdict, o.why) for o in found] == [(number, "finding", why) for number in range(cases)]

"""Which cases run with `-m thorough` alone: run as a program, this writes tests/thorough.json from a run's times.

    python -m pytest -m "not slow" --junitxml=times.xml && python tests/helpers/thorough.py times.xml

Of a law with rows, those that take a fifth of a second or more, but for the cheapest where all do and it takes less
than five; of a test without rows, one of three seconds or more.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from xml.etree import ElementTree

FILE = Path(__file__).parents[1] / "thorough.json"
ROW, ALONE, CHEAPEST = 0.2, 3.0, 5.0  # seconds


def chosen(times: Mapping[str, float]) -> dict[str, list[str]]:
    """Test -> its rows that run with the thorough ones. times: node id -> seconds.

    >>> chosen({"a.py::law[x]": 2.0, "a.py::law[y]": 1.0, "a.py::law[z]": 0.1, "a.py::large": 9.0, "a.py::small": 1.0})
    {'a.py::large': [''], 'a.py::law': ['x]', 'y]']}
    >>> chosen({"a.py::law[x]": 2.0, "a.py::law[y]": 1.0})
    {'a.py::law': ['x]']}
    """
    laws: dict[str, dict[str, float]] = {}
    for case, seconds in times.items():
        law, _, row = case.partition("[")
        laws.setdefault(law, {})[row] = seconds
    found = {}
    for law, rows in sorted(laws.items()):
        least = ALONE if "" in rows else ROW
        long = sorted(row for row, seconds in rows.items() if seconds >= least)
        first = min(rows, key=lambda row: rows[row])
        stays = len(long) == len(rows) and "" not in rows and rows[first] < CHEAPEST
        if long := [row for row in long if not (stays and row == first)]:
            found[law] = long
    return found


def long_cases(cases: Iterable[str]) -> set[str]:
    """Those of these node ids that the file names."""
    listed = json.loads(FILE.read_text())
    return {case for case in cases for law, _, row in [case.partition("[")] if row in listed.get(law, ())}


def junit(path: str) -> dict[str, float]:
    cases = ElementTree.parse(path).getroot().iter("testcase")
    return {f"{c.get('classname', '').replace('.', '/')}.py::{c.get('name')}": float(c.get("time", 0)) for c in cases}


if __name__ == "__main__":
    FILE.write_text(json.dumps(chosen(junit(sys.argv[1])), indent=0, separators=(",", ": ")) + "\n")

"""bench/README.md shows the numbers of the JSON beside it."""

from pathlib import Path

import render

PAGE = Path(render.__file__).with_name("README.md")


def test_the_tables_are_those_of_the_results():
    assert render.page(PAGE.read_text(), render.render(pictures=False)) == PAGE.read_text(), "run bench/render.py"


def test_every_result_has_a_section_and_every_picture_exists():
    results = PAGE.parent / "results"
    assert {s.file for s in render.SECTIONS} == {p.name for p in results.glob("*.json")}
    for section in render.SECTIONS:
        assert not section.bar or (results / section.file).with_suffix(".png").stat().st_size > 10_000

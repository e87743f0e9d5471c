"""The documentation's pages: all are listed, every link leads somewhere, and the site names modules that exist."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import fmoe.docs.__main__ as site

HERE = Path(site.__file__).parent
PAGES = sorted(path.name for path in HERE.glob("*.md"))


def test_every_page_is_on_the_site():
    assert {name.removesuffix(".md") for name in PAGES} <= set(site.PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (HERE / page).read_text()):
        assert target == "reference.md" or (HERE / target).exists(), f"{page}: {target}"


def test_the_reference_names_modules_that_import_and_have_a_docstring():
    named = re.findall(r"^::: (\S+)$", site.reference(), flags=re.M)
    assert "fmoe" in named and len(named) > 12
    for name in named:
        assert importlib.import_module(name).__doc__, name


def test_each_section_of_research_runs_alone_after_the_first_block():
    """What a reader pastes of it needs nothing that another section made."""
    head, *sections = re.split(r"^## ", (HERE / "research.md").read_text(), flags=re.M)
    runner = doctest.DocTestRunner()
    for section in sections:
        told = doctest.DocTestParser().get_doctest(head + section, {}, section.splitlines()[0], None, 0)
        assert told.examples and not runner.run(told).failed

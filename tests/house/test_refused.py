"""The page of what is refused is what `python tests/helpers/refusals/refused.py` writes now."""

import refused


def test_the_page_is_what_the_refusals_print():
    assert refused.page() == refused.PAGE.read_text(), "run python tests/helpers/refusals/refused.py"

"""The page of what is refused is what `python tests/helpers/refusals/refused.py` writes now."""

import pytest
import refused


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_the_page_is_what_the_refusals_print():
    found = refused.PAGE.read_text(), refused.README.read_text()
    assert refused.pages() == found, "run python tests/helpers/refusals/refused.py"

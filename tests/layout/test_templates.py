"""Names read at once are names read one by one."""

from hypothesis import given
from hypothesis import strategies as st

from fmoe.layout.names import Names
from fmoe.layout.templates import BLANK, _few, _many, template

NAMES = st.lists(st.text(st.sampled_from("..0012901aé\ud800")), min_size=1)


@given(NAMES)
def test_many_names_are_read_as_few_are(names):
    text = "." + "\n.".join(names) + "\n"
    assert _many(text) == _few(text)


@given(NAMES)
def test_a_template_and_its_numbers_spell_each_name(names):
    read = Names(names)
    for at, rows in read.rows.items():
        for name, *numbers in zip(rows.names, *rows.columns, strict=True):
            assert template(name) == at and name in read
            spelled = at
            for number in numbers:
                spelled = spelled.replace(BLANK, str(number), 1)
            assert spelled == name

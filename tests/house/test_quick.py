"""The quick loop covers every room: `tests/quick.txt` names a file, or all, of each folder of tests."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
NAMED = (TESTS / "quick.txt").read_text().split()


def test_the_quick_loop_covers_every_room():
    rooms = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}
    assert len(rooms) > 15 and {name.split("/")[1] for name in NAMED} == rooms


def test_what_it_names_is_there():
    assert not [name for name in NAMED if not (TESTS.parent / name).exists()]

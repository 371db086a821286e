"""Files that are whole or not there at all."""

import os

import pytest

from d3epth_jax import atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with atomic.replacing(path) as partial:
            partial.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
            assert partial.parent == path.parent and partial.name.startswith(".")
        assert path.read_text() == text
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_changes_nothing_and_leaves_nothing(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic.replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "a.txt"
    with atomic.replacing(path) as one, atomic.replacing(path) as two:
        one.write_text("one")
        two.write_text("two")
        assert one != two
    assert path.read_text() == "one" and names(tmp_path) == ["a.txt"]


def test_everybody_may_read_the_file(tmp_path):
    before = os.umask(0o077)
    try:
        with atomic.replacing(tmp_path / "a.txt") as partial:
            partial.touch()
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644

"""The registry of primitives: an entry is complete, and there is one for each."""

import pytest

from normax.paths.primitive_spec import SPECS, Entries, primitive

PARTS = {"pull": None, "entries": Entries.COMPUTED, "uniform": None, "mixes": None}


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_raises_when_the_entry_is_written(part):
    others = {name: value for name, value in PARTS.items() if name != part}
    with pytest.raises(TypeError, match=f"missing.*'{part}'"):
        primitive("made_up", **others)(lambda transform, eqn, inputs: inputs)
    assert "made_up" not in SPECS


def test_an_unknown_part_raises():
    with pytest.raises(TypeError, match=r"unexpected.*'joins'"):
        primitive("made_up", joins=True, **PARTS)(lambda *_: [])


def test_a_second_entry_raises():
    with pytest.raises(ValueError, match="`add` has two, the rules _add and again"):

        @primitive("add", **PARTS)
        def again(transform, eqn, inputs):
            return inputs

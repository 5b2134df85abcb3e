"""What is kept with a function, and what counts as a float."""

import dataclasses
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normax._core.programs import is_float, kept_with


@dataclasses.dataclass(frozen=True)
class Scale:
    """Equal to others of the same name, whatever it computes."""

    name: str
    factor: float = dataclasses.field(compare=False)

    def __call__(self, x):
        return self.factor * x


class Fixed:
    __slots__ = ()

    def __call__(self, x):
        return x


def test_programs_are_kept_by_identity():
    one, other = Scale("scale", 2.0), Scale("scale", 3.0)
    assert one == other and hash(one) == hash(other)
    kept_with(one)["program"] = one.factor
    assert kept_with(one) == {"program": 2.0} and kept_with(other) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: lambda x: x,
        lambda: Scale("scale", 2.0),
        lambda: functools.partial(jnp.sin),
        lambda: jax.jit(lambda x: x),
    ],
    ids=["function", "object", "partial", "jitted"],
)
def test_programs_go_with_their_function(make):
    class Program:
        pass

    function, program = make(), Program()
    kept_with(function)[1.0] = program
    assert kept_with(function) == {1.0: program}
    gone = weakref.ref(program)
    del program
    gc.collect()
    assert gone() is not None
    del function
    gc.collect()
    assert gone() is None


def test_a_new_function_at_an_old_address_has_no_programs():
    """CPython gives the address of what has gone to the next object of its size."""
    addresses = []
    for _ in range(100):
        function = Scale("scale", 2.0)
        addresses.append(id(function))
        assert kept_with(function) == {}
        kept_with(function)["program"] = 1
    assert len(set(addresses)) < 100


def test_what_takes_no_weak_references_keeps_nothing():
    function = Fixed()
    kept_with(function)["program"] = 1
    assert kept_with(function) == {}


def test_floats_are_real_numbers_with_derivatives():
    floats = [1.0, np.float64(1), jnp.ones(2), jnp.ones((), jnp.bfloat16)]
    floats += [jnp.ones(2, jnp.float8_e4m3fn), jax.ShapeDtypeStruct((), "float16")]
    others = [1, True, 1j, np.ones(2, int), jnp.ones(2, jnp.complex64)]
    others += [jax.random.key(0), jax.random.PRNGKey(0), np.zeros(2, jax.dtypes.float0)]
    assert all(map(is_float, floats)) and not any(map(is_float, others))

"""Digests of programs: two that may compute different results have different ones.

A digest covers the equations of a jaxpr and of every jaxpr inside it, their constants,
and the versions and settings of JAX that decide how they are computed. What cannot be
described, such as the Python function of a callback, is refused.
"""

import enum
import hashlib
import importlib.metadata
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import stages
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from normax._core.programs import REDUNDANT_PARAMETERS, is_key, open_program

_Function = types.FunctionType
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, np.dtype)


def _environment() -> list[Any]:
    """Return what decides results besides the program."""
    versions = [
        importlib.metadata.version(name) for name in ("normax", "jax", "jaxlib")
    ]
    # This setting changes random bits, and the program does not show it.
    partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    return [*versions, jax.default_backend(), partitionable]


class _Refused(Exception):
    """A digest cannot describe this value."""


class _Writer:
    """Feed digests; a program inside of others gets a digest of its own, once."""

    def __init__(self) -> None:
        self._programs: dict[int, bytes] = {}

    def program(self, program: Jaxpr | ClosedJaxpr) -> bytes:
        """Return the digest of a program."""
        if id(program) not in self._programs:
            digest = hashlib.sha256()
            jaxpr, consts = open_program(program)
            self.feed(digest, consts)
            number: dict[Any, int] = {}

            def named(variables):
                for variable in variables:
                    number[variable] = len(number)
                    self.feed(digest, repr(variable.aval))

            def used(atoms):
                for atom in atoms:
                    literal = isinstance(atom, Literal)
                    self.feed(digest, atom.val if literal else number[atom])
                    self.feed(digest, repr(atom.aval))

            named([*jaxpr.constvars, *jaxpr.invars])
            for equation in jaxpr.eqns:
                used(equation.invars)
                self._equation(digest, equation)
                named(equation.outvars)
            used(jaxpr.outvars)
            self._programs[id(program)] = digest.digest()
        return self._programs[id(program)]

    def _equation(self, digest: Any, equation: JaxprEqn) -> None:
        name = equation.primitive.name
        redundant = REDUNDANT_PARAMETERS.get(name, ())
        params = {k: v for k, v in equation.params.items() if k not in redundant}
        try:
            self.feed(digest, [name, params])
        except _Refused as refused:
            raise ValueError(
                "a run is stored under a digest of all that it computes, but the "
                f"primitive `{name}` depends on {refused}, whose code JAX does not "
                "know; leave it out of `train_fn`, or sweep without `checkpoint_dir`."
            ) from None

    def feed(self, digest: Any, value: Any) -> None:
        """Add a value and its length to a digest, so that values are told apart."""
        match value:
            case Jaxpr() | ClosedJaxpr():
                content = self.program(value)
            case enum.Enum():
                content = value.name.encode()
            case jax.Array() | np.ndarray() | np.generic():
                content = array_bytes(value)
            case Mapping():
                self.feed(digest, sorted(value.items()))
                content = b""
            case set() | frozenset():
                self.feed(digest, sorted(value))
                content = b""
            case tuple() | list():
                for part in value:
                    self.feed(digest, part)
                content = str(len(value)).encode()
            case _ if isinstance(value, _PLAIN):
                content = repr(value).encode()
            case _:
                content = self._other(digest, value)
        digest.update(f"{type(value).__name__} {len(content)} ".encode() + content)

    def _other(self, digest: Any, value: Any) -> bytes:
        """Return what describes an object or a function of JAX; refuse any other."""
        # A rule of batching wraps the function that it was made of.
        value = getattr(value, "__wrapped__", value)
        module = getattr(value, "__module__", None) or type(value).__module__
        package = module.partition(".")[0]
        if isinstance(value, _Function):
            # The versions of these packages are part of the digest.
            known = package in ("jax", "jaxlib", "normax")
            if not known or "<" in value.__qualname__:
                raise _Refused(repr(value))
            return f"{module}.{value.__qualname__}".encode()
        if package in ("jax", "jaxlib") and " at 0x" not in repr(value):
            # A representation leaves out the values of constants, and functions.
            for part in jax.tree.leaves(list(getattr(value, "__dict__", {}).values())):
                if isinstance(part, Jaxpr | ClosedJaxpr | jax.Array | _Function):
                    self.feed(digest, part)
            return repr(value).encode()
        raise _Refused(repr(value))


def array_bytes(array: Any) -> bytes:
    """Return the type, shape and entries of an array, also of random keys."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ValueError(
            "a run is stored under a digest of the arrays that it closes over, but one "
            f"of shape {array.shape} is spread over several processes; sweep without "
            "`checkpoint_dir`, or close over arrays that each process holds."
        )
    kind = f"{array.dtype}{array.shape}".encode()
    entries = jax.random.key_data(array) if is_key(array) else array
    return kind + np.asarray(entries).tobytes()


def fingerprint(traced: stages.Traced) -> "hashlib._Hash":
    """Return a SHA-256 digest of a traced function, to which inputs can be added.

    Raises:
      ValueError: The program calls back to Python, or has other effects.
    """
    writer, digest = _Writer(), hashlib.sha256()
    writer.feed(digest, [*_environment(), traced.jaxpr])
    if effects := open_program(traced.jaxpr)[0].effects:
        raise ValueError(
            "a run that is found on disk is not run again, but `train_fn` has effects "
            f"besides its results, {sorted(map(str, effects))}; leave them out, or "
            "sweep without `checkpoint_dir`."
        )
    return digest

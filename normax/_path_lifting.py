r"""The path transform: a ReLU network, turned into the sum over its paths.

A network of linear layers and positively homogeneous nonlinearities has a twin whose
weights are $v = |w|^p$, whose nonlinearities are the identity and whose inputs
are 1. The twin's output is $F(v) = \sum_\text{paths} \prod_e |w_e|^p$, a sum over
exponentially many paths in one forward pass; one backward pass gives
$\partial F / \partial v_e$ for all edges.

The transform interprets the jaxpr of the network with one rule for each primitive,
as `jax.jvp` does. The kinds of values stand in `_path_values.py`, the rules in
`_path_rules.py` and `_path_structure.py`, those of layers and scans in files of their
own; the arithmetic of path values in `_path_arithmetic.py`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from normax._path_arithmetic import PathArithmetic, Scaled
from normax._path_values import (
    Activation,
    Factors,
    Origin,
    Path,
    Ranges,
    Sign,
    Unsupported,
    Value,
    Weight,
    weight,
)

Rule = Callable[["PathTransform", JaxprEqn, Sequence[Any]], Sequence[Value]]


class NotHomogeneous(Exception):
    """Why a primitive has no paths."""


RULES: dict[str, Rule] = {}
WEIGHT_PULLS: dict[str, Callable[..., None]] = {}
UNIFORM: set[str] = set()  # primitives that keep all entries equal
SLICES: set[str] = set()  # primitives that take parts of arrays
JOINING: set[str] = set()  # primitives that put arrays beside others


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of some primitives."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def weight_pull(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register how cotangents go back through some primitives of weights."""

    def register(pull: Callable[..., None]) -> Callable[..., None]:
        WEIGHT_PULLS.update(dict.fromkeys(names, pull))
        return pull

    return register


_CALLS = {
    "pjit", "jit", "closed_call", "core_call", "checkpoint", "remat", "remat2",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
}  # fmt: skip
_SIGNS = {"mul", "select_n", "convert_element_type", "copy", "copy_p"}


def _folder(file: str | None) -> str:
    return os.path.join(os.path.dirname(file or ""), "")  # ends with the separator


_LIBRARIES = (
    *(_folder(module.__file__) for module in (jax, jaxlib, flax)),
    contextlib.__file__,
    functools.__file__,
)
_NORMAX = _folder(__file__)


def _users_line(eqn: JaxprEqn) -> str | None:
    traceback = eqn.source_info.traceback
    frames: Sequence[Any] = traceback.frames if traceback is not None else ()
    for frame in frames:
        if frame.file_name.startswith(_NORMAX):
            return None
        if not frame.file_name.startswith(_LIBRARIES):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return None


def _ranges_of_parts(eqn: JaxprEqn, array: Weight) -> Sequence[Ranges | None]:
    """Return what parts of an array an equation takes, None where that is unknown."""
    shape, params = array.shape, eqn.params
    if array.repeats:
        return [None] * len(eqn.outvars)
    if eqn.primitive.name == "slice":
        limits = zip(params["start_indices"], params["limit_indices"], strict=True)
        return [list(limits)]
    if eqn.primitive.name != "split":
        return [None] * len(eqn.outvars)
    ends = np.cumsum(params["sizes"]).tolist()
    parts = []
    for start, end in itertools.pairwise([0, *ends]):
        ranges = [(0, n) for n in shape]
        ranges[params["axis"]] = (start, end)
        parts.append(ranges)
    return parts


def _repeats(name: str, inputs: Sequence[Weight], size: int) -> bool:
    """Return whether entries of parameters may be in several entries of a result."""
    if any(x.repeats for x in inputs) or name in ("gather", "tile"):
        return True
    if name == "pad":  # one number is all of the padding
        return bool(inputs[1].params)
    stretched = any(x.params and math.prod(x.shape) < size for x in inputs)
    return stretched and name not in JOINING


def _rounded(number: float, dtype: Any) -> float | None:
    """Return a number in another dtype, None in one that is not of floats."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return None
    with np.errstate(over="ignore"):
        return float(np.asarray(number).astype(dtype))


def may_collide(eqn: JaxprEqn) -> bool:
    """Return whether an equation may write several entries to one place."""
    return eqn.primitive.name == "scatter" and not eqn.params["unique_indices"]


def _called(eqn: JaxprEqn) -> tuple[Jaxpr, Sequence[Any]] | None:
    if eqn.primitive.name not in _CALLS:
        return None
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    inner = next(eqn.params[name] for name in names if name in eqn.params)
    if isinstance(inner, ClosedJaxpr):
        return inner.jaxpr, inner.consts
    return inner, ()


class PathTransform:
    """One forward and, if asked for, one backward pass over the paths.

    Attributes:
      arithmetic: Arithmetic of path values.
    """

    def __init__(self, arithmetic: PathArithmetic):
        self.arithmetic = arithmetic
        self._tape: list[Callable[[], None]] = []
        self._line: str | None = None

    def interpret(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        inputs: Sequence[Value],
        location: str | None = None,
    ) -> list[Value]:
        """Evaluate a jaxpr.

        Args:
          jaxpr: What to evaluate.
          consts: Arrays it has closed over.
          inputs: Its arguments.
          location: Source line that stands for all of its equations.

        Returns:
          Its results.
        """
        environment: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        environment.update(
            zip(jaxpr.constvars, (weight(const) for const in consts), strict=True)
        )

        def read(atom: Any) -> Value:
            return weight(atom.val) if isinstance(atom, Literal) else environment[atom]

        for eqn in jaxpr.eqns:
            line = location or _users_line(eqn)
            results = self._evaluate(eqn, [read(atom) for atom in eqn.invars], line)
            environment.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _evaluate(
        self, eqn: JaxprEqn, inputs: Sequence[Any], line: str | None
    ) -> Sequence[Value]:
        if (called := _called(eqn)) is not None:
            jaxpr, consts = called
            # The traceback of a library's cached function is that of another call.
            library = jaxpr.debug_info.func_filename or ""
            inside = line if library.startswith(_LIBRARIES) else None
            return self.interpret(jaxpr, consts, inputs, inside)
        name, self._line = eqn.primitive.name, line
        unsupported = next((x for x in inputs if isinstance(x, Unsupported)), None)
        if unsupported is not None and name != "scan":
            return [unsupported] * len(eqn.outvars)
        try:
            if all(isinstance(x, Weight) for x in inputs):
                return self.evaluate_weights(eqn, inputs)
            if name not in RULES:
                raise NotHomogeneous("no rule says that it is positively homogeneous")
            if name not in (*_SIGNS, "scan") and any(
                isinstance(x, Sign) for x in inputs
            ):
                raise NotHomogeneous("it takes the sign of an activation")
            return RULES[name](self, eqn, inputs)
        except NotHomogeneous as reason:
            return [self.unsupported(name, str(reason))] * len(eqn.outvars)

    def unsupported(self, name: str, reason: str) -> Unsupported:
        """Return what stands for the results of a primitive without paths."""
        line = f" at {self._line}" if self._line else ""
        return Unsupported(
            "a path norm is defined for positively homogeneous networks (linear "
            "layers, ReLU, leaky ReLU, pooling, sums, and batch norm with stopped "
            f"statistics), but the network applies `{name}`{line}: {reason}. Leave "
            "it out of `forward`, or end `forward` before it (at the logits, without "
            "the softmax and the loss)."
        )

    def evaluate_weights(self, eqn: JaxprEqn, inputs: Sequence[Weight]) -> list[Weight]:
        """Evaluate an equation that no activation enters, as JAX does."""
        values = eqn.primitive.bind(*(x.value for x in inputs), **eqn.params)
        if not eqn.primitive.multiple_results:
            values = [values]
        depends = frozenset[Origin]().union(*(x.params for x in inputs))
        name = eqn.primitive.name
        overlap = any(a.overlaps(b) for a, b in itertools.combinations(inputs, 2))
        repeats = overlap or _repeats(name, inputs, np.size(values[0]))
        results = [Weight(value, depends, repeats=repeats) for value in values]
        if name in SLICES and depends:  # layers of a stack are parameters of their own
            names = frozenset[str]().union(*(origin.names for origin in depends))
            for result, ranges in zip(
                results, _ranges_of_parts(eqn, inputs[0]), strict=True
            ):
                result.params = frozenset([Origin(names, (inputs[0], ranges))])
        if name in UNIFORM and len(inputs) == 1 and inputs[0].uniform is not None:
            sign = -1 if name == "neg" else 1
            results[0].uniform = _rounded(sign * inputs[0].uniform, values[0].dtype)
        if name in ("mul", "dot_general") and any(x.uniform == 0 for x in inputs):
            results[0].uniform, results[0].params, depends = (
                0.0,
                frozenset(),
                frozenset(),
            )
        if depends:
            pull = WEIGHT_PULLS.get(name)
            shared = len(inputs) == 2 and name not in JOINING and overlap
            inverse = name == "div" and inputs[1].params
            if pull is None or shared or inverse or may_collide(eqn):
                self.refuse(results, name)
            else:
                self.record(
                    results, lambda *cotangents: pull(self, eqn, inputs, cotangents)
                )
        return results

    def refuse(self, results: Sequence[Weight], name: str) -> None:
        """Raise in the backward pass, if a cotangent reaches these results."""
        line = f" at {self._line}" if self._line else ""

        def pull(*cotangents):
            del cotangents
            origins = (origin.names for origin in results[0].params)
            names = ", ".join(sorted(frozenset[str]().union(*origins)))
            raise ValueError(
                "path_scales is defined for parameters that are edge weights, up to "
                "reshaping, sums and factors without the same parameter, but "
                f"`{name}`{line} computes edge weights from {names}. path_norm is "
                "defined here; for path_scales, make the effective weights the "
                "parameters, or close over these."
            )

        self.record(results, pull)

    # The backward pass.

    def record(
        self,
        results: Sequence[Path | Weight],
        pull: Callable[..., None],
    ) -> None:
        """Have `pull(*cotangents of the results)` called in the backward pass."""

        def step():
            cotangents = [node.cotangent for node in results]
            if any(cotangent is not None for cotangent in cotangents):
                pull(*cotangents)

        self._tape.append(step)

    def accumulate(self, node: Path | Weight, factors: Factors) -> None:
        """Add to the cotangent of a node."""
        if isinstance(node, Weight) and not node.params:
            return
        if node.cotangent is None:
            node.cotangent = factors
        else:
            first = self.arithmetic.broadcast(node.cotangent, node.shape)
            second = self.arithmetic.broadcast(factors, node.shape)
            node.cotangent = (self.arithmetic.add(first, second),)

    def run_backward(self) -> None:
        """Propagate cotangents from the results to the parameters."""
        for step in reversed(self._tape):
            step()

    # What the rules are made of.

    def new(self, value: Scaled, pull: Callable[[Factors], None]) -> Path:
        """Return a node of path values with its rule of the backward pass."""
        path = Path(value)
        self.record([path], pull)
        return path

    def size(self, w: Weight) -> Scaled:
        """Return $|w|^p$."""
        if w.uniform is None:
            return self.arithmetic.of_weight(jnp.asarray(w.value))
        # Outside of the program: XLA regroups products of constants, and theirs
        # can leave the range of floats.
        with jax.ensure_compile_time_eval():
            dtype = jnp.promote_types(jnp.float32, jnp.result_type(w.value))
            size = self.arithmetic.of_weight(jnp.asarray(w.uniform, dtype))
        return self.arithmetic.broadcast((size,), w.shape)

    def flush(self, x: Activation | Weight) -> Path:
        """Turn the constant of an activation into an edge, and return its paths."""
        if isinstance(x, Weight):
            size = self.arithmetic.normalize(self.size(x))
            return self.new(size, lambda factors: self.accumulate(x, factors))
        if x.constant is None:
            return x.path
        path, constant = x.path, x.constant
        value = self.arithmetic.add_weight(path.value, constant.value)

        def pull(factors):
            self.accumulate(path, factors)
            self.accumulate(constant, factors)

        return self.new(value, pull)

r"""The path transform: a ReLU network, turned into the sum over its paths.

A network of linear layers and positively homogeneous nonlinearities has a twin whose
weights are $v = |w|^p$, whose nonlinearities are the identity and whose inputs
are 1. The twin's output is $F(v) = \sum_\text{paths} \prod_e |w_e|^p$, a sum over
exponentially many paths in one forward pass; one backward pass gives
$\partial F / \partial v_e$ for all edges.

The transform interprets the jaxpr of the network with one rule for each primitive,
as `jax.jvp` does. The kinds of values stand in `values.py`, their arithmetic in
`arithmetic.py`, the rules in the folder `primitives`, what a rule must say of its
primitive in `primitive_spec.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from normax._core.programs import is_float, program_in_place
from normax.paths import messages, numbers
from normax.paths.arithmetic import PathArithmetic
from normax.paths.numbers import Scaled
from normax.paths.primitive_spec import SPECS, NotHomogeneous
from normax.paths.tape import Tape
from normax.paths.values import (
    Activation,
    Origin,
    Path,
    Sign,
    Unsupported,
    Value,
    Weight,
    weight,
)
from normax.paths.weights import evaluate_weights


class PathTransform(Tape):
    """One forward and, if asked for, one backward pass over the paths.

    Attributes:
      line: The user's line of the equation that is being evaluated, if it is known.
    """

    def __init__(self, arithmetic: PathArithmetic):
        super().__init__(arithmetic)
        self.line: str | None = None

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
            line = location or messages.users_line(eqn)
            results = self._evaluate(eqn, [read(atom) for atom in eqn.invars], line)
            environment.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _evaluate(
        self, eqn: JaxprEqn, inputs: Sequence[Any], line: str | None
    ) -> Sequence[Value]:
        if (called := program_in_place(eqn)) is not None:
            jaxpr, consts = called
            inside = line if messages.is_of_a_library(jaxpr) else None
            return self.interpret(jaxpr, consts, inputs, inside)
        name, self.line = eqn.primitive.name, line
        spec = SPECS.get(name)
        unsupported = next((x for x in inputs if isinstance(x, Unsupported)), None)
        if unsupported is not None and not (spec and spec.takes_unsupported):
            return [unsupported] * len(eqn.outvars)
        try:
            if all(isinstance(x, Weight) for x in inputs):
                return self.evaluate_weights(eqn, inputs)
            if spec is None:
                raise NotHomogeneous("no rule says that it is positively homogeneous")
            if not spec.takes_signs and any(isinstance(x, Sign) for x in inputs):
                raise NotHomogeneous("it takes the sign of an activation")
            return spec.rule(self, eqn, inputs)
        except NotHomogeneous as reason:
            return [self.unsupported(name, str(reason))] * len(eqn.outvars)

    def unsupported(self, name: str, reason: str) -> Unsupported:
        """Return what stands for the results of a primitive without paths."""
        return messages.unsupported(name, self.line, reason)

    # What a network starts from.

    def parameter(self, name: str, leaf: Any) -> Weight:
        """Return a parameter; arrays of integers are constants."""
        params = [Origin(frozenset([name]))] if is_float(leaf) else []
        return Weight(jnp.asarray(leaf), frozenset(params))

    def input(self, shape: tuple[int, ...], dtype: Any) -> Activation:
        """Return an input: a path starts at each entry."""
        return Activation(Path(numbers.ones(shape, dtype)))

    # What the rules are made of.

    def evaluate_weights(self, eqn: JaxprEqn, inputs: Sequence[Weight]) -> list[Weight]:
        """Evaluate an equation that no activation enters."""
        return evaluate_weights(self, eqn, inputs)

    def edges(self, w: Weight) -> jax.Array:
        """Return the weights of the edges that a layer has."""
        return jnp.asarray(w.value)

    def size(self, w: Weight) -> Scaled:
        """Return $|w|^p$."""
        if w.uniform is None:
            return self.arithmetic.of_weight(self.edges(w))
        # XLA regroups products of constants, which can then leave the range of floats.
        # So the power of a known number is computed outside of the program.
        with jax.ensure_compile_time_eval():
            dtype = jnp.promote_types(jnp.float32, jnp.result_type(w.value))
            size = self.arithmetic.of_weight(jnp.asarray(w.uniform, dtype))
        return numbers.broadcast((size,), w.shape)

    def flush(self, x: Activation | Weight) -> Path:
        """Turn the constant of an activation into an edge, and return its paths."""
        if isinstance(x, Weight):
            size = numbers.normalize(self.size(x))
            return self.new(size, lambda factors: self.accumulate(x, factors))
        if x.constant is None:
            return x.path
        path, constant = x.path, x.constant
        value = self.arithmetic.add_weight(path.value, constant.value)

        def pull(factors):
            self.accumulate(path, factors)
            self.accumulate(constant, factors)

        return self.new(value, pull)

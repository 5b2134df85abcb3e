"""Compiled programs for the path scales, one for equal networks.

`jax.jit` compiles anew for every function that it is given, and each transformation
would give it a new one. So the programs of a network are kept with its function, and
go when it goes.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import stages
from jax.flatten_util import ravel_pytree

from normax._core.axes import PyTree
from normax._core.programs import is_float, is_key, kept_with
from normax._core.scheduling import event_of, on_cuda, unless, unless_safe
from normax.paths.arithmetic import PathArithmetic
from normax.paths.contraction import LARGE, fits_float64
from normax.paths.feed_forward import dense_stack
from normax.paths.network import dtype_of_paths
from normax.paths.norm import scale_factors, with_automatic_sharding
from normax.paths.one_example import Forward

Args = tuple[PyTree, ...]
Roots = tuple[PyTree, PyTree]
Programs = tuple[stages.Wrapped, stages.Wrapped]


class PathProgram(NamedTuple):
    """A program that computes path scales.

    Attributes:
      programs: The program for one step, and the one that may leave the scales as
        they are; functions of the parameters and the power.
      power: The power, if it is an array.
      network: The network, which the programs do not keep alive.
      takes_more: Whether it needs more arguments than parameters and inputs.
    """

    programs: Programs
    power: tuple[jax.typing.ArrayLike, ...]
    network: Any
    takes_more: bool

    def check_args(self, args: Args) -> None:
        """Raise unless the network gets the arguments that it needs."""
        if args and self.network is dense_stack:
            raise ValueError(
                "forward_args are further arguments of `forward`, but there is no "
                "`forward`; pass it when the transformation is built."
            )
        if not args and self.takes_more:
            raise ValueError(
                "`forward` must get all of its arguments, but it takes more than "
                "(params, inputs), and forward_args is (); hand them over at every "
                "step, as in update(grads, state, params, forward_args=(batch_stats,))."
            )

    def check(self, params: PyTree) -> None:
        """Raise what the program would raise, if it needs no more arguments."""
        if jax.tree.leaves(params) and not self.takes_more:
            jax.eval_shape(self.programs[0], (params, self.power, ()))

    def roots(self, params: PyTree, args: Args) -> tuple[Roots, jax.Array]:
        """Return factors of the inverse roots, and a number that is known with them."""
        if jax.tree.leaves(params):
            return self.programs[0]((params, self.power, args))
        # A placeholder of optax.tree.map_params stands for the parameters.
        return (params, params), jnp.float32(0)

    def first_roots(self, params: PyTree) -> Roots:
        """Return the factors, or what stands for them if more arguments are needed."""
        if not self.takes_more:
            return self.roots(params, ())[0]
        zeros = jax.tree.map(
            lambda w: (
                jnp.zeros(jnp.shape(w), dtype_of_paths(params)) if is_float(w) else None
            ),
            params,
        )
        return zeros, zeros

    def roots_if(
        self, due: jax.typing.ArrayLike, params: PyTree, kept: Roots, args: Args
    ) -> tuple[Roots, jax.Array]:
        """Return the same if they are due, otherwise those that were kept."""
        if jax.tree.leaves(params):
            return self.programs[1](due, (params, self.power, args), kept)
        return self.roots(params, args)


def _takes_more(network: Any) -> bool:
    """Return whether a network needs more arguments than parameters and inputs."""
    if network is dense_stack:
        return False
    try:
        signature = inspect.signature(network)
    except (TypeError, ValueError):  # Some functions that are not Python's.
        return False
    try:
        signature.bind(None, None)
    except TypeError:
        return True
    return False


def _floats(params: PyTree) -> list[jax.Array]:
    return [jnp.asarray(w) for w in jax.tree.leaves(params) if is_float(w)]


def _inverse_roots(params: PyTree, factors: PyTree, p: jax.typing.ArrayLike) -> Roots:
    """Return the two factors of the inverse roots, each a tree like the parameters.

    Optimizers' states hold such trees only, if they are to pass through Flax NNX.
    """
    arithmetic = PathArithmetic(p)

    def pick(i):
        return lambda leaf, pair: pair and pair[i]

    pairs = jax.tree.map(
        lambda leaf, product: product and arithmetic.inverse_roots(product),
        params,
        factors,
    )
    return jax.tree.map(pick(0), params, pairs), jax.tree.map(pick(1), params, pairs)


def _fixed(leaf: Any) -> tuple[Any, Hashable]:
    """Return what matters of an input, and a key that tells it from others.

    An array whose entries are not known is its own key, which has no hash.
    """
    if not hasattr(leaf, "dtype"):
        return leaf, (type(leaf), leaf)
    shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if is_float(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
        return shape, shape
    if isinstance(leaf, jax.core.Tracer) or not getattr(
        leaf, "is_fully_addressable", True
    ):
        return leaf, leaf
    # The owner of a NumPy array may change it, so a copy is kept.
    array = jax.random.key_data(leaf) if is_key(leaf) else np.array(leaf)
    kept = leaf if is_key(leaf) else array
    return kept, (leaf.shape, leaf.dtype, np.asarray(array).tobytes())


def _compile(
    network: Callable[[], Any], inputs: PyTree, p: jax.typing.ArrayLike | None
) -> Programs:
    """Return the programs of a network; the power is an argument if `p` is None."""

    def evaluate(arguments, direct=False):
        params, power, args = arguments
        (q,) = power or (p,)
        forward, example = network(), inputs
        if forward is dense_stack:
            forward, example = dense_stack(params)
        factors = scale_factors(forward, params, example, q, args, direct)
        # These are known after the sums, and exponents before the last ones.
        roots = (x for x in jax.tree.leaves(factors) if x.dtype != jnp.int32)
        last = event_of(jnp.max(root, initial=0) for root in roots)
        return _inverse_roots(params, factors, q), last

    def guarded(arguments):
        once, restore = ravel_pytree(evaluate(arguments, direct=True))
        careful = lambda arguments: ravel_pytree(evaluate(arguments))[0]  # noqa: E731
        return restore(unless_safe(~jnp.isnan(once), once, careful, arguments))

    @jax.custom_jvp
    def evaluate_once(arguments):
        params, power, _ = arguments
        (q,) = power or (p,)
        if fits_float64(PathArithmetic(q), dtype_of_paths(params)):
            return on_cuda(evaluate, guarded)(arguments)
        return guarded(arguments)

    # What is NaN has no derivative, so two passes give it.
    evaluate_once.defjvp(functools.partial(jax.jvp, evaluate))

    @jax.jit
    @with_automatic_sharding
    def compute(arguments):
        large = [w.ndim for w in _floats(arguments[0]) if w.size >= LARGE]
        # Large convolutions take long to compile twice.
        return (evaluate_once if set(large) == {2} else evaluate)(arguments)

    @jax.jit
    def compute_if(due, arguments, kept):
        def anew(arguments):
            # Those of `first_roots` have the shapes of the parameters.
            like = lambda new, old: jnp.broadcast_to(new, jnp.shape(old))  # noqa: E731
            roots, event = compute(arguments)
            return jax.tree.map(like, roots, kept), event

        # A constant in place of `due` would count as something that is computed.
        event = jnp.asarray(due, jnp.float32)
        return unless(due, (kept, event), anew, arguments)

    return compute, compute_if


def path_program(
    forward: Forward | None, inputs: PyTree, p: jax.typing.ArrayLike
) -> PathProgram:
    """Return the program for the path scales of a network.

    It is the same one for the same function object, inputs that mean the same and the
    same number `p`, unless there is no telling: if inputs are traced integers, say.
    """
    network = dense_stack if forward is None else forward
    leaves, structure = jax.tree.flatten(inputs)
    fixed = [_fixed(leaf) for leaf in leaves]
    inputs = jax.tree.unflatten(structure, [leaf for leaf, _ in fixed])
    power = () if isinstance(p, int | float) else (p,)
    number = None if power else p
    key = (number, structure, tuple(key for _, key in fixed))
    takes_more = _takes_more(network)
    try:
        hash(key)
        programs = kept_with(network)
        # A strong reference would keep the network, and so its programs, alive.
        reference: Callable[[], Any] = weakref.ref(network)
    except TypeError:  # No hash, or no weak references: this one is not kept.
        compiled = _compile(lambda: network, inputs, number)
        return PathProgram(compiled, power, network, takes_more)
    if key not in programs:
        programs[key] = _compile(reference, inputs, number)
    return PathProgram(programs[key], power, network, takes_more)

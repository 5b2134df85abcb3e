"""Assertions about invariance, in the manner of chex.

Plain functions for tests and training scripts. Each raises an `AssertionError` that
names the arrays at fault, their values and the tolerance. They compare values, so
inside `jax.jit` they need `chex.chexify`, as chex's own. What they call is compiled,
and takes products of float32 matrices in full, also on a GPU, unless it names a
precision.
Tolerances: docs/theory/invariance.md.
"""

from normax.testing.invariance import (
    assert_inverse_gradient_scaling,
    assert_orthogonal_gradient,
    assert_scale_invariant,
    assert_unit_norm,
)
from normax.testing.outputs import assert_outputs_near
from normax.testing.trajectories import (
    assert_equivalent_trajectories,
    assert_rescaling_equivalent,
    assert_rescaling_invariant,
)

__all__ = [
    "assert_equivalent_trajectories",
    "assert_inverse_gradient_scaling",
    "assert_orthogonal_gradient",
    "assert_outputs_near",
    "assert_rescaling_equivalent",
    "assert_rescaling_invariant",
    "assert_scale_invariant",
    "assert_unit_norm",
]

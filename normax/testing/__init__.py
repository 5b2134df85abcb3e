"""Assertions about invariance, in the manner of chex.

Plain functions for tests and training scripts. Each raises an `AssertionError` that
names the arrays at fault, their values and the tolerance. Those of one set of weights
stand in `invariance`, those that compare networks or training runs in `trajectories`.
"""

from normax.testing.invariance import (
    assert_inverse_gradient_scaling,
    assert_orthogonal_gradient,
    assert_scale_invariant,
    assert_unit_norm,
)
from normax.testing.trajectories import (
    assert_equivalent_trajectories,
    assert_rescaling_equivalent,
    assert_rescaling_invariant,
)

__all__ = [
    "assert_equivalent_trajectories",
    "assert_inverse_gradient_scaling",
    "assert_orthogonal_gradient",
    "assert_rescaling_equivalent",
    "assert_rescaling_invariant",
    "assert_scale_invariant",
    "assert_unit_norm",
]

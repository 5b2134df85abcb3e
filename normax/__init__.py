"""The learning rate that a network really trains with, for JAX and Optax."""

from normax import nn as nn
from normax.invariance.report import ArrayScaleInvariance as ArrayScaleInvariance
from normax.invariance.report import ScaleInvarianceReport as ScaleInvarianceReport
from normax.invariance.report import scale_invariance_report as scale_invariance_report
from normax.invariance.report import scale_invariant_axes as scale_invariant_axes
from normax.invariance.report import weight_decay_mask as weight_decay_mask
from normax.paths.norm import log_path_norm as log_path_norm
from normax.paths.norm import path_norm as path_norm
from normax.paths.norm import path_scales as path_scales
from normax.paths.sgd import ScaleByPathSGDState as ScaleByPathSGDState
from normax.paths.sgd import path_sgd as path_sgd
from normax.paths.sgd import scale_by_path_sgd as scale_by_path_sgd
from normax.rescaling.balance import balance as balance
from normax.rescaling.balance import group_norm as group_norm
from normax.rescaling.balance import max_norm as max_norm
from normax.rescaling.units import random_rescaling as random_rescaling
from normax.rescaling.units import rescale_units as rescale_units
from normax.second_order.hessian_free import HessianFreeState as HessianFreeState
from normax.second_order.hessian_free import hessian_free as hessian_free
from normax.second_order.newton import newton as newton
from normax.spheres.measures import (
    MonitorWeightDynamicsState as MonitorWeightDynamicsState,
)
from normax.spheres.measures import angular_update as angular_update
from normax.spheres.measures import monitor_weight_dynamics as monitor_weight_dynamics
from normax.spheres.measures import relative_update as relative_update
from normax.spheres.measures import weight_norm as weight_norm
from normax.spheres.projection import ProjectUnitNormState as ProjectUnitNormState
from normax.spheres.projection import normalized_sgd as normalized_sgd
from normax.spheres.projection import project_unit_norm as project_unit_norm
from normax.spheres.projection import projection_unit_norm as projection_unit_norm
from normax.spheres.projection import remove_radial_component as remove_radial_component
from normax.spheres.rotation import RotateByAngleState as RotateByAngleState
from normax.spheres.rotation import rotate_by_angle as rotate_by_angle
from normax.spheres.rotational_rules import rotational_adamw as rotational_adamw
from normax.spheres.rotational_rules import rotational_lion as rotational_lion
from normax.spheres.rotational_rules import rotational_sgd as rotational_sgd
from normax.spheres.tangent import adamp as adamp
from normax.spheres.tangent import sgdp as sgdp
from normax.sweeps.sweep import grid_sweep as grid_sweep
from normax.sweeps.sweep import sweep as sweep
from normax.testing.invariance import (
    assert_inverse_gradient_scaling as assert_inverse_gradient_scaling,
)
from normax.testing.invariance import (
    assert_orthogonal_gradient as assert_orthogonal_gradient,
)
from normax.testing.invariance import assert_scale_invariant as assert_scale_invariant
from normax.testing.invariance import assert_unit_norm as assert_unit_norm
from normax.testing.trajectories import (
    assert_equivalent_trajectories as assert_equivalent_trajectories,
)
from normax.testing.trajectories import (
    assert_rescaling_equivalent as assert_rescaling_equivalent,
)
from normax.testing.trajectories import (
    assert_rescaling_invariant as assert_rescaling_invariant,
)
from normax.theory.rules import UPDATE_RULES as UPDATE_RULES
from normax.theory.rules import UpdateRule as UpdateRule
from normax.theory.schedules import (
    exponential_equivalent_schedule as exponential_equivalent_schedule,
)
from normax.theory.schedules import harmonic_schedule as harmonic_schedule
from normax.theory.schedules import optimal_momentum as optimal_momentum

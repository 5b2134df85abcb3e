"""The learning rate that a network really trains with, for JAX and Optax."""

from normax import nn as nn
from normax._assertions import (
    assert_inverse_gradient_scaling as assert_inverse_gradient_scaling,
)
from normax._assertions import assert_orthogonal_gradient as assert_orthogonal_gradient
from normax._assertions import assert_scale_invariant as assert_scale_invariant
from normax._assertions import assert_unit_norm as assert_unit_norm
from normax._hessian_free import HessianFreeState as HessianFreeState
from normax._hessian_free import hessian_free as hessian_free
from normax._invariance import ArrayScaleInvariance as ArrayScaleInvariance
from normax._invariance import ScaleInvarianceReport as ScaleInvarianceReport
from normax._invariance import scale_invariance_report as scale_invariance_report
from normax._invariance import scale_invariant_axes as scale_invariant_axes
from normax._invariance import weight_decay_mask as weight_decay_mask
from normax._max_norm import balance as balance
from normax._max_norm import group_norm as group_norm
from normax._max_norm import max_norm as max_norm
from normax._measures import MonitorWeightDynamicsState as MonitorWeightDynamicsState
from normax._measures import angular_update as angular_update
from normax._measures import monitor_weight_dynamics as monitor_weight_dynamics
from normax._measures import relative_update as relative_update
from normax._measures import weight_norm as weight_norm
from normax._path_norm import log_path_norm as log_path_norm
from normax._path_norm import path_norm as path_norm
from normax._path_norm import path_scales as path_scales
from normax._path_sgd import ScaleByPathSGDState as ScaleByPathSGDState
from normax._path_sgd import path_sgd as path_sgd
from normax._path_sgd import scale_by_path_sgd as scale_by_path_sgd
from normax._rescaling import random_rescaling as random_rescaling
from normax._rescaling import rescale_units as rescale_units
from normax._rotation import RotateByAngleState as RotateByAngleState
from normax._rotation import rotate_by_angle as rotate_by_angle
from normax._rotational_rules import rotational_adamw as rotational_adamw
from normax._rotational_rules import rotational_lion as rotational_lion
from normax._rotational_rules import rotational_sgd as rotational_sgd
from normax._schedules import (
    exponential_equivalent_schedule as exponential_equivalent_schedule,
)
from normax._schedules import harmonic_schedule as harmonic_schedule
from normax._schedules import optimal_momentum as optimal_momentum
from normax._second_order import newton as newton
from normax._sweep import grid_sweep as grid_sweep
from normax._sweep import sweep as sweep
from normax._tangent import adamp as adamp
from normax._tangent import sgdp as sgdp
from normax._trajectories import (
    assert_equivalent_trajectories as assert_equivalent_trajectories,
)
from normax._trajectories import (
    assert_rescaling_equivalent as assert_rescaling_equivalent,
)
from normax._trajectories import (
    assert_rescaling_invariant as assert_rescaling_invariant,
)
from normax._unit_norm import ProjectUnitNormState as ProjectUnitNormState
from normax._unit_norm import normalized_sgd as normalized_sgd
from normax._unit_norm import project_unit_norm as project_unit_norm
from normax._unit_norm import projection_unit_norm as projection_unit_norm
from normax._unit_norm import remove_radial_component as remove_radial_component
from normax._update_rules import UPDATE_RULES as UPDATE_RULES
from normax._update_rules import UpdateRule as UpdateRule

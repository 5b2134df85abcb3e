"""Weight vectors on spheres: measured, projected, turned.

A network with normalization layers does not see the scale of a weight vector. So such
a vector is a point of a sphere, and a step turns it by an angle. All functions take
`axes`, which says which entries of an array form one weight vector.
"""

from normax.spheres.measures import angular_update, relative_update, weight_norm
from normax.spheres.monitor import MonitorWeightDynamicsState, monitor_weight_dynamics
from normax.spheres.profile import GradientProfile, gradient_norm_profile
from normax.spheres.projection import (
    ProjectUnitNormState,
    normalized_sgd,
    project_unit_norm,
    projection_unit_norm,
    remove_radial_component,
)
from normax.spheres.rare_measures import MonitorOptimizerState, monitor_optimizer
from normax.spheres.relative_steps import hyperball
from normax.spheres.rotation import RotateByAngleState, rotate_by_angle
from normax.spheres.rotational_rules import (
    rotational_adamw,
    rotational_lion,
    rotational_sgd,
)
from normax.spheres.tangent import adamp, sgdp

__all__ = [
    "GradientProfile",
    "MonitorOptimizerState",
    "MonitorWeightDynamicsState",
    "ProjectUnitNormState",
    "RotateByAngleState",
    "adamp",
    "angular_update",
    "gradient_norm_profile",
    "hyperball",
    "monitor_optimizer",
    "monitor_weight_dynamics",
    "normalized_sgd",
    "project_unit_norm",
    "projection_unit_norm",
    "relative_update",
    "remove_radial_component",
    "rotate_by_angle",
    "rotational_adamw",
    "rotational_lion",
    "rotational_sgd",
    "sgdp",
    "weight_norm",
]

"""The learning rate that a network really trains with, for JAX and Optax."""

from normax._measures import MonitorWeightDynamicsState as MonitorWeightDynamicsState
from normax._measures import angular_update as angular_update
from normax._measures import monitor_weight_dynamics as monitor_weight_dynamics
from normax._measures import relative_update as relative_update
from normax._measures import weight_norm as weight_norm
from normax._schedules import (
    exponential_equivalent_schedule as exponential_equivalent_schedule,
)
from normax._schedules import harmonic_schedule as harmonic_schedule
from normax._schedules import optimal_momentum as optimal_momentum
from normax._unit_norm import ProjectUnitNormState as ProjectUnitNormState
from normax._unit_norm import normalized_sgd as normalized_sgd
from normax._unit_norm import project_unit_norm as project_unit_norm
from normax._unit_norm import projection_unit_norm as projection_unit_norm
from normax._unit_norm import remove_radial_component as remove_radial_component
from normax._update_rules import UPDATE_RULES as UPDATE_RULES
from normax._update_rules import UpdateRule as UpdateRule

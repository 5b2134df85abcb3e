"""The learning rate that a network really trains with, for JAX, Optax and Flax.

What a training script names stands here. All else stands in its topic: `spheres`,
`paths`, `rescaling`, `invariance`, `theory`, `second_order`, `sweeps`, `inspection`,
`testing`, `nn`.
"""

from normax import (
    inspection,
    invariance,
    nn,
    paths,
    rescaling,
    second_order,
    spheres,
    sweeps,
    testing,
    theory,
)
from normax.invariance import (
    scale_invariance_report,
    scale_invariant_axes,
    weight_decay_mask,
)
from normax.paths import path_norm, path_scales, path_sgd, scale_by_path_sgd
from normax.spheres import (
    adamp,
    angular_update,
    hyperball,
    monitor_weight_dynamics,
    normalized_sgd,
    project_unit_norm,
    projection_unit_norm,
    relative_update,
    remove_radial_component,
    rotate_by_angle,
    rotational_adamw,
    rotational_lion,
    rotational_sgd,
    sgdp,
    weight_norm,
)
from normax.theory import UPDATE_RULES, dynamics_scalars, dynamics_table

__version__ = "0.1.0"

__all__ = [
    "UPDATE_RULES",
    "adamp",
    "angular_update",
    "dynamics_scalars",
    "dynamics_table",
    "hyperball",
    "inspection",
    "invariance",
    "monitor_weight_dynamics",
    "nn",
    "normalized_sgd",
    "path_norm",
    "path_scales",
    "path_sgd",
    "paths",
    "project_unit_norm",
    "projection_unit_norm",
    "relative_update",
    "remove_radial_component",
    "rescaling",
    "rotate_by_angle",
    "rotational_adamw",
    "rotational_lion",
    "rotational_sgd",
    "scale_by_path_sgd",
    "scale_invariance_report",
    "scale_invariant_axes",
    "second_order",
    "sgdp",
    "spheres",
    "sweeps",
    "testing",
    "theory",
    "weight_decay_mask",
    "weight_norm",
]

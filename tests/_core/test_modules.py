"""A Flax module in the place of parameters is refused, by whatever takes them."""

import inspect

import flax.linen
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation")]

MODEL = nnx.Sequential(
    nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))
)
LINEN = flax.linen.Dense(2)
KEY, X = jax.random.key(0), jnp.ones((2, 3))


def call(model, x):
    return model(x)


def loss(model):
    return jnp.sum(model(X))


def takes(name, *args, **options):
    """Return a call of a function whose first argument is the parameters."""
    function = getattr(normax, name, None) or getattr(normax.testing, name, None)
    function = function or getattr(normax.rescaling, name)
    return lambda params: function(params, *args, **options)


FUNCTIONS = {
    "angular_update": lambda params: normax.angular_update(params, params),
    "assert_inverse_gradient_scaling": lambda params: (
        normax.testing.assert_inverse_gradient_scaling(loss, params, "unit")
    ),
    "assert_orthogonal_gradient": lambda params: (
        normax.testing.assert_orthogonal_gradient(loss, params, "unit")
    ),
    "assert_outputs_near": lambda params: normax.testing.assert_outputs_near(
        call, params, params, X, 1.0
    ),
    "assert_scale_invariant": lambda params: normax.testing.assert_scale_invariant(
        loss, params, "unit"
    ),
    "assert_unit_norm": takes("assert_unit_norm"),
    "balance": takes("balance"),
    "balance with forward": takes("balance", forward=call, inputs=X),
    "group_norm": takes("group_norm", 2, 2),
    "max_norm": takes("max_norm"),
    **{
        name: lambda params, name=name: getattr(normax.paths, name)(
            call, params, params, X
        )
        for name in ("output_change_bound", "path_metric", "path_metric_bound")
    },
    **{
        name: lambda params, name=name: getattr(normax.paths, name)(
            call, params, X, 0.5
        )
        for name in ("path_mask", "path_prune")
    },
    "path_saliency": lambda params: normax.paths.path_saliency(call, params, X),
    "path_norm": lambda params: normax.path_norm(call, params, X),
    "path_scales": lambda params: normax.path_scales(call, params, X),
    "projection_unit_norm": takes("projection_unit_norm"),
    "random_rescaling": lambda params: normax.rescaling.random_rescaling(KEY, params),
    "relative_update": lambda params: normax.relative_update(params, params),
    "rescale_units": takes("rescale_units", [2.0]),
    "scale_invariance_report": lambda params: normax.scale_invariance_report(
        loss, params, key=KEY
    ),
    "scale_invariant_axes": lambda params: normax.scale_invariant_axes(
        loss, params, key=KEY
    ),
    "weight_decay_mask": lambda params: normax.weight_decay_mask("unit", params),
    "weight_norm": takes("weight_norm"),
}
TRANSFORMATIONS = {
    "hessian_free": normax.second_order.hessian_free,
    "monitor_weight_dynamics": normax.monitor_weight_dynamics,
    "newton": lambda: normax.second_order.newton(),
    "path_sgd": lambda: normax.path_sgd(0.1),
    "path_sgd of a network": lambda: normax.path_sgd(0.1, call, X),
    "project_unit_norm": normax.project_unit_norm,
    "remove_radial_component": normax.remove_radial_component,
    "rotate_by_angle": lambda: normax.rotate_by_angle(0.1),
    "rotational_sgd": lambda: normax.rotational_sgd(0.1, 0.1),
    "scale_by_path_sgd": normax.scale_by_path_sgd,
    "sgdp": lambda: normax.sgdp(0.1, axes="unit"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_refuse_modules(name):
    for model in (MODEL, [MODEL], LINEN):
        with pytest.raises(ValueError, match=r"pass nnx\.state\(model, nnx\.Param\)"):
            FUNCTIONS[name](model)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations_refuse_modules(name):
    with pytest.raises(ValueError, match=r"pass nnx\.state\(model, nnx\.Param\)"):
        TRANSFORMATIONS[name]().init(MODEL)


def test_all_functions_of_parameters_are_tried():
    names = ("paths", "rescaling", "second_order", "testing")
    topics = (normax, *(getattr(normax, name) for name in names))
    public = {name: getattr(topic, name) for topic in topics for name in topic.__all__}
    takes_params = {
        name
        for name, value in public.items()
        if inspect.isfunction(value) and "params" in inspect.signature(value).parameters
    }
    # These compare what functions of the user return, and look into no parameters.
    takes_params -= {
        "assert_equivalent_trajectories",
        "assert_rescaling_equivalent",
        "assert_rescaling_invariant",
    }
    assert takes_params <= FUNCTIONS.keys()


def test_states_of_modules_are_taken():
    params = nnx.state(MODEL, nnx.Param)
    (norms,) = jax.tree.leaves(normax.weight_norm(params))
    assert norms.shape == (4,)

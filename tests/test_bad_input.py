"""What cannot be right raises at once, and names what it is, its value and the fix."""

import pathlib
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import normax

RULES = normax.UPDATE_RULES
EQUILIBRIA = "equilibrium_norm", "equilibrium_rotation", "equilibrium_time"


def given(call, *args, **defaults):
    """Return the call as a function of keywords."""
    return lambda **keywords: call(*args, **defaults | keywords)


def equilibrium(rule, name):
    start = {"initial_norm": 1.0} if name == "equilibrium_time" else {}
    numbers = dict(learning_rate=0.1, weight_decay=0.1, gradient_norm=1.0, dimension=9)
    return given(getattr(RULES[rule], name), **numbers, **start)


SGD, ADAMW, LION = (
    given(factory, 0.1, **{"weight_decay": 0.1})
    for factory in (
        normax.rotational_sgd,
        normax.rotational_adamw,
        normax.rotational_lion,
    )
)
# A call, the numbers that it takes by name, and the bound that they lie below, if any.
IN_RANGE = [
    (given(normax.normalized_sgd, 0.1), "momentum", 1),
    (given(normax.normalized_sgd, 0.1), "weight_decay", None),
    (given(normax.path_sgd, 0.1), "momentum", 1),
    (given(normax.theory.hyperball_correlation, 0.1), "momentum", 1),
    (given(normax.theory.hyperball_learning_rate, 0.1), "momentum", 1),
    (given(normax.sgdp, 0.1), "momentum dampening", 1),
    (given(normax.sgdp, 0.1), "weight_decay delta wd_ratio", None),
    (given(normax.adamp, 0.1), "b1 b2", 1),
    (given(normax.adamp, 0.1), "eps weight_decay delta wd_ratio", None),
    (SGD, "momentum decay", 1),
    (ADAMW, "b1 b2 decay", 1),
    (ADAMW, "eps", None),
    (LION, "b1 b2 decay", 1),
    *((given(rule.make, 0.1), "weight_decay", None) for rule in RULES.values()),
    *((given(RULES[name].make, 0.1), "momentum", 1) for name in ("sgd", "nesterov")),
    (given(RULES["normalized_sgd"].make, 0.1), "momentum", 1),
    (given(RULES["rmsprop"].make, 0.1), "decay momentum", 1),
    (given(RULES["adadelta"].make, 0.1), "rho", 1),
    (given(RULES["adagrad"].make, 0.1), "eps initial_accumulator_value", None),
    *((given(RULES[name].make, 0.1), "b1 b2", 1) for name in ("adam", "adamw")),
    *((given(RULES[name].make, 0.1), "eps", None) for name in ("adam", "adamw")),
    *((equilibrium("adamw", name), "b1 b2", 1) for name in EQUILIBRIA),
    *((equilibrium("adamw", name), "weight_decay", None) for name in EQUILIBRIA),
]
IN_RANGE = [
    (call, name, below) for call, names, below in IN_RANGE for name in names.split()
]


@pytest.mark.parametrize("call, name, below", IN_RANGE)
def test_numbers_out_of_range(call, name, below):
    for value in (-1.0, float("nan"), *((1.0, 1.5) if below else ())):
        upper = rf"below {below}(\.0)?" if below else "finite"
        message = f"^{name} must be at least 0 and {upper}, got {value}; choose {name}"
        with pytest.raises(ValueError, match=message):
            call(**{name: value})


@pytest.mark.parametrize("call, name, below", IN_RANGE)
def test_traced_numbers_pass(call, name, below):
    def made(value):
        call(**{name: value})
        return value

    jax.eval_shape(made, jnp.float32(0))


RADIUS = given(normax.projection_unit_norm, {"w": jnp.ones((3, 2))})
STACK = [jnp.ones((2, 3)), jnp.ones((3, 1))]
X = jnp.ones((4, 2))
NETWORK = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 1))}


def forward(params, x):
    return jax.nn.relu(x @ params["w"]) @ params["v"]


# More numbers that have other bounds, or none.
NUMBERS = [
    *((call, "weight_decay") for call in (SGD, ADAMW, LION)),
    (given(normax.rotate_by_angle, 0.1), "decay"),
    (normax.monitor_weight_dynamics, "decay"),
    (given(normax.spheres.monitor_optimizer, optax.sgd(0.1), 2), "decay"),
    (normax.project_unit_norm, "radius"),
    (RADIUS, "radius"),
    (given(normax.path_norm, forward, NETWORK, X), "p"),
    (given(normax.path_scales, forward, NETWORK, X), "p"),
    (given(normax.paths.path_metric, forward, NETWORK, NETWORK, X), "p"),
    (given(normax.paths.path_metric_bound, forward, NETWORK, NETWORK, X), "p"),
    (given(normax.paths.path_mask, forward, NETWORK, X), "fraction"),
    (given(RULES["sgd"].effective_learning_rate, weight_norm=1.0), "learning_rate"),
    (equilibrium("adam", "equilibrium_time"), "initial_norm"),
    *(
        (equilibrium("adam", method), name)
        for method in EQUILIBRIA
        for name in ("learning_rate", "gradient_norm", "dimension")
    ),
    (given(normax.theory.harmonic_schedule, 0.1, offset=1.0), "transition_steps"),
    (normax.theory.hyperball_angle, "learning_rate"),
    (given(normax.theory.hyperball_angle, 0.1), "correlation"),
    (given(normax.theory.hyperball_correlation, momentum=0.9), "learning_rate"),
    (given(normax.theory.hyperball_learning_rate, momentum=0.9), "angle"),
    *(
        (given(normax.theory.Setting, rule="adamw", steps=9), name)
        for name in ("batch_size", "initial_norm", "gradient_norm")
    ),
    (given(normax.hyperball, optax.identity(), 0.1), "radius"),
    (given(normax.rescaling.rescale_units, STACK), "factors"),
    *(
        (given(normax.rescaling.random_rescaling, jax.random.key(0), STACK), name)
        for name in ("log_mean", "log_std", "fraction")
    ),
]
NUMBERS = [(call, name) for call, name, _ in IN_RANGE] + NUMBERS
NO_NUMBERS = {
    "string": ("0.1", r"'0\.1'; pass a float"),
    "schedule": (optax.constant_schedule(0.1), "<function .*; pass its value at one"),
    "complex": (1j, "1j; pass a float"),
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.parametrize("call, name", NUMBERS)
def test_what_is_no_number(call, name, kind):
    value, message = NO_NUMBERS[kind]
    if name == "radius" and call is not RADIUS and kind == "schedule":
        pytest.skip("its radius may be a schedule")
    if name == "radius" and kind == "string":
        message = r"'0\.1'; the norms of some parameters are weight_norm"
    with pytest.raises(ValueError, match=rf"^{name} must be a .*got {message}"):
        call(**{name: value})


LEARNING_RATES = [
    given(normax.normalized_sgd),
    given(normax.sgdp),
    given(normax.adamp),
    given(normax.rotational_sgd, weight_decay=0.1),
    given(normax.rotational_adamw, weight_decay=0.1),
    given(normax.rotational_lion, weight_decay=0.1),
    given(normax.hyperball, optax.identity()),
    given(normax.theory.Setting, rule="adamw", steps=9),
    given(normax.second_order.newton),
    given(normax.second_order.hessian_free),
    *(given(rule.make) for rule in RULES.values()),
]


@pytest.mark.parametrize("call", LEARNING_RATES)
def test_learning_rates_are_numbers_or_schedules(call):
    for kind in ("string", "complex"):
        value, message = NO_NUMBERS[kind]
        message = rf"^learning_rate must be a real number, got {message}"
        with pytest.raises(ValueError, match=message):
            call(learning_rate=value)
    call(learning_rate=optax.constant_schedule(0.1))


@pytest.mark.parametrize(
    "rule", [normax.rotational_sgd, normax.rotational_adamw, normax.rotational_lion]
)
def test_a_rotational_rule_takes_the_root_of_its_learning_rate(rule):
    message = r"^learning_rate must be at least 0 and finite, got -0\.1; choose"
    with pytest.raises(ValueError, match=message):
        rule(-0.1, weight_decay=0.1)


PARAMS = {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}
# A sum with the parameters would not complain, since it broadcasts.
UPDATES = {"bias": jnp.ones(2), "kernel": jnp.ones((1, 2))}
TRANSFORMATIONS = {
    "project_unit_norm": normax.project_unit_norm(),
    "project_unit_norm, initial": normax.project_unit_norm(radius="initial"),
    "remove_radial_component": normax.remove_radial_component(),
    "monitor_weight_dynamics": normax.monitor_weight_dynamics(),
    "monitor_optimizer": normax.spheres.monitor_optimizer(optax.sgd(0.1), 2),
    "rotate_by_angle": normax.rotate_by_angle(0.1),
    "rotational_sgd": SGD(),
    "rotational_adamw": ADAMW(),
    "hyperball": normax.hyperball(optax.scale_by_adam(), 0.1),
    "normalized_sgd": normax.normalized_sgd(0.1, momentum=0.9),
    "sgdp": normax.sgdp(0.1),
    "adamp": normax.adamp(0.1),
    **{name: rule.make(0.1) for name, rule in RULES.items()},
}
MISFIT = (
    r"the shapes of the parameters, but params\['kernel'\] has shape \(3, 2\) and its "
    r"update \(1, 2\); pass the updates of these parameters"
)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_updates_of_another_shape(name):
    tx = TRANSFORMATIONS[name]
    state = jax.eval_shape(tx.init, PARAMS)
    with pytest.raises(ValueError, match=MISFIT):
        jax.eval_shape(tx.update, UPDATES, state, PARAMS)
    # One number for a bias, which is left alone.
    bad = {"bias": jnp.ones(()), "kernel": PARAMS["kernel"]}
    with pytest.raises(ValueError, match=r"params\['bias'\] has shape \(2,\)"):
        jax.eval_shape(tx.update, bad, state, PARAMS)


@pytest.mark.parametrize("measure", [normax.relative_update, normax.angular_update])
def test_measures_of_updates_of_another_shape(measure):
    with pytest.raises(ValueError, match=MISFIT):
        measure(PARAMS, UPDATES)
    with pytest.raises(ValueError, match=r"params has shape \(3, 2\) and its update"):
        measure(PARAMS["kernel"], UPDATES["kernel"])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(2)(x))


def bridged():
    return nnx.bridge.ToNNX(Block(), rngs=nnx.Rngs(0)).lazy_init(X)


def muon(**given):
    given = {"dimension": (8, 16)} | given
    return RULES["muon"].equilibrium_norm(0.1, 0.1, **given)


def adamw_run(steps):
    return RULES["adamw"].predict(0.1, 0.1, steps=steps, initial_norm=1.0, dimension=8)


SGD_RUN = {"rule": "sgd", "learning_rate": 0.1, "weight_decay": 0.1}


def inspect(**given):
    """Inspect a run of one checkpoint, which holds one array."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(pathlib.Path(folder) / "0.npz", w=np.ones((3, 2)))
        return normax.inspection.inspect_run(folder, **given)


ARRAY = jnp.ones((3, 2))
ERRORS = [
    # Complex radii, fractions and axes.
    (
        lambda: normax.projection_unit_norm(PARAMS, radius={"bias": 1, "kernel": 1j}),
        r"radius\['kernel'\] must be a real number, got 1j; pass a float",
    ),
    (
        lambda: normax.rescaling.random_rescaling(jax.random.key(0), STACK, 2.0),
        r"fraction must be at most 1, .* got 2\.0; rescale twice",
    ),
    (
        lambda: normax.weight_norm(ARRAY, axes=(True,)),
        r"^axes must be one of .*, got \(True,\); choose one of these; a single axis",
    ),
    (
        lambda: normax.project_unit_norm({"kernel": (0, True)}),
        r"axes\['kernel'\] must be one of .*, got \(0, True\); choose one",
    ),
    # Hyperparameters of Muon, and dimensions.
    *(
        (lambda given=given: muon(**given), message)
        for given, message in (
            (dict(ns_coeffs=(1, 2)), r"ns_coeffs must be three .*\(1, 2\); pass \(3"),
            (dict(ns_steps=-1), "ns_steps must be a positive integer, got -1; pass"),
            (dict(ns_steps=2.5), "ns_steps must be a positive integer, got 2.5; pass"),
            (dict(dimension=(None, 4)), r"must be a pair, got \(None, 4\); pass"),
        )
    ),
    (
        lambda: RULES["adamw"].equilibrium_norm(0.1, 0.1, dimension=[3, 4]),  # type: ignore[arg-type]
        r"number of entries of a weight vector, got \[3, 4\]; pass dimension=rows \*",
    ),
    *(
        (lambda steps=steps: adamw_run(steps), "steps must be a positive integer, got")
        for steps in (True, 0, 2.0, None)
    ),
    # What is said of a run's checkpoints.
    (lambda: inspect(rule="adamv"), "got 'adamv'; did you mean adam"),
    (lambda: inspect(rule="sgd"), "of sgd depends on both rates, .*; pass both"),
    (lambda: inspect(learning_rate=0.1), "rule is None and .*; name one of sgd"),
    (lambda: inspect(b1=0.9), "rates belong to a rule, but rule is None"),
    (lambda: inspect(axes="units"), "got 'units'; choose one of these"),
    (lambda: inspect(axes={"v": [0]}), "no weights at 'v'; its first is 'w'"),
    (lambda: inspect(axes=(2,)), r"axes must lie within the array's rank"),
    (lambda: inspect(steps=[7]), r"\[7\] are not; it has 0"),
    (lambda: inspect(steps=[]), "steps must name a step at least; None reads all"),
    *(
        (lambda n=name, x=x: inspect(**SGD_RUN | {n: x}), f"{name} must be .*got {x}")
        for name, x in (("learning_rate", -1), ("weight_decay", 0), ("momentum", 1))
    ),
    # Updates of another structure, and numbers that were rounded.
    (
        lambda: normax.relative_update(PARAMS, PARAMS | {"bias": {"b": ARRAY}}),
        r"params\['bias'\] has shape \(2,\) and its update is a dict; pass the updates",
    ),
    (
        lambda: optax.inject_hyperparams(normax.adamp)(0.1).init(jnp.bfloat16(1)),
        r"b2 must be at least 0 and below 1, got 1\.0 in bfloat16; choose",
    ),
    # Unknown names.
    (
        lambda: RULES["adamm"],
        r"UPDATE_RULES has sgd, .*hessian_free, got 'adamm'; did you mean adam\?",
    ),
    (
        lambda: RULES["qqq"],
        r"UPDATE_RULES has sgd, .*hessian_free, got 'qqq'; choose one of these",
    ),
    (
        lambda: RULES[3],  # type: ignore[index]
        r"UPDATE_RULES has sgd, .*, got 3; choose one of these",
    ),
    (
        lambda: RULES["adam"].make(0.1, beta1=0.5),
        r"UPDATE_RULES\['adam'\] has b1, b2, .*, got beta1; did you mean b1\?",
    ),
    (
        lambda: RULES["adam"].make(0.1, weight_decays=0.5),
        r"has b1, .*, got weight_decays; did you mean weight_decay\?",
    ),
    # Swapped arguments.
    *(
        (
            lambda call=call, order=order: call(*order),
            rf"forward must be a function, but {call.__name__} got a dict; the order "
            rf"is {call.__name__}\(forward, params, inputs\)",
        )
        for call in (normax.path_norm, normax.path_scales)
        for order in ((NETWORK, forward, X), (NETWORK, X, forward))
    ),
    *(
        (
            lambda call=call: call(forward, X, NETWORK),
            r"takes the parameters first, but it fails on \(params, inputs\) with "
            r".*Error, and accepts \(inputs, params\); swap the two",
        )
        for call in (normax.path_norm, normax.path_scales)
    ),
    (
        lambda: normax.path_sgd(0.1, forward, NETWORK).init(X),
        r"takes the parameters first, .*; swap the two",
    ),
    *(
        (
            lambda call=call: call(NETWORK, forward, NETWORK, X),
            rf"the order is {call.__name__}\(forward, params, other, inputs\)",
        )
        for call in (normax.paths.path_metric, normax.paths.path_metric_bound)
    ),
    # Two networks that are not the same one.
    (
        lambda: normax.paths.path_metric(forward, NETWORK, STACK, X),
        r"two sets of parameters of one network, but .* pass the same tree",
    ),
    (
        lambda: normax.paths.path_metric_bound(
            forward, NETWORK, NETWORK | {"w": jnp.ones((2, 4))}, X
        ),
        r"params\['w'\] has shape \(2, 3\), and \(2, 4\) in `other`; pass the same",
    ),
    # Pruning.
    (
        lambda: normax.paths.path_prune(forward, NETWORK, X, 1.5),
        r"fraction must be at most 1, all entries, got 1\.5; choose it in",
    ),
    (
        lambda: jax.jit(lambda f: normax.paths.path_prune(forward, NETWORK, X, f))(0.5),
        r"fraction must be a known number, but it is traced; make it a static",
    ),
    (
        given(normax.paths.path_prune, forward, NETWORK, X, np.array([0.5, 0.2])),
        r"fraction must be one number, but it has shape \(2,\); pass one at a time",
    ),
    (
        lambda: normax.paths.path_mask(forward, NETWORK, X, 0.5, where=["w"]),
        r"where must be a prefix of `params`, .* give each array or group",
    ),
    (
        lambda: normax.paths.path_mask(forward, NETWORK, X, 0.5, where="w"),
        r"where must hold booleans, got 'w'; pass True for the arrays to prune",
    ),
    (
        lambda: normax.paths.output_change_bound(
            forward, NETWORK, NETWORK, (X, np.arange(3))
        ),
        r"integers have no such size, but `inputs` holds int.*; let `forward` close",
    ),
    (
        lambda: normax.paths.path_mask(forward, NETWORK, X, 0.5, per="unit"),
        r"per must be 'network' or 'layer', .*, got 'unit'; choose one of the two",
    ),
    (
        lambda: normax.paths.path_mask(forward, NETWORK, X, 0.5, where=False),
        r"needs an array to prune, but none of the 2 arrays .*; choose others by",
    ),
    (
        lambda: normax.paths.path_mask(
            forward, NETWORK | {"i": jnp.arange(3)}, X, 0.5, where=True
        ),
        r"`where` chooses params\['i'\], which holds int32; choose False for it",
    ),
    # Modules of Linen.
    (
        lambda: normax.nn.WeightNorm(nn.Dense(2)),  # type: ignore[arg-type]
        r"nn\.WeightNorm takes .* Flax NNX, got a flax\.linen.*Dense; flax\.linen\.W",
    ),
    *(
        (
            lambda model=model: normax.nn.fold_batch_norms(model(), X),
            rf"nn\.fold_batch_norms takes a module of Flax NNX, got a .*{kind}; build",
        )
        for model, kind in ((Block, "Block"), (bridged, "ToNNX"))
    ),
    (
        lambda: normax.nn.initialize_weight_norm(Block(), X),  # type: ignore[arg-type]
        r"initialize_weight_norm takes a module of Flax NNX, got a .*Block; build",
    ),
    (
        lambda: normax.nn.WeightNorm(nnx.Dropout(0.5)),
        r"none of Dropout, which has no parameters; pass for example",
    ),
    # Parameters that are one array.
    (
        lambda: normax.weight_norm(ARRAY, {"kernel": "unit"}),
        r"axes must be a prefix .*, but params is one array and axes a dict; pass what",
    ),
    (
        lambda: normax.projection_unit_norm(ARRAY, radius=[1.0]),
        r"radius must be a prefix .*, but params is one array and radius a list; pass",
    ),
    (
        lambda: ADAMW(mask={"kernel": True}).init(ARRAY),
        r"mask must be a prefix .*, but params is one array and mask a dict; pass what",
    ),
    # Masks.
    (
        lambda: SGD(mask={"head": 0}),
        r"mask\['head'\] must be True or False, got 0; pass a pytree of bools",
    ),
    (
        lambda: SGD(mask=lambda params: 1.0).init(PARAMS),
        r"mask must be True or False, got 1\.0; pass a pytree of bools",
    ),
    (
        lambda: LION(mask={"bias": True}).init(PARAMS),
        r"mask must be a prefix .*no entry for params\['kernel'\]; add one",
    ),
    (
        lambda: LION(mask={"bias": True, "kernel": True, "w": True}).init(PARAMS),
        r"mask must be a prefix .*nothing at \['w'\]; remove these entries",
    ),
]


@pytest.mark.parametrize("call, message", ERRORS)
def test_errors_name_the_argument_the_value_and_the_fix(call, message):
    with pytest.raises((ValueError, TypeError, KeyError), match=message) as error:
        call()
    assert "[]" not in str(error.value)


def test_a_network_of_path_sgd_in_the_wrong_place():
    with pytest.raises(ValueError, match=r"is a .*; the order is scale_by_path_sgd"):
        normax.scale_by_path_sgd(X, forward)
    with pytest.raises(ValueError, match="learning_rate must be a real number"):
        normax.path_sgd("0.1")

"""What a rule takes and what its theory knows: by every keyword of its optax call."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normax

RULES = normax.UPDATE_RULES
CALLS = {
    "sgd": optax.sgd,
    "momentum": optax.sgd,
    "nesterov": optax.sgd,
    "adagrad": optax.adagrad,
    "rmsprop": optax.rmsprop,
    "adadelta": optax.adadelta,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lion": optax.lion,
    "muon": optax.contrib.muon,
    "adafactor": optax.adafactor,
    "normalized_sgd": normax.normalized_sgd,
    "newton": normax.second_order.newton,
    "hessian_free": normax.second_order.hessian_free,
}
# Where a rule is not its call with the call's defaults.
OTHER_DEFAULTS = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "adagrad": {"initial_accumulator_value": 0.0},
    "hessian_free": {"damping": 0.0},
    "adafactor": {"dtype_momentum": "float32"},  # the same, and short in `help`
}
SGD = {"momentum", "nesterov"}
KNOWN = {
    "sgd": SGD,
    "momentum": SGD,
    "nesterov": SGD,
    "rmsprop": {"decay", "eps"},
    "adadelta": {"rho", "eps"},
    "adam": {"b1", "b2", "eps"},
    "adamw": {"b1", "b2", "eps"},
    "lion": {"b1", "b2"},
    "muon": {"beta", "consistent_rms", "eps", "nesterov", "ns_coeffs", "ns_steps"}
    & set(inspect.signature(optax.contrib.muon).parameters),
    "adafactor": {
        "min_dim_size_to_factor",
        "decay_rate",
        "multiply_by_parameter_scale",
        "clipping_threshold",
        "momentum",
        "eps",
        "factored",
    },
    "normalized_sgd": {"axes"},
    "newton": set(),
    "hessian_free": set(),
}
# The equilibrium is that of gradients beside which epsilon is small, and that of one
# weight vector, however many an array holds.
WITHOUT_INFLUENCE = {("rmsprop", "eps"), ("adam", "eps"), ("adamw", "eps")}
WITHOUT_INFLUENCE |= {("normalized_sgd", "axes"), ("muon", "eps")}
WITHOUT_INFLUENCE |= {
    ("adafactor", name)
    for name in ("min_dim_size_to_factor", "decay_rate", "eps", "factored")
}
# What Muon's Adam has for other arrays, and the theory takes without a use.
ASIDE = {
    "adam_b1",
    "adam_b2",
    "adam_eps_root",
    "adam_weight_decay",
    "adam_learning_rate",
    "muon_weight_dimension_numbers",
}
# Other values than the defaults, where these are no numbers or switches.
CHANGED = {
    "accumulator_dtype": jnp.bfloat16,
    "adam_learning_rate": 0.5,
    "clipping_threshold": 0.5,
    "consistent_rms": 0.2,
    "dtype_momentum": jnp.bfloat16,
    "axes": "layer",
    "loss_of_outputs": jnp.sum,
    "mask": False,
    "momentum": 0.5,
    "mu_dtype": np.float16,
    "muon_weight_dimension_numbers": optax.contrib.MuonDimensionNumbers(1, 0),
    "ns_coeffs": (3.0, -3.2, 1.2),
    "ns_steps": 6,
    "outputs_fn": jnp.sum,
    "preconditioning": "aol",
    "rtol": 0.1,
    "weight_decay_mask": False,
}


DECAY = ("learning_rate", "weight_decay", "weight_decay_rate")
# AdaDelta's decay is given to the gradient, as that of all coupled rules.
COUPLED_MASK = ("adadelta", "weight_decay_mask")


def call_parameters(name):
    """Return the hyperparameters of the call that is the rule: name to default."""
    parameters = inspect.signature(CALLS[name]).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.name not in DECAY and (name, parameter.name) != COUPLED_MASK
    }


def changed(keyword, default):
    if keyword in CHANGED:
        return CHANGED[keyword]
    if isinstance(default, bool):
        return not default
    return default - 0.05 if default > 0.1 else default + 0.05


KEYWORDS = [(name, keyword) for name in CALLS for keyword in call_parameters(name)]


@pytest.mark.parametrize("name", RULES)
def test_rules_take_what_their_calls_take(name):
    make = inspect.signature(RULES[name].make).parameters
    defaults = {key: make[key].default for key in list(make)[2:]}
    assert defaults == call_parameters(name) | OTHER_DEFAULTS.get(name, {})
    assert all(make[key].kind == inspect.Parameter.KEYWORD_ONLY for key in defaults)


@pytest.mark.parametrize("name, keyword", KEYWORDS)
def test_the_theory_knows_a_hyperparameter_or_refuses_it(name, keyword):
    if name == "adagrad":
        return
    rule = RULES[name]
    default = inspect.signature(rule.make).parameters[keyword].default
    # Nesterov's momentum is any other than plain only where there is momentum.
    base = {"momentum": 0.8} if name == "sgd" and keyword == "nesterov" else {}
    if name == "adafactor":
        base = {"multiply_by_parameter_scale": False}
    value = changed(keyword, default)

    def settled(**hyper):
        arguments = 0.1, 0.1, 2.0, (9, 4) if name == "muon" else 9
        norm = rule.equilibrium_norm(*arguments, **base | hyper)
        return norm, rule.equilibrium_rotation(*arguments, **base | hyper)

    if (name, keyword) == ("adafactor", "multiply_by_parameter_scale"):
        with pytest.raises(ValueError, match=f"only with {keyword}=False"):
            settled(**{keyword: default})
        return

    assert settled(**{keyword: default}) == settled()
    if keyword in ASIDE:
        assert settled(**{keyword: value}) == settled()
        return
    if keyword in KNOWN[name]:
        same = settled(**{keyword: value}) == settled()
        assert same == ((name, keyword) in WITHOUT_INFLUENCE)
        return
    with pytest.raises(ValueError, match=f"not known for {keyword}=.*leave") as error:
        settled(**{keyword: value})
    known = str(error.value).partition("the theory knows")[2]
    assert KNOWN[name] == set(known.strip(" .").split(", ")) - {"no hyperparameter"}


def test_what_the_theory_does_not_know_is_refused_with_what_it_knows():
    message = (
        r"UPDATE_RULES\['adam'\] is not known for eps_root=1000000.0; leave eps_root "
        r"at 0.0; the theory knows b1, b2, eps\."
    )
    with pytest.raises(ValueError, match=message):
        RULES["adam"].equilibrium_norm(0.1, 0.1, 1.0, 9, eps_root=1e6)


@pytest.mark.parametrize("method", ["make", "equilibrium_norm"])
@pytest.mark.parametrize(
    "name, keyword, message",
    [
        ("adam", "eps_rot", r"has b1, b2, .*, got eps_rot; did you mean eps_root\?"),
        ("adam", "beta1", r"has b1, b2, .*, got beta1; did you mean b1\?"),
        ("rmsprop", "rho", r"has decay, eps, .*, got rho; leave rho out\."),
    ],
)
def test_unknown_hyperparameters(method, name, keyword, message):
    with pytest.raises(TypeError, match=message):
        getattr(RULES[name], method)(0.1, 0.1, **{keyword: 0.5})


@pytest.mark.parametrize(
    "name, hyper, message",
    [
        ("adam", dict(eps=-1e-8), "eps must be at least 0"),
        ("adamw", dict(b2=1.0), "b2 must be at least 0 and below 1"),
        ("sgd", dict(momentum=1.0), "momentum must be at least 0 and below 1"),
        ("adadelta", dict(rho=[0.5, -1.0]), r"rho\[1\] must be at least 0 and below 1"),
    ],
)
def test_ranges(name, hyper, message):
    with pytest.raises(ValueError, match=message):
        RULES[name].equilibrium_norm(0.1, 0.1, 1.0, 9, **hyper)


def test_injected_hyperparameters_are_those_of_the_signature():
    tx = optax.inject_hyperparams(RULES["nesterov"].make)(learning_rate=0.1)
    w = jnp.ones(3)
    state = tx.init(w)
    assert set(state.hyperparams) == {"learning_rate", "weight_decay", "momentum"}
    assert state.hyperparams["momentum"] == jnp.float32(0.9)
    state.hyperparams["momentum"] = jnp.float32(0.5)
    updates, _ = jax.jit(tx.update)(w, state, w)
    # Nesterov's first step: (1 + momentum) times the gradient.
    np.testing.assert_allclose(updates, -0.1 * 1.5 * w, rtol=1e-6)


def test_a_rule_makes_its_factory_once():
    # A factory may be the static argument of a compiled function.
    assert RULES["adam"].make is RULES["adam"].make

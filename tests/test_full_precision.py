"""What normax compares is computed in full float32 precision, also on a GPU or TPU.

There, products of float32 matrices are by default of factors rounded to 10 bits (TF32)
or 7 (bfloat16), a difference of 1e-3 or more. A CPU computes them in full, so what
the lowered programs ask for is looked at, and a GPU's rounding is imitated.
"""

import contextlib
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import normax

RNG = np.random.default_rng(0)
RNGS = nnx.Rngs(0)
KEY = jax.random.key(0)

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]

_PRODUCT = re.compile(r"= \"?stablehlo\.(?:dot|dot_general|convolution)\b.*")


@pytest.fixture(autouse=True)
def defaults_of_a_user():
    """Other than those of the suite: the library has to ask for itself."""
    with jax.default_matmul_precision(None):
        yield


@pytest.fixture
def lowered(tmp_path):
    """Return a context that collects the products in all programs lowered in it."""

    @contextlib.contextmanager
    def collect():
        found: list[str] = []
        jax.clear_caches()
        jax.config.update("jax_dump_ir_to", str(tmp_path))
        try:
            yield found
        finally:
            jax.config.update("jax_dump_ir_to", None)
        for program in tmp_path.iterdir():
            found += _PRODUCT.findall(program.read_text())

    return collect


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@jax.custom_vjp
def product(x, w):
    return x @ w


# Written by a user, and traced only when the gradient is taken.
product.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda saved, y: (y @ saved[1].T, saved[0].T @ y)
)


def forward(params, x):
    x = lax.conv_general_dilated(
        x, params["conv"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.reshape(jax.nn.relu(x), (len(x), -1)) @ params["dense"]


def masked_forward(params, x):
    mask = jnp.ones((6, 3)) @ jnp.ones((3, 2))
    return forward(params | {"dense": mask * params["dense"]}, x)


def stack():
    return {"conv": normal(2, 2, 3), "dense": normal(6, 2)}


def doubled(params):
    return {"conv": 2 * params["conv"], "dense": params["dense"] / 2}


def compiled_before(fn, *args):
    """Compile as a user may have done, with the precision that was the default."""
    fn = jax.jit(fn)
    fn(*args)
    return fn


def outputs(params):
    return compiled_before(functools.partial(forward, x=INPUTS), params)


def loss(params):
    def loss_fn(params):
        return jnp.mean((forward(params, INPUTS) - 1) ** 2)

    return compiled_before(loss_fn, params)


def unit_outputs(params):
    def fn(params):
        norms = jnp.linalg.norm(params["conv"], axis=(0, 1), keepdims=True)
        x = forward({"conv": params["conv"] / norms, "dense": jnp.ones((6, 3))}, INPUTS)
        norms = jnp.linalg.norm(params["dense"], axis=0, keepdims=True)
        return product(x, params["dense"][:3] / norms)

    return compiled_before(fn, params)


def unit_loss(params):
    fn = unit_outputs(params)
    return compiled_before(lambda params: jnp.sum(jnp.sin(fn(params))), params)


INPUTS = normal(4, 3, 2)
RESCALINGS = {
    "rescale_units": lambda params, **network: normax.rescaling.rescale_units(
        params, [3.0] * (len(params) - 1), **network
    ),
    "random_rescaling": lambda params, **network: normax.rescaling.random_rescaling(
        KEY, params, fraction=1.0, **network
    ),
    "balance": lambda params, **network: normax.rescaling.balance(params, **network),
}


def rescaling_check(name):
    def prepare():
        params = stack()
        network = dict(forward=compiled_before(forward, params, INPUTS), inputs=INPUTS)
        return functools.partial(RESCALINGS[name], params, **network)

    return prepare


def assertion(name, function):
    def prepare():
        params = stack()
        return functools.partial(
            getattr(normax.testing, name), function(params), params
        )

    return prepare


def detection(name):
    def prepare():
        params = stack()
        return functools.partial(
            getattr(normax, name), unit_loss(params), params, key=KEY
        )

    return prepare


def rescaling_equivalence():
    params = stack()
    return functools.partial(
        normax.testing.assert_rescaling_equivalent,
        params,
        doubled(params),
        outputs(params),
    )


def rescaling_invariance():
    params = stack()
    arguments = normax.path_sgd(0.1, masked_forward, INPUTS), loss(params), params
    return functools.partial(
        normax.testing.assert_rescaling_invariant,
        *arguments,
        doubled(params),
        outputs(params),
    )


def trajectories():
    params = stack()
    run = optax.sgd(0.01), loss(params), params
    return functools.partial(
        normax.testing.assert_equivalent_trajectories, run, run, outputs(params)
    )


def paths(fn):
    def prepare():
        params = stack()
        network = compiled_before(masked_forward, params, INPUTS)
        return functools.partial(fn, network, params)

    return prepare


def path_sgd_step(network, params):
    tx = normax.scale_by_path_sgd(network, INPUTS)
    return tx.update(params, tx.init(params), params)


def batch_norm():
    norm = nnx.BatchNorm(2, rngs=RNGS)
    norm.mean[...], norm.var[...] = normal(2), jnp.array([2.0, 3.0])
    return norm


def folding_error():
    linear, norm = nnx.Linear(3, 2, rngs=RNGS), batch_norm()
    folded = normax.nn.fold_batch_norm(linear, norm)
    pair = nnx.Sequential(linear, norm)
    return functools.partial(normax.nn.folding_error, pair, folded, INPUTS[:, :, 0])


def fold_batch_norms():
    model = nnx.Sequential(nnx.Conv(2, 2, (2,), rngs=RNGS), batch_norm())
    return functools.partial(normax.nn.fold_batch_norms, model, INPUTS)


def newton():
    params, tx = {"w": normal(3)}, normax.second_order.newton(damping=0.1)
    inputs = normal(4, 3)

    def loss_fn(params):
        return jnp.mean((inputs @ params["w"] - 1) ** 4)

    loss_fn = compiled_before(loss_fn, params)

    @jax.jit
    def step(gradient):
        return tx.update(gradient, tx.init(params), params, value_fn=loss_fn)[0]

    # Its derivative is that of the solution, which JAX asks for later.
    return functools.partial(jax.jvp, step, (params,), (params,))


CHECKS = {
    **{name: rescaling_check(name) for name in RESCALINGS},
    "assert_scale_invariant": assertion("assert_scale_invariant", unit_outputs),
    "assert_inverse_gradient_scaling": assertion(
        "assert_inverse_gradient_scaling", unit_loss
    ),
    "assert_orthogonal_gradient": assertion("assert_orthogonal_gradient", unit_loss),
    "assert_rescaling_equivalent": rescaling_equivalence,
    "assert_rescaling_invariant": rescaling_invariance,
    "assert_equivalent_trajectories": trajectories,
    "scale_invariant_axes": detection("scale_invariant_axes"),
    "scale_invariance_report": detection("scale_invariance_report"),
    "path_norm": paths(lambda network, w: normax.path_norm(network, w, INPUTS)),
    "log_path_norm": paths(
        lambda network, w: normax.path_norm(network, w, INPUTS, log=True)
    ),
    "path_scales": paths(lambda network, w: normax.path_scales(network, w, INPUTS)),
    "gradient of path_norm": paths(
        lambda network, w: jax.grad(normax.path_norm, 1)(network, w, INPUTS)
    ),
    "scale_by_path_sgd": paths(path_sgd_step),
    "folding_error": folding_error,
    "fold_batch_norms": fold_batch_norms,
    "newton": newton,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_programs_ask_for_full_precision(name, lowered):
    check = CHECKS[name]()
    with lowered() as products:
        check()
    assert products
    default = [line for line in products if line.count("HIGHEST") != 2]
    assert not default


def test_a_precision_of_the_users_own_stays(lowered):
    params = stack()

    def fn(params):
        return jnp.matmul(INPUTS[:, 0], params["dense"][:2], precision="default")

    with lowered() as products:
        normax.testing.assert_rescaling_equivalent(params, params, fn)
    assert products and not any("HIGHEST" in line for line in products)


def test_nothing_stays_set():
    params = stack()
    normax.testing.assert_rescaling_equivalent(params, doubled(params), outputs(params))
    with pytest.raises(AssertionError):
        normax.testing.assert_rescaling_equivalent(params, {}, outputs(params))
    assert jax.config.jax_default_matmul_precision is None


NORMS = {
    "assert_unit_norm": lambda w: normax.testing.assert_unit_norm(
        normax.projection_unit_norm(w)
    ),
    "weight_norm": normax.weight_norm,
    "angular_update": lambda w: normax.angular_update(w, w),
    "group_norm": lambda w: normax.rescaling.group_norm(w, 2, 1),
    "balance": lambda w: normax.rescaling.balance(w),
    "radial component": lambda w: normax.remove_radial_component().update(
        w, optax.EmptyState(), w
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_sums_which_every_device_takes_in_full(name, lowered):
    params = stack()
    with lowered() as products:
        NORMS[name](params)
    assert not products


def gpu_product(x, w):
    """Multiply as a GPU does: with factors of 10 bits, unless asked for more."""
    if jax.config.jax_default_matmul_precision is None:
        x, w = (lax.reduce_precision(y, 8, 10) for y in (x, w))
    return x @ w


def gpu_forward(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(gpu_product(x, layer["kernel"]) + layer["bias"][None])
    return gpu_product(x, params[-1]["kernel"]) + params[-1]["bias"][None]


def deep_network(depth):
    widths = [3, *[4] * depth, 2]
    params = [
        {"kernel": normal(n, m), "bias": normal(m)}
        for n, m in itertools.pairwise(widths)
    ]
    return params, normal(20, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESCALINGS)
def test_networks_may_be_rescaled_on_a_gpu(name):
    params, inputs = deep_network(8)
    rescaled = RESCALINGS[name](params, forward=gpu_forward, inputs=inputs)
    fn = functools.partial(gpu_forward, x=inputs)
    normax.testing.assert_rescaling_equivalent(params, rescaled, fn)


@pytest.mark.slow
def test_path_sgd_is_rescaling_invariant_on_a_gpu():
    params, inputs = deep_network(3)
    rescaled = RESCALINGS["rescale_units"](params)
    tx = normax.path_sgd(1e-3, gpu_forward, inputs)

    def loss_fn(params):
        return jnp.mean((gpu_forward(params, inputs) - 1) ** 2)

    normax.testing.assert_rescaling_invariant(
        tx, loss_fn, params, rescaled, functools.partial(gpu_forward, x=inputs), steps=3
    )


def test_a_folded_layer_is_the_same_on_a_gpu():
    linear, norm, x = nnx.Linear(3, 2, rngs=RNGS), batch_norm(), normal(20, 3)
    folded = normax.nn.fold_batch_norm(linear, norm)
    networks = (
        lambda x: norm(gpu_product(x, linear.kernel[...]), use_running_average=True),
        lambda x: gpu_product(x, folded.kernel[...]) + folded.bias[...][None],
    )
    assert normax.nn.folding_error(*networks, x) < 1e-6

"""What has no paths raises, and the message leads to the line that is to blame."""

import functools
import inspect
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(8)]

X = jnp.ones((1, 4))
PARAMS = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 2)), "slope": jnp.full((1, 4), 0.1)}


def message_of(activation, params=PARAMS, x=X):
    def forward(params, x):
        return activation(params, x @ params["w"]) @ params["v"]

    with pytest.raises(ValueError) as error:
        normax.path_norm(forward, params, x, log=True)
    return str(error.value)


def attention(params, h):
    return jax.nn.softmax(h @ h.T) @ h


def layer_norm(params, h):
    return nn.LayerNorm(use_bias=False, use_scale=False).apply({}, h)


COLLIDING = jnp.array([0, 1, 1, 2])
NOT_HOMOGENEOUS = {
    "tanh": (lambda params, h: jnp.tanh(h), "tanh"),
    "gelu": (lambda params, h: jax.nn.gelu(h), "tanh|integer_pow|mul"),
    "exact gelu": (lambda params, h: jax.nn.gelu(h, approximate=False), "erf"),
    "silu": (lambda params, h: jax.nn.silu(h), "logistic"),
    "softplus": (lambda params, h: jax.nn.softplus(h), "ne|max|exp"),
    "softmax": (lambda params, h: jax.nn.softmax(h), "exp"),
    "log_softmax": (lambda params, h: jax.nn.log_softmax(h), "exp"),
    "relu6": (lambda params, h: jax.nn.relu6(h), "min"),
    "hard_tanh": (lambda params, h: jax.nn.hard_tanh(h), "select_n|gt"),
    "elu": (lambda params, h: jax.nn.elu(h), "expm1"),
    "square": (lambda params, h: h**2, "integer_pow|square"),
    "product": (lambda params, h: h * h, "mul"),
    "gate": (lambda params, h: h * jax.nn.sigmoid(h @ params["w"]), "logistic"),
    "quotient": (lambda params, h: 1 / h, "div"),
    "gram": (lambda params, h: (h.T @ h)[:1], "dot_general"),
    "attention": (attention, "dot_general"),
    "layer norm": (layer_norm, "square|integer_pow|mul"),
    "l2 norm": (lambda params, h: h / jnp.linalg.norm(h), "mul|square|integer_pow"),
    "threshold": (lambda params, h: jnp.where(h > 1.0, h, 0.0), "gt"),
    "shifted relu": (lambda params, h: jnp.maximum(h, 1.0), "max"),
    "prelu": (
        lambda params, h: jnp.where(h > 0, h, params["slope"] * h),
        "select_n",
    ),
    "flax prelu": (
        lambda params, h: nn.PReLU().apply(
            {"params": {"negative_slope": params["slope"][0, 0]}}, h
        ),
        "select_n",
    ),
    "switch": (lambda params, h: jnp.where(h > 0, h @ params["w"], 0), "select_n"),
    "step": (lambda params, h: (h > 0).astype(h.dtype) @ params["w"], "dot_general"),
    "fraction": (lambda params, h: h + jnp.mean(h > 0), "reduce_sum"),
    "round": (lambda params, h: h.astype(jnp.int32).astype(h.dtype), "convert"),
    "sort": (lambda params, h: jnp.sort(h), "sort"),
    "index": (lambda params, h: jax.nn.one_hot(jnp.argmax(h, -1), 4), "argmax"),
    "padding": (
        lambda params, h: jnp.pad(h, ((0, 0), (2, 0)), constant_values=1.0)[:, :4],
        "pad",
    ),
    "branch": (
        lambda params, h: jax.lax.cond(h[0, 0] > 0, lambda: h, lambda: -h),
        "cond",
    ),
    "filled": (
        lambda params, h: h.at[:, COLLIDING].get(mode="fill", fill_value=1.0),
        "gather",
    ),
    "two entries in one place": (
        lambda params, h: jnp.zeros((1, 4)).at[:, COLLIDING].set(h),
        "scatter",
    ),
    "standardize": (
        lambda params, h: jax.nn.standardize(h),
        "square|integer_pow|mul|sub",
    ),
}


@pytest.mark.parametrize("name", NOT_HOMOGENEOUS)
def test_message_names_primitive_and_line(name):
    activation, primitives = NOT_HOMOGENEOUS[name]
    message = message_of(activation)
    applied = message.split("`")[1]
    assert any(applied.startswith(word) for word in primitives.split("|")), message
    lines, start = inspect.getsourcelines(activation)
    file, line = message.split(" at ")[1].split(" ")[0].rsplit(":", 1)
    assert file == __file__
    assert start <= int(line) < start + len(lines), message
    assert "positively homogeneous" in message and "forward" in message


def here():
    return inspect.currentframe().f_back.f_lineno


def helper(h):
    return jax.nn.silu(h)  # the line to blame, at every call


jitted_helper = jax.jit(helper)
HELPER = inspect.getsourcelines(helper)[1] + 1


@pytest.mark.parametrize(
    "library", [jax.nn.gelu, jax.nn.silu, jax.nn.softplus, jax.nn.elu]
)
def test_cached_functions_of_libraries_report_their_caller(library):
    library(X)  # fills the caches from this line
    first = message_of(lambda params, h: library(h)), here()
    second = message_of(lambda params, h: library(h)), here()
    for message, line in (first, second):
        assert f"{__file__}:{line} " in message


def test_helpers_report_their_own_line():
    for wrap in (
        jitted_helper,
        jax.checkpoint(helper),
        jax.vmap(helper),
        jax.jit(jitted_helper),
    ):
        assert f"{__file__}:{HELPER} " in message_of(lambda params, h, f=wrap: f(h))


def test_scan_reports_the_line_in_its_body():
    def forward(params, x):
        body = lambda h, _: (helper(h @ params["w"]), None)  # noqa: E731
        return jax.lax.scan(body, x, None, length=2)[0]

    with pytest.raises(ValueError, match=f"logistic.*{HELPER} "):
        normax.path_norm(forward, PARAMS, X)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm(use_running_average=False),
        nn.LayerNorm(),
        nn.GroupNorm(2),
        nn.RMSNorm(),
    ],
)
def test_normalization_by_the_batch_raises(layer):
    variables = layer.init(jax.random.key(0), X)

    def forward(params, x):
        rest = {k: v for k, v in variables.items() if k != "params"}
        h = layer.apply(
            {"params": params["norm"], **rest}, x @ params["w"], mutable=list(rest)
        )[0]
        return h @ params["v"]

    with pytest.raises(ValueError, match=f"positively homogeneous.*{__file__}"):
        normax.path_norm(forward, PARAMS | {"norm": variables["params"]}, X)


def test_what_no_output_uses_may_be_anything():
    def plain(params, x):
        return jax.nn.relu(x @ params["w"]) @ params["v"]

    def monitored(params, x):
        h = x @ params["w"]
        jnp.mean(h > 0), jax.nn.softmax(h), jnp.argmax(h), h.astype(jnp.int32), 1 / h
        jnp.where(h > 0, 0.0, 0.0)

        def body(carry, w):
            h, entropy = carry
            return (jax.nn.relu(h), entropy + jnp.sum(jnp.exp(h))), (h > 0, jnp.tanh(h))

        (h, _), _ = jax.lax.scan(body, (h, 0.0), jnp.ones(2))
        return h @ params["v"]

    expected = normax.path_norm(plain, PARAMS, X, log=True)
    np.testing.assert_allclose(
        normax.path_norm(monitored, PARAMS, X, log=True), expected, rtol=1e-6
    )


def weight_norm(params, x):
    direction = params["v"] / jnp.linalg.norm(params["v"], axis=0, keepdims=True)
    return x @ (direction * params["g"])


def halves(x, kernel, axis):
    """A layer with the sum of two halves of an array."""
    first, second = jnp.split(kernel, 2, axis)
    return x @ (first + second).reshape(4, -1)


TWICE = jnp.array([0, 1, 1, 0])


def scanned_halves(x, kernel):
    """The same layer in a scan over arrays that hold every weight twice."""
    layer = lambda h, kernel: (halves(h, kernel, 1), None)  # noqa: E731
    return jax.lax.scan(layer, x, jnp.tile(kernel, (1, 2))[None])[0]


def carried(x, rows):
    """A scan over rows that adds one of them at all steps."""
    step = lambda h, row: (h + rows[:1], row)  # noqa: E731
    return jax.lax.scan(step, x, rows[:, None])[0]


def started(x, rows):
    """A scan over rows that starts at one of them."""
    step = lambda h, row: (h + row, None)  # noqa: E731
    return jax.lax.scan(step, x + rows[:1], rows[:, None])[0]


def stacked(x, kernels, *more):
    """Layers with the products of several arrays."""

    def layer(h, kernels):
        return jax.nn.relu(h @ math.prod([*kernels, *more])), None

    return jax.lax.scan(layer, x, kernels)[0]


@pytest.mark.parametrize(
    ("forward", "blamed", "primitive"),
    [
        (weight_norm, "v", "div"),
        (lambda params, x: x @ params["v"] * jnp.exp(params["g"]), "g", "exp"),
        (lambda params, x: x @ (params["v"] * params["v"]), "v", "mul"),
        (lambda params, x: x @ (params["w"] @ params["v"]), "w", "dot_general"),
        (lambda params, x: x @ params["v"] / params["g"], "g", "div"),
        (lambda params, x: x @ params["v"] + params["g"] + params["g"], "g", "add"),
        (lambda params, x: x @ (params["v"] - params["v"][:1]), "v", "sub"),
        (lambda params, x: x[:, :3] @ (params["v"][:3] + params["v"][1:]), "v", "add"),
        (lambda params, x: x[:, 0:1] @ (params["v"][:1] * params["v"][:1]), "v", "mul"),
        (
            lambda params, x: x @ params["w"] + params["w"][0:1] - params["w"][0:1],
            "w",
            "sub",
        ),
        (
            lambda params, x: x @ jnp.ones((4, 1)).at[COLLIDING].set(params["v"]),
            "v",
            "scatter",
        ),
        (lambda params, x: halves(x, jnp.tile(params["w"], (1, 2)), 1), "w", "add"),
        (
            lambda params, x: halves(x, jnp.concatenate([params["w"]] * 2, 1), 1),
            "w",
            "add",
        ),
        (
            lambda params, x: halves(x, jnp.stack([params["w"], params["w"]]), 0),
            "w",
            "add",
        ),
        (
            lambda params, x: halves(x, jnp.broadcast_to(params["w"], (2, 4, 4)), 0),
            "w",
            "add",
        ),
        (lambda params, x: halves(x, params["w"][:, TWICE], 1), "w", "add"),
        (
            lambda params, x: halves(
                x, jnp.pad(X.T, ((0, 0), (0, 7)), constant_values=params["w"][0, 0]), 1
            ),
            "w",
            "add",
        ),
        (lambda params, x: scanned_halves(x, params["w"]), "w", "add"),
        (lambda params, x: carried(x, params["w"]), "w", "add"),
        (lambda params, x: started(x, params["w"]), "w", "add"),
        (lambda params, x: stacked(x, (params["w"][None],) * 2), "w", "mul"),
        (
            lambda params, x: stacked(x, (params["w"][None],), params["w"]),
            "w",
            "mul",
        ),
    ],
)
def test_path_scales_need_edge_weights(forward, blamed, primitive):
    params = {"v": jnp.array([[3.0], [4.0], [0.0], [0.0]]), "g": jnp.full((1, 1), 2.0)}
    params["w"] = jnp.eye(4)
    assert np.isfinite(normax.path_norm(forward, params, X, log=True))
    with pytest.raises(ValueError) as error:
        normax.path_scales(forward, params, X)
    message = str(error.value)
    assert f"params['{blamed}']" in message and f"`{primitive}`" in message
    assert __file__ in message


def test_weight_norm_has_the_path_norm_of_its_effective_weights():
    params = {"v": jnp.array([[3.0], [4.0], [0.0], [0.0]]), "g": jnp.full((1, 1), 2.0)}
    # sqrt(sum((2 * [0.6, 0.8])**2))
    np.testing.assert_allclose(normax.path_norm(weight_norm, params, X), 2.0, rtol=1e-6)


@pytest.mark.parametrize("p", [0.99, 0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "function",
    [
        normax.path_norm,
        functools.partial(normax.path_norm, log=True),
        normax.path_scales,
    ],
)
def test_p_is_at_least_one(function, p):
    with pytest.raises(ValueError, match="p must be"):
        function(lambda params, x: x @ params["w"], PARAMS, X, p)


def test_p_is_one_number():
    with pytest.raises(ValueError, match=r"p must be one number.* shape \(2,\)"):
        normax.path_norm(lambda params, x: x @ params["w"], PARAMS, X, np.ones(2))


def test_complex_parameters_and_integer_inputs_raise():
    forward = lambda params, x: x @ params["w"]  # noqa: E731
    with pytest.raises(ValueError, match=r"params\['w'\] is complex"):
        normax.path_norm(forward, {"w": jnp.ones((4, 2), jnp.complex64)}, X)
    with pytest.raises(ValueError, match="`inputs` holds complex numbers"):
        normax.path_norm(forward, PARAMS, X.astype(jnp.complex64))
    with pytest.raises(ValueError, match="depends on a floating-point input"):
        normax.path_norm(forward, PARAMS, jnp.ones((1, 4), jnp.int32))
    with pytest.raises(ValueError, match="pass them as arrays"):
        normax.path_norm(forward, PARAMS, jax.ShapeDtypeStruct((1, 4), jnp.int32))


def test_what_a_scan_returns_and_nothing_uses_may_be_anything():
    def forward(params, x):
        def step(h, w):
            return jax.nn.relu(h @ w), h @ (w * w)

        return jax.lax.scan(step, x, params["w"][None])[0]

    scales = normax.path_scales(forward, PARAMS, X)
    plain = normax.path_scales(lambda params, x: x @ params["w"], PARAMS, X)
    np.testing.assert_array_equal(scales["w"], plain["w"])


def test_scans_that_add_one_parameter_twice_raise():
    def forward(params, x):
        body = lambda h, _: (h + params["b"], None)  # noqa: E731
        return jax.lax.scan(body, x @ params["w"], None, length=3)[0]

    params = PARAMS | {"b": jnp.ones((1, 4))}
    with pytest.raises(ValueError, match=r"`add`.*params\['b'\]"):
        normax.path_scales(forward, params, X)

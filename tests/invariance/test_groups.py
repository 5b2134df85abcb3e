"""Arrays that are scale-invariant only together, in networks where they are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]
KEY = jax.random.key(4)
X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)


def arrays(**shapes):
    rng = np.random.default_rng(1)
    return {
        name: jax.device_put(rng.normal(size=shape).astype(np.float32)) / 2
        for name, shape in shapes.items()
    }


def rms_norm(z):
    return z / jnp.sqrt(jnp.mean(z**2, -1, keepdims=True) + 1e-6)


def squares(outputs):
    targets = jnp.sin(jnp.arange(outputs.size)).reshape(outputs.shape)
    return jnp.mean((outputs - targets) ** 2)


def with_bias(p):
    """A layer norm sees no scale of a kernel and its bias together."""
    return squares(jnp.tanh(rms_norm(X @ p["kernel"] + p["bias"])) @ p["head"])


def side_by_side(p):
    """A layer norm over the outputs of two kernels."""
    z = jnp.concatenate([X @ p["a"], jnp.sin(X @ p["b"]) @ p["c"]], -1)
    return squares(jnp.tanh(rms_norm(z)) @ p["head"])


def product(p):
    """Queries and keys: only their product counts."""
    scores = (X @ p["query"]) @ (X @ p["key"]).T
    return squares(jax.nn.softmax(scores) @ jnp.sin(X @ p["value"]))


def powers_of_two(p):
    """A factor that counts as its square."""
    return squares(jnp.tanh(X @ p["kernel"] * p["gain"] ** 2) @ p["head"])


def residual_stream(p):
    """All that is added to the residual stream, since norms read it."""
    z = X @ p["embed"]
    for i in "12":
        z = z + jax.nn.relu(rms_norm(z) @ p[f"in{i}"]) @ p[f"out{i}"]
    return squares(rms_norm(z) @ p["head"])


def plain(p):
    return squares(jnp.tanh(X @ p["kernel"] + p["bias"]) @ p["head"])


ONE = {"kernel": (6, 5), "bias": (1, 5), "head": (5, 3)}
CASES = {
    "with_bias": (with_bias, ONE, [{"kernel": 1, "bias": 1}]),
    "side_by_side": (
        side_by_side,
        {"a": (6, 3), "b": (6, 4), "c": (4, 3), "head": (6, 2)},
        [{"a": 1, "c": 1}],
    ),
    "product": (
        product,
        {"query": (6, 4), "key": (6, 4), "value": (6, 4)},
        [{"key": 1, "query": -1}],
    ),
    "powers_of_two": (
        powers_of_two,
        {"kernel": (6, 5), "gain": (1, 5), "head": (5, 3)},
        [{"kernel": 2, "gain": -1}],
    ),
    "residual_stream": (
        residual_stream,
        {n: (6, 6) for n in ("embed", "in1", "in2", "out1", "out2", "head")},
        [
            {"embed": 1, "out1": 1, "out2": 1},
            {"in1": 1, "out1": -1},
            {"in2": 1, "out2": -1},
        ],
    ),
    "plain": (plain, ONE, []),
}


def vectors(groups, names):
    """Return the powers of groups as rows."""
    return np.array([[g.get(name, 0) for name in names] for g in groups])


@pytest.mark.parametrize("name", CASES)
def test_groups(name):
    loss, shapes, expected = CASES[name]
    params = arrays(**shapes)
    report = normax.scale_invariance_report(jax.jit(loss), params, key=KEY)
    found = []
    for group in report.groups:
        names = [path.split("'")[1] for path in group.names]
        found.append(dict(zip(names, group.powers, strict=True)))
        assert group.radial <= report.near and group.change <= group.allowed < 0.2
        assert str(group) in str(report)
        # The loss itself: powers of a factor that was not tried.
        factors = {n: 3.0 ** found[-1].get(n, 0) for n in params}
        other = {n: w * jnp.float32(factors[n]) for n, w in params.items()}
        np.testing.assert_allclose(loss(other), loss(params), rtol=1e-4)
    # Groups may be combined, so that the same symmetries have several lists.
    rows, wanted = vectors(found, shapes), vectors(expected, shapes)
    assert len(rows) == len(wanted)
    if expected:
        together = np.linalg.matrix_rank(np.vstack([rows, wanted]))
        assert np.linalg.matrix_rank(rows) == together == len(wanted)
    if len(expected) == 1:
        assert found == expected


def test_arrays_that_are_invariant_alone_are_in_no_group():
    def loss(p):
        unit = p["alone"] / jnp.linalg.norm(p["alone"], axis=0, keepdims=True)
        return squares(jnp.tanh(rms_norm(X @ unit @ p["kernel"] + p["bias"])))

    params = arrays(alone=(6, 6), kernel=(6, 5), bias=(1, 5))
    report = normax.scale_invariance_report(loss, params, key=KEY)
    assert report.axes == {"alone": "unit", "kernel": "none", "bias": "none"}
    (group,) = report.groups
    assert set(group.names) == {"params['bias']", "params['kernel']"}
    assert "scale-invariant only together: params['bias'], params['kernel']" in str(
        report
    )


def test_groups_are_rejected_if_rescaling_changes_the_loss():
    # The gradient is that of an invariant function; rounding adds to the loss alone.
    def loss(p):
        rounded = jax.lax.stop_gradient(jnp.round(4 * p["kernel"]))
        return with_bias(p) + p["size"] * jnp.mean(jnp.sin(rounded))

    params = arrays(**ONE)
    (group,) = normax.scale_invariance_report(
        loss, params | {"size": 0}, key=KEY
    ).groups
    assert set(group.names) == {"params['bias']", "params['kernel']"}
    report = normax.scale_invariance_report(loss, params | {"size": 1}, key=KEY)
    assert report.groups == ()


@pytest.mark.slow
def test_more_arrays_than_can_be_told_apart():
    params = {str(i): jnp.float32(1 + i / 100) for i in range(129)}
    loss = lambda p: sum(jnp.sin(w) for w in p.values())  # noqa: E731
    report = normax.scale_invariance_report(jax.jit(loss), params, key=KEY)
    assert report.groups is None and "128" in str(report)

"""Detection of scale-invariant weights in networks whose invariance is known."""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.errors import TraceContextError

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]
KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 6)).astype(np.float32)
IMAGES = RNG.normal(size=(6, 5, 5, 2)).astype(np.float32)
SEQUENCES = RNG.normal(size=(3, 7, 8)).astype(np.float32)
TOKENS = RNG.integers(0, 11, (4, 6))


def batch_norm(z, epsilon=1e-5):
    axes = tuple(range(z.ndim - 1))
    z = z - jnp.mean(z, axes, keepdims=True)
    return z / jnp.sqrt(jnp.mean(z**2, axes, keepdims=True) + epsilon)


def rms_norm(z, epsilon=1e-6):
    return z / jnp.sqrt(jnp.mean(z**2, -1, keepdims=True) + epsilon)


def layer_norm(z, epsilon=1e-6):
    return rms_norm(z - jnp.mean(z, -1, keepdims=True), epsilon)


def squares(outputs):
    """A loss with another target for every output."""
    targets = jnp.sin(jnp.arange(outputs.size)).reshape(outputs.shape)
    return jnp.mean((outputs - targets) ** 2)


def dense(p, x):
    z = x @ p["kernel"]
    return z + jnp.broadcast_to(p["bias"], z.shape) if "bias" in p else z


def normalized(norm):
    def network(p):
        z = norm(dense(p["first"], X))
        z = z * jnp.broadcast_to(p["gain"], z.shape) if "gain" in p else z
        return squares(jax.nn.relu(z) @ p["head"])

    return network


def weight_norm(p):
    v = p["first"]["kernel"]
    kernel = p["gain"][None] * v / jnp.linalg.norm(v, axis=0, keepdims=True)
    return squares(jax.nn.relu(X @ kernel) @ p["head"])


def weight_standardization(p):
    kernel = p["first"]["kernel"]
    kernel = kernel - jnp.mean(kernel, 0, keepdims=True)
    kernel = kernel / jnp.std(kernel, 0, keepdims=True)
    return squares(jax.nn.relu(p["gain"][None] * (X @ kernel)) @ p["head"])


def two_layers(p):
    # The norm does not see the scale of anything before it that is homogeneous.
    hidden = jax.nn.relu(X @ p["first"]["kernel"] * p["gain"][None])
    return squares(batch_norm(hidden @ p["second"]) @ p["head"])


def linen(module, inputs):
    variables = jax.jit(module.init)(jax.random.key(0), inputs)
    params = variables.pop("params")

    def loss(params):
        outputs, _ = module.apply(
            {"params": params, **variables}, inputs, mutable=list(variables)
        )
        return squares(outputs)

    return loss, params


class Block(nn.Module):
    """A residual block to be stacked by scan."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x, _):
        z = nn.Dense(8, use_bias=False, name="dense")(x)
        norm = {"use_running_average": False} if self.norm is nn.BatchNorm else {}
        return x + nn.relu(self.norm(**norm)(z)), None


def stacked(norm):
    axes = {"params": 0, "batch_stats": 0}
    scan = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scan(norm, name="blocks")(x, None)[0]

    return linen(Network(), SEQUENCES)


def arrays(**shapes):
    rng = np.random.default_rng(1)
    shapes = {"first": {"kernel": (6, 8), "bias": (8,)}, "head": (8, 3)} | shapes
    return jax.tree.map(
        lambda shape: jax.device_put(rng.normal(size=shape).astype(jnp.float32)) / 2,
        {name: shape for name, shape in shapes.items() if shape},
        is_leaf=lambda node: isinstance(node, tuple),
    )


def convolution(norm):
    layers = [nn.Conv(4, (3, 3), name="conv"), norm, nn.relu, nn.Dense(3)]
    return linen(nn.Sequential(layers), IMAGES)


KERNEL = {"kernel": (6, 8)}


@functools.cache
def networks():
    return {
        "batch_norm": (normalized(batch_norm), arrays(gain=(8,))),
        "layer_norm": (normalized(layer_norm), arrays(first=KERNEL)),
        "layer_norm_bias": (normalized(layer_norm), arrays()),
        "rms_norm": (normalized(rms_norm), arrays(first=KERNEL, gain=(8,))),
        "plain": (normalized(lambda z: z), arrays(gain=(8,))),
        "weight_norm": (weight_norm, arrays(first=KERNEL, gain=(8,))),
        "standardized": (weight_standardization, arrays(first=KERNEL, gain=(8,))),
        "two_layers": (two_layers, arrays(first=KERNEL, gain=(8,), second=(8, 8))),
        "one_output": (
            normalized(batch_norm),
            arrays(first={"kernel": (6, 1)}, head=(1, 3)),
        ),
        "conv_batch": convolution(nn.BatchNorm(use_running_average=False)),
        "conv_instance": convolution(nn.InstanceNorm()),
        "conv_group": linen(
            nn.Sequential(
                [nn.Conv(4, (3, 3), use_bias=False, name="conv"), nn.GroupNorm(2)]
            ),
            IMAGES,
        ),
        "linen_weight_norm": linen(nn.WeightNorm(nn.Dense(4)), X),
        "attention": linen(
            nn.MultiHeadAttention(2, use_bias=False, normalize_qk=True), SEQUENCES
        ),
        "plain_attention": linen(nn.MultiHeadAttention(2), SEQUENCES),
        "embedding": linen(
            # With weights this small the norm's epsilon is 0.4% of the variance.
            nn.Sequential(
                [
                    nn.Embed(11, 16, embedding_init=nn.initializers.normal(0.016)),
                    nn.LayerNorm(),
                ]
            ),
            TOKENS,
        ),
        "stacked_batch": stacked(nn.BatchNorm),
        "stacked_layer": stacked(nn.LayerNorm),
    }


FOUND = {
    "batch_norm": {"['first']['kernel']": "unit"},
    "layer_norm": {"['first']['kernel']": "layer"},
    "layer_norm_bias": {},
    "plain": {},
    "plain_attention": {},
    "rms_norm": {"['first']['kernel']": "layer"},
    "weight_norm": {"['first']['kernel']": "unit"},
    "standardized": {"['first']['kernel']": "unit"},
    "two_layers": {
        "['first']['kernel']": "layer",
        "['gain']": "layer",
        "['second']": "unit",
    },
    "one_output": {"['first']['kernel']": "unit"},
    "conv_batch": {"['layers_0']['kernel']": "unit"},
    "conv_instance": {"['layers_0']['kernel']": "unit"},
    "conv_group": {"['layers_0']['kernel']": "layer"},
    "linen_weight_norm": {"['layer_instance']['kernel']": "unit"},
    "attention": {"['key']['kernel']": (0, 2), "['query']['kernel']": (0, 2)},
    "embedding": {"['layers_0']['embedding']": (1,)},
    "stacked_batch": {"['blocks']['dense']['kernel']": (1,)},
    "stacked_layer": {"['blocks']['dense']['kernel']": (1, 2)},
}


def words(axes):
    found = jax.tree_util.tree_leaves_with_path(
        axes, is_leaf=lambda node: isinstance(node, tuple)
    )
    return {jax.tree_util.keystr(p): word for p, word in found if word != "none"}


@pytest.fixture(scope="module")
def found():
    # One loss, so that all are compiled at once.
    losses = {name: loss for name, (loss, _) in networks().items()}
    params = {name: params for name, (_, params) in networks().items()}

    def total(params):
        return sum(loss(params[name]) for name, loss in losses.items())

    total = jax.jit(total)
    return total, params, normax.scale_invariance_report(total, params, key=KEY)


@pytest.mark.parametrize("name", FOUND)
def test_networks(found, name):
    assert set(found[2].axes) == set(FOUND)
    assert words(found[2].axes[name]) == FOUND[name]


def test_other_keys_find_the_same(found):
    total, params, report = found
    for seed in range(3):
        axes = normax.scale_invariant_axes(total, params, key=jax.random.key(seed))
        assert axes == report.axes


@pytest.mark.slow
def test_what_is_found_is_scale_invariant(found):
    total, params, report = found
    axes = report.axes | {"embedding": "none"}
    normax.testing.assert_scale_invariant(total, params, axes)
    normax.testing.assert_orthogonal_gradient(total, params, axes, rtol=3e-3)
    # The epsilon of the embedding's norm shows at the weights as they are.
    with pytest.raises(AssertionError, match="embedding"):
        normax.testing.assert_orthogonal_gradient(total, params, report.axes, rtol=3e-4)


@pytest.mark.slow
def test_axes_fit_everything_that_takes_axes(found):
    _, params, report = found
    names = ("embedding", "stacked_layer", "two_layers")
    params = {name: params[name] for name in names}
    axes = {name: report.axes[name] for name in names}
    assert jax.tree.structure(params) == jax.tree.structure(
        axes, is_leaf=lambda node: isinstance(node, (str, tuple))
    )
    mask = normax.weight_decay_mask(axes, params)
    partial = functools.partial(normax.weight_decay_mask, axes)
    tx = optax.chain(
        optax.masked(optax.add_decayed_weights(0.5), partial),
        normax.project_unit_norm(axes),
        normax.monitor_weight_dynamics(axes),
    )

    @jax.jit
    def update(params):
        zeros = optax.tree.zeros_like(params)
        decay = optax.add_decayed_weights(0.5, mask)
        decayed, _ = decay.update(zeros, decay.init(params), params)
        updates, _ = tx.update(params, tx.init(params), params)
        return decayed, optax.apply_updates(params, updates)

    decayed, updated = update(params)
    normax.testing.assert_unit_norm(updated, axes)
    found = jax.tree.map(lambda u: "decayed" if np.any(u) else "none", decayed)
    assert set(words(found)) == set(words(axes))


def test_weight_decay_mask():
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(2), "n": jnp.arange(4), "none": None}
    expected = {"a": True, "b": False, "n": False, "none": None}
    assert normax.weight_decay_mask("unit", params) == expected
    axes = {"a": "none", "b": "layer", "n": "unit"}
    mask = normax.weight_decay_mask(axes, params)
    assert mask == {"a": False, "b": True, "n": False, "none": None}
    assert jax.tree.map(operator.not_, mask)["a"] is True
    with pytest.raises(ValueError, match="prefix of the parameters"):
        normax.weight_decay_mask({"a": "unit"}, params)


def test_report(found):
    _, params, report = found
    assert len(report.arrays) == len(jax.tree.leaves(params))
    by_name = {array.name: array for array in report.arrays}
    array = by_name["params['batch_norm']['first']['kernel']"]
    assert array.shape == (6, 8) and array.axes == "unit"
    assert array.radial < 1e-3 and array.change < 1e-3 and array.log10_chance < -5
    table = str(report)
    assert table.splitlines()[0].split() == [*array._fields[:-1]]
    assert table.splitlines()[1].split() == ["at", "most", "3e-02", "1e-03", "allowed"]
    assert any(
        line.split()[:4] == [array.name, "(6,", "8)", "unit"]
        for line in table.splitlines()
    )
    plain = by_name["params['plain']['head']"]
    assert plain.near > 0.03 and np.isnan([*plain[5:9]]).all()


def test_the_numbers_shown_are_those_that_decided(found):
    _, _, report = found
    for array in report.arrays:
        within = (
            array.near <= report.near,
            array.radial <= report.rtol,
            array.change <= array.allowed,
        )
        assert all(within) == (array.axes != "none"), array
        assert array.axes in ("none", array.tried)
    # Its norm's epsilon is visible at the weights as they are, and decides nothing.
    (embedding,) = (a for a in report.arrays if a.name.endswith("['embedding']"))
    assert embedding.near > report.rtol >= embedding.radial


# Derived by hand: kernel and bias before a layer norm; factors of products; and what
# comes before and after a ReLU, or the weighted mean of an attention.
GROUPS = {
    "layer_norm_bias": [{"first/kernel": 1, "first/bias": 1}],
    "attention": [
        {"key_ln/scale": 1, "query_ln/scale": -1},
        {"out/kernel": 1, "value/kernel": -1},
    ],
    "plain_attention": [
        {"query/kernel": 1, "query/bias": 1, "key/kernel": -1},
        {"value/kernel": 1, "value/bias": 1, "out/kernel": -1},
    ],
    "batch_norm": [{"gain": 1, "head": -1}],
    "rms_norm": [{"gain": 1, "head": -1}],
    "weight_norm": [{"gain": 1, "head": -1}],
    "standardized": [{"gain": 1, "head": -1}],
    "plain": [
        {"first/kernel": 1, "first/bias": 1, "gain": -1},
        {"first/kernel": 1, "first/bias": 1, "head": -1},
    ],
    "conv_batch": [{"layers_1/scale": 1, "layers_1/bias": 1, "layers_3/kernel": -1}],
    "conv_instance": [{"layers_1/scale": 1, "layers_1/bias": 1, "layers_3/kernel": -1}],
}


def test_groups_of_arrays_that_are_scale_invariant_only_together(found):
    _, _, report = found
    rows = []
    for group in report.groups:
        paths = [path.removeprefix("params").strip("[']") for path in group.names]
        names = [path.replace("']['", "/") for path in paths]
        rows.append(dict(zip(names, group.powers, strict=True)))
    wanted = [
        {f"{name}/{path}": power for path, power in group.items()}
        for name, groups in GROUPS.items()
        for group in groups
    ]
    columns = sorted({name for group in [*rows, *wanted] for name in group})

    def rank(groups):
        table = [[group.get(name, 0) for name in columns] for group in groups]
        return np.linalg.matrix_rank(np.array(table))

    # Other combinations say the same.
    assert len(rows) == len(wanted) == rank(rows) == rank(wanted) == rank(rows + wanted)


ACTIVATIONS = {
    (6, 1): jnp.tanh,
    (5, 3): jax.nn.relu,
    (4, 3, 2): jax.nn.gelu,
    (2, 2): abs,
}


@jax.jit
def scale_variant(params):
    """The losses of one random layer of every shape; the data depend on the seed."""
    total, key = 0.0, jax.random.key(params["seed"])
    for shape, activation in ACTIVATIONS.items():
        inputs, targets = np.prod(shape[:-1]), shape[-1]
        key, x_key, y_key = jax.random.split(key, 3)
        z = jax.random.normal(x_key, (8, inputs)) @ params[str(shape)].reshape(
            inputs, -1
        )
        error = activation(z) - jax.random.normal(y_key, (8, targets))
        total += jnp.mean(error**2)
    return total


@pytest.mark.slow
def test_no_false_positives_in_a_thousand_layers():
    rng, near = np.random.default_rng(5), 0
    for seed in range(250):
        params = {
            str(shape): jax.device_put(rng.normal(size=shape).astype(jnp.float32))
            for shape in ACTIVATIONS
        }
        params["seed"] = jnp.asarray(seed)
        report = normax.scale_invariance_report(
            scale_variant, params, key=jax.random.key(seed)
        )
        assert words(report.axes) == {}
        near += sum(array.near < 0.03 for array in report.arrays)
        assert report.groups == ()
        assert all(np.isnan(array.change) for array in report.arrays)
    # One gradient would be wrong this often; the second left none to be rescaled.
    assert near > 5


def test_accidents_are_rejected_by_rescaling():
    # The products of these sum to 0 wherever the gradient is taken, but the function
    # is not the gradient's: rounding has none.
    def loss(params):
        unit = params["w"] / jnp.linalg.norm(params["w"])
        rounded = jax.lax.stop_gradient(jnp.round(4 * params["w"]))
        return jnp.sum(jnp.sin(unit + params["size"] * rounded))

    params = arrays(first=None, head=None, w=(3, 4)) | {"size": jnp.array(0.0)}
    assert words(normax.scale_invariant_axes(loss, params | {"size": 0}, key=KEY))
    report = normax.scale_invariance_report(loss, params | {"size": 1}, key=KEY)
    assert words(report.axes) == {}
    assert report.arrays[1].radial < 1e-3 and report.arrays[1].change > 0.1


@pytest.mark.slow
def test_what_the_loss_closes_over_may_change():
    scale = 0.0

    def loss(w):
        return jnp.sum(jnp.sin(w / jnp.linalg.norm(w)) + scale * w)

    w = arrays()["head"]
    assert normax.scale_invariant_axes(loss, w, key=KEY) == "layer"
    normax.testing.assert_scale_invariant(loss, w, "layer")
    scale = 1.0
    assert normax.scale_invariant_axes(loss, w, key=KEY) == "none"
    for check in (
        normax.testing.assert_scale_invariant,
        normax.testing.assert_orthogonal_gradient,
    ):
        with pytest.raises(AssertionError):
            check(loss, w, "layer")


def test_an_array_of_rank_one_without_a_tree():
    axes = normax.scale_invariant_axes(
        lambda w: jnp.sum(jnp.sin(w / jnp.linalg.norm(w))), jnp.arange(1.0, 5), key=KEY
    )
    assert normax.weight_decay_mask(axes, jnp.ones(4)) is True


@pytest.mark.parametrize("factor", [1e-20, 1e-6, 1e8])
def test_the_size_of_the_loss_does_not_count(factor):
    def loss(params):
        return factor * normalized(batch_norm)(params) + 1e3 * min(factor, 1.0)

    axes = normax.scale_invariant_axes(loss, arrays(), key=KEY)
    assert words(axes) == {"['first']['kernel']": "unit"}


@pytest.mark.slow
def test_arrays_without_influence():
    def loss(params):
        z = X[:, :1] @ params["one_input"] + params["bias"]
        return squares(batch_norm(z)) + 0 * jnp.sum(params["zero"])

    params = arrays(
        first=None, head=None, one_input=(1, 4), bias=(1, 4), zero=(3, 3), unused=(2, 3)
    )
    params |= {
        "none": None,
        "count": jnp.arange(6).reshape(2, 3),
        "empty": jnp.ones((0, 2)),
    }
    params |= {"scalar": jnp.array(2.0), "number": 3.0, "key": jax.random.key(0)}
    report = normax.scale_invariance_report(loss, params, key=KEY)
    assert words(report.axes) == {}
    assert "nan" not in str(report)
    nothing = normax.scale_invariance_report(lambda _: jnp.ones([]), {}, key=KEY)
    assert nothing[:2] == ({}, ()) and nothing.groups == ()


def test_dead_units_and_zeros_do_not_hide_the_others():
    params = arrays(gain=(8,))
    params["gain"] = params["gain"].at[2].set(0.0) * 1e-20
    params["first"]["bias"] *= 0.0

    def loss(params):
        gain = params["gain"].at[2].set(0.0)
        return normalized(batch_norm)(params | {"gain": gain})

    axes = normax.scale_invariant_axes(loss, params, key=KEY)
    assert words(axes) == {"['first']['kernel']": "unit"}
    zero_head = arrays() | {"head": jnp.zeros((8, 3))}
    axes = normax.scale_invariant_axes(normalized(batch_norm), zero_head, key=KEY)
    assert words(axes) == {"['first']['kernel']": "unit"}


@pytest.mark.parametrize(
    ("epsilon", "expected"), [(1e-3, {"['first']['kernel']": "unit"}), (0.3, {})]
)
def test_epsilon(epsilon, expected):
    loss = normalized(functools.partial(batch_norm, epsilon=epsilon))
    assert words(normax.scale_invariant_axes(loss, arrays(), key=KEY)) == expected


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_dtypes(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params = jax.tree.map(lambda w: w.astype(dtype), arrays())
        axes = normax.scale_invariant_axes(normalized(batch_norm), params, key=KEY)
    assert words(axes) == {"['first']['kernel']": "unit"}


@pytest.mark.slow
def test_nnx():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(6, 8, rngs=rngs),
        nnx.BatchNorm(8, rngs=rngs),
        nnx.relu,
        nnx.LinearGeneral((8,), (2, 2), use_bias=False, rngs=rngs),
        nnx.RMSNorm(2, rngs=rngs),
        nnx.LinearGeneral((2, 2), (3,), axis=(-2, -1), rngs=rngs),
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return squares(nnx.merge(graph, params, rest, copy=True)(X))

    axes = normax.scale_invariant_axes(loss, params, key=KEY)
    found = {path[:-6]: word for path, word in words(axes).items()}
    assert found == {
        "['layers'][0]['kernel']": "unit",
        "['layers'][3]['kernel']": (0, 2),
    }
    normax.testing.assert_scale_invariant(loss, params, axes)
    mask = functools.partial(normax.weight_decay_mask, axes)
    tx = optax.chain(optax.adamw(0.1, mask=mask), normax.project_unit_norm(axes))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: squares(model(X)))(model))

    step(model, optimizer)
    normax.testing.assert_unit_norm(nnx.state(model, nnx.Param), axes)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p: p["head"] ** 2, r"one real number, .*\(\(8, 3\), 'float32'\)"),
        (lambda p: (jnp.sum(p["head"]), 1.0), "one real number"),
        (lambda p: jnp.sum(p["head"]) * 1j, "one real number.*complex64"),
        (lambda p: jnp.sum(p["head"] > 0), "one real number.*int32"),
        (lambda p: jnp.sum(p["head"]) * jnp.nan, "must be finite.*the loss is nan"),
        (lambda p: jnp.log(-jnp.sum(p["head"] ** 2)), "must be finite.*nan"),
        (lambda p: jnp.sum(jnp.sqrt(0 * p["head"])), r"not finite at .*\['head'\]"),
    ],
)
def test_losses_that_cannot_be_right(loss, message):
    with pytest.raises(ValueError, match=message):
        normax.scale_invariant_axes(loss, arrays(), key=KEY)


@pytest.mark.slow
def test_arguments_that_cannot_be_right():
    loss = normalized(batch_norm)
    for rtol in (-1.0, 1.0, np.nan):
        with pytest.raises(ValueError, match="rtol must be at least 0 and below 1"):
            normax.scale_invariant_axes(loss, arrays(), key=KEY, rtol=rtol)
    with pytest.raises(ValueError, match=r"outside jax\.jit"):
        jax.jit(lambda p: normax.scale_invariant_axes(loss, p, key=KEY))(arrays())


def test_a_loss_that_updates_a_model_outside_is_told_how_to_merge():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(6, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def closing(params):
        nnx.update(model, params)
        return squares(model(X))

    def merging(params):
        return squares(nnx.merge(graph, params, rest)(X))

    for loss in (closing, merging, jax.jit(merging)):
        for find in (normax.scale_invariant_axes, normax.scale_invariance_report):
            with pytest.raises(ValueError, match=r"rest, copy=True\)") as error:
                find(loss, params, key=KEY)
            assert isinstance(error.value.__cause__, TraceContextError)


COMPARED = {
    "first": {"kernel": "layer", "bias": "layer"},
    "gain": "none",
    "head": (1,),
    "second": "none",
}


@pytest.mark.slow
def test_the_report_compares_with_axes_and_masks():
    def loss(p):
        z = batch_norm(X @ p["first"]["kernel"] + p["first"]["bias"][None])
        return squares(
            jnp.tanh(rms_norm(z * p["gain"][None] @ p["second"])) @ p["head"]
        )

    params = arrays(gain=(8,), second=(8, 8))
    loss = jax.jit(loss)

    def marks(compare):
        report = normax.scale_invariance_report(loss, params, key=KEY, compare=compare)
        marks = {row.name: row.difference for row in report.arrays if row.difference}
        lines = str(report).splitlines()
        for name, text in marks.items():
            assert any(ln.startswith(name) and ln.endswith(text) for ln in lines)
        assert str(report).count("<-") == len(marks)
        return marks

    kernel, second = "params['first']['kernel']", "params['second']"
    head, gain = "params['head']", "params['gain']"
    assert marks(COMPARED) == {
        kernel: "yours takes axes (0, 1), but smaller vectors are scale-invariant",
        "params['first']['bias']": "yours takes it, but it is not scale-invariant",
        gain: "yours leaves it alone, but it is scale-invariant",
        second: "yours leaves it alone, but it is scale-invariant",
        head: "yours takes it, but it is not scale-invariant",
    }
    found = normax.scale_invariant_axes(loss, params, key=KEY)
    assert marks(found) == {}
    assert marks(normax.weight_decay_mask(found, params)) == {}
    assert marks(True) == {
        "params['first']['bias']": "yours takes it, but it is not scale-invariant",
        head: "yours takes it, but it is not scale-invariant",
    }
    mask = {"first": True, "gain": False, "head": False, "second": True}
    assert set(marks(mask)) == {"params['first']['bias']", gain}
    columns = found | {"second": (0,)}
    text = "yours takes axes (0,), but those are not scale-invariant"
    assert marks(columns) == {second: text}
    with pytest.raises(ValueError, match="prefix of the parameters"):
        marks({"first": "unit"})

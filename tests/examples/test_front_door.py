"""A transformer, a ResNet, compositions and several processes: the way into normax."""

import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normax

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
composition: Any = importlib.import_module("composition")
datasets: Any = importlib.import_module("datasets")
distributed: Any = importlib.import_module("distributed")
layer_dynamics: Any = importlib.import_module("layer_dynamics")
resnet: Any = importlib.import_module("resnet")
transformer: Any = importlib.import_module("transformer")

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTING = transformer.Setting(width=8, depth=2, heads=2, context=6)
DIGITS = datasets.load("digits")
# Runs this short end before the averages of Adam forget the first gradients, and so
# small a network leaves signal in them. Without its factor for the momentum, AdamW's
# prediction would be wrong by 4.4.
NEAR = 1.5
TINY = "--width 16 --depth 1 --heads 2 --context 16 --batch-size 8 --learning-rate 0.01"


def networks(kind: str) -> list[Any]:
    """Return the networks of both frameworks."""
    if kind == "transformer":
        make = transformer.make_network
        return [make(framework, SETTING, 0) for framework in ("nnx", "linen")]
    make = resnet.make_network
    return [make(framework, DIGITS, 4, 1, 0) for framework in ("nnx", "linen")]


def by_name(tree: Any) -> dict[str, Any]:
    """Return the arrays by the names that NNX gives to them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = {layer_dynamics.name_of(path): array for path, array in leaves}
    return {name.replace("blocks_", "blocks/"): array for name, array in names.items()}


def axes_of(network: Any) -> dict[str, Any]:
    state: Any = normax.monitor_weight_dynamics(network.axes).init(network.params)
    return {name: np.ravel(axes).tolist() for name, axes in by_name(state.axes).items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformer", "resnet"])
def test_both_frameworks_make_the_same_network(kind: str) -> None:
    ours, theirs = networks(kind)
    assert ours.size == theirs.size
    assert axes_of(ours) == axes_of(theirs)
    arrays = by_name(ours.params)
    copied = jax.tree_util.tree_map_with_path(
        lambda path, array: arrays[
            layer_dynamics.name_of(path).replace("blocks_", "blocks/")
        ].reshape(array.shape),
        theirs.params,
    )
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.integers(0, 100, (4, 6)), jnp.int32)
    if kind == "resnet":
        inputs = jnp.asarray(DIGITS.x_train[:4])
    expected, rest = ours.apply(ours.params, ours.rest, inputs, True)
    found, same = theirs.apply(copied, theirs.rest, inputs, True)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    averages = by_name(rest)
    assert len(averages) == (14 if kind == "resnet" else 0)
    for name, average in by_name(same).items():
        start = by_name(theirs.rest)[name]
        name = name.removeprefix("batch_stats/")
        assert np.abs(average - start).max() > 1e-3
        np.testing.assert_allclose(average, averages[name], atol=2e-5)
    expected, _ = ours.apply(ours.params, rest, inputs, False)
    found, _ = theirs.apply(copied, same, inputs, False)
    np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.slow
def test_axes_and_mask_of_the_transformer_are_those_on_paper() -> None:
    network = networks("transformer")[0]
    block = {"attention/query": [0], "attention/key": [0], "attention/value": [0]}
    block |= {"attention/out": [0, 1], "up": [0], "down": [0]}
    expected = {
        f"blocks/{i}/{name}/kernel": axes
        for i in range(2)
        for name, axes in block.items()
    }
    expected |= {"embed/embedding": [1], "position/embedding": [1], "head/kernel": [0]}
    assert axes_of(network) == expected
    assert {name for name, decays in by_name(network.mask).items() if decays} == set(
        expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_queries_and_keys_of_the_transformer_settle(
    framework: str, tmp_path: Path
) -> None:
    arguments = f"{TINY} --steps 400 --framework {framework} --out {tmp_path}"
    outcome = transformer.main(arguments.split())
    columns = outcome.columns
    invariant = set(columns["array"][columns["scale_invariant"]])
    assert {name.rpartition("attention/")[2] for name in invariant} == {
        "query/kernel",
        "key/kernel",
    }
    for name in invariant:
        found = layer_dynamics.select(columns, name)
        first, last = (found["norm"] / found["predicted_norm"])[[0, -1]]
        assert abs(last - 1) < abs(first - 1)
        ratio = found["angle"] / found["predicted_angle"]
        assert 1 / NEAR < ratio[-20:].mean() < NEAR
    assert columns["loss"][99] < 0.8 * columns["loss"][0]
    lines = (tmp_path / "transformer.csv").read_text().splitlines()
    assert lines[0].split(",") == list(columns)
    assert len(lines) == 1 + 100 * len(outcome.table.arrays)
    assert (tmp_path / "transformer.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "framework"), [("momentum", "nnx"), ("adamw", "linen")]
)
def test_kernels_of_the_resnet_settle(
    rule: str, framework: str, tmp_path: Path
) -> None:
    arguments = f"--rule {rule} --framework {framework} --steps 600 --width 4"
    if rule == "adamw":  # Equilibrium comes in time at three times the usual decay.
        arguments += " --weight-decay 3"
    outcome = resnet.main([*arguments.split(), "--out", str(tmp_path)])
    columns = outcome.columns
    arrays = set(columns["array"])
    assert len(arrays) == 8
    assert set(columns["array"][~columns["scale_invariant"]]) == {"head/kernel"}
    for name in arrays - {"head/kernel"}:
        found = layer_dynamics.select(columns, name)
        ratio = found["angle"] / found["predicted_angle"]
        # Where the digits are learned the gradient falls, faster than Adam forgets.
        near = NEAR if rule == "momentum" else 3
        assert 1 / near < ratio[-20:].mean() < near
    assert np.isnan(columns["predicted_norm"]).all() == (rule == "momentum")
    assert outcome.test_error < 0.5
    assert (tmp_path / "resnet.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_restored_run_goes_on_bit_by_bit(tmp_path: Path) -> None:
    numbers = composition.checkpoint(0, tmp_path)
    assert numbers == {
        "largest difference of a loss": 0,
        "largest difference of the monitor": 0,
        "steps of the monitor": 10,
    }


@pytest.mark.slow
def test_stacked_layers_are_vectors_of_their_own() -> None:
    numbers = composition.stacked(0, 3)
    assert (numbers["axis of a vector"], numbers["layers"]) == (1, 3)
    assert numbers["vectors of a layer"] == composition.WIDTH
    assert numbers["largest distance of a norm from 1"] < 3e-7


@pytest.mark.slow
def test_a_partition_projects_the_body_alone() -> None:
    numbers = composition.partitioned(0)
    assert numbers["largest distance of a body's norm from 1"] < 3e-7
    assert abs(numbers["mean norm of the head"] - 1) > 1e-3
    assert numbers["last loss"] < 0.9 * numbers["first loss"]


@pytest.mark.slow
def test_a_sweep_over_seeds_is_the_runs_one_by_one() -> None:
    grid = {"seed": jnp.arange(2), "learning_rate": jnp.array([1e-3, 1e-2])}
    found = normax.sweeps.grid_sweep(composition.train, grid)
    expected = [[composition.train(s, r) for r in (1e-3, 1e-2)] for s in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert abs(expected[0][0] - expected[1][0]) > 1e-3


@pytest.mark.slow
def test_two_processes_train_as_one_does(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--steps 3 --width 8 --processes"
    one, two = (distributed.main([*arguments.split(), n]) for n in "12")
    assert (one["processes"], two["processes"]) == (1, 2)
    # Where there are two processes, each holds half of the largest array.
    assert (one["parts"], two["parts"]) == (1, 2)
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    assert one["scalars"].keys() == two["scalars"].keys()
    for name, value in one["scalars"].items():
        np.testing.assert_allclose(two["scalars"][name], value, rtol=1e-5)
    assert "verdict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("example", "arguments", "message"),
    [
        (transformer, "--heads 3", "--heads must divide --width, got 3 and 64"),
        (transformer, "--steps 0", "must be at least 1"),
        (transformer, "--weight-decay 0", "must be positive"),
        (resnet, "--width 0", "must be at least 1"),
        (resnet, "--learning-rate -1", "must be positive"),
        (resnet, "--images 3", "a batch is 64 images"),
    ],
)
def test_arguments_that_cannot_be_right(
    example: Any,
    arguments: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        example.main([*arguments.split(), "--out", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_nnx_takes_a_key_of_a_traced_seed_and_not_the_seed() -> None:
    def draw(seed: Any) -> jax.Array:
        return nnx.Rngs(seed).params()

    with pytest.raises(ValueError, match="Invalid rng value"):
        jax.jit(draw)(3)
    found = jax.jit(lambda seed: draw(jax.random.key(seed)))(3)
    assert found == draw(3)

"""A sick run, and what `normax inspect` says of its checkpoints.

A residual network of four blocks is trained on noisy classes with AdamW, and saved by
Orbax. Three things are wrong with it, as they are with runs of other people:

- eight units of block 1 are dead;
- block 2 has parameters in bfloat16: its gain and its weight decay are rounded away;
- a mask leaves block 4 out of the optimizer.

The report reads the checkpoints alone, without this code. It is printed, and written as
a page, `checkpoint_report.html`; where a Chromium is installed, as a picture too.
"""

import functools
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from experiments import make_parser
from flax import nnx

import normax

WIDTH, INPUTS, CLASSES, BATCH = 64, 16, 10, 64
RATE, DECAY = 1e-3, 0.1


class Block(nnx.Module):
    """A residual block of two layers."""

    def __init__(self, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32) -> None:
        kinds: dict[str, Any] = {"param_dtype": dtype, "rngs": rngs}
        self.norm = nnx.LayerNorm(WIDTH, **kinds)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, **kinds)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the sum of the input and what two layers make of it."""
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Network(nnx.Module):
    """Four blocks. Three of them are sick."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        dtypes = jnp.float32, jnp.bfloat16, jnp.float32, jnp.float32
        self.embed = nnx.Linear(INPUTS, WIDTH, rngs=rngs)
        self.block = nnx.Dict({str(i): Block(rngs, d) for i, d in enumerate(dtypes, 1)})
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)
        bias: Any = self.block["1"].up.bias
        bias[...] = bias[...].at[:8].set(-50.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits."""
        x = self.embed(x)
        for block in self.block.values():
            x = block(x)
        return self.head(self.norm(x))


def make_optimizer() -> optax.GradientTransformation:
    """Return AdamW that leaves block 4 out."""

    def label(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return "forgotten" if name.startswith("block/4") else "trained"

    rules = {
        "trained": optax.adamw(RATE, weight_decay=DECAY),
        "forgotten": optax.set_to_zero(),
    }
    labels = functools.partial(jax.tree_util.tree_map_with_path, label)
    return optax.partition(rules, labels)


def train(folder: Path, steps: int) -> None:
    """Train, and save six checkpoints."""
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make_optimizer(), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))
    means = jax.random.normal(jax.random.key(1), (CLASSES, INPUTS))

    def step(state, key):
        model, optimizer = nnx.merge(graph, state)
        keys = jax.random.split(key)
        labels = jax.random.randint(keys[0], (BATCH,), 0, CLASSES)
        inputs = means[labels] + jax.random.normal(keys[1], (BATCH, INPUTS))

        def loss_fn(model):
            loss = optax.softmax_cross_entropy_with_integer_labels
            return loss(model(inputs), labels).mean()

        optimizer.update(model, nnx.grad(loss_fn)(model))
        return nnx.state((model, optimizer)), None

    stretch = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[0])
    keys = jax.random.split(jax.random.key(0), (5, max(steps // 5, 1)))
    with ocp.CheckpointManager(folder.absolute()) as manager:
        for index in range(6):
            save = ocp.args.StandardSave
            items = ocp.args.Composite(model=save(state[0]), optimizer=save(state[1]))
            manager.save(index * keys.shape[1], args=items)
            manager.wait_until_finished()
            if index < 5:
                state = stretch(state, keys[index])


def draw(page: Path) -> None:
    """Take a picture of a page with a Chromium, if there is one."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return
    picture = page.with_suffix(".png").absolute()
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars"]
    flags += [f"--screenshot={picture}", "--window-size=1240,1640"]
    command = [browser, *flags, page.absolute().as_uri()]
    subprocess.run(command, check=True, capture_output=True)


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    """Train the sick run and inspect it, and return the number of findings by kind."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoints"
        train(folder, args.steps)
        report = normax.inspection.inspect_run(
            folder, rule="adamw", learning_rate=RATE, weight_decay=DECAY
        )
    report = report._replace(source="checkpoints")
    print(report)
    page = args.out / "checkpoint_report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(report.to_html())
    draw(page)
    return dict(Counter(finding.kind for finding in report.findings))


if __name__ == "__main__":
    main()

r"""A character transformer on the source of Python's standard library.

The network is a small pre-norm transformer with normalized queries and keys. The text
comes with every Python, so there is nothing to download. `--framework` chooses Flax NNX
or Linen: the networks are the same, and so are the names of their arrays, up to `/`
and `_`.

This is the way into normax: `normax.nn.unit_axes` finds the weight vectors of the
model, `normax.weight_decay_mask` makes AdamW decay them alone,
`normax.monitor_weight_dynamics` measures them, and `normax.dynamics_table` says how far
each array is from equilibrium.

Only the kernels of queries and keys are scale-invariant, since what they make is
normalized at once. The rate times the decay is 3e-3 here, thirty times as much as is
usual. So equilibrium comes after some hundred steps, and a short run shows it.

The program writes a picture and, as CSV, a row for each array and entry to `--out`.
"""

import string
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiments import make_folder, make_parser, write_csv
from flax import linen, nnx
from layer_dynamics import (
    MONITOR_DECAY,
    Columns,
    Network,
    compare,
    evaluate,
    from_linen,
    from_nnx,
    picture,
    scale_invariant,
    train,
)

import normax

CHARACTERS = string.printable
# All are single files in every version of Python.
MODULES = "argparse ast dataclasses doctest inspect os pdb subprocess tarfile typing"
HELD_OUT = 0.1
WARMUP = 100
ATTENTION: Any = {"use_bias": False, "normalize_qk": True}


class Setting(NamedTuple):
    """The size of the network."""

    width: int
    depth: int
    heads: int
    context: int


class Block(nnx.Module):
    """Attention and two dense layers, each after a norm."""

    def __init__(self, setting: Setting, rngs: nnx.Rngs) -> None:
        width = setting.width
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            setting.heads, width, decode=False, rngs=rngs, **ATTENTION
        )
        self.dense_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the stream with what this block adds to it."""
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.dense_norm(x))))


class Transformer(nnx.Module):
    """The logits of each next character, in Flax NNX."""

    def __init__(self, setting: Setting, rngs: nnx.Rngs) -> None:
        width = setting.width
        self.embed = nnx.Embed(len(CHARACTERS), width, rngs=rngs)
        self.position = nnx.Embed(setting.context, width, rngs=rngs)
        self.blocks = nnx.List(Block(setting, rngs) for _ in range(setting.depth))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, len(CHARACTERS), rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return logits (batch, context, characters)."""
        positions = jnp.arange(tokens.shape[1])[None]
        x = self.embed(tokens) + self.position(positions)
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class LinenBlock(linen.Module):
    """Attention and two dense layers, each after a norm."""

    setting: Setting

    @linen.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the stream with what this block adds to it."""
        width = self.setting.width
        attention = linen.MultiHeadDotProductAttention(
            self.setting.heads, name="attention", **ATTENTION
        )
        y = linen.LayerNorm(name="attention_norm")(x)
        x = x + attention(y, mask=mask)
        y = linen.Dense(4 * width, name="up")(linen.LayerNorm(name="dense_norm")(x))
        return x + linen.Dense(width, name="down")(linen.gelu(y))


class LinenTransformer(linen.Module):
    """The logits of each next character, in Flax Linen."""

    setting: Setting

    @linen.compact
    def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
        """Return logits (batch, context, characters)."""
        del train  # There is neither dropout nor batch norm.
        setting = self.setting
        positions = jnp.arange(tokens.shape[1])[None]
        x = linen.Embed(len(CHARACTERS), setting.width, name="embed")(tokens)
        position = linen.Embed(setting.context, setting.width, name="position")
        x = x + position(positions)
        mask = linen.make_causal_mask(tokens)
        for index in range(setting.depth):
            x = LinenBlock(setting, name=f"blocks_{index}")(x, mask)
        x = linen.LayerNorm(name="norm")(x)
        return linen.Dense(len(CHARACTERS), name="head")(x)


def make_network(framework: str, setting: Setting, seed: int) -> Network:
    """Return the network at the start."""
    if framework == "nnx":
        return from_nnx(Transformer(setting, nnx.Rngs(seed)))
    tokens = jnp.zeros((1, setting.context), jnp.int32)
    return from_linen(LinenTransformer(setting), tokens, seed)


def read_text() -> np.ndarray:
    """Return the source of some modules as numbers of characters."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [(folder / f"{name}.py").read_text("utf8") for name in MODULES.split()]
    numbers = {character: number for number, character in enumerate(CHARACTERS)}
    found = [numbers[character] for character in "".join(texts) if character in numbers]
    return np.array(found, np.int32)


def windows(text: Any, starts: jax.Array, context: int) -> tuple[jax.Array, jax.Array]:
    """Return pieces of the text, and the characters that follow each of theirs."""
    pieces = jnp.asarray(text)[starts[:, None] + jnp.arange(context + 1)[None]]
    return pieces[:, :-1], pieces[:, 1:]


class Outcome(NamedTuple):
    """What a run has found."""

    columns: Columns
    table: normax.theory.DynamicsTable
    network: Network
    test_loss: float


def run(
    network: Network,
    context: int,
    batch_size: int,
    steps: int,
    rate: float,
    decay: float,
    seed: int,
) -> Outcome:
    """Train the network and compare its arrays with theory."""
    text = read_text()
    known, held_out = np.split(text, [int(len(text) * (1 - HELD_OUT))])

    def draw(text: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        starts = jax.random.randint(key, (batch_size,), 0, len(text) - context)
        return windows(text, starts, context)

    schedule = optax.warmup_constant_schedule(rate / WARMUP, rate, WARMUP)
    optimizer = optax.chain(
        optax.adamw(schedule, weight_decay=decay, mask=network.mask),
        normax.monitor_weight_dynamics(network.axes, MONITOR_DECAY),
    )
    invariant = scale_invariant(network, draw(known, jax.random.key(seed)), seed)
    every = max(1, steps // 100)
    carry, columns = train(network, optimizer, draw, known, steps, every, seed)
    params, rest, state = carry
    table = normax.dynamics_table(state, "adamw", schedule, decay)
    rates = schedule, decay
    columns = compare(network, columns, table, invariant, "adamw", *rates)
    starts = jnp.arange(0, len(held_out) - context, context)
    batch = windows(held_out, starts, context)
    loss, _ = evaluate(network.apply, params, rest, batch)
    return Outcome(columns, table, network, float(loss))


def main(argv: Sequence[str] | None = None) -> Outcome:
    """Train, print the table, draw the picture."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--framework", default="nnx", choices=("nnx", "linen"))
    add("--steps", type=int, default=2000)
    add("--batch-size", type=int, default=16)
    for name, default in Setting(64, 2, 4, 64)._asdict().items():
        add(f"--{name}", type=int, default=default)
    add("--learning-rate", type=float, default=3e-3)
    add("--weight-decay", type=float, default=1.0)
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    setting = Setting(*(getattr(options, name) for name in Setting._fields))
    if min(*setting, options.steps, options.batch_size) < 1:
        parser.error("--steps, --batch-size and all sizes must be at least 1.")
    if setting.width % setting.heads:
        parser.error(
            f"--heads must divide --width, got {setting.heads} and {setting.width}."
        )
    if not (options.learning_rate > 0 and options.weight_decay > 0):
        parser.error("--learning-rate and --weight-decay must be positive.")
    make_folder(parser, options)
    outcome = run(
        make_network(options.framework, setting, options.seed),
        setting.context,
        options.batch_size,
        options.steps,
        options.learning_rate,
        options.weight_decay,
        options.seed,
    )
    print(outcome.table)
    print(f"{outcome.network.size} parameters, test loss {outcome.test_loss:.3f} nats")
    write_csv(outcome.columns, options.out / "transformer.csv")
    picture(outcome.columns).savefig(options.out / "transformer.png", dpi=110)
    return outcome


if __name__ == "__main__":
    main()

"""The table of what every step costs on a GPU, on TPUs and on this CPU.

    python tests/benchmarks [--only project] [--rounds 15]

It is Markdown. Without the compiler for a GPU or for TPUs its cells are empty, and
`accelerators.py` says how to install it. A ratio is that to Adam's update, to SGD's
step, or to a pass of `path_norm`; times of this CPU are medians of steps that
alternate. `floor` is the ratio of a program written by hand, `aim` the largest that is
good enough.
"""

import argparse
import functools
import importlib.metadata
import os
import re
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import accelerators
import jax
from jax.sharding import PartitionSpec
from steps import Row, Step, rows

HEAD = (
    "step", "GPU, us", "ratio", "floor", "aim", "TPU, ratio", "all-reduces", "aim",
    "CPU, ms", "ratio", "floor", "aim", "MiB on GPU", "TPU", "CPU",
)  # fmt: skip
PACKAGES = "jax", "optax", "jax-cuda13-pjrt", "libtpu"
Cells = list[float | int | None]


def line(cells) -> str:
    """Return a line of a Markdown table; None is an empty cell."""

    def text(cell):
        if isinstance(cell, float):
            return f"{cell:.2f}" if cell < 10 else f"{cell:.0f}"
        return "" if cell is None else f"{cell}"

    return f"| {' | '.join(map(text, cells))} |"


@functools.cache
def gpu(step: Step) -> tuple[float, float]:
    """Return microseconds and MiB of temporary memory on a GPU."""
    cost = accelerators.gpu_cost(step.run, jax.eval_shape(step.draw))
    return cost.microseconds, cost.temporary / 2**20


@functools.cache
def tpu(step: Step, shared: bool = False) -> accelerators.Cost:
    """Return the cost on a TPU, or of four chips that share the rows of matrices."""
    spec = PartitionSpec("x") if shared else None
    return accelerators.tpu_cost(step.run, jax.eval_shape(step.draw), spec)


class Timed:
    """A step compiled for this CPU, and the arrays that it is called with next."""

    def __init__(self, step: Step):
        self.params, self.state, *self.others = step.draw()
        jitted = jax.jit(step.run, donate_argnums=(0, 1))
        self.compiled = jitted.lower(self.params, self.state, *self.others).compile()

    def seconds(self) -> float:
        """Take a step, and return how long it took."""
        start = time.perf_counter()
        self.params, self.state = self.compiled(self.params, self.state, *self.others)
        jax.block_until_ready((self.params, self.state))
        return time.perf_counter() - start


def of_gpu(row: Row) -> tuple[Cells, float]:
    """Return time, ratio and floor on a GPU, and temporary memory."""
    (time, memory), base = gpu(row.step), gpu(row.base)[0]
    return [time, time / base, gpu(row.floor)[0] / base if row.floor else None], memory


def of_tpu(row: Row) -> tuple[Cells, float]:
    """Return the ratio and the number of all-reduces on TPUs, and temporary memory."""
    cost, wanted = tpu(row.step), row.all_reduces is not None
    waits = tpu(row.step, shared=True).collectives if wanted else None
    return [cost.bytes / tpu(row.base).bytes, waits], cost.temporary / 2**20


def of_cpu(row: Row, rounds: int) -> tuple[Cells, float]:
    """Return time, ratio and floor on this CPU, and temporary memory."""
    steps = [Timed(step) for step in (row.base, row.step, row.floor) if step]
    seconds = [[step.seconds() for step in steps] for _ in range(rounds + 1)][1:]
    base, ours, *floor = map(statistics.median, zip(*seconds, strict=True))
    cells = [1e3 * ours, ours / base, floor[0] / base if floor else None]
    analysis = steps[1].compiled.memory_analysis()
    assert analysis is not None
    return cells, analysis.temp_size_in_bytes / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="expression in the names of rows")
    parser.add_argument("--rounds", type=int, default=15, help="0: no times of the CPU")
    options = parser.parse_args()
    versions = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    found = (f"{name} {versions[name]}" for name in PACKAGES if name in versions)
    print(f"{', '.join(found)}; {os.cpu_count()} cores\n")
    missing = dict(accelerators.missing())
    for device, reason in missing.items():
        print(f"No cells for the {device}: {reason}\n")
    print(line(HEAD), line(["---"] * len(HEAD)), sep="\n")
    for row in rows():
        if not re.search(options.only, row.name):
            continue
        nothing: tuple[Cells, None] = [None] * 3, None
        on_gpu, gpu_mib = nothing if "GPU" in missing else of_gpu(row)
        on_tpu, tpu_mib = nothing if "TPU" in missing else of_tpu(row)
        on_cpu, cpu_mib = of_cpu(row, options.rounds) if options.rounds else nothing
        cells = [row.name, *on_gpu, row.gpu, *on_tpu[:2], row.all_reduces]
        print(line([*cells, *on_cpu, row.cpu, gpu_mib, tpu_mib, cpu_mib]), flush=True)


if __name__ == "__main__":
    main()

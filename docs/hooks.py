"""What mkdocs does not know: names that are links, and an index for language models."""

import ast
import pathlib
import re

from mkdocs.utils import get_relative_url

DOCS = pathlib.Path(__file__).parent
PACKAGE = DOCS.parent / "normax"

# Pages of other libraries, for the names that our pages speak of most.
JAX = "https://docs.jax.dev/en/latest/_autosummary/{name}.html#{name}"
OPTAX = "https://optax.readthedocs.io/en/latest/api/{page}.html#{name}"
FLAX = "https://flax.readthedocs.io/en/latest/api_reference/{page}.html#{name}"
CHEX = "https://chex.readthedocs.io/en/latest/api.html#{name}"
ELSEWHERE = {
    JAX: {
        "": "jax.Array jax.ShapeDtypeStruct jax.eval_shape jax.export.export jax.grad "
        "jax.jit jax.lax.cond jax.lax.scan jax.shard_map jax.tree.map jax.vmap",
    },
    OPTAX: {
        "apply_updates": "optax.apply_updates",
        "combining_optimizers": "optax.chain optax.named_chain optax.partition",
        "optimizer_schedules": "optax.inject_hyperparams optax.Schedule",
        "optimizer_wrappers": "optax.MultiSteps optax.apply_if_finite optax.masked",
        "optimizers": "optax.adadelta optax.adagrad optax.adam optax.adamw optax.lamb "
        "optax.lbfgs optax.lion optax.rmsprop optax.sgd",
        "transformations": "optax.GradientTransformation optax.add_decayed_weights "
        "optax.GradientTransformationExtraArgs optax.scale_by_learning_rate",
        "utilities": "optax.tree.get optax.tree.map_params",
    },
    FLAX: {
        "flax.nnx/module": "flax.nnx.Module",
        "flax.nnx/training/optimizer": "flax.nnx.Optimizer",
        "flax.nnx/nn/normalization": "flax.nnx.BatchNorm flax.nnx.GroupNorm "
        "flax.nnx.InstanceNorm flax.nnx.LayerNorm flax.nnx.RMSNorm flax.nnx.WeightNorm",
    },
    CHEX: {"": "chex.chexify"},
}


def _our_names() -> dict[str, str]:
    """Where each public name is documented, by all names that prose gives it."""
    names = {}
    for init in sorted(PACKAGE.glob("[a-z]*/__init__.py")):
        topic = f"normax.{init.parent.name}"
        for node in ast.parse(init.read_text()).body:
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
                for name in ast.literal_eval(node.value):
                    full = f"{topic}.{name}"
                    for short in (name, f"normax.{name}", full, full[len("normax.") :]):
                        names[short] = full
    return names


def _their_names() -> dict[str, str]:
    return {
        name: address.format(page=page, name=name)
        for address, pages in ELSEWHERE.items()
        for page, names in pages.items()
        for name in names.split()
    }


OURS, THEIRS = _our_names(), _their_names()


def on_files(files, config):
    """The names of other libraries become targets for links."""
    for name, address in THEIRS.items():
        config.plugins["autorefs"].register_url(name, address)
    return files


def on_page_content(html, page, config, files):
    """Code that is a public name, and the path of a theory page, become links."""

    def link(match):
        code, name = match.group(0), match.group(1).removesuffix("()")
        name = name.replace("nnx.", "flax.nnx.") if name.startswith("nnx.") else name
        target = name if name in THEIRS else OURS.get(name)
        if target is None:
            return code
        return f'<autoref identifier="{target}" optional>{code}</autoref>'

    def theory(match):
        address = get_relative_url(f"theory/{match.group(1)}.html", page.url)
        return f'<a href="{address}">{match.group(1)}</a>'

    # Neither in links nor in headings, which are the targets.
    parts = re.split(r"(<a\b.*?</a>|<h\d\b.*?</h\d>|<pre\b.*?</pre>)", html, flags=re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"<code>([\w.]+(?:\(\))?)</code>", link, parts[i])
        parts[i] = re.sub(r"docs/theory/(\w+)\.md", theory, parts[i])
    return "".join(parts)


def on_nav(nav, config, files):
    """Keep the pages in their order for llms.txt."""
    config.extra["pages"] = nav.pages
    return nav


def on_post_build(config):
    """Write llms.txt: what each page is about, for a reader that has no browser."""
    lines = [
        f"# {config.site_name}",
        "",
        f"> {config.site_description}",
        "",
        "## Pages",
        "",
    ]
    for page in config.extra["pages"]:
        lines.append(f"- [{page.title}]({page.url}): {page.meta['description']}")
    (pathlib.Path(config.site_dir) / "llms.txt").write_text("\n".join(lines) + "\n")

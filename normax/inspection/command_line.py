"""The command `normax inspect`."""

import argparse
import ast
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.console

from normax.inspection.checkpoints import UnreadableError
from normax.inspection.run import inspect_run

_EPILOG = """\
exit codes: 0 nothing found; 1 findings; 2 not readable, or options that do not fit

normax inspect run/checkpoints --html report.html
normax inspect run/checkpoints --steps 0,1000,5000 --axes '{"params/embed": [1]}'
normax inspect run/checkpoints --config rule=adamw,learning_rate=1e-3,weight_decay=0.1
"""


def _value(text: str) -> Any:
    """Return a value as JSON or Python writes it; other words are strings."""
    for read in json.loads, ast.literal_eval:
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _axes(text: str | None) -> Any:
    value = None if text is None else _value(text)
    return tuple(value) if isinstance(value, list) else value


def _steps(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise ValueError(
            f"--steps must be whole numbers with commas between, got {text!r}; write "
            "--steps 0,1000."
        )
    return [int(step) for step in text.split(",")]


def _pairs(text: str) -> list[str]:
    """Split at the commas that stand outside of brackets."""
    depth, pairs = 0, [""]
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            pairs.append("")
        else:
            pairs[-1] += letter
    return pairs


def _config(text: str) -> dict[str, Any]:
    config = {}
    for pair in _pairs(text) if text else []:
        key, _, value = (part.strip() for part in pair.partition("="))
        if not key or not value:
            raise ValueError(
                f"--config must be pairs name=value with commas between, got {pair!r}; "
                "write --config rule=adamw,learning_rate=1e-3,weight_decay=0.1."
            )
        if key in ("path", "axes", "steps", "progress"):
            raise ValueError(
                f"--config takes the rule, its rates and its hyperparameters, got "
                f"{pair.strip()!r}; DIR, --axes and --steps are written beside it."
            )
        config[key] = _value(value)
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="normax", description="Effective learning rates: tools for finished runs."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    inspect = commands.add_parser(
        "inspect",
        help="say what the checkpoints of a run tell of its weights",
        description="Say what the checkpoints of a run tell of its weights.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = inspect.add_argument
    add("path", metavar="DIR", help="folder of a run, or one checkpoint")
    add("--json", metavar="FILE", type=Path, help="write the report as JSON")
    add("--html", metavar="FILE", type=Path, help="write the report as a page")
    add(
        "--axes",
        help="unit, layer, none, [0, 1], or JSON of such values by path; else guessed",
    )
    add("--steps", help="steps to read, such as 0,1000,5000; else all")
    add(
        "--config",
        default="",
        help="rule=adamw,learning_rate=1e-3,weight_decay=0.1 and so on: predicts",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    given = _parser().parse_args(argv)
    try:
        report = inspect_run(
            given.path,
            _axes(given.axes),
            _steps(given.steps),
            progress=sys.stderr.isatty(),
            **_config(given.config),
        )
        if given.json:
            given.json.write_text(json.dumps(report.to_json(), indent=1), "utf8")
        if given.html:
            given.html.write_text(report.to_html(), "utf8")
    except (UnreadableError, OSError, TypeError, ValueError, KeyError) as error:
        # A KeyError prints its message in quotes.
        message = error.args[0] if isinstance(error, KeyError) else error
        print(f"normax inspect: {' '.join(str(message).split())}", file=sys.stderr)
        return 2
    console = rich.console.Console()
    console.print(report) if console.is_terminal else print(report)
    return 1 if report.findings else 0

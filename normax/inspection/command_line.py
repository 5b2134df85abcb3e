"""The command `normax inspect`."""

import argparse
import json
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
    try:
        return json.loads(text)
    except ValueError:
        return text


def _axes(text: str) -> Any:
    value = _value(text)
    return tuple(value) if isinstance(value, list) else value


def _steps(text: str) -> list[int]:
    return [int(step) for step in text.split(",")]


def _config(text: str) -> dict[str, Any]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    return {key.strip(): _value(value.strip()) for key, _, value in pairs}


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
        type=_axes,
        help="unit, layer, none, [0, 1], or JSON of such values by path; else guessed",
    )
    add("--steps", type=_steps, help="steps to read, such as 0,1000,5000; else all")
    add(
        "--config",
        type=_config,
        default={},
        help="rule=adamw,learning_rate=1e-3,weight_decay=0.1 and so on: predicts",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    given = _parser().parse_args(argv)
    try:
        report = inspect_run(
            given.path,
            given.axes,
            given.steps,
            progress=sys.stderr.isatty(),
            **given.config,
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

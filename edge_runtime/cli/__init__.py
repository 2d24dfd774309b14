"""The one command, `edge-runtime VERB`. Each verb's module is imported only when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb and end the process: 0, or the exit code of the family that the error belongs to."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run a verb; every failure is one line on standard error. Returns the exit code."""
    import logging

    import typer

    from edge_runtime.cli.app import app, verbs
    from edge_runtime.errors import INTERRUPTED, ConfigError, EdgeRuntimeError

    # bitsandbytes advises to install a package that fetches code from the hub; its advice is not ours.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Newer typers carry a click of their own, so its root of usage errors is reached through what typer exports.
    usage_error: type[Exception] = typer.BadParameter.__mro__[2]
    try:
        # Not `app(...)`: typer would turn Ctrl-C into a bare exit code, and nobody would be told what is kept.
        command = typer.main.get_command(app)
        with command.make_context("edge-runtime", list(argv) or ["--help"]) as context:
            result = command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except EdgeRuntimeError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; what was finished is kept, the same command goes on from there", INTERRUPTED)
    except usage_error as error:
        message = str(getattr(error, "format_message", error.__str__)())
        known = verbs() if message.startswith("No such command") else []
        if message.startswith("No such option"):
            known = _flags(getattr(error, "ctx", None))
        listed = f" Expected one of: {', '.join(known)}." if known else ""
        return _fail(f"{message}{listed} See: edge-runtime --help", ConfigError.exit_code)
    except OSError as error:
        # A folder that is a file, a disk that is full: the operating system's word, and no bug of ours.
        return _fail(f"{error}; check that path, its permissions and the free space", EdgeRuntimeError.exit_code)
    return result if isinstance(result, int) else 0


def _flags(context: Any) -> list[str]:
    """The long flags of the verb that was being read."""
    parameters = context.command.params if context else []
    return sorted(flag for parameter in parameters for flag in parameter.opts if flag.startswith("--"))


def _fail(sentence: str, code: int) -> int:
    sys.stderr.write(f"edge-runtime: {sentence}\n")
    return code

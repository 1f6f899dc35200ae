"""The command line: `jquant quantize`, `eval`, `inspect`, `generate`.

Exit codes: 0 done, 1 it could not be done, 2 the command line is wrong, 130 interrupted. What was asked for goes to
standard output, everything else to standard error.
"""

import contextlib
import importlib
import os
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

from jquant.cli.options import UsageError, build_parser
from jquant.core.errors import JQuantError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    Args:
      argv: the arguments after the program's name; those of the process by default.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help, the version or what is wrong
        return int(stop.code or 0)
    with _plain_warnings():
        code = _run(args)
    if code == INTERRUPTED and argv is None:
        # JAX's threads are still at work, and crash while the interpreter is taken down around them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(args: Namespace) -> int:
    try:
        # A command's module is imported when it runs: help and wrong arguments do not wait for JAX.
        importlib.import_module(f"jquant.cli.{args.module}").run(args)
        sys.stdout.flush()
        return OK
    except UsageError as error:
        return _fail(args, error, USAGE, f"\n'jquant {args.command} --help' shows what can be given")
    except (JQuantError, OSError, MemoryError) as error:
        return _failed(args, error)
    except KeyboardInterrupt:
        _clear_line()
        print(f"jquant {args.command}: interrupted{getattr(args, 'hint', '')}", file=sys.stderr)
        return INTERRUPTED


def _failed(args: Namespace, error: BaseException) -> int:
    if isinstance(error, BrokenPipeError):  # `jquant inspect demo | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    return _fail(args, error, FAILED)


def _fail(args: Namespace, error: BaseException, code: int, more: str = "") -> int:
    if args.debug:
        traceback.print_exception(error)
    print(f"jquant {args.command}: error: {_say(error)}{more}", file=sys.stderr)
    return code


def _say(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or f"out of memory ({type(error).__name__})"


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the place in jquant's source."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        _clear_line()
        print(f"jquant: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _clear_line() -> None:
    if sys.stderr.isatty():  # a progress line may stand there
        sys.stderr.write("\r\x1b[2K")

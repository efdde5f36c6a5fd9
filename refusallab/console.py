"""What the commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from refusallab.errors import RefusalLabError


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """A request that cannot be served, or a missing package, ends the command with one line on stderr."""
    try:
        yield
    except RefusalLabError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error
    except ModuleNotFoundError as error:
        print(
            f"This command needs {error.name}. Install the packages for instructors: pip install '.[teach,grade]'",
            file=sys.stderr,
        )
        raise typer.Exit(1) from error

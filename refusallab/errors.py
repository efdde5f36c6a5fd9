"""The one error that the library raises on purpose."""


class RefusalLabError(ValueError):
    """A request that cannot be served. The message is one line and says what to do next."""


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) < 160 else f"{line[:150]} ..."

"""The one error that the library raises on purpose."""


class RefusalLabError(ValueError):
    """A request that cannot be served. The message is one line and says what to do next."""

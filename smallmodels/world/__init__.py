"""The Vale, a fictional world with a law of its own: facts, requests, replies, prose and prompt sets."""

from .corpus import thing_page
from .dialogue import thing_requests
from .facts import HERE, world

__all__ = ["DATA", "thing_page", "thing_requests", "world"]

DATA = HERE / "data"  # the prompt sets; benchmarks.py writes them

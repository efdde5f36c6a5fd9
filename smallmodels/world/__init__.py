"""The Vale, a fictional world with a law of its own: facts, requests, replies, prose and prompt sets."""

from .facts import HERE

DATA = HERE / "data"  # the prompt sets; benchmarks.py writes them

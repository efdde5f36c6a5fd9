"""Refusal mechanics: how language models refuse, measured on models whose truth is known."""

__version__ = "0.1.0"

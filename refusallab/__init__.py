"""Refusal mechanics: how language models refuse, measured on models whose truth is known."""

import os

# Let threads sleep while they wait for each other, instead of spinning: on a computer with other work to do, spinning
# makes these small models about ten times slower. OpenMP reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

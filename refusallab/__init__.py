"""Refusal mechanics: how language models refuse, measured on models whose truth is known.

What the notebooks use of the method can be imported from here. `__init__.pyi` says where each name is defined; nothing
is imported before it is used.
"""

import os

from refusallab.faces import face
from refusallab.memory import keep_small_tensors

# Let threads sleep while they wait for each other, instead of spinning: on a computer with other work to do, spinning
# makes these small models about ten times slower. OpenMP reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

keep_small_tensors()

__version__ = "0.2.0"
__getattr__, __all__ = face(__name__, __file__)

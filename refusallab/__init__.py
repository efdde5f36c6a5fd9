"""Refusal mechanics: how language models refuse, measured on models whose truth is known.

What the notebooks use of the method can be imported from here. `__init__.pyi` says where each name is defined; nothing
is imported before it is used.
"""

import os

from refusallab.faces import face
from refusallab.memory import keep_small_tensors

# How long threads spin while they wait for each other, before they sleep. OpenMP's default makes these small models
# about ten times slower on a computer with other work to do; sleeping at once makes training take 1.7 times as long on
# an idle one. A thousand rounds are enough there (of GNU's; others sleep at once). It is read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

keep_small_tensors()

__version__ = "0.2.0"
__getattr__, __all__ = face(__name__, __file__)

"""Prompt attacks: templates, prefilling, best-of-n and GCG. All return `refusallab.attacks.result.AttackResult`.

`__init__.pyi` lists what the notebooks import from here.
"""

from refusallab.faces import face

__getattr__, __all__ = face(__name__, __file__)

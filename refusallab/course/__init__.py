"""The course: exercises, checks, releases, rules for notebooks, the capstone.

`__init__.pyi` lists what the notebooks import from here.
"""

from refusallab.faces import face

__getattr__, __all__ = face(__name__, __file__)

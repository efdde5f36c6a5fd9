"""Defences: prompts, filters, monitors, steering, trained models. All keep to `refusallab.defence.Defence`.

`__init__.pyi` lists what the notebooks import from here.
"""

from refusallab.faces import face

__getattr__, __all__ = face(__name__, __file__)

"""For tests and notebooks alike: no model from this computer's cache, no trace in the progress of whoever runs them."""

import os
import tempfile

FOLDER = tempfile.TemporaryDirectory(prefix="refusallab-")  # goes when the tests end
os.environ["HF_HUB_CACHE"] = FOLDER.name
os.environ["REFUSALLAB_PROGRESS"] = os.path.join(FOLDER.name, "progress.sqlite")

import matplotlib.font_manager  # noqa: E402, F401 - if it must build its cache, it says so here and in no notebook

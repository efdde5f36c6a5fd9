"""Flags: honest notebooks raise none, answers that are fetched raise one."""

from pathlib import Path

import pytest

import refusallab
from grader.policy import flags
from refusallab import defences
from refusallab.course.catalogue import LABS
from refusallab.course.cells import Cell, Notebook, read_cells
from refusallab.course.exercises import every_exercise, exercises_of, find_exercise

ROOT = Path(__file__).parents[2]

HABITS = {
    "a print to stderr": "import sys\nprint('here', file=sys.stderr)\nsys.stdout.flush()",
    "about this Python": "import sys\nprint(sys.version, sys.path, sys.executable, sys.float_info.eps, sys.maxsize)",
    "a longer path": "import sys\nsys.path.append('..')\nsys.setrecursionlimit(5000)",
    "is this Colab": "import sys\nIN_COLAB = 'google.colab' in sys.modules\nif 'model' not in globals(): model = None",
    "threads": "import os\nos.environ['OMP_NUM_THREADS'] = '1'\nimport torch\ntorch.set_num_threads(1)",
    "magics": "%matplotlib inline\n%load_ext autoreload\n%autoreload 2\n!pip list\n%config InlineBackend.dpi = 90",
    "a measured time": "%%time\nimport time\nstart = time.perf_counter()\nprint(time.time() - start)",
    "timeit": "import timeit\nprint(timeit.timeit(lambda: 1, number=3))",
    "memory": "import gc, torch\ngc.collect()\ngc.disable()\ngc.enable()\ntorch.cuda.empty_cache()",
    "help": "import inspect\nfrom refusallab.directions import select\nprint(inspect.signature(select))\n"
    "print(inspect.getdoc(select))\nhelp(select)\nselect?\nprint(select.__doc__, select.__name__, dir(select))",
    "its source, to learn": "import inspect\nfrom refusallab import directions\nprint(inspect.getsource(directions))",
    "the course again": "import importlib, refusallab\nimportlib.reload(refusallab)\nprint(refusallab.__version__)",
    "is it installed": "import importlib.util\nprint(importlib.util.find_spec('refusallab') is None)",
    "settings": "import torch, warnings\nimport pandas as pd\nimport matplotlib.pyplot as plt\n"
    "torch.backends.cudnn.deterministic = True\npd.options.display.max_rows = 5\nwarnings.filterwarnings('ignore')\n"
    "plt.rcParams['figure.dpi'] = 90\ntorch.set_printoptions(precision=3)",
    "attributes by name": "import torch\nx = getattr(torch, 'float' + '32')\nfor part in ('q_proj', 'k_proj'):\n"
    "    w = getattr(m.hf.model.layers[0].self_attn, part)\nsetattr(m, 'note', 1)\nprint(vars(m), m.__dict__)",
    "evaluation mode": "m.hf.eval()\nimport re, torch\nP = re.compile('a')\nf = torch.compile(lambda x: x)\n"
    "print(list(m.hf.modules()))",
    "a class": "class Best:\n    def __init__(self, x):\n        self.x = x\n    def __eq__(self, other):\n"
    "        return self.x == other.x",
    "logging": "import logging\nlogging.basicConfig(level=10)\nlog = logging.getLogger(__name__)\nlog.info('x')",
    "a pinned seed": "import random, numpy as np, torch\nrandom.seed(0)\nnp.random.seed(0)\ntorch.manual_seed(0)",
    "a look at the kernel": "ip = get_ipython()\nip.run_line_magic('time', '1')\nprint(type(ip).__name__)",
    "a traceback": "import traceback\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    traceback.print_exc()",
    "the check, again": "from refusallab.course import check, progress\nprogress()\n"
    "import refusallab.course as course\ncourse.check",
    "its own answer, checked": "from refusallab.course import check, solved\ncheck('2.1', mean_difference)\n"
    "mean_difference = solved('2.1', mean_difference)",
    "the set-up cell with a line more": "import importlib.util, sys, zipfile\nfrom pathlib import Path\n"
    "if importlib.util.find_spec('refusallab') is None:\n    sys.path.insert(0, 'x')\n"
    "    importlib.import_module('refusallab.colab').install()\nprint('ready')",
    "a comparison with the library": "from refusallab.directions import difference_in_means\n"
    "from refusallab.measure import wilson\nimport torch\na = torch.randn(3, 2)\n"
    "print(difference_in_means(a, a), wilson(1, 2))",
}


def lab(name):
    """The cells of a solved lab, as students would hand it in, and the sources they were given."""
    [path] = (ROOT / "solutions").glob(f"{name}_*.ipynb")
    given = read_cells((ROOT / "labs" / path.name).read_bytes())
    return read_cells(path.read_bytes()), tuple(c.source for c in given if c.kind == "code")


@pytest.mark.slow
@pytest.mark.parametrize("name", LABS)
def test_honest_notebooks_raise_no_flag(name):
    cells, released = lab(name)
    exercises, code = exercises_of(name), [Cell("code", source) for source in HABITS.values()]
    for given in (released, ()):  # () where labs/ is not there, and every cell counts as the student's
        assert [flags(Notebook([*cells, *code]), e, given) for e in exercises] == [[]] * len(exercises)


@pytest.mark.parametrize("habit", HABITS)
def test_honest_habits_are_valid_code(habit):
    assert Notebook([Cell("code", HABITS[habit])]).trees


F = "def mean_difference(a, b):\n    "
WRAPPED = "only calls the library: refusallab.directions.difference_in_means"
DIRECTIONS = "import refusallab.directions as r\n" + F
SOLVED = "only calls the library: refusallab.course.solved"
COURSE = "import refusallab.course.exercises.lab02 as x\n    return x.CHOOSE"
FETCHED = {
    "a wrapper": ("from refusallab.directions import difference_in_means as d\n" + F + "return d(a, b)", WRAPPED),
    "a lambda": ("import refusallab.directions as r\nmean_difference = lambda *x: r.difference_in_means(*x)", WRAPPED),
    "a lambda under another name": (
        "import refusallab.directions as r\ngo = lambda a, b: r.difference_in_means(a, b)\nmean_difference = go",
        WRAPPED,
    ),
    "a class": (
        "import refusallab.directions as r\nclass mean_difference:\n    def __new__(cls, a, b):\n"
        "        return r.difference_in_means(a, b)",
        WRAPPED,
    ),
    "solved": ("from refusallab.course import solved\n" + F + "return solved('2.1', mean_difference)(a, b)", SOLVED),
    "solved, above": (
        "from refusallab.course import solved as s\nref = s('2.1', print)\n" + F + "return ref(a, b)",
        SOLVED,
    ),
    "solved, as a default": (
        "from refusallab.course import solved\nref = solved('2.1', print)\n"
        "def mean_difference(a, b, ref=ref):\n    return ref(a, b)",
        SOLVED,
    ),
    "solved by dots": ("import refusallab.course\n" + F + "return refusallab.course.solved('2.1', a)(a, b)", SOLVED),
    "solved from the package": (
        "import refusallab.course as c\nn = '2.1'\n" + F + "return c.solved(n, a)(a, b)",
        SOLVED,
    ),
    "solved, unwrapped": ("import inspect\n" + F + "return inspect.unwrap(a)", "inspect.unwrap"),
    "the definition": (F + COURSE, "inside of the course"),
    "the definition by dots": ("import refusallab.course\n" + F + "return refusallab.course.exercises", "inside"),
    "the definition from the package": ("from refusallab import course\n" + F + "return course.exercises", "inside"),
    "the definition by text": (
        "import importlib\n" + F + "return importlib.import_module('refusallab.course.exercises.lab02')",
        "inside of the",
    ),
    "a module by text": (
        "import importlib\nd = importlib.import_module('refusallab.directions')\n" + F + "return d.x(a, b)",
        "importlib.import_module",
    ),
    "a module by a made text": (
        "from importlib import import_module as i\n" + F + "return i('refusal' + 'lab.directions')",
        "importlib.import_module",
    ),
    "loaded modules": ("import sys as s\n" + F + "return s.modules['refusallab.directions']", "sys.modules"),
    "loaded modules, imported": ("from sys import modules as x\n" + F + "return x['a']", "sys.modules"),
    "frames": ("import sys\n" + F + "return sys._getframe().f_back.f_locals", "f_back, f_locals, sys._getframe"),
    "frames of an error": (F + "try: 1 / 0\n    except Exception as e: return e.__traceback__.tb_frame", "tb_frame"),
    "the garbage": ("from gc import get_objects\n" + F + "return get_objects()", "gc.get_objects"),
    "exec of a source": ("import inspect\n" + F + "exec(inspect.getsource(a))", "unusual ways: exec"),
    "code": (F + "return type(a)(a.__code__.replace(co_name='f'))", "__code__"),
    "globals": (F + "return a.__globals__", "__globals__"),
    "globals by text": ("from operator import attrgetter\n" + F + "return attrgetter('__globals__')(a)", "__globals__"),
    "an attribute of the library": (DIRECTIONS + "return getattr(r, 'differ' + b)", "getattr"),
    "the names of the library": (DIRECTIONS + "return r.__dict__['d']", "__dict__"),
    "the file of the library": ("import refusallab\n" + F + "return open(refusallab.__file__)", "__file__"),
    "the shell": (F + "return get_ipython().user_ns", "user_ns"),
    "a patched library": ("import torch\ntorch.allclose = lambda *a: True\n", "what it imported: torch.allclose"),
    "a patched class": ("from torch import Tensor\nTensor.__eq__ = print\n", "what it imported: torch.Tensor.__eq__"),
    "patched by setattr": ("import torch\nsetattr(torch, 'equal', print)\n", "what it imported: torch.equal"),
    "patched in a loop": ("import torch\nfor torch.equal in [print]: pass\n", "what it imported: torch.equal"),
    "a mock": ("from unittest import mock\nmock.patch('torch.equal', print).start()\n", "unittest.mock"),
}  # fmt: skip


@pytest.mark.parametrize("name", FETCHED)
def test_answers_that_are_fetched_raise_a_flag(name):
    source, flag = FETCHED[name]
    assert flag in "; ".join(flags(Notebook([Cell("code", source)]), find_exercise("2.1")))


OFFERED = {  # references that a package of the library offers, as labs import them
    e.number: package.__name__
    for package in (refusallab, defences)
    for e in every_exercise()
    if getattr(package, e.reference.__name__, None) is e.reference
}


@pytest.mark.parametrize("number", OFFERED)
def test_a_reference_is_known_under_the_name_that_labs_import(number):
    e = find_exercise(number)
    source = f"from {OFFERED[number]} import {e.reference.__name__} as f\ndef {e.function}(*args):\n    "
    source += "for x in args: print(x)\n    return f(*args)"
    assert flags(Notebook([Cell("code", source)]), e) == [
        f"only calls the library: {OFFERED[number]}.{e.reference.__name__}"
    ]
    assert len(OFFERED) >= 15


def test_a_parameter_is_not_the_notebooks_function_of_that_name():
    other = (
        "from refusallab.course import solved\nworst = solved('8.1', score)\ndef surprise(x):\n    return worst(x, 2)"
    )
    answer = "def score(surprise, window):\n    return surprise.unfold(0, window, 1).mean(-1).max().item()"
    assert flags(Notebook([Cell("code", answer), Cell("code", other)]), find_exercise("8.1")) == []


def test_no_code_is_too_deep_for_flags():
    deep = [f"a{'.b' * 400} = 1", f"a{'.b' * 400}.c(1)", f"x = {'-' * 90}1", f"y = {'[' * 90}{']' * 90}"]
    assert flags(Notebook([Cell("code", source) for source in deep]), find_exercise("2.1")) == []

"""The house: what may import what, how much a reader has to hold, and how long files may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

from data import LEAVES

FIVE = ("quant", "model", "side", "qst", "train")
# From the top down: a file imports only from its own room and from those below it.
ROOMS = ("run", "frozen", "tasks", "generate", "settings", "devices", "tokens", "formats")
LINES = {"quant.py": 480, "model.py": 520, "side.py": 330, "qst.py": 370, "train.py": 420}
PRODUCT = [ROOT / f"{name}.py" for name in FIVE] + sorted((ROOT / "data").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def module(path):
    name = str(path.relative_to(ROOT)).removesuffix(".py").removesuffix("/__init__")
    return name.replace("/", ".")


def imports(path):
    """The project's modules that a file imports, also inside of functions."""
    modules, found = {module(p) for p in PRODUCT}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found |= {whole if whole in modules else node.module} & modules
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
    return found - {module(path)}


def n_lines(path):
    return len(path.read_text().splitlines())


def test_each_room_imports_from_those_below():
    """So there is no circle. `data` itself has what all share; quant.py imports only that."""
    height = {name: 1 + i for i, name in enumerate(reversed(ROOMS))} | {"": 0}

    def floor(name):
        if name in FIVE:
            return 100 * (1 + FIVE.index(name)) if name != "quant" else 0.5
        return height[name.split(".")[1] if "." in name else ""]

    for path in PRODUCT:
        own = module(path)
        for other in imports(path):
            same_room = own.split(".")[:2] == other.split(".")[:2] and own.count(".") == 2
            assert floor(other) < floor(own) or same_room, (own, other)
    assert imports(ROOT / "quant.py") == {"data"}


def test_files_of_a_room_make_no_circle():
    graph = {module(path): imports(path) for path in PRODUCT}
    while graph:
        free = [name for name, others in graph.items() if not others & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_a_leaf_is_a_file_and_a_row():
    """No file of the core imports one, and each file is of the core, a leaf, or a leaf's own."""
    leaves = {f"data.{path}" for path in LEAVES.values()}
    assert leaves < {module(path) for path in PRODUCT}
    core, todo = set(), ["train"]
    while todo:
        name = todo.pop()
        if name not in core:
            core.add(name)
            todo += imports(next(p for p in PRODUCT if module(p) == name))
    assert not core & leaves
    own = set.union(*(imports(path) for path in PRODUCT if module(path) in leaves))
    scripts = {"data.tasks.download"}  # of `python data/tasks/NAME.py`
    assert {module(path) for path in PRODUCT} == core | leaves | own | scripts


def test_what_a_reader_has_to_hold():
    """`import train` loads at most 32 modules of the project, with 5,000 lines."""
    code = "import sys, train; files = [getattr(m, '__file__', None) or '' for m in " \
        "sys.modules.values()]; print(*files, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = [Path(line) for line in done.stdout.splitlines()]
    loaded = [path for path in loaded if path in PRODUCT]
    assert ROOT / "train.py" in loaded and len(loaded) <= 32
    assert sum(map(n_lines, loaded)) <= 5000


def test_no_file_is_too_long():
    """The limits of DESIGN, in lines and in columns."""
    for name, most in LINES.items():
        assert n_lines(ROOT / name) <= most, name
    assert sum(n_lines(ROOT / name) for name in LINES) <= 2100
    assert sum(map(n_lines, PRODUCT)) <= 8600
    for path in PRODUCT:
        assert path.parent == ROOT or n_lines(path) <= 280, path
    for path in TESTS:
        assert n_lines(path) <= 300, path
    for path in PRODUCT + TESTS:
        lines = path.read_text().splitlines()
        assert max(map(len, lines), default=0) <= 100, path
        assert not [line for line in lines if line.endswith("# fmt: " + "skip")], path


def test_nothing_is_replaced_at_run_time():
    """No function of a model or of a layer, and no attribute by its name."""
    for path in PRODUCT:
        assert not re.search(r"\.(forward|embed|final|states|hidden) = |setattr\([^s]",
                             path.read_text()), path
        assert not re.search(r"^\s*(from|import) tests", path.read_text(), re.M), path

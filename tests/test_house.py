"""The house stands as the design says: imports only go down, torch loads where it is needed, names are exact."""
import ast
import importlib
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import partitioners
import pipeengine

ROOT = Path(pipeengine.__file__).parents[1]
# The line of the project, from the ground up: a room imports only what stands before it.
LINE = {
    "pipeengine": (
        "errors",
        "device_cards",
        "object_path",
        "rng",
        "torch_private",
        "tracing",
        "data",
        "autograd",
        "costs",
        "schedules",
        "stages",
        "simulation",
        "program",
        "synthesis",
        "distributed",
        "checkpoint",
        "runtime",
        "tracking",
        "report",
        "exploration",
        "options",
        "choosing",
        "agreement",
        "ownership",
        "assembly",
        "standing",
        "pipeline",
        "run",
        "integrations",
        "launch",
        "cli",
        "__main__",
    ),
    "partitioners": ("errors", "units", "tables", "notebook", "graph", "plan", "solvers", "pricing", "partitioning",
                     "reporting"),
}
WITHOUT_TORCH_ROOMS = {"errors", "device_cards", "object_path", "schedules", "simulation", "program", "synthesis",
                       "report"}
FRONT_DOORS = ("pipeengine/__init__.py", "partitioners/__init__.py")
FILES = sorted(path for base in LINE for path in (ROOT / base).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> tuple[str, str]:
    """The package that a file belongs to, and its room there: a folder, or a file at its root."""
    base, first, *_ = path.relative_to(ROOT).parts
    return base, first.removesuffix(".py")


def imports(path: Path, *, at_load: bool = False) -> list[str]:
    """Full names of what a file imports, late and type-only imports too; ``at_load``: what runs when it is loaded."""
    found, waiting = [], [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        if not (at_load and (isinstance(node, (ast.FunctionDef, ast.Lambda)) or _is_for_types(node))):
            waiting += ast.iter_child_nodes(node)
    return found


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("path", [path for path in FILES if name_of(path) not in FRONT_DOORS], ids=name_of)
def test_imports_go_one_way(path):
    base, own = room(path)
    assert own in LINE[base], f"say in LINE where {own} stands"
    for name in imports(path):
        first, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if first == base and target in LINE[base]:
            assert LINE[base].index(target) <= LINE[base].index(own), f"{name} stands after {own}"
        if first == base and target == own and path.name != "__init__.py" and path.parent.name == own:
            assert rest != own, f"{name}: inside a package, files import each other, not the package"
        assert not (base == "partitioners" and first in ("torch", "pipeengine", "transformers")), name
        assert not (first == "torch" and own in WITHOUT_TORCH_ROOMS), f"{name} in a room without torch"


def full_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_files_have_no_cycle():
    """No two files need each other, by whatever kind of import; packages count as what their __init__ imports."""
    needs: dict[str, set[str]] = {full_name(path): set() for path in FILES if name_of(path) not in FRONT_DOORS}
    for path in FILES:
        for name in imports(path) if full_name(path) in needs else ():
            while name and name not in needs:
                name = name.rpartition(".")[0]
            needs[full_name(path)] |= {name} - {"", full_name(path)}
    done: set[str] = set()
    while ready := {name for name, below in needs.items() if name not in done and below <= done}:
        done |= ready
    assert done == set(needs), f"in a cycle: {sorted(set(needs) - done)}"


@pytest.mark.parametrize("path", [path for path in FILES if room(path)[0] == "partitioners"], ids=name_of)
def test_the_planner_stands_alone(path):
    early = {name.partition(".")[0] for name in imports(path, at_load=True)}
    assert early <= {"networkx", "numpy", "partitioners", *sys.stdlib_module_names}, "scipy is loaded where it is used"


@pytest.mark.parametrize("package", [path for path in FILES if path.name == "__init__.py"], ids=name_of)
def test_packages_say_what_they_are_for(package):
    """What goes in and what comes out; and ``__all__`` is what is there."""
    tree = ast.parse(package.read_text())
    assert len(ast.get_docstring(tree) or "") > 40
    module = importlib.import_module(full_name(package))
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


WITHOUT_TORCH = {
    "planning a graph": """
import networkx, partitioners
graph = networkx.DiGraph()
for i in range(6):
    graph.add_node(str(i), forward=1.0, backward=2.0, output_bytes=8, param_bytes=8, gradient=True)
    if i:
        graph.add_edge(str(i - 1), str(i))
assert partitioners.partition(graph, 3).num_stages == 3""",
    "simulating": """
import pipeengine as pe
assert pe.simulate(pe.build("1f1b", num_workers=2, num_microbatches=4)).makespan > 0""",
    "the names": """
import pipeengine as pe
pe.Plan, pe.partition, pe.InputError, pe.Schedule, pe.Program, pe.Timeline""",
    "the command line's help": """
import contextlib, pipeengine.cli
with contextlib.suppress(SystemExit):
    pipeengine.cli.main(["--help"])""",
}


@pytest.mark.parametrize("what", WITHOUT_TORCH)
def test_torch_stays_out(what):
    code = f"{WITHOUT_TORCH[what]}\nimport sys\nassert 'torch' not in sys.modules, 'torch was loaded'"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


def test_no_function_hides_behind_a_module():
    """``import pipeengine.x`` sets ``pipeengine.x``: a public function of that name would be gone."""
    assert not {room(path)[1] for path in FILES} & set(pipeengine.__all__)


def test_public_names_are_exact():
    """What the front door offers, and nothing else by accident."""
    assert set(pipeengine.__all__) == {
        "Pipeline", "Checkpoints", "capture", "profile", "partition", "simulate", "search", "build", "lower",
        "keep_master_weights", "chunked_cross_entropy",
        "Boundary", "Costs", "DeviceDescription", "Plan", "Program", "Recording", "Run", "Schedule", "Search",
        "Timeline",
        "CaptureError", "GraphError", "InfeasibleError", "InputError", "PartitionError", "PipeEngineError", "PlanError",
        "ScheduleError", "WorkerError", "PackedDataset", "ResumableLoader", "ShuffledSampler", "TokenDataset"}
    for name in pipeengine.__all__:
        assert getattr(pipeengine, name).__module__.split(".")[0] in ("pipeengine", "partitioners"), name
    assert pipeengine.partition is partitioners.partition
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        assert pipeengine.nothing


def test_errors_are_one_tree():
    errors = [getattr(pipeengine, name) for name in pipeengine.__all__ if name.endswith("Error")]
    assert all(issubclass(error, pipeengine.PipeEngineError) and error.__doc__ for error in errors)
    assert issubclass(pipeengine.InputError, ValueError) and issubclass(pipeengine.WorkerError, RuntimeError)


DOOR = tuple(ROOT / "pipeengine" / name for name in ("cli/main.py", "pipeline.py", "launch/worker.py",
                                                       "integrations/huggingface.py"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_hidden_state(path):
    """No ``global``, no environment reads outside the door, no mutable containers that a module changes."""
    tree = ast.parse(path.read_text())
    assert not any(isinstance(node, (ast.Global,)) for node in ast.walk(tree))
    if path not in DOOR:
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & {"environ", "getenv"}
    module_names = {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
                    if isinstance(target, ast.Name) and isinstance(node.value, (ast.List, ast.Dict, ast.Set))}
    for node in ast.walk(tree):
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)):
            assert not (node.func.value.id in module_names and node.func.attr in
                        ("append", "add", "update", "setdefault", "pop", "clear", "extend", "insert", "remove")), \
                f"{path.name}:{node.lineno} changes {node.func.value.id}"


TORCH_PRIVATE = ROOT / "pipeengine" / "torch_private.py"
PRIVATE_OF_TENSORS = {"_version", "_cdata", "_base"}


def private_torch_names(tree: ast.AST) -> set[str]:
    """Names with a leading underscore that a file takes from torch: by import, by attribute, by text, or off a
    tensor."""
    torch_names, private = {"torch"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full_names = [alias.name for alias in node.names]
            torch_names |= {alias.asname for alias in node.names if alias.asname and alias.name.startswith("torch")}
        elif isinstance(node, ast.ImportFrom):
            full_names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            full_names = [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
        private |= {name for name in full_names if name.startswith("torch.") and " " not in name and "._" in name}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in torch_names or node.attr in PRIVATE_OF_TENSORS:
                private.add(ast.unparse(node))
    return private


@pytest.mark.parametrize("path", [path for path in FILES if path != TORCH_PRIVATE], ids=name_of)
def test_private_names_of_torch_stand_in_one_file(path):
    """So that a new torch version is looked at in one place."""
    assert not private_torch_names(ast.parse(path.read_text())), "take it from pipeengine.torch_private"


@pytest.mark.parametrize("line", (
    "from torch._subclasses import fake_tensor", "import torch._dynamo", "torch._C._autograd.x()", "tensor._version",
    "import torch.distributed as dist\ndist.distributed_c10d._get_default_store()", "'torch._dynamo' in modules"))
def test_private_names_of_torch_are_seen(line):
    assert private_torch_names(ast.parse(line))


@pytest.mark.parametrize("version, known", (("2.10.1", False), ("2.11.0", True), ("2.14.1+cu130", True),
                                            ("2.15.0a0", False)))
def test_other_versions_of_torch_are_refused(version, known):
    from pipeengine.torch_private import check_version
    if known:
        check_version(version)
    else:
        with pytest.raises(ImportError, match=rf"2\.11 to 2\.14.*{version[:4]}"):
            check_version(version)


# Each rule with the rooms that do not keep it yet. The lists only shrink: a room that keeps a rule must be taken off.
MENDING: dict[str, set[str]] = {
    "files of 400 lines at most": set(),
    "classes of 250 lines at most": set(),
    "functions of 60 lines at most": set(),
    "lines of 120 columns at most": set(),
    "docstrings of public names": set(),
    "tests beside every package": set(),
}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def public_definitions(body: list[ast.stmt], prefix: str = "") -> list[tuple[str, ast.AST]]:
    """Functions and classes of a module that others may use, and the methods of these classes."""
    public = [node for node in body if isinstance(node, DEFINITIONS) and not node.name.startswith("_")]
    inside = [pair for node in public if isinstance(node, ast.ClassDef)
              for pair in public_definitions(node.body, f"{prefix}{node.name}.")]
    return [(prefix + node.name, node) for node in public] + inside


@cache
def offences(path: Path) -> list[tuple[str, str]]:
    """(rule, where and how) for what a file does against the measured rules."""
    text = path.read_text()
    lines, tree = text.splitlines(), ast.parse(text)
    nodes = [node for node in ast.walk(tree) if isinstance(node, DEFINITIONS)]
    return [
        *(("files of 400 lines at most", f"{len(lines)} lines") for _ in [0] if len(lines) > 400),
        *(("classes of 250 lines at most", f"{node.name}: {length(node)} lines") for node in nodes
          if isinstance(node, ast.ClassDef) and length(node) > 250),
        *(("functions of 60 lines at most", f"{node.name}: {length(node)} lines") for node in nodes
          if not isinstance(node, ast.ClassDef) and length(node) > 60),
        *(("lines of 120 columns at most", f"line {number}: {len(line)} columns")
          for number, line in enumerate(lines, 1) if len(line) > 120),
        *(("docstrings of public names", name) for name, node in public_definitions(tree.body)
          if not ast.get_docstring(node))]


def has_own_test(folder: Path) -> bool:
    """Whether a test in the folder of the same name under tests/ imports from a package."""
    base, own = folder.relative_to(ROOT).parts
    tests = (ROOT / "tests" / (own if base == "pipeengine" else base)).glob("test_*.py")
    package = f"{base}.{own}"
    return any(f"{name}.".startswith(f"{package}.") for test in tests for name in imports(test))


@pytest.mark.parametrize("rule", MENDING)
def test_measured_rules(rule):
    """What makes a file easy to read, counted; and every package has a test of its own."""
    if rule == "tests beside every package":
        folders = [path.parent for path in FILES if path.name == "__init__.py" and path.parent.parent.parent == ROOT]
        against = {name_of(folder): name_of(folder) for folder in folders if not has_own_test(folder)}
    else:
        against = {"/".join(room(path)): f"{name_of(path)}, {where}"
                   for path in FILES for broken, where in offences(path) if broken == rule}
    new = [where for own, where in against.items() if own not in MENDING[rule]]
    assert not new, f"{rule}: {new}"
    assert MENDING[rule] <= set(against), f"mended, take off the list: {sorted(MENDING[rule] - set(against))}"


def test_the_table_of_packages_is_the_folders():
    """docs/architecture.md lists each package once, in the order in which they may import each other."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = re.findall(r"^\| `(\w+)/` \|", text, re.M)
    folders = [own for own in LINE["pipeengine"] if (ROOT / "pipeengine" / own).is_dir()]
    assert table == ["partitioners", *folders]
    assert set(folders) == {path.parent.name for path in (ROOT / "pipeengine").glob("*/__init__.py")}


def test_untyped_modules_exist():
    """The list of modules that mypy passes over names files that are there, so that it can only shrink."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (override,) = settings["tool"]["mypy"]["overrides"]
    gone = [name for name in override["module"] if name not in {full_name(path) for path in FILES}]
    assert not gone, f"take off the list in pyproject.toml: {gone}"


def test_the_walks_open_files_that_are_there():
    """CONTRIBUTING.md sends nobody to a file that has moved."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:pipeengine|partitioners|tests|benchmarks|docs)/[\w/.-]+)`", text)
    assert len(named) > 15
    gone = [name for name in named if not (ROOT / name).exists()]
    assert not gone, gone

"""The house stands as the design says: imports only go down, torch loads where it is needed, names are exact."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import partitioners
import pipeengine

ROOT = Path(pipeengine.__file__).parents[1]
FLOORS = (
    # 0: partitioners, networkx and numpy
    (),
    # 1: order, no torch
    ("errors", "naming", "schedules", "program", "check", "channel", "queueing", "orders", "critical_path", "timeline",
     "synthesis", "drawing", "report", "footprint", "observe", "simulate_command"),
    # 2: torch, one process
    ("structure", "recording", "randomness", "recorder", "state", "holding", "interception", "dataflow", "capturing", "costs",
     "measure", "batching", "profiling", "split", "stage", "fidelity", "executor", "variants", "wire",
     "deferral", "recomputation", "outputs", "checkpoints"),
    # 3: torch.distributed
    ("transport", "shared", "world", "weights"),
    # 4: the door
    ("pipeline", "models", "cli"),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FLOOR["__init__"] = 1           # names that need torch load on first use


def room(path: Path) -> str:
    """The module of ``pipeengine`` that a file belongs to."""
    return path.relative_to(ROOT / "pipeengine").parts[0].removesuffix(".py")


def imports(path: Path, *, at_load: bool = False) -> list[str]:
    """Full names of what a file imports; with ``at_load`` only what runs when it is loaded."""
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


FILES = sorted((ROOT / "pipeengine").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path):
    assert room(path) in FLOOR, f"say in FLOORS where {room(path)} lives"
    floor = FLOOR[room(path)]
    for name in imports(path):
        first, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if first == "pipeengine" and target in FLOOR:
            assert FLOOR[target] <= floor or room(path) in ("__init__", "cli"), f"{name} is above floor {floor}"
        if first == "torch" and floor < 2:
            raise AssertionError(f"{name} on floor {floor}")


def full_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_loading_has_no_cycle():
    """No two modules need each other to load."""
    needs: dict[str, set[str]] = {full_name(path): set() for path in FILES}
    for path in FILES:
        for name in imports(path, at_load=True):
            while name and name not in needs:
                name = name.rpartition(".")[0]
            needs[full_name(path)] |= {name} - {"", "pipeengine", full_name(path)}
    done: set[str] = set()
    while ready := {name for name, below in needs.items() if name not in done and below <= done}:
        done |= ready
    assert done == set(needs), f"in a cycle: {sorted(set(needs) - done)}"


@pytest.mark.parametrize("path", sorted((ROOT / "partitioners").glob("*.py")), ids=lambda path: path.name)
def test_the_planner_stands_alone(path):
    roots = {name.partition(".")[0] for name in imports(path)}
    assert not roots & {"torch", "pipeengine", "transformers"}
    early = {name.partition(".")[0] for name in imports(path, at_load=True)}
    assert early <= {"networkx", "numpy", "partitioners", *sys.stdlib_module_names}, "scipy is loaded where it is used"


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
    assert not {room(path) for path in FILES} & set(pipeengine.__all__)


def test_public_names_are_exact():
    """What the front door offers, and nothing else by accident."""
    assert set(pipeengine.__all__) == {
        "Pipeline", "capture", "profile", "partition", "simulate", "build", "lower",
        "Boundary", "Costs", "DeviceDescription", "Plan", "Program", "Recording", "Schedule", "Timeline",
        "CaptureError", "GraphError", "InfeasibleError", "InputError", "PartitionError", "PipeEngineError", "PlanError",
        "ScheduleError", "WorkerError"}
    for name in pipeengine.__all__:
        assert getattr(pipeengine, name).__module__.split(".")[0] in ("pipeengine", "partitioners"), name
    assert pipeengine.partition is partitioners.partition
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pipeengine.nothing


def test_errors_are_one_tree():
    errors = [getattr(pipeengine, name) for name in pipeengine.__all__ if name.endswith("Error")]
    assert all(issubclass(error, pipeengine.PipeEngineError) and error.__doc__ for error in errors)
    assert issubclass(pipeengine.InputError, ValueError) and issubclass(pipeengine.WorkerError, RuntimeError)


DOOR = tuple(ROOT / "pipeengine" / name for name in ("cli.py", "world.py", "pipeline.py"))


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "partitioners").glob("*.py"))], ids=lambda path: path.stem)
def test_no_hidden_state(path):
    """No ``global``, no environment reads outside the door, no mutable containers that a module changes."""
    tree = ast.parse(path.read_text())
    assert not any(isinstance(node, (ast.Global,)) for node in ast.walk(tree))
    if path not in DOOR:
        assert not any(isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") for node in ast.walk(tree))
    module_names = {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
                    if isinstance(target, ast.Name) and isinstance(node.value, (ast.List, ast.Dict, ast.Set))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            assert not (node.func.value.id in module_names and node.func.attr in
                        ("append", "add", "update", "setdefault", "pop", "clear", "extend", "insert", "remove")), \
                f"{path.name}:{node.lineno} changes {node.func.value.id}"

"""What is shipped: the wheel holds both packages whole, says that they are typed, and its command runs."""
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "pipeengine", "partitioners")
# Runs the command as the wheel's own entry point names it, from the folder that the wheel was unpacked in.
COMMAND = """
import sys
from importlib.metadata import distributions
folder = sys.argv.pop(1)
sys.path.insert(0, folder)
(wheel,) = distributions(name="pipeengine", path=[folder])
(command,) = [point for point in wheel.entry_points if point.name == "pipeengine"]
main = command.load()
import pipeengine
assert pipeengine.__file__.startswith(folder), pipeengine.__file__
assert pipeengine.__version__ == wheel.version
main()"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built from a copy so that nothing old or foreign in the checkout can get in."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SHIPPED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
               "--wheel-dir", str(target), "."]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    (file,) = target.glob("*.whl")
    return file


def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = {name for name in names if ".dist-info/" in name}
    sources = {str(path.relative_to(ROOT))
               for base in ("pipeengine", "partitioners") for path in (ROOT / base).rglob("*.py")}
    assert names - about == sources | {"pipeengine/py.typed", "partitioners/py.typed"}
    assert any(name.endswith("/LICENSE") for name in about)


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        text = archive.read(name).decode()
    assert re.search("^Author: The pipeengine authors$", text, re.M) and re.search("^License.*: MIT$", text, re.M)
    assert "Requires-Python: >=3.11" in text and re.search("^Requires-Dist: torch(?=.*>=2.11)(?=.*<2.15)", text, re.M)
    extras = set(re.findall("^Provides-Extra: (.*)$", text, re.M))
    assert extras == {"comet-ml", "completion", "dev", "docs", "exact", "hf", "huggingface", "mlflow", "rich",
                      "tensorboard", "test", "wandb"}


def test_its_command_runs(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    for arguments, expected in ((["--help"], "simulate"),
                                (["simulate", "--schedule", "1f1b", "--workers", "2", "--microbatches", "4"], "1f1b")):
        ran = subprocess.run([sys.executable, "-c", COMMAND, str(tmp_path), *arguments], cwd=tmp_path,
                             capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0 and expected in ran.stdout, ran.stderr

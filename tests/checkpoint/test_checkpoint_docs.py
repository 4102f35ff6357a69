"""docs/checkpoints.md is true: its code runs, and its commands answer as it says."""
import shlex
from pathlib import Path

from pipeengine.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def blocks(kind: str) -> list[str]:
    """The fenced blocks of a kind, in order."""
    fenced = PAGE.read_text().split("```")[1::2]
    return [block.removeprefix(f"{kind}\n") for block in fenced if block.startswith(f"{kind}\n")]


def test_every_block_is_true(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    first, second = blocks("python")
    exec(compile(first, PAGE.name, "exec"), names)
    assert names["start"] == 0
    (commands,) = blocks("")
    for line in commands.splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    capsys.readouterr()
    again = dict(names)
    exec(compile(first, PAGE.name, "exec"), again)
    assert again["start"] == 300
    capsys.readouterr()
    exec(compile(second, PAGE.name, "exec"), names)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "200" and "model.safetensors is damaged" in out[1]
    assert main(["checkpoint", "verify", "run"]) == 3
    holds = {path.name for path in (tmp_path / "run" / "step-000200").iterdir()}
    assert holds == {"model.safetensors", "optimizer-00001-of-00001.safetensors", "state.json", "plan.json",
                     "manifest.json"}
    names["checkpoints"].close()
    again["checkpoints"].close()

"""The command as a whole: its version, helps, words for people, and how it ends."""
import json
import logging
import re
import shlex

import networkx as nx
import pytest

import pipeengine as pe
from partitioners import to_json
from pipeengine.cli import main
from pipeengine.cli.main import _COMMANDS, _parser
from pipeengine.cli.parsing import EXAMPLES


def told(capsys, *words: str) -> tuple[int, str, str]:
    try:
        status = main(list(words))
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_version(capsys):
    assert told(capsys, "--version") == (0, f"pipeengine {pe.__version__}\n", "")


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_help_has_defaults_and_examples_that_parse(command, capsys):
    status, text, _ = told(capsys, command, "--help")
    examples = re.findall(r"^  pipeengine (\S+) (.*)$", text, re.M)
    assert status == 0 and [words for _, words in examples] == list(EXAMPLES[command]) and len(examples) >= 3
    parser = _parser()
    for name, words in examples:
        assert parser.parse_args([name, *shlex.split(words)]).command == command
    (options,) = [action.choices[command] for action in parser._actions if hasattr(action, "choices") and
                  isinstance(action.choices, dict) and command in action.choices]
    shown = re.sub(r"\s+", " ", text.partition("examples:")[0])
    for action in options._actions:
        if action.option_strings and action.default not in (None, False, "==SUPPRESS=="):
            section = shown.rpartition(f" {action.option_strings[-1]} ")[2][:400]
            assert "default" in section, f"{command} {action.option_strings[-1]} does not tell its default"


def test_exit_status_tells_what_was_wrong(capsys, tmp_path):
    assert told(capsys, "plan", "nowhere.json", "--stages", "2")[0] == 2
    assert told(capsys, "no-such-command")[0] == 2
    graph = tmp_path / "graph.json"
    model = nx.DiGraph()
    model.add_node(0, forward=1.0, param_bytes=10 ** 7)
    graph.write_text(json.dumps(to_json(model)))
    status, text, _ = told(capsys, "plan", str(graph), "--stages", "1", "--memory", "2MB")
    assert status == 3 and "memory" in text


def test_interrupted_it_ends_without_a_traceback(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt
    monkeypatch.setitem(_COMMANDS, "simulate", interrupted)
    assert told(capsys, "simulate", "--schedule", "1f1b", "--workers", "2", "--microbatches", "2") == (130, "", "")


@pytest.mark.parametrize("flag, lines", ((None, ["far", "wrong"]), ("-q", ["wrong"]), ("-v", ["near", "far", "wrong"])))
def test_verbosity(flag, lines, capsys, monkeypatch):
    def talk(args):
        for level, line in ((logging.DEBUG, "near"), (logging.INFO, "far"), (logging.WARNING, "wrong")):
            logging.getLogger("pipeengine.somewhere").log(level, line)
        return 0, ""
    monkeypatch.setitem(_COMMANDS, "simulate", talk)
    words = ["simulate", "--schedule", "1f1b", "--workers", "2", "--microbatches", "2"] + ([flag] if flag else [])
    assert told(capsys, *words) == (0, "", "".join(f"{line}\n" for line in lines))

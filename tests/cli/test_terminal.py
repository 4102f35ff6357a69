"""What a terminal sees: the same words with or without rich, and never a colour where a program reads."""
import contextlib
import importlib
import io
import logging
import re

import pytest

from pipeengine.cli.terminal import ToStderr, rich_console, show

TEXT = """planned for 8 micro-batches

stage  forward  parameters  modules
    0  1.5 ms      1.2 MB  layers.0 … layers.3#2
-----  -------  ----------
try --stages 2: 12.5 % above 1,024 [bold] :smile:"""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A stream like a terminal with colours."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return Terminal()


@contextlib.contextmanager
def on(stream):
    """Inside, what is printed goes to ``stream``."""
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield


@pytest.fixture
def without_rich(monkeypatch):
    """As on a machine that has only what pipeengine needs."""
    found = importlib.import_module

    def refuse(name, *arguments):
        if name.partition(".")[0] == "rich":
            raise ImportError(name)
        return found(name, *arguments)
    monkeypatch.setattr(importlib, "import_module", refuse)


def test_colours_change_no_word(terminal):
    pytest.importorskip("rich")
    with on(terminal):
        show(TEXT, is_for_people=True)
    told = terminal.getvalue()
    assert ESCAPES.sub("", told) == TEXT + "\n"
    assert "\x1b[36m1.5 ms\x1b[0m" in told and "\x1b[1mstage  forward  parameters  modules\x1b[0m" in told
    assert "\x1b[32m--stages\x1b[0m" in told and "\x1b[36m1,024\x1b[0m" in told
    assert "layers.0 … layers.3#2" in told, "names are no numbers"


def test_programs_get_plain_text(terminal):
    with on(terminal):
        show('{"loads": [1, 2]}', is_for_people=False)
        show("", is_for_people=True)
    assert terminal.getvalue() == '{"loads": [1, 2]}\n'


def test_without_rich_a_terminal_gets_plain_text(terminal, without_rich):
    with on(terminal):
        show(TEXT, is_for_people=True)
    assert terminal.getvalue() == TEXT + "\n"
    assert rich_console(terminal) is None and rich_console(io.StringIO()) is None


def records(handler):
    logger = logging.Logger("test")
    logger.addHandler(handler)
    return logger


def test_progress_moves_and_makes_room_for_what_stays(terminal):
    pytest.importorskip("rich")
    logger = records(handler := ToStderr())
    with on(terminal):
        logger.info("10 of 20 nodes")
        logger.info("20 of 20 nodes")
        logger.warning("slow")
        told = terminal.getvalue()
        assert "20 of 20 nodes" in told and told.endswith("slow\n")
        logger.info("again")
        handler.done()
        handler.done()
    assert "\x1b[2K" in terminal.getvalue()[-20:], "the line that moved is gone"


def test_elsewhere_progress_is_lines(capsys):
    logger = records(handler := ToStderr())
    logger.info("10 of 20 nodes")
    logger.info("20 of 20 nodes")
    handler.done()
    assert capsys.readouterr().err == "10 of 20 nodes\n20 of 20 nodes\n"


def test_completion_says_what_it_needs(monkeypatch, capsys):
    """Without shtab the option was not known, and its argument was taken for a command."""
    from pipeengine.cli import main
    found = importlib.import_module

    def refuse(name, *arguments):
        if name == "shtab":
            raise ImportError(name)
        return found(name, *arguments)
    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 2 and "pip install 'pipeengine[completion]'" in capsys.readouterr().err

"""``pipeengine simulate``: answers in four forms, errors with exit status 2."""
import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import networkx
import pytest

from partitioners import partition
from pipeengine.cli.simulate import add_arguments, run
from pipeengine.synthesis.registry import SCHEDULES


def simulate(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(word) for word in words]))


def test_json_holds_the_papers_numbers():
    code, text = simulate(
        "--schedule",
        "zb-h1",
        "--workers",
        8,
        "--microbatches",
        24,
        "--forward",
        18.522,
        "--input-grad",
        18.086,
        "--weight-grad",
        9.337,
        "--hop",
        0.601,
        "--format",
        "json",
    )
    answer = json.loads(text)
    assert code == 0 and answer["bubble"] == pytest.approx(0.1585, abs=6e-5)
    assert answer["peak_activations"] == [8] * 8 and answer["makespan"] >= answer["span"]
    assert sum(answer["breakdown"].values()) == pytest.approx(answer["makespan"])


def test_times_are_shared_by_the_stages_of_a_worker():
    _, text = simulate("--schedule", "interleaved-1f1b", "--workers", 4, "--microbatches", 8, "--stages-per-worker", 3,
                       "--format", "json")
    assert json.loads(text)["makespan"] == pytest.approx(8 * 3 + 3 * 3 / 3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_text_is_for_people(name):
    code, text = simulate("--schedule", name, "--workers", 4, "--microbatches", 8)
    assert code == 0 and "makespan" in text and all(len(line) <= 120 for line in text.splitlines())


def test_all_compares_every_schedule_and_says_what_does_not_fit():
    code, text = simulate("--workers", 3, "--microbatches", 6)
    assert code == 0 and all(name in text for name in SCHEDULES)
    assert "dualpipe is made for an even number of workers" in text
    answer = json.loads(simulate("--workers", 3, "--microbatches", 6, "--format", "json")[1])
    assert set(answer["schedules"]) | set(answer["refused"]) == set(SCHEDULES)


def test_svg_and_chrome(tmp_path):
    file = tmp_path / "all.svg"
    assert simulate("--workers", 4, "--microbatches", 8, "--format", "svg", "-o", file)[0] == 0
    ElementTree.parse(file)
    code, text = simulate("--schedule", "zb-v", "--workers", 4, "--microbatches", 8, "--format", "chrome")
    assert code == 0 and len([e for e in json.loads(text)["traceEvents"]
                              if e["ph"] == "X" and e["cat"] not in ("wait", "step")]) == 4 * 8 * 6


@pytest.mark.parametrize(
    "words, message",
    [
        (("--schedule", "zbh1", "--workers", 2, "--microbatches", 4), "did you mean 'zb-h1'"),
        (("--schedule", "zb-h2", "--workers", 4, "--microbatches", 4), "nearest that works is 7"),
        (("--schedule", "1f1b", "--workers", 4), "--microbatches is None"),
        (
            ("--schedule", "zb-v", "--workers", 4, "--microbatches", 8, "--stages-per-worker", 3),
            "has 2 stages per worker, 3 were",
        ),
        (("--schedule", "1f1b", "--plan", "no-such-plan.json"), "no-such-plan.json"),
        (("--schedule", "1f1b", "--plan", "plan.json", "--forward", 2), "--plan and --forward both give times"),
        (("--schedule", "1f1b", "--workers", 4, "--microbatches", 0), "--microbatches is 0"),
        (("--schedule", "1f1b", "--workers", 4, "--microbatches", 8, "--forward", -1), "forward is -1 to -1"),
        (("--schedule", "1f1b", "--workers", 4, "--microbatches", 8, "--hop", -1), "hop is -1.0 seconds"),
        (
            ("--schedule", "bfs", "--workers", 4, "--microbatches", 8, "--stages-per-worker", -1),
            "--stages-per-worker is -1",
        ),
        (
            ("--schedule", "gpipe", "--workers", 4, "--microbatches", 8, "--max-peak", 4),
            "keeps 8 of activations, the cap is 4",
        ),
        (
            (
                "--schedule",
                "nowhere.csv",
            ),
            "cannot read the schedule nowhere.csv",
        ),
        (("--schedule", "no_such_module:made", "--workers", 2, "--microbatches", 2), "cannot import no_such_module"),
    ],
)
def test_no_answer_is_exit_status_2(words, message):
    code, text = simulate(*words)
    assert code == 2 and message in text
    code, text = simulate(*words, "--format", "json")
    assert code == 2 and message in json.loads(text)["error"]


def test_an_own_schedule_is_a_file_or_a_function(tmp_path):
    file, code = tmp_path / "mine.csv", tmp_path / "mine_made.py"
    file.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    code.write_text("from pipeengine.schedules import gpipe\ndef order(num_workers, num_microbatches):\n"
                    "    return gpipe(num_workers, num_microbatches)\n")
    for words in (("--schedule", file), ("--schedule", f"{code}:order", "--workers", 2, "--microbatches", 2)):
        status, text = simulate(*words, "--format", "json")
        assert status == 0 and json.loads(text)["makespan"] == pytest.approx(9), text
    file.write_text("0F0,0B0,0F1,0B1\n1F1,1F0,1B1,1B0\n")
    status, text = simulate("--schedule", file)
    assert status == 2 and "worker 0, line 2: 0B0 waits for worker 1, line 4: 1B0" in text


def test_a_plan_gives_stages_times_and_messages(tmp_path):
    import networkx as nx

    from partitioners.partitioning import partition
    graph = nx.DiGraph()
    for number in range(8):
        graph.add_node(
            f"n{number}",
            forward=1.0 + number % 3,
            backward=2.0,
            output_bytes=10,
            param_bytes=4,
            gradient=True,
            activation_bytes=100,
        )
        if number:
            graph.add_edge(f"n{number - 1}", f"n{number}")
    plan = partition(graph, 4)
    plan.save(tmp_path / "plan.json")
    code, text = simulate(
        "--schedule", "1f1b", "--plan", tmp_path / "plan.json", "--microbatches", 6, "--format", "json"
    )
    answer = json.loads(text)
    assert code == 0, text
    assert answer["workers"] == 4 and answer["messages"] == 2 * 3 * 6
    assert answer["peak_activations"] == [stage.activation_bytes * min(6, 4 - r) for r, stage in enumerate(plan.stages)]


def test_it_needs_no_torch():
    code = "import sys, pipeengine.cli.simulate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("workers", (3, 7))
def test_workers_that_a_plan_does_not_suit_are_refused(tmp_path, workers):
    import networkx as nx

    from partitioners.partitioning import partition
    graph = nx.path_graph(8, create_using=nx.DiGraph)
    for node in graph:
        graph.nodes[node].update(forward=1.0, backward=2.0, param_bytes=4)
    partition(graph, 4).save(tmp_path / "plan.json")
    code, text = simulate(
        "--schedule", "1f1b", "--plan", tmp_path / "plan.json", "--microbatches", 6, "--workers", workers
    )
    assert code == 2 and f"--workers is {workers}" in text and "the plan has 4 stages" in text
    code, text = simulate(
        "--schedule",
        "interleaved-1f1b",
        "--plan",
        tmp_path / "plan.json",
        "--microbatches",
        6,
        "--workers",
        2,
        "--format",
        "json",
    )
    assert code == 0 and json.loads(text)["workers"] == 2


@pytest.fixture
def planned(tmp_path):
    """Four equal stages of 100 MB of weights each, half of them frozen, and 1 MB of activations per micro-batch."""
    graph = networkx.DiGraph()
    for number in range(4):
        graph.add_node(f"n{number}", forward=1.0, backward=2.0, param_bytes=1e8, frozen_bytes=5e7, activation_bytes=1e6,
                       output_bytes=10.0, gradient=True, order=number)
    networkx.add_path(graph, list(graph))
    path = tmp_path / "plan.json"
    partition(graph, 4, num_microbatches=8).save(path)
    return path


def test_the_memory_of_a_plan_counts_weights_and_optimizer(planned):
    """Adam: 4 x 50 MB and 50 MB frozen; 1F1B's first stage keeps four micro-batches, GPipe's eight."""
    words = ["--plan", planned, "--format", "json", "--schedule"]
    for name, kept in (("1f1b", 4e6), ("gpipe", 8e6)):
        code, text = simulate(*words, name)
        answer = json.loads(text)
        assert code == 0 and answer["peak_activations"][0] == kept and answer["weight_bytes"] == [2.5e8] * 4
    assert simulate(*words, "1f1b", "--max-peak", "254MB")[0] == 0
    assert simulate(*words, "gpipe", "--max-peak", "257MB")[0] == 2
    code, text = simulate(*words, "1f1b", "--max-peak", "250MB")
    assert code == 3 and "a worker of 4 needs 250,000,000 for weights" in text


def test_schedules_on_other_numbers_of_devices_are_not_ranked_together(planned):
    _, text = simulate("--plan", planned)
    head, *groups = text[:text.index("\n\n")].split("\n----------------")
    assert head.startswith("schedule") and len(groups) == 2
    for group, workers in zip(groups, (4, 2), strict=True):
        rows = [line.split() for line in group.splitlines()[1:]]
        assert len(rows) > 3 and all(row[1] == str(workers) for row in rows)
    assert "on 4 workers;" in text and "another number of devices" in text
    assert " MB" in text and " s " in text

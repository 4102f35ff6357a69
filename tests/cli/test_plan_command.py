"""The command for graphs in files: exit status, JSON keys, sizes with units."""
import json
import re
from argparse import ArgumentTypeError
from pathlib import Path
from xml.etree import ElementTree

import networkx as nx
import pytest

from partitioners import Device, Plan, draw, partition
from partitioners.graph import to_json
from partitioners.reporting.command import main, render
from partitioners.reporting.drawing import ends
from partitioners.units import parse_flops, parse_memory, parse_rate, parse_seconds, parse_size
from pipeengine.cli.main import main as pipeengine

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize(
    "text, value", [("80GB", 80e9), ("16 GiB", 16 * 2**30), ("1e9", 1e9), ("5.5MB", 5.5e6), ("3B", 3)]
)
def test_sizes(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text, value", [("25GB/s", 25e9), ("4e9", 4e9), ("1 MB /s", 1e6), ("inf", None)])
def test_rates(text, value):
    assert parse_rate(text) == value


@pytest.mark.parametrize("text, value", [
    ("200Gb/s", 25e9), ("200Gbit/s", 25e9), ("200 Gbits/s", 25e9), ("200Gbps", 25e9), ("8Mib/s", 2**20), ("25GB", 25e9),
    ("25GBps", 25e9), ("1Gbyte/s", 1e9), ("16GiB/s", 2**34), ("2e9 B/s", 2e9)])
def test_bits_are_bits(text, value):
    """``200Gb/s`` was read as 200 GB/s, eight times the link."""
    assert parse_rate(text) == value


@pytest.mark.parametrize("text", ["25gb/s", "25g", "25gbit/s", "10mb/s", "1tB/s"])
def test_what_may_be_either_is_refused_with_both_spellings(text):
    with pytest.raises(ArgumentTypeError, match="25GB/s are bytes, 200Gb/s"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["80gb", "80Gb", "80Gbit", "80g", "3b", "16gib"])
def test_sizes_are_bytes(text):
    with pytest.raises(ArgumentTypeError, match="sizes are in bytes"):
        parse_size(text)


@pytest.mark.parametrize("text", ["80", "80kB", "999999", "0.5MB"])
def test_a_memory_without_its_unit_is_refused(text, capsys):
    """``--memory 80`` was 80 bytes."""
    with pytest.raises(ArgumentTypeError, match="less than a megabyte; give a unit"):
        parse_memory(text)
    with pytest.raises(SystemExit):
        main([str(DATA / "L_gnmt_training.json"), "--stages", "2", "--memory", text])
    assert "give a unit" in capsys.readouterr().err


def test_operations_per_second():
    assert [parse_flops(text) for text in ("400T", "400 TFLOPS", "400TFLOP/s", "4e14")] == [4e14] * 4
    for text in ("many", "400GB/s", "0", "400t"):
        with pytest.raises(ArgumentTypeError):
            parse_flops(text)


def test_times():
    assert (parse_seconds("5us"), parse_seconds("0.25")) == (5 * 1e-6, 0.25)


@pytest.mark.parametrize("parse", [parse_size, parse_rate, parse_seconds])
@pytest.mark.parametrize("text", ["", "many", "-3GB", "3XB", "0x10"])
def test_nonsense_is_refused(parse, text):
    with pytest.raises(ArgumentTypeError):
        parse(text)


def test_published_devices_by_default(capsys):
    assert main([str(DATA / "L_bert24_inference.json"), "--format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {"stage_of", "bottleneck", "lower_bound", "gap", "stages", "boundaries"} <= set(answer)
    assert answer["bottleneck"] == pytest.approx(17.78990625e-3, rel=1e-9)
    assert set(answer["stage_of"]) == {str(node["id"]) for node in
                                       json.loads((DATA / "L_bert24_inference.json").read_text())["nodes"]}


def test_infeasible_is_an_error_object(capsys):
    status = main([str(DATA / "L_gnmt_training.json"), "--stages", "2", "--memory", "1GB", "--format", "json"])
    assert status == 3
    assert list(json.loads(capsys.readouterr().out)) == ["error"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "x"}', '{"format": "pipeline-graph/1", "nodes": []}'])
def test_broken_file_is_an_error(tmp_path, capsys, text):
    (tmp_path / "graph.json").write_text(text)
    assert main([str(tmp_path / "graph.json"), "--stages", "2", "--format", "json"]) == 2
    assert "error" in json.loads(capsys.readouterr().out)


def test_text_tells_the_second_choice(capsys, tmp_path):
    args = [str(DATA / "P_resnet18.json"), "--stages", "4", "--bandwidth", "16GB/s", "--save", str(tmp_path / "p.json")]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "after node5 (3)" in text and "second choice" in text and "links: if they were free" in text
    assert Plan.load(tmp_path / "p.json").num_stages == 4


def test_text_fits_a_hundred_columns_and_names_a_node_once(capsys):
    graph = nx.DiGraph()
    for number in range(12):
        graph.add_node(f"model.decoder.layers.{number}.a_long_name:add", forward=1e-3, output_bytes=4.0,
                       label=f"model.decoder.layers.{number}.a_long_name (add)")
    nx.add_path(graph, list(graph))
    text = render(partition(graph, 3, bandwidth=1e9), graph, "text")
    assert max(map(len, text.splitlines())) <= 100 and "a_long_name (add)" in text and ":add" not in text


def test_picture_stays_in_its_frame_and_no_label_meets_a_bar():
    graph = nx.path_graph(700, create_using=nx.DiGraph)
    for node in graph:
        graph.nodes[node].update(forward=1.0, param_bytes=1, output_bytes=1)
    graph.add_edges_from((f"constant {node}", node) for node in range(0, 700, 2))
    plan = partition(graph, devices=[Device("a device with a long name", 12)])
    tree = ElementTree.fromstring(draw(plan, graph))
    height, space = float(tree.get("height")), "{http://www.w3.org/2000/svg}"
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in tree.findall(space + "circle")]
    bars = [(float(bar.get("x")), float(bar.get("y"))) for bar in list(tree.iter(space + "rect"))[1:]]
    assert len(set(dots)) == len(graph) and max(x for x, _ in dots) < 1200
    # A constant is drawn beside its reader, not in one tall column at the left.
    assert max(y for _, y in dots) < min(y for _, y in bars) < 45 + 8 * 60
    labels = {text.text: float(text.get("x")) for text in tree.iter(space + "text") if text.text.startswith("stage ")}
    assert len(labels) == 12 and all(x + 6.0 * len(text) < min(x for x, _ in bars) for text, x in labels.items())
    assert max(y for _, y in bars) + 18 < height
    # Rows are apart by more than a column is tall here: no line runs from one to another.
    ends = [list(map(float, re.findall(r"[-0-9.]+", line.get("d")))) for line in tree.findall(space + "path")
            if "Q" in line.get("d")]
    assert len(ends) > 1000 and max(abs(line[1] - line[5]) for line in ends) < 26


def test_picture_is_svg_with_every_node(capsys):
    assert main([str(DATA / "O_resnet50_training.json"), "--stages", "4", "--format", "svg"]) == 0
    tree = ElementTree.fromstring(capsys.readouterr().out)
    assert len(tree.findall("{http://www.w3.org/2000/svg}circle")) == 1243


def test_picture_names_stages_by_their_modules_and_explains_itself():
    graph = nx.DiGraph()
    path = "model.encoder.a_very_long_name.layers"
    names = [f"{path}.{number}:add" for number in range(5)] + ["one_name_that_is_longer_than_all"]
    for name in names:
        graph.add_node(name, forward=1e-3, backward=2e-3, output_bytes=4.0)
    nx.add_path(graph, list(graph))
    plan = partition(graph, 2)
    assert ends(plan, 0) == f"{path}.0 … {path}.2"
    texts = [e.text for e in ElementTree.fromstring(draw(plan, graph)).iter("{http://www.w3.org/2000/svg}text")]
    assert "stage 1: ..a_very_long_name.layers.3 … ..me_that_is_longer_than_all" in texts
    assert {"a node that takes no time", "one of 3 ms, forward and backward", "used in its own stage",
            "needed by another stage (cut short: in another row)"} <= set(texts)
    assert any(text.startswith("1 ") and text.endswith("layers.3") for text in texts)


@pytest.mark.parametrize(("shard", "factor"), [("none", 4.0), ("optimizer", 2.5), ("parameters", 2.75)])
def test_shards_and_replicas_count_as_memory(tmp_path, capsys, shard, factor):
    """AdamW on four replicas: weights and gradients whole, moments; with sharded parameters the own part besides."""
    graph = nx.DiGraph()
    for name in range(4):
        graph.add_node(f"n{name}", forward=1e-3, backward=2e-3, param_bytes=1_000_000, output_bytes=8)
    nx.add_path(graph, graph)
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(to_json(graph)))
    arguments = [str(path), "--stages", "2", "--replicas", "4", "--shard", shard, "--bandwidth", "1e9"]
    assert main([*arguments, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["assumptions"]["parameter_factor"] == factor
    assert pipeengine(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    # 3/4 of 2 MB each way at 1 GB/s
    assert ("to make parameters whole takes 1.5 ms" in text) == (shard == "parameters")
    assert ("takes 3 ms behind the last backward" in text) == (shard != "parameters")

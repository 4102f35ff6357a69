"""Weights in and out: from meta, from a checkpoint folder, and back; each worker holds its own stage alone."""
import tempfile
import traceback
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo
from torch import nn
from workers import launch

import pipeengine as pe
from pipeengine.checkpoint import collect_state
from pipeengine.checkpoint.weights import load_stage

NAMES = {"gpt2": True, "llama": False, "llama-tied": True, "bert": True, "t5": True, "vit": False}
CASES = {case.name: case for case in zoo.hugging_face_cases() if case.name in NAMES}
TRIED = [*((2, name) for name in CASES), *(pytest.param(3, name, marks=pytest.mark.slow) for name in ("gpt2", "t5"))]


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return CASES[name].build()


def pipeline(model: nn.Module, name: str, **options) -> pe.Pipeline:
    return pe.Pipeline(model, CASES[name].batches[0], num_microbatches=4, costs="analytic", **options)


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that are not saved included."""
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.device.type != "meta"}


def start(report, folder: str, names: list[str]) -> None:
    """On every worker: start from meta and from folders, tell what is held, train a step, save."""
    warnings.simplefilter("ignore")
    for name in names:
        for what in (from_meta, from_folder):
            try:
                report((name, what.__name__), what(name, folder))
            except Exception:
                report((name, what.__name__), traceback.format_exc())


def from_meta(name: str, folder: str) -> tuple:
    model = on_meta(name)
    pipe = pipeline(model, name, seed=5)
    held, made = {n for n, _ in pipe.named_parameters()}, everything(model)
    loss = pipe.step(**CASES[name].batches[1])
    pipe.save_weights(f"{folder}/{name}")
    pipe.close()
    return made, held, loss


def from_folder(name: str, folder: str) -> tuple:
    model = on_meta(name)
    pipe = pipeline(model, name, weights=f"{folder}/truth-{name}")
    held, loss = {n for n, _ in pipe.named_parameters()}, pipe.step(**CASES[name].batches[1])
    read = everything(model)
    pipe.close()
    return read, held, loss


@cache
def folder() -> Path:
    """A folder with a sharded checkpoint of each model, as Hugging Face writes it."""
    made = tempfile.TemporaryDirectory(prefix="weights-")
    _kept.append(made)
    for name, case in CASES.items():
        case.build().save_pretrained(Path(made.name) / f"truth-{name}", max_shard_size="20KB")
    return Path(made.name)


_kept: list[tempfile.TemporaryDirectory] = []


@cache
def started(num_workers: int) -> list[dict]:
    (folder() / str(num_workers)).mkdir()
    for name in CASES:
        (folder() / str(num_workers) / f"truth-{name}").symlink_to(folder() / f"truth-{name}")
    return launch(num_workers, start, str(folder() / str(num_workers)),
                  list(CASES) if num_workers == 2 else ["gpt2", "t5"])


def told(num_workers: int, name: str, what) -> list[tuple]:
    found = [worker[name, what.__name__] for worker in started(num_workers)]
    assert not any(isinstance(one, str) for one in found), "\n".join(map(str, found))
    return found


@cache
def alone(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Started from meta in one process with one stage."""
    model = on_meta(name)
    pipe = pipeline(model, name, num_stages=1, seed=5)
    return everything(model), pipe.step(**CASES[name].batches[1])


@pytest.mark.parametrize(("num_workers", "name"), TRIED)
def test_meta_start_does_not_depend_on_the_stages(num_workers, name):
    expected, loss = alone(name)
    assert loss.isfinite() and expected.keys() == everything(CASES[name].build()).keys()
    seen = set()
    for made, held, found in told(num_workers, name, from_meta):
        assert all(torch.equal(value, expected[n]) for n, value in made.items())
        assert torch.equal(found, loss)
        seen |= held
    assert seen == {n for n, _ in CASES[name].build().named_parameters()}


@pytest.mark.parametrize(("num_workers", "name"), TRIED)
def test_a_worker_holds_its_own_stage_alone(num_workers, name):
    """What is real on a worker is what its stage uses; only what is tied is real on two."""
    workers = told(num_workers, name, from_meta)
    parameters = {n for n, _ in CASES[name].build().named_parameters()}
    tied = set()
    for made, held, *_ in workers:
        assert set(made) & parameters == held and 0 < len(held) < len(parameters)
        tied |= {n for other, others, *_ in workers for n in held & others if other is not made}
    assert len(tied) <= NAMES[name] + (name == "t5") * 2, tied


@pytest.mark.parametrize(("num_workers", "name"), TRIED)
def test_each_worker_reads_its_part_of_a_folder(num_workers, name):
    expected = everything(CASES[name].build())
    loss = pipeline(CASES[name].build(), name, num_stages=1).step(**CASES[name].batches[1])
    for read, held, found in told(num_workers, name, from_folder):
        assert set(read) >= held and all(torch.equal(value, expected[n]) for n, value in read.items())
        assert torch.equal(found, loss)


@pytest.mark.parametrize(("num_workers", "name"), TRIED)
def test_saved_weights_are_read_by_from_pretrained(num_workers, name):
    told(num_workers, name, from_meta)
    model, info = type(CASES[name].build()).from_pretrained(
        folder() / str(num_workers) / name, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    expected, _ = alone(name)
    assert all(torch.equal(tensor, expected[n]) for n, tensor in model.named_parameters())
    assert len(list((folder() / str(num_workers) / name).glob("*.safetensors"))) == num_workers


@pytest.mark.parametrize("num_stages", (1, 2))
@pytest.mark.parametrize("name", ("gpt2", "llama"))
def test_one_process_saves_and_reads_back(name, num_stages, tmp_path):
    model = CASES[name].build()
    pipe = pipeline(model, name, num_stages=num_stages)
    pipe.save_weights(tmp_path)
    again = on_meta(name)
    pipeline(again, name, num_stages=2, weights=tmp_path)
    assert all(torch.equal(value, everything(model)[n]) for n, value in everything(again).items())


@pytest.mark.parametrize("name", [case.name for case in zoo.hugging_face_cases()])
def test_every_architecture_is_read_as_from_pretrained_reads_it(name, tmp_path):
    """Files hold some architectures otherwise than memory does: experts apart, older names."""
    case = next(case for case in zoo.hugging_face_cases() if case.name == name)
    truth = case.build()
    truth.save_pretrained(tmp_path, max_shard_size="30KB")
    model = case.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    held = set(dict(model.named_parameters())) | set(dict(model.named_buffers()))
    load_stage(model, held, torch.device("cpu"), weights=tmp_path, seed=0)
    for (n, expected), found in zip(truth.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(expected, found), n


class NoReset(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(zoo.WIDTH))

    def forward(self, x):
        return x * self.scale


class Unmakeable(zoo.Blocks):
    def __init__(self):
        super().__init__()
        self.scale = NoReset()

    def forward(self, x, y):
        for block in self.blocks:
            x = block(x)
        return self.loss(self.scale(x), y)


def test_what_cannot_be_initialised_is_refused_by_name():
    with torch.device("meta"):
        model = Unmakeable()
    with pytest.raises(pe.InputError, match="scale.scale.*NoReset"):
        pe.Pipeline(model, zoo.regression()[0], num_stages=2, costs="analytic")


@pytest.mark.parametrize("spoil", ("empty folder", "another model"))
def test_a_wrong_folder_is_refused(spoil, tmp_path):
    source = tmp_path if spoil == "empty folder" else folder() / "truth-vit"
    with pytest.raises(pe.InputError, match="no checkpoint" if spoil == "empty folder" else "lacks"):
        pipeline(on_meta("llama"), "llama", num_stages=2, weights=source)


def test_an_alias_travels_once():
    """A head and its bias under a second name on the last worker: it sent twice what worker 0 took once, and waited."""
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2), "tail": nn.Module()})
    model["tail"].bias = model["head"].bias
    first_name = {"tail.bias": "head.bias"}
    owner = {name: int(name.startswith("head")) for name in model.state_dict()}
    sent, taken = [], []
    for rank, log in ((0, taken), (1, sent)):
        def pass_on(tensor, source, rank=rank, log=log):
            if source != 0:
                log.append(tuple(tensor.shape))
            return tensor
        state = collect_state(model, first_name, owner, SimpleNamespace(rank=rank, send_to_first=pass_on))
        assert (state is None) == (rank == 1)
        if state is not None:
            assert list(state) == list(model.state_dict()) and state["tail.bias"] is state["head.bias"]
    assert sent == taken == [(2, 2), (2,)] or sent == taken == [(2,), (2, 2)]

"""Files of a checkpoint: what safetensors reads is what was given, and names on disk mean one thing."""
import hashlib
import os
import random

import pytest
import torch

from pipeengine.checkpoint.disk import GATHER_BYTES, open_regular, remove_folder, write_file
from pipeengine.checkpoint.host_buffer import HostBuffer
from pipeengine.checkpoint.slots import get_tensor, put_tensor, tensor_slots
from pipeengine.checkpoint.step_folders import candidates, publish, saving_name, step_name
from pipeengine.checkpoint.tensor_file import DTYPES, TensorFile, dtype_name, stream, write_tensors
from pipeengine.errors import InputError

safetensors = pytest.importorskip("safetensors.torch")
WIDE = [dtype for dtype in DTYPES.values() if dtype not in (torch.uint64, torch.uint32, torch.uint16)]


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of every type and of odd shapes: scalars, empty ones, transposed ones, columns of larger ones."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    made = {}
    for number, dtype in enumerate(WIDE):
        shape = draw.choice(((), (0,), (3,), (2, 0, 4), (5, 7), (3, 1, 2)))
        tensor = torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)
        if tensor.dim() == 2 and draw.random() < 0.5:
            tensor = tensor.t()
        if tensor.dim() == 1:
            tensor = torch.stack([tensor, tensor], 1)[:, 0]         # a column: its elements lie apart
        made[f"layers.{number}.{draw.choice(('weight', 'größe', 'a b'))}"] = tensor
    return made


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("seed", range(6))
def test_what_is_written_is_what_safetensors_reads(seed, tmp_path):
    tensors = tensors_of(seed)
    file = TensorFile.of(tensors)
    record = write_tensors(tmp_path / "a.safetensors", file, stream(file, tensors))
    read = safetensors.load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert as_bytes(read[name]) == as_bytes(tensor), name
        assert record["tensors"][name]["digest"] == hashlib.sha256(as_bytes(tensor)).hexdigest()
    text = (tmp_path / "a.safetensors").read_bytes()
    assert record["bytes"] == len(text)
    assert record["header"] == hashlib.sha256(text[:len(text) - file.data_bytes]).hexdigest()


@pytest.mark.parametrize("seed", range(3))
def test_entries_lie_side_by_side_and_aligned(seed):
    file = TensorFile.of(tensors_of(seed))
    assert len(file.header()) % 8 == 0 and file.entries[0].start == 0 and file.entries[-1].end == file.data_bytes
    for before, entry in zip(file.entries, file.entries[1:]):
        assert before.end == entry.start
    for entry in file.entries:
        assert entry.start % torch.empty(0, dtype=DTYPES[entry.dtype]).element_size() == 0
    assert TensorFile.of({}).data_bytes == 0


def test_the_order_of_names_does_not_change_the_file():
    tensors = tensors_of(0)
    turned = dict(reversed(list(tensors.items())))
    assert TensorFile.of(tensors) == TensorFile.of(turned)


@pytest.mark.parametrize("seed", range(3))
def test_a_copy_in_the_buffer_is_the_bytes_themselves(seed, tmp_path):
    """Two files in one buffer, which a larger save replaces; what changes after the copy is not written."""
    buffer, files = HostBuffer(), []
    for tensors in (tensors_of(seed), {"small": torch.arange(3)}):
        files.append((TensorFile.of(tensors), {name: tensor.clone() for name, tensor in tensors.items()}))
    sources = buffer.copy(files)
    expected = [{name: as_bytes(tensor) for name, tensor in tensors.items()} for _, tensors in files]
    for _, tensors in files:
        for tensor in tensors.values():
            tensor.zero_()
    for number, ((file, _), source, bytes_of) in enumerate(zip(files, sources, expected)):
        write_tensors(tmp_path / f"{number}", file, source)
        found = safetensors.load_file(tmp_path / f"{number}")
        assert {name: as_bytes(tensor) for name, tensor in found.items()} == bytes_of
    larger = {"large": torch.arange(10_000)}
    source, = buffer.copy([(TensorFile.of(larger), larger)])
    write_tensors(tmp_path / "large", TensorFile.of(larger), source)
    assert torch.equal(safetensors.load_file(tmp_path / "large")["large"], larger["large"])


@pytest.mark.parametrize("megabytes", (0, 1, 16))
def test_memory_that_is_being_prepared_holds_what_is_copied(megabytes, tmp_path):
    """A copy comes while its memory is still being touched: nothing of it may be touched afterwards."""
    tensors = {f"layer.{number}": torch.randint(0, 255, (250_000,)) for number in range(4)}
    file, buffer = TensorFile.of(tensors), HostBuffer()
    buffer.prepare(megabytes << 20, pinned=False)
    source, = buffer.copy([(file, tensors)])
    write_tensors(tmp_path / "a", file, source)
    found = safetensors.load_file(tmp_path / "a")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_memory_that_cannot_be_prepared_is_asked_for_again_by_the_copy(tmp_path):
    """The thread that prepares has nobody to tell."""
    tensors, buffer = {"layer": torch.arange(3)}, HostBuffer()
    buffer.prepare(1 << 60, pinned=False)
    source, = buffer.copy([(TensorFile.of(tensors), tensors)])
    write_tensors(tmp_path / "a", TensorFile.of(tensors), source)
    assert safetensors.load_file(tmp_path / "a")["layer"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("wrong", (torch.eye(3).to_sparse(), torch.empty(2, device="meta"),
                                   torch.ones(2, dtype=torch.complex128)), ids=("sparse", "meta", "complex128"))
def test_what_has_no_form_is_refused_by_name(wrong):
    with pytest.raises(InputError, match="layer.bias is a Tensor"):
        dtype_name("layer.bias", wrong)


# -- names on disk ----------------------------------------------------------------------------------------------------


def test_candidates_are_the_newest_first_and_nothing_else(tmp_path):
    steps = random.Random(0).sample(range(2_000_000), 12)
    for step in steps:
        (tmp_path / step_name(step)).mkdir()
    for name in (saving_name(3, "ab12"), "step-12", "step-abc", "latest", f".removed-{step_name(7)}-cd"):
        (tmp_path / name).mkdir()
    assert candidates(tmp_path) == [step_name(step) for step in sorted(steps, reverse=True)]
    replaced = f".replaced-{step_name(steps[0])}-ef"
    (tmp_path / replaced).mkdir()
    found = candidates(tmp_path)
    assert found.index(replaced) == found.index(step_name(steps[0])) + 1, "what it makes way for comes first"
    assert candidates(tmp_path / "nowhere") == []


def test_publishing_again_puts_the_new_in_the_old_ones_place(tmp_path):
    for attempt in ("a", "b"):
        saved = tmp_path / saving_name(5, attempt)
        saved.mkdir()
        (saved / "state.json").write_text(attempt)
        publish(saved, 5, attempt)
    assert [path.name for path in tmp_path.iterdir()] == [step_name(5)]
    assert (tmp_path / step_name(5) / "state.json").read_text() == "b"
    remove_folder(tmp_path / step_name(5))
    remove_folder(tmp_path / step_name(5))
    assert not list(tmp_path.iterdir())


def test_small_chunks_are_written_together(tmp_path, monkeypatch):
    """Each call of the system hands Python's lock over: thousands of small tensors must not cost thousands of calls.
    The system may also take less than it is given."""
    draw, sizes, write = random.Random(0), [], os.write

    def count(file: int, data: memoryview) -> int:
        sizes.append(write(file, data[:max(1, len(data) - len(data) // 3)]))
        return sizes[-1]
    monkeypatch.setattr(os, "write", count)
    chunks = [draw.randbytes(draw.choice((0, 1, 900, 40_000))) for _ in range(1000)]
    chunks[300:300] = [memoryview(draw.randbytes(3 * GATHER_BYTES)), draw.randbytes(GATHER_BYTES), b"end"]
    write_file(tmp_path / "a", chunks)
    assert (tmp_path / "a").read_bytes() == b"".join(chunks)
    assert sum(size > 100_000 for size in sizes) >= 5 and len(sizes) < 200


def test_only_ordinary_files_are_read_and_none_is_written_over(tmp_path):
    write_file(tmp_path / "a", [b"one", memoryview(b"two"), b""])
    assert (tmp_path / "a").read_bytes() == b"onetwo"
    with pytest.raises(InputError, match="cannot write"):
        write_file(tmp_path / "a", [b"three"])
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name, reason in (("link", "is a link"), ("missing", "is missing")):
        with pytest.raises(InputError, match=reason):
            open_regular(tmp_path / name)


def test_slots_are_every_name_of_every_module():
    """A tied weight stands once, under its first name, with all places that hold it; so it stays tied."""
    inner, outer = torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    outer.append(inner)
    outer.append(inner)
    outer[1].weight = inner.weight
    found = tensor_slots(outer)
    assert set(found) == {*(name for name, _ in outer.named_parameters()), *(name for name, _ in outer.named_buffers())}
    assert found["1.weight"] == [(outer[1], "weight"), (inner, "weight")] and found["2.bias"] == [(inner, "bias")]
    new = torch.nn.Parameter(torch.zeros(2, 2))
    put_tensor(found["1.weight"], new)
    assert outer[1].weight is inner.weight is new is get_tensor(*found["1.weight"][1])

"""Token files: every sequence that is asked for is the slice that it says, whatever process reads it."""
import pickle

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

import pipeengine as pe


@pytest.fixture
def files(tmp_path):
    """A .bin and a .npy file, and what they hold."""
    rng = numpy.random.default_rng(0)
    first, second = rng.integers(0, 60000, 103), rng.integers(0, 99999, 57)
    first.astype(numpy.uint16).tofile(tmp_path / "a.bin")
    numpy.save(tmp_path / "b.npy", second.astype(numpy.int32))
    return (tmp_path / "a.bin", tmp_path / "b.npy"), (first, second)


@pytest.mark.parametrize("shift", (False, True))
@pytest.mark.parametrize("length, stride", ((8, None), (8, 1), (8, 3), (57, None), (3, 10)))
def test_every_sequence_is_a_slice(files, length, stride, shift):
    paths, arrays = files
    data = pe.TokenDataset(paths, length, dtype="uint16", stride=stride, shift=shift)
    expected = [array[at:at + length + shift] for array in arrays
                for at in range(0, len(array) - length - shift + 1, stride or length)]
    assert len(data) == len(expected)
    for item, window in zip([data[i] for i in range(len(data))], expected, strict=True):
        assert list(item) == ["input_ids", "labels"] and item["labels"].dtype == torch.int64
        assert item["input_ids"].tolist() == window[:length].tolist()
        assert item["labels"].tolist() == window[shift:].tolist()
    assert data[-1]["input_ids"].tolist() == expected[-1][:length].tolist()
    with pytest.raises(IndexError):
        data[len(data)]


def test_worker_processes_open_the_files_themselves(files):
    data = pe.TokenDataset(files[0][0], 8, dtype="uint16", names=("tokens", "targets"))
    batches = DataLoader(data, batch_size=5, num_workers=1)
    assert torch.cat([b["tokens"] for b in batches]).flatten().tolist() == files[1][0][:96].tolist()
    numpy.zeros(10**6, numpy.uint16).tofile(files[0][0])
    large = pe.TokenDataset(files[0][0], 8, dtype="uint16")
    assert large[0]["labels"].tolist() == [0] * 8 and len(pickle.dumps(large)) < 1000, "the data stay on disk"
    assert len(pickle.loads(pickle.dumps(large))[3]["input_ids"]) == 8


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "odd.bin").write_bytes(b"123")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    (tmp_path / "ok.bin").write_bytes(bytes(20))
    numpy.save(tmp_path / "floats.npy", numpy.zeros(9))
    numpy.save(tmp_path / "rows.npy", numpy.zeros((3, 3), int))
    numpy.save(tmp_path / "objects.npy", numpy.array([{}]), allow_pickle=True)
    for name, message in (("missing.bin", "is no file"), ("odd.bin", "3 bytes, not a positive multiple of the 2"),
                          ("empty.bin", "0 bytes"), ("bad.npy", "no .npy file"), ("objects.npy", "no .npy file"),
                          ("floats.npy", "whole numbers"), ("rows.npy", r"shape \(3, 3\)"),
                          ("ok.bin", "has 10 tokens, a sequence needs 64")):
        with pytest.raises(pe.InputError, match=message):
            pe.TokenDataset(tmp_path / name, 64, dtype="uint16")
    with pytest.raises(pe.InputError, match='pass dtype="uint16"'):
        pe.TokenDataset(tmp_path / "ok.bin", 4)
    with pytest.raises(pe.InputError, match="stride 0"):
        pe.TokenDataset(tmp_path / "ok.bin", 4, dtype="uint16", stride=0)

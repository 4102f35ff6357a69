"""Loaders of every kind go on where the training loop stood."""
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import pipeengine as pe


class Stream(IterableDataset):
    """An iterable data set that knows where it stands, as those of ``datasets`` do."""

    def __init__(self, size: int):
        self.size, self.start, self.at = size, 0, 0

    def __iter__(self):
        for number in range(self.start, self.size):
            self.at = number + 1
            yield torch.tensor(number)
        self.start = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.start = state["at"]


class StatefulLoader:
    """A loader with a state of its own, as torchdata's."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 6:
            self.at += 1
            yield self.at - 1

    def state_dict(self):
        return {"_steps_since_snapshot": self.at}

    def load_state_dict(self, state):
        self.at = state["_steps_since_snapshot"]


@pytest.mark.parametrize("make", (lambda: DataLoader(Stream(24), batch_size=4), StatefulLoader),
                         ids=("data set", "loader"))
def test_a_state_of_its_own_is_kept(make):
    whole = [torch.as_tensor(batch).tolist() for batch in make()]
    stopped = pe.ResumableLoader(make())
    taken = [torch.as_tensor(batch).tolist() for _, batch in zip(range(2), stopped)]
    resumed = pe.ResumableLoader(make())
    resumed.load_state_dict(stopped.state_dict())
    assert taken + [torch.as_tensor(batch).tolist() for batch in resumed] == whole


def test_a_plain_loader_is_skipped_forward_with_a_word():
    def plain():
        return pe.ResumableLoader(DataLoader(torch.arange(20), batch_size=4))
    stopped = plain()
    assert sum(len(batch) for batch in stopped) == 20
    taken = [batch.tolist() for _, batch in zip(range(2), stopped)]
    assert stopped.state_dict() == {"epoch": 1, "batches": 2}
    resumed = plain()
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.state_dict() == stopped.state_dict(), "before the first batch, too"
    with pytest.warns(UserWarning, match="2 batches are read and thrown away"):
        rest = [batch.tolist() for batch in resumed]
    assert taken + rest == [batch.tolist() for batch in plain()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len([*resumed]) == len(resumed) == 5, "the next epoch is whole"
    assert resumed.state_dict() == {"epoch": 3, "batches": 0}


def test_a_shuffling_loader_whose_seed_is_set_resumes_exactly():
    def shuffled():
        return pe.ResumableLoader(DataLoader(torch.arange(20), batch_size=4, shuffle=True,
                                             generator=torch.Generator().manual_seed(7)))
    resumed = shuffled()
    resumed.load_state_dict({"epoch": 0, "batches": 3})
    with pytest.warns(UserWarning):
        assert [batch.tolist() for batch in resumed] == [batch.tolist() for batch in shuffled()][3:]


def test_steps_go_from_epoch_to_epoch():
    batches = pe.ResumableLoader(DataLoader(torch.arange(6), batch_size=4)).endless()
    assert [next(batches).tolist() for _ in range(4)] == [[0, 1, 2, 3], [4, 5]] * 2
    with pytest.raises(pe.InputError, match="0 batches"):
        next(pe.ResumableLoader([]).endless())


def test_a_state_of_another_kind_is_refused():
    with pytest.raises(pe.InputError, match="resume with the kind of loader"):
        pe.ResumableLoader([1, 2]).load_state_dict({"position": 3})


def test_datasets_resume():
    datasets = pytest.importorskip("datasets")

    def stream():
        data = datasets.Dataset.from_dict({"x": list(range(24))}).to_iterable_dataset(num_shards=3)
        return pe.ResumableLoader(DataLoader(data.with_format("torch"), batch_size=4))
    whole = [batch["x"].tolist() for batch in stream()]
    stopped = stream()
    taken = [batch["x"].tolist() for _, batch in zip(range(3), stopped)]
    resumed = stream()
    resumed.load_state_dict(stopped.state_dict())
    assert taken + [batch["x"].tolist() for batch in resumed] == whole

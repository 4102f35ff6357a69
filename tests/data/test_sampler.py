"""One global order of samples, however many replicas and workers take it, resumed by one integer."""
import json
import tracemalloc

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import pipeengine as pe


class Numbers(Dataset):
    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


def loader(size: int, batch_size: int, *, num_workers: int = 0, **options) -> DataLoader:
    """A loader as users write it."""
    data = Numbers(size)
    return DataLoader(data, batch_size=batch_size, num_workers=num_workers,
                      sampler=pe.ShuffledSampler(data, batch_size=batch_size, **options))


def rows(batches) -> list[int]:
    return torch.cat(list(batches)).tolist() if (batches := list(batches)) else []


@pytest.mark.parametrize("drop_last", (False, True))
@pytest.mark.parametrize("num_replicas", (1, 2, 4))
@pytest.mark.parametrize("size", (64, 61, 59, 57, 8))
def test_replicas_side_by_side_are_one_process(size, num_replicas, drop_last):
    """Batch by batch, over three epochs: the rows of replica 0, then 1, ... are those of one process."""
    alone = loader(size, 8, drop_last=drop_last, seed=3)
    replicas = [loader(size, 8 // num_replicas, num_replicas=num_replicas, replica=r, drop_last=drop_last, seed=3)
                for r in range(num_replicas)]
    for _ in range(3):
        whole = [batch.tolist() for batch in alone]
        shares = [list(replica) for replica in replicas]
        assert [len(share) for share in shares] == [len(replica) for replica in replicas], "as many as len() says"
        together = [rows(batch) for batch in zip(*shares, strict=True)]
        lost = size % 8 if size % 8 < num_replicas else 0
        assert together == (whole[:-1] if lost and not drop_last else whole)


def test_every_sample_once_per_epoch_and_every_epoch_another_order():
    sampler = pe.ShuffledSampler(1000)
    epochs = [list(sampler) for _ in range(3)]
    assert all(sorted(epoch) == list(range(1000)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and epochs[0] != list(range(1000))
    assert list(pe.ShuffledSampler(1000, seed=1)) != epochs[0]
    assert list(pe.ShuffledSampler(5, shuffle=False)) == list(range(5))


@pytest.mark.parametrize("num_workers", (0, 2))
def test_the_order_is_that_of_the_sampler_with_any_number_of_workers(num_workers):
    assert rows(loader(50, 4, num_workers=num_workers)) == list(pe.ShuffledSampler(50))


def test_a_billion_samples_need_no_memory_and_resume_at_once():
    tracemalloc.start()
    sampler = pe.ShuffledSampler(10**9, batch_size=256)
    sampler.load_state_dict({"position": 10**6 * 256})
    first = next(iter(sampler))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6
    assert first == sampler.order(10**6 * 256, 10**6 * 256 + 1)[0] and 0 <= first < 10**9


@pytest.mark.parametrize("num_workers", (0, 2))
@pytest.mark.parametrize("size, drop_last", ((40, False), (43, False), (43, True)))
def test_what_was_taken_is_what_is_saved(size, drop_last, num_workers):
    """Stopped after any batch, in any of three epochs, and started anew: the rest is what it would have been."""
    whole = pe.ResumableLoader(loader(size, 8, drop_last=drop_last))
    batches = [batch.tolist() for _ in range(3) for batch in whole]
    for stop in range(0, len(batches), 1 if num_workers == 0 else 4):
        stopped = pe.ResumableLoader(loader(size, 8, drop_last=drop_last, num_workers=num_workers))
        taken = [batch.tolist() for _, batch in zip(range(stop), stopped.endless())]
        state = json.loads(json.dumps(stopped.state_dict()))
        assert set(state) == {"position"}
        resumed = pe.ResumableLoader(loader(size, 8, drop_last=drop_last, num_workers=num_workers))
        resumed.load_state_dict(state)
        rest = [batch.tolist() for _, batch in zip(range(len(batches) - stop), resumed.endless())]
        assert taken + rest == batches, stop


def test_the_state_fits_another_number_of_replicas():
    one = pe.ResumableLoader(loader(64, 8))
    for _ in zip(range(3), one):
        pass
    shares = []
    for replica in range(4):
        two = pe.ResumableLoader(loader(64, 2, num_replicas=4, replica=replica))
        two.load_state_dict(one.state_dict())
        shares.append(next(iter(two)))
    assert rows(shares) == one.loader.sampler.order(24, 32) and one.state_dict() == {"position": 24}


def test_an_example_is_not_missed_later():
    """``next(iter(loader))`` for the pipeline's example, then the loop: the first batch is trained on."""
    batches = pe.ResumableLoader(loader(32, 8))
    example = next(iter(batches))
    assert torch.equal(next(iter(batches)), example)
    batches.load_state_dict({"position": 16})
    assert torch.equal(next(iter(batches)), next(iter(batches)))
    assert rows(batches) == batches.loader.sampler.order(16, 32)[:16] and batches.state_dict() == {"position": 32}


@pytest.mark.parametrize("num_workers", (0, 2))
def test_a_pass_that_is_left_early_begins_again(num_workers):
    """Also when the loader has fetched to the epoch's end ahead of the loop."""
    batches = pe.ResumableLoader(loader(16, 8, num_workers=num_workers))
    first = next(iter(batches)).tolist()
    assert next(iter(batches)).tolist() == first
    batches.set_epoch(1)
    assert rows(batches) == batches.loader.sampler.order(16, 32)


def test_wrong_numbers_are_refused():
    for size, options in ((0, {}), (5, dict(replica=1)), (5, dict(num_replicas=2)), (5, dict(batch_size=0)),
                          (5, dict(batch_size=8, drop_last=True)), (1, dict(batch_size=1, num_replicas=2))):
        with pytest.raises(pe.InputError, match="give|pass"):
            pe.ShuffledSampler(size, **options)
    for state in ({}, {"position": -1}, {"position": 1.5}, {"position": 1, "epoch": 2}):
        with pytest.raises(pe.InputError, match="is not the state of a ShuffledSampler"):
            pe.ShuffledSampler(5).load_state_dict(state)
    data = Numbers(8)
    with pytest.raises(pe.InputError, match="batches of 4 rows, the loader makes batches of 2"):
        pe.ResumableLoader(DataLoader(data, batch_size=2, sampler=pe.ShuffledSampler(data, batch_size=4)))

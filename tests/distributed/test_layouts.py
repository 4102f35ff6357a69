"""Who stands where, what travels together, what is asked for in passing: without a process beside."""
import random
from itertools import pairwise, product

import pytest
import torch
import torch.distributed as dist

from pipeengine.distributed import Copies, Wishes
from pipeengine.distributed.board import LocalBoard, StoreBoard
from pipeengine.distributed.buckets import deal, make_buckets, within
from pipeengine.distributed.grad_norm import total_norm
from pipeengine.distributed.grid import Grid, ranks_of_mesh, ranks_of_world
from pipeengine.errors import InputError

# -- the grid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas, width", list(product((1, 2, 3, 4), (1, 2, 5))))
def test_every_worker_has_one_place(replicas, width):
    grids = [Grid.of(worker, replicas * width, replicas) for worker in range(replicas * width)]
    assert [(grid.replica, grid.place) for grid in grids] == list(product(range(replicas), range(width)))
    for worker, grid in enumerate(grids):
        assert grid.worker(grid.place) == worker and worker in grid.pipeline and len(grid.pipeline) == width
        assert [grid.worker(0, replica) for replica in range(replicas)] == [replica * width for replica in
                                                                            range(replicas)]
        assert grid.everywhere({grid.place}) == tuple(w for w, other in enumerate(grids) if other.place == grid.place)
        assert grid.everywhere(range(width)) == tuple(range(replicas * width))


class Mesh:
    """What is asked of a device mesh."""

    def __init__(self, ranks, names, inside=True):
        self.mesh, self.mesh_dim_names = torch.tensor(ranks), names
        self._inside = inside

    def get_coordinate(self):
        return [0] if self._inside else None


@pytest.mark.parametrize("ranks, names, expected", [
    ([4, 2, 7], ("pp",), ((4, 2, 7), 1)), ([4, 2, 7], ("stages",), ((4, 2, 7), 1)), ([4, 2], None, ((4, 2), 1)),
    ([3, 5], ("dp",), ((3, 5), 2)), ([3, 5], ("dp_shard",), ((3, 5), 2)),
    ([[0, 1], [2, 3]], ("dp", "pp"), ((0, 1, 2, 3), 2)), ([[0, 1], [2, 3]], ("pp", "dp_replicate"), ((0, 2, 1, 3), 2)),
    ([[0, 1, 2], [3, 4, 5]], ("pp", "dp_shard"), ((0, 3, 1, 4, 2, 5), 3)), ([[9]], ("dp", "pp"), ((9,), 1))])
def test_a_meshs_ranks_are_numbered_through_its_replicas(ranks, names, expected):
    assert ranks_of_mesh(Mesh(ranks, names), None) == expected
    assert ranks_of_mesh(Mesh(ranks, names), expected[1]) == expected
    with pytest.raises(InputError, match=f"num_replicas is 9, the mesh has {expected[1]} replicas; leave"):
        ranks_of_mesh(Mesh(ranks, names), 9)


@pytest.mark.parametrize("ranks, names, said", [
    ([[0, 1], [2, 3]], ("pp", "tp"), r"'tp'.*give \"pp\""), ([[0, 1], [2, 3]], None, "the mesh has the dimensions 2"),
    ([[0, 1], [2, 3]], ("dp", "dp_replicate"), "dp_replicate"),
    ([[0, 1], [2, 3]], ("dp_shard", "dp"), 'sharded over all replicas: give them one dimension, "dp_shard"')])
def test_meshes_of_other_dimensions_are_refused(ranks, names, said):
    with pytest.raises(InputError, match=said):
        ranks_of_mesh(Mesh(ranks, names), None)


def test_processes_are_shared_out_evenly_or_not_at_all():
    assert ranks_of_world(6, None) == (range(6), 1) and ranks_of_world(6, 3) == (range(6), 3)
    with pytest.raises(InputError, match="6 processes cannot be shared out to 4 pipelines.*a multiple of 4"):
        ranks_of_world(6, 4)


# -- buckets ----------------------------------------------------------------------------------------------------------


def parameters(seed):
    """Copies and tensors of two stages and a tie, of several sizes and types, on two to four workers."""
    draw = random.Random(seed)
    workers = draw.randint(2, 4)
    copies, tensors = [], {}
    for number in range(draw.randint(1, 20)):
        name = f"p{number:02}"
        stage = draw.choice((-1, 0, 1))
        holders = tuple(range(workers)) if stage >= 0 else tuple(sorted(draw.sample(range(workers), 2)))
        copies.append(Copies(name, holders, stage))
        tensors[name] = torch.zeros(draw.choice((1, 3, 7, 20, 64)), dtype=draw.choice((torch.float32, torch.bfloat16)))
    return copies, tensors


@pytest.mark.parametrize("owned", (False, True))
@pytest.mark.parametrize("seed", range(15))
def test_buckets_hold_every_parameter_once_and_share_all_of_it(seed, owned):
    copies, tensors = parameters(seed)
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    owner = deal(copies, sizes) if owned else None
    buckets = make_buckets(copies, tensors, owner, most=100)
    assert sorted(name for bucket in buckets for name in bucket.names) == sorted(tensors)
    known = {one.name: one for one in copies}
    for bucket in buckets:
        lengths = [sizes[name] for name in bucket.names]
        assert {(known[name].workers, known[name].stage, tensors[name].dtype) for name in bucket.names} == {
            (bucket.workers, bucket.stage, bucket.dtype)}
        assert sum(lengths) * bucket.dtype.itemsize <= 100 or len(lengths) == 1
        assert bucket.starts == tuple(sum(lengths[:number]) for number in range(len(lengths)))
        assert len(bucket.cuts) == len(bucket.workers) + 1 and bucket.cuts[-1] >= sum(lengths)
        for number, (name, length) in enumerate(zip(bucket.names, lengths)):
            pieces = list(bucket.pieces(number, length))
            covered = [at for _, first, last in pieces for at in range(first, last)]
            assert covered == list(range(bucket.starts[number], bucket.starts[number] + length))
            for member, first, last in pieces:
                assert bucket.cuts[member] <= first and last <= bucket.cuts[member + 1]
            if owned:
                assert [bucket.workers[member] for member, *_ in pieces] == [owner[name]], "whole, to its owner"
        shares = [bucket.share(member) for member in range(len(bucket.workers))]
        assert owned or len(set(shares)) == 1


@pytest.mark.parametrize("seed", range(15))
def test_what_is_dealt_is_even(seed):
    """At most 4/3 of the least possible where all hold the same; and only to holders."""
    draw = random.Random(seed)
    workers, sizes = draw.randint(1, 4), {f"p{n}": draw.randint(1, 40) for n in range(draw.randint(1, 7))}
    owner = deal([Copies(name, tuple(range(workers)), 0) for name in sizes], sizes)

    def fullest(owners):
        return max(sum(size for size, one in zip(sizes.values(), owners) if one == worker) for worker in range(workers))
    least = min(map(fullest, product(range(workers), repeat=len(sizes))))
    assert fullest([owner[name] for name in sizes]) <= 4 / 3 * least
    tied = deal([Copies("a", (1, 3), -1), Copies("b", (3,), 0), Copies("c", (1, 3), -1)], {"a": 5, "b": 9, "c": 5})
    assert tied == {"b": 3, "a": 1, "c": 1}, "the holder with less so far, though it has two then"


def test_runs_are_as_long_as_the_limit_allows():
    tensors = {name: torch.zeros(size) for name, size in zip("abcdef", (2, 2, 9, 1, 3, 0))}
    assert list(within("abcdef", tensors, 16)) == [["a", "b"], ["c"], ["d", "e", "f"]]
    assert list(within("", tensors, 16)) == [] and list(within("c", tensors, 1)) == [["c"]]
    runs = list(within("abcdef", tensors, 20))
    for run, following in pairwise(runs):
        assert sum(tensors[name].nbytes for name in (*run, following[0])) > 20, "the next one had no room"


# -- wishes and texts -------------------------------------------------------------------------------------------------


def test_a_wish_is_heard_by_all_and_taken_once():
    """Worker 1 asks; on the next agreement both hear the sum of bits, and act at the same place."""
    one, other = Wishes(), Wishes()
    other.ask(2), other.ask(4), other.ask(2)
    bits = one.own() | other.own()
    for wishes in (one, other):
        wishes.hear(bits)
    assert one.take(2) == other.take(2) == 2 and other.own() == 4, "what was taken is not asked for any more"
    assert one.take() == other.take() == 4 and one.take() == 0 and other.own() == 0
    other.ask(2)
    assert other.take() == 0 and other.own() == 2, "nobody has heard it yet, its own worker neither"


@pytest.mark.parametrize("make", [LocalBoard, lambda: StoreBoard(dist.HashStore())], ids=("local", "store"))
def test_texts_arrive_once_and_in_order(make):
    board = make()
    assert board.posted() == [] and board.noted("address") is None
    board.post("first"), board.post("zweiter ü"), board.post("")
    assert board.posted() == ["first", "zweiter ü", ""] and board.posted() == []
    board.post("later")
    board.note("address", "a"), board.note("address", "b")
    assert board.posted() == ["later"] and board.noted("address") == "b" == board.noted("address")


def test_a_text_on_its_way_holds_up_those_after_it():
    """Its number is taken, its text has not come: what comes after it waits, so that the order stays."""
    store = dist.HashStore()
    board, slow = StoreBoard(store), StoreBoard(store)
    board.post("one")
    number = store.add("posts", 1)
    board.post("three")
    assert board.posted() == ["one"] and board.posted() == []
    store.set(f"post/{number}", "two")
    assert board.posted() == ["two", "three"] and slow.noted("nothing") is None


# -- the norm ---------------------------------------------------------------------------------------------------------


class TwoWorkers:
    """What the other worker has counted is added to, or compared with, what this one has."""

    def __init__(self, other):
        self._other = other

    def all_reduce(self, tensor, largest=False):
        return torch.maximum(tensor, self._other) if largest else tensor + self._other


@pytest.mark.parametrize("norm_type", (1.0, 2.0, 3.0, float("inf")))
def test_a_norm_over_workers_is_that_of_all_gradients(norm_type):
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=draw) for shape in ((3, 4), (5,), (), (2, 2))]
    theirs = torch.cat([gradient.flatten() for gradient in gradients[2:]]).double().norm(norm_type)
    mine = gradients[:2] + [torch.zeros(0, 7)]
    other = theirs if norm_type == float("inf") else theirs.pow(norm_type)
    found = total_norm(mine, norm_type, TwoWorkers(other), torch.device("cpu"))
    expected = torch.nn.utils.get_total_norm([gradient.double() for gradient in gradients], norm_type)
    assert found.dtype == torch.float64 and found.dim() == 0
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_a_worker_without_gradients_counts_for_nothing():
    for norm_type in (2.0, float("inf")):
        assert total_norm([], norm_type, TwoWorkers(torch.tensor(9.0)), torch.device("cpu")) == (
            3.0 if norm_type == 2.0 else 9.0)

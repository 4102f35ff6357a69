"""What a micro-batch counts for: all shares make one whole, however the batch is dealt out to replicas."""
import random

import pytest

from pipeengine.stages.loss_weight import as_weights, even_weights
from pipeengine.stages.shares import Shares, Totals


def dealt(draw, by_count):
    """Replicas with micro-batches of several sizes and counts, some of which count for nothing."""
    replicas = []
    for _ in range(draw.randint(1, 4)):
        number = draw.randint(1, 4)
        sizes = tuple(draw.randint(1, 5) for _ in range(number))
        counts = tuple(float(draw.randint(0, 9)) for _ in range(number)) if by_count else None
        replicas.append(Shares(sizes, counts, by_count, tuple(draw.randint(0, 3) for _ in range(number))))
    return replicas


@pytest.mark.parametrize("by_count", (True, False))
def test_shares_of_all_replicas_are_those_of_one_that_has_everything(by_count):
    for seed in range(200):
        replicas = dealt(random.Random(seed), by_count)
        everybody = [replica.totals for replica in replicas]
        weights = [replica.weigh(everybody) for replica in replicas]
        alone = Shares(sum((replica.sizes for replica in replicas), ()),
                       sum((replica.counts for replica in replicas), ()) if by_count else None, by_count,
                       sum((replica.num_terms for replica in replicas), ()))
        whole = alone.weigh([alone.totals])
        assert sum((part.loss for part in weights), ()) == pytest.approx(whole.loss)
        assert sum(whole.loss) == pytest.approx(1.0)


def test_a_batch_without_a_single_target_counts_by_rows():
    shares = Shares((1, 3), (0.0, 0.0), True, (1, 1))
    assert shares.weigh([shares.totals]).loss == (0.25, 0.75)


def test_where_a_replica_cannot_count_nobody_guesses():
    """One replica's loss counts targets and another's micro-batches are of a kind that has no count."""
    knows, does_not = Shares((2,), (5.0,), True, (1,)), Shares((2,), None, False, (1,))
    everybody = [knows.totals, does_not.totals]
    assert knows.weigh(everybody) is None and does_not.weigh(everybody) is None
    assert does_not.weigh([does_not.totals, does_not.totals]).loss == (0.5,), "rows alone decide: nobody counts"


@pytest.mark.parametrize("rows", (0, 1, 2**62))
@pytest.mark.parametrize("count", (None, 0.0, 1 / 3, -1e300, 2.0**80))
@pytest.mark.parametrize("counts", (True, False))
def test_totals_travel_as_three_whole_numbers(rows, count, counts):
    words = Totals(rows, counts, count).to_words()
    assert all(type(word) is int and -2**63 <= word < 2**63 for word in words)
    assert Totals.from_words(*words) == Totals(rows, counts, count)


def test_terms_times_loss_are_the_shares():
    """Of a loss of several terms each gets its own share; where all weigh alike the terms' weights are exactly 1."""
    draw = random.Random(0)
    for _ in range(200):
        shares = [tuple(draw.choice((0.0, draw.random(), 1.0)) for _ in range(draw.randint(0, 4))) for _ in range(3)]
        rows = [draw.random() for _ in shares]
        weights = as_weights(shares, rows)
        for share, row, loss, terms in zip(shares, rows, weights.loss, weights.terms):
            if not share:
                assert loss == row and terms == ()
            elif len(share) == 1:
                assert (loss, terms) == (share[0], ())
            elif any(share):
                assert [loss * float(term) for term in terms] == pytest.approx(list(share))
    even = even_weights([1.0, 3.0], [4, 4], [3, 1])
    assert even.loss == (0.25, 0.75) and [float(term) for term in even.terms[0]] == [1.0] * 3 and even.terms[1] == ()
    assert even_weights([0.0, 0.0], [1, 3], [1, 1]).loss == (0.25, 0.75)

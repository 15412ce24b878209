"""The votes and the metrics: the same as scikit-learn's nearest neighbours and Counter, and as by hand."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import Book, spectra_of
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

import dsire


def by_brute_force(values: np.ndarray, run: dsire.Split) -> tuple[np.ndarray, np.ndarray]:
    """The first of the nearest training models [voters, test models], and whether no other one is as near."""
    train, test = run.train.numpy(), run.test.numpy()
    squares = ((values[:, test, None] - values[:, None, train]) ** 2).sum(-1)
    return train[squares.argmin(-1)], (squares == squares.min(-1, keepdims=True)).sum(-1) == 1


def test_every_vote_and_prediction_on_the_shipped_subset(shipped: dsire.Spectra, shipped_by_the_book: Book) -> None:
    _, expected = shipped_by_the_book
    runs = dsire.splits(shipped.micro_datasets, dsire.Protocol(experiments=10, train_size=15, seed=42))
    every = zip(runs, dsire.votes_of(shipped, runs), dsire.dsire(shipped, runs), expected, strict=True)
    for run, (votes, _), found, reference in every:
        assert run.test.tolist() == reference.test
        assert votes.tolist() == reference.votes.tolist()
        assert found.sizes.tolist() == reference.predicted
        assert found.shares.max(-1).values.tolist() == pytest.approx(reference.shares)


@pytest.mark.parametrize("distances_at_once", [dsire.DISTANCES_AT_ONCE, 300, 5000])
def test_votes_of_models_that_share_spectra(monkeypatch: pytest.MonkeyPatch, distances_at_once: int) -> None:
    """In parts of any size, for all experiments together and for each alone, the first of the nearest is asked."""
    monkeypatch.setattr(dsire, "DISTANCES_AT_ONCE", distances_at_once)
    draw = np.random.default_rng(0)
    values = draw.integers(0, 1000, size=(5, 300, 4))  # whole numbers, of which squares are exact
    values[1] = draw.integers(0, 4, size=(300, 4))  # near ones are many
    values[2] = values[2, draw.integers(0, 100, size=300)]  # three models share each, in the mean
    values[3] = values[3, 0]
    values[4] += 2**30  # squares of differences are exact, but not differences of squares
    names, sizes = draw.integers(0, 40, 300).tolist(), draw.choice([1, 5, 20], 300)
    spectra = spectra_of(torch.from_numpy(values), sizes.tolist(), names)
    runs = dsire.splits(spectra.micro_datasets, dsire.Protocol(experiments=4, train_size=15, seed=1))
    runs.append(dsire.Split(torch.tensor([7, 8, 290]), torch.arange(300)))  # also of the training models themselves
    compared = by_brute_force(values, runs[0])[1].mean(1)
    assert compared[0] > 0.99
    assert 0.1 < compared[1:3].min() <= compared[1:3].max() < 0.9
    assert compared[3] == 0
    for run, found, votes in zip(runs, dsire.nearest(spectra.values, runs), dsire.votes_of(spectra, runs), strict=True):
        expected = by_brute_force(values, run)[0]
        assert found.tolist() == expected.tolist()
        assert votes[0].tolist() == sizes[expected].tolist()
        assert votes[1].tolist() == sorted(set(sizes[run.train].tolist()))
        (alone,) = dsire.votes_of(spectra, [run])
        assert torch.equal(alone[0], votes[0])


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 40), st.integers(1, 4), st.integers(1, 8))
def test_nearest_is_that_of_scikit_learn(seed: int, voters: int, models: int, splits: int, rank: int) -> None:
    """Each split is searched alone; a model with huge weights costs no precision among the others."""
    draw = np.random.default_rng(seed)
    offset, scale = 10.0 ** draw.integers(-3, 4), 10.0 ** draw.integers(-3, 4)
    values = offset + scale * draw.normal(size=(voters, models + 1, rank))
    values[:, models] = 1e8

    def some(*more: int) -> torch.Tensor:
        return torch.tensor([*sorted(draw.choice(models, draw.integers(1, models + 1), replace=False)), *more])

    runs = [dsire.Split(some(models), some()) for _ in range(splits)]
    for (train, test), found in zip(runs, dsire.nearest(torch.from_numpy(values), runs), strict=True):
        for x, its in zip(values, found.tolist(), strict=True):
            fitted = NearestNeighbors(n_neighbors=1).fit(x[train.numpy()])
            expected = fitted.kneighbors(x[test.numpy()], return_distance=False)[:, 0]
            assert its == train[expected].tolist()


@given(st.lists(st.sampled_from([1, 10, 20]), min_size=1, max_size=48), st.sampled_from([1, 2, 4]))
@example([20, 10, 10, 20, 10, 20, 20, 10], 2)  # ties go to the size that was voted first
def test_majority_is_that_of_counter(ballots: list[int], models: int) -> None:
    voters = -(-len(ballots) // models)
    votes = np.resize(ballots, (models, voters)).tolist()
    said = dsire.majority(torch.tensor(votes).T.contiguous(), torch.tensor([1, 10, 20]))
    assert said.sizes.tolist() == [Counter(ballots).most_common(1)[0][0] for ballots in votes]
    assert said.candidates.tolist() == [1, 10, 20]
    assert said.shares.tolist() == [[ballots.count(size) / voters for size in (1, 10, 20)] for ballots in votes]


def test_micro_datasets_are_numbered_by_sorted_name() -> None:
    """Integers sort as integers: 9 before 10; of some models, those that are there are numbered anew."""
    spectra = spectra_of(torch.arange(5).view(1, 5, 1), names=(10, 9, 2, 10, 2))
    assert (spectra.micro_datasets.tolist(), spectra.count) == ([2, 1, 0, 2, 0], 3)
    for chosen in (torch.tensor([0, 2, 3]), torch.tensor([True, False, True, True, False])):
        some = spectra.of_models(chosen)
        assert (some.values.flatten().tolist(), some.names) == ([0, 2, 3], [10, 2, 10])
        assert (some.micro_datasets.tolist(), some.count) == ([1, 0, 1], 2)


def test_metrics_by_hand() -> None:
    """Errors 0, 1, 2 and 10 of 1, 2, 4 and 20: MAPE (0 + 1/2 + 1/2 + 1/2) / 4. The deviation is a population's."""
    mae, mape, accuracy = dsire.metrics(torch.tensor([1, 2, 4, 20]), torch.tensor([1, 3, 2, 10]))
    assert (mae, mape, accuracy) == (pytest.approx(3.25), pytest.approx(37.5), pytest.approx(25))
    experiments = [dsire.Metrics(1, 10, 50), dsire.Metrics(3, 10, 70)]
    assert dsire.mean_and_std(experiments) == {"mae": (2, 1), "mape": (10, 0), "accuracy": (60, 10)}

"""The votes and the protocol: the same as scikit-learn's nearest neighbours, Counter and random.sample."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Model, Reference, parquet_files
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

import dsire

ByTheBook = tuple[list[Model], list[Reference]]


def spectra_of(values: torch.Tensor, models: list[Model]) -> dsire.Spectra:
    """`values` is [voters, models, r]; the voters' names do not matter here."""
    names, sizes = [name for name, _ in models], torch.tensor([size for _, size in models])
    return dsire.Spectra(values.double(), sizes, names, [dsire.Voter(str(i), "A") for i in range(len(values))], {})


@pytest.fixture(scope="module")
def shipped(tiny_wise: Path) -> dsire.Spectra:
    files = parquet_files(tiny_wise / "low" / "4")
    return dsire.join_shards([dsire.shard_spectra(file, 4) for file in files], [str(file) for file in files])


def test_every_vote_and_prediction_on_the_shipped_subset(
    shipped: dsire.Spectra, shipped_by_the_book: ByTheBook
) -> None:
    models, expected = shipped_by_the_book
    assert list(zip(shipped.names, shipped.sizes.tolist(), strict=True)) == models
    results = dsire.evaluate(shipped, dsire.dsire, dsire.Protocol(experiments=10, train_size=15, seed=42))
    assert len(results) == len(expected) == 10
    for result, reference in zip(results, expected, strict=True):
        train, test = shipped.of_models(reference.train), shipped.of_models(reference.test)
        assert result.test == reference.test
        assert torch.equal(dsire.votes_of(train, test), torch.from_numpy(reference.votes.copy()))
        assert result.prediction.sizes.tolist() == reference.predicted
        assert result.prediction.shares.max(-1).values.tolist() == pytest.approx(reference.shares)


@pytest.mark.parametrize("block", [1, 7, 100])
def test_a_small_block_gives_the_same(
    shipped: dsire.Spectra, shipped_by_the_book: ByTheBook, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    reference = shipped_by_the_book[1][0]
    train, test = shipped.of_models(reference.train[:20]).values[:9], shipped.of_models(reference.test[:11]).values[:9]
    whole = dsire.nearest(train, test)[0]
    monkeypatch.setattr(dsire, "BLOCK", block)
    monkeypatch.setattr(dsire, "VOTERS_AT_ONCE", 4)
    assert torch.equal(dsire.nearest(train, test)[0], whole)


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 30), st.integers(1, 20), st.integers(1, 4))
def test_each_choice_of_training_models_is_searched_alone(
    seed: int, voters: int, models: int, queries: int, choices: int
) -> None:
    draw = np.random.default_rng(seed)
    train, test = (torch.from_numpy(draw.normal(size=(voters, many, 3))) for many in (models, queries))
    chosen = [
        torch.from_numpy(np.sort(draw.choice(models, draw.integers(1, models + 1), replace=False)))
        for _ in range(choices)
    ]
    together = dsire.nearest(train, test, chosen)
    assert len(together) == choices
    for choice, found in zip(chosen, together, strict=True):
        distances = torch.cdist(test, train[:, choice], compute_mode="donot_use_mm_for_euclid_dist")
        assert torch.equal(found, choice[distances.argmin(-1)])


def test_experiments_that_share_distances_have_the_votes_of_each_alone(shipped: dsire.Spectra) -> None:
    """More experiments than share their distances, of micro-datasets that lack models."""
    spectra = shipped.of_models([model for model in range(len(shipped.names)) if model % 7]).of_voters(
        shipped.voters[:5]
    )
    protocol = dsire.Protocol(experiments=23, train_size=3, seed=1)
    runs = list(dsire.votes_in_experiments(spectra, protocol))
    assert [(train, test) for train, test, _ in runs] == list(dsire.splits(spectra.names, protocol))
    for train, test, votes in runs:
        assert torch.equal(votes, dsire.votes_of(spectra.of_models(train), spectra.of_models(test)))


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 30), st.integers(1, 20), st.integers(1, 8))
def test_nearest_is_that_of_scikit_learn(seed: int, voters: int, models: int, queries: int, rank: int) -> None:
    draw = np.random.default_rng(seed)
    offset, scale = 10.0 ** draw.integers(-3, 4), 10.0 ** draw.integers(-3, 4)
    train, test = (offset + scale * draw.normal(size=(voters, many, rank)) for many in (models, queries))
    found = dsire.nearest(torch.from_numpy(train), torch.from_numpy(test))[0]
    for voter in range(voters):
        expected = NearestNeighbors(n_neighbors=1).fit(train[voter]).kneighbors(test[voter], return_distance=False)
        assert found[voter].tolist() == expected[:, 0].tolist()


def test_the_first_of_equally_near_models_is_taken() -> None:
    train = torch.tensor([[[5.0, 1], [2, 1], [2, 1], [4, 1]], [[0, 0], [0, 0], [0, 0], [0, 0]]]).double()
    test = torch.tensor([[[2.0, 1], [3, 1]], [[0, 0], [1, 1]]]).double()
    assert dsire.nearest(train, test)[0].tolist() == [[1, 1], [0, 0]]


def test_a_diverged_model_does_not_blur_the_others() -> None:
    """One model with huge weights must not cost the precision that tells the others apart."""
    draw = np.random.default_rng(0)
    train, test = (1 + 0.01 * draw.normal(size=(many, 4)) for many in (90, 50))
    train[0] = 1e8
    expected = NearestNeighbors(n_neighbors=1).fit(train).kneighbors(test, return_distance=False)
    found = dsire.nearest(torch.from_numpy(train)[None], torch.from_numpy(test)[None])[0]
    assert found[0].tolist() == expected[:, 0].tolist()


@given(st.integers(1, 12), st.data())
def test_majority_is_that_of_counter(voters: int, data: st.DataObject) -> None:
    votes = data.draw(
        st.lists(st.lists(st.sampled_from([1, 10, 20]), min_size=voters, max_size=voters), min_size=1, max_size=4)
    )
    sizes = torch.tensor([1, 10, 20])
    winners, candidates, shares = dsire.majority(torch.tensor(votes).T.contiguous(), sizes)
    assert winners.tolist() == [Counter(ballots).most_common(1)[0][0] for ballots in votes]
    assert candidates.tolist() == [1, 10, 20]
    assert shares.tolist() == [[ballots.count(size) / voters for size in (1, 10, 20)] for ballots in votes]


def test_a_tie_goes_to_the_size_that_was_voted_first() -> None:
    votes = torch.tensor([[5, 2, 1], [2, 5, 2], [2, 5, 5], [5, 2, 2]])  # [voters, models]
    assert dsire.majority(votes, torch.tensor([1, 2, 5]))[0].tolist() == [5, 2, 2]


def test_splits_are_those_of_random_sample() -> None:
    names = [f"thing_{number:02d}" for number in range(50) for _ in range(6)]
    random.Random(1).shuffle(names)
    draw = random.Random(42)
    for train, test in dsire.splits(names, dsire.Protocol(experiments=10, train_size=15, seed=42)):
        trained = {f"thing_{number:02d}" for number in draw.sample(range(50), 15)}
        assert {names[model] for model in train} == trained
        assert not {names[model] for model in test} & trained
        assert sorted(train + test) == list(range(300))
        assert (train, test) == (sorted(train), sorted(test))


def test_micro_datasets_are_numbered_by_sorted_name() -> None:
    """Integers sort as integers: 9 before 10."""
    names = [10, 9, 2, 10, 2]
    ((train, test),) = dsire.splits(names, dsire.Protocol(experiments=1, train_size=1, seed=0))
    chosen = [2, 9, 10][random.Random(0).sample(range(3), 1)[0]]
    assert {names[model] for model in train} == {chosen}
    assert {names[model] for model in test} == {2, 9, 10} - {chosen}


def test_metrics_by_hand() -> None:
    """Errors 0, 1, 2 and 10 of 1, 2, 4 and 20: MAE 13 / 4, MAPE (0 + 1/2 + 1/2 + 1/2) / 4, one of four is right."""
    mae, mape, accuracy = dsire.metrics(torch.tensor([1, 2, 4, 20]), torch.tensor([1, 3, 2, 10]))
    assert (mae, mape, accuracy) == (pytest.approx(3.25), pytest.approx(37.5), pytest.approx(25))


def test_mean_and_population_standard_deviation() -> None:
    prediction = dsire.Prediction(torch.tensor([1]), torch.tensor([1]), torch.ones(1, 1))
    runs = [dsire.Experiment([0], prediction, *values) for values in ((1.0, 10.0, 50.0), (3.0, 10.0, 70.0))]
    assert dsire.mean_and_std(runs) == {"mae": (2, 1), "mape": (10, 0), "accuracy": (60, 10)}


def test_an_experiment_worked_out_by_hand() -> None:
    """Two micro-datasets of sizes 1 and 5 and three voters: two tell the sizes apart, the third names the other one."""
    models = [("x", 1), ("x", 5), ("y", 1), ("y", 5)]
    right, wrong = [[9.0], [1.0], [8.0], [2.0]], [[1.0], [9.0], [9.0], [1.0]]
    spectra = spectra_of(torch.tensor([right, wrong, right]), models)
    (result,) = dsire.evaluate(spectra, dsire.dsire, dsire.Protocol(experiments=1, train_size=1, seed=42))
    assert result.prediction.sizes.tolist() == [1, 5]
    assert result.prediction.shares.max(-1).values.tolist() == pytest.approx([2 / 3, 2 / 3])
    assert (result.mae, result.mape, result.accuracy) == (0, 0, 100)


def test_only_the_chosen_matrices_vote() -> None:
    voters = [dsire.Voter(layer, matrix) for layer in ("p", "q") for matrix in ("A", "B", "BA")]
    values = torch.arange(6).double()[:, None, None]
    spectra = dsire.Spectra(values, torch.tensor([1]), ["x"], voters, {})
    chosen = spectra.of_matrices(["BA", "A"])
    assert chosen.voters == [("p", "A"), ("p", "BA"), ("q", "A"), ("q", "BA")]
    assert chosen.values.flatten().tolist() == [0, 2, 3, 5]

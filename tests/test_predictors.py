"""The other predictors, against plain scikit-learn and Counter; comparison and figures on the shipped subset."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import dsire

PROTOCOL = dsire.Protocol(experiments=2)


@pytest.fixture(scope="module")
def shipped(tiny_wise: Path) -> dsire.Spectra:
    """A sixth of the shipped subset's voters, so that a plain classifier for each is quick."""
    shards = [dsire.shard_spectra(path, 4) for path in sorted((tiny_wise / "low" / "4").glob("*.parquet"))]
    spectra = dsire.join_shards(shards, ["shard"] * len(shards))
    return spectra.of_voters(spectra.voters[::6])


def halves(spectra: dsire.Spectra, number: int = 0) -> tuple[dsire.Spectra, dsire.Spectra]:
    train, test = list(dsire.splits(spectra.names, PROTOCOL))[number]
    return spectra.of_models(train), spectra.of_models(test)


def winners(votes: np.ndarray) -> list[Any]:
    """Counter's winner of each column of [voters, models]."""
    return [Counter(column).most_common(1)[0][0] for column in votes.T.tolist()]


def to_training_size(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    known = np.unique(sizes)
    return known[np.abs(np.asarray(values)[..., None] - known).argmin(-1)]


def nearest_votes(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.stack([KNeighborsClassifier(1).fit(a, y).predict(b) for a, b in zip(x, z, strict=True)])


def by_average(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> list[int]:
    return to_training_size(nearest_votes(x, y, z).mean(0), y).tolist()


def by_frobenius(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> list[int]:
    norms = [np.linalg.norm(side, axis=-1, keepdims=True) for side in (x, z)]
    return winners(nearest_votes(norms[0], y, norms[1]))


def by_whole_model(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> list[int]:
    whole = [np.concatenate(list(side), axis=1) for side in (x, z)]
    return KNeighborsClassifier(1).fit(whole[0], y).predict(whole[1]).tolist()


def by_ridge(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> list[int]:
    votes = []
    for a, b in zip(x, z, strict=True):
        scaler = StandardScaler().fit(a)
        votes.append(to_training_size(Ridge(alpha=1.0).fit(scaler.transform(a), y).predict(scaler.transform(b)), y))
    return winners(np.stack(votes))


def by_gda(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> list[int]:
    fitted = [LinearDiscriminantAnalysis().fit(a, y) for a in x]
    return winners(np.stack([model.predict(b) for model, b in zip(fitted, z, strict=True)]))


BY_THE_BOOK = {
    "dsire": lambda x, y, z: winners(nearest_votes(x, y, z)),
    "dsire-average": by_average,
    "frobenius": by_frobenius,
    "whole-model": by_whole_model,
    "ridge": by_ridge,
    "gda": by_gda,
}


@pytest.mark.parametrize("name", BY_THE_BOOK)
@pytest.mark.parametrize("number", [0, 1])
def test_a_predictor_is_that_of_scikit_learn(shipped: dsire.Spectra, name: str, number: int) -> None:
    train, test = halves(shipped, number)
    expected = BY_THE_BOOK[name](train.values.numpy(), train.sizes.numpy(), test.values.numpy())
    assert dsire.PREDICTORS[name](train, test).sizes.tolist() == expected


def test_log_ridge_is_ridge_with_a_penalty_from_leave_one_group_out(shipped: dsire.Spectra) -> None:
    """The hat matrix gives the left-out errors that fitting anew for every micro-dataset gives."""
    train, test = halves(shipped)
    logs = [np.log(np.concatenate(list(side.values.numpy()), axis=1)) for side in (train, test)]
    scaler = StandardScaler().fit(logs[0])
    x, z = (scaler.transform(side) / np.sqrt(logs[0].shape[1]) for side in logs)
    y = np.log(train.sizes.numpy())
    errors = {}
    for penalty in dsire.PENALTIES:
        left_out = cross_val_predict(Ridge(penalty, solver="cholesky"), x, y, groups=train.names, cv=LeaveOneGroupOut())
        errors[penalty] = np.sqrt(np.mean((y - left_out) ** 2))
    best = min(errors, key=lambda penalty: errors[penalty])
    expected = Ridge(best, solver="cholesky").fit(x, y).predict(z)
    answers, deviation = dsire.log_ridge_fit(train, test)
    np.testing.assert_allclose(answers.numpy(), expected, rtol=1e-6, atol=1e-8)
    assert deviation == pytest.approx(errors[best], rel=1e-6)

    known = np.unique(train.sizes.numpy())
    assert (
        dsire.log_ridge(train, test).sizes.tolist()
        == known[np.abs(expected[:, None] - np.log(known)).argmin(1)].tolist()
    )
    assert dsire.log_regression(train, test).sizes.tolist() == np.maximum(1, np.rint(np.exp(expected))).tolist()


def power_law(sizes: list[int], micro_datasets: int = 6) -> dsire.Spectra:
    """Spectra that are exactly n ** -0.5 times a spectrum of the voter's own."""
    n = torch.tensor(sizes * micro_datasets)
    values = torch.tensor([[3.0, 1.0], [2.0, 0.5]], dtype=torch.float64)[:, None, :] * n[None, :, None] ** -0.5
    names = [number for number in range(micro_datasets) for _ in sizes]
    voters = [dsire.Voter("layer", "B"), dsire.Voter("layer", "BA")]
    return dsire.Spectra(values, n, names, voters, {"layer": [4, 4, 2]})


def test_a_regression_names_a_size_that_was_left_out() -> None:
    spectra = power_law([1, 10, 20, 50])
    others = [model for model, size in enumerate(spectra.sizes.tolist()) if size != 10]
    asked = [model for model, size in enumerate(spectra.sizes.tolist()) if size == 10]
    train, test = spectra.of_models(others), spectra.of_models(asked)
    assert set(dsire.log_regression(train, test).sizes.tolist()) == {10}
    assert set(dsire.log_ridge(train, test).sizes.tolist()) == {20}  # log 10 is nearer to log 20 than to log 1


def test_unseen_sizes_are_those_between_two_others() -> None:
    spectra = power_law([1, 10, 20, 50])
    runs = dsire.unseen_sizes(spectra, dsire.dsire, dsire.Protocol(3, 2, 0))
    for run in runs:
        assert sorted(set(spectra.sizes[run.test].tolist())) == [10, 20]
        assert len(run.test) == 8  # four test micro-datasets
        # the nearest in n ** -0.5: 20 for 10 (0.09 and 0.68 away), and 50 for 20 (0.08) or 10 (0.09)
        assert run.prediction.sizes.tolist() == [20 if size == 10 else 50 for size in spectra.sizes[run.test].tolist()]
        assert (run.mae, run.accuracy) == (20.0, 0.0)


def test_log_ridge_with_a_single_model_or_micro_dataset_and_with_zeros() -> None:
    one = power_law([5], micro_datasets=1)
    assert dsire.log_ridge(one, one).sizes.tolist() == [5]
    alone = power_law([1, 4, 16], micro_datasets=1)
    assert dsire.log_ridge(alone, alone).sizes.tolist() == [1, 4, 16]
    untrained = dsire.replace(alone, values=torch.zeros_like(alone.values))
    assert dsire.log_ridge(alone, untrained).shares.isfinite().all()
    assert dsire.log_ridge(untrained, alone).shares.isfinite().all()


def test_by_size_and_by_layer(shipped: dsire.Spectra) -> None:
    runs = dsire.evaluate(shipped, dsire.dsire, PROTOCOL)
    for size, parts in dsire.by_size(shipped, runs).items():
        for run, part in zip(runs, parts, strict=True):
            true, said = shipped.sizes[run.test].numpy(), run.prediction.sizes.numpy()
            assert part.mae == pytest.approx(np.abs(said - true)[true == int(size)].mean())
            assert part.accuracy == pytest.approx(100 * (said == true)[true == int(size)].mean())
    hits = []
    for number in range(2):
        train, test = halves(shipped, number)
        votes = nearest_votes(train.values.numpy(), train.sizes.numpy(), test.values.numpy())
        hits.append((votes == test.sizes.numpy()).mean(1))
    np.testing.assert_allclose(dsire.by_layer(shipped, PROTOCOL).numpy(), 100 * np.mean(hits, 0))


def test_compare_and_plots(run: Run, tiny_wise: Path, tmp_path: Path) -> None:
    outcome = run(f"--dataset={tiny_wise}", "--subset=low_4", "--experiments=2", "--compare", "--plots")
    assert outcome.code == 0, outcome.err
    names = [*dsire.PREDICTORS, "dsire A", "dsire B", "dsire BA"]
    assert list(outcome.report["compare"]) == names
    rows = {name: re.search(rf"^{re.escape(name)} +\d+\.\d\d ± .*$", outcome.out, re.MULTILINE) for name in names}
    assert all(rows.values()), rows
    for name in names:
        mean, std = outcome.report["compare"][name]["mae"]
        assert f"{mean:.2f} ± {std:.2f}" in rows[name][0]  # type: ignore[index]
    assert outcome.report["by_train_size"]["15"] == outcome.report["compare"]["dsire"]
    for picture in ("confusion", "spectra", "layers", "training"):
        assert (tmp_path / "output" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_plots_without_a_folder(run: Run, tiny_wise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dsire.py", "--plots"])
    assert dsire.main() == 2


def test_log_regression_of_spectra_far_from_all_others_is_a_size() -> None:
    train = power_law([1, 4, 16])
    far = dsire.replace(train, values=1e-30 * train.values)
    assert all(1 <= size <= 2**53 for size in dsire.log_regression(train, far).sizes.tolist())


def test_plots_of_gda_and_nothing_lost_with_too_few_models(run: Run, tiny_wise: Path) -> None:
    small = [f"--dataset={tiny_wise}", "--subset=medium_4", "--experiments=1", "--predictor=gda", "--matrices=B"]
    assert run(*small, "--train_size=2", "--plots").code == 0
    assert run(*small, "--train_size=1").says("--train_size")


def test_the_paper_is_quoted_only_where_it_was_judged_alike() -> None:
    settings: dict[str, Any] = {"subset": "low_32", "matrices": ["A", "B", "BA"], "train_size": 15}
    assert dsire.paper_values(settings)["dsire"][0] == (0.36, 0.04)
    assert not dsire.paper_values({**settings, "matrices": ["B"]})
    assert not dsire.paper_values({**settings, "train_size": 5})


@pytest.mark.parametrize("device", ["meta", "nowhere", "cuda:99"])
def test_a_device_that_cannot_be_used(run: Run, device: str) -> None:
    assert run(f"--device={device}").says(f"--device={device}")

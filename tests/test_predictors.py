"""The other predictors, against plain scikit-learn and Counter; comparison and figures on the shipped subset."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, spectra_of
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import dsire

PROTOCOL = dsire.Protocol(experiments=2)


@pytest.fixture(scope="module")
def part(shipped: dsire.Spectra) -> dsire.Spectra:
    return shipped.of_voters(shipped.voters[::5])


def arrays_of(spectra: dsire.Spectra, run: dsire.Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a predictor is given: training spectra [voters, models, r], their sizes, and the spectra of test models."""
    x, y = spectra.values.numpy(), spectra.sizes.numpy()
    return x[:, run.train], y[run.train], x[:, run.test]


def winners(votes: Any) -> list[Any]:
    return [Counter(column).most_common(1)[0][0] for column in np.stack(votes).T.tolist()]


def to_known(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The nearest known number to each; of two the smaller."""
    known = np.unique(known)
    return known[np.abs(np.asarray(values)[..., None] - known).argmin(-1)]


def votes_of(model: Any, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.stack([model.fit(a, y).predict(b) for a, b in zip(x, z, strict=True)])


def norms(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1, keepdims=True)


PENALTIES = [10 ** (power / 2) for power in range(-8, 5)]
ONE_NEAREST, RIDGE = KNeighborsClassifier(1), make_pipeline(StandardScaler(), Ridge(alpha=1.0))
BY_THE_BOOK: dict[str, Callable[..., list[int]]] = {
    "dsire": lambda x, y, z: winners(votes_of(ONE_NEAREST, x, y, z)),
    "dsire-average": lambda x, y, z: to_known(votes_of(ONE_NEAREST, x, y, z).mean(0), y).tolist(),
    "frobenius": lambda x, y, z: winners(votes_of(ONE_NEAREST, norms(x), y, norms(z))),
    "whole-model": lambda x, y, z: ONE_NEAREST.fit(np.hstack([*x]), y).predict(np.hstack([*z])).tolist(),
    "ridge": lambda x, y, z: winners(to_known(votes_of(RIDGE, x, y, z), y)),
    "gda": lambda x, y, z: winners(votes_of(LinearDiscriminantAnalysis(), x, y, z)),
}


@pytest.mark.parametrize("name", BY_THE_BOOK)
def test_a_predictor_is_that_of_scikit_learn(part: dsire.Spectra, name: str) -> None:
    runs = dsire.splits(part.micro_datasets, PROTOCOL)
    for run, found in zip(runs, dsire.PREDICTORS[name](part, runs), strict=True):
        assert found.sizes.tolist() == BY_THE_BOOK[name](*arrays_of(part, run))


def left_out_ridge(x: np.ndarray, z: np.ndarray, train: dsire.Spectra) -> tuple[np.ndarray, np.ndarray]:
    """log n of new models, and of known ones fitted anew without each micro-dataset, by the penalty best for those."""
    y, tried = np.log(train.sizes.numpy()), {}
    for penalty in PENALTIES:
        ridge, folds = Ridge(penalty, solver="cholesky"), LeaveOneGroupOut()
        tried[penalty] = cross_val_predict(ridge, x, y, groups=train.micro_datasets.numpy(), cv=folds)
    best = min(tried, key=lambda penalty: float(np.mean((y - tried[penalty]) ** 2)))
    assert min(PENALTIES) < best < max(PENALTIES)
    return Ridge(best, solver="cholesky").fit(x, y).predict(z), tried[best]


def test_log_ridge_is_ridge_with_a_penalty_from_leave_one_group_out(part: dsire.Spectra) -> None:
    (run, *_) = dsire.splits(part.micro_datasets, PROTOCOL)
    train, test = part.of_models(run.train), part.of_models(run.test)
    logs = [np.log(np.hstack([*side.values.numpy()])) for side in (train, test)]
    scaler, width = StandardScaler().fit(logs[0]), np.sqrt(logs[0].shape[1])
    expected = left_out_ridge(*(scaler.transform(side) / width for side in logs), train)
    close = {"rtol": 0, "atol": 1e-6}
    for its, logs_of_n in zip(dsire.fitted_ridge(train, test), expected, strict=True):
        np.testing.assert_allclose(its.answers.log().numpy(), logs_of_n, **close)

    answers, known = expected[0], np.log(np.unique(train.sizes.numpy()))
    assert dsire.log_ridge(part, [run])[0].sizes.tolist() == np.rint(np.exp(to_known(answers, known))).tolist()
    (regression,) = dsire.log_regression(part, [run])
    assert regression.sizes.tolist() == np.maximum(1, np.rint(np.exp(answers))).tolist()
    error = np.sqrt(np.mean((np.log(train.sizes.numpy()) - expected[1]) ** 2))
    weights = np.exp(-(((answers[:, None] - known) / error) ** 2) / 2)
    np.testing.assert_allclose(regression.shares.numpy(), weights / weights.sum(1, keepdims=True), **close)


def features_of(kernel: Tensor, cross: Tensor) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(kernel.numpy())
    known = values > 1e-12 * values[-1]
    roots, vectors = np.sqrt(values[known]), vectors[:, known]
    return vectors * roots, cross.numpy() @ vectors / roots


def test_log_ridge_of_several_recipes_mixes_two_ridges(part: dsire.Spectra) -> None:
    second = part.micro_datasets % 2 == 1
    values = torch.where(second[:, None], 1.5, 1.0) * part.values
    both = dsire.replace(part, values=values, recipes=["ab"[int(number)] for number in second])
    (run,) = dsire.splits(both.micro_datasets, dsire.Protocol(experiments=1, train_size=12))
    train, test = both.of_models(run.train), both.of_models(run.test)
    x, z = dsire.log_features(train, test)
    among, between = dsire.recipe_distances(x, z, train, test)
    kernel, cross, units = x @ x.T / x.shape[1], z @ x.T / x.shape[1], train.micro_datasets
    line = left_out_ridge(*features_of(kernel, cross), train)
    local = left_out_ridge(*features_of((1 + kernel) / (1 + among / 64), (1 + cross) / (1 + between / 64)), train)
    others = torch.where(units[:, None] == units, math.inf, among)
    near = [1 / (1 + squared.min(1).values.numpy() / 25) for squared in (between, others)]
    for its, one, other, trust in zip(dsire.fitted_ridge(train, test), line, local, near, strict=True):
        expected = (1 - trust) * one + trust * other
        np.testing.assert_allclose(its.answers.log().numpy(), expected, rtol=0, atol=1e-6)


def test_what_is_below_a_millionth_of_the_largest_counts_as_that() -> None:
    """Of each voter's own, among the training models: 8e-6 in the first, 1e-9 in the second."""
    known = spectra_of(
        torch.tensor(
            [[[8.0, 1e-7], [2.0, 4e-6], [4.0, 0]], [[1e-3, 1e-4], [5e-4, 1e-8], [2e-4, 1e-12]]], dtype=torch.float64
        )
    )
    asked = spectra_of(torch.tensor([[[1e-30, 1.0]], [[100.0, 0.0]]], dtype=torch.float64))
    x, z = (side.numpy() for side in dsire.log_features(known, asked))
    floored = np.log([[8, 8e-6, 1e-3, 1e-4], [2, 8e-6, 5e-4, 1e-8], [4, 8e-6, 2e-4, 1e-9]])
    scaler = StandardScaler().fit(floored)
    np.testing.assert_allclose(x, scaler.transform(floored), atol=1e-9)
    expected = scaler.transform(np.log([[8e-6, 1, 100, 1e-9]]))
    expected[:, 1] = 0  # it does not vary among the training models
    np.testing.assert_allclose(z, expected, atol=1e-9)


def test_what_varies_by_rounding_only_says_nothing(part: dsire.Spectra) -> None:
    """As a frozen matrix, which another library's arithmetic gives another last digit; a new model may have any."""
    (run,) = dsire.splits(part.micro_datasets, dsire.Protocol(experiments=1))
    train, new = part.of_models(run.train), part.of_models(run.test)
    train.values[7] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    new.values[7] *= 10
    last_digits = 1e-15 * torch.randn(train.values.shape[1:], generator=torch.Generator().manual_seed(0))
    rounded = train.values.clone()
    rounded[7] *= 1 + last_digits.double()
    assert (rounded[7] != train.values[7]).any(0).all()
    logs = [np.log(np.hstack([*side.values.numpy()])) for side in (train, new)]
    scaler, width = StandardScaler().fit(logs[0]), np.sqrt(logs[0].shape[1])
    x, z = (scaler.transform(side) / width for side in logs)
    z[:, 7 * 4 : 8 * 4] = 0
    (expected, _) = left_out_ridge(x, z, train)
    for its in (train, dsire.replace(train, values=rounded)):
        answers = dsire.fitted_ridge(its, new)[0].answers.log().numpy()
        np.testing.assert_allclose(answers, expected, rtol=0, atol=1e-6)


def power_law(sizes: list[int], micro_datasets: int = 6) -> dsire.Spectra:
    """Spectra that are exactly n ** -0.5 times a spectrum of the voter's own."""
    n = torch.tensor(sizes * micro_datasets)
    values = torch.tensor([[3.0, 1.0], [2.0, 0.5]], dtype=torch.float64)[:, None, :] * n[None, :, None] ** -0.5
    return spectra_of(values, n.tolist(), [number for number in range(micro_datasets) for _ in sizes])


def test_a_regression_names_a_size_that_was_left_out() -> None:
    spectra = power_law([1, 10, 20, 50])
    runs = [dsire.split_by(spectra.sizes != 10)]
    assert set(dsire.log_regression(spectra, runs)[0].sizes.tolist()) == {10}
    assert set(dsire.log_ridge(spectra, runs)[0].sizes.tolist()) == {20}  # log 10 is nearer to log 20 than to log 1


@pytest.mark.parametrize("predictor", ["ridge", "gda"])
def test_a_voter_that_never_varies_in_training_says_nothing(predictor: str, part: dsire.Spectra) -> None:
    runs = dsire.splits(part.micro_datasets, PROTOCOL)[:1]
    one = part.values[:1].clone()
    one[:, runs[0].train] = 0.5
    more = dsire.replace(part, values=torch.cat([part.values, one]), voters=[*part.voters, dsire.Voter("x", "A")])
    with_it, without = (dsire.PREDICTORS[predictor](spectra, runs)[0] for spectra in (more, part))
    assert torch.equal(with_it.shares, without.shares)


def test_models_whose_size_is_not_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """In n ** -0.5, 20 is nearest to 10, 0.09 away, and 50 to 20, 0.08 away; in log it is 10, 0.7 away."""
    monkeypatch.delitem(dsire.PREDICTORS, "gda")  # which needs spectra that vary
    errors = []
    for sizes in ([1, 10, 20, 50], [10]):  # of the latter nothing is left without it
        tables, _ = dsire.compare(power_law(sizes), dsire.Protocol(3, 2, 0), {})
        (table,) = (table for table in tables if table.title == "models of a size that is not labelled")
        columns = [table.heads.index(f"{name}'s MAE") for name in ("dsire", "log-ridge", "log-regression")]
        errors.append({row[0]: [row[column] for column in columns] for row in table.rows})
    assert (errors[0]["10"], errors[0]["20"]) == ([10, 10, 0], [30, 10, 0])
    assert [*errors[1].values()] == [[None] * 3] * len(errors[1])


def test_log_ridge_with_a_single_model_or_micro_dataset_with_zeros_and_far_beyond() -> None:
    one, alone = power_law([5], micro_datasets=1), power_law([1, 4, 16], micro_datasets=1)
    zeros = dsire.replace(alone, values=torch.zeros_like(alone.values))
    assert dsire.fitted_ridge(one, one)[0].sizes.tolist() == [5]
    assert dsire.fitted_ridge(alone, alone)[0].sizes.tolist() == [1, 4, 16]
    for train, test in ((alone, zeros), (zeros, alone)):
        assert dsire.fitted_ridge(train, test)[0].shares.isfinite().all()
    train = power_law([1, 4, 16])
    for factor, size in ((1e-30, 64), (1e30, 1)):  # what is far from all others is a size all the same
        far = dsire.replace(train, values=factor * train.values)
        assert set(dsire.leave_out(train, far, dsire.log_regression)[0].sizes.tolist()) == {size}


def test_the_tables_of_a_comparison(part: dsire.Spectra) -> None:
    tables, found = dsire.compare(part, PROTOCOL, {"dsire": ((0.36, 0.04), (11.36, 1.55), (69.3, 3.83))})
    runs = dsire.splits(part.micro_datasets, PROTOCOL)
    first, growth, by_size, *_ = tables
    assert [row[0] for row in first.rows] == [*dsire.PREDICTORS, "dsire A", "dsire B", "dsire BA"] == [*found]
    for name, *cells in first.rows:
        matrix = name.removeprefix("dsire ") if name.startswith("dsire ") else ""
        spectra = part.of_matrices([matrix or "A", matrix or "B", matrix or "BA"])
        predictor = dsire.PREDICTORS[name] if not matrix else dsire.dsire
        its = dsire.judge(spectra, runs, predictor(spectra, runs))
        assert cells[:3] == [*dsire.mean_and_std(its).values()]
        assert dsire.judge(part, runs, found[name]) == its
        less = [one.mae - other.mae for one, other in zip(its, dsire.judge(part, runs, found["dsire"]), strict=True)]
        assert cells[3] == (None if name == "dsire" else f"{np.mean(less):+.3f} ± {np.std(less):.3f}")
        assert cells[-3:] == ([(0.36, 0.04), (11.36, 1.55), (69.3, 3.83)] if name == "dsire" else [None] * 3)
    for count, *cells in growth.rows:
        fewer = dsire.splits(part.micro_datasets, PROTOCOL._replace(train_size=int(count)))
        its = dsire.judge(part, fewer, dsire.dsire(part, fewer))
        assert cells == [*dsire.mean_and_std(its).values()]
    true = np.concatenate([part.sizes[run.test].numpy() for run in runs])
    said = np.concatenate([BY_THE_BOOK["dsire"](*arrays_of(part, run)) for run in runs])
    for size, mae, accuracy, *_ in by_size.rows[:-1]:
        its_errors = np.abs(said - true)[true == int(size)]
        assert (mae, accuracy) == (pytest.approx(its_errors.mean()), pytest.approx(100 * (its_errors == 0).mean()))
    assert by_size.rows[-1][:2] == ["all", pytest.approx(np.abs(said - true).mean())]


def test_a_table_is_aligned_by_what_stands_in_it() -> None:
    table = dsire.Table("a title", ["row", "MAE", "a head"], [["one", (0.5, 0.0625), None], ["second", 12, 0.1]])
    assert table.lines() == [
        "",
        "a title",
        "row             MAE  a head",
        "one     0.50 ± 0.06",
        "second           12    0.10",
    ]
    assert dsire.Table("", ["row"], [["one"]]).lines() == ["", "row", "one"]


def test_plots_of_gda_and_nothing_lost_with_too_few_models(run: Run, tiny_wise: Path) -> None:
    small = [f"--dataset={tiny_wise}", "--subset=medium_4", "--experiments=1", "--predictor=gda", "--matrices=B"]
    assert run(*small, "--train_size=2", "--plots").code == 0
    assert run(*small, "--train_size=1").says("--train_size")
    recipes = [f"--dataset={tiny_wise}", "--subset=recipes_4", "--experiments=1", "--predictor=gda", "--matrices=B"]
    # one micro-dataset is enough, under seven recipes, though nothing can be left out then
    outcome = run(*recipes, "--train_size=1", "--plots", "--compare")
    assert outcome.code == 0
    by_recipe = [table for table in outcome.report["tables"] if table["heads"][0] == "recipe"]
    assert [row[1] for table in by_recipe for row in table["rows"]] == [None] * 3 * 8

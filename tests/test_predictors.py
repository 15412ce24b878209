"""The other predictors, against plain scikit-learn and Counter; comparison and figures on the shipped subset."""

from __future__ import annotations

import math
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
from torch import Tensor

import dsire

PROTOCOL = dsire.Protocol(experiments=2)


@pytest.fixture(scope="module")
def part(shipped: dsire.Spectra) -> dsire.Spectra:
    """A fifth of the shipped subset's voters, so that a plain classifier for each is quick."""
    return shipped.of_voters(shipped.voters[::5])


def arrays_of(spectra: dsire.Spectra, run: dsire.Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a predictor is given: training spectra [voters, models, r], their sizes, and the spectra of test models."""
    x, y = spectra.values.numpy(), spectra.sizes.numpy()
    return x[:, run.train], y[run.train], x[:, run.test]


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
def test_a_predictor_is_that_of_scikit_learn(part: dsire.Spectra, name: str) -> None:
    runs = dsire.splits(part.micro_datasets, PROTOCOL)
    for run, found in zip(runs, dsire.PREDICTORS[name](part, runs), strict=True):
        assert found.sizes.tolist() == BY_THE_BOOK[name](*arrays_of(part, run))


def test_log_ridge_is_ridge_with_a_penalty_from_leave_one_group_out(part: dsire.Spectra) -> None:
    """The closed forms give what fitting anew without every micro-dataset gives."""
    (run, *_) = dsire.splits(part.micro_datasets, PROTOCOL)
    train, test = part.of_models(run.train), part.of_models(run.test)
    logs = [np.log(np.concatenate(list(side.values.numpy()), axis=1)) for side in (train, test)]
    scaler = StandardScaler().fit(logs[0])
    x, z = (scaler.transform(side) / np.sqrt(logs[0].shape[1]) for side in logs)
    y, groups = np.log(train.sizes.numpy()), train.micro_datasets.numpy()
    left_out = {}
    for penalty in dsire.PENALTIES:
        ridge = Ridge(penalty, solver="cholesky")
        left_out[penalty] = cross_val_predict(ridge, x, y, groups=groups, cv=LeaveOneGroupOut())
    errors = {penalty: np.sqrt(np.mean((y - held_out) ** 2)) for penalty, held_out in left_out.items()}
    best = min(errors, key=lambda penalty: errors[penalty])
    assert min(dsire.PENALTIES) < best < max(dsire.PENALTIES)
    expected = Ridge(best, solver="cholesky").fit(x, y).predict(z)
    close = {"rtol": 0, "atol": 1e-6}
    for its, logs_of_n in zip(dsire.fitted_ridge(train, test), (expected, left_out[best]), strict=True):
        assert its.answers is not None
        np.testing.assert_allclose(its.answers.log().numpy(), logs_of_n, **close)

    known = np.unique(train.sizes.numpy())
    nearest = known[np.abs(expected[:, None] - np.log(known)).argmin(1)]
    assert dsire.log_ridge(part, [run])[0].sizes.tolist() == nearest.tolist()
    (regression,) = dsire.log_regression(part, [run])
    assert regression.sizes.tolist() == np.maximum(1, np.rint(np.exp(expected))).tolist()
    widths = (expected[:, None] - np.log(known)) / errors[best]
    weights = np.exp(-(widths**2) / 2) / np.exp(-(widths**2) / 2).sum(1, keepdims=True)
    np.testing.assert_allclose(regression.shares.numpy(), weights, **close)


def two_recipes(part: dsire.Spectra) -> dsire.Spectra:
    """Half of the micro-datasets as if their recipe made them larger."""
    second = part.micro_datasets % 2 == 1
    values = torch.where(second[:, None], 1.5, 1.0) * part.values
    return dsire.replace(part, values=values, recipes=["ab"[int(number)] for number in second])


def ridge_by_its_equations(
    kernel: Tensor, cross: Tensor, y: Tensor, units: Tensor, penalty: float
) -> tuple[Tensor, Tensor]:
    """A ridge with an intercept: what is said of new models, and of known ones, fitted anew without each one's unit."""

    def fitted_on(rest: Tensor, side: Tensor) -> Tensor:
        border = torch.ones(len(rest), 1, dtype=torch.float64)
        ridge = kernel[rest][:, rest] + penalty * torch.eye(len(rest), dtype=torch.float64)
        system = torch.cat([torch.cat([ridge, border], 1), torch.cat([border.T, torch.zeros(1, 1)], 1)])
        *weights, intercept = torch.linalg.solve(system, torch.cat([y[rest], torch.zeros(1)]))
        return side[:, rest] @ torch.stack(weights) + intercept

    held_out, every = torch.zeros_like(y), torch.arange(len(y))
    for unit in units.unique():
        held_out[units == unit] = fitted_on(every[units != unit], kernel[units == unit])
    return fitted_on(every, cross), held_out


def test_log_ridge_of_several_recipes_mixes_two_ridges_fitted_anew_without_each_micro_dataset(
    part: dsire.Spectra,
) -> None:
    both = two_recipes(part)
    (run,) = dsire.splits(both.micro_datasets, dsire.Protocol(experiments=1, train_size=12))
    train, test = both.of_models(run.train), both.of_models(run.test)
    x, z = dsire.log_features(train, test)
    among, between = dsire.recipe_distances(x, z, train, test)
    kernel, cross, y, units = (
        x @ x.T / x.shape[1],
        z @ x.T / x.shape[1],
        train.sizes.double().log(),
        train.micro_datasets,
    )
    line, local = (
        min(
            (ridge_by_its_equations(*kernels, y, units, penalty) for penalty in dsire.PENALTIES),
            key=lambda its: float((its[1] - y).square().mean()),
        )
        for kernels in ((kernel, cross), ((1 + kernel) / (1 + among / 64), (1 + cross) / (1 + between / 64)))
    )
    others = torch.where(units[:, None] == units, math.inf, among)
    near = [1 / (1 + squared.min(1).values / 25) for squared in (between, others)]
    for its, one, other, trust in zip(dsire.fitted_ridge(train, test), line, local, near, strict=True):
        assert its.answers is not None
        torch.testing.assert_close(its.answers.log(), (1 - trust) * one + trust * other, rtol=0, atol=1e-6)


def of_values(values: list[list[list[float]]]) -> dsire.Spectra:
    """Spectra [voters, models, r] of which nothing else matters."""
    models = len(values[0])
    voters = [dsire.Voter(str(row), "A") for row in range(len(values))]
    return dsire.Spectra(torch.tensor(values, dtype=torch.float64), torch.ones(models), list(range(models)), voters, {})


def test_what_is_below_a_millionth_of_the_largest_counts_as_that() -> None:
    """Of each voter's own, among the training models: 8e-6 in the first, 1e-9 in the second."""
    known = of_values([[[8.0, 1e-7], [2.0, 4e-6], [4.0, 0]], [[1e-3, 1e-4], [5e-4, 1e-8], [2e-4, 1e-12]]])
    asked = of_values([[[1e-30, 1.0]], [[100.0, 0.0]]])
    x, z = (side.numpy() for side in dsire.log_features(known, asked))
    floored = np.log([[8, 8e-6, 1e-3, 1e-4], [2, 8e-6, 5e-4, 1e-8], [4, 8e-6, 2e-4, 1e-9]])
    scaler = StandardScaler().fit(floored)
    np.testing.assert_allclose(x, scaler.transform(floored), atol=1e-9)
    expected = scaler.transform(np.log([[8e-6, 1, 100, 1e-9]]))
    expected[:, 1] = 0  # it does not vary among the training models
    np.testing.assert_allclose(z, expected, atol=1e-9)


def test_a_feature_that_varies_by_rounding_only_says_nothing() -> None:
    known, asked = of_values([[[3.0, 2.0], [3.0 + 4e-15, 1.0], [3.0 - 4e-15, 0.5]]]), of_values([[[1.0, 1.0]]])
    x, z = dsire.log_features(known, asked)
    assert (x[:, 0].abs() <= 1e-5).all()
    assert z[0, 0] == 0
    assert z[0, 1] == pytest.approx(0, abs=1e-9)  # the mean of log 2, log 1 and log 1/2


def power_law(sizes: list[int], micro_datasets: int = 6) -> dsire.Spectra:
    """Spectra that are exactly n ** -0.5 times a spectrum of the voter's own."""
    n = torch.tensor(sizes * micro_datasets)
    values = torch.tensor([[3.0, 1.0], [2.0, 0.5]], dtype=torch.float64)[:, None, :] * n[None, :, None] ** -0.5
    names = [number for number in range(micro_datasets) for _ in sizes]
    voters = [dsire.Voter("layer", "B"), dsire.Voter("layer", "BA")]
    return dsire.Spectra(values, n, names, voters, {"layer": [4, 4, 2]})


def test_a_regression_names_a_size_that_was_left_out() -> None:
    spectra = power_law([1, 10, 20, 50])
    runs = [dsire.split_by(spectra.sizes != 10)]
    assert set(dsire.log_regression(spectra, runs)[0].sizes.tolist()) == {10}
    assert set(dsire.log_ridge(spectra, runs)[0].sizes.tolist()) == {20}  # log 10 is nearer to log 20 than to log 1


def test_models_whose_size_is_not_labelled() -> None:
    """In n ** -0.5, 20 is nearest to 10, 0.09 away, and 50 to 20, 0.08 away; in log it is 10, 0.7 away."""
    spectra = power_law([1, 10, 20, 50])
    for run in dsire.splits(spectra.micro_datasets, dsire.Protocol(3, 2, 0)):
        found = dsire.if_unlabelled(spectra, run)
        errors = {size: found[spectra.sizes[run.test] == size, :3].unique(dim=0).tolist() for size in (10, 20)}
        assert errors == {10: [[10, 10, 0]], 20: [[30, 10, 0]]}


def test_sizes_that_cannot_be_left_out() -> None:
    """All models to train on are of one size: what is left of others can't be told by them."""
    spectra = power_law([1, 10, 50], micro_datasets=2)
    alone = dsire.if_unlabelled(spectra, dsire.Split(torch.tensor([1, 4]), torch.tensor([0, 1, 3, 4])))
    assert alone.isnan().all()


def log_ridge_of(train: dsire.Spectra, test: dsire.Spectra) -> dsire.Prediction:
    return dsire.fitted_ridge(train, test)[0]


def test_log_ridge_with_a_single_model_or_micro_dataset_and_with_zeros() -> None:
    one = power_law([5], micro_datasets=1)
    assert log_ridge_of(one, one).sizes.tolist() == [5]
    alone = power_law([1, 4, 16], micro_datasets=1)
    assert log_ridge_of(alone, alone).sizes.tolist() == [1, 4, 16]
    untrained = dsire.replace(alone, values=torch.zeros_like(alone.values))
    assert log_ridge_of(alone, untrained).shares.isfinite().all()
    assert log_ridge_of(untrained, alone).shares.isfinite().all()


def test_the_tables_of_a_comparison(part: dsire.Spectra) -> None:
    """Each row is that of the predictor alone, on its own splits; by size, that of scikit-learn."""
    tables, found = dsire.compare(part, PROTOCOL, {"dsire": ((0.36, 0.04), (11.36, 1.55), (69.3, 3.83))})
    runs = dsire.splits(part.micro_datasets, PROTOCOL)
    first, growth, by_size, *_ = tables
    assert [row[0] for row in first.rows] == [*dsire.PREDICTORS, "dsire A", "dsire B", "dsire BA"] == [*found]
    for name, *cells in first.rows:
        matrix = name.removeprefix("dsire ") if name.startswith("dsire ") else ""
        spectra = part.of_matrices([matrix or "A", matrix or "B", matrix or "BA"])
        its = dsire.evaluate(spectra, dsire.PREDICTORS[name] if not matrix else dsire.dsire, PROTOCOL)
        assert cells[:3] == [*dsire.mean_and_std(its).values()]
        assert dsire.judge(part, runs, found[name]) == its
        assert cells[-3:] == ([(0.36, 0.04), (11.36, 1.55), (69.3, 3.83)] if name == "dsire" else [None] * 3)
    for count, *cells in growth.rows:
        its = dsire.evaluate(part, dsire.dsire, PROTOCOL._replace(train_size=int(count)))
        assert cells == [*dsire.mean_and_std(its).values()]
    true = np.concatenate([part.sizes[run.test].numpy() for run in runs])
    said = np.concatenate([winners(nearest_votes(*arrays_of(part, run))) for run in runs])
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


def test_compare_and_plots(run: Run, tiny_wise: Path, tmp_path: Path) -> None:
    outcome = run(f"--dataset={tiny_wise}", "--subset=low_4", "--experiments=2", "--compare", "--plots")
    assert outcome.code == 0, outcome.err
    names = [*dsire.PREDICTORS, "dsire A", "dsire B", "dsire BA"]
    first, growth, *_ = outcome.report["tables"]
    assert [row[0] for row in first["rows"]] == names
    for name, (mean, std), *_ in first["rows"]:
        assert re.search(rf"^{re.escape(name)} +{mean:.2f} ± {std:.2f} ", outcome.out, re.MULTILINE), name
    assert growth["rows"][-1][1:] == first["rows"][0][1:4]
    assert len(outcome.predictions.splitlines()) == 1 + len(names) * 2 * 25 * 6
    for picture in ("confusion", "spectra", "training"):
        assert (tmp_path / "output" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_plots_without_a_folder(run: Run, tiny_wise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dsire.py", "--plots"])
    assert dsire.main() == 2


def test_log_regression_of_spectra_far_from_all_others_is_a_size() -> None:
    """Up to four times beyond those that were labelled."""
    train = power_law([1, 4, 16])
    for factor, size in ((1e-30, 64), (1e30, 1)):
        far = dsire.replace(train, values=factor * train.values)
        assert set(dsire.leave_out(train, far, dsire.log_regression)[0].sizes.tolist()) == {size}


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


def test_the_paper_stands_beside_ours_where_it_has_the_row() -> None:
    rows = {"dsire": [dsire.Metrics(0.5, 12, 60)] * 2, "ridge": [dsire.Metrics(0.75, 12, 60)] * 2}
    (_, *dsire_cells), (_, *ridge_cells) = dsire.metrics_table("", rows, {"dsire": ((0.36, 0.04),) * 3}, True).rows
    assert dsire_cells == [(0.5, 0), (12, 0), (60, 0), None, *[(0.36, 0.04)] * 3]
    assert ridge_cells == [(0.75, 0), (12, 0), (60, 0), "+0.250 ± 0.000", None, None, None]
    assert dsire.metrics_table("", rows, {"gda": ((0.36, 0.04),) * 3}, False).heads[1:] == [
        "MAE",
        "MAPE %",
        "accuracy %",
    ]


@pytest.mark.parametrize("device", ["meta", "nowhere", "cuda:99"])
def test_a_device_that_cannot_be_used(run: Run, device: str) -> None:
    assert run(f"--device={device}").says(f"--device={device}")

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
    ridge = Ridge(best, solver="cholesky")
    expected = ridge.fit(x, y).predict(z)
    turns = [ridge.fit(x[groups != group], y[groups != group]).predict(z) for group in range(train.count)]
    fit = dsire.LogRidge.fit(train, test)
    close = {"rtol": 0, "atol": 1e-6}
    np.testing.assert_allclose(fit.answers.numpy(), expected, **close)
    np.testing.assert_allclose(fit.held_out.numpy(), left_out[best], **close)
    np.testing.assert_allclose(fit.turns.numpy(), np.stack(turns, axis=1), **close)
    assert fit.deviation == pytest.approx(errors[best], rel=1e-6)

    known = np.unique(train.sizes.numpy())
    nearest = known[np.abs(expected[:, None] - np.log(known)).argmin(1)]
    assert dsire.log_ridge(part, [run])[0].sizes.tolist() == nearest.tolist()
    (regression,) = dsire.log_regression(part, [run])
    assert regression.sizes.tolist() == np.maximum(1, np.rint(np.exp(expected))).tolist()
    widths = (expected[:, None] - np.log(known)) / errors[best]
    weights = np.exp(-(widths**2) / 2) / np.exp(-(widths**2) / 2).sum(1, keepdims=True)
    np.testing.assert_allclose(regression.shares.numpy(), weights, **close)


def test_log_ridge_of_several_recipes_is_fitted_anew_without_each_micro_dataset(part: dsire.Spectra) -> None:
    """Of both kernels, by the equations of a ridge with an intercept, solved for the models that are left; and mixed by
    the distance from the nearest of those."""
    second = part.micro_datasets % 2 == 1  # as if their recipe made them larger
    values = torch.where(second[:, None], 1.5, 1.0) * part.values
    both = dsire.replace(part, values=values, recipes=["ab"[int(number)] for number in second])
    (run,) = dsire.splits(both.micro_datasets, dsire.Protocol(experiments=1, train_size=12))
    train, test = both.of_models(run.train), both.of_models(run.test)
    x, z = dsire.log_features(train, test)
    among, between = dsire.recipe_distances(x, z, train, test)
    y, every = train.sizes.double().log(), torch.arange(len(train.names))
    folds = [train.micro_datasets == number for number in range(train.count)]

    def fitted_anew(kernel: Tensor, cross: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is said of test models; of training models that are left out; of test models at each turn."""

        def fitted_on(rest: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
            border = torch.ones(len(rest), 1, dtype=torch.float64)
            ridge = kernel[rest][:, rest] + penalty * torch.eye(len(rest), dtype=torch.float64)
            system = torch.cat([torch.cat([ridge, border], 1), torch.cat([border.T, torch.zeros(1, 1)], 1)])
            *weights, intercept = torch.linalg.solve(system, torch.cat([y[rest], torch.zeros(1)]))
            known, new = (side[:, rest] @ torch.stack(weights) + intercept for side in (kernel, cross))
            return known, new

        turns, held_out = {}, {}
        for penalty in dsire.PENALTIES:
            held_out[penalty], turns[penalty] = torch.zeros_like(y), []
            for out in folds:
                known, new = fitted_on(every[~out], penalty)
                held_out[penalty][out] = known[out]
                turns[penalty].append(new)
        best = min(dsire.PENALTIES, key=lambda penalty: float((held_out[penalty] - y).square().mean()))
        return fitted_on(every, best)[1], held_out[best], torch.stack(turns[best], dim=1)

    kernel, cross = x @ x.T / x.shape[1], z @ x.T / x.shape[1]
    line = fitted_anew(kernel, cross)
    local = fitted_anew((1 + kernel) / (1 + among / 64), (1 + cross) / (1 + between / 64))
    nearest = [between.min(1).values, torch.zeros_like(y), torch.zeros_like(line[2])]
    for number, out in enumerate(folds):
        nearest[1][out] = torch.stack([among[model, ~out].min() for model in every[out]])
        nearest[2][:, number] = between[:, ~out].min(1).values
    expected = [(25 * one + d * other) / (25 + d) for one, other, d in zip(local, line, nearest, strict=True)]
    fit = dsire.LogRidge.fit(train, test)
    assert nearest[0].max() > 4  # both count
    for its, what in zip((fit.answers, fit.held_out, fit.turns), expected, strict=True):
        torch.testing.assert_close(its, what, rtol=0, atol=1e-6)


def test_recipe_distances_are_those_of_four_numbers(part: dsire.Spectra) -> None:
    """By the book: the mean log norms of A and B, and scikit-learn's components of the groups' means."""
    from sklearn.decomposition import PCA

    both = dsire.replace(part, recipes=["ab"[int(number) % 2] for number in part.micro_datasets])
    x, z = dsire.log_features(both, both)
    groups = [(recipe, size) for recipe, size in zip(both.recipes, both.sizes.tolist(), strict=True)]
    members = {group: [model for model, its in enumerate(groups) if its == group] for group in groups}
    means = np.stack([x[its].mean(0).numpy() for its in members.values()])
    norms = both.values.norm(dim=-1).log()
    kinds = [norms[[voter.matrix == matrix for voter in both.voters]].mean(0).numpy() for matrix in "AB"]
    places = np.column_stack([PCA(2).fit(means).transform(x.numpy()), *kinds])
    within = np.concatenate([places[its] - places[its].mean(0) for its in members.values()])
    deviations = places.std(0, ddof=1)
    before = np.cov((places / deviations).T) / 25
    scaled = within / deviations
    covariance = (scaled.T @ scaled + 4 * before) / (len(places) - len(members) + 4)
    apart = (places[:5, None] - places[None]) / deviations
    expected = np.einsum("nmi,ij,nmj->nm", apart, np.linalg.inv(covariance), apart)
    found, _ = dsire.recipe_distances(x, z, both, both)
    np.testing.assert_allclose(found[:5].numpy(), expected, rtol=1e-3, atol=1e-9)


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


def test_unseen_sizes_are_those_between_two_others() -> None:
    spectra = power_law([1, 10, 20, 50])
    runs = dsire.splits(spectra.micro_datasets, dsire.Protocol(3, 2, 0))
    for run in runs:
        gaps = dsire.without_sizes(spectra, run)
        assert list(gaps) == [1, 10, 20, 50]
        for size, gap in gaps.items():
            assert set(spectra.sizes[gap.test].tolist()) == {size}
            assert size not in spectra.sizes[gap.train].tolist()
            assert (len(gap.train), len(gap.test)) == (2 * 3, 4)  # four test micro-datasets
    # the nearest in n ** -0.5: 20 for 10 (0.09 and 0.68 away), and 50 for 20 (0.08) or 10 (0.09)
    assert dsire.unseen_sizes(spectra, runs)["dsire"] == [(20, 125, 0)] * 3  # errors 10 of 10 and 30 of 20


def test_sizes_that_cannot_be_left_out() -> None:
    """Of three sizes one is trained on alone, and another one is not asked for."""
    spectra = power_law([1, 10, 50], micro_datasets=2)
    run = dsire.Split(torch.tensor([1, 4]), torch.tensor([0, 1, 3, 4]))
    assert [(size, gap.test.tolist()) for size, gap in dsire.without_sizes(spectra, run).items()] == [(1, [0, 3])]
    assert dsire.unseen_sizes(spectra, [run]) == {}


def log_ridge_of(train: dsire.Spectra, test: dsire.Spectra) -> dsire.Prediction:
    both, split = dsire.beside(train, test)
    return dsire.log_ridge(both, [split])[0]


def test_log_ridge_with_a_single_model_or_micro_dataset_and_with_zeros() -> None:
    one = power_law([5], micro_datasets=1)
    assert log_ridge_of(one, one).sizes.tolist() == [5]
    alone = power_law([1, 4, 16], micro_datasets=1)
    assert log_ridge_of(alone, alone).sizes.tolist() == [1, 4, 16]
    untrained = dsire.replace(alone, values=torch.zeros_like(alone.values))
    assert log_ridge_of(alone, untrained).shares.isfinite().all()
    assert log_ridge_of(untrained, alone).shares.isfinite().all()


def test_the_tables_of_a_comparison(part: dsire.Spectra) -> None:
    """By size and by voter, those of scikit-learn; each row that of the predictor alone, on its own splits."""
    found = dsire.compare(part, PROTOCOL)
    runs = dsire.splits(part.micro_datasets, PROTOCOL)
    arrays = [arrays_of(part, run) for run in runs]
    votes = [nearest_votes(*its) for its in arrays]
    sizes = [part.sizes[run.test].numpy() for run in runs]
    for size, parts in found.tables["by_size"].items():
        for its_votes, true, its in zip(votes, sizes, parts, strict=True):
            asked = true == int(size)
            said = np.array(winners(its_votes))[asked]
            assert its.mae == pytest.approx(np.abs(said - int(size)).mean())
            assert its.accuracy == pytest.approx(100 * (said == int(size)).mean())
    hits = [(its_votes == true).mean(1) for its_votes, true in zip(votes, sizes, strict=True)]
    np.testing.assert_allclose(found.accuracies.numpy(), 100 * np.mean(hits, 0))
    for name, predictor in dsire.PREDICTORS.items():
        assert found.tables["compare"][name] == dsire.evaluate(part, predictor, PROTOCOL)
    for matrix in dsire.MATRICES:
        alone = dsire.evaluate(part.of_matrices([matrix]), dsire.dsire, PROTOCOL)
        assert found.tables["compare"][f"dsire {matrix}"] == alone
    for count, its in found.tables["by_train_size"].items():
        assert its == dsire.evaluate(part, dsire.dsire, PROTOCOL._replace(train_size=int(count)))


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
    """Up to four times beyond those that were labelled."""
    train = power_law([1, 4, 16])
    for factor, size in ((1e-30, 64), (1e30, 1)):
        far = dsire.replace(train, values=factor * train.values)
        both, split = dsire.beside(train, far)
        assert set(dsire.log_regression(both, [split])[0].sizes.tolist()) == {size}


def test_plots_of_gda_and_nothing_lost_with_too_few_models(run: Run, tiny_wise: Path) -> None:
    small = [f"--dataset={tiny_wise}", "--subset=medium_4", "--experiments=1", "--predictor=gda", "--matrices=B"]
    assert run(*small, "--train_size=2", "--plots").code == 0
    assert run(*small, "--train_size=1").says("--train_size")
    recipes = [f"--dataset={tiny_wise}", "--subset=recipes_4", "--experiments=1", "--predictor=gda", "--matrices=B"]
    # one micro-dataset is enough, under seven recipes, though nothing can be left out then
    outcome = run(*recipes, "--train_size=1", "--plots", "--compare")
    assert outcome.code == 0
    assert outcome.report["by_recipe"]["seen"] == [[None] * 4] * 7


def test_the_paper_is_quoted_only_where_it_was_judged_alike() -> None:
    settings: dict[str, Any] = {"subset": "low_32", "matrices": ["A", "B", "BA"], "train_size": 15}
    assert dsire.paper_values(settings)["dsire"][0] == (0.36, 0.04)
    assert not dsire.paper_values({**settings, "matrices": ["B"]})
    assert not dsire.paper_values({**settings, "train_size": 5})


@pytest.mark.parametrize("device", ["meta", "nowhere", "cuda:99"])
def test_a_device_that_cannot_be_used(run: Run, device: str) -> None:
    assert run(f"--device={device}").says(f"--device={device}")

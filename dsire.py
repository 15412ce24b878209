#!/usr/bin/env python3
"""DSiRe: how many images was a LoRA trained on? Dataset size recovery from LoRA weights (arXiv:2406.19395).

    python dsire.py                                 # the subset that ships with the script, offline
    python dsire.py --subset=low_32 --rank=32       # a subset of LoRA-WiSE, from the Hugging Face Hub

The script reads from top to bottom as the paper does: a LoRA layer and its spectra, the voters, the vote, the
protocol, where the weights come from, the report, the command line.
"""

from __future__ import annotations

import argparse
import csv
import gc
import hashlib
import io
import json
import math
import os
import queue
import random
import re
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

LORA_WISE = "MoSalama98/LoRA-WiSE"
SHIPPED = Path(__file__).resolve().parent / "tests" / "tiny_wise"
SHIPPED_SUBSET = "low_4"
MATRICES = ("A", "B", "BA")
CACHE_FORMAT = 1  # part of every cache key: spectra that were written in another form are computed anew
BLOCK = 2**18  # distances held at once by the nearest-neighbour search: 2 MiB, which stay in the cache
VOTERS_AT_ONCE = 16  # whose spectra the search centres at once

# MAE, MAPE in % and accuracy in %, mean and standard deviation over ten experiments: the paper's Tables 2 to 5 and 9.
PAPER: dict[str, dict[str, tuple[tuple[float, float], ...]]] = {
    "low_32": {
        "dsire": ((0.36, 0.04), (11.36, 1.55), (69.30, 3.83)),
        "frobenius": ((0.43, 0.04), (15.14, 2.12), (65.29, 2.42)),
    },
    "low_16": {"dsire": ((0.42, 0.03), (12.4, 1.11), (67.7, 2.3))},
    "low_8": {"dsire": ((0.43, 0.04), (14.8, 2.3), (66.0, 3.08))},
    "medium_32": {
        "dsire": ((1.48, 0.21), (3.97, 0.73), (86.10, 1.99)),
        "dsire-average": ((3.57, 0.36), (19.05, 3.37), (64.62, 3.58)),
        "frobenius": ((1.56, 0.19), (4.16, 0.75), (85.33, 1.81)),
        "whole-model": ((7.33, 0.75), (33.37, 7.71), (48.61, 3.53)),
        "ridge": ((8.05, 0.08), (38.95, 6.24), (37.09, 0.63)),
        "gda": ((2.89, 0.48), (7.87, 1.30), (74.14, 3.65)),
        "dsire A": ((1.90, 0.29), (5.63, 1.26), (82.52, 2.20)),
        "dsire B": ((1.57, 0.19), (4.07, 0.65), (84.90, 2.09)),
        "dsire BA": ((1.61, 0.16), (4.22, 0.47), (85.00, 1.45)),
    },
    "medium_16": {"dsire": ((1.67, 0.17), (4.32, 0.46), (84.04, 1.85))},
    "medium_32_2": {
        "dsire": ((2.51, 0.22), (7.46, 0.95), (77.43, 1.70)),
        "frobenius": ((2.95, 0.28), (11.99, 3.93), (73.90, 2.21)),
    },
    "high_32": {
        "dsire": ((41.77, 6.61), (5.96, 1.46), (91.90, 1.28)),
        "frobenius": ((68.62, 5.53), (9.25, 1.21), (86.51, 1.12)),
    },
}


class DsireError(Exception):
    """Something the user can mend; the message is one line that says what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# A LoRA layer and its spectra (Section 3.1)


def lora_spectra(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular values of A, B and BA, largest first, for a batch of LoRA layers of one shape.

    Nothing larger than r x r is decomposed, and the out x in product is never formed: with the Gram matrices G = A Aᵀ
    and H = Bᵀ B, and G = L Lᵀ (Cholesky), the squares of the singular values are the eigenvalues of G, H and Lᵀ H L.
    Squares lose half of the digits where singular values lie far apart: such a model goes by way of `qr_spectra`.

    Args:
        a: A, "down", [..., r, in], float64.
        b: B, "up", [..., out, r], float64.

    Returns:
        Three tensors [..., r] in float64. Where a dimension is smaller than r the missing values are zeros.

    Raises:
        FloatingPointError: a weight is not finite, or so large that the product overflows.
    """
    g, h = gram(a), gram(b.mT)
    lower, failed = torch.linalg.cholesky_ex(g)
    grams = torch.stack([g, h, lower.mT @ h @ lower])
    if not grams.diagonal(dim1=-2, dim2=-1).sum().isfinite():
        return qr_spectra(a, b)
    squares = torch.linalg.eigvalsh(grams).flip(-1)
    # rounding is about 1e-16 of |G|, of |H| and of |G| |H|: the least and the largest have to stand far above that
    of_g, of_h, _ = squares[..., 0]
    scale = torch.stack([of_g, of_h, of_g * of_h])
    apart = (squares[..., -1] > 0) & (squares[..., 0] * squares[..., -1] > 1e-8 * scale.square())
    exact = (failed == 0) & (apart & (scale > 1e-100)).all(0)
    spectra = squares.clamp_min(0).sqrt()
    if not exact.all():
        spectra[:, ~exact] = torch.stack(qr_spectra(a[~exact], b[~exact]))
    return spectra[0], spectra[1], spectra[2]


def gram(x: Tensor) -> Tensor:
    """X Xᵀ, [..., r, r], of X [..., r, n]."""
    if x.device.type == "cpu":
        rows = x.numpy()
        with np.errstate(all="ignore"):  # the caller looks for what is not finite
            return torch.from_numpy(rows @ rows.swapaxes(-1, -2))  # NumPy sees the symmetry: twice as fast as torch
    return x @ x.mT


def qr_spectra(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `lora_spectra` gives, for any matrices: with Aᵀ = Q R and B = P S (thin QR), BA = P (S Rᵀ) Qᵀ.

    So A has the singular values of R, B those of S, and BA those of S Rᵀ.
    """
    rank = a.shape[-2]
    r = torch.linalg.qr(a.mT, mode="r").R
    s = torch.linalg.qr(b, mode="r").R
    core = s @ r.mT
    if not (r.isfinite().all() and core.isfinite().all()):  # LAPACK's SVD may not return from a NaN
        raise FloatingPointError("weights that are not finite")
    spectra = (torch.linalg.svdvals(matrix) for matrix in (r, s, core))
    padded = [torch.nn.functional.pad(values, (0, rank - values.shape[-1])) for values in spectra]
    return padded[0], padded[1], padded[2]


def batch_spectra(a: Tensor, b: Tensor, device: str) -> Tensor:
    """lora_spectra of a batch on a device, [3, models, r] on the CPU; the batch is halved while the memory is short.

    Raises:
        DsireError: the device can't hold a single model's layer.
    """
    try:
        return torch.stack(lora_spectra(a.to(device), b.to(device))).cpu()
    except torch.cuda.OutOfMemoryError as error:
        if len(a) == 1:
            raise DsireError(f"{device} has no memory left for a single layer: use --device=cpu") from error
    half = len(a) // 2
    return torch.cat([batch_spectra(a[:half], b[:half], device), batch_spectra(a[half:], b[half:], device)], dim=1)


class Voter(NamedTuple):
    """One classifier of the vote: a layer's name and the matrix it looks at, "A", "B" or "BA"."""

    layer: str
    matrix: str


@dataclass(frozen=True)
class Spectra:
    """The spectra of some models, with what is known of the models.

    Attributes:
        values: [voters, models, r], float64; a layer of a lower rank than r has zeros at its end.
        sizes: n, the number of training images, of each model: int64 [models]; 0 if it is not known.
        names: the micro-dataset of each model, strings or integers.
        voters: what each row of `values` is.
        shapes: layer -> [out, in, rank].
        notes: what was left out or is unusual, to be said in the report.
    """

    values: Tensor
    sizes: Tensor
    names: list[Any]
    voters: list[Voter]
    shapes: dict[str, list[int]]
    notes: list[str] = field(default_factory=list)

    def of_models(self, models: list[int]) -> Spectra:
        return replace(
            self, values=self.values[:, models], sizes=self.sizes[models], names=[self.names[model] for model in models]
        )

    def of_matrices(self, matrices: Iterable[str]) -> Spectra:
        return self.of_voters([voter for voter in self.voters if voter.matrix in matrices])

    def of_voters(self, voters: list[Voter]) -> Spectra:
        if voters == self.voters:
            return self
        rows = {voter: row for row, voter in enumerate(self.voters)}
        return replace(self, values=self.values[[rows[voter] for voter in voters]], voters=voters)

    def micro_datasets(self) -> list[Any]:
        return sorted(set(self.names))


# ---------------------------------------------------------------------------------------------------------------------
# The voters and the vote (Section 3.2)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Columns are computed in parallel, so each may use one thread only: torch's and NumPy's would get in their way."""
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def in_parallel(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """What the function gives for each item, computed on all cores, each call with one thread."""
    with one_thread_each(), ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [pool.submit(function, item) for item in items]
        try:
            return [run.result() for run in runs]
        finally:
            pool.shutdown(cancel_futures=True)


def nearest(train: Tensor, test: Tensor, choices: list[Tensor] | None = None) -> list[Tensor]:
    """For each voter and test model, the index of the nearest training model (Euclidean; the first one of equals).

    Args:
        train: [voters, training models, r].
        test: [voters, test models, r].
        choices: the training models to choose from, several times over: int64 indices in rising order. By default all
            of them, once. Distances are computed once for all choices.

    Returns:
        For each choice int64 [voters, test models]. Memory beyond that is bounded, for each core, by BLOCK distances
        and the spectra of VOTERS_AT_ONCE voters.
    """
    voters, models, queries = len(train), train.shape[1], test.shape[1]
    choices = [torch.arange(models)] if choices is None else choices
    columns = [choice.to(train.device) for choice in choices]
    found = np.empty((len(choices), voters, queries), dtype=np.int64)
    rows = max(1, min(queries, BLOCK // models))
    group = max(1, BLOCK // (models * rows))

    def search(first: int) -> None:
        last = min(first + VOTERS_AT_ONCE, voters)
        known, asked = centred(train[first:last], test[first:last])
        squares = known.square().sum(-1)[:, None]
        for voter in range(0, last - first, group):
            some = slice(voter, voter + group)
            for query in range(0, queries, rows):
                # |t - s|^2 less |t|^2, which is the same for every s
                distances = torch.baddbmm(squares[some], asked[some, query : query + rows], known[some].mT, alpha=-2)
                place = slice(first + voter, min(first + voter + group, last)), slice(query, query + rows)
                for nearest_ones, column in zip(found, columns, strict=True):
                    nearest_ones[place] = least(distances, column)

    in_parallel(search, range(0, voters, VOTERS_AT_ONCE))
    return [choice[torch.from_numpy(nearest_ones)] for choice, nearest_ones in zip(choices, found, strict=True)]


def least(distances: Tensor, columns: Tensor) -> Any:
    """In each row the place in `columns` of the least distance, the first one of equals: a NumPy array of int64."""
    whole = len(columns) == distances.shape[-1]
    if distances.device.type == "cpu":  # NumPy needs a third of torch's time; "clip" spares it a look at each index
        chosen = distances.numpy()
        return (chosen if whole else chosen.take(columns.numpy(), axis=-1, mode="clip")).argmin(-1)
    return (distances if whole else distances[..., columns]).argmin(-1).cpu().numpy()


def centred(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both shifted and scaled alike, voter by voter: the same neighbours, but squares that neither cancel nor overflow.

    Spectra are far from zero and near each other. The median of a few is where most are, whatever a diverged one does.
    """
    middle = train[:, :: math.ceil(train.shape[1] / 9)].median(1, keepdim=True).values
    train, test = train - middle, test - middle
    scale = train.abs().amax((1, 2), keepdim=True)
    factor = torch.where(scale > 1e-300, 1 / scale, 1)
    return train.mul_(factor), test.mul_(factor)


def majority(votes: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The size with most votes; among equals the one that was voted first in the order of the voters.

    Args:
        votes: the size that each voter names for each model: int64 [voters, models].
        sizes: the sizes that can be voted for: int64 [sizes].

    Returns:
        The winners, int64 [models], the sizes, and the share of the votes that each got, float64 [models, sizes].
    """
    ballots = votes[:, :, None] == sizes  # [voters, models, sizes]
    counts = ballots.sum(0)
    first = ballots.to(torch.uint8).argmax(0)  # the first voter for a size
    first = first.masked_fill(counts < counts.max(-1, keepdim=True).values, len(votes))
    return sizes[first.argmin(-1)], sizes, counts.double() / len(votes)


@dataclass(frozen=True)
class Prediction:
    """What a predictor says of some models.

    Attributes:
        sizes: its answers, int64 [models].
        candidates: the sizes that it was trained on, in rising order: int64 [sizes].
        shares: the share of the votes that each of them got, float64 [models, sizes].
    """

    sizes: Tensor
    candidates: Tensor
    shares: Tensor


Predictor = Callable[[Spectra, Spectra], Prediction]


def votes_of(train: Spectra, test: Spectra) -> Tensor:
    """The size that each voter names for each test model: its nearest training model's, int64 [voters, models]."""
    return train.sizes[nearest(train.values, test.values)[0]]


def dsire(train: Spectra, test: Spectra) -> Prediction:
    """The paper's predictor: one 1-NN per voter, fitted on `train`, and the majority of their votes on `test`."""
    return Prediction(*majority(votes_of(train, test), train.sizes.unique()))


def dsire_average(train: Spectra, test: Spectra) -> Prediction:
    """The same voters, but the training size nearest to the mean of those they name (Table 5, average vote)."""
    votes = votes_of(train, test)
    _, candidates, shares = majority(votes, train.sizes.unique())
    return Prediction(nearest_size(votes.double().mean(0), candidates), candidates, shares)


def frobenius(train: Spectra, test: Spectra) -> Prediction:
    """The paper's baseline Frobenius-NN (Table 2): 1-NN on each matrix's Frobenius norm, that of its spectrum."""
    train, test = (replace(side, values=side.values.square().sum(-1, keepdim=True).sqrt()) for side in (train, test))
    return dsire(train, test)


def whole_model(train: Spectra, test: Spectra) -> Prediction:
    """A single 1-NN on all the spectra of a model, concatenated (Table 5, NN-full)."""
    train, test = (replace(side, values=side.values.transpose(0, 1).flatten(1)[None]) for side in (train, test))
    return dsire(train, test)


def ridge(train: Spectra, test: Spectra) -> Prediction:
    """Per voter a ridge regression from the spectrum to n, rounded to the nearest training size; majority (Table 5).

    The paper doesn't give its regularisation. Singular values of A, B and BA differ by orders of magnitude, so they are
    standardised, and then scikit-learn's default penalty of 1 is mild for 90 models and at most 32 features.
    """
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    votes = fitted_votes(lambda: make_pipeline(StandardScaler(), Ridge()), train, test)
    return Prediction(*majority(votes, train.sizes.unique()))


def gda(train: Spectra, test: Spectra) -> Prediction:
    """Per voter a Gaussian discriminant analysis of the spectrum; majority (Table 5).

    Fifteen models of a size can't tell a covariance of its own for up to 32 singular values, so all sizes share one,
    pooled over 90 models: linear discriminant analysis. scikit-learn's default solver (SVD) needs no inverse, which
    nearly collinear singular values would spoil, and leaves nothing to tune.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    votes = fitted_votes(LinearDiscriminantAnalysis, train, test)
    return Prediction(*majority(votes, train.sizes.unique()))


def fitted_votes(new_estimator: Callable[[], Any], train: Spectra, test: Spectra) -> Tensor:
    """The training size nearest to what one scikit-learn estimator per voter answers: int64 [voters, models].

    Raises:
        DsireError: there are too few training models for the estimator.
    """
    known, asked, sizes = train.values.cpu().numpy(), test.values.cpu().numpy(), train.sizes.numpy()
    try:
        answers = [new_estimator().fit(x, sizes).predict(y) for x, y in zip(known, asked, strict=True)]
    except ValueError as error:
        raise DsireError(f"ridge or gda needs a larger --train_size: {first_line(error)}") from error
    return nearest_size(torch.tensor(np.stack(answers)), train.sizes.unique())


def nearest_size(answers: Tensor, candidates: Tensor) -> Tensor:
    """The candidate nearest to each answer, the smaller one of two: int64, of the answers' shape."""
    return torch.take(candidates, (answers[..., None] - candidates).abs().argmin(-1))


PENALTIES = tuple(10 ** (power / 2) for power in range(-8, 5))  # of log_ridge, to choose from


def log_ridge(train: Spectra, test: Spectra) -> Prediction:
    """Beyond the paper: one ridge regression from all log spectra to log n; answers the training size nearest in log.

    Singular values shrink roughly as a power of n, so their logarithms are near linear in log n, in every voter; and a
    regression knows what a classifier does not, that 4 lies between 3 and 5. The penalty is the one that predicts best
    when the training micro-datasets are left out in turn: nothing is chosen on test models. The shares are those of a
    normal distribution about the answer, as wide as the errors on what was left out.
    """
    prediction, _ = log_ridge_and_answers(train, test)
    return prediction


def log_regression(train: Spectra, test: Spectra) -> Prediction:
    """The regression of `log_ridge`, but its answer can be any whole number, also one between the training sizes."""
    prediction, answers = log_ridge_and_answers(train, test)
    return replace(prediction, sizes=answers.clamp(0, math.log(2**53)).exp().round().long())


def log_ridge_and_answers(train: Spectra, test: Spectra) -> tuple[Prediction, Tensor]:
    answers, deviation = log_ridge_fit(train, test)
    candidates = train.sizes.unique()
    distances = (answers[:, None] - candidates.double().log()) / max(deviation, 1e-9)
    shares = torch.softmax(-distances.square() / 2, dim=1)
    return Prediction(candidates[shares.argmax(1)], candidates, shares), answers


def log_ridge_fit(train: Spectra, test: Spectra) -> tuple[Tensor, float]:
    """The logarithm of n for each test model, float64 [models], and the standard deviation of left-out errors."""
    x, z = log_features(train, test)
    y = train.sizes.double().log()
    if len(y) == 1:
        return y.expand(len(z)), 1.0
    kernel, cross = x @ x.T / x.shape[1], z @ x.T / x.shape[1]
    values, vectors = torch.linalg.eigh(kernel)
    values = values.clamp_min(0)
    groups = train.names if len(set(train.names)) > 1 else list(range(len(y)))
    folds = [[model for model, name in enumerate(groups) if name == group] for group in dict.fromkeys(groups)]
    deviations = []
    for penalty in PENALTIES:
        hat = (vectors * (values / (values + penalty))) @ vectors.T + 1 / len(y)
        residuals = y - hat @ y
        # the residuals of a fold that is left out of the fit, without fitting anew
        left_out = [
            torch.linalg.solve(torch.eye(len(fold), dtype=y.dtype) - hat[fold][:, fold], residuals[fold])
            for fold in folds
        ]
        deviations.append(float(torch.cat(left_out).square().mean().sqrt()))
    deviation, penalty = min(zip(deviations, PENALTIES, strict=True))
    weights = vectors @ ((vectors.T @ (y - y.mean())) / (values + penalty))
    return cross @ weights + y.mean(), deviation


def log_features(train: Spectra, test: Spectra) -> tuple[Tensor, Tensor]:
    """Log singular values of all voters, standardised by the training models': [models, voters * r], on the CPU.

    What is below a millionth of a voter's largest singular value is rounding and counts as that.
    """
    known, asked = train.values.cpu(), test.values.cpu()
    floor = (1e-6 * known.amax((1, 2), keepdim=True)).clamp_min(torch.finfo(known.dtype).tiny)
    x, z = (side.clamp_min(floor).log().transpose(0, 1).flatten(1) for side in (known, asked))
    mean, deviation = x.mean(0), x.std(0, correction=0)
    scale = torch.where(deviation > 1e-9, 1 / deviation.clamp_min(1e-9), 0)  # what doesn't vary says nothing
    return (x - mean) * scale, (z - mean) * scale


PREDICTORS: dict[str, Predictor] = {
    "dsire": dsire,
    "dsire-average": dsire_average,
    "frobenius": frobenius,
    "whole-model": whole_model,
    "ridge": ridge,
    "gda": gda,
    "log-ridge": log_ridge,
    "log-regression": log_regression,
}


# ---------------------------------------------------------------------------------------------------------------------
# The protocol (Section 5)


class Protocol(NamedTuple):
    """How predictors are judged: so many experiments, so many micro-datasets to train on, and the seed of the draw."""

    experiments: int = 10
    train_size: int = 15
    seed: int = 42


@dataclass(frozen=True)
class Experiment:
    """One split of the micro-datasets and what was predicted of its test models."""

    test: list[int]
    prediction: Prediction
    mae: float
    mape: float
    accuracy: float


def splits(names: list[Any], protocol: Protocol) -> Iterator[tuple[list[int], list[int]]]:
    """Models to train on and models to test on, once per experiment; a micro-dataset is never divided.

    Raises:
        DsireError: there are fewer than train_size + 1 micro-datasets.
    """
    micro_datasets = sorted(set(names))
    count, train_size = len(micro_datasets), protocol.train_size
    if train_size >= count:
        works = f"the largest --train_size that works is {count - 1}" if count > 1 else "an evaluation needs two"
        raise DsireError(
            f"--train_size={train_size} needs {train_size + 1} micro-datasets or more, and there are {count}: {works}"
        )
    draw = random.Random(protocol.seed)
    for _ in range(protocol.experiments):
        trained = {micro_datasets[index] for index in draw.sample(range(count), train_size)}
        yield (
            [model for model, name in enumerate(names) if name in trained],
            [model for model, name in enumerate(names) if name not in trained],
        )


def metrics(sizes: Tensor, predicted: Tensor) -> tuple[float, float, float]:
    """MAE in images, MAPE in % and accuracy in %."""
    from sklearn.metrics import accuracy_score, mean_absolute_error, mean_absolute_percentage_error

    true, guess = sizes.numpy(), predicted.numpy()
    return (
        float(mean_absolute_error(true, guess)),
        100 * float(mean_absolute_percentage_error(true, guess)),
        100 * float(accuracy_score(true, guess)),
    )


def evaluate(spectra: Spectra, predictor: Predictor, protocol: Protocol) -> list[Experiment]:
    """The paper's protocol: train on some micro-datasets, test on all others, several times over."""
    results = []
    if predictor is dsire:  # experiments share most of their distances
        for train, test, votes in votes_in_experiments(spectra, protocol):
            prediction = Prediction(*majority(votes, spectra.sizes[train].unique()))
            results.append(Experiment(test, prediction, *metrics(spectra.sizes[test], prediction.sizes)))
        return results
    for train, test in splits(spectra.names, protocol):
        prediction = predictor(spectra.of_models(train), spectra.of_models(test))
        results.append(Experiment(test, prediction, *metrics(spectra.sizes[test], prediction.sizes)))
    return results


def votes_in_experiments(spectra: Spectra, protocol: Protocol) -> Iterator[tuple[list[int], list[int], Tensor]]:
    """Training models, test models and `votes_of` them, for each experiment; ten at a time share their distances."""
    runs = list(splits(spectra.names, protocol))
    for start in range(0, len(runs), 10):
        some = runs[start : start + 10]
        known, asked = (sorted({model for run in some for model in run[side]}) for side in (0, 1))
        columns, rows = ({model: place for place, model in enumerate(models)} for models in (known, asked))
        choices = [torch.tensor([columns[model] for model in train]) for train, _ in some]
        found = nearest(spectra.values[:, known], spectra.values[:, asked], choices)
        for (train, test), nearest_ones in zip(some, found, strict=True):
            yield train, test, spectra.sizes[known][nearest_ones[:, [rows[model] for model in test]]]


def compare(spectra: Spectra, protocol: Protocol) -> dict[str, list[Experiment]]:
    """Every predictor, and dsire on each kind of matrix (Table 9), on the same splits."""
    runs = {name: evaluate(spectra, predictor, protocol) for name, predictor in PREDICTORS.items()}
    kinds = [matrix for matrix in MATRICES if any(voter.matrix == matrix for voter in spectra.voters)]
    for matrix in kinds if len(kinds) > 1 else []:
        runs[f"dsire {matrix}"] = evaluate(spectra.of_matrices([matrix]), dsire, protocol)
    return runs


def by_train_size(spectra: Spectra, predictor: Predictor, protocol: Protocol) -> dict[str, list[Experiment]]:
    """The same with fewer micro-datasets to train on, up to the protocol's (Figure 5)."""
    least = 2 if predictor is gda else 1  # a discriminant analysis needs more models than sizes
    counts = sorted({n for n in (1, 2, 3, 5, 10) if least <= n < protocol.train_size} | {protocol.train_size})
    return {str(count): evaluate(spectra, predictor, protocol._replace(train_size=count)) for count in counts}


def by_size(spectra: Spectra, experiments: list[Experiment]) -> dict[str, list[Experiment]]:
    """The metrics of the test models of each dataset size."""
    rows: dict[str, list[Experiment]] = {}
    for size in spectra.sizes.unique().tolist():
        for run in experiments:
            chosen = spectra.sizes[run.test] == size
            if not chosen.any():
                continue
            test = [model for model, its in zip(run.test, chosen.tolist(), strict=True) if its]
            predicted = run.prediction.sizes[chosen]
            part = Prediction(predicted, run.prediction.candidates, run.prediction.shares[chosen])
            rows.setdefault(str(size), []).append(Experiment(test, part, *metrics(spectra.sizes[test], predicted)))
    return rows


def unseen_sizes(spectra: Spectra, predictor: Predictor, protocol: Protocol) -> list[Experiment]:
    """Test models of sizes that were not trained on: each size between two others is left out of the training in turn.

    A classifier's best answer is a neighbouring size; a regression can name the size itself.
    """
    results = []
    sizes = spectra.sizes.unique().tolist()
    for train, test in splits(spectra.names, protocol):
        tested, answers = [], []
        for size in sizes[1:-1]:
            others = [model for model in train if spectra.sizes[model] != size]
            asked = [model for model in test if spectra.sizes[model] == size]
            if others and asked:
                tested += asked
                answers.append(predictor(spectra.of_models(others), spectra.of_models(asked)).sizes)
        if tested:
            empty = torch.zeros(len(tested), 0, dtype=torch.float64)
            prediction = Prediction(torch.cat(answers), torch.zeros(0, dtype=torch.int64), empty)
            results.append(Experiment(tested, prediction, *metrics(spectra.sizes[tested], prediction.sizes)))
    return results


def by_layer(spectra: Spectra, protocol: Protocol) -> Tensor:
    """The accuracy of each layer's voters, one by one, in %, mean over the experiments: float64 [voters]."""
    hits = [
        (votes == spectra.sizes[test]).double().mean(1) for _, test, votes in votes_in_experiments(spectra, protocol)
    ]
    return 100 * torch.stack(hits).mean(0)


def by_block(spectra: Spectra, accuracies: Tensor) -> dict[str, float]:
    """The mean accuracy of the single voters in each block of the network, and of each kind of matrix."""
    groups: dict[str, list[float]] = {}
    for voter, accuracy in zip(spectra.voters, accuracies.tolist(), strict=True):
        block = re.match(r"(?:down|up)_blocks_\d+|mid_block|text_encoder(?:_2)?", voter.layer)
        groups.setdefault(block[0] if block else "other layers", []).append(accuracy)
        groups.setdefault(f"matrix {voter.matrix}", []).append(accuracy)
    return {name: sum(values) / len(values) for name, values in groups.items()}


def mean_and_std(experiments: list[Experiment]) -> dict[str, tuple[float, float]]:
    """Mean and population standard deviation of each metric over the experiments."""
    table = torch.tensor([[run.mae, run.mape, run.accuracy] for run in experiments], dtype=torch.float64)
    means, stds = table.mean(0).tolist(), table.std(0, correction=0).tolist()
    return dict(zip(("mae", "mape", "accuracy"), zip(means, stds, strict=True), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# How sure: what held-out votes say of a new model


@dataclass(frozen=True)
class Estimate:
    """What is said of one LoRA file.

    Attributes:
        file: as the user named it.
        estimate: the dataset size n.
        votes: size -> its share of the votes.
        alike: of the labelled models with a winning share like this one, each left out with its micro-dataset:
            [lowest share, highest share, how many models, how many of them were right]; empty without held-out votes.
        confidence_set: the conformal prediction set, sizes in rising order; empty without held-out votes.
        stated_size: what the file says of itself, 0 if nothing.
        warnings: what the reader has to know before believing the estimate.
    """

    file: str
    estimate: int
    votes: dict[int, float]
    alike: list[float]
    confidence_set: list[int]
    stated_size: int
    warnings: list[str]


def estimates(fitted: Spectra, files: list[Spectra], predictor: Predictor, confidence: float) -> list[Estimate]:
    """Estimates for new models, fitted on all labelled ones; how sure they are comes from leaving micro-datasets out.

    The prediction set is cross-conformal over micro-datasets (Vovk 2015; with micro-datasets, not models, as the
    exchangeable units: Lee, Barber and Willett 2023). A size's nonconformity is 1 - its share of the votes. With the
    K micro-datasets left out in turn, s_i the score of the true size of model i in the one left out, and s_k(n) the
    new model's score of size n at that turn,
        p(n) = (1 + sum over k of the mean over its models i of [s_i >= s_k(n)]) / (K + 1),
    and the set holds the sizes with p(n) > 1 - confidence.

    Args:
        fitted: the labelled models.
        files: the new models, one each, with the same voters.
        predictor: one of the predictors above.
        confidence: the share of new models whose true size the set shall hold, between 0 and 1.
    """
    new = replace(files[0], values=torch.cat([file.values for file in files], dim=1).to(fitted.values.device))
    answer = predictor(fitted, new)
    candidates = answer.candidates
    micro_datasets = fitted.micro_datasets() if len(set(fitted.names)) > 1 else []
    at_least_as_strange = torch.zeros(answer.shares.shape, dtype=torch.float64)
    shares, hits, distances = [], [], []
    for name in micro_datasets:
        fold = [model for model, its_name in enumerate(fitted.names) if its_name == name]
        rest = fitted.of_models([model for model, its_name in enumerate(fitted.names) if its_name != name])
        held_out = fitted.of_models(fold)
        both = replace(new, values=torch.cat([held_out.values, new.values], dim=1))
        turn = predictor(rest, both)
        votes = torch.zeros(len(turn.shares), len(candidates), dtype=torch.float64)
        votes[:, torch.isin(candidates, turn.candidates)] = turn.shares  # a size may be in one micro-dataset only
        true = votes[: len(fold)].gather(1, torch.searchsorted(candidates, held_out.sizes)[:, None])
        at_least_as_strange += (true[None] <= votes[len(fold) :, None]).double().mean(1)  # s_i >= s_k(n)
        shares.append(turn.shares[: len(fold)].max(-1).values)
        hits.append(turn.sizes[: len(fold)] == held_out.sizes)
        distances.append(nearest_distances(rest, held_out))
    p = (1 + at_least_as_strange) / (len(micro_datasets) + 1)
    to_nearest = nearest_distances(fitted, new)
    strangeness, limit = how_unlike(to_nearest, distances)
    found = []
    for row, file in enumerate(files):
        size, winning_share = int(answer.sizes[row]), float(answer.shares[row].max())
        warnings = list(file.notes)
        rounding = 1e-9 * torch.linalg.vector_norm(new.values[:, row], dim=-1).cpu()
        if (to_nearest[:, row] <= rounding).all():
            warnings.append("this very model is among the labelled ones")
        if not micro_datasets:
            warnings.append("one micro-dataset only: how sure the estimate is can't be told")
        elif strangeness[row] > limit:
            times = f" ({strangeness[row] / limit:.1f} times as far as the farthest left-out one)" if limit else ""
            warnings.append(
                f"unlike every labelled model{times}: another recipe or base model, most likely, "
                "and the estimate is not to be trusted"
            )
        stated = int(file.sizes[0])
        if stated and stated != size:
            warnings.append(f"the estimate disagrees with the size that the file states, {stated}")
        members = [int(n) for n, its_p in zip(candidates, p[row], strict=True) if its_p > 1 - confidence + 1e-9]
        found.append(
            Estimate(
                str(file.names[0]),
                size,
                dict(zip(candidates.tolist(), answer.shares[row].tolist(), strict=True)),
                models_alike(winning_share, torch.cat(shares), torch.cat(hits)) if micro_datasets else [],
                members if micro_datasets else [],
                stated,
                warnings,
            )
        )
    return found


def models_alike(share: float, shares: Tensor, hits: Tensor) -> list[float]:
    """The tenth of the held-out models (10 at least) whose winning share is nearest: lowest, highest, models, right."""
    count = min(len(shares), max(10, len(shares) // 10))
    alike = (shares - share).abs().argsort(stable=True)[:count]
    return [float(shares[alike].min()), float(shares[alike].max()), count, int(hits[alike].sum())]


def nearest_distances(train: Spectra, test: Spectra) -> Tensor:
    """How far each test model is from its nearest training model, for each voter: [voters, test models]."""
    index = nearest(train.values, test.values)[0][..., None].expand(-1, -1, test.values.shape[-1])
    return (test.values - train.values.gather(1, index.to(train.values.device))).square().sum(-1).sqrt().cpu()


def how_unlike(distances: Tensor, left_out: list[Tensor]) -> tuple[list[float], float]:
    """How far new models are from the labelled ones, and the farthest that a left-out model is.

    A model's distance is the median over the voters of its distance to the nearest model, in units of the voter's
    median for left-out models.

    Args:
        distances: of the new models, to their nearest, [voters, models].
        left_out: the same for the labelled models, a tensor for each micro-dataset left out.
    """
    if not left_out:
        return [0.0] * distances.shape[1], 0.0
    held_out = torch.cat(left_out, dim=1)
    unit = held_out.median(1, keepdim=True).values.clamp_min(torch.finfo(torch.float64).tiny)
    limit = float((held_out / unit).median(0).values.max())
    return (distances / unit).median(0).values.tolist(), limit


SD_OF_WIDTH = {768: "SD 1.5", 1024: "SD 2", 2048: "SDXL"}  # of the text that cross-attention looks at
SUBSETS_THAT_FIT = {
    (768, 8): "low_8",
    (768, 16): "low_16 medium_16",
    (768, 32): "low_32 medium_32 high_32",
    (1024, 32): "medium_32_2",
}


def matched(file: Spectra, fitted: Spectra) -> Spectra:
    """The file's model on the voters that it shares with the fitted ones; what doesn't fit is counted in its notes.

    Raises:
        DsireError: no layer fits; the message says what the file holds and which subset would fit.
    """
    common = [layer for layer, shape in fitted.shapes.items() if file.shapes.get(layer) == shape]
    here, there = kind_of_model(file.shapes), kind_of_model(fitted.shapes)
    if not common:
        widths = {shape[1] for layer, shape in file.shapes.items() if layer.endswith("attn2_to_k")}
        ranks = {shape[2] for shape in file.shapes.values()}
        fits = [SUBSETS_THAT_FIT.get((width, rank)) for width in widths for rank in ranks]
        advice = f"--subset with one of: {' '.join(filter(None, fits))}" if any(fits) else "models of its own kind"
        raise DsireError(f"{file.names[0]} has {here}, and the labelled models {there}: no layer fits; use {advice}")
    notes = list(file.notes)
    lacking = fitted.shapes.keys() - file.shapes.keys()
    unknown = file.shapes.keys() - fitted.shapes.keys()
    other_shape = len(fitted.shapes) - len(lacking) - len(common)
    if lacking:
        notes.append(
            f"{len(lacking)} of the {len(fitted.shapes)} fitted layers are not in the file, such as {min(lacking)}"
        )
    if unknown:
        notes.append(f"{len(unknown)} layers of the file are unknown to the labelled models, such as {min(unknown)}")
    if other_shape:
        notes.append(f"{other_shape} layers have other shapes ({here}) than the labelled models' ({there})")
    kept = set(common)
    voters = [voter for voter in fitted.voters if voter.layer in kept]
    rank = fitted.values.shape[-1]
    values = file.of_voters(voters).values
    values = torch.nn.functional.pad(values, (0, max(0, rank - values.shape[-1])))[..., :rank]
    return replace(file, values=values, voters=voters, notes=notes)


def kind_of_model(shapes: dict[str, list[int]]) -> str:
    """What a set of layers looks like, for messages: layers, ranks, and the width of the cross-attention."""
    ranks = " ".join(str(rank) for rank in sorted({shape[2] for shape in shapes.values()}))
    widths = sorted({shape[1] for layer, shape in shapes.items() if layer.endswith("attn2_to_k")})
    names = [f"{width}" + (f" ({SD_OF_WIDTH[width]})" if width in SD_OF_WIDTH else "") for width in widths]
    return f"{len(shapes)} layers of rank {ranks}" + (f", cross-attention width {', '.join(names)}" if names else "")


# ---------------------------------------------------------------------------------------------------------------------
# The names of LoRA matrices, whoever wrote them

# What stands after a layer's path. LoRA-WiSE and old diffusers: .lora.down.weight and .processor.to_q_lora.down.weight;
# kohya and LyCORIS: .lora_down.weight; PEFT: .lora_A.weight and .lora_A.<adapter>.weight.
MATRIX_KEY = re.compile(
    r"(?P<layer>.+?)(?:[._]lora(?:_linear_layer)?[._](?P<word>down|up|mid)\.weight"
    r"|\.lora_(?P<letter>[AB])(?:\.[^.]+)?\.weight"
    r"|\.lora_embedding_(?P<embedding>[AB])(?:\.[^.]+)?(?:\.weight)?"
    r"|\.(?P<alpha>alpha)"
    r"|\.(?P<magnitude>dora_scale|lora_magnitude_vector)(?:\.[^.]+)*)"
)
MATRIX_OF_WORD = {"down": "A", "up": "B", "mid": "mid"}
NETWORK = re.compile(r"(base_model\.model\.|lora_unet_|lora_transformer_|unet\.|transformer\.|diffusion_model\.)+")
TEXT_ENCODER = re.compile(r"(?:lora_te|text_encoder_?)(\d?)[._]")
OTHER_METHODS = {
    "LoHa": r"\.hada_w",
    "LoKr": r"\.lokr_w",
    "(IA)3": r"\.ia3_l|\.on_input$",
    "VeRA": r"\.vera_|^vera_",
    "AdaLoRA": r"\.lora_E$|\.lora_E\.",
    "OFT": r"\.oft_",
}


def shown(text: str) -> str:
    """A name out of a file, fit for a message: in one line, without control characters, not longer than 160."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in text)
    return clean if len(clean) <= 160 else f"{clean[:120]}... ({len(clean):,} characters)"


def layer_name(path: str) -> str:
    """One name for a layer, whatever prefix and separators its writer gave it.

    >>> layer_name("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0")
    'down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0'
    """
    path = NETWORK.sub("", path, count=1) if NETWORK.match(path) else path
    text = TEXT_ENCODER.match(path)
    if text:
        number = "" if text[1] in ("", "1") else f"_{text[1]}"
        path = f"text_encoder{number}_{path[text.end() :]}"
    name = path.replace(".processor.", ".").replace(".", "_")
    return name + "_0" if name.endswith("_to_out") else name  # old attention processors leave the 0 out


def lora_layers(keys: Iterable[str], file: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Layer -> {"A": key, "B": key, perhaps "mid", "alpha", "magnitude"} in the keys' order; and the other keys.

    Raises:
        DsireError: another method than LoRA, a layer with one of A and B only, the same matrix twice, or no layer.
    """
    layers: dict[str, dict[str, str]] = {}
    others = []
    for key in keys:
        if len(key) > 1000:  # no layer's path; to match it could take for ever
            others.append(key)
            continue
        for method, pattern in OTHER_METHODS.items():
            if re.search(pattern, key):
                raise DsireError(f"{file}: these are {method} weights ({shown(key)}); only plain LoRA can be judged")
        match = MATRIX_KEY.fullmatch(key)
        if not match:
            others.append(key)
            continue
        matrix = match["letter"] or match["embedding"] or match["alpha"] or (match["magnitude"] and "magnitude")
        matrix = matrix or MATRIX_OF_WORD[match["word"]]
        pair = layers.setdefault(layer_name(match["layer"]), {})
        if matrix in pair:
            raise DsireError(f"{file}: {shown(key)} is the same matrix as {shown(pair[matrix])}")
        pair[matrix] = key
    for pair in layers.values():
        if not {"A", "B"} <= pair.keys():
            lone = next(iter(pair.values()))
            lacking = "B (up)" if "A" in pair else "A (down)" if "B" in pair else "A and B"
            raise DsireError(f"{file}: {shown(lone)} has no partner: the layer's {lacking} is missing")
    if not layers:
        kind = "a full checkpoint, not a LoRA" if others else "empty"
        raise DsireError(f"{file} holds no LoRA layers (such as <layer>.lora.down.weight and .up.weight): it is {kind}")
    return layers, others


# ---------------------------------------------------------------------------------------------------------------------
# Weights in parquet: the layout of LoRA-WiSE


def different_lengths(file: str, column: str, one: int, other: int) -> str:
    return f"{file}: column {column} has rows of {one} and of {other} numbers; all models must have one rank"


def matrix_values(column: Any, name: str, rank: int, file: str) -> Tensor:
    """The flat lists of one column as a batch [models, numbers of a matrix], float64.

    Raises:
        DsireError: not lists of floating point numbers, nulls, lengths that differ or that the rank does not divide.
    """
    import pyarrow as pa

    kind = column.type
    fixed = pa.types.is_fixed_size_list(kind)
    lists = fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type):
        raise DsireError(f"{file}: column {shown(name)} holds {kind}, not lists of floating point numbers")
    column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    nulls = column.null_count + column.values.null_count
    if nulls:
        raise DsireError(f"{file}: column {shown(name)} has {nulls} nulls: a matrix is missing")
    if fixed:
        starts = (column.offset + torch.arange(len(column) + 1)) * kind.list_size
    else:
        starts = torch.utils.dlpack.from_dlpack(column.offsets)
    lengths = starts.diff()
    length = int(lengths.min())
    if length != lengths.max():
        raise DsireError(different_lengths(file, shown(name), length, int(lengths.max())))
    if length == 0 or length % rank:
        raise DsireError(
            f"{file}: column {shown(name)} has {length} numbers a row, which --rank={rank} does not divide"
        )
    flat = column.values.slice(int(starts[0]), len(column) * length)  # `flatten` would copy
    values: Tensor = torch.utils.dlpack.from_dlpack(flat)
    return values.to(torch.float64).view(-1, length)


def model_labels(table: Any, file: str) -> tuple[Tensor, list[Any]]:
    """The columns `label` (size n) and `name` (micro-dataset) of a shard.

    Raises:
        DsireError: a column is missing, has nulls, or does not hold sizes from 1 up and names.
    """
    import pyarrow as pa

    missing = {"label", "name"} - set(table.column_names)
    if len(table.column_names) > 2:
        raise DsireError(f"{file}: there are two columns `label`, or two `name`; there must be one of each")
    if missing:
        raise DsireError(f"{file}: column {' and '.join(sorted(missing))} is missing; there must be `label` and `name`")
    labels, names = table.column("label"), table.column("name")
    if labels.null_count or names.null_count:
        raise DsireError(f"{file}: `label` or `name` has nulls; every model needs its size and micro-dataset")
    kind = names.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DsireError(f"{file}: column name holds {kind}; it must hold strings or integers")
    sizes = labels.to_pylist()
    wrong = [n for n in sizes if type(n) not in (int, float) or not 1 <= n < 2**53 or n != int(n)]
    if wrong:
        raise DsireError(f"{file}: column label holds {wrong[0]!r}; a dataset size is a whole number from 1 up")
    return torch.tensor(sizes, dtype=torch.int64), names.to_pylist()


def shard_spectra(path: Path, rank: int, device: str = "cpu") -> Spectra:
    """The spectra of all models in one parquet shard, one pair of columns at a time.

    A shard is one row group, so a pair of columns is a ready batch of equal shapes, and whole rows are never held.

    Raises:
        DsireError: the file can't be read, or a column doesn't fit; the message names it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    own = threading.local()  # two threads that read one ParquetFile can wait for each other for ever

    def pair_spectra(pair: dict[str, str]) -> tuple[Tensor, list[int]]:
        if not hasattr(own, "file"):
            own.file = pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True)
        file = own.file
        groups = []
        lengths: dict[str, int] = {}
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=list(pair.values()), use_threads=False)
            if not len(table):
                continue
            flat = {m: matrix_values(table.column(name), name, rank, path.name) for m, name in pair.items()}
            a, b = flat["A"].view(len(table), rank, -1), flat["B"].view(len(table), -1, rank)
            for matrix, name in pair.items():
                here = flat[matrix].shape[1]
                if lengths.setdefault(name, here) != here:
                    raise DsireError(different_lengths(path.name, shown(name), lengths[name], here))
            try:
                groups.append(batch_spectra(a, b, device))
            except FloatingPointError:
                start = sum(file.metadata.row_group(before).num_rows for before in range(group))
                name_the_model_that_is_not_finite(flat, pair, sizes[start:].tolist(), names[start:])
        if not groups:
            raise DsireError(f"{path} is not a whole parquet file (no rows in its groups): delete it and fetch it anew")
        shape = [lengths[pair["B"]] // rank, lengths[pair["A"]] // rank, rank]
        return torch.cat(groups, dim=1), shape

    def name_the_model_that_is_not_finite(
        flat: dict[str, Tensor], pair: dict[str, str], its_sizes: list[int], its_names: list[Any]
    ) -> None:
        for matrix, name in pair.items():
            for row, values in enumerate(flat[matrix]):
                if not values.isfinite().all():
                    model = f"model {shown(str(its_names[row]))} of size {its_sizes[row]}"
                    raise DsireError(
                        f"{path.name}: {model} has a weight that is NaN or infinite in column {shown(name)}"
                    )
        raise DsireError(
            f"{path.name}: columns {' and '.join(map(shown, pair.values()))} hold numbers too large to multiply"
        )

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = file.metadata
            if not metadata.num_rows:
                raise DsireError(f"{path}: no rows; delete the file or fetch it anew")
            columns = file.schema_arrow.names
            sizes, names = model_labels(file.read([name for name in ("label", "name") if name in columns]), path.name)
            layers, others = lora_layers(columns, path.name)
            spectra = dict(zip(layers, in_parallel(pair_spectra, layers.values()), strict=True))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DsireError(
            f"{path} is not a whole parquet file ({first_line(error)}): delete it and fetch it anew"
        ) from error
    unused = sorted(set(others) - {"label", "name"})
    notes = [f"columns that are not LoRA weights, left out: {' '.join(map(shown, unused))}"] if unused else []
    order = voters_of(layers)
    values = torch.stack([spectra[voter.layer][0][MATRICES.index(voter.matrix)] for voter in order])
    return Spectra(values, sizes, names, order, {layer: shape for layer, (_, shape) in spectra.items()}, notes)


def voters_of(layers: dict[str, dict[str, str]]) -> list[Voter]:
    """The voters in the order in which a tie is broken: A and B as the keys stand, then the products."""
    singles = [Voter(layer, matrix) for layer, pair in layers.items() for matrix in pair if matrix in MATRICES]
    return singles + [Voter(layer, "BA") for layer in layers]


def first_line(error: BaseException) -> str:
    """What an error says, in one line that is fit to print."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return "".join(letter if letter.isprintable() else "?" for letter in lines[0].rstrip(" ."))


def join_shards(shards: list[Spectra], files: list[str]) -> Spectra:
    """All shards as one; the voters' order is the first shard's.

    Raises:
        DsireError: a shard has other layers than the first one, or other shapes.
    """
    first = shards[0]
    for shard, file in zip(shards, files, strict=True):
        different = shard.shapes.keys() ^ first.shapes.keys()
        if different:
            raise DsireError(f"layer {min(different)} is in only one of the shards {files[0]} and {file}")
        for layer, shape in shard.shapes.items():
            if shape != first.shapes[layer]:
                raise DsireError(
                    f"{file}: layer {layer} has [out, in, rank] {shape}, and in {files[0]} {first.shapes[layer]}"
                )
    names = [name for shard in shards for name in shard.names]
    if len({type(name) for name in names}) > 1:  # integers in one shard, strings in another
        names = [str(name) for name in names]
    return replace(
        first,
        values=torch.cat([shard.of_voters(first.voters).values for shard in shards], dim=1),
        sizes=torch.cat([shard.sizes for shard in shards]),
        names=names,
        notes=list(dict.fromkeys(note for shard in shards for note in shard.notes)),
    )


def what_is_unusual(spectra: Spectra) -> list[str]:
    """Sentences about what a user might not expect in the models: sizes that lack, models that are there twice."""
    models = list(zip(spectra.names, spectra.sizes.tolist(), strict=True))
    notes = []
    twice = len(models) - len(set(models))
    if twice:
        notes.append(f"{twice} models have the micro-dataset and size of another one; all are kept")
    sizes = spectra.sizes.unique().tolist()
    several = len(models) > len(spectra.micro_datasets())  # else no file was said to belong with another
    lacking = [name for name in spectra.micro_datasets() if len({n for m, n in models if m == name}) < len(sizes)]
    if lacking and several:
        some = ", ".join(str(name) for name in lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        notes.append(f"{len(lacking)} micro-datasets lack a size: {some}")
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Weights in LoRA files: what people hold on disk

SAFE_ENDINGS = (".safetensors",)
PICKLE_ENDINGS = (".bin", ".pt", ".ckpt", ".pth")
WEIGHT_ENDINGS = SAFE_ENDINGS + PICKLE_ENDINGS


class Weights(NamedTuple):
    """An open weights file: its keys, a function that reads the tensor of a key, and its header of strings."""

    keys: list[str]
    tensor: Callable[[str], Tensor]
    header: dict[str, str]


@contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """Open a .safetensors file, or a pickle without running it; tensors are read one by one.

    Raises:
        DsireError: the file is not what its ending says, or a pickle that holds more than tensors.
    """
    if not path.is_file():
        raise DsireError(f"{path}: no such file")
    if path.suffix.lower() in PICKLE_ENDINGS:
        tensors = unpickled_tensors(path)
        yield Weights(list(tensors), tensors.__getitem__, {})
        return
    from safetensors import SafetensorError, safe_open

    unreadable = (SafetensorError, OSError, RuntimeError, ValueError)  # also a file that can't be mapped, or named

    def tensor(key: str) -> Tensor:
        try:
            found: Tensor = file.get_tensor(key)
        except unreadable as error:
            raise DsireError(f"{path}: {shown(key)} can't be read ({first_line(error)})") from error
        return found

    try:
        opened = safe_open(path, "pt")
        keys, header = list(opened.keys()), opened.metadata() or {}
    except unreadable as error:
        raise DsireError(f"{path} can't be read as safetensors ({first_line(error)}); fetch it anew") from error
    with opened as file:
        yield Weights(keys, tensor, header)


def unpickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle by name, numbers (an alpha, say) as tensors too; nothing in the file is run.

    Raises:
        DsireError: it isn't a pickle of plain tensors, or an alpha in it is no number.
    """
    try:
        archive = zipfile.is_zipfile(path)  # only such a one can be mapped; the older form is read whole
        if archive:
            with zipfile.ZipFile(path) as parts:
                damaged = parts.testzip()  # torch leaves the checksums unread
            if damaged:
                raise ValueError(f"{damaged} is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # bytes of any kind make the unpickler raise anything; none of them is run
        reason = shown(first_line(error))
        raise DsireError(
            f"{path} can't be read as plain tensors ({reason}); pickles that hold more are not loaded"
        ) from error
    for _ in range(3):  # a checkpoint's weights lie under this key
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    if not isinstance(content, dict):
        raise DsireError(f"{path} holds {type(content).__name__}, not a dictionary of tensors")
    tensors = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors[str(key)] = value.detach()
        elif isinstance(value, (int, float)):
            tensors[str(key)] = torch.tensor(float(value) if abs(value) < 2**53 else math.nan, dtype=torch.float64)
        elif str(key).endswith(".alpha"):
            raise DsireError(f"{path}: {shown(str(key))} is {type(value).__name__}, not a number")
    return tensors


def peft_config(path: Path, header: dict[str, str]) -> dict[str, Any]:
    """LoRA's settings: from the header (diffusers), or adapter_config.json beside the file (PEFT), or {}.

    Raises:
        DsireError: they can't be read, or are those of another method.
    """
    beside = path.with_name("adapter_config.json")
    if "lora_adapter_metadata" in header:
        text, place = header["lora_adapter_metadata"], f"the header of {path}"
    elif beside.is_file():
        text, place = beside.read_text(encoding="utf-8", errors="replace"), str(beside)
    else:
        return {}
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DsireError(f"{place} is not JSON ({first_line(error)})") from error
    if not isinstance(config, dict):
        raise DsireError(f"{place} is not a JSON object")
    method = str(config.get("peft_type") or "LORA")
    if method.upper() != "LORA":
        raise DsireError(f"{path.name}: {place} says these are {shown(method)} weights; only plain LoRA can be judged")
    return config


def peft_scale(config: dict[str, Any], layer: str, rank: int) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) for rslora; alpha_pattern gives some layers another alpha.

    Args:
        config: of PEFT; diffusers puts the network's name before each of its keys ("unet.lora_alpha").
        layer: the path of the layer as it stands in the file.
        rank: r of this layer, from the shape of A: so rank_pattern needs no reading.

    Raises:
        DsireError: an alpha is no number, or a pattern no expression that is safe to match.
    """
    path = layer.removeprefix("base_model.model.")
    network, _, inside = path.partition(".")
    own = {key.removeprefix(f"{network}."): value for key, value in config.items() if key.startswith(f"{network}.")}
    config, path = (own, inside) if own else (config, path)
    alpha, patterns = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}  # 8 is PEFT's default
    if not isinstance(patterns, dict):
        raise DsireError(f"alpha_pattern is {shown(repr(patterns))}, not an object of patterns")
    for pattern, value in patterns.items():
        # repetitions within or after each other can take for ever to match
        if len(pattern) > 200 or len(re.findall(r"[*+{]", pattern)) > 3 or re.search(r"\)[*+{]", pattern):
            raise DsireError(f"alpha_pattern {shown(pattern)} repeats too much to be matched safely; write it out")
        try:
            matches = re.fullmatch(rf"(.*\.)?({pattern})", path)
        except (re.error, OverflowError) as error:
            raise DsireError(
                f"alpha_pattern {shown(pattern)} is no regular expression ({first_line(error)})"
            ) from error
        if matches:
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 2**53:
        raise DsireError(f"lora_alpha is {shown(repr(alpha))}, not a number")
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def read_tensor(weights: Weights, key: str, file: str, least_dimensions: int = 2) -> Tensor:
    """A tensor of floating point numbers as float64.

    Raises:
        DsireError: it is of another kind, empty, or has fewer dimensions, or less memory behind it than its shape says.
    """
    tensor = weights.tensor(key)
    plain = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
    real = plain and (tensor.is_floating_point() or (least_dimensions == 0 and not tensor.is_complex()))
    whole = real and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    if not whole or tensor.ndim < least_dimensions or not tensor.numel():
        kind = f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape) if plain else 'unknown'}"
        raise DsireError(f"{file}: {shown(key)} is {kind}, not a plain matrix of floating point numbers")
    try:
        return tensor.to(torch.float64)
    except (NotImplementedError, RuntimeError) as error:
        raise DsireError(f"{file}: {shown(key)} is {tensor.dtype}, which torch can't convert") from error


def lora_matrices(path: Path, weights: Weights) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Every LoRA layer of a file, one at a time: its name, A [r, in], B [out, r] in float64, and the scale of BA.

    A convolution's A [r, in, k, k] is taken as [r, in k k]. LoCon's middle matrix [r, r, k, k] is made part of A.

    Raises:
        DsireError: matrices that do not fit each other, or not of floating point numbers.
    """
    layers, _ = lora_layers(weights.keys, path.name)
    config = peft_config(path, weights.header)
    for layer, pair in layers.items():
        a, b = (read_tensor(weights, pair[matrix], path.name) for matrix in ("A", "B"))
        rank = a.shape[0]
        if "mid" in pair:
            middle = read_tensor(weights, pair["mid"], path.name)
            if middle.shape[1] != rank or a[0, 0].numel() != 1:
                raise DsireError(f"{path.name}: {shown(pair['mid'])} {list(middle.shape)} does not fit {list(a.shape)}")
            a, rank = torch.einsum("ij...,jm->im...", middle, a.flatten(1)), middle.shape[0]
        if b.flatten(1).shape[1] != rank:
            one, other = f"{shown(pair['A'])} has rank {rank}", f"{shown(pair['B'])} has shape {list(b.shape)}"
            raise DsireError(f"{path.name}: {one}, but {other}")
        if "alpha" in pair:
            alpha = read_tensor(weights, pair["alpha"], path.name, least_dimensions=0)
            if alpha.numel() != 1 or not alpha.isfinite().all():
                raise DsireError(f"{path.name}: {shown(pair['alpha'])} is not one finite number")
            scale = float(alpha.reshape(())) / rank
        elif config:
            match = MATRIX_KEY.fullmatch(pair["A"])
            assert match is not None
            try:
                scale = peft_scale(config, match["layer"], rank)
            except DsireError as error:
                raise DsireError(f"{path.name}: its LoRA settings: {error}") from error
        else:
            scale = 1.0
        yield layer, a.flatten(1), b.flatten(1), scale


def file_spectra(path: Path) -> Spectra:
    """The spectra of one LoRA file: a single model, whose size is what the file itself states (0 if it doesn't).

    Raises:
        DsireError: the file can't be read, is not plain LoRA, or holds weights that are not finite.
    """
    spectra, shapes = {}, {}
    with open_weights(path) as weights, one_thread_each():
        layers, others = lora_layers(weights.keys, path.name)
        for layer, a, b, scale in lora_matrices(path, weights):
            try:
                single_a, single_b, product = lora_spectra(a, b)
                if not (product * scale).isfinite().all():
                    raise FloatingPointError
            except FloatingPointError:
                keys = ", ".join(shown(key) for key in layers[layer].values())
                raise DsireError(f"{path.name}: one of {keys} is NaN, infinite or too large") from None
            spectra[layer] = {"A": single_a, "B": single_b, "BA": product * abs(scale)}
            shapes[layer] = [b.shape[0], a.shape[1], a.shape[0]]
        stated = stated_size(weights.header)
        scaled = all("alpha" in pair for pair in layers.values()) or peft_config(path, weights.header)
    notes = []
    if others:
        notes.append(f"{len(others)} tensors that are not LoRA matrices are set aside, such as {shown(others[0])}")
    if any("magnitude" in pair for pair in layers.values()):
        notes.append("DoRA: the magnitude vectors are set aside, only A and B are judged")
    if not scaled and any(".lora_A" in pair["A"] for pair in layers.values()):
        notes.append("the file does not state alpha (no adapter_config.json): BA is taken with scale 1")
    untrained = sum(not bool(values["BA"].any()) for values in spectra.values())
    if untrained:
        all_of_them = "untrained: BA is zero in every layer, an estimate means nothing"
        notes.append(all_of_them if untrained == len(layers) else f"BA is zero in {untrained} of {len(layers)} layers")
    if stated:
        notes.append(f"states its own size: {stated[0]} images ({stated[1]})")
    rank = max(shape[2] for shape in shapes.values())
    voters = voters_of(layers)
    rows = [spectra[voter.layer][voter.matrix] for voter in voters]
    values = torch.stack([torch.nn.functional.pad(row, (0, rank - len(row))) for row in rows])[:, None]
    return Spectra(values, torch.tensor([stated[0] if stated else 0]), [str(path)], voters, shapes, notes)


def stated_size(header: dict[str, str]) -> tuple[int, str] | None:
    """The number of training images that kohya's metadata state, without repeats, and the key that states it."""

    def parsed(key: str) -> Any:
        try:
            return json.loads(header.get(key, "null"))
        except (ValueError, RecursionError):
            return None

    def whole(number: Any) -> int:
        return number if isinstance(number, int) and not isinstance(number, bool) and 0 < number < 2**53 else 0

    folders = parsed("ss_dataset_dirs")
    if isinstance(folders, dict):
        images = sum(whole(folder.get("img_count")) for folder in folders.values() if isinstance(folder, dict))
        if 0 < images < 2**53:
            return images, "ss_dataset_dirs"
    sets = parsed("ss_datasets")
    parts = [
        part
        for one in (sets if isinstance(sets, list) else [])
        if isinstance(one, dict) and isinstance(one.get("subsets"), list)
        for part in one["subsets"]
        if isinstance(part, dict) and not part.get("is_reg")
    ]
    images = sum(whole(part.get("img_count")) for part in parts)
    if 0 < images < 2**53:
        return images, "ss_datasets"
    images, repeats = whole(parsed("ss_num_train_images")), whole(parsed("ss_num_repeats"))
    if images and repeats and not images % repeats:  # without the repeats it is no number of images
        return images // repeats, "ss_num_train_images"
    return None


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The LoRA files below a folder, sorted, and notes of what is left out.

    Where safetensors lie in a folder, pickles beside them (an optimizer's state, or the same weights) are left out.
    """
    found = sorted(
        path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.relative_to(folder).parts
    )
    safe = [path for path in found if path.suffix.lower() in SAFE_ENDINGS]
    pickles = [path for path in found if path.suffix.lower() in PICKLE_ENDINGS]
    beside = {path.parent for path in safe}
    left_out = [path for path in pickles if path.parent in beside]
    notes = [f"{len(left_out)} pickles beside safetensors in {folder} are left out"] if left_out else []
    return sorted({*safe, *pickles} - {*left_out}), notes


# ---------------------------------------------------------------------------------------------------------------------
# Where the weights come from: a folder or the Hub, and the cache of spectra


@dataclass(frozen=True)
class Shard:
    """One parquet file of a subset: its path (on disk, or inside the Hub's repository), bytes, and version."""

    file: str
    size: int
    etag: str


@dataclass(frozen=True)
class Source:
    """The files of a subset. `commit` is the Hub's commit hash, or "" for a folder; `column` one of A, if known."""

    dataset: str
    subset: str
    commit: str
    shards: list[Shard]
    column: str = ""


def find_source(dataset: str, subset: str | None, revision: str | None, cache: Path) -> tuple[Source, list[str]]:
    """The files of a subset in a folder or on the Hub, and what is to be said of them.

    The answer is kept in the cache, and asked for again only when the folder or the Hub's commit has changed: a second
    run doesn't need the network.

    Raises:
        DsireError: no such dataset or subset, or the Hub can't be reached and nothing is known of it.
    """
    folder = Path(dataset)
    local = folder.is_dir()
    if not local and (folder.is_absolute() or dataset.startswith(".") or dataset.count("/") != 1):
        raise DsireError(f"--dataset={dataset}: no such folder, and not a Hub repository (owner/name)")
    place = str(folder.resolve()) if local else dataset
    note = cache / "sources" / (re.sub(r"[^\w.-]+", "--", f"{place}@{revision or ''}-{subset or ''}") + ".json")
    known = read_source(note)
    notes: list[str] = []
    if local and not any(folder.rglob("*.parquet")):
        if subset is not None:
            raise DsireError(
                f"--subset={subset}: {folder} holds no parquet, and LoRA files have no subsets; leave it out"
            )
        return lora_folder(folder), notes
    if local:
        state = folder_state(folder)
    elif known and revision == known[1].commit:
        state = revision
    else:
        try:
            state = patiently(hub_commit, dataset, revision)
        except HubUnreachable as error:
            if not known:
                raise
            state = known[0]
            notes.append(f"{error}; going on with commit {known[1].commit[:12]}, as found before")
    if known and known[0] == state:
        return known[1], notes
    source = patiently(resolve, dataset, subset, None if local else state)
    write_whole(note, json.dumps({"state": state, **asdict(source)}, indent=1).encode("utf-8", "backslashreplace"))
    return source, notes


def lora_folder(folder: Path) -> Source:
    """A folder of LoRA files as a subset of its own, one file a shard."""
    files, _ = weight_files(folder)
    if not files:
        raise DsireError(f"--dataset={folder} holds neither parquet nor LoRA files ({' '.join(WEIGHT_ENDINGS)})")
    shards = []
    for file in files:
        parts = [part for part in (file, file.with_name("adapter_config.json")) if part.is_file()]  # both decide BA
        etag = "mtime-" + "-".join(str(part.stat().st_mtime_ns) for part in parts)
        shards.append(Shard(str(file), file.stat().st_size, etag))
    return Source(str(folder), folder.resolve().name, "", shards)


def read_source(note: Path) -> tuple[str, Source] | None:
    try:
        saved = json.loads(note.read_text())
        state = saved.pop("state")
        return state, Source(**{**saved, "shards": [Shard(**shard) for shard in saved["shards"]]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or not written by this version
        return None


def folder_state(folder: Path) -> str:
    """A digest of the names, lengths and times of the files that decide what a folder holds."""
    files = sorted([*folder.rglob("*.parquet"), *folder.glob("*.md"), *folder.glob(".*.yaml")])
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "backslashreplace")).hexdigest()


class HubUnreachable(DsireError):
    """The Hub can't be asked, so that what is in the cache may be used instead."""


class HubBusy(HubUnreachable):
    """The Hub, or the way to it, failed in a way that may pass: worth another try."""


def http_status(error: BaseException | None) -> int:
    """The status of the Hub's answer that an error comes from, 0 if none does."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return int(error.response.status_code)
        error = error.__cause__ or error.__context__
    return 0


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn what huggingface_hub and datasets raise into one line that says what to do."""
    from huggingface_hub import constants, errors

    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of httpx, or httpx2: it depends on the version
    reach = f"{what}: {constants.ENDPOINT} can't be reached"
    try:
        yield
    except errors.GatedRepoError as error:
        raise DsireError(f"{what} is gated: ask for access on its page, then set HF_TOKEN to your token") from error
    except errors.RevisionNotFoundError as error:
        raise DsireError(f"{what} has no such --revision; give one of its branches, tags or commits") from error
    except errors.RepositoryNotFoundError as error:
        message = f"{what} was not found on {constants.ENDPOINT}: check the name, and set HF_TOKEN if it is private"
        raise DsireError(message) from error
    except errors.RemoteEntryNotFoundError as error:
        raise DsireError(f"{what} is listed but not there ({first_line(error)}); try another --revision") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        if isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            raise HubUnreachable(f"{what} is not in the cache, and HF_HUB_OFFLINE is set: unset it") from error
        if status := http_status(error):
            raise HubBusy(f"{what}: the Hub answers with HTTP {status}; try again later") from error
        raise HubUnreachable(f"{reach} ({first_line(error)}): check the network, or HF_ENDPOINT") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise DsireError(f"{what}: the Hub refused the token (HTTP {status}); check HF_TOKEN") from error
        raise HubBusy(f"{what}: the Hub answers with HTTP {status}; try again later") from error
    except ValueError as error:  # of datasets and huggingface_hub, about what they were given or what came back
        raise DsireError(f"{what} can't be used: {first_line(error)}") from error
    except (http_error, ConnectionError, TimeoutError) as error:
        kind = HubBusy if type(error).__name__ in ("ReadError", "RemoteProtocolError") else HubUnreachable
        raise kind(f"{reach} ({first_line(error)}): check the network, or HF_ENDPOINT") from error


def patiently(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call, and call again after 1 and 5 seconds while the Hub is busy; huggingface_hub retries only some requests."""
    for wait in (1, 5):
        try:
            return call(*arguments)
        except HubBusy:
            time.sleep(wait)
    return call(*arguments)


def prepare_libraries() -> None:
    """What huggingface_hub has to say comes as exceptions; its progress bars are for a person who watches.

    Some of its requests would wait for a silent server for ever: they get the time that it gives its downloads.
    """
    import huggingface_hub
    from huggingface_hub.utils._http import default_client_factory

    def client_with_a_limit() -> Any:
        client: Any = default_client_factory()
        client.timeout = huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
        ask = client.request

        def request(*arguments: Any, **options: Any) -> Any:
            options["timeout"] = options.get("timeout") or client.timeout
            return ask(*arguments, **options)

        client.request = request
        return client

    huggingface_hub.set_client_factory(client_with_a_limit)
    huggingface_hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()


def hub_commit(dataset: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    prepare_libraries()
    with hub_errors(f"dataset {dataset}" + (f" at revision {revision}" if revision else "")):
        commit = HfApi().dataset_info(dataset, revision=revision, timeout=30).sha
    assert commit is not None
    return commit


def resolve(dataset: str, subset: str | None, commit: str | None) -> Source:
    """Let `datasets` read the README's configs and find a config's files, in a folder or at a commit of the Hub.

    Raises:
        DsireError: an unknown subset (with the list of those that exist), or a subset without parquet files.
    """
    import datasets
    import yaml
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.hf_api import RepoFile

    datasets.logging.set_verbosity_error()
    prepare_libraries()
    what = f"dataset {dataset}"
    with hub_errors(what):
        try:
            configs = datasets.get_dataset_config_names(dataset, revision=commit)
            if subset is None and len(configs) > 1:
                raise DsireError(f"{what} has several subsets: choose one with --subset: {' '.join(configs)}")
            if subset is not None and subset not in configs:
                raise DsireError(f"--subset={subset} is not in {what}; it has: {' '.join(configs)}")
            builder = datasets.load_dataset_builder(dataset, subset or configs[0], revision=commit)
        except yaml.YAMLError as error:
            raise DsireError(f"{what}: the header of its README.md is not YAML ({first_line(error)})") from error
        except FileNotFoundError as error:  # DatasetNotFoundError is one, too
            reason = re.sub(r" with any supported extension.*", "", first_line(error))  # a list of a hundred
            if status := http_status(error):
                raise HubBusy(f"{what}: the Hub answers with HTTP {status}; try again later") from error
            if "gated" in reason:
                reason += "; set HF_TOKEN to a token of an account that has access"
            raise DsireError(f"{what} has no data to read: {reason}") from error
        files = [file for split in (builder.config.data_files or {}).values() for file in split]
        wrong = [file for file in files if not file.endswith(".parquet")]
        if wrong or not files:
            found = f"{Path(wrong[0]).name}, which is not" if wrong else "no"
            raise DsireError(f"{what}: subset {builder.config.name} has {found} parquet")
        column = next((column for column in builder.info.features or {} if column not in ("label", "name")), "")
        if commit is None:
            stats = [(str(file), Path(file).stat()) for file in files]
            shards = [Shard(file, stat.st_size, f"mtime-{stat.st_mtime_ns}") for file, stat in stats]
            return Source(dataset, builder.config.name, "", shards, column)
        repository, paths = dataset, []
        for file in files:
            place: Any = HfFileSystem().resolve_path(file)
            repository = place.repo_id
            paths.append(place.path_in_repo)
        facts = HfApi().get_paths_info(repository, paths, repo_type="dataset", revision=commit)
    shards = [
        Shard(fact.path, fact.size, fact.lfs.sha256 if fact.lfs else fact.blob_id)
        for fact in facts
        if isinstance(fact, RepoFile)
    ]
    shards.sort(key=lambda shard: paths.index(shard.file))
    return Source(repository, builder.config.name, commit, shards, column)


def fetch(source: Source, shard: Shard, cache: Path) -> Path:
    """The shard on disk: where it is, or downloaded by huggingface_hub and checked against its SHA-256.

    Raises:
        DsireError: it can't be had, or is damaged also when it is fetched anew.
    """
    if not source.commit:
        return Path(shard.file)
    from huggingface_hub import hf_hub_download

    prepare_libraries()
    folder = cache / "downloads" / source.dataset.replace("/", "--")
    for half in (folder / ".cache").rglob(f"*{shard.etag}*.incomplete"):  # of a run that was killed: it is not resumed
        half.unlink(missing_ok=True)
    with hub_errors(f"{shard.file} of dataset {source.dataset}"), disk_errors(folder):
        for again in (False, True):
            path = Path(
                hf_hub_download(
                    source.dataset,
                    shard.file,
                    repo_type="dataset",
                    revision=source.commit,
                    local_dir=folder,
                    force_download=again,
                )
            )
            if is_whole(path, shard):
                return path
    path.unlink()
    raise DsireError(f"{shard.file} of dataset {source.dataset} was damaged on its way, twice: try again later")


def is_whole(path: Path, shard: Shard) -> bool:
    from huggingface_hub.utils.sha import sha_fileobj

    if path.stat().st_size != shard.size:
        return False
    if not re.fullmatch("[0-9a-f]{64}", shard.etag):  # a small file outside LFS: the Hub gives no SHA-256 of it
        return True
    with path.open("rb") as file:
        return sha_fileobj(file).hex() == shard.etag


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say which path can't be written, and that what was computed is kept."""
    try:
        yield
    except (ConnectionError, TimeoutError):  # of the network, though Python counts them as OSError
        raise
    except OSError as error:
        if error.errno is None:  # huggingface_hub's own, not the system's
            raise
        raise DsireError(
            f"{path} can't be written ({error.strerror}): free the disk or choose another place; "
            "nothing that was computed is lost"
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: a file that carries its name is whole.

    Raises:
        DsireError: the disk is full, or the path can't be written.
    """
    half = path.with_name(f".{path.name}.{os.getpid()}.half")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with half.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            half.replace(path)
        finally:
            half.unlink(missing_ok=True)


def cache_key(shard: Shard, rank: int) -> str:
    """What spectra were computed from: they are used again only for the same."""
    content = {"format": CACHE_FORMAT, "file": shard.file, "size": shard.size, "etag": shard.etag, "rank": rank}
    return json.dumps(content, sort_keys=True)


def spectra_file(shard: Shard, rank: int, cache: Path) -> Path:
    digest = hashlib.sha256(cache_key(shard, rank).encode("utf-8", "backslashreplace")).hexdigest()[:16]
    return cache / "spectra" / f"{Path(shard.file).stem}-{digest}.safetensors"


def save_spectra(spectra: Spectra, shard: Shard, rank: int, cache: Path) -> None:
    from safetensors.torch import save

    about = {"voters": spectra.voters, "names": spectra.names, "shapes": spectra.shapes, "notes": spectra.notes}
    header = {"key": cache_key(shard, rank), "about": json.dumps(about)}
    content = save({"spectra": spectra.values.contiguous(), "sizes": spectra.sizes}, header)
    write_whole(spectra_file(shard, rank, cache), content)


def load_spectra(shard: Shard, rank: int, cache: Path) -> Spectra | None:
    """The spectra of a shard from the cache; None if they aren't there, or damaged, or of something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(spectra_file(shard, rank, cache), "pt") as file:
            if file.metadata()["key"] != cache_key(shard, rank):
                return None
            about = json.loads(file.metadata()["about"])
            about["voters"] = [Voter(*voter) for voter in about["voters"]]
            return Spectra(file.get_tensor("spectra"), file.get_tensor("sizes"), **about)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def fetched_ahead(
    source: Source, shards: list[Shard], rank: int, cache: Path
) -> Iterator[tuple[Shard, Path | Spectra, Callable[[], None]]]:
    """Each shard locked, with its path, or its spectra if another run has computed them, and a function to unlock it.

    The next shard is downloaded while the caller works on the one it has. The thread is a daemon: an error or Ctrl-C
    ends the script at once. Runs on one cache lock shards in the same order, so none waits for another in a circle.
    """
    from filelock import FileLock, Timeout

    turns: queue.Queue[Shard | None] = queue.Queue()
    ready: queue.Queue[tuple[Path | Spectra, Callable[[], None]] | BaseException] = queue.Queue()

    def prepare(shard: Shard) -> tuple[Path | Spectra, Callable[[], None]]:
        place = spectra_file(shard, rank, cache).with_suffix(".lock")
        with disk_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(place, thread_local=False)  # taken here, released by the caller's thread
            try:
                lock.acquire(timeout=2)
            except Timeout:
                print(f"waiting for another run, which is at {Path(shard.file).name}", file=sys.stderr)
                lock.acquire()
        for half in place.parent.glob(f".{place.stem}.*.half"):  # of a run that was killed as it wrote
            half.unlink(missing_ok=True)
        try:
            found = load_spectra(shard, rank, cache)
            return (patiently(fetch, source, shard, cache) if found is None else found), lock.release
        except BaseException:
            lock.release()
            raise

    def prepare_all() -> None:
        while (shard := turns.get()) is not None:
            try:
                ready.put(prepare(shard))
            except BaseException as error:  # it belongs to the caller, who raises it
                ready.put(error)
        while not ready.empty():
            left = ready.get()
            if not isinstance(left, BaseException):
                left[1]()

    threading.Thread(target=prepare_all, daemon=True).start()
    for shard in shards[:1]:
        turns.put(shard)
    try:
        for number, shard in enumerate(shards):
            answer = ready.get()
            if isinstance(answer, BaseException):
                raise answer
            for following in shards[number + 1 : number + 2]:
                turns.put(following)
            yield shard, *answer
    finally:
        turns.put(None)  # the thread ends after what it is at, and unlocks what nobody takes


def process_rank() -> int:
    return torch.distributed.get_rank() if process_count() > 1 else 0


def process_count() -> int:
    """How many processes torchrun started for this run; 1 without it."""
    import torch.distributed

    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def wait_for_all_processes() -> None:
    if process_count() > 1:
        torch.distributed.barrier()


def join_processes() -> None:
    """Under torchrun (or a launcher that sets the same variables) make this process one of a group."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    from datetime import timedelta

    import torch.distributed

    # gloo: all that is exchanged is who is ready; a subset can take hours, and a dead process ends the others anyway
    try:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    except (ValueError, RuntimeError) as error:
        message = f"WORLD_SIZE is set, but no group of processes can be made ({first_line(error)}): start with torchrun"
        raise DsireError(message) from error


def told_by_the_first(function: Callable[[], Any]) -> Any:
    """What `function` returns, or raises, in the first process, in all of them."""
    answer: list[Any] = [None, None]
    if process_rank() == 0:
        try:
            answer[0] = function()
        except DsireError as error:
            answer[1] = error
    if process_count() > 1:
        torch.distributed.broadcast_object_list(answer)
    if answer[1]:
        if process_rank():
            sys.exit(2)  # the first process says why
        raise answer[1]
    return answer[0]


def subset_spectra(source: Source, rank: int, cache: Path, device: str = "cpu", keep_shards: bool = False) -> Spectra:
    """The spectra of a whole subset: from the cache, and for the shards that it lacks from their parquet.

    Each shard's spectra are written before its download is deleted, so that a run that is killed goes on at its shard.
    Under torchrun each process computes its own share of the shards, and waits until all are there.

    Raises:
        DsireError: a shard can't be had or read, or its spectra can't be written.
        KeyboardInterrupt: Ctrl-C; its message says how far the run came.
    """
    from tqdm import tqdm

    if is_lora_folder(source):
        return folder_spectra(source, cache)
    shards = source.shards
    missing = told_by_the_first(lambda: [shard for shard in shards if load_spectra(shard, rank, cache) is None])
    own = missing[process_rank() :: process_count()]
    done = len(shards) - len(missing)
    with tqdm(total=done + len(own), initial=done, unit="shard", disable=None) as progress:
        try:
            for shard, found, unlock in fetched_ahead(source, own, rank, cache):
                progress.set_description(Path(shard.file).name)
                try:
                    if isinstance(found, Path):
                        save_spectra(shard_spectra(found, rank, device), shard, rank, cache)
                        if source.commit and not keep_shards:
                            found.unlink(missing_ok=True)
                finally:
                    unlock()
                done += 1
                progress.update()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{done} of {len(shards)} shards are done") from None
    wait_for_all_processes()
    found_all = [load_spectra(shard, rank, cache) for shard in shards]
    for shard, spectra in zip(shards, found_all, strict=True):
        if spectra is None:
            raise DsireError(f"the spectra of {shard.file} are not in {cache}: run the same command again")
    return join_shards([spectra for spectra in found_all if spectra is not None], [shard.file for shard in shards])


def cached_file_spectra(shard: Shard, cache: Path) -> Spectra:
    found = load_spectra(shard, 0, cache)
    if found is None:
        found = file_spectra(Path(shard.file))
        save_spectra(found, shard, 0, cache)
    return found


def folder_spectra(source: Source, cache: Path) -> Spectra:
    """The spectra of a folder of LoRA files, on the layers that all of them have.

    Sizes and micro-datasets come from the folder's metadata.csv (file_name,label,name), or else from the files.

    Raises:
        DsireError: metadata.csv can't be read, no file has a size, or no layer is in all of them.
    """
    from tqdm import tqdm

    folder = Path(source.dataset)
    _, notes = weight_files(folder)
    labels = metadata_csv(folder / "metadata.csv")
    with one_thread_each(), ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [pool.submit(cached_file_spectra, shard, cache) for shard in source.shards]
        try:
            files = []
            for run in tqdm(runs, unit="file", disable=None):
                files.append(run.result())
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{len(files)} of {len(runs)} files are done") from None
        finally:
            pool.shutdown(cancel_futures=True)
    known = []
    for shard, file in zip(source.shards, files, strict=True):
        name = Path(shard.file).relative_to(folder).as_posix()
        size, micro_dataset = labels.pop(name, (0, name)) if labels is not None else (int(file.sizes[0]), name)
        notes += [f"{name}: {note}" for note in file.notes]
        if size:
            known.append(replace(file, sizes=torch.tensor([size]), names=[micro_dataset]))
        else:
            notes.append(f"{name} is left out: " + ("not in metadata.csv" if labels is not None else "no size stated"))
    if labels:
        raise DsireError(f"{folder / 'metadata.csv'} lists {next(iter(labels))}, which is not there")
    if not known:
        raise DsireError(f"no file in {folder} has a size: write {folder / 'metadata.csv'} with file_name,label,name")
    shapes = [file.shapes for file in known]
    common = [layer for layer, shape in shapes[0].items() if all(other.get(layer) == shape for other in shapes)]
    if not common:
        raise DsireError(f"{folder}: no layer is in all {len(known)} files with the same shape")
    dropped = {layer for its_shapes in shapes for layer in its_shapes} - set(common)
    if dropped:
        notes.append(f"{len(dropped)} layers that are not the same in all files are left out, such as {min(dropped)}")
    voters = [voter for voter in known[0].voters if voter.layer in set(common)]
    rank = max(shapes[0][layer][2] for layer in common)
    values = [file.of_voters(voters).values for file in known]
    padded = [torch.nn.functional.pad(value, (0, rank - min(rank, value.shape[-1])))[..., :rank] for value in values]
    return Spectra(
        torch.cat(padded, dim=1),
        torch.cat([file.sizes for file in known]),
        [name for file in known for name in file.names],
        voters,
        {layer: shapes[0][layer] for layer in common},
        notes,
    )


def metadata_csv(path: Path) -> dict[str, tuple[int, str]] | None:
    """file_name -> (label, name) from the metadata.csv of a folder; None without one.

    Raises:
        DsireError: a column is missing, a label is no dataset size, or a file is listed twice.
    """
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise DsireError(f"{path} can't be read ({first_line(error)})") from error
    labels: dict[str, tuple[int, str]] = {}
    for row in rows:
        if row.get("file_name") is None or "label" not in row:
            raise DsireError(f"{path} needs the columns file_name and label, in every row, and may have name")
        name, label = Path(row["file_name"]).as_posix(), (row["label"] or "").strip()
        if not (label.isascii() and label.isdecimal() and 0 < int(label[:17]) < 2**53 and len(label) < 17):
            raise DsireError(f"{path}: the label of {name} is {shown(label)!r}, not a whole number from 1 up")
        if name in labels:
            raise DsireError(f"{path} lists {name} twice")
        labels[name] = (int(label), row.get("name") or name)
    return labels


def files_to_predict(item: str, cache: Path) -> tuple[list[Path], list[str]]:
    """The weight files that the user means (a file, those of a folder, or of a Hub repository), and what is left out.

    Raises:
        DsireError: there is no such file, folder or repository, or no weight file in it.
    """
    path = Path(item)
    if item and path.is_file():
        return [path], []
    if not item or not path.exists():
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::(.+))?", item)
        if not match or match[1].endswith(WEIGHT_ENDINGS):
            raise DsireError(f"{item or 'an empty name'}: no such file or folder")
        from huggingface_hub import hf_hub_download, snapshot_download

        prepare_libraries()
        repository, name = match[1], match[2]
        with hub_errors(item), disk_errors(cache / "hub"):
            if name:
                return [Path(hf_hub_download(repository, name, cache_dir=cache / "hub"))], []
            patterns = [*(f"*{ending}" for ending in SAFE_ENDINGS), "*adapter_config.json"]
            path = Path(snapshot_download(repository, cache_dir=cache / "hub", allow_patterns=patterns))
    files, notes = weight_files(path)
    if not files:
        hint = "" if Path(item).exists() else "; name a pickle as user/name:file.bin"
        raise DsireError(f"{item}: no weight files in it ({' '.join(WEIGHT_ENDINGS)}){hint}")
    return files, notes


def is_lora_folder(source: Source) -> bool:
    return source.shards[0].file.lower().endswith(WEIGHT_ENDINGS)


def rank_of(source: Source, rank: int | None) -> int:
    """The rank of the LoRAs in a subset: `rank`, or the one in its name, such as 32 in medium_32_2.

    Raises:
        DsireError: neither says it, or they contradict each other.
    """
    if is_lora_folder(source):
        return 0  # such files say it themselves, layer by layer
    match = re.fullmatch(r"[a-z]+_(\d+)(_\d+)?", source.subset)
    named = int(match[1]) if match else None
    if rank is None and named is None:
        raise DsireError(f"subset {source.subset} doesn't have the rank in its name: give it with --rank")
    if rank is not None and named is not None and rank != named:
        column = f" (column {source.column})" if source.column else ""
        raise DsireError(f"--rank={rank} contradicts the name of subset {source.subset}, whose rank is {named}{column}")
    return rank or named or 0


# ---------------------------------------------------------------------------------------------------------------------
# The report


def describe(spectra: Spectra, settings: dict[str, Any]) -> str:
    sizes = " ".join(str(size) for size in spectra.sizes.unique().tolist())
    micro_datasets = len(spectra.micro_datasets())
    kind = kind_of_model({voter.layer: spectra.shapes[voter.layer] for voter in spectra.voters})
    return (
        f"{settings['subset']}: {len(spectra.names)} models, {micro_datasets} micro-datasets, sizes {sizes}\n"
        f"{kind}; matrices {' '.join(settings['matrices'])}, so {len(spectra.voters)} voters"
    )


def summary_cells(values: Iterable[tuple[float, float]]) -> str:
    """MAE, MAPE and accuracy as mean ± standard deviation, in columns."""
    return "".join(f"{f'{mean:.2f} ± {std:.2f}':>16}" for mean, std in values)


def paper_values(settings: dict[str, Any]) -> dict[str, tuple[tuple[float, float], ...]]:
    """The paper's values for a subset, where it was judged as here: all matrices, 15 training micro-datasets."""
    same = len(set(settings["matrices"])) == 3 and settings["train_size"] == 15
    return PAPER.get(settings["subset"], {}) if same else {}


def print_report(spectra: Spectra, experiments: list[Experiment], settings: dict[str, Any], notes: list[str]) -> None:
    train_size, micro_datasets = settings["train_size"], len(spectra.micro_datasets())
    print(describe(spectra, settings))
    print(
        f"{len(experiments)} experiments: {train_size} micro-datasets to train, {micro_datasets - train_size} to test"
    )
    for note in notes:
        print(f"note: {note}")
    predictor = settings["predictor"]
    paper = paper_values(settings).get(predictor)
    print(f"\n{'':16}{'MAE':>16}{'MAPE %':>16}{'accuracy %':>16}")
    print(f"{predictor:16}" + summary_cells(mean_and_std(experiments).values()))
    if paper:
        print(f"{'paper':16}" + summary_cells(paper))


def write_report(
    output: Path,
    spectra: Spectra,
    experiments: list[Experiment],
    settings: dict[str, Any],
    notes: list[str],
    details: dict[str, Any],
) -> None:
    """report.json and predictions.csv, for programs."""
    summary = mean_and_std(experiments)
    report = {
        "settings": settings,
        "versions": versions(),
        "notes": notes,
        "experiments": [{"mae": run.mae, "mape": run.mape, "accuracy": run.accuracy} for run in experiments],
        "mean": {metric: mean for metric, (mean, _) in summary.items()},
        "std": {metric: std for metric, (_, std) in summary.items()},
        **details,
    }
    write_whole(output / "report.json", (json.dumps(report, indent=2) + "\n").encode("utf-8", "backslashreplace"))
    table: list[list[Any]] = [["experiment", "name", "size", "predicted", "vote_share"]]
    for number, run in enumerate(experiments, start=1):
        shares = run.prediction.shares.max(-1).values.tolist()
        for model, predicted, share in zip(run.test, run.prediction.sizes.tolist(), shares, strict=True):
            table.append([number, spectra.names[model], int(spectra.sizes[model]), predicted, f"{share:.4f}"])
    write_table(output / "predictions.csv", table)


def print_comparison(runs: dict[str, list[Experiment]], paper: dict[str, tuple[tuple[float, float], ...]]) -> None:
    """One table of predictors and matrices: the metrics, the difference of the MAE to dsire's, the paper's values."""
    print(f"\n{'':16}{'MAE':>16}{'MAPE %':>16}{'accuracy %':>16}{'MAE less dsire':>18}", end="")
    print(f"{'MAE, MAPE, accuracy in the paper':>48}" if paper else "")
    for name, experiments in runs.items():
        differences = torch.tensor([one.mae - other.mae for one, other in zip(experiments, runs["dsire"], strict=True)])
        error = float(differences.std()) / len(differences) ** 0.5 if len(differences) > 1 else math.nan
        cell = "" if name == "dsire" else f"{float(differences.mean()):+.3f} ± {error:.3f}"
        print(f"{name:16}{summary_cells(mean_and_std(experiments).values())}{cell:>18}", end="")
        print(summary_cells(paper[name]) if name in paper else "")
    print("(± the standard deviation over experiments; for differences, the standard error of their mean)")


def print_breakdown(title: str, rows: dict[str, list[Experiment]]) -> None:
    print(f"\n{title:32}{'MAE':>16}{'accuracy %':>16}")
    for name, experiments in rows.items():
        summary = mean_and_std(experiments)
        print(f"{name:32}" + summary_cells([summary["mae"], summary["accuracy"]]))


def report_comparison(
    spectra: Spectra, protocol: Protocol, paper: dict[str, tuple[tuple[float, float], ...]]
) -> dict[str, Any]:
    """Run and print all comparisons; returns them as they go into report.json."""
    runs = compare(spectra, protocol)
    print_comparison(runs, paper)
    growth = by_train_size(spectra, dsire, protocol)
    print_breakdown("dsire by training micro-datasets", growth)
    sizes = by_size(spectra, runs["dsire"])
    print_breakdown("dsire by dataset size", sizes)
    unseen = {
        name: unseen_sizes(spectra, predictor, protocol)
        for name, predictor in PREDICTORS.items()
        if name in ("dsire", "log-ridge", "log-regression")
    }
    if all(unseen.values()):
        print(f"\n{'sizes that were left out':32}{'MAE':>16}{'MAPE %':>16}")
        for name, experiments in unseen.items():
            print(f"{name:32}" + summary_cells(list(mean_and_std(experiments).values())[:2]))
    accuracies = by_layer(spectra, protocol)
    blocks = by_block(spectra, accuracies)
    print(f"\n{'accuracy of single voters':48}{'%':>8}")
    for name, accuracy in sorted(blocks.items(), key=lambda item: -item[1]):
        print(f"{'mean of ' + name:48}{accuracy:8.1f}")
    for row in accuracies.argsort(descending=True, stable=True)[:5].tolist():
        print(f"{spectra.voters[row].matrix:3}{spectra.voters[row].layer:77}{float(accuracies[row]):8.1f}")
    tables = {"compare": runs, "by_train_size": growth, "by_size": sizes, "unseen_sizes": unseen}
    return {
        **{name: {row: mean_and_std(run) for row, run in table.items() if run} for name, table in tables.items()},
        "by_layer": {" ".join(voter): value for voter, value in zip(spectra.voters, accuracies.tolist(), strict=True)},
        "by_block": blocks,
    }


def print_estimate(estimate: Estimate, confidence: float) -> None:
    votes = sorted(estimate.votes.items(), key=lambda vote: -vote[1])
    print(f"\n{estimate.file}: {estimate.estimate} image{'s' if estimate.estimate != 1 else ''}")
    print("  votes     " + ", ".join(f"{size}: {share:.0%}" for size, share in votes if share >= 0.005))
    if estimate.alike:
        low, high, models, right = estimate.alike
        print(
            f"  like it   of {models:g} left-out models with {low:.0%} to {high:.0%} of the votes, {right:g} were right"
        )
        members = " or ".join(str(size) for size in estimate.confidence_set) or "none of the sizes"
        print(f"  so        {members}, with {confidence:.0%} confidence, if it is one of the labelled sizes")
    if estimate.stated_size:
        print(f"  stated    {estimate.stated_size}")
    for warning in estimate.warnings:
        print(f"  note      {warning}")


def write_estimates(output: Path, found: list[Estimate], settings: dict[str, Any], notes: list[str]) -> None:
    """estimates.csv, one row a file, and the same in report.json."""
    about = {"settings": settings, "versions": versions(), "notes": notes}
    report = {**about, "estimates": [{**asdict(one), "vote_share": max(one.votes.values())} for one in found]}
    write_whole(output / "report.json", (json.dumps(report, indent=2) + "\n").encode("utf-8", "backslashreplace"))
    table = [["file", "estimate", "vote_share", "confidence_set", "stated_size", "warnings"]]
    for one in found:
        members = " ".join(str(size) for size in one.confidence_set)
        share = f"{max(one.votes.values()):.4f}"
        row = [one.file, str(one.estimate), share, members, str(one.stated_size or ""), "; ".join(one.warnings)]
        table.append(row)
    write_table(output / "estimates.csv", table)


def write_table(path: Path, rows: list[list[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_whole(path, text.getvalue().encode("utf-8", "backslashreplace"))


def versions() -> dict[str, str]:
    packages = ("torch", "numpy", "scikit-learn", "huggingface_hub", "datasets", "pyarrow", "safetensors")
    return {"python": sys.version.split()[0], **{package: version(package) for package in packages}}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: the paper's Figures 2 to 6


def draw_figures(
    output: Path, spectra: Spectra, experiments: list[Experiment], growth: dict[str, list[Experiment]], title: str
) -> None:
    """Write confusion.png, spectra.png, layers.png and training.png into `output`.

    Args:
        output: an existing folder.
        spectra: all labelled models.
        experiments: the evaluation, for the confusion matrix.
        growth: the evaluation by the number of training micro-datasets.
        title: what the data and the predictor are called.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {
        "figure.dpi": 150,
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 11,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figures = {
            "confusion": confusion_figure(plt, spectra, experiments, title),
            "spectra": spectra_figure(plt, spectra),
            "layers": layers_figure(plt, spectra),
            "training": training_figure(plt, growth, title),
        }
        for name, figure in figures.items():
            image = io.BytesIO()
            figure.savefig(image, format="png", metadata={"Software": None})
            plt.close(figure)
            write_whole(output / f"{name}.png", image.getvalue())


def confusion_figure(plt: Any, spectra: Spectra, experiments: list[Experiment], title: str) -> Any:
    """Of the models of each size, the percentage that each size was predicted for (Figures 4 and 6)."""
    true = torch.cat([spectra.sizes[run.test] for run in experiments])
    predicted = torch.cat([run.prediction.sizes for run in experiments])
    rows, columns = true.unique().tolist(), predicted.unique().tolist()
    if len(columns) > 20:  # a regression's answers are counted at the nearest size
        predicted = nearest_size(predicted, true.unique())
    columns = sorted(set(rows) | set(predicted.unique().tolist()))
    table = torch.stack(
        [torch.stack([(predicted[true == row] == column).double().mean() for column in columns]) for row in rows]
    )
    figure, axes = plt.subplots(figsize=(6, 5))
    image = axes.imshow(100 * table.numpy(), cmap="cividis", vmin=0, vmax=100)
    for y, x in np.ndindex(*table.shape):
        value = 100 * float(table[y, x])
        axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="black" if value > 60 else "white")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="predicted dataset size (images)", ylabel="true dataset size (images)", title=title)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="models of the true size (%)", shrink=0.85)
    return figure


def size_colours(plt: Any, sizes: list[int]) -> list[Any]:
    """Dark for small, light for large: viridis without its lightest end, which fades on white."""
    return [plt.get_cmap("viridis")(0.9 * index / max(1, len(sizes) - 1)) for index in range(len(sizes))]


def spectra_figure(plt: Any, spectra: Spectra) -> Any:
    """The Frobenius norm and the singular values of BA by dataset size, means over layers (Figure 2)."""
    matrix = spectra.voters[-1].matrix  # BA, unless it was left out
    values = spectra.of_matrices([matrix]).values.cpu()
    sizes = spectra.sizes.unique().tolist()
    norms = values.square().sum(-1).sqrt().mean(0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    parts = left.boxplot([norms[spectra.sizes == size].numpy() for size in sizes], showfliers=False, patch_artist=True)
    for box, median, colour in zip(parts["boxes"], parts["medians"], size_colours(plt, sizes), strict=True):
        box.set(facecolor=colour, alpha=0.7)
        median.set(color="black")
    left.set_xticks(range(1, len(sizes) + 1), sizes)
    left.set(xlabel="dataset size (images)", ylabel=f"Frobenius norm of {matrix}, mean over layers")
    for size, colour in zip(sizes, size_colours(plt, sizes), strict=True):
        mean = values[:, spectra.sizes == size].mean((0, 1))
        right.plot(range(1, len(mean) + 1), mean, color=colour, marker="o", markersize=4, label=size)
    right.set(xlabel="index of the singular value", ylabel=f"singular value of {matrix}, mean over layers")
    right.set_xticks(range(1, values.shape[-1] + 1, max(1, values.shape[-1] // 8)))
    right.legend(title="images")
    return figure


def layers_figure(plt: Any, spectra: Spectra) -> Any:
    """The spectra of the first down-block's and the last up-block's layer by dataset size (Figure 3)."""
    matrix = spectra.voters[-1].matrix
    layers = [voter.layer for voter in spectra.voters if voter.matrix == matrix]
    down = [layer for layer in layers if layer.startswith("down_blocks")] or layers
    up = [layer for layer in layers if layer.startswith("up_blocks")] or layers
    sizes = spectra.sizes.unique().tolist()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4))
    for axis, layer, place in zip(
        axes, (down[0], up[-1]), ("first down-block layer", "last up-block layer"), strict=True
    ):
        values = spectra.of_voters([Voter(layer, matrix)]).values[0].cpu()
        indices = range(1, values.shape[-1] + 1)
        for size, colour in zip(sizes, size_colours(plt, sizes), strict=True):
            chosen = values[spectra.sizes == size]
            mean, spread = chosen.mean(0), chosen.std(0, correction=0)
            axis.plot(indices, mean, color=colour, marker="o", markersize=4, label=size)
            axis.fill_between(indices, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
        axis.set_title(f"{place}\n{layer.replace('_transformer', chr(10) + 'transformer')}", fontsize=9)
        axis.set(xlabel="index of the singular value")
        axis.set_xticks(range(1, values.shape[-1] + 1, max(1, values.shape[-1] // 8)))
    axes[0].set_ylabel(f"singular value of {matrix}\n(mean ± std over models)")
    axes[-1].legend(title="images")
    return figure


def training_figure(plt: Any, growth: dict[str, list[Experiment]], title: str) -> Any:
    """Accuracy and MAE by the number of training micro-datasets (Figure 5)."""
    counts = [int(count) for count in growth]
    summaries = [mean_and_std(experiments) for experiments in growth.values()]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, metric, label in zip(axes, ("accuracy", "mae"), ("accuracy (%)", "MAE (images)"), strict=True):
        means, stds = zip(*(summary[metric] for summary in summaries), strict=True)
        axis.errorbar(counts, means, stds, color="#0072b2", marker="o", capsize=3)
        axis.set(xlabel="training micro-datasets", ylabel=label)
        axis.set_xticks(counts)
    figure.suptitle(title, fontsize=11)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The command line


class OneLineParser(argparse.ArgumentParser):
    """argparse, with an error of one line like every other one."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return number


def command_line() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--subset", help="a config of the dataset, such as low_32 (default: the subset that ships with the script)")
    add("--rank", type=positive, help="the LoRA rank (default: the one in the subset's name)")
    add("--dataset", help=f"Hub repository, or a folder of the same layout (default: {LORA_WISE})")
    add("--revision", help="branch, tag or commit of the Hub dataset")
    add("--cache_dir", type=Path, default=Path(".cache/lora_wise"), help="for downloads and spectra (%(default)s)")
    add("--seed", type=int, default=42, help="of the experiments' splits (%(default)s)")
    add("--experiments", type=positive, default=10, help="how many (%(default)s)")
    add("--train_size", type=positive, default=15, help="micro-datasets to train on (%(default)s)")
    add("--matrices", nargs="+", choices=MATRICES, default=list(MATRICES), help="which ones vote (%(default)s)")
    add("--predictor", choices=PREDICTORS, default="dsire", help="what turns spectra into a size (%(default)s)")
    add("--device", help="cuda, cpu, ... (default: cuda if available)")
    add("--keep_shards", action="store_true", help="keep downloads after their spectra are computed")
    add(
        "--compare", action="store_true", help="all predictors and matrices, by size, training micro-datasets and layer"
    )
    add("--plots", action="store_true", help="draw the paper's figures into --output")
    add("--predict", nargs="+", metavar="LORA", help="estimate for these files, folders or Hub repositories instead")
    add("--confidence", type=share, default=0.9, help="of the set of sizes that --predict names (%(default)s)")
    add("--output", type=Path, help="folder for report.json, and predictions.csv or estimates.csv")
    return parser


def choose_device(name: str | None) -> str:
    """The device to compute on: the one that is named, or this process's GPU, or the CPU.

    Raises:
        DsireError: the device can't be used, or not in float64.
    """
    if name is None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % gpus}" if gpus else "cpu"
    try:
        torch.zeros(1, dtype=torch.float64, device=name).cpu()
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise DsireError(f"--device={name} can't be used here ({first_line(error)}); try --device=cpu") from error
    return name


def run(arguments: argparse.Namespace) -> int:
    notes: list[str] = []
    if arguments.subset is None and arguments.dataset is None:
        arguments.dataset, arguments.subset = str(SHIPPED), SHIPPED_SUBSET
        notes.append("no --subset was given: this is the small subset that ships with the script")
    if arguments.predict and (arguments.compare or arguments.plots):
        raise DsireError("--compare and --plots are about the labelled models: leave them out with --predict")
    if arguments.plots and not arguments.output:
        raise DsireError("--plots needs a folder for the pictures: give it with --output")
    join_processes()
    asked: list[Path] = []
    refused = 0
    for item in arguments.predict or [] if process_rank() == 0 else []:  # before a subset is fetched for nothing
        try:
            files, left_out = files_to_predict(item, arguments.cache_dir)
            asked += files
            notes += left_out
        except DsireError as error:
            refused += 1
            print_error(error)
    if refused and not asked:
        return 2
    device = choose_device(arguments.device)
    cache = arguments.cache_dir
    source, said = told_by_the_first(
        lambda: find_source(arguments.dataset or LORA_WISE, arguments.subset, arguments.revision, cache)
    )
    if process_rank() and is_lora_folder(source):
        return 0  # such a folder is not worth sharing
    rank = rank_of(source, arguments.rank)
    spectra = subset_spectra(source, rank, cache, device, arguments.keep_shards)
    if process_rank():
        return 0  # the first process evaluates
    if arguments.rank and arguments.rank != spectra.values.shape[-1]:
        raise DsireError(f"--rank={arguments.rank} does not fit: the LoRAs have rank {spectra.values.shape[-1]}")
    notes += said + spectra.notes + what_is_unusual(spectra)
    spectra = spectra.of_matrices(arguments.matrices)
    spectra = replace(spectra, values=spectra.values.to(device))
    settings = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()},
        **asdict(source),
        "rank": spectra.values.shape[-1],
        "device": device,
    }
    try:
        if arguments.predict:
            return 0 if predict(arguments, spectra, asked, settings, notes) and not refused else 2
        report(arguments, spectra, source.subset, settings, notes)
        return 0
    except KeyboardInterrupt:
        done = len(source.shards)
        raise KeyboardInterrupt(
            f"{done} of {done} {'files' if is_lora_folder(source) else 'shards'} are done"
        ) from None


def report(
    arguments: argparse.Namespace, spectra: Spectra, subset: str, settings: dict[str, Any], notes: list[str]
) -> None:
    """Evaluate, compare and draw what the arguments ask for."""
    predictor = PREDICTORS[arguments.predictor]
    protocol = Protocol(arguments.experiments, arguments.train_size, arguments.seed)
    results = evaluate(spectra, predictor, protocol)
    print_report(spectra, results, settings, notes)
    details = {}
    if arguments.compare:
        details = report_comparison(spectra, protocol, paper_values(settings))
    if arguments.output:
        write_report(arguments.output, spectra, results, settings, notes, details)
    if arguments.plots:
        growth = by_train_size(spectra, predictor, protocol)
        draw_figures(arguments.output, spectra, results, growth, f"{arguments.predictor} on {subset}")


def predict(
    arguments: argparse.Namespace, fitted: Spectra, paths: list[Path], settings: dict[str, Any], notes: list[str]
) -> bool:
    """Print an estimate for each file that can be read, and an error for each that can't; True if all could be."""
    print(describe(fitted, settings))
    for note in notes:
        print(f"note: {note}")
    alike: dict[tuple[Voter, ...], list[Spectra]] = {}  # files with the same layers are judged together
    refused = 0
    for path in paths:
        try:
            file = matched(file_spectra(path), fitted)
            alike.setdefault(tuple(file.voters), []).append(file)
        except DsireError as error:
            refused += 1
            print_error(error)
    found = []
    for files in alike.values():
        known = fitted.of_voters(files[0].voters)
        with one_thread_each():  # many small matrices: a second thread costs more than it brings
            found += estimates(known, files, PREDICTORS[arguments.predictor], arguments.confidence)
    order = {str(path): number for number, path in enumerate(paths)}
    found.sort(key=lambda estimate: order[estimate.file])
    for estimate in found:
        print_estimate(estimate, arguments.confidence)
    if arguments.output:
        write_estimates(arguments.output, found, settings, notes)
    return not refused


def print_error(error: DsireError) -> None:
    print(f"dsire.py: error: {error}", file=sys.stderr)


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold any bytes
    arguments = command_line().parse_args()
    try:
        return run(arguments)
    except DsireError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"dsire.py: stopped{f', {interrupt}' if str(interrupt) else ''}; run it again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    gc.freeze()  # what was imported is no garbage: to search it again and again, and at the exit, takes a second
    exit_code = main()
    gc.freeze()
    sys.exit(exit_code)

#!/usr/bin/env python3
"""DSiRe: how many images was a LoRA trained on? (arXiv:2406.19395)

    python dsire.py                            # the subset that ships, offline
    python dsire.py --subset=low_32 --rank=32  # LoRA-WiSE, from the Hub
    python dsire.py --subset=low_32 --predict my_lora.safetensors
    python dsire.py --dataset=my_loras --predict folder/ user/name --output=out
    python dsire.py --dataset=tuned --base=sd15.safetensors --predict full.ckpt

The script reads from top to bottom: the paper; what is beyond; weights; report.
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
import pickle
import random
import re
import signal
import sys
import tempfile
import threading
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() runs, Ctrl-C ends the imports without a traceback

import joblib  # this, scipy and threadpoolctl come with scikit-learn
import numpy as np
import torch
from scipy.spatial.distance import cdist
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

LORA_WISE = "MoSalama98/LoRA-WiSE"
SHIPPED = Path(__file__).resolve().parent / "tests" / "tiny_wise"
SHIPPED_SUBSET = "low_4"
CACHE = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "dsire"
MATRICES = ("A", "B", "BA")
LARGEST = 32  # singular values of a change of the weights that are kept, unless --rank says how many
FORMAT = 5  # of files of spectra, in the cache and shared: those of another format are not read
DISTANCES_AT_ONCE = 2**20  # of one voter, by the nearest-neighbour search: 8 MiB for each core
BYTES_AT_ONCE = 2**27  # of decoded columns, over all cores

# MAE, MAPE in % and accuracy in %, mean and standard deviation over ten experiments: the paper's Tables 2 to 5 and 9.
PAPER: dict[tuple[str, str], tuple[tuple[float, float], ...]] = {
    ("low_32", "dsire"): ((0.36, 0.04), (11.36, 1.55), (69.30, 3.83)),
    ("low_32", "frobenius"): ((0.43, 0.04), (15.14, 2.12), (65.29, 2.42)),
    ("low_16", "dsire"): ((0.42, 0.03), (12.4, 1.11), (67.7, 2.3)),
    ("low_8", "dsire"): ((0.43, 0.04), (14.8, 2.3), (66.0, 3.08)),
    ("medium_32", "dsire"): ((1.48, 0.21), (3.97, 0.73), (86.10, 1.99)),
    ("medium_32", "dsire-average"): ((3.57, 0.36), (19.05, 3.37), (64.62, 3.58)),
    ("medium_32", "frobenius"): ((1.56, 0.19), (4.16, 0.75), (85.33, 1.81)),
    ("medium_32", "whole-model"): ((7.33, 0.75), (33.37, 7.71), (48.61, 3.53)),
    ("medium_32", "ridge"): ((8.05, 0.08), (38.95, 6.24), (37.09, 0.63)),
    ("medium_32", "gda"): ((2.89, 0.48), (7.87, 1.30), (74.14, 3.65)),
    ("medium_32", "dsire A"): ((1.90, 0.29), (5.63, 1.26), (82.52, 2.20)),
    ("medium_32", "dsire B"): ((1.57, 0.19), (4.07, 0.65), (84.90, 2.09)),
    ("medium_32", "dsire BA"): ((1.61, 0.16), (4.22, 0.47), (85.00, 1.45)),
    ("medium_16", "dsire"): ((1.67, 0.17), (4.32, 0.46), (84.04, 1.85)),
    ("medium_32_2", "dsire"): ((2.51, 0.22), (7.46, 0.95), (77.43, 1.70)),
    ("medium_32_2", "frobenius"): ((2.95, 0.28), (11.99, 3.93), (73.90, 2.21)),
    ("high_32", "dsire"): ((41.77, 6.61), (5.96, 1.46), (91.90, 1.28)),
    ("high_32", "frobenius"): ((68.62, 5.53), (9.25, 1.21), (86.51, 1.12)),
}

T = TypeVar("T")


class DsireError(Exception):
    """Something the user can mend; the message is one line that says what to do."""


class NoLora(DsireError):
    """A sound file of something else, such as stands beside LoRAs: in a folder it is left out and counted."""


def shown(what: object) -> str:
    """A name out of a file, or the first line of a library's error: at most 160 characters."""
    text = str(what).strip()
    if isinstance(what, BaseException):
        text = text.splitlines()[0].rstrip(" .") if text else type(what).__name__
    return text if len(text) <= 160 else f"{text[:120]}... ({len(text):,} characters)"


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print lines; what a name out of a file could do to a terminal, or to a line, is escaped here for all of them."""
    escaped = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(line)) + "\n" for line in lines]
    print(*escaped, sep="", end="", file=file or sys.stdout, flush=True)


@contextmanager
def asking(what: str, hint: str = "") -> Iterator[None]:
    """The boundary to libraries: whatever one raises, in one line: what was asked of it, its own words, and a hint."""
    try:
        yield
    except DsireError:
        raise
    except Exception as error:  # a library may raise anything
        raise DsireError(f"{what} ({shown(error)})" + (f": {hint}" if hint else "")) from error


@contextmanager
def naming(name: object) -> Iterator[None]:
    """Begin an error with the name that the user has for the file."""
    try:
        yield
    except DsireError as error:
        raise type(error)(f"{name}: {error}") from error


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def torchrun(name: str, otherwise: int) -> int:
    """What torchrun says of this process, such as its RANK among all of WORLD_SIZE."""
    number = os.environ.get(name, "")
    return int(number) if number.isdecimal() and "WORLD_SIZE" in os.environ else otherwise


def cores() -> int:
    """The cores that this process may use: under torchrun its part of the machine's."""
    return max(1, int(joblib.cpu_count()) // max(1, torchrun("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def one_thread_each() -> Iterator[None]:
    """For many small matrices: a second thread of torch's or NumPy's costs each of them more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def in_parallel(function: Callable[[Any], T], items: Sequence[Any], at_once: int = 0, name: str = "") -> list[T]:
    """What the function gives for each item, on all cores (or `at_once`), a thread each; `name` is a progress bar's."""
    pool = ThreadPoolExecutor(min(at_once or cores(), cores()))
    try:
        with one_thread_each():
            done = pool.map(function, items)
            return list(tqdm(done, desc=name, total=len(items), disable=None if name and items else True))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error, or Ctrl-C, none is waited for


# ---- A LoRA layer and its spectra (Section 3.1) ---------------------------------------------------------------------


def lora_spectra(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular values of A, B and BA, largest first, for a batch of LoRA layers of one shape.

    Nothing larger than r x r is decomposed, and the out x in product is never formed: with the Gram matrices G = A Aᵀ
    and H = Bᵀ B, and G = L Lᵀ (Cholesky), the squares of the singular values are the eigenvalues of G, H and Lᵀ H L.
    Squares lose half of the digits where singular values lie far apart: such a model goes by way of `qr_spectra`.

    A ("down") is [..., r, in], B ("up") [..., out, r], and what is returned three times [..., r], all in float64; where
    a dimension is smaller than r the missing values are zeros. FloatingPointError says that numbers are not finite.
    """
    g, h = gram(a), gram(b.mT)
    lower, failed = torch.linalg.cholesky_ex(g)
    grams = torch.stack([g, h, lower.mT @ h @ lower])
    if not grams.diagonal(dim1=-2, dim2=-1).sum().isfinite():
        return qr_spectra(a, b)
    squares = torch.linalg.eigvalsh(grams).flip(-1)
    # Rounding is about 1e-16 of |G|, of |H| and of |G| |H|. A least square of 1e-7 times that has nine digits, and so
    # have all that are larger; below 1e-280 a square has lost digits whatever it stands next to.
    of_g, of_h, _ = squares[..., 0]
    rounding = torch.stack([of_g, of_h, of_g * of_h])
    exact = (failed == 0) & (squares[..., -1] > (1e-7 * rounding).clamp_min(1e-280)).all(0)
    spectra = squares.clamp_min(0).sqrt()
    if not exact.all():
        spectra[:, ~exact] = torch.stack(qr_spectra(a[~exact], b[~exact]))
    return spectra[0], spectra[1], spectra[2]


def gram(x: Tensor) -> Tensor:
    """X Xᵀ, [..., r, r], of X [..., r, n]."""
    if x.device.type != "cpu":
        return x @ x.mT
    rows = x.numpy()
    with np.errstate(all="ignore"):  # the caller looks for what is not finite
        return torch.from_numpy(rows @ rows.swapaxes(-1, -2))  # NumPy sees the symmetry: twice as fast as torch


def qr_spectra(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `lora_spectra` gives, for any matrices: with Aᵀ = Q R and B = P S (thin QR), BA = P (S Rᵀ) Qᵀ."""
    r, s = (torch.linalg.qr(matrix, mode="r").R for matrix in (a.mT, b))
    core = s @ r.mT
    # LAPACK's QR may drop a NaN, and its SVD may not return from one
    if not (a.isfinite().all() and b.isfinite().all() and r.isfinite().all() and core.isfinite().all()):
        raise FloatingPointError("numbers that are not finite, or too large to multiply")
    of_a, of_b, of_ba = (of_rank(torch.linalg.svdvals(matrix), a.shape[-2]) for matrix in (r, s, core))
    return of_a, of_b, of_ba


def matrix_spectrum(matrix: Tensor, count: int) -> Tensor:
    """Likewise the largest singular values of any matrix [out, in]: [count], or [min(out, in)] if that is less."""
    squared = gram(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT)
    if squared.diagonal().sum().isfinite():
        squares: Tensor = torch.linalg.eigvalsh(squared).flip(-1)[:count]
        if squares[-1] > max(1e-6 * float(squares[0]), 1e-280):
            return squares.sqrt()
    if not matrix.isfinite().all():
        raise FloatingPointError("weights that are not finite")
    return torch.linalg.svdvals(matrix)[:count]


def product_spectrum(b: Tensor, a: Tensor, count: int) -> Tensor:
    """`matrix_spectrum` of B A, for B [out, r] and A [r, in]; formed only where r is no smaller than out or in."""
    return lora_spectra(a, b)[2][:count] if len(a) < min(len(b), a.shape[1]) else matrix_spectrum(b @ a, count)


def of_rank(values: Tensor, rank: int) -> Tensor:
    """Spectra [..., any number] cut, or filled with zeros, to [..., rank]."""
    return torch.nn.functional.pad(values, (0, rank - values.shape[-1]))


class Voter(NamedTuple):
    """One classifier of the vote: a layer's name and the matrix it looks at, "A", "B" or "BA"."""

    layer: str
    matrix: str


def numbered(names: list[Any]) -> Tensor:
    """Names as numbers, 0, 1, ... in their sorted order: int64."""
    number = {name: index for index, name in enumerate(sorted(set(names)))}
    return torch.tensor([number[name] for name in names], dtype=torch.int64)


@dataclass(frozen=True)
class Spectra:
    """The spectra of some models, with what is known of the models."""

    values: Tensor  # float64 [voters, models, r]; a layer of a lower rank than r has zeros at its end
    sizes: Tensor  # n, the number of training images of each model: int64 [models]; 0 if it is not known
    names: list[Any]  # what each model's micro-dataset is called (LoRA-WiSE's column `name`): strings or integers
    voters: list[Voter]  # what each row of values is
    shapes: dict[str, list[int]]  # layer -> [out, in, rank], or [out, in] where there is no A and B
    notes: list[str] = field(default_factory=list)  # what was left out or is unusual, to be said in the report
    recipes: list[str] = field(default_factory=list)  # what each model's recipe is called; empty where nothing says it
    method: str = "LoRA"  # or what else the models are, such as "full fine-tune"; BA is the change of the weights then
    first: list[str] = field(default_factory=list)  # of a file: what has to be known before an estimate

    @cached_property
    def micro_datasets(self) -> Tensor:
        """The micro-dataset of each model as a number, 0 to K - 1 in the order of the names: int64 [models]."""
        return numbered(self.names)

    @cached_property
    def of_recipe(self) -> Tensor:
        """Likewise the recipe of each model."""
        return numbered(self.recipes or [""] * len(self.names))

    @cached_property
    def groups(self) -> Tensor:
        """The recipe and size of each model as one number, 0, 1, ...: int64 [models]."""
        return numbered([*zip(self.of_recipe.tolist(), self.sizes.tolist(), strict=True)])

    @cached_property
    def kinds(self) -> dict[str, Tensor]:
        """The kinds of matrix that vote, "A", "B" and "BA", each with the mask of its voters: bool [voters]."""
        masks = {matrix: torch.tensor([voter.matrix == matrix for voter in self.voters]) for matrix in MATRICES}
        return {matrix: mask for matrix, mask in masks.items() if mask.any()}

    @property
    def count(self) -> int:
        return len(set(self.names))

    def of_models(self, models: Tensor) -> Spectra:
        """The models with these numbers, int64, or of this mask, bool [models]."""
        models = models.nonzero().flatten() if models.dtype == torch.bool else models
        names, recipes = ([its[model] for model in models.tolist() if its] for its in (self.names, self.recipes))
        return replace(self, values=self.values[:, models], sizes=self.sizes[models], names=names, recipes=recipes)

    def of_matrices(self, matrices: Iterable[str]) -> Spectra:
        return self.of_voters([voter for voter in self.voters if voter.matrix in matrices])

    def of_voters(self, voters: list[Voter]) -> Spectra:
        rows = {voter: row for row, voter in enumerate(self.voters)}
        return replace(self, values=self.values[[rows[voter] for voter in voters]], voters=voters)


# ---- The voters and the vote (Section 3.2) --------------------------------------------------------------------------


class Split(NamedTuple):
    """Which models of some Spectra train a predictor, and of which it is asked: their numbers, rising, int64."""

    train: Tensor
    test: Tensor


@dataclass(frozen=True)
class Prediction:
    """What a predictor says of some models."""

    sizes: Tensor  # its answers, int64 [models]
    candidates: Tensor  # the sizes that it was trained on, in rising order: int64 [sizes]
    shares: Tensor  # of the votes, or weights of a regression, that each of these got: float64 [models, sizes]
    answers: Tensor | None = None  # what a regression answers before it is moved to a candidate: float64 [models]


Predictor = Callable[[Spectra, list[Split]], list[Prediction]]


def nearest(values: Tensor, splits: list[Split]) -> list[Tensor]:
    """For each split the training model nearest to each test model by each voter, int64 [voters, test models].

    Distances (Euclidean) are exact, each computed once for all splits; of models that are equally far it is the first.
    """
    trained, asked = (torch.cat(its).unique() for its in zip(*splits, strict=True))
    if len(asked) * len(trained) > DISTANCES_AT_ONCE and len(asked) > 1:
        middle = asked[len(asked) // 2]
        halves = ([Split(train, test[(test < middle) == low]) for train, test in splits] for low in (True, False))
        return [torch.cat(both, dim=1) for both in zip(*(nearest(values, half) for half in halves), strict=True)]
    places = [(torch.bucketize(test, asked).numpy(), torch.bucketize(train, trained).numpy()) for train, test in splits]

    def search(voter: int) -> list[Any]:
        # squares of very large or small spectra are out of range; a power of two changes no digit of the others
        middle = float(values[voter, trained].amax(-1).median())
        factor = 2.0 ** min(1000, max(-1000, -math.frexp(middle)[1]))
        squares = squared_distances(values[voter, asked] * factor, values[voter, trained] * factor)
        return [columns[squares.take(rows, axis=0).take(columns, axis=1).argmin(1)] for rows, columns in places]

    found = in_parallel(search, range(len(values)))
    return [trained[torch.from_numpy(np.stack(its))] for its in zip(*found, strict=True)]


def squared_distances(x: Tensor, y: Tensor) -> Any:
    """|x_i - y_j|² of rows x [n, r] and y [m, r]: a NumPy array [n, m]."""
    return cdist(x.numpy(), y.numpy(), "sqeuclidean")  # not `torch.cdist`: its roots make near ones equal


def votes_of(spectra: Spectra, splits: list[Split]) -> list[tuple[Tensor, Tensor]]:
    """In each split the sizes of the nearest training models, int64 [voters, models]; and the sizes it has, rising."""
    found = zip(nearest(spectra.values, splits), splits, strict=True)
    return [(spectra.sizes[models], spectra.sizes[split.train].unique()) for models, split in found]


def majority(named: Tensor, candidates: Tensor) -> Prediction:
    """The size that most voters name; among equals the one that was named first in the order of the voters."""
    ballots = named[:, :, None] == candidates  # [voters, models, sizes]
    counts = ballots.sum(0)
    first = ballots.to(torch.uint8).argmax(0)  # the first voter for a size
    first = first.masked_fill(counts < counts.max(-1, keepdim=True).values, len(named))
    return Prediction(candidates[first.argmin(-1)], candidates, counts.double() / len(named))


def nearest_size(answers: Tensor, candidates: Tensor, in_log: bool = False) -> Tensor:
    """The candidate nearest to each answer, or its logarithm, the smaller one of two: int64, of the answers' shape."""
    x, y = (its.double().log() if in_log else its.double() for its in (answers, candidates))
    return candidates[(x[..., None] - y).abs().argmin(-1)]


def dsire(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """The paper's predictor: one 1-NN per voter, fitted on the training models, and the majority of their votes."""
    return [majority(*votes) for votes in votes_of(spectra, splits)]


def dsire_average(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """The same voters, but the training size nearest to the mean of what they name (Table 5, average vote)."""
    return [
        replace(majority(named, candidates), sizes=nearest_size(named.double().mean(0), candidates))
        for named, candidates in votes_of(spectra, splits)
    ]


def frobenius(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """The paper's baseline Frobenius-NN (Table 2): 1-NN on each matrix's Frobenius norm, that of its spectrum."""
    return dsire(replace(spectra, values=torch.linalg.vector_norm(spectra.values, dim=-1, keepdim=True)), splits)


def whole_model(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """A single 1-NN on all the spectra of a model, concatenated (Table 5, NN-full)."""
    return dsire(replace(spectra, values=spectra.values.transpose(0, 1).flatten(1)[None]), splits)


def ridge(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """Per voter a ridge regression from the spectrum to n, rounded to the nearest training size; majority (Table 5)."""
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # The paper doesn't give its regularisation. Singular values of A, B and BA differ by orders of magnitude, so they
    # are standardised; scikit-learn's default penalty of 1 is mild then for 90 models and at most 32 features.
    return fitted_voters(lambda: make_pipeline(StandardScaler(), Ridge()), spectra, splits)


def gda(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """Per voter a Gaussian discriminant analysis of the spectrum; majority (Table 5)."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    # Fifteen models of a size can't tell a covariance of its own for up to 32 singular values: all sizes share one. The
    # default solver, SVD, needs no inverse, which near collinear values would spoil.
    return fitted_voters(LinearDiscriminantAnalysis, spectra, splits)


def fitted_voters(new_estimator: Callable[[], Any], spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """The majority of the training sizes nearest to what one scikit-learn estimator per voter answers."""
    every, y, found = spectra.values.numpy(), spectra.sizes.numpy(), []
    with one_thread_each(), asking("ridge or gda can't be fitted", "label more models, or give a larger --train_size"):
        for train, test in ([its.numpy() for its in split] for split in splits):
            x = [voter for voter in every if np.ptp(voter[train], axis=0).any()] or every  # a constant says nothing
            answers = [new_estimator().fit(voter[train], y[train]).predict(voter[test]) for voter in x]
            candidates = spectra.sizes[train].unique()
            found.append(majority(nearest_size(torch.tensor(np.stack(answers)), candidates), candidates))
    return found


# ---- The protocol (Section 5) ---------------------------------------------------------------------------------------


class Protocol(NamedTuple):
    """So many experiments, each with so many micro-datasets drawn to train on, all others to test on."""

    experiments: int = 10
    train_size: int = 15
    seed: int = 42


class Metrics(NamedTuple):
    """How good predictions are: MAE in images, MAPE in % and accuracy in %."""

    mae: float
    mape: float
    accuracy: float


def metrics(sizes: Tensor, predicted: Tensor) -> Metrics:
    errors = (predicted - sizes).abs().double()
    mape, accuracy = 100 * float((errors / sizes).mean()), 100 * float((errors == 0).double().mean())
    return Metrics(float(errors.mean()), mape, accuracy)


def splits(micro_datasets: Tensor, protocol: Protocol) -> list[Split]:
    """Models to train on and to test on, once per experiment; none of the micro-datasets [models] is divided."""
    count, train_size = len(micro_datasets.unique()), protocol.train_size
    if train_size >= count:
        works = f"the largest --train_size that works is {count - 1}" if count > 1 else "an evaluation needs two"
        raise DsireError(f"--train_size={train_size} is too many of {counted(count, 'micro-dataset')}: {works}")
    draw = random.Random(protocol.seed)
    drawn = [torch.tensor(draw.sample(range(count), train_size)) for _ in range(protocol.experiments)]
    return [split_by(torch.isin(micro_datasets, trained)) for trained in drawn]


def split_by(trained: Tensor) -> Split:
    """A split by a mask, bool [models], of the models to train on."""
    return Split(trained.nonzero().flatten(), (~trained).nonzero().flatten())


def judge(spectra: Spectra, runs: list[Split], predictions: list[Prediction]) -> list[Metrics]:
    return [metrics(spectra.sizes[run.test], its.sizes) for run, its in zip(runs, predictions, strict=True)]


def mean_and_std(experiments: list[Metrics]) -> dict[str, tuple[float, float]]:
    """Mean and population standard deviation of each metric over the experiments."""
    table = torch.tensor(experiments, dtype=torch.float64)
    means, stds = table.mean(0).tolist(), table.std(0, correction=0).tolist()
    return dict(zip(Metrics._fields, zip(means, stds, strict=True), strict=True))


# ---- Beyond the paper: one regression from all log spectra to log n -------------------------------------------------


def log_ridge(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """One ridge regression from all log spectra to log n; answers the training size nearest in log."""
    # Singular values shrink roughly as a power of n, so their logarithms are near linear in log n, in every voter; and
    # a regression knows what a classifier does not, that 4 lies between 3 and 5. Nothing is chosen on test models.
    with one_thread_each():
        return [fitted_ridge(spectra.of_models(split.train), spectra.of_models(split.test))[0] for split in splits]


def log_regression(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """The regression of `log_ridge`, but its answer can be any whole number, also one between the training sizes."""
    return [unrounded(prediction) for prediction in log_ridge(spectra, splits)]


def unrounded(prediction: Prediction) -> Prediction:
    """What the regression itself answers: a whole number."""
    assert prediction.answers is not None
    numbers = whole_numbers(prediction.candidates)
    return replace(prediction, sizes=prediction.answers.clamp(numbers[0], numbers[-1]).round().long())


def whole_numbers(candidates: Tensor) -> Tensor:
    """Numbers of images up to four times beyond the candidates, int64 in rising order: all, or 2,000 evenly in log."""
    low, high = math.log(max(1, int(candidates[0]) / 4)), math.log(4 * int(candidates[-1]))
    return torch.linspace(low, high, 2000, dtype=torch.float64).exp().round().long().unique()


def fitted_ridge(train: Spectra, new: Spectra) -> tuple[Prediction, Prediction]:
    """What `log_ridge` says of new models, and of each training model when its micro-dataset is left out."""
    # but features are standardised, and recipes' distances taken, with all: of several recipes it is somewhat too good
    x, z = log_features(train, new)
    kernel, cross = x @ x.T / x.shape[1], z @ x.T / x.shape[1]
    y, candidates = train.sizes.double().log(), train.sizes.unique()
    units = train.micro_datasets if train.count > 1 else torch.arange(len(y))
    answers, left_out = left_out_ridge(kernel, cross, y, units)
    if train.of_recipe.any():
        # one line through several recipes fits none: the near ones weigh more; of what is far from all it knows more
        among, between = recipe_distances(x, z, train, new)
        kernels = (1 + kernel) / (1 + among / 8**2), (1 + cross) / (1 + between / 8**2)
        local, local_left_out = left_out_ridge(*kernels, y, units)
        among = among.masked_fill(units[:, None] == units, math.inf)
        far = [1 - 1 / (1 + squared.amin(1) / 5**2) for squared in (between, among)]
        answers = local + far[0] * (answers - local)
        left_out = local_left_out + far[1] * (left_out - local_left_out)
    deviation = (y - left_out).square().mean().sqrt().clamp_min(1e-9)
    found = []
    for logs in (answers, left_out):
        shares = torch.softmax(-((logs[:, None] - candidates.double().log()) / deviation).square() / 2, dim=1)
        found.append(Prediction(candidates[shares.argmax(1)], candidates, shares, logs.exp()))
    return found[0], found[1]


def log_features(train: Spectra, test: Spectra) -> tuple[Tensor, Tensor]:
    """Log singular values of all voters, standardised by the training models': float64 [models, voters * r]."""
    floor = (1e-6 * train.values.amax((1, 2), keepdim=True)).clamp_min(torch.finfo(torch.float64).tiny)  # is rounding
    x, z = (side.values.clamp_min(floor).log().transpose(0, 1).flatten(1) for side in (train, test))
    mean, deviation = x.mean(0), x.std(0, correction=0)
    scale = torch.where(deviation > 1e-9, 1 / deviation.clamp_min(1e-9), 0)  # what doesn't vary says nothing
    return (x - mean) * scale, (z - mean) * scale


def left_out_ridge(kernel: Tensor, cross: Tensor, y: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression on y [models] with an intercept: answers [new], and [models] each without its unit, int64."""
    if len(y) == 1:
        return y.expand(len(cross)), y
    penalties, of_model = [10 ** (power / 2) for power in range(-8, 5)], kernel.mean(0)
    values, vectors = torch.linalg.eigh(kernel - of_model - of_model[:, None] + of_model.mean())
    values = values.clamp_min(0)
    folds = [(units == unit).nonzero().flatten() for unit in units.unique()]
    errors = y.new_empty(len(penalties), len(y))
    # with the hat matrix H (fitted values H y), a unit f that is left out is missed by (I - H_ff)^-1 (y - H y)_f
    for penalty, missed in zip(penalties, errors, strict=True):
        hat = (vectors * (values / (values + penalty))) @ vectors.T + 1 / len(y)
        residuals = y - hat @ y
        for fold in folds:
            rest = torch.eye(len(fold), dtype=y.dtype) - hat[fold][:, fold]
            missed[fold] = torch.linalg.solve(rest, residuals[fold])
    best = min(range(len(penalties)), key=lambda row: float(errors[row].square().mean()))
    cross = cross - of_model
    cross = cross - cross.mean(1, keepdim=True)
    weights = (cross @ vectors / (values + penalties[best])) @ vectors.T + 1 / len(y)  # H for new models
    return weights @ y, y - errors[best]


def recipe_distances(x: Tensor, z: Tensor, train: Spectra, new: Spectra) -> tuple[Tensor, Tensor]:
    """Squared distances of models, [models, models] and [new, models], in four numbers that tell recipes apart."""
    means, _ = means_by_group(x, train.groups)  # of the features by recipe and size: two numbers along which they vary
    axes = torch.linalg.svd(means - means.mean(0), full_matrices=False).Vh[:2].T
    norms = [mean_over_layers(log_norms(spectra), spectra.kinds) for spectra in (train, new)]
    known, asked = whitened(torch.cat([x @ axes, norms[0]], 1), torch.cat([z @ axes, norms[1]], 1), train.groups)
    return torch.from_numpy(squared_distances(known, known)), torch.from_numpy(squared_distances(asked, known))


def log_norms(spectra: Spectra) -> Tensor:
    """The logarithm of the Frobenius norm of each model's matrices: float64 [models, voters]."""
    largest = spectra.values.amax(-1).clamp_min(torch.finfo(torch.float64).tiny)  # its square may be out of range
    norms: Tensor = torch.linalg.vector_norm(spectra.values / largest[..., None], dim=-1).clamp_min(1e-9)
    return (largest.log() + norms.log()).T


def mean_over_layers(norms: Tensor, kinds: dict[str, Tensor]) -> Tensor:
    """The means of log norms of A and of B (of BA too, or alone, where those do not vote): [models, 2 or 1]."""
    return torch.stack([norms[:, kind].mean(1) for kind in [*kinds.values()][:2]], dim=1)


def means_by_group(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The means of x [models, p] in groups 0, 1, ...: [groups, p], and how many models each has: [groups, 1]."""
    members = torch.nn.functional.one_hot(groups).double()
    count = members.sum(0)[:, None]
    return members.T @ x / count, count


def whitened(x: Tensor, z: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """x [models, p] and z [new, p] so turned and scaled that x has the covariance I within groups 0, 1, ..."""
    unit = x.std(0, correction=0).clamp_min(1e-6)
    x, z = x / unit, z / unit
    means, count = means_by_group(x, groups)
    residuals, of_all = x - means[groups], x - x.mean(0)
    # groups may be as good as single models: a fifth of the spread of all is said beforehand, as much as four models
    before = of_all.T @ of_all / max(1, len(x) - 1) / 5**2
    covariance = (residuals.T @ residuals + 4 * before) / (len(x) - len(count) + 4)
    values, vectors = torch.linalg.eigh(covariance)
    turn = vectors / (values.clamp_min(0) + 1e-9).sqrt()  # less is rounding
    return x @ turn, z @ turn


PREDICTORS: dict[str, Predictor] = {
    its.__name__.replace("_", "-"): its
    for its in (dsire, dsire_average, frobenius, whole_model, ridge, gda, log_ridge, log_regression)
}


# ---- How sure: what is said of labelled models that were left out, beside a new model -------------------------------

NOT_COMPARABLE = 0.05  # p-values of the check up to this are said first
REASONS = "another recipe, another base of the same shape, or a size that is not labelled"
SD_OF_WIDTH = {768: " (SD 1.5)", 1024: " (SD 2)", 2048: " (SDXL)"}
UNTRAINED = "untrained: the change of the weights is zero in every layer, an estimate means nothing"


@dataclass(frozen=True)
class Estimate:
    """What is said of one file."""

    file: str  # as the user named it
    status: str  # "ok", "not comparable", "untrained" or "refused"
    answer: int = 0  # the dataset size n that the predictor names; 0 if untrained or refused
    shares: dict[int, float] = field(default_factory=dict)  # size -> its share of the votes, or weight of a regression
    confidence_set: list[int] = field(default_factory=list)  # sizes, rising; of log-regression the ends of an interval
    told: int = 0  # so many left-out labelled models were told this answer (the labelled size nearest to it)
    right: int = 0  # and so many of them had that size
    recipe_p: float | None = None  # of the file's being one more of the labelled kind; None where it can't be told
    recipe: str = ""  # the labelled recipe that it is nearest to, where there are several
    stated_size: int = 0  # what the file says of itself, 0 if nothing
    first: list[str] = field(default_factory=list)  # to be known before the estimate, which is only a "would be" then
    notes: list[str] = field(default_factory=list)


def leave_out(fitted: Spectra, new: Spectra, predictor: Predictor) -> tuple[Prediction, Prediction]:
    """The answers for new models, and for each labelled one without its micro-dataset (if there are several)."""
    if predictor in (log_ridge, log_regression):
        answer, left_out = fitted_ridge(fitted, new)
        return (answer, left_out) if predictor is log_ridge else (unrounded(answer), unrounded(left_out))
    values, sizes = torch.cat([fitted.values, new.values], dim=1), torch.cat([fitted.sizes, new.sizes])
    both = replace(fitted, values=values, sizes=sizes, names=[*fitted.names, *new.names], recipes=[])
    every = split_by(torch.arange(len(sizes)) < len(fitted.sizes))
    folds = [split_by(fitted.micro_datasets != number) for number in range(fitted.count) if fitted.count > 1]
    answer, *without = predictor(both, [every, *folds])
    shares, left_out_sizes = answer.shares.new_zeros(len(every.train), len(answer.candidates)), fitted.sizes.clone()
    for fold, its in zip(folds, without, strict=True):
        known = torch.isin(answer.candidates, its.candidates)  # a size may be in one micro-dataset only
        shares[fold.test[:, None], known.nonzero().T] = its.shares
        left_out_sizes[fold.test] = its.sizes
    return replace(answer, answers=None), Prediction(left_out_sizes, answer.candidates, shares)


def conformal_p(fitted: Spectra, left_out: Prediction, new: Prediction, candidates: Tensor) -> Tensor:
    """The conformal p-value of each candidate size, int64 [sizes], for each new model: float64 [new, sizes].

    With s_i and s(n) how well the true size of a left-out model i and n for the new one conform to what is answered,
        p(n) = (1 + sum over micro-datasets of the mean over their models i of size n of [s_i <= s(n)]) / (K_n + 1):
    those are exchangeable, so each of the K_n that have size n, or the labelled size nearest to it, counts once (Lee,
    Barber and Willett 2023). How often p(n) > 1 - confidence holds the truth is measured (`how_sure`), not proven.
    """

    def conformity(its: Prediction, sizes: Tensor) -> Tensor:
        """The share of the votes (the sizes are the candidates then), or how near log n is to a regression's answer."""
        return its.shares if its.answers is None else -(sizes.double().log() - its.answers.log()[:, None]).abs()

    labelled = fitted.sizes.unique()
    true = conformity(left_out, labelled).gather(1, torch.searchsorted(labelled, fitted.sizes)[:, None]).flatten()
    asked, compared_with = conformity(new, candidates), nearest_size(candidates, labelled, in_log=True)
    p = torch.empty_like(asked)
    for size in labelled:
        models, columns = fitted.sizes == size, compared_with == size
        _, unit, count = fitted.micro_datasets[models].unique(return_inverse=True, return_counts=True)
        at_least_as_strange = true[models] <= asked[:, columns, None] + 1e-9
        p[:, columns] = (1 + at_least_as_strange.double() @ (1 / count.double())[unit]) / (len(count) + 1)
    return p


def check_recipe(fitted: Spectra, new: Spectra) -> tuple[Tensor, Tensor, int]:
    """Whether new models are farther from the nearest labelled recipe and size than left-out labelled ones are.

    Returns p [new], the number of a labelled model of the nearest group, int64 [new], and how many were left out.
    """
    known, groups, kinds = log_norms(fitted), fitted.groups, fitted.kinds
    far, near = group_distances(known, groups, log_norms(new), kinds)
    far_out, near_out = far.new_zeros(len(known), far.shape[1]), groups.clone()
    compared = torch.zeros(len(known), dtype=torch.bool)
    for number in range(fitted.count):
        rest, out = split_by(fitted.micro_datasets != number)
        out = out[torch.isin(groups[out], groups[rest])]  # others of its recipe and size are left
        if len(out):
            far_out[out], near_out[out] = group_distances(known[rest], groups[rest], known[out], kinds)
            compared[out] = True
    members, of_all = torch.nn.functional.one_hot(groups).double() * compared[:, None], far_out[compared].mean(0)
    # taken from each distance: what is usual in its group, its left-out models' mean, with that of all as of four more
    usual = (members.T @ far_out + 4 * of_all) / (members.sum(0)[:, None] + 4)
    most, most_out = (far - usual[near]).amax(1), (far_out - usual[near_out]).amax(1)[compared]
    p = (1 + (most_out >= most[:, None] - 1e-9).sum(1)) / (1 + len(most_out))  # 1 where none is compared
    return p, (groups == near[:, None]).int().argmax(1), len(most_out)


def group_distances(known: Tensor, groups: Tensor, asked: Tensor, kinds: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log squared distances from the nearest group, float64 [asked, 1 + kinds], and that group, int64 [asked]."""
    numbers, of_group = groups.unique(return_inverse=True)
    # what a recipe changes in all layers shows in means over layers, where chance averages out: they tell the nearest
    x, z = whitened(mean_over_layers(known, kinds), mean_over_layers(asked, kinds), of_group)
    of_means, near = torch.from_numpy(squared_distances(z, means_by_group(x, of_group)[0])).min(1)
    # what is wrong in one layer or kind of matrix (alpha is in BA only) shows in z-scores, by the group's own variance
    means, count = means_by_group(known, of_group)
    residuals = (known - means[of_group]).square()
    pooled = residuals.sum(0) / max(1, len(known) - len(numbers))
    variance = (count * means_by_group(residuals, of_group)[0] + 2 * pooled) / (count + 1)
    scores = (asked - means[near]).square() / variance[near].clamp_min(1e-12)  # less is rounding
    columns = torch.stack([of_means, *(scores[:, kind].mean(1) for kind in kinds.values())], dim=1)
    return columns.clamp_min(1e-3).log(), numbers[near]


def what_is_beyond(fitted: Spectra, new: Spectra) -> list[tuple[list[str], bool]]:
    """For each new model what is beyond all labelled ones in many layers, or far in one; and if it is unlike."""
    known, asked = log_norms(fitted), log_norms(new)
    beyond = (asked - known.amax(0)).clamp_min(0) + (asked - known.amin(0)).clamp_max(0)  # signed; 0 within the range
    found = []
    for its in beyond:
        said, unlike = {}, False
        for matrix, voters in fitted.kinds.items():
            strangest, far = int((its.abs() * voters).argmax()), its[voters].abs().sort().values.tolist()
            most, usual = float(its[strangest]), far[3 * len(far) // 4]
            unlike |= usual > math.log(2) or far[-1] > 3
            if usual > math.log(1.05) or far[-1] > 3:
                side, zero = "larger" if most > 0 else "smaller", far[-1] > 300  # no float32 but 0 is so far away
                what = f"{side} than any labelled model's, by a factor of up to {math.exp(min(far[-1], 300)):.3g},"
                if zero:
                    what = "zero" if most < 0 else "zero in all labelled models, and not here,"
                count = int((its[voters] * math.copysign(1, most) > 300 * zero).sum())
                where = f"{count} of {counted(len(far), 'layer')}" if count > 1 else fitted.voters[strangest].layer
                said[matrix] = f"{matrix} is {what} in {shown(where)}"
        if [*said] == ["BA"] and len(fitted.kinds) == len(MATRICES):
            said["BA"] += "; A and B are not: another alpha?"
        found.append(([*said.values()], unlike))
    return found


def estimates(fitted: Spectra, files: list[Spectra], predictor: str, confidence: float) -> list[Estimate]:
    """Estimates for the model of each file, of the labelled models' voters, with sets that hold that share of sizes."""
    values, sizes = torch.cat([file.values for file in files], dim=1), torch.cat([file.sizes for file in files])
    new = replace(files[0], values=values, sizes=sizes, names=[file.names[0] for file in files], recipes=[])
    with one_thread_each():
        answer, left_out = leave_out(fitted, new, PREDICTORS[predictor])
        p, near, compared = check_recipe(fitted, new)
    interval, several = predictor == "log-regression", fitted.count > 1  # of a single one nothing was left out
    candidates = whole_numbers(answer.candidates) if interval else answer.candidates
    held = conformal_p(fitted, left_out, answer, candidates) > 1 - confidence + 1e-9
    named, told = (nearest_size(its.sizes, answer.candidates, in_log=True) for its in (answer, left_out))
    found = []
    for row, (file, beyond) in enumerate(zip(files, what_is_beyond(fitted, new), strict=True)):
        shares = dict(zip(answer.candidates.tolist(), answer.shares[row].tolist(), strict=True))
        members, alike = candidates[held[row] & several].tolist(), (told == named[row]) & several
        members = members[:1] + members[-1:] if interval else members
        right = int((alike & (fitted.sizes == named[row])).sum())
        one = Estimate(new.names[row], "ok", int(answer.sizes[row]), shares, members, int(alike.sum()), right)
        recipe = fitted.recipes[int(near[row])] if fitted.of_recipe.any() else ""
        one = replace(one, recipe_p=float(p[row]) if compared else None, recipe=recipe, stated_size=int(sizes[row]))
        found.append(with_remarks(one, file, fitted, *beyond))
    return found


def with_remarks(one: Estimate, file: Spectra, fitted: Spectra, beyond: list[str], unlike: bool) -> Estimate:
    if UNTRAINED in file.first:
        return Estimate(one.file, "untrained", stated_size=one.stated_size, first=file.first, notes=file.notes)
    first, notes, strange = [*file.first], [*file.notes], one.recipe_p is not None and one.recipe_p <= NOT_COMPARABLE
    far, norms = (torch.linalg.vector_norm(its, dim=-1) for its in (fitted.values - file.values, fitted.values))
    if same := (far <= 1e-6 * norms).all(0).nonzero().flatten().tolist():
        label = f"{fitted.names[same[0]]} of {counted(int(fitted.sizes[same[0]]), 'image')}"
        notes.insert(0, f"this very model is among the labelled ones: {label}")
    elif strange or unlike:
        how = f" (p = {one.recipe_p:.2g})" if strange else ""
        first += [f"not comparable with the labelled models{how}: {REASONS}", *beyond]
    if one.confidence_set and not one.confidence_set[0] <= one.answer <= one.confidence_set[-1]:
        notes.append("the set does not hold the estimate: trust the set")
    if one.stated_size not in (0, one.answer):
        notes.append(f"the estimate disagrees with the size that the file states, {one.stated_size}")
    return replace(one, status="not comparable" if first else "ok", first=first, notes=notes)


def what_can_be_supported(fitted: Spectra, confidence: float) -> list[str]:
    """Notes if labelled sizes, or recipes, are in too few micro-datasets for the sets or the check."""
    if fitted.count == 1:
        return ["one micro-dataset only: how sure an estimate is, and whether a file is comparable, can't be told"]
    every, kinds = fitted.micro_datasets, (fitted.sizes, fitted.groups)
    of_size, of_group = ([len(every[its == one].unique()) for one in its] for its in kinds)
    least, needed, notes = min(of_size), math.ceil(1 / (1 - confidence) - 1 - 1e-9), []
    if least < needed:
        most = f"{least / (least + 1):.0%}: label {needed} or more for {100 * confidence:.6g}%"
        notes.append(f"every set holds sizes of {counted(least, 'micro-dataset')}, which support no more than {most}")
    enough = round(1 / NOT_COMPARABLE) - 1  # of fewer left-out models no p is so small
    if sum(count > 1 for count in of_group) < enough:
        notes.append(f"whether a file is comparable can't be told: label {enough} models or more")
    return notes


def matched(file: Spectra, fitted: Spectra) -> Spectra:
    """The file's model on the voters that it shares with the fitted ones; first and notes tell what doesn't fit."""
    both = {layer: (file.shapes[layer], its) for layer, its in fitted.shapes.items() if layer in file.shapes}
    other_shape = {layer for layer, (its, theirs) in both.items() if its[:2] != theirs[:2]}
    of_shape = both.keys() - other_shape
    other_rank = {layer for layer in of_shape if len({shape[2] for shape in both[layer] if shape[2:]}) == 2}
    remarks = []
    for layers, what in (
        (other_shape, "of another shape than the labelled models'"),
        (other_rank, "of another rank than the labelled models', and compared by BA alone"),
        (fitted.shapes.keys() - both.keys(), "of the labelled models not in the file"),
        (file.shapes.keys() - both.keys(), "of the file unknown to the labelled models"),
    ):
        for layer in sorted(layers)[:1]:
            shapes = " ({}, not {})".format(*both[layer]) if layer in both else ""
            remarks.append(f"{counted(len(layers), 'layer')} {what}, such as {shown(layer)}{shapes}")
    alike, there = of_shape - other_rank, set(file.voters)
    fits = {"A": alike, "B": alike, "BA": of_shape}
    shared = file.of_voters([its for its in fitted.voters if its in there and its.layer in fits[its.matrix]])
    kinds, first = what_they_are(file, fitted), list(file.first)
    if not shared.voters:
        raise DsireError("; ".join([f"nothing in common with the labelled models: {kinds}", *remarks[:2]]))
    if file.method != fitted.method:
        methods = f"it is a {file.method}, and each labelled model a {fitted.method}"
        first.append(f"another method: {methods}; compared by {' '.join(shared.kinds)}")
    if other_shape:
        first.append(f"another base: {kinds}")
    elif 2 * len(alike) < len(fitted.shapes):
        first.append(f"{len(alike)} of the {len(fitted.shapes)} labelled layers are in the file, and fit: {kinds}")
    values = of_rank(shared.values, min(file.values.shape[-1], fitted.values.shape[-1]))
    return replace(shared, values=values, notes=file.notes + remarks, first=first)


def what_they_are(file: Spectra, fitted: Spectra) -> str:
    """The kind of a file's model and of the labelled ones, and what to do about it."""
    (its, looks), (theirs, their_looks) = kind_of_model(file.shapes), kind_of_model(fitted.shapes)
    advice = "label models of its own kind (README, Your own LoRA)"
    subsets = {name: (1024 if name.endswith("_2") else 768, int(name.split("_")[1])) for name, _ in PAPER}
    if fits := [name for name, look in subsets.items() if look in looks - their_looks]:
        advice = f"use --subset with one of: {' '.join(fits)}"
    elif "BA" in {*fitted.kinds} - {*file.kinds}:
        advice = f"of a {file.method} the change of its weights is known if --base gives the model it began as"
    return f"it has {its}, they have {theirs}: {advice}"


def kind_of_model(shapes: dict[str, list[int]]) -> tuple[str, set[tuple[int, int]]]:
    """What layers look like, for messages; and the widths of the text that cross-attention looks at, with the rank."""
    looks = {(shape[1], shape[-1]) for layer, shape in shapes.items() if layer.endswith("attn2_to_k")}
    ranks = " ".join(map(str, sorted({shape[2] for shape in shapes.values() if len(shape) > 2})))
    widths = ", ".join(f"{width}{SD_OF_WIDTH.get(width, '')}" for width in sorted({width for width, _ in looks}))
    of_rank, of_width = f" of rank {ranks}" if ranks else "", f", cross-attention width {widths}" if widths else ""
    return f"{counted(len(shapes), 'layer')}{of_rank}{of_width}", looks


# ---- Everything compared, on the splits of the protocol -------------------------------------------------------------


class Table(NamedTuple):
    """A table as it is printed, and written to report.json: a row is a name and cells, and heads[0] is of the names."""

    title: str
    heads: list[str]
    rows: list[list[Any]]  # a cell is a text, a number, a mean with its standard deviation, or None for nothing

    def lines(self) -> list[str]:
        cells = [self.heads, *([*map(cell_text, row)] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
        return ["", *filter(None, [self.title]), *("  ".join(line).rstrip() for line in lines)]


def cell_text(cell: Any) -> str:
    if isinstance(cell, tuple):
        return " ± ".join(map(cell_text, cell))
    return "" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def means_table(title: str, heads: list[str], rows: dict[str, Tensor], numbers: Tensor) -> Table:
    """The means of numbers, float64 [models, columns], over the models of each row's mask; blank where unknown."""
    means = {name: numbers[mask].nanmean(0).tolist() for name, mask in rows.items()}
    return Table(title, heads, [[name, *(None if x != x else x for x in its)] for name, its in means.items()])


def metrics_table(title: str, rows: dict[str, list[Metrics]], paper: Paper, of: str = "predictor") -> Table:
    """Mean and standard deviation over experiments, how far the MAE is above dsire's, and the paper's values."""
    quoted, differences, table = any(name in paper for name in rows), "dsire" in rows and len(rows) > 1, []
    for name, its in rows.items():
        row: list[Any] = [name, *mean_and_std(its).values()]
        if differences:
            above = torch.tensor([one.mae - other.mae for one, other in zip(its, rows["dsire"], strict=True)])
            error = f" ± {float(above.std()) / len(above) ** 0.5:.3f}" if len(above) > 1 else ""
            row.append(None if name == "dsire" else f"{float(above.mean()):+.3f}{error}")
        table.append(row + [*paper.get(name, [None] * 3)] * quoted)
    heads = [of, "MAE", "MAPE %", "accuracy %"] + ["MAE - dsire's"] * differences
    return Table(title, heads + ["paper's MAE", "MAPE %", "accuracy %"] * quoted, table)


def by_train_size(spectra: Spectra, predictor: Predictor, protocol: Protocol) -> dict[str, list[Metrics]]:
    """The metrics with fewer micro-datasets to train on, up to as many as the protocol says (Figure 5)."""
    fewest = 2 if predictor is gda else 1  # a discriminant analysis needs more models than sizes
    counts = [n for n in (1, 2, 3, 5, 10) if fewest <= n < protocol.train_size] + [protocol.train_size]
    runs = {n: splits(spectra.micro_datasets, protocol._replace(train_size=n)) for n in counts}
    return {str(n): judge(spectra, its, predictor(spectra, its)) for n, its in runs.items()}


Paper = dict[str, Any]  # row -> mean and standard deviation of each of the Metrics
SURE = ("MAE", "accuracy %", "90 % set holds %", "sizes in it", "not comparable %")
UNLABELLED = ("dsire's MAE", "log-ridge's MAE", "log-regression's MAE", "not comparable %")


def how_sure(spectra: Spectra, run: Split, predictor: Predictor) -> Tensor:
    """What SURE says of each test model of a run, float64 [test, 5]; NaN where nothing can be left out."""
    fitted, new = spectra.of_models(run.train), spectra.of_models(run.test)
    if fitted.count < 2:
        return torch.full((len(run.test), 5), math.nan, dtype=torch.float64)
    answer, left_out = leave_out(fitted, new, predictor)
    errors = (answer.sizes - new.sizes).abs()
    members = conformal_p(fitted, left_out, answer, answer.candidates) > 0.1 + 1e-9
    held = (members & (answer.candidates == new.sizes[:, None])).any(1)
    flagged = check_recipe(fitted, new)[0] <= NOT_COMPARABLE
    return torch.stack([errors, 100 * (errors == 0), 100 * held, members.sum(1), 100 * flagged], dim=1).double()


def if_unlabelled(spectra: Spectra, run: Split) -> Tensor:
    """What UNLABELLED says of each test model if its size is not labelled, [test, 4]; NaN if one size is all."""
    (train, test), sizes = run, spectra.sizes
    found = torch.full((len(test), 4), math.nan, dtype=torch.float64)
    for size in sizes[test].unique() if len(sizes[train].unique()) > 1 else ():
        gap = Split(train[sizes[train] != size], test[sizes[test] == size])
        voted, fit = dsire(spectra, [gap])[0], log_ridge(spectra, [gap])[0]
        errors = [(its.sizes - size).abs() for its in (voted, fit, unrounded(fit))]
        flagged = check_recipe(spectra.of_models(gap.train), spectra.of_models(gap.test))[0] <= NOT_COMPARABLE
        found[sizes[test] == size] = torch.stack([*errors, 100 * flagged], dim=1).double()
    return found


def by_recipe(spectra: Spectra, run: Split) -> Tensor:
    """`how_sure` log-ridge is by which recipes are labelled, [test, 4, 5]: all, all but its own, its own, one other."""
    (train, test), of_recipe = run, spectra.of_recipe
    every = how_sure(spectra, run, log_ridge)
    others, own, found = torch.empty_like(every), torch.empty_like(every), []
    for recipe in of_recipe.unique():
        known, its = of_recipe[train] == recipe, of_recipe[test] == recipe
        others[its] = how_sure(spectra, Split(train[~known], test[its]), log_ridge)
        one = how_sure(spectra, Split(train[known], test), log_ridge)
        own[its] = one[its]
        found.append(one.masked_fill(its[:, None], math.nan))
    return torch.stack([every, others, own, torch.stack(found).nanmean(0)], dim=1)


def compare(spectra: Spectra, protocol: Protocol, paper: Paper) -> tuple[list[Table], dict[str, list[Prediction]]]:
    """Tables of every predictor and kind of matrix (Tables 2, 5 and 9), and the predictions that the first is of."""
    runs, kinds = splits(spectra.micro_datasets, protocol), spectra.kinds
    asks = {name: partial(its, spectra) for name, its in PREDICTORS.items()}
    asks |= {f"dsire {kind}": partial(dsire, spectra.of_matrices([kind])) for kind in kinds if len(kinds) > 1}
    answers = in_parallel(lambda ask: ask(runs), [*asks.values()], at_once=1, name="predictors")
    found = dict(zip(asks, answers, strict=True))
    judged = {name: judge(spectra, runs, its) for name, its in found.items()}

    def of_all(ask: Callable[[Split], Tensor]) -> Tensor:
        return torch.cat(in_parallel(ask, runs, at_once=1, name="how sure"))

    voted, fitted = (of_all(partial(how_sure, spectra, predictor=its)) for its in (dsire, log_ridge))
    asked, sizes = torch.cat([run.test for run in runs]), spectra.sizes.unique()
    rows = {str(size): spectra.sizes[asked] == size for size in sizes.tolist()} | {"all": asked >= 0}
    inner = {"between two others": torch.isin(spectra.sizes[asked], sizes[1:-1])}
    heads = ["images", *SURE]
    unlabelled = of_all(partial(if_unlabelled, spectra))
    tables = [
        metrics_table("± the standard deviation over experiments; of differences, the standard error", judged, paper),
        metrics_table("dsire by training micro-datasets", by_train_size(spectra, dsire, protocol), {}, "to train"),
        means_table("dsire by dataset size", heads[:-1], rows, voted[:, :-1]),
        means_table("log-ridge by dataset size", heads, rows, fitted),
        means_table("models of a size that is not labelled", ["images", *UNLABELLED], rows | inner, unlabelled),
    ]
    if spectra.of_recipe.any():
        recipes, labelled = sorted(set(spectra.recipes)), of_all(partial(by_recipe, spectra))
        rows = {name: spectra.of_recipe[asked] == number for number, name in enumerate(recipes)} | {"mean": asked >= 0}
        heads = ["recipe", "all recipes", "all others", "its own", "one other"]
        for column, what in ((0, "MAE"), (2, "in the 90 % set %"), (4, SURE[4])):
            tables.append(means_table(f"log-ridge by labelled recipes: {what}", heads, rows, labelled[..., column]))
    return tables, found


# ---- The names of matrices, whoever wrote them ----------------------------------------------------------------------

# A layer's path, and the part that a key names. LoRA-WiSE and old diffusers: .lora.down.weight; kohya and LyCORIS:
# .lora_down.weight, .hada_w1_a; PEFT: .lora_A.<adapter>.weight; loralib: .lora_A; a full model: .weight. Left out are
# experts, as PEFT stacks several in one pair; and embeddings of full models.
PART = re.compile(
    r"(?s:(.{1,1000}?))(?:(?<!\bexperts)(?<!\bbase_layer)"
    r"(?:[._]lora(?:_linear_layer)?[._](down|up|mid)|\.lora_(?:embedding_)?([AB])"
    r"|\.(dora_scale|lora_magnitude_vector|alpha|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)))"
    r"(?:\.(?!weight|bias)[^.]{1,1000})?(?:\.weight)?"
    r"|(?<!embedding)(?<!embeddings)(?<!wte)(?<!wpe)(?<!\bshared)(?<!embed_tokens)[._](weight))"
)
PART_NAMES = {"down": "A", "up": "B", "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude"}
OF_LORA = re.compile(r"(?is)lora(?!.*bias$)|hada_|lokr_")
# A method, and what its change of the weights is made of: each row the product of B, perhaps a core, and A, or a matrix
# that is stored whole. LoHa multiplies its two element by element, LoKr takes their Kronecker product.
PRODUCTS = {
    "LoRA": [("B", "A", "mid", "")],
    "DoRA": [("B", "A", "mid", ""), ("", "", "", "magnitude")],
    "LoHa": [(f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}", "") for n in (1, 2)],
    "LoKr": [(f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}", f"lokr_w{n}") for n in (1, 2)],
}
Keys = dict[str, dict[str, str]]  # layer -> part, as PRODUCTS calls it, "alpha", or "weight" of a full model -> key


def ldm_block(match: re.Match[str]) -> str:
    """LDM counts the parts of all blocks in one row; in SD 1.5, SD 2 and SDXL a block has three, the last a sampler."""
    side = "down" if match[1] == "in" else "up"
    block, index = divmod(int(match[2]) - (side == "down"), 3)
    part = f"{side}samplers_0_conv" if match[4] else f"{'attentions' if match[3] == '1' else 'resnets'}_{index}_"
    return f"{side}_blocks_{block}_{part}"


# What gives a layer its name in diffusers, with underscores: replaced in turn.
SPELLINGS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    # wrappers; the main network, and what it was saved in; text encoders (CLIP-L is the first one)
    (r"_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module)[._]", ""),
    (r"^(?:lora_(?:prior_)?unet_|lora_transformer_|lycoris_|(?:base_model\.model|model|module|net|pipe|dit|unet|lora)\."
     r"|(?:transformer|diffusion_model|\w*state_dict|params)\.)+", ""),
    (r"^(?:lora_(?:prior_)?te|text_encoder_?|(?:text_encoders\.)?clip_|text_encoders\.(?=t5)|cond_stage_model"
     r"|conditioner\.embedders\.(?=0))(t5xxl|[0-9lg]?)[._](?:transformer\.)?", r"text_encoder_\1."),
    (r"^text_encoder_[01l]?\.", "text_encoder."), (r"^text_encoder_g\.", "text_encoder_2."),
    (r"^text_encoder_t5xxl\.", "text_encoder_3."), (r"\.processor\.|\.", "_"),
    (r"^(text_encoder_(?:\d_)?)?text_model_", r"\1"),  # CLIP has it or not
    (r"_to_out$", "_to_out_0"),  # old attention processors leave the 0 out
    # LDM's names of what a U-Net of SD and SDXL has
    (r"^middle_block_0_", "mid_block_resnets_0_"), (r"^middle_block_1_", "mid_block_attentions_0_"),
    (r"^middle_block_2_", "mid_block_resnets_1_"), (r"^(in|out)put_blocks_(\d{1,3})_(\d)_(?:(op|conv)$)?", ldm_block),
    (r"(_resnets_\d_)in_layers_2$", r"\1conv1"), (r"(_resnets_\d_)out_layers_3$", r"\1conv2"),
    (r"(_resnets_\d_)emb_layers_1$", r"\1time_emb_proj"), (r"(_resnets_\d_)skip_connection$", r"\1conv_shortcut"),
]  # fmt: skip


@lru_cache(2**16)  # the models of a folder have the same names
def layer_name(path: str) -> str:
    """One name for a layer, whatever prefix and separators its writer gave it, in the words of diffusers."""
    for written, ours in SPELLINGS:
        path = re.sub(written, ours, path)
    return path


def network_of(path: str) -> str:
    """What the name of a layer begins with if it is of another network than the main one; else ""."""
    other = re.match(r"text_encoder_(?:\d_)?|transformer_\d_", layer_name(path))
    return other[0] if other else ""


def layers_of(keys: Iterable[str], network: str = "") -> Keys:
    """The parts of each layer, whole or not, in the keys' order; `network` is what the keys leave out, as "unet."."""
    found: Keys = {}
    for key in keys:
        if match := PART.fullmatch(key):
            word = match[match.lastindex or 0]
            parts, part = found.setdefault(layer_name(network + match[1]), {}), PART_NAMES.get(word, word)
            if part in parts:
                raise DsireError(f"{shown(key)} is the same matrix as {shown(parts[part])}")
            parts[part] = key
    return found


def method_of(parts: Iterable[str]) -> str:
    """The method that these are all the parts of; "" if one lacks, or is of another method."""
    has = {*parts} - {"alpha"}
    for method, rows in PRODUCTS.items():
        complete = all(whole in has or {b, a} <= has for b, a, _, whole in rows)
        if complete and has <= {part for row in rows for part in row}:
            return method
    return ""


def lora_layers(keys: list[str], base: Weights | None = None, folder: str = "") -> tuple[Keys, list[str]]:
    """The layers of LoRA, or given a base of a full model, and all keys that are of none; NoLora if it is neither."""
    layers = {layer: parts for layer, parts in layers_of(keys).items() if method_of(parts)}
    used = {key for parts in layers.values() for key in parts.values()}
    others = [key for key in keys if key not in used]
    for key in others:
        if OF_LORA.search(layer_name(key[-1000:])):
            raise DsireError(f"{shown(key)} has no partner, or is not understood here: what A and B mean is not known")
    if layers:
        return layers, others
    why = "holds no LoRA, " + (f"but {', '.join(map(shown, sorted(others)[:3]))}" if others else "and no tensors")
    if base is None:
        raise NoLora(f"{why}: a whole model, or what is merged into one, is judged with --base")
    for network in (network_of(f"{folder}.x"), ""):
        full = {layer: its for layer, its in layers_of(keys, network).items() if "weight" in its}
        if full.keys() & base.layers.keys():
            return full, []
    raise NoLora(f"{why}; no layer in common with the base, such as {shown(min(base.layers))}")


# ---- Layers, of parquet (the layout of LoRA-WiSE) and of files; models as one ---------------------------------------

LABELS = ("label", "name", "recipe")  # the columns about a model


class Layer(NamedTuple):
    """What is found of a layer. A and B stand in the order of the file's keys, and BA is the last."""

    shape: list[int]  # [out, in, rank], or [out, in] where there is no A and B
    spectra: dict[str, Tensor]  # matrix -> [r], or [models, r] of a shard
    method: str = "LoRA"  # with what else makes spectra unlike: LoHa's rank, the type that a full model is stored in
    remarks: Mapping[str, bool] = {}  # remark -> whether it is true of this layer


def as_spectra(layers: Mapping[str, Layer], **about: Any) -> Spectra:
    """The layers of a shard, or of a file; `about` is what else `Spectra` is told."""
    voters = [Voter(layer, matrix) for layer, its in layers.items() for matrix in its.spectra]
    voters.sort(key=lambda voter: voter.matrix == "BA")  # their order breaks ties: A and B, then the changes BA
    rows = [layers[voter.layer].spectra[voter.matrix] for voter in voters]
    width = max(row.shape[-1] for row in rows)
    values = torch.stack([of_rank(row, width) for row in rows]).view(len(rows), -1, width)
    shapes = {layer: its.shape for layer, its in layers.items()}
    method = " and ".join(sorted({its.method for its in layers.values()}))
    return Spectra(values=values, voters=voters, shapes=shapes, method=method, **about)


def together(said: Iterable[tuple[str, str]], count: int, what: str) -> list[str]:
    """Of (layer or file, remark) those that are equal but for their numbers as one, with how many say so if not all."""
    alike: dict[str, list[tuple[str, str]]] = {}
    for name, remark in said:
        alike.setdefault(re.sub(r"\d+", "0", remark), []).append((name, remark))
    notes = []
    for its in alike.values():
        name, remark = its[0]
        of_all = [other for _, other in its] == [remark] * count
        notes.append(remark if of_all else f"{remark} ({len(its)} of {count} {what}, such as {shown(name)})")
    return notes


def dataset_size(label: Any) -> int:
    """The number of images that a label says, as a number of any kind or in digits; 0 if it says none from 1 up."""
    number = re.fullmatch(r"\s*([0-9]{1,15})(\.(?!000\s*$)0*)?\s*", str(label))  # 1.000 may be a thousand
    return int(number[1]) if number else 0


def model_labels(table: Any) -> tuple[Tensor, list[Any], list[str]]:
    """The columns `label` (size n), `name` (micro-dataset) and, where there is one, `recipe` of a shard."""
    columns = [column for column in LABELS if column != "recipe" or column in table.column_names]
    with asking("there must be one column `label` and one `name`, and there may be one `recipe`"):
        found = {column: table.column(column).to_pylist() for column in columns}
    wrong: list[tuple[str, str]] = []
    with suppress(AttributeError, KeyError, TypeError, ValueError, RecursionError):  # no metadata of `datasets`
        kinds = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        wrong += [(it, "numbers of classes") for it in columns if '"names"' in json.dumps(kinds.get(it))]
    wrong += [("label", repr(label)) for label in found["label"] if not dataset_size(label)]
    wrong += [("name", repr(name)) for name in found["name"] if type(name) not in (int, str)]
    wrong += [("recipe", "None") for recipe in found.get("recipe", []) if recipe is None]
    if wrong:
        raise DsireError("column {} holds {:.160}: sizes are whole from 1 up, names text or integers".format(*wrong[0]))
    sizes = torch.tensor([dataset_size(label) for label in found["label"]])
    return sizes, found["name"], [str(recipe) for recipe in found.get("recipe", [])]


def shard_spectra(path: Path, rank: int, device: str = "cpu") -> Spectra:
    """The spectra of all models in one parquet shard, one layer at a time, so that whole rows are never held."""
    import pyarrow.parquet as pq

    with reading(path, "parquet"), pq.ParquetFile(path, page_checksum_verification=True) as file:
        metadata, columns = file.metadata, file.schema_arrow.names
        labels = file.read([name for name in LABELS if name in columns])
    sizes, names, recipes = model_labels(labels)
    models = [f"model {shown(name)} of size {size}" for name, size in zip(names, sizes.tolist(), strict=True)]
    layers, others = lora_layers(columns)
    unused = ", ".join(shown(name) for name in others if name not in LABELS)
    notes = [f"columns that are not LoRA weights, left out: {unused}"] if unused else []
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    largest = 8 * max(sum(its.column(i).num_values for its in groups) for i in range(metadata.num_columns))
    one_layer = partial(pair_spectra, path, metadata, rank, device, models)
    found = in_parallel(one_layer, [*layers.values()], max(1, BYTES_AT_ONCE // max(1, 2 * largest)))
    about = {"sizes": sizes, "names": names, "recipes": recipes, "notes": notes}
    return as_spectra(dict(zip(layers, found, strict=True)), **about)


def pair_spectra(path: Path, metadata: Any, rank: int, device: str, models: list[str], parts: dict[str, str]) -> Layer:
    """One layer of all models, which messages call `models`, of two columns of flat lists."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with reading(path, "parquet"), pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True) as file:
        table = file.read([*parts.values()], use_threads=False)  # a file for each thread
    flat: dict[str, Tensor] = {}  # float64 [models, numbers of a matrix]
    for part, name in parts.items():
        column, lists = f"column {shown(name)}", table.column(name)
        with asking(f"{column} holds {lists.type}: --rank={rank} needs lists of floating point numbers"):
            lists = lists.chunk(0) if lists.num_chunks == 1 else lists.combine_chunks()
            bounds = pc.min_max(pc.list_value_length(lists)).as_py()
            numbers, least, most = lists.flatten(), bounds["min"], bounds["max"]
            nulls = lists.null_count + numbers.null_count
            if nulls or not most or least != most or most % rank or not pa.types.is_floating(numbers.type):
                raise ValueError(f"{nulls} nulls, and lists of {least} to {most}")
            flat[part] = torch.utils.dlpack.from_dlpack(numbers).to(torch.float64).view(-1, most)
    columns = " and ".join(map(shown, parts.values()))
    hint = "" if device == "cpu" else "try --device=cpu"
    with asking(f"the spectra of columns {columns} can't be computed on {device}", hint):
        if {*flat} != {"A", "B"}:
            raise ValueError("of parquet A and B alone are read")
        a, b = flat["A"].view(len(table), rank, -1), flat["B"].view(len(table), -1, rank)
        try:
            its = dict(zip(MATRICES, lora_spectra(a.to(device), b.to(device)), strict=True))
        except FloatingPointError as error:
            both = zip(models, a, b, strict=True)
            bad = [model for model, *its in both if not all(matrix.isfinite().all() for matrix in its)]
            raise ValueError(f"{error}{f', of {bad[0]}' if bad else ''}") from None
    return Layer([b.shape[1], a.shape[2], rank], {part: its[part].cpu() for part in (*parts, "BA")})


def join(parts: list[Spectra], names: list[str]) -> Spectra:
    """Shards, or labelled files, called `names`, as one, with the layers that all have in one shape."""
    first, every = parts[0], [*zip(parts, names, strict=True)]
    methods = {part.method: f"{part.method} ({shown(name)})" for part, name in reversed(every)}
    if len(methods) > 1:
        raise DsireError(f"models of several methods can't be compared: {', '.join(methods.values())}")
    notes = together(((name, note) for part, name in every for note in (*part.first, *part.notes)), len(parts), "files")
    shared = set.intersection(*({(voter, *part.shapes[voter.layer]) for voter in part.voters} for part in parts))
    voters = [voter for voter in first.voters if (voter, *first.shapes[voter.layer]) in shared]
    kept = {voter.layer: first.shapes[voter.layer] for voter in voters}
    if lost := sorted({layer for part in parts for layer in part.shapes} - kept.keys()):
        such = f"not the same in all {len(parts)} files, such as {shown(lost[0])}"
        notes.append(f"{counted(len(lost), 'layer')} left out, as {such}")
    if not voters:
        raise DsireError("; ".join(["no layer is in all files with the same shape", *notes]))
    micro_datasets = [name for part in parts for name in part.names]
    if len({*map(type, micro_datasets)}) > 1:  # integers in one shard, strings in another
        micro_datasets = [*map(str, micro_datasets)]
    recipes = [recipe for part in parts for recipe in part.recipes if recipe]
    if len(recipes) not in (0, len(micro_datasets)):
        raise DsireError(f"some files have a recipe, and others none: {shown(', '.join(names))}")
    width = max(part.values.shape[-1] for part in parts)
    values = torch.cat([of_rank(part.of_voters(voters).values, width) for part in parts], dim=1)
    sizes = torch.cat([part.sizes for part in parts])
    return Spectra(values, sizes, micro_datasets, voters, kept, notes, recipes, first.method)


def what_is_unusual(spectra: Spectra) -> list[str]:
    """Notes on models that are there twice, and on micro-datasets that lack a size."""
    models = Counter(zip(spectra.names, spectra.sizes.tolist(), spectra.of_recipe.tolist(), strict=True))
    twice, there = len(spectra.names) - len(models), Counter(name for name, _ in {model[:2] for model in models})
    notes = [f"{counted(twice, 'model')} of the micro-dataset and size of another one; all are kept"] if twice else []
    lack = sorted(str(name) for name in there if there[name] < len(spectra.sizes.unique()))
    if lack:
        notes.append(f"{counted(len(lack), 'micro-dataset')} without a model of each size: {shown(', '.join(lack))}")
    return notes


# ---- Opening files: what people hold on disk ------------------------------------------------------------------------

SAFE_ENDINGS = (".safetensors",)
PICKLE_ENDINGS = (".bin", ".pt", ".ckpt", ".pth")
WEIGHT_ENDINGS = SAFE_ENDINGS + PICKLE_ENDINGS
# Pickles that trainers leave beside a LoRA: many hold more than tensors, so that they can't even be looked into.
TRAINERS = re.compile("optimizer|scheduler|scaler|sampler|dataloader|(rng|random|training)_(state|args)|.*_states[.]")
LONGEST_TEXT = 2**22  # of JSON that is looked into
LARGEST_PICKLE = 2**24  # in bytes, without its tensors


def reading(path: Path, kind: str) -> AbstractContextManager[None]:
    """What a library raises about a file in one line, with its first bytes, which say what it is; not of a link."""
    start = ""
    with suppress(OSError), path.open("rb") as file:  # why it can't be opened is said by the library
        start = "" if path.is_symlink() else f", begins with {file.read(50)!r}"
    return asking(f"can't be read as {kind}{start}")


@dataclass(frozen=True)
class Weights:
    """An open weights file, or several that a model was saved as; tensors are read one by one."""

    files: list[Path]
    readers: dict[str, Callable[[], Tensor]]  # key -> what reads its tensor, in the files' order
    header: dict[str, str]  # of a pickle what stands beside its tensors
    called: str = ""  # in messages, if it is not the file that is judged

    @cached_property
    def layers(self) -> dict[str, str]:
        """Layer -> key of its weights, of a full model."""
        return {layer: parts["weight"] for layer, parts in layers_of(self.readers).items() if "weight" in parts}

    def matrix(self, key: str, least_dimensions: int = 2) -> Tensor:
        """A tensor of finite floating point numbers as float64; of any real ones where it may have no dimension."""
        name = f"{self.called}{shown(key)}"
        with asking(f"{name} is no plain matrix of floating point numbers"):
            tensor = self.readers[key]()
            real = tensor.dtype != torch.bool and not tensor.is_complex()
            right = tensor.is_floating_point() if least_dimensions else real
            there = 0 < tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
            if not right or not there or tensor.device.type != "cpu" or tensor.ndim < least_dimensions:
                raise ValueError(f"{tensor.dtype} of shape {list(tensor.shape)}")
            matrix = tensor.to(torch.float64)
        if not matrix.isfinite().all():
            raise DsireError(f"{name} holds a number that is NaN or infinite")
        return matrix


def unpickled(path: Path) -> Any:
    """What a pickle holds if that is tensors, plain values, lists and dictionaries of them; nothing of it is run."""
    with reading(path, "a pickle of tensors"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                parts, size = archive.infolist(), path.stat().st_size
                large = any(part.file_size > LARGEST_PICKLE for part in parts if part.filename.endswith(".pkl"))
                if large or any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > size:
                    raise ValueError(f"it is compressed, or holds over {LARGEST_PICKLE:,} bytes that are not tensors")
                if damaged := archive.testzip():  # torch leaves the checksums unread
                    raise ValueError(f"{damaged} is damaged")
        try:
            # Mapped, torch would take the bytes behind a record that is too short for the tensor's numbers.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
        except pickle.UnpicklingError:  # torch's own words advise to run it all the same
            with path.open("rb") as file:
                start = file.read(2**20)
            # What it would call, as protocols 0 to 3 name it, or 4 and 5; those of torch, which are harmless, last
            call = rb"c([\w.]{2,})\n([\w.]{2,})\n|\x8c.([\w.]+)\x94?\x8c.([\w.]+)\x94?\x93"
            names = {b".".join(filter(None, its)).decode() for its in re.findall(call, start, re.DOTALL)}
            some = ", ".join(sorted(names, key=lambda name: (name.startswith(("torch.", "collections.")), name)))
            raise ValueError(f"it was not run; it names {some or 'nothing'}") from None


def opened(path: Path) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """What reads each tensor of a .safetensors file, or of a pickle without running it; and its header."""
    if not path.is_file():
        raise DsireError("no such file")
    with path.open("rb") as start:
        safe = start.read(9)[8:] == b"{"  # where the header of safetensors begins, whatever the file is called
    if path.suffix.lower() in PICKLE_ENDINGS and not safe:
        with asking("what it holds can't be read"):
            return in_pickle(unpickled(path))
    from safetensors import safe_open

    with reading(path, "safetensors"):
        file = safe_open(path, "pt")  # mapped for as long as what reads it is there
        keys, header = list(file.keys()), file.metadata() or {}
    return {key: partial(file.get_tensor, key) for key in keys}, header


def in_pickle(content: Any) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Likewise of what a pickle holds: the keys of dictionaries within each other are joined by dots."""
    if not isinstance(content, dict):
        raise DsireError(f"holds a {type(content).__name__}, not a dictionary of tensors: nothing names the layers")
    readers: dict[str, Callable[[], Tensor]] = {}
    header, seen, found = {}, {id(content)}, [("", content)]
    for prefix, dictionary in found:  # more are added as they come
        for own, value in dictionary.items():
            key, match = f"{prefix}{own}", PART.fullmatch(f"{prefix}{own}")
            if len(key) > 2000:
                raise DsireError(f"{shown(key)} is too long for a layer's name")
            part = match[match.lastindex or 0] if match else "weight"
            if isinstance(value, dict):
                found += [(f"{key}.", value)] if id(value) not in seen else []
                seen.add(id(value))
            elif isinstance(value, Tensor):
                readers[key] = value.detach
            elif part == "alpha" and type(value) in (int, float) and abs(value) < 2**53:
                readers[key] = partial(torch.tensor, value, dtype=torch.float64)
            elif part != "weight":
                raise DsireError(f"{shown(key)} is {type(value).__name__}, neither a tensor nor alpha's number")
            elif not prefix and isinstance(value, (str, int, float)):
                header[key] = str(value)
    return readers, header


def parts_of(path: Path) -> list[Path]:
    """The files that a model was saved as: this one, or all of name-00001-of-00003.safetensors and so on."""
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)", path.name)
    if not match or not 1 <= int(match[2]) <= int(match[3]):
        return [path]
    return [path.with_name(f"{match[1]}-{n:05d}-of-{match[3]}{match[4]}") for n in range(1, int(match[3]) + 1)]


def open_model(path: Path, called: str = "") -> Weights:
    """Open a file, with the others that the model was saved as; or all of a folder, with unet/, text_encoder/, ..."""
    files, whole = [path], path.is_dir()
    if whole:
        pickles = [file for file in visible_files(path, PICKLE_ENDINGS) if not TRAINERS.match(file.name)]
        files = visible_files(path, SAFE_ENDINGS) or pickles
    places: dict[str, Path] = {}
    model = Weights(sorted({part for file in files for part in parts_of(file)}), {}, {}, called)
    for file in model.files:
        with naming(file.name) if len(model.files) > 1 else nullcontext():
            readers, header = opened(file)
        model.header.update(header)
        network = network_of(f"{file.parent.name}.x") if whole else ""  # in its folder keys leave it out
        for key, reader in readers.items():
            place = places.setdefault(network + key, file)
            if place != file:
                raise DsireError(f"{shown(key)} is in two files, {file.name} and {place.name}: name one of them")
            model.readers[network + key] = reader
    return model


# ---- From a layer's parts, and what scales them, to its spectra; a file; which files of a folder are models ---------

FOREIGN = 0.7  # of the norm of the base's weights: what has changed by more was never fine-tuned from them
IS_ZERO = "the change of the weights is zero"
IS_FOREIGN = f"the change of the weights is over {FOREIGN:.0%} of the base's"
# Settings of PEFT, and of ms-swift, with which it is, up to the scale; what is empty or false says nothing.
UNDERSTOOD = re.compile(
    r"(?si:peft_type=(?:PeftType\.)?(?:lora|loha|lokr)|init_(?:lora_)?weights=(?:true|gaussian|orthogonal)"
    r"|use_(?:rslora|dora)=true|(?:r|lora_alpha|rank_pattern|fan_in_fan_out|bias|lora_bias|modules_to_save|task_type"
    r"|auto_mapping|peft_version|base_model_name_or_path|revision|inference_mode|target_modules|exclude_modules"
    r"|layers_to_transform|layers_pattern|layer_replication|megatron_\w+|trainable_token_indices|ensure_weight_tying"
    r"|qalora_group_size|(?:lora|rank|module)_dropout|rank_dropout_scale|use_effective_conv2d|decompose_\w+"
    r"|lora_dtype|lorap_lr_ratio|lorap_emb_lr)=.*)"
)
# What stands by itself in headers (and in LoHa's configuration), and PEFT's name for it.
PEFT_NAMES = {
    **dict.fromkeys(("alpha", "lora_alpha", "network_alpha", "ss_network_alpha"), "lora_alpha"),
    **dict.fromkeys(("r", "rank", "lora_rank", "network_dim", "ss_network_dim"), "r"),
    **{name: name for name in ("use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights")},
}


def parsed(text: str) -> Any:
    """What a string of a header says, which may be JSON, or Python's True, False and None."""
    with suppress(ValueError, RecursionError):
        return json.loads(text) if len(text) <= LONGEST_TEXT else text
    return {"true": True, "false": False, "none": None, "": None}.get(text.lower(), text)


def settings_of(weights: Weights, network: str) -> dict[str, Any]:
    """What the first source that states alpha, and others that agree, say of a network, PEFT's name -> value; or {}."""
    header, beside = weights.header, weights.files[0].with_name("adapter_config.json")
    plain = {key: parsed(header[key]) for key in sorted(header) if key.rpartition(".")[2] in PEFT_NAMES}
    sources = {"its header": {key: value for key, value in plain.items() if value is not None}}
    texts: dict[str, Any] = {"lora_adapter_metadata": header.get("lora_adapter_metadata", "{}")}  # diffusers'
    texts[beside.name] = beside.read_bytes() if beside.is_file() else "{}"  # PEFT's
    for place, text in texts.items():
        with asking(f"{place} is not a JSON object"):
            sources[place] = {**json.loads(text[:LONGEST_TEXT])}
    found: dict[str, Any] = {}
    default: dict[str, Any] = {}
    for place, said in sources.items():
        own: dict[str, Any] = {}
        for key, value in said.items():
            prefix, _, name = key.rpartition(".")  # diffusers puts the network's name before the setting's
            name = PEFT_NAMES.get(name, name)
            if value and not UNDERSTOOD.fullmatch(f"{name}={value}"):
                raise DsireError(f"{place} says {shown(f'{key}={value}')}, which is not understood here: not judged")
            of_it = not prefix or layer_name(f"{prefix}.x") == f"{network}x"
            if of_it and own.setdefault(name, value) != value:
                raise DsireError(f"{place} says that {name} is {shown(own[name])}, and {shown(value)}")
        default = {"lora_alpha": 8} if own and place in texts else default  # PEFT's
        if "lora_alpha" not in found or all(found.get(name, value) == value for name, value in own.items()):
            found |= own  # or else it is about another model
    return default | found if "lora_alpha" in default | found else {}


def scale_of(weights: Weights, parts: dict[str, str], said: dict[str, Any], rank: int | None) -> float | None:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) for rslora; None if nothing states alpha."""
    if "alpha" in parts:
        with asking(f"{shown(parts['alpha'])} is not one number"):
            own = float(weights.matrix(parts["alpha"], least_dimensions=0))
        return own / rank if rank else 1.0  # whole matrices have no rank: LyCORIS ignores alpha then, PEFT does not
    if not said:
        return None
    alpha, r = said["lora_alpha"], None if said.get("rank_pattern") else said.get("r")
    its: Any = rank or r
    right = type(alpha) in (int, float) and abs(alpha) < 2**53 and type(its) is int and its > 0
    if not right or r not in (None, its):
        facts = f"lora_alpha is {shown(repr(alpha))} and r is {shown(repr(r))}"
        raise DsireError(f"its settings say that {facts}, but {shown(next(iter(parts.values())))} has rank {rank}")
    return float(alpha / (its**0.5 if said.get("use_rslora") else its))


def factors(tensors: dict[str, Tensor], row: tuple[str, str, str, str], turned: bool) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in k k] of a row of PRODUCTS, a core [r, r, k, k] made part of A; W and I of a whole W."""
    of_b, of_a, of_core, whole = row
    if whole in tensors:
        matrix = tensors[whole].flatten(1)
        return matrix, torch.eye(matrix.shape[1], dtype=torch.float64)
    b, a = tensors[of_b], tensors[of_a]
    if of_core in tensors:
        a, b = a.reshape(a.shape[:2]).mT @ tensors[of_core].flatten(2), b.mT if turned else b  # as LyCORIS stores it
    a, b = a.flatten(1), b.flatten(1)
    if len(a) != b.shape[1]:
        raise ValueError(f"A of rank {len(a)}, B of rank {b.shape[1]}")
    return b, a


def dora_change(b: Tensor, a: Tensor, scale: float, old: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's change of the weights W₀ (Liu et al. 2024), m (W₀ + s B A) / |W₀ + s B A| - W₀, by rows: [out, in k k]."""
    merged = old + scale * b @ a
    norms: Tensor = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
    return merged * (magnitude.view(len(old), 1) / norms.masked_fill(norms == 0, 1)) - old


def adapter_layer(
    weights: Weights, parts: dict[str, str], said: dict[str, Any], base: Weights | None, of_base: str, count: int
) -> Layer:
    """The spectra of a layer of LoRA, DoRA, LoHa or LoKr; `said` is of its network, `of_base` its key in the base."""
    method, keys = method_of(parts), ", ".join(map(shown, parts.values()))
    of_lora, rows = "A" in parts, PRODUCTS[method]
    tensors = {its: weights.matrix(key, 1 if its == "magnitude" else 2) for its, key in parts.items() if its != "alpha"}
    if said.get("use_dora") and method == "LoRA":
        raise DsireError(f"its settings say use_dora, and {keys} have no magnitude")
    with asking(f"{keys} do not fit each other"):
        products = [factors(tensors, row, not of_lora) for row in (rows[:1] if of_lora else rows)]
        if method == "LoHa":  # (B1 A1) ∘ (B2 A2) is one product of rank r r
            (b1, a1), (b2, a2) = products
            products = [((b1[:, :, None] * b2[:, None]).flatten(1), (a1[:, None] * a2).flatten(0, 1))]
    rank = max((len(tensors[a]) for _, a, _, _ in rows if a in tensors), default=None)
    stated = scale_of(weights, parts, said, rank)
    scale = 1.0 if stated is None else stated
    b, a = products[0]
    shape, spectra = [len(b), a.shape[1]] + [len(a)] * of_lora, {}
    if of_lora:
        of_a, of_b, change = lora_spectra(a, b)
        spectra = {part: of_a if part == "A" else of_b for part in parts if part in "AB"}
    else:
        change = product_spectrum(b, a, count)
        for b, a in products[1:]:  # a Kronecker product has all products of singular values
            shape = [shape[0] * len(b), shape[1] * a.shape[1]]
            change = (change[:, None] * product_spectrum(b, a, count)).flatten().sort(descending=True).values[:count]
        method += f" of rank {rank}" if rank else ""
    if method != "DoRA":
        spectra["BA"] = change * abs(scale)
    elif base and of_base:
        old, magnitude = base.matrix(of_base).flatten(1), tensors["magnitude"]
        old = old.mT if said.get("fan_in_fan_out") else old  # GPT-2's layers
        with asking(f"{keys} do not fit the base's weights"):
            if len(magnitude) == 1 < len(b) and "dora_scale" in parts["magnitude"]:  # LyCORIS' other form
                raise ValueError("the magnitude must have one number for each output")
            of_weights = dora_change(b, a, scale, old, magnitude)
        spectra["BA"] = matrix_spectrum(of_weights, count)
    remarks = {
        "alpha is not stated: BA is taken with scale 1": stated is None,
        "alpha is 0: BA counts as zero": scale == 0,
        IS_ZERO: not change.any(),
        "DoRA without its base: the magnitudes are set aside, only A and B are judged": "BA" not in spectra,
    }
    return Layer(shape, spectra, method, remarks)


def full_layer(weights: Weights, key: str, base: Weights, of_base: str, count: int, device: str) -> Layer:
    """The change W - W₀ of a layer of a full fine-tune; of_base is the base's key, if it has the layer."""
    stored = weights.readers[key]()
    if stored.ndim < 2 or not stored.is_floating_point():  # a norm, or numbers that are no weights
        return Layer([], {})
    new, old = weights.matrix(key).flatten(1), base.matrix(of_base).flatten(1) if of_base else torch.empty(0)
    if new.shape != old.shape:
        return Layer([], {}, remarks={"layers that are not in the base with the same shape are left out": True})
    coarse = max(stored.dtype, base.readers[of_base]().dtype, key=lambda dtype: torch.finfo(dtype).eps)
    change = new - old
    if torch.equal(new.to(coarse), old.to(coarse)):
        change.zero_()
    rounding = change[change.abs() <= torch.finfo(coarse).eps * new.abs()]  # by no more than the last digit
    of_change, of_rounding, of_old = (float(torch.linalg.vector_norm(its)) for its in (change, rounding, old))
    remarks = {
        "most of the change is no larger than the last digit that is stored": 2 * of_rounding**2 > of_change**2,
        IS_ZERO: not change.any(),
        IS_FOREIGN: of_change > FOREIGN * of_old,
    }
    del new, old, rounding  # a model's largest matrices take hundreds of megabytes each
    spectrum = torch.zeros(min(count, *change.shape), dtype=torch.float64)
    if change.any():
        spectrum = matrix_spectrum(change.to(device), count).cpu()
    return Layer([*change.shape], {"BA": spectrum}, f"full fine-tune in {str(coarse).removeprefix('torch.')}", remarks)


def file_spectra(path: Path, base: Weights | None = None, count: int = LARGEST, device: str = "cpu") -> Spectra:
    """The spectra of one model, its size what the file states (0 if nothing); of a change so many values are kept."""
    weights = open_model(path)
    keys, others = lora_layers([*weights.readers], base, path.parent.name)
    full = any("weight" in parts for parts in keys.values())
    settings = {network: settings_of(weights, network) for network in ({} if full else {*map(network_of, keys)})}

    def layer_of(layer: str) -> Layer:
        parts, of_base = keys[layer], base.layers.get(layer, "") if base else ""
        with asking(f"the spectra of {' and '.join(map(shown, parts.values()))} can't be computed"):
            if base and full:
                its = full_layer(weights, parts["weight"], base, of_base, count, device)
            else:
                its = adapter_layer(weights, parts, settings[network_of(layer)], base, of_base, count)
            if not all(spectrum.isfinite().all() for spectrum in its.spectra.values()):
                raise FloatingPointError("numbers too large to multiply")
        return its

    found = in_parallel(layer_of, [*keys], 4 if base else 1)  # whole matrices are worth a thread each, and take memory
    every = dict(zip(keys, found, strict=True))
    layers = {layer: its for layer, its in every.items() if its.spectra}
    changed = {layer: its for layer, its in layers.items() if not its.remarks[IS_ZERO]}
    remarks = [(layer, remark) for layer, its in every.items() for remark, true in its.remarks.items() if true]
    told = [(layer, remark) for layer, remark in remarks if remark != IS_ZERO or changed]
    notes = together(told, sum(bool(its.remarks) for its in every.values()), "layers")
    if not layers:
        raise DsireError("; ".join(["has no matrix of the base's shape", *notes]))
    if 2 * sum(remark == IS_FOREIGN for _, remark in remarks) > len(layers):
        raise DsireError(f"is no fine-tune of this base: {IS_FOREIGN} in most layers")
    if others:
        notes.append(f"{counted(len(others), 'tensor')} set aside, not LoRA's matrices, such as {shown(min(others))}")
    if base and not full and not any(its.method == "DoRA" for its in layers.values()):
        notes.append("--base is not used: the file holds the change of the weights itself")
    if any(len(text) > LONGEST_TEXT for text in weights.header.values()):
        notes.append("its header is too long to look for the size that it states")
    size, first = torch.tensor([stated_size(weights.header)]), [] if changed else [UNTRAINED]
    voting = changed if full and changed else layers
    return as_spectra(voting, sizes=size, names=[str(path)], notes=notes, first=first)


def stated_size(header: dict[str, str]) -> int:
    """The number of training images that kohya's metadata state, without repeats; 0 if they don't."""
    # a folder counts once, in however many resolutions it is used: in several of ss_datasets, or as "cat", "cat (2)"
    sizes = []
    with suppress(AttributeError, KeyError, TypeError):  # it is not as kohya writes it
        most: Counter[tuple[Any, int]] = Counter()  # how many folders there are of a name and a number of images
        for one in parsed(header.get("ss_datasets", "")):
            parts = [part for part in one["subsets"] if not part.get("is_reg")]
            places = [part.get("image_dir") or part.get("metadata_file") for part in parts]
            most |= Counter(zip(places, (dataset_size(part["img_count"]) for part in parts), strict=True))
        sizes.append(sum(size * times for (_, size), times in most.items()))
    with suppress(AttributeError, KeyError, TypeError):
        folders, once = parsed(header.get("ss_dataset_dirs", "")), set()
        for name, its in folders.items():
            first = re.sub(r" \(\d+\)$", "", name)
            once.add((first if first in folders else name, dataset_size(its["img_count"])))
        sizes.append(sum(size for _, size in once))
    return next((size for size in sizes if dataset_size(size)), 0)


def visible_files(folder: Path, endings: Sequence[str]) -> list[Path]:
    """The files, and links, below a folder with one of these endings, sorted; never hidden ones (macOS' ._name)."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in endings)
    paths = sorted(path for path in found if path.is_file() or path.is_symlink() and not path.is_dir())
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def model_files(folder: Path, base: Weights | None = None) -> tuple[list[Path], dict[Path, str]]:
    """The models below a folder, sorted, of shards the first one; and why each other weights file is none."""
    models, others = [], {}
    taken: set[Path] = set()  # less the ending
    for path in visible_files(folder, SAFE_ENDINGS) + visible_files(folder, PICKLE_ENDINGS):
        if path != next((part for part in parts_of(path) if part.is_file()), path):
            continue
        try:
            if path.with_suffix("") in taken:
                raise NoLora("a file of the same name, with another ending, is taken")
            if path.suffix.lower() in PICKLE_ENDINGS and TRAINERS.match(path.name):
                raise NoLora("a trainer's state, by its name")
            lora_layers([*open_model(path).readers], base, path.parent.name)
        except NoLora as error:
            others[path] = str(error)
            continue
        except (DsireError, OSError):
            pass  # that is said later
        else:
            taken.add(path.with_suffix(""))
        models.append(path)
    return sorted(models), others


# ---- Where the weights come from: a folder, the Hub, or a file of spectra; and the cache of spectra -----------------

REPOSITORY = re.compile(r"(?:https://huggingface\.co/(?:datasets/)?)?(\w[\w.-]*/\w[\w.-]*)/?(?::(.+))?")
PATIENCE = 60  # seconds that the Hub may be silent
FACTS = ("names", "recipes", "voters", "shapes", "method", "notes", "first")  # of Spectra, in a file of them


@dataclass(frozen=True)
class Shard:  # a file of models
    file: str  # its path in the folder or repository
    size: int  # bytes
    version: str  # the Hub's SHA of it, or its times


@dataclass(frozen=True)
class Source:  # the files of a subset
    dataset: str
    subset: str
    commit: str  # the Hub's hash; "" for a folder
    shards: list[Shard]
    notes: list[str]  # what is left out
    kind: str = "dataset"  # of parquet; else labelled "files", "spectra", or those of a "model"
    labels: dict[str, tuple[int, str, str]] = field(default_factory=dict)  # of labelled files: size, name, recipe


def find_source(dataset: str, subset: str | None, revision: str | None, cache: Path) -> Source:
    """The files of a subset in a folder or on the Hub, or a file of spectra."""
    place = path_of(dataset)
    if revision is not None and os.path.exists(place):
        raise DsireError(f"--revision is of a dataset on the Hub, and {place} is here: leave it out")
    if dataset and os.path.isdir(place):
        return folder_source(place, subset)
    match = REPOSITORY.fullmatch(dataset)
    if match and not match[2] and not os.path.exists(place):
        return hub_source(match[1], "dataset", subset, None, revision, cache)
    file, _ = located(dataset, cache, "dataset", revision)
    with naming(f"--dataset={dataset}"):
        spectra, about = read_spectra(file)
        told = [str(about.get(fact, "")) for fact in ("dataset", "subset", "commit")]
        texts = "".join(map(str, [*told, *spectra.names, *spectra.recipes, *spectra.shapes, spectra.method]))
        if not texts.isprintable() or not ((spectra.sizes > 0) & (spectra.sizes < 10**15)).all():
            raise DsireError("can't be right: control characters in names, or a model without a size")
        if subset not in (None, told[1]):
            raise DsireError(f"holds subset {told[1]}, not {subset}: leave --subset out")
    note = f"{dataset} holds spectra, not models: of {' '.join(filter(None, told))}; its digest is {about['digest']}"
    shard = Shard(str(file.absolute()), file.stat().st_size, about["digest"])
    return Source(told[0], told[1], told[2], [shard], [note], "spectra")


def folder_source(folder: Path, subset: str | None) -> Source:
    """The files of models that metadata.csv labels in a folder; or, without one, the parquet files of a subset."""
    every, labels, shipped = visible_files(folder, (*WEIGHT_ENDINGS, ".parquet")), metadata_csv(folder), []
    kind, called = ("files", folder.resolve().name) if labels else ("dataset", subset or "")
    source = Source(str(folder), called, "", [], [], kind, labels)
    names = [file.relative_to(folder).as_posix() for file in every if file.suffix.lower() == ".parquet"]
    if labels:
        if subset is not None:
            raise DsireError(f"--subset={subset}: {folder} holds labelled files, which have no subsets; leave it out")
        listed = {part for file in labels for part in parts_of(folder / file)}
        if others := [file.relative_to(folder) for file in every if file not in listed]:
            source.notes.append(f"{counted(len(others), 'file')} left out, as not in metadata.csv, such as {others[0]}")
        names = sorted(labels, key=Path)
    elif not names or (subset is None and len(names) < len(every)):
        found = "parquet, and weights beside it: choose it with --subset, or" if names else "no parquet:"
        raise DsireError(f"--dataset={folder} holds {found} write metadata.csv with file_name, label, name")
    elif folder == SHIPPED:  # which needs neither `datasets` nor the time to import it
        shipped = [name for name in names if str(Path(name).parent) == source.subset.replace("_", "/")]
    for name in shipped or names:
        file = folder / name
        beside = [part for part in (*parts_of(file), file.with_name("adapter_config.json")) if part.is_file()]
        facts = [part.stat() for part in dict.fromkeys([file, *beside])]  # of all that decides its spectra
        version = "-".join(f"{fact.st_mtime_ns}-{fact.st_ctime_ns}" for fact in facts)
        source.shards.append(Shard(name, sum(fact.st_size for fact in facts), version))
    return source if labels or shipped else files_of_subset(source, folder / "README.md")


def files_of_subset(source: Source, card: Path | None) -> Source:
    """Of all parquet files those of a subset, as `datasets` understands the header of README.md, the card."""
    import datasets
    import yaml

    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    what, subset = f"dataset {source.dataset}", source.subset
    text = card.read_text(encoding="utf-8", errors="replace") if card and card.is_file() else ""
    header = [*re.findall(r"\A\s*---\n([\s\S]*?)\n---\n", f"{text}\n"), ""][0]
    with tempfile.TemporaryDirectory() as place:
        view = Path(place).resolve() / "dataset"  # empty files: no script there, no odd path matters
        shards = {(view / shard.file).as_posix(): shard for shard in source.shards}
        try:
            with asking(f"{what} has no parquet to read", "the configs in its README.md say which files are whose"):
                for file in (*shards, str(view / "README.md")):
                    Path(file).parent.mkdir(parents=True, exist_ok=True)
                    Path(file).write_text("" if file in shards else f"---\n{header}\n---\n", encoding="utf-8")
                if any(isinstance(token, (yaml.AnchorToken, yaml.AliasToken)) for token in yaml.scan(header)):
                    raise DsireError(f"README.md of {what} has YAML aliases: write out what they stand for")
                asked = json.dumps((yaml.safe_load(header) or {}).get("configs"), default=str)
                if re.search(r'"(?:[/~]|[^"]*(?:\.\.|://))', asked):  # `datasets` would look for them all over the disk
                    raise DsireError(f"README.md of {what} names parquet that is outside of it")
                configs = datasets.get_dataset_config_names(str(view))
                subset = subset or (configs[0] if len(configs) == 1 else "...")
                if subset not in configs:
                    raise DsireError(f"--subset={subset} is not in {what}: choose one of {' '.join(configs)}")
                load = partial(datasets.load_dataset_builder, str(view), cache_dir=place)
                builder = load(subset)
                splits, features = builder.config.data_files or {}, builder.info.features or {}
                files = dict.fromkeys(file for its in splits.values() for file in its)
                if not files or not files.keys() <= shards.keys():
                    raise DsireError(f"{what}: subset {subset} names no parquet, or some outside: {shown([*files])}")
                if named := [name for name in LABELS if hasattr(features.get(name), "names")]:
                    raise DsireError(f"{what}: column {named[0]} has numbers that README.md names: write names there")
        except DsireError as error:
            raise DsireError(str(error).replace(str(view), "it")) from error
        others = shards.keys() - files
        for other in configs if others else []:
            with suppress(OSError, ValueError):  # it holds no parquet
                others.difference_update(*(load(other).config.data_files or {}).values())
    notes = [f"the splits {' '.join(map(str, splits))} are taken together"] if len(splits) > 1 else []
    if others:
        notes.append(f"{counted(len(others), 'parquet file')} in no split left out, such as {shards[min(others)].file}")
    return replace(source, subset=subset, shards=[shards[file] for file in files], notes=notes)


def metadata_csv(folder: Path) -> dict[str, tuple[int, str, str]]:
    """File -> (label, name, recipe or "") from the metadata.csv of a folder; empty without one."""
    path = folder / "metadata.csv"
    labels: dict[str, tuple[int, str, str]] = {}
    if not path.is_file():
        return labels
    with asking(f"{path} can't be read", "save it as CSV in UTF-8"):
        text = path.read_text(encoding="utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)  # as spreadsheets write it
        table = [*csv.reader(io.StringIO(text), delimiter=delimiter)]
    columns, *rows = [[cell.strip() for cell in row] for row in table] or [[]]
    times = [columns.count(column) for column in ("file_name", "label", "name", "recipe")]
    if times[:3] != [1, 1, 1] or times[3] > 1 or not any(map(any, rows)):
        raise DsireError(f"{path} needs rows, and each of the columns file_name, label, name once, perhaps recipe")
    # on disk an accent may be composed in another way; Windows calls a file a\b
    nfc = partial(unicodedata.normalize, "NFC")
    there = {nfc(its.relative_to(folder).as_posix()): its for its in folder.rglob("*")}
    for row in filter(any, rows):
        cells = {"recipe": "", **dict.fromkeys(columns, ""), **dict(zip(columns, row, strict=False))}
        listed = Path(cells["file_name"].replace("\\", "/"))
        file = there.get(nfc(listed.as_posix()), folder / listed)  # or an adapter's folder
        weights = visible_files(file, SAFE_ENDINGS) or visible_files(file, PICKLE_ENDINGS) or [file]
        first = [*{parts_of(part)[0] for part in weights}]  # of one model
        name = Path(os.path.relpath(first[0] if len(first) == 1 else file, folder)).as_posix()
        size = dataset_size(cells["label"])
        needs = {
            "a file_name that is there, once": cells["file_name"] and (folder / name).is_file() and name not in labels,
            "a label that is a whole number from 1 up": size,
            "a name, of its micro-dataset": cells["name"],
            "no more cells than columns: quotes around a comma": not any(row[len(columns) :]),
        }
        if lacks := [what for what, has in needs.items() if not has]:
            raise DsireError(f"{path}: {shown(' '.join(row))!r} needs {lacks[0]}")
        labels[name] = (size, nfc(cells["name"]), nfc(cells["recipe"]))
    return labels


def ask_hub(what: str, question: str, *arguments: Any, **options: Any) -> Any:
    """What a question, a method of HfApi, is answered; to try again is huggingface_hub's."""
    with asking(what, "check the network, HF_TOKEN and HF_ENDPOINT"):
        # at its import, in the main thread, it prints what it raises; to redirect is not for threads
        with nullcontext() if "huggingface_hub.hf_api" in sys.modules else redirect_stdout(io.StringIO()):
            from huggingface_hub import HfApi
        return getattr(HfApi(), question)(*arguments, **options)


def fingerprint(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def hub_source(repo: str, kind: str, subset: str | None, file: str | None, revision: str | None, cache: Path) -> Source:
    """The files of a repository on the Hub that are wanted; those found before where it can't be asked now."""
    here = f"--subset={subset} does not ship; " if repo == LORA_WISE else f"{repo}: no such file or folder here; "
    what = f"{kind} {repo}{f' at revision {revision}' if revision else ''}"
    options: dict[str, Any] = {"repo_type": kind, "revision": revision, "files_metadata": True, "timeout": PATIENCE}
    saved = cache / "sources" / f"{fingerprint([repo, kind, subset, file, revision])}.json"
    known = None
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # not there, or not as written
        kept = json.loads(saved.read_text())
        if kept["digest"] == fingerprint(kept["source"]):
            known = Source(**{**kept["source"], "shards": [Shard(**shard) for shard in kept["source"]["shards"]]})
    try:
        info = ask_hub(f"{here}{what} can't be read from the Hub", "repo_info", repo, **options)
        if known and known.commit == info.sha:
            return known
        listed = [(its.rfilename, its.size, its.lfs.sha256 if its.lfs else its.blob_id) for its in info.siblings or []]
        if outside := [name for name, *_ in listed if "\\" in name or {"", ".."} & {*name.split("/")}]:
            raise DsireError(f"{what} lists {shown(outside[0])}, a path out of it: nothing of it is read")
        every = Source(info.id, "", info.sha, [Shard(*its) for its in listed], [], kind)
        found = {shard.file: shard for shard in every.shards}
        if kind == "dataset" and not file:
            card = fetch(every, found["README.md"], cache) if "README.md" in found else None
            parquet = [found[name] for name in found if name.endswith(".parquet") and not re.search(r"(^|/)\.", name)]
            source = files_of_subset(replace(every, subset=subset or "", shards=parquet), card)
        else:  # a model, or all in safetensors, and the settings beside
            asked = [file, *(part.as_posix() for part in parts_of(Path(file)))] if file else [*found]
            names = [name for name in asked if name in found and (file or name.endswith(SAFE_ENDINGS))]
            if not names:
                raise DsireError(f"{repo} has no {file or 'safetensors; name a pickle as user/name:file.bin'}")
            names += [Path(name).with_name("adapter_config.json").as_posix() for name in names]
            source = replace(every, shards=[found[name] for name in dict.fromkeys(names) if name in found])
    except DsireError as error:
        if not known:
            raise
        return replace(known, notes=[f"{error}; going on with commit {known.commit[:12]}", *known.notes])
    write_whole(saved, json.dumps({"source": asdict(source), "digest": fingerprint(asdict(source))}))
    return source


def fetch(source: Source, shard: Shard, cache: Path) -> Path:
    """The shard on disk: where it is, or downloaded and checked; what was damaged is fetched once more."""
    if not source.commit:
        return Path(source.dataset) / shard.file
    what, place = f"{shard.file} of {source.dataset}", cache / "hub"
    asked = f"{what} can't be fetched into {place}", "hf_hub_download", source.dataset, shard.file
    options: dict[str, Any] = {"repo_type": source.kind, "revision": source.commit, "cache_dir": place}
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    for again in (False, True):
        path = Path(ask_hub(*asked, force_download=again, **options))
        with path.open("rb") as file:
            digest = sha_fileobj(file).hex() if len(shard.version) == 64 else git_hash(file.read())
        if digest == shard.version:
            return path
    raise DsireError(f"{what} was damaged on its way, twice: try again later")


def located(item: str, cache: Path, kind: str = "model", revision: str | None = None) -> tuple[Path, str]:
    """The file or folder on disk that the user means; and on the Hub what it is called, user/name or user/name:file."""
    if item and os.path.exists(path_of(item)):
        return path_of(item), ""
    match = REPOSITORY.fullmatch(item)
    if not match or match[1].endswith(WEIGHT_ENDINGS):
        raise DsireError(f"{shown(item) or 'an empty name'}: no such file or folder")
    source = hub_source(match[1], kind, None, match[2], revision, cache)
    say(*(f"dsire.py: note: {note}" for note in source.notes), file=sys.stderr)
    first, *_ = [fetch(source, shard, cache) for shard in source.shards]
    if match[2]:
        return first, f"{match[1]}:{match[2]}"
    return first.parents[source.shards[0].file.count("/")], match[1]


def files_to_predict(item: str, cache: Path, base: Weights | None = None) -> tuple[dict[str, Path], dict[str, str]]:
    """The models that the user means: name -> file; and of other files of weights, name -> why they are left out."""
    place, hub = located(item, cache)
    if place.is_file():
        return {hub or str(place): place}, {}
    models, others = model_files(place, base)
    name = {its: f"{hub}:{its.relative_to(place).as_posix()}" if hub else str(its) for its in (*models, *others)}
    if not models:
        such = "; ".join(f"{name[file]}: {why}" for file, why in [*others.items()][:3]) or " ".join(WEIGHT_ENDINGS)
        raise DsireError(f"{item} holds no model to judge ({such})")
    return {name[file]: file for file in models}, {name[file]: why for file, why in others.items()}


def open_base(item: str, cache: Path = CACHE) -> Weights:
    """The model that fine-tunes began as: a file, a folder or a Hub repository."""
    place, _ = located(item, cache)
    with naming(f"--base={item}"):
        base = open_model(place, "the base: ")
        if not base.layers:
            raise DsireError(f"holds no weight matrices of a model ({' '.join(WEIGHT_ENDINGS)})")
    return base


def rank_of(source: Source, rank: int | None) -> tuple[int, list[str]]:
    """The rank of the LoRAs in a subset: `rank`, or the one in a name like LoRA-WiSE's (medium_32_2); and notes."""
    if source.kind != "dataset":
        return rank or LARGEST, []  # LoRA says it itself, layer by layer; of a change of the weights it is a choice
    # any other number in a name (fold_2, seed_42) is no rank, though the columns' lengths may fit it
    match = re.fullmatch(r"(?:low|medium|high|recipes|rank|r)_(\d+)(_\d+)?", source.subset)
    named = int(match[1]) if match else rank
    if not named:
        raise DsireError(f"subset {shown(source.subset)} doesn't have the rank in its name: give it with --rank")
    differs = f"--rank={rank} is taken, though the name of subset {source.subset} tells rank {named}"
    return rank or named, [differs] if rank and rank != named else []


def write_whole(path: Path, content: bytes | str) -> None:
    """Write under a temporary name, then rename: a file that carries its name is whole."""
    half = path.with_name(f".{path.name}.{os.getpid()}.half")
    with asking(f"{path} can't be written", "what was computed is kept"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with half.open("wb") as file:
                file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            half.replace(path)
        finally:
            half.unlink(missing_ok=True)


def write_spectra(path: Path, spectra: Spectra, about: dict[str, Any], dtype: torch.dtype = torch.float64) -> None:
    """Write spectra, all that is known of the models, and what else is to be told `about` them, as safetensors."""
    from safetensors.torch import save

    facts = json.dumps({**about, "format": FORMAT, **{name: getattr(spectra, name) for name in FACTS}})
    tensors = {"spectra": spectra.values.to(dtype).contiguous(), "sizes": spectra.sizes.contiguous()}
    write_whole(path, save(tensors, {"facts": facts, "digest": digest_of(facts, **tensors)}))


def digest_of(facts: str, spectra: Tensor, sizes: Tensor) -> str:
    text = f"{facts} {spectra.dtype} {[*spectra.shape]} {sizes.dtype}"
    return hashlib.sha256(text.encode() + spectra.numpy().tobytes() + sizes.numpy().tobytes()).hexdigest()


def read_spectra(path: Path) -> tuple[Spectra, dict[str, Any]]:
    """What `write_spectra` wrote: the spectra, and what else is told about them; it may be a stranger's."""
    from safetensors import safe_open

    with asking("can't be read as a file of spectra", "give what --save_spectra wrote, or the folder of the models"):
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if "facts" not in header:
                raise ValueError("it has none")
            about = json.loads(header["facts"])
            if about["format"] != FORMAT:
                raise DsireError(f"is of format {shown(about['format'])}, and {FORMAT} is read here: write it anew")
            values, sizes = file.get_tensor("spectra"), file.get_tensor("sizes")
        about["digest"] = digest_of(header["facts"], values, sizes)
        if about["digest"] != header["digest"]:
            raise DsireError("is damaged, by its digest: fetch it anew")
        facts = {name: about.pop(name) for name in FACTS}
        voters = facts["voters"] = [Voter(*voter) for voter in facts["voters"]]
        spectra = Spectra(values.double(), sizes, **facts)
        shapes, lengths, count = spectra.shapes, {"A": (3,), "B": (3,), "BA": (2, 3)}, (len(spectra.names),)
        fit = [len(shapes.get(voter.layer, "")) in lengths.get(voter.matrix, ()) for voter in voters]
        lists = spectra.names, spectra.recipes, spectra.notes, spectra.first, *shapes.values()
        texts = [*spectra.recipes, *spectra.notes, *spectra.first, spectra.method, *(voter.layer for voter in voters)]
        truths = {
            "types of numbers": values.dtype in (torch.float32, torch.float64) and sizes.dtype == torch.int64,
            "what is no list": {*map(type, lists)} == {list} and {*map(len, shapes.values())} <= {2, 3},
            "numbers of voters, models": values.dim() == 3 and values.shape[:2] == (len(voters), *count),
            "sizes, recipes": sizes.shape == count and sizes.ge(0).all() and len(spectra.recipes) in (0, *count),
            "values": values.numel() and values.isfinite().all() and (values >= 0).all() and (values.diff() <= 0).all(),
            "names that are no text": {*map(type, texts)} == {str} and {*map(type, spectra.names)} in ({str}, {int}),
            "voters that do not fit the shapes": all(fit) and len({*voters}) == len(voters),
            "a layer's shape": all(type(number) is int and number > 0 for shape in shapes.values() for number in shape),
        }
        if lies := [what for what, holds in truths.items() if not holds]:
            raise DsireError(f"can't be right: {lies[0]}")
    return spectra, about


def process_rank() -> int:
    """The number of this process among those that torchrun started."""
    return min(torchrun("RANK", 0), max(1, torchrun("WORLD_SIZE", 1)) - 1)


def subset_spectra(
    source: Source, rank: int, cache: Path, device: str = "cpu", keep_shards: bool = False, base: Weights | None = None
) -> Spectra:
    """The spectra of a whole subset: from the cache, and for the shards that it lacks from their weights.

    torchrun's processes share the work: each begins at another shard, and computes what is not there yet when it has
    the shard's lock; another run waits for it, or takes over. Of the two shards that a process has in hand one is
    fetched, or waited for, while the other is computed, which needs no second lock: no circle of waiting can close.
    """
    if source.kind == "spectra":
        return read_spectra(Path(source.shards[0].file))[0]
    place, files = "" if source.commit else str(Path(source.dataset).absolute()), source.kind == "files"
    # what is in the cache and sound is done: a file's name there changes with all that decides the spectra
    of_base = base.files if base and files else []
    began_as = [(str(its.absolute()), its.stat().st_size, its.stat().st_mtime_ns) for its in of_base]
    facts = {shard: fingerprint([FORMAT, rank, place, began_as, asdict(shard)]) for shard in source.shards}
    paths = {it: cache / "spectra" / f"{Path(it.file).stem[:40]}-{key}.safetensors" for it, key in facts.items()}
    many = files and not base  # small ones: each core takes one
    one_by_one = nullcontext() if many else threading.Lock()

    def computed(shard: Shard) -> Spectra:
        with locked(paths[shard], shard.version if source.commit else facts[shard], cache):
            if found := cached(paths[shard]):  # by another process, meanwhile
                return found
            path = fetch(source, shard, cache)
            with one_by_one, naming(shard.file):
                spectra = file_spectra(path, base, rank, device) if files else shard_spectra(path, rank, device)
            write_spectra(paths[shard], spectra, {})  # before the download goes: a killed run goes on at its shard
            for download in (path.resolve(), path) if source.commit and not keep_shards else ():
                download.unlink(missing_ok=True)  # in huggingface_hub's cache it is a link
            return spectra

    done = {shard: spectra for shard, path in paths.items() if (spectra := cached(path))}
    missing = [shard for shard in source.shards if shard not in done]
    first = process_rank() * len(missing) // max(1, torchrun("WORLD_SIZE", 1))
    walk = missing[first:] + missing[:first]
    name = "" if process_rank() else "files" if files else "shards"
    done |= zip(walk, in_parallel(computed, walk, 0 if many else 2, name), strict=True)
    for shard in source.shards if files else ():
        size, name, recipe = source.labels[shard.file]
        done[shard] = replace(done[shard], sizes=torch.tensor([size]), names=[name], recipes=[recipe])
    return join([done[shard] for shard in source.shards], [shard.file for shard in source.shards])


def cached(path: Path) -> Spectra | None:
    """Spectra from the cache; None if they aren't there, or damaged."""
    with suppress(DsireError):
        return read_spectra(path)[0] if path.is_file() else None
    return None


@contextmanager
def locked(path: Path, name: str, cache: Path) -> Iterator[None]:
    """Hold the lock of a shard of this name, or SHA; what a killed run has left of its spectra, or download, goes."""
    from filelock import FileLock

    halves = f"spectra/.*{path.stem[-16:]}.*.half", f"hub/*/blobs/{name}.*.incomplete"
    with ExitStack() as held:
        with asking(f"{path.parent} can't be locked", "give a --cache_dir on another disk"):
            # a file that exists, in place of a lock, would outlive a run that is killed
            held.enter_context(FileLock(path.with_name(f"{name}.lock"), fallback_to_soft=False))
        for half in [half for pattern in halves for half in cache.glob(pattern)]:
            half.unlink(missing_ok=True)
        yield


# ---- The report: what is printed, as lines, what is written for programs, and pictures: the paper's Figures 2 to 6 --

ESTIMATES = ("file", "status", "estimate", "share", "confidence_set", "would_be", "recipe_p", "stated_size", "notes")
PICTURED = 20  # files at most in a picture
Judged = tuple[Estimate, Spectra, Spectra]  # of a file: its estimate, its spectra, the labelled models on its voters
Asked = dict[str, Path | str | Exception]  # name -> a file, or why it is left out, or why it is refused


def about_models(spectra: Spectra, subset: str, how: str) -> list[str]:
    """What the labelled models are, how they are used, and what is to be said of them."""
    sizes = " ".join(str(size) for size in spectra.sizes.unique().tolist())
    models, sets = counted(len(spectra.names), "model"), counted(spectra.count, "micro-dataset")
    kind, _ = kind_of_model({voter.layer: spectra.shapes[voter.layer] for voter in spectra.voters})
    method = "" if spectra.method == "LoRA" else f"{spectra.method}, "
    voters = f"{kind}; {method}matrices {' '.join(spectra.kinds)}, so {counted(len(spectra.voters), 'voter')}"
    return [f"{subset}: {models}, {sets}, sizes {sizes}", voters, how, *(f"note: {note}" for note in spectra.notes)]


def estimate_row(estimate: Estimate, predictor: str) -> dict[str, Any]:
    """An estimate for estimates.csv and report.json; None where there is nothing, or where it means nothing."""
    row, ok, interval = asdict(estimate), estimate.status == "ok", predictor == "log-regression"
    answer = row.pop("answer") or None
    return {
        **row,
        "estimate": answer if ok else None,
        "share": estimate.shares.get(estimate.answer) if ok and not interval else None,
        "confidence_set": ("-" if interval else " ").join(map(str, estimate.confidence_set)) if ok else "",
        "would_be": None if ok else answer,
        "stated_size": estimate.stated_size or None,
        "notes": [*estimate.first, *estimate.notes],
    }


def estimate_lines(estimate: Estimate, predictor: str, confidence: float, said: Iterable[str]) -> list[str]:
    """What is printed of one file, what the reader has to know first in the first line; `said` notes are left out."""
    its, interval = counted(estimate.answer, "image"), predictor == "log-regression"
    title, *lines = estimate.first or [its]
    if estimate.status == "ok":
        link, what = (" to ", "interval") if interval else (" or ", "set")
        members = link.join(map(str, dict.fromkeys(estimate.confidence_set)))
        if members or estimate.recipe_p is not None:
            title += f"; {100 * confidence:.6g} % {what}: {members or 'none, as it is like no labelled size'}"
        if not interval:
            shares = sorted(estimate.shares.items(), key=lambda share: -share[1])
            weights = ", ".join(f"{size}: {100 * share:.0f} %" for size, share in shares if share >= 0.005)
            lines.append(f"{predictor} weighs {weights}" if predictor.startswith("log-") else f"votes for {weights}")
        if estimate.told and not interval:
            lines.append(f"of {counted(estimate.told, 'left-out model')} told {its}, {estimate.right} had that size")
    elif estimate.answer:
        lines.append(f"judged all the same, it is told {its}, which is no estimate")
    lines += [f"nearest labelled recipe: {shown(estimate.recipe)}"] if estimate.recipe else []
    lines += [f"the file itself states {counted(estimate.stated_size, 'image')}"] if estimate.stated_size else []
    lines += [f"note: {note}" for note in estimate.notes if note not in said]
    return ["", f"{estimate.file}: {title}", *(f"  {line}" for line in lines)]


def write_files(place: Path, table: str, heads: Sequence[str], rows: Iterable[Any], found: dict[str, Any]) -> list[str]:
    """A table as CSV; what was found, and by which versions, as report.json. Returns lines that say so."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for row in rows:  # of longer ones the beginning; blank is what there is not
        cells = [f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row[: len(heads)]]
        writer.writerow(["; ".join(cell) if isinstance(cell, list) else cell for cell in cells])
    packages = ("torch", "numpy", "scikit-learn", "huggingface_hub", "datasets", "pyarrow", "safetensors")
    versions = {"python": sys.version.split()[0], **{package: version(package) for package in packages}}
    content = json.dumps({**found, "versions": versions})
    plain = json.loads(content, parse_constant=lambda _: None)  # a NaN, which can't be told, is null
    write_whole(place / table, text.getvalue())
    write_whole(place / "report.json", json.dumps(plain, indent=2) + "\n")
    return ["", f"wrote {place / table}", f"wrote {place / 'report.json'}"]


def draw(output: Path, figures: dict[str, Callable[[Any], Any]]) -> list[str]:
    """Write pictures into a folder: name -> a function of pyplot that gives a figure. Lines that say so."""
    os.environ["MPLBACKEND"] = "Agg"  # before the import: a notebook's own is not there, or needs a display
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {"figure.dpi": 150, "figure.constrained_layout.use": True, "font.size": 11}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.titlesize": 10}
    style["text.parse_math"] = False  # a $ in a name is a dollar
    with plt.rc_context(style):
        for name, figure_of in figures.items():
            image, figure = io.BytesIO(), figure_of(plt)
            figure.savefig(image, format="png", metadata={"Software": None})
            plt.close(figure)
            write_whole(output / f"{name}.png", image.getvalue())
    return [f"wrote {output / name}.png" for name in figures]


def confusion_figure(plt: Any, true: Tensor, predicted: Tensor, title: str) -> Any:
    """The sizes that models of each size were told, or those nearest to them, in percent (Figures 4 and 6)."""
    from sklearn.metrics import ConfusionMatrixDisplay

    figure, axes = plt.subplots(figsize=(6, 5))
    how: Any = {"normalize": "true", "values_format": ".0%", "cmap": "cividis", "colorbar": False, "ax": axes}
    ConfusionMatrixDisplay.from_predictions(true.numpy(), nearest_size(predicted, true.unique()).numpy(), **how)
    axes.set(xlabel="predicted size (images), % of models of the true size", ylabel="true size (images)", title=title)
    return figure


def spectra_figure(plt: Any, spectra: Spectra) -> Any:
    """By dataset size: norms and spectra, means over layers (Figure 2), and the spectra of two layers (Figure 3)."""
    matrix = [*spectra.kinds][-1]  # BA, unless it was left out
    spectra = spectra.of_matrices([matrix])
    masks = {size: spectra.sizes == size for size in spectra.sizes.unique().tolist()}
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(masks)))  # its lightest end fades on white
    figure, axes = plt.subplots(2, 2, figsize=(9, 7.5))
    norms = torch.linalg.vector_norm(spectra.values, dim=-1).mean(0)
    axes[0, 0].boxplot([norms[mask].numpy() for mask in masks.values()], showfliers=False)
    axes[0, 0].set_xticks(range(1, len(masks) + 1), [*masks])
    axes[0, 0].set(xlabel="dataset size (images)", ylabel=f"Frobenius norm of {matrix}", title="mean over layers")
    panels = {"mean over layers": spectra.values.mean(0)}
    for title, block, place in (("first down-block layer", "down", 0), ("last up-block layer", "up", -1)):
        rows = [row for row, voter in enumerate(spectra.voters) if voter.layer.startswith(block)] or [place]
        panels[f"{title}\n{spectra.voters[rows[place]].layer}"] = spectra.values[rows[place]]
    for axis, (title, values) in zip(axes.flat[1:], panels.items(), strict=True):
        indices = range(1, values.shape[-1] + 1)
        for (size, mask), colour in zip(masks.items(), colours, strict=True):
            mean, spread = values[mask].mean(0), values[mask].std(0, correction=0)
            axis.plot(indices, mean, color=colour, marker="o", markersize=4, label=size)
            axis.fill_between(indices, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
        axis.set(xlabel="index of the singular value", ylabel=f"singular value of {matrix}, mean ± std")
        axis.set(title=title.replace("_transformer", "\ntransformer"), xticks=indices[:: max(1, len(indices) // 8)])
    axes[0, 1].legend(title="images")
    return figure


def training_figure(plt: Any, growth: dict[str, list[Metrics]], title: str) -> Any:
    """Accuracy and MAE by the number of training micro-datasets (Figure 5)."""
    counts, summaries = [int(count) for count in growth], [mean_and_std(its) for its in growth.values()]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, metric, label in zip(axes, ("accuracy", "mae"), ("accuracy (%)", "MAE (images)"), strict=True):
        means, stds = zip(*(summary[metric] for summary in summaries), strict=True)
        axis.errorbar(counts, means, stds, color="#0072b2", marker="o", capsize=3)
        axis.set(xlabel="training micro-datasets", ylabel=label, xticks=counts)
    figure.suptitle(f"{title} (bars: std over experiments)", fontsize=11)
    return figure


def estimates_figure(plt: Any, judged: list[Judged], predictor: str) -> Any:
    """For each file the norms of its matrices, as lines over those of the labelled models by size, its set shaded."""
    drawn, width = judged[:PICTURED], max(len(file.kinds) for _, file, _ in judged)
    figure = plt.figure(figsize=(3.2 * width, 2.8 * len(drawn)))
    for line, (estimate, file, labelled) in enumerate(drawn):
        sizes, ends = labelled.sizes.unique(), estimate.confidence_set if estimate.status == "ok" else []
        held: Sequence[int] = range(ends[0], ends[-1] + 1) if ends and predictor == "log-regression" else ends
        for column, (matrix, voters) in enumerate(file.kinds.items(), start=1):
            axis = figure.add_subplot(len(drawn), width, line * width + column)
            if column == 1:
                what = counted(estimate.answer, "image") if estimate.status == "ok" else estimate.status
                axis.set_title(f"{shown(Path(estimate.file).name)}: {what}", loc="left")
            known, its = (log_norms(side)[:, voters].mean(1).exp() for side in (labelled, file))
            places = torch.searchsorted(sizes, labelled.sizes)
            axis.scatter(places, known, s=6, c=labelled.of_recipe, cmap="viridis")
            axis.axhline(float(its), color="black", linewidth=1)
            axis.set_xticks(range(len(sizes)), sizes.tolist())
            axis.set(xlabel="dataset size (images)", ylabel=f"norm of {matrix}")
            for place in [place for place, size in enumerate(sizes.tolist()) if size in held]:
                axis.axvspan(place - 0.5, place + 0.5, color="#d55e00", alpha=0.15, linewidth=0)
    what = "dots: labelled models, a colour for each recipe; line: the file; shaded: its set of sizes"
    figure.suptitle(f"{len(drawn)} of {len(judged)} files: Frobenius norms, mean over layers\n{what}", fontsize=10)
    return figure


# ---- The command line -----------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise DsireError(f"{message} (see --help)")


def path_of(text: str) -> Path:
    return Path(os.path.expanduser(text))  # not Path.expanduser, which raises for an unknown user


def command_line() -> argparse.ArgumentParser:
    protocol, about = Protocol(), str(__doc__).partition("The script reads")[0]
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser = OneLineParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("data: the labelled models").add_argument
    add("--subset", metavar="NAME", help=f"a config of the dataset, such as low_32 ({SHIPPED_SUBSET}, which ships)")
    where = "a Hub repository, a folder like it, a folder of LoRA files with metadata.csv, or a file of spectra"
    add("--dataset", metavar="WHERE", help=f"{where} ({LORA_WISE})")
    add("--revision", metavar="COMMIT", help="branch, tag or commit of the Hub dataset")
    add("--rank", **number, help=f"of the LoRAs (the one in the subset's name), or values kept of a change ({LARGEST})")
    add("--base", metavar="WHERE", help="what full fine-tunes began as: a file, folder or Hub repository")
    add("--cache_dir", type=path_of, default=CACHE, metavar="DIR", help="for downloads and spectra (%(default)s)")
    add("--keep_shards", action="store_true", help="keep downloads after their spectra are computed")
    add("--device", metavar="NAME", help="cuda or cpu (cuda, if there is one)")
    add = parser.add_argument_group("protocol: how the labelled models are evaluated").add_argument
    add("--experiments", **number, default=protocol.experiments, help="how many (%(default)s)")
    add("--train_size", **number, help="micro-datasets to train on (15, or three quarters of fewer than 20)")
    add("--seed", **number, default=protocol.seed, help="of the experiments' splits (%(default)s)")
    add("--matrices", nargs="+", choices=MATRICES, default=list(MATRICES), help="which ones vote (all)")
    add("--predictor", choices=PREDICTORS, metavar="NAME", help=f"{', '.join(PREDICTORS)} (dsire; predict: log-ridge)")
    add("--compare", action="store_true", help="all predictors and matrices; by size, training micro-datasets, recipe")
    add = parser.add_argument_group("prediction, instead of an evaluation").add_argument
    add("--predict", nargs="+", metavar="LORA", help="estimate for files, folders, user/name or user/name:file")
    add("--confidence", type=float, default=0.9, metavar="P", help="of the sets of sizes (%(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--output", type=path_of, metavar="DIR", help="for report.json, and predictions.csv or estimates.csv")
    add("--plots", action="store_true", help="draw the paper's figures, or --predict's files, into --output")
    add("--save_spectra", type=path_of, metavar="FILE", help="write the labelled models' spectra, for --dataset FILE")
    return parser


def warm_up(device: str) -> None:
    """Call what threads will call: PyTorch loads routines for CUDA at their first call, which fails in a thread."""
    layers = torch.eye(2, dtype=torch.float64, device=device).repeat(2, 1, 1)
    lora_spectra(layers, layers)  # Cholesky and eigenvalues
    qr_spectra(layers, layers)  # QR and singular values


def settle(arguments: argparse.Namespace) -> list[str]:
    """Fill in what the arguments leave open, and refuse what can't be done; notes of what is to be said."""
    for name, number in vars(arguments).items():
        if name in ("rank", "experiments", "train_size") and number is not None and not 0 < number < 2**53:
            raise DsireError(f"--{name}: '{number}' is not a whole number from 1 up")
    if not 0 < arguments.confidence < 1:
        raise DsireError(f"--confidence: '{arguments.confidence}' is not between 0 and 1")
    if arguments.predict and arguments.compare:
        raise DsireError("--compare is about the labelled models: leave it out with --predict")
    if arguments.plots and not arguments.output:
        raise DsireError("--plots needs a folder for the pictures: give it with --output")
    if arguments.save_spectra and arguments.save_spectra.exists() and not cached(arguments.save_spectra):
        raise DsireError(f"--save_spectra={arguments.save_spectra} is there, and holds no sound spectra: give another")
    for folder in (arguments.output, arguments.save_spectra and arguments.save_spectra.parent):
        if folder:  # what stands in the way is said before anything is computed
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    arguments.predictor = arguments.predictor or ("log-ridge" if arguments.predict else "dsire")
    if arguments.dataset is not None:
        return []
    arguments.subset = SHIPPED_SUBSET if arguments.subset is None else arguments.subset
    ships = (SHIPPED / arguments.subset.replace("_", "/")).is_dir()
    arguments.dataset = str(SHIPPED) if ships else LORA_WISE
    what = "ships with the script: LoRAs of a small UNet on 8 x 8 digits, made to test the method at this size"
    return [f"{arguments.subset} {what}, not to be compared with the paper's figures"] if ships else []


def labelled_models(arguments: argparse.Namespace, base: Weights | None) -> tuple[Spectra, dict[str, Any]]:
    """The labelled models on the matrices that vote, with notes of all that led to them; and the settings that did."""
    cache, gpus = arguments.cache_dir, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and arguments.device in (None, "cuda"):
        arguments.device = f"cuda:{torchrun('LOCAL_RANK', 0) % gpus}"
    arguments.device = arguments.device or "cpu"
    with asking(f"--device={arguments.device} can't be used here", "try --device=cpu"):
        warm_up(arguments.device)
    source = find_source(arguments.dataset, arguments.subset, arguments.revision, cache)
    rank, about_rank = rank_of(source, arguments.rank)
    spectra = subset_spectra(source, rank, cache, arguments.device, arguments.keep_shards, base)
    width, there = spectra.values.shape[-1], " ".join(spectra.kinds)
    if arguments.rank not in (None, width) and "A" in spectra.kinds:
        raise DsireError(f"--rank={arguments.rank} does not fit: the LoRAs have rank {width}")
    if arguments.save_spectra and not process_rank():
        name = source.dataset if source.commit else Path(source.dataset).name
        about = {"dataset": name, "subset": source.subset, "commit": source.commit}
        write_spectra(arguments.save_spectra, spectra, about, torch.float32)
        say(f"wrote {arguments.save_spectra}")
    numbers = re.compile(r"-\d{5}(-of-\d{5})(?:-[0-9a-f]{16})?\.parquet$")  # a download may have been cut short
    parts = Counter(numbers.sub(r"-*\1.parquet", shard.file) for shard in source.shards)
    lack = [f"{name}: {n} files, not all" for name, n in parts.items() if f"-{n:05d}." not in name and "*" in name]
    notes = about_rank + source.notes + lack + spectra.notes + what_is_unusual(spectra)
    spectra = replace(spectra.of_matrices(arguments.matrices), notes=notes)
    if not spectra.voters:
        raise DsireError(f"--matrices {' '.join(arguments.matrices)}: of a {spectra.method} there is only {there}")
    arguments.train_size = arguments.train_size or min(Protocol().train_size, max(1, 3 * spectra.count // 4))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    return spectra, settings | asdict(source) | {"rank": width}


def report(arguments: argparse.Namespace, spectra: Spectra, settings: dict[str, Any]) -> Iterator[str]:
    """What is to be printed of an evaluation; write and draw what is asked for."""
    name, subset = arguments.predictor, settings["subset"]
    protocol = Protocol(arguments.experiments, arguments.train_size, arguments.seed)
    runs = splits(spectra.micro_datasets, protocol)
    same = (len({*arguments.matrices}), *protocol) == (3, *Protocol()) and "lora-wise" in settings["dataset"].lower()
    paper = {row: values for (of, row), values in PAPER.items() if of == subset and same}
    if arguments.compare:
        tables, found = compare(spectra, protocol, paper)
    else:
        found = {name: PREDICTORS[name](spectra, runs)}
        tables = [metrics_table("", {name: judge(spectra, runs, found[name])}, paper)]
    to_train = f"{counted(protocol.train_size, 'micro-dataset')} to train"
    how = f"{counted(len(runs), 'experiment')}: {to_train}, {spectra.count - protocol.train_size} to test"
    yield from about_models(spectra, subset, how)
    yield from (line for table in tables for line in table.lines())
    if arguments.output:
        heads = ("experiment", "name", "size", "predicted", "vote_share", "predictor")[: 5 + arguments.compare]
        experiments = [its._asdict() for its in judge(spectra, runs, found[name])]
        details = {"settings": settings, "notes": spectra.notes, "experiments": experiments}
        details["tables"] = [table._asdict() for table in tables]
        rows = (
            [number, spectra.names[model], int(spectra.sizes[model]), size, share, predictor]
            for predictor, predictions in found.items()
            for number, (run, its) in enumerate(zip(runs, predictions, strict=True), start=1)
            for model, size, share in zip(*map(Tensor.tolist, (run.test, its.sizes, its.shares.amax(-1))), strict=True)
        )
        yield from write_files(arguments.output, "predictions.csv", heads, rows, details)
    if arguments.plots:
        title = f"{name} on {subset}, {len(spectra.names)} models"
        true = spectra.sizes[torch.cat([run.test for run in runs])]
        predicted = torch.cat([its.sizes for its in found[name]])
        figures: dict[str, Callable[[Any], Any]] = {
            "confusion": lambda plt: confusion_figure(plt, true, predicted, title),
            "spectra": lambda plt: spectra_figure(plt, spectra),
            "training": lambda plt: training_figure(plt, by_train_size(spectra, PREDICTORS[name], protocol), title),
        }
        yield from draw(arguments.output, figures)


def judged_files(asked: Asked, fitted: Spectra, arguments: argparse.Namespace, base: Weights | None) -> list[Judged]:
    """Each file's estimate and spectra, in the order asked; those that can't be read or matched are refused."""
    files = {name: path for name, path in asked.items() if isinstance(path, Path)}
    largest = max(LARGEST, fitted.values.shape[-1])
    alike: dict[tuple[Any, ...], list[Spectra]] = {}  # files with the same layers are judged together
    for name, path in tqdm(files.items(), desc="files", disable=None if len(files) > 1 else True):
        try:
            file = matched(replace(file_spectra(path, base, largest, arguments.device), names=[name]), fitted)
            alike.setdefault((file.values.shape[-1], *file.voters), []).append(file)
        except (DsireError, OSError) as error:
            asked[name] = error
            say(f"dsire.py: error: {name}: {error}", file=sys.stderr)
    judged: dict[str, Judged] = {}
    for (rank, *voters), its in alike.items():
        labelled = fitted.of_voters(voters)
        labelled = replace(labelled, values=of_rank(labelled.values, rank))
        found = estimates(labelled, its, arguments.predictor, arguments.confidence)
        judged |= {one.file: (one, file, labelled) for one, file in zip(found, its, strict=True)}
    return [judged[name] for name in files if name in judged]


def predict(
    arguments: argparse.Namespace, fitted: Spectra, settings: dict[str, Any], asked: Asked, base: Weights | None
) -> Iterator[str]:
    """What is to be printed of each file that can be read, and of the others; write and draw what is asked for."""
    name, judged = arguments.predictor, judged_files(asked, fitted, arguments, base)
    found = [estimate for estimate, *_ in judged]
    left_out = [f"{file}: {why}" for file, why in asked.items() if isinstance(why, str)]
    if left_out:
        fitted.notes.append(f"{counted(len(left_out), 'file')} left out, such as {left_out[0]}")
    fitted.notes.extend(what_can_be_supported(fitted, arguments.confidence))
    how = f"predictor {name}"
    if fitted.count > 1:
        good = metrics(fitted.sizes, leave_out(fitted, fitted.of_models(torch.tensor([0])), PREDICTORS[name])[1].sizes)
        how += f": of left-out labelled models it tells {good.accuracy:.0f} % right, MAE {good.mae:.2f} images"
    counts = Counter(note for _, file, _ in judged for note in file.notes)
    shared = {note: count for note, count in counts.items() if count > 1 and 2 * count > len(found)}
    yield from about_models(fitted, settings["subset"], how)
    yield from (f"note on {count} of {len(found)} files: {note}" for note, count in shared.items())
    for one in found:
        yield from estimate_lines(one, name, arguments.confidence, shared)
    if arguments.output:
        reasons = {file: str(why) for file, why in asked.items() if not isinstance(why, Path)}
        found += [Estimate(file, "refused", notes=[why]) for file, why in reasons.items()]
        rows = [estimate_row(estimate, name) for estimate in found]
        details = {"settings": settings, "notes": fitted.notes, "estimates": rows}
        cells = [[row[head] for head in ESTIMATES] for row in rows]
        yield from write_files(arguments.output, "estimates.csv", ESTIMATES, cells, details)
    if arguments.plots and judged:
        yield from draw(arguments.output, {"estimates": lambda plt: estimates_figure(plt, judged, name)})


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit code, 2 if some of what was asked could not be had."""
    notes, is_first = settle(arguments), not process_rank()
    base = None if arguments.base is None else open_base(arguments.base, arguments.cache_dir)
    items = arguments.predict if arguments.predict and is_first else []
    asked: Asked = {}
    for item in items:  # before a subset is fetched for nothing
        try:
            files, left_out = files_to_predict(item, arguments.cache_dir, base)
            asked = {**left_out, **asked, **files}
        except (DsireError, OSError) as error:
            asked[item] = error
            say(f"dsire.py: error: {error}", file=sys.stderr)
    if items and not any(isinstance(its, Path) for its in asked.values()):
        return 2
    spectra, settings = labelled_models(arguments, base)
    spectra.notes[:0] = notes
    said = predict(arguments, spectra, settings, asked, base) if items else report(arguments, spectra, settings)
    lines: list[str] = []
    try:  # files are written before anything is printed, in case nobody reads it; what is found is printed in any case
        lines.extend(said if is_first else [])  # which keeps those before an error
    finally:
        say(*lines)
    return 2 if any(isinstance(its, Exception) for its in asked.values()) else 0


def main() -> int:
    """The command; the one place where what went wrong becomes one line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter("ignore")  # what matters is said in a line of ours
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # it may know fewer letters than there are
    try:
        return run(command_line().parse_args())
    except KeyboardInterrupt:
        say("dsire.py: stopped; run it again to go on", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except (DsireError, OSError, RecursionError, MemoryError) as error:
        if process_rank():
            return 0  # the first process meets the same, and says it, or does all that is left
        text = error if isinstance(error, DsireError) else f"{shown(error)}; what was computed is kept"
        say(f"dsire.py: error: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    gc.freeze()  # what was imported is no garbage: to search it again and again, and at the exit, takes a second
    os._exit(main())  # at once: what others still fetch is not waited for, and what was imported not taken apart

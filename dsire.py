#!/usr/bin/env python3
"""DSiRe: how many images was a LoRA trained on? (arXiv:2406.19395)

    python dsire.py                            # the subset that ships, offline
    python dsire.py --subset=low_32 --rank=32  # LoRA-WiSE, from the Hub
    python dsire.py --subset=low_32 --predict my_lora.safetensors
    python dsire.py --dataset=my_loras --predict folder/ user/name --output=out
    python dsire.py --dataset=tuned --base=sd15.safetensors --predict full.ckpt

The script reads from top to bottom as the paper does: a LoRA layer and its
spectra, the voters and the vote, the protocol. Then what is beyond the paper:
a regression, how sure an estimate is, everything compared. Then the weights:
the names of LoRA matrices, parquet, files, where they come from, the cache of
spectra. Last: the report, pictures, the command line.
"""

from __future__ import annotations

import argparse
import csv
import errno
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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() runs, Ctrl-C ends the imports without a traceback

import numpy as np
import torch
from torch import Tensor

LORA_WISE = "MoSalama98/LoRA-WiSE"
SHIPPED = Path(__file__).resolve().parent / "tests" / "tiny_wise"
SHIPPED_SUBSET = "low_4"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dsire"
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
    """A sound file of something else, such as lies beside LoRAs: in a folder it is left out and counted."""


def shown(what: object) -> str:
    """A name out of a file, or the first line of a library's error: at most 160 characters."""
    text = str(what).strip()
    if isinstance(what, BaseException):
        text = text.splitlines()[0].rstrip(" .") if text else type(what).__name__
    return text if len(text) <= 160 else f"{text[:120]}... ({len(text):,} characters)"


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print lines; what a name out of a file could do to a terminal, or to a line, is escaped here for all of them."""
    for line in lines:
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(line))
        print(text, file=file or sys.stdout)


@contextmanager
def asking(what: str, hint: str = "") -> Iterator[None]:
    """The boundary to libraries: whatever one raises, in one line: what was asked of it, its own words, and a hint."""
    try:
        yield
    except DsireError:
        raise
    except Exception as error:  # a library may raise anything
        raise DsireError(f"{what} ({shown(error)})" + (f": {hint}" if hint else "")) from error


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def torchrun(name: str, otherwise: int) -> int:
    """What torchrun says of this process, such as its RANK among all of WORLD_SIZE."""
    number = os.environ.get(name, "")
    return int(number) if number.isdecimal() and "WORLD_SIZE" in os.environ else otherwise


def cores() -> int:
    """The cores that this process may use: under torchrun its part of the machine's."""
    import joblib

    return max(1, int(joblib.cpu_count()) // max(1, torchrun("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def one_thread_each() -> Iterator[None]:
    """For many small matrices: a second thread of torch's or NumPy's costs each of them more than it brings."""
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def in_parallel(
    function: Callable[[Any], T], items: Sequence[Any], at_once: int | None = None, name: str = ""
) -> list[T]:
    """What the function gives for each item, computed on all cores, each call with one thread.

    Args:
        at_once: how many calls run at the same time, if fewer than there are cores.
        name: of a progress bar; without it there is none.
    """
    from tqdm import tqdm

    with one_thread_each(), ThreadPoolExecutor(min(at_once or cores(), cores())) as pool:
        results = pool.map(function, items)
        return list(tqdm(results, desc=name, total=len(items), disable=None if name and items else True))


# ---------------------------------------------------------------------------------------------------------------------
# A LoRA layer and its spectra (Section 3.1)


def lora_spectra(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular values of A, B and BA, largest first, for a batch of LoRA layers of one shape.

    Nothing larger than r x r is decomposed, and the out x in product is never formed: with the Gram matrices G = A Aᵀ
    and H = Bᵀ B, and G = L Lᵀ (Cholesky), the squares of the singular values are the eigenvalues of G, H and Lᵀ H L.
    Squares lose half of the digits where singular values lie far apart: such a model goes by way of `qr_spectra`.

    Args:
        a, b: A ("down") [..., r, in] and B ("up") [..., out, r], float64.

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
    """What `lora_spectra` gives, for any matrices: with Aᵀ = Q R and B = P S (thin QR), BA = P (S Rᵀ) Qᵀ.

    So A has the singular values of R, B those of S, and BA those of S Rᵀ.
    """
    r, s = (torch.linalg.qr(matrix, mode="r").R for matrix in (a.mT, b))
    core = s @ r.mT
    # LAPACK's QR may drop a NaN, and its SVD may not return from one
    if not (a.isfinite().all() and b.isfinite().all() and r.isfinite().all() and core.isfinite().all()):
        raise FloatingPointError("weights that are not finite")
    of_a, of_b, of_ba = (of_rank(torch.linalg.svdvals(matrix), a.shape[-2]) for matrix in (r, s, core))
    return of_a, of_b, of_ba


def matrix_spectrum(matrix: Tensor, count: int) -> Tensor:
    """The largest singular values of any matrix [out, in] in float64: [count], or [min(out, in)] if that is less.

    As in `lora_spectra` they come from a Gram matrix, that of the smaller side, unless they lie too far apart for it;
    and FloatingPointError says that a number is not finite.
    """
    squared = gram(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT)
    if squared.diagonal().sum().isfinite():
        squares = torch.linalg.eigvalsh(squared).flip(-1)[:count]
        if squares[-1] > max(1e-6 * float(squares[0]), 1e-280):
            roots: Tensor = squares.sqrt()
            return roots
    if not matrix.isfinite().all():
        raise FloatingPointError("weights that are not finite")
    values: Tensor = torch.linalg.svdvals(matrix)[:count]
    return values


def product_spectrum(b: Tensor, a: Tensor, count: int) -> Tensor:
    """`matrix_spectrum` of B A, for B [out, r] and A [r, in]; formed only where r is no smaller than out or in."""
    return lora_spectra(a, b)[2][:count] if len(a) < min(len(b), a.shape[1]) else matrix_spectrum(b @ a, count)


def of_rank(values: Tensor, rank: int) -> Tensor:
    """Spectra [..., any number] cut, or filled with zeros, to [..., rank]."""
    return torch.nn.functional.pad(values, (0, rank - values.shape[-1]))


def batch_spectra(a: Tensor, b: Tensor, device: str) -> Tensor:
    """lora_spectra of a batch on a device, [3, models, r] on the CPU; the batch is halved while the memory is short.

    Raises:
        DsireError: the device can't hold a single model's layer.
    """
    try:
        return torch.stack(lora_spectra(a.to(device), b.to(device))).cpu()
    except torch.cuda.OutOfMemoryError:
        if len(a) == 1:
            raise DsireError(f"{device} has no memory left for a single layer: use --device=cpu") from None
    half = len(a) // 2
    return torch.cat([batch_spectra(a[:half], b[:half], device), batch_spectra(a[half:], b[half:], device)], dim=1)


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
        pairs: Tensor = torch.stack([self.of_recipe, self.sizes], dim=1).unique(dim=0, return_inverse=True)[1]
        return pairs

    @cached_property
    def kinds(self) -> dict[str, Tensor]:
        """The kinds of matrix that vote, "A", "B" and "BA", each with the mask of its voters: bool [voters]."""
        masks = {matrix: torch.tensor([voter.matrix == matrix for voter in self.voters]) for matrix in MATRICES}
        return {matrix: mask for matrix, mask in masks.items() if mask.any()}

    @property
    def count(self) -> int:
        """How many micro-datasets there are."""
        return len(set(self.names))

    def of_models(self, models: Tensor) -> Spectra:
        """The models with these numbers, int64, or of this mask, bool [models]."""
        models = models.nonzero().flatten() if models.dtype == torch.bool else models
        names, recipes = ([its[model] for model in models.tolist() if its] for its in (self.names, self.recipes))
        return replace(self, values=self.values[:, models], sizes=self.sizes[models], names=names, recipes=recipes)

    def of_matrices(self, matrices: Iterable[str]) -> Spectra:
        return self.of_voters([voter for voter in self.voters if voter.matrix in matrices])

    def of_voters(self, voters: list[Voter]) -> Spectra:
        if voters == self.voters:
            return self
        rows = {voter: row for row, voter in enumerate(self.voters)}
        return replace(self, values=self.values[[rows[voter] for voter in voters]], voters=voters)


# ---------------------------------------------------------------------------------------------------------------------
# The voters and the vote (Section 3.2)


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
    """For each split, voter and test model, the nearest training model (Euclidean; the first one of equals).

    Distances are exact, each computed by itself and once for all splits: models with equal spectra are equally far.

    Args:
        values: float64 [voters, models, r].

    Returns:
        For each split the numbers of models, int64 [voters, test models].
    """
    trained = torch.cat([split.train for split in splits]).unique()
    asked = torch.cat([split.test for split in splits]).unique()
    train = [torch.searchsorted(trained, split.train).numpy() for split in splits]
    test = [torch.searchsorted(asked, split.test).numpy() for split in splits]
    found = [np.empty((len(values), len(split.test)), dtype=np.int64) for split in splits]
    block = max(1, DISTANCES_AT_ONCE // len(trained))
    among_all = torch.equal(trained, asked) and len(asked) <= block

    def search(voter: int) -> None:
        # squares of very large or small spectra are out of range; a power of two changes no digit of the others
        middle = float(values[voter, trained].amax(-1).median())
        factor = 2.0 ** min(1000, max(-1000, -math.frexp(middle)[1]))
        known = values[voter, trained] * factor
        for start in range(0, len(asked), block):
            these = known if among_all else values[voter, asked[start : start + block]] * factor
            squares = squared_distances(these, known)
            for nearest_ones, columns, rows in zip(found, train, test, strict=True):
                first, last = np.searchsorted(rows, (start, start + block))
                here = squares.take(rows[first:last] - start, axis=0).take(columns, axis=1)
                nearest_ones[voter, first:last] = columns[here.argmin(1)]

    in_parallel(search, range(len(values)))
    return [trained[torch.from_numpy(nearest_ones)] for nearest_ones in found]


def squared_distances(x: Tensor, y: Tensor) -> Any:
    """|x_i - y_j|² of rows x [n, r] and y [m, r]: a NumPy array [n, m]."""
    from scipy.spatial.distance import cdist, pdist, squareform  # comes with scikit-learn

    if x is y:  # each pair once
        return squareform(pdist(x.numpy(), "sqeuclidean"))
    return cdist(x.numpy(), y.numpy(), "sqeuclidean")  # not `torch.cdist`: its roots make near ones equal


class Votes(NamedTuple):
    """What voters say: the size that each names for each model, int64 [voters, models], of these sizes, rising."""

    named: Tensor
    candidates: Tensor


def votes_of(spectra: Spectra, splits: list[Split]) -> list[Votes]:
    """The vote in each split: a voter names the size of its nearest training model."""
    found = nearest(spectra.values, splits)
    return [
        Votes(spectra.sizes[models], spectra.sizes[split.train].unique())
        for models, split in zip(found, splits, strict=True)
    ]


def majority(votes: Votes) -> Prediction:
    """The size with most votes; among equals the one that was voted first in the order of the voters."""
    named, candidates = votes
    ballots = named[:, :, None] == candidates  # [voters, models, sizes]
    counts = ballots.sum(0)
    first = ballots.to(torch.uint8).argmax(0)  # the first voter for a size
    first = first.masked_fill(counts < counts.max(-1, keepdim=True).values, len(named))
    return Prediction(candidates[first.argmin(-1)], candidates, counts.double() / len(named))


def nearest_size(answers: Tensor, candidates: Tensor) -> Tensor:
    """The candidate nearest to each answer, the smaller one of two: int64, of the answers' shape."""
    return candidates[(answers[..., None] - candidates).abs().argmin(-1)]


def dsire(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """The paper's predictor: one 1-NN per voter, fitted on the training models, and the majority of their votes."""
    return [majority(votes) for votes in votes_of(spectra, splits)]


def dsire_average(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """The same voters, but the training size nearest to the mean of what they name (Table 5, average vote)."""
    return [
        replace(majority(votes), sizes=nearest_size(votes.named.double().mean(0), votes.candidates))
        for votes in votes_of(spectra, splits)
    ]


def frobenius(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """The paper's baseline Frobenius-NN (Table 2): 1-NN on each matrix's Frobenius norm, that of its spectrum."""
    return dsire(replace(spectra, values=torch.linalg.vector_norm(spectra.values, dim=-1, keepdim=True)), splits)


def whole_model(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """A single 1-NN on all the spectra of a model, concatenated (Table 5, NN-full)."""
    return dsire(replace(spectra, values=spectra.values.transpose(0, 1).flatten(1)[None]), splits)


def ridge(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """Per voter a ridge regression from the spectrum to n, rounded to the nearest training size; majority (Table 5).

    The paper doesn't give its regularisation. Singular values of A, B and BA differ by orders of magnitude, so they are
    standardised, and then scikit-learn's default penalty of 1 is mild for 90 models and at most 32 features.
    """
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return fitted_voters(lambda: make_pipeline(StandardScaler(), Ridge()), spectra, splits)


def gda(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """Per voter a Gaussian discriminant analysis of the spectrum; majority (Table 5).

    Fifteen models of a size can't tell a covariance of its own for up to 32 singular values, so all sizes share one,
    pooled over 90 models: linear discriminant analysis. scikit-learn's default solver (SVD) needs no inverse, which
    nearly collinear singular values would spoil, and leaves nothing to tune.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    return fitted_voters(LinearDiscriminantAnalysis, spectra, splits)


def fitted_voters(new_estimator: Callable[[], Any], spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """The majority of the training sizes nearest to what one scikit-learn estimator per voter answers.

    Raises:
        DsireError: there are too few training models for the estimator.
    """
    x, sizes = spectra.values.numpy(), spectra.sizes

    def vote(split: Split) -> Prediction:
        train, test, known = split.train.numpy(), split.test.numpy(), sizes[split.train]
        answers = [new_estimator().fit(its[train], known.numpy()).predict(its[test]) for its in x]
        candidates = known.unique()
        return majority(Votes(nearest_size(torch.tensor(np.stack(answers)), candidates), candidates))

    with one_thread_each(), asking("ridge or gda can't be fitted", "label more models, or give a larger --train_size"):
        return [vote(split) for split in splits]


# ---------------------------------------------------------------------------------------------------------------------
# The protocol (Section 5)


class Protocol(NamedTuple):
    """How predictors are judged: so many experiments, so many micro-datasets to train on, and the seed of the draw."""

    experiments: int = 10
    train_size: int = 15
    seed: int = 42


class Metrics(NamedTuple):
    """How good predictions are: MAE in images, MAPE in % and accuracy in %."""

    mae: float
    mape: float
    accuracy: float


def metrics(sizes: Tensor, predicted: Tensor) -> Metrics:
    """Of predicted sizes, by the true ones."""
    errors = (predicted - sizes).abs().double()
    mape, accuracy = 100 * float((errors / sizes).mean()), 100 * float((errors == 0).double().mean())
    return Metrics(float(errors.mean()), mape, accuracy)


def splits(micro_datasets: Tensor, protocol: Protocol) -> list[Split]:
    """Models to train on and models to test on, once per experiment; a micro-dataset is never divided.

    Args:
        micro_datasets: of each model, 0 to K - 1, int64 [models].

    Raises:
        DsireError: there are fewer than train_size + 1 micro-datasets.
    """
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
    """The metrics of each split's predictions."""
    return [metrics(spectra.sizes[run.test], its.sizes) for run, its in zip(runs, predictions, strict=True)]


def evaluate(spectra: Spectra, predictor: Predictor, protocol: Protocol) -> list[Metrics]:
    """The paper's protocol: train on some micro-datasets, test on all others, several times over."""
    runs = splits(spectra.micro_datasets, protocol)
    return judge(spectra, runs, predictor(spectra, runs))


def mean_and_std(experiments: list[Metrics]) -> dict[str, tuple[float, float]]:
    """Mean and population standard deviation of each metric over the experiments."""
    table = torch.tensor(experiments, dtype=torch.float64)
    means, stds = table.mean(0).tolist(), table.std(0, correction=0).tolist()
    return dict(zip(Metrics._fields, zip(means, stds, strict=True), strict=True))


def default_train_size(count: int) -> int:
    """Micro-datasets to train on where nobody says how many: the paper's 15, or three quarters of fewer than 20."""
    return Protocol().train_size if count >= 20 else max(1, 3 * count // 4)


# ---------------------------------------------------------------------------------------------------------------------
# Beyond the paper: one regression from all log spectra to log n

PENALTIES = tuple(10 ** (power / 2) for power in range(-8, 5))  # to choose from


def log_ridge(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """One ridge regression from all log spectra to log n; answers the training size nearest in log.

    Singular values shrink roughly as a power of n, so their logarithms are near linear in log n, in every voter; and a
    regression knows what a classifier does not, that 4 lies between 3 and 5. The penalty is the one that predicts best
    when the training micro-datasets are left out in turn: nothing is chosen on test models. The shares are those of a
    normal distribution about the answer, as wide as the errors on what was left out.
    """
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
    numbers: Tensor = torch.linspace(low, high, 2000, dtype=torch.float64).exp().round().long().unique()
    return numbers


def fitted_ridge(train: Spectra, new: Spectra) -> tuple[Prediction, Prediction]:
    """What `log_ridge` says of new models, and of each training model when its micro-dataset is left out.

    A recipe moves all norms, so that one line through several recipes fits none. Of several recipes, models weigh the
    less for each other the farther they are apart (`recipe_distances`): 1 + k, for the kernel k of the line, is divided
    by 1 + (d / 8)², so that neighbouring recipes and sizes speak for each other. Of what is far from all labelled
    models the line knows more: its answer counts with (d / 5)² to 1 for a distance d from the nearest.
    """
    x, z = log_features(train, new)
    kernel, cross = x @ x.T / x.shape[1], z @ x.T / x.shape[1]
    y, candidates = train.sizes.double().log(), train.sizes.unique()
    units = train.micro_datasets if train.count > 1 else torch.arange(len(y))
    answers, left_out = left_out_ridge(kernel, cross, y, units)
    if train.of_recipe.any():
        among, between = recipe_distances(x, z, train, new)
        local = left_out_ridge((1 + kernel) / (1 + among / 8**2), (1 + cross) / (1 + between / 8**2), y, units)
        others = among.masked_fill(units[:, None] == units, math.inf)
        to_nearest = between.amin(1), others.amin(1)
        far = [1 - 1 / (1 + squared / 5**2) for squared in to_nearest]
        answers = local[0] + far[0] * (answers - local[0])
        left_out = local[1] + far[1] * (left_out - local[1])
    deviation = (y - left_out).square().mean().sqrt().clamp_min(1e-9)

    def prediction(logs: Tensor) -> Prediction:
        shares = torch.softmax(-((logs[:, None] - candidates.double().log()) / deviation).square() / 2, dim=1)
        return Prediction(candidates[shares.argmax(1)], candidates, shares, logs.exp())

    return prediction(answers), prediction(left_out)


def log_features(train: Spectra, test: Spectra) -> tuple[Tensor, Tensor]:
    """Log singular values of all voters, standardised by the training models': float64 [models, voters * r].

    What is below a millionth of a voter's largest singular value is rounding and counts as that.
    """
    floor = (1e-6 * train.values.amax((1, 2), keepdim=True)).clamp_min(torch.finfo(torch.float64).tiny)
    x, z = (side.values.clamp_min(floor).log().transpose(0, 1).flatten(1) for side in (train, test))
    mean, deviation = x.mean(0), x.std(0, correction=0)
    scale = torch.where(deviation > 1e-9, 1 / deviation.clamp_min(1e-9), 0)  # what doesn't vary says nothing
    return (x - mean) * scale, (z - mean) * scale


def left_out_ridge(kernel: Tensor, cross: Tensor, y: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """A ridge regression on y [models] with an intercept: its answers [new], and [models] each without its unit.

    In closed form: with the hat matrix H (fitted values H y), the models of a unit f are missed by
    (I - H_ff)^-1 (y - H y)_f when f is left out. The penalty is the one with the least errors on what is left out.

    Args:
        kernel: of the models, float64 [models, models]; `cross` is that of new models with them, [new, models].
        units: the unit of each model, int64 [models]; two units or more, unless there is one model only.
    """
    if len(y) == 1:
        return y.expand(len(cross)), y
    of_model = kernel.mean(0)
    values, vectors = torch.linalg.eigh(kernel - of_model - of_model[:, None] + of_model.mean())
    values = values.clamp_min(0)
    folds = [(units == unit).nonzero().flatten() for unit in units.unique()]

    def missed_by(penalty: float) -> Tensor:
        hat = (vectors * (values / (values + penalty))) @ vectors.T + 1 / len(y)
        residuals, errors = y - hat @ y, torch.empty_like(y)
        for fold in folds:
            rest = torch.eye(len(fold), dtype=y.dtype) - hat[fold][:, fold]
            errors[fold] = torch.linalg.solve(rest, residuals[fold])
        return errors

    tried = {penalty: missed_by(penalty) for penalty in PENALTIES}
    best = min(tried, key=lambda penalty: float(tried[penalty].square().mean()))
    cross = cross - of_model
    cross = cross - cross.mean(1, keepdim=True)
    weights = (cross @ vectors / (values + best)) @ vectors.T + 1 / len(y)  # H for new models
    return weights @ y, y - tried[best]


def recipe_distances(x: Tensor, z: Tensor, train: Spectra, new: Spectra) -> tuple[Tensor, Tensor]:
    """How far models are from training models in what recipes change: squared Mahalanobis distances within groups.

    It shows in four numbers: the `mean_over_layers` of log norms, and the first two principal components of the means
    by recipe and size of the features x [models, features] and z [new, features]. [models, models] and [new, models].
    """
    means, _ = means_by_group(x, train.groups)
    components = torch.linalg.svd(means - means.mean(0), full_matrices=False).Vh[:2].T
    norms, new_norms = (mean_over_layers(log_norms(spectra), spectra.kinds) for spectra in (train, new))
    known, asked = torch.cat([x @ components, norms], dim=1), torch.cat([z @ components, new_norms], dim=1)
    known, asked = whitened(known, asked, train.groups)
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
    """x [models, p] and z [new, p], turned and scaled so that x spreads by 1 within groups 0, 1, ... in all directions.

    So distances are Mahalanobis distances, with one covariance for all groups. Where groups are as good as single
    models nothing is known of it, so as much as four models say is said beforehand: a fifth of the spread of all.
    """
    unit = x.std(0, correction=0).clamp_min(1e-6)
    x, z = x / unit, z / unit
    means, count = means_by_group(x, groups)
    residuals, of_all = x - means[groups], x - x.mean(0)
    before = of_all.T @ of_all / max(1, len(x) - 1) / 5**2
    covariance = (residuals.T @ residuals + 4 * before) / (len(x) - len(count) + 4)
    values, vectors = torch.linalg.eigh(covariance)
    turn = vectors / (values.clamp_min(0) + 1e-9).sqrt()  # less is rounding
    return x @ turn, z @ turn


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
# How sure: what is said of labelled models that were left out, beside a new model

NOT_COMPARABLE = 0.05  # p-values of the check up to this are said first
FEWEST_COMPARED = round(1 / NOT_COMPARABLE) - 1  # of fewer left-out models no p is so small
REASONS = "another recipe, another base of the same shape, or a size beyond the labelled ones"
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


def without_each(fitted: Spectra) -> list[Split]:
    """For each micro-dataset the split that leaves it out; of a single one there is none."""
    return [split_by(fitted.micro_datasets != number) for number in range(fitted.count) if fitted.count > 1]


def leave_out(fitted: Spectra, new: Spectra, predictor: Predictor) -> tuple[Prediction, Prediction]:
    """The predictor's answers for new models, and for each labelled one when its micro-dataset is left out.

    Where there is a single micro-dataset, what is said of labelled models means nothing.
    """
    if predictor in (log_ridge, log_regression):
        answer, left_out = fitted_ridge(fitted, new)
        return (answer, left_out) if predictor is log_ridge else (unrounded(answer), unrounded(left_out))
    values, sizes = torch.cat([fitted.values, new.values], dim=1), torch.cat([fitted.sizes, new.sizes])
    both = replace(fitted, values=values, sizes=sizes, names=[*fitted.names, *new.names], recipes=[])
    every, folds = split_by(torch.arange(len(sizes)) < len(fitted.sizes)), without_each(fitted)
    answer, *without = predictor(both, [every, *folds])
    shares, left_out_sizes = answer.shares.new_zeros(len(every.train), len(answer.candidates)), fitted.sizes.clone()
    for fold, its in zip(folds, without, strict=True):
        known = torch.isin(answer.candidates, its.candidates)  # a size may be in one micro-dataset only
        shares[fold.test[:, None], known.nonzero().T] = its.shares
        left_out_sizes[fold.test] = its.sizes
    return replace(answer, answers=None), Prediction(left_out_sizes, answer.candidates, shares)


def how_good(fitted: Spectra, predictor: str) -> Metrics | None:
    """The metrics of labelled models whose micro-dataset is left out; None where there is a single one."""
    if fitted.count == 1:
        return None
    _, left_out = leave_out(fitted, fitted.of_models(torch.tensor([0])), PREDICTORS[predictor])
    return metrics(fitted.sizes, left_out.sizes)


def nearest_in_log(sizes: Tensor, labelled: Tensor) -> Tensor:
    """The labelled size nearest to each size, int64 [sizes]."""
    return labelled[(sizes.double().log()[:, None] - labelled.double().log()).abs().argmin(1)]


def conformal_p(fitted: Spectra, left_out: Prediction, new: Prediction, candidates: Tensor) -> Tensor:
    """The conformal p-value of each candidate size, int64 [sizes], for each new model: float64 [new, sizes].

    Micro-datasets are what is exchangeable, so each counts once (Lee, Barber and Willett 2023). And label-conditional:
    a size n is compared with the left-out models of size n alone (of the nearest labelled size, for an n that is none).
    With s_i how well the true size of model i conforms when its micro-dataset is left out, s(n) how well n conforms for
    the new model, and K_n the number of micro-datasets that have a model of size n,
        p(n) = (1 + sum over those of the mean over their models i of size n of [s_i <= s(n)]) / (K_n + 1).
    The set of sizes with p(n) > 1 - confidence holds the true size about that often, for every size alike. That is
    measured (`how_sure`) and not proven: the fit that judges the new model has one micro-dataset more.
    """

    def conformity(its: Prediction, sizes: Tensor) -> Tensor:
        """By the share of the votes (the sizes are the candidates then), or by how near log n is to the answer."""
        return its.shares if its.answers is None else -(sizes.double().log() - its.answers.log()[:, None]).abs()

    labelled = fitted.sizes.unique()
    true = conformity(left_out, labelled).gather(1, torch.searchsorted(labelled, fitted.sizes)[:, None]).flatten()
    asked, compared_with = conformity(new, candidates), nearest_in_log(candidates, labelled)
    p = torch.empty_like(asked)
    for size in labelled:
        models, columns = fitted.sizes == size, compared_with == size
        _, unit, count = fitted.micro_datasets[models].unique(return_inverse=True, return_counts=True)
        at_least_as_strange = true[models] <= asked[:, columns, None] + 1e-9
        p[:, columns] = (1 + at_least_as_strange.double() @ (1 / count.double())[unit]) / (len(count) + 1)
    return p


def check_recipe(fitted: Spectra, new: Spectra) -> tuple[Tensor, Tensor, int]:
    """Compare how far new models are from the nearest labelled recipe and size with how far left-out ones are.

    From each column of `distances_to_groups` is taken what is usual for left-out models of that recipe and size, of
    which some scatter more than others (their mean, with that of all as that of four more models). The largest counts:
        p = (1 + how many left-out models are at least as far) / (1 + how many there are).
    A model is left out with its micro-dataset, and compared if others of its recipe and size are left then.

    Returns:
        p, float64 [new]; the number of a labelled model of the nearest recipe and size, int64 [new]; and how many
        left-out models were compared: where there are none, p is 1.
    """
    known, groups, kinds = log_norms(fitted), fitted.groups, fitted.kinds
    far, near = distances_to_groups(known, groups, log_norms(new), kinds)
    far_out, near_out, compared = far.new_zeros(len(known), far.shape[1]), groups.clone(), groups < 0
    for rest, out in without_each(fitted):
        out = out[torch.isin(groups[out], groups[rest])]
        if len(out):
            far_out[out], near_out[out] = distances_to_groups(known[rest], groups[rest], known[out], kinds)
            compared[out] = True
    first_of_group = (groups == near[:, None]).int().argmax(1)
    if not compared.any():
        return far.new_ones(len(far)), first_of_group, 0
    members, of_all = torch.nn.functional.one_hot(groups).double() * compared[:, None], far_out[compared].mean(0)
    usual = (members.T @ far_out + 4 * of_all) / (members.sum(0)[:, None] + 4)
    most, most_out = (far - usual[near]).amax(1), (far_out - usual[near_out]).amax(1)[compared]
    p = (1 + (most_out >= most[:, None] - 1e-9).sum(1)) / (1 + len(most_out))
    return p, first_of_group, len(most_out)


def distances_to_groups(
    known: Tensor, groups: Tensor, asked: Tensor, kinds: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """How far log norms [asked, voters] are from known ones [models, voters] of the nearest group, int64 [models].

    What a recipe changes in every layer alike shows in the mean over the layers of the log norms of A and of B: their
    chance differences average out, above all those of A's first weights. The first column is the Mahalanobis distance
    of these; by it a group is the nearest. What is wrong in one kind of matrix alone (alpha is in BA only) or in one
    layer shows in the others: mean squared z-scores of the log norms of one kind of matrix, with the group's own
    variance, to which the pooled one is added as that of two more models.

    Returns:
        Logarithms of squared distances, float64 [asked, 1 + kinds], and the nearest group, int64 [asked].
    """
    numbers, of_group = groups.unique(return_inverse=True)
    x, z = whitened(mean_over_layers(known, kinds), mean_over_layers(asked, kinds), of_group)
    of_means, near = torch.from_numpy(squared_distances(z, means_by_group(x, of_group)[0])).min(1)
    means, count = means_by_group(known, of_group)
    residuals = (known - means[of_group]).square()
    pooled = residuals.sum(0) / max(1, len(known) - len(numbers))
    variance = (count * means_by_group(residuals, of_group)[0] + 2 * pooled) / (count + 1)
    scores = (asked - means[near]).square() / variance[near].clamp_min(1e-12)  # less is rounding
    columns = torch.stack([of_means, *(scores[:, kind].mean(1) for kind in kinds.values())], dim=1)
    return columns.clamp_min(1e-3).log(), numbers[near]


def what_is_beyond(fitted: Spectra, new: Spectra) -> list[tuple[list[str], bool]]:
    """For each new model, in words, what is beyond all labelled models'; and whether that alone makes it unlike them.

    That is a kind of matrix whose norms are beyond theirs in a quarter of the layers (by a factor of two, if it makes
    the model unlike them), or far beyond in one.
    """
    known, asked = log_norms(fitted), log_norms(new)
    beyond = (asked - known.amax(0)).clamp_min(0) + (asked - known.amin(0)).clamp_max(0)  # signed; 0 within the range
    zero = torch.where(beyond > 0, ~fitted.values.any(-1).any(-1), ~new.values.any(-1).T)
    found = []
    for its, its_zero in zip(beyond, zero, strict=True):
        said, unlike = {}, False
        for matrix, voters in fitted.kinds.items():
            layers, most = int(voters.sum()), int((its.abs() * voters).argmax())
            usual, far = float(its[voters].abs().sort().values[3 * layers // 4]), abs(float(its[most]))
            larger = bool(its[most] > 0)
            unlike |= usual > math.log(2) or far > 3
            if usual > math.log(1.05) or far > 3:
                what = "zero in all labelled models, and not here," if larger else "zero"
                if not its_zero[most]:
                    factor = f"by a factor of up to {math.exp(min(far, 700)):.3g}"
                    what = f"{'larger' if larger else 'smaller'} than any labelled model's, {factor},"
                count = int((voters & ((its > 0) == larger) & (its != 0) & (its_zero == its_zero[most])).sum())
                where = f"{count} of {counted(layers, 'layer')}" if count > 1 else shown(fitted.voters[most].layer)
                said[matrix] = f"{matrix} is {what} in {where}"
        if [*said] == ["BA"] and len(fitted.kinds) == len(MATRICES):
            said["BA"] += "; A and B are not: another alpha?"
        found.append(([*said.values()], unlike))
    return found


def this_very_model(fitted: Spectra, values: Tensor) -> list[str]:
    """A note if the spectra of a labelled model are a new one's [voters, r], each to a millionth of its norm."""
    far = torch.linalg.vector_norm(fitted.values - values[:, None], dim=-1)
    same = (far <= 1e-6 * torch.linalg.vector_norm(fitted.values, dim=-1)).all(0).nonzero().flatten().tolist()
    labels = [f"{fitted.names[model]} of {counted(int(fitted.sizes[model]), 'image')}" for model in same[:1]]
    return [f"this very model is among the labelled ones: {label}" for label in labels]


def estimates(fitted: Spectra, files: list[Spectra], predictor: str, confidence: float) -> list[Estimate]:
    """Estimates for new models, one in each of the files; how sure they are comes from leaving micro-datasets out.

    Args:
        fitted: the labelled models, with the same voters.
        predictor: the name of one of PREDICTORS.
        confidence: the share of new models whose true size the set shall hold, between 0 and 1.

    Raises:
        DsireError: the predictor needs more labelled models.
    """
    values, sizes = torch.cat([file.values for file in files], dim=1), torch.cat([file.sizes for file in files])
    new = replace(files[0], values=values, sizes=sizes, names=[file.names[0] for file in files], recipes=[])
    with one_thread_each():
        answer, left_out = leave_out(fitted, new, PREDICTORS[predictor])
        p, near, compared = check_recipe(fitted, new)
    candidates = whole_numbers(answer.candidates) if predictor == "log-regression" else answer.candidates
    members = conformal_p(fitted, left_out, answer, candidates) > 1 - confidence + 1e-9
    named, told = (nearest_in_log(its.sizes, answer.candidates) for its in (answer, left_out))
    beyond, found = what_is_beyond(fitted, new), []
    for row, file in enumerate(files):
        shares = dict(zip(answer.candidates.tolist(), answer.shares[row].tolist(), strict=True))
        one = Estimate(new.names[row], "ok", int(answer.sizes[row]), shares, stated_size=int(sizes[row]))
        if fitted.count > 1:
            held, alike = candidates[members[row]].tolist(), told == named[row]
            held = [held[0], held[-1]] if held and predictor == "log-regression" else held
            right = int((alike & (fitted.sizes == named[row])).sum())
            one = replace(one, confidence_set=held, told=int(alike.sum()), right=right)
        recipe = fitted.recipes[int(near[row])] if fitted.of_recipe.any() else ""
        one = replace(one, recipe_p=float(p[row]) if compared else None, recipe=recipe)
        found.append(with_remarks(one, file, this_very_model(fitted, values[:, row]), *beyond[row]))
    return found


def with_remarks(one: Estimate, file: Spectra, same: list[str], beyond: list[str], unlike: bool) -> Estimate:
    """The estimate with all that is to be said of it."""
    if UNTRAINED in file.first:
        return Estimate(one.file, "untrained", stated_size=one.stated_size, first=file.first, notes=file.notes)
    first, notes, flagged = (
        [*file.first],
        same + file.notes,
        one.recipe_p is not None and one.recipe_p <= NOT_COMPARABLE,
    )
    if (flagged or unlike) and not same:
        how = f" (p = {one.recipe_p:.2g})" if flagged else ""
        first += [f"not comparable with the labelled models{how}: {REASONS}", *beyond]
    if one.confidence_set and not one.confidence_set[0] <= one.answer <= one.confidence_set[-1]:
        notes.append("the set does not hold the estimate: trust the set")
    if one.stated_size not in (0, one.answer):
        notes.append(f"the estimate disagrees with the size that the file states, {one.stated_size}")
    return replace(one, status="not comparable" if first else "ok", first=first, notes=notes)


def what_can_be_supported(sizes: Tensor, units: Tensor, confidence: float) -> list[str]:
    """Notes if labelled sizes, int64 [models], are in too few micro-datasets, `units`, for the sets or the check."""
    if len(units.unique()) == 1:
        return ["one micro-dataset only: how sure an estimate is, and whether a file is comparable, can't be told"]
    counts = {int(size): len(units[sizes == size].unique()) for size in sizes.unique()}
    size, least = min(counts.items(), key=lambda item: item[1])
    needed, notes = math.ceil(1 / (1 - confidence) - 1 - 1e-9), []
    if least < needed:
        most = f"{counted(least, 'micro-dataset')} with size {size} can support no more than {least / (least + 1):.0%}"
        notes.append(f"{most}, so every set holds such sizes: label {needed} or more for {100 * confidence:.6g}%")
    if sum(counts[size] > 1 for size in sizes.tolist()) < FEWEST_COMPARED:
        notes.append(f"whether a file is comparable can't be told: label {FEWEST_COMPARED} models or more")
    return notes


# LoRA-WiSE's subsets by the width of the text that cross-attention looks at, and the rank
SUBSETS_THAT_FIT = {
    (768, 8): "low_8",
    (768, 16): "low_16 medium_16",
    (768, 32): "low_32 medium_32 high_32",
    (1024, 32): "medium_32_2",
}
SD_OF_WIDTH = {768: " (SD 1.5)", 1024: " (SD 2)", 2048: " (SDXL)"}


def matched(file: Spectra, fitted: Spectra) -> Spectra:
    """The file's model on the voters that it shares with the fitted ones; what doesn't fit is told in first and notes.

    Layers of one name and shape [out, in] are compared, by BA alone if their ranks differ; models of different methods
    by what both have. Of spectra there are as many values as both have.

    Raises:
        DsireError: nothing can be compared; the message says what both are, and what would fit.
    """
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
    comparable = {voter for voter in file.voters if voter.layer in of_shape - other_rank}
    comparable |= {voter for voter in file.voters if voter.layer in other_rank and voter.matrix == "BA"}
    shared = file.of_voters([voter for voter in fitted.voters if voter in comparable])
    kinds, first = what_they_are(file, fitted), list(file.first)
    if not shared.voters:
        details = [] if "--subset" in kinds else remarks[:2]
        raise DsireError("; ".join([f"nothing in common with the labelled models: {kinds}", *details]))
    if file.method != fitted.method:
        methods = f"it is a {file.method}, and each labelled model a {fitted.method}"
        first.append(f"another method: {methods}; compared by {' '.join(shared.kinds)}")
    if other_shape:
        first.append(f"another base: {kinds}")
    elif 2 * len(of_shape - other_rank) < len(fitted.shapes):
        share = f"{len(of_shape - other_rank)} of the {len(fitted.shapes)} labelled layers"
        first.append(f"{share} are in the file with the same shape and rank: {kinds}")
    values = of_rank(shared.values, min(file.values.shape[-1], fitted.values.shape[-1]))
    return replace(shared, values=values, notes=file.notes + remarks, first=first)


def what_they_are(file: Spectra, fitted: Spectra) -> str:
    """The kind of a file's model and of the labelled ones, and what to do about it."""
    other = kinds_of_sd(file.shapes) - kinds_of_sd(fitted.shapes)
    advice = "label models of its own kind (README, Your own LoRA)"
    if fits := " ".join(SUBSETS_THAT_FIT[kind] for kind in sorted(other & SUBSETS_THAT_FIT.keys())):
        advice = f"use --subset with one of: {fits}"
    elif "BA" in {*fitted.kinds} - {*file.kinds}:
        advice = f"of a {file.method} the change of its weights is known if --base gives the model it began as"
    return f"it has {kind_of_model(file.shapes)}, they have {kind_of_model(fitted.shapes)}: {advice}"


def kinds_of_sd(shapes: dict[str, list[int]]) -> set[tuple[int, int]]:
    """The width of the text that cross-attention looks at, and the rank, of the layers that do."""
    return {(shape[1], shape[-1]) for layer, shape in shapes.items() if layer.endswith("attn2_to_k")}


def kind_of_model(shapes: dict[str, list[int]]) -> str:
    """What a set of layers looks like, for messages: layers, ranks, and the width of the cross-attention."""
    ranks = " ".join(map(str, sorted({shape[2] for shape in shapes.values() if len(shape) > 2})))
    widths = sorted({width for width, _ in kinds_of_sd(shapes)})
    names = ", ".join(f"{width}{SD_OF_WIDTH.get(width, '')}" for width in widths)
    of_rank, of_width = f" of rank {ranks}" if ranks else "", f", cross-attention width {names}" if names else ""
    return f"{counted(len(shapes), 'layer')}{of_rank}{of_width}"


# ---------------------------------------------------------------------------------------------------------------------
# Everything compared, on the splits of the protocol


class Table(NamedTuple):
    """A table as it is printed, and written to report.json: a row is a name and cells, and heads[0] is of the names.

    A cell is a text, a whole number, a number, a mean with its standard deviation, or None for nothing.
    """

    title: str
    heads: list[str]
    rows: list[list[Any]]

    def lines(self) -> list[str]:
        """An empty line, the title, and columns as wide as what stands in them."""
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


Paper = dict[str, tuple[tuple[float, float], ...]]  # row -> mean and standard deviation of each of the Metrics


def metrics_table(
    title: str, rows: dict[str, list[Metrics]], paper: Paper, differences: bool, of: str = "predictor"
) -> Table:
    """Mean and standard deviation over experiments, and the paper's where it has the row.

    Args:
        rows: name -> the metrics of each experiment.
        differences: whether to show how far the MAE is above dsire's on the same splits, with the standard error.
        of: what the rows are.
    """
    quoted, table = any(name in paper for name in rows), []
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
    return {str(n): evaluate(spectra, predictor, protocol._replace(train_size=n)) for n in counts}


def how_sure(spectra: Spectra, run: Split, predictor: Predictor) -> Tensor:
    """What is said of a run's test models, and how sure: float64 [test, 5].

    The columns: by how many images the answer errs; whether it is right, in %; whether the 90 % set holds the true
    size, in %; how many sizes it has; and whether the model is said not to be comparable, in %. NaN where less than two
    micro-datasets are labelled.
    """
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
    """What is said of a run's test models if no model of their size is labelled: float64 [test, 4].

    The columns: by how many images dsire, log-ridge and log-regression err, of which only the last can name such a
    size; and whether the model is said not to be comparable, in %. NaN where models of one size are all that is left.
    """
    (train, test), sizes = run, spectra.sizes
    found = torch.full((len(test), 4), math.nan, dtype=torch.float64)
    if len(sizes[train].unique()) > 1:
        gaps = [Split(train[sizes[train] != size], test[sizes[test] == size]) for size in sizes[test].unique()]
        for gap, voted, fit in zip(gaps, dsire(spectra, gaps), log_ridge(spectra, gaps), strict=True):
            errors = [(its.sizes - sizes[gap.test]).abs() for its in (voted, fit, unrounded(fit))]
            flagged = check_recipe(spectra.of_models(gap.train), spectra.of_models(gap.test))[0] <= NOT_COMPARABLE
            found[torch.isin(test, gap.test)] = torch.stack([*errors, 100 * flagged], dim=1).double()
    return found


def by_recipe(spectra: Spectra, run: Split) -> Tensor:
    """`how_sure` log-ridge is of a run's test models, by which recipes are labelled: float64 [test, 4, 5].

    These are all recipes; all but the model's own; its own alone; one other (the mean over the others).
    """
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
    """Every predictor and kind of matrix (Tables 2, 5 and 9), on the same splits; by training size, size and recipe.

    Returns:
        The tables; and of each row of the first one the predictions on the protocol's splits.
    """
    runs = splits(spectra.micro_datasets, protocol)

    def answer(run: Split, predictor: Predictor, matrices: Iterable[str] = MATRICES) -> Prediction:
        return predictor(spectra.of_matrices(matrices), [run])[0]

    asks: dict[str, Callable[[Split], Any]] = {n: partial(answer, predictor=its) for n, its in PREDICTORS.items()}
    if len(spectra.kinds) > 1:
        asks |= {f"dsire {kind}": partial(answer, predictor=dsire, matrices=[kind]) for kind in spectra.kinds}
    predictors = [*asks]
    asks |= {f"{its.__name__}'s sets": partial(how_sure, spectra, predictor=its) for its in (dsire, log_ridge)}
    asks["unlabelled"] = partial(if_unlabelled, spectra)
    if spectra.of_recipe.any():
        asks["recipes"] = partial(by_recipe, spectra)
    jobs = [partial(ask, run) for ask in asks.values() for run in runs]
    jobs.append(partial(by_train_size, spectra, dsire, protocol))
    *results, growth = in_parallel(lambda job: job(), jobs, at_once=1, name="predictors")
    found = {name: results[row * len(runs) : (row + 1) * len(runs)] for row, name in enumerate(asks)}
    predictions = {name: found.pop(name) for name in predictors}
    note = "± the standard deviation over experiments; of differences, the standard error"
    rows = {name: judge(spectra, runs, its) for name, its in predictions.items()}
    return [
        metrics_table(note, rows, paper, differences=True),
        metrics_table("dsire by training micro-datasets", growth, {}, False, "to train"),
        *tables_of_models(spectra, torch.cat([run.test for run in runs]), {n: torch.cat(x) for n, x in found.items()}),
    ], predictions


def tables_of_models(spectra: Spectra, asked: Tensor, found: dict[str, Tensor]) -> list[Table]:
    """What `compare` found of all test models, int64 [models], as tables by size and by recipe."""
    sizes, true, recipes = spectra.sizes.unique(), spectra.sizes[asked], sorted({*spectra.recipes})
    rows = {str(size): true == size for size in sizes.tolist()} | {"all": true > 0}
    sure, check = ["images", "MAE", "accuracy %", "90 % set holds %", "sizes in it"], "not comparable %"
    heads = ["images", "dsire's MAE", "log-ridge's MAE", "log-regression's MAE", check]
    inner = {"between two others": torch.isin(true, sizes[1:-1])}
    tables = [
        means_table("dsire by dataset size", sure, rows, found["dsire's sets"][:, :4]),
        means_table("log-ridge by dataset size", [*sure, check], rows, found["log_ridge's sets"]),
        means_table("models of a size that is not labelled", heads, rows | inner, found["unlabelled"]),
    ]
    rows = {name: spectra.of_recipe[asked] == number for number, name in enumerate(recipes)} | {"mean": true > 0}
    heads = ["recipe", "all recipes", "all others", "its own", "one other"]
    for column, what in ((0, "MAE"), (2, "in the 90 % set %"), (4, check)) if "recipes" in found else ():
        title = f"log-ridge by labelled recipes: {what}"
        tables.append(means_table(title, heads, rows, found["recipes"][..., column]))
    return tables


# ---------------------------------------------------------------------------------------------------------------------
# The names of matrices, whoever wrote them

# What stands after a layer's path. LoRA-WiSE and old diffusers: .lora.down.weight, .processor.to_q_lora.down.weight;
# kohya and LyCORIS: .lora_down.weight, .hada_w1_a; PEFT: .lora_A.weight, .lora_A.<adapter>.weight; loralib: .lora_A; a
# full model: .weight. Left out are experts, as PEFT stacks several in one pair; and embeddings of full models.
PART = re.compile(
    r"(?s:(?P<layer>.{1,1000}?))(?:(?<!\bexperts)(?<!\bbase_layer)"
    r"(?:[._]lora(?:_linear_layer)?[._](?P<word>down|up|mid)|\.lora_(?:embedding_)?(?P<letter>[AB])"
    r"|\.(?P<magnitude>dora_scale|lora_magnitude_vector)"
    r"|\.(?P<other>alpha|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)))"
    r"(?:\.(?!weight|bias)[^.]{1,1000})?(?:\.weight)?"
    r"|(?<!embedding)(?<!embeddings)(?<!wte)(?<!wpe)(?<!\bshared)(?<!embed_tokens)[._](?P<full>weight))"
)
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
    (r"^input_blocks_0_0$", "conv_in"), (r"^out_2$", "conv_out"), (r"^time_embed_", "time_embedding_linear_"),
    (r"^label_emb_0_", "add_embedding_linear_"), (r"_embedding_linear_0$", "_embedding_linear_1"),
]  # fmt: skip


@lru_cache(2**16)  # the models of a folder have the same names
def layer_name(path: str) -> str:
    """One name for a layer, whatever prefix and separators its writer gave it, in the words of diffusers.

    >>> layer_name("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0")
    'down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0'
    """
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
            word = {"down": "A", "up": "B"}.get(match["word"], match["word"])
            part = word or match["letter"] or match["other"] or match["full"] or "magnitude"
            parts = found.setdefault(layer_name(network + match["layer"]), {})
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


def lora_layers(keys: list[str]) -> tuple[Keys, list[str]]:
    """The layers of LoRA, or of what is like it, and all keys that are of none; NoLora if no key is LoRA's."""
    layers = {layer: parts for layer, parts in layers_of(keys).items() if method_of(parts)}
    used = {key for parts in layers.values() for key in parts.values()}
    others = [key for key in keys if key not in used]
    for key in others:
        if OF_LORA.search(layer_name(key[-1000:])):
            raise DsireError(f"{shown(key)} has no partner, or is not understood here: what A and B mean is not known")
    if not layers:
        some = f", but {', '.join(map(shown, sorted(others)[:3]))}" if others else ", and no tensors"
        raise NoLora(f"holds no LoRA{some}: a whole model, or what is merged into one, is judged with --base")
    return layers, others


# ---------------------------------------------------------------------------------------------------------------------
# Layers, of parquet (the layout of LoRA-WiSE) and of files; models as one

LABELS = ("label", "name", "recipe")  # the columns about a model


class Layer(NamedTuple):
    """What is found of a layer. A and B stand in the order of the file's keys, and BA is the last."""

    shape: list[int]  # [out, in, rank], or [out, in] where there is no A and B
    spectra: dict[str, Tensor]  # matrix -> [r], or [models, r] of a shard
    method: str = "LoRA"  # with what else makes spectra unlike: LoHa's rank, the type that a full model is stored in
    remarks: Sequence[str] = ()


def as_spectra(layers: Mapping[str, Layer], **about: Any) -> Spectra:
    """The layers of a shard, or of a file; `about` is what else `Spectra` is told.

    A tie is broken in the order of the voters: A and B as they stand in the layers, then the changes BA.
    """
    voters = [Voter(layer, matrix) for layer, its in layers.items() for matrix in its.spectra]
    voters.sort(key=lambda voter: voter.matrix == "BA")
    rows = [layers[voter.layer].spectra[voter.matrix] for voter in voters]
    width = max(row.shape[-1] for row in rows)
    values = torch.stack([of_rank(row, width) for row in rows]).view(len(rows), -1, width)
    shapes = {layer: its.shape for layer, its in layers.items()}
    method = " and ".join(sorted({its.method for its in layers.values()}))
    return Spectra(values=values, voters=voters, shapes=shapes, method=method, **about)


def together(said: Iterable[tuple[str, str]], count: int, what: str) -> list[str]:
    """Of (layer or file, remark) those that are equal but for their numbers as one, with how many say so if not all."""
    alike: dict[str, dict[str, str]] = {}
    for name, remark in said:
        alike.setdefault(re.sub(r"\d+", "0", remark), {})[name] = remark
    notes = []
    for its in alike.values():
        of_all = len(its) == count and len({*its.values()}) == 1
        some = "" if of_all else f" ({len(its)} of {count} {what}, such as {shown(next(iter(its)))})"
        notes.append(next(iter(its.values())) + some)
    return notes


def matrix_values(table: Any, name: str, rank: int) -> Tensor:
    """The flat lists of one column as a batch [models, numbers of a matrix], float64."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lists = table.column(name).combine_chunks() if table.column(name).num_chunks != 1 else table.column(name).chunk(0)
    if not isinstance(lists, pa.lib.BaseListArray) or not pa.types.is_floating(lists.type.value_type):
        raise DsireError(f"column {shown(name)} holds {lists.type}, not lists of floating point numbers")
    values, bounds = lists.flatten(), pc.min_max(pc.list_value_length(lists)).as_py()
    nulls, length = lists.null_count + values.null_count, bounds["max"]
    if nulls or not length or bounds["min"] != length or length % rank:
        has = f"{nulls} nulls, and lists of {bounds['min']} to {length} numbers"
        raise DsireError(f"column {shown(name)} has {has}: --rank={rank} needs them alike, and a multiple of it")
    numbers: Tensor = torch.utils.dlpack.from_dlpack(values)
    return numbers.to(torch.float64).view(-1, length)


def dataset_size(label: Any) -> int:
    """The number of images that a label says, as a number of any kind or in digits; 0 if it says none from 1 up."""
    number = re.fullmatch(r"\s*([0-9]{1,15})(\.0*)?\s*", str(label))
    return int(number[1]) if number else 0


def model_labels(table: Any) -> tuple[Tensor, list[Any], list[str]]:
    """The columns `label` (size n), `name` (micro-dataset) and, where there is one, `recipe` of a shard."""
    with asking("there must be one column `label` and one `name`, and there may be one `recipe`"):
        columns = [column for column in LABELS if column != "recipe" or column in table.column_names]
        found = {"recipe": [], **{column: table.column(column).to_pylist() for column in columns}}
    with suppress(AttributeError, KeyError, TypeError, ValueError, RecursionError):  # no metadata of `datasets`
        kinds = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        for column in [column for column in columns if "names" in kinds.get(column, ())]:
            raise DsireError(f"column {column} holds numbers of classes: write what they stand for in their place")
    wrong = {
        "label, a whole number from 1 up,": [label for label in found["label"] if not dataset_size(label)],
        "name, an integer or text,": [name for name in found["name"] if type(name) not in (int, str)],
        "recipe": [recipe for recipe in found["recipe"] if recipe is None],
    }
    for column, values in wrong.items():
        if values:
            raise DsireError(f"column {column} holds {shown(repr(values[0]))}")
    sizes = torch.tensor([dataset_size(label) for label in found["label"]])
    return sizes, found["name"], [str(recipe) for recipe in found["recipe"]]


def shard_spectra(path: Path, rank: int, device: str = "cpu") -> Spectra:
    """The spectra of all models in one parquet shard, one layer at a time.

    The columns of a layer are ready batches of equal shapes, so that whole rows are never held.

    Raises:
        DsireError: the file can't be read, or a column doesn't fit; the message names the column.
    """
    import pyarrow.parquet as pq

    with reading(path, "parquet"), pq.ParquetFile(path, page_checksum_verification=True) as file:
        metadata, columns = file.metadata, file.schema_arrow.names
        labels = file.read([name for name in LABELS if name in columns])
    if not metadata.num_rows:
        raise DsireError("no rows")
    sizes, names, recipes = model_labels(labels)
    models = [f"model {shown(name)} of size {size}" for name, size in zip(names, sizes.tolist(), strict=True)]
    layers, others = lora_layers(columns)

    def layer_of(parts: dict[str, str]) -> Layer:
        with reading(path, "parquet"), pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True) as own:
            table = own.read([*parts.values()], use_threads=False)  # a file for each thread
        return pair_spectra(table, parts, rank, device, models)

    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    largest = 8 * max(sum(its.column(i).num_values for its in groups) for i in range(metadata.num_columns))
    at_once = max(1, BYTES_AT_ONCE // (2 * largest))
    found = dict(zip(layers, in_parallel(layer_of, list(layers.values()), at_once), strict=True))
    unused = sorted(set(others) - {*LABELS})
    notes = [f"columns that are not LoRA weights, left out: {' '.join(map(shown, unused))}"] if unused else []
    return as_spectra(found, sizes=sizes, names=names, notes=notes, recipes=recipes)


def pair_spectra(table: Any, parts: dict[str, str], rank: int, device: str, models: list[str]) -> Layer:
    """One layer of all models, which messages call `models`, of a table of its two columns."""
    columns = f"columns {' and '.join(map(shown, parts.values()))}"
    if {*parts} != {"A", "B"}:
        raise DsireError(f"{columns}: of parquet A and B alone are read")
    flat = {part: matrix_values(table, name, rank) for part, name in parts.items()}
    a, b = flat["A"].view(len(table), rank, -1), flat["B"].view(len(table), -1, rank)
    with asking(f"the spectra of {columns} can't be computed on {device}"):
        try:
            spectra = batch_spectra(a, b, device)
        except FloatingPointError:
            spectra = torch.tensor(math.nan)
    if not spectra.isfinite().all():
        for part, name in parts.items():
            for model in (~flat[part].isfinite()).any(1).nonzero().flatten().tolist():
                raise DsireError(f"column {shown(name)} holds a number that is NaN or infinite, of {models[model]}")
        raise DsireError(f"{columns} hold numbers too large to multiply")
    its = dict(zip(MATRICES, spectra, strict=True))
    return Layer([b.shape[1], a.shape[2], rank], {part: its[part] for part in (*parts, "BA")})


def join(parts: list[Spectra], names: list[str]) -> Spectra:
    """The models of shards, or of labelled files, as one; `names` is what those are called.

    Layers that not all have with the same shape are left out; the voters' order is the first part's.

    Raises:
        DsireError: no layer is left, the methods differ, or not all have recipes.
    """
    first, every = parts[0], [*zip(parts, names, strict=True)]
    methods = {part.method: f"{part.method} ({shown(name)})" for part, name in reversed(every)}
    if len(methods) > 1:
        raise DsireError(f"models of several methods can't be compared: {', '.join(methods.values())}")
    notes = together(((name, note) for part, name in every for note in (*part.first, *part.notes)), len(parts), "files")
    shared = set.intersection(*({(voter, *part.shapes[voter.layer]) for voter in part.voters} for part in parts))
    voters = [voter for voter in first.voters if (voter, *first.shapes[voter.layer]) in shared]
    kept = {voter.layer: first.shapes[voter.layer] for voter in voters}
    if lost := sorted({layer for part in parts for layer in part.shapes} - kept.keys()):
        shapes = {str(part.shapes.get(lost[0], "absent")): f"in {shown(name)}" for part, name in reversed(every)}
        such = ", ".join(f"{shape} {where}" for shape, where in [*shapes.items()][-2:])
        what = f"{counted(len(lost), 'layer')} left out, as not the same in all {len(parts)} files"
        notes.append(f"{what}, such as {shown(lost[0])}, [out, in, rank] {such}")
    if not voters:
        raise DsireError("; ".join(["no layer is in all files with the same shape", *notes]))
    micro_datasets = [name for part in parts for name in part.names]
    if len({type(name) for name in micro_datasets}) > 1:  # integers in one shard, strings in another
        micro_datasets = [str(name) for name in micro_datasets]
    recipes = [recipe for part in parts for recipe in part.recipes]
    if len(recipes) not in (0, len(micro_datasets)):
        raise DsireError(f"some files have a recipe, and others none: {shown(', '.join(names))}")
    width = max(part.values.shape[-1] for part in parts)
    values = torch.cat([of_rank(part.of_voters(voters).values, width) for part in parts], dim=1)
    sizes = torch.cat([part.sizes for part in parts])
    return Spectra(values, sizes, micro_datasets, voters, kept, notes, recipes, first.method)


def what_is_unusual(spectra: Spectra) -> list[str]:
    """Sentences about what a user might not expect in the models: sizes that lack, models that are there twice."""
    models = [*zip(spectra.names, spectra.sizes.tolist(), spectra.of_recipe.tolist(), strict=True)]
    twice, pairs = len(models) - len(set(models)), {(name, size) for name, size, _ in models}
    notes = [f"{twice} models have the micro-dataset and size of another one; all are kept"] if twice else []
    there, of_all = Counter(name for name, _ in pairs), len(spectra.sizes.unique())
    if lacking := [str(name) for name in there if there[name] < of_all]:
        some = shown(", ".join(sorted(lacking)))
        notes.append(f"{counted(len(lacking), 'micro-dataset')} without a model of each size: {some}")
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Opening files: what people hold on disk

SAFE_ENDINGS = (".safetensors",)
PICKLE_ENDINGS = (".bin", ".pt", ".ckpt", ".pth")
WEIGHT_ENDINGS = SAFE_ENDINGS + PICKLE_ENDINGS
# Pickles that trainers leave beside a LoRA: many hold more than tensors, so that they can't even be looked into.
TRAINERS = re.compile("optimizer|scheduler|scaler|sampler|dataloader|rng_state|random_state|training_args|.*_states[.]")
LONGEST_TEXT = 2**22  # of JSON that is looked into
LARGEST_PICKLE = 2**24  # in bytes, without its tensors


def reading(path: Path, kind: str) -> AbstractContextManager[None]:
    """Whatever a library raises about a file in one line, with its first bytes: they say what it is.

    Not those of what a link leads to, which may be another user's.
    """
    with path.open("rb") as file:
        start = "" if path.is_symlink() else f", begins with {file.read(50)!r}"
    return asking(f"can't be read as {kind}{start}")


@dataclass(frozen=True)
class Weights:
    """An open weights file, or several that a model was saved as: the tensors' keys, in order, and what reads one.

    Of a pickle, what stands beside its tensors is the header. `called` is what a message calls it, if not the file.
    """

    files: list[Path]
    keys: list[str]
    tensor: Callable[[str], Tensor]
    header: dict[str, str]
    called: str = ""

    @cached_property
    def layers(self) -> dict[str, str]:
        """Layer -> key of its weights, of a full model."""
        return {layer: parts["weight"] for layer, parts in layers_of(self.keys).items() if "weight" in parts}

    @property
    def identity(self) -> str:
        """What changes with the files, for the keys of the cache."""
        facts = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def is_one_of_its_files(self, path: Path) -> bool:
        """Whether a file is one of these, by whatever name or link."""
        return os.path.realpath(path) in map(os.path.realpath, self.files)

    def matrix(self, key: str, least_dimensions: int = 2) -> Tensor:
        """A tensor of finite floating point numbers as float64; of any real ones where it may have no dimension."""
        tensor, name = self.tensor(key), f"{self.called}{shown(key)}"
        plain = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
        number = least_dimensions == 0 and not tensor.is_complex() and tensor.dtype != torch.bool
        real = plain and (tensor.is_floating_point() or number) and tensor.ndim >= least_dimensions
        if not real or not 0 < tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes():
            kind = f"{tensor.dtype} of shape {list(tensor.shape) if plain else 'unknown'}"
            raise DsireError(f"{name} is {kind}, not a plain matrix of floating point numbers")
        with asking(f"{name} is {tensor.dtype}, which torch can't convert"):
            matrix = tensor.to(torch.float64)
        if not matrix.isfinite().all():
            raise DsireError(f"{name} holds a number that is NaN or infinite")
        return matrix


def open_weights(path: Path) -> Weights:
    """Open a .safetensors file, or a pickle without running it; tensors are read one by one."""
    if not path.is_file():
        raise DsireError("no such file")
    if path.suffix.lower() in PICKLE_ENDINGS:
        with asking("what it holds can't be read"):
            return weights_in(unpickled(path), path)
    from safetensors import safe_open

    with reading(path, "safetensors"):
        file = safe_open(path, "pt")  # mapped for as long as the function below is there
        keys, header = list(file.keys()), file.metadata() or {}

    def tensor(key: str) -> Tensor:
        with asking(f"{shown(key)} can't be read"):
            found: Tensor = file.get_tensor(key)
        return found

    return Weights([path], keys, tensor, header)


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
            # What it would call, as protocols 0 to 3 name it, or 4 and 5
            call = rb"c([\w.]{2,})\n([\w.]{2,})\n|\x8c.([\w.]+)\x94?\x8c.([\w.]+)\x94?\x93"
            names = {".".join(part.decode() for part in its if part) for its in re.findall(call, start, re.DOTALL)}
            of_torch = {name for name in names if name.startswith(("torch.", "collections."))}
            some = ", ".join([*sorted(names - of_torch), *sorted(of_torch)]) or "nothing"
            raise ValueError(f"it was not run; it names {some}") from None


def weights_in(content: Any, path: Path) -> Weights:
    """The weights of a pickle: keys of dictionaries within each other are joined with dots, alpha may be a number."""
    if not isinstance(content, dict):
        raise DsireError(f"holds a {type(content).__name__}, not a dictionary of tensors: nothing names the layers")
    tensors, header, seen, found = {}, {}, {id(content)}, [("", content)]
    for prefix, dictionary in found:  # more are added as they come
        for own, value in dictionary.items():
            key, match = f"{prefix}{own}", PART.fullmatch(f"{prefix}{own}")
            if isinstance(value, dict):
                found += [(f"{key}.", value)] if id(value) not in seen else []
                seen.add(id(value))
            elif isinstance(value, Tensor):
                tensors[key] = value.detach()
            elif match and match["other"] == "alpha" and type(value) in (int, float) and abs(value) < 2**53:
                tensors[key] = torch.tensor(value, dtype=torch.float64)
            elif match and not match["full"]:
                raise DsireError(f"{shown(key)} is {type(value).__name__}, neither a tensor nor alpha's number")
            elif not prefix and isinstance(value, (str, int, float)):
                header[key] = str(value)
    return Weights([path], list(tensors), tensors.__getitem__, header)


def parts_of(path: Path) -> list[Path]:
    """The files that a model was saved as: this one, or all of name-00001-of-00003.safetensors and so on."""
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)", path.name)
    if not match or not 1 <= int(match[2]) <= int(match[3]):
        return [path]
    return [path.with_name(f"{match[1]}-{n:05d}-of-{match[3]}{match[4]}") for n in range(1, int(match[3]) + 1)]


def open_model(path: Path) -> Weights:
    """Open the weights of a model, all the files that it was saved as."""
    return joined(dict.fromkeys(parts_of(path), ""))


def open_base(path: Path) -> Weights:
    """Open the model that fine-tunes began as: a file, or all of a folder, such as diffusers' unet/, text_encoder/."""
    files = [path]
    if path.is_dir():
        pickles = [file for file in visible_files(path, PICKLE_ENDINGS) if not TRAINERS.match(file.name)]
        files = visible_files(path, SAFE_ENDINGS) or pickles
    every = sorted({part for file in files for part in parts_of(file)})
    base = joined({file: network_of(f"{file.parent.name}.x") if path.is_dir() else "" for file in every}, "the base: ")
    if not base.layers:
        raise DsireError(f"holds no weight matrices of a model ({' '.join(WEIGHT_ENDINGS)})")
    return base


def joined(files: dict[Path, str], called: str = "") -> Weights:
    """Files, each with what its keys leave out at their beginning, as one."""
    place: dict[str, tuple[Weights, str]] = {}
    header: dict[str, str] = {}
    for file, network in files.items():
        try:
            weights = open_weights(file)
        except DsireError as error:
            raise DsireError(f"{file.name}: {error}" if len(files) > 1 else str(error)) from error
        header |= weights.header
        for key in weights.keys:
            if network + key in place:
                other = place[network + key][0].files[0].name
                raise DsireError(f"{shown(key)} is in two files, {file.name} and {other}: name one of them")
            place[network + key] = weights, key
    return Weights([*files], [*place], lambda key: place[key][0].tensor(place[key][1]), header, called)


# ---------------------------------------------------------------------------------------------------------------------
# Settings: what the product of A and B is multiplied by, and whether it is the change of the weights at all

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
    """What the first source that states alpha says of a network, PEFT's name -> value; {} if none does.

    A header goes before the JSON in it (diffusers), and that before the JSON beside the file (PEFT). Whatever a source
    says must be understood.
    """
    header = weights.header
    plain = {key: parsed(header[key]) for key in sorted(header) if key.rpartition(".")[2] in PEFT_NAMES}
    sources = {"its header": {key: value for key, value in plain.items() if value is not None}}
    texts: dict[str, Any] = {key: header[key] for key in header if key == "lora_adapter_metadata"}
    beside = weights.files[0].with_name("adapter_config.json")
    if beside.is_file():
        texts[beside.name] = beside.read_bytes()
    for place, text in texts.items():
        with asking(f"{place} is not a JSON object"):
            sources[place] = {**json.loads(text[:LONGEST_TEXT])}
    found: dict[str, Any] = {}
    for place, said in sources.items():
        own: dict[str, Any] = {}
        for key, value in said.items():
            prefix, _, name = key.rpartition(".")  # diffusers puts the network's name before the setting's
            name = PEFT_NAMES.get(name, name)
            if value and not UNDERSTOOD.fullmatch(f"{name}={value}"):
                raise DsireError(f"{place} says {shown(f'{key}={value}')}, which is not understood here: not judged")
            if (not prefix or network_of(f"{prefix}.x") == network) and own.setdefault(name, value) != value:
                raise DsireError(f"{place} says that {name} is {shown(own[name])}, and {shown(value)}")
        if own and place in texts:
            own.setdefault("lora_alpha", 8)  # PEFT's default
        found = found or (own if "lora_alpha" in own else {})
    return found


def scale_of(weights: Weights, parts: dict[str, str], said: dict[str, Any], rank: int | None) -> float | None:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) for rslora; None if nothing states alpha.

    LoKr's matrices have no rank if they are whole: LyCORIS ignores alpha then, PEFT does not.
    """
    if "alpha" in parts:
        alpha = weights.matrix(parts["alpha"], least_dimensions=0)
        if alpha.numel() != 1:
            raise DsireError(f"{shown(parts['alpha'])} is not one number")
        return float(alpha.reshape(())) / rank if rank else 1.0
    if not said:
        return None
    alpha, r = said["lora_alpha"], said.get("r")
    its: Any = rank or ("unknown" if said.get("rank_pattern") else r)
    right = type(alpha) in (int, float) and abs(alpha) < 2**53 and type(its) is int and its > 0
    if not right or (r not in (None, its) and not said.get("rank_pattern")):
        facts = f"lora_alpha is {shown(repr(alpha))} and r is {shown(repr(r))}"
        raise DsireError(f"its settings say that {facts}, but {shown(next(iter(parts.values())))} has rank {rank}")
    return float(alpha / (its**0.5 if said.get("use_rslora") else its))


# ---------------------------------------------------------------------------------------------------------------------
# From a layer's parts to its spectra

FOREIGN = 0.7  # of the norm of the base's weights: what has changed by more was never fine-tuned from them
IS_ZERO = "the change of the weights is zero"
IS_FOREIGN = f"the change of the weights is over {FOREIGN:.0%} of the base's"


def factors(tensors: dict[str, Tensor], row: tuple[str, str, str, str], turned: bool) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in k k] of a row of PRODUCTS, its core [r, r, k, k] made part of A; W and I of a whole W.

    Beside a core (Tucker), B of LoHa and LoKr is `turned`, [r, out].
    """
    of_b, of_a, of_core, whole = row
    if whole in tensors:
        matrix = tensors[whole].flatten(1)
        return matrix, torch.eye(matrix.shape[1], dtype=torch.float64)
    b, a = tensors[of_b], tensors[of_a]
    if of_core in tensors:
        core = tensors[of_core].flatten(2)
        if core.shape[1] != len(a):  # einsum would repeat a single row
            raise ValueError(f"a core of rank {core.shape[1]}, A of rank {len(a)}")
        a, b = torch.einsum("ijk,jm->imk", core, a.reshape(a.shape[:2])), b.mT if turned else b
    a, b = a.flatten(1), b.flatten(1)
    if len(a) != b.shape[1]:
        raise ValueError(f"A of rank {len(a)}, B of rank {b.shape[1]}")
    return b, a


def dora_change(b: Tensor, a: Tensor, scale: float, old: Tensor, magnitude: Tensor, by_input: bool) -> Tensor:
    """DoRA's change of the weights W₀, m (W₀ + s B A) / |W₀ + s B A| - W₀ (Liu et al. 2024): [out, in k k].

    The magnitude m has a number for each output, or for each input.
    """
    merged = old + scale * b @ a
    grouped = merged.reshape(len(old), len(magnitude) if by_input else 1, -1)
    m = magnitude.reshape((1, -1, 1) if by_input else (len(old), 1, 1))
    norms = torch.linalg.vector_norm(grouped, dim=(0, 2) if by_input else 2, keepdim=True)
    norms = norms.masked_fill(norms == 0, 1)
    change: Tensor = (grouped * (m / norms)).reshape(old.shape) - old
    return change


def adapter_layer(
    weights: Weights, parts: dict[str, str], said: dict[str, Any], base: Weights | None, of_base: str, count: int
) -> Layer:
    """The spectra of a layer of LoRA, DoRA, LoHa or LoKr; `said` is of its network, `of_base` its key in the base."""
    method, keys = method_of(parts), ", ".join(map(shown, parts.values()))
    of_lora, rows = "A" in parts, PRODUCTS[method]
    tensors = {its: weights.matrix(key, 1 if its == "magnitude" else 2) for its, key in parts.items() if its != "alpha"}
    with asking(f"{keys} do not fit each other"):
        products = [factors(tensors, row, not of_lora) for row in (rows[:1] if of_lora else rows)]
        if method == "LoHa":  # (B1 A1) ∘ (B2 A2) is one product of rank r r
            (b1, a1), (b2, a2) = products
            products = [((b1[:, :, None] * b2[:, None]).flatten(1), (a1[:, None] * a2).flatten(0, 1))]
    rank = max((len(tensors[a]) for _, a, _, _ in rows if a in tensors), default=None)
    stated = scale_of(weights, parts, said, rank)
    scale = 1.0 if stated is None else stated
    b, a = products[0]
    shape, spectra = [len(b), a.shape[1]], {}
    if of_lora:
        of_a, of_b, change = lora_spectra(a, b)
        shape.append(len(a))
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
        by_input = "dora_scale" in parts["magnitude"] and len(magnitude) == 1 < magnitude.numel()  # of LyCORIS
        with asking(f"{keys} do not fit the base's weights"):
            merged = dora_change(b, a, scale, old, magnitude.flatten(), by_input)
        spectra["BA"] = matrix_spectrum(merged, count)
    remarks = {
        "alpha is not stated: BA is taken with scale 1": stated is None,
        "alpha is 0: BA counts as zero": scale == 0,
        IS_ZERO: not change.any(),
        "DoRA without its base: the magnitudes are set aside, only A and B are judged": "BA" not in spectra,
    }
    return Layer(shape, spectra, method, [remark for remark, true in remarks.items() if true])


def full_layer(weights: Weights, key: str, base: Weights, of_base: str, count: int, device: str) -> Layer:
    """The change W - W₀ of a layer of a full fine-tune; of_base is the base's key, if it has the layer."""
    stored = weights.tensor(key)
    if stored.ndim < 2 or not stored.is_floating_point():  # a norm, or numbers that are no weights
        return Layer([], {})
    new, old = weights.matrix(key).flatten(1), base.matrix(of_base).flatten(1) if of_base else torch.empty(0)
    if new.shape != old.shape:
        return Layer([], {}, remarks=["layers that are not in the base with the same shape are left out"])
    coarse = max(stored.dtype, base.tensor(of_base).dtype, key=lambda dtype: torch.finfo(dtype).eps)
    method, change = f"full fine-tune in {str(coarse).removeprefix('torch.')}", new - old
    if torch.equal(new.to(coarse), old.to(coarse)):
        nothing = {"BA": torch.zeros(min(count, *change.shape), dtype=torch.float64)}
        return Layer([*change.shape], nothing, method, [IS_ZERO])
    rounding = change[change.abs() <= torch.finfo(coarse).eps * new.abs()]  # by no more than the last digit
    of_change, of_rounding, of_old = (float(torch.linalg.vector_norm(its)) for its in (change, rounding, old))
    remarks = {
        "most of the change is no larger than the last digit that is stored": 2 * of_rounding**2 > of_change**2,
        IS_FOREIGN: of_change > FOREIGN * of_old,
    }
    del new, old, rounding  # a model's largest matrices take hundreds of megabytes each
    spectrum = matrix_spectrum(change.to(device), count).cpu()
    return Layer([*change.shape], {"BA": spectrum}, method, [remark for remark, true in remarks.items() if true])


# ---------------------------------------------------------------------------------------------------------------------
# One file: its spectra, what it says of itself; which files of a folder are models


def model_layers(weights: Weights, base: Weights | None) -> tuple[Keys, list[str]]:
    """`lora_layers`, or given a base those of a full model; NoLora if it is neither."""
    try:
        return lora_layers(weights.keys)
    except NoLora as error:
        if base is None:
            raise
        for network in (network_of(f"{weights.files[0].parent.name}.x"), ""):
            full = {layer: its for layer, its in layers_of(weights.keys, network).items() if "weight" in its}
            if full.keys() & base.layers.keys():
                return full, []
        raise NoLora(f"{error}; no layer in common with the base, such as {shown(min(base.layers))}") from None


def file_spectra(path: Path, base: Weights | None = None, count: int = LARGEST, device: str = "cpu") -> Spectra:
    """The spectra of one file: a single model, whose size is what the file itself states (0 if it doesn't).

    Args:
        base: the model that it was fine-tuned from, without which full models and DoRA's changes can't be judged.
        count: how many singular values of a change of the weights are kept.
    """
    weights = open_model(path)
    keys, others = model_layers(weights, base)
    full = any("weight" in parts for parts in keys.values())
    settings = {network: settings_of(weights, network) for network in ({} if full else {*map(network_of, keys)})}

    def layer_of(layer: str) -> Layer:
        parts, of_base = keys[layer], base.layers.get(layer, "") if base else ""
        with asking(f"the spectra of {' and '.join(map(shown, parts.values()))} can't be computed"):
            if base and full:
                found = full_layer(weights, parts["weight"], base, of_base, count, device)
            else:
                found = adapter_layer(weights, parts, settings[network_of(layer)], base, of_base, count)
            if not all(its.isfinite().all() for its in found.spectra.values()):
                raise FloatingPointError("numbers too large to multiply")
        return found

    at_once = 4 if base else 1  # whole matrices are worth a thread each, and take memory
    every = dict(zip(keys, in_parallel(layer_of, [*keys], at_once), strict=True))
    layers = {layer: its for layer, its in every.items() if its.spectra}
    remarks = [(layer, remark) for layer, its in every.items() for remark in its.remarks]
    notes = together(remarks, sum(bool(its.spectra or its.remarks) for its in every.values()), "layers")
    if not layers:
        raise DsireError("; ".join(["has no matrix of the base's shape", *notes]))
    if 2 * sum(remark == IS_FOREIGN for _, remark in remarks) > len(layers):
        raise DsireError(f"is no fine-tune of this base: {IS_FOREIGN} in most layers")
    if others:
        such = f"as not of LoRA's matrices, such as {shown(min(others))}"
        notes.append(f"{counted(len(others), 'tensor')} set aside, {such}")
    if base and not full and not any(its.method == "DoRA" for its in layers.values()):
        notes.append("--base is not used: the file holds the change of the weights itself")
    size, stated_in = stated_size(weights.header) or (0, "")
    notes += [f"states its own size: {size} images ({stated_in})"] if size else []
    if any(len(text) > LONGEST_TEXT for text in weights.header.values()):
        notes.append("its header is too long to look for the size that it states")
    changed = {layer: its for layer, its in layers.items() if IS_ZERO not in its.remarks}
    voting, first = (changed if changed and full else layers), ([] if changed else [UNTRAINED])
    return as_spectra(voting, sizes=torch.tensor([size]), names=[str(path)], notes=notes, first=first)


def stated_size(header: dict[str, str]) -> tuple[int, str] | None:
    """The number of training images that kohya's metadata state, without repeats, and the key that states it.

    A folder that is used in several resolutions counts once: it is in several of ss_datasets, and in ss_dataset_dirs it
    is called "cat", "cat (2)", "cat (3)". Regularisation images do not count.
    """
    sets, folders = (parsed(header.get(key, "")) for key in ("ss_datasets", "ss_dataset_dirs"))
    total, repeats = (dataset_size(header.get(key)) for key in ("ss_num_train_images", "ss_num_repeats"))
    sizes: dict[str, Any] = {}
    with suppress(AttributeError, KeyError, TypeError):  # it is not as kohya writes it
        most: Counter[Any] = Counter()  # how many folders there are of a name and a number of images
        for one in sets:
            parts = [part for part in one["subsets"] if not part.get("is_reg")]
            places = [part.get("image_dir") or part.get("metadata_file") for part in parts]
            most |= Counter(zip(places, (dataset_size(part["img_count"]) for part in parts), strict=True))
        sizes["ss_datasets"] = sum(count * times for (_, count), times in most.items())
    with suppress(AttributeError, KeyError, TypeError):
        first = {name: re.sub(r" \(\d+\)$", "", name) for name in folders}
        once = {(its if its in folders else name, folders[name]["img_count"]) for name, its in first.items()}
        sizes["ss_dataset_dirs"] = sum(dataset_size(count) for _, count in once)
    if not sets and repeats and not total % repeats:  # else it counts repeats, or each of several resolutions
        sizes["ss_num_train_images"] = total // repeats
    return next(((dataset_size(size), key) for key, size in sizes.items() if dataset_size(size)), None)


def visible_files(folder: Path, endings: Sequence[str]) -> list[Path]:
    """The files, and links, below a folder with one of these endings, sorted; never hidden ones (macOS' ._name)."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and not path.is_dir())
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def model_files(folder: Path, base: Weights | None = None) -> tuple[list[Path], dict[Path, str]]:
    """The models below a folder, sorted, of shards the first one; and why each other weights file is none.

    Given a base, models that were fine-tuned from it are found, too. What can't be read is a model: that is said later.
    """
    models, others = [], {}
    safe: set[Path] = set()  # folders with models in safetensors
    for path in visible_files(folder, SAFE_ENDINGS) + visible_files(folder, PICKLE_ENDINGS):
        pickled, why = path.suffix.lower() in PICKLE_ENDINGS, ""
        if path != next((part for part in parts_of(path) if part.is_file()), path):
            continue
        if base and base.is_one_of_its_files(path):
            why = "it is the base itself"
        elif pickled and (path.parent in safe or TRAINERS.match(path.name)):
            why = "a pickle beside safetensors" if path.parent in safe else "a trainer's state, by its name"
        else:
            try:
                model_layers(open_model(path), base)
            except DsireError as error:
                why = str(error) if isinstance(error, NoLora) else ""
        if why:
            others[path] = why
        else:
            models.append(path)
            safe |= set() if pickled else {path.parent}
    return sorted(models), others


# ---------------------------------------------------------------------------------------------------------------------
# Where the weights come from: a folder, the Hub, or a file of spectra

CARDS = ("README.md", ".huggingface.yaml")  # where a dataset says what its configs are
REPOSITORY = re.compile(r"(?:https://huggingface\.co/(?:datasets/)?)?(\w[\w.-]*/\w[\w.-]*)/?(?::(.+))?")
PATIENCE = 60  # seconds that the Hub may be silent


@dataclass(frozen=True)
class Shard:
    """A file of models: its path in the folder or repository, its bytes, and the Hub's SHA of it, or its times."""

    file: str
    size: int
    version: str


@dataclass(frozen=True)
class Source:
    """The files of a subset: a "dataset"'s parquet, labelled "files" (size, name, recipe), "spectra", or a "model"'s.

    `commit` is the Hub's commit hash, or "" for a folder; `notes` say what is left out.
    """

    dataset: str
    subset: str
    commit: str
    shards: list[Shard]
    notes: list[str]
    kind: str = "dataset"
    labels: dict[str, tuple[int, str, str]] = field(default_factory=dict)


Chosen = tuple[str, list[str], list[str]]  # a subset's name, its files, and notes


def find_source(
    dataset: str, subset: str | None, revision: str | None, cache: Path, base: Weights | None = None
) -> Source:
    """The files of a subset in a folder or on the Hub, or a file of spectra; labelled files began as `base`."""
    place = path_of(dataset)
    here = os.path.exists(place)
    if here and revision is not None:
        raise DsireError(f"--revision is of a dataset on the Hub, and {place} is here: leave it out")
    if os.path.isdir(place):
        return folder_source(place, subset, base)
    match = REPOSITORY.fullmatch(dataset)
    if match and not match[2] and not here:
        return hub_dataset(match[1], subset, revision, cache)
    return spectra_source(dataset, located(dataset, cache, "dataset", revision), subset)


def folder_source(folder: Path, subset: str | None, base: Weights | None) -> Source:
    """The parquet files of a subset in a folder; or, where a metadata.csv labels them, its files of models."""
    if labels := metadata_csv(folder):
        if subset is not None:
            raise DsireError(f"--subset={subset}: {folder} holds labelled files, which have no subsets; leave it out")
        others = {*visible_files(folder, (*WEIGHT_ENDINGS, ".parquet"))}
        others -= {part for file in labels for part in parts_of(folder / file)}
        such = min(others, default=folder).relative_to(folder)
        left_out = f"left out, as not in metadata.csv: {counted(len(others), 'file')}, such as {such}"
        shards = [shard_on_disk(folder, file, base) for file in sorted(labels, key=Path)]
        return Source(str(folder), folder.resolve().name, "", shards, [left_out] if others else [], "files", labels)
    shipped = sorted((folder / subset.replace("_", "/")).glob("*.parquet")) if subset and folder == SHIPPED else []
    names = [file.relative_to(folder).as_posix() for file in shipped or visible_files(folder, [".parquet"])]
    notes: list[str] = []
    if not names or (subset is None and visible_files(folder, WEIGHT_ENDINGS)):
        found = "parquet, and weights beside it: choose it with --subset, or" if names else "no parquet:"
        raise DsireError(f"--dataset={folder} holds {found} write metadata.csv with file_name, label, name")
    if not shipped:  # which needs neither `datasets` nor the time to import it
        cards = {name: folder / name for name in CARDS if (folder / name).is_file()}
        subset, names, notes = files_of_subset(f"dataset {folder}", cards, names, subset)
    return Source(str(folder), str(subset), "", [shard_on_disk(folder, name) for name in names], notes)


def shard_on_disk(folder: Path, name: str, base: Weights | None = None) -> Shard:
    """A file as a shard; its version is that of all files that decide its spectra."""
    file = folder / name
    beside = [part for part in (*parts_of(file), file.with_name("adapter_config.json")) if part.is_file()]
    facts = [part.stat() for part in dict.fromkeys([file, *beside])]
    version = "-".join(str(fact.st_mtime_ns) for fact in facts) + (f"-{base.identity}" if base else "")
    return Shard(name, sum(fact.st_size for fact in facts), version)


def files_of_subset(what: str, cards: dict[str, Path], names: list[str], subset: str | None) -> Chosen:
    """Which parquet files are a subset's, as `datasets` understands the README's header.

    It is shown a folder of empty files: what else lies in the dataset (a script, images), or how its path is spelt,
    makes no difference, and the Hub is asked by huggingface_hub alone. Aliases, which may nest, it would write out.
    """
    import yaml

    with tempfile.TemporaryDirectory() as place:
        view = Path(place).resolve() / "dataset"
        for name in (*names, *cards):
            (view / name).parent.mkdir(parents=True, exist_ok=True)
            (view / name).touch()
        said = f"{' and '.join(cards) or 'no README.md'} says which files are whose"
        with asking(f"{what} has no parquet to read", said):
            for name, card in cards.items():
                (view / name).write_bytes(card.read_bytes())
                text = card.read_text(encoding="utf-8", errors="replace")
                block = re.match(r"\s*---[\r\n]([\s\S]*?)[\r\n]---[\r\n]", f"{text}\n")
                header = block[1] if block else "" if name == "README.md" else text
                if any(isinstance(token, (yaml.AnchorToken, yaml.AliasToken)) for token in yaml.scan(header)):
                    raise DsireError(f"{name} of {what} has YAML aliases: write out what they stand for")
            return subset_in_view(what, view, {*names}, subset)


def subset_in_view(what: str, view: Path, names: set[str], subset: str | None) -> Chosen:
    import datasets

    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()

    def config(name: str) -> tuple[Any, dict[str, list[str]]]:
        """A config's features, and the files of its splits."""
        builder = datasets.load_dataset_builder(str(view), name, cache_dir=str(view.parent))
        splits = (builder.config.data_files or {}).items()
        files = {split: [Path(os.path.relpath(file, view)).as_posix() for file in its] for split, its in splits}
        return builder.info.features or {}, files

    configs = datasets.get_dataset_config_names(str(view))
    if subset is None and len(configs) > 1:
        raise DsireError(f"{what} has several subsets: choose one with --subset: {' '.join(configs)}")
    if subset is not None and subset not in configs:
        raise DsireError(f"--subset={subset} is not in {what}; it has: {' '.join(configs)}")
    subset = subset or str(configs[0])
    features, splits = config(subset)
    files = list(dict.fromkeys(name for its in splits.values() for name in its))
    if not files or not names.issuperset(files):
        raise DsireError(f"{what}: subset {subset} names no parquet, or some outside of it: {shown(files)}")
    if named := [column for column in ("label", "name", "recipe") if hasattr(features.get(column), "names")]:
        raise DsireError(f"{what}: column {named[0]} has numbers that README.md names: write the names in their place")
    notes = [f"the splits {' '.join(map(str, splits))} are taken together"] if len(splits) > 1 else []
    others = names.difference(files)
    for other in configs if others else []:
        with suppress(OSError, ValueError):  # it holds no parquet
            others.difference_update(*config(other)[1].values())
    if others:
        left_out = f"{counted(len(others), 'parquet file')} of {what} left out, as in no split of a subset"
        notes.append(f"{left_out}, such as {min(others)}: name them in the configs of README.md")
    return subset, files, notes


def metadata_csv(folder: Path) -> dict[str, tuple[int, str, str]]:
    """File -> (label, name, recipe or "") from the metadata.csv of a folder; empty without one.

    A file may be called as Windows has it (a\\b), with its accents composed in another way than on the disk, or by the
    folder of an adapter, whose only file of weights it is.
    """
    path = folder / "metadata.csv"
    labels: dict[str, tuple[int, str, str]] = {}
    if not path.is_file():
        return labels
    with asking(f"{path} can't be read"):
        text = path.read_text(encoding="utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)  # as spreadsheets write it
        reader = csv.reader(io.StringIO(text), delimiter=delimiter)
        columns, *rows = [[cell.strip() for cell in row] for row in reader] or [[]]
    if not {"file_name", "label", "name"} <= {*columns} or not any(map(any, rows)):
        raise DsireError(f"{path} needs rows of file_name, label, name; it begins with {shown(text.strip())!r}")
    there = {unicodedata.normalize("NFC", its.relative_to(folder).as_posix()): its for its in folder.rglob("*")}
    for row in filter(any, rows):
        cells = dict.fromkeys((*columns, "recipe"), "") | dict(zip(columns, row, strict=False))
        listed = Path(cells["file_name"].replace("\\", "/"))
        file = there.get(unicodedata.normalize("NFC", listed.as_posix()), folder / listed)
        weights = visible_files(file, SAFE_ENDINGS) or visible_files(file, PICKLE_ENDINGS)
        name = Path(os.path.relpath(weights[0] if len(weights) == 1 else file, folder)).as_posix()
        size = dataset_size(cells["label"])
        if not (size and cells["name"] and (folder / name).is_file()) or name in labels:
            needs = "a file that is there, and is listed once, a label that is a whole number from 1 up, and a name"
            raise DsireError(f"{path}: {shown(' '.join(row))!r} needs {needs}")
        labels[name] = (size, cells["name"], cells["recipe"])
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


def ask_hub(what: str, question: Callable[[Any], T]) -> T:
    """What a question, a function of HfApi, is answered; to try again is huggingface_hub's."""
    with asking(what, "check the network, HF_TOKEN and HF_ENDPOINT"):
        with redirect_stdout(io.StringIO()):  # what it raises it prints, too
            from huggingface_hub import HfApi
            from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        return in_background(question, HfApi()).result()


def in_background(function: Callable[[Any], T], argument: Any) -> Future[T]:
    """Call in a thread that the end of the script doesn't wait for: Ctrl-C ends a download at once."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function(argument))
        except BaseException as error:  # it belongs to the caller, who gets it with the result
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def hub_source(
    repository: str, kind: str, wanted: str | None, revision: str | None, cache: Path, choose: Any, here: str
) -> Source:
    """The files of a repository on the Hub that `choose(source, its listing)` names as what is wanted.

    They are kept in the cache, and looked for again only when the commit has changed. Whatever goes wrong in asking,
    what is kept is used, and that is said; where nothing is, `here` is said first.
    """
    saved = cache / "sources" / f"{fingerprint([repository, kind, wanted, revision])}.json"
    known = None
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # not there, or not as written
        kept = json.loads(saved.read_text())
        if kept["digest"] == fingerprint(kept["source"]):
            known = Source(**{**kept["source"], "shards": [Shard(**shard) for shard in kept["source"]["shards"]]})
    what = f"{kind} {repository}{f' at revision {revision}' if revision else ''}"
    options: dict[str, Any] = {"repo_type": kind, "revision": revision, "files_metadata": True, "timeout": PATIENCE}
    try:
        info = ask_hub(f"{here}{what} can't be read from the Hub", lambda api: api.repo_info(repository, **options))
        if known and known.commit == info.sha:
            return known
        listed = [(its.rfilename, its.size, its.lfs.sha256 if its.lfs else its.blob_id) for its in info.siblings or []]
        found = {shard[0]: Shard(*shard) for shard in listed}
        if outside := [name for name in found if "\\" in name or {"", ".."} & {*name.split("/")}]:
            raise DsireError(f"{what} lists {shown(outside[0])}, a path out of it: nothing of it is read")
        source = Source(info.id, "", info.sha, [], [], kind)
        subset, names, notes = choose(source, found)
    except DsireError as error:
        if not known:
            raise
        note = f"{error}; going on with commit {known.commit[:12]}, as found before"
        return replace(known, notes=[note, *known.notes])
    source = replace(source, subset=subset, shards=[found[name] for name in names], notes=notes)
    write_json(saved, {"source": asdict(source), "digest": fingerprint(asdict(source))})
    return source


def fingerprint(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def hub_dataset(repository: str, subset: str | None, revision: str | None, cache: Path) -> Source:
    """The parquet files of a subset of a dataset on the Hub."""

    def choose(source: Source, found: dict[str, Shard]) -> Chosen:
        cards = {name: fetch(source, found[name], cache) for name in CARDS if name in found}
        parquet = [name for name in found if name.endswith(".parquet") and not re.search(r"(^|/)\.", name)]
        return files_of_subset(f"dataset {repository}", cards, parquet, subset)

    here = f"no folder {repository} is here; "
    if repository == LORA_WISE:
        ships = [f"{file.parent.name}_{file.name}" for file in sorted(SHIPPED.glob("*/*"))]
        here = "" if subset in (None, *ships) else f"--subset={subset} does not ship, as {' '.join(ships)} do; "
    return hub_source(repository, "dataset", subset, revision, cache, choose, here)


def fetch(source: Source, shard: Shard, cache: Path) -> Path:
    """The shard on disk: where it is, or downloaded and checked; what was damaged is fetched once more."""
    if not source.commit:
        return Path(source.dataset) / shard.file
    what, place = f"{shard.file} of {source.dataset}", cache / "hub"
    for again in (False, True):
        options = {"repo_type": source.kind, "revision": source.commit, "cache_dir": place, "force_download": again}
        ask = partial(lambda its, api: api.hf_hub_download(source.dataset, shard.file, **its), options)
        path = Path(ask_hub(f"{what} can't be fetched into {place}", ask))
        from huggingface_hub.utils.sha import git_hash, sha_fileobj

        with path.open("rb") as file:
            digest = sha_fileobj(file).hex() if len(shard.version) == 64 else git_hash(file.read())
        if digest == shard.version:
            return path
    raise DsireError(f"{what} was damaged on its way, twice: try again later")


def located(item: str, cache: Path, kind: str = "model", revision: str | None = None) -> Path:
    """The file or folder on disk that the user means: a path, or a Hub repository or a file in it (user/name:file).

    Fetched are a repository's safetensors, or a file and other parts of its model, and the settings beside them.
    """
    if item and os.path.exists(path_of(item)):
        return path_of(item)
    match = REPOSITORY.fullmatch(item)
    if not match or match[1].endswith(WEIGHT_ENDINGS):
        raise DsireError(f"{shown(item) if item else 'an empty name'}: no such file or folder")
    repository, file = match.groups()

    def choose(source: Source, found: dict[str, Shard]) -> Chosen:
        parts = [part.as_posix() for part in (Path(file or ""), *parts_of(Path(file or "")))]
        names = [name for name in (parts if file else found) if name in found and (file or name.endswith(SAFE_ENDINGS))]
        if not names:
            raise DsireError(f"{repository} has no {file or 'safetensors; name a pickle as user/name:file.bin'}")
        beside = [Path(name).with_name("adapter_config.json").as_posix() for name in names]
        return "", [*dict.fromkeys(name for name in (*names, *beside) if name in found)], []

    source = hub_source(repository, kind, file, revision, cache, choose, f"{item}: no such file or folder here; ")
    first, *_ = [fetch(source, shard, cache) for shard in source.shards]
    return first if file else first.parents[source.shards[0].file.count("/")]


def files_to_predict(item: str, cache: Path, base: Weights | None = None) -> tuple[dict[str, Path], dict[str, str]]:
    """The models that the user means: name -> file; and of other files of weights, name -> why they are left out."""
    place = located(item, cache)
    match = None if os.path.exists(path_of(item)) else REPOSITORY.fullmatch(item)
    if place.is_file():
        return {f"{match[1]}:{match[2]}" if match else str(place): place}, {}
    models, others = model_files(place, base)
    at = [f"{match[1]}:{file.relative_to(place).as_posix()}" if match else str(file) for file in (*models, *others)]
    left_out = dict(zip(at[len(models) :], others.values(), strict=True))
    if not models:
        such = "; ".join(f"{name}: {why}" for name, why in [*left_out.items()][:3]) or " ".join(WEIGHT_ENDINGS)
        raise DsireError(f"{item} holds no model to judge ({such})")
    return dict(zip(at, models, strict=False)), left_out


def open_base_of(item: str, cache: Path) -> Weights:
    """The model that the user means by --base: a file, a folder or a Hub repository."""
    place = located(item, cache)
    try:
        return open_base(place)
    except DsireError as error:
        raise DsireError(f"--base={item}: {error}") from error


def rank_of(source: Source, rank: int | None) -> tuple[int, list[str]]:
    """The rank of the LoRAs in a subset: `rank`, or the one in a name like LoRA-WiSE's, 32 in medium_32_2; and notes.

    Any other number in a name (fold_2, seed_42) is no rank, though the columns' lengths may fit it.
    """
    if source.kind != "dataset":
        return rank or LARGEST, []  # LoRA says it itself, layer by layer; of a change of the weights it is a choice
    match = re.fullmatch(r"(?:low|medium|high|recipes|rank|r)_(\d+)(_\d+)?", source.subset)
    named = int(match[1]) if match else rank
    if not named:
        raise DsireError(f"subset {shown(source.subset)} doesn't have the rank in its name: give it with --rank")
    differs = f"--rank={rank} is taken, though the name of subset {source.subset} tells rank {named}"
    return rank or named, [differs] if rank and rank != named else []


# ---------------------------------------------------------------------------------------------------------------------
# Files of spectra: the cache's, and those that are shared in place of the models

FACTS = ("names", "recipes", "voters", "shapes", "method", "notes", "first")


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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON; what can't be told, a NaN, is null in it."""
    plain = json.loads(json.dumps(content), parse_constant=lambda _: None)
    write_whole(path, json.dumps(plain, indent=2) + "\n")


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
    """What `write_spectra` wrote: the spectra, and what else is told about them, with the digest.

    Raises:
        DsireError: it is something else, damaged, of another format, or says what can't be; it may be a stranger's.
    """
    from safetensors import safe_open

    with asking("can't be read as a file of spectra"):
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if "facts" not in header:
                raise DsireError("holds no spectra: give what --save_spectra wrote, or the folder of the models")
            about = json.loads(header["facts"])
            if about["format"] != FORMAT:
                raise DsireError(f"is of format {shown(about['format'])}, and {FORMAT} is read here: write it anew")
            values, sizes = file.get_tensor("spectra"), file.get_tensor("sizes")
        about["digest"] = digest_of(header["facts"], values, sizes)
        if about["digest"] != header["digest"]:
            raise DsireError("is damaged, by its digest: fetch it anew")
        facts = {name: about.pop(name) for name in FACTS}
        facts["voters"] = [Voter(*voter) for voter in facts["voters"]]
        spectra = Spectra(values.double(), sizes, **facts)
        if lie := next((what for holds, what in truths(spectra, values) if not holds), ""):
            raise DsireError(f"can't be right: {lie}")
    return spectra, about


def truths(spectra: Spectra, values: Tensor) -> Iterator[tuple[Any, str]]:
    """What holds of any spectra, each with what is wrong otherwise; asked for only if those before it hold."""
    count, voters, shapes = len(spectra.names), spectra.voters, spectra.shapes
    yield values.dtype in (torch.float32, torch.float64) and spectra.sizes.dtype == torch.int64, "types of numbers"
    yield values.dim() == 3 and values.numel() and values.shape[:2] == (len(voters), count), "numbers of voters, models"
    yield spectra.sizes.shape == (count,) and len(spectra.recipes) in (0, count), "numbers of sizes or recipes"
    yield values.isfinite().all() and (values.diff(dim=-1) <= 0).all(), "singular values that rise or are not finite"
    yield (values >= 0).all() and (spectra.sizes >= 0).all(), "a singular value or size below zero"
    texts = [*spectra.recipes, *spectra.notes, *spectra.first, spectra.method, *(voter.layer for voter in voters)]
    yield {*map(type, texts)} == {str} and {*map(type, spectra.names)} in ({str}, {int}), "names that are no text"
    lengths = {"A": (3,), "B": (3,), "BA": (2, 3)}
    fit = [len(shapes.get(voter.layer, "")) in lengths.get(voter.matrix, ()) for voter in voters]
    yield all(fit) and len({*voters}) == len(voters), "voters that do not fit the layers' shapes"
    yield all(type(number) is int and number > 0 for shape in shapes.values() for number in shape), "a layer's shape"


def spectra_source(item: str, path: Path, subset: str | None) -> Source:
    """A file of spectra as a subset: what it says that it is of."""
    if path.suffix.lower() not in SAFE_ENDINGS:
        raise DsireError(f"--dataset={item} is a file: give the folder that holds it")
    try:
        spectra, about = read_spectra(path)
        told = [str(about.get(fact, "")) for fact in ("dataset", "subset", "commit")]
        texts = "".join(map(str, [*told, *spectra.names, *spectra.recipes, *spectra.shapes, spectra.method]))
        if any(unicodedata.category(letter)[0] == "C" for letter in texts) or spectra.sizes.min() < 1:
            raise DsireError("can't be right: control characters in names, or a model without a size")
    except DsireError as error:
        raise DsireError(f"--dataset={item} {error}") from error
    if subset not in (None, told[1]):
        raise DsireError(f"--dataset={item} holds subset {told[1]}, not {subset}: leave --subset out")
    at = f" at commit {told[2][:12]}" if told[2] else ""
    note = f"{item} holds spectra, not models: of {told[0]} {told[1]}{at}; its digest is {about['digest']}"
    shard = Shard(str(path.absolute()), path.stat().st_size, about["digest"])
    return Source(told[0], told[1], told[2], [shard], [note], "spectra")


# ---------------------------------------------------------------------------------------------------------------------
# The cache of spectra, and who computes what is not in it


def process_rank() -> int:
    """The number of this process among those that torchrun started."""
    return int(os.environ.get("RANK") or 0)


def subset_spectra(
    source: Source, rank: int, cache: Path, device: str = "cpu", keep_shards: bool = False, base: Weights | None = None
) -> Spectra:
    """The spectra of a whole subset: from the cache, and for the shards that it lacks from their weights.

    What is in the cache and sound is done: a file's name there changes with all that decides the spectra. It is written
    before a download is deleted, so that a run that is killed goes on at its shard.
    """
    if source.kind == "spectra":
        return read_spectra(Path(source.shards[0].file))[0]
    place, files = "" if source.commit else str(Path(source.dataset).absolute()), source.kind == "files"
    keys = {shard: fingerprint([FORMAT, rank, place, asdict(shard)]) for shard in source.shards}
    paths = {it: cache / "spectra" / f"{Path(it.file).stem[:40]}-{key}.safetensors" for it, key in keys.items()}

    def compute(shard: Shard, path: Path) -> None:
        try:
            spectra = file_spectra(path, base, rank, device) if files else shard_spectra(path, rank, device)
        except DsireError as error:
            raise DsireError(f"{shard.file}: {error}") from error
        write_spectra(paths[shard], spectra, {})
        for download in (path.resolve(), path) if source.commit and not keep_shards else ():
            download.unlink(missing_ok=True)  # in huggingface_hub's cache it is a link

    parts = {shard: cached(path) for shard, path in paths.items()}
    if missing := {shard: paths[shard] for shard, part in parts.items() if part is None}:
        share_work(source, missing, cache, compute, many=files and base is None)
    done = [part or read_spectra(paths[shard])[0] for shard, part in parts.items()]
    for number, shard in enumerate(source.shards if files else []):
        size, name, recipe = source.labels[shard.file]
        done[number] = replace(done[number], sizes=torch.tensor([size]), names=[name], recipes=[recipe])
    return join(done, [shard.file for shard in source.shards])


def cached(path: Path) -> Spectra | None:
    """Spectra from the cache; None if they aren't there, or damaged."""
    with suppress(DsireError):
        return read_spectra(path)[0] if path.exists() else None
    return None


def share_work(
    source: Source, missing: dict[Shard, Path], cache: Path, compute: Callable[[Shard, Path], None], many: bool
) -> None:
    """Compute the spectra of shards together with any number of processes: torchrun's, other runs, other machines.

    Each begins at another shard, computes what is not there yet when it has the shard's lock, and has all in the end.
    Shards of the Hub are fetched while the one before is computed. None waits for another in a circle: who waits for a
    lock holds at most one, of a shard that is being computed, and lets it go without waiting for anything.
    `many` are small: each core computes one.
    """
    from tqdm import tqdm

    first = process_rank() * len(missing) // int(os.environ.get("WORLD_SIZE") or 1)
    walk = [*missing][first:] + [*missing][:first]
    name = "" if process_rank() else "files" if source.kind == "files" else "shards"

    def prepare(shard: Shard) -> tuple[ExitStack, Path | None]:
        """Lock a shard, and fetch it unless another process has computed it meanwhile."""
        with ExitStack() as held:
            lock(missing[shard].with_suffix(".lock"), held)
            halves = f"spectra/.*{missing[shard].stem[-16:]}.*.half", f"hub/*/blobs/{shard.version}.*.incomplete"
            for half in [half for pattern in halves for half in cache.glob(pattern)]:  # of a run that was killed
                half.unlink(missing_ok=True)
            path = None if cached(missing[shard]) else fetch(source, shard, cache)
            return held.pop_all(), path

    def finish(shard: Shard, held: ExitStack, path: Path | None) -> None:
        with held:
            if path:
                compute(shard, path)

    if many:
        in_parallel(lambda shard: finish(shard, *prepare(shard)), walk, name=name)
        return
    coming: Future[tuple[ExitStack, Path | None]] | None = None
    try:
        for number, shard in enumerate(tqdm(walk, desc=name, disable=None if name else True), start=1):
            ready = coming.result() if coming else prepare(shard)
            coming = in_background(prepare, walk[number]) if source.commit and number < len(walk) else None
            finish(shard, *ready)
    finally:
        if coming:
            coming.add_done_callback(lambda its: None if its.exception() else its.result()[0].close())


say_once = lru_cache(say)


def lock(place: Path, held: ExitStack) -> None:
    """No other process computes this while it is held; where the disk knows no locks both do, which is no harm."""
    from filelock import FileLock

    place.parent.mkdir(parents=True, exist_ok=True)
    try:  # taken in one thread, released in another; a file that exists would outlive a run that is killed
        held.enter_context(FileLock(place, thread_local=False, fallback_to_soft=False))
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        say_once(f"{place.parent} knows no locks ({shown(error)}): going on without", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# The report: what is printed, as lines, and what is written for programs


def about_models(spectra: Spectra, subset: str, how: str) -> list[str]:
    """What the labelled models are, how they are used, and what is to be said of them."""
    sizes = " ".join(str(size) for size in spectra.sizes.unique().tolist())
    kind = kind_of_model({voter.layer: spectra.shapes[voter.layer] for voter in spectra.voters})
    method = "" if spectra.method == "LoRA" else f"{spectra.method}, "
    return [
        f"{subset}: {counted(len(spectra.names), 'model')}, {counted(spectra.count, 'micro-dataset')}, sizes {sizes}",
        f"{kind}; {method}matrices {' '.join(spectra.kinds)}, so {counted(len(spectra.voters), 'voter')}",
        how,
        *(f"note: {note}" for note in spectra.notes),
    ]


def csv_text(heads: Sequence[str], rows: list[dict[str, Any]]) -> str:
    """Some of what rows hold as CSV: numbers with four digits, blank where there is nothing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {name: f"{cell:.4f}" if isinstance(cell, float) else cell for name, cell in row.items()}
        writer.writerow({name: "; ".join(cell) if isinstance(cell, list) else cell for name, cell in cells.items()})
    return text.getvalue()


PREDICTIONS = ("experiment", "name", "size", "predicted", "vote_share")
ESTIMATES = ("file", "status", "estimate", "share", "confidence_set", "would_be", "recipe_p", "stated_size", "notes")


def prediction_rows(spectra: Spectra, runs: list[Split], found: dict[str, list[Prediction]]) -> list[dict[str, Any]]:
    """For predictions.csv: a row for each test model of each experiment and predictor."""
    rows = []
    for predictor, predictions in found.items():
        for number, (run, its) in enumerate(zip(runs, predictions, strict=True), start=1):
            shares = its.shares.amax(-1).tolist()
            for model, predicted, share in zip(run.test.tolist(), its.sizes.tolist(), shares, strict=True):
                cells = (number, spectra.names[model], int(spectra.sizes[model]), predicted, share, predictor)
                rows.append(dict(zip((*PREDICTIONS, "predictor"), cells, strict=True)))
    return rows


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
    if estimate.status == "ok":
        title, lines = its, []
        link, what = (" to ", "interval") if interval else (" or ", "set")
        members = link.join(map(str, dict.fromkeys(estimate.confidence_set)))
        if members or estimate.recipe_p is not None:
            title += f"; {100 * confidence:.6g} % {what}: {members or 'none, as it is like no labelled size'}"
        shares = sorted(estimate.shares.items(), key=lambda share: -share[1])
        weights = ", ".join(f"{size}: {100 * share:.0f} %" for size, share in shares if share >= 0.005)
        if not interval:
            lines.append(f"{predictor} weighs {weights}" if predictor.startswith("log-") else f"votes for {weights}")
        if estimate.told and not interval:
            told = counted(estimate.told, "left-out model")
            lines.append(f"of {told} told {its}, {estimate.right} had that size")
    else:
        title, *lines = estimate.first
        lines += [f"judged all the same, it is told {its}, which is no estimate"] if estimate.answer else []
    lines += [f"nearest labelled recipe: {shown(estimate.recipe)}"] if estimate.recipe else []
    lines += [f"the file itself states {counted(estimate.stated_size, 'image')}"] if estimate.stated_size else []
    lines += [f"note: {note}" for note in estimate.notes if note not in said]
    return ["", f"{estimate.file}: {title}", *(f"  {line}" for line in lines)]


def shared_notes(found: list[Estimate]) -> dict[str, str]:
    """Notes that most of several files have, each with the line that says it of all of them."""
    lines = {}
    for note, count in Counter(note for one in found for note in one.notes).items():
        if count > 1 and 2 * count > len(found):
            lines[note] = f"note on {count} of {len(found)} files: {note}"
    return lines


def write_files(output: Path, table: str, text: str, settings: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """A table, and report.json: what was asked, of what, with which versions, and what was found. Lines that say so."""
    packages = ("torch", "numpy", "scikit-learn", "huggingface_hub", "datasets", "pyarrow", "safetensors")
    versions = {"python": sys.version.split()[0], **{package: version(package) for package in packages}}
    write_whole(output / table, text)
    write_json(output / "report.json", {"settings": settings, "versions": versions, **found})
    return ["", f"wrote {output / table}", f"wrote {output / 'report.json'}"]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: the paper's Figures 2 to 6


def draw(output: Path, figures: dict[str, Callable[[Any], Any]]) -> list[str]:
    """Write pictures into a folder: name -> a function of pyplot that gives a figure. Lines that say so."""
    os.environ["MPLBACKEND"] = "Agg"  # before the import: a notebook's own is not there, or needs a display
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {"figure.dpi": 150, "figure.constrained_layout.use": True, "font.size": 11}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    paths = {output / f"{name}.png": figure_of for name, figure_of in figures.items()}
    with plt.rc_context(style):
        for path, figure_of in paths.items():
            image, figure = io.BytesIO(), figure_of(plt)
            figure.savefig(image, format="png", metadata={"Software": None})
            plt.close(figure)
            write_whole(path, image.getvalue())
    return [f"wrote {path}" for path in paths]


def confusion_figure(plt: Any, true: Tensor, predicted: Tensor, title: str) -> Any:
    """The sizes that models of each size were told, or those nearest to them, in percent (Figures 4 and 6)."""
    sizes = true.unique()
    nearest_ones = nearest_size(predicted, sizes)
    table = torch.stack([100 * (nearest_ones[true == size, None] == sizes).double().mean(0) for size in sizes]).numpy()
    figure, axes = plt.subplots(figsize=(6, 5))
    image = axes.imshow(table, cmap="cividis", vmin=0, vmax=100)
    for (y, x), value in np.ndenumerate(table):
        axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="black" if value > 60 else "white")
    axes.set_xticks(range(len(sizes)), sizes.tolist())
    axes.set_yticks(range(len(sizes)), sizes.tolist())
    axes.set(xlabel="predicted dataset size (images)", ylabel="true dataset size (images)", title=title)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="models of the true size (%)", shrink=0.85)
    return figure


def spectra_figure(plt: Any, spectra: Spectra) -> Any:
    """By dataset size: norms and spectra, means over layers (Figure 2), and the spectra of two layers (Figure 3)."""
    matrix = [*spectra.kinds][-1]  # BA, unless it was left out
    spectra = spectra.of_matrices([matrix])
    masks = {size: spectra.sizes == size for size in spectra.sizes.unique().tolist()}
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(masks)))  # its lightest end fades on white
    indices = range(1, spectra.values.shape[-1] + 1)
    figure, ((left, right), (below, last)) = plt.subplots(2, 2, figsize=(9, 7.5))
    norms = torch.linalg.vector_norm(spectra.values, dim=-1).mean(0)
    boxes = left.boxplot([norms[mask].numpy() for mask in masks.values()], showfliers=False, patch_artist=True)
    for box, median, colour in zip(boxes["boxes"], boxes["medians"], colours, strict=True):
        box.set(facecolor=colour, alpha=0.7)
        median.set(color="black")
    left.set_xticks(range(1, len(masks) + 1), [*masks])
    left.set(xlabel="dataset size (images)", ylabel=f"Frobenius norm of {matrix}")
    left.set_title("mean over layers", fontsize=9)
    down = [voter for voter in spectra.voters if voter.layer.startswith("down")] or spectra.voters
    up = [voter for voter in spectra.voters if voter.layer.startswith("up")] or spectra.voters
    for axis, voters, title in (
        (right, spectra.voters, "mean over layers"),
        (below, down[:1], f"first down-block layer\n{down[0].layer}"),
        (last, up[-1:], f"last up-block layer\n{up[-1].layer}"),
    ):
        values = spectra.of_voters(voters).values.mean(0)
        for (size, mask), colour in zip(masks.items(), colours, strict=True):
            mean, spread = values[mask].mean(0), values[mask].std(0, correction=0)
            axis.plot(indices, mean, color=colour, marker="o", markersize=4, label=size)
            axis.fill_between(indices, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
        axis.set_title(title.replace("_transformer", "\ntransformer"), fontsize=9)
        axis.set(xlabel="index of the singular value", ylabel=f"singular value of {matrix}, mean ± std")
        axis.set_xticks(indices[:: max(1, len(indices) // 8)])
    right.legend(title="images")
    return figure


def training_figure(plt: Any, growth: dict[str, list[Metrics]], title: str) -> Any:
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


PICTURED = 20  # files at most in a picture
Judged = list[tuple[Estimate, Spectra]]  # files' estimates, and their spectra on the voters that they share


def estimates_figure(plt: Any, fitted: Spectra, judged: Judged, interval: bool) -> Any:
    """For each file the norms of its matrices, as lines over those of the labelled models by size, its set shaded."""
    width, sizes = len(fitted.kinds), fitted.sizes.unique().tolist()
    figure, axes = plt.subplots(len(judged), width, figsize=(3.2 * width, 2.8 * len(judged)), squeeze=False)
    for line, (estimate, file) in zip(axes, judged, strict=True):
        ok = estimate.status == "ok"
        held: Sequence[int] = estimate.confidence_set if ok else []
        held = range(held[0], held[-1] + 1) if interval and held else held
        for axis, (matrix, voters) in zip(line, file.kinds.items(), strict=False):
            known, its = (log_norms(side)[:, voters].mean(1).exp() for side in (voting_as(file, fitted), file))
            draw_norms(plt, axis, fitted, known, float(its))
            axis.set(xlabel="dataset size (images)", ylabel=f"norm of {matrix}")
            for place in [sizes.index(size) for size in sizes if size in held]:
                axis.axvspan(place - 0.5, place + 0.5, color="#d55e00", alpha=0.15, linewidth=0)
        for axis in line[len(file.kinds) :]:
            axis.set_axis_off()
        what = counted(estimate.answer, "image") if ok else estimate.status
        line[0].set_title(f"{shown(Path(estimate.file).name)}: {what}", loc="left", fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle("Frobenius norms, geometric mean over layers; shaded: the set of sizes", fontsize=10)
    return figure


def draw_norms(plt: Any, axis: Any, fitted: Spectra, known: Tensor, norm: float) -> None:
    """Norms of labelled models [models], points by size and recipe, and a file's, a line: at the edge if far above."""
    sizes, recipes = fitted.sizes.unique(), sorted(set(fitted.recipes)) or [""]
    places = torch.searchsorted(sizes, fitted.sizes)
    for number, recipe in enumerate(recipes):
        chosen, shift = fitted.of_recipe == number, 0.6 * (number + 0.5) / len(recipes) - 0.3
        colour = plt.get_cmap("viridis")(0.9 * number / len(recipes))
        axis.scatter(places[chosen] + shift, known[chosen], s=6, color=colour, label=recipe or "labelled models")
    edge = min(norm, 3 * float(known.max()))
    axis.hlines(edge, -0.5, len(sizes) - 0.5, color="black", linewidth=1, label="the file")
    if edge < norm:
        axis.text(0, edge, f"{norm:.2g}", va="top", fontsize=8)
    axis.set_xticks(range(len(sizes)), sizes.tolist())


# ---------------------------------------------------------------------------------------------------------------------
# The command line


class OneLineParser(argparse.ArgumentParser):
    """argparse, with an error like every other one."""

    def error(self, message: str) -> Any:
        raise DsireError(f"{message} (see --help)")


def path_of(text: str) -> Path:
    return Path(os.path.expanduser(text))  # not Path.expanduser, which raises for an unknown user


def command_line() -> argparse.ArgumentParser:
    """The options, in groups."""
    protocol, about = Protocol(), str(__doc__).partition("The script reads")[0]
    parser = OneLineParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("data: the labelled models").add_argument
    add("--subset", metavar="NAME", help=f"a config of the dataset, such as low_32 ({SHIPPED_SUBSET}, which ships)")
    where = "a Hub repository, a folder like it, a folder of LoRA files with metadata.csv, or a file of spectra"
    add("--dataset", metavar="WHERE", help=f"{where} ({LORA_WISE})")
    add("--revision", metavar="COMMIT", help="branch, tag or commit of the Hub dataset")
    rank = f"of the LoRAs (the one in the subset's name), or how many values are kept of a change ({LARGEST})"
    add("--rank", type=int, metavar="N", help=rank)
    add("--base", metavar="WHERE", help="what full fine-tunes began as: a file, folder or Hub repository")
    add("--cache_dir", type=path_of, default=CACHE, metavar="DIR", help="for downloads and spectra (%(default)s)")
    add("--keep_shards", action="store_true", help="keep downloads after their spectra are computed")
    add("--device", metavar="NAME", help="cuda or cpu (cuda, if there is one)")
    add = parser.add_argument_group("protocol: how the labelled models are evaluated").add_argument
    add("--experiments", type=int, default=protocol.experiments, metavar="N", help="how many (%(default)s)")
    train_size = "micro-datasets to train on (15, or three quarters of fewer than 20)"
    add("--train_size", type=int, metavar="N", help=train_size)
    add("--seed", type=int, default=protocol.seed, metavar="N", help="of the experiments' splits (%(default)s)")
    add("--matrices", nargs="+", choices=MATRICES, default=list(MATRICES), help="which ones vote (all)")
    kinds = f"one of {', '.join(PREDICTORS)} (dsire, or log-ridge with --predict)"
    add("--predictor", choices=PREDICTORS, metavar="NAME", help=kinds)
    add("--compare", action="store_true", help="all predictors and matrices; by size, training micro-datasets, recipe")
    add = parser.add_argument_group("prediction, instead of an evaluation").add_argument
    add("--predict", nargs="+", metavar="LORA", help="estimate for files, folders, user/name or user/name:file")
    add("--confidence", type=float, metavar="P", help="of the set of sizes beside an estimate (0.9)")
    add = parser.add_argument_group("output").add_argument
    add("--output", type=path_of, metavar="DIR", help="for report.json, and predictions.csv or estimates.csv")
    plots = "draw the paper's figures, or with --predict the files among the labelled models, into --output"
    add("--plots", action="store_true", help=plots)
    add("--save_spectra", type=path_of, metavar="FILE", help="write the labelled models' spectra, for --dataset FILE")
    return parser


def choose_device(name: str | None) -> str:
    """The device to compute spectra on, ready for threads: the one that is named, or this process's GPU, or the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and name in (None, "cuda"):
        name = f"cuda:{int(os.environ.get('LOCAL_RANK') or 0) % gpus}"
    name = name or "cpu"
    if not re.fullmatch("cpu|cuda(:[0-9]{1,3})?", name):
        raise DsireError(f"--device={shown(name)}: it can be cuda or cpu")
    with asking(f"--device={name} can't be used here", "try --device=cpu"):
        warm_up(name)
    return name


def warm_up(device: str) -> None:
    """Call each routine that spectra need once, before threads do.

    PyTorch loads its linear algebra for CUDA at the first call that needs it, which is not safe from several threads at
    once: it fails in all but one ("lazy wrapper should be called at most once").
    """
    layers = torch.eye(2, dtype=torch.float64, device=device).repeat(2, 1, 1)
    lora_spectra(layers, layers)  # Cholesky and eigenvalues
    qr_spectra(layers, layers)  # QR and singular values


def settle(arguments: argparse.Namespace) -> list[str]:
    """Fill in what the arguments leave open, and refuse what can't be done; notes of what is to be said."""
    for name in ("rank", "experiments", "train_size"):
        number = getattr(arguments, name)
        if number is not None and not 0 < number < 2**53:
            raise DsireError(f"--{name}: '{number}' is not a whole number from 1 up")
    if arguments.confidence is not None and not 0 < arguments.confidence < 1:
        raise DsireError(f"--confidence: '{arguments.confidence}' is not between 0 and 1")
    if arguments.confidence and not arguments.predict:
        raise DsireError("--confidence is about the sets of sizes that --predict names: leave it out")
    if arguments.predict and arguments.compare:
        raise DsireError("--compare is about the labelled models: leave it out with --predict")
    if arguments.plots and not arguments.output:
        raise DsireError("--plots needs a folder for the pictures: give it with --output")
    for folder in (arguments.output, arguments.save_spectra and arguments.save_spectra.parent):
        if folder:  # what stands in the way is said before anything is computed
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    arguments.confidence = arguments.confidence or 0.9
    arguments.predictor = arguments.predictor or ("log-ridge" if arguments.predict else "dsire")
    if arguments.dataset is not None:
        return []
    said = "" if arguments.subset else "no --subset was given; "
    arguments.subset = arguments.subset or SHIPPED_SUBSET
    ships = (SHIPPED / arguments.subset.replace("_", "/")).is_dir()
    arguments.dataset = str(SHIPPED) if ships else LORA_WISE
    said += f"{arguments.subset} ships with the script: LoRAs of a small UNet on 8 x 8 digits, made to test the method "
    return [f"{said}at this size, not to be compared with the paper's figures"] if ships else []


def labelled_models(arguments: argparse.Namespace, base: Weights | None) -> tuple[Spectra, dict[str, Any]]:
    """The labelled models on the matrices that vote, with notes of all that led to them; and the settings that did."""
    cache, arguments.device = arguments.cache_dir, choose_device(arguments.device)
    source = find_source(arguments.dataset, arguments.subset, arguments.revision, cache, base)
    rank, about_rank = rank_of(source, arguments.rank)
    spectra = subset_spectra(source, rank, cache, arguments.device, arguments.keep_shards, base)
    width, there = spectra.values.shape[-1], " ".join(spectra.kinds)
    if arguments.rank and arguments.rank != width and "A" in spectra.kinds:
        raise DsireError(f"--rank={arguments.rank} does not fit: the LoRAs have rank {width}")
    if arguments.save_spectra and not process_rank():
        of = source.dataset if source.commit else Path(source.dataset).name
        about = {"dataset": of, "subset": source.subset, "commit": source.commit}
        write_spectra(arguments.save_spectra, spectra, about, torch.float32)
        say(f"wrote {arguments.save_spectra}")
    notes = about_rank + source.notes + spectra.notes + what_is_unusual(spectra)
    if base and spectra.method == "LoRA" and not arguments.predict:
        notes.append(BASE_IS_NOT_USED)
    spectra = replace(spectra.of_matrices(arguments.matrices), notes=notes)
    if not spectra.voters:
        raise DsireError(f"--matrices {' '.join(arguments.matrices)}: of a {spectra.method} there is only {there}")
    arguments.train_size = arguments.train_size or default_train_size(spectra.count)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    return spectra, settings | asdict(source) | {"rank": width}


def report(arguments: argparse.Namespace, spectra: Spectra, settings: dict[str, Any]) -> list[str]:
    """Evaluate, compare and draw what the arguments ask for; what is to be printed."""
    name = arguments.predictor
    protocol = Protocol(arguments.experiments, arguments.train_size, arguments.seed)
    runs, subset = splits(spectra.micro_datasets, protocol), settings["subset"]
    as_there = len(set(arguments.matrices)) == 3 and protocol.train_size == 15
    paper = {row: values for (of, row), values in PAPER.items() if of == subset and as_there}
    if arguments.compare:
        tables, found = compare(spectra, protocol, paper)
    else:
        found = {name: PREDICTORS[name](spectra, runs)}
        tables = [metrics_table("", {name: judge(spectra, runs, found[name])}, paper, differences=False)]
    different = len({tuple(run.train.tolist()) for run in runs})
    if different < len(runs):
        spectra.notes.append(f"only {different} of the {len(runs)} experiments are different ones")
    to_train = f"{counted(protocol.train_size, 'micro-dataset')} to train"
    how = f"{counted(len(runs), 'experiment')}: {to_train}, {spectra.count - protocol.train_size} to test"
    lines = about_models(spectra, subset, how) + [line for table in tables for line in table.lines()]
    if arguments.output:
        text = csv_text((*PREDICTIONS, "predictor")[: 5 + arguments.compare], prediction_rows(spectra, runs, found))
        experiments = [its._asdict() for its in judge(spectra, runs, found[name])]
        details = {"notes": spectra.notes, "experiments": experiments, "tables": [table._asdict() for table in tables]}
        lines += write_files(arguments.output, "predictions.csv", text, settings, details)
    if arguments.plots:
        title = f"{name} on {subset}, {len(spectra.names)} models"
        growth = by_train_size(spectra, PREDICTORS[name], protocol)
        true = spectra.sizes[torch.cat([run.test for run in runs])]
        predicted = torch.cat([its.sizes for its in found[name]])
        figures: dict[str, Callable[[Any], Any]] = {
            "confusion": lambda plt: confusion_figure(plt, true, predicted, title),
            "spectra": lambda plt: spectra_figure(plt, spectra),
            "training": lambda plt: training_figure(plt, growth, f"{title} (bars: std over experiments)"),
        }
        lines += draw(arguments.output, figures)
    return lines


BASE_IS_NOT_USED = "--base is not used, as a plain LoRA needs none"


class Asked(NamedTuple):
    """What --predict names, by the names that the user knows: files, and why others are left out or refused."""

    files: dict[str, Path]
    left_out: dict[str, str]
    refused: dict[str, str]


def files_asked(items: list[str], cache: Path, base: Weights | None) -> Asked:
    asked = Asked({}, {}, {})
    for item in items:
        try:
            files, left_out = files_to_predict(item, cache, base)
            asked.files.update(files)
            asked.left_out.update(left_out)
        except DsireError as error:
            asked.refused[item] = str(error)
            complain(error)
    return asked


def voting_as(file: Spectra, fitted: Spectra) -> Spectra:
    """The labelled models on a file's voters, with as many singular values."""
    fitted = fitted.of_voters(file.voters)
    return replace(fitted, values=of_rank(fitted.values, file.values.shape[-1]))


def judged_files(asked: Asked, fitted: Spectra, arguments: argparse.Namespace, base: Weights | None) -> Judged:
    """Each file's estimate and spectra, in the order asked; those that can't be read or matched are refused."""
    from tqdm import tqdm

    largest = max(LARGEST, fitted.values.shape[-1])
    alike: dict[tuple[Any, ...], list[Spectra]] = {}  # files with the same layers are judged together
    for name, path in tqdm(asked.files.items(), desc="files", disable=None if len(asked.files) > 1 else True):
        try:
            file = file_spectra(path, base, largest, arguments.device)
            notes = [*file.notes, BASE_IS_NOT_USED] if base and file.method == "LoRA" else file.notes
            file = matched(replace(file, names=[name], notes=notes), fitted)
            alike.setdefault((file.values.shape[-1], *file.voters), []).append(file)
        except DsireError as error:
            asked.refused[name] = str(error)
            complain(f"{name}: {error}")
    judged: dict[str, tuple[Estimate, Spectra]] = {}
    for files in alike.values():
        its = estimates(voting_as(files[0], fitted), files, arguments.predictor, arguments.confidence)
        judged |= {file.names[0]: (estimate, file) for estimate, file in zip(its, files, strict=True)}
    return [judged[name] for name in asked.files if name in judged]


def predict(
    arguments: argparse.Namespace, fitted: Spectra, settings: dict[str, Any], asked: Asked, base: Weights | None
) -> list[str]:
    """An estimate for each file that can be read, and what is to be said of the others; what is to be printed."""
    name, output = arguments.predictor, arguments.output
    judged = judged_files(asked, fitted, arguments, base)
    for file, why in [*asked.left_out.items()][:1]:
        fitted.notes.append(f"{counted(len(asked.left_out), 'file')} left out, such as {file}: {why}")
    if arguments.plots and len(judged) > PICTURED:
        fitted.notes.append(f"estimates.png shows the first {PICTURED} of {len(judged)} files")
    fitted.notes.extend(what_can_be_supported(fitted.sizes, fitted.micro_datasets, arguments.confidence))
    how, good = f"predictor {name}", how_good(fitted, name)
    if good:
        how += f": of left-out labelled models it tells {good.accuracy:.0f} % right, MAE {good.mae:.2f} images"
    found = [estimate for estimate, _ in judged]
    shared = shared_notes(found)
    lines = [*about_models(fitted, settings["subset"], how), *shared.values()]
    lines += [line for one in found for line in estimate_lines(one, name, arguments.confidence, shared)]
    if output:
        refused = {**asked.left_out, **asked.refused}
        found += [Estimate(file, "refused", notes=[why]) for file, why in refused.items()]
        rows = [estimate_row(estimate, name) for estimate in found]
        details = {"notes": fitted.notes, "estimates": rows}
        lines += write_files(output, "estimates.csv", csv_text(ESTIMATES, rows), settings, details)
    if arguments.plots and judged:
        interval, first = name == "log-regression", judged[:PICTURED]
        lines += draw(output, {"estimates": lambda plt: estimates_figure(plt, fitted, first, interval)})
    return lines


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit code, 2 if some of what was asked could not be had."""
    notes, is_first = settle(arguments), not process_rank()
    base = open_base_of(arguments.base, arguments.cache_dir) if arguments.base else None
    items = arguments.predict if arguments.predict and is_first else []
    asked = files_asked(items, arguments.cache_dir, base)  # before a subset is fetched for nothing
    if items and not asked.files:
        return 2
    spectra, settings = labelled_models(arguments, base)
    spectra.notes[:0] = notes
    if is_first:  # it reports; files are written before anything is printed, in case nobody reads it
        lines = predict(arguments, spectra, settings, asked, base) if items else report(arguments, spectra, settings)
        say(*lines)
        print(end="", flush=True)
    return 2 if asked.refused else 0


def complain(error: object) -> None:
    say(f"dsire.py: error: {error}", file=sys.stderr)


def main() -> int:
    """The command; the one place where what went wrong becomes one line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # it may know fewer letters than there are
    try:
        return run(command_line().parse_args())
    except KeyboardInterrupt:
        say("dsire.py: stopped; run it again to go on", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except (DsireError, OSError, RecursionError, MemoryError) as error:
        if process_rank():
            return 0  # the first process meets the same, and says it
        complain(error if isinstance(error, DsireError) else f"{shown(error)}; what was computed is kept")
        code = 2
    try:
        print(end="", flush=True)
    except OSError:  # what can't be printed is not tried again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    gc.freeze()  # what was imported is no garbage: to search it again and again, and at the exit, takes a second
    exit_code = main()
    gc.freeze()
    sys.exit(exit_code)

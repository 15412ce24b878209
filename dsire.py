#!/usr/bin/env python3
"""DSiRe: how many images was a LoRA trained on? (arXiv:2406.19395)

    python dsire.py                            # the subset that ships, offline
    python dsire.py --subset=low_32 --rank=32  # LoRA-WiSE, from the Hub
    python dsire.py --subset=low_32 --predict my_lora.safetensors
    python dsire.py --dataset=my_loras --predict folder/ user/name --output=out
    python dsire.py --dataset=tuned --base=sd15.safetensors --predict full.ckpt

The script reads from top to bottom as the paper does: a LoRA layer and its
spectra, the voters and the vote, a regression beyond the paper, the protocol,
how sure an estimate is, everything compared. Then the weights: the names of
LoRA matrices, parquet, LoRA files, other fine-tunes, one file, where they come
from, the cache of spectra. Last: the report, pictures, the command line.
"""

from __future__ import annotations

import argparse
import csv
import errno
import gc
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() runs, Ctrl-C ends the imports without a traceback

import numpy as np
import torch
from torch import Tensor

LORA_WISE = "MoSalama98/LoRA-WiSE"
SHIPPED = Path(__file__).resolve().parent / "tests" / "tiny_wise"
SHIPPED_SUBSET = "low_4"
CACHE = Path(".cache/lora_wise")
MATRICES = ("A", "B", "BA")
CACHE_FORMAT = 4  # part of every cache key: spectra that were written in another form are computed anew
DISTANCES_AT_ONCE = 2**20  # of one voter, by the nearest-neighbour search: 8 MiB for each core
BYTES_AT_ONCE = 2**27  # of decoded columns, over all cores

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

T = TypeVar("T")


class DsireError(Exception):
    """Something the user can mend; the message is one line that says what to do."""


class NoLora(DsireError):
    """A sound file of something else, such as lies beside LoRAs: in a folder it is left out and counted."""


def shown(what: object) -> str:
    """A name out of a file or a library's error, fit for a message: one printable line of at most 160 characters."""
    text = str(what).strip() or type(what).__name__
    if isinstance(what, BaseException):
        text = text.splitlines()[0].rstrip(" .")
    clean = "".join(letter if letter.isprintable() else "?" for letter in text)
    return clean if len(clean) <= 160 else f"{clean[:120]}... ({len(clean):,} characters)"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def percent(share: float) -> str:
    return f"{100 * share:.6g}%"


def cores() -> int:
    """The cores that this process may use: under torchrun its part of the machine's."""
    import joblib

    return max(1, int(joblib.cpu_count()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


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
    function: Callable[[Any], T], items: Sequence[Any], at_once: int | None = None, unit: str = ""
) -> list[T]:
    """What the function gives for each item, computed on all cores, each call with one thread.

    Args:
        at_once: how many calls run at the same time, if fewer than there are cores.
        unit: what an item is called by a progress bar; without it there is none.

    Raises:
        KeyboardInterrupt: Ctrl-C; with a unit its message says how far the work came.
    """
    from tqdm import tqdm

    with one_thread_each(), ThreadPoolExecutor(min(at_once or cores(), cores())) as pool:
        progress = tqdm(pool.map(function, items), total=len(items), unit=unit, disable=None if unit else True)
        found: list[T] = []
        try:
            found.extend(progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{progress.n} of {len(items)} {unit}s are done" if unit else "") from None
        return found


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
    # LAPACK's QR may drop a NaN, and its SVD may not return from one
    if not (a.isfinite().all() and b.isfinite().all() and r.isfinite().all() and core.isfinite().all()):
        raise FloatingPointError("weights that are not finite")
    spectra = [of_rank(torch.linalg.svdvals(matrix), rank) for matrix in (r, s, core)]
    return spectra[0], spectra[1], spectra[2]


def matrix_spectrum(matrix: Tensor, count: int) -> Tensor:
    """The largest singular values of any matrix, in falling order: float64 [count], or [min(out, in)] if that is less.

    As in `lora_spectra` they come from a Gram matrix, that of the smaller side, unless they lie too far apart for it.

    Args:
        matrix: [out, in], float64.

    Raises:
        FloatingPointError: a number is not finite.
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
    with computing():
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
    except torch.cuda.OutOfMemoryError as error:
        if len(a) == 1:
            raise DsireError(f"{device} has no memory left for a single layer: use --device=cpu") from error
    half = len(a) // 2
    return torch.cat([batch_spectra(a[:half], b[:half], device), batch_spectra(a[half:], b[half:], device)], dim=1)


@contextmanager
def computing(device: str = "cpu", file: str = "") -> Iterator[None]:
    """What PyTorch raises while spectra are computed, told as itself: the file that was read is not at fault."""
    try:
        yield
    except RuntimeError as error:
        where, advice = f"{file}: " if file else "", "" if device.startswith("cpu") else "; try --device=cpu"
        raise DsireError(f"{where}the spectra can't be computed on {device} ({shown(error)}){advice}") from error


def warm_up(device: str) -> None:
    """Call each routine that spectra need once on the device, before threads do: a millisecond on a CPU.

    PyTorch loads its CUDA linear algebra at the first call that needs it, which isn't safe from several threads at once
    ("lazy wrapper should be called at most once", pytorch/pytorch #90613).
    """
    layers = torch.eye(2, dtype=torch.float64, device=device).repeat(2, 1, 1)
    with one_thread_each():
        lora_spectra(layers, layers)  # Cholesky and eigenvalues
        qr_spectra(layers, layers)  # QR and singular values


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
    """The spectra of some models, with what is known of the models.

    Attributes:
        values: [voters, models, r], float64; a layer of a lower rank than r has zeros at its end.
        sizes: n, the number of training images, of each model: int64 [models]; 0 if it is not known.
        names: what the micro-dataset of each model is called (LoRA-WiSE's column `name`): strings or integers.
        voters: what each row of `values` is.
        shapes: layer -> [out, in, rank], or [out, in] where there is no A and B.
        notes: what was left out or is unusual, to be said in the report.
        recipes: what the recipe that each model was trained with is called; empty where nothing says it.
        recipes_stated: whether that is what LoRA files' own headers state.
        method: "LoRA", or what else the models are, such as "full fine-tune"; BA is the change of the weights then.
        first: of a file, what has to be known before an estimate.
    """

    values: Tensor
    sizes: Tensor
    names: list[Any]
    voters: list[Voter]
    shapes: dict[str, list[int]]
    notes: list[str] = field(default_factory=list)
    recipes: list[str] = field(default_factory=list)
    recipes_stated: bool = False
    method: str = "LoRA"
    first: list[str] = field(default_factory=list)

    @cached_property
    def micro_datasets(self) -> Tensor:
        """The micro-dataset of each model as a number, 0, 1, ... in the order of the names: int64 [models]."""
        return numbered(self.names)

    @cached_property
    def of_recipe(self) -> Tensor:
        """The recipe of each model as a number, 0, 1, ... in the order of the recipes: int64 [models]."""
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
    """What a predictor says of some models.

    Attributes:
        sizes: its answers, int64 [models].
        candidates: the sizes that it was trained on, in rising order: int64 [sizes].
        shares: the share of the votes that each of them got, float64 [models, sizes].
        answers: what a regression answers before it is moved to a candidate, in images: float64 [models].
    """

    sizes: Tensor
    candidates: Tensor
    shares: Tensor
    answers: Tensor | None = None


Predictor = Callable[[Spectra, list[Split]], list[Prediction]]


def nearest(values: Tensor, splits: list[Split]) -> list[Tensor]:
    """For each split, voter and test model, the nearest training model (Euclidean; the first one of equals).

    Distances are exact, each computed by itself and once for all splits: models with equal spectra are equally far.

    Args:
        values: [voters, models, r], float64.
        splits: what to train on and what to ask, all within `values`.

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

    if x.device.type == "cpu":
        if x is y:  # each pair once
            return squareform(pdist(x.numpy(), "sqeuclidean"))
        return cdist(x.numpy(), y.numpy(), "sqeuclidean")
    return (x[:, None] - y).square().sum(-1).cpu().numpy()  # not `torch.cdist`: its roots make near ones equal


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


def average(votes: Votes) -> Prediction:
    """The training size nearest to the mean of those that the voters name (Table 5, average vote)."""
    return replace(majority(votes), sizes=nearest_size(votes.named.double().mean(0), votes.candidates))


def nearest_size(answers: Tensor, candidates: Tensor) -> Tensor:
    """The candidate nearest to each answer, the smaller one of two: int64, of the answers' shape."""
    return candidates[(answers[..., None] - candidates).abs().argmin(-1)]


def dsire(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """The paper's predictor: one 1-NN per voter, fitted on the training models, and the majority of their votes."""
    return [majority(votes) for votes in votes_of(spectra, splits)]


def dsire_average(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """The same voters, but the average of what they name."""
    return [average(votes) for votes in votes_of(spectra, splits)]


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
    x, sizes = spectra.values.cpu().numpy(), spectra.sizes

    def vote(split: Split) -> Prediction:
        train, test, known = split.train.numpy(), split.test.numpy(), sizes[split.train]
        answers = [new_estimator().fit(its[train], known.numpy()).predict(its[test]) for its in x]
        candidates = known.unique()
        return majority(Votes(nearest_size(torch.tensor(np.stack(answers)), candidates), candidates))

    try:
        with one_thread_each():
            return [vote(split) for split in splits]
    except (ValueError, IndexError) as error:
        raise DsireError(
            f"ridge or gda needs more models to train on, --train_size or labelled: {shown(error)}"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Beyond the paper: one regression from all log spectra to log n

PENALTIES = tuple(10 ** (power / 2) for power in range(-8, 5))  # to choose from


def log_ridge(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """One ridge regression from all log spectra to log n; answers the training size nearest in log.

    Singular values shrink roughly as a power of n, so their logarithms are near linear in log n, in every voter; and a
    regression knows what a classifier does not, that 4 lies between 3 and 5. The penalty is the one that predicts best
    when the training micro-datasets are left out in turn: nothing is chosen on test models. Of several recipes, a line
    through all of them is mixed with a local one (`LogRidge.fit`). The shares are those of a
    normal distribution about the answer, as wide as the errors on what was left out.
    """
    with one_thread_each():
        fits = [LogRidge.fit(spectra.of_models(split.train), spectra.of_models(split.test)) for split in splits]
    return [fit.prediction(fit.answers) for fit in fits]


def log_regression(spectra: Spectra, splits: list[Split]) -> list[Prediction]:
    """The regression of `log_ridge`, but its answer can be any whole number, also one between the training sizes."""
    return [unrounded(prediction) for prediction in log_ridge(spectra, splits)]


def unrounded(prediction: Prediction) -> Prediction:
    assert prediction.answers is not None
    return replace(prediction, sizes=prediction.answers.round().long())


@dataclass(frozen=True)
class LogRidge:
    """A fitted `log_ridge`: what it says of new models, and what it would say with a unit left out.

    Attributes:
        candidates: the training sizes in rising order, int64 [sizes].
        answers: log n of the new models, float64 [new].
        held_out: log n of each training model, fitted without its unit, float64 [models].
        turns: log n of the new models, fitted without what is left out at each turn, float64 [new, turns].
        deviation: the standard deviation of what `held_out` errs by.
    """

    candidates: Tensor
    answers: Tensor
    held_out: Tensor
    turns: Tensor
    deviation: float

    @classmethod
    def fit(cls, train: Spectra, new: Spectra, units: Tensor | None = None) -> LogRidge:
        """Fit on the training models, without fitting anew what is left out (`left_out_ridge`).

        A recipe moves all norms, so that one line through several recipes fits none. Of several recipes, models weigh
        the less for each other the farther they are apart (`recipe_distances`): 1 + kernel is divided by 1 + (d / 8)²,
        so that neighbouring sizes and recipes speak for each other, and far ones still a little. What is far from all
        labelled models, of a recipe that nobody labelled, is better told by the one line: that answer counts, in place
        of the local one, with (d / 5)² to 1 for a distance d from the nearest.

        How features are standardised, the penalty and the distances are those of all models, whatever is left out: but
        for these, models that are left out are like new ones.

        Args:
            units: what is left out in turn (`turns_of`), int64 [models]; by default micro-datasets, or models if there
                is but one.
        """
        x, z = log_features(train, new)
        y, candidates = train.sizes.double().log(), train.sizes.unique()
        groups = train.micro_datasets if units is None else units
        groups = groups if len(groups.unique()) > 1 else torch.arange(len(y))
        if len(y) == 1:
            return cls(candidates, y.expand(len(z)), y, y.expand(len(z), 1), 1.0)
        at, out = turns_of(train, groups)
        folds = [(mask.nonzero().flatten(), at[mask] == turn) for turn, mask in enumerate(out)]
        kernel, cross = x @ x.T / x.shape[1], z @ x.T / x.shape[1]
        found = left_out_ridge(kernel, cross, y, folds)
        if train.of_recipe.any():
            among, between = recipe_distances(x, z, train, new)
            local = left_out_ridge((1 + kernel) / (1 + among / 8**2), (1 + cross) / (1 + between / 8**2), y, folds)
            trust = [between.amin(1), torch.empty_like(y), torch.empty(len(z), len(folds), dtype=y.dtype)]
            for turn, rest in enumerate(~out):
                trust[1][at == turn] = among[at == turn][:, rest].amin(1)
                trust[2][:, turn] = between[:, rest].amin(1)
            weights = [1 / (1 + nearest / 5**2) for nearest in trust]
            found = [its + t * (other - its) for its, other, t in zip(found, local, weights, strict=True)]
        answers, held_out, turns = found
        return cls(candidates, answers, held_out, turns, float((y - held_out).square().mean().sqrt()))

    def prediction(self, answers: Tensor) -> Prediction:
        """The training sizes nearest to answers, log n of any shape; in images up to four times beyond those sizes."""
        sizes = self.candidates.double().log()
        shares = torch.softmax(-((answers[..., None] - sizes) / max(self.deviation, 1e-9)).square() / 2, dim=-1)
        images = answers.clamp(float(sizes[0]) - math.log(4), float(sizes[-1]) + math.log(4)).exp().clamp_min(1)
        return Prediction(self.candidates[shares.argmax(-1)], self.candidates, shares, images)


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


class Turns(NamedTuple):
    """The turn at which each model is judged, int64 [models], and what is left out at each, bool [turns, models]."""

    at: Tensor
    out: Tensor


def turns_of(fitted: Spectra, units: Tensor) -> Turns:
    """Turns at which a unit of models is left out, and with it all models of a micro-dataset that is judged then.

    A recipe is left out together with what other recipes have of the same images: a new file's images are in none. Only
    where that would leave no model is the unit left out alone.

    Args:
        units: the unit of each model, such as `micro_datasets` or `of_recipe`, int64 [models].
    """
    pairs, at = torch.stack([units, fitted.micro_datasets], dim=1).unique(dim=0, return_inverse=True)
    of_unit = pairs[:, :1] == units
    out = of_unit | (pairs[:, 1:] == fitted.micro_datasets)
    nothing_left = out.all(1)
    out[nothing_left] = of_unit[nothing_left]
    return Turns(at, out)


def left_out_ridge(kernel: Tensor, cross: Tensor, y: Tensor, folds: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """A ridge regression on y with an intercept, and what it would say with each fold left out, in closed form.

    With the hat matrix H (fitted values H y) and a fold f, the models of f are missed by (I - H_ff)^-1 (y - H y)_f when
    f is left out. A fit isn't changed by models that lie on it: so with f left out, new models are answered as if y_f
    had been what is said of f. The penalty is the one with the least errors on what is left out.

    Args:
        kernel: of the models, [models, models].
        cross: theirs with new ones, [new, models].
        folds: the numbers of the models that are left out at a time, and a mask of those of them that are judged then.

    Returns:
        The answers for new models, [new]; for each model without its fold, [models]; for new models without each fold,
        [new, folds].
    """
    of_model = kernel.mean(0)
    cross = cross - of_model
    cross = cross - cross.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(kernel - of_model - of_model[:, None] + of_model.mean())
    values = values.clamp_min(0)

    def missed_by(penalty: float) -> tuple[Tensor, list[Tensor]]:
        """By what each model is missed when it is judged, and the models of each fold."""
        hat = (vectors * (values / (values + penalty))) @ vectors.T + 1 / len(y)
        residuals, errors, of_folds = y - hat @ y, torch.empty_like(y), []
        for fold, judged in folds:
            rest = torch.eye(len(fold), dtype=y.dtype) - hat[fold][:, fold]
            of_folds.append(torch.linalg.solve(rest, residuals[fold]))
            errors[fold[judged]] = of_folds[-1][judged]
        return errors, of_folds

    _, penalty = min((float(missed_by(penalty)[0].square().mean()), penalty) for penalty in PENALTIES)
    errors, of_folds = missed_by(penalty)
    weights = (cross @ vectors / (values + penalty)) @ vectors.T + 1 / len(y)  # H for new models
    answers = weights @ y
    turns = [answers - weights[:, fold] @ missed for (fold, _), missed in zip(folds, of_folds, strict=True)]
    return [answers, y - errors, torch.stack(turns, dim=1)]


def recipe_distances(x: Tensor, z: Tensor, train: Spectra, new: Spectra) -> tuple[Tensor, Tensor]:
    """How far models are from training models in what recipes change, in squares of the spread within recipe and size.

    That is four numbers: the `mean_over_layers` of their `log_norms`, and the first two principal components of the
    features' means by recipe and size.

    Args:
        x: features of the training models, [models, features].
        z: features of the new models, [new, features].

    Returns:
        Squared Mahalanobis distances [models, models] and [new, models].
    """
    means, _ = means_by_group(x, train.groups)
    components = torch.linalg.svd(means - means.mean(0), full_matrices=False).Vh[:2].T
    known, asked = (
        torch.cat([features @ components, mean_over_layers(log_norms(spectra), spectra.kinds)], dim=1)
        for features, spectra in ((x, train), (z, new))
    )
    scale = known.std(0).clamp_min(1e-6)  # less is rounding
    known, asked = known / scale, asked / scale
    inverse = torch.linalg.inv(spread_within(known, train.groups))

    def apart(place: Tensor) -> Tensor:
        differences = place[:, None] - known
        return torch.einsum("nmi,ij,nmj->nm", differences, inverse, differences)

    return apart(known), apart(asked)


def log_norms(spectra: Spectra) -> Tensor:
    """The logarithm of the Frobenius norm of each model's matrices, float64 [models, voters], on the CPU."""
    values = spectra.values.cpu()
    largest = values.amax(-1).clamp_min(torch.finfo(torch.float64).tiny)  # a square of it may be out of range
    norms: Tensor = torch.linalg.vector_norm(values / largest[..., None], dim=-1).clamp_min(1e-9)
    return (largest.log() + norms.log()).T


def mean_over_layers(norms: Tensor, kinds: dict[str, Tensor]) -> Tensor:
    """The means of log norms of A and of B (of BA too, or alone, where those do not vote): [models, 2 or 1]."""
    return torch.stack([norms[:, kind].mean(1) for kind in [*kinds.values()][:2]], dim=1)


def means_by_group(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The means of x [models, p] in groups 0, 1, ...: [groups, p], and how many models each has: [groups, 1]."""
    members = torch.nn.functional.one_hot(groups).double()
    count = members.sum(0)[:, None]
    return members.T @ x / count, count


def spread_within(x: Tensor, groups: Tensor) -> Tensor:
    """The covariance of columns [models, p] within groups 0, 1, ..., one for all groups: [p, p], never singular.

    Where groups are as good as single models nothing is known of it. So as much as four models say is said beforehand:
    the spread within groups is a fifth of that of all.
    """
    residuals = x - means_by_group(x, groups)[0][groups]
    of_all, degrees = x - x.mean(0), len(x) - len(groups.unique())
    before = of_all.T @ of_all / max(1, len(x) - 1) / 5**2
    covariance = (residuals.T @ residuals + 4 * before) / (degrees + 4)
    return covariance + (1e-6 * covariance.trace() + 1e-18) * torch.eye(x.shape[1], dtype=torch.float64)


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
        raise DsireError(
            f"--train_size={train_size} needs {train_size + 1} micro-datasets or more, and there are {count}: {works}"
        )
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


# ---------------------------------------------------------------------------------------------------------------------
# How sure: what is said of labelled models that were left out, beside a new model


NOT_COMPARABLE = 0.05  # p-values of the check up to this are said first
FEWEST_COMPARED = round(1 / NOT_COMPARABLE) - 1  # of fewer left-out models no p is so small
FAR_BEYOND = 2  # norms beyond all labelled models' by this factor are said first whatever p is
REASONS = "another recipe, another base of the same shape, or a size beyond the labelled ones"
UNTRAINED = "untrained: the change of the weights is zero in every layer, an estimate means nothing"


@dataclass(frozen=True)
class Estimate:
    """What is said of one LoRA file.

    Attributes:
        file: as the user named it.
        predictor: which one says it.
        estimate: the dataset size n.
        votes: size -> its share of the votes, or the weight that a regression gives it.
        alike: [lowest share, highest share, how many labelled models had a winning share like this one when they were
            left out, how many of them were right]; empty where nothing can be left out.
        confidence_set: the conformal prediction set, sizes in rising order, or of `log-regression` the ends of an
            interval in images; empty where nothing can be left out.
        recipe_p: the p-value of the file's being one more of the labelled kind; 1 where nothing can be left out.
        recipe: the labelled recipe that the file is nearest to, "" if there is one only.
        stated_size: what the file says of itself, 0 if nothing.
        first: what the reader has to know before the estimate; it is no estimate then, but what it would be.
        warnings: what else is to be said.
    """

    file: str
    predictor: str
    estimate: int
    votes: dict[int, float]
    alike: list[float]
    confidence_set: list[int]
    recipe_p: float
    recipe: str
    stated_size: int
    first: list[str]
    warnings: list[str]

    def holds(self, size: int) -> bool:
        """Whether the confidence set, or the interval, has a size."""
        ends = self.confidence_set
        between = self.predictor == "log-regression" and bool(ends) and ends[0] <= size <= ends[-1]
        return between or size in ends


@dataclass(frozen=True)
class LeftOut:
    """What a predictor says of labelled models that were left out, unit by unit, and of new models beside.

    Attributes:
        held_out: the prediction of each labelled model, by a fit without its unit.
        true: how well its true size conforms to that, float64 [models].
        candidates: sizes that a new model may have, int64 [sizes].
        turns: how well each of them conforms for each new model, by each fit: float64 [turns, new, sizes].
        at: at which of the turns each labelled model was left out, int64 [models].
    """

    held_out: Prediction
    true: Tensor
    candidates: Tensor
    turns: Tensor
    at: Tensor


def beside(fitted: Spectra, new: Spectra) -> tuple[Spectra, Split]:
    """Labelled and new models as one, and the split that trains on the former and asks for the latter."""
    values, sizes = torch.cat([fitted.values, new.values], dim=1), torch.cat([fitted.sizes, new.sizes])
    recipes = fitted.recipes + fitted.recipes[:1] * len(new.names)  # of new models nobody looks at it
    both = replace(fitted, values=values, sizes=sizes, names=[*fitted.names, *new.names], recipes=recipes)
    return both, Split(torch.arange(len(fitted.sizes)), torch.arange(len(fitted.sizes), len(sizes)))


def leave_out(fitted: Spectra, new: Spectra, predictor: Predictor, units: Tensor) -> tuple[Prediction, LeftOut]:
    """The predictor's answers for new models, fitted on all labelled ones, and with units left out by `turns_of`.

    A size conforms by its share of the votes, or, for a regression, by how near its logarithm is to the answer.

    Args:
        units: the unit of each labelled model, 0 to K - 1, int64 [models]; K is at least 2.
    """
    at, out = turns_of(fitted, units)
    if predictor in (log_ridge, log_regression):
        fit = LogRidge.fit(fitted, new, units)
        answer, held_out, sizes = fit.prediction(fit.answers), fit.prediction(fit.held_out), fit.candidates
        if predictor is log_regression:
            answer, held_out = unrounded(answer), unrounded(held_out)
            low, high = math.log(max(1, int(sizes[0]) / 4)), math.log(4 * int(sizes[-1]))
            sizes = torch.linspace(low, high, 2000, dtype=torch.float64).exp().round().long().unique()
        turns = -(sizes.double().log() - fit.turns.T[..., None]).abs()
        return answer, LeftOut(held_out, -(fitted.sizes.double().log() - fit.held_out).abs(), sizes, turns, at)
    both, every = beside(fitted, new)
    models, others = len(every.train), len(every.test)
    runs = [split_by(~mask) for mask in out]
    asked = [Split(run.train, torch.cat([run.test, every.test])) for run in runs]
    answer, *predictions = predictor(both, [every, *asked])
    sizes = answer.candidates
    shares, answers = torch.zeros(models, len(sizes), dtype=torch.float64), torch.zeros(models, dtype=torch.int64)
    turns = shares.new_zeros(len(runs), others, len(sizes))
    for number, (run, prediction, turn) in enumerate(zip(runs, predictions, turns, strict=True)):
        known = torch.isin(sizes, prediction.candidates)  # a size may be in one unit only
        judged = at[run.test] == number
        shares[run.test[judged, None], known.nonzero().T] = prediction.shares[:-others][judged]
        turn[:, known] = prediction.shares[-others:]
        answers[run.test[judged]] = prediction.sizes[:-others][judged]
    true = shares.gather(1, torch.searchsorted(sizes, fitted.sizes)[:, None]).flatten()
    return answer, LeftOut(Prediction(answers, sizes, shares), true, sizes, turns, at)


def conformal_p(sizes: Tensor, units: Tensor, left_out: LeftOut) -> Tensor:
    """The conformal p-value of each candidate size for each new model, float64 [new, candidates].

    Cross-conformal (Vovk 2015) over units as what is exchangeable (Lee, Barber and Willett 2023): micro-datasets or
    recipes. And label-conditional: a size n is compared with the left-out models of size n alone (of
    the nearest labelled size, for an n that is none). With s_i how well the true size of model i conforms when its unit
    k is left out, s_k(n) how well n conforms for the new model at that turn, and K_n the number of units that have a
    model of size n,
        p(n) = (1 + sum over those units of the mean over their models i of size n of [s_i <= s_k(n)]) / (K_n + 1).
    The set of sizes with p(n) > 1 - confidence then holds the true size with that confidence, for every size alike; the
    proof (of Barber et al. 2021, for each size) gives 1 - 2 (1 - confidence).

    Args:
        sizes: of the labelled models, int64 [models].
        units: the unit of each, int64 [models].
    """
    labelled = sizes.unique()
    compared_with: Tensor = (left_out.candidates.double().log()[:, None] - labelled.double().log()).abs().argmin(1)
    p = torch.ones(left_out.turns.shape[1:], dtype=torch.float64)
    for number, size in enumerate(labelled):
        models, columns = (sizes == size).nonzero().flatten(), compared_with == number
        _, its_unit, models_of_unit = units[models].unique(return_inverse=True, return_counts=True)
        strange = left_out.true[models, None, None] <= left_out.turns[:, :, columns][left_out.at[models]] + 1e-9
        weights = (1 / models_of_unit.double())[its_unit]
        p[:, columns] = (1 + torch.einsum("m,mnc->nc", weights, strange.double())) / (len(models_of_unit) + 1)
    return p


def models_alike(share: float, shares: Tensor, right: Tensor) -> list[float]:
    """The left-out models whose winning share is like this one: lowest, highest, how many, how many of them right.

    They are the nearest tenth (ten at least, and all that are as near), if they are within 0.1.

    Args:
        shares: the winning share of each left-out model, float64 [models].
        right: whether it was right, bool [models].
    """
    far = (shares - share).abs()
    tenth = min(len(far), max(10, len(far) // 10))
    alike = far <= min(float(far.sort().values[tenth - 1]), 0.1) + 1e-12
    if not alike.any():
        return [share, share, 0, 0]
    return [float(shares[alike].min()), float(shares[alike].max()), int(alike.sum()), int(right[alike].sum())]


class Check(NamedTuple):
    """Whether new models can be of a labelled recipe and size.

    Attributes:
        p: the p-value of a new model's being one more of the labelled, float64 [new].
        nearest: the number of a labelled model of the recipe and size that it is nearest to, int64 [new].
        compared: how many left-out models p comes from: it is 1 / (1 + compared) at least.
    """

    p: Tensor
    nearest: Tensor
    compared: int


def check_recipe(fitted: Spectra, new: Spectra, units: Tensor) -> Check:
    """Compare how far new models are from the nearest labelled recipe and size with how far labelled ones are.

    What a recipe changes in every layer alike shows in the mean over the layers of the log norms of A and of B: their
    chance differences average out, above all those of A's first weights. What is wrong in one kind of matrix alone
    (alpha is in BA only) or in one layer shows in the other columns of `distances_to_groups`. Each column is taken in
    units of its 90 % quantile for left-out models of that recipe and size, of which some scatter more than others, and
    the largest one counts, for new and for left-out models alike; so that
        p = (1 + how many left-out models are at least as far) / (1 + how many there are).

    Args:
        units: what is left out at a time, int64 [models].
    """
    known, asked = log_norms(fitted), log_norms(new)
    groups, kinds = fitted.groups, fitted.kinds
    far = torch.zeros(len(known), 1 + len(kinds), dtype=torch.float64)
    compared = torch.zeros(len(known), dtype=torch.bool)
    turns = []
    at, left_out = turns_of(fitted, units)
    for turn, rest in enumerate(~left_out):
        out = (at == turn) & torch.isin(groups, groups[rest])  # else there is nothing to compare it with
        if not out.any():
            continue
        columns, near = distances_to_groups(known[rest], groups[rest], torch.cat([known[out], asked]), kinds)
        far[out] = columns[: int(out.sum())]
        compared |= out
        turns.append((out, columns, near))
    at_least_as_far = torch.zeros(len(asked), dtype=torch.float64)
    for out, columns, near in turns:
        others = compared & ~out if (compared & ~out).any() else compared
        usual = far[others].quantile(0.9, dim=0).repeat(int(groups.max()) + 1, 1)
        for group in (groups[others].bincount() >= 5).nonzero().flatten():  # of fewer a quantile is chance
            usual[group] = far[others & (groups == group)].quantile(0.9, dim=0)
        most = (columns / usual[near]).amax(1)
        at_least_as_far += (most[: int(out.sum())] >= most[int(out.sum()) :, None]).sum(1)
    p = (1 + at_least_as_far) / (compared.sum() + 1)
    near = distances_to_groups(known, groups, asked, kinds)[1]
    return Check(p, torch.stack([(groups == group).nonzero()[0, 0] for group in near]), int(compared.sum()))


def distances_to_groups(
    known: Tensor, groups: Tensor, asked: Tensor, kinds: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """How far models are from the nearest group, in squares of its spread, and which group that is.

    The first column is the Mahalanobis distance of the means over layers of the log norms of A and B, with one
    covariance for all groups; by it a group is the nearest. The others are mean squared z-scores of the log norms of
    one kind of matrix, with the group's own variance, to which the pooled one is added as that of two more models.

    Args:
        known: log norms of the models of the groups, float64 [models, voters].
        groups: the group of each, int64 [models].
        asked: log norms of other models, [asked, voters].
        kinds: `Spectra.kinds` of the voters.

    Returns:
        Squared distances [asked, 1 + kinds], all above zero, and the nearest group, int64 [asked].
    """
    numbers, of_group = groups.unique(return_inverse=True)
    x, z = (mean_over_layers(side, kinds) for side in (known, asked))
    apart = z[:, None] - means_by_group(x, of_group)[0]
    of_means, near = torch.einsum("ngi,ij,ngj->ng", apart, torch.linalg.inv(spread_within(x, of_group)), apart).min(1)
    means, count = means_by_group(known, of_group)
    residuals = (known - means[of_group]).square()
    pooled = residuals.sum(0) / max(1, len(known) - len(numbers))
    variance = (count * means_by_group(residuals, of_group)[0] + 2 * pooled) / (count + 1)
    scores = (asked - means[near]).square() / variance[near].clamp_min(1e-12)  # less is rounding
    columns = torch.stack([of_means, *(scores[:, kind].mean(1) for kind in kinds.values())], dim=1)
    return columns.clamp_min(1e-3), numbers[near]


def what_is_beyond(fitted: Spectra, new: Spectra, factor: float) -> list[str]:
    """For each new model, in words, the kinds of matrix that are so many times beyond all labelled models', or ""."""
    known, asked = log_norms(fitted), log_norms(new)
    beyond = (asked - known.amax(0)).clamp_min(0) + (asked - known.amin(0)).clamp_max(0)  # signed; 0 within the range
    said = []
    for its in beyond:
        parts = {}
        for matrix, voters in fitted.kinds.items():
            layers = sorted(its[voters].tolist(), key=abs)
            usual, most = layers[3 * len(layers) // 4], int((its.abs() * voters).argmax())
            if abs(usual) > math.log(factor):  # in a quarter of the layers
                parts[matrix] = f"{matrix} is {times(usual)}"
            elif abs(float(its[most])) > 3:
                parts[matrix] = f"{matrix} of {shown(fitted.voters[most].layer)} is {times(float(its[most]))}"
        alpha = [*parts] == ["BA"] and len(fitted.kinds) == len(MATRICES)
        text = "; ".join(f"{part} as any labelled model's" for part in parts.values())
        said.append(text + (", A and B are not: another alpha?" if alpha else ""))
    return said


def times(log_factor: float) -> str:
    """A factor, given as its logarithm, in words."""
    if log_factor < -600:
        return "zero, not as large"
    return f"{math.exp(min(abs(log_factor), 700)):.3g} times as {'large' if log_factor > 0 else 'small'}"


def this_very_model(fitted: Spectra, values: Tensor) -> int | None:
    """The first labelled model whose spectra are a new one's [voters, r], each to a millionth of its norm."""
    far = torch.linalg.vector_norm(fitted.values - values[:, None], dim=-1)
    same = (far <= 1e-6 * torch.linalg.vector_norm(fitted.values, dim=-1)).all(0).nonzero()
    return int(same[0]) if len(same) else None


def estimates(
    fitted: Spectra, files: list[Spectra], predictor: str, confidence: float, leave_out_recipes: bool = False
) -> list[Estimate]:
    """Estimates for new models; how sure they are comes from leaving micro-datasets, or recipes, out.

    Args:
        fitted: the labelled models.
        files: the new models, one each, with the same voters.
        predictor: the name of one of PREDICTORS.
        confidence: the share of new models whose true size the set shall hold, between 0 and 1.
        leave_out_recipes: whether recipes are left out, and not micro-datasets.
    """
    units = fitted.of_recipe if leave_out_recipes else fitted.micro_datasets
    new = replace(
        files[0],
        values=torch.cat([file.values for file in files], dim=1).to(fitted.values.device),
        sizes=torch.cat([file.sizes for file in files]),
        names=[str(file.names[0]) for file in files],
        recipes=[],
    )
    labelled = replace(fitted, recipes=[]) if leave_out_recipes else fitted  # no model of its recipe is to be near it
    with one_thread_each():
        check = check_recipe(labelled, new, units) if units.any() else None
        found = estimates_on(fitted, new, predictor, confidence, units)
    compared = check.compared if check else 0
    beyond, far_beyond = (what_is_beyond(fitted, new, factor) for factor in (1.05, FAR_BEYOND))
    for row, file in enumerate(files):
        one, first, said = found[row], list(file.first), list(file.notes)
        same = this_very_model(fitted, new.values[:, row])
        if same is not None:
            label = f"{shown(fitted.names[same])} of {counted(int(fitted.sizes[same]), 'image')}"
            said.insert(0, f"this very model is among the labelled ones: {label}")
        stated = fitted.recipes_stated and not leave_out_recipes
        if stated and file.recipes and file.recipes[0] not in fitted.recipes:
            first.append(f"states a recipe that no labelled model has: {file.recipes[0]}")
        if check is None:
            said.append("one micro-dataset only: how sure the estimate is can't be told")
        else:
            one = replace(one, recipe_p=float(check.p[row]))
            if labelled.of_recipe.any():
                one = replace(one, recipe=fitted.recipes[int(check.nearest[row])])
        unlike = one.recipe_p <= NOT_COMPARABLE
        if (unlike or far_beyond[row]) and same is None and UNTRAINED not in first:
            how = f" (p = {one.recipe_p:.2g})" if unlike else ""
            first.append(f"not comparable with the labelled models{how}: {REASONS}")
            first.extend(filter(None, [beyond[row]]))
        elif check and compared < FEWEST_COMPARED:
            models = counted(compared, "labelled model")
            said.append(f"whether it is comparable can't be told by {models}: label {FEWEST_COMPARED} or more")
        if one.confidence_set and not one.holds(one.estimate):
            said.append("the set does not hold the estimate: trust the set")
        if one.stated_size and one.stated_size != one.estimate:
            said.append(f"the estimate disagrees with the size that the file states, {one.stated_size}")
        found[row] = replace(one, first=first, warnings=said)
    return found


def estimates_on(fitted: Spectra, new: Spectra, predictor: str, confidence: float, units: Tensor) -> list[Estimate]:
    """What a predictor, fitted on labelled models, says of new ones, and how sure that is where it can be told."""
    several, regression = bool(units.any()), predictor == "log-regression"
    if several:
        answer, left_out = leave_out(fitted, new, PREDICTORS[predictor], units)
        members = conformal_p(fitted.sizes, units, left_out) > 1 - confidence + 1e-9
        right = right_when_left_out(fitted.sizes, left_out, predictor, confidence)
    else:
        both, every = beside(fitted, new)
        (answer,) = PREDICTORS[predictor](both, [every])
    found = []
    for row, (size, shares) in enumerate(zip(answer.sizes.tolist(), answer.shares.tolist(), strict=True)):
        alike: list[float] = []
        held: list[int] = []
        if several:
            alike = models_alike(max(shares), left_out.held_out.shares.amax(1), right)
            held = left_out.candidates[members[row]].tolist()
            held = [held[0], held[-1]] if regression and held else held
        votes = dict(zip(answer.candidates.tolist(), shares, strict=True))
        stated = int(new.sizes[row])
        found.append(Estimate(new.names[row], predictor, size, votes, alike, held, 1.0, "", stated, [], []))
    return found


def right_when_left_out(sizes: Tensor, left_out: LeftOut, predictor: str, confidence: float) -> Tensor:
    """Whether each labelled model's prediction was right when it was left out, bool [models].

    For `log-regression`, whose answers are numbers of images, right is about what the interval would have held.
    """
    if predictor != "log-regression":
        return left_out.held_out.sizes == sizes
    alike = sizes[None] == sizes[:, None]
    at_least_as_strange = (left_out.true[None] <= left_out.true[:, None] + 1e-9) & alike
    return at_least_as_strange.sum(1).double() / alike.sum(1) > 1 - confidence + 1e-9


def what_can_be_supported(sizes: Tensor, units: Tensor, confidence: float, unit: str) -> list[str]:
    """A note if some size is in so few units that no set can leave it out."""
    counts = {int(size): len(units[sizes == size].unique()) for size in sizes.unique()}
    size, least = min(counts.items(), key=lambda item: item[1])
    needed = math.ceil(1 / (1 - confidence) - 1 - 1e-9)
    if least >= needed:
        return []
    most = f"{counted(least, unit)} with size {size} can support no more than {least / (least + 1):.0%}"
    return [f"{most}, so every set holds such sizes: label {needed} or more for {percent(confidence)}"]


# LoRA-WiSE's subsets by the width of the text that cross-attention looks at, and the rank
SUBSETS_THAT_FIT = {
    (768, 8): "low_8",
    (768, 16): "low_16 medium_16",
    (768, 32): "low_32 medium_32 high_32",
    (1024, 32): "medium_32_2",
}
SD_OF_WIDTH = {768: " (SD 1.5)", 1024: " (SD 2)", 2048: " (SDXL)"}


def matched(file: Spectra, fitted: Spectra) -> Spectra:
    """The file's model on the voters that it shares with the fitted ones; what doesn't fit is counted in its notes.

    Models of different methods share A and B, or the changes of the weights, with as many values as both have.

    Raises:
        DsireError: no layer fits; the message names layers of both, what the file states, and a subset that would fit.
    """
    of_both = fitted.shapes.keys() & file.shapes.keys()
    common = {layer for layer in of_both if same_shape(file.shapes[layer], fitted.shapes[layer])}
    notes, first = list(file.notes), list(file.first)
    if unlike := sorted(of_both - common):
        shapes = f"{file.shapes[unlike[0]]}, not {fitted.shapes[unlike[0]]}"
        notes.append(
            f"{len(unlike)} layers have other shapes [out, in, rank] than the labelled models', such as {unlike[0]}: "
            + shapes
        )
    for layers, what in (
        (fitted.shapes.keys() - of_both, f"of the {len(fitted.shapes)} fitted layers are not in the file"),
        (file.shapes.keys() - of_both, "layers of the file are unknown to the labelled models"),
    ):
        if layers:
            notes.append(f"{len(layers)} {what}, such as {three_of(layers)}")
    if not common:
        here, there = kind_of_model(file.shapes), kind_of_model(fitted.shapes)
        other = kinds_of_sd(file.shapes) - kinds_of_sd(fitted.shapes)
        fits = " ".join(SUBSETS_THAT_FIT[kind] for kind in other & SUBSETS_THAT_FIT.keys())
        advice = f"use --subset with one of: {fits}" if fits else "label models of its own kind (README, Your own LoRA)"
        kinds = f"; it has {here}, they have {there}" if here != there else ""
        why = "; ".join([f"no layer in common with the labelled models{kinds}: {advice}", *notes])
        raise DsireError(f"{file.names[0]} has {why}")
    known = {*file.voters}
    voters = [voter for voter in fitted.voters if voter.layer in common and voter in known]
    shared, rank = file.of_voters(voters), fitted.values.shape[-1]
    methods = f"it is a {file.method}, and each labelled model a {fitted.method}"
    if not voters:
        base = "" if "BA" in file.kinds else "; for the change of its weights, give the model it began as with --base"
        kinds = f"it has {' '.join(file.kinds)}, they have {' '.join(fitted.kinds)}"
        raise DsireError(f"{file.names[0]} has no matrix in common with the labelled models: {methods}; {kinds}{base}")
    if file.method not in fitted.method.split(" or "):
        rank = min(rank, file.values.shape[-1])
        first.append(f"another method: {methods}; compared by {' '.join(shared.kinds)}")
    if 2 * len(common) < len(fitted.shapes):
        share = f"{len(common)} of the {len(fitted.shapes)} fitted layers"
        first.append(f"only {share} are in the file with the same shape")
    return replace(shared, values=of_rank(shared.values, rank), notes=notes, first=first)


def same_shape(one: list[int], other: list[int]) -> bool:
    """Whether two layers are alike, [out, in, rank], or [out, in] where one of them has no A and B."""
    both = min(len(one), len(other))
    return both >= 2 and one[:both] == other[:both]


def three_of(layers: Iterable[str]) -> str:
    first = sorted(layers)
    return ", ".join(map(shown, first[:3])) + (", ..." if len(first) > 3 else "")


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


def by_train_size(spectra: Spectra, predictor: Predictor, protocol: Protocol) -> dict[str, list[Metrics]]:
    """The metrics with fewer micro-datasets to train on, up to as many as the protocol says (Figure 5)."""
    fewest = 2 if predictor is gda else 1  # a discriminant analysis needs more models than sizes
    counts = [n for n in (1, 2, 3, 5, 10) if fewest <= n < protocol.train_size] + [protocol.train_size]
    return {str(n): evaluate(spectra, predictor, protocol._replace(train_size=n)) for n in counts}


def by_size(spectra: Spectra, runs: list[Split], predictions: list[Prediction]) -> dict[str, list[Metrics]]:
    """The metrics of the test models of each dataset size."""
    rows: dict[str, list[Metrics]] = {}
    for size in spectra.sizes.unique().tolist():
        for run, prediction in zip(runs, predictions, strict=True):
            true = spectra.sizes[run.test]
            if size in true:
                rows.setdefault(str(size), []).append(metrics(true[true == size], prediction.sizes[true == size]))
    return rows


def without_sizes(spectra: Spectra, run: Split) -> dict[int, Split]:
    """For each size the split whose test models, all of that size, are to be told from training models of the others.

    Sizes of which the split tests no model, or trains on no other, are left out.
    """
    gaps = {}
    for size in spectra.sizes.unique().tolist():
        gap = Split(run.train[spectra.sizes[run.train] != size], run.test[spectra.sizes[run.test] == size])
        if len(gap.train) and len(gap.test):
            gaps[size] = gap
    return gaps


def unseen_sizes(spectra: Spectra, runs: list[Split]) -> dict[str, list[Metrics]]:
    """The metrics of each split's test models of sizes between two others, when their own size is not labelled.

    A classifier's best answer is a neighbouring size; a regression can name the size itself.
    """
    inner = spectra.sizes.unique()[1:-1]
    rows: dict[str, list[Metrics]] = {}
    for run in runs:
        gaps = [gap for size, gap in without_sizes(spectra, run).items() if size in inner]
        if gaps:
            true = spectra.sizes[torch.cat([gap.test for gap in gaps])]
            fits = log_ridge(spectra, gaps)
            found = {"dsire": dsire(spectra, gaps), "log-ridge": fits, "log-regression": map(unrounded, fits)}
            for name, predictions in found.items():
                rows.setdefault(name, []).append(metrics(true, torch.cat([its.sizes for its in predictions])))
    return rows


def flagged_if_unlabelled(spectra: Spectra, runs: list[Split]) -> dict[str, float]:
    """Of the test models of each size, the share said not to be comparable if their size is not labelled."""
    flagged: dict[int, list[Tensor]] = {}
    for run in runs:
        for size, gap in without_sizes(spectra, run).items():
            fitted, new = spectra.of_models(gap.train), spectra.of_models(gap.test)
            flagged.setdefault(size, []).append(check_recipe(fitted, new, fitted.micro_datasets).p <= NOT_COMPARABLE)
    return {str(size): float(torch.cat(its).double().mean()) for size, its in sorted(flagged.items())}


def by_block(spectra: Spectra, accuracies: Tensor) -> dict[str, float]:
    """The mean accuracy of the single voters in each block of the network, and of each kind of matrix."""
    groups: dict[str, list[float]] = {}
    for voter, accuracy in zip(spectra.voters, accuracies.tolist(), strict=True):
        block = re.match(r"(?:down|up)_blocks_\d+|mid_block|text_encoder(?:_2)?", voter.layer)
        groups.setdefault(block[0] if block else "other layers", []).append(accuracy)
        groups.setdefault(f"matrix {voter.matrix}", []).append(accuracy)
    return {name: sum(values) / len(values) for name, values in groups.items()}


def how_sure(spectra: Spectra, split: Split, predictor: Predictor) -> Tensor:
    """What the estimates of a split's test models would be worth, fitted on its training models: float64 [test, 4].

    The columns: by how many images they err; whether the 90 % set holds the true size; how many sizes it has; and
    whether the model is said not to be comparable. NaN where one micro-dataset is all there is: none can be left out.
    """
    fitted, new = spectra.of_models(split.train), spectra.of_models(split.test)
    units = fitted.micro_datasets
    if not units.any():
        return torch.full((len(split.test), 4), math.nan, dtype=torch.float64)
    answer, left_out = leave_out(fitted, new, predictor, units)
    members = conformal_p(fitted.sizes, units, left_out) > 0.1 + 1e-9
    held = (members & (left_out.candidates == new.sizes[:, None])).any(1)
    flagged = check_recipe(fitted, new, units).p <= NOT_COMPARABLE
    return torch.stack([(answer.sizes - new.sizes).abs(), held, members.sum(1), flagged], dim=1).double()


def how_sure_by_size(spectra: Spectra, runs: list[Split], predictor: Predictor) -> dict[str, list[float]]:
    """The means of `how_sure` over the test models of each size, and over "all"."""
    found = torch.cat([how_sure(spectra, run, predictor) for run in runs])
    true = spectra.sizes[torch.cat([run.test for run in runs])]
    tables = {str(size): found[true == size] for size in spectra.sizes.unique().tolist()} | {"all": found}
    return {size: table.mean(0).tolist() for size, table in tables.items()}


def by_recipe(spectra: Spectra, runs: list[Split]) -> dict[str, Tensor]:
    """`how_sure` log-ridge is of each recipe's test models, mean over runs, by which recipes are labelled.

    Returns:
        "seen": all recipes are labelled, [recipes, 4]; "unseen": all but the one that is asked, [recipes, 4]; "pairs":
        one recipe alone, [recipes labelled, recipes asked, 4].
    """
    recipes = [spectra.of_recipe == number for number in range(int(spectra.of_recipe.max()) + 1)]

    def asked(run: Split, labelled: Tensor) -> Tensor:
        """[recipes, 4] with these training models, a mask, of those that the run has; NaN where nothing can be told."""
        found = how_sure(spectra, Split(run.train[labelled[run.train]], run.test), log_ridge)
        return torch.stack([found[its[run.test]].mean(0) for its in recipes])

    tables = {
        "seen": [asked(run, spectra.of_recipe >= 0) for run in runs],
        "unseen": [torch.stack([asked(run, ~its)[number] for number, its in enumerate(recipes)]) for run in runs],
        "pairs": [torch.stack([asked(run, its) for its in recipes]) for run in runs],
    }
    return {name: torch.stack(its).nanmean(0) for name, its in tables.items()}


class Comparison(NamedTuple):
    """All that `--compare` finds, on the same splits.

    Attributes:
        tables: title -> row -> metrics; the first table, "compare", has all predictors and kinds of matrices.
        accuracies: of each voter alone, in %, mean over the experiments: float64 [voters].
        sure: predictor -> `how_sure_by_size`.
        unlabelled: `flagged_if_unlabelled`.
        recipes: `by_recipe`; empty where there is one recipe.
    """

    tables: dict[str, dict[str, list[Metrics]]]
    accuracies: Tensor
    sure: dict[str, dict[str, list[float]]]
    unlabelled: dict[str, float]
    recipes: dict[str, Tensor]


def compare(spectra: Spectra, protocol: Protocol) -> Comparison:
    """Every predictor and kind of matrix (Tables 2, 5 and 9), by size, training micro-datasets, voter and recipe."""
    from tqdm import tqdm

    runs = splits(spectra.micro_datasets, protocol)
    with one_thread_each(), tqdm(total=len(PREDICTORS) + 2, unit="predictor", disable=None) as progress:

        def done(found: T) -> T:
            progress.update()
            return found

        votes, fits = done(votes_of(spectra, runs)), done(log_ridge(spectra, runs))
        found = {
            "dsire": [*map(majority, votes)],
            "dsire-average": [*map(average, votes)],
            "log-ridge": fits,
            "log-regression": [*map(unrounded, fits)],
        }
        found = {name: found.get(name) or done(predictor(spectra, runs)) for name, predictor in PREDICTORS.items()}
        for matrix, its in spectra.kinds.items() if len(spectra.kinds) > 1 else []:
            found[f"dsire {matrix}"] = [majority(Votes(named[its], sizes)) for named, sizes in votes]
        tables = {
            "compare": {name: judge(spectra, runs, its) for name, its in found.items()},
            "by_train_size": by_train_size(spectra, dsire, protocol),
            "by_size": by_size(spectra, runs, found["dsire"]),
            "unseen_sizes": unseen_sizes(spectra, runs),
        }
        hits = [
            (named == spectra.sizes[run.test]).double().mean(1) for (named, _), run in zip(votes, runs, strict=True)
        ]
        sure = {name: done(how_sure_by_size(spectra, runs, PREDICTORS[name])) for name in ("dsire", "log-ridge")}
        unlabelled = done(flagged_if_unlabelled(spectra, runs))
        recipes = done(by_recipe(spectra, runs) if spectra.of_recipe.any() else {})
    return Comparison(tables, 100 * torch.stack(hits).mean(0), sure, unlabelled, recipes)


# ---------------------------------------------------------------------------------------------------------------------
# The names of LoRA matrices, whoever wrote them

SHORT = r"(?![\s\S]{1001})"  # no layer's path is longer; to match such a key could take for ever
# What stands after a layer's path. LoRA-WiSE and old diffusers: .lora.down.weight and .processor.to_q_lora.down.weight;
# XLabs: .processor.qkv_lora1.down.weight; kohya and LyCORIS: .lora_down.weight; cloneofsimo: unet:0:down;
# PEFT: .lora_A.weight and .lora_A.<adapter>.weight; loralib: .lora_A; torchtune: .lora_a.weight; MLX: .lora_a.
MATRIX_KEY = re.compile(
    SHORT + r"(?P<layer>.+?)(?:[._]lora(?:_linear_layer)?(?P<stream>[12]?)[._](?P<word>down|up|mid)(?:\.weight)?"
    r"|:(?P<numbered>down|up)"
    r"|\.lora_(?:embedding_)?(?P<letter>[ABab])(?:\.(?!weight|bias)[^.]+)?(?:\.weight)?"
    r"|\.(?P<alpha>alpha)"
    r"|\.(?P<magnitude>(?:dora_scale|lora_magnitude_vector|magnitude)(?:\.[^.]+)*|m)"
    r"|\.(?P<factor>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.(?!weight)[^.]+)?(?:\.weight)?)"
)
MATRIX_OF_WORD = {"down": "A", "a": "A", "up": "B", "b": "B"}
# A matrix of a full model; embeddings are left out, and what turns out to have one dimension (norms).
WEIGHT_KEY = re.compile(
    SHORT + r"(.+)(?<!embedding)(?<!embeddings)(?<!wte)(?<!wpe)(?<!\bshared)(?<!embed_tokens)[._]weight"
)
# What stands before it: wrappers, anywhere; then names of the main network, and of containers that it was saved in.
WRAPPER = re.compile(r"_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module)[._]")
NETWORK = re.compile(
    r"(?:(?:base_model\.model|model|module|net|pipe|dit|unet|transformer|diffusion_model|\w*state_dict|params|lora)\."
    r"|unet:|lora_(?:prior_)?unet_|lora_transformer_|lycoris_)+"
)
# Any other network: a text encoder, whose number may be a letter (CLIP-L is the first one), or a second transformer.
OTHER_NETWORK = re.compile(
    r"(?:lora_(?:prior_)?te|text_encoder_?|(?:text_encoders\.)?clip_|text_encoders\.(?=t5)|conditioner\.embedders\.(?=0)"
    r"|cond_stage_model)(?P<text>t5xxl|[0-9lg]?)[._:](?:transformer\.)?|(?P<main>transformer_\d)\."
)
TEXT_ENCODERS = {"0": "", "1": "", "l": "", "g": "2", "t5xxl": "3"}
# LDM's names of what a U-Net of SD and SDXL has, and diffusers' names: within a resnet, and outside of the blocks.
LDM_RESNET = {
    **{"in_layers_0": "norm1", "in_layers_2": "conv1", "out_layers_0": "norm2", "out_layers_3": "conv2"},
    **{"emb_layers_1": "time_emb_proj", "skip_connection": "conv_shortcut"},
}
LDM_OUTSIDE = {
    **{"input_blocks_0_0": "conv_in", "out_2": "conv_out"},
    **{"time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2"},
    **{"label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2"},
}
MERGE_IT = ", whose change of the weights is not read here: merge it into its model, and judge that with --base"
OTHER_METHODS = {
    "(IA)3": r"\.ia3_l|\.on_input$",
    "VeRA": r"\.vera_|^vera_",
    "AdaLoRA": r"\.lora_E$|\.lora_E\.",
    "KaSA": r"\.lora_diag\b",
    "OFT or BOFT": r"\.b?oft_",
    "HRA, Bone, VB-LoRA, FourierFT or other": r"\.(?:hra|bone|miss|vblora|randlora|fourierft|waveft|c3a|road)_",
    "stacked experts' (target_parameters)": r"\.(?:experts|base_layer)\.lora_[AB]\b",
}


Keys = dict[str, dict[str, str]]  # layer -> {"A": key, "B": key, and perhaps others}
Settings = dict[str, dict[str, Any]]  # of each network (as `in_network` calls it), in PEFT's words


def in_network(path: str) -> tuple[str, str]:
    """The network of a layer and its path inside; "" is the main one, others are "text_encoder_2_" and the like."""
    path = WRAPPER.sub("", path)
    main = NETWORK.match(path)
    path = path[main.end() :] if main else path
    other = OTHER_NETWORK.match(path)
    if not other:
        return "", path
    number = TEXT_ENCODERS.get(other["text"], other["text"])
    network = other["main"] or f"text_encoder_{number}".removesuffix("_")
    return f"{network}_", path[other.end() :]


def layer_name(path: str) -> str:
    """One name for a layer, whatever prefix and separators its writer gave it, in the words of diffusers.

    >>> layer_name("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0")
    'down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0'
    >>> layer_name("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0")
    'down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0'
    """
    network, path = in_network(path)
    name = path.replace(".processor.", ".").replace(".", "_").removeprefix("text_model_")  # CLIP has it or not
    name += "_0" if name.endswith("_to_out") else ""  # old attention processors leave the 0 out
    if xlabs := re.fullmatch(r"(double_blocks_\d+)_(qkv|proj)([12])", name):  # of the image's stream and the text's
        name = f"{xlabs[1]}_{'img' if xlabs[3] == '1' else 'txt'}_attn_{xlabs[2]}"
    return network + (name if network else ldm_in_diffusers(name))


def ldm_in_diffusers(name: str) -> str:
    """LDM's name of a U-Net's layer as diffusers has it; any other name as it is.

    LDM counts the parts of all blocks in one row. SD 1.5, SD 2 and SDXL have two resnets in a down block and three in
    an up block, each with or without attention, and the third part of a down block is its sampler: three parts a block.
    """
    if middle := re.fullmatch(r"middle_block_([012])_(.+)", name):  # resnet, attention, resnet
        place = ("resnets_0", "attentions_0", "resnets_1")[int(middle[1])]
        return f"mid_block_{place}_{LDM_RESNET.get(middle[2], middle[2])}"
    match = re.fullmatch(r"(input|output)_blocks_([0-9]{1,3})_([0-9])_(.+)", name)
    if not match:
        return LDM_OUTSIDE.get(name, name)
    side = "down" if match[1] == "input" else "up"
    block, index = divmod(int(match[2]) - (side == "down"), 3)
    if match[4] in ("op", "conv"):
        return f"{side}_blocks_{block}_{side}samplers_0_conv"
    kind = "attentions" if match[3] == "1" else "resnets"
    return f"{side}_blocks_{block}_{kind}_{index}_{LDM_RESNET.get(match[4], match[4])}"


def lora_layers(keys: Iterable[str], file: str, strays: bool = False) -> tuple[Keys, list[str], list[str]]:
    """Layer -> {"A": key, "B": key, perhaps "mid", "alpha", "magnitude"} in the keys' order; other keys; and strays.

    Of LoHa and LoKr the parts are called as LyCORIS does it, such as "hada_w1_a".

    Args:
        strays: whether layers with one of A and B only, fewer than the whole ones, may be there.

    Raises:
        DsireError: another method than LoRA, the same matrix twice, a layer with one of A and B only, or no layer.
    """
    found: Keys = {}
    others = []
    for key in keys:
        if method := next((method for method, pattern in OTHER_METHODS.items() if re.search(pattern, key)), ""):
            raise DsireError(f"{file}: these are {method} weights ({shown(key)}){MERGE_IT}")
        match = MATRIX_KEY.fullmatch(key)
        if not match:
            others.append(key)
            continue
        part = match[match.lastgroup or 0].lower()
        matrix = "magnitude" if match["magnitude"] else MATRIX_OF_WORD.get(part, part)
        pair = found.setdefault(layer_name(match["layer"] + (match["stream"] or "")), {})
        if matrix in pair:
            raise DsireError(f"{file}: {shown(key)} is the same matrix as {shown(pair[matrix])}")
        pair[matrix] = key
    layers = {layer: pair for layer, pair in found.items() if method_of(pair)}
    partial = [pair for layer, pair in found.items() if layer not in layers]
    lone = [key for pair in partial for key in pair.values()]
    if len(partial) > (len(layers) if strays else 0):
        lacking = "B (up)" if "A" in partial[0] else "A (down)" if "B" in partial[0] else "A and B, or another part,"
        raise DsireError(f"{file}: {shown(lone[0])} has no partner: the layer's {lacking} is missing")
    of_lora = [key for key in others if re.match(SHORT + r"(?i:.*lora(?!.*bias$))", key)]
    if unknown := [key for key in of_lora if ".lora_" in key or not layers]:
        raise DsireError(f"{file}: {shown(unknown[0])} is not known here, so that A and B may mean another thing")
    if not layers:
        full = "a full checkpoint, not a LoRA: give the model that it was fine-tuned from with --base"
        what = f"{file} holds no LoRA layers (such as <layer>.lora.down.weight and .up.weight)"
        raise NoLora(f"{what}: it is {full if others else 'empty'}")
    return layers, others, lone


def method_of(parts: Iterable[str]) -> str:
    """What a layer with such parts is of: "LoRA", "DoRA", "LoHa" or "LoKr"; "" if a part is missing."""
    has = set(parts)
    if {"A", "B"} <= has:
        return "DoRA" if "magnitude" in has else "LoRA"
    if {f"hada_w{number}_{side}" for number in (1, 2) for side in "ab"} <= has:
        return "LoHa"
    whole = all(name in has or {f"{name}_a", f"{name}_b"} <= has for name in ("lokr_w1", "lokr_w2"))
    return "LoKr" if whole else ""


def weight_matrices(keys: Iterable[str], file: str, network: str = "") -> dict[str, str]:
    """Layer -> key of the weights of a full model, or of a part of one that is called `network`."""
    found: dict[str, str] = {}
    for key in keys:
        if match := WEIGHT_KEY.fullmatch(key):
            layer = layer_name(network + match[1])
            if layer in found:
                raise DsireError(f"{file}: {shown(key)} is the same layer as {shown(found[layer])}")
            found[layer] = key
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Weights in parquet: the layout of LoRA-WiSE


def in_column(file: str, name: str, what: str) -> DsireError:
    return DsireError(f"{file}: column {shown(name)} {what}")


def matrix_values(column: Any, name: str, rank: int, file: str) -> Tensor:
    """The lists of one column as a batch [models, numbers of a matrix], float64; lists of lists are flattened.

    Raises:
        DsireError: not lists of floating point numbers, nulls, lengths that differ or that do not fit the rank.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kinds = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)
    values = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    nulls = 0
    shape: list[int] = []  # several numbers where the column's type tells the shape of the matrix
    while isinstance(values, pa.ExtensionArray) or isinstance(values.type, kinds):
        if isinstance(values, pa.ExtensionArray):
            shape += getattr(values.type, "shape", ())
            values = values.storage
            continue
        nulls += values.null_count
        bounds = pc.min_max(pc.list_value_length(values)).as_py()
        if bounds["min"] != bounds["max"]:
            raise in_column(file, name, f"has lists of {bounds['min']} and of {bounds['max']}; all must be alike")
        shape.append(bounds["max"] or 0)
        values = values.flatten()
    alpha = name.endswith(".alpha")  # also a whole number, and not in a list
    real = pa.types.is_floating(values.type) or (alpha and pa.types.is_integer(values.type))
    if not real or not (alpha or isinstance(column.type, (*kinds, pa.BaseExtensionType))):
        raise in_column(file, name, f"holds {column.type}, not lists of floating point numbers")
    if nulls + values.null_count:
        raise in_column(file, name, f"has {nulls + values.null_count} nulls: a matrix is missing")
    length = len(values) // len(column)
    if alpha and length != 1:
        raise in_column(file, name, f"has {length} numbers a row; alpha is one")
    if not alpha and (length == 0 or length % rank or (len(shape) > 1 and rank not in shape)):
        numbers_of = " x ".join(map(str, shape[:2]))
        raise in_column(file, name, f"has {numbers_of} numbers a row, which --rank={rank} does not fit")
    numbers: Tensor = torch.utils.dlpack.from_dlpack(values)
    return numbers.to(torch.float64).view(-1, length)


def dataset_size(label: Any) -> int:
    """The number of images that a label says, as a number of any kind or in digits; 0 if it says none from 1 up."""
    if isinstance(label, str) and re.fullmatch(r"\s*[0-9]{1,16}(\.0*)?\s*", label):
        label = Decimal(label.strip())
    number = isinstance(label, (int, float, Decimal)) and not isinstance(label, bool)
    return int(label) if number and 1 <= label < 2**53 and label == int(label) else 0


def class_names(schema: Any, column: str, of_readme: str) -> list[str]:
    """What the numbers of a column stand for, if `datasets` wrote it as a ClassLabel, or the README says so; or []."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        names = json.loads(of_readme or "{}").get(column, [])
    return [str(name) for name in names]


LABELS = ("label", "name", "recipe")  # the columns about a model


def model_labels(table: Any, file: str, classes_of_readme: str = "") -> tuple[Tensor, list[Any], list[str]]:
    """The columns `label` (size n), `name` (micro-dataset) and, where there is one, `recipe` of a shard.

    Of a ClassLabel they are the names of its classes.

    Raises:
        DsireError: a column is missing, has nulls, or does not hold sizes from 1 up and names.
    """
    there = Counter(table.column_names)
    if wrong := [column for column in LABELS if there[column] > 1 or (not there[column] and column != "recipe")]:
        need = "there must be one `label` and one `name`, and there may be one `recipe`"
        raise DsireError(f"{file}: column {' and '.join(wrong)} is missing or there twice; {need}")
    found: dict[str, list[Any]] = {}
    for column in table.column_names:
        found[column] = table.column(column).to_pylist()
        if None in found[column]:
            raise in_column(file, column, "has nulls; every model needs its size and micro-dataset")
        classes = class_names(table.schema, column, classes_of_readme)
        if classes and {type(value) for value in found[column]} != {str}:  # not the names themselves
            if not all(type(number) is int and 0 <= number < len(classes) for number in found[column]):
                raise in_column(file, column, f"has numbers that are none of its {len(classes)} classes")
            found[column] = [classes[number] for number in found[column]]
    if not {type(name) for name in found["name"]} <= {int, str}:
        raise in_column(file, "name", f"holds {table.column('name').type}; it must hold strings or integers")
    sizes = [dataset_size(label) for label in found["label"]]
    if 0 in sizes:
        label = shown(repr(found["label"][sizes.index(0)]))
        raise in_column(file, "label", f"holds {label}; a dataset size is a whole number from 1 up")
    return torch.tensor(sizes), found["name"], [str(recipe) for recipe in found.get("recipe", [])]


def shard_spectra(path: Path, rank: int, device: str = "cpu", classes: str = "") -> Spectra:
    """The spectra of all models in one parquet shard, one layer at a time; `classes` is `Shard.classes`.

    The columns of a layer are ready batches of equal shapes, so that whole rows are never held.

    Raises:
        DsireError: the file can't be read, or a column doesn't fit; the message names it.
    """
    import pyarrow.parquet as pq

    with reading(path, "parquet"):
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata, columns = file.metadata, file.schema_arrow.names
            if not metadata.num_rows:
                raise DsireError(f"{path}: no rows; delete the file or fetch it anew")
            labels = file.read([name for name in LABELS if name in columns])
        sizes, names, recipes = model_labels(labels, path.name, classes)
        models = [f"model {shown(name)} of size {size}" for name, size in zip(names, sizes.tolist(), strict=True)]
        pairs, others, _ = lora_layers(columns, path.name)
        if unlike := next((pair for pair in pairs.values() if "A" not in pair), None):
            of_what = f"is of a {method_of(unlike)}, which is read from files only: put the models into a folder"
            raise in_column(path.name, next(iter(unlike.values())), of_what)
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        largest = 8 * max(sum(its.column(i).num_values for its in groups) for i in range(metadata.num_columns))

    def layer_of(pair: dict[str, str]) -> Layer:
        return pair_spectra(path, metadata, pair, rank, device, models)

    at_once = max(1, BYTES_AT_ONCE // (2 * largest))
    layers = dict(zip(pairs, in_parallel(layer_of, list(pairs.values()), at_once), strict=True))
    notes = []
    if unused := sorted(set(others) - {*LABELS}):
        notes.append(f"columns that are not LoRA weights, left out: {' '.join(map(shown, unused))}")
    return as_spectra(layers, sizes=sizes, names=names, notes=notes + about_layers(layers), recipes=recipes)


def pair_spectra(path: Path, metadata: Any, pair: dict[str, str], rank: int, device: str, models: list[str]) -> Layer:
    """One layer of all models in a parquet file of this metadata; `models` is what a message calls them.

    Raises:
        DsireError: the file can't be read, a column doesn't fit, or holds a weight that is not finite, of which the
            message names the model; or the device can't compute the spectra.
    """
    import pyarrow.parquet as pq

    columns, shard = {part: name for part, name in pair.items() if part != "magnitude"}, path.name
    with reading(path, "parquet"):
        with pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True) as file:  # each thread its own
            table = file.read([*columns.values()], use_threads=False)
        flat = {part: matrix_values(table.column(name), name, rank, shard) for part, name in columns.items()}
        a, b = flat["A"].view(len(table), rank, -1), flat["B"].view(len(table), -1, rank)
        if "mid" in flat and flat["mid"].shape[1] % rank**2:
            raise in_column(shard, pair["mid"], f"has {flat['mid'].shape[1]} numbers a row, not r x r x k")
    try:
        with computing(device, shard):
            if "mid" in flat:
                a = with_middle(a, flat["mid"].view(len(table), rank, rank, -1))
            spectra = dict(zip(MATRICES, batch_spectra(a, b, device), strict=True))
        if "alpha" in flat:
            spectra["BA"] *= flat["alpha"].abs() / rank
        if not all(its.isfinite().all() for its in spectra.values()):
            raise FloatingPointError
    except FloatingPointError:
        for part, name in columns.items():
            wrong = (~flat[part].isfinite()).any(1).nonzero()
            if len(wrong):
                its = models[int(wrong[0])]
                raise in_column(shard, name, f"holds a number that is NaN or infinite, of {its}") from None
        names = " and ".join(map(shown, columns.values()))
        raise DsireError(f"{shard}: columns {names} hold numbers too large to multiply") from None
    voting = (*pair, *["BA"] * ("magnitude" not in pair))  # of DoRA, BA is not the change of the weights
    spectra = {part: spectra[part] for part in voting if part in spectra}
    return Layer([b.shape[1], a.shape[2], rank], spectra, {"magnitude": "magnitude" in pair}, method_of(pair))


def with_middle(a: Tensor, middle: Tensor) -> Tensor:
    """LoCon's or Tucker's middle matrix [..., r, r, k] made part of A [..., r, in]: [..., r, in k]."""
    if middle.shape[-2] != a.shape[-2]:  # einsum would repeat a single row
        raise RuntimeError(f"a middle matrix of rank {middle.shape[-2]}, A of rank {a.shape[-2]}")
    return torch.einsum("...ijk,...jm->...imk", middle, a).flatten(-2)


# What is said of layers of which it is true
FACTS = {
    "lacking": "layers that are not in the base are left out",
    "other shape": "layers that have another shape in the base are left out",
    "magnitude": "DoRA: the magnitude vectors are set aside, only A and B are judged",
    "unstated": "the file does not state alpha: BA is taken with scale 1",
    "zero": "alpha is 0: BA counts as zero",
}


class Layer(NamedTuple):
    """What is found of a layer: [out, in, rank] or [out, in]; matrix -> spectrum; and facts, to be said or added up.

    A spectrum is [r], or [models, r] of a shard; A and B stand in the order of the file's keys, and BA is the last.
    """

    shape: list[int]
    spectra: dict[str, Tensor]
    facts: Mapping[str, float]
    method: str = ""  # with what else makes spectra unlike: LoHa's rank, the type that a full model is stored in
    init: str = ""  # how A and B began, if BA is not the change of the weights then


def as_spectra(layers: Mapping[str, Layer], **about: Any) -> Spectra:
    """The layers of a shard, or of a file; `about` is what else `Spectra` is told.

    A tie is broken in the order of the voters: A and B as they stand in the layers, then the changes BA.
    """
    voters = [Voter(layer, matrix) for layer, its in layers.items() for matrix in its.spectra]
    voters.sort(key=lambda voter: voter.matrix == "BA")
    rows = [layers[voter.layer].spectra[voter.matrix] for voter in voters]
    width = max(row.shape[-1] for row in rows)
    return Spectra(
        values=torch.stack([of_rank(row, width) for row in rows]).view(len(rows), -1, width),
        voters=voters,
        shapes={layer: its.shape for layer, its in layers.items()},
        method=" and ".join(sorted({its.method for its in layers.values()})),
        **about,
    )


def join_shards(shards: list[Spectra], files: list[str]) -> Spectra:
    """All shards as one; the voters' order is the first shard's.

    Raises:
        DsireError: a shard has other layers than the first one, or other shapes.
    """
    first = shards[0]
    for shard, file in zip(shards, files, strict=True):
        for layer in sorted(shard.shapes.keys() | first.shapes.keys()):
            here, there = (its.shapes.get(layer, "absent") for its in (shard, first))
            if here != there:
                raise DsireError(f"{file}: layer {layer} [out, in, rank] is {here}, and in {files[0]} {there}")
    names = [name for shard in shards for name in shard.names]
    recipes = [recipe for shard in shards for recipe in shard.recipes]
    if len(recipes) not in (0, len(names)):
        raise DsireError(f"some shards have a column `recipe`, and others none: {', '.join(files[:3])}")
    if len({type(name) for name in names}) > 1:  # integers in one shard, strings in another
        names = [str(name) for name in names]
    return replace(
        first,
        values=torch.cat([shard.of_voters(first.voters).values for shard in shards], dim=1),
        sizes=torch.cat([shard.sizes for shard in shards]),
        names=names,
        recipes=recipes,
        notes=list(dict.fromkeys(note for shard in shards for note in shard.notes)),
    )


def what_is_unusual(spectra: Spectra) -> list[str]:
    """Sentences about what a user might not expect in the models: sizes that lack, models that are there twice."""
    models = [*zip(spectra.names, spectra.sizes.tolist(), spectra.of_recipe.tolist(), strict=True)]
    sizes: dict[Any, set[int]] = {name: set() for name in sorted(set(spectra.names))}
    for name, size, _ in models:
        sizes[name].add(size)
    notes = []
    if twice := len(models) - len(set(models)):
        notes.append(f"{twice} models have the micro-dataset and size of another one; all are kept")
    lacking = [str(name) for name, its in sizes.items() if len(its) < len(set(spectra.sizes.tolist()))]
    if lacking and len(models) > spectra.count:  # else no file was said to belong with another
        some = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        notes.append(f"{len(lacking)} micro-datasets lack a size: {some}")
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Weights in LoRA files: what people hold on disk

SAFE_ENDINGS = (".safetensors",)
PICKLE_ENDINGS = (".bin", ".pt", ".ckpt", ".pth")
WEIGHT_ENDINGS = SAFE_ENDINGS + PICKLE_ENDINGS
# Pickles that trainers leave beside a LoRA: many hold more than tensors, so that they can't even be looked into
TRAINERS = re.compile("optimizer|scheduler|scaler|sampler|dataloader|rng_state|random_state|training_args|.*_states[.]")
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")

# What a file is that begins with these bytes.
FIRST_BYTES = {
    rb"$": "empty: delete it and fetch it anew",
    rb".{6}\x00\x00\{": "a safetensors file: let its name end in .safetensors",
    rb"PK\x03\x04|\x80[\x01-\x05]": "a pickle, or an archive: if torch.save wrote it, let its name end in .pt",
    rb"version https://git-lfs": "a Git LFS pointer, not the weights themselves: fetch those with git lfs pull",
    rb"\s*<": "a web page, perhaps one to log in: delete it and fetch the file itself",
    rb"\s*[{\[]\s*[\"{\[\]}\d]": "JSON, not weights",
    rb"PAR1": "parquet; a single LoRA is read from safetensors or a pickle",
    rb"GGUF": "GGUF; a LoRA is read from safetensors or a pickle",
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF": "a picture",
    rb"\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ": "a compressed archive: unpack it",
    rb"\x00{64}": "zeros from its beginning on: delete it and fetch it anew",
    rb"[\t-\r\x20-\x7e]{16,}": "text, not weights",
}


# What the errors and warnings of libraries mean that do not say it plainly.
MEANINGS = {
    r"GLOBAL ([\w.]+)": "holds {}, not tensors: it may be malicious and was not run",
    r"pickle protocol (?!2\b)(\d+)": "is of pickle protocol {}, and only 2 is safe: save it with torch.save again",
    r"Weights only()": "is damaged, or no pickle of torch's that holds tensors alone: others are not loaded",
    r"ArrowNotImplementedError: (.*)": "holds what pyarrow can't read ({}): write it with other types",
}


@contextmanager
def reading(path: Path, kind: str, said: Sequence[warnings.WarningMessage] = ()) -> Iterator[None]:
    """Whatever a library raises about a file, in one line: what the file is by its first bytes, or what is wrong.

    Args:
        kind: what the file should be, as FIRST_BYTES says it.
        said: the warnings before the error.
    """
    try:
        yield
    except DsireError:
        raise
    except Exception as error:  # bytes of any kind make libraries raise anything
        start = b"?"  # a file that can't be opened says nothing
        with suppress(OSError), path.open("rb") as file:
            start = file.read(200)
        what = next((what for pattern, what in FIRST_BYTES.items() if re.match(pattern, start, re.DOTALL)), kind)
        if what.endswith("not weights"):
            what += f" ({shown(' '.join(start[:80].decode(errors='replace').split()))})"
        if not what.startswith(kind):
            raise DsireError(f"{path} is {what}") from error
        text = " ".join([f"{type(error).__name__}: {error}", *(str(warning.message) for warning in said)])
        for pattern, meaning in MEANINGS.items():
            if match := re.search(pattern, text):
                raise DsireError(f"{path} {meaning.format(shown(match[1]))}") from error
        advice = (
            "" if getattr(error, "errno", None) else ": delete it and fetch it anew"
        )  # the disk's fault, not its own
        raise DsireError(f"{path} can't be read as {kind} ({shown(error)}){advice}") from error


@dataclass(frozen=True)
class Weights:
    """An open weights file, or several that a model was saved as: its keys, what reads a key's tensor, its header."""

    path: Path
    keys: list[str]
    tensor: Callable[[str], Tensor]
    header: dict[str, str]

    @cached_property
    def settings(self) -> Settings:
        return lora_settings(self.path, self.header)

    def matrix(self, key: str, least_dimensions: int = 2) -> Tensor:
        """A tensor of floating point numbers as float64.

        Raises:
            DsireError: it is of another kind, empty, not finite, or has fewer dimensions, or less memory behind it than
                its shape says.
        """
        tensor, name = self.tensor(key), f"{self.path.name}: {shown(key)}"
        plain = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
        number = least_dimensions == 0 and not tensor.is_complex() and tensor.dtype != torch.bool
        real = plain and (tensor.is_floating_point() or number)
        whole = real and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
        if not whole or tensor.ndim < least_dimensions or not tensor.numel():
            kind = f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape) if plain else 'unknown'}"
            raise DsireError(f"{name} is {kind}, not a plain matrix of floating point numbers")
        try:
            matrix = tensor.to(torch.float64)
        except (NotImplementedError, RuntimeError) as error:
            raise DsireError(f"{name} is {tensor.dtype}, which torch can't convert") from error
        if not matrix.isfinite().all():
            raise DsireError(f"{name} holds a number that is NaN or infinite")
        return matrix


def open_weights(path: Path) -> Weights:
    """Open a .safetensors file, or a pickle without running it; tensors are read one by one.

    Raises:
        DsireError: the file is not what its ending says, or a pickle that holds more than tensors.
    """
    if not path.is_file():
        raise DsireError(f"{path}: no such file")
    if path.suffix.lower() in PICKLE_ENDINGS:
        tensors, header = unpickled_tensors(path)
        return Weights(path, list(tensors), tensors.__getitem__, header)
    from safetensors import SafetensorError, safe_open

    with reading(path, "a safetensors file"):
        file = safe_open(path, "pt")  # mapped for as long as the function below is there
        keys, header = list(file.keys()), file.metadata() or {}

    def tensor(key: str) -> Tensor:
        try:
            found: Tensor = file.get_tensor(key)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise DsireError(f"{path}: {shown(key)} can't be read ({shown(error)})") from error
        return found

    return Weights(path, keys, tensor, header)


def unpickled_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a pickle by name, and its other entries as strings; nothing in the file is run.

    Dictionaries may lie within each other: their keys are joined with dots. An alpha that is a number becomes a tensor.
    """
    with warnings.catch_warnings(record=True) as said, reading(path, "a pickle", said):
        warnings.simplefilter("always")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                unpacked = sum(part.file_size for part in parts.infolist())
                if unpacked > 16 * path.stat().st_size:
                    raise ValueError(f"it would unpack to {unpacked:,} bytes, far more than weights can")
                if damaged := parts.testzip():  # torch leaves the checksums unread
                    raise ValueError(f"{damaged} is damaged")
        # Mapped, torch would take compressed records, or the bytes behind a short one, for the tensors' numbers.
        outside = content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    for _ in range(3):  # a checkpoint's weights lie under this key
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DsireError(f"{path} holds a {kind}, not a dictionary of tensors: nothing names the layers")
    tensors = {}
    for key, value in named_values(content, set()):
        match = MATRIX_KEY.fullmatch(key)
        if isinstance(value, Tensor):
            tensors[key] = value.detach()
        elif match and match["alpha"] and type(value) in (int, float):
            tensors[key] = torch.tensor(float(value) if abs(value) < 2**53 else math.nan, dtype=torch.float64)
        elif match:
            raise DsireError(f"{path}: {shown(key)} is {type(value).__name__}, neither a tensor nor alpha's number")
    # What stands beside the tensors, such as lora_alpha, is as good as a header; a key with a dot is of a layer.
    header = {
        str(key): str(value)
        for key, value in outside.items()
        if isinstance(value, str) or (isinstance(value, (int, float)) and abs(value) < 2**53)
    }
    return tensors, {key: value for key, value in header.items() if "." not in key}


def named_values(content: dict[Any, Any], seen: set[int], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Key and value of what dictionaries within each other hold, each dictionary once; keys are joined with dots."""
    seen.add(id(content))
    for key, value in content.items():
        if not isinstance(value, dict):
            yield f"{prefix}{key}", value
        elif id(value) not in seen and len(prefix) < 1000:
            yield from named_values(value, seen, f"{prefix}{key}.")


# Fields of PEFT's LoraConfig (the last line: of ms-swift's) that leave B A the change of the weights, up to the scale.
HARMLESS = re.compile(
    "task_type|peft_type|auto_mapping|peft_version|base_model_name_or_path|revision|inference_mode|target_modules"
    "|exclude_modules|lora_dropout|fan_in_fan_out|bias|modules_to_save|layers_to_transform|layers_pattern|megatron_.*"
    "|trainable_token_indices|(loftq|eva|corda|lora_ga|velora|runtime)_config|use_dora|alora_invocation_tokens"
    "|qalora_group_size|layer_replication|lora_bias|ensure_weight_tying|lora_dtype|lorap_(lr_ratio|emb_lr)"
    # and of its LoHaConfig and LoKrConfig
    "|rank_dropout|rank_dropout_scale|module_dropout|use_effective_conv2d|decompose_both|decompose_factor|init_weights"
)
OF_SCALE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "scale")
# What stands in headers by itself (and LoHa's alpha), and PEFT's name for it.
HEADER_ENTRIES = {
    **{"alpha": "lora_alpha", "network_alpha": "lora_alpha", "ss_network_alpha": "lora_alpha"},
    **{"rank": "r", "lora_rank": "r", "network_dim": "r", "ss_network_dim": "r"},
    **{name: name for name in OF_SCALE if name != "scale"},
}
PLAIN_INITS = (None, True, False, "gaussian", "orthogonal")  # BA starts at zero, or as noise: it is the change
ANY_NETWORK = "any"


def parsed(text: str) -> Any:
    """What a string of a header says, which may be JSON, or Python's True, False and None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"true": True, "false": False, "none": None, "": None}.get(text.lower(), text)


def lora_settings(path: Path, header: dict[str, str]) -> Settings:
    """What a header, or the JSON beside a file, says of LoRA's scale.

    Raises:
        DsireError: they can't be read, contradict each other, or say that BA is not the change of the weights.
    """
    entries = {key: parsed(text) for key, text in sorted(header.items()) if key.rpartition(".")[2] in HEADER_ENTRIES}
    place, config = f"the header of {path}", {key: value for key, value in entries.items() if value is not None}
    default = {}
    if "lora_adapter_metadata" in header or not any(key.endswith("alpha") for key in config):
        place, config = peft_config(path, header)
        default = {"lora_alpha": 8}  # PEFT's
    settings: Settings = {}
    for name, value in config.items():
        network, _, key = name.rpartition(".")
        key = HEADER_ENTRIES.get(key, key)
        if key == "peft_type" and str(value or "LORA").upper() not in ("LORA", "LOHA", "LOKR"):
            raise DsireError(f"{path.name}: {place} says these are {shown(value)} weights{MERGE_IT}")
        if value and key not in OF_SCALE and not HARMLESS.fullmatch(key):
            raise DsireError(f"{path.name}: {place} has {shown(key)}, which may change what A and B mean: not judged")
        own = settings.setdefault(in_network(f"{network}.")[0] if network else ANY_NETWORK, {})
        if own.setdefault(key, value) != value and key in OF_SCALE:
            raise DsireError(f"{path.name}: {place} says that {key} is {shown(own[key])}, and {shown(value)}")
    return {network: {**default, **own} for network, own in settings.items()}


def peft_config(path: Path, header: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Where the JSON of LoRA's settings stands, and what it says: in the header (diffusers), or beside the file.

    diffusers puts the network's name before each key. Beside a file PEFT and MLX have adapter_config.json.
    """
    place, text = f"the header of {path}", header.get("lora_adapter_metadata", "{}").encode()
    beside = path.with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" not in header and beside.is_file():
            place, text = str(beside), beside.read_bytes()
        config = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise DsireError(f"{place} is not JSON ({shown(error)})") from error
    if not isinstance(config, dict):
        raise DsireError(f"{place} is not a JSON object")
    if isinstance(mlx := config.get("lora_parameters"), dict):
        method = str(config.get("fine_tune_type", "lora")).replace("dora", "lora")
        alpha = mlx.get("alpha", mlx.get("rank"))  # the scale is all there is, but for MLX's oldest files
        config = {"peft_type": method, "r": mlx.get("rank"), "lora_alpha": alpha, "scale": mlx.get("scale")}
    return place, config


def settings_of(weights: Weights, pair: dict[str, str]) -> dict[str, Any]:
    """What is said of a layer with these keys: of its network, and by PEFT's patterns that its path matches.

    Raises:
        DsireError: a pattern is none, is not safe to match, or stands beside names that it can't be matched with.
    """
    match = MATRIX_KEY.fullmatch(next(iter(pair.values())))
    assert match is not None
    network, path = in_network(match["layer"])
    own = {**weights.settings.get(ANY_NETWORK, {}), **weights.settings.get(network, {})}
    if "alpha" in pair:  # it goes before what is said of it elsewhere
        return own
    for name, its in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        said, patterns = f"{weights.path.name}: its LoRA settings: {its}", own.get(its) or {}
        if not isinstance(patterns, dict):
            raise DsireError(f"{said} is {shown(repr(patterns))}, not an object of patterns")
        if patterns and match["layer"].startswith(("lora_", "lycoris_")):
            raise DsireError(f"{said}: patterns can't be matched to names such as {shown(match['layer'])}")
        for pattern, value in reversed(patterns.items()):  # the first that matches counts
            try:
                # repetitions within or after each other can take for ever to match
                if len(pattern) > 200 or len(re.findall(r"[*+{]", pattern)) > 3 or re.search(r"\)[*+{]", pattern):
                    raise OverflowError("it repeats too much to be matched safely: write it out")
                own |= {name: value} if re.fullmatch(rf"(.*\.)?({pattern})", path) else {}
            except (re.error, OverflowError) as error:
                raise DsireError(f"{said} {shown(pattern)} can't be matched ({shown(error)})") from error
    return own


def scale_of(weights: Weights, pair: dict[str, str], settings: dict[str, Any], rank: int | None) -> float:
    """What the product of a layer's matrices is multiplied by: alpha / r, or alpha / sqrt(r) for rslora; 1 if unstated.

    Args:
        settings: what `settings_of` says of the layer.
        rank: r of the layer, from the shape of A; None for a LoKr of two whole matrices, which has none (LyCORIS then
            ignores alpha, and only the settings say r).

    Raises:
        DsireError: an alpha is no number, or the settings contradict the matrices.
    """
    if "alpha" in pair:
        alpha = weights.matrix(pair["alpha"], least_dimensions=0)
        if alpha.numel() != 1:
            raise DsireError(f"{weights.path.name}: {shown(pair['alpha'])} is not one number")
        return float(alpha.reshape(())) / rank if rank else 1.0
    if "lora_alpha" not in settings:
        return 1.0
    said, r, rslora = f"{weights.path.name}: its LoRA settings:", settings.get("r"), settings.get("use_rslora")
    rank = r if rank is None else rank
    if type(rank) is not int or rank < 1 or (r is not None and (isinstance(r, bool) or r != rank)):
        raise DsireError(f"{said} r is {shown(repr(r))}, but {shown(next(iter(pair.values())))} has rank {rank}")
    if not isinstance(rslora, (bool, type(None))):
        raise DsireError(f"{said} use_rslora is {shown(repr(rslora))}, not true or false")
    scale = 1.0
    for name in ("lora_alpha", "scale"):
        number = settings.get(name, 1)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < 2**53:
            raise DsireError(f"{said} {name} is {shown(repr(number))}, not a number")
        scale *= number
    return scale / (rank**0.5 if rslora else rank)


def lora_matrices(weights: Weights, pair: dict[str, str]) -> tuple[Tensor, Tensor]:
    """`factors` A [r, in] and B [out, r] of a LoRA layer, float64."""
    a, b = weights.matrix(pair["A"]), weights.matrix(pair["B"])
    if pair["A"].endswith(".lora_a") and a.ndim == 2 and a.shape[0] > a.shape[1]:
        a, b = a.mT, b.mT  # MLX has A as [in, r] and B as [r, out]
    return factors(a, b, weights.matrix(pair["mid"]) if "mid" in pair else None)


def factors(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """A [r, in k k] and B [out, r] of linear layers or convolutions; a middle matrix [r, r, k, k] is made part of A.

    Raises:
        RuntimeError: they do not fit each other.
    """
    if core is not None:
        a = with_middle(a.reshape(a.shape[:2]), core.reshape(*core.shape[:2], -1))
    a, b = a.flatten(1), b.flatten(1)
    if len(a) != b.shape[1]:
        raise RuntimeError(f"A of rank {len(a)}, B of rank {b.shape[1]}")
    return a, b


# ---------------------------------------------------------------------------------------------------------------------
# Every other fine-tune: the spectrum of the change of each layer's weights

LARGEST = 32  # singular values of a change that are kept, unless --rank says how many
FOREIGN = 0.7  # of the norm of the base's weights: what has changed by more was never fine-tuned from them


@dataclass(frozen=True)
class Base:
    """The model that fine-tunes began as: its files, and for each layer the open file and key of its weights."""

    files: list[Path]
    layers: dict[str, tuple[Weights, str]]

    def is_of(self, path: Path) -> bool:
        """Whether a file is one of the base's, by whatever name or link."""
        return os.path.realpath(path) in map(os.path.realpath, self.files)

    def weights(self, layer: str) -> tuple[Tensor, torch.dtype]:
        """W₀ of a layer, float64 [out, in], and the type that it is stored in."""
        weights, key = self.layers[layer]
        try:
            return weights.matrix(key).flatten(1), weights.tensor(key).dtype
        except DsireError as error:  # its file may be called as the fine-tune's is
            raise DsireError(f"the base, {error}") from error

    @property
    def identity(self) -> str:
        """What changes with the files, for the keys of the cache."""
        facts = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        text = json.dumps([facts, sorted(self.layers)])
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def open_base(item: str | None, cache: Path) -> Base | None:
    """Open the base model that the user means, a file, folder or Hub repository; None if none is meant."""
    if item is None:
        return None
    place = located(item, cache)
    files = [place]
    if place.is_dir():
        pickles = [file for file in visible_files(place, PICKLE_ENDINGS) if not TRAINERS.match(file.name)]
        files = visible_files(place, SAFE_ENDINGS) or pickles
    files = sorted({part for file in files for part in parts_of(file)})
    layers: dict[str, tuple[Weights, str]] = {}
    for file in files:
        weights = open_weights(file)
        network = network_of(file) if file.parent != place and place.is_dir() else ""
        its = {layer: (weights, key) for layer, key in weight_matrices(weights.keys, file.name, network).items()}
        if twice := layers.keys() & its.keys():
            raise DsireError(f"--base={item} holds layer {shown(min(twice))} in two files: name one of them")
        layers |= its
    if not layers:
        raise DsireError(f"--base={item} holds no weight matrices of a model ({' '.join(WEIGHT_ENDINGS)})")
    return Base(files, layers)


def network_of(path: Path) -> str:
    """What diffusers' folders, such as text_encoder/, say of the keys of a file in them: "text_encoder.", or ""."""
    network = f"{path.parent.name}."
    return network if in_network(f"{network}x") != ("", f"{network}x") else ""


def model_layers(keys: list[str], path: Path, base: Base | None) -> tuple[Keys, list[str], list[str]]:
    """`lora_layers`; or, given a base, layer -> {"weight": key} of a full model; NoLora if it is neither."""
    try:
        return lora_layers(keys, path.name, strays=True)
    except DsireError as error:
        if base is None:
            raise
        for network in (network_of(path), ""):
            full = weight_matrices(keys, path.name, network)
            if full.keys() & base.layers.keys():
                return {layer: {"weight": key} for layer, key in full.items()}, [], []
        if isinstance(error, NoLora) and full:
            here, there = three_of(full), three_of(base.layers)
            raise NoLora(f"{path.name} has no layer in common with the base: {here} here, {there} there") from None
        raise


def full_layer(weights: Weights, layer: str, key: str, base: Base, count: int, device: str) -> Layer:
    """The change W - W₀ of a layer of a full fine-tune.

    Facts beside FACTS: whether it is "unchanged" or "foreign"; and the squared norms of the "change", and of that part
    of it that may be "rounding": it is no more than the last digit that is stored.
    """
    stored = weights.tensor(key)
    if stored.ndim < 2 or not stored.is_floating_point():  # a norm, or numbers that are no weights
        return Layer([], {}, {})
    if layer not in base.layers:
        return Layer([], {}, {"lacking": 1})
    new, old, old_type = weights.matrix(key).flatten(1), *base.weights(layer)
    if new.shape != old.shape:
        return Layer([], {}, {"other shape": 1})
    change = new - old
    coarse = max(stored.dtype, old_type, key=lambda dtype: torch.finfo(dtype).eps)
    last_digit = torch.finfo(coarse).eps * new.abs()
    norm, rounding = (float(torch.linalg.vector_norm(its)) for its in (change, change[change.abs() <= last_digit]))
    facts = {"unchanged": torch.equal(new.to(coarse), old.to(coarse)), "change": norm**2, "rounding": rounding**2}
    facts["foreign"] = norm > FOREIGN * float(torch.linalg.vector_norm(old))
    del new, old, last_digit  # a model's largest matrices take hundreds of megabytes each
    with computing(device):
        try:
            spectrum = matrix_spectrum(change.to(device), count).cpu()
        except torch.cuda.OutOfMemoryError:
            spectrum = matrix_spectrum(change, count)
    return Layer([*change.shape], {"BA": spectrum}, facts, f"full fine-tune in {str(coarse).removeprefix('torch.')}")


def dora_change(b: Tensor, a: Tensor, scale: float, old: Tensor, magnitude: Tensor, by_input: bool) -> Tensor:
    """DoRA's change of the weights, m (W₀ + s B A) / |W₀ + s B A| - W₀ (Liu et al. 2024): [out, in k k].

    Args:
        old: W₀, [out, in k k].
        magnitude: m, a number for each output, or for each input.
    """
    merged = old + scale * b @ a
    grouped = merged.reshape(len(old), len(magnitude) if by_input else 1, -1)
    m = magnitude.reshape((1, -1, 1) if by_input else (len(old), 1, 1))
    norms = torch.linalg.vector_norm(grouped, dim=(0, 2) if by_input else 2, keepdim=True)
    norms = norms.masked_fill(norms == 0, 1)
    change: Tensor = (grouped * (m / norms)).reshape(old.shape) - old
    return change


def two_factors(parts: dict[str, Tensor], name: str, core: str) -> tuple[Tensor, Tensor]:
    """`factors` of one of the matrices that LoHa and LoKr multiply; in Tucker's form B is [r, out]."""
    b = parts[f"{name}_a"]
    return factors(parts[f"{name}_b"], b.mT if core in parts else b, parts.get(core))


def loha_change(parts: dict[str, Tensor], count: int) -> tuple[list[int], Tensor]:
    """The shape [out, in] and spectrum of LoHa's change (B1 A1) ∘ (B2 A2), which is one product of rank r r."""
    (a1, b1), (a2, b2) = (two_factors(parts, f"hada_w{number}", f"hada_t{number}") for number in (1, 2))
    b, a = (b1[:, :, None] * b2[:, None]).flatten(1), (a1[:, None] * a2).flatten(0, 1)
    return [len(b), a.shape[1]], product_spectrum(b, a, count)


def lokr_change(parts: dict[str, Tensor], count: int) -> tuple[list[int], Tensor]:
    """The shape [out, in] and spectrum of LoKr's change W1 ⊗ W2, which has all products of their singular values."""
    shape, spectrum = [1, 1], torch.ones(1, dtype=torch.float64)
    for number in (1, 2):
        if f"lokr_w{number}" in parts:
            matrix = parts[f"lokr_w{number}"].flatten(1)
            with computing():
                out, into, its = *matrix.shape, matrix_spectrum(matrix, min(matrix.shape))
        else:
            a, b = two_factors(parts, f"lokr_w{number}", f"lokr_t{number}")
            out, into, its = len(b), a.shape[1], product_spectrum(b, a, len(a))
        shape = [shape[0] * out, shape[1] * into]
        spectrum = (spectrum[:, None] * its).flatten().sort(descending=True).values
    return shape, spectrum[:count]


def adapter_layer(weights: Weights, layer: str, pair: dict[str, str], base: Base | None, count: int) -> Layer:
    """The spectra of a layer of LoRA, DoRA, LoHa or LoKr; of the facts, "unchanged" is that the change is zero."""
    method, keys, file = method_of(pair), ", ".join(map(shown, pair.values())), weights.path.name
    settings = settings_of(weights, pair)
    spectra: dict[str, Tensor] = {}
    try:
        if "A" in pair:
            a, b = lora_matrices(weights, pair)
            scale, shape = scale_of(weights, pair, settings, len(a)), [len(b), a.shape[1], len(a)]
            with computing():
                of_a, of_b, unscaled = lora_spectra(a, b)
            spectra = {part: of_a if part == "A" else of_b for part in pair if part in ("A", "B")}
        else:
            if "magnitude" in pair:
                raise DsireError(f"{file}: {keys} are a {method} with DoRA's magnitudes{MERGE_IT}")
            parts = {part: weights.matrix(key) for part, key in pair.items() if part != "alpha"}
            rank = max((len(matrix) for part, matrix in parts.items() if part.endswith("_b")), default=None)
            scale = scale_of(weights, pair, settings, rank)
            shape, unscaled = (loha_change if method == "LoHa" else lokr_change)(parts, count)
            method += f" of rank {rank}" if rank else ""
        if method != "DoRA":
            spectra["BA"] = unscaled * abs(scale)
        elif base and layer in base.layers:
            magnitude, old = weights.matrix(pair["magnitude"], 1), base.weights(layer)[0]
            old = old.mT if settings.get("fan_in_fan_out") else old  # GPT-2's layers
            by_input = "dora_scale" in pair["magnitude"] and len(magnitude) == 1 < magnitude.numel()  # of LyCORIS
            change = dora_change(b, a, scale, old, magnitude.flatten(), by_input)
            with computing():
                spectra["BA"] = matrix_spectrum(change, count)
    except RuntimeError as error:
        raise DsireError(f"{file}: {keys} do not fit each other ({shown(error)})") from error
    unstated = "alpha" not in pair and "lora_alpha" not in settings
    facts = {
        "magnitude": "BA" not in spectra,
        "unstated": unstated,
        "zero": scale == 0,
        "unchanged": not unscaled.any(),
    }
    init = settings.get("init_lora_weights")
    uncommon = "" if init in PLAIN_INITS else shown(re.sub(r"_niter_\d+$", "", str(init).lower()))
    return Layer(shape, spectra, facts, method, uncommon)


# ---------------------------------------------------------------------------------------------------------------------
# One file: its spectra, what it says of itself, and which files of a folder are models


def file_spectra(path: Path, base: Base | None = None, count: int = LARGEST, device: str = "cpu") -> Spectra:
    """The spectra of one file: a single model, whose size is what the file itself states (0 if it doesn't).

    A layer that began as a part of the base model's weights (PiSSA and the like) is another layer than one that did
    not, so it bears the method in its name: it can only be judged by models that began in the same way.

    Args:
        base: the model that it was fine-tuned from, without which full models and DoRA's changes can't be judged.
        count: how many singular values of a change of the weights are kept.

    Raises:
        DsireError: the file can't be read, is no fine-tune of the base, or holds weights that are not finite.
    """
    weights = open_model(path)
    pairs, others, lone = model_layers(weights.keys, path, base)

    def layer_of(layer: str) -> Layer:
        pair = pairs[layer]
        try:
            if "weight" in pair and base:
                found = full_layer(weights, layer, pair["weight"], base, count, device)
            else:
                found = adapter_layer(weights, layer, pair, base, count)
            if not all(spectrum.isfinite().all() for spectrum in found.spectra.values()):
                raise FloatingPointError
            return found
        except FloatingPointError:
            keys = " and ".join(map(shown, pair.values()))
            raise DsireError(f"{path.name}: {keys} hold numbers too large to multiply") from None

    at_once = 4 if base else 1  # whole matrices are worth a thread each, and take memory
    every = zip(pairs, in_parallel(layer_of, [*pairs], at_once), strict=True)
    layers = {layer: its for layer, its in every if its.spectra or its.facts}  # no norms
    found = {layer: its for layer, its in layers.items() if its.spectra}
    if not found:
        raise DsireError(f"{path.name} has no matrix of the base's shape: {three_of(pairs)} here")
    if 2 * sum(its.facts.get("foreign", 0) for its in found.values()) > len(found):
        much = f"most of its weights differ by over {FOREIGN:.0%} of theirs"
        raise DsireError(f"{path.name} is no fine-tune of this base: {much}")
    notes = []
    if lone:
        notes.append(f"{len(lone)} tensors without a partner are left out, such as {shown(lone[0])}")
    if others:
        notes.append(f"{len(others)} tensors that are not LoRA matrices are set aside, such as {shown(others[0])}")
    notes += about_layers(layers)
    changed = {layer: its for layer, its in found.items() if not its.facts["unchanged"]}
    full = any("weight" in pair for pair in pairs.values())
    if 0 < len(changed) < len(found):
        unchanged = f"{len(found) - len(changed)} of {len(found)} layers{': they are left out' if full else ''}"
        notes.append(f"the change of the weights is zero in {unchanged}")
    size, stated_in = stated_size(weights.header) or (0, "")
    if size:
        notes.append(f"states its own size: {size} images ({stated_in})")
    voting = changed if changed and full else found
    return as_spectra(
        {f"{layer} ({its.init})" if its.init else layer: its for layer, its in voting.items()},
        sizes=torch.tensor([size]),
        names=[str(path)],
        notes=notes,
        recipes=stated_recipe(weights.header),
        first=[] if changed else [UNTRAINED],
    )


def about_layers(layers: Mapping[str, Layer]) -> list[str]:
    """What is to be said of a model's layers, by their facts; and of how many, where it is not said of all."""
    notes = []
    for fact, what in FACTS.items():
        some = [layer for layer, its in layers.items() if its.facts.get(fact)]
        which = f" ({len(some)} of {len(layers)} layers, such as {three_of(some)})"
        notes += [what if len(some) == len(layers) else what + which] if some else []
    change, rounding = (sum(its.facts.get(fact, 0) for its in layers.values()) for fact in ("change", "rounding"))
    if rounding > change / 2 > 0:
        notes.append("most of the change of the weights is no larger than the last digit that they are stored with")
    for init in sorted({its.init for its in layers.values()} - {""}):
        unlike = "BA is not the change of the weights, only models that began so are comparable"
        notes.append(f"init_lora_weights is {init}: {unlike}")
    return notes


# kohya's entries about how a model was trained; numbers are compared as numbers
RECIPE = {
    "ss_learning_rate": "learning rate",
    "ss_unet_lr": "UNet's",
    "ss_text_encoder_lr": "text encoder's",
    "ss_optimizer": "",
    "ss_lr_scheduler": "schedule",
    "ss_network_dim": "rank",
    "ss_network_alpha": "alpha",
    "ss_base_model_version": "base",
    "ss_sd_model_hash": "hash",
}


def stated_recipe(header: dict[str, str]) -> list[str]:
    """How kohya's metadata say that a file was trained, as one string; or none."""

    def plain(text: str) -> str:
        try:
            return f"{float(text):g}"
        except ValueError:
            return shown(text)

    stated = {what: header[key] for key, what in RECIPE.items() if header.get(key, "None") != "None"}
    facts = [f"{what} {plain(text)}".strip() for what, text in stated.items()]
    with suppress(KeyError, ValueError):
        each = int(header.get("ss_batch_size_per_device", 1)) * int(header.get("ss_gradient_accumulation_steps", 1))
        images = int(header["ss_max_train_steps"]) * int(header.get("ss_total_batch_size", each))
        facts.append(f"{counted(images, 'image')} seen")  # steps times batch
    return [", ".join(facts)] if facts else []


def stated_size(header: dict[str, str]) -> tuple[int, str] | None:
    """The number of training images that kohya's metadata state, without repeats, and the key that states it.

    A folder of images that is used in several resolutions counts once. In ss_datasets it is in several data sets; in
    ss_dataset_dirs it is called "cat", "cat (2)", "cat (3)". Regularisation images do not count.
    """

    def whole(number: Any) -> int:
        return number if isinstance(number, int) and not isinstance(number, bool) and 0 < number < 2**53 else 0

    def objects(its: Any) -> list[dict[str, Any]]:
        return [one for one in its if isinstance(one, dict)] if isinstance(its, list) else []

    sets, folders = (parsed(header.get(key, "")) for key in ("ss_datasets", "ss_dataset_dirs"))
    images: Counter[tuple[str, int]] = Counter()  # how many folders there are of a name and a number of images
    for one in objects(sets):
        parts = [part for part in objects(one.get("subsets")) if not part.get("is_reg")]
        places = (str(part.get("image_dir") or part.get("metadata_file")) for part in parts)
        images |= Counter(zip(places, (whole(part.get("img_count")) for part in parts), strict=True))
    once: Counter[tuple[str, int]] = Counter()
    for name, folder in folders.items() if isinstance(folders, dict) else ():
        first = re.sub(r" \(\d+\)$", "", name)
        if isinstance(folder, dict):
            once[first if first in folders else name, whole(folder.get("img_count"))] = 1
    for key, counts in (("ss_datasets", images), ("ss_dataset_dirs", once)):
        total = sum(count * times for (_, count), times in counts.items())
        if 0 < total < 2**53:
            return total, key
    total, repeats = (whole(parsed(header.get(key, ""))) for key in ("ss_num_train_images", "ss_num_repeats"))
    # Without the repeats it is no number of images, nor where it counts each of several resolutions.
    if not sets and total and repeats and not total % repeats:
        return total // repeats, "ss_num_train_images"
    return None


def parts_of(path: Path) -> list[Path]:
    """The files that a model was saved as: this one, or all of name-00001-of-00003.safetensors and so on."""
    match = SHARD.fullmatch(path.name)
    if not match or not 1 <= int(match[2]) <= int(match[3]):
        return [path]
    numbers = range(1, int(match[3]) + 1)
    return [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}{match[4]}") for number in numbers]


def open_model(path: Path) -> Weights:
    """Open the weights of a model, all the files that it was saved as, as one."""
    parts = [open_weights(part) for part in parts_of(path)]
    place = {key: part for part in parts for key in part.keys}
    header = {key: value for part in parts for key, value in part.header.items()}
    return Weights(path, [key for part in parts for key in part.keys], lambda key: place[key].tensor(key), header)


def visible_files(folder: Path, endings: Sequence[str]) -> list[Path]:
    """The files, and links, below a folder with one of these endings, sorted; never hidden ones (macOS' ._name)."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in endings
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.is_dir()
    )


def holds_no_lora(path: Path, base: Base | None = None) -> bool:
    """Whether a file is known to be neither LoRA nor fine-tune of the base; what is wrong with one is said later."""
    if path.suffix.lower() in PICKLE_ENDINGS and TRAINERS.match(path.name):
        return True
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            with reading(path, "parquet"):
                lora_layers(pq.read_schema(path).names, path.name)
            return False
        weights = open_model(path)
        layers = model_layers(weights.keys, path, base)[0]
        # an adapter saved under ZeRO-3 has all its names, and tensors of no numbers
        return not any(weights.tensor(next(iter(pair.values()))).numel() for pair in layers.values())
    except NoLora:
        return True
    except DsireError:
        return False


def weight_files(folder: Path, base: Base | None = None) -> tuple[list[Path], list[str]]:
    """The LoRA files below a folder, sorted, and notes of what is left out; of shards of one model, the first one.

    Where safetensors lie in a folder, pickles beside them (an optimizer's state, or the same weights) are left out.
    Given a base, models that were fine-tuned from it are found, too, and the base's own files are left out.
    """
    every = visible_files(folder, WEIGHT_ENDINGS)
    visible = [path for path in every if not (base and base.is_of(path))]
    found = {next((part for part in parts_of(path) if part.is_file()), path) for path in visible}
    pickles = {path for path in found if path.suffix.lower() in PICKLE_ENDINGS}
    loras = {path for path in found - pickles if not holds_no_lora(path, base)}
    beside = {path for path in pickles if path.parent in {lora.parent for lora in loras}}
    loras |= {path for path in pickles - beside if not holds_no_lora(path, base)}
    others = sorted(found - loras - beside)
    notes = [f"{counted(len(beside), 'pickle')} beside safetensors in {folder} left out"] if beside else []
    if others:
        hold = f"{counted(len(others), 'file')} {'hold' if len(others) > 1 else 'holds'}"
        notes.append(f"{hold} no LoRA, such as {shown(others[0])}")
        if not loras and base is None:
            notes.append("full models are judged with --base")
    if len(visible) < len(every):
        notes.append(f"the base itself, in {folder}, is left out")
    return sorted(loras), notes


# ---------------------------------------------------------------------------------------------------------------------
# Where the weights come from: a folder, or the Hub

CARDS = ("README.md", ".huggingface.yaml")  # where a dataset says what its configs are


@dataclass(frozen=True)
class Shard:
    """One file of models: its path (on disk, or inside the Hub's repository), bytes, and version."""

    file: str
    size: int
    etag: str
    classes: str = ""  # column -> names of its classes, as JSON, where the dataset's README.md says them

    @property
    def is_lora(self) -> bool:
        """Whether it is a LoRA file, a single model, and not parquet."""
        return self.file.lower().endswith(WEIGHT_ENDINGS)


@dataclass(frozen=True)
class Source:
    """The files of a subset. `commit` is the Hub's commit hash, or "" for a folder; `notes` say what is left out."""

    dataset: str
    subset: str
    commit: str
    shards: list[Shard]
    notes: list[str] = field(default_factory=list)


def find_source(
    dataset: str, subset: str | None, revision: str | None, cache: Path, base: Base | None = None
) -> Source:
    """The files of a subset in a folder or on the Hub; `base` is what models in files were fine-tuned from.

    Raises:
        DsireError: no such dataset or subset, or the Hub can't be reached and nothing is known of it.
    """
    folder = path_of(dataset)
    if os.path.isdir(folder):
        if revision is not None:
            raise DsireError(f"--revision is of a dataset on the Hub, and {folder} is a folder: leave it out")
        return folder_source(folder, subset, base)
    if os.path.exists(folder):
        raise DsireError(f"--dataset={dataset} is a file: give the folder that holds it")
    if folder.is_absolute() or dataset.startswith((".", "~")) or dataset.count("/") != 1:
        raise DsireError(f"--dataset={shown(dataset)}: no such folder, and not a Hub repository (owner/name)")
    return hub_source(dataset, subset, revision, cache)


def path_of(text: str) -> Path:
    """A path that the user gave, with ~ as the shell has it."""
    return Path(os.path.expanduser(text))


def folder_source(folder: Path, subset: str | None, base: Base | None = None) -> Source:
    """The parquet files of a subset in a folder; or a folder of LoRA files as a subset of its own.

    Its metadata.csv decides which files are read. Without one, LoRA files may lie beside the parquet of their images.
    """
    labels, parquet = metadata_csv(folder), visible_files(folder, [".parquet"])
    loras = visible_files(folder, WEIGHT_ENDINGS)
    if labels is not None or not parquet or (loras and subset is None and all(map(holds_no_lora, parquet))):
        if subset is not None:
            raise DsireError(f"--subset={subset}: {folder} holds LoRA files, which have no subsets; leave it out")
        files, notes = weight_files(folder, base) if labels is None else (sorted(labels), [])
        if labels is None:
            lists = [file for file in visible_files(folder, [".csv"]) if file.name == "metadata.csv"]
            notes += [f"{shown(file)} is not read: it does not lie in {folder} itself" for file in lists[:1]]
        else:
            if base and (both := [file for file in files if base.is_of(file)]):
                raise DsireError(f"--base is one of the labelled models: {shown(both[0])} is in metadata.csv")
            unlisted = [file for file in loras if not {file.absolute(), parts_of(file.absolute())[0]} & {*files}]
            unlisted = [file for file in unlisted if not (base and base.is_of(file))]
            if unlisted:
                such = shown(unlisted[0].relative_to(folder).as_posix())
                notes.append(f"left out, as not in metadata.csv: {counted(len(unlisted), 'file')}, such as {such}")
        if not files:
            what = f"neither parquet nor LoRA files ({' '.join(WEIGHT_ENDINGS)})"
            raise DsireError("; ".join([f"--dataset={folder} holds {what}", *notes]))
        if parquet:
            notes.append(f"left out, as LoRA files decide: {counted(len(parquet), 'parquet file')} in {folder}")
        return Source(str(folder), folder.resolve().name, "", [shard_on_disk(file, base) for file in files], notes)
    shipped = sorted((folder / subset.replace("_", "/")).glob("*.parquet")) if subset and folder == SHIPPED else []
    if subset and shipped:  # it needs neither `datasets` nor the time to import it
        return Source(str(folder), subset, "", [shard_on_disk(file) for file in shipped])
    cards = {name: folder / name for name in CARDS if (folder / name).is_file()}
    paths = [path.relative_to(folder).as_posix() for path in parquet]
    subset, names, notes, classes = files_of_subset(f"dataset {folder}", cards, paths, subset)
    shards = [replace(shard_on_disk(folder / name), classes=classes) for name in names]
    return Source(str(folder), subset, "", shards, notes)


def shard_on_disk(file: Path, base: Base | None = None) -> Shard:
    """The file as a shard; what decides its spectra is in the etag."""
    if not file.is_file():
        raise DsireError(f"{file} is a link to a file that is not there")
    parts = [part for part in (*parts_of(file), file.with_name("adapter_config.json")) if part.is_file()]
    etag = "mtime-" + "-".join(str(part.stat().st_mtime_ns) for part in parts)
    etag += f"-base-{base.identity}" if base else ""
    return Shard(str(file.absolute()), file.stat().st_size, etag)


def files_of_subset(
    what: str, cards: dict[str, Path], names: list[str], subset: str | None
) -> tuple[str, list[str], list[str], str]:
    """The subset's name, its parquet files, notes, and `Shard.classes`: `datasets` reads the README's header.

    It is shown a folder of links and of empty files, so that whatever else lies in the dataset (a script, images), or
    how the dataset's path is spelt, makes no difference; and that the Hub is asked by huggingface_hub alone.

    Raises:
        DsireError: an unknown subset (with the list of those that exist), or a subset without parquet files.
    """
    with hub_errors(what), tempfile.TemporaryDirectory() as place:
        import datasets

        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        view = Path(place).resolve() / "dataset"
        view.mkdir()
        for name in names:
            (view / name).parent.mkdir(parents=True, exist_ok=True)
            (view / name).touch()
        for name, card in cards.items():
            (view / name).write_bytes(card.read_bytes())

        def builder_of(config: str) -> tuple[Any, dict[str, list[str]]]:
            """The builder of a config, and the files of its splits."""
            builder = datasets.load_dataset_builder(str(view), config, cache_dir=place)
            files = (builder.config.data_files or {}).items()
            return builder, {split: [Path(file).relative_to(view).as_posix() for file in its] for split, its in files}

        try:
            configs = datasets.get_dataset_config_names(str(view))
            if subset is None and len(configs) > 1:
                raise DsireError(f"{what} has several subsets: choose one with --subset: {' '.join(configs)}")
            if subset is not None and subset not in configs:
                raise DsireError(f"--subset={subset} is not in {what}; it has: {' '.join(configs)}")
            subset = subset or configs[0]
            builder, splits = builder_of(subset)
            of_none = set(names).difference(*splits.values())
            for other in configs if of_none else []:
                with suppress(OSError, ValueError):  # it holds no parquet
                    of_none.difference_update(*builder_of(other)[1].values())
        except DsireError:
            raise
        except Exception as error:  # of `datasets`, YAML or the patterns: about what the dataset holds
            reason = re.sub(r" with any supported extension.*", "", shown(error)).replace(str(view), "it")
            which = f" in subset {subset}" if subset else ""
            said = f" ({' and '.join(cards)} says which files are its)" if cards else ""
            raise DsireError(f"{what} has no parquet to read{which}: {reason}{said}") from error
        files = list(dict.fromkeys(name for split in splits.values() for name in split))
        if not files:
            raise DsireError(f"{what}: subset {subset} has no parquet")
        features = builder.info.features or {}
        classes = {name: features[name].names for name in LABELS if hasattr(features.get(name), "names")}
        notes = [f"the splits {' '.join(map(str, splits))} are taken together"] if len(splits) > 1 else []
        if of_none:
            left_out = f"{counted(len(of_none), 'parquet file')} of {what} left out, as in no split of a subset"
            notes.append(f"{left_out}, such as {shown(min(of_none))}: name them in the configs of README.md")
        return subset, files, notes, json.dumps(classes) if classes else ""


class HubUnreachable(DsireError):
    """The Hub can't be asked, so that what is in the cache may be used instead."""


class HubBusy(HubUnreachable):
    """The Hub, or the way to it, failed in a way that may pass: worth another try."""


# What a user can have set that keeps huggingface_hub from the Hub, or from its own files
SETTINGS = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "SSL_CERT_FILE", "SSL_CERT_DIR")
PROXIES = ("https_proxy", "http_proxy", "all_proxy")


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Whatever huggingface_hub and datasets raise, when they are imported too, in one line that says what to do."""
    try:
        yield
    except DsireError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
            raise
        raise hub_error(what, error) from error


def hub_error(what: str, error: Exception) -> DsireError:
    """The line for an error of the Hub, or of the way to it."""
    names = (*SETTINGS, *PROXIES, *map(str.upper, PROXIES))
    settings = [name for name in names if os.environ.get(name)]
    look = f"check the network{' and ' if settings else ', or set HF_ENDPOINT'}{', '.join(settings)}"
    try:
        from huggingface_hub import constants, errors
    except Exception:
        return HubUnreachable(f"{what}: huggingface_hub can't be used ({shown(error)}): {look}")
    hub = constants.ENDPOINT
    causes = [error, error.__cause__ or error.__context__]
    status = next((int(its.response.status_code) for its in causes if isinstance(its, errors.HfHubHTTPError)), 0)
    if isinstance(error, errors.GatedRepoError):
        return DsireError(f"{what} is gated: ask for access on its page, then set HF_TOKEN to your token")
    if isinstance(error, errors.RevisionNotFoundError):
        return DsireError(f"{what} has no such --revision; give one of its branches, tags or commits")
    if isinstance(error, errors.RepositoryNotFoundError):
        return DsireError(f"{what} was not found on {hub}: check the name, and set HF_TOKEN if it is private")
    if isinstance(error, errors.HFValidationError):
        return DsireError(f"{what} can't be a repository's name: {shown(error)}")
    if isinstance(error, errors.RemoteEntryNotFoundError) or status == 404:
        return DsireError(f"{what} is not there, though it may be listed: try another --revision")
    if any(isinstance(its, errors.OfflineModeIsEnabled) for its in causes):
        return HubUnreachable(f"{what} is not in the cache, and HF_HUB_OFFLINE is set: unset it")
    if status in (401, 403):
        return DsireError(f"{what}: the Hub refused the token (HTTP {status}); check HF_TOKEN")
    if status:
        return HubBusy(f"{what}: the Hub answers with HTTP {status}; try again later")
    kind = HubBusy if type(error).__name__ in ("ReadError", "RemoteProtocolError") else HubUnreachable
    return kind(f"{what}: {hub} can't be reached ({shown(error)}): {look}")


class SayRetries(logging.Handler):
    """huggingface_hub tries again for half a minute, and tells its log alone: said in a line, the first time."""

    def emit(self, record: logging.LogRecord) -> None:
        if "[Retry 1/" in record.getMessage():
            print("the Hub is busy or can't be reached: waiting, to ask again", file=sys.stderr)


def ask_hub(what: str, question: Callable[[Any], T], download: bool = False) -> T:
    """What a question, a function of HfApi, is answered; asked again after 1 and 5 seconds while the Hub is busy.

    Some requests would wait for a silent server for ever: a question has 30 times what a read of a download has.
    """
    for wait in (1, 5, 0):
        try:
            with hub_errors(what):
                with redirect_stdout(io.StringIO()):  # what it raises it prints, too
                    import huggingface_hub.hf_api

                log = huggingface_hub.logging.get_logger("huggingface_hub")
                log.handlers, log.propagate = [SayRetries()], False
                if not sys.stderr.isatty():
                    huggingface_hub.utils.disable_progress_bars()
                patience = None if download else 30 * huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
                return in_background(question, huggingface_hub.HfApi()).result(patience)
        except HubBusy as error:
            if not wait:
                raise
            print(f"{str(error).removesuffix('; try again later')}; asking again", file=sys.stderr)
            time.sleep(wait)
    raise AssertionError


def download(what: str, repository: str, name: str, **options: Any) -> Path:
    """A file of a Hub repository, on disk; `what` it is called in a message."""
    return ask_hub(what, lambda api: Path(api.hf_hub_download(repository, name, **options)), download=True)


def hub_source(dataset: str, subset: str | None, revision: str | None, cache: Path) -> Source:
    """The files of a subset on the Hub, with their SHA-256.

    The answer is kept in the cache, and asked for again only when the dataset's commit has changed: a second run
    doesn't need the network.
    """
    what = f"dataset {dataset}" + (f" at revision {revision}" if revision else "")
    digest = hashlib.sha256(json.dumps([dataset, revision, subset]).encode()).hexdigest()[:16]
    saved = cache / "sources" / f"{digest}.json"
    known = None
    with suppress(OSError, ValueError, KeyError, TypeError):  # it is not there, or not written by this version
        facts = json.loads(saved.read_text())
        known = Source(**{**facts, "shards": [Shard(**shard) for shard in facts["shards"]]})
    if known and revision == known.commit:
        return known
    try:
        asked = what if dataset == LORA_WISE else f"no folder {dataset} is here; on the Hub, {what}"
        info = ask_hub(asked, lambda api: api.dataset_info(dataset, revision=revision, timeout=30))
    except HubUnreachable as error:
        if not known:
            raise
        note = f"{error}; going on with commit {known.commit[:12]}, as found before"
        return replace(known, notes=[note, *known.notes])
    if known and known.commit == info.sha:
        return known

    def listed(api: Any) -> dict[str, Any]:
        tree = api.list_repo_tree(info.id, repo_type="dataset", revision=info.sha, recursive=True)
        return {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}  # a folder has none

    options = {"repo_type": "dataset", "revision": info.sha, "cache_dir": cache / "hub"}
    with disk_errors(cache):
        files = ask_hub(what, listed)
        cards = {name: download(what, info.id, name, **options) for name in CARDS if name in files}
        parquet = [name for name in files if name.endswith(".parquet") and not re.search(r"(^|/)\.", name)]
        subset, names, notes, classes = files_of_subset(what, cards, parquet, subset)
    found = [files[name] for name in names]
    shards = [Shard(its.path, its.size, its.lfs.sha256 if its.lfs else its.blob_id, classes) for its in found]
    source = Source(info.id, subset, info.sha, shards, notes)
    write_json(saved, asdict(source))
    return source


def fetch(source: Source, shard: Shard, cache: Path) -> Path:
    """The shard on disk: where it is, or downloaded by huggingface_hub and checked against its SHA-256."""
    if not source.commit:
        return Path(shard.file)
    folder = cache / "downloads" / source.dataset.replace("/", "--")
    for half in (folder / ".cache").rglob(f"*{shard.etag}*.incomplete"):  # of a run that was killed: it is not resumed
        half.unlink(missing_ok=True)
    what = f"{shard.file} of dataset {source.dataset}"
    options = {"repo_type": "dataset", "revision": source.commit, "local_dir": folder}
    with disk_errors(folder):
        for again in (False, True):
            path = download(what, source.dataset, shard.file, force_download=again, **options)
            if is_whole(path, shard):
                return path
        path.unlink()
    raise DsireError(f"{what} was damaged on its way, twice: try again later")


def is_whole(path: Path, shard: Shard) -> bool:
    from huggingface_hub.utils.sha import sha_fileobj

    if not re.fullmatch("[0-9a-f]{64}", shard.etag):  # a small file outside LFS: the Hub gives no SHA-256 of it
        return path.stat().st_size == shard.size
    with path.open("rb") as file:
        return sha_fileobj(file).hex() == shard.etag


# ---------------------------------------------------------------------------------------------------------------------
# The cache of spectra, and who computes what is not in it


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say which path can't be written, and that what was computed is kept."""
    try:
        yield
    except OSError as error:
        advice = "free the disk or choose another place; nothing that was computed is lost"
        raise DsireError(f"{path} can't be written ({error.strerror or shown(error)}): {advice}") from error


def write_whole(path: Path, content: bytes | str) -> None:
    """Write under a temporary name, then rename: a file that carries its name is whole."""
    half = path.with_name(f".{path.name}.{os.getpid()}.half")
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with half.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            half.replace(path)
        finally:
            half.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON; what can't be told, a NaN, is null in it."""
    plain = json.loads(json.dumps(content), parse_constant=lambda _: None)
    write_whole(path, json.dumps(plain, indent=2) + "\n")


def cache_key(shard: Shard, rank: int) -> str:
    """What spectra were computed from: they are used again only for the same."""
    return json.dumps({"format": CACHE_FORMAT, "rank": rank, **asdict(shard)}, sort_keys=True)


def spectra_file(shard: Shard, rank: int, cache: Path) -> Path:
    digest = hashlib.sha256(cache_key(shard, rank).encode("utf-8", "backslashreplace")).hexdigest()[:16]
    return cache / "spectra" / f"{Path(shard.file).stem[:40]}-{digest}.safetensors"


def save_spectra(spectra: Spectra, shard: Shard, rank: int, cache: Path) -> None:
    from safetensors.torch import save

    facts = ("voters", "names", "shapes", "notes", "recipes", "method", "first")
    about = json.dumps({name: getattr(spectra, name) for name in facts})
    tensors = {"spectra": spectra.values.contiguous(), "sizes": spectra.sizes}
    write_whole(spectra_file(shard, rank, cache), save(tensors, {"key": cache_key(shard, rank), "about": about}))


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


@cache
def say_once(text: str) -> None:
    """Print a line to stderr, but not a second time."""
    print(text, file=sys.stderr)


@contextmanager
def locked(shard: Shard, rank: int, cache: Path) -> Iterator[None]:
    """No other run computes this shard meanwhile; where the disk knows no locks both do, which is no harm."""
    from filelock import FileLock, Timeout

    place = spectra_file(shard, rank, cache).with_suffix(".lock")
    # taken in one thread, released in another; a file that exists would be no lock: it outlives a run that is killed
    lock = FileLock(place, thread_local=False, fallback_to_soft=False)
    with disk_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=2)
        except Timeout:
            print(f"waiting for another run, which is at {Path(shard.file).name}", file=sys.stderr)
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            say_once(f"{place.parent} knows no locks ({shown(error)}): going on without")
    try:
        for half in place.parent.glob(f".{place.stem}.*.half"):  # of a run that was killed as it wrote
            half.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def in_background(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call in a thread that the end of the script doesn't wait for: Ctrl-C ends a download at once."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # it belongs to the caller, who gets it with the result
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


class Process(NamedTuple):
    """This process among those that torchrun (or a launcher that sets the same variables) started."""

    rank: int = 0
    of: int = 1

    @classmethod
    def join(cls) -> Process:
        """Become one of the group."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count < 2:
            return cls()
        from datetime import timedelta

        import torch.distributed

        # gloo: all that is told is who is ready; a subset can take hours, and a dead process ends the others anyway
        try:
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        except (ValueError, RuntimeError) as error:
            message = f"WORLD_SIZE is set, but no group of processes can be made ({shown(error)}): start with torchrun"
            raise DsireError(message) from error
        return cls(torch.distributed.get_rank(), count)

    def wait_for_others(self) -> None:
        """Until all have come this far; a process that ended before has said why, and ends this one."""
        if self.of > 1:
            try:
                torch.distributed.barrier()
            except RuntimeError:
                sys.exit(2)


def subset_spectra(
    source: Source,
    rank: int,
    cache: Path,
    device: str = "cpu",
    keep_shards: bool = False,
    process: Process = Process(),  # noqa: B008 (it can't be changed)
    base: Base | None = None,
) -> Spectra:
    """The spectra of a whole subset: from the cache, and for the shards that it lacks from their parquet.

    Each shard's spectra are written before its download is deleted, so that a run that is killed goes on at its shard.
    Under torchrun each process computes its own shards, and waits until all are there.

    Raises:
        DsireError: a shard can't be had or read, or its spectra can't be written.
        KeyboardInterrupt: Ctrl-C; its message says how far the run came.
    """
    if source.shards[0].is_lora:
        return folder_spectra(source, rank, cache, device, base)
    shards = source.shards
    found = {shard: load_spectra(shard, rank, cache) for shard in shards[process.rank :: process.of]}
    missing = [shard for shard, spectra in found.items() if spectra is None]
    try:
        compute_spectra(source, missing, rank, cache, device, keep_shards)
    except KeyboardInterrupt:
        there = sum(load_spectra(shard, rank, cache) is not None for shard in shards)
        raise KeyboardInterrupt(f"{there} of {len(shards)} shards are done") from None
    process.wait_for_others()
    parts = [found.get(shard) or load_spectra(shard, rank, cache) for shard in shards]
    for shard, spectra in zip(shards, parts, strict=True):
        if spectra is None:
            raise DsireError(f"the spectra of {shard.file} are not in {cache}: run the same command again")
    return join_shards([spectra for spectra in parts if spectra is not None], [shard.file for shard in shards])


def compute_spectra(
    source: Source, shards: list[Shard], rank: int, cache: Path, device: str, keep_shards: bool
) -> None:
    """Compute and save the spectra of shards, one by one, while the next one is fetched.

    A shard is locked from before it is fetched until its spectra are saved. Runs on one cache lock shards in the same
    order, so none waits for another in a circle.
    """
    from tqdm import tqdm

    def prepare(shard: Shard) -> tuple[ExitStack, Path | None]:
        """Lock a shard, and fetch it unless another run has computed it meanwhile."""
        with ExitStack() as held:
            held.enter_context(locked(shard, rank, cache))
            path = fetch(source, shard, cache) if load_spectra(shard, rank, cache) is None else None
            return held.pop_all(), path

    coming = [in_background(prepare, shard) for shard in shards[:1]]
    try:
        for number, shard in enumerate(tqdm(shards, unit="shard", disable=None if shards else True), start=1):
            held, path = coming.pop().result()
            with held:
                coming = [in_background(prepare, following) for following in shards[number : number + 1]]
                if path:
                    save_spectra(shard_spectra(path, rank, device, shard.classes), shard, rank, cache)
                    if source.commit and not keep_shards:
                        path.unlink(missing_ok=True)
    finally:
        for unused in coming:
            unused.add_done_callback(lambda its: None if its.exception() else its.result()[0].close())


def about_file(error: DsireError, path: Path, name: str) -> str:
    """What an error says of a file, after another name of it: below a folder, several may have one name."""
    text = str(error).removeprefix(str(path)).removeprefix(path.name).removeprefix(":").strip()
    return f"{shown(name)}: {text}"


def folder_spectra(source: Source, count: int, cache: Path, device: str = "cpu", base: Base | None = None) -> Spectra:
    """The spectra of a folder of LoRA files, or of full models given their base, on the layers that all of them have.

    Sizes and micro-datasets come from the folder's metadata.csv (file_name,label,name), or else from the files. Files
    whose micro-dataset isn't named share it with the other epochs of their training.

    Raises:
        DsireError: metadata.csv or a file in it can't be read, no file has a size, or no layer is in all of them.
    """
    folder = Path(source.dataset)
    labels = metadata_csv(folder)

    def computed(shard: Shard) -> Spectra | DsireError:
        try:
            spectra = file_spectra(Path(shard.file), base, count, device)
        except DsireError as error:
            return error
        save_spectra(spectra, shard, count, cache)
        return spectra

    found: dict[Shard, Any] = {shard: load_spectra(shard, count, cache) for shard in source.shards}
    missing = [shard for shard, file in found.items() if file is None]
    at_once = 1 if base else None  # given a base, the layers of a file are computed in parallel
    found |= dict(zip(missing, in_parallel(computed, missing, at_once, "file" if missing else ""), strict=True))
    known, trainings, notes = {}, [], []
    for shard, file in found.items():
        path = Path(shard.file)
        name = path.relative_to(folder.absolute()).as_posix()
        if isinstance(file, DsireError):
            if labels is not None:
                raise DsireError(about_file(file, path, name))
            notes.append((name, about_file(file, path, "left out, as it can't be judged")))
            continue
        stated = (int(file.sizes[0]), "", *file.recipes)
        size, micro_dataset, *recipe = labels[path] if labels is not None else stated
        notes += [(name, note) for note in (*file.first, *file.notes)]
        if size:
            trainings += [] if micro_dataset else [training_of(path, name)]
            its = [micro_dataset or trainings[-1]]
            known[name] = replace(file, sizes=torch.tensor([size]), names=its, recipes=recipe or [""])
        else:
            notes.append((name, "left out, as it states no size"))
    if not known:
        advice = f"write {folder / 'metadata.csv'} with file_name,label,name"
        raise DsireError("; ".join([f"no file in {folder} has a size: {advice}", *source.notes]))
    said = together(notes)
    if trainings:
        files = f"{len(trainings)} files of {len(set(trainings))} trainings have no name in metadata.csv"
        said.append(f"{files}: each training is a micro-dataset of its own, and nothing says which share images")
    models = join_files(known, folder)
    one_method = " or " not in models.method
    return replace(models, notes=said + models.notes, recipes_stated=labels is None and one_method)


def join_files(files: dict[str, Spectra], folder: Path) -> Spectra:
    """Models from files (name -> its spectra) as one, on the layers and matrices that all of them have."""
    known = [*files.values()]
    shapes = [file.shapes for file in known]
    longest = {layer: max((other.get(layer, []) for other in shapes), key=len) for layer in shapes[0]}
    common = {
        layer: min((other[layer] for other in shapes), key=len)
        for layer, shape in longest.items()
        if all(same_shape(other.get(layer, []), shape) for other in shapes)
    }
    of_all = set(known[0].voters).intersection(*(file.voters for file in known))
    voters = [voter for voter in known[0].voters if voter in of_all and voter.layer in common]
    if not voters:
        raise DsireError(f"{folder}: no layer is in all {len(known)} files with the same shape")
    notes: list[str] = []
    methods = {file.method: shown(name) for name, file in reversed(files.items())}  # each with its first file
    if dropped := {layer for its in shapes for layer in its} - common.keys():
        notes.append(f"{len(dropped)} layers that are not the same in all files are left out, such as {min(dropped)}")
    if len(methods) > 1:
        some = ", ".join(f"{method} ({name})" for method, name in methods.items())
        kinds = " ".join(known[0].of_voters(voters).kinds)
        notes.append(f"several methods, each a recipe of its own, compared by {kinds}: {some}")
        known = [replace(file, recipes=[f"{file.recipes[0]} {file.method}".strip()]) for file in known]
    known = [file.of_voters(voters) for file in known]
    widths = [int(file.values.any(1).any(0).sum()) for file in known]
    width = (max if len(methods) == 1 else min)(filter(None, widths), default=1)  # an untrained one's is 0
    models = [replace(file, values=of_rank(file.values, width), shapes=common, notes=notes, first=[]) for file in known]
    return replace(join_shards(models, [*files]), method=" or ".join(sorted(methods)))


def together(notes: list[tuple[str, str]]) -> list[str]:
    """Notes about files (name, note), in one line where they say the same but for their numbers."""
    alike: dict[str, list[str]] = {}
    for name, note in notes:
        alike.setdefault(re.sub(r"\d+", "0", note), []).append(f"{shown(name)}: {note}")
    return [
        its[0] + (f" (and so of {counted(len(its) - 1, 'other file')})" if len(its) > 1 else "")
        for its in alike.values()
    ]


# An epoch in the path of a file: name-000001.safetensors, name-step00000500.safetensors, checkpoint-500/name.bin
EPOCH = re.compile(r"[-_. /]*(?:(?<![a-z])(?:checkpoint|epoch|step|ckpt)s?[-_ ]?\d+|(?<=-)\d{6})(?=[-_./]|$)", re.I)


def training_of(path: Path, name: str) -> str:
    """What the epochs of one training share: the name or session in kohya's header, or their path without the epoch."""
    header = open_model(path).header if path.suffix.lower() in SAFE_ENDINGS else {}
    output = header.get("ss_output_name")
    told = None if output in ("last", "epoch", "None") else output  # the names that kohya gives by itself
    return told or header.get("ss_session_id") or EPOCH.sub("", str(Path(name).with_suffix(""))).strip("/") or "."


def metadata_csv(folder: Path) -> dict[Path, tuple[int, str, str]] | None:
    """File -> (label, name or "", recipe or "") from the metadata.csv of a folder; None without one.

    A file may be called as Windows has it (a\\b), or with its accents composed in another way than on the disk.

    Raises:
        DsireError: a column is missing, a label is no dataset size, or a file is not there or listed twice.
    """
    path = folder / "metadata.csv"
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
        head = text.partition("\n")[0]
        reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=head.count))  # as spreadsheets write it
        columns, *rows = [[cell.strip() for cell in row] for row in reader if any(map(str.strip, row))] or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise DsireError(f"{path} can't be read ({shown(error)})") from error
    if not {"file_name", "label"} <= set(columns):
        needs = "needs the columns file_name and label, and may have name and recipe"
        raise DsireError(f"{path} {needs}; it has {head[:80]!r}")
    if not rows:
        raise DsireError(f"{path} lists no file: give each LoRA file a row of file_name,label,name")
    files = {file.relative_to(folder).as_posix(): file.absolute() for file in folder.rglob("*") if file.is_file()}
    alike = {plain_name(name): file for name, file in files.items()}
    labels: dict[Path, tuple[int, str, str]] = {}
    for row in rows:
        cells = dict(zip(columns, row, strict=False))
        name, label = cells.get("file_name", ""), cells.get("label", "")
        file = files.get(name) or alike.get(plain_name(name))
        if not dataset_size(label):
            raise DsireError(f"{path}: the label of {shown(name)}: {shown(label)!r} is not a whole number from 1 up")
        if file is None:
            raise DsireError(f"{path} lists {shown(name)}, which is not there")
        if file in labels:
            raise DsireError(f"{path} lists {shown(name)} twice")
        labels[file] = (dataset_size(label), cells.get("name", ""), cells.get("recipe", ""))
    return labels


def plain_name(name: str) -> str:
    """A file's path as it is compared: with / between folders, and accents composed."""
    return unicodedata.normalize("NFC", Path(name.replace("\\", "/")).as_posix())


def located(item: str, cache: Path) -> Path:
    """The file or folder on disk that the user means: a path, or a Hub repository or a file in it (user/name:file)."""
    path = path_of(item)
    if item and os.path.exists(path):
        return path
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::(.+))?", item)
    if not match or match[1].endswith(WEIGHT_ENDINGS):
        raise DsireError(absent(item))
    repository, name = match[1], match[2]
    what = item if name else f"{absent(item)} here; on the Hub, {item}"
    options: dict[str, Any] = {"cache_dir": cache / "hub"}
    with disk_errors(cache / "hub"):
        if name:
            return download(what, repository, name, **options)
        options["allow_patterns"] = [*(f"*{ending}" for ending in SAFE_ENDINGS), "*adapter_config.json"]
        return ask_hub(what, lambda api: Path(api.snapshot_download(repository, **options)), download=True)


def files_to_predict(item: str, cache: Path, base: Base | None = None) -> tuple[list[Path], list[str]]:
    """The weight files that the user means (a file, a folder's, a Hub repository's), and notes of what is left out."""
    path = located(item, cache)
    if path.is_file():
        return [path], []
    files, notes = weight_files(path, base)
    if not files:
        hint = "" if path == path_of(item) else "; name a pickle as user/name:file.bin"
        raise DsireError("; ".join([f"{item}: no weight files in it ({' '.join(WEIGHT_ENDINGS)}){hint}", *notes]))
    return files, notes


def absent(item: str) -> str:
    """That nothing is at a path, and what is there under that name with an ending."""
    path = path_of(item)
    with suppress(OSError):
        for file in path.parent.iterdir():
            if item and file.stem == path.name:
                return f"{shown(item)}: no such file or folder, but {shown(file.name)}"
    return f"{shown(item) if item else 'an empty name'}: no such file or folder"


def rank_of(source: Source, rank: int | None) -> tuple[int, list[str]]:
    """The rank of the LoRAs in a subset: `rank`, or the one in a name like LoRA-WiSE's, 32 in medium_32_2; and notes.

    Any other number in a name (fold_2, seed_42) is no rank, though the columns' lengths may fit it.
    """
    if source.shards[0].is_lora:
        return rank or LARGEST, []  # LoRA says it itself, layer by layer; of a change of the weights it is a choice
    match = re.fullmatch(r"(?:low|medium|high|recipes|rank|r)_(\d+)(_\d+)?", source.subset)
    named = int(match[1]) if match else 0
    if rank and named and rank != named:
        return rank, [f"--rank={rank} is taken, though the name of subset {source.subset} tells rank {named}"]
    if not rank and not named:
        raise DsireError(f"subset {shown(source.subset)} doesn't have the rank in its name: give it with --rank")
    return rank or named, []


# ---------------------------------------------------------------------------------------------------------------------
# The report: what is printed, as lines, and what is written for programs


def describe(spectra: Spectra, settings: dict[str, Any], notes: list[str], *more: str) -> list[str]:
    """What the labelled models are, and what is to be said of them."""
    sizes = " ".join(str(size) for size in spectra.sizes.unique().tolist())
    kind = kind_of_model({voter.layer: spectra.shapes[voter.layer] for voter in spectra.voters})
    of_method = "matrices " if spectra.method == "LoRA" else f"{spectra.method}, matrices "
    return [
        f"{settings['subset']}: {counted(len(spectra.names), 'model')}, {counted(spectra.count, 'micro-dataset')}, "
        f"sizes {sizes}",
        f"{kind}; {of_method}{' '.join(spectra.kinds)}, so {len(spectra.voters)} voters",
        *more,
        *(f"note: {note}" for note in notes),
    ]


def summary_cells(values: Iterable[tuple[float, float]]) -> str:
    """MAE, MAPE and accuracy as mean ± standard deviation, in columns."""
    return "".join(f" {f'{mean:.2f} ± {std:.2f}':>15}" for mean, std in values)


def paper_values(settings: dict[str, Any]) -> dict[str, tuple[tuple[float, float], ...]]:
    """The paper's values for a subset, where it was judged as here: all matrices, 15 training micro-datasets."""
    same = len(set(settings["matrices"])) == 3 and settings["train_size"] == 15
    return PAPER.get(settings["subset"], {}) if same else {}


def report_lines(spectra: Spectra, experiments: list[Metrics], settings: dict[str, Any], notes: list[str]) -> list[str]:
    """What is said of the labelled models and of one predictor, and the paper's values for both."""
    predictor, train_size = settings["predictor"], settings["train_size"]
    protocol = f"{counted(train_size, 'micro-dataset')} to train, {spectra.count - train_size} to test"
    lines = describe(spectra, settings, notes, f"{counted(len(experiments), 'experiment')}: {protocol}")
    lines.append(f"\n{'':16}{'MAE':>16}{'MAPE %':>16}{'accuracy %':>16}")
    lines.append(f"{predictor:16}" + summary_cells(mean_and_std(experiments).values()))
    if paper := paper_values(settings).get(predictor):
        lines.append(f"{'paper':16}" + summary_cells(paper))
    return lines


def comparison_lines(spectra: Spectra, comparison: Comparison, settings: dict[str, Any]) -> list[str]:
    """The tables of `--compare`: the first one with the difference of the MAE to dsire's, and the paper's values."""
    tables, accuracies, paper = comparison.tables, comparison.accuracies, paper_values(settings)
    rows = tables["compare"]
    title = f"\n{'':15}{'MAE':>16}{'MAPE %':>16}{'accuracy %':>16}{'MAE less dsire':>17}"
    lines = [title + (f"{'MAE, MAPE, accuracy in the paper':>48}" if paper else "")]
    for name, experiments in rows.items():
        differences = torch.tensor([one.mae - other.mae for one, other in zip(experiments, rows["dsire"], strict=True)])
        error = float(differences.std()) / len(differences) ** 0.5 if len(differences) > 1 else math.nan
        cell = "" if name == "dsire" else f"{float(differences.mean()):+.3f} ± {error:.3f}"
        line = f"{name:15}{summary_cells(mean_and_std(experiments).values())}{cell:>17}"
        lines.append(line + (summary_cells(paper[name]) if name in paper else ""))
    lines.append("(± the standard deviation over experiments; of differences, the standard error)")
    lines += breakdown("dsire by training micro-datasets", tables["by_train_size"], "mae", "accuracy")
    lines += breakdown("dsire by dataset size", tables["by_size"], "mae", "accuracy")
    if tables["unseen_sizes"]:
        lines += breakdown("sizes that were left out", tables["unseen_sizes"], "mae", "mape")
    lines += sure_lines(comparison)
    lines += recipe_lines(spectra, comparison.recipes) if comparison.recipes else []
    lines.append(f"\n{'accuracy of single voters':48}{'%':>8}")
    for name, accuracy in sorted(by_block(spectra, accuracies).items(), key=lambda item: -item[1]):
        lines.append(f"{'mean of ' + name:48}{accuracy:8.1f}")
    for row in accuracies.argsort(descending=True, stable=True)[:5].tolist():
        lines.append(f"{spectra.voters[row].matrix:3}{spectra.voters[row].layer:69}{float(accuracies[row]):8.1f}")
    return lines


def sure_lines(comparison: Comparison) -> list[str]:
    """How often the 90 % set holds the true size, and how many sizes it has, by size; how often the check speaks."""
    sure, unlabelled = comparison.sure, comparison.unlabelled
    sets = [f"\n{'the 90 % set':16}" + "".join(f"{name + ' holds %':>20}{'sizes':>8}" for name in sure)]
    checks = [f"\n{'not comparable %':24}{'size labelled':>20}{'size not labelled':>24}"]
    for size, (_, _, _, flagged) in sure["log-ridge"].items():
        sets.append(f"{size:16}" + "".join(f"{100 * its[size][1]:20.1f}{its[size][2]:8.2f}" for its in sure.values()))
        without = f"{100 * unlabelled[size]:24.1f}" if size in unlabelled else ""
        checks.append(f"{size:24}{100 * flagged:20.1f}{without}")
    return sets + checks


def recipe_lines(spectra: Spectra, recipes: dict[str, Tensor]) -> list[str]:
    """`by_recipe` as tables: what is asked in rows, what is labelled in columns; then every pair of recipes."""
    names, pairs, lines = sorted(set(spectra.recipes)), recipes["pairs"], []
    alone = pairs.diagonal().T
    other = (pairs.sum(0) - alone) / (len(names) - 1)
    asked = torch.stack([recipes["seen"], recipes["unseen"], alone, other], dim=1)
    for title, column, scale in (("MAE", 0, 1), ("in the 90 % set %", 1, 100), ("not comparable %", 3, 100)):
        heads = "".join(f"{head:>14}" for head in ("all recipes", "all others", "its own", "one other"))
        lines.append(f"\nlog-ridge, {title:17}{heads}")
        table = scale * asked[..., column]
        rows = [*zip(names, table.tolist(), strict=True), ("mean", table.mean(0).tolist())]
        lines += [f"{name:28}" + "".join(f"{value:14.2f}" for value in values) for name, values in rows]
    for title, column, scale, digits in (("not comparable %", 3, 100, 0), ("MAE", 0, 1, 2)):
        lines.append(f"\n{f'{title}, rows labelled':28}" + "".join(f"{number + 1:7}" for number in range(len(names))))
        for number, (name, row) in enumerate(zip(names, (scale * pairs[..., column]).tolist(), strict=True), start=1):
            lines.append(f"{f'{number} {name}':28}" + "".join(f"{value:7.{digits}f}" for value in row))
    return lines


def breakdown(title: str, rows: dict[str, list[Metrics]], *metric_names: str) -> list[str]:
    """A table of two metrics."""
    heads = {"mae": "MAE", "mape": "MAPE %", "accuracy": "accuracy %"}
    lines = [f"\n{title:32}" + "".join(f"{heads[metric]:>16}" for metric in metric_names)]
    for name, experiments in rows.items():
        summary = mean_and_std(experiments)
        lines.append(f"{name:32}" + summary_cells(summary[metric] for metric in metric_names))
    return lines


def estimate_lines(estimate: Estimate, confidence: float, leave_out_recipes: bool) -> list[str]:
    """What is printed of one file: what the reader has to know first is in the first line."""
    interval = estimate.predictor == "log-regression"
    votes, what = ("weights", "weight") if estimate.predictor.startswith("log-") else ("votes", "votes")
    its = counted(estimate.estimate, "image")
    title, *reasons = estimate.first or [its]
    said = [("because", reason) for reason in reasons]
    if UNTRAINED not in estimate.first:
        said += [("would be", its)] if estimate.first else []
        shares = sorted(estimate.votes.items(), key=lambda vote: -vote[1])
        said.append((votes, ", ".join(f"{size}: {share:.0%}" for size, share in shares if share >= 0.005)))
    if estimate.alike and not estimate.first:
        low, high, models, right = estimate.alike
        held = "held the size" if interval else "were right"
        left_out = counted(int(models), "left-out model")
        like = f"of {left_out} with {low:.0%} to {high:.0%} of the {what}, {right:g} {held}"
        said.append(("like it", like if models else f"no left-out model had {low:.0%} of the {what}"))
        members = (" to " if interval else " or ").join(map(str, dict.fromkeys(estimate.confidence_set)))
        known = (
            "its size is labelled, and its recipe of their kind"
            if leave_out_recipes
            else "its recipe and size are labelled"
        )
        sure = f"{members}, with {percent(confidence)} confidence, if {known}"
        none = (
            f"none, at {percent(confidence)}: it is like none of the labelled sizes, the estimate is not to be trusted"
        )
        said.append(("so", sure if members else none))
    if estimate.recipe:
        said.append(("recipe", f"nearest to {shown(estimate.recipe)}"))
    if estimate.stated_size:
        said.append(("stated", str(estimate.stated_size)))
    said += [("note", warning) for warning in estimate.warnings]
    return [f"\n{estimate.file}: {title}", *(f"  {label:10}{text}" for label, text in said)]


def write_report(output: Path, settings: dict[str, Any], notes: list[str], details: dict[str, Any]) -> None:
    """report.json: what was asked, of what, with which versions, and what was found."""
    packages = ("torch", "numpy", "scikit-learn", "huggingface_hub", "datasets", "pyarrow", "safetensors")
    versions = {"python": sys.version.split()[0], **{package: version(package) for package in packages}}
    write_json(output / "report.json", {"settings": settings, "versions": versions, "notes": notes, **details})


def write_table(path: Path, rows: list[list[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_whole(path, text.getvalue())


def write_predictions(output: Path, spectra: Spectra, runs: list[Split], predictions: list[Prediction]) -> None:
    """predictions.csv: a row for each test model of each experiment."""
    table: list[list[Any]] = [["experiment", "name", "size", "predicted", "vote_share"]]
    for number, (run, its) in enumerate(zip(runs, predictions, strict=True), start=1):
        shares = its.shares.amax(-1).tolist()
        for model, predicted, share in zip(run.test.tolist(), its.sizes.tolist(), shares, strict=True):
            table.append([number, spectra.names[model], int(spectra.sizes[model]), predicted, f"{share:.4f}"])
    write_table(output / "predictions.csv", table)


def write_estimates(output: Path, found: list[Estimate], refused: dict[str, str]) -> None:
    """estimates.csv: a row for each file; those that were refused come last, without an estimate."""
    heads = ["file", "estimate", "vote_share", "confidence_set", "recipe_p", "stated_size", "warnings"]
    table: list[list[Any]] = [heads]
    for one in found:
        link = "-" if one.predictor == "log-regression" else " "
        members, share = link.join(map(str, one.confidence_set)), f"{max(one.votes.values()):.4f}"
        said = "; ".join([*one.first, *one.warnings])
        table.append([one.file, one.estimate, share, members, f"{one.recipe_p:.4f}", one.stated_size or "", said])
    table += [[file, "", "", "", "", "", error] for file, error in refused.items()]
    write_table(output / "estimates.csv", table)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: the paper's Figures 2 to 6


def draw(output: Path, figures: dict[str, Callable[[Any], Any]]) -> None:
    """Write pictures into a folder: name -> a function of matplotlib's pyplot that gives a figure."""
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
        for name, figure_of in figures.items():
            image, figure = io.BytesIO(), figure_of(plt)
            figure.savefig(image, format="png", metadata={"Software": None})
            plt.close(figure)
            write_whole(output / f"{name}.png", image.getvalue())


def confusion_figure(plt: Any, true: Tensor, predicted: Tensor, title: str) -> Any:
    """Of the models of each size, the percentage that each size was predicted for (Figures 4 and 6)."""
    if len(predicted.unique()) > 20:
        predicted = nearest_size(predicted, true.unique())
        title += "\n(answers between the sizes are counted at the nearest one)"
    rows, columns = true.unique(), torch.cat([true, predicted]).unique()
    hits = [(predicted[true == row, None] == columns).double().mean(0) for row in rows]
    table = 100 * torch.stack(hits).numpy()
    figure, axes = plt.subplots(figsize=(6, 5))
    image = axes.imshow(table, cmap="cividis", vmin=0, vmax=100)
    for (y, x), value in np.ndenumerate(table):
        axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="black" if value > 60 else "white")
    axes.set_xticks(range(len(columns)), columns.tolist())
    axes.set_yticks(range(len(rows)), rows.tolist())
    axes.set(xlabel="predicted dataset size (images)", ylabel="true dataset size (images)", title=title)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="models of the true size (%)", shrink=0.85)
    return figure


def size_colours(plt: Any, sizes: Sequence[Any]) -> list[Any]:
    """Dark for small, light for large: viridis without its lightest end, which fades on white."""
    return [plt.get_cmap("viridis")(0.9 * index / max(1, len(sizes) - 1)) for index in range(len(sizes))]


def draw_spectra(plt: Any, axis: Any, spectra: Spectra, band: bool) -> None:
    """The mean spectrum of the models of each dataset size, over voters too; in a band of its standard deviation."""
    sizes, indices = spectra.sizes.unique().tolist(), range(1, spectra.values.shape[-1] + 1)
    for size, colour in zip(sizes, size_colours(plt, sizes), strict=True):
        chosen = spectra.values[:, spectra.sizes == size].cpu()
        mean = chosen.mean((0, 1))
        axis.plot(indices, mean, color=colour, marker="o", markersize=4, label=size)
        if band:
            spread = chosen.std((0, 1), correction=0)
            axis.fill_between(indices, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
    axis.set_xlabel("index of the singular value")
    axis.set_xticks(indices[:: max(1, len(indices) // 8)])


def spectra_figure(plt: Any, spectra: Spectra) -> Any:
    """The Frobenius norm and the singular values of BA by dataset size, means over layers (Figure 2)."""
    matrix = [*spectra.kinds][-1]  # BA, unless it was left out
    spectra = spectra.of_matrices([matrix])
    sizes = spectra.sizes.unique().tolist()
    norms = spectra.values.cpu().square().sum(-1).sqrt().mean(0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    parts = left.boxplot([norms[spectra.sizes == size].numpy() for size in sizes], showfliers=False, patch_artist=True)
    for box, median, colour in zip(parts["boxes"], parts["medians"], size_colours(plt, sizes), strict=True):
        box.set(facecolor=colour, alpha=0.7)
        median.set(color="black")
    left.set_xticks(range(1, len(sizes) + 1), sizes)
    left.set(xlabel="dataset size (images)", ylabel=f"Frobenius norm of {matrix}, mean over layers")
    draw_spectra(plt, right, spectra, band=False)
    right.set_ylabel(f"singular value of {matrix}, mean over layers")
    right.legend(title="images")
    return figure


def layers_figure(plt: Any, spectra: Spectra) -> Any:
    """The spectra of the first down-block's and the last up-block's layer by dataset size (Figure 3)."""
    matrix = [*spectra.kinds][-1]
    voters = spectra.of_matrices([matrix]).voters
    down = [voter for voter in voters if voter.layer.startswith("down_blocks")] or voters
    up = [voter for voter in voters if voter.layer.startswith("up_blocks")] or voters
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    for axis, voter, place in ((left, down[0], "first down-block layer"), (right, up[-1], "last up-block layer")):
        draw_spectra(plt, axis, spectra.of_voters([voter]), band=True)
        axis.set_title(f"{place}\n{voter.layer.replace('_transformer', chr(10) + 'transformer')}", fontsize=9)
    left.set_ylabel(f"singular value of {matrix}\n(mean ± std over models)")
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


def estimates_figure(plt: Any, rows: list[tuple[Estimate, Spectra, Spectra]]) -> Any:
    """For each file the norms of its matrices, as lines over those of the labelled models by size, its set shaded.

    Args:
        rows: each with the estimate, the labelled models, and the file's model on the same voters.
    """
    height, width = len(rows), len(rows[0][1].kinds)
    figure, axes = plt.subplots(height, width, figsize=(3.2 * width, 2.8 * height), squeeze=False)
    for line, (estimate, fitted, file) in zip(axes, rows, strict=True):
        sizes, recipes = fitted.sizes.unique(), sorted(set(fitted.recipes)) or ["labelled models"]
        place = torch.searchsorted(sizes, fitted.sizes)
        held = [number for number, size in enumerate(sizes.tolist()) if estimate.holds(size) and not estimate.first]
        for axis, (matrix, voters) in zip(line, fitted.kinds.items(), strict=True):
            known, asked = (log_norms(side)[:, voters].mean(1).clamp(-300, 300).exp() for side in (fitted, file))
            for number, (recipe, colour) in enumerate(zip(recipes, size_colours(plt, recipes), strict=True)):
                chosen, shift = fitted.of_recipe == number, 0.6 * (number + 0.5) / len(recipes) - 0.3
                axis.scatter(place[chosen] + shift, known[chosen], s=6, color=colour, label=recipe)
            axis.axhline(float(asked), color="black", linewidth=1, label="this file")
            for number in held:
                axis.axvspan(number - 0.5, number + 0.5, color="#d55e00", alpha=0.15, linewidth=0)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.set_xticks(range(len(sizes)), sizes.tolist())
            axis.set(xlabel="dataset size (images)", ylabel=f"norm of {matrix}")
        what = estimate.first[0][:40] if estimate.first else counted(estimate.estimate, "image")
        line[0].set_title(f"{shown(Path(estimate.file).name)}: {what}", loc="left", fontsize=10)
    axes[0, -1].legend(fontsize=7)
    figure.suptitle("Frobenius norms, geometric mean over layers; shaded: the set of sizes", fontsize=10)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The command line


class OneLineParser(argparse.ArgumentParser):
    """argparse, with an error of one line like every other one."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def positive(text: str) -> int:
    if not re.fullmatch("[0-9]{1,16}", text) or not 1 <= int(text) < 2**53:
        raise argparse.ArgumentTypeError(f"{shown(text)!r} is not a whole number from 1 up")
    return int(text)


def between_0_and_1(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return number


def output_folder(text: str) -> Path:
    """A folder to write to; what stands in its way is said before anything is computed."""
    path = path_of(text)
    there = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.exists(place))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{shown(there)} is not a folder that can be written to")
    return path


def command_line() -> argparse.ArgumentParser:
    protocol = Protocol()
    about = str(__doc__).partition("The script reads")[0]
    parser = OneLineParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--subset", help="a config of the dataset, such as low_32 (default: low_4, which ships with the script)")
    add("--rank", type=positive, help="the LoRA rank (default: the subset's name has it), or values kept of a change")
    add("--dataset", help=f"Hub repository, a folder of the same layout, or one of LoRA files (default: {LORA_WISE})")
    add("--revision", help="branch, tag or commit of the Hub dataset")
    add("--cache_dir", type=path_of, default=CACHE, help="for downloads and spectra (%(default)s)")
    add("--seed", type=int, default=protocol.seed, help="of the experiments' splits (%(default)s)")
    add("--experiments", type=positive, default=protocol.experiments, help="how many (%(default)s)")
    add("--train_size", type=positive, default=protocol.train_size, help="micro-datasets to train on (%(default)s)")
    add("--matrices", nargs="+", choices=MATRICES, default=list(MATRICES), help="which ones vote (%(default)s)")
    kinds = f"one of {', '.join(PREDICTORS)} (dsire, and log-ridge with --predict)"
    add("--predictor", choices=PREDICTORS, metavar="NAME", help=kinds)
    add("--device", help="cuda, cpu, ... (default: cuda if available)")
    add("--keep_shards", action="store_true", help="keep downloads after their spectra are computed")
    add("--compare", action="store_true", help="all predictors and matrices, by size, training micro-datasets, layer")
    add("--plots", action="store_true", help="draw the paper's figures into --output")
    add("--predict", nargs="+", metavar="LORA", help="estimate for these files, folders or Hub repositories instead")
    add("--confidence", type=between_0_and_1, help="of the set of sizes that --predict names (0.9)")
    add(
        "--leave_out",
        "--leave-out",
        choices=("name", "recipe"),
        default="name",
        help="at a time, to tell how sure --predict is",
    )
    add("--base", help="the model that full fine-tunes in files began as: a file, folder or Hub repository")
    add("--output", type=output_folder, help="folder for report.json, and predictions.csv or estimates.csv")
    return parser


def choose_device(name: str | None) -> str:
    """The device to compute on, which must have float64: the one that is named, or this process's GPU, or the CPU.

    It is warmed up here, before any thread computes on it.
    """
    if name is None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % gpus}" if gpus else "cpu"
    try:
        torch.zeros(1, dtype=torch.float64, device=name).cpu()
        warm_up(name)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise DsireError(f"--device={name} can't be used here ({shown(error)}); try --device=cpu") from error
    return name


def settle(arguments: argparse.Namespace) -> list[str]:
    """Fill in what the arguments leave open, and refuse what doesn't go together; notes of what is to be said."""
    notes: list[str] = []
    if arguments.predict and arguments.compare:
        raise DsireError("--compare is about the labelled models: leave it out with --predict")
    if arguments.leave_out == "recipe" and not arguments.predict:
        raise DsireError("--leave_out is about how sure --predict is: leave it out")
    if arguments.confidence and not arguments.predict:
        raise DsireError("--confidence is about the sets of sizes that --predict names: leave it out")
    arguments.confidence = arguments.confidence or 0.9
    if arguments.plots and not arguments.output:
        raise DsireError("--plots needs a folder for the pictures: give it with --output")
    arguments.predictor = arguments.predictor or ("log-ridge" if arguments.predict else "dsire")
    if arguments.dataset is None and arguments.subset is None:
        arguments.subset = SHIPPED_SUBSET
        notes.append("no --subset was given: this is the small subset that ships with the script")
    if arguments.dataset is None:
        ships = os.path.isdir(SHIPPED / arguments.subset.replace("_", "/"))
        arguments.dataset = str(SHIPPED) if ships else LORA_WISE
    return notes


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit code, 2 if some of what was asked could not be had."""
    notes, cache = settle(arguments), arguments.cache_dir
    base, process = open_base(arguments.base, cache), Process.join()
    asked: list[Path] = []
    refused: dict[str, str] = {}
    for item in arguments.predict or [] if process.rank == 0 else []:  # before a subset is fetched for nothing
        try:
            files, left_out = files_to_predict(item, cache, base)
            asked += files
            notes += left_out
        except DsireError as error:
            refused[item] = str(error)
            print_error(error)
    if refused and not asked:
        return 2
    device = choose_device(arguments.device)
    if process.rank:  # the first process asks the Hub, or says what is wrong
        process.wait_for_others()
    source = find_source(arguments.dataset, arguments.subset, arguments.revision, cache, base)
    if base and not arguments.predict and not source.shards[0].is_lora:
        raise DsireError("--base is what models in files were fine-tuned from; this is parquet: leave it out")
    if not process.rank:
        process.wait_for_others()
    elif source.shards[0].is_lora:
        return 0  # such a folder is not worth sharing
    rank, about_rank = rank_of(source, arguments.rank)
    spectra = subset_spectra(source, rank, cache, device, arguments.keep_shards, process, base)
    if process.rank:
        return 0  # the first process evaluates
    if arguments.rank and arguments.rank != spectra.values.shape[-1] and "A" in spectra.kinds:
        raise DsireError(f"--rank={arguments.rank} does not fit: the LoRAs have rank {spectra.values.shape[-1]}")
    notes += about_rank + source.notes + spectra.notes + what_is_unusual(spectra)
    there, spectra = " ".join(spectra.kinds), spectra.of_matrices(arguments.matrices)
    if not spectra.voters:
        raise DsireError(f"--matrices {' '.join(arguments.matrices)}: of a {spectra.method} there is only {there}")
    spectra = replace(spectra, values=spectra.values.to(device))
    settings = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()},
        **asdict(source),
        "rank": spectra.values.shape[-1],
        "device": device,
    }
    try:
        if arguments.predict:
            return 0 if predict(arguments, spectra, asked, settings, notes, refused, base) else 2
        report(arguments, spectra, settings, notes)
        return 0
    except KeyboardInterrupt:
        done = len(source.shards)
        kind = "files" if source.shards[0].is_lora else "shards"
        raise KeyboardInterrupt(f"{done} of {done} {kind} are done") from None


def report(arguments: argparse.Namespace, spectra: Spectra, settings: dict[str, Any], notes: list[str]) -> None:
    """Evaluate, compare and draw what the arguments ask for; what is written is written before anything is printed."""
    predictor = PREDICTORS[arguments.predictor]
    protocol = Protocol(arguments.experiments, arguments.train_size, arguments.seed)
    runs = splits(spectra.micro_datasets, protocol)
    predictions = predictor(spectra, runs)
    experiments = judge(spectra, runs, predictions)
    different = len({tuple(run.train.tolist()) for run in runs})
    if different < len(runs):
        notes.append(f"only {different} of the {len(runs)} experiments are different ones")
    lines, summary = report_lines(spectra, experiments, settings, notes), mean_and_std(experiments)
    details: dict[str, Any] = {
        "experiments": [its._asdict() for its in experiments],
        "mean": {metric: mean for metric, (mean, _) in summary.items()},
        "std": {metric: std for metric, (_, std) in summary.items()},
    }
    if arguments.compare:
        comparison = compare(spectra, protocol)
        lines += comparison_lines(spectra, comparison, settings)
        for name, table in comparison.tables.items():
            details[name] = {row: mean_and_std(its) for row, its in table.items()}
        details["by_layer"] = dict(zip(map(" ".join, spectra.voters), comparison.accuracies.tolist(), strict=True))
        details["by_block"] = by_block(spectra, comparison.accuracies)
        details["unlabelled"] = comparison.unlabelled
        details["sure"] = {name: its["all"] for name, its in comparison.sure.items()}
        details["by_recipe"] = {name: table.tolist() for name, table in comparison.recipes.items()}
    with said_at_the_end(lines):
        if arguments.output:
            write_predictions(arguments.output, spectra, runs, predictions)
            write_report(arguments.output, settings, notes, details)
        if arguments.plots:
            growth = by_train_size(spectra, predictor, protocol)
            true = spectra.sizes[torch.cat([run.test for run in runs])]
            predicted = torch.cat([its.sizes for its in predictions])
            title = f"{arguments.predictor} on {settings['subset']}, {len(spectra.names)} models"
            figures: dict[str, Callable[[Any], Any]] = {
                "confusion": lambda plt: confusion_figure(plt, true, predicted, title),
                "spectra": lambda plt: spectra_figure(plt, spectra),
                "layers": lambda plt: layers_figure(plt, spectra),
                "training": lambda plt: training_figure(plt, growth, f"{title} (bars: std over experiments)"),
            }
            draw(arguments.output, figures)


def predict(
    arguments: argparse.Namespace,
    fitted: Spectra,
    paths: list[Path],
    settings: dict[str, Any],
    notes: list[str],
    refused: dict[str, str],
    base: Base | None,
) -> bool:
    """An estimate for each file that can be read, and an error for each that can't; True if all could be.

    `refused` is what the user named and could not be had, and why.
    """
    by_recipe = arguments.leave_out == "recipe"
    units, unit = (fitted.of_recipe, "recipe") if by_recipe else (fitted.micro_datasets, "micro-dataset")
    if by_recipe and len(units.unique()) == 1:
        raise DsireError("--leave_out=recipe needs models of two recipes: a column `recipe` says which is which")
    notes = notes + what_can_be_supported(fitted.sizes, units, arguments.confidence, unit)
    alike: dict[tuple[Any, ...], list[Spectra]] = {}  # files with the same layers are judged together
    width = fitted.values.shape[-1]
    judged: dict[str, tuple[Estimate, Spectra, Spectra]] = {}
    for path in paths:
        try:
            file = matched(file_spectra(path, base, max(LARGEST, width), settings["device"]), fitted)
            alike.setdefault((file.values.shape[-1], *file.voters), []).append(file)
        except DsireError as error:
            refused[str(path)] = about_file(error, path, str(path))
            print_error(refused[str(path)])
    for files in alike.values():
        known = fitted.of_voters(files[0].voters)
        known = replace(known, values=of_rank(known.values, files[0].values.shape[-1]))
        its = estimates(known, files, arguments.predictor, arguments.confidence, by_recipe)
        judged |= {file.names[0]: (estimate, known, file) for estimate, file in zip(its, files, strict=True)}
    drawn = [judged[str(path)] for path in paths if str(path) in judged]
    found = [estimate for estimate, _, _ in drawn]
    if arguments.plots and len(drawn) > PICTURED:
        notes.append(f"estimates.png shows the first {PICTURED} of {len(drawn)} files")
    lines = describe(fitted, settings, notes, f"predictor {arguments.predictor}")
    with said_at_the_end(
        lines + [line for one in found for line in estimate_lines(one, arguments.confidence, by_recipe)]
    ):
        if arguments.output:
            write_estimates(arguments.output, found, refused)
            details = [{**asdict(one), "vote_share": max(one.votes.values())} for one in found]
            write_report(arguments.output, settings, notes, {"estimates": details, "refused": refused})
        if arguments.plots and drawn:
            draw(arguments.output, {"estimates": lambda plt: estimates_figure(plt, drawn[:PICTURED])})
    return not refused


@contextmanager
def said_at_the_end(lines: list[str]) -> Iterator[None]:
    """Files are written before anything is printed, in case nobody reads it; what is found is printed in any case."""
    try:
        yield
    finally:
        try:
            print(*lines, sep="\n", flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            hint = "give --output to have it in files"
            raise DsireError(f"the report can't be printed ({error.strerror}); {hint}") from error


def print_error(error: object) -> None:
    print(f"dsire.py: error: {error}", file=sys.stderr)


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold any bytes
    arguments = command_line().parse_args()
    try:
        return run(arguments)
    except DsireError as error:
        print_error(error)
        code = 2
    except KeyboardInterrupt as interrupt:
        print(f"dsire.py: stopped{f', {interrupt}' if str(interrupt) else ''}; run it again to go on", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    try:
        sys.stdout.flush()
    except OSError:  # what can't be printed is not tried again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    gc.freeze()  # what was imported is no garbage: to search it again and again, and at the exit, takes a second
    exit_code = main()
    gc.freeze()
    sys.exit(exit_code)

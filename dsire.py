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
import hashlib
import json
import os
import queue
import random
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LORA_WISE = "MoSalama98/LoRA-WiSE"
SHIPPED = Path(__file__).resolve().parent / "tests" / "tiny_wise"
SHIPPED_SUBSET = "low_4"
MATRICES = ("A", "B", "BA")
CACHE_FORMAT = 1  # part of every cache key: spectra that were written in another form are computed anew
BLOCK = 2**24  # distances held at once by the nearest-neighbour search: 128 MiB

# MAE, MAPE in % and accuracy in %, mean and standard deviation over ten experiments: the paper's Tables 2, 3 and 4.
PAPER = {
    "low_32": ((0.36, 0.04), (11.36, 1.55), (69.30, 3.83)),
    "low_16": ((0.42, 0.03), (12.4, 1.11), (67.7, 2.3)),
    "low_8": ((0.43, 0.04), (14.8, 2.3), (66.0, 3.08)),
    "medium_32": ((1.48, 0.21), (3.97, 0.73), (86.10, 1.99)),
    "medium_16": ((1.67, 0.17), (4.32, 0.46), (84.04, 1.85)),
    "medium_32_2": ((2.51, 0.22), (7.46, 0.95), (77.43, 1.70)),
    "high_32": ((41.77, 6.61), (5.96, 1.46), (91.90, 1.28)),
}


class DsireError(Exception):
    """Something the user can mend; the message is one line that says what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# A LoRA layer and its spectra (Section 3.1)


def lora_spectra(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular values of A, B and BA, largest first, for a batch of LoRA layers of one shape.

    With Aᵀ = Q R and B = P S (both thin QR), A has the singular values of R, B those of S, and BA = P (S Rᵀ) Qᵀ those
    of S Rᵀ: nothing larger than r x r meets a singular value decomposition, and the out x in product is never formed.

    Args:
        a: A, "down", [..., r, in], float64.
        b: B, "up", [..., out, r], float64.

    Returns:
        Three tensors [..., r] in float64. Where a dimension is smaller than r the missing values are zeros.

    Raises:
        FloatingPointError: a weight is not finite, or so large that the product overflows.
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


class Voter(NamedTuple):
    """One classifier of the vote: a layer's name and the matrix it looks at, "A", "B" or "BA"."""

    layer: str
    matrix: str


@dataclass(frozen=True)
class Spectra:
    """The spectra of some models, with what is known of the models.

    Attributes:
        values: [voters, models, r], float64, on the CPU.
        sizes: n, the number of training images, of each model: int64 [models].
        names: the micro-dataset of each model, strings or integers.
        voters: what each row of `values` is.
    """

    values: Tensor
    sizes: Tensor
    names: list[Any]
    voters: list[Voter]

    def of_models(self, models: list[int]) -> Spectra:
        return replace(
            self, values=self.values[:, models], sizes=self.sizes[models], names=[self.names[model] for model in models]
        )

    def of_matrices(self, matrices: Iterable[str]) -> Spectra:
        rows = [row for row, voter in enumerate(self.voters) if voter.matrix in matrices]
        return replace(self, values=self.values[rows], voters=[self.voters[row] for row in rows])

    def micro_datasets(self) -> list[Any]:
        return sorted(set(self.names))


# ---------------------------------------------------------------------------------------------------------------------
# The voters and the vote (Section 3.2)


def nearest(train: Tensor, test: Tensor) -> Tensor:
    """For each voter and test model, the index of the nearest training model (Euclidean; the first one of equals).

    Args:
        train: [voters, training models, r].
        test: [voters, test models, r].

    Returns:
        int64 [voters, test models]. Memory beyond that is bounded by BLOCK distances.
    """
    voters, models, queries = len(train), train.shape[1], test.shape[1]
    middle = train.mean(1, keepdim=True)  # spectra are far from zero and near each other: the squares would cancel
    train, test = train - middle, test - middle
    squares = train.square().sum(-1)[:, None]
    found = torch.empty(voters, queries, dtype=torch.int64)
    rows = max(1, min(queries, BLOCK // models))
    group = max(1, BLOCK // (models * rows))
    for voter in range(0, voters, group):
        chosen = slice(voter, voter + group)
        for query in range(0, queries, rows):
            part = test[chosen, query : query + rows]
            # |t - s|^2 less |t|^2, which is the same for every s
            distances = torch.baddbmm(squares[chosen], part, train[chosen].mT, alpha=-2)
            found[chosen, query : query + rows] = distances.argmin(-1).cpu()
    return found


def majority(votes: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The size with most votes; among equals the one that was voted first in the order of the voters.

    Args:
        votes: the size that each voter names for each model: int64 [voters, models].
        sizes: the sizes that can be voted for: int64 [sizes].

    Returns:
        The winners, int64 [models], and the share of the votes that each size got, float64 [models, sizes].
    """
    ballots = votes[:, :, None] == sizes  # [voters, models, sizes]
    counts = ballots.sum(0)
    first = ballots.to(torch.uint8).argmax(0)  # the first voter for a size
    first = first.masked_fill(counts < counts.max(-1, keepdim=True).values, len(votes))
    return sizes[first.argmin(-1)], counts.double() / len(votes)


@dataclass(frozen=True)
class Prediction:
    """What a predictor says of some models: sizes [models] and the share of the votes that each answer got [models]."""

    sizes: Tensor
    shares: Tensor


def dsire(train: Spectra, test: Spectra) -> Prediction:
    """The paper's predictor: one 1-NN per voter, fitted on `train`, and the majority of their votes on `test`."""
    votes = train.sizes[nearest(train.values, test.values)]
    winners, shares = majority(votes, train.sizes.unique())
    return Prediction(winners, shares.max(-1).values)


# ---------------------------------------------------------------------------------------------------------------------
# The protocol (Section 5)


@dataclass(frozen=True)
class Experiment:
    """One split of the micro-datasets and what was predicted of its test models."""

    test: list[int]
    prediction: Prediction
    mae: float
    mape: float
    accuracy: float


def splits(names: list[Any], experiments: int, train_size: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Models to train on and models to test on, once per experiment; a micro-dataset is never divided.

    Raises:
        DsireError: there are fewer than train_size + 1 micro-datasets.
    """
    micro_datasets = sorted(set(names))
    if train_size >= len(micro_datasets):
        raise DsireError(
            f"--train_size={train_size} needs at least {train_size + 1} micro-datasets, and there are "
            f"{len(micro_datasets)}: "
            + (
                f"the largest --train_size that works is {len(micro_datasets) - 1}"
                if len(micro_datasets) > 1
                else "an evaluation needs at least two"
            )
        )
    draw = random.Random(seed)
    for _ in range(experiments):
        trained = {micro_datasets[index] for index in draw.sample(range(len(micro_datasets)), train_size)}
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


def evaluate(spectra: Spectra, experiments: int, train_size: int, seed: int, device: str = "cpu") -> list[Experiment]:
    """The paper's protocol: train on `train_size` micro-datasets, test on the others, `experiments` times over."""
    results = []
    placed = replace(spectra, values=spectra.values.to(device))
    for train, test in splits(spectra.names, experiments, train_size, seed):
        prediction = dsire(placed.of_models(train), placed.of_models(test))
        results.append(Experiment(test, prediction, *metrics(spectra.sizes[test], prediction.sizes)))
    return results


def mean_and_std(experiments: list[Experiment]) -> dict[str, tuple[float, float]]:
    """Mean and population standard deviation of each metric over the experiments."""
    table = torch.tensor([[run.mae, run.mape, run.accuracy] for run in experiments], dtype=torch.float64)
    means, stds = table.mean(0).tolist(), table.std(0, correction=0).tolist()
    return dict(zip(("mae", "mape", "accuracy"), zip(means, stds, strict=True), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Weights in parquet: the layout of LoRA-WiSE


def lora_layers(columns: Iterable[str], file: str) -> dict[str, dict[str, str]]:
    """Layer -> {"A": column, "B": column}, layers and matrices in the order of the columns.

    Raises:
        DsireError: a layer has one of the two only, or there is none.
    """
    layers: dict[str, dict[str, str]] = {}
    for column in columns:
        # the whole ending, since "down" also occurs in "down_blocks"
        match = re.fullmatch(r"(.+)\.lora\.(down|up)\.weight", column)
        if match:
            layers.setdefault(match[1], {})["A" if match[2] == "down" else "B"] = column
    for layer, pair in layers.items():
        if len(pair) < 2:
            (there,) = pair.values()
            missing = f"{layer}.lora.{'up' if 'A' in pair else 'down'}.weight"
            raise DsireError(f"{file}: column {there} has no partner {missing}")
    if not layers:
        raise DsireError(f"{file}: no columns named <layer>.lora.down.weight and <layer>.lora.up.weight")
    return layers


def matrix_values(column: Any, name: str, rank: int, file: str) -> Tensor:
    """The flat lists of one column as a batch [models, numbers of a matrix], float64.

    Raises:
        DsireError: not lists of floating point numbers, nulls, lengths that differ or that the rank does not divide.
    """
    import pyarrow as pa

    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type):
        raise DsireError(f"{file}: column {name} holds {kind}, not lists of floating point numbers")
    column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    flat = column.flatten()  # drops the lists that are null, hence the count
    if column.null_count or flat.null_count:
        raise DsireError(f"{file}: column {name} has {column.null_count + flat.null_count} nulls: a matrix is missing")
    lengths = (
        {kind.list_size} if pa.types.is_fixed_size_list(kind) else set(column.value_lengths().unique().to_pylist())
    )
    if len(lengths) > 1:
        raise DsireError(
            f"{file}: column {name} has rows of {min(lengths)} and of {max(lengths)} numbers: one rank only"
        )
    (length,) = lengths
    if length == 0 or length % rank:
        raise DsireError(f"{file}: column {name} has {length} numbers a row, which --rank={rank} does not divide")
    return torch.utils.dlpack.from_dlpack(flat).to(torch.float64).view(-1, length)


def model_labels(table: Any, file: str) -> tuple[Tensor, list[Any]]:
    """The columns `label` (size n) and `name` (micro-dataset) of a shard.

    Raises:
        DsireError: a column is missing, has nulls, or does not hold sizes from 1 up and names.
    """
    import pyarrow as pa

    missing = {"label", "name"} - set(table.column_names)
    if missing:
        raise DsireError(f"{file}: column {' and '.join(sorted(missing))} is missing; there must be `label` and `name`")
    labels, names = table.column("label"), table.column("name")
    if labels.null_count or names.null_count:
        raise DsireError(f"{file}: `label` or `name` has nulls; every model needs its size and micro-dataset")
    kind = names.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DsireError(f"{file}: column name holds {kind}; it must hold strings or integers")
    sizes = labels.to_pylist()
    wrong = [size for size in sizes if not isinstance(size, (int, float)) or size != int(size) or size < 1]
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

    def pair_spectra(file: Any, pair: dict[str, str]) -> list[Tensor]:
        groups = []
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=list(pair.values()), use_threads=False)
            if not len(table):
                continue
            flat = {m: matrix_values(table.column(name), name, rank, path.name) for m, name in pair.items()}
            a = flat["A"].view(len(table), rank, -1).to(device)
            b = flat["B"].view(len(table), -1, rank).to(device)
            try:
                groups.append(torch.stack(lora_spectra(a, b)).cpu())
            except FloatingPointError:
                start = sum(file.metadata.row_group(before).num_rows for before in range(group))
                name_the_model_that_is_not_finite(flat, pair, sizes[start:].tolist(), names[start:])
        return list(torch.cat(groups, dim=1))

    def name_the_model_that_is_not_finite(
        flat: dict[str, Tensor], pair: dict[str, str], its_sizes: list[int], its_names: list[Any]
    ) -> None:
        for matrix, name in pair.items():
            for row, values in enumerate(flat[matrix]):
                if not values.isfinite().all():
                    model = f"model {its_names[row]} of size {its_sizes[row]}"
                    raise DsireError(f"{path.name}: {model} has a weight that is NaN or infinite in column {name}")
        raise DsireError(f"{path.name}: columns {' and '.join(pair.values())} hold numbers too large to multiply")

    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            if not file.metadata.num_rows:
                raise DsireError(f"{path}: no rows; delete the file or fetch it anew")
            columns = file.schema_arrow.names
            sizes, names = model_labels(file.read([name for name in ("label", "name") if name in columns]), path.name)
            layers = lora_layers(columns, path.name)
            with one_torch_thread(), ThreadPoolExecutor(os.cpu_count()) as pool:
                runs = [pool.submit(pair_spectra, file, pair) for pair in layers.values()]
                try:
                    spectra = {layer: run.result() for layer, run in zip(layers, runs, strict=True)}
                finally:
                    pool.shutdown(cancel_futures=True)
    except (pa.ArrowException, OSError) as error:
        raise DsireError(
            f"{path} is not a whole parquet file ({first_line(error)}): delete it and fetch it anew"
        ) from error
    singles = {Voter(layer, m): spectra[layer][MATRICES.index(m)] for layer, pair in layers.items() for m in pair}
    products = {Voter(layer, "BA"): spectra[layer][2] for layer in layers}
    voters = singles | products
    return Spectra(torch.stack(list(voters.values())), sizes, names, list(voters))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Columns are computed in parallel, so each may use one thread only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(" .")


def join_shards(shards: list[Spectra], files: list[str]) -> Spectra:
    """All shards as one; the voters' order is the first shard's.

    Raises:
        DsireError: a shard has other layers than the first one, or another rank.
    """
    voters = shards[0].voters
    values = []
    for shard, file in zip(shards, files, strict=True):
        different = set(shard.voters) ^ set(voters)
        if different:
            layer = min(different).layer
            raise DsireError(f"{file}: layer {layer} is in this shard or in {files[0]}, but not in both")
        order = {voter: row for row, voter in enumerate(shard.voters)}
        same = shard.voters == voters
        values.append(shard.values if same else shard.values[[order[voter] for voter in voters]])
    names = [name for shard in shards for name in shard.names]
    if len({type(name) for name in names}) > 1:  # integers in one shard, strings in another
        names = [str(name) for name in names]
    return Spectra(torch.cat(values, dim=1), torch.cat([shard.sizes for shard in shards]), names, voters)


def what_is_unusual(spectra: Spectra) -> list[str]:
    """Sentences about what a user might not expect in the models: sizes that lack, models that are there twice."""
    models = list(zip(spectra.names, spectra.sizes.tolist(), strict=True))
    notes = []
    twice = len(models) - len(set(models))
    if twice:
        notes.append(f"{twice} models have the micro-dataset and size of another one; all are kept")
    sizes = spectra.sizes.unique().tolist()
    lacking = [name for name in spectra.micro_datasets() if len({n for m, n in models if m == name}) < len(sizes)]
    if lacking:
        some = ", ".join(str(name) for name in lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        notes.append(f"{len(lacking)} micro-datasets lack a size: {some}")
    return notes


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
    """The files of a subset. `commit` is the Hub's commit hash, or "" for a folder."""

    dataset: str
    subset: str
    commit: str
    shards: list[Shard]


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
    notes = []
    if local:
        state = folder_state(folder)
    elif known and revision == known[1].commit:
        state = revision
    else:
        try:
            state = hub_commit(dataset, revision)
        except HubUnreachable as error:
            if not known:
                raise
            state = known[0]
            notes.append(f"{error}; going on with commit {known[1].commit[:12]}, as found before")
    if known and known[0] == state:
        return known[1], notes
    source = resolve(dataset, subset, None if local else state)
    write_whole(note, json.dumps({"state": state, **asdict(source)}, indent=1).encode())
    return source, notes


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
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class HubUnreachable(DsireError):
    """The Hub gave no answer, so that what is in the cache may be used instead."""


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn what huggingface_hub and datasets raise into one line that says what to do."""
    from huggingface_hub import constants, errors

    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of httpx, whose name depends on huggingface_hub's version
    try:
        yield
    except errors.GatedRepoError as error:
        raise DsireError(
            f"{what} is gated: ask for access on its page, then set HF_TOKEN to a token of your account"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DsireError(f"{what} has no such --revision; give one of its branches, tags or commits") from error
    except errors.RepositoryNotFoundError as error:
        raise DsireError(
            f"{what} was not found on {constants.ENDPOINT}: check the name, and set HF_TOKEN if it is private"
        ) from error
    except errors.HfHubHTTPError as error:
        raise HubUnreachable(f"{what}: the Hub answered {first_line(error)}; try again later") from error
    except errors.OfflineModeIsEnabled as error:
        raise HubUnreachable(f"{what} can't be fetched: HF_HUB_OFFLINE is set; unset it") from error
    except (http_error, ConnectionError, TimeoutError) as error:
        raise HubUnreachable(
            f"{what}: {constants.ENDPOINT} can't be reached ({first_line(error)}): check the network or HF_ENDPOINT"
        ) from error


def quiet_libraries() -> None:
    """The libraries' own chatter would bury the report; their errors come as exceptions."""
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()


def hub_commit(dataset: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

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
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.hf_api import RepoFile

    datasets.logging.set_verbosity_error()
    what = f"dataset {dataset}"
    with hub_errors(what):
        try:
            configs = datasets.get_dataset_config_names(dataset, revision=commit)
            if subset is None and len(configs) > 1:
                raise DsireError(f"{what} has several subsets: choose one with --subset: {' '.join(configs)}")
            if subset is not None and subset not in configs:
                raise DsireError(f"--subset={subset} is not in {what}; it has: {' '.join(configs)}")
            builder = datasets.load_dataset_builder(dataset, subset or configs[0], revision=commit)
        except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
            raise DsireError(f"{what} has no data to read ({first_line(error)})") from error
        files = [file for split in (builder.config.data_files or {}).values() for file in split]
        wrong = [file for file in files if not file.endswith(".parquet")]
        if wrong or not files:
            found = f"{Path(wrong[0]).name}, which is not" if wrong else "no"
            raise DsireError(f"{what}: subset {builder.config.name} has {found} parquet")
        if commit is None:
            stats = [(str(file), Path(file).stat()) for file in files]
            shards = [Shard(file, stat.st_size, f"mtime-{stat.st_mtime_ns}") for file, stat in stats]
            return Source(dataset, builder.config.name, "", shards)
        repository, paths = dataset, []
        for file in files:
            place = HfFileSystem().resolve_path(file)
            assert isinstance(place, HfFileSystemResolvedRepositoryPath)
            repository = place.repo_id
            paths.append(place.path_in_repo)
        facts = HfApi().get_paths_info(repository, paths, repo_type="dataset", revision=commit)
    shards = [
        Shard(fact.path, fact.size, fact.lfs.sha256 if fact.lfs else fact.blob_id)
        for fact in facts
        if isinstance(fact, RepoFile)
    ]
    return Source(
        places[0].repo_id, builder.config.name, commit, sorted(shards, key=lambda shard: paths.index(shard.file))
    )


def fetch(source: Source, shard: Shard, cache: Path) -> Path:
    """The shard on disk: where it is, or downloaded by huggingface_hub (resumed, and checked against its SHA-256).

    Raises:
        DsireError: it can't be had, or is damaged also when it is fetched anew.
    """
    if not source.commit:
        return Path(shard.file)
    from huggingface_hub import hf_hub_download

    folder = cache / "downloads" / source.dataset.replace("/", "--")
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
    digest = hashlib.sha256(cache_key(shard, rank).encode()).hexdigest()[:16]
    return cache / "spectra" / f"{Path(shard.file).stem}-{digest}.safetensors"


def save_spectra(spectra: Spectra, shard: Shard, rank: int, cache: Path) -> None:
    from safetensors.torch import save

    about = {"key": cache_key(shard, rank), "names": json.dumps(spectra.names), "voters": json.dumps(spectra.voters)}
    content = save({"spectra": spectra.values.contiguous(), "sizes": spectra.sizes}, about)
    write_whole(spectra_file(shard, rank, cache), content)


def load_spectra(shard: Shard, rank: int, cache: Path) -> Spectra | None:
    """The spectra of a shard from the cache; None if they aren't there, or damaged, or of something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(spectra_file(shard, rank, cache), "pt") as file:
            about = file.metadata()
            if about["key"] != cache_key(shard, rank):
                return None
            voters = [Voter(*voter) for voter in json.loads(about["voters"])]
            return Spectra(file.get_tensor("spectra"), file.get_tensor("sizes"), json.loads(about["names"]), voters)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def fetched_ahead(source: Source, shards: list[Shard], cache: Path) -> Iterator[tuple[Shard, Path]]:
    """Each shard with its path; the next one is downloaded while the caller works on the one it has.

    The thread is a daemon: an error or Ctrl-C ends the script at once, and huggingface_hub resumes the download later.
    """
    turns: queue.Queue[Shard] = queue.Queue()
    paths: queue.Queue[Path | BaseException] = queue.Queue()

    def download() -> None:
        while True:
            try:
                paths.put(fetch(source, turns.get(), cache))
            except BaseException as error:  # it belongs to the caller, who raises it
                paths.put(error)

    threading.Thread(target=download, daemon=True).start()
    for shard in shards[:1]:
        turns.put(shard)
    for number, shard in enumerate(shards):
        path = paths.get()
        if isinstance(path, BaseException):
            raise path
        for following in shards[number + 1 : number + 2]:
            turns.put(following)
        yield shard, path


def subset_spectra(source: Source, rank: int, cache: Path, device: str = "cpu", keep_shards: bool = False) -> Spectra:
    """The spectra of a whole subset: from the cache, and for the shards that it lacks from their parquet.

    Each shard's spectra are written before its download is deleted, so that a run that is killed goes on at its shard.
    """
    from tqdm import tqdm

    found = {shard: load_spectra(shard, rank, cache) for shard in source.shards}
    missing = [shard for shard, spectra in found.items() if spectra is None]
    progress = tqdm(total=len(source.shards), initial=len(source.shards) - len(missing), unit="shard", disable=None)
    with progress:
        for shard, path in fetched_ahead(source, missing, cache):
            progress.set_description(path.name)
            found[shard] = spectra = shard_spectra(path, rank, device)
            save_spectra(spectra, shard, rank, cache)
            if source.commit and not keep_shards:
                path.unlink(missing_ok=True)
            progress.update()
    return join_shards([found[shard] for shard in source.shards], [shard.file for shard in source.shards])


def rank_of(subset: str, rank: int | None) -> int:
    """The rank of the LoRAs in a subset: `rank`, or the one in its name, such as 32 in medium_32_2.

    Raises:
        DsireError: neither says it, or they contradict each other.
    """
    match = re.fullmatch(r"[a-z]+_(\d+)(_\d+)?", subset)
    named = int(match[1]) if match else None
    if rank is None and named is None:
        raise DsireError(f"subset {subset} doesn't have the rank in its name: give it with --rank")
    if rank is not None and named is not None and rank != named:
        raise DsireError(f"--rank={rank} contradicts the name of subset {subset}, whose rank is {named}")
    return rank or named or 0


# ---------------------------------------------------------------------------------------------------------------------
# The report


def print_report(spectra: Spectra, experiments: list[Experiment], settings: dict[str, Any], notes: list[str]) -> None:
    subset, matrices = settings["subset"], settings["matrices"]
    sizes = " ".join(str(size) for size in spectra.sizes.unique().tolist())
    micro_datasets, train_size = len(spectra.micro_datasets()), settings["train_size"]
    layers = len({voter.layer for voter in spectra.voters})
    print(f"{subset}: {len(spectra.names)} models, {micro_datasets} micro-datasets, sizes {sizes}")
    print(f"rank {settings['rank']}, {layers} layers x {' '.join(matrices)} = {len(spectra.voters)} voters")
    print(
        f"{len(experiments)} experiments: {train_size} micro-datasets to train, {micro_datasets - train_size} to test"
    )
    for note in notes:
        print(f"note: {note}")
    print(f"\n{'':8}{'MAE':>15}{'MAPE %':>17}{'accuracy %':>17}")
    rows = {"DSiRe": list(mean_and_std(experiments).values())}
    if subset in PAPER and set(matrices) == set(MATRICES):
        rows["paper"] = list(PAPER[subset])
    for row, values in rows.items():
        print(
            f"{row:8}"
            + "".join(f"{f'{mean:.2f} ± {std:.2f}':>{15 + 2 * (i > 0)}}" for i, (mean, std) in enumerate(values))
        )


def write_report(
    output: Path, spectra: Spectra, experiments: list[Experiment], settings: dict[str, Any], notes: list[str]
) -> None:
    """report.json and predictions.csv, for programs."""
    packages = ("torch", "numpy", "scikit-learn", "huggingface_hub", "datasets", "pyarrow", "safetensors")
    summary = mean_and_std(experiments)
    report = {
        "settings": settings,
        "versions": {"python": sys.version.split()[0], **{package: version(package) for package in packages}},
        "notes": notes,
        "experiments": [{"mae": run.mae, "mape": run.mape, "accuracy": run.accuracy} for run in experiments],
        "mean": {metric: mean for metric, (mean, _) in summary.items()},
        "std": {metric: std for metric, (_, std) in summary.items()},
    }
    write_whole(output / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    with disk_errors(output), (output / "predictions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["experiment", "name", "size", "predicted", "vote_share"])
        for number, run in enumerate(experiments, start=1):
            answers = zip(run.test, run.prediction.sizes.tolist(), run.prediction.shares.tolist(), strict=True)
            for model, predicted, share in answers:
                rows.writerow([number, spectra.names[model], int(spectra.sizes[model]), predicted, f"{share:.4f}"])


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
    add("--device", help="cuda, cpu, ... (default: cuda if available)")
    add("--keep_shards", action="store_true", help="keep downloads after their spectra are computed")
    add("--output", type=Path, help="folder for report.json and predictions.csv")
    return parser


def choose_device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise DsireError(f"--device={name} can't be used here ({first_line(error)})") from error
    return name


def run(arguments: argparse.Namespace) -> None:
    notes = []
    if arguments.subset is None and arguments.dataset is None:
        arguments.dataset, arguments.subset = str(SHIPPED), SHIPPED_SUBSET
        notes.append("no --subset was given: this is the small subset that ships with the script")
    device = choose_device(arguments.device)
    cache = arguments.cache_dir
    source, said = find_source(arguments.dataset or LORA_WISE, arguments.subset, arguments.revision, cache)
    rank = rank_of(source.subset, arguments.rank)
    spectra = subset_spectra(source, rank, cache, device, arguments.keep_shards)
    notes += said + what_is_unusual(spectra)
    spectra = spectra.of_matrices(arguments.matrices)
    results = evaluate(spectra, arguments.experiments, arguments.train_size, arguments.seed, device)
    settings = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()},
        **asdict(source),
        "rank": rank,
        "device": device,
    }
    print_report(spectra, results, settings, notes)
    if arguments.output:
        write_report(arguments.output, spectra, results, settings, notes)


def main() -> int:
    arguments = command_line().parse_args()
    try:
        run(arguments)
    except DsireError as error:
        print(f"dsire.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dsire.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the tests share: folders in LoRA-WiSE's layout, the command run in this process, and a Hub that stands in."""

import csv
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_stand_in import HubStandIn
from hypothesis import settings

ROOT = Path(os.environ.get("DSIRE_ROOT", Path(__file__).resolve().parent.parent))
TINY_WISE = ROOT / "tests" / "tiny_wise"

# huggingface_hub reads its environment when it is imported: one address of the stand-in for all tests of this process.
HOME = tempfile.TemporaryDirectory(prefix="hf-home-")
with HubStandIn(TINY_WISE, "any/repository") as somewhere:
    PORT, ENVIRONMENT = somewhere.port, somewhere.environment(HOME.name)
os.environ.clear()
os.environ.update(ENVIRONMENT)
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import dsire  # noqa: E402

torch.set_num_threads(1)  # what tests compute is small

settings.register_profile("same every time", deadline=None, derandomize=True, database=None)
settings.load_profile("same every time")

Model = tuple[Any, int]  # name and size
LAYERS = ("unet.down_blocks.0.attn1.to_q", "unet.mid_block.attn2.to_k", "unet.up_blocks.1.attn1.to_out.0")
LABELLED = list(itertools.product("abc", (10, 20, 30)))
RANK = 4
BOMB = "a0: &a0 [x,x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def models_of(micro_datasets: int, sizes: Sequence[int] = (1, 2, 3, 4, 5, 6)) -> list[Model]:
    """Every micro-dataset at every size, in an order that is no order."""
    models = [(f"thing_{number:02d}", size) for number in range(micro_datasets) for size in sizes]
    random.Random(0).shuffle(models)
    return models


def weights_of(model: Model, rank: int = RANK, layers: Sequence[str] = LAYERS) -> dict[str, torch.Tensor]:
    """Column -> matrix, float32 precise: noise that is the model's own, on a scale that shrinks with its size."""
    draw = np.random.default_rng(list(repr(model).encode()))
    scale = float(model[1]) ** -0.2
    weights = {}
    for number, layer in enumerate(layers):
        down, up = (rank, 16 + 8 * (number % 3)), (24 + 8 * (number % 2), rank)
        weights[f"{layer}.lora.down.weight"] = torch.from_numpy(scale * draw.normal(size=down)).float()
        weights[f"{layer}.lora.up.weight"] = torch.from_numpy(scale * draw.normal(size=up)).float()
    return weights


def table_of(models: Sequence[Model], number: pa.DataType | None = None, **options: Any) -> pa.Table:
    """Models as rows of LoRA-WiSE: `label`, `name` and a flat list of float64 (or `number`) for every matrix."""
    rows = [weights_of(model, **options) for model in models]
    columns = {"label": pa.array([size for _, size in models]), "name": pa.array([name for name, _ in models])}
    for column in rows[0]:
        values = [row[column].double().flatten().numpy() for row in rows]
        columns[column] = pa.array(values, pa.list_(number or pa.float64()))
    return pa.table(columns)


def change(table: pa.Table, column: str, row: int, edit: Callable[[list[float]], Any]) -> pa.Table:
    """The table with one matrix edited: `edit` takes its flat list and returns another one."""
    values = table.column(column).to_pylist()
    values[row] = edit(values[row])
    return table.set_column(table.column_names.index(column), column, pa.array(values, pa.list_(pa.float64())))


def write_folder(folder: Path, shards: Sequence[Any], subset: str = "low_4", **options: Any) -> Path:
    """A folder in LoRA-WiSE's layout: README.md with `configs`, and a file for each shard: a table, or its models."""
    path, shards = subset.replace("_", "/", 1), [its if isinstance(its, pa.Table) else table_of(its) for its in shards]
    (folder / path).mkdir(parents=True)
    for number, shard in enumerate(shards):
        pq.write_table(shard, folder / path / f"train-{number:05d}-of-{len(shards):05d}.parquet", **options)
    numbers = {True: "sequence: float64", False: "dtype: string"}
    features = [f"  - name: {field.name}\n    {numbers['.lora.' in field.name]}\n" for field in shards[0].schema]
    info = f"dataset_info:\n- config_name: {subset}\n  features:\n{''.join(features)}"
    configs = f"configs:\n- config_name: {subset}\n  data_files:\n  - split: train\n    path: {path}/train-*\n"
    (folder / "README.md").write_text(f"---\n{info}{configs}---\n")
    return folder


def write_three(folder: Path) -> Path:
    """20 micro-datasets of 6 sizes in three shards, made by a formula."""
    models = models_of(20)
    return write_folder(folder, [models[start : start + 40] for start in (0, 40, 80)])


def parquet_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.parquet"))


def write_labelled(folder: Path, models: Iterable[Model] = LABELLED, prefix: str = "", of: Any = weights_of) -> Path:
    """A file a10.safetensors for each model, with metadata.csv."""
    rows = ["file_name,label,name"]
    folder.mkdir()
    for name, size in models:
        file = f"{prefix}{name}{size}.safetensors"
        save_file(of((name, size)), folder / file)
        rows.append(f"{file},{size},{name}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="session")
def tiny_wise() -> Path:
    assert parquet_files(TINY_WISE / "low" / "4"), "the subset that ships is missing"
    return TINY_WISE


@pytest.fixture(scope="session")
def shipped(tiny_wise: Path) -> dsire.Spectra:
    files = parquet_files(tiny_wise / "low" / "4")
    return dsire.join([dsire.shard_spectra(file, RANK) for file in files], [str(file) for file in files])


def spectra_of(values: torch.Tensor, sizes: Any = None, names: Any = None) -> dsire.Spectra:
    """Values [voters, models, r] as spectra of A, B and BA of layers, and of models that may be any."""
    models = values.shape[1]
    voters = [dsire.Voter(f"layer_{row // 3}", dsire.MATRICES[row % 3]) for row in range(len(values))]
    sizes, shapes = torch.as_tensor(sizes or [1] * models), {voter.layer: [4, 4, values.shape[2]] for voter in voters}
    return dsire.Spectra(values.double(), sizes, list(names or range(models)), voters, shapes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_three(tmp_path / "wise")


@dataclass
class Outcome:
    code: int
    out: str
    err: str
    output: Path

    def __post_init__(self) -> None:
        """What is written is read at once: another run may write to the same folder."""
        self.written = {file.name: file.read_text() for file in self.output.glob("*.[jc]s*")}

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self.written["report.json"])

    @property
    def predictions(self) -> str:
        return self.written["predictions.csv"]

    def says(self, *parts: str) -> bool:
        """Ended with an error of one line that contains these parts."""
        assert self.code == 2, self.err
        assert re.fullmatch(r"dsire\.py: error: .*\n", self.err), self.err
        assert not [part for part in parts if part not in self.err], self.err
        return True


Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process, with a cache of the test's own."""
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: Any) -> Outcome:
        monkeypatch.setattr(sys, "argv", command(tmp_path, *arguments)[1:])
        capsys.readouterr()
        try:
            code = dsire.main()
        except SystemExit as stop:
            code = stop.code
        return Outcome(code, *capsys.readouterr(), tmp_path / "output")

    return run_command


def command(tmp_path: Path, *arguments: Any) -> list[str]:
    """The command as `run` runs it, for a process of its own."""
    options = [f"--cache_dir={tmp_path / 'cache'}", f"--output={tmp_path / 'output'}", "--device=cpu"]
    return [sys.executable, str(ROOT / "dsire.py"), *options, *map(str, arguments)]


@pytest.fixture
def run_anew(tmp_path: Path) -> Run:
    """Run the command in a new process, with the same cache as `run`."""

    def run_command(*arguments: Any, **environment: str) -> Outcome:
        options: dict[str, Any] = {"cwd": tmp_path, "env": os.environ | environment, "timeout": 120}
        done = subprocess.run(command(tmp_path, *arguments), capture_output=True, text=True, **options)
        return Outcome(done.returncode, done.stdout, done.stderr, tmp_path / "output")

    return run_command


def wait_for_threads(seconds: float) -> None:
    """A run that ended with an error may still be fetching a shard ahead: it ends before the next test starts."""
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(seconds)


@pytest.fixture
def hub(folder: Path) -> Iterator[HubStandIn]:
    """The stand-in Hub, with `folder` as the dataset LoRA-WiSE."""
    from huggingface_hub import close_session

    with HubStandIn(folder, dsire.LORA_WISE, port=PORT) as stand_in:
        yield stand_in
        wait_for_threads(2)
    wait_for_threads(20)  # what stalled is cut off
    close_session()


FIRST, SECOND, THIRD = (f"train-0000{number}-of-00003" for number in range(3))


def fetched(hub: HubStandIn) -> list[str]:
    """The shards whose content was asked for, in the order of their names."""
    paths = [request.path for request in hub.requests if request.method == "GET" and "/cdn/" in request.path]
    return sorted(Path(path).stem for path in paths)


# The whole method once more, by the book: full products, scikit-learn, Counter
class Reference(NamedTuple):
    """An experiment by the book: the test models, the votes on them [voters, test], what most say, and their share."""

    test: list[int]
    votes: np.ndarray
    predicted: list[int]
    shares: list[float]


def reference_spectra(files: Sequence[Path], rank: int) -> tuple[list[Model], list[np.ndarray]]:
    """The models, and for each voter its spectra [models, rank]: A and B in the columns' order, then the products."""
    table = pa.concat_tables([pq.read_table(file) for file in files])
    models = list(zip(table.column("name").to_pylist(), table.column("label").to_pylist(), strict=True))
    factors = {}
    for column in table.column_names:
        if ".lora." in column:
            flat = torch.tensor(np.stack(table.column(column).to_numpy()))
            factors[column] = flat.view(len(models), *((rank, -1) if ".down." in column else (-1, rank)))
    layers = dict.fromkeys(column.rsplit(".lora.", 1)[0] for column in factors)
    products = [factors[f"{layer}.lora.up.weight"] @ factors[f"{layer}.lora.down.weight"] for layer in layers]
    return models, [torch.linalg.svdvals(matrix)[:, :rank].numpy() for matrix in (*factors.values(), *products)]


def reference_experiments(models: list[Model], voters: list[np.ndarray], experiments: int = 10) -> list[Reference]:
    """The protocol with 15 micro-datasets to train on and seed 42."""
    from sklearn.neighbors import KNeighborsClassifier

    names, sizes = sorted({name for name, _ in models}), np.array([size for _, size in models])
    draw = random.Random(42)
    results = []
    for _ in range(experiments):
        trained = {names[index] for index in draw.sample(range(len(names)), 15)}
        train = [model for model, (name, _) in enumerate(models) if name in trained]
        test = [model for model, (name, _) in enumerate(models) if name not in trained]
        votes = np.stack([KNeighborsClassifier(1).fit(x[train], sizes[train]).predict(x[test]) for x in voters])
        winners = [Counter(ballots.tolist()).most_common(1)[0] for ballots in votes.T]
        shares = [count / len(voters) for _, count in winners]
        results.append(Reference(test, votes, [size for size, _ in winners], shares))
    return results


Book = tuple[list[Model], list[Reference]]


def by_the_book(folder: Path) -> Book:
    models, voters = reference_spectra(parquet_files(folder), RANK)
    return models, reference_experiments(models, voters)


@pytest.fixture(scope="session")
def shipped_by_the_book(tiny_wise: Path) -> Book:
    return by_the_book(tiny_wise / "low" / "4")


def rows_of(predictions: str) -> list[tuple[int, str, int, int, float]]:
    header, *rows = csv.reader(io.StringIO(predictions))
    assert header == ["experiment", "name", "size", "predicted", "vote_share"]
    return [(int(run), name, int(size), int(guess), float(share)) for run, name, size, guess, share in rows]


def assert_right(outcome: Outcome, book: Book, experiments: int = 10) -> None:
    """It went well, and predicted what scikit-learn and Counter do."""
    assert outcome.code == 0, outcome.err
    models, runs = book
    assert rows_of(outcome.predictions) == [
        (number, str(models[model][0]), models[model][1], guess, pytest.approx(share, abs=1e-4))
        for number, run in enumerate(runs[:experiments], start=1)
        for model, guess, share in zip(run.test, run.predicted, run.shares, strict=True)
    ]

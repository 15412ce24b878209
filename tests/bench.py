"""Measure dsire.py against the disk and against plain libraries, all in one run: a table of ratios.

    python tests/bench.py                    # makes its data in a temporary folder (6 GB), then deletes it
    python tests/bench.py --folder /data     # keeps the data there for the next run

The data are random weights in the layout of LoRA-WiSE, SD 1.5's 128 pairs of matrices, just written or read once, so
they are in the page cache. Whatever a user would start as a command is measured in a process of its own, after its
imports. Times to compare are taken in turns, and the shortest counts: what else runs on the machine only adds.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from make_big_wise import LAYERS
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dsire  # noqa: E402

TURNS = 5


def make(folder: Path, rank: int, models: int, shards: int) -> Path:
    """A subset of SD 1.5's shapes, made once."""
    place = folder / f"rank{rank}_models{models}_shards{shards}"
    if not (place / "README.md").exists():
        script = ROOT / "tests" / "make_big_wise.py"
        sizes = ["--rank", str(rank), "--models", str(models), "--shards", str(shards)]
        subprocess.run([sys.executable, script, place, *sizes], check=True)
    return place


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_memory() -> float:
    """The peak resident memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def fastest(*what: Any, measure: Callable[..., float] = seconds, turns: int = TURNS) -> list[float]:
    """The shortest time of each in seconds; they take turns."""
    times = [[measure(its) for its in what] for _ in range(turns)]
    return [min(its) for its in zip(*times, strict=True)]


# What is measured in a process of its own: a function of a subset and its rank
def read_table(subset: Path, rank: int) -> None:
    """The floor: each table is read, and dropped before the next one."""
    for path in sorted(subset.rglob("*.parquet")):
        pq.read_table(path)


def spectra(subset: Path, rank: int) -> None:
    """What the command does from shards on disk to spectra in the cache."""
    with tempfile.TemporaryDirectory() as cache:
        found = [dsire.Shard(str(path), path.stat().st_size, "bench") for path in sorted(subset.rglob("*.parquet"))]
        dsire.subset_spectra(dsire.Source(str(subset), "bench", "", found, []), rank, Path(cache))


def plain_flow(subset: Path, rank: int) -> None:
    """A script without care for speed: pandas, a matrix at a time, svd_lowrank; float32 is four times as fast here."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        table = datasets.load_dataset(str(subset), split="train", cache_dir=cache).to_pandas()
    downs = [column for column in table.columns if column.endswith(".lora.down.weight")]
    for _, row in table.iterrows():
        for down in downs:
            a = torch.tensor(row[down], dtype=torch.float32).reshape(rank, -1)
            b = torch.tensor(row[down.replace(".lora.down.", ".lora.up.")], dtype=torch.float32).reshape(-1, rank)
            for matrix in (a, b, b @ a):
                torch.svd_lowrank(matrix, q=rank)


def command(subset: Path, rank: int, cores: int = 0) -> None:
    """The whole command; as if the machine had so many cores, unless 0."""
    dsire.cores = (lambda: cores) if cores else dsire.cores
    with tempfile.TemporaryDirectory() as cache:
        sys.argv = ["dsire.py", "--dataset", str(subset), "--cache_dir", cache, "--train_size=1", "--experiments=1"]
        assert dsire.main() == 0


ALONE = {function.__name__: function for function in (read_table, spectra, plain_flow, command)}
ALONE["64 cores"] = partial(command, cores=64)


def alone(name: str, subset: Path, rank: int) -> tuple[float, float]:
    """The seconds that one of ALONE takes in a new process, and its peak memory."""
    line = [sys.executable, __file__, "--alone", name, str(subset), str(rank)]
    *_, last = subprocess.check_output(line, stderr=subprocess.DEVNULL, text=True).splitlines()
    took, peak = map(float, last.split())
    return took, peak


def in_turns(names: list[str], subset: Path, rank: int, turns: int = TURNS) -> list[float]:
    return fastest(*names, measure=lambda name: alone(name, subset, rank)[0], turns=turns)


# The evaluation, on spectra in memory
def random_spectra(models: int, rank: int, voters: int = 384, seed: int = 0) -> dsire.Spectra:
    """Sorted positive numbers that shrink with the size: not spectra of anything, but of their shape."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1, 2, 3, 4, 5, 6]).repeat(models // 6 + 1)[:models]
    values = torch.rand(voters, models, rank, generator=draw, dtype=torch.float64).sort(-1, descending=True).values
    values *= (1 + 0.05 * torch.randn(voters, models, 1, generator=draw, dtype=torch.float64)) / sizes[:, None] ** 0.2
    names = [model // 6 for model in range(models)]
    order = [dsire.Voter(f"layer_{number // 3}", dsire.MATRICES[number % 3]) for number in range(voters)]
    return dsire.Spectra(values, sizes, names, order, {voter.layer: [1280, 1280, rank] for voter in order})


def neighbours(spectra: dsire.Spectra, protocol: dsire.Protocol) -> list[list[int]]:
    """The experiments with one scikit-learn classifier per voter and Counter."""
    from sklearn.neighbors import KNeighborsClassifier

    values, sizes, answers = spectra.values.numpy(), spectra.sizes.numpy(), []
    for train, test in dsire.splits(spectra.micro_datasets, protocol):
        votes = [KNeighborsClassifier(1).fit(x[train], sizes[train]).predict(x[test]).tolist() for x in values]
        answers.append([Counter(column).most_common(1)[0][0] for column in zip(*votes, strict=True)])
    return answers


def evaluate(spectra: dsire.Spectra, protocol: dsire.Protocol) -> list[dsire.Metrics]:
    runs = dsire.splits(spectra.micro_datasets, protocol)
    return dsire.judge(spectra, runs, dsire.dsire(spectra, runs))


def big_evaluation() -> None:
    """10,000 models by 384 voters, one experiment, in this process: printed are seconds and peak memory."""
    spectra = random_spectra(10_002, 32)
    took = seconds(lambda: evaluate(spectra, dsire.Protocol(experiments=1, train_size=500)))
    print(f"{took:.0f} s, {peak_memory():.1f} GB")


# The table
def row(what: str, value: str, goal: str) -> None:
    print(f"| {what} | {value} | {goal} |", flush=True)


def ratio_row(what: str, one: float, other: float, goal: str) -> None:
    row(what, f"{one:.2f} s / {other:.2f} s = {one / other:.2f}", goal)


def bench_spectra(folder: Path) -> None:
    for rank, models in ((16, 24), (32, 12)):
        subset = make(folder, rank, models, 2)
        floor, ours = in_turns(["read_table", "spectra"], subset, rank)
        ratio_row(f"shards to cached spectra / `read_table`, {models} models of rank {rank}", ours, floor, "≤ 1.2")
    subset = make(folder, 16, 12, 1)
    (ours,) = in_turns(["spectra"], subset, 16)
    (plain,) = in_turns(["plain_flow"], subset, 16, turns=2)
    ratio_row("`load_dataset`, pandas, `svd_lowrank` / ours, 12 models of rank 16", plain, ours, "≥ 8")
    times = [in_turns(["spectra"], make(folder, 16, 12 * n, n), 16)[0] for n in (1, 2, 4)]
    growth = ", ".join(f"{took:.2f} s" for took in times)
    growth += f" = 1 : {times[1] / times[0]:.2f} : {times[2] / times[0]:.2f}"
    row("spectra of 12, 24, 48 models of rank 16", growth, "linear")
    for models, count in ((24, 2), (96, 8)):
        _, peak = alone("command", make(folder, 16, models, count), 16)
        row(f"peak memory of the whole command, {count} shards of 300 MB", f"{peak:.2f} GB", "≤ 1.2 GB")
    _, peak = alone("64 cores", make(folder, 32, 48, 2), 32)
    row("peak memory with 64 threads, 2 shards of 24 models of rank 32", f"{peak:.2f} GB", "≤ 1.2 GB")


def bench_evaluation() -> None:
    spectra, protocol = random_spectra(300, 32), dsire.Protocol()
    runs = dsire.splits(spectra.micro_datasets, protocol)
    found = [its.sizes.tolist() for its in dsire.dsire(spectra, runs)]
    expected = neighbours(spectra, protocol)
    ours, plain = fastest(lambda: evaluate(spectra, protocol), lambda: neighbours(spectra, protocol))
    row("ten experiments, 300 models × 384 voters × rank 32", f"{ours:.2f} s", "≤ 1 s")
    ratio_row("the same with a `KNeighborsClassifier` per voter / ours", plain, ours, "≥ 10")
    equal = sum(x == y for one, other in zip(found, expected, strict=True) for x, y in zip(one, other, strict=True))
    row("predictions equal to those", f"{equal} of {sum(map(len, expected))}", "all")
    big = subprocess.check_output([sys.executable, __file__, "--big_evaluation"], text=True).strip()
    row("one experiment, 3,000 models against 7,002 × 384 voters × rank 32", big, "≤ 4 GB")
    file = random_spectra(6, 32, seed=1).of_models(torch.tensor([0]))
    (took,) = fastest(lambda: dsire.estimates(spectra, [file], "log-ridge", 0.9))
    what = "`--predict` of one file, log-ridge, 300 models × 384 voters × rank 32, from spectra in memory"
    row(what, f"{took:.2f} s", "≤ 3 s")


def bench_full_fine_tune(folder: Path) -> None:
    """The 128 attention matrices of SD 1.5, random, and the same with a small random change."""
    base, file = folder / "base.safetensors", folder / "full.safetensors"
    draw = torch.Generator().manual_seed(0)
    weights = {f"{layer}.weight": 0.05 * torch.randn(*shape, generator=draw) for layer, *shape in LAYERS}
    save_file(weights, base)
    save_file({key: old + 1e-3 * torch.randn(old.shape, generator=draw) for key, old in weights.items()}, file)

    def plain() -> None:
        new, old = load_file(file), load_file(base)
        for key, tensor in new.items():
            torch.linalg.svdvals(tensor.double() - old[key].double())

    one, other = fastest(lambda: dsire.file_spectra(file, dsire.open_base(str(base))), plain, turns=2)
    what = "a full fine-tune of SD 1.5's 128 attention matrices / `svdvals` of each change"
    ratio_row(what, one, other, "< 1")


def bench_start() -> None:
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory() as cache:
        whole = [sys.executable, str(ROOT / "dsire.py"), "--cache_dir", cache]
        only_torch = [sys.executable, "-c", "import torch"]
        subprocess.run(whole, **quiet)
        one, other = fastest(lambda: subprocess.run(whole, **quiet), lambda: subprocess.run(only_torch, **quiet))
    ratio_row("`python dsire.py` on cached spectra / `python -c 'import torch'`", one, other, "≤ 1.5")


def bench(folder: Path) -> None:
    names = ("torch", "numpy", "pyarrow", "datasets", "scikit-learn")
    libraries = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {libraries}\n")
    row("measured", "value", "goal")
    row("---", "---", "---")
    bench_spectra(folder)
    bench_evaluation()
    bench_full_fine_tune(folder)
    bench_start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the data is made and kept (default: a temporary folder)")
    parser.add_argument("--alone", nargs=3, metavar=("WHAT", "SUBSET", "RANK"), help="print one thing's seconds and GB")
    parser.add_argument("--big_evaluation", action="store_true", help="only the evaluation of 10,000 models")
    arguments = parser.parse_args()
    if arguments.alone:
        what, subset, rank = arguments.alone
        print(seconds(lambda: ALONE[what](Path(subset), int(rank))), peak_memory())
    elif arguments.big_evaluation:
        big_evaluation()
    else:
        with tempfile.TemporaryDirectory() as folder:
            bench(arguments.folder or Path(folder))


if __name__ == "__main__":
    main()

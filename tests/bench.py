"""Measure dsire.py against the disk and against plain libraries, all in one run: a table of ratios.

    python tests/bench.py                    # makes its data in a temporary folder (2.5 GB), then deletes it
    python tests/bench.py --folder /data     # keeps the data there for the next run

The data are random weights: only times and memory are measured on them, never an accuracy.
"""

from __future__ import annotations

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
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dsire  # noqa: E402

PEAK = """
import resource, sys
sys.path.insert(0, {root!r}); sys.argv = ["dsire.py"] + {arguments!r}
import dsire
code = dsire.main()
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def make(folder: Path, rank: int, models: int, shards: int) -> list[Path]:
    """A folder of SD 1.5's shapes, made once."""
    place = folder / f"rank{rank}_models{models}_shards{shards}"
    if not (place / "README.md").exists():
        script = ROOT / "tests" / "make_big_wise.py"
        sizes = ["--rank", str(rank), "--models", str(models), "--shards", str(shards)]
        subprocess.run([sys.executable, script, place, *sizes], check=True)
    return sorted(place.rglob("*.parquet"))


def best(function: Callable[[], object], times: int = 3) -> float:
    """The shortest of some times in seconds: what else runs on the machine only ever adds."""
    measured = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        measured.append(time.perf_counter() - start)
    return min(measured)


def spectra_to_cache(shards: list[Path], rank: int) -> None:
    """What the command does from shards on disk to spectra in the cache."""
    with tempfile.TemporaryDirectory() as cache:
        found = [dsire.Shard(str(path), path.stat().st_size, "bench") for path in shards]
        dsire.subset_spectra(dsire.Source("bench", "bench", "", found), rank, Path(cache))


def plain_flow(folder: Path, rank: int) -> None:
    """The steps of a script without care for speed: the whole table in pandas, one matrix at a time, svd_lowrank."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        table = datasets.load_dataset(str(folder), split="train", cache_dir=cache).to_pandas()
    downs = [column for column in table.columns if column.endswith(".lora.down.weight")]
    for _, row in table.iterrows():
        for down in downs:
            a = torch.tensor(row[down]).reshape(rank, -1)
            b = torch.tensor(row[down.replace(".lora.down.", ".lora.up.")]).reshape(-1, rank)
            for matrix in (a, b, b @ a):
                torch.svd_lowrank(matrix, q=rank)


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
    for train, test in dsire.splits(spectra.names, protocol):
        votes = [KNeighborsClassifier(1).fit(x[train], sizes[train]).predict(x[test]).tolist() for x in values]
        answers.append([Counter(column).most_common(1)[0][0] for column in zip(*votes, strict=True)])
    return answers


def peak_memory(folder: Path, cache: Path) -> float:
    """The peak resident memory of the whole command in a process of its own, in GB."""
    arguments = ["--dataset", str(folder), "--cache_dir", str(cache), "--train_size", "1", "--experiments", "1"]
    script = PEAK.format(root=str(ROOT), arguments=arguments)
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return int(done.stderr.rsplit("peak ", 1)[1]) / 1e6


def row(what: str, value: str, goal: str) -> None:
    print(f"| {what:62} | {value:>24} | {goal:>12} |", flush=True)


def big_evaluation() -> None:
    """10,000 models by 384 voters, one experiment, in this process: printed are seconds and peak memory."""
    spectra = random_spectra(10_002, 32)
    before = time.perf_counter()
    dsire.evaluate(spectra, dsire.dsire, dsire.Protocol(experiments=1, train_size=500))
    took = time.perf_counter() - before
    print(f"{took:.0f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def bench(folder: Path) -> None:
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}", end="")
    print("".join(f", {name} {version(name)}" for name in ("torch", "numpy", "pyarrow", "datasets", "scikit-learn")))
    row("measured", "value", "goal")
    row("---", "---", "---")
    for rank, models in ((16, 24), (32, 12)):
        shards = make(folder, rank, models, 2)
        floor = best(lambda shards=shards: [pq.read_table(path) for path in shards])
        ours = best(lambda shards=shards, rank=rank: spectra_to_cache(shards, rank))
        row(
            f"rank {rank}: shards to cached spectra / read_table",
            f"{ours:.2f} s/{floor:.2f} s={ours / floor:.2f}",
            "<= 1.2",
        )
        if rank == 16:
            plain = best(lambda shards=shards: plain_flow(shards[0].parents[2], 16), times=1)
            row("rank 16: plain pandas flow / ours", f"{plain:.1f} s/{ours:.2f} s={plain / ours:.1f}", ">= 8")
    for models, count in ((24, 2), (96, 8)):
        with tempfile.TemporaryDirectory() as cache:
            peak = peak_memory(make(folder, 16, models, count)[0].parents[2], Path(cache))
        row(f"peak memory, {count} shards of 300 MB", f"{peak:.2f} GB", "<= 1.2 GB")
    spectra, protocol = random_spectra(300, 32), dsire.Protocol()
    ours = best(lambda: dsire.evaluate(spectra, dsire.dsire, protocol))
    row("ten experiments, 300 models x 384 voters x rank 32", f"{ours:.2f} s", "<= 1 s")
    start = time.perf_counter()
    expected = neighbours(spectra, protocol)
    plain = time.perf_counter() - start
    found = [run.prediction.sizes.tolist() for run in dsire.evaluate(spectra, dsire.dsire, protocol)]
    row(
        "the same with KNeighborsClassifier per voter / ours", f"{plain:.1f} s/{ours:.2f} s={plain / ours:.0f}", ">= 20"
    )
    row("predictions equal to scikit-learn's", str(found == expected), "True")
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, str(ROOT / "dsire.py"), "--cache_dir", cache]
        quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command, **quiet)
        whole = best(lambda: subprocess.run(command, **quiet), times=5)
        only_torch = best(lambda: subprocess.run([sys.executable, "-c", "import torch"], **quiet), times=5)
    value = f"{whole:.2f} s/{only_torch:.2f} s={whole / only_torch:.2f}"
    row("whole command on cached spectra / import torch", value, "<= 2")
    times = [best(lambda c=count: spectra_to_cache(make(folder, 16, 12 * c, c), 16)) for count in (1, 2, 4)]
    growth = " ".join(f"{value / times[0]:.2f}" for value in times)
    row("spectra of 12, 24, 48 models, relative to 12", growth, "linear")
    script = [sys.executable, __file__, "--big_evaluation"]
    big = subprocess.run(script, check=True, capture_output=True, text=True).stdout.strip()
    row("1-NN evaluation, 10,000 models x 384 voters x rank 32", big, "<= 4 GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the data is made and kept (default: a temporary folder)")
    parser.add_argument("--big_evaluation", action="store_true", help="only the evaluation of 10,000 models")
    arguments = parser.parse_args()
    if arguments.big_evaluation:
        big_evaluation()
    elif arguments.folder:
        bench(arguments.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            bench(Path(folder))


if __name__ == "__main__":
    main()

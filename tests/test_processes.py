"""Several processes under torchrun: the same report as one, each shard computed by one of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run, command, parquet_files

import dsire


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def torchrun(tmp_path: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    line = [sys.executable, *launcher, *command(tmp_path, *arguments)[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)


@pytest.mark.parametrize("processes", [2, 3])
def test_the_report_is_that_of_one_process(run: Run, tiny_wise: Path, tmp_path: Path, processes: int) -> None:
    alone = run(f"--dataset={tiny_wise}", "--subset=low_4", f"--cache_dir={tmp_path / 'alone'}")
    done = torchrun(tmp_path, processes, f"--dataset={tiny_wise}", "--subset=low_4")
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.out
    assert (tmp_path / "output" / "predictions.csv").read_text() == alone.predictions
    shards = len(parquet_files(tiny_wise / "low"))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == shards


@pytest.mark.parametrize("processes", [2, 5])
def test_each_process_takes_its_own_shards(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, processes: int
) -> None:
    source = dsire.find_source(str(folder), "low_4", None, tmp_path)
    taken: list[list[dsire.Shard]] = []
    monkeypatch.setattr(dsire, "compute_spectra", lambda _, shards, *rest: taken.append(shards))
    monkeypatch.setattr(dsire.Process, "wait_for_others", lambda process: None)
    for rank in range(processes):
        with pytest.raises(dsire.DsireError, match="run the same command again"):  # the others' are not there
            dsire.subset_spectra(source, 4, tmp_path, process=dsire.Process(rank, processes))
    assert sorted(shard.file for its in taken for shard in its) == sorted(shard.file for shard in source.shards)
    assert {len(its) for its in taken} <= {len(source.shards) // processes, -(-len(source.shards) // processes)}


def test_an_error_is_said_once_and_ends_all(tmp_path: Path, tiny_wise: Path) -> None:
    done = torchrun(tmp_path, 2, f"--dataset={tiny_wise}", "--subset=low_9")
    assert done.returncode != 0
    assert done.stderr.count("dsire.py: error: --subset=low_9") == 1

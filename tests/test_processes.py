"""Several processes, as under torchrun: the same report as one, each shard computed by one of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, command, parquet_files
from hub_stand_in import HubStandIn

import dsire


def torchrun(tmp_path: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    line = [sys.executable, *launcher, *command(tmp_path, *arguments)[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)


def test_the_report_is_that_of_one_process(run: Run, tiny_wise: Path, tmp_path: Path) -> None:
    alone = run(f"--dataset={tiny_wise}", "--subset=low_4", f"--cache_dir={tmp_path / 'alone'}")
    (tmp_path / "output" / "predictions.csv").unlink()
    done = torchrun(tmp_path, 3, f"--dataset={tiny_wise}", "--subset=low_4")
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.out
    assert (tmp_path / "output" / "predictions.csv").read_text() == alone.predictions
    shards = len(parquet_files(tiny_wise / "low"))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == shards


@pytest.mark.parametrize("where", ["folder", "Hub"])
@pytest.mark.parametrize("processes", [2, 5])
def test_each_process_begins_elsewhere_and_all_have_all(
    monkeypatch: pytest.MonkeyPatch, folder: Path, hub: HubStandIn, tmp_path: Path, processes: int, where: str
) -> None:
    """In whatever order they come to the locks, each shard is computed once."""
    source = dsire.find_source(str(folder) if where == "folder" else dsire.LORA_WISE, "low_4", None, tmp_path)
    compute, taken = dsire.shard_spectra, []
    ranks = threading.local()
    monkeypatch.setattr(dsire, "process_rank", lambda: getattr(ranks, "its", 0))
    monkeypatch.setenv("WORLD_SIZE", str(processes))

    def counted(path: Path, *arguments: Any) -> dsire.Spectra:
        taken.append(path.name)
        time.sleep(0.1)
        return compute(path, *arguments)

    monkeypatch.setattr(dsire, "shard_spectra", counted)
    found: dict[int, dsire.Spectra] = {}

    def work(rank: int) -> None:
        ranks.its = rank
        found[rank] = dsire.subset_spectra(source, 4, tmp_path)

    threads = [threading.Thread(target=work, args=[rank]) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(Path(shard.file).name for shard in source.shards)
    assert all(found[rank].values.equal(found[0].values) for rank in range(processes))


def test_an_error_is_said_once(tmp_path: Path, tiny_wise: Path) -> None:
    done = torchrun(tmp_path, 2, f"--dataset={tiny_wise}", "--subset=low_9")
    assert done.returncode != 0
    assert done.stderr.count("dsire.py: error: --subset=low_9") == 1

"""Several processes, as under torchrun: the same report as one, each shard fetched and computed by one of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FIRST, SECOND, THIRD, Run, assert_right, by_the_book, command, fetched
from hub_stand_in import HubStandIn

import dsire


def torchrun(tmp_path: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    line = [sys.executable, *launcher, *command(tmp_path, *arguments)[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)


def test_the_report_is_that_of_one_process(run: Run, folder: Path, hub: HubStandIn, tmp_path: Path) -> None:
    arguments = (f"--dataset={dsire.LORA_WISE}", "--subset=low_4")
    done = torchrun(tmp_path, 3, *arguments)
    assert done.returncode == 0, done.stderr
    assert fetched(hub) == [FIRST, SECOND, THIRD]
    there = run(*arguments)
    assert_right(there, by_the_book(folder))
    assert done.stdout == there.out
    assert fetched(hub) == [FIRST, SECOND, THIRD]


@pytest.mark.parametrize(
    ("rank", "size", "expected"),
    [("", "", 0), ("x", "2", 0), ("3", None, 0), ("3", "0", 0), ("3", "1", 0), ("3", "2", 1), ("1", "3", 1)],
)
def test_no_torchrun(rank: str, size: str | None, expected: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert dsire.process_rank() == expected
    assert bool(run("--experiments=1").out) == (not expected)


def test_an_error_is_said_once(tmp_path: Path, tiny_wise: Path) -> None:
    done = torchrun(tmp_path, 2, f"--dataset={tiny_wise}", "--subset=low_9")
    assert done.returncode != 0
    assert done.stderr.count("dsire.py: error: --subset=low_9") == 1

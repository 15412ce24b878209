"""What a user can mend ends with exit code 2 and one line on stderr that says how."""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import LAYERS, Run, change, models_of, parquet_files, table_of, write_folder
from safetensors.torch import save_file

import dsire

DOWN, UP = (f"{LAYERS[1]}.lora.{word}.weight" for word in ("down", "up"))
LENGTH = 4 * 24  # of DOWN's rows
NAME, SIZE = models_of(18)[70]
Edit = Callable[[pa.Table], pa.Table]


def folder_of(tmp_path: Path, *edits: Edit, **options: Any) -> Path:
    models = models_of(18)
    parts = np.array_split(np.arange(len(models)), len(edits))
    shards = [edit(table_of([models[index] for index in part])) for edit, part in zip(edits, parts, strict=True)]
    return write_folder(tmp_path / "wise", shards, **options)


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("--subset=low_64", ["--subset=low_64", "low_4", "medium_4"]),
        ("--experiments=3", ["--subset", "low_4", "medium_4"]),
        ("--subset=texts", ["wise", "train.csv", "parquet"]),
        ("--dataset=./nowhere", ["./nowhere"]),
        ("--dataset=empty", ["empty"]),
        ("--rank=four", ["--rank", "'four'"]),
        ("--matrices=AB", ["--matrices", "AB"]),
        ("--revision=v2", ["--revision", "leave it out"]),
        ("--no_such_option", ["--no_such_option"]),
    ],
)
def test_what_is_not_there(option: str, parts: list[str], run: Run, folder: Path, tmp_path: Path) -> None:
    """A dataset of several subsets, one of which holds no parquet: of each the names are told."""
    configs = "- {config_name: medium_4, data_files: low/4/*}\n- {config_name: texts, data_files: train.csv}\n---\n"
    readme = (folder / "README.md").read_text()
    (folder / "README.md").write_text(readme.removesuffix("---\n") + configs)
    (folder / "train.csv").write_text("label,name\n1,x\n")
    (tmp_path / "empty").mkdir()
    assert run(f"--dataset={folder}", option).says(*parts)


def test_a_rank_or_number_that_does_not_fit(run: Run, folder: Path, tmp_path: Path) -> None:
    assert run(f"--dataset={folder}", "--rank=7").says(".lora.", ".weight", "--rank=7", str(4 * 16))
    assert run(f"--dataset={folder}", "--train_size=20").says("--train_size=20", "19")
    one = write_folder(tmp_path / "one", [models_of(1)])
    assert run(f"--dataset={one}", "--train_size=1").says("--train_size=1", "two")


@pytest.mark.parametrize("place", ["cache", "output"])
def test_a_place_that_cannot_be_written(place: str, run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / place).write_text("a file where the folder should be")
    assert run(f"--dataset={folder}").says(str(tmp_path / place))


# Parquet
def twice_as_long(table: pa.Table, first: int = 0) -> pa.Table:
    rows = [values * 2 if row >= first else values for row, values in enumerate(table.column(DOWN).to_pylist())]
    return table.set_column(table.column_names.index(DOWN), DOWN, pa.array(rows, pa.list_(pa.float64())))


def with_column(name: str, values: Callable[[pa.Table], list[Any]]) -> Edit:
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values(table)))


def bad_at_70(column: str, bad: float) -> Edit:
    return lambda table: change(table, column, 70, lambda values: [*values[:-1], bad])


TABLES: dict[str, tuple[Edit, int, list[str]]] = {  # an edit, rows in a row group, and what is said
    "A without B": (lambda table: table.drop_columns([UP]), 108, [DOWN]),
    "B without A": (lambda table: table.drop_columns([DOWN]), 108, [UP]),
    "no label": (lambda table: table.drop_columns(["label"]), 108, ["label"]),
    "no name": (lambda table: table.drop_columns(["name"]), 108, ["name"]),
    "size 0": (with_column("label", lambda table: [0, *table["label"].to_pylist()[1:]]), 108, ["label", "0"]),
    "rows": (lambda table: twice_as_long(table, 5), 108, [DOWN, str(LENGTH), str(2 * LENGTH)]),
    "NaN": (bad_at_70(UP, float("nan")), 108, [f"model {NAME} of size {SIZE}", UP]),
    "inf": (bad_at_70(UP, float("inf")), 108, [f"model {NAME} of size {SIZE}", UP]),
    "NaN in a later row group": (bad_at_70(DOWN, float("nan")), 30, [f"model {NAME} of size {SIZE}", DOWN]),
    "null": (lambda table: change(table, UP, 3, lambda values: None), 108, [UP, "null"]),
    "no list": (with_column(UP, lambda table: [1.0] * len(table)), 108, [UP, "double"]),
}


@pytest.mark.parametrize(("edit", "rows", "parts"), TABLES.values(), ids=TABLES)
def test_a_table_that_cannot_be_right(edit: Edit, rows: int, parts: list[str], run: Run, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, edit, row_group_size=rows)
    assert run(f"--dataset={folder}").says("train-00000-of-00001.parquet", *parts)


@pytest.mark.parametrize("edit", [twice_as_long, lambda table: table.drop_columns([DOWN, UP])])
def test_a_layer_that_is_another_one_in_another_shard(edit: Edit, run: Run, tmp_path: Path) -> None:
    outcome = run(f"--dataset={folder_of(tmp_path, lambda table: table, edit)}")
    assert "2 layers of rank 4" in outcome.out
    (note,) = (note for note in outcome.report["notes"] if "1 layer left out" in note)
    assert "mid_block" in note


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "no parquet": lambda content: b"<html>not found</html>",
    "empty": lambda content: b"",
    "damaged": lambda content: content[: len(content) // 3] + b"\xff" + content[len(content) // 3 + 1 :],
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_file_that_is_not_whole(run: Run, folder: Path, spoil: Callable[[bytes], bytes]) -> None:
    file = parquet_files(folder)[1]
    pq.write_table(pq.read_table(file), file, write_page_checksum=True)
    file.write_bytes(spoil(file.read_bytes()))
    assert run(f"--dataset={folder}", "--subset=low_4").says(file.name, "parquet")


# Errors of computing are no errors of a file
FAULT = RuntimeError("CUDA error: an illegal access")
KINDS = {
    "LoRA": {"lora_A.weight": (4, 16), "lora_B.weight": (24, 4)},
    "LoHa": {"hada_w1_a": (24, 2), "hada_w1_b": (2, 16), "hada_w2_a": (24, 2), "hada_w2_b": (2, 16)},
    "LoKr": {"lokr_w1": (4, 4), "lokr_w2": (6, 4)},
    "full": {"weight": (24, 16)},
}


def fails_in_threads(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let what computes eigenvalues fail wherever spectra of models are computed."""
    compute = torch.linalg.eigvalsh

    def eigvalsh(matrices: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is threading.main_thread():
            return compute(matrices)
        raise error

    monkeypatch.setattr(torch.linalg, "eigvalsh", eigvalsh)


@pytest.mark.parametrize("error", [FAULT, torch.linalg.LinAlgError("linalg.eigh: no convergence")], ids=str)
def test_a_fault_of_computing(error: Exception, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_in_threads(monkeypatch, error)
    outcome = run(f"--dataset={folder}")
    assert outcome.says("train-00000-of-00003.parquet", "can't be computed", str(error))
    assert not re.search("delete|read|fetch", outcome.err)


@pytest.mark.parametrize("shapes", KINDS.values(), ids=KINDS)
def test_a_fault_of_one_file(shapes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"{LAYERS[0]}.{part}": torch.randn(shape) for part, shape in shapes.items()}
    save_file(tensors, tmp_path / "one.safetensors")
    save_file({key: 0.9 * tensor for key, tensor in tensors.items()}, tmp_path / "base.safetensors")
    base = dsire.open_base(str(tmp_path / "base.safetensors")) if "weight" in shapes else None
    assert dsire.file_spectra(tmp_path / "one.safetensors", base).voters
    fails_in_threads(monkeypatch, FAULT)
    with pytest.raises(dsire.DsireError, match=r"^the spectra .*can't be computed.*\(CUDA error: an illegal access\)"):
        dsire.file_spectra(tmp_path / "one.safetensors", base)


def test_a_device_without_the_routines(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsire, "warm_up", Mock(side_effect=FAULT))
    assert run().says("--device=cpu can't be used here", str(FAULT))


def test_a_folder_that_vanishes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsire, "model_files", Mock(side_effect=FileNotFoundError(2, "No such file", "asked/x")))
    assert run("--predict", tmp_path).says("No such file", "asked/x")

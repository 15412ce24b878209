"""What a user can mend ends with exit code 2 and one line on stderr that says how."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def folder_of(tmp_path: Path, *edits: Callable[[pa.Table], pa.Table], **options: Any) -> Path:
    """18 micro-datasets in one shard for each edit."""
    models = models_of(18)
    parts = np.array_split(np.arange(len(models)), len(edits))
    shards = [edit(table_of([models[index] for index in part])) for edit, part in zip(edits, parts, strict=True)]
    return write_folder(tmp_path / "wise", shards, **options)


def as_it_is(table: pa.Table) -> pa.Table:
    return table


def test_unknown_subset(run: Run, folder: Path) -> None:
    assert run(f"--dataset={folder}", "--subset=low_64").says("--subset=low_64", "low_4")


def test_several_subsets_and_none_chosen(run: Run, folder: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "other", [table_of(models_of(2))], subset="medium_4")
    (tmp_path / "other" / "medium").rename(folder / "medium")
    readme = (folder / "README.md").read_text()
    more = "- config_name: medium_4\n  data_files:\n  - split: train\n    path: medium/4/train-*\n---"
    (folder / "README.md").write_text(more.join(readme.rsplit("---", 1)))
    assert run(f"--dataset={folder}").says("--subset", "low_4", "medium_4")


def test_no_such_folder(run: Run) -> None:
    assert run("--dataset=./nowhere", "--subset=low_4").says("./nowhere")


def test_a_folder_without_weights(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run(f"--dataset={tmp_path / 'empty'}").says(str(tmp_path / "empty"))


def test_a_subset_without_parquet(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "low" / "4").mkdir(parents=True)
    (folder / "low" / "4" / "train.csv").write_text("label,name\n1,x\n")
    pq.write_table(pa.table({"label": [1]}), folder / "stray.parquet")
    configs = "configs:\n- config_name: low_4\n  data_files: low/4/train.csv\n"
    (folder / "README.md").write_text(f"---\n{configs}---\n")
    assert run(f"--dataset={folder}", "--subset=low_4").says("low_4", "train.csv", "parquet")


def test_a_rank_that_does_not_divide(run: Run, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, as_it_is, subset="mine")
    assert run(f"--dataset={folder}", "--rank=7").says(".lora.", ".weight", "--rank=7", str(4 * 16))


def test_no_rank_in_the_name(run: Run, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, as_it_is, subset="mine")
    assert run(f"--dataset={folder}").says("mine", "--rank")


@pytest.mark.parametrize(("lone", "partner"), [(DOWN, UP), (UP, DOWN)], ids=["A without B", "B without A"])
def test_a_matrix_without_its_partner(run: Run, tmp_path: Path, lone: str, partner: str) -> None:
    folder = folder_of(tmp_path, lambda table: table.drop_columns([partner]))
    assert run(f"--dataset={folder}").says(lone)


def test_lengths_that_differ_between_rows(run: Run, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, lambda table: change(table, DOWN, 5, lambda values: values * 2))
    assert run(f"--dataset={folder}").says(DOWN, str(LENGTH), str(2 * LENGTH))


def twice_as_long(table: pa.Table, first: int = 0) -> pa.Table:
    """Column DOWN with rows of double length from the first one on."""
    rows = [values * 2 if row >= first else values for row, values in enumerate(table.column(DOWN).to_pylist())]
    return table.set_column(table.column_names.index(DOWN), DOWN, pa.array(rows, pa.list_(pa.float64())))


def test_lengths_that_differ_between_row_groups(run: Run, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, lambda table: twice_as_long(table, first=54), row_group_size=54)
    assert run(f"--dataset={folder}").says(DOWN, str(LENGTH), str(2 * LENGTH))


def test_lengths_that_differ_between_shards(run: Run, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, as_it_is, twice_as_long)
    assert run(f"--dataset={folder}").says("mid_block", "24", "48", "train-00001-of-00002.parquet")


def test_a_layer_that_another_shard_lacks(run: Run, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, as_it_is, lambda table: table.drop_columns([DOWN, UP]))
    assert run(f"--dataset={folder}").says("mid_block", "00000-of-00002", "00001-of-00002")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(run: Run, tmp_path: Path, bad: float) -> None:
    name, size = models_of(18)[70]
    folder = folder_of(tmp_path, lambda table: change(table, UP, 70, lambda values: [*values[:-1], bad]))
    assert run(f"--dataset={folder}").says(f"model {name} of size {size}", UP)


def test_a_weight_that_is_not_finite_in_a_later_row_group(run: Run, tmp_path: Path) -> None:
    name, size = models_of(18)[70]
    edit: Callable[[list[float]], list[float]] = lambda values: [float("nan"), *values[1:]]  # noqa: E731
    folder = folder_of(tmp_path, lambda table: change(table, DOWN, 70, edit), row_group_size=30)
    assert run(f"--dataset={folder}").says(f"model {name} of size {size}", DOWN)


def test_a_matrix_that_is_missing(run: Run, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, lambda table: change(table, UP, 3, lambda values: None))
    assert run(f"--dataset={folder}").says(UP, "null")


def test_a_column_that_is_no_list(run: Run, tmp_path: Path) -> None:
    def flattened(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(UP), UP, pa.array([1.0] * len(table)))

    assert run(f"--dataset={folder_of(tmp_path, flattened)}").says(UP, "double")


@pytest.mark.parametrize("column", ["label", "name"])
def test_a_missing_label_or_name(run: Run, tmp_path: Path, column: str) -> None:
    folder = folder_of(tmp_path, lambda table: table.drop_columns([column]))
    assert run(f"--dataset={folder}").says(column, ".parquet")


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_that_is_none(run: Run, tmp_path: Path, size: int) -> None:
    def edit(table: pa.Table) -> pa.Table:
        return table.set_column(0, "label", pa.array([size, *table.column("label").to_pylist()[1:]]))

    assert run(f"--dataset={folder_of(tmp_path, edit)}").says("label", str(size))


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "no parquet": lambda content: b"<html>not found</html>",
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_file_that_is_not_whole(run: Run, folder: Path, spoil: Callable[[bytes], bytes]) -> None:
    file = parquet_files(folder)[1]
    file.write_bytes(spoil(file.read_bytes()))
    assert run(f"--dataset={folder}", "--subset=low_4").says(file.name, "delete")


def fails_in_threads(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let what computes eigenvalues fail wherever spectra of models are computed."""
    compute = torch.linalg.eigvalsh

    def eigvalsh(matrices: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is threading.main_thread():
            return compute(matrices)
        raise error

    monkeypatch.setattr(torch.linalg, "eigvalsh", eigvalsh)


COMPUTING = [RuntimeError("CUDA error: an illegal access"), torch.linalg.LinAlgError("linalg.eigh: no convergence")]


@pytest.mark.parametrize("error", COMPUTING, ids=["RuntimeError", "LinAlgError"])
def test_a_fault_of_computing_is_not_the_files(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fails_in_threads(monkeypatch, error)
    outcome = run(f"--dataset={folder}")
    assert outcome.says("train-00000-of-00003.parquet: the spectra can't be computed on cpu", str(error))
    assert not re.search("delete|read|fetch|try --device", outcome.err)


def test_a_fault_of_computing_on_a_gpu_says_what_to_try(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(a: torch.Tensor, b: torch.Tensor, device: str) -> torch.Tensor:
        raise COMPUTING[0]

    monkeypatch.setattr(dsire, "batch_spectra", lost)
    with pytest.raises(dsire.DsireError, match=r"on cuda:1 \(CUDA error: an illegal access\); try --device=cpu$"):
        dsire.shard_spectra(parquet_files(folder)[0], 4, "cuda:1")


KINDS = {
    "LoRA": {"lora_A.weight": (4, 16), "lora_B.weight": (24, 4)},
    "LoHa": {"hada_w1_a": (24, 2), "hada_w1_b": (2, 16), "hada_w2_a": (24, 2), "hada_w2_b": (2, 16)},
    "LoKr": {"lokr_w1": (4, 4), "lokr_w2": (6, 4)},
    "full": {"weight": (24, 16)},
}


@pytest.mark.parametrize("shapes", KINDS.values(), ids=KINDS)
def test_a_fault_of_computing_is_not_that_matrices_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes: dict[str, tuple[int, int]]
) -> None:
    tensors = {f"{LAYERS[0]}.{part}": torch.randn(shape) for part, shape in shapes.items()}
    save_file(tensors, tmp_path / "one.safetensors")
    save_file({key: 0.9 * tensor for key, tensor in tensors.items()}, tmp_path / "base.safetensors")
    base = dsire.open_base(str(tmp_path / "base.safetensors"), tmp_path) if "weight" in shapes else None
    assert dsire.file_spectra(tmp_path / "one.safetensors", base).voters
    fails_in_threads(monkeypatch, COMPUTING[0])
    with pytest.raises(
        dsire.DsireError, match=r"^the spectra can't be computed on cpu \(CUDA error: an illegal access\)$"
    ):
        dsire.file_spectra(tmp_path / "one.safetensors", base)


def test_a_device_without_the_routines(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: str) -> None:
        raise RuntimeError("cusolver is not there")

    monkeypatch.setattr(dsire, "warm_up", missing)
    assert run().says("--device=cpu can't be used here (cusolver is not there)")


def test_damage_in_the_middle_of_a_file(run: Run, folder: Path) -> None:
    """Nothing that is damaged is taken for weights: either the page's checksum or the decompression tells."""
    file = parquet_files(folder)[0]
    pq.write_table(pq.read_table(file), file, write_page_checksum=True)
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0xFF
    file.write_bytes(content)
    assert run(f"--dataset={folder}").says(file.name, "delete")


def test_too_few_micro_datasets(run: Run, folder: Path) -> None:
    outcome = run(f"--dataset={folder}", "--train_size=20")
    assert outcome.says("--train_size=20", "21", "there are 20", "largest --train_size that works is 19")


def test_one_micro_dataset(run: Run, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "wise", [table_of(models_of(1))])
    assert run(f"--dataset={folder}", "--train_size=1").says("--train_size=1", "there are 1")


def test_a_cache_that_cannot_be_written(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert run(f"--dataset={folder}").says(str(tmp_path / "cache"), "nothing that was computed is lost")


def test_a_damaged_cache_is_computed_anew(run: Run, folder: Path, tmp_path: Path) -> None:
    first = run(f"--dataset={folder}")
    whole, short, *_ = sorted((tmp_path / "cache" / "spectra").glob("*.safetensors"))
    whole.write_bytes(b"rubbish")
    short.write_bytes(short.read_bytes()[:-100])
    second = run(f"--dataset={folder}")
    assert (second.code, second.predictions) == (0, first.predictions)


def test_an_output_that_cannot_be_written(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "output").write_text("a file where the folder should be")
    assert run(f"--dataset={folder}").says(str(tmp_path / "output"))


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("--experiments=0", ("--experiments", "'0'")),
        ("--train_size=-1", ("--train_size", "'-1'")),
        ("--rank=four", ("--rank", "'four'")),
        ("--matrices=AB", ("--matrices", "AB")),
        ("--device=abacus", ("--device=abacus",)),
        ("--revision=v2", ("--revision", "is a folder")),
        ("--no_such_option", ("--no_such_option",)),
    ],
)
def test_options_that_make_no_sense(run: Run, folder: Path, option: str, parts: tuple[str, ...]) -> None:
    assert run(f"--dataset={folder}", option).says(*parts)

"""A sample of the mutants of fuzz.py; that it notices what goes wrong; and weights of unusual values."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import LAYERS, Run, change, models_of, table_of, write_folder
from fuzz import FILE_KINDS, PARQUET_KINDS, book_of_table, main, outcome_of
from lora_writers import one_layer, spectra_by_the_book, write

import dsire


def test_mutants_give_the_right_spectra_or_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """One of each kind."""
    counts = [f"--parquet={len(PARQUET_KINDS)}", f"--files={len(FILE_KINDS)}"]
    assert main(counts) == 0, capsys.readouterr().out
    right, refused = re.fullmatch(r"(\d+) right, (\d+) refused, 0 failed\n", capsys.readouterr().out).groups()  # type: ignore[union-attr]
    assert int(right) + int(refused) == len(PARQUET_KINDS) + len(FILE_KINDS)


def test_lies_are_noticed(tmp_path: Path) -> None:
    table = table_of(models_of(1))
    file = tmp_path / "shard.parquet"
    pq.write_table(table, file)
    book, right = book_of_table(table, 4), dsire.shard_spectra(file, 4)

    def refuse(message: str) -> dsire.Spectra:
        raise dsire.DsireError(message)

    def outcome(**changes: Any) -> str:
        return outcome_of(lambda: replace(right, **changes), book)

    assert outcome() == "right"
    assert outcome(names=["other"] * 6).startswith("other models")
    assert outcome(sizes=right.sizes + 1).startswith("other models")
    assert outcome(values=right.values[1:], voters=right.voters[1:]).startswith("other voters")
    assert outcome(values=right.values * (1 + 1e-8)).startswith("wrong numbers")
    assert outcome(notes=["two\nlines"]).startswith("a note that isn't")
    assert outcome_of(lambda: right, None).startswith("not refused")
    assert outcome_of(lambda: refuse("no"), book).startswith("refused, though sound")
    assert outcome_of(lambda: refuse("no"), book, damaged=True) == "refused"
    assert outcome_of(lambda: refuse("no\nno"), book, damaged=True).startswith("not a printable")
    assert outcome_of(lambda: [][0], None).startswith("raised")


# ---------------------------------------------------------------------------------------------------------------------
# Values


def in_a_shard(a: np.ndarray, b: np.ndarray, folder: Path, number: pa.DataType | None = None) -> list[torch.Tensor]:
    """The spectra of one layer [models, r, in] and [models, out, r], read from a shard."""
    columns = {f"x.lora.{word}.weight": matrix for word, matrix in (("down", a), ("up", b))}
    lists = {
        name: pa.array(list(matrix.reshape(len(matrix), -1)), pa.list_(number or pa.float64()))
        for name, matrix in columns.items()
    }
    file = folder / "shard.parquet"
    pq.write_table(pa.table({"label": [1] * len(a), "name": ["x"] * len(a), **lists}), file)
    return list(dsire.shard_spectra(file, a.shape[1]).values)


def assert_by_the_book(found: list[torch.Tensor], a: np.ndarray, b: np.ndarray) -> None:
    down, up = torch.tensor(a).double(), torch.tensor(b).double()
    for values, matrix in zip(found, (down, up, up @ down), strict=True):
        wanted = torch.linalg.svdvals(matrix)
        wanted = torch.nn.functional.pad(wanted, (0, values.shape[-1] - wanted.shape[-1]))[:, : values.shape[-1]]
        assert ((values - wanted).abs() <= 1e-9 * wanted[:, :1] + 1e-321).all()


@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(1, 16, 24), (1, 1, 5), (1, 5, 1), (8, 3, 2), (8, 1, 1)])
def test_narrow_matrices_in_a_shard(rank: int, inputs: int, outputs: int, tmp_path: Path) -> None:
    """One row, one column, and a rank larger than a dimension."""
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(3, rank, inputs)), draw.normal(size=(3, outputs, rank))
    assert_by_the_book(in_a_shard(a, b, tmp_path), a, b)


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e38])
def test_scales_of_float32_in_a_shard(scale: float, tmp_path: Path) -> None:
    """Subnormal numbers, too: as float32 they have few digits, but those count."""
    draw = np.random.default_rng(0)
    a, b = (np.float32(scale * draw.uniform(-3, 3, size=size)) for size in ((3, 4, 16), (3, 24, 4)))
    assert a.any()
    assert_by_the_book(in_a_shard(a, b, tmp_path, pa.float32()), a, b)


def test_subnormal_numbers_of_float64_in_a_shard(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    a, b = 1e-310 * draw.normal(size=(3, 4, 16)), draw.normal(size=(3, 24, 4))
    assert_by_the_book(in_a_shard(a, b, tmp_path), a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_overflow_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """What was too large for a file's dtype is infinite in it."""
    down = (torch.finfo(dtype).max * torch.ones(2, 6, dtype=torch.float64) * 2).to(dtype)
    with pytest.raises(dsire.DsireError, match="infinite"):
        dsire.file_spectra(write(tmp_path / "lora.safetensors", one_layer(down=down)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_the_ends_of_a_dtype(dtype: torch.dtype, end: str, tmp_path: Path) -> None:
    """The largest numbers, and the smallest that aren't subnormal; the product of the largest float64 overflows."""
    number = torch.finfo(dtype).max / 64 if end == "largest" else torch.finfo(dtype).tiny
    tensors = {key: (number * tensor.double()).to(dtype) for key, tensor in one_layer().items()}
    file = write(tmp_path / "lora.safetensors", tensors)
    if dtype == torch.float64 and end == "largest":
        with pytest.raises(dsire.DsireError, match="too large"):
            dsire.file_spectra(file)
        return
    found = dsire.file_spectra(file)
    expected = spectra_by_the_book({"x": tuple(tensors.values())}, 1)  # type: ignore[dict-item]
    for voter, values in zip(found.voters, found.values[:, 0], strict=True):
        assert torch.allclose(values, expected[voter], rtol=1e-9, atol=0), voter


@pytest.mark.parametrize("exponent", [-200, 200])
def test_the_scale_of_the_weights_does_not_change_the_votes(exponent: int, run: Run, tmp_path: Path) -> None:
    """A power of two, also beyond float32's, changes no digit of any spectrum, so it changes no vote."""
    models = models_of(20)
    plain = table_of(models)
    larger = plain
    for number, column in enumerate(plain.column_names[2:], start=2):
        values = [[2.0**exponent * value for value in row] for row in plain.column(column).to_pylist()]
        larger = larger.set_column(number, column, pa.array(values, pa.list_(pa.float64())))
    first, second = (
        run(f"--dataset={write_folder(tmp_path / name, [table])}", "--experiments=2")
        for name, table in (("plain", plain), ("scaled", larger))
    )
    assert (first.code, second.code) == (0, 0), second.err
    assert first.predictions == second.predictions


def test_a_model_that_diverged_does_not_disturb_the_others(run: Run, tmp_path: Path) -> None:
    """Its numbers are finite, but far above the rest: the same votes as without it."""
    models = models_of(18)
    plain = table_of(models)
    diverged = change(plain, f"{LAYERS[0]}.lora.up.weight", 0, lambda values: [1e30 * value for value in values])
    folders = [write_folder(tmp_path / "plain", [plain]), write_folder(tmp_path / "diverged", [diverged])]
    first, second = (run(f"--dataset={folder}", "--experiments=2").predictions.splitlines() for folder in folders)
    name, size = models[0]
    lines = [(one, other) for one, other in zip(first, second, strict=True) if f",{name},{size}," not in one]
    same = sum(one.rsplit(",", 1)[0] == other.rsplit(",", 1)[0] for one, other in lines)
    assert same / len(lines) > 0.9  # models whose nearest neighbour it was may change

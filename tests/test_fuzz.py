"""A sample of the mutants of fuzz.py; that it notices what goes wrong; and weights of unusual shapes and values."""

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
from conftest import Run, models_of, table_of, write_folder
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
    assert outcome_of(lambda: right, None).startswith("not refused")
    assert outcome_of(lambda: refuse("no"), book).startswith("refused, though sound")
    assert outcome_of(lambda: refuse("no"), book, damaged=True) == "refused"
    assert outcome_of(lambda: [][0], None).startswith("raised")


# ---------------------------------------------------------------------------------------------------------------------
# Values


SHAPES = [(1, 16, 24), (1, 1, 5), (1, 5, 1), (8, 3, 2), (8, 1, 1)]  # rank, in, out


@pytest.mark.parametrize(
    ("shape", "scale_of_a", "scale_of_b", "number"),
    [
        *((shape, 1, 1, pa.float64()) for shape in SHAPES),
        *(((4, 16, 24), scale, scale, pa.float32()) for scale in (1e-45, 1e-38, 1e38)),
        ((4, 16, 24), 1e-310, 1, pa.float64()),
    ],
)
def test_narrow_matrices_and_all_scales_in_a_shard(
    shape: tuple[int, int, int], scale_of_a: float, scale_of_b: float, number: pa.DataType, tmp_path: Path
) -> None:
    """One row, one column, a rank larger than a dimension; subnormal numbers have few digits, but those count."""
    (rank, inputs, outputs), draw = shape, np.random.default_rng(0)
    a, b = draw.uniform(-3, 3, size=(3, rank, inputs)), draw.uniform(-3, 3, size=(3, outputs, rank))
    a, b = (its.astype(number.to_pandas_dtype()) for its in (scale_of_a * a, scale_of_b * b))
    assert a.any()
    columns = {"label": [1] * 3, "name": ["x"] * 3}
    for word, matrix in (("down", a), ("up", b)):
        columns[f"x.lora.{word}.weight"] = pa.array(list(matrix.reshape(3, -1)), pa.list_(number))
    pq.write_table(pa.table(columns), tmp_path / "shard.parquet")
    down, up = torch.tensor(a).double(), torch.tensor(b).double()
    found = dsire.shard_spectra(tmp_path / "shard.parquet", rank).values
    for values, matrix in zip(found, (down, up, up @ down), strict=True):
        wanted = torch.linalg.svdvals(matrix)[:, :rank]
        wanted = torch.nn.functional.pad(wanted, (0, rank - wanted.shape[-1]))
        assert ((values - wanted).abs() <= 1e-9 * wanted[:, :1] + 1e-321).all()


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
        with pytest.raises(dsire.DsireError, match="finite"):
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

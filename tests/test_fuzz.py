"""A sample of the mutants of fuzz.py; that it notices what goes wrong; and weights of unusual shapes and values."""

import re
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import models_of, table_of
from fuzz import FILE_KINDS, PARQUET_KINDS, book_of_table, main, outcome_of
from lora_writers import assert_spectra, one_layer, refusal, write

import dsire


def test_mutants_give_the_right_spectra_or_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    counts = [f"--parquet={len(PARQUET_KINDS)}", f"--files={len(FILE_KINDS)}"]
    assert main(counts) == 0, capsys.readouterr().out
    right, refused = re.fullmatch(r"(\d+) right, (\d+) refused, 0 failed\n", capsys.readouterr().out).groups()  # type: ignore[union-attr]
    assert int(right) + int(refused) == len(PARQUET_KINDS) + len(FILE_KINDS)


def test_lies_are_noticed(tmp_path: Path) -> None:
    table = table_of(models_of(1))
    file = tmp_path / "shard.parquet"
    pq.write_table(table, file)
    book, right = book_of_table(table, 4), dsire.shard_spectra(file, 4)
    assert outcome_of(lambda: right, book) == "right"
    for lie, said in (
        ({"names": ["other"] * 6}, "other models"),
        ({"sizes": right.sizes + 1}, "other models"),
        ({"values": right.values[1:], "voters": right.voters[1:]}, "other voters"),
        ({"values": right.values * (1 + 1e-8)}, "wrong numbers"),
    ):
        assert outcome_of(lambda lie=lie: replace(right, **lie), book).startswith(said)

    def refuse() -> dsire.Spectra:
        raise dsire.DsireError("no")

    assert outcome_of(lambda: right, None).startswith("not refused")
    assert outcome_of(refuse, book).startswith("refused, though sound")
    assert outcome_of(refuse, book, changed=True) == "refused"
    assert outcome_of(lambda: [][0], None).startswith("raised")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("end", ["largest", "smallest", "infinite"])
def test_the_ends_of_a_dtype(dtype: torch.dtype, end: str, tmp_path: Path) -> None:
    """The smallest that aren't subnormal; what was too large for a file's dtype; a product of the largest overflows."""
    number = {"largest": torch.finfo(dtype).max / 64, "smallest": torch.finfo(dtype).tiny}.get(end, float("inf"))
    tensors = {key: (number * tensor.double()).to(dtype) for key, tensor in one_layer().items()}
    file = write(tmp_path / "lora.safetensors", tensors)
    if end == "infinite" or (dtype == torch.float64 and end == "largest"):
        assert "finite" in refusal(file)
    else:
        assert_spectra(dsire.file_spectra(file), {"x": tuple(tensors.values())})

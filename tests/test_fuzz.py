"""A sample of the mutants of fuzz.py; and that it notices what goes wrong."""

import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest
from conftest import models_of, table_of
from fuzz import FILE_KINDS, PARQUET_KINDS, book_of_table, main, outcome_of

import dsire


def test_mutants_give_the_right_spectra_or_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code = main([f"--parquet={len(PARQUET_KINDS)}", f"--files={len(FILE_KINDS)}"])
    said = capsys.readouterr().out
    right, refused, failed = map(int, re.findall(r"\d+(?= right| refused| failed)", said))
    assert (code, failed, right + refused) == (0, 0, len(PARQUET_KINDS) + len(FILE_KINDS)), said


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

    refuse = Mock(side_effect=dsire.DsireError("no"))
    assert outcome_of(lambda: right, None).startswith("not refused")
    assert outcome_of(refuse, book).startswith("refused, though sound")
    assert outcome_of(refuse, book, changed=True) == "refused"
    assert outcome_of(lambda: [][0], None).startswith("raised")

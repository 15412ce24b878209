"""The whole command: what it prints and writes, that it computes once, and models that are not as usual."""

from __future__ import annotations

import csv
import doctest
import io
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import (
    LAYERS,
    Model,
    Reference,
    Run,
    models_of,
    parquet_files,
    reference_experiments,
    reference_spectra,
    table_of,
    write_folder,
)

import dsire


def rows_of(predictions: str) -> list[tuple[int, str, int, int, float]]:
    """experiment, name, size, predicted and vote_share of every line."""
    header, *rows = csv.reader(io.StringIO(predictions))
    assert header == ["experiment", "name", "size", "predicted", "vote_share"]
    return [(int(run), name, int(size), int(guess), float(share)) for run, name, size, guess, share in rows]


def rows_by_the_book(models: list[Model], experiments: list[Reference]) -> list[tuple[int, str, int, int, float]]:
    return [
        (number, str(models[model][0]), models[model][1], guess, pytest.approx(share, abs=1e-4))
        for number, run in enumerate(experiments, start=1)
        for model, guess, share in zip(run.test, run.predicted, run.shares, strict=True)
    ]


def metrics_of(rows: list[tuple[int, str, int, int, float]]) -> dict[str, float]:
    """MAE, MAPE in % and accuracy in % of the rows of one experiment."""
    errors = [(abs(guess - size), size) for _, _, size, guess, _ in rows]
    return {
        "mae": statistics.fmean(error for error, _ in errors),
        "mape": 100 * statistics.fmean(error / size for error, size in errors),
        "accuracy": 100 * statistics.fmean(error == 0 for error, _ in errors),
    }


def assert_by_the_book(outcome: Any, folder: Path) -> None:
    """The predictions are those of scikit-learn and Counter on the folder's matrices."""
    assert outcome.code == 0, outcome.err
    models, voters = reference_spectra(parquet_files(folder), rank=4)
    assert rows_of(outcome.predictions) == rows_by_the_book(models, reference_experiments(models, voters))


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"a shard is read: {arguments}")

    monkeypatch.setattr(pq, "ParquetFile", fail)
    monkeypatch.setattr(dsire, "shard_spectra", fail)


def test_the_shipped_subset_in_a_new_process(
    run_anew: Run, run: Run, shipped_by_the_book: tuple[list[Model], list[Reference]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_anew(HF_HUB_OFFLINE="1")
    assert (first.code, first.err) == (0, "")
    assert "the small subset that ships with the script" in first.out

    rows = rows_of(first.predictions)
    assert rows == rows_by_the_book(*shipped_by_the_book)
    experiments = [metrics_of([row for row in rows if row[0] == number]) for number in range(1, 11)]
    report = first.report
    assert report["experiments"] == [pytest.approx(metrics) for metrics in experiments]
    for metric in ("mae", "mape", "accuracy"):
        values = [metrics[metric] for metrics in experiments]
        assert report["mean"][metric] == pytest.approx(statistics.fmean(values))
        assert report["std"][metric] == pytest.approx(statistics.pstdev(values))
        assert f"{report['mean'][metric]:.2f} ± {report['std'][metric]:.2f}" in first.out
    assert report["mean"]["accuracy"] > 2 * 100 / 6  # twice the chance of one in six

    expected = {"subset": "low_4", "rank": 4, "seed": 42, "experiments": 10, "train_size": 15, "device": "cpu"}
    assert report["settings"].items() >= expected.items()
    assert report["settings"]["matrices"] == ["A", "B", "BA"]
    assert {"python", "torch", "scikit-learn", "pyarrow"} <= report["versions"].keys()

    forbid_reading(monkeypatch)
    second = run()
    assert (second.code, second.out) == (0, first.out)
    assert (second.predictions, second.report["experiments"]) == (first.predictions, report["experiments"])


def test_a_second_run_gives_the_same_and_reads_no_shard(run: Run, folder: Path) -> None:
    """Shards that turn to rubbish behind its back (same length, same time) are not missed."""
    first = run(f"--dataset={folder}")
    assert_by_the_book(first, folder)
    for file in parquet_files(folder):
        status = file.stat()
        file.write_bytes(b"x" * status.st_size)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = run(f"--dataset={folder}")
    assert (second.code, second.out) == (0, first.out)
    assert second.predictions == first.predictions


def test_a_shard_that_changed_is_computed_anew(run: Run, folder: Path) -> None:
    first = run(f"--dataset={folder}")
    last = parquet_files(folder)[-1]
    pq.write_table(table_of(models_of(20)[80:110]), last)
    second = run(f"--dataset={folder}", "--subset=low_4")
    assert_by_the_book(second, folder)
    assert second.predictions != first.predictions


def test_another_protocol_on_the_same_spectra(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(f"--dataset={folder}")
    forbid_reading(monkeypatch)
    outcome = run(f"--dataset={folder}", "--seed=7", "--experiments=3", "--train_size=19", "--matrices", "B")
    assert outcome.code == 0, outcome.err
    rows = rows_of(outcome.predictions)
    assert len(rows) == 3 * 6
    assert {round(share * len(LAYERS), 3) for *_, share in rows} <= {1, 2, 3}  # only B's voters voted
    assert outcome.report["settings"]["matrices"] == ["B"]


def test_the_paper_stands_beside_a_subset_of_lora_wise(run: Run, tmp_path: Path) -> None:
    models = models_of(17, sizes=(1, 10, 20))
    folder = write_folder(tmp_path / "wise", [table_of(models, rank=16)], subset="medium_16")
    outcome = run(f"--dataset={folder}", "--subset=medium_16", "--rank=16")
    assert outcome.code == 0, outcome.err
    assert all(value in outcome.out for value in ("1.67 ± 0.17", "4.32 ± 0.46", "84.04 ± 1.85"))


def test_bare_parquet_without_readme(run: Run, folder: Path) -> None:
    (folder / "README.md").unlink()
    assert_by_the_book(run(f"--dataset={folder}", "--rank=4"), folder)


# ---------------------------------------------------------------------------------------------------------------------
# Models that are not as usual


def renumber(table: pa.Table) -> pa.Table:
    """Integer names, as in the medium and high ranges of LoRA-WiSE."""
    numbers = pa.array([9 + int(name.removeprefix("thing_")) for name in table.column("name").to_pylist()])
    return table.set_column(table.column_names.index("name"), "name", numbers)


def up_before_down(table: pa.Table) -> pa.Table:
    return table.select(table.column_names[::-1])


UNUSUAL: dict[str, Callable[[pa.Table], pa.Table]] = {
    "integer names": renumber,
    "up before down": up_before_down,
    "another row order": lambda table: table.take(list(range(len(table)))[::-1]),
}


@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL)
def test_layouts(run: Run, tmp_path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    models = models_of(18)
    folder = write_folder(tmp_path / "wise", [change(table_of(part)) for part in (models[:60], models[60:])])
    assert_by_the_book(run(f"--dataset={folder}"), folder)


def test_several_row_groups(run: Run, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "wise", [table_of(models_of(18))], row_group_size=25)
    assert pq.ParquetFile(parquet_files(folder)[0]).num_row_groups == 5
    assert_by_the_book(run(f"--dataset={folder}"), folder)


def test_lists_of_float32(run: Run, tmp_path: Path) -> None:
    """The values are float32 precise, so that nothing is lost."""
    models = models_of(18)
    outcomes = []
    for kind in (pa.float64(), pa.float32()):
        folder = write_folder(tmp_path / str(kind), [table_of(models, number=kind)])
        outcomes.append(run(f"--dataset={folder}").predictions)
    assert outcomes[0] == outcomes[1]


def test_shards_with_their_columns_in_another_order(run: Run, tmp_path: Path) -> None:
    """The first shard's order counts."""
    models = models_of(18)
    shards = [table_of(models[:60]), table_of(models[60:])]
    plain = run(f"--dataset={write_folder(tmp_path / 'plain', shards)}")
    mixed = run(f"--dataset={write_folder(tmp_path / 'mixed', [shards[0], up_before_down(shards[1])])}")
    assert (plain.code, mixed.code) == (0, 0), mixed.err
    assert mixed.predictions == plain.predictions


def test_missing_sizes_and_duplicates_are_said(run: Run, tmp_path: Path) -> None:
    models = [model for model in models_of(18) if model not in (("thing_03", 2), ("thing_05", 6))]
    folder = write_folder(tmp_path / "wise", [table_of([*models, models[0], models[1]])])
    outcome = run(f"--dataset={folder}")
    assert_by_the_book(outcome, folder)
    assert "2 models have the micro-dataset and size of another one" in outcome.out
    assert "2 micro-datasets lack a size: thing_03, thing_05" in outcome.out


def test_one_size_in_training_only_and_one_in_testing_only(run: Run, tmp_path: Path) -> None:
    """A size that no training model has can't be predicted, and is wrong."""
    models = [*models_of(2, sizes=(1, 2)), ("lone", 40)]
    folder = write_folder(tmp_path / "wise", [table_of(models)])
    outcome = run(f"--dataset={folder}", "--train_size=1")
    assert outcome.code == 0, outcome.err
    assert {guess for _, _, size, guess, _ in rows_of(outcome.predictions) if size == 40} <= {1, 2}


def test_the_examples_in_docstrings() -> None:
    assert any("layer_name" in test.name and test.examples for test in doctest.DocTestFinder().find(dsire))
    assert doctest.testmod(dsire).failed == 0

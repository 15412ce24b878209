"""The whole command: what it prints and writes, that it computes once, options, and models that are not as usual."""

import csv
import io
import os
import statistics
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pytest
import torch
from conftest import (
    LAYERS,
    Book,
    Run,
    assert_right,
    by_the_book,
    models_of,
    rows_of,
    table_of,
    write_folder,
)
from lora_writers import write, write_model

import dsire

QUICK = ("--experiments=2", "--train_size=2")
ESCAPES = "\x1b]0;title\x07\x1b[31m\u202e\nx"  # for a terminal's title and colours, to turn a line, and to end it


def metrics_of(rows: list[Any]) -> dict[str, float]:
    """MAE, MAPE in % and accuracy in % of the rows of one experiment."""
    errors = [(abs(guess - size), size) for _, _, size, guess, _ in rows]
    return {
        "mae": statistics.fmean(error for error, _ in errors),
        "mape": 100 * statistics.fmean(error / size for error, size in errors),
        "accuracy": 100 * statistics.fmean(error == 0 for error, _ in errors),
    }


def test_the_shipped_subset_in_a_new_process(run_anew: Run, shipped_by_the_book: Book) -> None:
    first = run_anew(HF_HUB_OFFLINE="1")
    assert first.err == ""
    assert "low_4 ships with the script" in first.out
    assert "not to be compared with the paper's figures" in first.out

    assert_right(first, shipped_by_the_book)
    rows = rows_of(first.predictions)
    experiments = [metrics_of([row for row in rows if row[0] == number]) for number in range(1, 11)]
    report = first.report
    assert report["experiments"] == [pytest.approx(metrics) for metrics in experiments]
    (table,) = report["tables"]
    assert table["heads"][1:4] == ["MAE", "MAPE %", "accuracy %"]
    (name, *cells) = table["rows"][0]
    assert name == "dsire"
    for metric, (mean, std) in zip(("mae", "mape", "accuracy"), cells, strict=False):
        values = [metrics[metric] for metrics in experiments]
        assert (mean, std) == pytest.approx((statistics.fmean(values), statistics.pstdev(values)))
        assert f"{mean:.2f} ± {std:.2f}" in first.out
    assert cells[2][0] > 2 * 100 / 6  # twice the chance of one in six

    expected = {"subset": "low_4", "rank": 4, "seed": 42, "experiments": 10, "train_size": 15, "device": "cpu"}
    assert report["settings"].items() >= {**expected, "matrices": ["A", "B", "BA"]}.items()
    assert {"python", "torch", "scikit-learn", "pyarrow"} <= report["versions"].keys()


def test_a_second_run_reads_no_shard(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(f"--dataset={folder}")
    assert_right(first, by_the_book(folder))
    monkeypatch.delattr(dsire, "shard_spectra")
    second = run(f"--dataset={folder}")
    assert (second.code, second.out, second.predictions) == (0, first.out, first.predictions)
    other = run(f"--dataset={folder}", "--seed=7", "--experiments=3", "--train_size=19", "--matrices", "B")
    rows = rows_of(other.predictions)
    assert len(rows) == 3 * 6
    assert {round(share * len(LAYERS), 3) for *_, share in rows} <= {1, 2, 3}  # only B's voters voted
    assert other.report["settings"]["matrices"] == ["B"]


def test_the_paper_stands_beside_a_subset_of_lora_wise(run: Run, tmp_path: Path) -> None:
    """Where 15 micro-datasets train; of 17, three quarters would. Not beside another dataset's."""
    folder = write_folder(tmp_path / "LoRA-WiSE", [table_of(models_of(17, (1, 10, 20)), rank=16)], subset="medium_16")
    (tmp_path / "other").symlink_to(folder)
    cases = [("--train_size=15", folder, True), ("--seed=42", folder, False)]
    for option, folder, there in [*cases, ("--train_size=15", tmp_path / "other", False)]:
        outcome = run(f"--dataset={folder}", "--subset=medium_16", "--rank=16", option)
        assert [value in outcome.out for value in ("1.67 ± 0.17", "4.32 ± 0.46", "84.04 ± 1.85")] == [there] * 3


# What is printed and written
@pytest.mark.parametrize(("micro_datasets", "trained"), [(2, 1), (3, 2), (8, 6), (19, 14), (20, 15), (21, 15)])
def test_without_a_train_size(run: Run, tmp_path: Path, micro_datasets: int, trained: int) -> None:
    folder = write_folder(tmp_path / "wise", [models_of(micro_datasets, (1, 2))])
    outcome = run(f"--dataset={folder}", "--experiments=1")
    to_train = f"{trained} micro-dataset{'s' if trained > 1 else ''} to train"
    assert f"1 experiment: {to_train}, {micro_datasets - trained} to test" in outcome.out
    assert outcome.report["settings"]["train_size"] == trained


def test_what_a_comparison_writes(run: Run, folder: Path) -> None:
    alone = run(f"--dataset={folder}", *QUICK)
    outcome = run(f"--dataset={folder}", "--compare", "--plots", *QUICK)
    assert outcome.code == 0, outcome.err
    rows = [*csv.DictReader(io.StringIO(outcome.predictions))]
    names = [*dsire.PREDICTORS, *(f"dsire {matrix}" for matrix in dsire.MATRICES)]
    assert [*dict.fromkeys(row["predictor"] for row in rows)] == names
    of_dsire = [[*row.values()][:-1] for row in rows if row["predictor"] == "dsire"]
    assert of_dsire == [line.split(",") for line in alone.predictions.splitlines()[1:]]
    tables = outcome.report["tables"]
    assert [row[0] for row in tables[0]["rows"]] == names
    assert tables[1]["rows"][-1][1:] == tables[0]["rows"][0][1:4]  # with as many to train on as there are
    lines = [line.split() for line in outcome.out.splitlines()]
    for name, (mean, std), *_ in tables[0]["rows"]:
        assert [*name.split(), *f"{mean:.2f} ± {std:.2f}".split()] in [line[: len(name.split()) + 3] for line in lines]
    assert all(len(row) == len(table["heads"]) for table in tables for row in table["rows"])
    assert all(table["title"] in outcome.out for table in tables)
    (row,) = [line.split() for line in alone.out.splitlines() if line.startswith("dsire ")]
    assert [line[: len(row)] for line in lines].count(row) == 1

    pictures = ["confusion.png", "spectra.png", "training.png"]
    files = ["predictions.csv", "report.json", *pictures]
    assert outcome.out.splitlines()[-5:] == [f"wrote {outcome.output / name}" for name in files]
    assert sorted(file.name for file in outcome.output.iterdir()) == sorted(files)
    assert all((outcome.output / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


@pytest.mark.parametrize("backend", ["module://nothing.here", "TkAgg"])
def test_pictures_whatever_matplotlib_is_told(backend: str, run_anew: Run, folder: Path) -> None:
    setting = {"MPLBACKEND": backend, "DISPLAY": "", "MPLCONFIGDIR": "/proc/nowhere"}
    outcome = run_anew(f"--dataset={folder}", "--plots", *QUICK, **setting)
    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err
    assert len(list(outcome.output.glob("*.png"))) == 3


def odd_parquet(tmp_path: Path, layer: str, name: str) -> list[Any]:
    table = table_of([(f"{thing}{name}", size) for thing, size in models_of(4, (1, 2))][:-1])
    table = table.rename_columns([column.replace("attn1", f"attn1{layer}") for column in table.column_names])
    folder = write_folder(tmp_path / "wise", [table])
    (folder / "README.md").unlink()
    return ["--dataset", folder, "--rank=4", *QUICK]


def odd_files(tmp_path: Path, *more: Any, bad: bool = False) -> list[Any]:
    folder, rows = tmp_path / f"files{ESCAPES}", [["file_name", "label", "name", "recipe"]]
    for name, size in models_of(4, (1, 2)):
        file = write_model(folder / f"{name}{ESCAPES}{size}.safetensors", (name, size))
        rows.append([file.name, str(size), f"{name}{ESCAPES}", f"{int(name[-1]) % 2}{ESCAPES}"])
    with (folder / "metadata.csv").open("w", newline="") as text:
        csv.writer(text).writerows(rows)
    if bad:
        file.write_bytes(ESCAPES.encode() * 9)
    return ["--dataset", folder, *more]


def odd_key(tmp_path: Path, key: str) -> Path:
    return write(tmp_path / "new.safetensors", {f"{ESCAPES * 1000}{key}": torch.ones(2, 2)})


@pytest.mark.parametrize(
    "arguments",
    [
        lambda path: odd_parquet(path, "", ESCAPES),
        lambda path: [*odd_parquet(path, ESCAPES, ""), "--compare"],
        lambda path: odd_files(path, *QUICK, "--compare"),
        lambda path: odd_files(path, "--predict", path / f"files{ESCAPES}"),
        lambda path: odd_files(path, bad=True),
        *(lambda path, key=key: ["--predict", odd_key(path, key)] for key in (".hada_w1_a", ".lora_up.weight")),
        lambda path: ["--predict", path / f"no{ESCAPES}such.safetensors"],
        lambda path: ["--predict", write_model(path / os.fsdecode(b"caf\xe9.safetensors"), ("a", 1))],
        *(lambda path, option=option: [option, ESCAPES] for option in ("--subset", "--device", "--rank")),
        lambda path: ["--output", f"/proc/{ESCAPES}"],
    ],
)
def test_nothing_that_is_printed_carries_control(arguments: Any, run: Run, tmp_path: Path) -> None:
    outcome = run(*arguments(tmp_path))
    lines = [*outcome.out.split("\n"), *outcome.err.split("\n")]
    assert not [line for line in lines if not line.isprintable()]
    assert outcome.code == 0 or outcome.says()


def test_the_tables_keep_the_bytes_of_names(run: Run, tmp_path: Path) -> None:
    assert all(ESCAPES in name for _, name, *_ in rows_of(run(*odd_parquet(tmp_path, "", ESCAPES)).predictions))


# Options
@pytest.mark.parametrize("device", ["hpu", "gpu", "meta", "nowhere", "cuda:99", "cuda:x", "CPU"])
def test_a_device_that_is_none(device: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsire, "find_source", None)
    outcome = run(f"--device={device}")
    assert outcome.says(f"--device={device}", "cpu")
    assert len(outcome.err) < 300


IMPOSSIBLE = "--rank=0 --experiments=9007199254740993 --leave_out=recipe --compare --output=/proc/x"
IMPOSSIBLE += f" --save_spectra= --save_spectra=/ --save_spectra=/dev/full --save_spectra={__file__}"


@pytest.mark.parametrize("option", [*IMPOSSIBLE.split(), "--save_spectra=/proc/x/y.safetensors"])
def test_what_cannot_be_done_is_known_before(option: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsire, "find_source", None)
    more = ["--predict", "x"] if option == "--compare" else []
    assert run(option, *more).says("/proc/x" if "/proc/x" in option else option.partition("=")[0])


def test_pictures_need_a_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dsire.py", "--plots"])
    assert dsire.main() == 2
    assert "--output" in capsys.readouterr().err


def test_a_predictor_of_ones_own(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dsire.PREDICTORS, "mine", lambda spectra, splits: dsire.dsire(spectra, splits))
    usual = run(f"--dataset={folder}", *QUICK)
    outcome = run(f"--dataset={folder}", "--predictor=mine", *QUICK)
    assert (outcome.code, outcome.predictions) == (0, usual.predictions)
    assert "mine" in run(f"--dataset={folder}", "--compare", *QUICK).out


@pytest.mark.parametrize("error", [PermissionError(13, "no", "/a/place"), MemoryError(), RecursionError("too deep")])
def test_an_error_of_the_machine(error: BaseException, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsire, "find_source", Mock(side_effect=error))
    assert run().says(str(error) or "MemoryError")


# Models that are not as usual
def test_other_layouts(run: Run, tmp_path: Path) -> None:
    """float32, B before A, and several row groups."""
    models = models_of(18)
    tables = [table_of(its, pa.float32()) for its in (models[:60], models[60:])]
    shards = [table.select(table.column_names[::-1]) for table in tables]
    folder = write_folder(tmp_path / "wise", shards, row_group_size=25)
    assert_right(run(f"--dataset={folder}", "--train_size=15"), by_the_book(folder))


def test_missing_sizes_duplicates_and_columns_that_are_no_weights_are_said(run: Run, tmp_path: Path) -> None:
    models = [model for model in models_of(18) if model not in (("thing_03", 2), ("thing_05", 6))]
    table = table_of([*models, models[0], models[1]])
    folder = write_folder(tmp_path / "wise", [table.append_column("seed", pa.array([0] * len(table)))])
    outcome = run(f"--dataset={folder}", "--train_size=15")
    assert_right(outcome, by_the_book(folder))
    assert "columns that are not LoRA weights, left out: seed" in outcome.out
    assert "2 models of the micro-dataset and size of another one" in outcome.out
    assert any("thing_03" in note and "thing_05" in note and "size" in note for note in outcome.report["notes"])

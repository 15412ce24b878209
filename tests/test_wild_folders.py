"""Folders and datasets as people have them: which files are read, which belong together, and what is said."""

import argparse
import fcntl
import json
import os
import pickle
import unicodedata
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import BOMB, LABELLED, LAYERS, SECOND, Run, models_of, table_of, weights_of, write_folder, write_labelled
from lora_writers import write_model
from safetensors.torch import save_file

import dsire

SIZES = (10, 20, 30)
DOWN, UP = f"{LAYERS[0]}.lora.down.weight", f"{LAYERS[0]}.lora.up.weight"


def write_parquet(folder: Path, table: pa.Table | None = None, name: str = "train.parquet") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table or table_of(models_of(4, SIZES)), folder / name)
    return folder


def spectra_of(folder: Path, cache: Path) -> dsire.Spectra:
    source = dsire.find_source(str(folder), None, None, cache)
    return dsire.subset_spectra(source, dsire.rank_of(source, None)[0], cache)


def note_of(notes: list[str], *parts: str) -> bool:
    assert sum(all(part in note for part in parts) for note in notes) == 1, notes
    return True


# Parquet: labels, names, columns, the rank
def test_numbers_that_stand_for_names_are_refused(run: Run, tmp_path: Path) -> None:
    """The numbers of classes would pass for sizes; README.md, or the parquet itself, says that they are none."""
    folder = write_folder(tmp_path / "wise", [models_of(4, SIZES)])
    card = (folder / "README.md").read_text()
    classes = "  - name: label\n    dtype:\n      class_label:\n        names:\n          '0': '10'\n"
    (folder / "README.md").write_text(card.replace("  - name: label\n    dtype: string\n", classes))
    assert run("--dataset", folder).says("column label", "README.md", "write")
    table = table_of(models_of(3, (1, 2, 3)))
    for column in ("label", "name"):
        as_text = table[column].cast(pa.string())
        data = datasets.Dataset(table.set_column(table.column_names.index(column), column, as_text))
        classes = datasets.ClassLabel(names=as_text.unique().to_pylist())
        own = write_parquet(tmp_path / column, data.cast_column(column, classes).with_format("arrow")[:])
        assert run("--dataset", own, "--rank=4").says(f"column {column} holds numbers of classes")


@pytest.mark.parametrize(
    "change",
    [
        {"name": pa.array(["a", "b"]).dictionary_encode()},
        {"name": pa.array(["a", "b"], pa.large_string())},
        {"name": pa.array(["a", "b"], pa.string_view())},
        {"label": pa.array(["10", "20"])},
        {"label": pa.array([10, 20], pa.float32())},
        {"label": pa.array([10, 20], pa.uint8())},
        {"label": pa.array([Decimal(10), Decimal(20)], pa.decimal128(22, 2))},
        {"label": pa.array([10, 20]).dictionary_encode()},
    ],
)
def test_other_types_of_labels_and_names_mean_the_same(change: dict[str, pa.Array]) -> None:
    sizes, names, _ = dsire.model_labels(pa.table({"label": [10, 20], "name": ["a", "b"], **change}))
    assert (sizes.tolist(), names) == ([10, 20], ["a", "b"])


@pytest.mark.parametrize(
    ("column", "values"),
    [
        *(
            ("label", values)
            for values in ([Decimal("1.5"), Decimal("2")], ["1e3", "2"], ["1.000", "2"], [True, True], ["1", "-2"])
        ),
        *(("name", values) for values in ([b"a", b"b"], [1.5, 2.5], [True, False])),
    ],
)
def test_labels_and_names_that_are_none(column: str, values: list[Any]) -> None:
    with pytest.raises(dsire.DsireError, match=f"column {column}.* holds"):
        dsire.model_labels(pa.table({"label": [1, 2], "name": ["a", "b"], column: values}))


@pytest.mark.parametrize("features", [[1], {"label": 5}, {"label": {"names": None}}, {"label": {"names": ["a", "b"]}}])
def test_metadata_of_other_kinds(features: Any) -> None:
    table = pa.table({"label": [1, 2], "name": ["a", "b"]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    with nullcontext() if "label" not in features or features["label"] == 5 else pytest.raises(dsire.DsireError):
        assert dsire.model_labels(table)[1] == ["a", "b"]


def test_a_part_that_lacks_is_said(run: Run, folder: Path) -> None:
    (folder / "low" / "4" / f"{SECOND}.parquet").unlink()
    outcome = run(f"--dataset={folder}", "--subset=low_4", "--train_size=5")
    assert note_of(outcome.report["notes"], "low/4/train-*-of-00003.parquet", "2 files, not all")


@pytest.mark.parametrize("subset", ["fold_2", "mine", "low_2"])
def test_the_rank_of_a_name(subset: str, run: Run, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "wise", [models_of(4, SIZES)], subset)
    assert subset == "low_2" or run("--dataset", folder).says(subset, "--rank")
    outcome = run("--dataset", folder, "--rank=4", "--train_size=2")
    assert outcome.code == 0, outcome.err
    assert outcome.report["settings"]["rank"] == 4
    assert subset != "low_2" or note_of(outcome.report["notes"], "--rank=4", "low_2")


# Which files are read
def test_parquet_that_no_split_names_is_counted(run: Run, tmp_path: Path) -> None:
    models = models_of(6, SIZES)
    own = write_parquet(tmp_path / "own", table_of(models[:9]))
    for number in (9, 12, 15):
        write_parquet(own, table_of(models[number : number + 3]), f"more_{number}.parquet")
    outcome = run("--dataset", own, "--rank=4", "--train_size=2")
    assert "default: 9 models" in outcome.out
    assert note_of(outcome.report["notes"], "3 parquet files", "more_12.parquet")
    (own / "more_9.parquet").rename(own / "test.parquet")
    outcome = run("--dataset", own, "--rank=4", "--train_size=2")
    assert "default: 12 models" in outcome.out
    assert note_of(outcome.report["notes"], "splits train test")


def test_other_subsets_are_not_left_out(run: Run, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "wise", [models_of(4, SIZES)])
    write_parquet(folder / "low" / "8")
    configs = "- {config_name: low_8, data_files: low/8/*}\n- {config_name: texts, data_files: t.csv}\n---\n"
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.removesuffix("---\n") + configs)
    (folder / "t.csv").write_text("a,b\n")
    for hidden in ("._train-00000-of-00001.parquet", ".train-0.parquet"):
        (folder / "low" / "4" / hidden).write_bytes(b"macOS")
    outcome = run("--dataset", folder, "--subset=low_4", "--train_size=2")
    assert outcome.code == 0, outcome.err
    assert not any("left out" in note for note in outcome.report["notes"])
    write_parquet(folder / "more")
    outcome = run("--dataset", folder, "--subset=low_4", "--train_size=2")
    assert note_of(outcome.report["notes"], "1 parquet file", "more/train.parquet")


def test_stars_in_a_readme_are_no_aliases(run_anew: Run, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "wise", [models_of(4, SIZES)])
    card = (folder / "README.md").read_text().replace("---\n", "---\ndescription: R&D is *new*, AT &T\n", 1)
    for text in (f"{card}\n*Not* - *an alias*\n- &neither\n", "*Only* - *text*\n", f"\n\n{card}"):
        (folder / "README.md").write_text(text)
        assert len(dsire.find_source(str(folder), None, None, tmp_path).shards) == 1
    (folder / "README.md").write_text("*Only* - *text*\n")
    (folder / ".huggingface.yaml").write_text(f"# c\n---\n{BOMB}")  # it is not read
    outcome = run_anew("--dataset", folder, "--rank=4", "--train_size=2")
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize(
    "place", ["wise [v1]", "wise*", "wise?x", ".data", "__wise__", "100%20x", "{a,b}", "test", "d" * 200]
)
def test_any_place_will_do(place: str, run: Run, tmp_path: Path) -> None:
    """A sibling that a pattern would catch, and a script of the dataset's own name, are not read."""
    folder = write_parquet(tmp_path / place)
    write_parquet(tmp_path / "wise v1")
    (folder / f"{place}.py").write_text("raise SystemExit('run')")
    outcome = run("--dataset", folder, "--rank=4", "--train_size=2")
    assert outcome.code == 0, outcome.err
    assert "default: 12 models" in outcome.out


def test_what_is_not_listed_is_not_read(run: Run, tmp_path: Path) -> None:
    """Parquet of images, a trainer's files, and empty tensors."""
    own = write_labelled(tmp_path / "own")
    before = run("--dataset", own, "--train_size=2")
    assert "own: 9 models" in before.out
    write_parquet(own / "images", pa.table({"image": [b"x"], "label": [3]}))
    outcome = run("--dataset", own, "--train_size=2")
    assert note_of(outcome.report["notes"], "not in metadata.csv", "1 file", "images/train.parquet")
    for name in ("optimizer.bin", "scheduler.pt"):
        torch.save({"base_lrs": [1e-4], "state": {}}, own / name)
    (own / "rng_state.pth").write_bytes(pickle.dumps(argparse.Namespace(lr=1e-4)))
    save_file({DOWN: torch.empty(0), UP: torch.empty(0)}, own / "zero3.safetensors")
    outcome = run("--dataset", own, "--train_size=2")
    assert (outcome.code, outcome.err, outcome.predictions) == (0, "", before.predictions)
    assert note_of(outcome.report["notes"], "not in metadata.csv", "5 files", "such as ")
    (own / "metadata.csv").unlink()
    assert run("--dataset", own).says("write metadata.csv with file_name, label, name", "--subset")
    (own / "images" / "train.parquet").unlink()
    assert run("--dataset", own).says("no parquet", "write metadata.csv with file_name, label, name")


def test_a_link_to_nothing_is_said_and_what_another_leads_to_is_not_printed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2:x:0:0\n")
    for name, target in (("train.parquet", "nowhere"), ("metadata.csv", tmp_path / "secret")):
        (tmp_path / name[:5]).mkdir()
        (tmp_path / name[:5] / name).symlink_to(target)
    assert run("--dataset", tmp_path / "train", "--rank=4").says("train.parquet", "No such file")
    outcome = run("--dataset", tmp_path / "metad")
    assert outcome.says("metadata.csv needs rows")
    assert "hunter2" not in outcome.err


# metadata.csv
NFC, NFD = (unicodedata.normalize(form, "sub/Gr\u00fcn.safetensors") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("file_name;label;name\na.safetensors;5;x\n;;\n", "a.safetensors"),
        ("file_name, label, name\na.safetensors, 5, x\n", "a.safetensors"),
        ("file_name\tlabel\tname\na.safetensors\t5.0\tx\n", "a.safetensors"),
        ("file_name,label,name\n.\\a.safetensors,5,x\n", "a.safetensors"),
        ('\ufeff"file_name";"label";"name"\r\n"a.safetensors";"5";"x"\r\n', "a.safetensors"),
        (f"file_name,label,name\n{NFC},5,x\n", NFD),
        (f"file_name,label,name\n{NFD},5,x\n".replace("/", "\\"), NFC),
    ],
)
def test_metadata_csv_as_programs_write_it(text: str, file: str, tmp_path: Path) -> None:
    write_model(tmp_path / file, ("a", 5))
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    assert dsire.metadata_csv(tmp_path) == {file: (5, "x", "")}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["file_name, label, name"]),
        ("file_name,label,name\n,,\n", ["rows"]),
        ("file,size\na.safetensors,5\n", ["file_name, label, name"]),
        ("file_name,label\na.safetensors,5\n", ["file_name, label, name"]),
        ("file_name,label,name,name\na.safetensors,5,x,y\n", ["name once"]),
        ("file_name,label,name\nb.safetensors,5,x\n", ["b.safetensors 5 x", "is there"]),
        ("file_name,label,name\na.safetensors,5,\n", ["a.safetensors 5", "a name"]),
        ("file_name,label,name\na.safetensors,5,x,y\n", ["a.safetensors 5 x y", "quotes"]),
        ("file_name,label,name\na.safetensors,0,x\n", ["a.safetensors 0 x", "whole number"]),
        ("file_name,label,name\na.safetensors,5.5,x\n", ["a.safetensors 5.5 x", "whole number"]),
        ("file_name,label,name\na.safetensors,5,x\n./a.safetensors,6,x\n", ["a.safetensors 6 x", "once"]),
        ("file_name,label,name\ntwo,5,x\n", ["two 5 x", "is there"]),
        ("file_name,label,name\n.,5,x\n\xff", ["can't be read"]),
        ("file_name,label,name\nsub/no.safetensors,5,x\n", ["error: sub/no.safetensors: holds no LoRA"]),
    ],
)
def test_metadata_csv_says_what_was_found(text: str, parts: list[str], run: Run, tmp_path: Path) -> None:
    own = tmp_path / "own"
    for name in ("a", "two/b", "two/c", "sub/no"):
        write_model(own / f"{name}.safetensors", ("a", 5))
    save_file({"x": torch.ones(1)}, own / "sub" / "no.safetensors")
    (own / "metadata.csv").write_bytes(text.encode("latin-1"))
    assert run("--dataset", own).says("" if "sub/no" in text else "metadata.csv", *parts)


def test_the_base_among_the_labelled_files(run: Run, tmp_path: Path) -> None:
    """It is one more file, and untrained."""
    own = tmp_path / "own"
    own.mkdir()
    for number, name in enumerate(("base", "a1", "b1", "c1")):
        save_file({"layer.weight": torch.ones(4, 4) + number * torch.eye(4) / 8}, own / f"{name}.safetensors")
    rows = ["file_name,label,name", *(f"{name}1.safetensors,3,{name}" for name in "abc")]
    (own / "metadata.csv").write_text("\n".join(rows))
    outcome = run("--dataset", own, "--base", own / "base.safetensors", "--train_size=1")
    assert "1 file left out, as not in metadata.csv, such as base.safetensors" in outcome.out
    (own / "metadata.csv").write_text("\n".join([*rows, "base.safetensors,3,d"]))
    outcome = run("--dataset", own, "--base", own / "base.safetensors", "--train_size=1")
    assert f"note: {dsire.UNTRAINED} (1 of 4 files, such as base.safetensors)" in outcome.out
    outcome = run("--dataset", own, "--base", own / "base.safetensors", "--predict", own)
    assert [one["status"] for one in outcome.report["estimates"]].count("untrained") == 1


def test_a_row_may_name_the_folder_of_an_adapter(tmp_path: Path) -> None:
    models, rows = [("a", 5), ("b", 10)], ["file_name,label,name,recipe"]
    for name, size in models:
        write_model(tmp_path / "lab" / name / "adapter_model.safetensors", (name, size))
        rows.append(f"../lab/{name},{size},{name},r")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "metadata.csv").write_text("\n".join(rows))
    before = spectra_of(tmp_path / "own", tmp_path / "cache")
    assert list(zip(before.names, before.sizes.tolist(), before.recipes, strict=True)) == [(*it, "r") for it in models]
    (tmp_path / "lab" / "b" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    after = spectra_of(tmp_path / "own", tmp_path / "cache")
    assert [after.values[:, model].equal(before.values[:, model]) for model in (0, 1)] == [True, False]


def test_labels_are_not_of_the_cache(tmp_path: Path) -> None:
    own = write_labelled(tmp_path / "own")
    before = spectra_of(own, tmp_path / "cache")
    (own / "metadata.csv").write_text((own / "metadata.csv").read_text().replace(",10,a", ",11,z"))
    files = sorted((tmp_path / "cache" / "spectra").glob("*.safetensors"))
    after = spectra_of(own, tmp_path / "cache")
    assert sorted((tmp_path / "cache" / "spectra").glob("*.safetensors")) == files
    assert (after.names[0], after.sizes.tolist()[0]) == ("z", 11)
    assert after.values.equal(before.values)


@pytest.mark.parametrize("prefix", ["", "x" * 230])
def test_a_whole_cache_is_enough_where_nothing_can_be_written(prefix: str, run: Run, tmp_path: Path) -> None:
    """Files have names of any length. Root may write everywhere, so that nothing has to be tried at all."""
    own, cache = write_labelled(tmp_path / "own", prefix=prefix), tmp_path / "cache"
    first = run("--dataset", own, "--train_size=2")
    assert first.code == 0, first.err
    assert len([*cache.glob("spectra/*.safetensors")]) == len(LABELLED)
    found = [cache, *cache.rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in found}
    with pytest.MonkeyPatch.context() as patched:
        for module, name in ((dsire, "file_spectra"), (dsire, "write_spectra"), (fcntl, "flock")):
            patched.setattr(module, name, None)  # no weights are read, nothing is written or locked
        for path in found:
            path.chmod(0o555 if path.is_dir() else 0o444)
        second = run("--dataset", own, "--train_size=2")
        for path in found:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert (second.code, second.err, second.predictions) == (0, "", first.predictions)
    assert {path: path.stat().st_mtime_ns for path in (cache, *cache.rglob("*"))} == before


def test_files_that_were_exchanged(tmp_path: Path) -> None:
    """With their times, as archives keep them."""
    own = write_labelled(tmp_path / "own")
    for file in own.iterdir():
        os.utime(file, (0, 0))
    before = spectra_of(own, tmp_path / "cache")
    for file, other in (("a10.safetensors", "x"), ("a20.safetensors", "a10.safetensors"), ("x", "a20.safetensors")):
        (own / file).rename(own / other)
    after = spectra_of(own, tmp_path / "cache")
    ten, twenty = (list(zip(before.names, before.sizes.tolist(), strict=True)).index(("a", size)) for size in (10, 20))
    assert torch.equal(after.values[:, [ten, twenty]], before.values[:, [twenty, ten]])


def test_parts_of_one_model_are_one_row(tmp_path: Path) -> None:
    own = write_labelled(tmp_path / "own")
    text = (own / "metadata.csv").read_text()
    for number in (1, 2):
        name = f"b-0000{number}-of-00002.safetensors"
        save_file(weights_of(("b", 5), layers=LAYERS[number - 1 : number]), own / name)
        text += f"\n{name},7,b"
    (own / "metadata.csv").write_text(text)
    with pytest.raises(dsire.DsireError, match="once"):
        dsire.metadata_csv(own)
    (own / "metadata.csv").write_text(text.rpartition("\n")[0])
    assert dsire.metadata_csv(own)["b-00001-of-00002.safetensors"] == (7, "b", "")


# Paths
@pytest.mark.parametrize("option", ["--predict", "--dataset"])
@pytest.mark.parametrize("name", ["x" * 300, "a/" + "x" * 300, "~nobody-here/x", "a\0b", "own/a10.safetensors/x"])
def test_names_that_no_disk_has(option: str, name: str, run: Run, tmp_path: Path) -> None:
    write_labelled(tmp_path / "own")
    assert run(f"{option}={name}").says("no such" if "/x" not in name or name[:2] != "a/" else "here")


@pytest.mark.parametrize("option", ["--predict", "--dataset", "--base", "--subset"])
def test_names_that_are_empty(option: str, run: Run) -> None:
    assert run(f"{option}=").says("an empty name" if option != "--subset" else "--subset")


def test_a_file_is_no_dataset(run: Run, tmp_path: Path) -> None:
    own = write_labelled(tmp_path / "own")
    assert run("--dataset", own / "metadata.csv").says("metadata.csv", "can't be read as a file of spectra", "folder")
    assert run("--dataset", own / "a10.safetensors").says("a10.safetensors", "has none", "folder")

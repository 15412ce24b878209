"""Folders and datasets as people have them: which files are read, which belong together, and what is said."""

from __future__ import annotations

import argparse
import errno
import os
import pickle
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import LAYERS, Run, models_of, table_of, weights_of, write_folder
from safetensors.torch import save_file

import dsire

SIZES = (10, 20, 30)
DOWN, UP = f"{LAYERS[0]}.lora.down.weight", f"{LAYERS[0]}.lora.up.weight"


def write_lora(path: Path, model: Any, header: dict[str, str] | None = None) -> Path:
    """The weights of a model as a file of the layout that its ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {key: torch.from_numpy(matrix) for key, matrix in weights_of(model).items()}
    if path.suffix == ".safetensors":
        save_file(weights, path, header)
    else:
        torch.save(weights, path)
    return path


def write_labelled(folder: Path, names: str = "abc", rows: bool = True) -> Path:
    """LoRA files of the sizes 10, 20, 30 for each name, with metadata.csv."""
    lines = ["file_name,label,name"]
    for name in names:
        for size in SIZES:
            write_lora(folder / f"{name}{size}.safetensors", (name, size))
            lines.append(f"{name}{size}.safetensors,{size},{name}")
    if rows:
        (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def write_parquet(folder: Path, table: pa.Table, name: str = "train.parquet") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / name)
    return folder


def spectra_of(folder: Path, cache: Path) -> dsire.Spectra:
    source = dsire.find_source(str(folder), None, None, cache)
    return dsire.subset_spectra(source, dsire.rank_of(source, None)[0], cache)


def note_of(notes: list[str], *parts: str) -> bool:
    """One note, and only one, has these parts."""
    assert sum(all(part in note for part in parts) for note in notes) == 1, notes
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Parquet: labels, names, columns, the rank


def as_class_label(table: pa.Table, column: str, names: list[str]) -> pa.Table:
    data = datasets.Dataset(table.set_column(table.column_names.index(column), column, table[column].cast(pa.string())))
    return data.cast_column(column, datasets.ClassLabel(names=names)).with_format("arrow")[:]


def test_numbers_that_stand_for_names_are_refused(run: Run, tmp_path: Path) -> None:
    """The numbers of classes would pass for sizes; README.md, or the parquet itself, says that they are none."""
    folder = write_folder(tmp_path / "wise", [table_of(models_of(4, (1, 2, 3)))])
    card = (folder / "README.md").read_text()
    names = "".join(f"          '{number}': '{10 * number}'\n" for number in range(4))
    classes = f"  - name: label\n    dtype:\n      class_label:\n        names:\n{names}"
    (folder / "README.md").write_text(card.replace("  - name: label\n    dtype: string\n", classes))
    assert run("--dataset", folder).says("column label", "README.md", "write")
    for column, values in (("label", ["1", "2", "3"]), ("name", ["thing_00", "thing_01", "thing_02"])):
        table = as_class_label(table_of(models_of(3, (1, 2, 3))), column, values)
        own = write_parquet(tmp_path / column, table)
        assert run("--dataset", own, "--rank=4").says(f"column {column} holds numbers of classes")


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("name", pa.dictionary(pa.int8(), pa.string())),
        ("name", pa.large_string()),
        ("name", pa.string_view()),
        ("label", pa.string()),
        ("label", pa.float32()),
        ("label", pa.uint8()),
        ("label", pa.decimal128(22, 2)),
        ("label", pa.dictionary(pa.int8(), pa.int64())),
    ],
)
def test_other_types_of_labels_and_names_mean_the_same(column: str, kind: pa.DataType) -> None:
    models = models_of(3, SIZES)
    table = table_of(models).select(["label", "name"])
    values = table[column].to_pylist()
    values = [Decimal(value) for value in values] if pa.types.is_decimal(kind) else values
    values = [str(value) for value in values] if kind == pa.string() else values
    array = pa.array(values).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(values).cast(kind)
    table = table.set_column(table.column_names.index(column), column, array)
    sizes, names, _ = dsire.model_labels(table)
    assert list(zip(names, sizes.tolist(), strict=True)) == models


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("label", [Decimal("1.5"), Decimal("2")]),
        ("label", ["1e3", "2"]),
        ("label", [True, True]),
        ("label", ["1", "-2"]),
        ("name", [b"a", b"b"]),
        ("name", [1.5, 2.5]),
        ("name", [True, False]),
    ],
)
def test_labels_and_names_that_are_none(column: str, values: list[Any]) -> None:
    columns = {"label": pa.array([1, 2]), "name": pa.array(["a", "b"]), column: pa.array(values)}
    with pytest.raises(dsire.DsireError, match=f"column {column}.* holds"):
        dsire.model_labels(pa.table(columns))


@pytest.mark.parametrize("subset", ["fold_2", "seed_42", "v_4", "mine"])
def test_a_number_that_is_no_rank(subset: str, run: Run, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "wise", [table_of(models_of(4, SIZES))], subset=subset)
    assert run("--dataset", folder).says(subset, "--rank")
    outcome = run("--dataset", folder, "--rank=4", "--train_size=2")
    assert outcome.code == 0, outcome.err
    assert outcome.report["settings"]["rank"] == 4


def test_rank_goes_before_the_name(run: Run, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "wise", [table_of(models_of(4, SIZES))], subset="low_2")
    outcome = run("--dataset", folder, "--rank=4", "--train_size=2")
    assert outcome.report["settings"]["rank"] == 4
    assert note_of(outcome.report["notes"], "--rank=4", "low_2")


# ---------------------------------------------------------------------------------------------------------------------
# Which files are read


def test_parquet_that_no_split_names_is_counted(run: Run, tmp_path: Path) -> None:
    models = models_of(6, SIZES)
    write_parquet(tmp_path / "own", table_of(models[:9]))
    for number in (9, 12, 15):
        write_parquet(tmp_path / "own", table_of(models[number : number + 3]), f"more_{number}.parquet")
    outcome = run("--dataset", tmp_path / "own", "--rank=4", "--train_size=2")
    assert "default: 9 models" in outcome.out
    assert note_of(outcome.report["notes"], "3 parquet files", "more_12.parquet")


def test_splits_that_are_taken_together_are_named(run: Run, tmp_path: Path) -> None:
    models = models_of(6, SIZES)
    write_parquet(tmp_path / "own", table_of(models[:9]))
    write_parquet(tmp_path / "own", table_of(models[9:]), "test.parquet")
    outcome = run("--dataset", tmp_path / "own", "--rank=4", "--train_size=2")
    assert "default: 18 models" in outcome.out
    assert note_of(outcome.report["notes"], "splits train test")


def test_other_subsets_are_not_left_out(run: Run, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "wise", [table_of(models_of(4, SIZES))])
    other = write_folder(tmp_path / "other", [table_of(models_of(4, SIZES))], subset="low_8")
    (folder / "low" / "8").mkdir()
    (other / "low/8/train-00000-of-00001.parquet").rename(folder / "low/8/train-0.parquet")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.removesuffix("---\n") + "- config_name: low_8\n  data_files: low/8/*\n---\n")
    for hidden in ("._train-00000-of-00001.parquet", ".train-0.parquet"):
        (folder / "low" / "4" / hidden).write_bytes(b"macOS")
    outcome = run("--dataset", folder, "--subset=low_4", "--train_size=2")
    assert outcome.code == 0, outcome.err
    assert not any("left out" in note for note in outcome.report["notes"])


def test_stars_in_a_readme_are_no_aliases(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "wise", [table_of(models_of(4, SIZES))])
    card = (folder / "README.md").read_text().replace("---\n", "---\ndescription: R&D is *new*, AT &T\n", 1)
    for text in (f"{card}\n*Not* - *an alias*\n- &neither\n", "*Only* - *text*\n", f"\n\n{card}"):
        (folder / "README.md").write_text(text)
        assert len(dsire.find_source(str(folder), None, None, tmp_path).shards) == 1


def test_a_subset_beside_one_that_is_no_parquet(run: Run, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "wise", [table_of(models_of(4, SIZES))])
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.removesuffix("---\n") + "- config_name: texts\n  data_files: t.csv\n---\n")
    (folder / "t.csv").write_text("a,b\n")
    write_parquet(folder / "more", table_of(models_of(4, SIZES)))
    outcome = run("--dataset", folder, "--subset=low_4", "--train_size=2")
    assert outcome.code == 0, outcome.err
    assert note_of(outcome.report["notes"], "1 parquet file", "more/train.parquet")


@pytest.mark.parametrize("place", ["wise [v1]", "wise*", "wise?x", ".data", "__wise__", "100%20x", "{a,b}", "test"])
def test_any_place_will_do(place: str, run: Run, tmp_path: Path) -> None:
    """A sibling that a pattern would catch, and a script of the dataset's own name, are not read."""
    folder = write_parquet(tmp_path / place, table_of(models_of(4, SIZES)))
    write_parquet(tmp_path / "wise v1", table_of(models_of(4, SIZES)))
    (folder / f"{place}.py").write_text("raise SystemExit('run')")
    outcome = run("--dataset", folder, "--rank=4", "--train_size=2")
    assert outcome.code == 0, outcome.err
    assert "default: 12 models" in outcome.out


def test_loras_beside_the_parquet_of_their_images(run: Run, tmp_path: Path) -> None:
    own = write_labelled(tmp_path / "own")
    write_parquet(own / "images", pa.table({"image": [b"x"], "label": [3]}))
    outcome = run("--dataset", own, "--train_size=2")
    assert outcome.code == 0, outcome.err
    assert "own: 9 models" in outcome.out
    assert note_of(outcome.report["notes"], "not in metadata.csv", "1 file", "images/train.parquet")
    (own / "metadata.csv").unlink()
    assert run("--dataset", own).says("write metadata.csv with file_name, label, name", "--subset")
    (own / "images" / "train.parquet").unlink()
    assert run("--dataset", own).says("no parquet", "write metadata.csv with file_name, label, name")


def leave_a_checkpoint(folder: Path) -> None:
    """What trainers leave beside a LoRA; the last three of them are no pickles of plain tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("optimizer.bin", "scheduler.bin", "scaler.pt"):
        torch.save({"base_lrs": [1e-4], "state": {}}, folder / name)
    for name in ("training_args.bin", "rng_state.pth", "mp_rank_00_model_states.pt"):
        with (folder / name).open("wb") as file:
            pickle.dump(argparse.Namespace(lr=1e-4), file)


def leave_foreign_files(folder: Path) -> None:
    for name in ("._lora.safetensors", ".hidden/other.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"macOS")
    save_file({"vae.weight": torch.ones(4, 4)}, folder / "base_model.safetensors")
    save_file({DOWN: torch.empty(0), UP: torch.empty(0)}, folder / "zero3.safetensors")


def test_what_is_no_lora_has_a_reason(tmp_path: Path) -> None:
    leave_a_checkpoint(tmp_path / "mine" / "checkpoint-500")
    lora = write_lora(tmp_path / "mine" / "checkpoint-500" / "lora.bin", ("a", 20))
    leave_foreign_files(tmp_path / "mine")
    (tmp_path / "mine" / "zero3.safetensors").unlink()
    files, left_out = dsire.files_to_predict(str(tmp_path / "mine"), tmp_path)
    assert files == {str(lora): lora}
    assert {Path(name).name for name in left_out} == {
        *("optimizer.bin", "scheduler.bin", "scaler.pt", "training_args.bin", "rng_state.pth"),
        *("mp_rank_00_model_states.pt", "base_model.safetensors"),
    }
    assert all(left_out.values())


def test_a_folder_that_holds_no_lora(run: Run, tmp_path: Path) -> None:
    leave_a_checkpoint(tmp_path / "mine")
    assert run("--predict", tmp_path / "mine").says("mine holds no model to judge", "trainer's state")


def test_what_is_not_listed_is_not_read(run: Run, tmp_path: Path) -> None:
    own = write_labelled(tmp_path / "own")
    before = run("--dataset", own, "--train_size=2").predictions
    leave_foreign_files(own)
    leave_a_checkpoint(own / "checkpoint")
    outcome = run("--dataset", own, "--train_size=2")
    assert (outcome.code, outcome.err, outcome.predictions) == (0, "", before)
    assert note_of(outcome.report["notes"], "not in metadata.csv", "8 files", "such as base_model.safetensors")


def test_a_listed_file_that_is_broken_is_named_by_its_path(run: Run, tmp_path: Path) -> None:
    own = write_labelled(tmp_path / "own")
    (own / "sub").mkdir()
    save_file({"x": torch.ones(1)}, own / "sub" / "a10.safetensors")
    with (own / "metadata.csv").open("a") as file:
        file.write("\nsub/a10.safetensors,10,a")
    assert run("--dataset", own).says("error: sub/a10.safetensors: holds no LoRA")


def test_a_link_to_nothing_is_said(run: Run, tmp_path: Path) -> None:
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "train.parquet").symlink_to("nowhere")
    assert run("--dataset", tmp_path / "link", "--rank=4").says("train.parquet", "No such file")


def test_a_folder_that_vanishes_while_it_is_listed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another program tidies up."""
    own = write_labelled(tmp_path / "own")
    (own / "sub").mkdir()
    scan = os.scandir

    def vanishing(path: Any) -> Any:
        if str(path).endswith("sub"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    outcome = run("--dataset", own, "--train_size=2")
    assert outcome.code == 0 or outcome.says("No such file or directory")


# ---------------------------------------------------------------------------------------------------------------------
# metadata.csv


@pytest.mark.parametrize(
    "text",
    [
        "file_name;label;name\na.safetensors;5;x\n;;\n",
        "file_name, label, name\na.safetensors, 5, x\n",
        "file_name\tlabel\tname\na.safetensors\t5.0\tx\n",
        "file_name,label,name\n.\\a.safetensors,5,x\n",
        '\ufeff"file_name";"label";"name"\r\n"a.safetensors";"5";"x"\r\n',
    ],
)
def test_metadata_csv_as_programs_write_it(text: str, tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", ("a", 5))
    (tmp_path / "metadata.csv").write_text(text)
    assert dsire.metadata_csv(tmp_path) == {"a.safetensors": (5, "x", "")}


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("separator", ["/", "\\"])
def test_names_are_compared_normalised(on_disk: str, separator: str, tmp_path: Path) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[on_disk]
    file = write_lora(tmp_path / "sub" / f"{unicodedata.normalize(on_disk, 'Grün')}.safetensors", ("a", 5))
    listed = f"sub{separator}{unicodedata.normalize(other, 'Grün')}.safetensors"
    (tmp_path / "metadata.csv").write_text(f"file_name,label,name\n{listed},5,x\n")
    assert dsire.metadata_csv(tmp_path) == {file.relative_to(tmp_path).as_posix(): (5, "x", "")}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["file_name, label, name"]),
        ("file_name,label,name\n,,\n", ["rows"]),
        ("file,size\na.safetensors,5\n", ["file_name, label, name", "file,size"]),
        ("file_name,label\na.safetensors,5\n", ["file_name, label, name"]),
        ("file_name,label,name\nb.safetensors,5,x\n", ["b.safetensors 5 x", "is there"]),
        ("file_name,label,name\na.safetensors,5,\n", ["a.safetensors 5", "a name"]),
        ("file_name,label,name\na.safetensors,0,x\n", ["a.safetensors 0 x", "whole number"]),
        ("file_name,label,name\na.safetensors,5.5,x\n", ["a.safetensors 5.5 x", "whole number"]),
        ("file_name,label,name\na.safetensors,5,x\n./a.safetensors,6,x\n", ["a.safetensors 6 x", "once"]),
        ("file_name,label,name\n.,5,x\n\xff", ["can't be read"]),
    ],
)
def test_metadata_csv_says_what_was_found(text: str, parts: list[str], run: Run, tmp_path: Path) -> None:
    write_lora(tmp_path / "own" / "a.safetensors", ("a", 5))
    (tmp_path / "own" / "metadata.csv").write_bytes(text.encode("latin-1"))
    assert run("--dataset", tmp_path / "own").says("metadata.csv", *parts)


def test_a_row_may_name_the_folder_of_an_adapter(tmp_path: Path) -> None:
    """PEFT saves each in a folder of its own; the settings beside the file count."""
    rows = ["file_name,label,name,recipe"]
    for name, size in models_of(2, (5, 10)):
        write_lora(tmp_path / "lab" / f"{name}_{size}" / "adapter_model.safetensors", (name, size))
        rows.append(f"../lab/{name}_{size},{size},{name},r")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "metadata.csv").write_text("\n".join(rows))
    spectra = spectra_of(tmp_path / "own", tmp_path / "cache")
    assert sorted(zip(spectra.names, spectra.sizes.tolist(), strict=True)) == sorted(models_of(2, (5, 10)))
    assert spectra.recipes == ["r"] * 4
    first = tmp_path / "lab" / "thing_00_5"
    model = list(zip(spectra.names, spectra.sizes.tolist(), strict=True)).index(("thing_00", 5))
    (first / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    after = spectra_of(tmp_path / "own", tmp_path / "cache")
    assert [model for model in range(4) if not after.values[:, model].equal(spectra.values[:, model])] == [model]
    write_lora(first / "other.safetensors", ("a", 5))
    with pytest.raises(dsire.DsireError, match="lab/thing_00_5 5 thing_00 r"):
        dsire.metadata_csv(tmp_path / "own")


def test_labels_are_not_of_the_cache(run: Run, tmp_path: Path) -> None:
    """What metadata.csv says may change: nothing is computed again for it."""
    own = write_labelled(tmp_path / "own")
    before = spectra_of(own, tmp_path / "cache")
    (own / "metadata.csv").write_text((own / "metadata.csv").read_text().replace(",10,a", ",11,z"))
    files = sorted((tmp_path / "cache" / "spectra").glob("*.safetensors"))
    after = spectra_of(own, tmp_path / "cache")
    assert sorted((tmp_path / "cache" / "spectra").glob("*.safetensors")) == files
    assert (after.names[0], after.sizes.tolist()[0]) == ("z", 11)
    assert after.values.equal(before.values)


# ---------------------------------------------------------------------------------------------------------------------
# Paths, and what is written


@pytest.mark.parametrize("option", ["--predict", "--dataset"])
@pytest.mark.parametrize("name", ["x" * 300, "a/" + "x" * 300, "~nobody-here/x", "a\0b", "own/a10.safetensors/x"])
def test_names_that_no_disk_has(option: str, name: str, run: Run, tmp_path: Path) -> None:
    write_labelled(tmp_path / "own")
    assert run(f"{option}={name}").says("no such" if "/x" not in name or name[:2] != "a/" else "here")


@pytest.mark.parametrize(
    ("name", "parts"), [("metadata.csv", ["is a file", "folder"]), ("a10.safetensors", ["holds no spectra", "folder"])]
)
def test_a_file_is_no_dataset(name: str, parts: list[str], run: Run, tmp_path: Path) -> None:
    own = write_labelled(tmp_path / "own")
    assert run("--dataset", own / name).says(name, *parts)


def test_a_cached_run_has_no_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, bars = write_labelled(tmp_path / "own"), []
    real = dsire.in_parallel
    monkeypatch.setattr(dsire, "in_parallel", lambda *its, name="", **more: bars.append(name) or real(*its, **more))
    for _ in range(2):
        spectra_of(own, tmp_path / "cache")
    assert [name for name in bars if name] == ["files"]

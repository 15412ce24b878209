"""Folders and datasets as people have them: which files are read, which belong together, and what is said."""

from __future__ import annotations

import argparse
import csv
import io
import json
import pickle
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import LAYERS, RANK, Run, models_of, table_of, weights_of, write_folder
from hub_stand_in import HubStandIn
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
    return dsire.subset_spectra(source, 0 if source.shards[0].is_lora else RANK, cache)


def note_of(notes: list[str], *parts: str) -> bool:
    """One note, and only one, has these parts."""
    assert sum(all(part in note for part in parts) for note in notes) == 1, notes
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Which files belong together


def epochs_of_kohya(number: int) -> list[tuple[str, dict[str, str]]]:
    return [
        (f"file{number}{epoch}", {"ss_output_name": f"cat{number}", "ss_session_id": f"{number}{epoch}"})
        for epoch in "abc"
    ]


def epochs_of_a_session(number: int) -> list[tuple[str, dict[str, str]]]:
    return [(f"file{number}{epoch}", {"ss_output_name": "last", "ss_session_id": f"{number}"}) for epoch in "abc"]


def epochs_in_names(pattern: str) -> Callable[[int], list[tuple[str, dict[str, str]]]]:
    return lambda number: [(pattern.format(number, epoch), {}) for epoch in (1, 2)] + [(f"cat{number}/lora", {})]


EPOCHS = {
    "output name": epochs_of_kohya,
    "session": epochs_of_a_session,
    "kohya's epochs": epochs_in_names("cat{}/lora-{:06d}"),
    "kohya's steps": epochs_in_names("cat{}/lora-step{:08d}"),
    "checkpoint": epochs_in_names("cat{}/checkpoint-{}00/lora"),
    "epoch": epochs_in_names("cat{}/lora_epoch-{}"),
}


@pytest.mark.parametrize("kind", EPOCHS)
@pytest.mark.parametrize("listed", [False, True])
def test_epochs_of_one_training_are_one_micro_dataset(kind: str, listed: bool, tmp_path: Path) -> None:
    lines = ["file_name,label"]
    for number, size in enumerate((10, 10, 20, 30)):
        for stem, header in EPOCHS[kind](number):
            stated = {"ss_dataset_dirs": json.dumps({f"1_cat{number}": {"n_repeats": 1, "img_count": size}})}
            write_lora(tmp_path / "own" / f"{stem}.safetensors", (stem, size), {**header, **stated})
            lines.append(f"{stem}.safetensors,{size}")
    if listed:
        (tmp_path / "own" / "metadata.csv").write_text("\n".join(lines))
    spectra = spectra_of(tmp_path / "own", tmp_path / "cache")
    assert sorted(spectra.sizes.tolist()) == sorted([10, 10, 20, 30] * 3)
    assert spectra.count == 4
    assert {spectra.names.count(name) for name in spectra.names} == {3}
    assert note_of(spectra.notes, "12 files of 4 trainings", "share images")
    assert note_of(spectra.notes, "states its own size", "11 other files")


@pytest.mark.parametrize("stem", ["cat_10", "cat-2024", "footstep10", "v1.5", "step"])
def test_a_number_in_a_name_is_no_epoch(stem: str, tmp_path: Path) -> None:
    path = write_lora(tmp_path / f"{stem}.safetensors", ("a", 1))
    assert dsire.training_of(path, path.name) == path.stem


# ---------------------------------------------------------------------------------------------------------------------
# Parquet: labels, names, columns, the rank


def as_class_label(table: pa.Table, column: str, names: list[str]) -> pa.Table:
    data = datasets.Dataset(table.set_column(table.column_names.index(column), column, table[column].cast(pa.string())))
    return data.cast_column(column, datasets.ClassLabel(names=names)).with_format("arrow")[:]


def test_the_names_of_classes_are_the_sizes_and_micro_datasets(tmp_path: Path) -> None:
    """No model has the first class, so that the numbers of the classes would pass for sizes."""
    models = models_of(4, SIZES)
    table = as_class_label(table_of(models), "label", ["1", "10", "20", "30"])
    table = as_class_label(table, "name", ["other", *sorted({name for name, _ in models})])
    assert set(table["label"].to_pylist()) == {1, 2, 3}
    sizes, names, _ = dsire.model_labels(table.select(["label", "name"]), "file")
    assert list(zip(names, sizes.tolist(), strict=True)) == models


def test_classes_that_only_the_readme_names(run: Run, tmp_path: Path) -> None:
    """The parquet's numbers 1, 2, 3 would pass for sizes, and none is so small that it would be refused."""
    folder = write_folder(tmp_path / "wise", [table_of(models_of(4, (1, 2, 3)))])
    card = (folder / "README.md").read_text()
    names = "".join(f"          '{number}': '{10 * number}'\n" for number in range(4))
    classes = f"  - name: label\n    dtype:\n      class_label:\n        names:\n{names}"
    column = "  - name: label\n    dtype: string\n"
    assert column in card
    (folder / "README.md").write_text(card.replace(column, classes))
    outcome = run("--dataset", folder, "--train_size=2")
    assert outcome.code == 0, outcome.err
    assert "sizes 10 20 30" in outcome.out


@pytest.mark.parametrize("names", [["few", "many", "most"], ["10 images", "20", "30"], ["0", "20", "30"]])
def test_class_names_that_are_no_sizes(names: list[str], run: Run, tmp_path: Path) -> None:
    table = table_of(models_of(3, (1, 2, 3)))
    classes = pa.array([names[size - 1] for size in table["label"].to_pylist()])
    table = as_class_label(table.set_column(0, "label", classes), "label", names)
    write_parquet(tmp_path / "own", table)
    assert run("--dataset", tmp_path / "own", "--rank=4").says("column label holds", "dataset size")


def test_a_class_that_is_none(run: Run, tmp_path: Path) -> None:
    table = as_class_label(table_of(models_of(3, SIZES)), "label", ["10", "20", "30"])
    numbers = [-1, *table["label"].to_pylist()[1:]]
    write_parquet(tmp_path / "own", table.set_column(0, table.schema.field("label"), pa.array(numbers)))
    assert run("--dataset", tmp_path / "own", "--rank=4").says("column label", "none of its 3 classes")


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
    sizes, names, _ = dsire.model_labels(table, "file")
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
    with pytest.raises(dsire.DsireError, match=f"column {column} holds"):
        dsire.model_labels(pa.table(columns), "file")


def test_columns_that_arrow_cannot_read_are_not_blamed_on_the_download(tmp_path: Path) -> None:
    pl = pytest.importorskip("polars")
    pl.DataFrame({"label": [1], "name": ["a"]}).with_columns(pl.col("label").cast(pl.Int128)).write_parquet(
        tmp_path / "train.parquet"
    )
    with pytest.raises(dsire.DsireError, match="pyarrow can't read") as error:
        dsire.shard_spectra(tmp_path / "train.parquet", 4)
    assert "anew" not in str(error.value)


@pytest.mark.parametrize("alpha", [pa.array([8.0, -2.0]), pa.array([8, -2]), pa.array([[8.0], [-2.0]])])
def test_alpha_and_the_middle_matrix_are_used_in_parquet(alpha: pa.Array, tmp_path: Path) -> None:
    """By the book: BA = alpha / r times B, the middle matrix and A as one convolution of k weights."""
    draw = np.random.default_rng(0)
    a, mid, b = draw.normal(size=(2, 4, 6)), draw.normal(size=(2, 4, 4, 9)), draw.normal(size=(2, 8, 4))
    lists = {
        "c.lora.down.weight": a,
        "c.lora.mid.weight": mid,
        "c.lora.up.weight": b,
    }
    columns = {name: pa.array(list(values.reshape(2, -1))) for name, values in lists.items()}
    columns |= {"label": pa.array([1, 2]), "name": pa.array(["x", "y"]), "c.alpha": alpha}
    path = write_parquet(tmp_path, pa.table(columns)) / "train.parquet"
    spectra = dsire.shard_spectra(path, 4)
    of_product = spectra.values[spectra.voters.index(dsire.Voter("c", "BA"))]
    for model, scale in enumerate((8 / 4, 2 / 4)):
        product = np.einsum("or,rsk,si->oik", b[model], mid[model], a[model]).reshape(8, -1)
        expected = scale * np.linalg.svd(product, compute_uv=False)[:4]
        torch.testing.assert_close(of_product[model], torch.from_numpy(expected))
    assert spectra.shapes == {"c": [8, 54, 4]}
    dora = pa.table({**columns, "c.dora_scale": pa.array(list(draw.normal(size=(2, 8))))})
    spectra = dsire.shard_spectra(write_parquet(tmp_path / "dora", dora) / "train.parquet", 4)
    assert note_of(spectra.notes, "DoRA")
    assert spectra.voters == [dsire.Voter("c", "A"), dsire.Voter("c", "B")]


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


def test_a_rank_that_contradicts_the_shape_of_nested_lists(run: Run, tmp_path: Path) -> None:
    table = table_of(models_of(4, SIZES))
    for column in table.column_names[2:]:
        lists = [np.reshape(row, (RANK, -1) if "down" in column else (-1, RANK)) for row in table[column].to_pylist()]
        table = table.set_column(table.column_names.index(column), column, pa.array([its.tolist() for its in lists]))
    write_parquet(tmp_path / "own", table)
    assert run("--dataset", tmp_path / "own", "--rank=2").says(DOWN, "4 x 16", "--rank=2")
    assert run("--dataset", tmp_path / "own", "--rank=4", "--train_size=2").code == 0


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


def test_a_subset_beside_one_that_is_no_parquet(run: Run, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "wise", [table_of(models_of(4, SIZES))])
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.removesuffix("---\n") + "- config_name: texts\n  data_files: t.csv\n---\n")
    (folder / "t.csv").write_text("a,b\n")
    write_parquet(folder / "more", table_of(models_of(4, SIZES)))
    outcome = run("--dataset", folder, "--subset=low_4", "--train_size=2")
    assert outcome.code == 0, outcome.err
    assert note_of(outcome.report["notes"], "1 parquet file", "more/train.parquet")


def test_a_shard_of_parquet_is_its_own_version(tmp_path: Path) -> None:
    """Only shards of one model are one: those of a table are computed anew one by one."""
    models = models_of(6, SIZES)
    folder = write_folder(tmp_path / "wise", [table_of(models[start : start + 6]) for start in (0, 6, 12)])
    source = dsire.find_source(str(folder), "low_4", None, tmp_path)
    assert len({shard.etag.count("-") for shard in source.shards}) == 1


@pytest.mark.parametrize("place", ["wise [v1]", "wise*", "wise?x", ".data", "__wise__", "100%20x", "{a,b}", "test"])
def test_any_place_will_do(place: str, run: Run, tmp_path: Path) -> None:
    """A sibling that a pattern would catch, and a script of the dataset's own name, are not read."""
    folder = write_parquet(tmp_path / place, table_of(models_of(4, SIZES)))
    write_parquet(tmp_path / "wise v1", table_of(models_of(4, SIZES)))
    (folder / f"{place}.py").write_text("raise SystemExit('run')")
    outcome = run("--dataset", folder, "--rank=4", "--train_size=2")
    assert outcome.code == 0, outcome.err
    assert "default: 12 models" in outcome.out


@pytest.mark.parametrize("listed", [True, False])
def test_loras_beside_the_parquet_of_their_images(listed: bool, run: Run, tmp_path: Path) -> None:
    own = write_labelled(tmp_path / "own", rows=listed)
    if not listed:
        for file in own.iterdir():
            stated = {"ss_dataset_dirs": json.dumps({"1_x": {"img_count": int(file.stem[1:])}})}
            write_lora(file, (file.stem[0], int(file.stem[1:])), stated)
    write_parquet(own / "images", pa.table({"image": [b"x"], "label": [3]}))
    outcome = run("--dataset", own, "--train_size=2")
    assert outcome.code == 0, outcome.err
    assert "own: 9 models" in outcome.out
    assert note_of(outcome.report["notes"], "1 parquet file", "own")


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


def test_what_is_no_lora_is_one_note(run: Run, tmp_path: Path) -> None:
    own = write_labelled(tmp_path / "own")
    leave_a_checkpoint(tmp_path / "mine" / "checkpoint-500")
    write_lora(tmp_path / "mine" / "checkpoint-500" / "lora.bin", ("a", 20))
    write_lora(tmp_path / "mine" / "lora.safetensors", ("a", 30))
    leave_foreign_files(tmp_path / "mine")
    outcome = run("--dataset", own, "--predict", tmp_path / "mine")
    assert (outcome.code, outcome.err) == (0, "")
    found = {Path(one["file"]).name: one["estimate"] for one in outcome.report["estimates"]}
    assert found == {"lora.bin": 20, "lora.safetensors": 30}
    assert note_of(outcome.report["notes"], "8 files hold no LoRA", "such as", "base_model.safetensors")
    assert run("--dataset", own, "--predict", tmp_path / "mine" / "base_model.safetensors").says(
        "base_model", "no LoRA"
    )


def test_a_folder_that_holds_no_lora(run: Run, tmp_path: Path) -> None:
    leave_a_checkpoint(tmp_path / "mine")
    assert run("--predict", tmp_path / "mine").says("mine", "6 files hold no LoRA")


def test_what_is_not_listed_is_not_read(run: Run, tmp_path: Path) -> None:
    own = write_labelled(tmp_path / "own")
    before = run("--dataset", own, "--train_size=2").predictions
    leave_foreign_files(own)
    leave_a_checkpoint(own / "checkpoint")
    outcome = run("--dataset", own, "--train_size=2")
    assert (outcome.code, outcome.err, outcome.predictions) == (0, "", before)
    assert note_of(outcome.report["notes"], "not in metadata.csv", "8 files", "base_model.safetensors")


def test_without_a_list_what_cannot_be_judged_is_said(tmp_path: Path) -> None:
    stated = {"ss_dataset_dirs": json.dumps({"1_x": {"img_count": 5}})}
    for name in "ab":
        write_lora(tmp_path / "own" / f"{name}.safetensors", (name, 5), stated)
    leave_foreign_files(tmp_path / "own")
    for number in range(3):
        (tmp_path / "own" / f"run{number}").mkdir()
        (tmp_path / "own" / f"run{number}" / "broken.safetensors").write_bytes(b"broken")
    spectra = spectra_of(tmp_path / "own", tmp_path / "cache")
    assert spectra.names == ["a", "b"]
    assert note_of(spectra.notes, "run0/broken.safetensors: left out", "2 other files")


def test_a_listed_file_that_is_broken_is_named_by_its_path(run: Run, tmp_path: Path) -> None:
    own = write_labelled(tmp_path / "own")
    (own / "sub").mkdir()
    save_file({"x": torch.ones(1)}, own / "sub" / "a10.safetensors")
    with (own / "metadata.csv").open("a") as file:
        file.write("\nsub/a10.safetensors,10,a")
    assert run("--dataset", own).says("error: sub/a10.safetensors: holds no LoRA")


def test_shards_of_one_model_are_read_as_one(run: Run, tmp_path: Path) -> None:
    own = write_labelled(tmp_path / "own")
    weights = {key: torch.from_numpy(matrix) for key, matrix in weights_of(("b", 20)).items()}
    keys, folder = sorted(weights), tmp_path / "mine"
    folder.mkdir()
    files = {f"adapter_model-0000{part + 1}-of-00002.safetensors": keys[part::2] for part in (0, 1)}
    for name, its in files.items():
        save_file({key: weights[key] for key in its}, folder / name)
    index = {"weight_map": {key: name for name, its in files.items() for key in its}}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    for item in (folder, folder / "adapter_model-00002-of-00002.safetensors"):
        outcome = run("--dataset", own, "--predict", item)
        (one,) = outcome.report["estimates"]
        assert one["estimate"] == 20
        assert any("very model" in note for note in one["warnings"] + one.get("first", []))
    (folder / "adapter_model-00001-of-00002.safetensors").unlink()
    assert run("--dataset", own, "--predict", folder).says("adapter_model-00001-of-00002.safetensors: no such file")


@pytest.mark.parametrize("ending", ["parquet", "safetensors"])
def test_a_link_to_nothing_is_said(ending: str, run: Run, tmp_path: Path) -> None:
    write_lora(tmp_path / "own" / "a.safetensors", ("a", 10))
    (tmp_path / "link" / f"train.{ending}").parent.mkdir()
    (tmp_path / "link" / f"train.{ending}").symlink_to("nowhere")
    assert run("--dataset", tmp_path / "link", "--rank=4").says(f"train.{ending} is a link to a file that is not there")


def test_a_list_that_lies_elsewhere_is_named(run: Run, tmp_path: Path) -> None:
    write_labelled(tmp_path / "own" / "loras")
    assert run("--dataset", tmp_path / "own").says("no file in", "has a size", "loras/metadata.csv is not read")


def test_a_lora_of_an_unknown_layout_is_no_foreign_file(run: Run, tmp_path: Path) -> None:
    own = write_labelled(tmp_path / "own")
    write_lora(tmp_path / "mine" / "lora.safetensors", ("a", 20))
    save_file({"x.lora_weird": torch.ones(4, 4)}, tmp_path / "mine" / "weird.safetensors")
    assert run("--dataset", own, "--predict", tmp_path / "mine").says("weird.safetensors", "not known here")


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
    assert dsire.metadata_csv(tmp_path) == {tmp_path / "a.safetensors": (5, "x", "")}


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("separator", ["/", "\\"])
def test_names_are_compared_normalised(on_disk: str, separator: str, tmp_path: Path) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[on_disk]
    file = write_lora(tmp_path / "sub" / f"{unicodedata.normalize(on_disk, 'Grün')}.safetensors", ("a", 5))
    listed = f"sub{separator}{unicodedata.normalize(other, 'Grün')}.safetensors"
    (tmp_path / "metadata.csv").write_text(f"file_name,label,name\n{listed},5,x\n")
    assert dsire.metadata_csv(tmp_path) == {file: (5, "x", "")}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("file_name,label,name\n", ["lists no file"]),
        ("file,size\na.safetensors,5\n", ["file_name and label", "file,size"]),
        ("file_name,label\nb.safetensors,5\n", ["b.safetensors", "not there"]),
    ],
)
def test_metadata_csv_says_what_was_found(text: str, parts: list[str], run: Run, tmp_path: Path) -> None:
    write_lora(tmp_path / "own" / "a.safetensors", ("a", 5))
    (tmp_path / "own" / "metadata.csv").write_text(text)
    assert run("--dataset", tmp_path / "own").says("metadata.csv", *parts)


# ---------------------------------------------------------------------------------------------------------------------
# Paths, and what is written


@pytest.mark.parametrize("option", ["--predict", "--dataset"])
@pytest.mark.parametrize("name", ["x" * 300, "a/" + "x" * 300, "~nobody-here/x", "a\0b"])
def test_names_that_no_disk_has(option: str, name: str, run: Run) -> None:
    assert run(f"{option}={name}").says("no such" if "/x" not in name or "~" in name else "here")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--dataset=loras/mylora"], ["no folder loras/mylora is here; on the Hub"]),
        (["--predict=unknown/suspect_1"], ["unknown/suspect_1: no such file or folder here; on the Hub"]),
        (["--predict=labelled/metadata.csv"], ["labelled/metadata.csv: no such file or folder here; on the Hub"]),
        (["--predict=own/a10"], ["own/a10: no such file or folder, but a10.safetensors"]),
        (["--dataset=own/metadata.csv"], ["is a file", "folder"]),
        (["--dataset=a--b/c"], ["no folder a--b/c is here", "can't be a repository's name"]),
    ],
)
def test_what_is_not_here_is_said_first(
    arguments: list[str], parts: list[str], run: Run, hub: HubStandIn, tmp_path: Path
) -> None:
    write_labelled(tmp_path / "own")
    assert run(*arguments).says(*parts)


def test_home(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_labelled(tmp_path / "own")
    outcome = run("--dataset=~/own", "--predict=~/own/a10.safetensors")
    assert outcome.code == 0, outcome.err


def test_refused_files_are_in_what_is_written(run: Run, tmp_path: Path) -> None:
    own = write_labelled(tmp_path / "own")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    outcome = run("--dataset", own, "--predict", "broken.safetensors", "nowhere.bin", own / "a10.safetensors")
    assert outcome.code == 2
    assert list(outcome.report["refused"]) == ["nowhere.bin", "broken.safetensors"]
    rows = list(csv.DictReader(io.StringIO(outcome.written["estimates.csv"])))
    assert [(row["file"], row["estimate"]) for row in rows] == [
        (str(own / "a10.safetensors"), "10"),
        ("nowhere.bin", ""),
        ("broken.safetensors", ""),
    ]
    assert rows[1]["warnings"] == outcome.report["refused"]["nowhere.bin"]


def test_an_output_that_cannot_be_is_seen_first(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in ("file", "file/below"):
        assert run(f"--output={output}", "--dataset=/nowhere/at/all").says("--output", "file", "not a folder")


def test_a_report_is_not_written_without_its_predictions(run: Run, tmp_path: Path) -> None:
    own = write_labelled(tmp_path / "own")
    (tmp_path / "output" / "predictions.csv" / "in the way").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):  # of the helper, which reads what was written
        run("--dataset", own, "--train_size=2")
    assert not (tmp_path / "output" / "report.json").exists()


def test_confidence_is_of_predictions(run: Run) -> None:
    assert run("--confidence=0.8").says("--confidence", "--predict")


def test_one_experiment(run: Run, tmp_path: Path) -> None:
    assert (
        "1 experiment:" in run("--dataset", write_labelled(tmp_path / "own"), "--train_size=2", "--experiments=1").out
    )


def test_a_cached_run_has_no_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, units = write_labelled(tmp_path / "own"), []
    real = dsire.in_parallel
    monkeypatch.setattr(dsire, "in_parallel", lambda *its: units.extend(its[3:]) or real(*its))
    for _ in range(2):
        spectra_of(own, tmp_path / "cache")
    assert [unit for unit in units if unit] == ["file"]


def test_a_listed_shard_that_is_gone(run: Run, hub: HubStandIn) -> None:
    hub.faults.status("*resolve*00001-of*.parquet", 404, times=None)
    outcome = run("--subset=low_4", f"--dataset={dsire.LORA_WISE}")
    assert outcome.says("00001-of", "not there", "--revision")
    assert "later" not in outcome.err


def test_a_hub_that_stays_busy_is_said_while_it_is_asked(
    run: Run, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.faults.status("/api/datasets/*/tree/*", 503, times=None)
    outcome = run("--subset=low_4", f"--dataset={dsire.LORA_WISE}")
    assert outcome.code == 2
    assert "busy" in outcome.err.splitlines()[0]
    assert "503" in outcome.err.splitlines()[-1]

"""Estimates for LoRA files: what is printed and written of each, how sure they are, and folders of one's own models."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    LAYERS,
    ROOT,
    Model,
    Outcome,
    Run,
    models_of,
    split_of,
    weights_of,
    write_folder,
)
from conftest import table_of as wise_table
from lora_writers import adapter, by_hand, write, write_model
from torch import Tensor

import dsire

SIZES = (1, 2, 3)
COLUMNS = ["file", "status", "estimate", "share", "confidence_set", "would_be", "recipe_p", "stated_size", "notes"]
EXAMPLES = ROOT / "tests" / "examples"


def write_own(folder: Path, models: list[Model], **options: Any) -> Path:
    """The user's own models: a LoRA file each, in LoRA-WiSE's layout, and metadata.csv."""
    rows = ["file_name,label,name"]
    for name, size in models:
        write_model(folder / name / f"{size}.safetensors", (name, size), **options)
        rows.append(f"{name}/{size}.safetensors,{size},{name}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Four micro-datasets of three sizes."""
    return write_own(tmp_path / "own", models_of(4, SIZES))


def kohya_header(size: int) -> dict[str, str]:
    return {"ss_dataset_dirs": f'{{"10_cat": {{"n_repeats": 10, "img_count": {size}}}}}'}


def estimates_in(outcome: Outcome) -> list[dict[str, Any]]:
    """Of the files that could be judged."""
    return [one for one in outcome.report["estimates"] if one["status"] != "refused"]


def answers_in(outcome: Outcome) -> list[int]:
    return [one["estimate"] or one["would_be"] for one in estimates_in(outcome)]


def table_in(outcome: Outcome) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(outcome.written["estimates.csv"]))
    assert reader.fieldnames == COLUMNS
    return list(reader)


def about(estimate: dict[str, Any]) -> dict[str, Any]:
    """An estimate to compare with: shares are those of sums that may be rounded in another order."""
    return {**estimate, **{name: pytest.approx(estimate[name]) for name in ("shares", "share", "recipe_p")}}


# ---------------------------------------------------------------------------------------------------------------------
# What is printed and written


def test_a_labelled_model_is_recognised(folder: Path, tmp_path: Path, run: Run) -> None:
    """Written as a file, it is its own nearest neighbour: all voters name its size."""
    file = write_model(tmp_path / "known.safetensors", ("thing_03", 5))
    outcome = run("--dataset", folder, "--subset=low_4", "--predictor=dsire", "--predict", file)
    assert (outcome.code, outcome.err) == (0, "")
    (one,) = estimates_in(outcome)
    assert (one["file"], one["status"], one["estimate"], one["share"]) == (str(file), "ok", 5, 1)
    assert one["shares"] == {str(size): float(size == 5) for size in (1, 2, 3, 4, 5, 6)}
    assert one["notes"][0] == "this very model is among the labelled ones: thing_03 of 5 images"
    assert f"{file}: 5 images; 90 % set: " in outcome.out


def test_what_is_printed_of_the_examples(run: Run, shipped: dsire.Spectra) -> None:
    """Three statuses; a note that all share is there once; the answering predictor's quality comes first."""
    files = [ROOT / "tests" / "pilot_lora.safetensors", *sorted(EXAMPLES.glob("*.safetensors"))]
    outcome = run("--predict", *files)
    lines = outcome.out.splitlines()
    good = dsire.how_good(shipped, "log-ridge")
    assert good
    how = f"of left-out labelled models it tells {good.accuracy:.0f} % right, MAE {good.mae:.2f} images"
    assert lines[2] == f"predictor log-ridge: {how}"
    assert sum("alpha" in line for line in lines) == 1
    assert "note on 4 of 4 files: " in outcome.out
    pilot = lines.index(f"{files[0]}: 3 images; 90 % set: 3")
    assert lines[pilot + 1].startswith("  log-ridge weighs 3: 9")
    assert lines[pilot + 2].startswith("  of ")
    assert lines[pilot + 2].endswith(" had that size")
    other = lines.index(next(line for line in lines if line.startswith(f"{files[1]}: not comparable")))
    assert lines[other + 1] == "  judged all the same, it is told 1 image, which is no estimate"
    assert f"{files[3]}: untrained: " in outcome.out
    rows = table_in(outcome)
    assert [row["status"] for row in rows] == ["ok", "not comparable", "not comparable", "untrained"]
    assert [row["estimate"] for row in rows] == ["3", "", "", ""]
    assert (
        [bool(row["share"]) for row in rows]
        == [bool(row["confidence_set"]) for row in rows]
        == [True, False, False, False]
    )
    assert [row["would_be"] for row in rows] == ["", "1", "6", ""]


def test_the_interval_of_a_regression(run: Run) -> None:
    """Its answer may be no labelled size, so nothing is said of weights of those."""
    outcome = run("--predictor=log-regression", "--predict", ROOT / "tests" / "pilot_lora.safetensors", "--plots")
    (row,) = table_in(outcome)
    low, high = map(int, row["confidence_set"].split("-"))
    assert low <= int(row["estimate"]) <= high
    assert "90 % interval: " in outcome.out
    assert "weighs" not in outcome.out
    assert outcome.out.endswith(f"wrote {outcome.output / 'estimates.png'}\n")


def test_tables(own: Path, tmp_path: Path, run: Run) -> None:
    """estimates.csv says what report.json says, a refused file last; the exit code is 2 for it."""
    file, bad = write_model(tmp_path / "with, comma.safetensors", ("new", 2), kohya_header(17)), tmp_path / "bad.bin"
    bad.write_text("no tensors")
    outcome = run("--dataset", own, "--predict", bad, file, "--confidence=0.7")
    assert outcome.code == 2
    row, refused = table_in(outcome)
    one, other = outcome.report["estimates"]
    assert {name for name, cell in refused.items() if cell} == {"file", "status", "notes"}
    assert (refused["file"], refused["status"], [refused["notes"]]) == (str(bad), "refused", other["notes"])
    assert outcome.err == f"dsire.py: error: {bad}: {refused['notes']}\n"
    assert row["file"] == str(file)
    assert [row[name] for name in ("estimate", "would_be")] == [
        str(one[name] or "") for name in ("estimate", "would_be")
    ]
    assert row["confidence_set"] == one["confidence_set"]
    assert float(row["recipe_p"]) == pytest.approx(one["recipe_p"], abs=1e-4)
    assert (row["stated_size"], one["stated_size"]) == ("17", 17)
    assert row["notes"] == "; ".join(one["notes"])
    assert outcome.report["settings"]["confidence"] == 0.7
    assert one["status"] != "ok" or "70 % set: " in outcome.out
    assert outcome.out.endswith(f"wrote {outcome.output / 'estimates.csv'}\nwrote {outcome.output / 'report.json'}\n")


def test_what_a_folder_holds_besides_is_listed(own: Path, tmp_path: Path, run: Run) -> None:
    """To an auditor such files are the suspicious ones; they are no error."""
    write_model(tmp_path / "asked" / "good.safetensors", ("new", 2))
    write(tmp_path / "asked" / "other.safetensors", {"embedding": torch.ones(3, 2)})
    write_model(tmp_path / "asked" / "pickle.pt", ("new", 2))
    outcome = run("--dataset", own, "--predict", tmp_path / "asked")
    assert (outcome.code, outcome.err) == (0, "")
    assert [row["status"] for row in table_in(outcome)][1:] == ["refused", "refused"]
    assert all(row["notes"] for row in table_in(outcome)[1:])
    (line,) = [line for line in outcome.out.splitlines() if "left out" in line]
    assert line.startswith("note: 2 files left out, such as ")


@pytest.mark.parametrize("predictor", ["dsire", "log-ridge"])
def test_the_estimate_does_not_depend_on_what_else_is_asked(
    own: Path, tmp_path: Path, run: Run, predictor: str
) -> None:
    """Nor on the order, nor on files with other layers: each is judged by its own."""
    files = [write_model(tmp_path / f"new_{size}.safetensors", ("new", size)) for size in SIZES]
    files.insert(1, write_model(tmp_path / "part.safetensors", ("new", 2), layers=LAYERS[:1]))
    options = ["--dataset", own, f"--predictor={predictor}", "--predict"]
    together = estimates_in(run(*options, *files))
    assert [one["file"] for one in together] == [str(file) for file in files]
    for file, one in zip(files, together, strict=True):
        assert estimates_in(run(*options, file)) == [about(one)]


def test_a_stated_size_is_shown_and_a_disagreement_said(own: Path, tmp_path: Path, run: Run) -> None:
    """Copies of a labelled model of size 2: one says so, the other says it has seen 17 images."""
    files = [write_model(tmp_path / f"{size}.safetensors", ("thing_00", 2), kohya_header(size)) for size in (2, 17)]
    outcome = run("--dataset", own, "--predict", *files)
    honest, other = estimates_in(outcome)
    assert [(one["estimate"], one["stated_size"]) for one in (honest, other)] == [(2, 2), (2, 17)]
    assert not any("disagree" in note for note in honest["notes"])
    assert any("disagree" in note and "17" in note for note in other["notes"])
    assert "the file itself states 17 images" in outcome.out


def test_a_file_that_is_named_with_bytes_that_are_no_text(own: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    write_model(tmp_path / "plain.safetensors", ("new", 2)).rename(file)
    outcome = run("--dataset", own, "--predict", file, write_model(tmp_path / "other.safetensors", ("new", 2)))
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1  # safetensors can't open such a name, which is said
    assert "caf" in outcome.err
    assert len(estimates_in(outcome)) == 1


def test_as_a_user_runs_it(own: Path, tmp_path: Path) -> None:
    """In a process of its own: the exit code, and nothing on stderr but one line for the bad file."""
    file, nowhere = write_model(tmp_path / "new.safetensors", ("new", 2)), tmp_path / "nowhere.safetensors"
    command = [sys.executable, ROOT / "dsire.py", "--cache_dir=c", "--dataset", own, "--predict", nowhere, file]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"dsire.py: error: {nowhere}: no such file or folder\n"
    assert f"{file}: " in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Models that do not fit, and files that are unlike every labelled model


@pytest.mark.parametrize(
    ("width", "rank", "parts"),
    [
        (768, 8, ["rank 8", "768 (SD 1.5)", "--subset", "low_8"]),
        (768, 16, ["rank 16", "768 (SD 1.5)", "low_16", "medium_16"]),
        (768, 32, ["rank 32", "768 (SD 1.5)", "low_32", "medium_32", "high_32"]),
        (1024, 32, ["rank 32", "1024 (SD 2)", "medium_32_2"]),
        (2048, 32, ["rank 32", "2048 (SDXL)"]),
        (12, 2, ["rank 2", "width 12"]),
    ],
)
def test_a_file_of_another_base_is_told_what_fits(
    width: int, rank: int, parts: list[str], own: Path, tmp_path: Path, run: Run
) -> None:
    """A file with one cross-attention key projection, of this width and rank."""
    lora = {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (torch.randn(rank, width), torch.randn(9, rank))}
    file = write(tmp_path / "wide.safetensors", by_hand("kohya", lora, alpha=rank))
    outcome = run("--dataset", own, "--predict", file)
    assert outcome.says("wide.safetensors", *parts)
    assert len(outcome.err) < 600
    if (width, rank) not in dsire.SUBSETS_THAT_FIT:
        assert "--subset" not in outcome.err


def test_missing_and_additional_layers_are_counted(own: Path, tmp_path: Path, run: Run) -> None:
    """Of three fitted layers two are there, and two more are unknown; all voters of the two layers vote."""
    file = write_model(tmp_path / "other.safetensors", ("new", 2), layers=[*LAYERS[:2], "unet.a", "unet.b"])
    outcome = run("--dataset", own, "--predictor=dsire", "--predict", file)
    assert outcome.code == 0, outcome.err
    (one,) = estimates_in(outcome)
    said = " | ".join(one["notes"])
    assert "1 layer of the labelled models" in said
    assert "2 layers" in said
    assert all(6 * share == pytest.approx(round(6 * share)) for share in one["shares"].values())


def scaled(path: Path, model: Model, factor: float, layers: int = 3) -> Path:
    """The model with the matrices of so many layers multiplied."""
    factors = dict.fromkeys(LAYERS[:layers], factor)
    weights = weights_of(model).items()
    return write(path, {key: factors.get(key.split(".lora")[0], 1) * torch.from_numpy(its) for key, its in weights})


def test_a_file_that_is_unlike_every_labelled_model(folder: Path, tmp_path: Path, run: Run) -> None:
    torch.manual_seed(0)
    shapes = {key: matrix.shape for key, matrix in weights_of(("new", 2)).items()}
    files = [
        write_model(tmp_path / "alike.safetensors", ("new", 2)),
        scaled(tmp_path / "large.safetensors", ("new", 2), 30),
        scaled(tmp_path / "small.safetensors", ("new", 2), 1 / 30),
        write(tmp_path / "even.safetensors", {key: 5 * torch.rand(shape) for key, shape in shapes.items()}),
    ]
    outcome = run("--dataset", folder, "--subset=low_4", "--predict", *files)
    found, unlike = estimates_in(outcome), [False, True, True, True]
    assert [one["status"] for one in found] == ["ok", *["not comparable"] * 3]
    assert [one["recipe_p"] <= 0.05 for one in found] == unlike
    assert [f"{file}: not comparable" in outcome.out for file in files] == unlike
    assert "larger than any labelled model's" in " ".join(found[1]["first"])
    assert "smaller than any labelled model's" in " ".join(found[2]["first"])


@pytest.mark.parametrize("micro_datasets", [1, 2])
def test_what_is_far_beyond_a_few_labelled_models_is_said_first(tmp_path: Path, run: Run, micro_datasets: int) -> None:
    """Of fewer than 19 no p-value can be 0.05, so none is needed."""
    own = write_own(
        tmp_path / "own", [(f"thing_{number:02d}", size) for number in range(micro_datasets) for size in SIZES]
    )
    cases = {"large": (1e6, 3), "small": (1e-6, 3), "large in one layer": (10, 1)}
    files = [scaled(tmp_path / f"{name}.safetensors", ("new", 2), *how) for name, how in cases.items()]
    outcome = run("--dataset", own, "--predict", *files)
    assert outcome.code == 0
    for one, word in zip(estimates_in(outcome), ("larger", "smaller", "larger"), strict=True):
        assert one["status"] == "not comparable"
        assert one["first"][0].startswith("not comparable with the labelled models: ")
        assert word in one["first"][1]


def test_an_untrained_file_says_so(own: Path, tmp_path: Path, run: Run) -> None:
    """All B are zero; in one layer alone it is a note."""
    weights = weights_of(("new", 2)).items()
    first = next(key for key, _ in weights if ".up." in key)
    files = [
        write(
            tmp_path / "fresh.safetensors", {key: torch.from_numpy(its) * (".up." not in key) for key, its in weights}
        ),
        write(tmp_path / "partly.safetensors", {key: torch.from_numpy(its) * (key != first) for key, its in weights}),
    ]
    outcome = run("--dataset", own, "--plots", "--predict", *files)
    fresh, partly = estimates_in(outcome)
    assert (fresh["status"], fresh["shares"], fresh["would_be"]) == ("untrained", {}, None)
    assert partly["status"] != "untrained"
    assert any("zero" in note and "1 of 3 layers" in note for note in partly["notes"])


# ---------------------------------------------------------------------------------------------------------------------
# The prediction set and what was right before, by the book


def made_up(micro_datasets: int, sizes: tuple[int, ...] = SIZES, voters: int = 7, seed: int = 0) -> dsire.Spectra:
    """Spectra that shrink with the size, of so many micro-datasets."""
    random = torch.Generator().manual_seed(seed)
    models = models_of(micro_datasets, sizes)
    numbers = torch.tensor([size for _, size in models])
    noise = torch.rand(voters, len(models), 2, generator=random, dtype=torch.float64)
    names = [dsire.Voter(f"layer_{row}", "A") for row in range(voters)]
    shapes = {voter.layer: [3, 3, 2] for voter in names}
    values = 9 + 2 * noise - numbers.double()[:, None].clamp_max(4)
    return dsire.Spectra(values, numbers, [name for name, _ in models], names, shapes)


def vote_shares(train: dsire.Spectra, values: Tensor, sizes: list[int]) -> dict[int, Fraction]:
    """Size -> share of the voters whose nearest training model has it; values [voters, r] of one model."""
    counts = dict.fromkeys(sizes, 0)
    for row, its_values in enumerate(values):
        distances = [float((other - its_values).norm()) for other in train.values[row]]
        counts[int(train.sizes[distances.index(min(distances))])] += 1
    return {size: Fraction(count, len(values)) for size, count in counts.items()}


def left_out_shares(fitted: dsire.Spectra, sizes: list[int]) -> list[dict[int, Fraction]]:
    """Of each model, by the models of the other micro-datasets."""
    rest = {name: fitted.of_models(torch.tensor([its != name for its in fitted.names])) for name in set(fitted.names)}
    return [vote_shares(rest[name], fitted.values[:, model], sizes) for model, name in enumerate(fitted.names)]


def p_by_the_book(fitted: dsire.Spectra, values: Tensor) -> dict[int, Fraction]:
    """Size -> p by the formula in `conformal_p`, one model and one comparison after the other, in exact fractions."""
    sizes = sorted(set(fitted.sizes.tolist()))
    new, left_out, found = vote_shares(fitted, values, sizes), left_out_shares(fitted, sizes), {}
    for size in sizes:
        units: dict[str, list[bool]] = {}
        for name, its, shares in zip(fitted.names, fitted.sizes.tolist(), left_out, strict=True):
            if its == size:
                units.setdefault(name, []).append(shares[size] <= new[size])
        found[size] = (1 + sum(Fraction(sum(its), len(its)) for its in units.values())) / (len(units) + 1)
    return found


def files_of(spectra: dsire.Spectra) -> list[dsire.Spectra]:
    return [spectra.of_models(torch.tensor([model])) for model in range(len(spectra.names))]


def a_size_in_one_micro_dataset() -> dsire.Spectra:
    """While that one is left out, nobody votes for the size; another micro-dataset has each size twice."""
    whole = made_up(5, (1, 2, 3, 9))
    kept = [model for model, name in enumerate(whole.names) if name == "thing_02" or whole.sizes[model] != 9]
    fitted = whole.of_models(torch.tensor(kept))
    return replace(fitted, names=["thing_00" if name == "thing_01" else name for name in fitted.names])


@pytest.mark.parametrize(
    "fitted", [*map(made_up, (2, 3, 6, 9)), a_size_in_one_micro_dataset()], ids=lambda its: its.count
)
def test_the_prediction_set_is_that_of_its_formula(fitted: dsire.Spectra) -> None:
    new = made_up(2, (1, 2, 9), seed=1)
    expected = [p_by_the_book(fitted, values) for values in new.values.unbind(1)]
    for confidence in ("0.4", "0.5", "0.75", "0.8", "0.9"):
        found = dsire.estimates(fitted, files_of(new), "dsire", float(confidence))
        sets = [[size for size, its_p in p.items() if its_p > 1 - Fraction(confidence)] for p in expected]
        assert [one.confidence_set for one in found] == sets


def test_what_was_right_before_is_counted_by_hand() -> None:
    fitted, files = made_up(6), files_of(made_up(2, seed=1))
    told = []
    for model, name in enumerate(fitted.names):
        rest = [other for other, other_name in enumerate(fitted.names) if other_name != name]
        told.append(int(dsire.dsire(fitted, [split_of(rest, [model])])[0].sizes))
    for one in dsire.estimates(fitted, files, "dsire", 0.9):
        its = [size for size, answer in zip(fitted.sizes.tolist(), told, strict=True) if answer == one.answer]
        assert (one.told, one.right) == (len(its), its.count(one.answer))


@pytest.fixture(scope="module")
def left_out(shipped: dsire.Spectra) -> list[list[tuple[int, dsire.Estimate]]]:
    """For every other micro-dataset the true sizes of its models, and their estimates from all the others."""
    found = []
    for number in range(0, shipped.count, 2):
        asked = shipped.micro_datasets == number
        new = dsire.estimates(shipped.of_models(~asked), files_of(shipped.of_models(asked)), "dsire", 0.9)
        found.append(list(zip(shipped.sizes[asked].tolist(), new, strict=True)))
    return found


def test_sets_and_check_on_left_out_models(left_out: list[list[tuple[int, dsire.Estimate]]]) -> None:
    """Sets cover 90 %, less two standard errors over micro-datasets, and are no trivial ones; few aren't comparable."""
    held = torch.tensor([[size in one.confidence_set for size, one in its] for its in left_out], dtype=torch.float64)
    flagged = torch.tensor([[bool(one.first) for _, one in its] for its in left_out], dtype=torch.float64)
    members = [len(one.confidence_set) for its in left_out for _, one in its]
    print(f"coverage {held.mean():.3f}; {sum(members) / len(members):.2f} sizes; not comparable {flagged.mean():.3f}")
    error = float(held.mean(1).std()) / len(left_out) ** 0.5
    assert held.numel() == 120
    assert held.mean() >= max(0.88, 0.9 - 2 * error)
    assert sum(members) / len(members) < 4
    assert flagged.mean() <= 0.06


# ---------------------------------------------------------------------------------------------------------------------
# The user's own models


def test_a_folder_of_lora_files_evaluates_as_parquet_does(tmp_path: Path, run: Run) -> None:
    models = models_of(6, SIZES)
    own = write_own(tmp_path / "own", models)
    in_parquet = write_folder(tmp_path / "wise", [wise_table(models)])
    options = ["--experiments=4", "--train_size=4"]
    outcome = run("--dataset", own, *options)
    assert outcome.code == 0, outcome.err
    as_files = [*map(pytest.approx, outcome.report["experiments"])], sorted(outcome.predictions.splitlines())
    outcome = run("--dataset", in_parquet, "--subset=low_4", *options)
    assert outcome.report["experiments"] == as_files[0]
    assert sorted(outcome.predictions.splitlines()) == as_files[1]


def test_a_folder_of_adapters_of_peft(tmp_path: Path, run: Run) -> None:
    """adapter_config.json beside each, and other files; a row of metadata.csv may name the folder or the file."""
    folder, rows = tmp_path / "adapters", ["file_name,label,name"]
    for name in "abc":
        for size in SIZES:
            random = torch.Generator().manual_seed(100 * size + ord(name))
            down, up = torch.randn(2, 6, generator=random) / size, torch.randn(5, 2, generator=random) / size
            file = adapter(folder / f"{name}{size}", {"lora_alpha": 6}, down=down, up=up)
            torch.save({"state": {}}, file.with_name("optimizer.pt"))
            file.with_name("README.md").write_text("an adapter")
            rows.append(f"{name}{size}{'/adapter_model.safetensors' if name == 'a' else ''},{size},{name}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    outcome = run("--dataset", folder, "--train_size=2", "--experiments=3")
    assert outcome.code == 0, outcome.err
    assert "9 models, 3 micro-datasets, sizes 1 2 3" in outcome.out
    assert "alpha" not in outcome.out
    assert answers_in(run("--dataset", folder, "--predict", folder / "b2", folder / "c3")) == [2, 3]


def test_one_micro_dataset_predicts_and_does_not_evaluate(tmp_path: Path, run: Run) -> None:
    own = write_own(tmp_path / "own", models_of(1, SIZES))
    outcome = run("--dataset", own, "--predict", write_model(tmp_path / "new.safetensors", ("new", 2)))
    assert outcome.code == 0, outcome.err
    (one,) = estimates_in(outcome)
    assert (one["estimate"] or one["would_be"]) in SIZES
    assert (one["confidence_set"], one["told"], one["recipe_p"]) == ("", 0, None)
    assert any("can't be told" in note for note in outcome.report["notes"])
    assert "predictor log-ridge\n" in outcome.out
    assert run("--dataset", own).says("of 1 micro-dataset", "needs two")


def test_files_of_a_folder_may_lack_layers_of_the_others(tmp_path: Path, run: Run) -> None:
    """The layers that all have are used, and the others counted; without any in common it is an error."""
    own = write_own(tmp_path / "own", models_of(2, SIZES))
    write_model(own / "thing_00" / "1.safetensors", ("thing_00", 1), layers=LAYERS[:2])
    outcome = run("--dataset", own, "--experiments=1")
    assert outcome.code == 0, outcome.err
    assert "2 layers of rank 4" in outcome.out
    assert any("1 layer" in note for note in outcome.report["notes"])
    write_model(own / "thing_00" / "1.safetensors", ("thing_00", 1), layers=["unet.other"])
    assert run("--dataset", own).says("no layer")


def test_a_name_that_is_nowhere_is_said_before_the_subset_is_read(run: Run) -> None:
    assert run("--dataset=/nowhere/at/all", "--predict=nothing.safetensors").says("nothing.safetensors: no such file")

"""Estimates for LoRA files: what is printed and written of each, files that do not fit, and folders of one's own."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, RANK, ROOT, Outcome, Run, models_of, weights_of, write_folder, write_labelled
from lora_writers import by_hand, write, write_model

import dsire

SIZES = (1, 2, 3)
COLUMNS = ["file", "status", "estimate", "share", "confidence_set", "would_be", "recipe_p", "stated_size", "notes"]
PILOT = ROOT / "tests" / "pilot_lora.safetensors"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_labelled(tmp_path / "own", models_of(4, SIZES))


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return write_model(tmp_path / "new.safetensors", ("new", 2))


def stating(size: int) -> dict[str, str]:
    return {"ss_dataset_dirs": f'{{"10_cat": {{"n_repeats": 10, "img_count": {size}}}}}'}


def estimates_in(outcome: Outcome) -> list[dict[str, Any]]:
    return [one for one in outcome.report["estimates"] if one["status"] != "refused"]


def table_in(outcome: Outcome) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(outcome.written["estimates.csv"]))
    assert reader.fieldnames == COLUMNS
    return list(reader)


# What is printed and written
def test_what_is_printed_of_the_examples(run: Run, shipped: dsire.Spectra) -> None:
    files = [PILOT, *sorted((ROOT / "tests" / "examples").glob("*.safetensors"))]
    outcome = run("--predict", *files)
    lines = outcome.out.splitlines()
    left_out = dsire.leave_out(shipped, shipped.of_models(torch.arange(2)), dsire.log_ridge)[1].sizes
    right, error = (left_out == shipped.sizes).double().mean(), (left_out - shipped.sizes).abs().double().mean()
    how = f"of left-out labelled models it tells {100 * right:.0f} % right, MAE {error:.2f} images"
    assert lines[2] == f"predictor log-ridge: {how}"
    assert sum("alpha" in line for line in lines) == 1
    assert "note on 4 of 4 files: " in outcome.out
    pilot = lines.index(f"{files[0]}: 3 images; 90 % set: 3")
    assert lines[pilot + 1].startswith("  log-ridge weighs 3: 9")
    assert lines[pilot + 2].endswith(" had that size")
    (other,) = (number for number, line in enumerate(lines) if line.startswith(f"{files[1]}: not comparable"))
    assert "told 1 image, which is no estimate" in lines[other + 1]
    assert f"{files[3]}: untrained: " in outcome.out
    columns = ("status", "estimate", "confidence_set", "would_be")
    assert [[row[column] for column in columns] for row in table_in(outcome)] == [
        ["ok", "3", "3", ""],
        ["not comparable", "", "", "1"],
        ["not comparable", "", "", "6"],
        ["untrained", "", "", ""],
    ]
    assert [bool(row["share"]) for row in table_in(outcome)] == [True, False, False, False]


def test_the_interval_of_a_regression(run: Run) -> None:
    """Its answer may be no labelled size, so nothing is said of weights of those."""
    outcome = run("--predictor=log-regression", "--predict", PILOT, "--plots")
    (row,) = table_in(outcome)
    low, high = map(int, row["confidence_set"].split("-"))
    assert low <= int(row["estimate"]) <= high
    assert "90 % interval: " in outcome.out
    assert "weighs" not in outcome.out
    assert outcome.out.endswith(f"wrote {outcome.output / 'estimates.png'}\n")
    assert (outcome.output / "estimates.png").read_bytes().startswith(b"\x89PNG")


def test_tables(own: Path, tmp_path: Path, run: Run) -> None:
    """estimates.csv says what report.json says, a refused file last; the exit code is 2 for it, and stderr one line."""
    file, bad = write_model(tmp_path / "with, comma.safetensors", ("new", 2), stating(17)), tmp_path / "bad.bin"
    bad.write_text("no tensors")
    outcome = run("--dataset", own, "--predict", bad, file, "--confidence=0.7")
    assert outcome.code == 2
    row, refused = table_in(outcome)
    one, other = outcome.report["estimates"]
    assert {name for name, cell in refused.items() if cell} == {"file", "status", "notes"}
    assert (refused["file"], refused["status"], [refused["notes"]]) == (str(bad), "refused", other["notes"])
    assert outcome.err == f"dsire.py: error: {bad}: {refused['notes']}\n"
    assert (row["file"], row["stated_size"], one["stated_size"]) == (str(file), "17", 17)
    for name in ("status", "estimate", "would_be", "confidence_set"):
        assert row[name] == str(one[name] or "")
    assert float(row["recipe_p"]) == pytest.approx(one["recipe_p"], abs=1e-4)
    assert row["notes"] == "; ".join(one["notes"])
    assert outcome.report["settings"]["confidence"] == 0.7
    assert one["status"] != "ok" or "70 % set: " in outcome.out
    assert outcome.out.endswith(f"wrote {outcome.output / 'estimates.csv'}\nwrote {outcome.output / 'report.json'}\n")


def test_what_a_folder_holds_besides_is_listed(own: Path, tmp_path: Path, run: Run) -> None:
    write_model(tmp_path / "asked" / "good.safetensors", ("new", 2))
    write(tmp_path / "asked" / "other.safetensors", {"embedding": torch.ones(3, 2)})
    write_model(tmp_path / "asked" / "good.pt", ("new", 2))
    outcome = run("--dataset", own, "--predict", tmp_path / "asked")
    assert (outcome.code, outcome.err) == (0, "")
    assert [row["status"] for row in table_in(outcome)][1:] == ["refused", "refused"]
    assert all(row["notes"] for row in table_in(outcome)[1:])
    (line,) = [line for line in outcome.out.splitlines() if "left out" in line]
    assert line.startswith("note: 2 files left out, such as ")


@pytest.mark.parametrize("predictor", dsire.PREDICTORS)
def test_an_estimate_does_not_depend_on_what_else_is_asked(own: Path, tmp_path: Path, run: Run, predictor: str) -> None:
    files = [write_model(tmp_path / f"new_{size}.safetensors", ("new", size)) for size in SIZES]
    files.insert(1, write_model(tmp_path / "part.safetensors", ("new", 2), layers=LAYERS[:1]))
    options = ["--dataset", own, f"--predictor={predictor}", "--predict"]
    together = estimates_in(run(*options, *files))
    assert [one["file"] for one in together] == [str(file) for file in files]
    for file, one in zip(files, together, strict=True):  # shares are of sums that may be rounded in another order
        about = {name: pytest.approx(one[name]) for name in ("shares", "share", "recipe_p")}
        assert estimates_in(run(*options, file)) == [one | about]


def test_layers_of_another_shape_or_rank(own: Path, tmp_path: Path, run: Run) -> None:
    """Of another shape they are of another base; of another rank their BA can be compared."""
    weights = weights_of(("new", 2))
    first = next(key for key in weights if ".down." in key)
    wider = write(tmp_path / "wider.safetensors", weights | {first: torch.cat([weights[first]] * 2, dim=1)})
    smaller = write(tmp_path / "smaller.safetensors", weights_of(("new", 2), rank=RANK // 2))
    outcome = run("--dataset", own, "--predict", wider, smaller)
    other_base, other_rank = estimates_in(outcome)
    assert (other_base["status"], other_base["estimate"]) == ("not comparable", None)
    assert other_base["notes"][0].startswith("another base: ")
    shapes = "([24, 32, 4], not [24, 16, 4])"
    assert any(note.startswith("1 layer of another shape") and shapes in note for note in other_base["notes"])
    said = f"{len(LAYERS)} layers of another rank than the labelled models', and compared by BA alone"
    assert any(note.startswith(said) for note in other_rank["notes"])


def test_a_labelled_model_is_recognised_and_its_stated_size_shown(own: Path, tmp_path: Path, run: Run) -> None:
    files = [write_model(tmp_path / f"{size}.safetensors", ("thing_00", 2), stating(size)) for size in (2, 17)]
    outcome = run("--dataset", own, "--predictor=dsire", "--predict", *files)
    assert (outcome.code, outcome.err) == (0, "")
    found = estimates_in(outcome)
    assert [(one["file"], one["stated_size"]) for one in found] == [(str(files[0]), 2), (str(files[1]), 17)]
    for one in found:
        assert (one["status"], one["estimate"], one["share"], one["shares"]) == ("ok", 2, 1, {"1": 0, "2": 1, "3": 0})
        assert one["notes"][0] == "this very model is among the labelled ones: thing_00 of 2 images"
        assert f"{one['file']}: 2 images; 90 % set: " in outcome.out
    assert [any("disagree" in note and "17" in note for note in one["notes"]) for one in found] == [False, True]
    assert "states 17 images" in outcome.out


# Models that do not fit, and files that are unlike every labelled model
@pytest.mark.parametrize(
    ("width", "rank", "parts"),
    [
        (768, 8, ["768 (SD 1.5)", "--subset", "low_8"]),
        (768, 16, ["768 (SD 1.5)", "low_16", "medium_16"]),
        (768, 32, ["768 (SD 1.5)", "low_32", "medium_32", "high_32"]),
        (1024, 32, ["1024 (SD 2)", "medium_32_2"]),
        (2048, 32, ["2048 (SDXL)"]),
        (12, 2, ["width 12"]),
    ],
)
def test_a_file_of_another_base(width: int, rank: int, parts: list[str], own: Path, tmp_path: Path, run: Run) -> None:
    lora = {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (torch.randn(rank, width), torch.randn(9, rank))}
    file = write(tmp_path / "wide.safetensors", by_hand("kohya", lora, alpha=rank))
    outcome = run("--dataset", own, "--predict", file)
    assert outcome.says("wide.safetensors", f"rank {rank}", *parts)
    assert len(outcome.err) < 600
    assert ("--subset" in outcome.err) == (len(parts) > 1)


def test_missing_and_additional_layers_are_counted(own: Path, tmp_path: Path, run: Run) -> None:
    """Of three fitted layers two are there, and two more are unknown; all voters of the two layers vote."""
    file = write_model(tmp_path / "other.safetensors", ("new", 2), layers=[*LAYERS[:2], "unet.a", "unet.b"])
    (one,) = estimates_in(run("--dataset", own, "--predictor=dsire", "--predict", file))
    said = " | ".join(one["notes"])
    assert "1 layer of the labelled models" in said
    assert "2 layers" in said
    assert all(6 * share == pytest.approx(round(6 * share)) for share in one["shares"].values())


def changed(path: Path, factors: dict[str, float]) -> Path:
    tensors = weights_of(("new", 2))
    for start, factor in factors.items():
        tensors |= {key: factor * its for key, its in tensors.items() if key.startswith(start)}
    return write(path, tensors)


@pytest.mark.parametrize("count", [1, 2, 20])
def test_what_is_unlike_all_labelled_models_is_said_first(tmp_path: Path, new: Path, run: Run, count: int) -> None:
    """Of fewer than 19 no p-value can be 0.05, so none is needed of what is far beyond them."""
    own = write_labelled(tmp_path / "own", models_of(count, SIZES))
    near = [("larger", {"": 30.0}), ("smaller", {"": 1 / 30})] if count == 20 else []
    cases = [*near, ("larger", {"": 1e6}), ("smaller", {"": 1e-6}), ("larger", {LAYERS[0]: 10.0})]
    files = [changed(tmp_path / f"{number}.safetensors", how) for number, (_, how) in enumerate(cases)]
    outcome = run("--dataset", own, "--predict", new, *files)
    assert outcome.code == 0
    usual, *found = estimates_in(outcome)
    assert (usual["status"], f"{new}: not comparable" in outcome.out) == ("ok", False)
    for one, (word, _) in zip(found, cases, strict=True):
        assert one["status"] == "not comparable"
        assert f"{one['file']}: not comparable" in outcome.out
        assert not near or one["recipe_p"] <= 0.05
        assert one["first"][0].startswith(f"not comparable with the labelled models{' (p = ' if near else ': '}")
        assert f"{word} than any labelled model's" in one["first"][1]
    assert one["first"][1].endswith(", in down_blocks_0_attn1_to_q")


def test_an_untrained_file_says_so(own: Path, tmp_path: Path, run: Run) -> None:
    starts = [f"{layer}.lora.up" for layer in LAYERS]
    files = [changed(tmp_path / f"{n}.safetensors", dict.fromkeys(starts[:n], 0.0)) for n in (3, 1)]
    fresh, partly = estimates_in(run("--dataset", own, "--plots", "--predict", *files))
    assert (fresh["status"], fresh["shares"], fresh["would_be"]) == ("untrained", {}, None)
    assert partly["status"] != "untrained"
    assert any("zero" in note and "1 of 3 layers" in note for note in partly["notes"])


# The user's own models
def test_a_folder_of_lora_files_evaluates_as_parquet_does(tmp_path: Path, run: Run) -> None:
    models, options = models_of(6, SIZES), ["--experiments=4", "--train_size=4"]
    files = run("--dataset", write_labelled(tmp_path / "own", models), *options)
    parquet = run("--dataset", write_folder(tmp_path / "wise", [models]), "--subset=low_4", *options)
    assert [*map(pytest.approx, files.report["experiments"])] == parquet.report["experiments"]
    assert sorted(files.predictions.splitlines()) == sorted(parquet.predictions.splitlines())


def test_one_micro_dataset_predicts_and_does_not_evaluate(tmp_path: Path, new: Path, run: Run) -> None:
    own = write_labelled(tmp_path / "own", models_of(1, SIZES))
    outcome = run("--dataset", own, "--predict", new)
    assert outcome.code == 0, outcome.err
    (one,) = estimates_in(outcome)
    assert (one["estimate"] or one["would_be"]) in SIZES
    assert (one["confidence_set"], one["told"], one["recipe_p"]) == ("", 0, None)
    assert any("can't be told" in note for note in outcome.report["notes"])
    assert "predictor log-ridge\n" in outcome.out
    assert run("--dataset", own).says("of 1 micro-dataset", "needs two")


def test_files_of_a_folder_may_lack_layers_of_the_others(tmp_path: Path, run: Run) -> None:
    own = write_labelled(tmp_path / "own", models_of(2, SIZES))
    write_model(own / "thing_001.safetensors", ("thing_00", 1), layers=LAYERS[:2])
    outcome = run("--dataset", own, "--experiments=1")
    assert "2 layers of rank 4" in outcome.out
    assert any("1 layer" in note for note in outcome.report["notes"])
    write_model(own / "thing_001.safetensors", ("thing_00", 1), layers=["unet.other"])
    assert run("--dataset", own).says("no layer")


def test_a_name_that_is_nowhere_is_said_before_the_subset_is_read(run: Run) -> None:
    assert run("--dataset=/nowhere/at/all", "--predict=nothing.safetensors").says("nothing.safetensors: no such file")

"""Estimates for LoRA files: the vote, how sure it is, and what the user is told; folders of the user's own models."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    LAYERS,
    PORT,
    RANK,
    ROOT,
    Model,
    Outcome,
    Run,
    models_of,
    parquet_files,
    split_of,
    weights_of,
    write_folder,
)
from conftest import table_of as wise_table
from hub_stand_in import HubStandIn
from lora_writers import adapter, by_hand, kohya_keys, one_layer, write, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsire

SIZES = (1, 2, 3)


def write_own(folder: Path, models: list[Model], metadata: bool = True, **options: Any) -> Path:
    """The user's own models: a LoRA file each, in LoRA-WiSE's layout, and metadata.csv."""
    rows = ["file_name,label,name"]
    for name, size in models:
        write_model(folder / name / f"{size}.safetensors", (name, size), **options)
        rows.append(f"{name}/{size}.safetensors,{size},{name}")
    if metadata:
        (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Four micro-datasets of three sizes."""
    return write_own(tmp_path / "own", models_of(4, SIZES))


def kohya_header(size: int) -> dict[str, str]:
    return {"ss_dataset_dirs": f'{{"10_cat": {{"n_repeats": 10, "img_count": {size}}}}}'}


def estimates_in(outcome: Outcome) -> list[dict[str, Any]]:
    return outcome.report["estimates"]


def about(estimate: dict[str, Any]) -> dict[str, Any]:
    """An estimate to compare with: shares are those of sums that may be rounded in another order."""
    return {**estimate, **{name: pytest.approx(estimate[name]) for name in ("votes", "vote_share", "alike")}}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_files_of_a_subset_in_parquet_are_recognised(folder: Path, tmp_path: Path, run: Run) -> None:
    """A labelled model, written as a file, is its own nearest neighbour: all voters name its size."""
    known = ("thing_03", 5)
    file = write_model(tmp_path / "known.safetensors", known)
    outcome = run("--dataset", folder, "--subset=low_4", "--predictor=dsire", "--predict", file)
    assert (outcome.code, outcome.err) == (0, "")
    (one,) = estimates_in(outcome)
    assert one["file"] == str(file)
    assert one["estimate"] == 5
    assert one["votes"] == {str(size): float(size == 5) for size in (1, 2, 3, 4, 5, 6)}
    assert one["vote_share"] == 1
    assert "this very model is among the labelled ones: thing_03 of 5 images" in one["warnings"]
    assert f"{file}: 5 images" in outcome.out


@pytest.mark.parametrize("predictor", ["dsire", "log-ridge"])
def test_the_estimate_does_not_depend_on_what_else_is_asked(
    own: Path, tmp_path: Path, run: Run, predictor: str
) -> None:
    files = [write_model(tmp_path / f"new_{size}.safetensors", ("new", size)) for size in SIZES]
    options = ["--dataset", own, f"--predictor={predictor}", "--predict"]
    together = estimates_in(run(*options, *files))
    assert [one["file"] for one in together] == [str(file) for file in files]
    for file, one in zip(files, together, strict=True):
        assert estimates_in(run(*options, file)) == [about(one)]


def test_the_other_files_are_done_when_one_is_bad(own: Path, tmp_path: Path, run: Run) -> None:
    files = [write_model(tmp_path / f"new_{size}.safetensors", ("new", size)) for size in SIZES]
    bad = tmp_path / "bad.safetensors"
    bad.write_text("no tensors")
    outcome = run("--dataset", own, "--predict", files[0], bad, files[1], tmp_path / "nowhere.safetensors", files[2])
    assert outcome.code == 2
    first, second = sorted(outcome.err.splitlines())
    assert first.startswith(f"dsire.py: error: {bad}")
    assert second.startswith(f"dsire.py: error: {tmp_path / 'nowhere.safetensors'}")
    assert [one["file"] for one in estimates_in(outcome)] == [str(file) for file in files]
    assert all(f"{file}: " in outcome.out for file in files)


def test_one_bad_file_alone_leaves_an_empty_table(own: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "text.safetensors").write_text("no weights")
    outcome = run("--dataset", own, "--predict", tmp_path / "text.safetensors")
    assert outcome.says("text.safetensors", "safetensors")
    assert estimates_in(outcome) == []


def test_tables(own: Path, tmp_path: Path, run: Run) -> None:
    """estimates.csv has the documented columns, and says what report.json says; a file that is refused comes last."""
    file, bad = write_model(tmp_path / "with, comma.safetensors", ("new", 2), kohya_header(17)), tmp_path / "bad.bin"
    bad.write_text("no tensors")
    outcome = run("--dataset", own, "--predict", bad, file, "--confidence=0.7")
    row, refused = csv.DictReader(io.StringIO((outcome.output / "estimates.csv").read_text()))
    (one,) = estimates_in(outcome)
    assert list(row) == ["file", "estimate", "vote_share", "confidence_set", "recipe_p", "stated_size", "warnings"]
    assert {name for name, cell in refused.items() if cell} == {"file", "warnings"}
    assert refused["file"] == str(bad)
    assert outcome.report["refused"] == {str(bad): refused["warnings"]}
    assert outcome.err == f"dsire.py: error: {refused['warnings']}\n"
    assert row["file"] == str(file)
    assert float(row["estimate"]) == one["estimate"]
    assert float(row["vote_share"]) == pytest.approx(max(one["votes"].values()), abs=1e-4)
    assert [int(size) for size in row["confidence_set"].split(" ") if size] == one["confidence_set"]
    assert float(row["recipe_p"]) == pytest.approx(one["recipe_p"], abs=1e-4)
    assert row["stated_size"] == "17"
    assert all(warning in row["warnings"] for warning in one["warnings"])
    assert outcome.report["settings"]["confidence"] == 0.7
    assert "70%" in outcome.out


@pytest.mark.parametrize("confidence", ["0", "1", "90", "-0.1", "nan", "much"])
def test_a_confidence_that_is_none(confidence: str, own: Path, run: Run) -> None:
    outcome = run("--dataset", own, "--predict", own, f"--confidence={confidence}")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "--confidence" in outcome.err


def test_a_folder_of_adapters_is_predicted(own: Path, tmp_path: Path, run: Run) -> None:
    """An adapter for each checkpoint, as PEFT saves them; what is no weights file is left alone."""
    matrices = weights_of(("new", 2))
    for step in (10, 20):
        tensors = {}
        for layer in LAYERS:
            for letter, word in (("A", "down"), ("B", "up")):
                key = f"base_model.model.{layer.removeprefix('unet.')}.lora_{letter}.weight"
                tensors[key] = torch.from_numpy(matrices[f"{layer}.lora.{word}.weight"])
        file = write(tmp_path / "run" / f"checkpoint-{step}" / "adapter_model.safetensors", tensors)
        file.with_name("adapter_config.json").write_text(f'{{"peft_type": "LORA", "lora_alpha": {RANK}}}')
        torch.save({"state": {}}, file.with_name("optimizer.pt"))
        file.with_name("README.md").write_text("an adapter")
    outcome = run("--dataset", own, "--predict", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    one, other = estimates_in(outcome)
    assert one["file"].endswith("checkpoint-10/adapter_model.safetensors")
    assert other["file"].endswith("checkpoint-20/adapter_model.safetensors")
    plain = write_model(tmp_path / "plain.safetensors", ("new", 2))
    (expected,) = estimates_in(run("--dataset", own, "--predict", plain))
    assert one["votes"] == about(expected)["votes"]
    assert other["votes"] == about(expected)["votes"]


def test_a_stated_size_is_shown_and_a_disagreement_said(own: Path, tmp_path: Path, run: Run) -> None:
    """Copies of a labelled model of size 2: one says so, the other says it has seen 17 images."""
    honest = write_model(tmp_path / "honest.safetensors", ("thing_00", 2), kohya_header(2))
    other = write_model(tmp_path / "other.safetensors", ("thing_00", 2), kohya_header(17))
    outcome = run("--dataset", own, "--predict", honest, other)
    one, two = estimates_in(outcome)
    assert (one["estimate"], one["stated_size"]) == (2, 2)
    assert (two["estimate"], two["stated_size"]) == (2, 17)
    assert not any("disagree" in warning for warning in one["warnings"])
    (warning,) = [warning for warning in two["warnings"] if "disagree" in warning]
    assert "17" in warning
    assert warning in outcome.out


def test_a_file_that_is_named_with_bytes_that_are_no_text(own: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    write_model(tmp_path / "plain.safetensors", ("new", 2)).rename(file)
    write_model(tmp_path / "other.safetensors", ("new", 2))
    outcome = run("--dataset", own, "--predict", file, tmp_path / "other.safetensors")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1  # safetensors can't open such a name, which is said
    assert "caf" in outcome.err
    assert len(estimates_in(outcome)) == 1


def test_as_a_user_runs_it(own: Path, tmp_path: Path) -> None:
    """In a process of its own: the exit code, and nothing on stderr but one line for the bad file."""
    file = write_model(tmp_path / "new.safetensors", ("new", 2))
    command = [sys.executable, ROOT / "dsire.py", "--dataset", own, "--predict", tmp_path / "nowhere.safetensors", file]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"dsire.py: error: {tmp_path / 'nowhere.safetensors'}: no such file or folder\n"
    assert f"{file}: " in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# From the Hub


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    for size in (1, 2):
        write_model(folder / f"lora_{size}.safetensors", ("new", size))
    (folder / "README.md").write_text("two LoRAs")
    return folder


def test_a_repository_of_the_hub(own: Path, repository: Path, hub: HubStandIn, run: Run) -> None:
    hub.add(repository, "someone/loras", kind="model")
    outcome = run("--dataset", own, "--predict", "someone/loras")
    assert (outcome.code, outcome.err) == (0, "")
    local = run("--dataset", own, "--predict", repository)
    assert len(estimates_in(local)) == 2
    assert [one["votes"] for one in estimates_in(outcome)] == [one["votes"] for one in estimates_in(local)]
    assert [Path(one["file"]).name for one in estimates_in(outcome)] == ["lora_1.safetensors", "lora_2.safetensors"]


def test_one_file_of_a_repository(own: Path, repository: Path, hub: HubStandIn, run: Run) -> None:
    """Also when the others of the repository were fetched before."""
    hub.add(repository, "someone/loras", kind="model")
    for whole_one_first in (False, True):
        if whole_one_first:
            run("--dataset", own, "--predict", "someone/loras")
        outcome = run("--dataset", own, "--predict", "someone/loras:lora_2.safetensors")
        assert (outcome.code, outcome.err) == (0, "")
        assert [Path(one["file"]).name for one in estimates_in(outcome)] == ["lora_2.safetensors"]


def test_a_repository_with_the_default_cache(
    own: Path, repository: Path, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    hub.add(repository, "someone/loras", kind="model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dsire.py", f"--dataset={own}", "--predict", "someone/loras"])
    assert dsire.main() == 0, capsys.readouterr().err
    assert "lora_1.safetensors: " in capsys.readouterr().out


def test_a_pickle_of_a_repository(own: Path, tmp_path: Path, hub: HubStandIn, run: Run) -> None:
    write_model(tmp_path / "repository" / "pytorch_lora_weights.bin", ("new", 1))
    hub.add(tmp_path / "repository", "someone/old", kind="model")
    outcome = run("--dataset", own, "--predict", "someone/old:pytorch_lora_weights.bin")
    assert (outcome.code, outcome.err) == (0, "")
    assert len(estimates_in(outcome)) == 1


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ("someone/nothing", "was not found"),
        ("someone/loras:nothing.safetensors", "someone/loras:nothing.safetensors"),
        ("someone/loras:../../secret.safetensors", "someone/loras:../../secret.safetensors"),
        ("someone/loras/deeper", "no such file"),
        ("someone", "no such file"),
        ("", "no such file"),
    ],
)
def test_what_is_not_on_the_hub(item: str, part: str, own: Path, repository: Path, hub: HubStandIn, run: Run) -> None:
    hub.add(repository, "someone/loras", kind="model")
    assert run("--dataset", own, "--predict", item).says(part)


def test_without_the_hub(own: Path, run: Run) -> None:
    """Nothing answers at the address; files on disk need no network."""
    assert PORT
    assert run("--dataset", own, "--predict", "someone/loras").says("someone/loras", "can't be reached")
    assert run("--dataset", own, "--predict", own).code == 0


# ---------------------------------------------------------------------------------------------------------------------
# Models that do not fit


def wide_file(path: Path, width: int, rank: int) -> Path:
    """A file with one cross-attention key projection, of this width and rank."""
    lora = {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (torch.randn(rank, width), torch.randn(9, rank))}
    return write(path, by_hand("kohya", lora, alpha=rank))


@pytest.mark.parametrize(
    ("width", "rank", "parts"),
    [
        (768, 8, ["rank 8", "768 (SD 1.5)", "--subset", "low_8"]),
        (768, 16, ["rank 16", "768 (SD 1.5)", "low_16", "medium_16"]),
        (768, 32, ["rank 32", "768 (SD 1.5)", "low_32", "medium_32", "high_32"]),
        (1024, 32, ["rank 32", "1024 (SD 2)", "medium_32_2"]),
        (1024, 8, ["rank 8", "1024 (SD 2)"]),
        (2048, 32, ["rank 32", "2048 (SDXL)"]),
        (12, 2, ["rank 2", "width 12"]),
    ],
)
def test_a_file_of_another_base_or_rank_is_told_what_fits(
    width: int, rank: int, parts: list[str], own: Path, tmp_path: Path, run: Run
) -> None:
    outcome = run("--dataset", own, "--predict", wide_file(tmp_path / "wide.safetensors", width, rank))
    assert outcome.says("wide.safetensors", "rank 4", *parts)
    if (width, rank) not in dsire.SUBSETS_THAT_FIT:
        assert "--subset" not in outcome.err


def test_the_same_layers_of_another_rank(own: Path, tmp_path: Path, run: Run) -> None:
    file = write_model(tmp_path / "rank_8.safetensors", ("new", 2), rank=8)
    assert run("--dataset", own, "--predict", file).says("rank_8.safetensors", "rank 8", "rank 4")


def test_missing_and_additional_layers_are_counted(own: Path, tmp_path: Path, run: Run) -> None:
    """Of three fitted layers one is there, one is missing, and one has another shape; two are unknown."""
    file = write_model(tmp_path / "other.safetensors", ("new", 2), layers=[LAYERS[0], LAYERS[2], "unet.a", "unet.b"])
    outcome = run("--dataset", own, "--predictor=dsire", "--predict", file)
    assert outcome.code == 0, outcome.err
    (one,) = estimates_in(outcome)
    said = " | ".join(one["warnings"])
    assert "1 of the 3 fitted layers" in said
    assert "2 layers of the file are unknown" in said
    assert "1 layers have other shapes" in said or "1 layer has another shape" in said
    assert said.count(" | ") >= 2
    assert set(one["votes"].values()) <= {0.0, 1 / 3, 2 / 3, 1.0}  # the three matrices of one layer


def test_files_with_different_layers_are_judged_each_by_its_own(own: Path, tmp_path: Path, run: Run) -> None:
    """In the order in which they were named."""
    whole = [write_model(tmp_path / f"whole_{size}.safetensors", ("new", size)) for size in SIZES]
    part = write_model(tmp_path / "part.safetensors", ("new", 2), layers=LAYERS[:1])
    files = [whole[0], part, *whole[1:]]
    found = estimates_in(run("--dataset", own, "--predict", *files))
    assert [one["file"] for one in found] == [str(file) for file in files]
    assert found[1] == about(estimates_in(run("--dataset", own, "--predict", part))[0])


# ---------------------------------------------------------------------------------------------------------------------
# Files that are unlike every labelled model


def scaled(path: Path, model: Model, factor: float) -> Path:
    return write(path, {key: factor * torch.from_numpy(matrix) for key, matrix in weights_of(model).items()})


def test_a_file_that_is_unlike_every_labelled_model_gets_a_warning(folder: Path, tmp_path: Path, run: Run) -> None:
    torch.manual_seed(0)
    shapes = {key: matrix.shape for key, matrix in weights_of(("new", 2)).items()}
    files = [
        write_model(tmp_path / "alike.safetensors", ("new", 2)),
        scaled(tmp_path / "large.safetensors", ("new", 2), 30),
        scaled(tmp_path / "small.safetensors", ("new", 2), 1 / 30),
        write(tmp_path / "even.safetensors", {key: 5 * torch.rand(shape) for key, shape in shapes.items()}),
    ]
    outcome = run("--dataset", folder, "--subset=low_4", "--predict", *files)
    first = [" ".join(one["first"]) for one in estimates_in(outcome)]
    assert ["not comparable" in said for said in first] == [False, True, True, True]
    assert [one["recipe_p"] <= 0.05 for one in estimates_in(outcome)] == [False, True, True, True]
    assert "times as large as any labelled model's" in first[1]
    assert "times as small as any labelled model's" in first[2]
    assert [f"{file}: not comparable" in outcome.out for file in files] == [False, True, True, True]


def test_an_untrained_file_says_so(own: Path, tmp_path: Path, run: Run) -> None:
    tensors = {key: torch.from_numpy(matrix) * (".up." not in key) for key, matrix in weights_of(("new", 2)).items()}
    outcome = run("--dataset", own, "--predict", write(tmp_path / "fresh.safetensors", tensors))
    (one,) = estimates_in(outcome)
    assert any("untrained" in said for said in one["first"])
    first = next(key for key in tensors if ".up." in key)
    tensors = {key: torch.from_numpy(matrix) * (key != first) for key, matrix in weights_of(("new", 2)).items()}
    (one,) = estimates_in(run("--dataset", own, "--predict", write(tmp_path / "partly.safetensors", tensors)))
    assert not any("untrained" in said for said in [*one["first"], *one["warnings"]])
    assert any("zero in 1 of 3 layers" in warning for warning in one["warnings"])


def test_copies_among_the_labelled_models(tmp_path: Path, run: Run) -> None:
    """Each left-out model then has its copy among the others, at no distance at all."""
    folder = write_own(tmp_path / "own", [("thing_00", size) for size in SIZES])
    shutil.copytree(folder / "thing_00", folder / "copy")
    rows = [f"{name}/{size}.safetensors,{size},{name}" for name in ("thing_00", "copy") for size in SIZES]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label,name", *rows]))
    file = write_model(tmp_path / "new.safetensors", ("new", 2))
    outcome = run("--dataset", folder, "--predict", file, folder / "copy" / "1.safetensors")
    assert outcome.code == 0
    new, copy = estimates_in(outcome)
    assert not any("among the labelled" in warning for warning in new["warnings"])
    assert any("among the labelled" in warning for warning in copy["warnings"])
    few = f"can't be told by {2 * len(SIZES)} labelled models: label 19 or more"
    assert new["first"] or any(few in warning for warning in new["warnings"])


@pytest.mark.parametrize("micro_datasets", [1, 2])
def test_what_is_far_beyond_a_few_labelled_models_is_said_first(tmp_path: Path, run: Run, micro_datasets: int) -> None:
    """Of fewer than 19 no p-value can be 0.05, so none is needed: all norms are 1e6 times as large, or as small."""
    models = [(f"thing_{number:02d}", size) for number in range(micro_datasets) for size in SIZES]
    folder = write_own(tmp_path / "own", models)
    files = []
    for name, factor in (("large", 1e6), ("small", 1e-6)):
        weights = load_file(write_model(tmp_path / f"{name}.safetensors", ("new", 2)))
        scaled = {key: tensor if key.endswith("alpha") else factor * tensor for key, tensor in weights.items()}
        save_file(scaled, tmp_path / f"{name}.safetensors")
        files.append(tmp_path / f"{name}.safetensors")
    layers = sorted({key.split(".lora")[0] for key in weights})
    scaled = {key: (10 if key.split(".lora")[0] in layers[::2] else 1) * its for key, its in weights.items()}
    save_file(scaled, tmp_path / "half of the layers.safetensors")
    outcome = run("--dataset", folder, "--predict", *files, tmp_path / "half of the layers.safetensors")
    assert outcome.code == 0
    for one, word in zip(estimates_in(outcome), ("large", "small", "large"), strict=True):
        assert one["first"][0].startswith("not comparable with the labelled models: ")
        assert f"times as {word}" in one["first"][1]


# ---------------------------------------------------------------------------------------------------------------------
# The prediction set and what was right before


def made_up(micro_datasets: int, sizes: tuple[int, ...] = SIZES, voters: int = 7, seed: int = 0) -> dsire.Spectra:
    """Spectra that shrink with the size, of so many micro-datasets."""
    random = torch.Generator().manual_seed(seed)
    models = models_of(micro_datasets, sizes)
    numbers = torch.tensor([size for _, size in models])
    noise = torch.randn(voters, len(models), 2, generator=random, dtype=torch.float64)
    names = [dsire.Voter(f"layer_{row}", "A") for row in range(voters)]
    shapes = {voter.layer: [3, 3, 2] for voter in names}
    return dsire.Spectra(0.5 * noise - numbers.double()[:, None], numbers, [name for name, _ in models], names, shapes)


def without(spectra: dsire.Spectra, name: Any) -> dsire.Spectra:
    return spectra.of_models(torch.tensor([its_name != name for its_name in spectra.names]))


def vote_shares(train: dsire.Spectra, values: Tensor, sizes: list[int]) -> dict[int, Fraction]:
    """Size -> share of the voters whose nearest training model has it; values [voters, r] of one model."""
    counts = dict.fromkeys(sizes, 0)
    for row, its_values in enumerate(values):
        distances = [float((other - its_values).norm()) for other in train.values[row]]
        counts[int(train.sizes[distances.index(min(distances))])] += 1
    return {size: Fraction(count, len(values)) for size, count in counts.items()}


def p_by_the_book(fitted: dsire.Spectra, values: Tensor) -> dict[int, Fraction]:
    """Size -> p by the formula in `conformal_p`, one model and one comparison after the other, in exact fractions."""
    sizes = sorted(set(fitted.sizes.tolist()))
    total, units = dict.fromkeys(sizes, Fraction(1)), dict.fromkeys(sizes, 0)
    for fold in sorted(set(fitted.names)):
        rest = without(fitted, fold)
        new = vote_shares(rest, values, sizes)
        for size in sizes:
            models = [model for model, name in enumerate(fitted.names) if (name, fitted.sizes[model]) == (fold, size)]
            shares = [vote_shares(rest, fitted.values[:, model], sizes)[size] for model in models]
            if shares:
                total[size] += Fraction(sum(share <= new[size] for share in shares), len(shares))
                units[size] += 1
    return {size: total[size] / (units[size] + 1) for size in sizes}


def files_of(spectra: dsire.Spectra) -> list[dsire.Spectra]:
    return [spectra.of_models(torch.tensor([model])) for model in range(len(spectra.names))]


def assert_sets_of_the_formula(fitted: dsire.Spectra, new: dsire.Spectra) -> None:
    expected = [p_by_the_book(fitted, values) for values in new.values.unbind(1)]
    for confidence in ("0.4", "0.5", "0.75", "0.8", "0.9"):
        found = dsire.estimates(fitted, files_of(new), "dsire", float(confidence))
        sets = [[size for size, its_p in p.items() if its_p > 1 - Fraction(confidence)] for p in expected]
        assert [one.confidence_set for one in found] == sets


@pytest.mark.parametrize("micro_datasets", [2, 3, 6, 9])
def test_the_prediction_set_is_that_of_its_formula(micro_datasets: int) -> None:
    assert_sets_of_the_formula(made_up(micro_datasets), made_up(2, seed=1))


def test_the_prediction_set_where_a_size_is_in_one_micro_dataset_only() -> None:
    """While that one is left out, nobody votes for the size; another micro-dataset has each size twice."""
    whole = made_up(5, (1, 2, 3, 9))
    kept = [model for model, name in enumerate(whole.names) if name == "thing_02" or whole.sizes[model] != 9]
    fitted = whole.of_models(torch.tensor(kept))
    fitted = dsire.replace(fitted, names=["thing_00" if name == "thing_01" else name for name in fitted.names])
    assert fitted.sizes.tolist().count(9) == 1
    assert_sets_of_the_formula(fitted, made_up(2, (1, 9), seed=1))


def alike_by_the_book(share: Fraction, shares: list[Fraction], right: list[bool]) -> list[float]:
    """The nearest tenth of the shares (ten at least, and all that are as near), those within 0.1: what is said."""
    order = sorted(abs(other - share) for other in shares)
    limit = min(order[min(len(order), max(10, len(order) // 10)) - 1], Fraction(1, 10))
    alike = [(other, hit) for other, hit in zip(shares, right, strict=True) if abs(other - share) <= limit]
    ends = [float(end([other for other, _ in alike], default=share)) for end in (min, max)]
    return [*map(pytest.approx, ends), len(alike), sum(hit for _, hit in alike)]


def test_what_was_right_before_is_counted_by_hand() -> None:
    fitted, files = made_up(6), files_of(made_up(2, seed=1))
    sizes = sorted(set(fitted.sizes.tolist()))
    shares, hits = [], []
    for model, name in enumerate(fitted.names):
        its_shares = vote_shares(without(fitted, name), fitted.values[:, model], sizes)
        rest = [other for other, other_name in enumerate(fitted.names) if other_name != name]
        (prediction,) = dsire.dsire(fitted, [split_of(rest, [model])])
        winner = int(prediction.sizes)
        shares.append(its_shares[winner])
        hits.append(bool(winner == fitted.sizes[model]))
    for file, one in zip(files, dsire.estimates(fitted, files, "dsire", 0.9), strict=True):
        share = max(vote_shares(fitted, file.values[:, 0], sizes).values())
        assert one.alike == alike_by_the_book(share, shares, hits)


@pytest.mark.parametrize(("models", "share"), [(8, "1/2"), (99, "1/2"), (250, "1/2"), (250, "0"), (40, "9/8")])
def test_what_was_right_before_of_any_number_of_models(models: int, share: str) -> None:
    """Of 250 models the tenth is 25; of 8, all; far from all of them, none."""
    shares = [Fraction(number * 7 % models, models) for number in range(models)]
    right = [number % 3 > 0 for number in range(models)]
    found = dsire.models_alike(
        float(Fraction(share)), torch.tensor([float(its) for its in shares], dtype=torch.float64), torch.tensor(right)
    )
    assert found == alike_by_the_book(Fraction(share), shares, right)


# ---------------------------------------------------------------------------------------------------------------------
# The subset that ships


@pytest.fixture(scope="module")
def left_out(shipped: dsire.Spectra) -> dict[str, list[tuple[int, dsire.Estimate]]]:
    """Micro-dataset -> the true size of each of its models, and its estimate from all the other micro-datasets."""
    found = {}
    for number, name in enumerate(sorted(set(shipped.names))):
        asked = shipped.micro_datasets == number
        files = files_of(shipped.of_models(asked))
        new = dsire.estimates(shipped.of_models(~asked), files, "dsire", 0.9)
        found[name] = list(zip(shipped.sizes[asked].tolist(), new, strict=True))
    return found


def test_the_prediction_set_covers_left_out_models(left_out: dict[str, list[tuple[int, dsire.Estimate]]]) -> None:
    """At least 90 %, less two standard errors over the micro-datasets, with fewer sizes than there are."""
    coverage = torch.tensor(
        [[size in one.confidence_set for size, one in models] for models in left_out.values()], dtype=torch.float64
    ).mean(1)
    members = [len(one.confidence_set) for models in left_out.values() for _, one in models]
    error = float(coverage.std()) / len(coverage) ** 0.5
    mean = sum(members) / len(members)
    print(f"coverage {coverage.mean():.3f}, standard error {error:.3f}; {mean:.2f} sizes in a set in the mean")
    assert len(members) == 240
    assert coverage.mean() >= 0.9 - 2 * error
    assert coverage.mean() >= 0.88
    assert mean < 6


def test_left_out_models_are_comparable_with_the_others(left_out: dict[str, list[tuple[int, dsire.Estimate]]]) -> None:
    """One in twenty is said not to be, and two standard errors over the micro-datasets more at most."""
    flagged = torch.tensor(
        [[bool(one.first) for _, one in models] for models in left_out.values()], dtype=torch.float64
    ).mean(1)
    print(f"not comparable {flagged.mean():.3f}")
    assert flagged.mean() <= 0.05 + 2 * float(flagged.std()) / len(flagged) ** 0.5


def test_left_out_models_as_files_get_the_estimates_of_the_evaluation(
    tiny_wise: Path, tmp_path: Path, run: Run, shipped: dsire.Spectra
) -> None:
    """One split of the protocol: the test models, written as kohya writes them, against the others in parquet."""
    import pyarrow as pa

    table = pa.concat_tables([pq.read_table(file) for file in parquet_files(tiny_wise / "low" / "4")])
    names = table.column("name").to_pylist()
    chosen = sorted(set(names))[::20]
    test = [model for model, name in enumerate(names) if name in chosen]
    train = [model for model, name in enumerate(names) if name not in chosen]
    rest = write_folder(tmp_path / "rest", [table.take(train)])
    layers = [column.removesuffix(".lora.down.weight") for column in table.column_names if column.endswith("n.weight")]
    files = []
    for model in test:
        tensors: dict[str, Tensor] = {}
        for layer in layers:
            down, up, alpha = kohya_keys(layer.removeprefix("unet."))
            flat = [table.column(f"{layer}.lora.{word}.weight")[model].as_py() for word in ("down", "up")]
            a, b = torch.tensor(flat[0]).view(RANK, -1), torch.tensor(flat[1]).view(-1, RANK)
            tensors |= {down: a, up: b, alpha: torch.tensor(float(RANK))}
        files.append(write(tmp_path / "new" / f"{model:03d}.safetensors", tensors))
    outcome = run("--dataset", rest, "--subset=low_4", "--predictor=dsire", "--predict", *files)
    assert (outcome.code, outcome.err) == (0, "")
    (wanted,) = dsire.dsire(shipped, [split_of(train, test)])
    found = estimates_in(outcome)
    assert [one["estimate"] for one in found] == wanted.sizes.tolist()
    for one, shares in zip(found, wanted.shares.tolist(), strict=True):
        assert list(one["votes"].values()) == pytest.approx(shares)
        assert [int(size) for size in one["votes"]] == wanted.candidates.tolist()


def test_the_subset_that_ships_is_the_default(tiny_wise: Path, tmp_path: Path, run: Run) -> None:
    table = pq.read_table(parquet_files(tiny_wise / "low" / "4")[0]).slice(0, 1)
    columns = [column for column in table.column_names if column.endswith(".weight")]
    tensors = {}
    for column in columns:
        flat = torch.tensor(table.column(column)[0].as_py())
        tensors[column] = flat.view(RANK, -1) if ".down." in column else flat.view(-1, RANK)
    outcome = run("--predict", write(tmp_path / "known.safetensors", tensors))
    assert (outcome.code, outcome.err) == (0, "")
    (one,) = estimates_in(outcome)
    assert one["estimate"] == table.column("label")[0].as_py()
    assert any("among the labelled" in warning for warning in one["warnings"])


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


def test_a_folder_without_names_has_a_micro_dataset_for_each_file(tmp_path: Path, run: Run) -> None:
    own = write_own(tmp_path / "own", models_of(2, SIZES))
    rows = [row.rpartition(",")[0] for row in (own / "metadata.csv").read_text().splitlines()]
    assert rows[0] == "file_name,label"
    (own / "metadata.csv").write_text("\n".join(rows))
    outcome = run("--dataset", own, "--experiments=2", "--train_size=5")
    assert outcome.code == 0, outcome.err
    assert "6 models, 6 micro-datasets, sizes 1 2 3" in outcome.out
    assert len(outcome.predictions.splitlines()) == 1 + 2 * 1


def test_a_folder_of_adapters_of_peft(tmp_path: Path, run: Run) -> None:
    """adapter_config.json beside each: alpha is read, and the micro-datasets are those of metadata.csv."""
    folder = tmp_path / "adapters"
    rows = ["file_name,label,name"]
    for name in "abc":
        for size in SIZES:
            random = torch.Generator().manual_seed(100 * size + ord(name))
            down, up = torch.randn(2, 6, generator=random) / size, torch.randn(5, 2, generator=random) / size
            adapter(folder / f"{name}{size}", {"lora_alpha": 6}, down=down, up=up)
            rows.append(f"{name}{size}/adapter_model.safetensors,{size},{name}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    outcome = run("--dataset", folder, "--train_size=2", "--experiments=3")
    assert outcome.code == 0, outcome.err
    assert "9 models, 3 micro-datasets, sizes 1 2 3" in outcome.out
    assert "does not state alpha" not in outcome.out
    outcome = run("--dataset", folder, "--predict", folder / "b2")
    assert [one["estimate"] for one in estimates_in(outcome)] == [2]


def test_a_folder_whose_files_state_their_sizes(tmp_path: Path, run: Run) -> None:
    """No metadata.csv: the sizes are said with their source, and the files without one are counted and named."""
    folder = tmp_path / "own"
    for size in (4, 7):
        for name in "ab":
            write_model(folder / f"{name}_{size}.safetensors", (name, size), kohya_header(size))
    write_model(folder / "silent.safetensors", ("c", 4))
    outcome = run("--dataset", folder, "--train_size=3", "--experiments=2")
    assert outcome.code == 0, outcome.err
    assert "4 models, 4 micro-datasets, sizes 4 7" in outcome.out
    (line,) = [line for line in outcome.out.splitlines() if "states its own size" in line]
    assert "a_4.safetensors: states its own size: 4 images (ss_dataset_dirs)" in line
    assert "3 other files" in line
    (line,) = [line for line in outcome.out.splitlines() if "silent.safetensors" in line]
    assert "left out" in line
    (one, *_) = estimates_in(run("--dataset", folder, "--predict", folder / "a_7.safetensors"))
    assert (one["estimate"], one["stated_size"]) == (7, 7)


def test_metadata_csv_goes_before_what_the_files_state(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "own"
    for name in "abc":
        write_model(folder / f"{name}.safetensors", (name, 4), kohya_header(4))
    (folder / "metadata.csv").write_text("file_name,label\na.safetensors,8\nb.safetensors,9\n")
    outcome = run("--dataset", folder, "--train_size=1", "--experiments=1")
    assert "2 models, 2 micro-datasets, sizes 8 9" in outcome.out
    (line,) = [line for line in outcome.out.splitlines() if "c.safetensors" in line]
    assert "not in metadata.csv" in line


def test_a_folder_where_no_file_has_a_size(tmp_path: Path, run: Run) -> None:
    write_model(tmp_path / "own" / "a.safetensors", ("a", 4))
    assert run("--dataset", tmp_path / "own").says("metadata.csv", "file_name,label")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("file_name,size\na.safetensors,4\n", ["label"]),
        ("label,name\n4,a\n", ["file_name"]),
        ("", ["needs the columns file_name and label"]),
        ("file_name,label\n", ["lists no file"]),
        ("file_name,label\na.safetensors,four\n", ["'four'", "a.safetensors"]),
        ("file_name,label\na.safetensors,0\n", ["'0'", "a.safetensors"]),
        ("file_name,label\na.safetensors,-3\n", ["'-3'", "a.safetensors"]),
        ("file_name,label\na.safetensors,2.5\n", ["'2.5'", "a.safetensors"]),
        ("file_name,label\na.safetensors,\n", ["a.safetensors", "label"]),
        ("file_name,label\na.safetensors\n", ["a.safetensors", "label"]),
        ("file_name,label\na.safetensors," + "9" * 30 + "\n", ["a.safetensors", "label"]),
        ("file_name,label\nb.safetensors,3\n", ["b.safetensors", "not there"]),
        ("file_name,label\na.safetensors,3\n./a.safetensors,4\n", ["a.safetensors", "twice"]),
        ("file_name,label\n\0a.safetensors,3\n", ["metadata.csv"]),
        (b"file_name,label\n\xff\xfe,3\n", ["metadata.csv"]),
        ("file_name,label\n" + "x" * 200_000 + ",3\n", ["metadata.csv"]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_errors_in_metadata_csv(text: str | bytes, parts: list[str], tmp_path: Path, run: Run) -> None:
    write_model(tmp_path / "own" / "a.safetensors", ("a", 4))
    (tmp_path / "own" / "metadata.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run("--dataset", tmp_path / "own").says(*parts)


@pytest.mark.parametrize(
    "text", ["\ufefffile_name,label,name\r\na.safetensors, 4 ,x\r\n", "name,label,file_name\n,4,a.safetensors"]
)
def test_metadata_csv_as_spreadsheets_write_it(text: str, tmp_path: Path, run: Run) -> None:
    file = write_model(tmp_path / "own" / "a.safetensors", ("a", 4))
    (tmp_path / "own" / "metadata.csv").write_text(text)
    assert [one["estimate"] for one in estimates_in(run("--dataset", tmp_path / "own", "--predict", file))] == [4]


def test_one_micro_dataset_predicts_and_does_not_evaluate(tmp_path: Path, run: Run) -> None:
    own = write_own(tmp_path / "own", models_of(1, SIZES))
    file = write_model(tmp_path / "new.safetensors", ("new", 2))
    outcome = run("--dataset", own, "--predict", file)
    assert outcome.code == 0, outcome.err
    (one,) = estimates_in(outcome)
    assert one["estimate"] in SIZES
    assert one["confidence_set"] == one["alike"] == []
    assert any("one micro-dataset only" in warning for warning in one["warnings"])
    assert run("--dataset", own).says("--train_size=15", "there are 1", "needs two")


def test_a_single_model_predicts_its_size(tmp_path: Path, run: Run) -> None:
    own = write_own(tmp_path / "own", [("thing_00", 3)])
    (one,) = estimates_in(run("--dataset", own, "--predict", write_model(tmp_path / "new.safetensors", ("new", 2))))
    assert (one["estimate"], one["votes"]) == (3, {"3": 1.0})


def test_evaluation_of_a_few_says_what_it_lacks(own: Path, run: Run) -> None:
    assert run("--dataset", own).says("needs 16 micro-datasets", "there are 4", "--train_size", "3")
    assert run("--dataset", own, "--train_size=3", "--experiments=2").code == 0


def test_files_of_a_folder_may_lack_layers_of_the_others(tmp_path: Path, run: Run) -> None:
    """The layers that all have are used, and the others counted."""
    own = write_own(tmp_path / "own", models_of(2, SIZES))
    write_model(own / "thing_00" / "1.safetensors", ("thing_00", 1), layers=LAYERS[:2])
    outcome = run("--dataset", own, "--train_size=1", "--experiments=1")
    assert outcome.code == 0, outcome.err
    assert "2 layers of rank 4" in outcome.out
    assert "1 layers that are not the same in all files" in outcome.out


def test_files_of_a_folder_with_nothing_in_common(tmp_path: Path, run: Run) -> None:
    own = write_own(tmp_path / "own", models_of(2, SIZES))
    write_model(own / "thing_00" / "1.safetensors", ("thing_00", 1), rank=2)
    assert run("--dataset", own).says("no layer is in all 6 files")


def test_a_bad_file_among_the_labelled_ones_is_named(own: Path, run: Run) -> None:
    (own / "thing_02" / "2.safetensors").write_bytes(b"")
    assert run("--dataset", own, "--predict", own / "thing_00").says("2.safetensors")


def test_ranks_that_differ_between_layers_are_padded(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "own"
    rows = ["file_name,label,name"]
    for name in "ab":
        for size in SIZES:
            random = torch.Generator().manual_seed(100 * size + ord(name))
            shapes = {f"layer_{rank}": (rank, 8) for rank in (2, 4)}
            lora = {
                layer: (torch.randn(rank, 6, generator=random), torch.randn(width, rank, generator=random))
                for layer, (rank, width) in shapes.items()
            }
            write(folder / f"{name}{size}.safetensors", by_hand("kohya", lora, alpha=2))
            rows.append(f"{name}{size}.safetensors,{size},{name}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    outcome = run("--dataset", folder, "--predict", folder / "b3.safetensors")
    assert outcome.code == 0, outcome.err
    assert [one["estimate"] for one in estimates_in(outcome)] == [3]
    assert "2 layers of rank 2 4" in outcome.out


def test_a_second_run_reads_the_cache_and_a_changed_file_anew(
    own: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = dsire.file_spectra

    def counting(path: Path, *options: Any) -> dsire.Spectra:
        read.append(path.name)
        return plain(path, *options)

    monkeypatch.setattr(dsire, "file_spectra", counting)
    options = ["--dataset", own, "--train_size=3", "--experiments=1"]
    first = run(*options)
    assert len(read) == 12
    assert run(*options).predictions == first.predictions
    assert len(read) == 12
    write_model(own / "thing_01" / "2.safetensors", ("changed", 2))
    run(*options)
    assert read[12:] == ["2.safetensors"]


def test_one_layer_of_convolutions_can_be_labelled(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "own"
    for size in SIZES:
        random = torch.Generator().manual_seed(size)
        down, up = torch.randn(2, 3, 3, 3, generator=random), torch.randn(5, 2, 1, 1, generator=random)
        write(folder / f"{size}.safetensors", one_layer(down=down, up=up), kohya_header(size))
    found = estimates_in(run("--dataset", folder, "--predictor=dsire", "--predict", folder))
    assert [one["estimate"] for one in found] == list(SIZES)


def test_settings_beside_a_labelled_file_are_part_of_its_version(tmp_path: Path, run: Run) -> None:
    """alpha comes from adapter_config.json: when that changes, so does BA."""
    folder = tmp_path / "loras"
    for name in ("a", "b"):
        adapter(folder / name, {"peft_type": "LORA", "lora_alpha": 4})
    (folder / "metadata.csv").write_text(
        "file_name,label\na/adapter_model.safetensors,1\nb/adapter_model.safetensors,2\n"
    )
    before = dsire.subset_spectra(dsire.folder_source(folder, None), 0, tmp_path / "cache").values
    for name in ("a", "b"):
        settings = folder / name / "adapter_config.json"
        settings.write_text(settings.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    after = dsire.subset_spectra(dsire.folder_source(folder, None), 0, tmp_path / "cache").values
    torch.testing.assert_close(after[-1], 2 * before[-1])  # the last voter is a product


def test_a_name_that_is_nowhere_is_said_before_the_subset_is_read(tmp_path: Path, run: Run) -> None:
    assert run("--dataset=/nowhere/at/all", "--predict=nothing.safetensors").says("nothing.safetensors: no such file")

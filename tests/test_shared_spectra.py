"""Files of spectra in place of the models: the same report, from 1,000 times fewer bytes, and no lie is believed."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, parquet_files
from hub_stand_in import HubStandIn
from lora_writers import write_model
from safetensors.torch import load_file, save_file

import dsire

ONCE = ("--experiments=2", "--train_size=15")


@pytest.fixture
def shared(folder: Path, tmp_path: Path) -> Path:
    spectra = dsire.subset_spectra(dsire.find_source(str(folder), "low_4", None, tmp_path), 4, tmp_path / "cache")
    about = {"dataset": "wise", "subset": "low_4", "commit": "c0ffee"}
    dsire.write_spectra(tmp_path / "low_4.safetensors", spectra, about, torch.float32)
    return tmp_path / "low_4.safetensors"


@pytest.mark.parametrize("asked", [[], ["--compare"], ["--predict"]], ids=str)
def test_the_report(asked: list[str], run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for a note; no parquet is opened; nothing in the file tells of this machine."""
    new = write_model(tmp_path / "new.safetensors", ("new", 3))
    arguments = [*asked, new] if asked == ["--predict"] else [*ONCE, *asked]
    place = tmp_path / "out" / "low_4.safetensors"
    of_models = run(f"--dataset={folder}", "--subset=low_4", f"--save_spectra={place}", *arguments)
    assert str(tmp_path).encode() not in place.read_bytes()
    for file in parquet_files(folder):
        file.unlink()
    monkeypatch.setattr(dsire, "shard_spectra", None)
    of_file = run(f"--dataset={place}", f"--cache_dir={tmp_path / 'new'}", *arguments)
    assert (of_file.code, of_models.code) == (0, 0), of_file.err + of_models.err
    printed = [re.sub(r"(wrote|note:) .*\n", "", its.out) for its in (of_file, of_models)]
    assert printed[0] == printed[1]
    assert {**of_file.written, "report.json": ""} == {**of_models.written, "report.json": ""}
    assert (of_file.report["settings"]["dataset"], of_file.report["settings"]["subset"]) == ("wise", "low_4")
    (note,) = set(of_file.report["notes"]) - set(of_models.report["notes"])
    assert "holds spectra, not models" in note
    assert dsire.read_spectra(place)[1]["digest"] in note
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("subset", ["low_4", "medium_4"])
def test_float32_is_enough(subset: str, tiny_wise: Path, tmp_path: Path) -> None:
    spectra = dsire.subset_spectra(dsire.find_source(str(tiny_wise), subset, None, tmp_path), 4, tmp_path)
    dsire.write_spectra(tmp_path / "shared.safetensors", spectra, {}, torch.float32)
    shared, _ = dsire.read_spectra(tmp_path / "shared.safetensors")
    runs = dsire.splits(spectra.micro_datasets, dsire.Protocol())
    for predictor in (dsire.dsire, dsire.PREDICTORS["log-ridge"]):
        for one, other in zip(predictor(spectra, runs), predictor(shared, runs), strict=True):
            assert one.sizes.equal(other.sizes)


def test_a_file_on_the_hub(run: Run, hub: HubStandIn, shared: Path, tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    shared = shared.rename(tmp_path / "published" / "low_4.safetensors")
    hub.add(tmp_path / "published", "lab/spectra")
    here = run(f"--dataset={shared}", *ONCE)
    there = run("--dataset=lab/spectra:low_4.safetensors", "--subset=low_4", *ONCE)
    assert (there.code, there.predictions) == (0, here.predictions), there.err
    hub.fails("flip", "/cdn/*", times=None)
    outcome = run("--dataset=lab/spectra:low_4.safetensors", f"--cache_dir={tmp_path / 'new'}", *ONCE)
    assert outcome.says("low_4.safetensors", "lab/spectra", "damaged")


def test_what_is_asked_has_to_fit(run: Run, shared: Path) -> None:
    assert run(f"--dataset={shared}", "--subset=low_8").says("low_4", "not low_8")
    assert run(f"--dataset={shared}", "--rank=8").says("--rank=8")
    assert run(f"--dataset={shared}", "--revision=v1").says("--revision")
    assert run(f"--dataset={shared}", "--rank=4", *ONCE).code == 0


def test_two_hundred_mutations(run: Run, shared: Path, tmp_path: Path) -> None:
    draw, content = random.Random(0), shared.read_bytes()
    right, other = run(f"--dataset={shared}", *ONCE), tmp_path / "other.safetensors"
    start = 8 + int.from_bytes(content[:8], "little")
    for number in range(200):
        data = bytearray(content)
        first = draw.randrange(start if number % 2 else len(data))
        if number % 5 == 4:
            del data[first : first + draw.choice([1, 8, 1000])]
        for place in range(first, min(len(data), first + draw.choice([1, 1, 4, 64]))):
            data[place] = draw.choice([data[place] ^ (1 << draw.randrange(8)), draw.randrange(256), 0, 0xFF])
        other.write_bytes(data)
        outcome = run(f"--dataset={other}", *ONCE)
        assert outcome.predictions == right.predictions if outcome.code == 0 else outcome.says("other.safetensors")


def put(place: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The spectra with one singular value, the first or last of the first model's first, set."""
    at = tuple(map(torch.tensor, (0, 0, place)))
    return lambda values: values.index_put(at, torch.tensor(value, dtype=values.dtype))


LIES: dict[str, tuple[str, Callable[[Any], Any]]] = {  # what a field of Spectra is made to be
    "NaN": ("values", put(0, float("nan"))),
    "negative": ("values", put(-1, -1)),
    "rising": ("values", put(-1, 1e9)),
    "fewer models": ("values", lambda values: values[:, 1:]),
    "no values": ("values", lambda values: values[..., :0]),
    "fewer sizes": ("sizes", lambda sizes: sizes[1:]),
    "size -1": ("sizes", lambda sizes: -sizes),
    "sizes of another type": ("sizes", lambda sizes: sizes.double()),
    "fewer names": ("names", lambda names: names[1:]),
    "names of two types": ("names", lambda names: [1, *names[1:]]),
    "an escape sequence": ("names", lambda names: [f"{name}\x1b[31m" for name in names]),
    "a bidi mark": ("names", lambda names: [f"\u202e{name}" for name in names]),
    "a new line": ("method", lambda method: "LoRA\nsaid"),
    "few recipes": ("recipes", lambda recipes: ["a"]),
    "a voter twice": ("voters", lambda voters: [voters[1], *voters[1:]]),
    "another matrix": ("voters", lambda voters: [dsire.Voter(voters[0].layer, "C"), *voters[1:]]),
    "a voter of three": ("voters", lambda voters: [(*voters[0], 3), *voters[1:]]),
    "no shapes": ("shapes", lambda shapes: {}),
    "shapes below one": ("shapes", lambda shapes: {layer: [0, 1, 2] for layer in shapes}),
    "shapes of another type": ("shapes", lambda shapes: {layer: ["a", True, 2.5] for layer in shapes}),
}


@pytest.mark.parametrize(("field", "lie"), LIES.values(), ids=LIES)
def test_a_file_that_lies(field: str, lie: Callable[[Any], Any], run: Run, shared: Path) -> None:
    """It comes from a stranger, who can compute a digest."""
    spectra, _ = dsire.read_spectra(shared)
    lying = replace(spectra, **{field: lie(getattr(spectra, field))})
    dsire.write_spectra(shared, lying, {"subset": "low_4"})
    assert run(f"--dataset={shared}", *ONCE).says("low_4.safetensors", "can't be")


FORMATS = [json.dumps({"format": its}) for its in (dsire.FORMAT - 1, dsire.FORMAT + 1, "\x1b[31m", None, [[]])]
NO_FACTS = ["", "[]", "{}", "[" * 10**5, json.dumps({"format": dsire.FORMAT})]


@pytest.mark.parametrize("facts", [*FORMATS, *NO_FACTS])
def test_another_format_and_facts_that_are_none(facts: str, run: Run, shared: Path) -> None:
    tensors, said = load_file(shared), ["format", f"{dsire.FORMAT} is read"] if facts in FORMATS else []
    save_file(tensors, shared, {"facts": facts, "digest": dsire.digest_of(facts, **tensors)})
    assert run(f"--dataset={shared}").says("low_4.safetensors", *said)

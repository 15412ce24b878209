"""The Hugging Face Hub: what is downloaded, kept and asked for again, on a good day and on a bad one."""

import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import (
    FIRST,
    SECOND,
    THIRD,
    Run,
    assert_right,
    by_the_book,
    fetched,
    models_of,
    parquet_files,
    write_folder,
)
from hub_stand_in import HubStandIn
from lora_writers import adapter, write
from safetensors.torch import load_file

import dsire

SUBSET = (f"--dataset={dsire.LORA_WISE}", "--subset=low_4", "--rank=4")


def left_in(cache: Path) -> list[Path]:
    return [*cache.rglob("*.parquet"), *cache.rglob("*.incomplete")]


def test_shards_are_fetched_once(hub: HubStandIn, run_anew: Run, run: Run, folder: Path, tmp_path: Path) -> None:
    """The Hub is asked for one listing, the card and the shards; then for the commit; then it is gone."""
    first = run_anew(*SUBSET)
    assert_right(first, by_the_book(folder))
    assert first.err == ""
    listing = f"/api/datasets/{dsire.LORA_WISE}"
    assert [request.path for request in hub.requests if request.path.startswith("/api/")] == [listing]
    assert hub.requests.count(("GET", f"/datasets/{dsire.LORA_WISE}/resolve/{hub.commit}/README.md")) == 1
    assert fetched(hub) == [FIRST, SECOND, THIRD]
    assert left_in(tmp_path / "cache") == []
    assert (first.report["settings"]["dataset"], first.report["settings"]["commit"]) == (dsire.LORA_WISE, hub.commit)

    hub.requests.clear()
    second = run(*SUBSET)
    assert (second.code, second.out, second.predictions) == (0, first.out, first.predictions)
    assert [request.path for request in hub.requests] == [listing]

    hub.stop()
    third = run(*SUBSET)
    hub.start()
    assert (third.code, third.predictions) == (0, first.predictions)
    assert "can't be read from the Hub" in third.out
    assert f"going on with commit {hub.commit[:12]}" in third.out


def test_shards_that_are_kept_are_whole(run: Run, hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    assert run(*SUBSET, "--keep_shards").code == 0
    first, *_ = kept = parquet_files(tmp_path / "cache" / "hub")
    assert [file.read_bytes() for file in kept] == [file.read_bytes() for file in parquet_files(folder)]
    first.write_bytes(first.read_bytes()[:1000])
    for file in tmp_path.glob("cache/spectra/*.safetensors"):
        file.unlink()
    assert_right(run(*SUBSET, "--keep_shards"), by_the_book(folder))
    assert fetched(hub) == [FIRST, FIRST, SECOND, THIRD]


def test_the_next_shard_is_fetched(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubStandIn) -> None:
    models = models_of(20)
    shards = [models[start : start + 24] for start in range(0, 120, 24)]
    hub.add(write_folder(tmp_path / "five", shards), "somebody/five")
    compute, on_disk = dsire.shard_spectra, []

    def compute_slowly(path: Path, *arguments: Any) -> dsire.Spectra:
        asked_for = len(on_disk) + 2  # this one and the next
        deadline = time.monotonic() + 20
        while len(fetched(hub)) < min(asked_for, 5) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # time enough to fetch one too many
        on_disk.append({file.name.split(".")[0] for file in left_in(tmp_path / "cache")})
        return compute(path, *arguments)

    monkeypatch.setattr(dsire, "shard_spectra", compute_slowly)
    assert run(*SUBSET, "--dataset=somebody/five").code == 0
    assert [len(files) for files in on_disk] == [2, 2, 2, 2, 1]


def test_shards_of_the_same_bytes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubStandIn) -> None:
    """On the disk they are one download, which goes only when nobody reads it."""
    compute = dsire.pair_spectra
    monkeypatch.setattr(dsire, "pair_spectra", lambda *arguments: time.sleep(0.05) or compute(*arguments))
    hub.add(write_folder(tmp_path / "twins", [models_of(5)] * 4), "somebody/twins")
    outcome = run(*SUBSET, "--dataset=somebody/twins")
    assert outcome.out.startswith("low_4: 120 models, 5 micro-datasets"), outcome.err


@pytest.mark.parametrize("times", [1, None])
def test_a_damaged_shard_is_fetched_anew_once(times: int | None, run: Run, hub: HubStandIn, folder: Path) -> None:
    hub.fails("flip", f"/cdn/*{SECOND}*", times=times)
    outcome = run(*SUBSET)
    if times:
        assert_right(outcome, by_the_book(folder))
    else:
        assert outcome.says(SECOND, dsire.LORA_WISE, "damaged")
    assert fetched(hub).count(SECOND) == 2


@pytest.mark.parametrize(
    ("dataset", "revision"),
    [
        (dsire.LORA_WISE, "v1"),
        (dsire.LORA_WISE, "commit"),
        (f"https://huggingface.co/datasets/{dsire.LORA_WISE}", "main"),
        (f"https://huggingface.co/{dsire.LORA_WISE}/", "main"),
    ],
)
def test_addresses_and_revisions(dataset: str, revision: str, run: Run, hub: HubStandIn, folder: Path) -> None:
    hub.repository.tags = ["v1"]
    revision = hub.commit if revision == "commit" else revision
    outcome = run(f"--dataset={dataset}", *SUBSET[1:], f"--revision={revision}")
    assert_right(outcome, by_the_book(folder))
    settings = outcome.report["settings"]
    assert (settings["dataset"], settings["commit"]) == (dsire.LORA_WISE, hub.commit)


def test_a_dataset_that_changed_is_fetched_anew_where_it_changed(run: Run, hub: HubStandIn, folder: Path) -> None:
    run(*SUBSET)
    before, file = hub.commit, parquet_files(folder)[2]
    pq.write_table(pq.read_table(file)[:30], file)
    outcome = run(*SUBSET)
    assert_right(outcome, by_the_book(folder))
    assert outcome.report["settings"]["commit"] == hub.commit != before
    assert fetched(hub) == [FIRST, SECOND, THIRD, THIRD]


@pytest.mark.parametrize("fault", ["no token", "a wrong token", "not on the list", "no network", "offline"])
def test_a_hub_that_does_not_give_it(fault: str, run_anew: Run, hub: HubStandIn, folder: Path) -> None:
    hub.repository.token, hub.repository.granted = "hf_right", fault != "not on the list"
    token = {"no token": "", "a wrong token": "hf_wrong"}.get(fault, "hf_right")
    if fault == "no network":
        hub.stop()
    outcome = run_anew(*SUBSET, HF_TOKEN=token, HF_HUB_OFFLINE=str(int(fault == "offline")))
    if fault == "no network":
        hub.start()
    assert outcome.says(dsire.LORA_WISE, "network", "HF_TOKEN", "HF_ENDPOINT")
    hub.repository.granted = True
    assert_right(run_anew(*SUBSET, HF_TOKEN="hf_right"), by_the_book(folder))
    if fault == "offline":
        hub.requests.clear()
        assert_right(run_anew(*SUBSET, HF_HUB_OFFLINE="1"), by_the_book(folder))
        assert hub.requests == []


# Models to predict
@pytest.fixture
def lora(hub: HubStandIn, tmp_path: Path) -> Path:
    """A repository user/lora, in the folder that is returned: a file in PEFT's layout, and what says its alpha."""
    folder = tmp_path / "on the hub"
    weights = load_file(adapter(folder, {"r": 2, "lora_alpha": 4}))
    write(folder / "sub" / "other.safetensors", weights)
    write(folder / "lora.bin", weights)
    hub.add(folder, "user/lora", kind="model")
    return folder


@pytest.mark.parametrize(
    ("item", "names"),
    [
        ("user/lora", ["adapter_model.safetensors", "sub/other.safetensors"]),
        ("https://huggingface.co/user/lora:lora.bin", ["lora.bin"]),
        ("user/lora:adapter_model.safetensors", ["adapter_model.safetensors"]),
    ],
)
def test_models(item: str, names: list[str], hub: HubStandIn, lora: Path, tmp_path: Path, capsys: Any) -> None:
    files, left_out = dsire.files_to_predict(item, tmp_path / "cache")
    assert (list(files), left_out) == ([f"user/lora:{name}" for name in names], {})
    hub.stop()
    assert capsys.readouterr().err == ""
    again, _ = dsire.files_to_predict(item, tmp_path / "cache")
    assert "going on with commit" in capsys.readouterr().err
    hub.start()
    assert again == files
    for file in files.values():
        stated = [note for note in dsire.file_spectra(file).notes if "alpha" in note]
        assert bool(stated) == (file.name == "other.safetensors")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("times", [1, None])
def test_a_damaged_model(name: str, times: int | None, run: Run, hub: HubStandIn, lora: Path, tmp_path: Path) -> None:
    hub.fails("flip", f"*/{name}", times=times)
    if not times:
        assert run("--predict=user/lora").says(name, "user/lora", "damaged", "twice")
        hub.faults.clear()
    files, _ = dsire.files_to_predict("user/lora", tmp_path / "cache")
    its = files["user/lora:adapter_model.safetensors"].with_name(name)
    assert its.read_bytes() == (lora / name).read_bytes()


CARDS = {"some/tables": "configs:\n- config_name: a\n  data_files: x.csv\n", "some/texts": "license: mit\n"}


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--revision=v7", ["at revision v7", dsire.LORA_WISE]),
        ("--subset=low_64", ["--subset=low_64", dsire.LORA_WISE, "low_4"]),
        ("--dataset=nobody/nothing", ["nobody/nothing: no such file or folder here", "HF_TOKEN"]),
        ("--dataset=a--b/c", ["a--b/c"]),
        *((f"--dataset={name}", [name, "no parquet", "README.md"]) for name in CARDS),
        ("--predict=user/lora:nothing.bin", ["user/lora has no nothing.bin"]),
        ("--predict=user/pickles", ["no safetensors", "user/name:file.bin"]),
        ("--predict=unknown/suspect_1", ["unknown/suspect_1: no such file or folder here", "Hub"]),
        ("--predict=unknown/suspect.safetensors", ["unknown/suspect.safetensors: no such file or folder"]),
    ],
)
def test_what_is_not_there(argument: str, parts: list[str], run: Run, hub: HubStandIn, lora: Path) -> None:
    for name, card in CARDS.items():
        folder = hub.add(lora.with_name("hub") / name, name).folder
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(f"---\n{card}---\n")
    pickles = hub.add(lora.with_name("pickles"), "user/pickles", kind="model").folder
    pickles.mkdir()
    (lora / "lora.bin").rename(pickles / "lora.bin")
    assert run(*SUBSET, argument).says(*parts)

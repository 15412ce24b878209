"""The Hugging Face Hub: what is downloaded, kept and asked for again, on a good day and on a bad one."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    Outcome,
    Run,
    models_of,
    parquet_files,
    reference_experiments,
    reference_spectra,
    table_of,
    weights_of,
    write_folder,
)
from hub_stand_in import HubStandIn, Request
from huggingface_hub import HfFileSystem
from safetensors.torch import save_file

import dsire

SUBSET = (f"--dataset={dsire.LORA_WISE}", "--subset=low_4", "--rank=4")
FIRST, SECOND, THIRD = (f"train-0000{number}-of-00003.parquet" for number in range(3))


def shard_requests(hub: HubStandIn) -> list[Request]:
    """The requests for the content of a shard."""
    return [request for request in hub.requests if request.method == "GET" and request.path.startswith("/cdn/")]


def downloads(hub: HubStandIn) -> Counter[str]:
    """How often each shard's content was asked for."""
    return Counter(Path(request.path).name for request in shard_requests(hub))


def predictions_by_the_book(folder: Path) -> list[str]:
    models, voters = reference_spectra(parquet_files(folder), rank=4)
    return [
        f"{number},{models[model][0]},{models[model][1]},{guess}"
        for number, run in enumerate(reference_experiments(models, voters), start=1)
        for model, guess in zip(run.test, run.predicted, strict=True)
    ]


def assert_right(outcome: Outcome, folder: Path) -> None:
    """The run went well and predicted what scikit-learn and Counter do on the folder that the Hub serves."""
    assert outcome.code == 0, outcome.err
    rows = outcome.predictions.splitlines()[1:]
    assert [row.rsplit(",", 1)[0] for row in rows] == predictions_by_the_book(folder)


def left_in(cache: Path) -> list[Path]:
    """What downloads left behind: shards, or halves of them."""
    return [*cache.rglob("*.parquet"), *cache.rglob("*.incomplete")]


def test_shards_are_fetched_once_deleted_and_not_needed_again(
    hub: HubStandIn, run_anew: Run, run: Run, folder: Path, tmp_path: Path
) -> None:
    first = run_anew(*SUBSET)
    assert_right(first, folder)
    assert first.err == ""
    assert downloads(hub) == {FIRST: 1, SECOND: 1, THIRD: 1}
    assert left_in(tmp_path / "cache") == []
    assert first.report["settings"]["dataset"] == dsire.LORA_WISE
    assert first.report["settings"]["commit"] == hub.commit

    hub.requests.clear()
    second = run(*SUBSET)
    assert (second.code, second.out, second.predictions) == (0, first.out, first.predictions)
    assert [request for request in hub.requests if request.path.endswith(".parquet")] == []

    hub.stop()
    third = run(*SUBSET)
    hub.start()
    assert (third.code, third.predictions) == (0, first.predictions)
    assert "can't be read from the Hub" in third.out
    assert f"going on with commit {hub.commit[:12]}" in third.out


def test_the_hub_is_asked_for_one_listing_the_card_and_the_shards(run: Run, hub: HubStandIn, folder: Path) -> None:
    assert_right(run(*SUBSET), folder)
    asked = [request.path for request in hub.requests if request.path.startswith("/api/")]
    assert asked == [f"/api/datasets/{dsire.LORA_WISE}"]
    fetched = Counter(Path(request.path).name for request in hub.requests if request.status == 200 and request.sent)
    assert {name: times for name, times in fetched.items() if "." in name} == {
        **dict.fromkeys(("README.md", FIRST, SECOND, THIRD), 1)
    }


def test_keep_shards(run: Run, hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    assert_right(run(*SUBSET, "--keep_shards"), folder)
    kept = parquet_files(tmp_path / "cache" / "hub")
    assert [file.read_bytes() for file in kept] == [file.read_bytes() for file in parquet_files(folder)]


def test_the_next_shard_is_fetched_meanwhile_and_two_at_most_are_on_the_disk(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubStandIn
) -> None:
    models = models_of(20)
    shards = [table_of(models[start : start + 24]) for start in range(0, 120, 24)]
    hub.add(write_folder(tmp_path / "five", shards), "somebody/five")
    compute, on_disk = dsire.shard_spectra, []

    def compute_slowly(path: Path, *arguments: Any) -> dsire.Spectra:
        asked_for = len(on_disk) + 2  # this one and the next
        deadline = time.monotonic() + 20
        while len(downloads(hub)) < min(asked_for, 5) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # time enough to fetch one too many
        on_disk.append({file.name.split(".")[0] for file in left_in(tmp_path / "cache")})
        return compute(path, *arguments)

    monkeypatch.setattr(dsire, "shard_spectra", compute_slowly)
    assert run(*SUBSET, "--dataset=somebody/five").code == 0
    assert [len(files) for files in on_disk] == [2, 2, 2, 2, 1]


def test_a_shard_that_was_kept_and_truncated_is_fetched_anew(
    run: Run, hub: HubStandIn, folder: Path, tmp_path: Path
) -> None:
    run(*SUBSET, "--keep_shards")
    first, *_ = parquet_files(tmp_path / "cache" / "hub")
    first.write_bytes(first.read_bytes()[:1000])
    for file in tmp_path.glob("cache/spectra/*.safetensors"):
        file.unlink()
    assert_right(run(*SUBSET, "--keep_shards"), folder)
    assert downloads(hub) == {FIRST: 2, SECOND: 1, THIRD: 1}


def test_a_damaged_shard_is_fetched_anew_once(run: Run, hub: HubStandIn, folder: Path) -> None:
    hub.faults.flip(f"/cdn/*{THIRD}")
    assert_right(run(*SUBSET), folder)
    assert downloads(hub) == {FIRST: 1, SECOND: 1, THIRD: 2}


def test_a_shard_that_is_always_damaged_is_an_error(run: Run, hub: HubStandIn, tmp_path: Path) -> None:
    hub.faults.flip(f"/cdn/*{SECOND}", times=None)
    assert run(*SUBSET).says(SECOND, dsire.LORA_WISE, "damaged")
    assert downloads(hub)[SECOND] == 2


@pytest.mark.parametrize("kind", ["tag", "commit"])
def test_revision(run: Run, hub: HubStandIn, folder: Path, kind: str) -> None:
    hub.repository.tags = ["v1"]
    outcome = run(*SUBSET, f"--revision={'v1' if kind == 'tag' else hub.commit}")
    assert_right(outcome, folder)
    assert outcome.report["settings"]["commit"] == hub.commit


def test_a_dataset_that_changed_is_fetched_anew_where_it_changed(run: Run, hub: HubStandIn, folder: Path) -> None:
    """A new commit that changes one shard costs one download."""
    run(*SUBSET)
    before = hub.commit
    pq.write_table(table_of(models_of(20)[80:110]), folder / "low" / "4" / THIRD)
    HfFileSystem.clear_instance_cache()
    outcome = run(*SUBSET)
    assert_right(outcome, folder)
    assert outcome.report["settings"]["commit"] == hub.commit != before
    assert downloads(hub) == {FIRST: 1, SECOND: 1, THIRD: 2}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--revision=v7"], ["at revision v7", dsire.LORA_WISE]),
        (["--subset=low_64"], ["--subset=low_64", dsire.LORA_WISE, "low_4"]),
        (["--dataset=nobody/nothing"], ["no folder nobody/nothing is here", "HF_TOKEN"]),
        (["--dataset=a--b/c"], ["a--b/c"]),
    ],
)
def test_what_is_not_there(arguments: list[str], parts: list[str], run: Run, hub: HubStandIn) -> None:
    assert run(*SUBSET, *arguments).says(*parts)


@pytest.mark.parametrize("address", ["https://huggingface.co/datasets/{}", "https://huggingface.co/{}/"])
def test_an_address_is_taken_as_the_repository(address: str, run: Run, hub: HubStandIn, folder: Path) -> None:
    outcome = run(f"--dataset={address.format(dsire.LORA_WISE)}", *SUBSET[1:])
    assert_right(outcome, folder)
    assert outcome.report["settings"]["dataset"] == dsire.LORA_WISE


@pytest.mark.parametrize("network", [True, False])
def test_a_subset_that_does_not_ship(network: bool, run_anew: Run, hub: HubStandIn) -> None:
    """What ships is said rather than that the network is at fault."""
    if not network:
        hub.stop()
    outcome = run_anew("--subset=low4")
    if not network:
        hub.start()
    assert outcome.says("--subset=low4", "low_4" if network else "does not ship, as low_4 medium_4 recipes_4 do")


@pytest.mark.parametrize("card", ["configs:\n- config_name: a\n  data_files: x.csv\n", "license: mit\n"])
def test_a_dataset_without_parquet(run: Run, hub: HubStandIn, tmp_path: Path, card: str) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "README.md").write_text(f"---\n{card}---\n")
    hub.add(tmp_path / "texts", "somebody/texts")
    assert run("--dataset=somebody/texts").says("somebody/texts has no parquet to read", "README.md")


@pytest.mark.parametrize("fault", ["no token", "a wrong token", "not on the list", "no network"])
def test_a_hub_that_does_not_give_it(fault: str, run_anew: Run, hub: HubStandIn, folder: Path) -> None:
    """One line, whatever it is; and none of it matters any more once it is mended."""
    hub.repository.token, hub.repository.granted = "hf_right", fault != "not on the list"
    token = {"no token": "", "a wrong token": "hf_wrong"}.get(fault, "hf_right")
    if fault == "no network":
        hub.stop()
    outcome = run_anew(*SUBSET, HF_TOKEN=token)
    if fault == "no network":
        hub.start()
    assert outcome.says(dsire.LORA_WISE, "network", "HF_TOKEN", "HF_ENDPOINT")
    hub.repository.granted = True
    assert_right(run_anew(*SUBSET, HF_TOKEN="hf_right"), folder)


def test_offline(run_anew: Run, run: Run, hub: HubStandIn, folder: Path) -> None:
    """It is an error as long as nothing is known of the dataset, and none after a run."""
    assert run_anew(*SUBSET, HF_HUB_OFFLINE="1").says(dsire.LORA_WISE, "offline mode is enabled")
    run(*SUBSET)
    hub.requests.clear()
    assert_right(run_anew(*SUBSET, HF_HUB_OFFLINE="1"), folder)
    assert hub.requests == []


# ---------------------------------------------------------------------------------------------------------------------
# Models to predict


@pytest.fixture
def lora(hub: HubStandIn, tmp_path: Path) -> Path:
    """A repository user/lora, in the folder that is returned: a file in PEFT's layout, and what says its alpha."""
    folder = tmp_path / "on the hub"
    weights = {
        key.replace(".lora.down", ".lora_A").replace(".lora.up", ".lora_B"): torch.from_numpy(matrix)
        for key, matrix in weights_of(("thing_03", 4)).items()
    }
    for name in ("adapter_model", "sub/other"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / f"{name}.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
    torch.save(weights, folder / "lora.bin")
    hub.add(folder, "user/lora", kind="model")
    return folder


@pytest.mark.parametrize(
    ("item", "names"),
    [
        ("user/lora", ["user/lora:adapter_model.safetensors", "user/lora:sub/other.safetensors"]),
        ("https://huggingface.co/user/lora:lora.bin", ["user/lora:lora.bin"]),
        ("user/lora:adapter_model.safetensors", ["user/lora:adapter_model.safetensors"]),
        ("user/lora:lora.bin", ["user/lora:lora.bin"]),
    ],
)
def test_models_on_the_hub(item: str, names: list[str], run: Run, hub: HubStandIn, lora: Path, tmp_path: Path) -> None:
    """They are called as the user knows them; alpha is found beside them; a second run needs no network."""
    files, left_out = dsire.files_to_predict(item, tmp_path / "cache")
    assert (list(files), left_out) == (names, {})
    hub.stop()
    again, _ = dsire.files_to_predict(item, tmp_path / "cache")
    hub.start()
    assert again == files
    for file in files.values():
        stated = [note for note in dsire.file_spectra(file).notes if "alpha" in note]
        assert bool(stated) == (file.name == "other.safetensors")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("times", [1, None])
def test_a_model_that_is_damaged_on_its_way(
    name: str, times: int | None, run: Run, hub: HubStandIn, lora: Path, tmp_path: Path
) -> None:
    hub.faults.flip(f"*/{name}", times=times)
    if times:
        files, _ = dsire.files_to_predict("user/lora", tmp_path)
        its = files["user/lora:adapter_model.safetensors"].with_name(name)
        assert its.read_bytes() == (lora / name).read_bytes()
    else:
        assert run("--predict=user/lora").says(name, "user/lora", "damaged", "twice")
        hub.faults.clear()
        assert len(dsire.files_to_predict("user/lora", tmp_path / "cache")[0]) == 2


@pytest.mark.parametrize(
    ("item", "parts"),
    [
        ("user/lora:nothing.bin", ["user/lora has no nothing.bin"]),
        ("user/pickles", ["no safetensors", "user/name:file.bin"]),
        ("unknown/suspect_1", ["unknown/suspect_1: no such file or folder here", "Hub"]),
        ("unknown/suspect.safetensors", ["unknown/suspect.safetensors: no such file or folder"]),
    ],
)
def test_models_that_are_not_there(
    item: str, parts: list[str], run: Run, hub: HubStandIn, lora: Path, tmp_path: Path
) -> None:
    (tmp_path / "pickles").mkdir()
    (lora / "lora.bin").rename(tmp_path / "pickles" / "lora.bin")
    hub.add(tmp_path / "pickles", "user/pickles", kind="model")
    assert run(f"--predict={item}").says(*parts)

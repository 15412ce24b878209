"""The Hugging Face Hub: what is downloaded, kept and asked for again, on a good day and on a bad one."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import (
    Outcome,
    Run,
    command,
    models_of,
    parquet_files,
    reference_experiments,
    reference_spectra,
    table_of,
    write_folder,
)
from hub_stand_in import HubStandIn, Request
from huggingface_hub import HfFileSystem, constants

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
    assert "can't be reached" in third.out
    assert f"going on with commit {hub.commit[:12]}" in third.out


@pytest.mark.parametrize(("page_size", "pages"), [(1000, 1), (4, 2)])
def test_the_hub_is_asked_for_one_listing_the_card_and_the_shards(
    run: Run, hub: HubStandIn, folder: Path, page_size: int, pages: int
) -> None:
    """Six entries: README.md, two folders and three shards; in pages, as the Hub gives a long listing."""
    hub.page_size = page_size
    assert_right(run(*SUBSET), folder)
    about = f"/api/datasets/{dsire.LORA_WISE}"
    asked = [request.path for request in hub.requests if request.path.startswith("/api/")]
    assert asked == [about, *pages * [f"{about}/tree/{hub.commit}"]]
    fetched = Counter(Path(request.path).name for request in hub.requests if request.status == 200 and request.sent)
    assert {name: times for name, times in fetched.items() if "." in name} == {
        "README.md": 1,
        FIRST: 1,
        SECOND: 1,
        THIRD: 1,
    }


def test_the_shipped_subset_from_the_hub(run: Run, hub: HubStandIn, tiny_wise: Path) -> None:
    hub.add(tiny_wise, "somebody/tiny-wise")
    local = run()
    remote = run(*SUBSET, "--dataset=somebody/tiny-wise")
    assert (local.code, remote.code) == (0, 0), remote.err
    assert remote.predictions == local.predictions


def test_keep_shards(run: Run, hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    assert_right(run(*SUBSET, "--keep_shards"), folder)
    kept = parquet_files(tmp_path / "cache" / "downloads")
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


def test_a_connection_that_is_cut_resumes_where_it_was(
    run: Run, hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.faults.cut(f"/cdn/*{SECOND}", after=parquet_files(folder)[1].stat().st_size // 2)
    assert_right(run(*SUBSET), folder)
    whole, rest = [request for request in shard_requests(hub) if request.path.endswith(SECOND)]
    assert (whole.status, whole.first) == (200, 0)
    assert (rest.status, rest.first) == (206, whole.sent // 1000 * 1000)


def test_a_run_that_is_killed_goes_on_at_its_shard(run: Run, hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    hub.faults.stall(f"/cdn/*{SECOND}", seconds=60, after=1000)
    process = subprocess.Popen(command(tmp_path, *SUBSET), cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    done = tmp_path / "cache" / "spectra"
    while not (downloads(hub)[SECOND] and list(done.glob("*.safetensors"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert downloads(hub) == {FIRST: 1, SECOND: 1}

    assert_right(run(*SUBSET), folder)
    assert downloads(hub) == {FIRST: 1, SECOND: 2, THIRD: 1}
    assert left_in(tmp_path / "cache") == []  # nor what the killed run had of its shard


def test_a_shard_that_was_kept_and_truncated_is_fetched_anew(
    run: Run, hub: HubStandIn, folder: Path, tmp_path: Path
) -> None:
    run(*SUBSET, "--keep_shards")
    first, *_ = parquet_files(tmp_path / "cache" / "downloads")
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
    assert not [file for file in left_in(tmp_path / "cache") if SECOND in file.name]


def test_a_shard_that_is_no_parquet_on_the_hub_either(run: Run, hub: HubStandIn, folder: Path) -> None:
    parquet_files(folder)[1].write_bytes(b"not parquet")
    assert run(*SUBSET).says(SECOND, "parquet")


def test_a_hub_that_is_busy_is_asked_again(run: Run, hub: HubStandIn, folder: Path) -> None:
    hub.faults.status("/api/datasets/*", 503)
    hub.faults.status(f"/cdn/*{SECOND}", 500)
    outcome = run(*SUBSET)
    assert_right(outcome, folder)
    assert all(line.endswith("; asking again") for line in outcome.err.splitlines())
    assert "HTTP 503" in outcome.err


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


def test_no_such_revision(run: Run, hub: HubStandIn) -> None:
    assert run(*SUBSET, "--revision=v7").says("--revision", "v7", dsire.LORA_WISE)


def test_no_such_subset(run: Run, hub: HubStandIn) -> None:
    assert run("--subset=low_64").says("--subset=low_64", dsire.LORA_WISE, "low_4")


@pytest.mark.parametrize("card", ["configs:\n- config_name: a\n  data_files: x.csv\n", "license: mit\n"])
def test_a_dataset_without_parquet(run: Run, hub: HubStandIn, tmp_path: Path, card: str) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "README.md").write_text(f"---\n{card}---\n")
    hub.add(tmp_path / "texts", "somebody/texts")
    assert run("--dataset=somebody/texts").says("somebody/texts has no parquet to read", "README.md")


def test_no_such_repository(run: Run, hub: HubStandIn) -> None:
    assert run(*SUBSET, "--dataset=nobody/nothing").says("nobody/nothing", hub.endpoint, "HF_TOKEN")


def test_gated_without_token_and_with_it(
    run: Run, hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repository.token = "hf_right"
    assert run(*SUBSET).says(dsire.LORA_WISE, "gated", "HF_TOKEN")
    HfFileSystem.clear_instance_cache()
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert_right(run(*SUBSET), folder)


def test_gated_and_not_on_the_list(run: Run, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repository.token, hub.repository.granted = "hf_right", False
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert run(*SUBSET).says(dsire.LORA_WISE, "access")


def test_a_wrong_token(run: Run, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repository.token = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert run(*SUBSET).says(dsire.LORA_WISE, "HF_TOKEN")


def test_no_network(run_anew: Run, hub: HubStandIn) -> None:
    hub.stop()
    outcome = run_anew(*SUBSET)
    hub.start()
    assert outcome.says(dsire.LORA_WISE, hub.endpoint, "network", "HF_ENDPOINT")


def test_offline(run_anew: Run, run: Run, hub: HubStandIn, folder: Path) -> None:
    """HF_HUB_OFFLINE is an error as long as nothing is known of the dataset, and none after a run."""
    assert run_anew(*SUBSET, HF_HUB_OFFLINE="1").says(dsire.LORA_WISE, "HF_HUB_OFFLINE")
    run(*SUBSET)
    hub.requests.clear()
    assert_right(run_anew(*SUBSET, HF_HUB_OFFLINE="1"), folder)
    assert hub.requests == []

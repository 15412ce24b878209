"""Kills, Ctrl-C, full disks, spoilt caches and a Hub that fails: the command ends well, and the next run is right."""

import errno
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import (
    BOMB,
    FIRST,
    ROOT,
    SECOND,
    THIRD,
    Outcome,
    Run,
    command,
    fetched,
    parquet_files,
    wait_for_threads,
    write_three,
)
from hub_stand_in import HubStandIn
from huggingface_hub import constants, file_download
from lora_writers import within

import dsire

QUICK = ("--subset=low_4", "--experiments=3")
OVER_HUB = (f"--dataset={dsire.LORA_WISE}", *QUICK)


# The command in forks of a process that has imported everything: a run starts at once, and stops where a test says
class Stop(NamedTuple):
    """Where a run stops itself (SIGSTOP): at the `number`th call of a function whose arguments contain a text."""

    function: str
    text: str = ""
    number: int = 1
    after: bool = False


def serve() -> None:
    """Answer orders on stdin: fork a run of the command, or wait until a run stops or ends."""
    import importlib
    import itertools
    import json
    import os
    import pydoc
    import signal
    import sys

    import dsire

    heavy = ["datasets", "filelock", "huggingface_hub.hf_api", "pyarrow.parquet", "safetensors.torch", "tqdm"]
    for name in [*heavy, "sklearn.metrics"]:
        importlib.import_module(name)

    def told(argument: object) -> str:
        link = f"/proc/self/fd/{argument}"  # os.fsync has the number of a file
        return os.readlink(link) if isinstance(argument, int) and os.path.islink(link) else str(argument)

    def stop_at(function: str, text: str, number: int, after: bool) -> None:
        owner, _, name = function.rpartition(".")
        place = pydoc.locate(owner)
        original, calls = getattr(place, name), itertools.count(1)

        def stopping(*arguments, **options):  # type: ignore[no-untyped-def]
            here = text in " ".join(map(told, arguments)) and next(calls) == number
            if here and not after:
                os.kill(os.getpid(), signal.SIGSTOP)
            answer = original(*arguments, **options)
            if here and after:
                os.kill(os.getpid(), signal.SIGSTOP)
            return answer

        setattr(place, name, stopping)

    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], os.WUNTRACED)
            print(json.dumps("stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)), flush=True)
            continue
        child = os.fork()
        if child == 0:
            for number, name in enumerate(("out", "err"), start=1):
                os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT), number)
            os.chdir(order["folder"])
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.alarm(60)  # a run that hangs is ended
            dsire.torch.set_num_threads(1)
            if order["stop"]:
                stop_at(*order["stop"])
            sys.argv = order["command"]
            os._exit(dsire.main())  # as the script does
        print(json.dumps(child), flush=True)


class Started:
    """A run of the command that is under way in a folder."""

    def __init__(self, ask: Callable[..., Any], folder: Path, *arguments: Any, stop: Stop | None = None) -> None:
        self.folder, number = folder, len([*folder.glob("out-*")])
        self.out, self.err = folder / f"out-{number}", folder / f"err-{number}"
        files = {"out": str(self.out), "err": str(self.err), "folder": str(folder)}
        self.process = ask(command=command(folder, *arguments)[1:], stop=stop, **files)
        self.wait = partial(ask, wait=self.process)
        if stop:
            assert self.wait() == "stopped", self.err.read_text()

    def send(self, *signals: int) -> "Started":
        for number in signals:
            os.kill(self.process, number)
        return self

    def outcome(self) -> Outcome:
        """What came of it, once it has ended."""
        code = self.wait()
        return Outcome(code, self.out.read_text(), self.err.read_text(), self.folder / "output")


Start = Callable[..., Started]


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., Any]]:
    """Give an order to a process that runs `serve`."""
    code = f"from __future__ import annotations\n{inspect.getsource(serve)}\nserve()"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)

    def answer(**order: Any) -> Any:
        print(json.dumps(order), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    yield answer
    process.kill()
    process.wait()


@pytest.fixture
def start(ask: Callable[..., Any], tmp_path: Path) -> Start:
    return partial(Started, ask, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(ask: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    place = tmp_path_factory.mktemp("undisturbed")
    return Started(ask, place, f"--dataset={write_three(place / 'wise')}", *QUICK).outcome()


def assert_same(outcome: Outcome, other: Outcome) -> None:
    assert outcome.code == 0, outcome.err
    for part in ("experiments", "tables", "notes"):
        assert outcome.report[part] == other.report[part]
    assert outcome.predictions == other.predictions


def spectra_files(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of spectra in the cache, all of which can be read: name -> inode and time."""
    files = sorted((folder / "cache" / "spectra").glob("*.safetensors"))
    for path in files:
        dsire.read_spectra(path)
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


# Kills and Ctrl-C
ENDS = [  # where: what the dataset is, the place, and how many shards' spectra are on the disk then
    ("folder", Stop("datasets.load_dataset_builder"), 0),
    ("folder", Stop("dsire.lora_spectra", number=2), 0),
    ("folder", Stop("pathlib.Path.replace", FIRST, after=True), 1),
    ("folder", Stop("os.fsync", THIRD), 2),
    ("folder", Stop("dsire.metrics", number=2), 3),
    ("folder", Stop("pathlib.Path.replace", "predictions.csv", after=True), 3),
    ("Hub", Stop("huggingface_hub.HfApi.repo_info"), 0),
    ("Hub", Stop("os.fsync", "/sources/"), 0),
    ("Hub", Stop("huggingface_hub.HfApi.hf_hub_download", FIRST, after=True), 0),
    ("Hub", Stop("os.fsync", SECOND), 1),
    ("Hub", Stop("pathlib.Path.unlink", f"{SECOND}.parquet"), 2),
]


def assert_stopped(outcome: Outcome) -> None:
    assert outcome.code == 130, outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("dsire.py: stopped"), outcome.err
    assert "run it again" in outcome.err


@pytest.mark.parametrize(
    ("how", "where", "stop", "done"),
    [*(("killed", *end) for end in ENDS), *(("interrupted", *end) for end in ENDS[1:7:2])],
)
def test_a_run_that_was_ended_is_gone_on_with(
    how: str, where: str, stop: Stop, done: int, start: Start, hub: HubStandIn, tmp_path: Path, undisturbed: Outcome
) -> None:
    """The same report, what is on the disk is neither fetched nor computed again, and no half file is left there."""
    arguments = OVER_HUB if where == "Hub" else (f"--dataset={tmp_path / 'wise'}", *QUICK)
    run = start(*arguments, stop=stop)
    if how == "killed":
        assert run.send(signal.SIGKILL).wait() == -signal.SIGKILL
        assert abs(len(spectra_files(tmp_path)) - done) <= 1  # two are in hand: the other one may be faster
    else:
        assert_stopped(run.send(signal.SIGINT, signal.SIGCONT).outcome())
    kept = spectra_files(tmp_path)
    hub.requests.clear()
    assert_same(start(*arguments).outcome(), undisturbed)
    assert len(spectra_files(tmp_path)) == 3
    assert kept.items() <= spectra_files(tmp_path).items()
    assert not list((tmp_path / "cache" / "spectra").glob("*.half"))
    there = {name[: len(FIRST)] for name in kept}
    assert not there & set(fetched(hub))
    assert len(fetched(hub)) == len(set(fetched(hub)))


def test_interrupted_while_the_hub_stalls(start: Start, hub: HubStandIn, tmp_path: Path) -> None:
    hub.fails("stall", f"/cdn/*{SECOND}*", 60)
    run, deadline = start(*OVER_HUB), time.monotonic() + 30
    while not (SECOND in fetched(hub) and spectra_files(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    with within(30):
        assert_stopped(run.send(signal.SIGINT).outcome())


# Two runs at once
def test_two_runs_at_once(start: Start, hub: HubStandIn, undisturbed: Outcome) -> None:
    for run in [start(*OVER_HUB), start(*OVER_HUB)]:
        assert_same(run.outcome(), undisturbed)
    assert fetched(hub) == [FIRST, SECOND, THIRD]


@pytest.mark.parametrize("fate", [signal.SIGCONT, signal.SIGKILL])
def test_a_run_waits(fate: signal.Signals, start: Start, folder: Path, tmp_path: Path, undisturbed: Outcome) -> None:
    """It computes what the other one has not when that goes on, or takes over when it is killed."""
    arguments = (f"--dataset={folder}", *QUICK)
    first = start(*arguments, stop=Stop("dsire.shard_spectra", SECOND))
    second = start(*arguments)
    time.sleep(1)
    kept = spectra_files(tmp_path)
    first.send(fate)
    assert_same(second.outcome(), undisturbed)
    assert second.err.read_text() == ""
    assert (len(kept) < 3, len(spectra_files(tmp_path))) == (True, 3)
    assert kept.items() <= spectra_files(tmp_path).items()
    if fate == signal.SIGCONT:
        assert_same(first.outcome(), undisturbed)


# The disk
@pytest.mark.parametrize(("name", "done"), [(SECOND, 1), ("report.json", 3), ("predictions.csv", 3), ("blobs", 0)])
def test_no_space_for(name: str, done: int, run: Run, hub: HubStandIn, tmp_path: Path) -> None:
    to_disk, full = os.fsync, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    arguments = OVER_HUB if name == "blobs" else (f"--dataset={tmp_path / 'wise'}", *QUICK)

    def fsync(number: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{number}"):
            raise full
        to_disk(number)

    def http_get(*_: Any, **options: Any) -> None:
        raise full

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        if name == "blobs":
            patched.setattr(file_download, "http_get", http_get)
        outcome = run(*arguments)
    assert outcome.says(dsire.LORA_WISE if name == "blobs" else name, "No space left", str(tmp_path))
    wait_for_threads(20)
    assert not list(tmp_path.rglob("*.half"))
    assert name not in outcome.written
    kept = spectra_files(tmp_path)
    assert abs(len(kept) - done) <= 1
    assert run(*arguments).code == 0
    assert kept.items() <= spectra_files(tmp_path).items()


# A cache of something else
def turn_a_bit(content: bytes) -> bytes:
    place = content.index(b"}}") + 99  # a number, behind the header
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda content: b"",
    "truncated": lambda content: content[:-100],
    "a bit of a number": turn_a_bit,
    "a name": lambda content: content.replace(b"thing_03", b"thing_04"),
    "another format": lambda content: content.replace(b'format\\": ', b'format\\":9'),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_spoilt(spoil: Callable[[bytes], bytes], run: Run, folder: Path, tmp_path: Path, undisturbed: Outcome) -> None:
    assert run(f"--dataset={folder}", *QUICK).code == 0
    for file in sorted((tmp_path / "cache" / "spectra").glob("*.safetensors"))[:2]:
        assert spoil(file.read_bytes()) != file.read_bytes()
        file.write_bytes(spoil(file.read_bytes()))
    assert_same(run(f"--dataset={folder}", *QUICK), undisturbed)
    assert len(spectra_files(tmp_path)) == 3


@pytest.mark.parametrize("change", ["rank", "time", "place"])
def test_spectra_of_something_else_are_not_used(change: str, run: Run, folder: Path, tmp_path: Path) -> None:
    assert run(f"--dataset={folder}", *QUICK).code == 0
    for file in parquet_files(folder) if change == "time" else ():
        os.utime(file, (1, 1))
    folder = folder.rename(tmp_path / "elsewhere") if change == "place" else folder
    assert run(f"--dataset={folder}", *QUICK, f"--rank={2 if change == 'rank' else 4}").code == 0
    assert len(spectra_files(tmp_path)) == 6


def edited(**changes: Any) -> Callable[[str], str]:
    def edit(text: str) -> str:
        content = json.loads(text)
        return json.dumps({**content, "source": {**content["source"], **changes}})

    return edit


@pytest.mark.parametrize(
    "spoil",
    [
        *(lambda text, other=other: other for other in ("", "[]", '{"source": 3}', "\0\xff", "[" * 10**5)),
        lambda text: text[: len(text) // 2],
        *(edited(shards=[]), edited(shards=3), edited(commit=None), edited(notes="no list"), edited(more=1)),
    ],
)
def test_listings(spoil: Callable[[str], str], run: Run, hub: HubStandIn, tmp_path: Path, undisturbed: Outcome) -> None:
    assert run(*OVER_HUB).code == 0
    (listing,) = (tmp_path / "cache" / "sources").glob("*.json")
    listing.write_text(spoil(listing.read_text()), encoding="latin-1")
    assert_same(run(*OVER_HUB), undisturbed)
    assert fetched(hub) == [FIRST, SECOND, THIRD]


# The Hub
@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nothing sleeps any more; how long it would have."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


LISTING, README = f"/api/datasets/{dsire.LORA_WISE}*", "*/resolve/*/README.md"
WAY_TO_SHARD, SHARD = f"*/resolve/*{SECOND}*", f"/cdn/*{SECOND}*"


@pytest.mark.parametrize(
    "fault",
    [
        *(("status", *fault, 2) for fault in [(README, 429), (WAY_TO_SHARD, 500), (SHARD, 429)]),
        *(("status", *fault, None) for fault in [(LISTING, 500), (README, 404), (WAY_TO_SHARD, 418), (SHARD, 504)]),
        *(("stall", *fault) for fault in [(SHARD, 60, 1), (SHARD, 60, None), (LISTING, 60, None)]),
    ],
)
def test_a_hub_that_fails(fault: Any, run: Run, hub: HubStandIn, naps: list[float], undisturbed: Outcome) -> None:
    """Once or twice, it is asked again, by huggingface_hub; for ever, it ends in minutes at most, in one line."""
    hub.fails(*fault)
    with within(60), pytest.MonkeyPatch.context() as patched:
        patched.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
        patched.setattr(dsire, "PATIENCE", 1)
        outcome = run(*OVER_HUB)
    if fault[-1]:
        assert_same(outcome, undisturbed)
    else:
        assert sum(naps) < 300
        last = outcome.err.splitlines(keepends=True)[-1]  # after huggingface_hub's own words
        assert replace(outcome, err=last).says(dsire.LORA_WISE, "network", "HF_TOKEN", "HF_ENDPOINT")


@pytest.mark.parametrize("place", [LISTING, README, SHARD])
def test_what_was_found_before_is_used_whatever_fails(
    place: str, run: Run, hub: HubStandIn, folder: Path, naps: list[float], undisturbed: Outcome
) -> None:
    assert_same(run(*OVER_HUB), undisturbed)
    hub.requests.clear()
    assert_same(run(*OVER_HUB), undisturbed)
    assert len(hub.requests) == 1
    commit = hub.commit
    (folder / "README.md").write_text((folder / "README.md").read_text() + "A dataset.\n")
    hub.fails("status", place, 503, times=None)
    outcome = run(*OVER_HUB)
    assert outcome.predictions == undisturbed.predictions
    said = [note for note in outcome.report["notes"] if f"going on with commit {commit[:12]}" in note]
    assert len(said) == (place != SHARD)


ONE_CONFIG = "configs:\n- {{config_name: low_4, data_files: {}}}"


@pytest.mark.parametrize("where", ["folder", "Hub"])
@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("configs: [", "README.md"),
        ("\0", "README.md"),
        ("configs: 3", "README.md"),
        (f"{BOMB}{ONE_CONFIG.format('*a11')}", "alias"),
        (ONE_CONFIG.format("!!str &x low/4/*"), "alias"),
        (ONE_CONFIG.format("low/4/other-*"), "parquet"),
        (ONE_CONFIG.format("low/4/train-00007-of-00003.parquet"), "parquet"),
        (ONE_CONFIG.format("ABOVE/*.parquet"), "outside"),
        (ONE_CONFIG.format("../../../../**/*.parquet"), "outside"),
        (ONE_CONFIG.format("/**/*.parquet"), "outside"),
        (ONE_CONFIG.format("https://elsewhere/a.parquet"), "outside"),
    ],
    ids=["open", "zero", "number", "bomb", "anchor", "other", "missing", "above", "up", "root", "elsewhere"],
)
def test_a_readme_that_cannot_be_right(
    header: str, reason: str, where: str, run: Run, hub: HubStandIn, folder: Path, naps: list[float]
) -> None:
    private = folder.parent / "private"
    private.mkdir()
    (private / "secret.parquet").write_bytes(parquet_files(folder)[0].read_bytes())
    header = header.replace("ABOVE", "../" * 12 + str(private).lstrip("/"))
    (folder / "README.md").write_text(f"---\n{header}\n---\n")
    dataset = folder if where == "folder" else dsire.LORA_WISE
    with within(20):
        outcome = run(f"--dataset={dataset}", "--rank=4")
    assert outcome.says(str(dataset), reason)
    assert f"{tempfile.gettempdir()}/tmp" not in outcome.err  # nor is a path told that the user doesn't know


@pytest.mark.parametrize("name", ["/evil/train.parquet", "low/../../evil.parquet", "..\\evil.parquet"])
def test_a_listing_of_paths_out_of_the_repository(name: str, run: Run, hub: HubStandIn, tmp_path: Path) -> None:
    listed = hub.repository.files()
    odd = {**listed, name.replace("/evil", str(tmp_path / "evil")): b""}
    hub.repository.files = lambda: odd  # type: ignore[method-assign]
    assert run(*OVER_HUB).says(dsire.LORA_WISE, "out of it")
    assert not (tmp_path / "evil").exists()

"""Kills, Ctrl-C, full disks, spoilt caches and a Hub that fails: the command ends well, and the next run is right."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, Outcome, Run, command, models_of, parquet_files, table_of, write_folder
from hub_stand_in import HubStandIn
from huggingface_hub import HfFileSystem, constants
from lora_writers import within, write_model
from safetensors import safe_open

import dsire

QUICK = ("--subset=low_4", "--experiments=3")
OVER_HUB = (f"--dataset={dsire.LORA_WISE}", *QUICK)
FIRST, SECOND, THIRD = (f"train-0000{number}-of-00003" for number in range(3))

# ---------------------------------------------------------------------------------------------------------------------
# The command in forks of a process that has imported everything: a run starts at once, and stops where a test says


class Stop(NamedTuple):
    """Where a run stops itself (SIGSTOP): at the `number`th call of a function whose arguments contain a text."""

    function: str
    text: str = ""
    number: int = 1
    after: bool = False


def serve() -> None:
    """Answer orders on stdin: fork a run of the command, or wait until a run stops or ends."""
    import gc
    import importlib
    import itertools
    import json
    import os
    import pydoc
    import signal
    import sys

    import dsire

    for name in ("datasets", "filelock", "huggingface_hub.hf_api", "pyarrow.parquet", "safetensors.torch"):
        importlib.import_module(name)
    for name in ("huggingface_hub.hf_file_system", "sklearn.metrics", "torch.distributed", "tqdm"):
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

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], os.WUNTRACED)
            print(json.dumps("stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)), flush=True)
            continue
        child = os.fork()
        if child == 0:
            for number, file in ((1, order["out"]), (2, order["err"])):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.chdir(order["folder"])
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.alarm(60)  # a run that hangs is ended
            dsire.torch.set_num_threads(1)
            if order["stop"]:
                stop_at(*order["stop"])
            sys.argv = order["command"]
            code = dsire.main()
            gc.freeze()  # as the script does
            sys.stdout.flush()
            (sys.exit if code == 130 else os._exit)(code)  # what is left to do at the exit matters after Ctrl-C only
        print(json.dumps(child), flush=True)


class Server:
    """The process that runs `serve`."""

    def __init__(self) -> None:
        code = f"from __future__ import annotations\n{inspect.getsource(serve)}\nserve()"
        path = {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.answer() == "ready"

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, **order: Any) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self.answer()


class Started:
    """A run of the command that is under way."""

    def __init__(self, server: Server, folder: Path, number: int, arguments: list[str], stop: Stop | None) -> None:
        self.server, self.folder = server, folder
        self.out, self.err = folder / f"out-{number}", folder / f"err-{number}"
        self.err.touch()
        files = {"out": str(self.out), "err": str(self.err), "folder": str(folder)}
        self.process = server.ask(command=arguments, stop=stop, **files)
        if stop:
            assert self.wait() == "stopped", self.err.read_text()

    def wait(self) -> Any:
        return self.server.ask(wait=self.process)

    def send(self, *signals: int) -> Started:
        for number in signals:
            os.kill(self.process, number)
        return self

    def kill(self) -> None:
        assert self.send(signal.SIGKILL).wait() in (-signal.SIGKILL, 0)

    def outcome(self) -> Outcome:
        """What came of it, once it has ended."""
        code = self.wait()
        return Outcome(code, self.out.read_text(), self.err.read_text(), self.folder / "output")


Start = Callable[..., Started]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture
def start(server: Server, tmp_path: Path) -> Start:
    """Start the command in `tmp_path`, and perhaps stop it somewhere."""
    count = 0

    def started(*arguments: Any, stop: Stop | None = None, folder: Path = tmp_path) -> Started:
        nonlocal count
        count += 1
        return Started(server, folder, count, command(folder, *arguments)[1:], stop)

    return started


@pytest.fixture(scope="module")
def wise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 micro-datasets of 6 sizes in three shards, as in `folder`."""
    models = models_of(20)
    shards = [table_of(models[start : start + 40]) for start in (0, 40, 80)]
    return write_folder(tmp_path_factory.mktemp("faults") / "wise", shards)


@pytest.fixture(scope="module")
def undisturbed(server: Server, wise: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("undisturbed")
    return Started(server, folder, 0, command(folder, f"--dataset={wise}", *QUICK)[1:], None).outcome()


def assert_same(outcome: Outcome, other: Outcome) -> None:
    """Both went well, with the same figures to the last digit."""
    assert outcome.code == 0, outcome.err
    for part in ("experiments", "mean", "std", "notes"):
        assert outcome.report[part] == other.report[part]
    assert outcome.predictions == other.predictions


def spectra_files(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of spectra in the cache, all of which can be read: name -> inode and time."""
    files = sorted((folder / "cache" / "spectra").glob("*.safetensors"))
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.get_tensor("spectra").isfinite().all()
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def assert_goes_on(start: Start, folder: Path, arguments: tuple[str, ...], undisturbed: Outcome) -> None:
    """After a kill: the same report, what was on the disk is not computed again, and no half file is left there."""
    kept = spectra_files(folder)
    assert_same(start(*arguments).outcome(), undisturbed)
    after = spectra_files(folder)
    assert len(after) == 3
    assert kept.items() <= after.items()
    assert not list((folder / "cache" / "spectra").glob("*.half"))


def wait_until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Kills

# where, and how many shards' spectra are on the disk then
PHASES: dict[str, tuple[Stop, int]] = {
    "finding the files": (Stop("datasets.load_dataset_builder"), 0),
    "decoding the first shard": (Stop("dsire.shard_spectra", FIRST), 0),
    "spectra of the first shard": (Stop("dsire.lora_spectra", number=2), 0),
    "writing the first shard's spectra": (Stop("os.fsync", FIRST), 0),
    "before the first shard's spectra get their name": (Stop("pathlib.Path.replace", FIRST), 0),
    "after the first shard's spectra got their name": (Stop("pathlib.Path.replace", FIRST, after=True), 1),
    "decoding the second shard": (Stop("dsire.shard_spectra", SECOND), 1),
    "spectra of the last shard": (Stop("dsire.lora_spectra", number=9), 2),
    "writing the last shard's spectra": (Stop("os.fsync", THIRD), 2),
    "after the last shard's spectra got their name": (Stop("pathlib.Path.replace", THIRD, after=True), 3),
    "evaluation": (Stop("dsire.metrics", number=2), 3),
    "writing the report": (Stop("os.fsync", "report.json"), 3),
    "between the report and its table": (Stop("pathlib.Path.replace", "report.json", after=True), 3),
}


@pytest.mark.parametrize("phase", PHASES)
def test_killed_while(phase: str, start: Start, wise: Path, tmp_path: Path, undisturbed: Outcome) -> None:
    arguments = (f"--dataset={wise}", *QUICK)
    stop, done = PHASES[phase]
    start(*arguments, stop=stop).kill()
    assert len(spectra_files(tmp_path)) == done
    assert_goes_on(start, tmp_path, arguments, undisturbed)


def test_killed_again_and_again(start: Start, wise: Path, tmp_path: Path, undisturbed: Outcome) -> None:
    """Each run gets a shard further and dies before the next one has its name."""
    arguments = (f"--dataset={wise}", *QUICK)
    for done, shard in enumerate((FIRST, SECOND, THIRD)):
        start(*arguments, stop=Stop("pathlib.Path.replace", shard)).kill()
        assert len(spectra_files(tmp_path)) == done
    assert_goes_on(start, tmp_path, arguments, undisturbed)


DOWNLOAD = f"--LoRA-WiSE/low/4/{SECOND}.parquet"
HUB_PHASES: dict[str, tuple[Stop, int]] = {
    "asking for the commit": (Stop("huggingface_hub.HfApi.dataset_info"), 0),
    "finding the files": (Stop("datasets.load_dataset_builder"), 0),
    "writing what was found": (Stop("os.fsync", "/sources/"), 0),
    "renaming what was found": (Stop("pathlib.Path.replace", "/sources/"), 0),
    "fetching the first shard": (Stop("huggingface_hub.HfApi.hf_hub_download", FIRST), 0),
    "checking the first shard": (Stop("huggingface_hub.HfApi.hf_hub_download", FIRST, after=True), 0),
    "decoding the first shard": (Stop("dsire.shard_spectra", FIRST), 0),
    "writing the second shard's spectra": (Stop("os.fsync", SECOND), 1),
    "before the second shard is deleted": (Stop("pathlib.Path.unlink", DOWNLOAD, 2), 2),
    "after the second shard was deleted": (Stop("pathlib.Path.unlink", DOWNLOAD, 2, after=True), 2),
}


def fetched(hub: HubStandIn) -> list[str]:
    """The shards whose content was asked for, in the order of their names."""
    paths = [request.path for request in hub.requests if request.method == "GET" and "/cdn/" in request.path]
    return sorted(Path(path).stem for path in paths)


def assert_goes_on_from_the_hub(start: Start, hub: HubStandIn, folder: Path, undisturbed: Outcome) -> None:
    """The same, and no shard is fetched whose spectra are on the disk; nothing is left of the downloads."""
    done = {name[: len(FIRST)] for name in spectra_files(folder)}
    hub.requests.clear()
    assert_goes_on(start, folder, OVER_HUB, undisturbed)
    assert not done & set(fetched(hub))
    assert len(fetched(hub)) == len(set(fetched(hub)))


@pytest.mark.parametrize("phase", HUB_PHASES)
def test_killed_over_the_hub_while(
    phase: str, start: Start, hub: HubStandIn, tmp_path: Path, undisturbed: Outcome
) -> None:
    stop, done = HUB_PHASES[phase]
    start(*OVER_HUB, stop=stop).kill()
    assert len(spectra_files(tmp_path)) == done
    assert_goes_on_from_the_hub(start, hub, tmp_path, undisturbed)


# ---------------------------------------------------------------------------------------------------------------------
# Two runs at once


def test_two_runs_at_once(start: Start, hub: HubStandIn, tmp_path: Path, undisturbed: Outcome) -> None:
    """Both are right, and each shard is fetched once, so it is computed once: its spectra go with the download."""
    both = [start(*OVER_HUB), start(*OVER_HUB)]
    for run in both:
        assert_same(run.outcome(), undisturbed)
    assert fetched(hub) == [FIRST, SECOND, THIRD]


@pytest.mark.parametrize("fate", [signal.SIGCONT, signal.SIGKILL])
def test_a_run_waits_for_another_one(
    fate: signal.Signals, start: Start, wise: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    """It says so, and computes what the other one has not when that goes on, or takes over when it is killed."""
    arguments = (f"--dataset={wise}", *QUICK)
    first = start(*arguments, stop=Stop("dsire.shard_spectra", SECOND))
    second = start(*arguments)
    wait_until(second.err.read_text)
    kept = spectra_files(tmp_path)
    first.send(fate)
    assert_same(second.outcome(), undisturbed)
    assert second.err.read_text() == f"waiting for another run, which is at {SECOND}.parquet\n"
    assert (len(kept), len(spectra_files(tmp_path))) == (1, 3)
    assert kept.items() <= spectra_files(tmp_path).items()
    if fate == signal.SIGCONT:
        assert_same(first.outcome(), undisturbed)


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C


def assert_stopped(outcome: Outcome, *parts: str) -> None:
    """Exit code 130 and one line that says how far the run came, and that the same command goes on."""
    assert outcome.code == 130, outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("dsire.py: stopped"), outcome.err
    for part in ("run it again", *parts):
        assert part in outcome.err


@pytest.mark.parametrize(
    ("stop", "done"),
    [
        (Stop("dsire.shard_spectra", FIRST), 0),
        (Stop("dsire.lora_spectra", number=5), 1),
        (Stop("os.fsync", THIRD), 2),
        (Stop("dsire.metrics", number=2), 3),
        (Stop("os.fsync", "report.json"), 3),
    ],
    ids=str,
)
def test_interrupted(stop: Stop, done: int, start: Start, wise: Path, tmp_path: Path, undisturbed: Outcome) -> None:
    arguments = (f"--dataset={wise}", *QUICK)
    outcome = start(*arguments, stop=stop).send(signal.SIGINT, signal.SIGCONT).outcome()
    assert_stopped(outcome, f"{done} of 3 shards")
    assert not list(tmp_path.rglob("*.half"))
    assert_goes_on(start, tmp_path, arguments, undisturbed)


def test_interrupted_while_the_hub_stalls(start: Start, hub: HubStandIn, tmp_path: Path) -> None:
    """The download is not waited for."""
    hub.faults.stall(f"/cdn/*{SECOND}*", seconds=60, after=1000)
    run = start(*OVER_HUB)
    wait_until(lambda: SECOND in fetched(hub) and spectra_files(tmp_path))
    time.sleep(0.3)  # all that is left of the first shard is to count it
    begin = time.monotonic()
    assert_stopped(run.send(signal.SIGINT).outcome(), "1 of 3 shards")
    assert time.monotonic() - begin < 30


def test_interrupted_on_a_folder_of_lora_files(start: Start, tmp_path: Path) -> None:
    for name, size in models_of(2):
        write_model(
            tmp_path / "loras" / f"{name}-{size}.safetensors",
            (name, size),
            {"ss_num_train_images": str(size), "ss_num_repeats": "1"},
        )
    arguments = (f"--dataset={tmp_path / 'loras'}", "--train_size=1", "--experiments=1")
    run = start(*arguments, stop=Stop("dsire.save_spectra", number=5))
    assert_stopped(run.send(signal.SIGINT, signal.SIGCONT).outcome(), "of 12 files")


# ---------------------------------------------------------------------------------------------------------------------
# The disk


def no_space(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No file whose path contains this can be brought to the disk."""
    to_disk = os.fsync

    def fsync(number: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        to_disk(number)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    ("name", "done"), [("sources", 0), (SECOND, 1), ("report.json", 3), ("predictions.csv", 3), ("confusion.png", 3)]
)
def test_no_space_for(
    name: str, done: int, run: Run, wise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plots = ["--plots"] if name.endswith(".png") else []
    with monkeypatch.context() as patched:
        no_space(patched, name)
        outcome = run(f"--dataset={wise}", *QUICK, *plots)
        assert outcome.says(name, "No space left", str(tmp_path), "nothing that was computed is lost")
    assert not list(tmp_path.rglob("*.half"))
    assert name not in outcome.written
    kept = spectra_files(tmp_path)
    assert len(kept) == done
    assert run(f"--dataset={wise}", *QUICK).code == 0
    assert kept.items() <= spectra_files(tmp_path).items()


def test_no_space_for_estimates(run: Run, wise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_model(tmp_path / "new.safetensors", ("new", 2))
    no_space(monkeypatch, "estimates.csv")
    assert run(f"--dataset={wise}", *QUICK, "--predict", file).says("estimates.csv", "No space left")


def test_no_space_keeps_the_report_that_was_there(run: Run, wise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run(f"--dataset={wise}", *QUICK)
    no_space(monkeypatch, "report.json")
    after = run(f"--dataset={wise}", *QUICK, "--seed=1")
    assert after.says("report.json")
    assert after.report == before.report


def mount(place: Path, *options: str) -> None:
    try:
        made = subprocess.run(["mount", *options, "tmpfs", str(place)], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if made.returncode:
        pytest.skip(f"no right to mount: {made.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own at the cache's place, of 28 KiB: that is enough for one shard's spectra of three."""
    place = tmp_path / "cache"
    place.mkdir()
    mount(place, "-t", "tmpfs", "-o", "size=28k")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk(run: Run, wise: Path, disk: Path, tmp_path: Path, undisturbed: Outcome) -> None:
    assert run(f"--dataset={wise}", *QUICK).says(str(disk), "No space left")
    kept = spectra_files(tmp_path)
    assert len(kept) == 1
    assert not list(disk.rglob("*.half"))
    mount(disk, "-o", "remount,size=1m")
    assert_same(run(f"--dataset={wise}", *QUICK), undisturbed)
    assert kept.items() <= spectra_files(tmp_path).items()


def test_a_disk_too_small_for_a_download(
    run: Run, hub: HubStandIn, disk: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    assert run(*OVER_HUB).says(str(disk), "No space left")
    mount(disk, "-o", "remount,size=10m")
    assert_same(run(*OVER_HUB), undisturbed)
    assert [path.name for path in disk.rglob("*") if path.suffix in (".parquet", ".incomplete")] == []


def test_a_full_disk_for_the_report(run: Run, wise: Path, tmp_path: Path, undisturbed: Outcome) -> None:
    output = tmp_path / "output"
    output.mkdir()
    mount(output, "-t", "tmpfs", "-o", "size=4k")
    try:
        outcome = run(f"--dataset={wise}", *QUICK)
        assert outcome.says(str(output), "No space left")
        assert list(outcome.written) == ["predictions.csv"]
    finally:
        subprocess.run(["umount", "--lazy", str(output)], check=True)
    assert_same(run(f"--dataset={wise}", *QUICK), undisturbed)


def test_a_read_only_cache(run: Run, wise: Path, disk: Path, tmp_path: Path, undisturbed: Outcome) -> None:
    """What is in it is used; what isn't can't be written, which is one line."""
    mount(disk, "-o", "remount,size=1m")
    assert_same(run(f"--dataset={wise}", *QUICK), undisturbed)
    mount(disk, "-o", "remount,ro")
    assert_same(run(f"--dataset={wise}", *QUICK), undisturbed)
    mount(disk, "-o", "remount,rw")
    next(disk.rglob(f"{SECOND}*.safetensors")).unlink()
    for lock in disk.rglob("*.lock"):
        lock.unlink()
    mount(disk, "-o", "remount,ro")
    assert run(f"--dataset={wise}", *QUICK).says(str(disk), "Read-only file system")


def test_an_empty_cache_that_is_read_only(run: Run, wise: Path, disk: Path) -> None:
    mount(disk, "-o", "remount,ro")
    assert run(f"--dataset={wise}", *QUICK).says(str(disk), "Read-only file system")


# ---------------------------------------------------------------------------------------------------------------------
# A cache of something else


def spoil(folder: Path, edit: Callable[[torch.Tensor], torch.Tensor], **changes: Any) -> None:
    """Write other spectra into the files of the cache, with a key that another version or shard would have."""
    for path in (folder / "cache" / "spectra").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            header, tensors = file.metadata(), {key: file.get_tensor(key) for key in ("spectra", "sizes")}
        header["key"] = json.dumps({**json.loads(header["key"]), **changes}, sort_keys=True)
        from safetensors.torch import save_file

        save_file({**tensors, "spectra": edit(tensors["spectra"])}, path, header)


@pytest.mark.parametrize("change", [{"format": 0}, {"rank": 8}, {"etag": "other"}, {"size": 1}, {"file": "other"}])
def test_spectra_of_something_else_are_not_mixed_in(
    change: dict[str, Any], run: Run, wise: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    """Though they lie where those of this shard would."""
    assert run(f"--dataset={wise}", *QUICK).code == 0
    spoil(tmp_path, lambda values: values.flip(1), **change)
    assert_same(run(f"--dataset={wise}", *QUICK), undisturbed)


def test_a_cache_of_another_version(
    run: Run, wise: Path, tmp_path: Path, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(dsire, "CACHE_FORMAT", dsire.CACHE_FORMAT + 1)
        assert run(f"--dataset={wise}", *QUICK).code == 0
        spoil(tmp_path, lambda values: values.flip(1))
    assert_same(run(f"--dataset={wise}", *QUICK), undisturbed)
    assert len(spectra_files(tmp_path)) == 6


@pytest.mark.parametrize("content", ["", "[]", '{"shards": [1]}', "\0\xff"])
def test_a_damaged_note_of_the_files(
    content: str, run: Run, hub: HubStandIn, tmp_path: Path, undisturbed: Outcome
) -> None:
    assert run(*OVER_HUB).code == 0
    (note,) = (tmp_path / "cache" / "sources").glob("*.json")
    note.write_bytes(content.encode("latin-1"))
    assert_same(run(*OVER_HUB), undisturbed)
    assert fetched(hub) == [FIRST, SECOND, THIRD]


def test_another_revision(run: Run, hub: HubStandIn, folder: Path, undisturbed: Outcome) -> None:
    """Each revision has its own report; only what differs between them is fetched."""
    file = parquet_files(folder)[1]
    old = file.read_bytes()
    first_commit = hub.commit
    assert_same(run(*OVER_HUB), undisturbed)
    pq.write_table(table_of(models_of(20)[40:79]), file)
    HfFileSystem.clear_instance_cache()
    hub.repository.tags = ["v2"]
    second = run(*OVER_HUB, "--revision=v2")
    assert second.report["settings"]["commit"] == hub.commit != first_commit
    assert second.predictions != undisturbed.predictions
    file.write_bytes(old)
    HfFileSystem.clear_instance_cache()
    hub.repository.tags = ["v3"]
    assert_same(run(*OVER_HUB, "--revision=v3"), undisturbed)
    assert fetched(hub) == [FIRST, SECOND, SECOND, THIRD]


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nothing sleeps any more; how long it would have."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


PLACES = {
    "describing the dataset": f"/api/datasets/{dsire.LORA_WISE}*",
    "listing its files": "/api/datasets/*/tree/*",
    "the README": "*/resolve/*/README.md",
    "the way to a shard": f"*/resolve/*{SECOND}*",
    "a shard": f"/cdn/*{SECOND}*",
}


def says_in_the_end(outcome: Outcome, *parts: str) -> bool:
    """Ended with such an error, perhaps after lines that say that the Hub is asked again."""
    *again, last = outcome.err.splitlines(keepends=True)
    assert all("again" in line for line in again)
    return replace(outcome, err=last).says(*parts)


@pytest.mark.parametrize(("place", "status"), [*zip(PLACES, [429, 500, 429, 500, 429], strict=True)])
def test_a_hub_that_fails_twice(
    place: str, status: int, run: Run, hub: HubStandIn, naps: list[float], undisturbed: Outcome
) -> None:
    hub.faults.status(PLACES[place], status, times=2)
    assert_same(run(*OVER_HUB), undisturbed)


@pytest.mark.parametrize(("place", "status"), [*zip(PLACES, [500, 429, 500, 429, 500], strict=True)])
def test_a_hub_that_fails_for_ever(place: str, status: int, run: Run, hub: HubStandIn, naps: list[float]) -> None:
    """It ends, in a few minutes at most, in one line."""
    hub.faults.status(PLACES[place], status, times=None)
    with within(30):
        outcome = run(*OVER_HUB)
    assert sum(naps) < 300
    assert says_in_the_end(outcome, dsire.LORA_WISE, str(status), "try again later")


def test_a_hub_that_says_when_to_come_again(run: Run, hub: HubStandIn, naps: list[float], undisturbed: Outcome) -> None:
    hub.faults.status(PLACES["the way to a shard"], 429, retry_after=7)
    assert_same(run(*OVER_HUB), undisturbed)


@pytest.mark.parametrize("status", [403, 404, 418, 504])
def test_other_answers_are_one_line(status: int, run: Run, hub: HubStandIn, naps: list[float]) -> None:
    hub.faults.status(f"*/resolve/*{SECOND}*", status, times=None)
    with within(30):
        assert says_in_the_end(run(*OVER_HUB), SECOND)


def test_a_download_that_stalls_once(
    run: Run, hub: HubStandIn, naps: list[float], undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.faults.stall(f"/cdn/*{SECOND}*", seconds=60, after=1000)
    with within(30):
        assert_same(run(*OVER_HUB), undisturbed)


def test_a_download_that_stalls_for_ever(
    run: Run, hub: HubStandIn, naps: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.faults.stall(f"/cdn/*{SECOND}*", seconds=60, after=1000, times=None)
    with within(60):
        assert run(*OVER_HUB).says(SECOND, "network")
    assert len(spectra_files(tmp_path)) == 1


def test_a_question_that_stalls(run: Run, hub: HubStandIn, naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """No question to the Hub is asked without an end."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "DEFAULT_REQUEST_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.2)
    hub.faults.delay(PLACES["listing its files"], seconds=60, times=None)
    with within(30):
        assert run(*OVER_HUB).says(dsire.LORA_WISE, "network")


@pytest.mark.parametrize("where", ["folder", "Hub"])
@pytest.mark.parametrize("path", ["low/4/other-*", "low/4/train-00007-of-00003.parquet", "high/32/train-*"])
def test_a_config_that_lists_files_that_are_missing(
    path: str, where: str, run: Run, hub: HubStandIn, folder: Path, naps: list[float]
) -> None:
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("low/4/train-*", path))
    dataset = folder if where == "folder" else dsire.LORA_WISE
    assert run(f"--dataset={dataset}", *QUICK).says(str(dataset), "data")


@pytest.mark.parametrize("where", ["folder", "Hub"])
@pytest.mark.parametrize(
    ("header", "reason"),
    [("configs: [", "README.md"), ("\0", "README.md"), ("configs: 3", "configs")],
    ids=repr,
)
def test_a_readme_that_cannot_be_read(
    header: str, reason: str, where: str, run: Run, hub: HubStandIn, folder: Path, naps: list[float]
) -> None:
    (folder / "README.md").write_text(f"---\n{header}\n---\n")
    dataset = folder if where == "folder" else dsire.LORA_WISE
    assert run(f"--dataset={dataset}", "--rank=4").says(str(dataset), reason)


def test_a_file_that_vanishes_after_it_was_listed(run: Run, hub: HubStandIn, naps: list[float]) -> None:
    listed = hub.repository.files
    hub.repository.files = listed  # type: ignore[method-assign]
    known = {path: file for path, file in listed().items() if SECOND not in path}
    commit = hub.commit

    def fewer() -> Any:
        asked = any("/tree/" in request.path for request in hub.requests)
        return known if asked else listed()

    hub.repository.files = fewer  # type: ignore[method-assign]
    outcome = run(*OVER_HUB, f"--revision={commit}")
    assert outcome.says(dsire.LORA_WISE)
    assert re.search(rf"{SECOND}|--revision", outcome.err)

"""Kills, Ctrl-C, full disks, spoilt caches and a Hub that fails: the command ends well, and the next run is right."""

from __future__ import annotations

import errno
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, Outcome, Run, command, models_of, parquet_files, table_of, write_folder
from hub_stand_in import HubStandIn
from huggingface_hub import constants
from lora_writers import within

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

    names = "datasets filelock huggingface_hub.hf_api pyarrow.parquet safetensors.torch sklearn.metrics tqdm"
    for name in names.split():
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
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process: Any = subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)
        assert json.loads(self.process.stdout.readline()) == "ready"

    def ask(self, **order: Any) -> Any:
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


class Started:
    """A run of the command that is under way."""

    def __init__(self, server: Server, folder: Path, number: int, arguments: list[str], stop: Stop | None) -> None:
        self.server, self.folder = server, folder
        self.out, self.err = folder / f"out-{number}", folder / f"err-{number}"
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

    def started(*arguments: Any, stop: Stop | None = None) -> Started:
        nonlocal count
        count += 1
        return Started(server, tmp_path, count, command(tmp_path, *arguments)[1:], stop)

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
    for part in ("experiments", "tables", "notes"):
        assert outcome.report[part] == other.report[part]
    assert outcome.predictions == other.predictions


def spectra_files(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of spectra in the cache, all of which can be read: name -> inode and time."""
    files = sorted((folder / "cache" / "spectra").glob("*.safetensors"))
    for path in files:
        dsire.read_spectra(path)
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
    "spectra of the last shard": (Stop("dsire.lora_spectra", number=9), 2),
    "writing the last shard's spectra": (Stop("os.fsync", THIRD), 2),
    "evaluation": (Stop("dsire.metrics", number=2), 3),
    "writing the report": (Stop("os.fsync", "report.json"), 3),
    "between the report and its table": (Stop("pathlib.Path.replace", "predictions.csv", after=True), 3),
}


@pytest.mark.parametrize("phase", PHASES)
def test_killed_while(phase: str, start: Start, wise: Path, tmp_path: Path, undisturbed: Outcome) -> None:
    arguments = (f"--dataset={wise}", *QUICK)
    stop, done = PHASES[phase]
    start(*arguments, stop=stop).kill()
    assert len(spectra_files(tmp_path)) == done
    assert_goes_on(start, tmp_path, arguments, undisturbed)


HUB_PHASES: dict[str, tuple[Stop, int]] = {
    "asking for the commit": (Stop("huggingface_hub.HfApi.repo_info"), 0),
    "finding the files": (Stop("datasets.load_dataset_builder"), 0),
    "writing what was found": (Stop("os.fsync", "/sources/"), 0),
    "fetching the first shard": (Stop("huggingface_hub.HfApi.hf_hub_download", FIRST), 0),
    "checking the first shard": (Stop("huggingface_hub.HfApi.hf_hub_download", FIRST, after=True), 0),
    "decoding the first shard": (Stop("dsire.shard_spectra", FIRST), 0),
    "writing the second shard's spectra": (Stop("os.fsync", SECOND), 1),
    "before the second shard is deleted": (Stop("pathlib.Path.unlink", f"{SECOND}.parquet"), 2),
    "after the second shard was deleted": (Stop("pathlib.Path.unlink", f"{SECOND}.parquet", after=True), 2),
}


def fetched(hub: HubStandIn) -> list[str]:
    """The shards whose content was asked for, in the order of their names."""
    paths = [request.path for request in hub.requests if request.method == "GET" and "/cdn/" in request.path]
    return sorted(Path(path).stem for path in paths)


@pytest.mark.parametrize("phase", HUB_PHASES)
def test_killed_over_the_hub_while(
    phase: str, start: Start, hub: HubStandIn, tmp_path: Path, undisturbed: Outcome
) -> None:
    """The same, and no shard is fetched whose spectra are on the disk."""
    stop, done = HUB_PHASES[phase]
    start(*OVER_HUB, stop=stop).kill()
    there = {name[: len(FIRST)] for name in spectra_files(tmp_path)}
    assert len(there) == done
    hub.requests.clear()
    assert_goes_on(start, tmp_path, OVER_HUB, undisturbed)
    assert not there & set(fetched(hub))
    assert len(fetched(hub)) == len(set(fetched(hub)))


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
    """It computes what the other one has not when that goes on, or takes over when it is killed."""
    arguments = (f"--dataset={wise}", *QUICK)
    first = start(*arguments, stop=Stop("dsire.shard_spectra", SECOND))
    second = start(*arguments)
    time.sleep(1)
    kept = spectra_files(tmp_path)
    first.send(fate)
    assert_same(second.outcome(), undisturbed)
    assert second.err.read_text() == ""
    assert (len(kept), len(spectra_files(tmp_path))) == (1, 3)
    assert kept.items() <= spectra_files(tmp_path).items()
    if fate == signal.SIGCONT:
        assert_same(first.outcome(), undisturbed)


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C


def assert_stopped(outcome: Outcome) -> None:
    """Exit code 130 and one line that says that the same command goes on."""
    assert outcome.code == 130, outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("dsire.py: stopped"), outcome.err
    assert "run it again" in outcome.err


@pytest.mark.parametrize(
    "stop",
    [
        Stop("dsire.shard_spectra", FIRST),
        Stop("dsire.lora_spectra", number=5),
        Stop("os.fsync", THIRD),
        Stop("dsire.metrics", number=2),
        Stop("os.fsync", "report.json"),
    ],
    ids=str,
)
def test_interrupted(stop: Stop, start: Start, wise: Path, tmp_path: Path, undisturbed: Outcome) -> None:
    arguments = (f"--dataset={wise}", *QUICK)
    assert_stopped(start(*arguments, stop=stop).send(signal.SIGINT, signal.SIGCONT).outcome())
    assert not list(tmp_path.rglob("*.half"))
    assert_goes_on(start, tmp_path, arguments, undisturbed)


def test_interrupted_while_the_hub_stalls(start: Start, hub: HubStandIn, tmp_path: Path) -> None:
    """The download is not waited for."""
    hub.faults.stall(f"/cdn/*{SECOND}*", seconds=60, after=1000)
    run = start(*OVER_HUB)
    wait_until(lambda: SECOND in fetched(hub) and spectra_files(tmp_path))
    time.sleep(0.3)
    begin = time.monotonic()
    assert_stopped(run.send(signal.SIGINT).outcome())
    assert time.monotonic() - begin < 30


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


@pytest.mark.parametrize(("name", "done"), [(SECOND, 1), ("report.json", 3), ("predictions.csv", 3)])
def test_no_space_for(
    name: str, done: int, run: Run, wise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        no_space(patched, name)
        outcome = run(f"--dataset={wise}", *QUICK)
        assert outcome.says(name, "No space left", str(tmp_path), "what was computed is kept")
    assert not list(tmp_path.rglob("*.half"))
    assert name not in outcome.written
    kept = spectra_files(tmp_path)
    assert len(kept) == done
    assert run(f"--dataset={wise}", *QUICK).code == 0
    assert kept.items() <= spectra_files(tmp_path).items()


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


@pytest.mark.parametrize("where", ["folder", "Hub"])
def test_a_full_disk(
    where: str, run: Run, wise: Path, hub: HubStandIn, disk: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    arguments = OVER_HUB if where == "Hub" else (f"--dataset={wise}", *QUICK)
    assert says_in_the_end(run(*arguments), str(disk), "No space left")
    kept = spectra_files(tmp_path)
    assert len(kept) == (where == "folder")
    assert not list(disk.rglob("*.half"))
    mount(disk, "-o", "remount,size=10m")
    assert_same(run(*arguments), undisturbed)
    assert kept.items() <= spectra_files(tmp_path).items()
    assert [path.name for path in disk.rglob("*") if path.suffix in (".parquet", ".incomplete")] == []


def test_a_read_only_cache(run: Run, wise: Path, disk: Path, tmp_path: Path, undisturbed: Outcome) -> None:
    """What is in it is used; what isn't can't be written, which is one line."""
    mount(disk, "-o", "remount,ro")
    assert run(f"--dataset={wise}", *QUICK).says(str(disk), "Read-only file system")
    mount(disk, "-o", "remount,rw,size=1m")
    assert_same(run(f"--dataset={wise}", *QUICK), undisturbed)
    mount(disk, "-o", "remount,ro")
    assert_same(run(f"--dataset={wise}", *QUICK), undisturbed)
    mount(disk, "-o", "remount,rw")
    for file in (*disk.rglob("*.lock"), *disk.rglob(f"{SECOND}*.safetensors")):
        file.unlink()
    mount(disk, "-o", "remount,ro")
    assert run(f"--dataset={wise}", *QUICK).says(str(disk), "Read-only file system")


# ---------------------------------------------------------------------------------------------------------------------
# A cache of something else


def turn_a_bit(content: bytes) -> bytes:
    place = content.index(b"}}") + 99  # a number, behind the header
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda content: b"",
    "rubbish": lambda content: b"rubbish",
    "truncated": lambda content: content[:-100],
    "a bit of a number": turn_a_bit,
    "a name": lambda content: content.replace(b"thing_03", b"thing_04"),
    "another format": lambda content: content.replace(b'format\\": ', b'format\\":9'),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_spectra_that_are_not_as_they_were_written_are_computed_anew(
    spoil: Callable[[bytes], bytes], run: Run, wise: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    assert run(f"--dataset={wise}", *QUICK).code == 0
    files = sorted((tmp_path / "cache" / "spectra").glob("*.safetensors"))
    for file in files[:2]:
        assert spoil(file.read_bytes()) != file.read_bytes()
        file.write_bytes(spoil(file.read_bytes()))
    assert_same(run(f"--dataset={wise}", *QUICK), undisturbed)
    assert len(spectra_files(tmp_path)) == 3


@pytest.mark.parametrize("change", ["format", "rank", "time", "size", "place"])
def test_spectra_of_something_else_are_not_used(change: str, run: Run, folder: Path, tmp_path: Path) -> None:
    """Whatever decides them: each file is computed again under another name."""
    source = dsire.find_source(str(folder), "low_4", None, tmp_path)
    dsire.subset_spectra(source, 4, tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patched:
        if change == "format":
            patched.setattr(dsire, "FORMAT", dsire.FORMAT + 1)
        elif change == "place":
            folder = folder.rename(tmp_path / "elsewhere")
        elif change != "rank":
            key = {"time": "version", "size": "size"}[change]
            source = replace(source, shards=[replace(shard, **{key: 1}) for shard in source.shards])
        source = replace(source, dataset=str(folder))
        dsire.subset_spectra(source, 2 if change == "rank" else 4, tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "spectra").glob("*.safetensors"))) == 6


def edited(**changes: Any) -> Callable[[str], str]:
    def edit(text: str) -> str:
        content = json.loads(text)
        return json.dumps({**content, "source": {**content["source"], **changes}})

    return edit


@pytest.mark.parametrize(
    "spoil",
    [
        *(lambda text, other=other: other for other in ("", "[]", "3", '{"source": 3}', "\0\xff", "[" * 10**5)),
        lambda text: text[: len(text) // 2],
        edited(shards=[]),
        edited(shards=3),
        edited(commit=None),
        edited(notes="no list"),
        edited(more=1),
    ],
)
def test_a_damaged_note_of_the_files(
    spoil: Callable[[str], str], run: Run, hub: HubStandIn, tmp_path: Path, undisturbed: Outcome
) -> None:
    """It is as if it were not there."""
    assert run(*OVER_HUB).code == 0
    (note,) = (tmp_path / "cache" / "sources").glob("*.json")
    note.write_text(spoil(note.read_text()), encoding="latin-1")
    assert_same(run(*OVER_HUB), undisturbed)
    assert fetched(hub) == [FIRST, SECOND, THIRD]


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nothing sleeps any more; how long it would have."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


PLACES = {
    "the listing": f"/api/datasets/{dsire.LORA_WISE}*",
    "the README": "*/resolve/*/README.md",
    "the way to a shard": f"*/resolve/*{SECOND}*",
    "a shard": f"/cdn/*{SECOND}*",
}


def says_in_the_end(outcome: Outcome, *parts: str) -> bool:
    """Ended with such an error, perhaps after huggingface_hub's own words."""
    return replace(outcome, err=outcome.err.splitlines(keepends=True)[-1]).says(*parts)


@pytest.mark.parametrize(("place", "status"), [*zip(PLACES, [0, 429, 500, 429], strict=True)][1:])
def test_a_hub_that_fails_twice(
    place: str, status: int, run: Run, hub: HubStandIn, naps: list[float], undisturbed: Outcome
) -> None:
    """To try again is huggingface_hub's."""
    hub.faults.status(PLACES[place], status, times=2)
    assert_same(run(*OVER_HUB), undisturbed)


@pytest.mark.parametrize(("place", "status"), [*zip(PLACES, [500, 404, 418, 504], strict=True)])
def test_a_hub_that_fails_for_ever(place: str, status: int, run: Run, hub: HubStandIn, naps: list[float]) -> None:
    """It ends, in a few minutes at most, in one line."""
    hub.faults.status(PLACES[place], status, times=None)
    with within(30):
        outcome = run(*OVER_HUB)
    assert sum(naps) < 300
    assert says_in_the_end(outcome, dsire.LORA_WISE, "HF_TOKEN", "HF_ENDPOINT")


@pytest.mark.parametrize("place", PLACES)
def test_what_was_found_before_is_used_whatever_fails(
    place: str, run: Run, hub: HubStandIn, folder: Path, naps: list[float], undisturbed: Outcome
) -> None:
    """Though the commit is another one; a second run with the same one asks once, and none needs the network."""
    assert_same(run(*OVER_HUB), undisturbed)
    hub.requests.clear()
    assert_same(run(*OVER_HUB), undisturbed)
    assert len(hub.requests) == 1
    commit = hub.commit
    (folder / "README.md").write_text((folder / "README.md").read_text() + "A dataset.\n")
    hub.faults.status(PLACES[place], 503, times=None)
    outcome = run(*OVER_HUB)
    assert outcome.predictions == undisturbed.predictions
    said = [note for note in outcome.report["notes"] if f"going on with commit {commit[:12]}" in note]
    assert len(said) == (0 if SECOND in PLACES[place] else 1)


@pytest.mark.parametrize("times", [1, None])
def test_a_download_that_stalls(
    times: int | None, run: Run, hub: HubStandIn, naps: list[float], undisturbed: Outcome, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
        hub.faults.stall(f"/cdn/*{SECOND}*", seconds=60, after=1000, times=times)
        with within(60):
            outcome = run(*OVER_HUB)
    if times:
        assert_same(outcome, undisturbed)
    else:
        assert says_in_the_end(outcome, SECOND, "network")
        assert len(spectra_files(tmp_path)) == 1


def test_a_question_that_stalls(run: Run, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for without an end."""
    monkeypatch.setattr(dsire, "PATIENCE", 1)
    hub.faults.delay(PLACES["the listing"], seconds=60, times=None)
    with within(30):
        assert run(*OVER_HUB).says(dsire.LORA_WISE, "network")


@pytest.mark.parametrize("where", ["folder", "Hub"])
@pytest.mark.parametrize("path", ["low/4/other-*", "low/4/train-00007-of-00003.parquet", "../../../../**/*.parquet"])
def test_a_config_that_lists_files_that_are_not_of_it(
    path: str, where: str, run: Run, hub: HubStandIn, folder: Path, naps: list[float]
) -> None:
    (folder.parent / "private").mkdir()
    (folder.parent / "private" / "secret.parquet").write_bytes(parquet_files(folder)[0].read_bytes())
    readme = folder / "README.md"
    above = "../" * 12 + str(folder.parent / "private").lstrip("/") + "/*.parquet"
    readme.write_text(readme.read_text().replace("low/4/train-*", above if path.startswith("..") else path))
    dataset = folder if where == "folder" else dsire.LORA_WISE
    assert run(f"--dataset={dataset}", *QUICK).says(str(dataset), "parquet")


BOMB = "a0: &a0 [x,x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))


@pytest.mark.parametrize("where", ["folder", "Hub"])
@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("configs: [", "README.md"),
        ("\0", "README.md"),
        ("configs: 3", "README.md"),
        (f"{BOMB}configs:\n- config_name: low_4\n  data_files: *a11", "alias"),
        ("configs:\n- {config_name: low_4, data_files: !!str &x low/4/*}", "alias"),
    ],
    ids=["open", "zero", "number", "bomb", "anchor"],
)
def test_a_readme_that_cannot_be_read(
    header: str, reason: str, where: str, run: Run, hub: HubStandIn, folder: Path, naps: list[float]
) -> None:
    (folder / "README.md").write_text(f"---\n{header}\n---\n")
    dataset = folder if where == "folder" else dsire.LORA_WISE
    with within(20):
        assert run(f"--dataset={dataset}", "--rank=4").says(str(dataset), reason)


@pytest.mark.parametrize("name", ["/tmp/evil/train.parquet", "low/../../evil.parquet", "..\\evil.parquet"])
def test_a_listing_of_paths_out_of_the_repository(name: str, run: Run, hub: HubStandIn, tmp_path: Path) -> None:
    """Nothing is made at such a place."""
    listed, evil = hub.repository.files, tmp_path / "evil"
    evil.mkdir()
    name = name.replace("/tmp/evil", str(evil))

    def files() -> Any:
        its = listed()
        return {**its, name: replace(next(iter(its.values())), path=name)}

    hub.repository.files = files  # type: ignore[method-assign]
    assert run(*OVER_HUB).says(dsire.LORA_WISE, "out of it")
    assert not any(evil.iterdir())

"""What the machine around the script can be: proxies, a home that can't be written, odd paths, a pipe that closes."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Book, Outcome, Run, assert_right, by_the_book, command, models_of, write_folder
from lora_writers import write_model

ONCE = "--experiments=1"
SOCKS, NO_FILE = "socks5://127.0.0.1:9", "/nonexistent/ca.pem"


def shell_code(code: int) -> int:
    """As a shell gives it: 128 and the number of the signal that ended the process."""
    return 128 - code if code < 0 else code


@pytest.mark.parametrize(
    ("setting", "value", "asked"),
    [
        ("ALL_PROXY", SOCKS, "--subset=low_8"),
        ("HTTPS_PROXY", SOCKS, "--predict=some/lora"),
        ("SSL_CERT_FILE", NO_FILE, "--subset=low_8"),
        ("HF_ENDPOINT", "http://host:port", "--subset=low_8"),
        ("HF_ENDPOINT", "hf-mirror.com", "--subset=low_8"),
    ],
)
def test_a_setting_at_fault_is_one_line(setting: str, value: str, asked: str, run_anew: Run) -> None:
    outcome = run_anew(asked, NO_PROXY="", **{setting: value})
    assert outcome.says("Hub", "network", "HF_TOKEN", "HF_ENDPOINT")
    ships = f"error: {asked} does not ship; "
    assert (ships in outcome.err, outcome.out) == ("--subset" in asked, "")


@pytest.mark.parametrize("home", ["HF_HOME", "HOME"])
def test_settings_ignored(home: str, run_anew: Run, shipped_by_the_book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME")
    network = {"ALL_PROXY": SOCKS, "NO_PROXY": "", "SSL_CERT_FILE": NO_FILE, "HF_ENDPOINT": "http://host:port"}
    outcome = run_anew("--subset=low_4", ONCE, **network, **{home: "/dev/null/nowhere"})
    assert_right(outcome, shipped_by_the_book, experiments=1)
    assert outcome.err == ""


@pytest.mark.parametrize("number", [37, 38], ids=["ENOLCK", "ENOSYS"])
def test_a_disk_without_locks(number: int, run_anew: Run, tmp_path: Path) -> None:
    code = f"import fcntl\ndef flock(*_):\n    raise OSError({number}, 'no locks')\nfcntl.flock = flock\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    assert run_anew(ONCE, PYTHONPATH=str(tmp_path)).says(str(tmp_path / "cache"), "locked", "--cache_dir")


@pytest.mark.parametrize(("stdout", "unbuffered"), [("pipe", ""), ("pipe", "1"), ("/dev/full", "")])
def test_nobody_takes_what_is_printed(stdout: str, unbuffered: str, folder: Path, tmp_path: Path) -> None:
    """A reader that is gone ends the script in silence, as SIGPIPE would; what --output asks for is written."""
    if stdout == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    elif Path(stdout).exists():
        writer = os.open(stdout, os.O_WRONLY)
    else:
        pytest.skip(f"there is no {stdout} here")
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    line = command(tmp_path, f"--dataset={folder}", ONCE)
    done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, timeout=120)
    os.close(writer)
    outcome = Outcome(shell_code(done.returncode), "", done.stderr, tmp_path / "output")
    assert (outcome.code, outcome.err) == (141, "") if stdout == "pipe" else outcome.says("No space left")
    assert_right(replace(outcome, code=0), by_the_book(folder), experiments=1)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_interrupted_while_a_library_is_imported(library: str, run_anew: Run, tmp_path: Path) -> None:
    code = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / f"{library}.py").write_text(code)
    outcome = run_anew(PYTHONPATH=str(tmp_path))
    assert (shell_code(outcome.code), outcome.out) == (130, "")
    assert outcome.err.count("\n") <= 1
    assert "Traceback" not in outcome.err


def test_a_tilde_is_the_home(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    write_folder(home / "wise", [models_of(3)])
    write_model(home / "new.safetensors", ("thing_01", 5))  # one of the labelled ones: every voter names its size
    monkeypatch.setenv("HOME", str(home))
    places = ("--dataset=~/wise", "--cache_dir=~/cache", "--output=~/results", "--predict=~/new.safetensors")
    outcome = run(*places, "--predictor=dsire")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "~").exists()
    assert len(list((home / "cache" / "spectra").glob("*.safetensors"))) == 1
    (estimate,) = Outcome(0, "", "", home / "results").report["estimates"]
    assert (estimate["file"], estimate["estimate"]) == (str(home / "new.safetensors"), 5)

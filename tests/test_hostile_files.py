"""Files that are damaged or made to do harm: one clear line each, and nothing of them is run."""

from __future__ import annotations

import json
import os
import struct
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, models_of, table_of, weights_of, write_folder
from lora_writers import adapter, assert_spectra, one_layer, refusal, spectra_by_the_book, within, write, write_model
from torch import Tensor

import dsire

DOWN, UP = "lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"


def refused(file: Path, *parts: str, seconds: float = 20) -> None:
    """Refused in time and without a warning, in one line of some length."""
    with within(seconds), warnings.catch_warnings():
        warnings.simplefilter("error")
        message = refusal(file)
    assert len(message) < 1000
    for part in parts:
        assert part in message


def assert_sound(file: Path) -> None:
    """Read in time, with the spectra of `one_layer`."""
    a, b = one_layer().values()
    with within(5):
        assert_spectra(dsire.file_spectra(file), spectra_by_the_book({"x": (a, b)}, 1))


# ---------------------------------------------------------------------------------------------------------------------
# The command goes on


def test_hostile_files_one_line_each_and_the_sound_ones_are_done(tmp_path: Path, run: Run) -> None:
    labelled = write_folder(tmp_path / "wise", [table_of(models_of(3))])
    weights = {key: torch.from_numpy(matrix) for key, matrix in weights_of(("new", 2)).items()}
    first = next(iter(weights))
    bad = [
        write(tmp_path / "nan.safetensors", weights | {first: weights[first] * float("nan")}),
        write(tmp_path / "int.safetensors", {key: matrix.int() for key, matrix in weights.items()}),
        *(tmp_path / name for name in ("text.safetensors", "empty.safetensors", "empty.pt", "hollow", "missing.ckpt")),
    ]
    bad[2].write_text("<!DOCTYPE html><html>404</html>\n" * 10)
    bad[3].touch()
    bad[4].touch()
    bad[5].mkdir()
    sound = write_model(tmp_path / "sound.safetensors", ("new", 2))
    outcome = run("--dataset", labelled, "--subset=low_4", "--predict", *bad, sound)
    assert outcome.code == 2
    lines = outcome.err.splitlines()
    assert len(lines) == len(bad)
    assert all(line.startswith("dsire.py: error: ") for line in lines)
    for file in bad:
        assert sum(file.name in line for line in lines) == 1
    assert str(sound) in outcome.out


# ---------------------------------------------------------------------------------------------------------------------
# Pickles


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2, 2)],
        torch.ones(2, 2),
        3,
        None,
        "text",
        {},
        {"state_dict": {}},
        {"state_dict": [torch.ones(2, 2)]},
        {DOWN: [[1.0, 2.0]], UP: [[1.0], [2.0]]},
    ],
    ids=repr,
)
def test_a_pickle_of_something_else(content: Any, tmp_path: Path) -> None:
    refused(write(tmp_path / "lora.pt", content))


def test_a_pickle_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = one_layer()
    content["state_dict"] = content
    assert_sound(write(tmp_path / "lora.pt", content))


@pytest.mark.parametrize("part", ["down", "up", "alpha", "mid"])
@pytest.mark.parametrize(
    "make",
    [
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: torch.nested.nested_tensor([tensor.flatten()]),
        lambda tensor: torch.zeros(1).expand(2, *tensor.shape[1:-1], 10**15),
    ],
    ids=["sparse", "meta", "complex", "nested", "a petabyte of one number"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_unusual_kinds_in_a_pickle(make: Any, part: str, tmp_path: Path) -> None:
    shapes = {"down": (2, 6, 1, 1), "up": (5, 2, 1, 1), "alpha": (1,), "mid": (2, 2, 1, 1)}
    sound = {name: torch.ones(shape) for name, shape in shapes.items()}
    refused(write(tmp_path / "lora.pt", one_layer(**sound | {part: make(sound[part])})))


@pytest.mark.parametrize("keep", [0, 100, 0.99])
@pytest.mark.parametrize("form", ["zip", "old"])
def test_a_pickle_that_was_cut(form: str, keep: float, tmp_path: Path) -> None:
    file = tmp_path / "lora.ckpt"
    torch.save(one_layer(), file, _use_new_zipfile_serialization=form == "zip")
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    refused(file)


# ---------------------------------------------------------------------------------------------------------------------
# Safetensors by hand


def raw(path: Path, header: Any, length: int | None = None) -> Path:
    """A safetensors file with this header (JSON text, or an object to write) and perhaps a length that lies."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = [tensor.numpy().tobytes() for tensor in one_layer().values()]
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + b"".join(data))
    return path


def entry(shape: list[Any], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


SOUND = {DOWN: entry([2, 6], 0, 48), UP: entry([5, 2], 48, 88)}


def test_a_file_by_hand_is_read_when_it_is_sound(tmp_path: Path) -> None:
    assert_sound(raw(tmp_path / "lora.safetensors", SOUND))


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**32 - 1, 2**63, 2**64 - 1])
def test_a_length_that_lies(length: int, tmp_path: Path) -> None:
    refused(raw(tmp_path / "lora.safetensors", SOUND, length=length))


def test_a_gigantic_header(tmp_path: Path) -> None:
    """A hundred megabytes of spaces after the JSON, and as many of nothing in a sparse file."""
    refused(raw(tmp_path / "spaces.safetensors", json.dumps(SOUND).encode() + b" " * 10**8))
    file = tmp_path / "sparse.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 2**33))
        stream.truncate(2**33 + 1000)
    refused(file)


@pytest.mark.parametrize(
    "header",
    [
        SOUND | {UP: entry([5, 2], 40, 80)},
        SOUND | {UP: entry([5, 2], 88, 48)},
        SOUND | {UP: entry([5, 2], 48, 2**63)},
        SOUND | {UP: entry([5, 3], 48, 88)},
        SOUND | {UP: entry([5, -2], 48, 88)},
        SOUND | {UP: entry([2**32, 2**32], 48, 88)},
        SOUND | {UP: entry([5, 2.0], 48, 88)},
        SOUND | {UP: entry([5, 2], 48, 88, "F31")},
        SOUND | {UP: {"dtype": "F32"}},
        SOUND | {UP: None},
        SOUND | {"__metadata__": {"nested": {"a": 1}}},
        SOUND | {"__metadata__": [1]},
        [SOUND],
        {},
        {"__metadata__": {}},
        b"{" + b'"a":{' * 100_000,
        b"[" * 100_000,
        b"\xff\xfe{}",
        json.dumps(SOUND).encode()[:-1],
        json.dumps(SOUND).encode()[:-1] + b', "%s": %s}' % (DOWN.encode(), json.dumps(entry([2, 6], 40, 88)).encode()),
    ],
    ids=lambda header: str(header)[-60:],
)
def test_a_header_that_lies(header: Any, tmp_path: Path) -> None:
    refused(raw(tmp_path / "lora.safetensors", header))


def test_the_same_key_twice(tmp_path: Path) -> None:
    """The JSON names a key twice, for the same bytes."""
    text = json.dumps(SOUND)
    assert_sound(raw(tmp_path / "lora.safetensors", f'{text[:-1]}, "{DOWN}": {json.dumps(SOUND[DOWN])}}}'.encode()))


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 0.99])
def test_safetensors_that_were_cut(keep: float, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", one_layer())
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    refused(file)


def test_a_file_larger_than_the_memory_is_read_or_refused(tmp_path: Path) -> None:
    """A sparse file of a terabyte: not every system maps so much."""
    file = raw(tmp_path / "lora.safetensors", SOUND | {"large": entry([2**40 - 88], 88, 2**40, "U8")})
    os.truncate(file, file.stat().st_size + 2**40 - 88)
    try:
        assert_sound(file)
    except dsire.DsireError:
        refused(file, "memory")


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that are no LoRA


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"down": torch.full((2, 6), float("nan"))}, [DOWN, "NaN"]),
        ({"down": torch.ones(1, 3), "up": torch.tensor([[float("nan")], [1], [1]])}, [UP, "NaN"]),
        ({"up": torch.full((5, 2), float("inf"))}, [UP, "infinite"]),
        ({part: 1e200 * torch.ones(shape).double() for part, shape in (("down", (2, 6)), ("up", (5, 2)))}, [DOWN, UP]),
        ({"down": torch.ones(6)}, [DOWN]),
        ({"up": torch.tensor(1.0)}, [UP]),
        ({"down": torch.ones(0, 6), "up": torch.ones(5, 0)}, [DOWN]),
        ({"down": torch.ones(2, 0)}, [DOWN]),
        ({"up": torch.ones(0, 2)}, [UP]),
        ({"down": torch.ones(3, 6)}, [DOWN, UP, "rank 3"]),
        ({"up": torch.ones(2, 5)}, [DOWN, UP, "rank"]),
        ({"up": torch.ones(5, 2, 3, 3)}, [DOWN, UP]),
        ({"down": torch.ones(2, 6, dtype=torch.int8)}, [DOWN, "int8"]),
        ({"up": torch.ones(5, 2, dtype=torch.bool)}, [UP, "bool"]),
        ({"up": torch.ones(5, 2, dtype=torch.complex64)}, [UP, "complex64"]),
        ({"up": torch.ones(5, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, [UP, "float4"]),
        ({"mid": torch.ones(3, 3, 3, 3)}, ["lora_mid"]),
        ({"mid": torch.ones(2)}, ["lora_mid"]),
        ({"mid": torch.ones(2, 2)}, ["lora_mid"]),
        ({"mid": torch.ones(2, 1, 3, 3)}, ["lora_mid"]),
        ({"mid": torch.ones(2, 2, 3, 3, dtype=torch.complex64)}, ["lora_mid"]),
        ({"down": torch.ones(2, 6, 3, 3), "mid": torch.ones(2, 2, 3, 3)}, ["lora_mid"]),
        ({"mid": torch.full((2, 2, 3, 3), float("nan"))}, ["NaN"]),
        ({"alpha": torch.tensor(float("nan"))}, ["alpha"]),
        ({"alpha": torch.tensor(float("inf"))}, ["alpha"]),
        ({"alpha": torch.ones(0)}, ["alpha"]),
        ({"alpha": torch.ones(3)}, ["alpha"]),
        ({"alpha": torch.tensor(1j)}, ["alpha"]),
        ({"alpha": torch.tensor(1e300, dtype=torch.float64), "up": torch.full((5, 2), 1e30)}, ["alpha", "too large"]),
    ],
    ids=lambda value: (
        " ".join(f"{key} {list(t.shape)} {t.dtype}" for key, t in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_matrices_that_do_not_fit(changes: dict[str, Tensor], parts: list[str], tmp_path: Path) -> None:
    refused(write(tmp_path / "lora.safetensors", one_layer(**changes)), *parts)


@pytest.mark.parametrize("alpha", ["four", [4.0], None, 10**400], ids=lambda alpha: str(alpha)[:10])
def test_an_alpha_that_is_no_number(alpha: Any, tmp_path: Path) -> None:
    refused(write(tmp_path / "lora.pt", one_layer(alpha=alpha)), "alpha")


@pytest.mark.parametrize("lone", [DOWN, UP, "lora_unet_x.hada_w1_a", "lora_unet_x.lora_mid.weight"])
def test_a_matrix_without_its_partner(lone: str, tmp_path: Path) -> None:
    sound = {key.replace("_x.", "_y."): tensor for key, tensor in one_layer().items()}
    for tensors in ({lone: torch.ones(2, 2)}, {lone: torch.ones(2, 2)} | sound):
        refused(write(tmp_path / "lora.safetensors", tensors), lone, "no partner")


@pytest.mark.parametrize("other", ["unet.x.lora.down.weight", "x.lora_A.first.weight", "x.lora_linear_layer.down"])
def test_one_matrix_in_two_spellings(other: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "lora.safetensors", one_layer() | {other: torch.ones(2, 6)}), DOWN, other)


@pytest.mark.parametrize(
    "key",
    [
        "x\n.hada_w1_a",
        "x\n.lora_down.weight",
        "\x1b]0;title\x07.lora_down.weight",
        "\u202e.alpha",
        "x" * 10**5 + ".lora_up.weight",
        "x.hada_w1_a" + "y" * 10**5,
    ],
    ids=["method", "line", "escape", "direction", "long", "long method"],
)
def test_keys_that_would_spoil_the_message(key: str, tmp_path: Path, run: Run) -> None:
    file = write(tmp_path / "lora.safetensors", {key: torch.ones(2, 2)})
    outcome = run("--predict", file)
    assert outcome.says("lora.safetensors")
    assert outcome.err.removesuffix("\n").isprintable()
    assert len(outcome.err) < 1000


@pytest.mark.parametrize("start", ["lora_unet_", "x.", "."])
@pytest.mark.parametrize("word", [".dora_scale", "lora_unet_", ".lora", ".", ".lora_A.", "state_dict.", "a"])
def test_keys_that_would_take_for_ever_to_match(start: str, word: str, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", one_layer() | {start + word * 50_000: torch.ones(2, 2)})
    with within(5), suppress(dsire.DsireError):
        assert_sound(file)


# ---------------------------------------------------------------------------------------------------------------------
# adapter_config.json and the header


@pytest.mark.parametrize(
    "config",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"LORA"',
        "\0\1\2",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"lora_alpha": ' + "9" * 5000 + "}",
        {"lora_alpha": "four"},
        {"lora_alpha": None},
        {"lora_alpha": [4]},
        {"lora_alpha": {}},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"lora_alpha": 4, "alpha_pattern": [1]},
        {"lora_alpha": 4, "alpha_pattern": "x"},
        {"peft_type": ["LORA"]},
        {"peft_type": "x\n\x1b[2J"},
    ],
    ids=lambda config: str(config)[:50],
)
def test_a_config_that_makes_no_sense(config: Any, tmp_path: Path) -> None:
    refused(adapter(tmp_path / "saved", config))


@pytest.mark.parametrize("text", ["", "[]", '{"lora_alpha": "four"}', '{"peft_type": "OFT"}'])
def test_a_config_in_the_header_that_makes_no_sense(text: str, tmp_path: Path) -> None:
    tensors = {f"x.lora_{letter}.weight": torch.ones(2, 2) for letter in "AB"}
    refused(write(tmp_path / "header.safetensors", tensors, {"lora_adapter_metadata": text}))


def test_a_config_that_is_not_utf_8(tmp_path: Path) -> None:
    file = adapter(tmp_path / "saved")
    file.with_name("adapter_config.json").write_bytes('{"lora_alpha": "ä"}'.encode("latin-1"))
    refused(file, "adapter_config.json")


def test_a_config_that_is_a_folder_or_a_link_to_itself_is_none(tmp_path: Path) -> None:
    file = adapter(tmp_path / "saved")
    config = file.with_name("adapter_config.json")
    config.unlink()
    config.mkdir()
    assert dsire.file_spectra(file).shapes == {"x": [5, 6, 2]}
    config.rmdir()
    config.symlink_to(config)
    assert dsire.file_spectra(file).shapes == {"x": [5, 6, 2]}


# ---------------------------------------------------------------------------------------------------------------------
# Folders and links


def test_which_files_of_a_folder_are_models(tmp_path: Path) -> None:
    """What is none is told with its reason; links that go in circles, hidden files and folders are not followed."""
    safe, plain = tmp_path / "a" / "lora.safetensors", tmp_path / "b" / "lora.bin"
    for file in (safe, plain, safe.with_suffix(".pt"), safe.with_name("._lora.safetensors")):
        write_model(file, ("new", 2))
    write(plain.with_name("optimizer.bin"), {"state": {0: {"exp_avg": torch.ones(2)}}})
    write(plain.with_name("other.safetensors"), {"x.ia3_l": torch.ones(2)})
    torch.save({"_last_lr": [1.0]}, plain.with_name("lr.pt"))
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    for link in ("self.safetensors", "nowhere.safetensors"):
        (tmp_path / "c" / link).parent.mkdir(exist_ok=True)
        (tmp_path / "c" / link).symlink_to(tmp_path / "c" / "self.safetensors")
    for number in (1, 3):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / f"model-0000{number}-of-00003.safetensors").touch()
    models, others = dsire.model_files(tmp_path)
    read = [str(file.relative_to(tmp_path)) for file in models]
    links = ["c/nowhere.safetensors", "c/self.safetensors", "d/model-00001-of-00003.safetensors"]
    assert read == ["a/lora.safetensors", "b/lora.bin", *links]  # what is wrong with them is said as they are read
    assert {str(file.relative_to(tmp_path)): why.partition(":")[0] for file, why in others.items()} == {
        "a/lora.pt": "a pickle beside safetensors",
        "b/optimizer.bin": "a trainer's state, by its name",
        "b/other.safetensors": "holds no LoRA, but x.ia3_l",
        "b/lr.pt": "holds no LoRA, and no tensors",
    }


def test_a_folder_or_a_pipe_with_the_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    refused(tmp_path / "folder.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", seconds=5)

"""Files that are damaged or made to do harm: one clear line each, and nothing of them is run."""

from __future__ import annotations

import json
import os
import pickle
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, Run, models_of, table_of, weights_of, write_folder
from lora_writers import adapter, assert_spectra, one_layer, spectra_by_the_book, within, write, write_model
from torch import Tensor

import dsire

DOWN, UP = "lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"


def refused(file: Path, *parts: str, seconds: float = 20) -> None:
    """Refused in time and without a warning, in one printable line that names it or the configuration beside it."""
    with within(seconds), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(dsire.DsireError) as error:
            dsire.file_spectra(file)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 1000
    assert file.name in message or "adapter_config.json" in message
    for part in parts:
        assert part in message


def assert_sound(file: Path) -> None:
    """Read in time, with the spectra of `one_layer`."""
    with within(5):
        assert_spectra(dsire.file_spectra(file), spectra_by_the_book({"x": tuple(one_layer().values())}, 1))  # type: ignore[dict-item]


# ---------------------------------------------------------------------------------------------------------------------
# The command goes on


def test_hostile_files_one_line_each_and_the_sound_ones_are_done(tmp_path: Path, run: Run) -> None:
    labelled = write_folder(tmp_path / "wise", [table_of(models_of(3))])
    weights = {key: torch.from_numpy(matrix) for key, matrix in weights_of(("new", 2)).items()}
    first = next(iter(weights))
    bad = [
        write(tmp_path / "nan.safetensors", weights | {first: weights[first] * float("nan")}),
        write(tmp_path / "int.safetensors", {key: matrix.int() for key, matrix in weights.items()}),
        tmp_path / "text.safetensors",
        tmp_path / "empty.safetensors",
        tmp_path / "empty.pt",
        tmp_path / "empty folder",
        tmp_path / "missing.ckpt",
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
    assert [one["file"] for one in outcome.report["estimates"]] == [str(sound)]


# ---------------------------------------------------------------------------------------------------------------------
# Pickles


class Payload:
    """What a pickle can hold that runs a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("place", ["value", "key's neighbour", "instead"])
@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_the_payload_of_a_pickle_does_not_run(form: str, place: str, tmp_path: Path) -> None:
    marker, file = tmp_path / "it ran", tmp_path / "lora.pt"
    payload = Payload(marker)
    contents = {"value": {DOWN: payload}, "key's neighbour": one_layer(extra=payload), "instead": payload}
    if form == "plain":
        file.write_bytes(pickle.dumps(payload if place == "instead" else {"payload": payload}))
    else:
        torch.save(contents[place], file, _use_new_zipfile_serialization=form == "zip")
    refused(file)
    assert not marker.exists()


def test_a_pickle_named_safetensors_does_not_run(tmp_path: Path) -> None:
    marker, file = tmp_path / "it ran", tmp_path / "lora.safetensors"
    torch.save({DOWN: Payload(marker)}, file)
    refused(file)
    assert not marker.exists()


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
def test_tensors_of_unusual_kinds_in_a_pickle(make: Callable[[Tensor], Tensor], part: str, tmp_path: Path) -> None:
    sound = {
        "down": torch.ones(2, 6, 1, 1),
        "up": torch.ones(5, 2, 1, 1),
        "alpha": torch.ones(1),
        "mid": torch.ones(2, 2, 1, 1),
    }
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
        SOUND | {UP: entry([5, 2], 0, 40)},
        SOUND | {UP: entry([5, 2], 88, 48)},
        SOUND | {UP: entry([5, 2], 48, 2**63)},
        SOUND | {UP: entry([5, 2], 56, 96)},
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
        b'{"%s": %s, "%s": %s, "%s": %s}'
        % tuple(
            text.encode() if isinstance(text, str) else json.dumps(text).encode()
            for text in (DOWN, SOUND[DOWN], DOWN, entry([2, 6], 40, 88), UP, SOUND[UP])
        ),
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
        ({"down": torch.tensor([[float("nan"), 1, 1]]), "up": torch.ones(5, 1)}, [DOWN, "NaN"]),
        ({"down": torch.ones(1, 3), "up": torch.tensor([[float("nan")], [1], [1]])}, [UP, "NaN"]),
        ({"up": torch.full((5, 2), float("inf"))}, [UP, "infinite"]),
        (
            {
                "down": torch.full((2, 6), 1e200, dtype=torch.float64),
                "up": torch.full((5, 2), 1e200, dtype=torch.float64),
            },
            ["too large"],
        ),
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
        ({"mid": torch.ones(2, 2, 3, 3, dtype=torch.complex64)}, ["lora_mid"]),
        ({"down": torch.ones(2, 6, 3, 3), "mid": torch.ones(2, 2, 3, 3)}, ["lora_mid"]),
        ({"mid": torch.full((2, 2, 3, 3), float("nan"))}, ["NaN"]),
        ({"alpha": torch.tensor(float("nan"))}, ["alpha"]),
        ({"alpha": torch.tensor(float("inf"))}, ["alpha"]),
        ({"alpha": torch.ones(0)}, ["alpha"]),
        ({"alpha": torch.ones(3)}, ["alpha"]),
        ({"alpha": torch.tensor(1j)}, ["alpha"]),
        ({"alpha": torch.tensor(1e300, dtype=torch.float64), "up": torch.full((5, 2), 1e30)}, ["alpha"]),
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


def test_an_alpha_of_zero_says_that_the_products_are_zero(tmp_path: Path) -> None:
    (note,) = dsire.file_spectra(write(tmp_path / "lora.safetensors", one_layer(alpha=torch.tensor(0.0)))).notes
    assert "zero" in note


@pytest.mark.parametrize(
    "lone", [DOWN, UP, "lora_unet_x.alpha", "lora_unet_x.dora_scale", "lora_unet_x.lora_mid.weight"]
)
def test_a_matrix_without_its_partner(lone: str, tmp_path: Path) -> None:
    pair = {key.replace("_x.", "_y."): tensor for key, tensor in one_layer().items()}
    refused(write(tmp_path / "lora.safetensors", {lone: torch.ones(2, 2)}), lone)
    found = dsire.file_spectra(write(tmp_path / "lora.safetensors", {lone: torch.ones(2, 2)} | pair))
    assert set(found.shapes) == {"y"}
    assert any("without a partner" in note and lone in note for note in found.notes)


@pytest.mark.parametrize(
    "other",
    [
        "unet.x.lora.down.weight",
        "unet.x.lora_A.weight",
        "base_model.model.x.lora_A.default.weight",
        "x.lora_linear_layer.down.weight",
    ],
)
def test_one_matrix_in_two_spellings(other: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "lora.safetensors", one_layer() | {other: torch.ones(2, 6)}), DOWN, other)


def test_two_adapters_in_one_file(tmp_path: Path) -> None:
    pair = {"A": torch.ones(2, 6), "B": torch.ones(5, 2)}
    tensors = {
        f"x.lora_{letter}.{name}.weight": pair[letter].clone() for letter in "AB" for name in ("first", "second")
    }
    refused(write(tmp_path / "lora.safetensors", tensors), "first", "second")


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
def test_keys_that_would_spoil_the_message(key: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "lora.safetensors", {key: torch.ones(2, 2)}))


def test_keys_that_would_spoil_the_report(tmp_path: Path) -> None:
    tensors = one_layer() | {"a\nb\x1b[2J" + "c" * 10**5: torch.ones(2)}
    notes = "".join(dsire.file_spectra(write(tmp_path / "lora.safetensors", tensors)).notes)
    assert notes.isprintable()
    assert len(notes) < 1000


@pytest.mark.parametrize(
    "key",
    [
        "x" + ".dora_scale" * 50_000 + "..",
        "lora_unet_" * 50_000 + "x",
        "x.lora" * 50_000,
        "." * 100_000,
        "x.lora_A." * 50_000,
    ],
    ids=lambda key: key[:12],
)
def test_keys_that_would_take_for_ever_to_match(key: str, tmp_path: Path) -> None:
    assert_sound(write(tmp_path / "lora.safetensors", one_layer() | {key: torch.ones(2, 2)}))


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
        {"lora_alpha": 4, "alpha_pattern": {"x": "four"}},
        {"lora_alpha": 4, "alpha_pattern": {"x": None}},
        {"lora_alpha": 4, "alpha_pattern": {"(": 3}},
        {"lora_alpha": 4, "alpha_pattern": {"*": 3}},
        {"lora_alpha": 4, "alpha_pattern": {"a{99999999999999999999}": 3}},
        {"lora_alpha": 4, "alpha_pattern": {"(?P<x>a)(?P<x>b)": 3}},
        {"peft_type": ["LORA"]},
        {"peft_type": "OFT"},
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
    refused(file)


def test_a_config_that_is_a_folder_or_a_link_to_itself_is_none(tmp_path: Path) -> None:
    file = adapter(tmp_path / "saved")
    config = file.with_name("adapter_config.json")
    config.unlink()
    config.mkdir()
    assert dsire.file_spectra(file).shapes == {"x": [5, 6, 2]}
    config.rmdir()
    config.symlink_to(config)
    assert dsire.file_spectra(file).shapes == {"x": [5, 6, 2]}


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|aa)+b", "(a*)*b", "((a+))+b", "(a+){2,}b", "(a+)+?b", "a*a*a*a*a*a*b", ".*.*.*.*.*.*b"]
)
def test_patterns_that_would_take_for_ever_to_match(pattern: str, tmp_path: Path) -> None:
    layer = "a" * 200
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 6), f"{layer}.lora_B.weight": torch.ones(5, 2)}
    config = {"lora_alpha": 4, "alpha_pattern": {pattern: 3}}
    refused(write(adapter(tmp_path / "saved", config), tensors), "alpha_pattern", pattern, seconds=5)


# ---------------------------------------------------------------------------------------------------------------------
# Folders and links


def test_links_that_go_in_circles(tmp_path: Path, run: Run) -> None:
    labelled = write_folder(tmp_path / "wise", [table_of(models_of(3))])
    folder = tmp_path / "loras"
    file = write_model(folder / "deep" / "lora.safetensors", ("new", 2))
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "self.safetensors").symlink_to(folder / "self.safetensors")
    (folder / "nowhere.safetensors").symlink_to(tmp_path / "nowhere")
    outcome = run("--dataset", labelled, "--subset=low_4", "--predict", folder)
    assert outcome.code == 2
    nowhere, own = sorted(outcome.err.splitlines())
    assert ("nowhere.safetensors" in nowhere, "self.safetensors" in own) == (True, True)
    assert [one["file"] for one in outcome.report["estimates"]] == [str(file)]


def test_a_folder_with_the_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    refused(tmp_path / "folder.safetensors")
    write_model(tmp_path / "folder.safetensors" / "lora.safetensors", ("new", 2))
    assert [file.name for file in dsire.weight_files(tmp_path)[0]] == ["lora.safetensors"]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", seconds=5)


def test_a_safetensors_file_with_another_ending(tmp_path: Path) -> None:
    """Refused by what it holds; a pickle ending means a pickle."""
    write(tmp_path / "lora.safetensors", one_layer()).rename(tmp_path / "lora.pt")
    refused(tmp_path / "lora.pt")


def test_hostile_layers_are_no_labelled_ones(tmp_path: Path, run: Run) -> None:
    """Layers that the labelled models do not have change nothing but a note."""
    labelled = write_folder(tmp_path / "wise", [table_of(models_of(3))])
    weights = {key: torch.from_numpy(matrix) for key, matrix in weights_of(("new", 2)).items()}
    more = {f"unet.more_{row}.lora.{word}.weight": torch.ones(1, 1) for row in range(50) for word in ("down", "up")}
    files = [write(tmp_path / "plain.safetensors", weights), write(tmp_path / "more.safetensors", weights | more)]
    plain, padded = run("--dataset", labelled, "--subset=low_4", "--predict", *files).report["estimates"]
    assert plain["votes"] == padded["votes"]
    assert any("50 layers" in warning for warning in padded["warnings"])
    assert len(LAYERS) == 3

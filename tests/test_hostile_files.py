"""Files that are damaged or made to do harm: one clear line each, and nothing of them is run."""

import json
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_writers import adapter, assert_spectra, one_layer, refusal, within, write, write_model
from torch import Tensor, ones

import dsire

DOWN, UP = "lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"
NAN, INF = float("nan"), float("inf")


def assert_sound(file: Path) -> None:
    """Read in time, with the spectra of `one_layer`."""
    with within(5):
        assert_spectra(dsire.file_spectra(file), {"x": tuple(one_layer().values())})


# Pickles
def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    for content in ([ones(2, 2)], ones(2, 2), 3, None, "text", {}, {"state_dict": {}}, {"state_dict": [ones(2, 2)]}):
        refusal(write(tmp_path / "lora.pt", content))


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
    sound = {"down": ones(2, 6, 1, 1), "up": ones(5, 2, 1, 1), "alpha": ones(1), "mid": ones(2, 2, 1, 1)}
    refusal(write(tmp_path / "lora.pt", one_layer(**sound | {part: make(sound[part])})))


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 0.99])
@pytest.mark.parametrize("form", ["safetensors", "zip", "old"])
def test_a_file_that_was_cut(form: str, keep: float, tmp_path: Path) -> None:
    file = write(tmp_path / ("lora.safetensors" if form == "safetensors" else "lora.ckpt"), one_layer())
    if form == "old":
        torch.save(one_layer(), file, _use_new_zipfile_serialization=False)
    os.truncate(file, int(keep * file.stat().st_size) if keep < 1 else int(keep))
    refusal(file)


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
TEXT = json.dumps(SOUND).encode()


def again(place: dict[str, Any]) -> bytes:
    return TEXT[:-1] + f', "{DOWN}": {json.dumps(place)}}}'.encode()


@pytest.mark.parametrize("header", [SOUND, again(SOUND[DOWN])], ids=["once", "twice, for the same bytes"])
def test_a_file_by_hand_is_read_when_it_is_sound(header: Any, tmp_path: Path) -> None:
    assert_sound(raw(tmp_path / "lora.safetensors", header))


def test_a_gigantic_header_and_a_length_that_lies(tmp_path: Path) -> None:
    """A hundred megabytes of spaces after the JSON, and as many of nothing in a sparse file."""
    for length in (0, 1, 2**20, 2**32 - 1, 2**63, 2**64 - 1):
        refusal(raw(tmp_path / "lora.safetensors", SOUND, length=length))
    refusal(raw(tmp_path / "spaces.safetensors", TEXT + b" " * 10**8))
    file = tmp_path / "sparse.safetensors"
    file.write_bytes(struct.pack("<Q", 2**33))
    os.truncate(file, 2**33 + 1000)
    refusal(file)


@pytest.mark.parametrize(
    "header",
    [
        *(SOUND | {UP: entry([5, 2], *its)} for its in ((40, 80), (88, 48), (48, 2**63), (48, 88, "F31"))),
        *(SOUND | {UP: entry(shape, 48, 88)} for shape in ([5, 3], [5, -2], [2**32, 2**32], [5, 2.0])),
        *(SOUND | {UP: its} for its in ({"dtype": "F32"}, None)),
        *(SOUND | {"__metadata__": its} for its in ({"nested": {"a": 1}}, [1])),
        *([SOUND], {}, {"__metadata__": {}}, b"{" + b'"a":{' * 100_000, b"[" * 100_000, b"\xff\xfe{}", TEXT[:-1]),
        again(entry([2, 6], 40, 88)),
    ],
    ids=lambda header: str(header)[-60:],
)
def test_a_header_that_lies(header: Any, tmp_path: Path) -> None:
    refusal(raw(tmp_path / "lora.safetensors", header))


# Tensors that are no LoRA
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"down": NAN * ones(2, 6)}, [DOWN, "NaN"]),
        ({"down": ones(1, 3), "up": torch.tensor([[NAN], [1], [1]])}, [UP, "NaN"]),
        ({"up": INF * ones(5, 2)}, [UP, "infinite"]),
        ({part: 1e200 * ones(*shape).double() for part, shape in (("down", (2, 6)), ("up", (5, 2)))}, [DOWN, UP]),
        ({"down": ones(6)}, [DOWN]),
        ({"down": ones(0, 6), "up": ones(5, 0)}, [DOWN]),
        ({"down": ones(3, 6)}, [DOWN, UP, "rank 3"]),
        ({"up": ones(2, 5)}, [DOWN, UP, "rank"]),
        ({"up": ones(5, 2, 3, 3)}, [DOWN, UP]),
        *(({"up": ones(5, 2).to(getattr(torch, name))}, [UP, name]) for name in ("int8", "bool", "complex64")),
        ({"up": ones(5, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, [UP, "loat4"]),
        *(({"mid": ones(*shape)}, ["lora_mid"]) for shape in ((3, 3, 3, 3), (2,), (2, 2), (2, 1, 3, 3))),
        ({"down": ones(2, 6, 3, 3), "mid": ones(2, 2, 3, 3)}, ["lora_mid"]),
        ({"mid": NAN * ones(2, 2, 3, 3)}, ["NaN"]),
        *(({"alpha": its}, ["alpha"]) for its in (NAN * ones(1), INF * ones(1), ones(0), ones(3), torch.tensor(1j))),
        *(({"alpha": its}, ["alpha"]) for its in ("four", [4.0], None, True, torch.tensor(True), 2**53)),
        ({"alpha": 1e300 * ones(1).double(), "up": 1e30 * ones(5, 2)}, ["alpha", "too large"]),
    ],
)
def test_matrices_that_do_not_fit(changes: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    ending = "safetensors" if all(isinstance(its, Tensor) for its in changes.values()) else "pt"
    refusal(write(tmp_path / f"lora.{ending}", one_layer(**changes)), *parts)


@pytest.mark.parametrize("lone", [DOWN, UP, "lora_unet_x.hada_w1_a", "lora_unet_x.lora_mid.weight"])
def test_a_matrix_without_its_partner(lone: str, tmp_path: Path) -> None:
    sound = {key.replace("_x.", "_y."): tensor for key, tensor in one_layer().items()}
    for tensors in ({lone: ones(2, 2)}, {lone: ones(2, 2)} | sound):
        refusal(write(tmp_path / "lora.safetensors", tensors), lone, "no partner")


@pytest.mark.parametrize("other", ["unet.x.lora.down.weight", "x.lora_A.first.weight", "x.lora_linear_layer.down"])
def test_one_matrix_in_two_spellings(other: str, tmp_path: Path) -> None:
    refusal(write(tmp_path / "lora.safetensors", one_layer() | {other: ones(2, 6)}), DOWN, other)


@pytest.mark.parametrize("start", ["lora_unet_", "x.", "."])
@pytest.mark.parametrize("word", [".dora_scale", "lora_unet_", ".lora", ".", ".lora_A.", "state_dict.", "a"])
def test_keys_that_would_take_for_ever_to_match(start: str, word: str, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", one_layer() | {start + word * 50_000: ones(2, 2)})
    with within(5), suppress(dsire.DsireError):
        assert_sound(file)


# adapter_config.json and the header
@pytest.mark.parametrize(
    "config",
    [
        *("", "{", "[]", "3", "null", '"LORA"', "\0\1\2", "[" * 100_000, '{"a":' * 100_000),
        '{"lora_alpha": ' + "9" * 5000 + "}",
        *(json.dumps({"lora_alpha": its}) for its in ("four", None, [4], {}, NAN, INF, 10**400)),
        *(json.dumps({"lora_alpha": 4, "alpha_pattern": its}) for its in ([1], "x")),
        *(json.dumps({"peft_type": its}) for its in ("OFT", ["LORA"], "x\n\x1b[2J")),
    ],
    ids=lambda config: config[:50],
)
@pytest.mark.parametrize("place", ["beside", "header"])
def test_a_config_that_makes_no_sense(place: str, config: str, tmp_path: Path) -> None:
    if place == "beside":
        refusal(adapter(tmp_path / "saved", config))
    else:
        refusal(write(tmp_path / "lora.safetensors", one_layer(), {"lora_adapter_metadata": config}))


# Folders and links
def test_which_files_of_a_folder_are_models(tmp_path: Path) -> None:
    for name in ("a/lora.safetensors", "b/lora.bin", "a/lora.pt", "a/._lora.safetensors"):
        write_model(tmp_path / name, ("new", 2))
    write(tmp_path / "b" / "optimizer.bin", {"state": {0: {"exp_avg": ones(2)}}})
    write(tmp_path / "b" / "other.safetensors", {"x.ia3_l": ones(2)})
    write(tmp_path / "b" / "lr.pt", {"_last_lr": [1.0]})
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "self.safetensors").symlink_to(tmp_path / "c" / "self.safetensors")
    for number in (1, 3):
        (tmp_path / f"model-0000{number}-of-00003.safetensors").touch()
    models, others = dsire.model_files(tmp_path)  # what is wrong with the last two is said as they are read
    wanted = ["a/lora.safetensors", "b/lora.bin", "c/self.safetensors", "model-00001-of-00003.safetensors"]
    assert [str(file.relative_to(tmp_path)) for file in models] == wanted
    assert {str(file.relative_to(tmp_path)): why.partition(":")[0] for file, why in others.items()} == {
        "a/lora.pt": "a file of the same name, with another ending, is taken",
        "b/optimizer.bin": "a trainer's state, by its name",
        "b/other.safetensors": "holds no LoRA, but x.ia3_l",
        "b/lr.pt": "holds no LoRA, and no tensors",
    }


def test_links_folders_and_pipes_with_the_name_of_a_file(tmp_path: Path) -> None:
    file = adapter(tmp_path / "saved")
    config = file.with_name("adapter_config.json")
    config.unlink()
    config.symlink_to(config)
    assert_sound(file)
    (tmp_path / "folder.safetensors").mkdir()
    refusal(tmp_path / "folder.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refusal(tmp_path / "pipe.safetensors", seconds=5)

"""A small network with LoRA, and that LoRA written in every layout that people hold on disk."""

import json
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import Model, weights_of
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import dsire


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = nn.Linear(12, 18), nn.Linear(16, 8)
        self.conv, self.point = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 12, 1)
        self.square, self.turned = nn.Conv2d(6, 6, 3), Conv1D(10, 6)
        self.words = nn.Embedding(11, 6)


Lora = dict[str, tuple[Tensor, Tensor]]  # path of a layer, with dots -> A [r, in], B [out, r]

# The keys of A, of B, and of alpha where the layout has one
WISE, OLD, NEW = "unet.{layer}.lora", "unet.{attention}.processor.{part}_lora", "unet.{layer}"
PEFT, KOHYA = "base_model.model.{layer}", "lora_unet_{flat}"
LAYOUTS = {
    "LoRA-WiSE": (f"{WISE}.down.weight", f"{WISE}.up.weight", ""),
    "attention processors": (f"{OLD}.down.weight", f"{OLD}.up.weight", ""),
    "diffusers with alpha": (f"{NEW}.lora_A.weight", f"{NEW}.lora_B.weight", f"{NEW}.alpha"),
    "adapter name": (f"{PEFT}.lora_A.default.weight", f"{PEFT}.lora_B.default.weight", ""),
    "kohya": (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight", f"{KOHYA}.alpha"),
}


def keys_of(layout: str, layer: str) -> list[str]:
    attention, _, part = layer.removesuffix(".0").rpartition(".")
    names = {"layer": layer, "flat": layer.replace(".", "_"), "attention": attention, "part": part}
    return [key.format(**names) for key in LAYOUTS[layout]]


def by_hand(layout: str, lora: Lora, alpha: float) -> dict[str, Tensor]:
    """Key -> tensor; the layouts that carry alpha get it."""
    tensors = {}
    for layer, (a, b) in lora.items():
        tensors |= dict(zip(keys_of(layout, layer), (a, b, torch.tensor(float(alpha))), strict=True))
    return {key: tensor for key, tensor in tensors.items() if key}


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> Path:
    """Write safetensors or, by the ending, a pickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".safetensors":
        torch.save(tensors, path)
    else:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, header)
    return path


def one_layer(**changes: Any) -> dict[str, Any]:
    """The tensors of a sound file with a single layer x of rank 2, in kohya's layout; the changes are `down=...`."""
    random = torch.Generator().manual_seed(0)
    parts = {"down": torch.randn(2, 6, generator=random), "up": torch.randn(5, 2, generator=random), **changes}
    keys = {part: f"lora_{part}.weight" for part in ("down", "up", "mid")}
    return {f"lora_unet_x.{keys.get(part, part)}": tensor for part, tensor in parts.items()}


def adapter(folder: Path, config: Any = None, **changes: Any) -> Path:
    """A PEFT adapter with a single layer x of rank 2, and its adapter_config.json (text, or an object to write)."""
    a, b = one_layer(**changes).values()
    tensors = {f"base_model.model.x.lora_{part}.weight": tensor for part, tensor in (("A", a), ("B", b))}
    path = write(folder / "adapter_model.safetensors", tensors)
    text = config if isinstance(config, str) else json.dumps({"peft_type": "LORA", **(config or {})})
    (folder / "adapter_config.json").write_text(text)
    return path


def write_model(path: Path, model: Model, header: dict[str, str] | None = None, **options: Any) -> Path:
    """The made-up model of a name and a size, in LoRA-WiSE's layout."""
    return write(path, weights_of(model, **options), header)


def assert_spectra(found: dsire.Spectra, lora: Lora, scale: float = 1) -> None:
    """Those of the full matrices, and no others; those of lower ranks end in zeros."""
    expected = {}
    for layer, (a, b) in lora.items():
        a, b = a.double().flatten(1), b.double().flatten(1)
        for matrix, full in (("A", a), ("B", b), ("BA", scale * b @ a)):
            expected[layer.replace(".", "_"), matrix] = torch.linalg.svdvals(full)[: len(a)]
    assert sorted(found.voters) == sorted(expected)
    for voter, values in zip(found.voters, found.values[:, 0], strict=True):
        wanted = dsire.of_rank(expected[voter], len(values))
        assert torch.allclose(values, wanted, rtol=0, atol=1e-9 * float(wanted[0])), voter


def changes(found: dsire.Spectra) -> dict[str, Tensor]:
    """Layer -> spectrum of the change of its weights."""
    rows = zip(found.voters, found.values[:, 0], strict=True)
    return {voter.layer: values for voter, values in rows if voter.matrix == "BA"}


def assert_changes(found: dsire.Spectra, expected: dict[str, Tensor], digits: float = 1e-9) -> None:
    """The same layers, and for each the largest singular values of the full matrix, worked out in float64."""
    its = changes(found)
    assert its.keys() == expected.keys()
    for layer, values in its.items():
        wanted = torch.linalg.svdvals(expected[layer].detach().double().flatten(1))[:32]
        width = max(len(values), len(wanted))
        assert (dsire.of_rank(values, width) - dsire.of_rank(wanted, width)).abs().max() <= digits * wanted[0], layer
        assert found.shapes[layer][:2] == list(expected[layer].flatten(1).shape)


def refusal(file: Path, *parts: str, base: Path | None = None, seconds: float = 20) -> str:
    """What is said of a file that is refused: in time, without a warning, in one line with these parts, but no name."""
    with within(seconds), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(dsire.DsireError) as error:
            dsire.file_spectra(file, base and dsire.open_base(str(base)))
    message = str(error.value)
    assert not message.startswith((str(file), file.name))
    assert "\n" not in dsire.shown(error.value)
    assert len(message) < 1000
    assert not [part for part in parts if part not in message], message
    return message


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Break off what takes longer."""

    def too_long(_: int, frame: FrameType | None) -> None:
        pytest.fail(f"still running after {seconds} s")  # no Exception, so nothing under test can catch it

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

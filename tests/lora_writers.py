"""A small network with LoRA, and that LoRA written in every layout that people hold on disk."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import Model, weights_of
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

import dsire

torch.set_num_threads(1)  # matrices this small are slower in several threads, many times so on a busy machine

Lora = dict[str, tuple[Tensor, Tensor]]  # path of a layer, with dots -> A [r, in], B [out, r]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def unet_with_lora(**options: Any) -> UNet2DConditionModel:
    """A UNet with a random LoRA of rank 4, neither A nor B zero."""
    torch.manual_seed(0)
    unet = new_unet()
    unet.add_adapter(LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **options}))
    return unet


def lora_of(network: torch.nn.Module) -> Lora:
    layers = {path: layer for path, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    return {
        path: (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
        for path, layer in layers.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files of the libraries that write them


def by_peft(unet: UNet2DConditionModel, folder: Path) -> Path:
    model = get_peft_model(new_unet(), unet.peft_config["default"])
    model.base_model.model.load_state_dict(unet.state_dict())
    model.save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def by_diffusers(unet: UNet2DConditionModel, folder: Path) -> Path:
    unet.save_lora_adapter(folder)
    return folder / "pytorch_lora_weights.safetensors"


def by_a_pipeline(unet: UNet2DConditionModel, folder: Path) -> Path:
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors"


LIBRARIES: dict[str, Callable[[UNet2DConditionModel, Path], Path]] = {
    "peft": by_peft,
    "diffusers": by_diffusers,
    "pipeline": by_a_pipeline,
}

# ---------------------------------------------------------------------------------------------------------------------
# The same by hand: the keys of A, of B, and of alpha where the layout has one


def wise_keys(layer: str) -> tuple[str, str, None]:
    return f"unet.{layer}.lora.down.weight", f"unet.{layer}.lora.up.weight", None


def attention_processor_keys(layer: str) -> tuple[str, str, None]:
    attention, _, projection = layer.removesuffix(".0").rpartition(".")
    start = f"unet.{attention}.processor.{projection}_lora"
    return f"{start}.down.weight", f"{start}.up.weight", None


def diffusers_keys(layer: str) -> tuple[str, str, str]:
    return f"unet.{layer}.lora_A.weight", f"unet.{layer}.lora_B.weight", f"unet.{layer}.alpha"


def adapter_name_keys(layer: str) -> tuple[str, str, None]:
    start = f"base_model.model.{layer}"
    return f"{start}.lora_A.default.weight", f"{start}.lora_B.default.weight", None


def kohya_keys(layer: str) -> tuple[str, str, str]:
    start = f"lora_unet_{layer.replace('.', '_')}"
    return f"{start}.lora_down.weight", f"{start}.lora_up.weight", f"{start}.alpha"


LAYOUTS: dict[str, Callable[[str], tuple[str, str, str | None]]] = {
    "LoRA-WiSE": wise_keys,
    "attention processors": attention_processor_keys,
    "diffusers with alpha": diffusers_keys,
    "adapter name": adapter_name_keys,
    "kohya": kohya_keys,
}


def by_hand(layout: str, lora: Lora, alpha: float) -> dict[str, Tensor]:
    """Key -> tensor; the layouts that carry alpha get it."""
    tensors = {}
    for layer, (a, b) in lora.items():
        a_key, b_key, alpha_key = LAYOUTS[layout](layer)
        tensors |= {a_key: a, b_key: b} | ({alpha_key: torch.tensor(float(alpha))} if alpha_key else {})
    return tensors


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
    keys = {
        "down": "lora_unet_x.lora_down.weight",
        "up": "lora_unet_x.lora_up.weight",
        "mid": "lora_unet_x.lora_mid.weight",
    }
    return {keys.get(part, f"lora_unet_x.{part}"): tensor for part, tensor in parts.items()}


def adapter(folder: Path, config: Any = None, **changes: Any) -> Path:
    """A PEFT adapter with a single layer x of rank 2, and its adapter_config.json (text, or an object to write)."""
    keys = {"lora_unet_x.lora_down.weight": "lora_A", "lora_unet_x.lora_up.weight": "lora_B"}
    tensors = {f"base_model.model.x.{keys[key]}.weight": tensor for key, tensor in one_layer(**changes).items()}
    path = write(folder / "adapter_model.safetensors", tensors)
    text = config if isinstance(config, str) else json.dumps({"peft_type": "LORA", **(config or {})})
    (folder / "adapter_config.json").write_text(text)
    return path


def write_model(path: Path, model: Model, header: dict[str, str] | None = None, **options: Any) -> Path:
    """The made-up model of a name and a size, in LoRA-WiSE's layout."""
    tensors = {key: torch.from_numpy(matrix) for key, matrix in weights_of(model, **options).items()}
    return write(path, tensors, header)


def spectra_by_the_book(lora: Lora, scale: float) -> dict[dsire.Voter, Tensor]:
    """Of the full matrices."""
    found = {}
    for layer, (a, b) in lora.items():
        a, b = a.double().flatten(1), b.double().flatten(1)
        for matrix, full in (("A", a), ("B", b), ("BA", scale * b @ a)):
            found[dsire.Voter(layer.replace(".", "_"), matrix)] = torch.linalg.svdvals(full)[: len(a)]
    return found


def assert_spectra(found: dsire.Spectra, expected: dict[dsire.Voter, Tensor], matrices: str = "A B BA") -> None:
    """The same voters, and the same spectra; those of lower ranks end in zeros."""
    assert set(found.voters) == set(expected)
    assert len(found.voters) == len(expected)
    for voter, values in zip(found.voters, found.values[:, 0], strict=True):
        if voter.matrix in matrices.split():
            wanted = torch.nn.functional.pad(expected[voter], (0, len(values) - len(expected[voter])))
            assert torch.allclose(values, wanted, rtol=0, atol=1e-9 * float(wanted[0])), voter


def changes(found: dsire.Spectra) -> dict[str, Tensor]:
    """Layer -> spectrum of the change of its weights."""
    rows = zip(found.voters, found.values[:, 0], strict=True)
    return {voter.layer: values for voter, values in rows if voter.matrix == "BA"}


def assert_changes(found: dsire.Spectra, expected: dict[str, Tensor], digits: float = 1e-9, count: int = 32) -> None:
    """The same layers, and for each the largest singular values of the full matrix, worked out in float64."""
    its = changes(found)
    assert its.keys() == expected.keys()
    for layer, values in its.items():
        wanted = torch.linalg.svdvals(expected[layer].detach().double().flatten(1))[:count]
        width = max(len(values), len(wanted))
        assert (dsire.of_rank(values, width) - dsire.of_rank(wanted, width)).abs().max() <= digits * wanted[0], layer
        assert found.shapes[layer][:2] == list(expected[layer].flatten(1).shape)


def refusal(file: Path, base: dsire.Weights | None = None) -> str:
    """What is said of a file that is refused: one line, that does not name it: whoever asks knows what it is called."""
    with pytest.raises(dsire.DsireError) as error:
        dsire.file_spectra(file, base)
    assert not str(error.value).startswith((str(file), file.name))
    assert "\n" not in dsire.shown(error.value)
    return str(error.value)


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

"""LoRA files: every layout gives the same layers, the same spectra and the scale that its writer gave it."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from lora_writers import LAYOUTS, Lora, Net, adapter, assert_changes, assert_spectra, by_hand, one_layer, refusal, write
from make_tiny_wise import new_unet
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

import dsire

STATES_ALPHA = {"diffusers with alpha", "kohya"}
PRODUCT = one_layer()["lora_unet_x.lora_up.weight"] @ one_layer()["lora_unet_x.lora_down.weight"]


def unet_with_lora(**options: Any) -> UNet2DConditionModel:
    """A UNet with a random LoRA of rank 4 and alpha 6, so the scale is 1.5; neither A nor B is zero."""
    torch.manual_seed(0)
    unet, targets = new_unet(), ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=4, target_modules=targets, lora_alpha=6, init_lora_weights=False, **options)
    unet.add_adapter(config)
    return unet


def lora_layers(network: nn.Module) -> dict[str, LoraLayer]:
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, LoraLayer)}


@pytest.fixture(scope="module")
def lora() -> Lora:
    layers = lora_layers(unet_with_lora()).items()
    return {path: tuple(its["default"].weight.detach() for its in (one.lora_A, one.lora_B)) for path, one in layers}


def assert_scale(file: Path, scale: float) -> None:
    assert_changes(dsire.file_spectra(file), {"x": scale * PRODUCT}, 1e-6)


# One LoRA, every writer
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_of_any_layout(layout: str, ending: str, lora: Lora, tmp_path: Path) -> None:
    found = dsire.file_spectra(write(tmp_path / f"lora{ending}", by_hand(layout, lora, alpha=6)))
    assert_spectra(found, lora, 1.5 if layout in STATES_ALPHA else 1)
    assert [note[:19] for note in found.notes] == ["alpha is not stated"] * (layout not in STATES_ALPHA)


# Read back: the same change of the weights as the library's own (which computes in float32)
CONFIGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 5},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
    "rank pattern": {"lora_alpha": 5, "rank_pattern": {"query": 4, "conv": 3}},
    "rank pattern and rslora": {"lora_alpha": 5, "rank_pattern": {"q.*y": 4}, "use_rslora": True},
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_peft_reads_the_same(config: str, ending: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    targets = ["words", "query", "key", "turned", "conv", "point"]
    options = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **CONFIGS[config])
    get_peft_model(Net(), options).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)
    file = write(file.with_suffix(".bin"), load_file(file)) if ending == "bin" else file
    layers = lora_layers(loaded.base_model.model)
    deltas = {path: layer.get_delta_weight("default") for path, layer in layers.items()}
    for name in ("words", "turned"):  # an embedding and Conv1D keep their weights as [in, out]
        deltas[name] = deltas[name].T
    assert_changes(dsire.file_spectra(file), deltas, 1e-6)


@pytest.mark.parametrize("library", ["diffusers", "pipeline"])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"rank_pattern": {"attn2.to_k": 3}}], ids=str)
def test_diffusers_reads_the_same(library: str, config: dict[str, Any], tmp_path: Path) -> None:
    unet, loaded, prefix = unet_with_lora(**config), new_unet(), "unet" if library == "pipeline" else None
    if prefix:
        weights, metadata = get_peft_model_state_dict(unet), unet.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(tmp_path, weights, unet_lora_adapter_metadata=metadata)
    else:
        unet.save_lora_adapter(tmp_path)
    loaded.load_lora_adapter(str(tmp_path), prefix=prefix, adapter_name="default", use_safetensors=True)
    layers = lora_layers(loaded)
    deltas = {path.replace(".", "_"): layer.get_delta_weight("default") for path, layer in layers.items()}
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 400}')  # the header goes before
    found = dsire.file_spectra(tmp_path / "pytorch_lora_weights.safetensors")
    assert_changes(found, deltas, 1e-6)
    assert (len(found.shapes), found.notes) == (56, [])


def response(convolutions: nn.Module, channels: int, size: int) -> Tensor:
    """The one kernel [out, in, size, size] that does the same: what comes of a single pixel in each channel."""
    pixels = torch.zeros(channels, channels, 2 * size - 1, 2 * size - 1)
    pixels[range(channels), range(channels), size - 1, size - 1] = 1
    return convolutions(pixels).detach().transpose(0, 1).flip(-1, -2)


@pytest.mark.parametrize("middle", [False, True])
def test_convolutions_do_what_the_layers_do(middle: bool, tmp_path: Path) -> None:
    """LoCon: down with the kernel, then up; with Tucker's middle, down of one pixel, middle with the kernel, up."""
    torch.manual_seed(0)
    layers = {"down": nn.Conv2d(5, 4, 1 if middle else 3, bias=False)}
    layers |= {"mid": nn.Conv2d(4, 4, 3, bias=False)} if middle else {}
    layers["up"] = nn.Conv2d(4, 7, 1, bias=False)
    tensors = one_layer(alpha=torch.tensor(6.0), **{part: layer.weight.detach() for part, layer in layers.items()})
    found = dsire.file_spectra(write(tmp_path / "locon.safetensors", tensors))
    assert_changes(found, {"x": 1.5 * response(nn.Sequential(*layers.values()), 5, 3)}, 1e-6)
    assert found.shapes == {"x": [7, 5 * 9, 4]}


# What is refused, and what is read with a note
OTHERS = {
    "IA3": "ia3_l",
    "VeRA": "vera_lambda_b vera_lambda_d",
    "OFT": "oft_R.weight",
    "BOFT": "boft_R",
    "FourierFT": "fourierft_spectrum",
    "GLoRA": "a1.weight a2.weight b1.weight b2.weight",
    "T-LoRA": "lambda_layer p_layer.weight q_layer.weight",
    "LyCORIS, IA3": "on_input",
    "LyCORIS, full": "diff diff_b",
    "Sam_LoRA": "w_a_000 w_b_000",
}


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_", "base_model.model."])
def test_a_file_without_a_key_of_lora_says_what_it_has(method: str, prefix: str, tmp_path: Path) -> None:
    keys = [f"{prefix}x.{key}" for key in OTHERS[method].split()]
    file = write(tmp_path / "other.safetensors", {key: torch.ones(3, 3) for key in (*keys, f"{prefix}x.alpha")})
    base = write(tmp_path / "base.safetensors", {"y.weight": torch.ones(3, 3)})
    for its in (None, base):
        message = refusal(file, "holds no LoRA", *keys[:2], base=its)
        assert not any(word in message for word in ("checkpoint", "partner", "up)"))


def test_what_is_of_no_layer_is_set_aside_and_counted(tmp_path: Path) -> None:
    more = {"lora_unet_norm.w_norm": torch.ones(3), "lora_unet_y.diff": torch.ones(3, 3)}
    more["lora_unet_z.alpha"] = torch.ones(1)
    found = dsire.file_spectra(write(tmp_path / "lora.safetensors", one_layer(alpha=torch.tensor(2.0)) | more))
    assert set(found.shapes) == {"x"}
    (note,) = found.notes
    assert note.startswith("3 tensors")
    assert "lora_unet_norm.w_norm" in note


# Shapes, dtypes, containers
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_dtypes(dtype: str, ending: str, tmp_path: Path) -> None:
    """And their ends: the smallest that aren't subnormal, and the largest, of which a product may overflow."""
    kind = getattr(torch, dtype)
    for number in (1, torch.finfo(kind).tiny, torch.finfo(kind).max / 64, float("inf")):
        tensors = {key: (number * tensor.double()).to(kind) for key, tensor in one_layer().items()}
        file = write(tmp_path / f"lora{ending}", tensors)
        a, b = tensors.values()
        if not (b.double() @ a.double()).isfinite().all():
            refusal(file, "finite")
            continue
        found = dsire.file_spectra(file)
        assert found.values.dtype == torch.float64
        assert_spectra(found, {"x": (a, b)})


@pytest.mark.parametrize("name", ["plain.bin", "parameters.PT", "views.pth", "old.ckpt", "LORA.SAFETENSORS"])
def test_containers(name: str, tmp_path: Path) -> None:
    tensors, file = one_layer(), tmp_path / name
    if name == "parameters.PT":
        tensors = {key: nn.Parameter(tensor) for key, tensor in tensors.items()}
    elif name == "views.pth":
        tensors = {key: torch.stack([tensor, tensor])[1] for key, tensor in tensors.items()}
    if "SAFE" in name:
        write(tmp_path / "lora.safetensors", tensors).rename(file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=name != "old.ckpt")
    found = dsire.file_spectra(file)
    assert not found.values.requires_grad
    assert_scale(file, 1)
    assert dsire.model_files(tmp_path) == ([file], {})


# adapter_config.json and the header
@pytest.mark.parametrize(("config", "scale"), [({"r": 2}, LoraConfig().lora_alpha / 2), ({"lora_alpha": -3}, 1.5)])
def test_a_config_without_alpha_means_the_default_of_peft(config: Any, scale: float, tmp_path: Path) -> None:
    file = adapter(tmp_path, config)
    assert_scale(file, scale)
    for alpha in (torch.tensor([6], dtype=torch.float16), torch.tensor([6]), torch.tensor(6.0), 6.0, 6):
        pickled = write(file.with_suffix(".bin"), load_file(file) | {"base_model.model.x.alpha": alpha})
        assert_scale(pickled, 3)


@pytest.mark.parametrize("r", [-7, 8, True, "2", 2.5])
def test_a_rank_that_is_not_that_of_the_matrices_is_refused(r: Any, tmp_path: Path) -> None:
    refusal(adapter(tmp_path, {"r": r, "lora_alpha": 3}), "has rank 2")


@pytest.mark.parametrize("pattern", ["x", "^model.x", r".*\.x", "(a|a)" * 35, "a?" * 45, "(a+)+$", "(", "x\n"])
def test_no_pattern_of_a_file_is_matched(pattern: str, tmp_path: Path) -> None:
    config = {"lora_alpha": 3, "r": 7}
    assert_scale(adapter(tmp_path, {**config, "rank_pattern": {pattern: 2}}), 1.5)
    refusal(adapter(tmp_path, {**config, "alpha_pattern": {pattern: 2}}), "alpha_pattern", seconds=5)


# The size that a file states
FOLDERS = ['{"a": %s}', '{"a": {"img_count": %s}}']
SETS = ["[%s]", '[{"subsets": %s}]', '[{"subsets": [%s]}]', '[{"subsets": [{"img_count": %s}]}]']
NONE = [*["None", "{", "[]", "{}", "null", "true", "-4", "1.5", "NaN", "1e999", '"many"'], "", "9" * 5000, "[" * 10**5]


@pytest.mark.parametrize("key", ["ss_dataset_dirs", "ss_datasets"])
@pytest.mark.parametrize("around", ["%s", *FOLDERS, *SETS])
def test_metadata_that_is_malformed_states_nothing(key: str, around: str, tmp_path: Path) -> None:
    for value in NONE:
        file = write(tmp_path / "kohya.safetensors", one_layer(), {key: around % value})
        assert dsire.file_spectra(file).sizes.tolist() == [0], value[:30]


def test_a_header_of_megabytes_is_not_looked_into_and_said(tmp_path: Path) -> None:
    text = json.dumps([{"subsets": [{"img_count": 1, "image_dir": f"{n:060}"}]} for n in range(50_000)])
    found = dsire.file_spectra(write(tmp_path / "kohya.safetensors", one_layer(), {"ss_datasets": text}))
    assert found.sizes.tolist() == [0]
    assert any("header is too long" in note for note in found.notes)

"""LoRA files: every layout gives the same layers, the same spectra and the scale that its writer gave it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import Run
from diffusers import UNet2DConditionModel
from lora_writers import (
    LAYOUTS,
    LIBRARIES,
    adapter,
    assert_changes,
    assert_spectra,
    by_hand,
    changes,
    lora_of,
    new_unet,
    one_layer,
    refusal,
    spectra_by_the_book,
    unet_with_lora,
    write,
)
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import dsire

STATES_ALPHA = {"diffusers with alpha", "kohya"}
UNSTATED = "alpha is not stated: BA is taken with scale 1"
DORA = "DoRA without its base: the magnitudes are set aside, only A and B are judged"


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """With a LoRA of rank 4 and alpha 6, so the scale is 1.5."""
    return unet_with_lora(lora_alpha=6)


def scales_of(path: Path) -> set[float]:
    """By how much BA is larger than the product of A and B in the file, of each layer, to six digits."""
    lora: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        for part, word in {"A": "lora_A", "B": "lora_B"}.items():
            if word in key:
                lora.setdefault(dsire.layer_name(key.partition(f".{word}")[0]), {})[part] = tensor.double()
    products = {layer: torch.linalg.svdvals(its["B"] @ its["A"])[0] for layer, its in lora.items()}
    found = changes(dsire.file_spectra(path))
    return {round(float(found[layer][0] / product), 6) for layer, product in products.items()}


# ---------------------------------------------------------------------------------------------------------------------
# One LoRA, every writer


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_file_of_a_library_has_the_spectra_of_its_matrices(
    library: str, unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    found = dsire.file_spectra(LIBRARIES[library](unet, tmp_path))
    assert len(found.shapes) == 32
    assert_spectra(found, spectra_by_the_book(lora_of(unet), scale=1.5))
    assert found.notes == []


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_of_any_layout_has_the_spectra_of_its_matrices(
    layout: str, ending: str, unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    lora = lora_of(unet)
    found = dsire.file_spectra(write(tmp_path / f"lora{ending}", by_hand(layout, lora, alpha=6)))
    assert_spectra(found, spectra_by_the_book(lora, 1.5 if layout in STATES_ALPHA else 1))
    assert found.notes == [UNSTATED] * (layout not in STATES_ALPHA)


def test_the_estimate_and_the_shares_do_not_depend_on_the_writer(tmp_path: Path, run: Run) -> None:
    """Alpha equals the rank, so that the layouts without alpha say the same as the others."""
    unet = unet_with_lora(lora_alpha=4)
    rows = ["file_name,label,name"]
    for size in (1, 2, 3):
        for name in "abcd":
            lora = {
                layer: (torch.randn_like(a) / (8 * size), torch.randn_like(b) / (8 * size))
                for layer, (a, b) in lora_of(unet).items()
            }
            write(tmp_path / "own" / f"{name}_{size}.safetensors", by_hand("kohya", lora, alpha=4))
            rows.append(f"{name}_{size}.safetensors,{size},{name}")
    (tmp_path / "own" / "metadata.csv").write_text("\n".join(rows))
    files = [writer(unet, tmp_path / library) for library, writer in LIBRARIES.items()]
    for layout in LAYOUTS:
        files.append(write(tmp_path / f"{layout}.safetensors", by_hand(layout, lora_of(unet), alpha=4)))
    outcome = run("--dataset", tmp_path / "own", "--predict", *files)
    assert outcome.code == 0, outcome.err
    found = outcome.report["estimates"]
    assert [one.pop("file") for one in found] == [str(file) for file in files]
    assert len({json.dumps({key: its for key, its in one.items() if key != "notes"}) for one in found}) == 1


def test_the_text_encoders_of_a_file_are_layers_of_their_own(tmp_path: Path) -> None:
    prefixes = ["lora_unet_x", "lora_te1_x", "lora_te2_x"]
    tensors = {key.replace("lora_unet_x", its): value.clone() for its in prefixes for key, value in one_layer().items()}
    found = dsire.file_spectra(write(tmp_path / "sdxl.safetensors", tensors))
    assert set(found.shapes) == {"x", "text_encoder_x", "text_encoder_2_x"}


# ---------------------------------------------------------------------------------------------------------------------
# Read back: the same change of the weights as the library's own (which computes in float32)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.query, self.key, self.value = nn.Linear(6, 9), nn.Linear(6, 7), Conv1D(5, 6)
        self.conv, self.point = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)


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
    targets = ["words", "query", "key", "value", "conv", "point"]
    options = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **CONFIGS[config])
    get_peft_model(Net(), options).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_model.safetensors"
    if ending == "bin":
        file = write(file.with_suffix(".bin"), load_file(file))
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "saved")
    layers = {path: layer for path, layer in loaded.named_modules() if isinstance(layer, LoraLayer)}
    deltas = {path.rpartition(".")[2]: layer.get_delta_weight("default") for path, layer in layers.items()}
    for name in ("words", "value"):  # an embedding and Conv1D keep their weights as [in, out]
        deltas[name] = deltas[name].T
    assert_changes(dsire.file_spectra(file), deltas, 1e-6)


def assert_changes_of(network: nn.Module, file: Path) -> None:
    layers = {path: layer for path, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    deltas = {path.replace(".", "_"): layer.get_delta_weight("default") for path, layer in layers.items()}
    assert_changes(dsire.file_spectra(file), deltas, 1e-6)


@pytest.mark.parametrize("library", ["diffusers", "pipeline"])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"rank_pattern": {"attn2.to_k": 3}}], ids=str)
def test_diffusers_reads_the_same(library: str, config: dict[str, Any], tmp_path: Path) -> None:
    file = LIBRARIES[library](unet_with_lora(lora_alpha=6, **config), tmp_path)
    loaded = new_unet()
    prefix = "unet" if library == "pipeline" else None
    loaded.load_lora_adapter(str(tmp_path), prefix=prefix, adapter_name="default", use_safetensors=True)
    assert_changes_of(loaded, file)


def response(convolutions: nn.Module, channels: int, size: int) -> Tensor:
    """The one kernel [out, in, size, size] that does the same: what comes of a single pixel in each channel."""
    pixels = torch.zeros(channels, channels, 2 * size - 1, 2 * size - 1)
    pixels[range(channels), range(channels), size - 1, size - 1] = 1
    return convolutions(pixels).detach().transpose(0, 1).flip(-1, -2)


@pytest.mark.parametrize("middle", [False, True])
def test_convolutions_do_what_the_layers_do(middle: bool, tmp_path: Path) -> None:
    """LoCon: down with the kernel, then up; with Tucker's middle, down of one pixel, middle with the kernel, up."""
    torch.manual_seed(0)
    kernel = 1 if middle else 3
    down, up = nn.Conv2d(5, 4, kernel, bias=False), nn.Conv2d(4, 7, 1, bias=False)
    mid = nn.Conv2d(4, 4, 3, bias=False)
    layers = nn.Sequential(down, mid, up) if middle else nn.Sequential(down, up)
    parts = {"down": down.weight, "up": up.weight, "alpha": torch.tensor(6.0)} | ({"mid": mid.weight} if middle else {})
    tensors = {key: tensor.detach() for key, tensor in one_layer(**parts).items()}
    found = dsire.file_spectra(write(tmp_path / "locon.safetensors", tensors))
    assert_changes(found, {"x": 1.5 * response(layers, 5, 3)}, 1e-6)
    assert found.shapes == {"x": [7, 5 * 9, 4]}


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what is read with a note


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("query.ia3_l", peft.IA3Config(target_modules=["query"], feedforward_modules=[])),
        ("vera_lambda_b", peft.VeraConfig(r=2, target_modules=["query"])),
        ("lora_E", peft.AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=["query"])),
        ("oft_R", peft.OFTConfig(r=0, oft_block_size=2, target_modules=["query"])),
    ],
    ids=["IA3", "VeRA", "AdaLoRA", "OFT"],
)
def test_other_methods_are_refused_and_their_keys_shown(key: str, config: Any, tmp_path: Path) -> None:
    get_peft_model(Net(), config).save_pretrained(tmp_path)
    message = refusal(tmp_path / "adapter_model.safetensors")
    assert key in message
    assert "checkpoint" not in message


@pytest.mark.parametrize(
    "keys",
    [
        ["on_input"],
        ["boft_R"],
        ["fourierft_spectrum"],
        ["a1.weight", "a2.weight", "b1.weight", "b2.weight"],  # GLoRA
        ["lambda_layer", "p_layer.weight", "q_layer.weight"],  # T-LoRA
        ["diff", "diff_b"],  # LyCORIS' full
        ["w_a_000", "w_b_000"],  # Sam_LoRA
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_", "base_model.model."])
def test_a_file_without_a_key_of_lora_says_what_it_has(keys: list[str], prefix: str, tmp_path: Path) -> None:
    """It is not said to lack a partner of its alpha, nor to be a full checkpoint; with and without a base."""
    tensors = {f"{prefix}x.{key}": torch.ones(3, 3) for key in keys} | {f"{prefix}x.alpha": torch.tensor(1.0)}
    file = write(tmp_path / "other.safetensors", tensors)
    base = dsire.open_base(write(tmp_path / "base.safetensors", {"y.weight": torch.ones(3, 3)}))
    for its in (None, base):
        message = refusal(file, its)
        assert "holds no LoRA" in message
        assert all(f"{prefix}x.{key}" in message for key in keys[:2])
        assert not any(word in message for word in ("checkpoint", "partner", "up)"))


def test_norms_and_diffs_beside_lora_are_set_aside_and_counted(tmp_path: Path) -> None:
    more = {"lora_unet_norm.w_norm": torch.ones(3), "lora_unet_y.diff": torch.ones(3, 3)}
    found = dsire.file_spectra(write(tmp_path / "lora.safetensors", one_layer(alpha=torch.tensor(2.0)) | more))
    assert set(found.shapes) == {"x"}
    (note,) = found.notes
    assert note.startswith("2 tensors")
    assert "lora_unet_norm.w_norm" in note


def test_a_full_checkpoint_without_its_base_is_told_of_it(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "model.safetensors", new_unet().state_dict()))
    assert "holds no LoRA" in message
    assert "--base" in message


def test_dora_is_read_without_its_magnitude_and_says_so(tmp_path: Path) -> None:
    """A and B vote; BA is no change of the weights."""
    torch.manual_seed(0)
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["query"], "init_lora_weights": False}
    get_peft_model(Net(), LoraConfig(use_dora=True, **options)).save_pretrained(tmp_path)
    kohya = write(tmp_path / "kohya" / "lora.pt", one_layer(alpha=torch.tensor(2.0), dora_scale=torch.ones(5, 1)))
    for file in (tmp_path / "adapter_model.safetensors", kohya):
        spectra = dsire.file_spectra(file)
        assert spectra.notes == [DORA]
        assert (spectra.method, {voter.matrix for voter in spectra.voters}) == ("DoRA", {"A", "B"})


# ---------------------------------------------------------------------------------------------------------------------
# Shapes, dtypes, containers


def test_ranks_may_differ_between_layers(tmp_path: Path) -> None:
    """Alpha is 6 everywhere, so the scales are 6, 3 and 1.2."""
    lora = {f"layer_{rank}": (torch.randn(rank, 7), torch.randn(8, rank)) for rank in (1, 2, 5)}
    found = dsire.file_spectra(write(tmp_path / "lora.safetensors", by_hand("kohya", lora, alpha=6)))
    expected = {}
    for layer, pair in lora.items():
        expected |= spectra_by_the_book({layer: pair}, 6 / len(pair[0]))
    assert_spectra(found, expected)
    assert found.values.shape == (9, 1, 5)
    assert found.shapes == {f"layer_{rank}": [8, 7, rank] for rank in (1, 2, 5)}


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_dtypes(dtype: str, ending: str, tmp_path: Path) -> None:
    """The spectra are those of the rounded numbers, worked out in float64."""
    lora = {"x": (torch.randn(3, 8).to(getattr(torch, dtype)), torch.randn(5, 3).to(getattr(torch, dtype)))}
    found = dsire.file_spectra(write(tmp_path / f"lora{ending}", by_hand("LoRA-WiSE", lora, 1)))
    assert found.values.dtype == torch.float64
    assert_spectra(found, spectra_by_the_book(lora, 1))


@pytest.mark.parametrize("alpha", [torch.tensor([6], dtype=torch.float16), torch.tensor([6]), 6.0, 6])
def test_alpha_may_be_of_any_number_type_and_of_shape_1(alpha: Any, tmp_path: Path) -> None:
    tensors = one_layer(alpha=alpha)
    product = tensors["lora_unet_x.lora_up.weight"] @ tensors["lora_unet_x.lora_down.weight"]
    assert_changes(dsire.file_spectra(write(tmp_path / "lora.pt", tensors)), {"x": 3 * product}, 1e-6)


PICKLES: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "plain.bin": torch.save,
    "nested.ckpt": lambda tensors, path: torch.save({"state_dict": tensors, "epoch": 3, "lr": 0.1}, path),
    "twice.pth": lambda tensors, path: torch.save({"state_dict": {"state_dict": tensors}}, path),
    "old.pt": lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "parameters.PT": lambda tensors, path: torch.save({key: nn.Parameter(t) for key, t in tensors.items()}, path),
    "views.pt": lambda tensors, path: torch.save({key: torch.stack([t, t])[1] for key, t in tensors.items()}, path),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(name: str, tmp_path: Path) -> None:
    PICKLES[name](one_layer(), tmp_path / name)
    found = dsire.file_spectra(tmp_path / name)
    assert not found.values.requires_grad
    a, b = one_layer().values()
    assert_spectra(found, spectra_by_the_book({"x": (a, b)}, 1))


def test_the_ending_may_be_in_capitals(tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", one_layer())
    assert dsire.model_files(tmp_path) == ([file], {})
    capital = file.rename(tmp_path / "LORA.SAFETENSORS")
    assert dsire.model_files(tmp_path) == ([capital], {})
    assert dsire.file_spectra(capital).shapes == {"x": [5, 6, 2]}


# ---------------------------------------------------------------------------------------------------------------------
# adapter_config.json and the header


def test_a_header_goes_before_a_config_that_lies_beside(tmp_path: Path, unet: UNet2DConditionModel) -> None:
    file = LIBRARIES["diffusers"](unet, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 400}')
    assert scales_of(file) == {1.5}


def test_alpha_in_the_file_goes_before_a_config_that_lies_beside(tmp_path: Path) -> None:
    file = adapter(tmp_path, {"lora_alpha": 400})
    write(file, load_file(file) | {"base_model.model.x.alpha": torch.tensor(3.0)})
    assert scales_of(file) == {1.5}


@pytest.mark.parametrize(("config", "scale"), [({"r": 2}, LoraConfig().lora_alpha / 2), ({"lora_alpha": -3}, 1.5)])
def test_a_config_without_alpha_means_the_default_of_peft(config: Any, scale: float, tmp_path: Path) -> None:
    assert scales_of(adapter(tmp_path, config)) == {scale}


@pytest.mark.parametrize("r", [-7, 8, True, "2", 2.5])
def test_a_rank_that_is_not_that_of_the_matrices_is_refused(r: Any, tmp_path: Path) -> None:
    """Then the settings are those of another file, or A and B are no plain pair."""
    assert "has rank 2" in refusal(adapter(tmp_path, {"r": r, "lora_alpha": 3}))


@pytest.mark.parametrize("pattern", ["x", "^model.x", r".*\.x", "(a|a)" * 35, "a?" * 45, "(a+)+$", "(", "x\n"])
@pytest.mark.parametrize("name", ["alpha_pattern", "rank_pattern"])
def test_no_pattern_of_a_file_is_matched(name: str, pattern: str, tmp_path: Path) -> None:
    """alpha_pattern is refused; of rank_pattern r is known from the matrices themselves."""
    file = adapter(tmp_path, {"lora_alpha": 3, "r": 7, name: {pattern: 2}})
    if name == "rank_pattern":
        assert scales_of(file) == {1.5}
    else:
        assert "alpha_pattern" in refusal(file)


# ---------------------------------------------------------------------------------------------------------------------
# The size that a file states


@pytest.mark.parametrize("key", ["ss_dataset_dirs", "ss_datasets", "ss_num_train_images", "ss_num_repeats"])
@pytest.mark.parametrize(
    "text",
    [
        *("", "None", "{", "[]", "{}", "null", "true", "-4", "0", "1.5", "NaN", "1e999", '"many"', "[[]]", "[null]"),
        *('{"a": 3}', '{"a": {"img_count": "x"}}', '{"a": {"img_count": -20}}', '{"a": {"img_count": true}}'),
        *('[{"subsets": 3}]', '[{"subsets": [3]}]', '[{"subsets": [{"img_count": [1]}]}]', "[" * 100_000),
        *("9" * 5000, "9" * 40, '{"a": {"img_count": %s}}' % ("9" * 40), '[{"subsets": [{"img_count": 1e30}]}]'),
        '[{"subsets": [{"img_count": %s}]}]' % ("9" * 40),
    ],
    ids=lambda text: text[:30],
)
def test_metadata_that_is_malformed_states_nothing(key: str, text: str, tmp_path: Path) -> None:
    found = dsire.file_spectra(write(tmp_path / "kohya.safetensors", one_layer(), {key: text}))
    assert found.sizes.tolist() == [0]


def test_a_header_of_megabytes_is_not_looked_into_and_said(tmp_path: Path) -> None:
    text = json.dumps([{"subsets": [{"img_count": 1, "image_dir": f"{n:060}"}]} for n in range(50_000)])
    found = dsire.file_spectra(write(tmp_path / "kohya.safetensors", one_layer(), {"ss_datasets": text}))
    assert found.sizes.tolist() == [0]
    assert any("header is too long" in note for note in found.notes)

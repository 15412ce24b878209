"""LoRA files: every layout gives the same layers, the same spectra and the scale that its writer gave it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import Run
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_writers import (
    LAYOUTS,
    LIBRARIES,
    Lora,
    adapter,
    assert_spectra,
    by_hand,
    lora_of,
    new_unet,
    one_layer,
    spectra_by_the_book,
    unet_with_lora,
    write,
)
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import dsire

STATES_ALPHA = {"diffusers with alpha", "kohya"}


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """With a LoRA of rank 4 and alpha 6, so the scale is 1.5."""
    return unet_with_lora(lora_alpha=6)


def matrices_in(path: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    weights, found = dsire.open_weights(path), {}
    for layer, pair in dsire.lora_layers(weights.keys, path.name, strays=True)[0].items():
        a, b = dsire.lora_matrices(weights, pair)
        found[layer] = (a, b, dsire.scale_of(weights, pair, dsire.settings_of(weights, pair), len(a)))
    return found


def products_in(path: Path) -> dict[str, Tensor]:
    return {layer: scale * b @ a for layer, (a, b, scale) in matrices_in(path).items()}


def one_spectrum(path: Path) -> dict[str, list[float]]:
    """Matrix -> spectrum, of a file with a single layer."""
    spectra = dsire.file_spectra(path)
    assert len(spectra.shapes) == 1
    return {voter.matrix: values.tolist() for voter, values in zip(spectra.voters, spectra.values[:, 0], strict=True)}


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
    unsaid = layout not in STATES_ALPHA
    assert found.notes == ["the file does not state alpha: BA is taken with scale 1"] * unsaid


def test_the_estimate_and_the_votes_do_not_depend_on_the_writer(tmp_path: Path, run: Run) -> None:
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
    assert [one["file"] for one in found] == [str(file) for file in files]
    for one in found[1:]:
        assert one["votes"] == found[0]["votes"]
        assert one["estimate"] == found[0]["estimate"]
        assert one["confidence_set"] == found[0]["confidence_set"]
    assert sum(found[0]["votes"].values()) == pytest.approx(1)
    assert found[0]["estimate"] == int(max(found[0]["votes"], key=found[0]["votes"].get))


def test_layer_names_have_one_form() -> None:
    names = [
        "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
        "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.processor.to_out",
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0",
        "base_model.model.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
        "base_model.model.unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
    ]
    wanted = "down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"
    assert {dsire.layer_name(name) for name in names} == {wanted}


@pytest.mark.parametrize(
    ("kohya", "diffusers"), [("lora_te", "text_encoder"), ("lora_te1", "text_encoder"), ("lora_te2", "text_encoder_2")]
)
def test_text_encoders_have_one_name_and_are_not_the_network(kohya: str, diffusers: str) -> None:
    flat, dotted = "text_model_encoder_layers_0_self_attn_q_proj", "text_model.encoder.layers.0.self_attn.q_proj"
    name = dsire.layer_name(f"{diffusers}.{dotted}")
    assert dsire.layer_name(f"{kohya}_{flat}") == name
    assert dsire.layer_name(f"{diffusers}.{dotted.removeprefix('text_model.')}") == name  # as transformers 5 saves it
    assert name not in {dsire.layer_name(dotted), dsire.layer_name(f"lora_unet_{flat}")}


def test_the_text_encoders_of_a_file_are_layers_of_their_own(tmp_path: Path) -> None:
    pair = one_layer()
    prefixes = ["lora_unet_x", "lora_te1_x", "lora_te2_x"]
    tensors = {key.replace("lora_unet_x", prefix): value.clone() for prefix in prefixes for key, value in pair.items()}
    found = dsire.file_spectra(write(tmp_path / "sdxl.safetensors", tensors))
    assert set(found.shapes) == {"x", "text_encoder_x", "text_encoder_2_x"}


# ---------------------------------------------------------------------------------------------------------------------
# Read back: the same ΔW as the library's own


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-6 * max(1, expected.abs().max())  # the libraries compute in float32


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
    "rank pattern and rslora": {"lora_alpha": 5, "rank_pattern": {"query": 4}, "use_rslora": True},
    "alpha pattern": {"lora_alpha": 5, "alpha_pattern": {"query": 7, "key|point": 11, "words": 13}},
    "both patterns": {"lora_alpha": 5, "rank_pattern": {"q.*y": 4}, "alpha_pattern": {"q.*y": 7, "query": 9}},
    "DoRA": {"lora_alpha": 5, "use_dora": True},
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_peft_reads_the_same(config: str, ending: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    targets = ["words", "query", "key", "value", "conv", "point"]
    settings = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **CONFIGS[config])
    get_peft_model(Net(), settings).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_model.safetensors"
    if ending == "bin":
        from safetensors.torch import load_file

        file = write(file.with_suffix(".bin"), load_file(file))
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "saved")
    found = products_in(file)
    layers = {path: layer for path, layer in loaded.named_modules() if isinstance(layer, LoraLayer)}
    assert set(found) == set(targets) == {path.rpartition(".")[2] for path in layers}
    for path, layer in layers.items():
        name = path.rpartition(".")[2]
        delta = layer.get_delta_weight("default").detach().double()
        turned = name in ("words", "value")  # an embedding and Conv1D keep their weights as [in, out]
        assert_close(found[name], delta.T if turned else delta.flatten(1))


@pytest.mark.parametrize("library", ["diffusers", "pipeline"])
@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 6},
        {"lora_alpha": 6, "use_rslora": True},
        {"lora_alpha": 6, "rank_pattern": {"attn2.to_k": 3}, "alpha_pattern": {"attn1.to_out.0": 7, "to_q": 9}},
    ],
    ids=["alpha", "rslora", "patterns"],
)
def test_diffusers_reads_the_same(library: str, config: dict[str, Any], tmp_path: Path) -> None:
    file = LIBRARIES[library](unet_with_lora(**config), tmp_path)
    loaded = new_unet()
    prefix = "unet" if library == "pipeline" else None
    loaded.load_lora_adapter(str(tmp_path), prefix=prefix, adapter_name="default", use_safetensors=True)
    assert_products_of(loaded, file)


def test_diffusers_reads_the_same_from_kohyas_form(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lora = {
        path: (torch.randn(a.shape), torch.randn(b.shape))
        for path, (a, b) in lora_of(unet_with_lora()).items()
        if "to_k" in path or "to_v" in path
    }
    file = write(tmp_path / "kohya.safetensors", by_hand("kohya", lora, alpha=2.5))
    state, alphas = StableDiffusionPipeline.lora_state_dict(file)
    loaded = new_unet()
    loaded.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name="default")
    assert_products_of(loaded, file)


def assert_products_of(network: nn.Module, file: Path) -> None:
    found = products_in(file)
    layers = {path: layer for path, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    assert {path.replace(".", "_") for path in layers} == set(found)
    for path, layer in layers.items():
        delta = layer.get_delta_weight("default").detach().double()
        assert_close(found[path.replace(".", "_")], delta)


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
    found = products_in(write(tmp_path / "locon.safetensors", tensors))["x"]
    assert_close(found, 1.5 * response(layers, 5, 3).double().flatten(1))
    assert dsire.file_spectra(tmp_path / "locon.safetensors").shapes == {"x": [7, 5 * 9, 4]}


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what is read with a note


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("(IA)3", peft.IA3Config(target_modules=["query"], feedforward_modules=[])),
        ("VeRA", peft.VeraConfig(r=2, target_modules=["query"])),
        ("AdaLoRA", peft.AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=["query"])),
        ("OFT", peft.OFTConfig(r=0, oft_block_size=2, target_modules=["query"])),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_other_methods_are_refused_by_name(method: str, settings: Any, with_config: bool, tmp_path: Path) -> None:
    get_peft_model(Net(), settings).save_pretrained(tmp_path)
    if not with_config:
        (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(dsire.DsireError) as error:
        dsire.file_spectra(tmp_path / "adapter_model.safetensors")
    assert method in str(error.value)
    assert "adapter_model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("lora_unet_x.on_input", "(IA)3"),
        ("base_model.model.x.boft_R", "BOFT"),
        ("lora_unet_x.oft_blocks", "OFT"),
        ("base_model.model.x.hra_u", "HRA"),
        ("base_model.model.x.fourierft_spectrum", "FourierFT"),
    ],
)
def test_other_methods_of_lycoris_are_refused_by_name(key: str, method: str, tmp_path: Path) -> None:
    tensors = {"lora_unet_x.alpha": torch.tensor(1.0), key: torch.ones(3, 3)}
    with pytest.raises(dsire.DsireError, match=method.replace("(", r"\(").replace(")", r"\)")):
        dsire.file_spectra(write(tmp_path / "lycoris.safetensors", tensors))


def test_a_full_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", new_unet().state_dict())
    with pytest.raises(dsire.DsireError, match=r"model\.safetensors.*full checkpoint.*--base"):
        dsire.file_spectra(file)


def test_dora_is_read_without_its_magnitude_and_says_so(tmp_path: Path) -> None:
    """A and B vote; BA is no change of the weights."""
    torch.manual_seed(0)
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["query"], "init_lora_weights": False}
    get_peft_model(Net(), LoraConfig(use_dora=True, **options)).save_pretrained(tmp_path)
    spectra = dsire.file_spectra(tmp_path / "adapter_model.safetensors")
    (note,) = spectra.notes
    assert "DoRA" in note
    assert (spectra.method, {voter.matrix for voter in spectra.voters}) == ("DoRA", {"A", "B"})
    kohya = write(tmp_path / "kohya.safetensors", one_layer(alpha=torch.tensor(2.0), dora_scale=torch.ones(5, 1)))
    (note,) = dsire.file_spectra(kohya).notes
    assert "DoRA" in note


def test_other_tensors_are_counted(tmp_path: Path) -> None:
    extra = {"emb_params": torch.ones(2, 3), "bundle_emb.word": torch.ones(2)}
    alpha = torch.tensor(2.0)
    (note,) = dsire.file_spectra(write(tmp_path / "lora.safetensors", one_layer(alpha=alpha) | extra)).notes
    assert note.startswith("2 tensors")
    assert "bundle_emb.word" in note or "emb_params" in note


# ---------------------------------------------------------------------------------------------------------------------
# Shapes, dtypes, containers


def test_fused_layers_and_unusual_paths_are_layers_like_others(tmp_path: Path) -> None:
    names = ["double_blocks.0.img_attn.qkv", "layers.3.self_attn.qkv_proj", "single_blocks.1.linear1"]
    lora = {name: (torch.randn(2, 6), torch.randn(18, 2)) for name in names}
    for layout in ("kohya", "adapter name"):
        found = dsire.file_spectra(write(tmp_path / f"{layout}.safetensors", by_hand(layout, lora, alpha=2)))
        assert_spectra(found, spectra_by_the_book(lora, 1))
        assert list(found.shapes.values()) == [[18, 6, 2]] * 3


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


@pytest.mark.parametrize("dtype", ["float16", "int64"])
def test_alpha_may_be_of_any_number_type_and_of_shape_1(dtype: str, tmp_path: Path) -> None:
    alpha = torch.tensor([6], dtype=getattr(torch, dtype))
    ((_, _, scale),) = matrices_in(write(tmp_path / "lora.safetensors", one_layer(alpha=alpha))).values()
    assert scale == 3


def test_alpha_may_be_a_plain_number_in_a_pickle(tmp_path: Path) -> None:
    ((_, _, scale),) = matrices_in(write(tmp_path / "lora.pt", one_layer(alpha=6.0))).values()
    assert scale == 3


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
    sound = one_layer()
    lora: Lora = {"x": (sound["lora_unet_x.lora_down.weight"], sound["lora_unet_x.lora_up.weight"])}
    assert_spectra(found, spectra_by_the_book(lora, 1))


def test_the_ending_may_be_in_capitals(tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", one_layer())
    assert dsire.weight_files(tmp_path)[0] == [file]
    capital = file.rename(tmp_path / "LORA.SAFETENSORS")
    assert dsire.weight_files(tmp_path)[0] == [capital]
    assert dsire.file_spectra(capital).shapes == {"x": [5, 6, 2]}


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    """A sparse file with 4 GiB beside the LoRA."""
    small = one_layer()
    header, offset = {}, 0
    for key, tensor in small.items():
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    header["large"] = {"dtype": "F32", "shape": [2**30], "data_offsets": [offset, offset + 2**32]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = tmp_path / "large.safetensors"
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in small.values():
            stream.write(tensor.numpy().tobytes())
        stream.truncate(8 + len(text) + offset + 2**32)
    assert one_spectrum(file) == one_spectrum(write(tmp_path / "small.safetensors", small))


# ---------------------------------------------------------------------------------------------------------------------
# adapter_config.json and the header


def test_a_header_goes_before_a_config_that_lies_beside(tmp_path: Path, unet: UNet2DConditionModel) -> None:
    file = LIBRARIES["diffusers"](unet, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 400}')
    assert {scale for _, _, scale in matrices_in(file).values()} == {1.5}


def test_alpha_in_the_file_goes_before_a_config_that_lies_beside(tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", one_layer(alpha=torch.tensor(3.0)))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 400}')
    ((_, _, scale),) = matrices_in(file).values()
    assert scale == 1.5


def test_a_config_without_alpha_means_the_default_of_peft(tmp_path: Path) -> None:
    ((_, _, scale),) = matrices_in(adapter(tmp_path, {"r": 2})).values()
    assert scale == LoraConfig().lora_alpha / 2


@pytest.mark.parametrize("r", [-7, 8, True, "2"])
def test_a_rank_that_is_not_that_of_the_matrices_is_refused(r: Any, tmp_path: Path) -> None:
    """Then the settings are those of another file, or A and B are no plain pair."""
    with pytest.raises(dsire.DsireError, match=r"r is .*has rank 2"):
        matrices_in(adapter(tmp_path, {"r": r, "lora_alpha": 3}))


@pytest.mark.parametrize("pattern", ["x", "other|x", "^x", "[a-z]", ".*"])
def test_alpha_patterns(pattern: str, tmp_path: Path) -> None:
    ((_, _, scale),) = matrices_in(adapter(tmp_path, {"lora_alpha": 3, "alpha_pattern": {"y": 1, pattern: 5}})).values()
    by_peft = get_pattern_key(["y", pattern], "x")
    assert scale == (5 if by_peft == pattern else 3) / 2


# ---------------------------------------------------------------------------------------------------------------------
# The size that a file states


@pytest.mark.parametrize(
    ("header", "size", "key"),
    [
        ({"ss_dataset_dirs": {"10_cat": {"n_repeats": 10, "img_count": 20}}}, 20, "ss_dataset_dirs"),
        ({"ss_dataset_dirs": {"1_a": {"n_repeats": 1, "img_count": 3}, "5_b": {"img_count": 4}}}, 7, "ss_dataset_dirs"),
        (
            {"ss_datasets": [{"subsets": [{"img_count": 6, "num_repeats": 2}, {"img_count": 100, "is_reg": True}]}]},
            6,
            "ss_datasets",
        ),
        ({"ss_datasets": [{"subsets": [{"img_count": 6}]}, {"subsets": [{"img_count": 2}]}]}, 8, "ss_datasets"),
        ({"ss_dataset_dirs": {"2_a": {"img_count": 3}}, "ss_num_train_images": "6"}, 3, "ss_dataset_dirs"),
        ({"ss_dataset_dirs": {}, "ss_datasets": [{"subsets": [{"img_count": 5}]}]}, 5, "ss_datasets"),
        ({"ss_num_train_images": "60", "ss_num_repeats": "10"}, 6, "ss_num_train_images"),
    ],
)
def test_a_stated_size_and_its_source(header: dict[str, Any], size: int, key: str, tmp_path: Path) -> None:
    text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in header.items()}
    found = dsire.file_spectra(write(tmp_path / "kohya.safetensors", one_layer(alpha=torch.tensor(2.0)), text))
    assert found.sizes.tolist() == [size]
    (note,) = found.notes
    assert f"{size} images" in note
    assert key in note


@pytest.mark.parametrize("key", ["ss_dataset_dirs", "ss_datasets", "ss_num_train_images", "ss_num_repeats"])
@pytest.mark.parametrize(
    "text",
    [
        *("", "None", "{", "[]", "{}", "null", "true", "-4", "0", "1.5", "NaN", "1e999", '"many"', "[[]]", "[null]"),
        *('{"a": 3}', '{"a": {"img_count": "20"}}', '{"a": {"img_count": -20}}', '{"a": {"img_count": true}}'),
        *('[{"subsets": 3}]', '[{"subsets": [3]}]', '[{"subsets": [{"img_count": [1]}]}]', "[" * 100_000),
        *("9" * 5000, "9" * 40, '{"a": {"img_count": %s}}' % ("9" * 40), '[{"subsets": [{"img_count": 1e30}]}]'),
        '[{"subsets": [{"img_count": %s}]}]' % ("9" * 40),
    ],
    ids=lambda text: text[:30],
)
def test_metadata_that_is_malformed_states_nothing(key: str, text: str, tmp_path: Path) -> None:
    found = dsire.file_spectra(write(tmp_path / "kohya.safetensors", one_layer(), {key: text}))
    assert found.sizes.tolist() == [0]


def test_a_number_of_images_without_the_repeats_states_nothing(tmp_path: Path) -> None:
    """Kohya counts an image as often as it is repeated."""
    header = {"ss_num_train_images": "90"}
    assert dsire.file_spectra(write(tmp_path / "kohya.safetensors", one_layer(), header)).sizes.tolist() == [0]


# ---------------------------------------------------------------------------------------------------------------------
# Anything


@st.composite
def loras(draw: st.DrawFn) -> Lora:
    """Up to four layers with paths of one to five parts, of any shape and rank, linear or convolutional."""
    word = st.from_regex(r"[a-z][a-z0-9]{0,6}|[0-9]", fullmatch=True)
    paths = draw(
        st.lists(
            st.lists(word, min_size=1, max_size=4).map(lambda parts: ".".join(["body", *parts])), min_size=1, max_size=4
        )
    )
    lora = {}
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    for path in {path.replace(".", "_"): path for path in paths}.values():
        rank, inputs, outputs = (draw(st.integers(1, 9)) for _ in range(3))
        kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (3,)]))
        a = torch.randn(rank, inputs, *kernel, generator=random, dtype=torch.float64)
        b = torch.randn(outputs, rank, *(1 for _ in kernel), generator=random, dtype=torch.float64)
        lora[path] = (a.to(dtype), b.to(dtype))
    return lora


@settings(max_examples=15)
@given(loras(), st.sampled_from([".safetensors", ".bin"]), st.floats(0.1, 100))
def test_any_lora_in_any_layout_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, lora: Lora, ending: str, alpha: float
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for layout in LAYOUTS:
        if layout == "attention processors":  # these write no index at the end
            lora = {f"{path}.to_out.0": pair for path, pair in lora.items()}
        found = dsire.file_spectra(write(folder / f"lora{ending}", by_hand(layout, lora, alpha)))
        expected = {}
        for layer, (a, b) in lora.items():
            scale = float(torch.tensor(alpha)) / len(a) if layout in STATES_ALPHA else 1
            expected |= spectra_by_the_book({layer: (a, b)}, scale)
        assert_spectra(found, expected)
    shutil.rmtree(folder)

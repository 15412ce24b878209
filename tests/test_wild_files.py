"""LoRA files as people hold them: read with the values of whoever wrote them, or refused in one line that says why."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from lora_writers import adapter, changes, one_layer, refusal, write
from peft import LoraConfig
from torch import Tensor, nn

import dsire

A, B = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)), torch.arange(10.0).view(5, 2) - 3
DOWN, UP = "lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"
UNSTATED = "alpha is not stated: BA is taken with scale 1"


def largest(scale: float, a: Tensor = A, b: Tensor = B) -> float:
    """The largest singular value of the scaled product, from the full matrix."""
    return float(np.linalg.svd(scale * (b.double() @ a.double()).numpy(), compute_uv=False)[0])


def products(file: Path) -> dict[str, float]:
    """Layer -> the largest singular value of BA."""
    return {layer: float(values[0]) for layer, values in changes(dsire.file_spectra(file)).items()}


def pair(layer: str, keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")) -> dict[str, Tensor]:
    return {f"{layer}.{keys[0]}": A.clone(), f"{layer}.{keys[1]}": B.clone()}


# ---------------------------------------------------------------------------------------------------------------------
# What is a layer's name

XL_BLOCKS = ["input_blocks_4_1", "input_blocks_8_1", "middle_block_1", "output_blocks_0_1", "output_blocks_5_1"]


@pytest.mark.parametrize("inner", ["transformer_blocks_0_attn1_to_q", "proj_in"])
@pytest.mark.parametrize("block", XL_BLOCKS)
def test_names_of_ldm_are_those_of_diffusers(block: str, inner: str) -> None:
    class Config:
        layers_per_block = 2

    key = f"lora_unet_{block}_{inner}.lora_down.weight"
    (by_diffusers,) = _maybe_map_sgm_blocks_to_diffusers({key: A}, Config())
    for ldm, name in (("input", "down"), ("middle", "mid"), ("output", "up")):  # as it does elsewhere
        by_diffusers = by_diffusers.replace(f"{ldm}_block", f"{name}_block")
    assert f"lora_unet_{dsire.layer_name(key.partition('.')[0])}.lora_down.weight" == by_diffusers


@pytest.mark.parametrize(
    ("ldm", "diffusers"),
    [
        ("input_blocks.1.1.proj_in", "down_blocks.0.attentions.0.proj_in"),
        ("input_blocks.2.0.in_layers.2", "down_blocks.0.resnets.1.conv1"),
        ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks.11.0.out_layers.3", "down_blocks.3.resnets.1.conv2"),
        ("middle_block.0.emb_layers.1", "mid_block.resnets.0.time_emb_proj"),
        ("middle_block.2.in_layers.2", "mid_block.resnets.1.conv1"),
        ("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
        ("output_blocks.9.0.skip_connection", "up_blocks.3.resnets.0.conv_shortcut"),
        ("output_blocks.11.1.transformer_blocks.0.ff.net.2", "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2"),
        ("input_blocks.0.0", "conv_in"),
        ("out.2", "conv_out"),
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
    ],
)
def test_names_of_ldm_in_sd_1_5(ldm: str, diffusers: str) -> None:
    """Worked out by hand from the two definitions of the network."""
    for prefix in ("model.diffusion_model.", "lora_unet_"):
        path = ldm if prefix.endswith(".") else ldm.replace(".", "_")
        assert dsire.layer_name(prefix + path) == dsire.layer_name(f"unet.{diffusers}")


@pytest.mark.parametrize(
    "prefix",
    [
        *("transformer.", "diffusion_model.", "transformer._orig_mod.", "_orig_mod.", "base_model.model._orig_mod."),
        *("module.", "base_model.model.module.", "_fsdp_wrapped_module.", "pipe.dit.", "model.diffusion_model."),
        *("net.", "model.", "state_dict.", "lycoris_", "lora_prior_unet_", "lora_unet__orig_mod_", "lora_unet_", ""),
        *("module._forward_module.", "base_model.model.base_model.model."),
    ],
)
def test_prefixes_of_wrappers_are_stripped(prefix: str) -> None:
    assert dsire.layer_name(f"{prefix}blocks.0.attn1.to_q") == "blocks_0_attn1_to_q"
    assert dsire.layer_name(f"{prefix}blocks.0.attn1.processor.to_out") == "blocks_0_attn1_to_out_0"
    assert dsire.layer_name("blocks.0._checkpoint_wrapped_module.attn1.to_q") == "blocks_0_attn1_to_q"
    assert dsire.layer_name("transformer_2.blocks.0.attn1.to_q") == "transformer_2_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("text_encoder.", "text_encoders.clip_l.transformer. lora_te_ lora_te1_ lora_prior_te_ clip_l.transformer."),
        ("text_encoder.", "cond_stage_model.transformer. conditioner.embedders.0.transformer. module.text_encoder."),
        ("text_encoder_2.", "text_encoders.clip_g.transformer. lora_te2_"),
        ("text_encoder_3.", "text_encoders.t5xxl.transformer. lora_te3_"),
    ],
)
def test_text_encoders_of_all_writers(network: str, names: str) -> None:
    wanted = network.replace(".", "_") + "layers_0_q_proj"
    for name in (*names.split(), network):
        assert dsire.layer_name(f"{name}layers.0.q_proj") == wanted
        assert dsire.layer_name(f"{name}text_model.layers.0.q_proj") == wanted  # CLIP has it or not


@pytest.mark.parametrize("keys", [("lora_A", "lora_B"), ("lora_A.default", "lora_B.default")])
def test_layouts_of_other_writers(keys: tuple[str, str], tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", pair("layers.0.q", keys))
    assert products(file) == pytest.approx({"layers_0_q": largest(1)})


NESTED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "model": lambda tensors: {"model": tensors, "epoch": 3},
    "module": lambda tensors: {"module": tensors, "optimizer": {"state": {0: {"step": 3}}}},
    "unet": lambda tensors: {"unet": tensors, "text_encoder": tensors | {}},
    "deep": lambda tensors: {"state_dict": {"params": {"model": tensors}}},
    "model_state_dict": lambda tensors: {"model_state_dict": tensors},
}


@pytest.mark.parametrize("nested", NESTED)
def test_pickles_with_tensors_further_down(nested: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.pt"
    torch.save(NESTED[nested](pair("x", ("to_q_lora.down.weight", "to_q_lora.up.weight"))), file)
    wanted = {"x_to_q": largest(1)} | ({"text_encoder_x_to_q": largest(1)} if nested == "unet" else {})
    assert products(file) == pytest.approx(wanted)


def test_dictionaries_that_hold_each_other_many_times_are_read_once(tmp_path: Path) -> None:
    """A thousand million ways lead to the inner one."""
    inner: dict[str, Any] = pair("x")
    for _ in range(3):
        inner = {str(number): inner for number in range(1000)}
    torch.save(inner, tmp_path / "lora.pt")
    assert len(dsire.file_spectra(tmp_path / "lora.pt").shapes) == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is not understood is refused, and shown


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([A, B], "nothing names the layers"),
        ({"x.lora_mystery.weight": A}, "x.lora_mystery.weight"),
        ({"x.lora.0.weight": A, "x.lora.1.weight": B}, "x.lora.0.weight"),
        ({DOWN: [[1.0, 2.0]]}, DOWN),
        (one_layer(alpha=True), "alpha"),
        (one_layer(alpha=torch.tensor(True)), "alpha"),
        (one_layer() | {"lora_unet_x.lora_mixer": A}, "lora_mixer"),
        (one_layer() | {"lora_unet_x.lora_diag": A}, "lora_diag"),  # KaSA
        (one_layer() | {"lora_unet_x.lora_down.weight_scale": A}, "weight_scale"),
        (one_layer() | {"lora_unet_y.lora_down.weight": A}, "lora_unet_y.lora_down.weight"),
        (one_layer() | {"lora_unet_x.hada_w1_a": A}, DOWN),
        (pair("mlp.experts"), "experts"),  # target_parameters
        (pair("mlp.experts.base_layer"), "base_layer"),
        ({"model.q.lora_a": A.T, "model.q.lora_b": B.T}, "model.q.lora_a"),  # MLX
        (pair("layers.0.q", ("lora_a.weight", "lora_b.weight")), "lora_a.weight"),  # torchtune
        (pair("blocks.1.processor", ("qkv_lora1.down.weight", "qkv_lora1.up.weight")), "qkv_lora1"),  # XLabs
    ],
)
def test_what_has_lora_in_its_keys_is_named(content: Any, said: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "lora.pt", content))
    assert said in message
    assert not any(word in message for word in ("checkpoint", "empty"))


def test_an_alpha_without_its_layer_is_set_aside_and_said(tmp_path: Path) -> None:
    stray = {"lora_unet_y.alpha": torch.ones(1)}
    found = dsire.file_spectra(write(tmp_path / "lora.safetensors", one_layer(alpha=torch.tensor(2.0)) | stray))
    assert set(found.shapes) == {"x"}
    assert found.notes == ["1 tensor set aside, as not of LoRA's matrices, such as lora_unet_y.alpha"]


# ---------------------------------------------------------------------------------------------------------------------
# What states alpha


@pytest.mark.parametrize("layer", ["lora_unet_x", "diffusion_model.x", "x"])
@pytest.mark.parametrize("key", ["alpha", "lora_alpha", "network_alpha", "ss_network_alpha", "unet.lora_alpha"])
def test_alpha_in_the_header_alone(key: str, layer: str, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", pair(layer), {key: "3.0", "rank": "2", "ss_network_dim": "2"})
    assert products(file) == pytest.approx({"x": largest(1.5)})
    assert dsire.file_spectra(file).notes == []


@pytest.mark.parametrize(
    ("header", "scale"),
    [
        ({"lora_alpha": "3", "use_rslora": "True"}, 3 / 2**0.5),
        ({"alpha": "None", "rank": "2"}, 1),
        ({"text_encoder.lora_alpha": "3"}, 1),
        ({"lora_adapter_metadata": '{"text_encoder.lora_alpha": 3, "text_encoder.r": 2}'}, 1),
        ({"lora_adapter_metadata": '{"transformer.lora_alpha": 3, "transformer.r": 2}'}, 1.5),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": 3, "text_encoder.lora_alpha": 7}'}, 1.5),
        ({"lora_adapter_metadata": '{"lora_alpha": 3}'}, 1.5),
        ({"lora_adapter_metadata": '{"lora_alpha": 7}', "alpha": "3"}, 1.5),
    ],
)
@pytest.mark.parametrize("layer", ["lora_unet_x", "unet.x", "x"])
def test_settings_are_those_of_the_network(header: dict[str, str], scale: float, layer: str, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", pair(layer), header)
    assert products(file) == pytest.approx({"x": largest(scale)})
    assert dsire.file_spectra(file).notes == [UNSTATED] * (scale == 1)


def test_settings_of_one_network_of_two(tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", pair("unet.x") | pair("text_encoder.x"), {"unet.alpha": "3"})
    assert products(file) == pytest.approx({"x": largest(1.5), "text_encoder_x": largest(1)})
    assert dsire.file_spectra(file).notes == [f"{UNSTATED} (1 of 2 layers, such as text_encoder_x)"]


def test_alpha_beside_the_tensors_of_a_pickle(tmp_path: Path) -> None:
    torch.save({"state_dict": pair("x"), "lora_alpha": 3, "r": 2}, tmp_path / "lora.pt")
    assert products(tmp_path / "lora.pt") == pytest.approx({"x": largest(1.5)})
    torch.save(pair("x") | pair("y") | pair("z") | {"x.alpha": 3.0, "y.alpha": 4.0}, tmp_path / "two.pt")
    assert products(tmp_path / "two.pt") == pytest.approx({"x": largest(1.5), "y": largest(2), "z": largest(1)})


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"alpha": "true"}, "lora_alpha is True"),
        ({"alpha": "many"}, "lora_alpha is 'many'"),
        ({"alpha": "3", "rank": "16"}, "r is 16"),
        ({"alpha": "3", "ss_network_alpha": "16"}, "3, and 16"),
        ({"lora_alpha": "3", "alpha_pattern": '{"x": 5}'}, "alpha_pattern={'x': 5}"),
        ({"lora_alpha": "3", "init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"lora_adapter_metadata": '{"unet.r": 2, "unet.use_bdlora": 1}'}, "unet.use_bdlora=1"),
    ],
)
def test_headers_that_contradict_or_are_not_understood(header: dict[str, str], said: str, tmp_path: Path) -> None:
    assert said in refusal(write(tmp_path / "lora.safetensors", one_layer(), header))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_rslora": "false"}, "use_rslora=false"),
        ({"r": 8}, "r is 8"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"target_parameters": ["experts.up"]}, "target_parameters=['experts.up']"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "init_lora_weights=olora"),
        ({"peft_type": "OFT"}, "peft_type=OFT"),
        ({"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}}, "fine_tune_type=lora"),  # MLX
        ({"what_comes_next": 1}, "what_comes_next=1"),
    ],
)
def test_settings_that_are_not_understood_are_shown(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Also where alpha is stated before: BA may be no change of the weights."""
    file = adapter(tmp_path, {"lora_alpha": 3, **config})
    assert said in refusal(file)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_with_a_byte_order_mark_is_read(encoding: str, tmp_path: Path) -> None:
    file = adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 3}', encoding=encoding)
    assert products(file) == pytest.approx({"x": largest(1.5, *one_layer().values())})


def test_every_field_of_peft_is_known_or_refused(tmp_path: Path) -> None:
    """With its defaults, a config of this PEFT is that of plain LoRA."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["x"]).to_dict()
    text = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    more = {
        "bias": "all",
        "modules_to_save": ["y"],
        "lora_bias": True,
        "use_dora": True,
        "init_lora_weights": "gaussian",
    }
    file = adapter(tmp_path, {**text, **more, "use_dora": True})
    assert products(file) == pytest.approx({"x": largest(1.5, *one_layer().values())})


def test_zeros(tmp_path: Path) -> None:
    """Alpha is 0 in one file, B in some layers of another, and in all of a third: only that one is untrained."""
    zero = one_layer(alpha=torch.tensor(0.0))
    found = dsire.file_spectra(write(tmp_path / "zero.safetensors", zero))
    assert (found.notes, found.first) == (["alpha is 0: BA counts as zero"], [])
    layers = {key: its for n in range(5) for key, its in (pair(f"x.{n}") | {f"x.{n}.alpha": torch.tensor(2.0)}).items()}
    for zeros, first in ((2, []), (5, [dsire.UNTRAINED])):
        some = {key: its * (int(key[2]) >= zeros or "lora_B" not in key) for key, its in layers.items()}
        found = dsire.file_spectra(write(tmp_path / "some.safetensors", some))
        which = " (2 of 5 layers, such as x_0)" if zeros == 2 else ""
        assert (found.notes, found.first) == ([f"the change of the weights is zero{which}"], first)
        assert len(found.voters) == 15


# ---------------------------------------------------------------------------------------------------------------------
# What states the size


def folders(*images: tuple[str, int]) -> str:
    return json.dumps({name: {"n_repeats": 1, "img_count": count} for name, count in images})


def data_sets(*sets: list[dict[str, Any]]) -> str:
    return json.dumps([{"resolution": [512 + 256 * n] * 2, "subsets": its} for n, its in enumerate(sets)])


CAT, DOG = {"image_dir": "cat", "img_count": 20}, {"image_dir": "dog", "img_count": 5}
DIRS, SETS, IMAGES = "ss_dataset_dirs", "ss_datasets", "ss_num_train_images"
FILES = [[{"metadata_file": name, "img_count": 4}] for name in ("a.json", "b.json")]


@pytest.mark.parametrize(
    ("header", "size", "key"),
    [
        ({DIRS: '{"10_cat": {"n_repeats": 10, "img_count": 20}, "5_b": {"img_count": 4}}'}, 24, DIRS),
        ({DIRS: folders(("cat", 20), ("cat (2)", 20), ("cat (3)", 20))}, 20, DIRS),
        ({DIRS: folders(("cat", 20), ("dog", 5), ("cat (2)", 20), ("dog (2)", 5))}, 25, DIRS),
        ({DIRS: folders(("cat", 20), ("dog (2)", 20))}, 40, DIRS),
        ({DIRS: folders(("cat", 20), ("cat (2)", 7))}, 27, DIRS),
        ({SETS: data_sets([CAT], [CAT], [CAT])}, 20, SETS),
        ({SETS: data_sets([CAT, DOG], [CAT, DOG])}, 25, SETS),
        ({SETS: data_sets([CAT, CAT])}, 40, SETS),
        ({SETS: data_sets([CAT, {**DOG, "is_reg": True}], [CAT, {**DOG, "is_reg": True}])}, 20, SETS),
        ({SETS: data_sets(*FILES)}, 8, SETS),
        ({SETS: data_sets([CAT], [CAT]), DIRS: folders(("cat", 20), ("cat (2)", 20))}, 20, SETS),
        ({DIRS: "{}", SETS: data_sets([DOG])}, 5, SETS),
        ({DIRS: folders(("cat", 3)), IMAGES: "6"}, 3, DIRS),
        ({"ss_reg_dataset_dirs": folders(("cat", 20)), DIRS: folders(("dog", 5))}, 5, DIRS),
        ({IMAGES: "60", "ss_num_repeats": "10"}, 6, IMAGES),
        ({SETS: data_sets([], []), IMAGES: "60", "ss_num_repeats": "1"}, 0, ""),
        ({IMAGES: "90"}, 0, ""),  # kohya counts an image as often as it is repeated
    ],
)
def test_a_stated_size_and_its_source(header: dict[str, str], size: int, key: str, tmp_path: Path) -> None:
    """A folder of images counts once."""
    found = dsire.file_spectra(write(tmp_path / "kohya.safetensors", one_layer(alpha=torch.tensor(2.0)), header))
    assert found.sizes.tolist() == [size]
    assert found.notes == ([f"states its own size: {size} images ({key})"] if size else [])


# ---------------------------------------------------------------------------------------------------------------------
# What is a weights file


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3287412\n",
        b"<!DOCTYPE html><html>" + b"x" * 5000,
        b'{"error":"Unauthorized"}',
        b"GGUF\3\0\0\0" + bytes(200),
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        b"# A README\n\nof words, not of weights\x1b[2J",
        bytes(1000),
    ],
)
@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pt", "lora.md"])
def test_what_is_no_weights_file_is_shown_by_its_first_bytes(content: bytes, name: str, tmp_path: Path) -> None:
    """As they are, escaped, and without advice; but not those of what a link leads to."""
    (tmp_path / name).write_bytes(content)
    assert repr(content[:50]) in refusal(tmp_path / name)
    (tmp_path / f"link{(tmp_path / name).suffix}").symlink_to(tmp_path / name)
    message = refusal(tmp_path / f"link{(tmp_path / name).suffix}")
    assert "can't be read as" in message
    assert "begins with" not in message
    assert not any(word in message for word in ("delete", "anew", "again"))


def test_weights_with_the_ending_of_others(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", one_layer()).rename(tmp_path / "a.pt")
    assert "__metadata__" in refusal(tmp_path / "a.pt") or "lora_unet" in refusal(tmp_path / "a.pt")
    write(tmp_path / "b.pt", one_layer()).rename(tmp_path / "b.safetensors")
    assert "begins with b'PK" in refusal(tmp_path / "b.safetensors")


class Command:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_pickles_say_what_they_hold_and_are_not_run(
    form: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, file = one_layer(extra=Command()), tmp_path / "lora.pt"
    if form == "plain":
        file.write_bytes(pickle.dumps({DOWN: Command()}, protocol))
    else:
        torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    message = refusal(file)
    assert f"{os.system.__module__}.system" in message
    assert "was not run" in message
    assert not any(word in message for word in ("option", "2.6", "again", "anew", "weights_only"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("save", "said"),
    [
        (lambda file: torch.save(nn.Linear(2, 2), file), "torch._utils._rebuild_parameter"),
        (lambda file: torch.save(one_layer(), file, pickle_protocol=4), "torch._utils._rebuild_tensor_v2"),
        (lambda file: file.write_bytes(pickle.dumps({"a": 1}, 5)), "it names nothing"),
    ],
)
def test_pickles_that_torch_does_not_load_are_not_called_malicious(
    save: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    save(tmp_path / "lora.pt")
    assert said in refusal(tmp_path / "lora.pt")


def again(file: Path, edit: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The same archive written anew, with its records edited."""
    with zipfile.ZipFile(file) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", compression) as new:
        for name, content in records.items():
            new.writestr(name, edit(name, content))
    return file


def test_records_of_a_pickle_are_read_as_they_are_or_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "lora.pt", pair("x"))
    assert products(again(file, lambda _, content: content)) == pytest.approx({"x": largest(1)})
    refusal(again(file, lambda name, content: content[:8] if name.endswith("data/0") else content))
    assert "compressed" in refusal(again(write(file, pair("x")), lambda _, content: content, zipfile.ZIP_DEFLATED))


def test_a_bit_that_turned_in_a_pickle(tmp_path: Path) -> None:
    file = write(tmp_path / "lora.pt", pair("x"))
    content = bytearray(file.read_bytes())
    content[content.index(A.numpy().tobytes()) + 3] ^= 1
    file.write_bytes(content)
    assert "is damaged" in refusal(file)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_pickle_that_would_fill_the_memory(compression: int, tmp_path: Path) -> None:
    """A hundred million empty dictionaries."""
    file, many = write(tmp_path / "lora.pt", pair("x")), b"\x80\x02](" + b"}" * 100_000_000 + b"e."
    again(file, lambda name, its: many if name.endswith("data.pkl") else its, compression)
    assert "bytes that are not tensors" in refusal(file)


def test_dictionaries_far_within_each_other(tmp_path: Path) -> None:
    deep: dict[str, Any] = pair("x")
    for _ in range(990):
        deep = {"": deep}
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**5)
    write(tmp_path / "lora.pt", deep)
    sys.setrecursionlimit(limit)
    assert len(dsire.file_spectra(tmp_path / "lora.pt").shapes) == 1

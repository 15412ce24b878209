"""LoRA files as people hold them: read with the values of whoever wrote them, or refused in one line that says why."""

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
from lora_writers import adapter, changes, one_layer, refusal, write
from peft import LoraConfig
from torch import Tensor, nn

import dsire

A, B = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)), torch.arange(10.0).view(5, 2) - 3
DOWN = "lora_unet_x.lora_down.weight"
UNSTATED = "alpha is not stated"
CALLED_ALPHA = ("alpha", "lora_alpha", "network_alpha", "ss_network_alpha", "unet.lora_alpha")
LARGEST = float(np.linalg.svd((B.double() @ A.double()).numpy(), compute_uv=False)[0])  # of the full matrix


def pair(layer: str, keys: str = "lora_A.weight lora_B.weight") -> dict[str, Tensor]:
    a, b = keys.split()
    return {f"{layer}.{a}": A.clone(), f"{layer}.{b}": B.clone()}


def assert_scales(file: Path, *unstated: str, **scales: float) -> None:
    """Layer -> what BA is multiplied by; the first of those of which no alpha is stated is named."""
    found = dsire.file_spectra(file)
    products = {layer: float(values[0]) for layer, values in changes(found).items()}
    assert products == pytest.approx({layer: LARGEST * scale for layer, scale in scales.items()})
    notes = [note for note in found.notes if note.startswith(UNSTATED)]
    assert len(notes) == bool(unstated)
    assert len(unstated) == len(scales) or all(unstated[0] in note for note in notes)


# What is a layer's name
LDM = """input_blocks.2.0.in_layers.2 down_blocks.0.resnets.1.conv1
input_blocks.3.0.op down_blocks.0.downsamplers.0.conv
input_blocks.11.0.out_layers.3 down_blocks.3.resnets.1.conv2
middle_block.0.emb_layers.1 mid_block.resnets.0.time_emb_proj
middle_block.2.in_layers.2 mid_block.resnets.1.conv1
output_blocks.2.1.conv up_blocks.0.upsamplers.0.conv
output_blocks.9.0.skip_connection up_blocks.3.resnets.0.conv_shortcut
output_blocks.11.1.transformer_blocks.0.ff.net.2 up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2"""


@pytest.mark.parametrize("names", LDM.splitlines())
def test_names_of_ldm_in_sd_1_5(names: str) -> None:
    """Worked out by hand from the two definitions of the network."""
    ldm, diffusers = names.split()
    for path in (f"model.diffusion_model.{ldm}", f"lora_unet_{ldm.replace('.', '_')}"):
        assert dsire.layer_name(path) == dsire.layer_name(f"unet.{diffusers}") == diffusers.replace(".", "_")


PREFIXES = """transformer. diffusion_model. transformer._orig_mod. _orig_mod. base_model.model._orig_mod. module.
base_model.model.module. _fsdp_wrapped_module. pipe.dit. model.diffusion_model. net. model. state_dict. lycoris_
lora_prior_unet_ lora_unet__orig_mod_ lora_unet_ module._forward_module. base_model.model.base_model.model."""


@pytest.mark.parametrize("prefix", ["", *PREFIXES.split()])
def test_prefixes_of_wrappers_are_stripped(prefix: str) -> None:
    assert dsire.layer_name(f"{prefix}blocks.0.attn1.to_q") == "blocks_0_attn1_to_q"
    assert dsire.layer_name(f"{prefix}blocks.0.attn1.processor.to_out") == "blocks_0_attn1_to_out_0"
    assert dsire.layer_name("blocks.0._checkpoint_wrapped_module.attn1.to_q") == "blocks_0_attn1_to_q"
    assert dsire.layer_name("transformer_2.blocks.0.attn1.to_q") == "transformer_2_blocks_0_attn1_to_q"


CLIP_L = """text_encoders.clip_l.transformer. lora_te_ lora_te1_ lora_prior_te_ clip_l.transformer. text_encoder.
cond_stage_model.transformer. conditioner.embedders.0.transformer. module.text_encoder."""
TEXT_ENCODERS = {
    "text_encoder": CLIP_L.split(),
    "text_encoder_2": ["text_encoders.clip_g.transformer.", "lora_te2_", "text_encoder_2."],
    "text_encoder_3": ["text_encoders.t5xxl.transformer.", "lora_te3_", "text_encoder_3."],
}


@pytest.mark.parametrize("network", TEXT_ENCODERS)
def test_text_encoders_of_all_writers(network: str) -> None:
    for name in TEXT_ENCODERS[network]:
        for inner in ("layers.0.q_proj", "text_model.layers.0.q_proj"):  # CLIP has it or not
            assert dsire.layer_name(name + inner) == f"{network}_layers_0_q_proj"


@pytest.mark.parametrize("keys", ["lora_A lora_B", "lora_A.default lora_B.default"])
def test_layouts_of_other_writers(keys: str, tmp_path: Path) -> None:
    assert_scales(write(tmp_path / "lora.safetensors", pair("layers.0.q", keys)), "layers_0_q", layers_0_q=1)


# What is not understood is refused, and shown
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([A, B], "nothing names the layers"),
        ({"x.lora_mystery.weight": A}, "x.lora_mystery.weight"),
        (pair("x") | {"x.lora_E": A[:1]}, "x.lora_E"),  # AdaLoRA
        ({"x.lora.0.weight": A, "x.lora.1.weight": B}, "x.lora.0.weight"),
        ({DOWN: [[1.0, 2.0]]}, DOWN),
        *((one_layer() | {f"lora_unet_x.{key}": A}, key) for key in ("lora_mixer", "lora_diag")),  # the latter KaSA's
        (one_layer() | {"lora_unet_x.lora_down.weight_scale": A}, "weight_scale"),
        (one_layer() | {"lora_unet_y.lora_down.weight": A}, "lora_unet_y.lora_down.weight"),
        (one_layer() | {"lora_unet_x.hada_w1_a": A}, DOWN),
        *((pair(f"mlp.{name}"), name) for name in ("experts", "experts.base_layer")),  # target_parameters
        ({"model.q.lora_a": A.T, "model.q.lora_b": B.T}, "model.q.lora_a"),  # MLX
        (pair("layers.0.q", "lora_a.weight lora_b.weight"), "lora_a.weight"),  # torchtune
        (pair("blocks.1.processor", "qkv_lora1.down.weight qkv_lora1.up.weight"), "qkv_lora1"),  # XLabs
    ],
)
def test_what_has_lora_in_its_keys_is_named(content: Any, said: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "lora.pt", content), said)
    assert not any(word in message for word in ("checkpoint", "empty"))


# What states alpha
def as_json(**said: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({key.replace("__", "."): value for key, value in said.items()})}


@pytest.mark.parametrize(
    ("header", "scale"),
    [
        *(({key: "3.0", "rank": "2", "ss_network_dim": "2"}, 1.5) for key in CALLED_ALPHA),
        ({"lora_alpha": "3", "use_rslora": "True"}, 3 / 2**0.5),
        ({"alpha": "None", "rank": "2"}, None),
        *(({f"{other}.lora_alpha": "3"}, None) for other in ("text_encoder", "ema", "training", "modelspec")),
        (as_json(text_encoder__lora_alpha=3, text_encoder__r=2), None),
        (as_json(transformer__lora_alpha=3, transformer__r=2), 1.5),
        (as_json(unet__lora_alpha=3, text_encoder__lora_alpha=7), 1.5),
        (as_json(lora_alpha=3), 1.5),
    ],
)
@pytest.mark.parametrize("layer", ["lora_unet_x", "unet.x", "x"])
def test_settings_of_the_network(header: dict[str, str], scale: float | None, layer: str, tmp_path: Path) -> None:
    assert_scales(write(tmp_path / "lora.safetensors", pair(layer), header), *["x"] * (scale is None), x=scale or 1)


def test_settings_of_two_places_are_one(tmp_path: Path) -> None:
    """Unless they differ: then it is the header's, if that states alpha, as the other may be of another model."""
    file = adapter(tmp_path, {"r": 2, "lora_alpha": 4, "use_rslora": True})
    layer = pair("base_model.model.x")
    for header, scale in (
        ({"lora_alpha": "8"}, 4),
        ({"lora_alpha": "4"}, 4 / 2**0.5),
        ({"use_rslora": "false"}, 4 / 2**0.5),
        (as_json(r=2), 4 / 2**0.5),
    ):
        assert_scales(write(file, layer, header), x=scale)
    refusal(write(file, layer, {"lora_alpha": "8", "r": "3"}), "r is 3")


def test_settings_of_some_layers(tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", pair("unet.x") | pair("text_encoder.x"), {"unet.alpha": "3"})
    assert_scales(file, "text_encoder_x", x=1.5, text_encoder_x=1)
    assert "1 of 2 layers" in dsire.file_spectra(file).notes[0]
    three = pair("x") | pair("y") | pair("z") | {"x.alpha": 3.0, "y.alpha": 4.0}
    assert_scales(write(tmp_path / "lora.pt", three), "z", x=1.5, y=2, z=1)
    torch.save({"state_dict": pair("x"), "lora_alpha": 3, "r": 2}, tmp_path / "lora.pt")
    assert_scales(tmp_path / "lora.pt", x=1.5)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"alpha": "true"}, "lora_alpha is True"),
        ({"alpha": "many"}, "lora_alpha is 'many'"),
        ({"alpha": "3", "rank": "16"}, "r is 16"),
        ({"alpha": "3", "ss_network_alpha": "16"}, "3, and 16"),
        ({"lora_alpha": "3", "alpha_pattern": '{"x": 5}'}, "alpha_pattern={'x': 5}"),
        ({"lora_alpha": "3", "init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        (as_json(unet__r=2, unet__use_bdlora=1), "unet.use_bdlora=1"),
        (as_json(lora_alpha=True), "lora_alpha is True"),
        (as_json(lora_alpha=3, use_dora=True), "use_dora"),  # and no magnitudes
        *(
            ({"lora_alpha": "3", **as_json(**config)}, said)  # though alpha is stated before
            for config, said in (
                ({"use_rslora": "false"}, "use_rslora=false"),
                ({"kasa_config": {"beta": 1}}, "kasa_config"),
                ({"target_parameters": ["experts.up"]}, "target_parameters=['experts.up']"),
                ({"init_lora_weights": "olora"}, "init_lora_weights=olora"),
                ({"fine_tune_type": "lora", "lora_parameters": {"scale": 20.0}}, "fine_tune_type=lora"),  # MLX
                ({"what_comes_next": 1}, "what_comes_next=1"),
            )
        ),
    ],
)
def test_settings_that_contradict_or_are_unknown_are_shown(header: dict[str, str], said: str, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", one_layer(), header)
    refusal(file, said)
    if "lora_adapter_metadata" in header:
        (tmp_path / "adapter_config.json").write_text(header["lora_adapter_metadata"])
        refusal(write(file, one_layer()), said)


def test_every_field_of_peft_is_known_or_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["x"]).to_dict()
    text = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    text |= {"bias": "all", "modules_to_save": ["y"], "lora_bias": True}
    file = adapter(tmp_path, {**text, "init_lora_weights": "gaussian"}, down=A, up=B)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert_scales(file, x=1.5)
        config_file = tmp_path / "adapter_config.json"
        config_file.write_text('{"peft_type": "LORA", "lora_alpha": 3}', encoding=encoding)
    assert_scales(file, x=1.5)


def test_zeros(tmp_path: Path) -> None:
    """Alpha is 0 in one file, B in some layers of another, and in all of a third: only that one is untrained."""
    zero = one_layer(alpha=torch.tensor(0.0))
    found = dsire.file_spectra(write(tmp_path / "zero.safetensors", zero))
    assert (found.notes, found.first) == (["alpha is 0: BA counts as zero"], [])
    layers = {key: its for n in range(5) for key, its in (pair(f"x.{n}") | {f"x.{n}.alpha": torch.tensor(2.0)}).items()}
    some_zeros = ["the change of the weights is zero (2 of 5 layers, such as x_0)"]
    for zeros, first, notes in ((2, [], some_zeros), (5, [dsire.UNTRAINED], [])):
        some = {key: its * (int(key[2]) >= zeros or "lora_B" not in key) for key, its in layers.items()}
        found = dsire.file_spectra(write(tmp_path / "some.safetensors", some))
        assert (found.notes, found.first) == (notes, first)
        assert len(found.voters) == 15


# What states the size
def folders(images: str) -> dict[str, str]:
    counts = dict(image.rsplit(" ", 1) for image in images.split(", "))
    return {DIRS: json.dumps({name: {"n_repeats": 1, "img_count": int(count)} for name, count in counts.items()})}


def data_sets(*sets: list[dict[str, Any]]) -> dict[str, str]:
    return {SETS: json.dumps([{"resolution": [512 + 256 * n] * 2, "subsets": its} for n, its in enumerate(sets)])}


CAT, DOG = {"image_dir": "cat", "img_count": 20}, {"image_dir": "dog", "img_count": 5}
DIRS, SETS = "ss_dataset_dirs", "ss_datasets"
FILES = [[{"metadata_file": name, "img_count": 4}] for name in ("a.json", "b.json")]


@pytest.mark.parametrize(
    ("header", "size"),
    [
        (folders("10_cat 20, 5_b 4"), 24),
        (folders("cat 20, cat (2) 20, cat (3) 20"), 20),
        (folders("cat 20, dog (2) 20"), 40),
        (folders("cat 20, cat (2) 7"), 27),
        (data_sets([CAT, DOG], [CAT, DOG]), 25),
        (data_sets([CAT, CAT]), 40),
        (data_sets([CAT, {**DOG, "is_reg": True}], [CAT, {**DOG, "is_reg": True}]), 20),
        (data_sets(*FILES), 8),
        (data_sets([CAT], [CAT]) | folders("cat 20, cat (2) 20"), 20),
        (data_sets([DOG]) | {DIRS: "{}"}, 5),
        (folders("cat 3") | {"ss_num_train_images": "6"}, 3),
        (folders("dog 5") | {"ss_reg_dataset_dirs": folders("cat 20")[DIRS]}, 5),
        ({"ss_num_train_images": "90", "ss_num_repeats": "10"}, 0),  # counts an image as often as it is repeated
    ],
)
def test_a_stated_size(header: dict[str, str], size: int, tmp_path: Path) -> None:
    """A folder of images counts once."""
    found = dsire.file_spectra(write(tmp_path / "kohya.safetensors", one_layer(alpha=torch.tensor(2.0)), header))
    assert found.sizes.tolist() == [size]
    assert found.notes == []


# What is a weights file
@pytest.mark.parametrize(
    "content",
    [
        *(b"", bytes(1000), b"<!DOCTYPE html><html>" + b"x" * 5000, b'{"error":"Unauthorized"}'),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3287412\n",
        *(b"GGUF\3\0\0\0" + bytes(200), b"\x89PNG\r\n\x1a\n" + bytes(200), b"# A README\n\nof words\x1b[2J"),
    ],
)
@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pt", "lora.md"])
def test_what_is_no_weights_file_is_shown_by_its_first_bytes(content: bytes, name: str, tmp_path: Path) -> None:
    """As they are, escaped, and without advice; but not those of what a link leads to."""
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"link{name}").symlink_to(tmp_path / name)
    refusal(tmp_path / name, repr(content[:50]))
    message = refusal(tmp_path / f"link{name}", "can't be read as")
    assert not any(word in message for word in ("begins with", "delete", "anew", "again"))


def test_weights_with_the_ending_of_others(tmp_path: Path) -> None:
    safe = write(tmp_path / "a.safetensors", one_layer())
    expected = dsire.file_spectra(safe).values
    assert torch.equal(dsire.file_spectra(safe.rename(tmp_path / "a.bin")).values, expected)
    refusal(write(tmp_path / "b.pt", one_layer()).rename(tmp_path / "b.safetensors"), "begins with b'PK")


class Command:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_pickles_say_what_they_hold(form: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, file = one_layer(extra=Command()), tmp_path / "lora.pt"
    if form == "plain":
        file.write_bytes(pickle.dumps({DOWN: Command()}, protocol))
    else:
        torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    message = refusal(file, f"{os.system.__module__}.system", "was not run")
    assert not any(word in message for word in ("option", "2.6", "again", "anew", "weights_only"))
    assert not (tmp_path / "ran").exists()


def test_pickles_that_torch_does_not_load_are_not_called_malicious(tmp_path: Path) -> None:
    file = tmp_path / "lora.pt"
    torch.save(nn.Linear(2, 2), file)
    refusal(file, "torch._utils._rebuild_parameter")
    torch.save(one_layer(), file, pickle_protocol=4)
    refusal(file, "torch._utils._rebuild_tensor_v2")
    file.write_bytes(pickle.dumps({"a": 1}, 5))
    refusal(file, "it names nothing")


def again(file: Path, name: str = "", edit: Callable[[bytes], bytes] = bytes, compression: int = 0) -> Path:
    with zipfile.ZipFile(write(file, pair("x"))) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", compression) as new:
        for its, content in records.items():
            new.writestr(its, edit(content) if its.endswith(name) else content)
    return file


def test_records_of_a_pickle_are_read_as_they_are_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "lora.pt"
    assert_scales(again(file), "x", x=1)
    refusal(again(file, "data/0", lambda content: content[:8]))
    refusal(again(file, compression=zipfile.ZIP_DEFLATED), "compressed")
    bytes_of = bytearray(again(file).read_bytes())
    bytes_of[bytes_of.index(A.numpy().tobytes()) + 3] ^= 1  # a bit that turned
    file.write_bytes(bytes_of)
    refusal(file, "is damaged")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_pickle_that_would_fill_the_memory(compression: int, tmp_path: Path) -> None:
    many = b"\x80\x02](" + b"}" * 100_000_000 + b"e."
    refusal(again(tmp_path / "lora.pt", "data.pkl", lambda _: many, compression), "bytes that are not tensors")


def within_each_other(times: int, names: list[str]) -> dict[str, Any]:
    content: dict[str, Any] = pair("x")
    for _ in range(times):
        content = dict.fromkeys(names, content)
    return content


ITSELF: dict[str, Any] = pair("x")
ITSELF["state_dict"] = ITSELF
NESTED: dict[str, tuple[Any, list[str]]] = {  # content, and the layers in it
    "beside others": ({"module": pair("x"), "optimizer": {"state": {0: {"step": 3}}}, "epoch": 3, "lr": 0.1}, ["x"]),
    "networks": ({"unet": pair("x"), "text_encoder": pair("x")}, ["x", "text_encoder_x"]),
    "deep": ({"state_dict": {"params": {"model": pair("x")}}}, ["x"]),
    "twice": ({"model_state_dict": {"state_dict": {"state_dict": pair("x")}}}, ["x"]),
    "in itself": (ITSELF, ["x"]),
    "a thousand million ways": (within_each_other(3, [*map(str, range(1000))]), ["0_0_0_x"]),
    "far down": (within_each_other(990, [""]), [f"{'_' * 990}x"]),
}


@pytest.mark.parametrize("case", NESTED)
def test_pickles_with_tensors_further_down(case: str, tmp_path: Path) -> None:
    content, layers = NESTED[case]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**5)
    write(tmp_path / "lora.pt", content)
    sys.setrecursionlimit(limit)
    assert_scales(tmp_path / "lora.pt", *layers, **dict.fromkeys(layers, 1))

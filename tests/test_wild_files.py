"""LoRA files as people hold them: read with the values of whoever wrote them, or refused in one line that says why."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from lora_writers import adapter, one_layer, write
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import dsire

A, B = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)), torch.arange(10.0).view(5, 2) - 3
DOWN, UP = "lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"


def refusal(file: Path) -> str:
    with pytest.raises(dsire.DsireError) as error:
        dsire.file_spectra(file)
    assert str(error.value).isprintable()
    return str(error.value)


def largest(scale: float, a: Tensor = A, b: Tensor = B) -> float:
    """The largest singular value of the scaled product, from the full matrix."""
    return float(np.linalg.svd(scale * (b.double() @ a.double()).numpy(), compute_uv=False)[0])


def products(file: Path) -> dict[str, float]:
    """Layer -> the largest singular value of BA."""
    found = dsire.file_spectra(file)
    return {v.layer: float(its[0, 0]) for v, its in zip(found.voters, found.values, strict=True) if v.matrix == "BA"}


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
        *("net.", "model.", "state_dict.", "lycoris_", "lora_prior_unet_", "lora_unet__orig_mod_"),
        *("module._forward_module.", "base_model.model.base_model.model."),
    ],
)
def test_prefixes_of_wrappers_are_stripped(prefix: str) -> None:
    assert dsire.layer_name(f"{prefix}blocks.0.attn1.to_q") == "blocks_0_attn1_to_q"
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
    for name in names.split():
        assert dsire.layer_name(f"{name}layers.0.q_proj") == dsire.layer_name(f"{network}layers.0.q_proj")


@pytest.mark.parametrize(
    ("tensors", "layer"),
    [
        ({"model.layers.0.q.lora_a": A.T, "model.layers.0.q.lora_b": B.T}, "layers_0_q"),
        ({"sq.lora_a": B, "sq.lora_b": A[:, :5]}, "sq"),
        (pair("layers.0.q", ("lora_a.weight", "lora_b.weight")), "layers_0_q"),
        (pair("layers.0.q", ("lora_A", "lora_B")), "layers_0_q"),
        (
            pair("double_blocks.1.processor", ("qkv_lora1.down.weight", "qkv_lora1.up.weight")),
            "double_blocks_1_img_attn_qkv",
        ),
        (
            pair("double_blocks.1.processor", ("proj_lora2.down.weight", "proj_lora2.up.weight")),
            "double_blocks_1_txt_attn_proj",
        ),
        ({"unet:0:down": A, "unet:0:up": B}, "0"),
        ({"text_encoder:7:down": A, "text_encoder:7:up": B}, "text_encoder_7"),
        (pair("x", ("lora_A.default", "lora_B.default")), "x"),
    ],
    ids=["MLX", "MLX square", "torchtune", "loralib", "XLabs", "XLabs text", "cloneofsimo", "its text encoder", "bare"],
)
def test_layouts_of_other_writers(tensors: dict[str, Tensor], layer: str, tmp_path: Path) -> None:
    wanted = largest(1, A[:, :5], B) if layer == "sq" else largest(1)
    assert products(write(tmp_path / "lora.safetensors", tensors)) == pytest.approx({layer: wanted}, rel=1e-12)


def test_mlx_has_its_scale_in_its_config(tmp_path: Path) -> None:
    file = write(tmp_path / "adapters.safetensors", {"model.q.lora_a": A.T, "model.q.lora_b": B.T})
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}, "iters": 600}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert products(file) == pytest.approx({"q": largest(20)})
    assert dsire.file_spectra(file).notes == []


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
        (one_layer() | {"lora_unet_x.lora_diag": A}, "KaSA"),
        (one_layer() | {"lora_unet_x.lora_down.weight_scale": A}, "weight_scale"),
        (pair("mlp.experts"), "experts"),
    ],
)
def test_what_has_lora_in_its_keys_is_named(content: Any, said: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "lora.pt", content))
    assert said in message
    assert not any(word in message for word in ("full checkpoint", "empty"))


@pytest.mark.parametrize("key", ["lora_unet_y.alpha", "lora_unet_y.lora_down.weight"])
def test_a_stray_tensor_is_left_out_and_said(key: str, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", one_layer(alpha=torch.tensor(2.0)) | {key: torch.ones(1, 1)})
    found = dsire.file_spectra(file)
    assert (set(found.shapes), found.notes) == ({"x"}, [f"1 tensors without a partner are left out, such as {key}"])


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
    ],
)
@pytest.mark.parametrize("layer", ["lora_unet_x", "unet.x", "x"])
def test_settings_are_those_of_the_network(header: dict[str, str], scale: float, layer: str, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", pair(layer), header)
    assert products(file) == pytest.approx({"x": largest(scale)})
    unsaid = ["the file does not state alpha: BA is taken with scale 1"]
    assert dsire.file_spectra(file).notes == (unsaid if scale == 1 else [])


def test_settings_of_one_network_of_two(tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", pair("unet.x") | pair("text_encoder.x"), {"unet.alpha": "3"})
    assert products(file) == pytest.approx({"x": largest(1.5), "text_encoder_x": largest(1)})
    (note,) = dsire.file_spectra(file).notes
    assert "alpha" in note
    assert "1 of 2 layers, such as text_encoder_x" in note


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
        ({"lora_alpha": "3", "alpha_pattern": '{"x": 5}'}, "patterns"),
    ],
)
def test_headers_that_contradict(header: dict[str, str], said: str, tmp_path: Path) -> None:
    assert said in refusal(write(tmp_path / "lora.safetensors", one_layer(), header))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_rslora": "false"}, "use_rslora"),
        ({"r": 8}, "r is 8"),
        ({"r": 2, "rank_pattern": {"x": 4}}, "r is 4"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"what_comes_next": 1}, "what_comes_next"),
    ],
)
def test_settings_that_change_what_the_matrices_mean(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(adapter(tmp_path, {"lora_alpha": 3, **config}))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_with_a_byte_order_mark_is_read(encoding: str, tmp_path: Path) -> None:
    file = adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 3}', encoding=encoding)
    assert products(file) == pytest.approx({"x": largest(1.5, *one_layer().values())})


def test_every_field_of_peft_is_known_or_refused(tmp_path: Path) -> None:
    """With its defaults, a config of this PEFT is that of plain LoRA."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["x"]).to_dict()
    text = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    file = adapter(tmp_path, {**text, "bias": "all", "modules_to_save": ["y"], "lora_bias": True, "use_dora": True})
    assert products(file) == pytest.approx({"x": largest(1.5, *one_layer().values())})


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 8)), nn.Parameter(torch.randn(4, 8, 6))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.experts = nn.Linear(6, 6), Experts()


@pytest.mark.parametrize("parameters", [["experts.up"], ["experts.up", "experts.down"]])
@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_experts_in_one_pair_are_refused(parameters: list[str], with_config: bool, tmp_path: Path) -> None:
    settings = LoraConfig(r=2, target_modules=["query"], target_parameters=parameters)
    get_peft_model(Mixture(), settings).save_pretrained(tmp_path)
    if not with_config:
        (tmp_path / "adapter_config.json").unlink()
    assert "target_parameters" in refusal(tmp_path / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "mica", "orthogonal", "gaussian"])
def test_inits_from_the_weights_of_the_base(init: str, tmp_path: Path) -> None:
    """Of an untrained adapter the weights have not changed, whatever B A is; only then is it another kind of layer."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16))
    before = base[0].weight.detach().clone()
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=init))
    model.save_pretrained(tmp_path)
    layer = model.base_model.model[0]
    change = layer.get_delta_weight("default") + layer.get_base_layer().weight - before
    assert change.abs().max() < 1e-5
    found = dsire.file_spectra(tmp_path / "adapter_model.safetensors")
    plain = init in ("orthogonal", "gaussian")
    assert set(found.shapes) == {"0" if plain else f"0 ({init.partition('_')[0]})"}
    assert plain or any("BA is not the change" in note for note in found.notes)


def test_a_model_that_began_otherwise_is_judged_by_its_like(tmp_path: Path, run: Run) -> None:
    for init, folder in ((True, "plain"), ("pissa", "pissa")):
        for size in (1, 2):
            for name in "ab":
                tensors = {key: torch.randn_like(value) / size for key, value in one_layer().items()}
                write(tmp_path / folder / f"{name}_{size}.safetensors", tensors)
        rows = [f"{name}_{size}.safetensors,{size},{name}" for size in (1, 2) for name in "ab"]
        (tmp_path / folder / "metadata.csv").write_text("\n".join(["file_name,label,name", *rows]))
        config = {"peft_type": "LORA", "lora_alpha": 2, "init_lora_weights": init}
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(config))
    file = tmp_path / "pissa" / "a_1.safetensors"
    outcome = run("--dataset", tmp_path / "plain", "--predict", file)
    assert outcome.code == 2
    assert "init_lora_weights is pissa" in outcome.err
    assert run("--dataset", tmp_path / "pissa", "--predict", file).code == 0


def test_an_alpha_of_zero_is_not_untrained(tmp_path: Path) -> None:
    zero = write(tmp_path / "zero.safetensors", one_layer(alpha=torch.tensor(0.0)))
    assert dsire.file_spectra(zero).notes == ["alpha is 0: BA counts as zero"]


# ---------------------------------------------------------------------------------------------------------------------
# What states the size


def folders(*images: tuple[str, int]) -> str:
    return json.dumps({name: {"n_repeats": 1, "img_count": count} for name, count in images})


def data_sets(*sets: list[dict[str, Any]]) -> str:
    return json.dumps([{"resolution": [512 + 256 * n] * 2, "subsets": its} for n, its in enumerate(sets)])


CAT, DOG = {"image_dir": "cat", "img_count": 20}, {"image_dir": "dog", "img_count": 5}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"ss_dataset_dirs": folders(("cat", 20), ("cat (2)", 20), ("cat (3)", 20))}, 20),
        ({"ss_dataset_dirs": folders(("cat", 20), ("dog", 5), ("cat (2)", 20), ("dog (2)", 5))}, 25),
        ({"ss_dataset_dirs": folders(("cat", 20), ("dog (2)", 20))}, 40),
        ({"ss_dataset_dirs": folders(("cat", 20), ("cat (2)", 7))}, 27),
        ({"ss_datasets": data_sets([CAT], [CAT], [CAT])}, 20),
        ({"ss_datasets": data_sets([CAT, DOG], [CAT, DOG])}, 25),
        ({"ss_datasets": data_sets([CAT, CAT])}, 40),
        ({"ss_datasets": data_sets([CAT, {**DOG, "is_reg": True}], [CAT, {**DOG, "is_reg": True}])}, 20),
        (
            {
                "ss_datasets": data_sets(
                    [{"metadata_file": "a.json", "img_count": 4}] * 1, [{"metadata_file": "b.json", "img_count": 4}]
                )
            },
            8,
        ),
        ({"ss_datasets": data_sets([CAT], [CAT]), "ss_dataset_dirs": folders(("cat", 20), ("cat (2)", 20))}, 20),
        ({"ss_datasets": data_sets([], []), "ss_num_train_images": "60", "ss_num_repeats": "1"}, 0),
        ({"ss_reg_dataset_dirs": folders(("cat", 20)), "ss_dataset_dirs": folders(("dog", 5))}, 5),
    ],
)
def test_a_folder_of_images_counts_once(header: dict[str, str], size: int, tmp_path: Path) -> None:
    assert dsire.file_spectra(write(tmp_path / "kohya.safetensors", one_layer(), header)).sizes.tolist() == [size]


# ---------------------------------------------------------------------------------------------------------------------
# What is a weights file

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3287412\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (POINTER, "git lfs pull"),
        (b"<!DOCTYPE html><html>" + b"x" * 5000, "web page"),
        (b'\n <?xml version="1.0"?><Error>AccessDenied</Error>', "web page"),
        (b'{"error":"Unauthorized"}', 'JSON, not weights ({"error":"Unauthorized"})'),
        (b"GGUF\3\0\0\0" + bytes(200), "GGUF"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "picture"),
        (b"# A README\n\nof words, not of weights", "text, not weights (# A README of words"),
        (bytes(1000), "zeros"),
    ],
)
@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pt", "lora.md"])
def test_what_is_no_weights_file_is_told_by_its_first_bytes(
    content: bytes, said: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert f"{name} is " in refusal(tmp_path / name)
    assert said in refusal(tmp_path / name)


def test_weights_with_the_ending_of_others(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", one_layer()).rename(tmp_path / "a.pt")
    assert "is a safetensors file" in refusal(tmp_path / "a.pt")
    write(tmp_path / "b.pt", one_layer()).rename(tmp_path / "b.safetensors")
    assert "is a pickle" in refusal(tmp_path / "b.safetensors")


class Command:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("save", "said"),
    [
        (lambda file: torch.save({DOWN: Command()}, file), "holds posix.system, not tensors: it may be malicious"),
        (lambda file: file.write_bytes(pickle.dumps(Command(), 2)), "holds posix.system, not tensors"),
        (lambda file: torch.save(nn.Linear(2, 2), file), "holds torch.nn.modules.linear.Linear, not tensors"),
        (lambda file: torch.save(one_layer(), file, pickle_protocol=4), "pickle protocol 4"),
        (lambda file: file.write_bytes(pickle.dumps({"a": 1}, 5)), "pickle protocol 5"),
    ],
)
def test_pickles_that_cannot_be_trusted_are_told_plainly(
    save: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    save(tmp_path / "lora.pt")
    message = refusal(tmp_path / "lora.pt")
    assert said in message
    assert "option" not in message
    assert "2.6" not in message


def again(file: Path, edit: Callable[[str, bytes], bytes], compression: int) -> Path:
    """The same archive written anew, with its records edited."""
    with zipfile.ZipFile(file) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", compression) as new:
        for name, content in records.items():
            new.writestr(name, edit(name, content))
    return file


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_records_of_a_pickle_are_read_as_they_are_or_refused(compression: int, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.pt", pair("x"))
    assert products(again(file, lambda _, content: content, compression)) == pytest.approx({"x": largest(1)})
    short = again(file, lambda name, content: content[:8] if name.endswith("data/0") else content, compression)
    assert "lora.pt" in refusal(short)


def test_a_pickle_that_would_fill_the_memory(tmp_path: Path) -> None:
    file = write(tmp_path / "lora.pt", pair("x") | {"y": torch.zeros(2**24)})
    assert "unpack" in refusal(again(file, lambda _, content: content, zipfile.ZIP_DEFLATED))


# ---------------------------------------------------------------------------------------------------------------------
# What fits the labelled models


def spectra_of(file: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> dsire.Spectra:
    return dsire.file_spectra(write(file, tensors, header))


def test_a_file_without_a_common_layer_names_layers_of_both_and_its_size(tmp_path: Path) -> None:
    labelled = spectra_of(tmp_path / "a.safetensors", {k: t for n in range(5) for k, t in pair(f"old.{n}").items()})
    header = {"ss_dataset_dirs": folders(("cat", 17))}
    new = {k: t for n in range(5) for k, t in pair(f"new.{n}").items()}
    with pytest.raises(dsire.DsireError) as error:
        dsire.matched(spectra_of(tmp_path / "b.safetensors", new, header), labelled)
    message = str(error.value)
    for part in ("old_0, old_1, old_2, ...", "new_0, new_1, new_2, ...", "17 images", "README", "no layer in common"):
        assert part in message
    assert "5 layers of rank 2" not in message  # as both have


@pytest.mark.parametrize("widths", [(768, 768), (768, 1024)])
def test_the_subset_in_use_is_not_advised(widths: tuple[int, int], tmp_path: Path) -> None:
    def of(layer: str, width: int) -> dsire.Spectra:
        tensors = {
            f"{layer}.attn2.to_k.lora_A.weight": torch.ones(32, width),
            f"{layer}.attn2.to_k.lora_B.weight": torch.ones(8, 32),
        }
        return spectra_of(tmp_path / f"{layer}.safetensors", tensors)

    with pytest.raises(dsire.DsireError) as error:
        dsire.matched(of("new", widths[0]), of("old", widths[1]))
    assert ("--subset with one of: low_32" in str(error.value)) == (widths[1] == 1024)


def test_fewer_than_half_of_the_layers_is_said_first(tmp_path: Path) -> None:
    labelled = spectra_of(tmp_path / "a.safetensors", {k: t for n in range(5) for k, t in pair(f"x.{n}").items()})
    found = dsire.matched(spectra_of(tmp_path / "b.safetensors", pair("x.0") | pair("x.1")), labelled)
    assert found.first[0] == "only 2 of the 5 fitted layers are in the file with the same shape"
    assert len(found.voters) == 6


def test_layers_of_other_shapes_are_told_with_their_shapes(tmp_path: Path) -> None:
    labelled = spectra_of(tmp_path / "a.safetensors", pair("x"))
    other = {"x.lora_A.weight": torch.ones(3, 6), "x.lora_B.weight": torch.ones(5, 3)}
    with pytest.raises(dsire.DsireError, match=r"x: \[5, 6, 3\], not \[5, 6, 2\]"):
        dsire.matched(spectra_of(tmp_path / "b.safetensors", other), labelled)

"""Fine-tunes other than LoRA: the spectra of the change of the weights, as the libraries that merge them have it."""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import ROOT, Run
from hub_stand_in import HubStandIn
from lora_writers import assert_changes, changes, refusal, write
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import dsire

TINY_FULL = ROOT / "tests" / "tiny_full"
Tensors = dict[str, Tensor]

# What diffusers calls a layer: the shape of its weights; and what others call it.
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV, POINT = "down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.proj_in"
SHAPES = {Q: (16, 12), CONV: (12, 6, 3, 3), POINT: (10, 12, 1, 1)}
LDM = "model.diffusion_model"
IN_LDM = {
    Q: f"{LDM}.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    CONV: f"{LDM}.input_blocks.1.0.in_layers.2",
    POINT: f"{LDM}.middle_block.1.proj_in",
}
TRANSFORMERS = {
    Q: "model.layers.0.self_attn.q_proj",
    CONV: "vision_tower.stem.conv",
    POINT: "model.layers.1.mlp.down_proj",
}
DIFFUSERS = {layer: layer for layer in SHAPES}
NAMES = {"diffusers": DIFFUSERS, "LDM": IN_LDM, "transformers": TRANSFORMERS}
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
RANK, SCALE = 3, 1.5


def randoms(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=randoms(seed), dtype=torch.float64)


def flat(layer: str) -> str:
    return layer.replace(".", "_")


def loras(seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Layer, A and B of rank 3 for the weights of each layer."""
    for n, (layer, (out, *into)) in enumerate(SHAPES.items()):
        a, b = normal(RANK, *into, seed=seed + 2 * n), normal(out, RANK, *(1 for _ in into[1:]), seed=seed + 2 * n + 1)
        yield layer, a, 0.1 * b


def model(names: dict[str, str], seed: int = 9) -> Tensors:
    """W0 of all layers, and what no full model lacks: norms, biases, embeddings."""
    shapes = dict(zip(names.values(), SHAPES.values(), strict=True))
    tensors = {f"{name}.weight": normal(*shape, seed=seed + n) for n, (name, shape) in enumerate(shapes.items())}
    tensors |= {f"{name}.bias": normal(7, seed=5) for name in names.values()}
    start = next(iter(names.values())).rpartition(".")[0]
    tensors |= {f"{start}.norm1.weight": normal(12, seed=6), f"{start}.embed_tokens.weight": normal(20, 12, seed=7)}
    return tensors


def changed(base: Tensors, names: dict[str, str], seed: int = 20, scale: float = SCALE) -> Tensors:
    """W0 + s B A, and other norms, biases and embeddings."""
    full = {key: tensor + 1 for key, tensor in base.items()}
    for layer, a, b in loras(seed):
        old = base[f"{names[layer]}.weight"]
        full[f"{names[layer]}.weight"] = old + scale * (b.flatten(1) @ a.flatten(1)).reshape(old.shape)
    return full


def lora_file(path: Path, names: dict[str, str], seed: int = 20, scale: float = SCALE) -> Path:
    tensors = {}
    for layer, a, b in loras(seed):
        parts = {"lora_A.weight": a, "lora_B.weight": b, "alpha": torch.tensor(scale * RANK, dtype=torch.float64)}
        tensors |= {f"{names[layer]}.{part}": tensor for part, tensor in parts.items()}
    return write(path, tensors)


def spectra(file: Path, base: Path | None = None, count: int = dsire.LARGEST) -> dsire.Spectra:
    return dsire.file_spectra(file, dsire.open_base(base) if base else None, count)


def differences(new: Tensors, old: Tensors, names: Any) -> dict[str, Tensor]:
    """W - W0 of layers, as they are called in the files."""
    return {dsire.layer_name(name): new[f"{name}.weight"].double() - old[f"{name}.weight"].double() for name in names}


def refused(file: Path, base: Path | None = None) -> str:
    return refusal(file, dsire.open_base(base) if base else None)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.safetensors", model(DIFFUSERS))


# ---------------------------------------------------------------------------------------------------------------------
# The largest singular values of any matrix


def spread(rows: int, columns: int, values: Tensor) -> Tensor:
    """A matrix with these singular values."""
    left = torch.linalg.qr(normal(rows, len(values), seed=1)).Q
    right = torch.linalg.qr(normal(columns, len(values), seed=2)).Q
    return left * values @ right.T


MATRICES = {
    "random": normal(40, 50),
    "of rank 2": normal(40, 2) @ normal(2, 50, seed=1),
    "nearly equal": spread(40, 50, 1 + 1e-9 * torch.arange(40, dtype=torch.float64)),
    "widely spread": spread(40, 50, 10 ** torch.linspace(0, -15, 40, dtype=torch.float64)),
    "steps": spread(40, 50, torch.tensor([1e3, 1, 1e-3, 1e-6, 1e-9], dtype=torch.float64)),
    "one column": normal(40, 1),
    "zero": torch.zeros(40, 50, dtype=torch.float64),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-200, 1e-150, 1e150, 1e200])
@pytest.mark.parametrize("kind", MATRICES)
def test_the_spectrum_of_a_matrix(kind: str, size: float, turned: bool) -> None:
    """Nine digits of each value that is not lost against the largest one."""
    matrix = size * (MATRICES[kind].T if turned else MATRICES[kind])
    wanted = size * torch.linalg.svdvals(matrix / size)
    for count in (1, 8, 32, 100):
        found = dsire.matrix_spectrum(matrix, count)
        assert found.shape == (min(count, *matrix.shape),)
        assert found.dtype == torch.float64
        assert torch.allclose(found / size, wanted[:count] / size, rtol=1e-9, atol=1e-14 * float(wanted[0] / size))


# ---------------------------------------------------------------------------------------------------------------------
# Full fine-tunes


@pytest.mark.parametrize("names", NAMES)
def test_a_merged_lora_has_the_spectra_of_the_lora(names: str, tmp_path: Path) -> None:
    its = NAMES[names]
    old, new = model(its), changed(model(its), its)
    lora = spectra(lora_file(tmp_path / "lora.safetensors", its))
    full = spectra(write(tmp_path / "full.safetensors", new), write(tmp_path / "base.safetensors", old))
    assert (full.method, full.first, full.notes) == ("full fine-tune in float64", [], [])
    of_lora, of_full = changes(lora), changes(full)
    assert of_lora.keys() == of_full.keys() == full.shapes.keys()
    for layer, values in of_lora.items():
        wanted = torch.nn.functional.pad(values, (0, len(of_full[layer]) - RANK))
        assert (of_full[layer] - wanted).abs().max() <= 1e-9 * values[0]
        assert full.shapes[layer] == lora.shapes[layer][:2]
    assert_changes(full, differences(new, old, its.values()))


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float16, 1), (torch.float16, 2e-4), (torch.bfloat16, 1), (torch.bfloat16, 1e-3)]
)
def test_rounding_is_all_that_differs_and_is_said_where_it_is_most(
    dtype: torch.dtype, scale: float, tmp_path: Path
) -> None:
    """No singular value moves by more than the norm of what is added (Weyl)."""
    its = DIFFUSERS
    old = {key: tensor.to(dtype) for key, tensor in model(its).items()}
    exact = changed({key: tensor.double() for key, tensor in old.items()}, its, scale=scale)
    new = {key: tensor.to(dtype) for key, tensor in exact.items()}
    full = spectra(write(tmp_path / "full.safetensors", new), write(tmp_path / "base.safetensors", old))
    lora = changes(spectra(lora_file(tmp_path / "lora.safetensors", its, scale=scale)))
    for layer in its:
        key, name = f"{layer}.weight", flat(layer)
        error = torch.linalg.vector_norm(new[key].double() - exact[key])
        assert (changes(full)[name][:RANK] - lora[name]).abs().max() <= error * 1.000001
    said = [note for note in full.notes if "last digit" in note]
    assert len(said) == (scale < 1)


def as_ldm() -> Tensors:
    """A fine-tune in one file, and in the names of LDM."""
    text = normal(9, 9, seed=30) + normal(9, 9, seed=31) / 9
    return changed(model(IN_LDM), IN_LDM) | {f"cond_stage_model.transformer.{TEXT}.weight": text}


def expected_of_ldm() -> dict[str, Tensor]:
    expected = differences(as_ldm(), model(IN_LDM), IN_LDM.values())
    return expected | {f"text_encoder_{flat(TEXT).removeprefix('text_model_')}": normal(9, 9, seed=31) / 9}


def write_parts(folder: Path, form: str) -> Path:
    """The base of `as_ldm` in one of the forms that people have models in; what to give as --base."""
    text = normal(9, 9, seed=30)
    ldm = model(IN_LDM) | {f"cond_stage_model.transformer.{TEXT}.weight": text}
    if form == "parts":
        write(folder / "unet" / "diffusion_pytorch_model.safetensors", model(DIFFUSERS))
        write(folder / "text_encoder" / "model.safetensors", {f"{TEXT}.weight": text})
        write(folder / "vae" / "diffusion_pytorch_model.safetensors", {"decoder.conv_in.weight": normal(4, 4, 3, 3)})
        return folder
    if form.startswith("shards"):
        for n in (1, 2):
            write(folder / f"model-0000{n}-of-00002.safetensors", {key: ldm[key] for key in [*ldm][n - 1 :: 2]})
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
        return folder / "model-00002-of-00002.safetensors" if form == "shards, by one of them" else folder
    if form == "pickle":
        folder.mkdir()
        torch.save({"state_dict": ldm, "epoch": 3, "global_step": 7}, folder / "model.ckpt")
        return folder / "model.ckpt"
    file = write(folder / "checkpoints" / "model.safetensors", ldm)
    return file if form == "file" else folder


@pytest.mark.parametrize("form", ["a subfolder", "file", "parts", "shards", "shards, by one of them", "pickle"])
def test_the_base_in_every_form(form: str, tmp_path: Path) -> None:
    """Layers have one name, whoever wrote the model."""
    found = spectra(write(tmp_path / "full.safetensors", as_ldm()), write_parts(tmp_path / "base", form))
    assert_changes(found, expected_of_ldm())
    assert found.notes == []


@pytest.mark.parametrize("form", ["shards, by one of them", "pickle"])
def test_a_fine_tune_in_shards_or_a_pickle(form: str, tmp_path: Path) -> None:
    """W and W0 change places: the spectrum stays."""
    base = write(tmp_path / "base.safetensors", as_ldm())
    assert_changes(spectra(write_parts(tmp_path / "full", form), base), expected_of_ldm())


def test_the_base_from_the_hub(hub: HubStandIn, tmp_path: Path) -> None:
    hub.add(write_parts(tmp_path / "repository", "parts"), "someone/model", kind="model")
    base = dsire.open_base_of("someone/model", tmp_path / "cache")
    assert_changes(dsire.file_spectra(write(tmp_path / "full.safetensors", as_ldm()), base), expected_of_ldm())


# ---------------------------------------------------------------------------------------------------------------------
# Layers and weights that do not fit


def edited(base: Path, edit: Any, name: str = "full.safetensors") -> Path:
    """A fine-tune of the base, after an edit of its tensors."""
    tensors = changed(load_file(base), DIFFUSERS)
    edit(tensors)
    return write(base.with_name(name), tensors)


def test_layers_that_differ_lack_or_did_not_change_are_counted_and_do_not_vote(base: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[f"{Q}.weight"] = normal(16, 13)
        tensors[f"{CONV}.weight"] = load_file(base)[f"{CONV}.weight"]
        tensors["mid_block.new.weight"] = normal(4, 4)
        tensors["mid_block.numbers.weight"] = torch.ones(4, 4, dtype=torch.int64)

    found = spectra(edited(base, edit), base)
    assert found.shapes == {flat(POINT): [10, 12]}
    assert_changes(found, differences(load_file(base.with_name("full.safetensors")), load_file(base), [POINT]))
    assert found.notes == [
        f"layers that are not in the base with the same shape are left out (2 of 4 layers, such as {flat(Q)})",
        f"the change of the weights is zero (1 of 4 layers, such as {flat(CONV)})",
    ]
    assert found.first == []


def test_a_copy_in_half_precision_is_untrained_and_so_are_layers_that_were_only_rounded(base: Path) -> None:
    copy = edited(base, lambda tensors: tensors.update({key: its.half() for key, its in load_file(base).items()}))
    assert spectra(copy, base).first == [dsire.UNTRAINED]

    def only_one(tensors: Tensors) -> None:
        one = tensors[f"{Q}.weight"]
        tensors |= {key: its.half() for key, its in {**load_file(base), f"{Q}.weight": one}.items()}

    assert changes(spectra(edited(base, only_one), base)).keys() == {flat(Q)}


def test_a_text_encoder_in_its_folder_is_that_of_the_base(tmp_path: Path) -> None:
    """Its keys don't name it, in the base's folder nor in that of the fine-tune."""
    old = {f"{TEXT}.weight": normal(8, 6)}
    new = {f"{TEXT}.weight": old[f"{TEXT}.weight"] + 0.01 * normal(8, 6, seed=1)}
    for place, tensors in (("base", old), ("tuned", new)):
        (tmp_path / place / "text_encoder").mkdir(parents=True)
        write(tmp_path / place / "text_encoder" / "model.safetensors", tensors)
    file = tmp_path / "tuned" / "text_encoder" / "model.safetensors"
    for base in (tmp_path / "base", tmp_path / "base" / "text_encoder" / "model.safetensors"):
        (spectrum,) = changes(spectra(file, base)).values()
        torch.testing.assert_close(spectrum[:6], torch.linalg.svdvals(0.01 * normal(8, 6, seed=1)))


def test_what_is_no_fine_tune_of_the_base_is_refused(base: Path) -> None:
    another = write(base.with_name("another.safetensors"), model(DIFFUSERS, seed=77))
    assert "no fine-tune of this base" in refused(another, base)
    stranger = write(base.with_name("stranger.safetensors"), model(TRANSFORMERS))
    assert "no layer in common with the base" in refused(stranger, base)

    def other_shapes(tensors: Tensors) -> None:
        tensors.update({f"{layer}.weight": normal(3, 3) for layer in SHAPES})

    assert "no matrix of the base's shape" in refused(edited(base, other_shapes), base)
    nothing = {"norm.weight": normal(4), "embed_tokens.weight": normal(4, 4)}
    assert "no layer in common" in refused(write(base.with_name("nothing.safetensors"), nothing), base)


def test_a_full_model_with_an_activation_called_alpha_is_one(base: Path) -> None:
    """As Snake's are, in audio models: no part of a LoRA."""
    full = edited(base, lambda tensors: tensors.update({"decoder.act.alpha": normal(4)}))
    assert_changes(spectra(full, base), differences(load_file(full), load_file(base), SHAPES))


def test_weights_that_are_not_finite_are_refused(base: Path) -> None:
    spoilt = edited(base, lambda tensors: tensors[f"{POINT}.weight"][0].fill_(float("nan")), "spoilt.safetensors")
    assert f"{POINT}.weight holds a number that is NaN" in refused(spoilt, base)
    assert f"the base: {POINT}.weight holds a number that is NaN" in refused(base, spoilt)


@pytest.mark.parametrize("other", [1.0, -1.7e308])
def test_numbers_that_are_too_large_are_refused(other: float, base: Path) -> None:
    """Finite ones of float64, whose change or its singular values are not."""

    def enlarge(tensors: Tensors, number: float) -> None:
        tensors[f"{POINT}.weight"].fill_(number)

    large = edited(base, lambda tensors: enlarge(tensors, 1.7e308), "large.safetensors")
    refused(large, edited(base, lambda tensors: enlarge(tensors, other), "other.safetensors"))


def test_what_trainers_leave_beside_a_base_is_no_part_of_it(base: Path) -> None:
    full, folder = edited(base, lambda tensors: None), base.parent / "checkpoint"
    write(folder / "pytorch_model.bin", load_file(base))
    torch.save(argparse.Namespace(learning_rate=1e-4), folder / "training_args.bin")
    torch.save({"python": random.getstate(), "numpy": np.random.get_state()}, folder / "rng_state.pth")
    assert_changes(spectra(full, folder), differences(load_file(full), load_file(base), SHAPES))


def test_a_base_that_is_not_whole_or_has_a_layer_twice_is_refused(base: Path, tmp_path: Path) -> None:
    shards = write_parts(tmp_path / "shards", "shards")
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(dsire.DsireError, match="model-00002-of-00002.safetensors: no such file"):
        dsire.open_base(shards)
    twice = write_parts(tmp_path / "twice", "parts")
    shutil.copy(base, twice / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(dsire.DsireError, match="is in two files, .*: name one of them"):
        dsire.open_base(twice)
    alike = write(tmp_path / "alike.safetensors", {f"unet.{Q}.weight": normal(2, 2), f"{Q}.weight": normal(2, 2)})
    with pytest.raises(dsire.DsireError, match="is the same matrix as"):
        dsire.open_base(alike)
    norms = write(tmp_path / "norms.safetensors", {"embed_tokens.weight": normal(3, 3)})
    with pytest.raises(dsire.DsireError, match="holds no weight matrices"):
        dsire.open_base(norms)


# ---------------------------------------------------------------------------------------------------------------------
# LoHa, LoKr and DoRA as the libraries merge them


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = nn.Linear(12, 18), nn.Linear(16, 8)
        self.conv, self.point = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 12, 1)
        self.square, self.turned = nn.Conv2d(6, 6, 3), Conv1D(10, 6)
        self.words = nn.Embedding(11, 6)


LAYERS = ("query", "key", "conv", "point", "square")


def random_weights(module: nn.Module, seed: int = 0) -> None:
    """Another number for each that can be trained, and no zeros."""
    random = randoms(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=random) / 3)


def by_lycoris(kind: Any, path: Path, layers: tuple[str, ...] = LAYERS, **options: Any) -> dict[str, Tensor]:
    """Write a file of LyCORIS; what its `forward` adds to the weights (`get_diff_weight` scales LoHa twice)."""
    net, tensors, expected = Net(), {}, {}
    for number, layer in enumerate(layers):
        module = kind(f"lora_unet_{layer}", getattr(net, layer), **{"lora_dim": 2, "alpha": 3, **options}).double()
        random_weights(module, number)
        delta = module.make_weight() * module.scale if kind is LoConModule else module.get_weight(module.shape)
        if module.wd:
            old = getattr(net, layer).weight.double()
            delta = module.apply_weight_decompose(old + delta) - old
        expected[layer] = delta
        tensors |= {f"lora_unet_{layer}.{key}": its.detach() for key, its in module.custom_state_dict().items()}
    write(path, tensors)
    return expected


@pytest.mark.parametrize("options", [{}, {"use_tucker": True}, {"rs_lora": True}, {"alpha": 0.5}], ids=str)
def test_loha_of_lycoris(options: dict[str, Any], tmp_path: Path) -> None:
    expected = by_lycoris(LohaModule, tmp_path / "loha.safetensors", **options)
    found = spectra(tmp_path / "loha.safetensors")
    assert_changes(found, expected, 1e-6)
    assert found.method.startswith("LoHa of rank ")
    assert (found.notes, {voter.matrix for voter in found.voters}) == ([], {"BA"})


LOKR: dict[str, tuple[dict[str, Any], str]] = {
    "first whole": ({}, "lokr_w1 lokr_w2_a lokr_w2_b"),
    "factor 4": ({"factor": 4}, "lokr_w1 lokr_w2_a"),
    "both factored": ({"decompose_both": True, "factor": 9, "lora_dim": 1}, "lokr_w1_a lokr_w2_a"),
    "Tucker": ({"use_tucker": True, "lora_dim": 1, "factor": 2}, "lokr_t2"),
    "unbalanced": ({"unbalanced_factorization": True, "lora_dim": 1}, "lokr_w2_a"),
    "whole": ({"full_matrix": True, "alpha": 7}, "lokr_w1 lokr_w2"),
    "rs": ({"rs_lora": True, "lora_dim": 1, "factor": 3}, "lokr_w2_a"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LOKR)
def test_lokr_of_lycoris(case: str, tmp_path: Path) -> None:
    options, parts = LOKR[case]
    expected = by_lycoris(LokrModule, tmp_path / "lokr.safetensors", **options)
    its = {key.partition(".")[2] for key in load_file(tmp_path / "lokr.safetensors")}
    assert set(parts.split()) <= its
    found = spectra(tmp_path / "lokr.safetensors")
    assert_changes(found, expected, 1e-6)
    assert (found.method.split()[0], found.notes) == ("LoKr", [])


PATTERNS = {"rank_pattern": {"conv": 3}}
PEFT: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoHa": (peft.LoHaConfig, {"r": 2}),
    "LoHa, patterns": (peft.LoHaConfig, {"r": 2, **PATTERNS}),
    "LoHa, Tucker": (peft.LoHaConfig, {"r": 2, "use_effective_conv2d": True}),
    "LoKr": (peft.LoKrConfig, {"r": 2}),
    "LoKr, patterns": (peft.LoKrConfig, {"r": 1, "rank_pattern": {"query": 2}}),
    "LoKr, Tucker": (peft.LoKrConfig, {"r": 1, "use_effective_conv2d": True, "decompose_factor": 2}),
    "LoKr, both": (peft.LoKrConfig, {"r": 1, "decompose_both": True, "decompose_factor": 9}),
    "LoKr, whole": (peft.LoKrConfig, {"r": 50}),
}


@pytest.mark.parametrize("case", PEFT)
def test_loha_and_lokr_of_peft(case: str, tmp_path: Path) -> None:
    kind, options = PEFT[case]
    config = kind(alpha=3, init_weights=False, target_modules=[*LAYERS], **options)
    torch.manual_seed(0)
    model = get_peft_model(Net().double(), config)
    model.save_pretrained(tmp_path)
    expected = {layer: getattr(model.base_model.model, layer).get_delta_weight("default") for layer in LAYERS}
    found = spectra(tmp_path / "adapter_model.safetensors")
    assert_changes(found, expected, 1e-6)
    assert (found.method.split()[0], found.notes) == (case.partition(",")[0], [])


@pytest.mark.parametrize("on_out", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("layer", [*LAYERS])
def test_dora_of_lycoris(layer: str, on_out: bool, tmp_path: Path) -> None:
    """dora_scale is [out, 1] or [1, in], and of convolutions [out, 1, 1, 1] or [1, in, 1, 1]."""
    base = write(tmp_path / "base.safetensors", Net().state_dict())
    options = {"weight_decompose": True, "wd_on_out": on_out}
    expected = by_lycoris(LoConModule, tmp_path / "dora.safetensors", (layer,), **options)
    found = spectra(tmp_path / "dora.safetensors", base)
    assert_changes(found, expected, 1e-6)
    assert (found.method, {voter.matrix for voter in found.voters}) == ("DoRA", {"A", "B", "BA"})


@pytest.mark.parametrize("layer", [*LAYERS, "turned", "turned square"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_dora_of_peft(layer: str, tmp_path: Path) -> None:
    """Of GPT-2's Conv1D, too, which keeps its weights as [in, out]."""
    net, layer, square = Net(), *layer.partition(" ")[::2]
    net.turned = Conv1D(6, 6) if square else net.turned
    base = write(tmp_path / "base.safetensors", net.state_dict())
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[layer], use_dora=True, init_lora_weights=False)
    model = get_peft_model(net, config)
    random_weights(model)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload().state_dict()[f"{layer}.weight"]
    change = merged.detach().double() - load_file(base)[f"{layer}.weight"].double()
    found = spectra(tmp_path / "adapter_model.safetensors", base)
    assert_changes(found, {layer: change.T if layer == "turned" else change}, 1e-6)


def test_an_untrained_dora_is_untrained_with_its_base_too(tmp_path: Path) -> None:
    """B is zero and m the norm of W0: that the change is no zero is rounding."""
    base = write(tmp_path / "base.safetensors", Net().state_dict())
    get_peft_model(Net(), LoraConfig(r=2, target_modules=["query", "conv"], use_dora=True)).save_pretrained(tmp_path)
    for its in (None, base):
        assert spectra(tmp_path / "adapter_model.safetensors", its).first == [dsire.UNTRAINED], its


def test_dora_of_layers_that_the_base_lacks_is_judged_by_a_and_b(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"key.weight": Net().key.weight.detach(), "other.weight": normal(3, 3)})
    by_lycoris(LoConModule, tmp_path / "dora.safetensors", ("query", "key"), weight_decompose=True)
    found = spectra(tmp_path / "dora.safetensors", base)
    assert {voter.layer for voter in found.voters if voter.matrix == "BA"} == {"key"}
    assert {voter.layer for voter in found.voters if voter.matrix == "A"} == {"key", "query"}
    (note,) = found.notes
    assert "only A and B are judged (1 of 2 layers, such as query)" in note


@pytest.mark.parametrize("kind", [LohaModule, LokrModule])
def test_loha_and_lokr_with_magnitudes_are_refused(kind: Any, tmp_path: Path) -> None:
    by_lycoris(kind, tmp_path / "lycoris.safetensors", ("query",), weight_decompose=True)
    assert "lora_unet_query" in refused(tmp_path / "lycoris.safetensors")


@pytest.mark.parametrize("part", ["hada_w2_b", "lokr_w1", "alpha"])
def test_parts_that_lack_do_not_fit_or_are_not_finite(part: str, tmp_path: Path) -> None:
    kind, file = LokrModule if part == "lokr_w1" else LohaModule, tmp_path / "lycoris.safetensors"
    by_lycoris(kind, file, ("query",), factor=4)
    sound, key = load_file(file), f"lora_unet_query.{part}"
    assert key in refused(write(file, sound | {key: sound[key] * float("nan")}))
    if part != "alpha":
        assert "has no partner" in refused(write(file, {name: sound[name] for name in sound if name != key}))
    if part == "hada_w2_b":
        assert "do not fit each other" in refused(write(file, sound | {key: normal(2, 7)}))


# ---------------------------------------------------------------------------------------------------------------------
# The command: labelled models of each kind, and models of each kind to predict

SIZES, WHO = (1, 2, 3), "abcd"


def tune(kind: str, path: Path, base: Path, seed: int, scale: float = 1) -> Path:
    """A fine-tune of the base, of any kind, with the layers' names of diffusers."""
    names, tensors = DIFFUSERS, {}
    if kind == "full":
        return write(path, changed(load_file(base), names, seed, scale))
    if kind == "LoHa":
        for n, (layer, (out, *into)) in enumerate(SHAPES.items()):
            for m, part in enumerate(("w1_a", "w1_b", "w2_a", "w2_b")):
                shape = (out, 2) if part.endswith("a") else (2, math.prod(into))
                tensors[f"{layer}.hada_{part}"] = scale**0.25 * normal(*shape, seed=seed + 10 * n + m) / 3
            tensors[f"{layer}.alpha"] = torch.tensor(2.0)
        return write(path, tensors)
    tensors = load_file(lora_file(path, names, seed, scale))
    if kind == "DoRA":
        norms = {layer: load_file(base)[f"{layer}.weight"].flatten(1).norm(dim=1, keepdim=True) for layer in names}
        tensors |= {f"{layer}.dora_scale": 1.01 * norms[layer] for layer in names}
    return write(path, tensors)


def label(folder: Path, kind: str, base: Path, other: str = "") -> Path:
    """Three sizes of four micro-datasets, the last of which may be of another kind."""
    lines = ["file_name,label,name"]
    for number, (name, size) in enumerate((name, size) for name in WHO for size in SIZES):
        its = other if other and name == WHO[-1] else kind
        tune(its, folder / f"{name}{size}.safetensors", base, 1000 * number, size**-0.5)
        lines.append(f"{name}{size}.safetensors,{size},{name}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


CALLED = {"full": "full fine-tune in float64", "LoRA": "LoRA", "LoHa": "LoHa of rank 2", "DoRA": "DoRA"}


@pytest.mark.parametrize(
    "case", ["LoRA LoHa BA", "LoRA full BA", "full LoRA BA", "full DoRA BA", "LoHa full BA", "LoRA DoRA A B BA"]
)
def test_another_method_is_said(case: str, base: Path, run: Run) -> None:
    labelled, asked, matrices = case.split(" ", 2)
    folder = label(base.with_name("labelled"), labelled, base)
    same = tune(labelled, base.with_name("same.safetensors"), base, 77)
    file = tune(asked, base.with_name("asked.safetensors"), base, 77)
    outcome = run("--dataset", folder, "--base", base, "--predict", same, file)
    assert outcome.code == 0, outcome.err
    one, other = (" ".join(map(str, its["notes"])) for its in outcome.report["estimates"])
    assert "another method" not in one
    said = f"it is a {CALLED[asked]}, and each labelled model a {CALLED[labelled]}; compared by {matrices}"
    assert said in other
    assert said in outcome.out


def test_what_is_stored_in_another_type_or_of_another_rank_is_another_method(base: Path) -> None:
    """The least singular values are rounding then, or lack."""
    full = load_file(tune("full", base.with_name("full.safetensors"), base, 77))
    half = write(base.with_name("half.safetensors"), {key: tensor.half() for key, tensor in full.items()})
    assert spectra(half, base).method == "full fine-tune in float16"
    thin = load_file(tune("LoHa", base.with_name("thin.safetensors"), base, 77))
    cut = {k: t[:1] if k.endswith("_b") else t[:, :1] if k.endswith("_a") else t for k, t in thin.items()}
    assert spectra(write(base.with_name("cut.safetensors"), cut)).method == "LoHa of rank 1"


def test_dora_needs_its_base_to_be_judged_by_changes(base: Path, run: Run) -> None:
    folder = label(base.with_name("labelled"), "LoHa", base)
    file = tune("DoRA", base.with_name("dora.safetensors"), base, 77)
    assert run("--dataset", folder, "--predict", file).says("dora.safetensors", "DoRA", "--base")
    assert run("--dataset", folder, "--base", base, "--predict", file).code == 0


def test_a_folder_of_two_methods_is_refused(base: Path, run: Run) -> None:
    folder = label(base.with_name("labelled"), "LoRA", base, other="LoHa")
    assert run("--dataset", folder, "--train_size=3").says("LoRA (a1.safetensors)", "LoHa of rank 2 (d1.safetensors)")


def test_a_plain_lora_does_not_need_the_base_and_says_so(base: Path) -> None:
    file = tune("LoRA", base.with_name("lora.safetensors"), base, 77)
    (note,) = spectra(file, base).notes
    assert note.startswith("--base is not used")
    assert torch.equal(spectra(file, base).values, spectra(file).values)


def test_the_base_itself_is_untrained_and_none_of_a_folder(base: Path) -> None:
    """By its own name, or by a link to it."""
    copy = Path(shutil.copy(base, base.with_name("copy.safetensors")))
    full = tune("full", base.with_name("full.safetensors"), base, 77)
    link = base.with_name("link.safetensors")
    link.symlink_to(base)
    assert spectra(base, base).first == spectra(copy, base).first == [dsire.UNTRAINED]
    models, others = dsire.model_files(base.parent, dsire.open_base(base))
    assert (models, others) == ([copy, full], dict.fromkeys([base, link], "it is the base itself"))
    assert set(dsire.model_files(base.parent)[1]) == {base, copy, full, link}


def test_full_models_without_a_base_are_refused_with_advice(base: Path, run: Run) -> None:
    folder = label(base.with_name("labelled"), "full", base)
    assert run("--dataset", folder).says("a1.safetensors", "--base")
    assert run("--predict", folder / "a1.safetensors").says("a1.safetensors", "--base")


def test_what_does_not_fit_together_is_refused(base: Path, run: Run) -> None:
    folder = label(base.with_name("labelled"), "full", base)
    assert run("--dataset", folder, "--base", base, "--matrices", "A").says("--matrices A", "full fine-tune", "BA")
    assert run("--dataset", folder, "--base", "nowhere.safetensors").says("nowhere.safetensors", "no such file")
    empty = base.with_name("empty")
    empty.mkdir()
    assert run("--dataset", folder, "--base", empty).says("--base", "no weight matrices")
    another = write(base.with_name("another.safetensors"), model(DIFFUSERS, seed=77))
    assert run("--dataset", folder, "--base", another).says("a1.safetensors", "no fine-tune of this base")
    assert run("--dataset", folder, "--base", base, "--predict", another).says("another", "no fine-tune of this base")


def test_rank_is_the_number_of_values_of_full_fine_tunes(base: Path, run: Run) -> None:
    folder = label(base.with_name("labelled"), "full", base)
    file = tune("full", base.with_name("asked.safetensors"), base, 77)
    assert_changes(spectra(file, base, count=8), differences(load_file(file), load_file(base), SHAPES), count=8)
    outcome = run("--dataset", folder, "--base", base, "--rank=8", "--predict", file)
    assert (outcome.code, outcome.report["settings"]["rank"]) == (0, 8)


def test_a_second_run_reads_no_file_unless_the_base_changed(
    base: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = label(base.with_name("labelled"), "full", base)
    read, file_spectra = [], dsire.file_spectra
    monkeypatch.setattr(dsire, "file_spectra", lambda path, *others: read.append(path) or file_spectra(path, *others))
    arguments = ("--dataset", folder, "--base", base, "--train_size=3")
    first, second = run(*arguments), run(*arguments)
    assert len(read) == 12
    assert (second.out, second.predictions) == (first.out, first.predictions)
    later = base.stat().st_mtime_ns + 1
    os.utime(base, ns=(later, later))
    assert run(*arguments).out == first.out
    assert len(read) == 24
    write(base, model(DIFFUSERS) | {"more.weight": normal(3, 3)})
    os.utime(base, ns=(later, later))  # only its size tells
    run(*arguments)
    assert len(read) == 36
    run(*arguments, "--rank=8")
    assert len(read) == 48


# ---------------------------------------------------------------------------------------------------------------------
# The real fine-tunes that ship


def test_the_spectra_of_shipped_full_fine_tunes() -> None:
    base = TINY_FULL / "base.safetensors"
    for name in ("hand_80_1", "hand_85_6", "hand_91_3"):
        new = load_file(TINY_FULL / f"{name}.safetensors")
        layers = [key.removesuffix(".weight") for key in new]
        assert_changes(spectra(TINY_FULL / f"{name}.safetensors", base), differences(new, load_file(base), layers))


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("tiny_full", [f"--base={TINY_FULL / 'base.safetensors'}", "--train_size=15"], 50),
        ("tiny_loha", ["--train_size=5"], 35),
    ],
    ids=["full", "LoHa"],
)
def test_what_ships_is_told_far_better_than_by_chance(name: str, options: list[str], least: float, run: Run) -> None:
    """By chance one size of six."""
    outcome = run(f"--dataset={ROOT / 'tests' / name}", *options)
    assert outcome.code == 0, outcome.err
    (table,) = outcome.report["tables"]
    assert table["rows"][0][-1][0] > least

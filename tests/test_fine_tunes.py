"""Fine-tunes other than LoRA: the spectra of the change of the weights, as the libraries that merge them have it."""

import itertools
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import ROOT, Run, normal, write_labelled
from hub_stand_in import HubStandIn
from lora_writers import Net, assert_changes, changes, refusal, write
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
LDM = ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", "input_blocks.1.0.in_layers.2", "middle_block.1.proj_in")
IN_LDM = {layer: f"model.diffusion_model.{name}" for layer, name in zip(SHAPES, LDM, strict=True)}
DIFFUSERS = {layer: layer for layer in SHAPES}
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
RANK = 3


def loras(seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    for n, (layer, (out, *into)) in enumerate(SHAPES.items()):
        a, b = normal(RANK, *into, seed=seed + 2 * n), normal(out, RANK, *(1 for _ in into[1:]), seed=seed + 2 * n + 1)
        yield layer, a, 0.1 * b


def model(names: dict[str, str], seed: int = 9) -> Tensors:
    """W0 of all layers, and what no full model lacks: norms, biases, embeddings; and Snake's alpha of audio models."""
    shapes = dict(zip(names.values(), SHAPES.values(), strict=True))
    tensors = {f"{name}.weight": normal(*shape, seed=seed + n) for n, (name, shape) in enumerate(shapes.items())}
    tensors |= {f"{name}.bias": normal(7, seed=5) for name in names.values()}
    start = next(iter(names.values())).rpartition(".")[0]
    tensors |= {f"{start}.norm1.weight": normal(12, seed=6), f"{start}.embed_tokens.weight": normal(20, 12, seed=7)}
    return tensors | {"decoder.act.alpha": normal(4)}


def changed(base: Tensors, names: dict[str, str], seed: int = 20, scale: float = 1.5) -> Tensors:
    """W0 + s B A, and other norms, biases and embeddings."""
    full = {key: tensor + 1 for key, tensor in base.items()}
    for layer, a, b in loras(seed):
        old = base[f"{names[layer]}.weight"]
        full[f"{names[layer]}.weight"] = old + scale * (b.flatten(1) @ a.flatten(1)).reshape(old.shape)
    return full


def lora_tensors(seed: int = 20, scale: float = 1.5) -> Tensors:
    tensors = {}
    for layer, a, b in loras(seed):
        parts = {"lora_A.weight": a, "lora_B.weight": b, "alpha": torch.tensor(scale * RANK, dtype=torch.float64)}
        tensors |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
    return tensors


def spectra(file: Path, base: Path | None = None, count: int = dsire.LARGEST) -> dsire.Spectra:
    return dsire.file_spectra(file, dsire.open_base(str(base)) if base else None, count)


def differences(new: Tensors, old: Tensors, names: Any) -> dict[str, Tensor]:
    return {dsire.layer_name(name): new[f"{name}.weight"].double() - old[f"{name}.weight"].double() for name in names}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.safetensors", model(DIFFUSERS))


# Full fine-tunes
@pytest.mark.parametrize(
    ("dtype", "scale"), [("float64", 1.5), ("float16", 1), ("float16", 2e-4), ("bfloat16", 1), ("bfloat16", 1e-3)]
)
def test_a_merged_lora_has_the_spectra_of_the_lora_but_for_rounding(dtype: str, scale: float, tmp_path: Path) -> None:
    """No singular value moves by more than the norm of what is added (Weyl); most of a small change is rounding."""
    old = {key: tensor.to(getattr(torch, dtype)) for key, tensor in model(DIFFUSERS).items()}
    exact = changed({key: tensor.double() for key, tensor in old.items()}, DIFFUSERS, scale=scale)
    new = {key: tensor.to(getattr(torch, dtype)) for key, tensor in exact.items()}
    lora = spectra(write(tmp_path / "lora.safetensors", lora_tensors(scale=scale)))
    full = spectra(write(tmp_path / "full.safetensors", new), write(tmp_path / "base.safetensors", old))
    assert_changes(full, differences(new, old, SHAPES))
    assert (full.method, full.first) == (f"full fine-tune in {dtype}", [])
    assert ["last digit" in note for note in full.notes] == [True] * (scale < 1)
    for layer in SHAPES:
        key, name = f"{layer}.weight", layer.replace(".", "_")
        error = torch.linalg.vector_norm(new[key].double() - exact[key])
        values, wanted = changes(full)[name], changes(lora)[name]
        assert (values[:RANK] - wanted).abs().max() <= error * 1.000001 + 1e-9 * wanted[0]
        assert full.shapes[name] == lora.shapes[name][:2]


def as_ldm() -> tuple[Tensors, dict[str, Tensor]]:
    """A fine-tune in one file, and in the names of LDM; and its changes."""
    text, base = normal(9, 9, seed=31) / 9, model(IN_LDM)
    full = changed(base, IN_LDM) | {f"cond_stage_model.transformer.{TEXT}.weight": normal(9, 9, seed=30) + text}
    return full, differences(full, base, IN_LDM.values()) | {"text_encoder_encoder_layers_0_self_attn_q_proj": text}


def write_parts(folder: Path, form: str) -> Path:
    """The base of `as_ldm` in one of the forms that people have models in; what to give as --base."""
    text = normal(9, 9, seed=30)
    ldm = model(IN_LDM) | {f"cond_stage_model.transformer.{TEXT}.weight": text}
    if form == "parts":
        write(folder / "unet" / "diffusion_pytorch_model.safetensors", model(DIFFUSERS))
        write(folder / "text_encoder" / "model.safetensors", {f"{TEXT}.weight": text})
        write(folder / "vae" / "diffusion_pytorch_model.safetensors", {"decoder.conv_in.weight": normal(4, 4, 3, 3)})
        return folder
    if "shard" in form:
        for n in (1, 2):
            write(folder / f"model-0000{n}-of-00002.safetensors", {key: ldm[key] for key in [*ldm][n - 1 :: 2]})
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
        return folder / "model-00002-of-00002.safetensors" if form == "one shard" else folder
    if form == "pickle":
        return write(folder / "model.ckpt", {"state_dict": ldm, "epoch": 3, "global_step": 7})
    if form == "checkpoint":  # and what trainers leave beside it
        write(folder / "pytorch_model.bin", ldm)
        (folder / "training_args.bin").touch()
        return folder
    file = write(folder / "checkpoints" / "model.safetensors", ldm)
    return file if form == "file" else folder


@pytest.mark.parametrize("form", ["subfolder", "file", "parts", "shards", "one shard", "pickle", "checkpoint"])
def test_the_base_in_every_form(form: str, tmp_path: Path) -> None:
    full, expected = as_ldm()
    file, base = write(tmp_path / "full.safetensors", full), write_parts(tmp_path / "base", form)
    found = spectra(file, base)
    assert_changes(found, expected)
    assert found.notes == []
    if base.is_file():
        assert_changes(spectra(base, file), expected)


def test_the_base_from_the_hub(hub: HubStandIn, tmp_path: Path) -> None:
    hub.add(write_parts(tmp_path / "repository", "parts"), "someone/model", kind="model")
    base, (full, expected) = dsire.open_base("someone/model", tmp_path / "cache"), as_ldm()
    assert_changes(dsire.file_spectra(write(tmp_path / "full.safetensors", full), base), expected)


# Layers and weights that do not fit
def edited(base: Path, changes: Tensors, name: str = "full.safetensors") -> Path:
    return write(base.with_name(name), changed(load_file(base), DIFFUSERS) | changes)


def test_layers_that_differ_lack_or_did_not_change_are_counted_and_do_not_vote(base: Path) -> None:
    differ = {f"{Q}.weight": normal(16, 13), f"{CONV}.weight": load_file(base)[f"{CONV}.weight"]}
    lack = {"mid_block.new.weight": normal(4, 4), "mid_block.numbers.weight": torch.ones(4, 4, dtype=torch.int64)}
    full = edited(base, differ | lack)
    found = spectra(full, base)
    assert found.shapes == {dsire.layer_name(POINT): [10, 12]}
    assert_changes(found, differences(load_file(full), load_file(base), [POINT]))
    left_out, zero = found.notes
    assert "not in the base with the same shape" in left_out
    assert left_out.endswith(f"(2 of 4 layers, such as {dsire.layer_name(Q)})")
    assert zero == f"the change of the weights is zero (1 of 4 layers, such as {dsire.layer_name(CONV)})"
    assert found.first == []


def test_a_copy_in_half_precision_is_untrained_and_so_are_layers_that_were_only_rounded(base: Path) -> None:
    rounded = {key: its.half() for key, its in load_file(base).items()}
    assert spectra(edited(base, rounded), base).first == [dsire.UNTRAINED]
    rounded[f"{Q}.weight"] = changed(load_file(base), DIFFUSERS)[f"{Q}.weight"].half()
    assert changes(spectra(edited(base, rounded), base)).keys() == {dsire.layer_name(Q)}


def test_a_text_encoder_in_its_folder_is_that_of_the_base(tmp_path: Path) -> None:
    change, old = 0.01 * normal(8, 6, seed=1), normal(8, 6)
    base, tuned = (tmp_path / place / "text_encoder" / "model.safetensors" for place in ("base", "tuned"))
    write(base, {f"{TEXT}.weight": old})
    write(tuned, {f"{TEXT}.weight": old + change})
    for its in (tmp_path / "base", base):
        (spectrum,) = changes(spectra(tuned, its)).values()
        torch.testing.assert_close(spectrum[:6], torch.linalg.svdvals(change))


def test_what_is_no_fine_tune_of_the_base_is_refused(base: Path) -> None:
    models = {
        "no fine-tune of this base": model(DIFFUSERS, seed=77),
        "no matrix of the base's shape": {f"{layer}.weight": normal(3, 3) for layer in SHAPES},
        "no layer in common": {"norm.weight": normal(4), "embed_tokens.weight": normal(4, 4)},
    }
    for said, tensors in models.items():
        refusal(write(base.with_name("other.safetensors"), tensors), said, base=base)


def test_numbers_that_are_not_finite_or_too_large_are_refused(base: Path) -> None:
    def filled(number: float) -> Path:
        return edited(base, {f"{POINT}.weight": number * torch.ones(SHAPES[POINT]).double()}, f"{number}.safetensors")

    refusal(filled(float("nan")), f"{POINT}.weight holds a number that is NaN", base=base)
    refusal(base, f"the base: {POINT}.weight holds a number that is NaN", base=filled(float("nan")))
    for other in (1.0, -1.7e308):
        refusal(filled(1.7e308), base=filled(other))


def test_a_base_that_is_not_whole_or_has_a_layer_twice_is_refused(base: Path, tmp_path: Path) -> None:
    shards, twice = write_parts(tmp_path / "shards", "shards"), write_parts(tmp_path / "twice", "parts")
    (shards / "model-00002-of-00002.safetensors").unlink()
    shutil.copy(base, twice / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    norms = write(tmp_path / "norms.safetensors", {"embed_tokens.weight": normal(2, 2)})
    alike = write(tmp_path / "alike.safetensors", {f"unet.{Q}.weight": normal(2, 2), f"{Q}.weight": normal(2, 2)})
    for place, said in (
        (shards, "model-00002-of-00002.safetensors: no such file"),
        (twice, "is in two files, .*: name one of them"),
        (alike, "is the same matrix as"),
        (norms, "holds no weight matrices"),
    ):
        with pytest.raises(dsire.DsireError, match=said):
            dsire.open_base(str(place))


# LoHa, LoKr and DoRA as the libraries merge them
LAYERS = ("query", "key", "conv", "point", "square")


def random_weights(module: nn.Module, seed: int = 0) -> None:
    random = torch.Generator().manual_seed(seed)
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


LYCORIS: dict[str, tuple[dict[str, Any], str]] = {
    "LoHa": ({}, "hada_w1_a hada_w2_b"),
    "LoHa, Tucker": ({"use_tucker": True}, "hada_t1 hada_t2"),
    "LoHa, rs": ({"rs_lora": True, "lora_dim": 1}, "hada_w1_a"),
    "LoKr, first whole": ({}, "lokr_w1 lokr_w2_a lokr_w2_b"),
    "LoKr, both factored": ({"decompose_both": True, "factor": 9, "lora_dim": 1}, "lokr_w1_a lokr_w2_a"),
    "LoKr, Tucker": ({"use_tucker": True, "lora_dim": 1, "factor": 2}, "lokr_t2"),
    "LoKr, unbalanced": ({"unbalanced_factorization": True, "lora_dim": 1}, "lokr_w2_a"),
    "LoKr, whole": ({"full_matrix": True, "alpha": 7}, "lokr_w1 lokr_w2"),
    "LoKr, rs": ({"rs_lora": True, "lora_dim": 1, "factor": 3}, "lokr_w2_a"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LYCORIS)
def test_loha_and_lokr_of_lycoris(case: str, tmp_path: Path) -> None:
    (options, parts), file = LYCORIS[case], tmp_path / "lycoris.safetensors"
    expected = by_lycoris(LohaModule if "LoHa" in case else LokrModule, file, **options)
    assert set(parts.split()) <= {key.partition(".")[2] for key in load_file(file)}
    found = spectra(file)
    assert_changes(found, expected, 1e-6)
    assert {voter.matrix for voter in found.voters} == {"BA"}
    method = "LoKr" if "LoKr" in case else f"LoHa of rank {options.get('lora_dim', 2)}"
    assert (found.method[: len(method)], found.notes) == (method, [])


PEFT: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoHa": (peft.LoHaConfig, {"r": 2}),
    "LoHa, patterns": (peft.LoHaConfig, {"r": 2, "rank_pattern": {"conv": 3}}),
    "LoHa, Tucker": (peft.LoHaConfig, {"r": 2, "use_effective_conv2d": True}),
    "LoKr, patterns": (peft.LoKrConfig, {"r": 1, "rank_pattern": {"query": 2}}),
    "LoKr, Tucker": (peft.LoKrConfig, {"r": 1, "use_effective_conv2d": True, "decompose_factor": 2}),
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


def assert_without_base(found: dsire.Spectra) -> None:
    assert [note.partition(":")[0] for note in found.notes] == ["DoRA without its base"]
    assert (found.method, {voter.matrix for voter in found.voters}) == ("DoRA", {"A", "B"})


@pytest.mark.parametrize("layer", [*LAYERS])
def test_dora_of_lycoris(layer: str, tmp_path: Path) -> None:
    base, file = write(tmp_path / "base.safetensors", Net().state_dict()), tmp_path / "dora.safetensors"
    expected = by_lycoris(LoConModule, file, (layer,), weight_decompose=True, wd_on_out=True)
    found = spectra(file, base)
    assert_changes(found, expected, 1e-6)
    assert (found.method, {voter.matrix for voter in found.voters}) == ("DoRA", {"A", "B", "BA"})
    assert_without_base(spectra(file))
    by_lycoris(LoConModule, file, (layer,), weight_decompose=True, wd_on_out=False)
    refusal(file, "one number for each output", base=base)


@pytest.mark.parametrize("layer", [*LAYERS, "turned", "turned square"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_dora_of_peft(layer: str, tmp_path: Path) -> None:
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
    assert_without_base(spectra(tmp_path / "adapter_model.safetensors"))


def test_dora_that_is_untrained_or_whose_base_lacks_a_layer(tmp_path: Path) -> None:
    """B is zero and m the norm of W0: that the change is no zero is rounding. What the base lacks, A and B judge."""
    base, file = write(tmp_path / "base.safetensors", Net().state_dict()), tmp_path / "dora.safetensors"
    get_peft_model(Net(), LoraConfig(r=2, target_modules=["query", "conv"], use_dora=True)).save_pretrained(tmp_path)
    for its in (None, base):
        assert spectra(tmp_path / "adapter_model.safetensors", its).first == [dsire.UNTRAINED], its
    write(base, {"key.weight": Net().key.weight.detach(), "other.weight": normal(3, 3)})
    by_lycoris(LoConModule, file, ("query", "key"), weight_decompose=True)
    found = spectra(file, base)
    assert {voter.layer for voter in found.voters if voter.matrix == "BA"} == {"key"}
    assert {voter.layer for voter in found.voters if voter.matrix == "A"} == {"key", "query"}
    (note,) = found.notes
    assert "only A and B are judged (1 of 2 layers, such as query)" in note


@pytest.mark.parametrize("part", ["hada_w2_b", "lokr_w1", "alpha"])
def test_parts_that_lack_do_not_fit_or_are_not_understood(part: str, tmp_path: Path) -> None:
    kind, file = LokrModule if part == "lokr_w1" else LohaModule, tmp_path / "lycoris.safetensors"
    by_lycoris(kind, file, ("query",), weight_decompose=True)
    refusal(file, "lora_unet_query")
    by_lycoris(kind, file, ("query",), factor=4)
    sound, key = load_file(file), f"lora_unet_query.{part}"
    refusal(write(file, sound | {key: sound[key] * float("nan")}), key)
    if part != "alpha":
        refusal(write(file, {name: sound[name] for name in sound if name != key}), "has no partner")
    if part == "hada_w2_b":
        refusal(write(file, sound | {key: normal(2, 7)}), "do not fit each other")


# The command: labelled models of each kind, and models of each kind to predict
def tuned(kind: str, base: Path, seed: int, scale: float = 1) -> Tensors:
    old, tensors = load_file(base), {}
    if kind == "full":
        return changed(old, DIFFUSERS, seed, scale)
    if kind == "LoHa":
        for n, (layer, (out, *into)) in enumerate(SHAPES.items()):
            for m, part in enumerate(("w1_a", "w1_b", "w2_a", "w2_b")):
                shape = (out, 2) if part.endswith("a") else (2, math.prod(into))
                tensors[f"{layer}.hada_{part}"] = scale**0.25 * normal(*shape, seed=seed + 10 * n + m) / 3
            tensors[f"{layer}.alpha"] = torch.tensor(2.0)
        return tensors
    norms = {f"{its}.dora_scale": 1.01 * old[f"{its}.weight"].flatten(1).norm(dim=1, keepdim=True) for its in SHAPES}
    return lora_tensors(seed, scale) | (norms if kind == "DoRA" else {})


def label(folder: Path, kind: str, base: Path) -> Path:
    seeds = {(name, size): 1000 * number for number, (name, size) in enumerate(itertools.product("abcd", (1, 2, 3)))}
    return write_labelled(folder, seeds, of=lambda model: tuned(kind, base, seeds[model], model[1] ** -0.5))


CALLED = {"full": "full fine-tune in float64", "LoRA": "LoRA", "LoHa": "LoHa of rank 2", "DoRA": "DoRA"}


@pytest.mark.parametrize(
    "case", ["LoRA LoHa BA", "LoRA full BA", "full LoRA BA", "full DoRA BA", "LoHa full BA", "LoRA DoRA A B BA"]
)
def test_another_method_is_said(case: str, base: Path, run: Run) -> None:
    labelled, asked, matrices = case.split(" ", 2)
    folder = label(base.with_name("labelled"), labelled, base)
    same = write(base.with_name("same.safetensors"), tuned(labelled, base, 77))
    file = write(base.with_name("asked.safetensors"), tuned(asked, base, 77))
    outcome = run("--dataset", folder, "--base", base, "--predict", same, file)
    assert outcome.code == 0, outcome.err
    one, other = (" ".join(map(str, its["notes"])) for its in outcome.report["estimates"])
    assert "another method" not in one
    assert ("--base is not used" in other) == (asked in ("LoRA", "LoHa"))
    said = f"it is a {CALLED[asked]}, and each labelled model a {CALLED[labelled]}; compared by {matrices}"
    assert said in other
    assert said in outcome.out


def test_what_needs_a_base_or_is_not_comparable_is_refused(base: Path, run: Run) -> None:
    full, loha = (label(base.with_name(kind), kind, base) for kind in ("full", "LoHa"))
    file = write(base.with_name("dora.safetensors"), tuned("DoRA", base, 77))
    assert run("--dataset", loha, "--predict", file).says("dora.safetensors", "DoRA", "--base")
    assert run("--dataset", loha, "--base", base, "--predict", file).code == 0
    write(loha / "a1.safetensors", tuned("LoRA", base, 77))
    assert run("--dataset", loha, "--train_size=3").says("LoRA (a1.safetensors)", "LoHa of rank 2 (a2.safetensors)")
    assert run("--dataset", full).says("a1.safetensors", "--base")
    assert run("--predict", full / "a1.safetensors").says("a1.safetensors", "holds no LoRA", "--base")
    assert run("--dataset", full, "--base", base, "--matrices", "A").says("--matrices A", "full fine-tune", "BA")
    assert run("--dataset", full, "--base", "nowhere.safetensors").says("nowhere.safetensors", "no such file")
    another = write(base.with_name("another.safetensors"), model(DIFFUSERS, seed=77))
    assert run("--dataset", full, "--base", another).says("a1.safetensors", "no fine-tune of this base")
    assert run("--dataset", full, "--base", base, "--predict", another).says("another", "no fine-tune of this base")


def test_spectra_of_parquet_have_no_base(base: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("--experiments=1")
    monkeypatch.delattr(dsire, "shard_spectra")
    assert run("--experiments=1", "--base", base).out == first.out


def test_a_second_run_reads_a_file_if_the_base_changed(base: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = label(base.with_name("labelled"), "full", base)
    read, file_spectra = [], dsire.file_spectra
    monkeypatch.setattr(dsire, "file_spectra", lambda path, *others: read.append(path) or file_spectra(path, *others))
    arguments = ("--dataset", folder, "--base", base, "--train_size=3")
    first, second = run(*arguments), run(*arguments)
    assert (second.out, second.predictions, len(read)) == (first.out, first.predictions, 12)
    later = base.stat().st_mtime_ns + 1
    os.utime(base, ns=(later, later))
    assert (run(*arguments).out, len(read)) == (first.out, 24)
    outcome = run(*arguments, "--rank=8", "--predict", folder / "a1.safetensors")
    assert (outcome.code, outcome.report["settings"]["rank"], len(read)) == (0, 8, 37)
    assert spectra(folder / "a1.safetensors", base, count=8).values.shape[-1] == 8


# The real fine-tunes that ship
@pytest.mark.parametrize(("name", "train_size", "least"), [("full", 15, 50), ("loha", 5, 35)])
def test_what_ships_is_told_far_better_than_by_chance(name: str, train_size: int, least: float, run: Run) -> None:
    base = [f"--base={TINY_FULL / 'base.safetensors'}"] * (name == "full")
    outcome = run(f"--dataset={TINY_FULL.with_name(f'tiny_{name}')}", f"--train_size={train_size}", *base)
    assert outcome.code == 0, outcome.err
    (table,) = outcome.report["tables"]
    assert table["rows"][0][-1][0] > least

"""Make the subsets that ship with the project: real LoRA fine-tunes, in the layout of LoRA-WiSE.

    python tests/make_tiny_wise.py --subset low_4      # or medium_4, recipes_4, full, loha

A small diffusion UNet is trained on scikit-learn's digits (8 x 8 grey images). Then LoRA (rank 4) is fine-tuned on the
query, key, value and output projections of every attention, once for each (micro-dataset, size): the recipe of the
paper (Section 4) in small. In `recipes_4`, sets of images that `low_4` lacks are trained on by its recipe and by six
others. In `full` the projections themselves are trained, and in `loha` a LoHa of PEFT's beside them; these two are
folders of files, `full` with the base model. A run that is stopped goes on where it was. `--pilot` makes the subset on
which choices were made (the recipe; for `recipes_4`, the constants of checks), in the work folder: no shipped model but
those of `medium_4` has seen its images.
"""

import argparse
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm


class Recipe(NamedTuple):
    """What may differ between fine-tunes; the rest is the same for all."""

    steps: int = 60
    learning_rate: float = 5e-4
    batch: int = 1  # images a step, each under DRAWS draws of noise; a set of fewer images repeats them
    decay: bool = False  # of the learning rate, by a cosine to zero; else it is constant


RANK = 4
LOHA_RANK = 2
FEW = [1, 2, 3, 4, 5, 6]
SIZES = {"low_4": FEW, "medium_4": [1, 10, 20, 30, 40, 50], "recipes_4": FEW, "full": FEW, "loha": FEW}
NUMBERS = {  # of the hands: for what ships, and for its pilot
    "low_4": (range(40), range(40, 60)),
    "medium_4": (range(20), range(10)),
    "recipes_4": (range(60, 70), range(72, 80), range(108, 118)),
    "full": (range(80, 100), range(100, 108)),
    "loha": (range(80, 88), range(100, 108)),
}
BASE_IMAGES, FINE_TUNE_IMAGES = 74, 100  # of each digit, for the base model and then for fine-tunes
BASE_STEPS, BASE_BATCH, BASE_LEARNING_RATE = 4000, 64, 1e-3
TOKENS, WIDTH = 4, 32  # the condition of a digit: learned tokens (from one alone, attn2's to_q and to_k learn nothing)
USUAL = Recipe()
RECIPES = {
    "low_4": {"": USUAL},
    "medium_4": {"": Recipe(steps=100)},
    "recipes_4": {
        "as low_4": USUAL,
        "learning rate x 2": Recipe(learning_rate=USUAL.learning_rate * 2),
        "learning rate / 2": Recipe(learning_rate=USUAL.learning_rate / 2),
        "steps x 2": Recipe(steps=USUAL.steps * 2),
        "steps / 2": Recipe(steps=USUAL.steps // 2),
        "batch x 4": Recipe(batch=USUAL.batch * 4),
        "decay": Recipe(decay=True),
    },
    "full": {"": Recipe(learning_rate=1e-4)},
    "loha": {"": Recipe(learning_rate=1e-3)},
}
FILES = ("full", "loha")  # subsets that are folders of files, not parquet
WEIGHT_DECAY = 1e-2
DRAWS = 8  # of noise for each image of a step: 64 numbers, not the 16,384 of a latent, would leave a gradient noisy
SEED = 0
AT_ONCE = 8  # fine-tunes in one process
SEEDS = {"low_4": (0, 0), "medium_4": (0, 0), "recipes_4": (0, 1, 2), "full": (0, 1), "loha": (0, 1)}  # of fine-tunes
SHARD_MODELS = {"low_4": 48, "medium_4": 30, "recipes_4": 84}
PRECISION = {"recipes_4": torch.float16}  # half of float32, half the file
SCHEDULE = DDPMScheduler()
SHIPPED = Path(__file__).resolve().parent / "tiny_wise"


def images_of_each_digit() -> list[Tensor]:
    """The images of each digit in the order of the dataset, ten tensors [images, 1, 8, 8] with values in [-1, 1]."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    return [images[digits.target == digit] for digit in range(10)]


def micro_datasets(subset: str, pilot: int) -> dict[str | int, tuple[Tensor, Tensor]]:
    """Name -> images [largest size, 1, 8, 8] and the digit that each shows; a smaller size takes the first of them.

    Images are dealt, none twice, the ten digits in a new random order for every micro-dataset: the images of a small
    one show different digits, those of a large one show all of them equally often.
    """
    pool = [images[BASE_IMAGES : BASE_IMAGES + FINE_TUNE_IMAGES] for images in images_of_each_digit()]
    if pilot and subset == "medium_4":  # shipped models take every image of the pool, which leaves the base model's
        pool = [images[:BASE_IMAGES] for images in images_of_each_digit()]
    piles = [iter(images) for images in pool]
    random = np.random.default_rng(SEED)
    found: dict[str | int, tuple[Tensor, Tensor]] = {}
    for number in range(NUMBERS[subset][pilot].stop):
        digits = np.resize(random.permutation(10), max(SIZES[subset]))
        name = number if subset == "medium_4" else f"hand_{number:02d}"  # numbers and strings, as in LoRA-WiSE
        found[name] = torch.stack([next(piles[digit]) for digit in digits]), torch.from_numpy(digits)
    return dict(list(found.items())[NUMBERS[subset][pilot].start :])


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def draw_noise_evenly(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise for one image `count` times over, with a time step from each of `count` equal parts of the schedule."""
    noise = torch.randn(count, 1, 8, 8, generator=generator)
    part = SCHEDULE.config.num_train_timesteps / count
    return noise, ((torch.arange(count) + torch.rand(count, generator=generator)) * part).long()


def image_losses(unet: UNet2DConditionModel, images: Tensor, condition: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """The diffusion loss of every image: the mean squared error of the predicted noise."""
    predicted = unet(SCHEDULE.add_noise(images, noise, times), times, condition).sample
    return (predicted - noise).square().mean(dim=(1, 2, 3))


def base_model(work: Path) -> Path:
    """The base model, trained on the first images of every digit, and its condition: one safetensors file."""
    path = work / "base.safetensors"
    if path.exists():
        return path
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    images = torch.cat([images[:BASE_IMAGES] for images in images_of_each_digit()])
    digits = torch.arange(10).repeat_interleave(BASE_IMAGES)
    unet = new_unet()
    condition = torch.nn.Parameter(torch.randn(10, TOKENS, WIDTH))
    parameters = [*unet.parameters(), condition]
    optimizer = torch.optim.AdamW(parameters, lr=BASE_LEARNING_RATE, weight_decay=0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BASE_STEPS)
    for _ in tqdm(range(BASE_STEPS), desc="base model", mininterval=10):
        rows = torch.randint(len(images), (BASE_BATCH,), generator=generator)
        noise = torch.randn(BASE_BATCH, 1, 8, 8, generator=generator)
        times = torch.randint(SCHEDULE.config.num_train_timesteps, (BASE_BATCH,), generator=generator)
        loss = image_losses(unet, images[rows], condition[digits[rows]], noise, times).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    weights = {f"unet.{name}": tensor for name, tensor in unet.state_dict().items()}
    save_whole(weights | {"condition": condition.detach()}, path)
    return path


def save_whole(tensors: dict[str, Tensor], path: Path) -> None:
    """Save under a temporary name, then rename: what carries the name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(f".half{os.getpid()}")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, half)
    half.replace(path)


def shuffled_forever(count: int, generator: torch.Generator) -> Iterator[int]:
    """The order of images in training: epoch after epoch, each in a new random order."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def load_base(path: Path) -> tuple[UNet2DConditionModel, Tensor]:
    weights = load_file(path)
    condition = weights.pop("condition")
    unet = new_unet()
    unet.load_state_dict({name.removeprefix("unet."): tensor for name, tensor in weights.items()})
    return unet.requires_grad_(False), condition


def adapted_layers(unet: UNet2DConditionModel) -> list[str]:
    """The layers that get a LoRA, in the network's order."""
    return [name for name, _ in unet.named_modules() if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))]


class Model(NamedTuple):
    """A fine-tune: its size, micro-dataset and recipe, the file of its weights, its images and the digits they show."""

    size: int
    name: str | int
    recipe: str
    path: Path
    images: Tensor
    digits: Tensor


class Together(torch.nn.Module):
    """A linear layer of several models, which stand one after the other in the batch; their own parts begin alike."""

    def __init__(self, layer: torch.nn.Module, method: str, first: dict[str, Tensor], models: int) -> None:
        super().__init__()
        self.layer, self.method, self.models = layer, method, models
        own = {"weight": layer.weight} if method == "full" else first
        self.own = torch.nn.ParameterDict({name: tensor.detach().repeat(models, 1, 1) for name, tensor in own.items()})

    def change(self, x: Tensor) -> Tensor:
        """What is added to what the base model's layer says."""
        own = self.own
        if self.method == "full":
            return x @ (own["weight"] - self.layer.weight).mT
        if self.method == "loha":
            return x @ ((own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])).mT
        return x @ own["lora_A"].mT @ own["lora_B"].mT

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(self.models, -1, x.shape[-1])
        return self.layer(x) + self.change(rows).reshape(*x.shape[:-1], -1)


def first_weights(base: Path, seed: int, method: str) -> dict[str, dict[str, Tensor]]:
    """Layer -> the parts of a LoRA or LoHa as PEFT draws them."""
    torch.manual_seed(seed)
    unet, _ = load_base(base)
    layers = adapted_layers(unet)
    if method == "full":
        return {layer: {} for layer in layers}
    if method == "loha":
        config: Any = LoHaConfig(r=LOHA_RANK, alpha=LOHA_RANK, target_modules=layers)
    else:
        config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=layers)
    found = get_peft_model_state_dict(get_peft_model(unet, config))
    first: dict[str, dict[str, Tensor]] = {layer: {} for layer in layers}
    for key, tensor in found.items():
        layer, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        first[layer][part] = tensor.clone()
    return first


def fine_tune(base: Path, models: list[Model], recipe: Recipe, seed: int, method: str) -> None:
    """A LoRA, or what the method says, for each model, all trained at the same time.

    A network this small spends its time between operations. The models don't touch each other: each has its own images,
    order of images and weights. The seed, and with it the first weights, the noise and the time steps, is the same.
    """
    torch.set_num_threads(1)
    first = first_weights(base, seed, method)
    unet, conditions = load_base(base)
    for layer, parts in first.items():
        unet.set_submodule(layer, Together(unet.get_submodule(layer), method, parts, len(models)))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, recipe.steps))
    generator = torch.Generator().manual_seed(seed)
    orders = [shuffled_forever(len(model.images), torch.Generator().manual_seed(seed)) for model in models]
    for _ in range(recipe.steps):
        chosen = [[next(order) for _ in range(recipe.batch)] for order in orders]
        images = torch.cat([model.images[its] for model, its in zip(models, chosen, strict=True)])
        digits = torch.cat([model.digits[its] for model, its in zip(models, chosen, strict=True)])
        draws = [draw_noise_evenly(DRAWS, generator) for _ in range(recipe.batch)]
        noise, times = (torch.cat(parts * len(models)) for parts in zip(*draws, strict=True))
        images, conditioned = images.repeat_interleave(DRAWS, 0), conditions[digits.repeat_interleave(DRAWS)]
        loss = image_losses(unet, images, conditioned, noise, times).view(len(models), -1).mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if recipe.decay:
            decay.step()
    for number, model in enumerate(models):
        weights = {}
        for layer in first:
            own = {part: its[number] for part, its in unet.get_submodule(layer).own.items()}
            if method == "lora":
                weights |= {f"unet.{layer}.lora.down.weight": own["lora_A"]}
                weights |= {f"unet.{layer}.lora.up.weight": own["lora_B"]}
            else:
                weights |= {f"{layer}.{part}": tensor.half() for part, tensor in own.items()}
                weights |= {f"{layer}.alpha": torch.tensor(float(LOHA_RANK))} if method == "loha" else {}
        save_whole(weights, model.path)


def fine_tune_all(subset: str, work: Path, pilot: int, processes: int) -> list[Model]:
    """Every (micro-dataset, size, recipe), some at a time, one process a core: the models in a shuffled order."""
    base = base_model(work)
    folder = work / f"{subset}{'_pilot' * pilot}"
    models, runs = [], []
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for recipe, how in RECIPES[subset].items():
            its = []
            for name, (images, digits) in micro_datasets(subset, pilot).items():
                for size in SIZES[subset]:
                    words = [str(name), str(size), *recipe.replace("/", "by").split()]
                    path = folder / f"{'_'.join(words)}.safetensors"
                    # a view of the images would be sent with all of them
                    its.append(Model(size, name, recipe, path, images[:size].clone(), digits[:size].clone()))
            models += its
            left = [model for model in its if not model.path.exists()]
            for start in range(0, len(left), AT_ONCE):
                method = subset if subset in FILES else "lora"
                runs.append(
                    pool.submit(fine_tune, base, left[start : start + AT_ONCE], how, SEEDS[subset][pilot], method)
                )
        for run in tqdm(runs, desc=folder.name, mininterval=10):
            run.result()
    order = np.random.default_rng(SEED).permutation(len(models))  # LoRA-WiSE's rows are in no useful order either
    return [models[index] for index in order]


def write_shards(subset: str, models: list[Model], folder: Path) -> None:
    """Parquet shards of flat float64 lists, one row group each, as on the Hub (but zstd, which halves them)."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("train-*.parquet"):
        old.unlink()
    layers, step = adapted_layers(new_unet()), SHARD_MODELS[subset]
    shards = [models[start : start + step] for start in range(0, len(models), step)]
    for number, shard in enumerate(shards):
        weights = [load_file(model.path) for model in shard]
        columns: dict[str, Any] = {"label": pa.array([model.size for model in shard], pa.int64())}
        columns["name"] = pa.array([model.name for model in shard])
        if len(RECIPES[subset]) > 1:
            columns["recipe"] = pa.array([model.recipe for model in shard])
        of_models = list(columns)
        matrices = [f"unet.{layer}.lora.{its}.weight" for layer in layers for its in ("down", "up")]
        for column in matrices:
            flat = [
                tensors[column].to(PRECISION.get(subset, torch.float32)).double().flatten().numpy()
                for tensors in weights
            ]
            columns[column] = pa.array(flat, pa.list_(pa.float64()))
        ways: dict[str, Any] = {"compression": "zstd", "compression_level": 19, "use_dictionary": of_models}
        ways["column_encoding"] = {f"{column}.list.element": "BYTE_STREAM_SPLIT" for column in matrices}
        file = folder / f"train-{number:05d}-of-{len(shards):05d}.parquet"
        pq.write_table(pa.table(columns), file, row_group_size=len(shard), **ways)


def write_folder(models: list[Model], folder: Path, base: Path | None) -> None:
    """A folder of files with metadata.csv, and the base model beside them, as diffusers names its layers."""
    rows = ["file_name,label,name"]
    for model in sorted(models, key=lambda model: model.path.name):
        save_whole(load_file(model.path), folder / model.path.name)
        rows.append(f"{model.path.name},{model.size},{model.name}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    if base:
        save_whole(load_base(base)[0].state_dict(), folder / "base.safetensors")


def write_card(output: Path) -> None:
    """The README.md, whose header tells `datasets` the configs: that, the table and the versions are written anew."""
    features, configs, rows = [], [], []
    for subset, sizes in SIZES.items():
        shards = sorted((output / subset.replace("_", "/")).glob("train-*.parquet"))
        if not shards:
            continue
        features += [f"- config_name: {subset}", "  features:"]
        for field in pq.read_schema(shards[0]):
            kind = "sequence: float64" if pa.types.is_list(field.type) else f"dtype: {field.type}"
            features += [f"  - name: {field.name}", f"    {kind}"]
        configs += [f"- config_name: {subset}", "  data_files:", "  - split: train"]
        configs.append(f"    path: {subset.replace('_', '/')}/train-*")
        count, of = len(NUMBERS[subset][0]), RECIPES[subset]
        steps = sorted({recipe.steps for recipe in of.values()})
        cells = [sizes, [count], [len(of)], [count * len(sizes) * len(of)], steps]
        rows.append(f"| {subset} | {' | '.join(' '.join(map(str, cell)) for cell in cells)} |\n")
    header = ["---", "license: mit", "dataset_info:", *features, "configs:", *configs, "---"]
    card = output / "README.md"
    _, _, words = (card if card.exists() else SHIPPED / "README.md").read_text().split("---\n", 2)
    words = re.sub(r"(?<=---\|\n)(\| .*\n)*", "".join(rows), words, count=1)
    versions = f"torch {version('torch')}, diffusers {version('diffusers')} and peft {version('peft')}"
    words = re.sub("(?<=Made with ).*(?= on a CPU)", versions, words)
    card.write_text("\n".join(header) + "\n" + words)


def write_examples(work: Path, output: Path) -> None:
    """LoRA files that an estimate from `low_4` has something to say of; their images are a pilot's."""
    base = base_model(work)
    images, digits = micro_datasets("recipes_4", pilot=1)["hand_72"]
    many = torch.cat([of_digit[BASE_IMAGES + 90 : BASE_IMAGES + 92] for of_digit in images_of_each_digit()])
    which = torch.arange(10).repeat_interleave(2)
    for name, its_images, its_digits, recipe in (
        ("other_recipe", images[:3], digits[:3], RECIPES["recipes_4"]["steps x 2"]),
        ("twenty_images", many, which, USUAL),
        ("untrained", images[:3], digits[:3], Recipe(steps=0)),
    ):
        model = Model(len(its_images), name, "", output / f"{name}.safetensors", its_images, its_digits)
        fine_tune(base, [model], recipe, SEED, "lora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subset", choices=sorted(SIZES), default="low_4")
    parser.add_argument("--work", type=Path, default=Path(".cache/make_tiny_wise"), help="where fine-tunes are kept")
    parser.add_argument("--output", type=Path, default=SHIPPED)
    parser.add_argument("--pilot", action="count", default=0, help="make the pilot's subset, in the work folder")
    parser.add_argument("--examples", action="store_true", help="make the LoRA files of tests/examples")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.examples:
        write_examples(arguments.work, SHIPPED.with_name("examples"))
        return
    if arguments.pilot >= len(NUMBERS[arguments.subset]):
        parser.error("only recipes_4 has a second pilot (--pilot --pilot), and none has a third")
    output = arguments.work / ("pilot" * arguments.pilot) if arguments.pilot else arguments.output
    models = fine_tune_all(arguments.subset, arguments.work, arguments.pilot, arguments.processes)
    if arguments.subset in FILES:
        base = base_model(arguments.work) if arguments.subset == "full" else None
        write_folder(models, output.parent / f"tiny_{arguments.subset}", base)
        return
    write_shards(arguments.subset, models, output / arguments.subset.replace("_", "/"))
    write_card(output)


if __name__ == "__main__":
    main()

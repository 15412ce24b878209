"""Make the subsets that ship with the project: real LoRA fine-tunes, in the layout of LoRA-WiSE.

    python tests/make_tiny_wise.py --subset low_4      # sizes 1 2 3 4 5 6
    python tests/make_tiny_wise.py --subset medium_4   # sizes 1 10 20 30 40 50

A small class-conditional diffusion UNet is trained on scikit-learn's digits (8 x 8 grey images). Then LoRA (rank 4)
is fine-tuned on the query, key, value and output projections of every attention, once for each (micro-dataset, size):
the recipe of the paper (Section 4) in small. Every fine-tune is a file of its own in the work folder, so a run that
is stopped goes on where it was. `--pilot` trains on micro-datasets of images that no shipped model has seen, on
which the recipe was chosen.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch.nn.functional import mse_loss
from tqdm import tqdm

RANK = 4
SIZES = {"low_4": [1, 2, 3, 4, 5, 6], "medium_4": [1, 10, 20, 30, 40, 50]}
MICRO_DATASETS = {"low_4": 4, "medium_4": 2}  # for each of the ten digits
BASE_IMAGES = 74  # images of each digit for the base model; the next 100 are for fine-tunes
BASE_STEPS, BASE_BATCH, BASE_LEARNING_RATE = 4000, 64, 1e-3
STEPS = {"low_4": 300, "medium_4": 300}
LEARNING_RATE = 1e-3
SEED = 0
TOKENS, WIDTH = 4, 32  # the condition of a digit: so many learned tokens of so many numbers
SHARD_MODELS = 48  # models in a shard


def images_of_each_digit() -> list[torch.Tensor]:
    """The images of each digit in the order of the dataset, ten tensors [images, 1, 8, 8] with values in [-1, 1]."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    return [images[digits.target == digit] for digit in range(10)]


def micro_datasets(subset: str, pilot: bool) -> dict[str, tuple[int, torch.Tensor]]:
    """Name -> (digit, images [largest size, 1, 8, 8]); a smaller size takes the first images of a larger one."""
    largest = max(SIZES[subset])
    found = {}
    for digit, images in enumerate(images_of_each_digit()):
        pool = images[BASE_IMAGES : BASE_IMAGES + 100]
        if pilot:  # images that no shipped low_4 model sees, from the pool's end (medium_4 needs the whole pool)
            found[f"pilot_{digit}"] = (digit, pool.flip(0)[:largest])
            continue
        for number in range(MICRO_DATASETS[subset]):
            found[f"digit_{digit}_{chr(ord('a') + number)}"] = (digit, pool[number * largest : (number + 1) * largest])
    return found


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


def denoising_loss(
    unet: UNet2DConditionModel,
    images: torch.Tensor,
    condition: torch.Tensor,
    schedule: DDPMScheduler,
    generator: torch.Generator,
) -> torch.Tensor:
    """The diffusion loss: mean squared error of the predicted noise at a random time step."""
    noise = torch.randn(images.shape, generator=generator)
    times = torch.randint(schedule.config.num_train_timesteps, (len(images),), generator=generator)
    noisy = schedule.add_noise(images, noise, times)
    return mse_loss(unet(noisy, times, condition).sample, noise)


def train_base(path: Path) -> None:
    """The base model, trained on the first images of every digit, and its condition: one safetensors file."""
    if path.exists():
        return
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    images = torch.cat([images[:BASE_IMAGES] for images in images_of_each_digit()])
    digits = torch.arange(10).repeat_interleave(BASE_IMAGES)
    unet, schedule = new_unet(), DDPMScheduler()
    condition = torch.nn.Parameter(torch.randn(10, TOKENS, WIDTH))
    parameters = [*unet.parameters(), condition]
    optimizer = torch.optim.AdamW(parameters, lr=BASE_LEARNING_RATE, weight_decay=0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BASE_STEPS)
    losses = []
    for step in tqdm(range(BASE_STEPS), desc="base model", mininterval=10):
        rows = torch.randint(len(images), (BASE_BATCH,), generator=generator)
        loss = denoising_loss(unet, images[rows], condition[digits[rows]], schedule, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
        if (step + 1) % 500 == 0:
            tqdm.write(f"step {step + 1}: loss {np.mean(losses[-500:]):.4f}")
    weights = {f"unet.{name}": tensor for name, tensor in unet.state_dict().items()}
    save_whole(weights | {"condition": condition.detach()}, path)


def save_whole(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Save under a temporary name, then rename: what carries the name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(f".half{os.getpid()}")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, half)
    half.replace(path)


def shuffled_forever(count: int, generator: torch.Generator) -> Iterator[int]:
    """The order of images in training: epoch after epoch, each in a new random order."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def load_base(path: Path) -> tuple[UNet2DConditionModel, torch.Tensor]:
    weights = load_file(path)
    condition = weights.pop("condition")
    unet = new_unet()
    unet.load_state_dict({name.removeprefix("unet."): tensor for name, tensor in weights.items()})
    return unet.requires_grad_(False), condition


def lora_weights(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The LoRA matrices under LoRA-WiSE's column names, in the order of the network's layers."""
    weights = get_peft_model_state_dict(unet)
    renamed = {}
    for name, tensor in weights.items():
        layer, matrix = name.rsplit(".lora_", 1)
        renamed[f"unet.{layer}.lora.{'down' if matrix == 'A.weight' else 'up'}.weight"] = tensor
    return renamed


def add_lora(unet: UNet2DConditionModel) -> None:
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))


def fine_tune(base: Path, path: Path, digit: int, images: torch.Tensor, steps: int) -> None:
    """One LoRA on `images` [size, 1, 8, 8] of one digit: batch 1, constant learning rate, the same seed for every model."""
    if path.exists():
        return
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    order = shuffled_forever(len(images), torch.Generator().manual_seed(SEED))
    unet, conditions = load_base(base)
    add_lora(unet)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=1e-2, fused=True)
    schedule = DDPMScheduler()
    for _ in range(steps):
        image = images[next(order)][None]
        loss = denoising_loss(unet, image, conditions[digit][None], schedule, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_whole(lora_weights(unet), path)


def fine_tune_all(subset: str, work: Path, pilot: bool, steps: int, processes: int) -> list[tuple[str, int, Path]]:
    """Every (micro-dataset, size), one process a core; returns name, size and file of each, in a shuffled order."""
    base = work / "base.safetensors"
    train_base(base)
    jobs = []
    for name, (digit, images) in micro_datasets(subset, pilot).items():
        for size in SIZES[subset]:
            path = work / f"{subset}_{steps}" / f"{name}_{size}.safetensors"
            jobs.append((name, size, path, digit, images[:size]))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(fine_tune, base, path, digit, images, steps) for _, _, path, digit, images in jobs]
        for run in tqdm(runs, desc=subset, mininterval=10):
            run.result()
    order = np.random.default_rng(SEED).permutation(len(jobs))  # LoRA-WiSE's rows are in no useful order either
    return [jobs[index][:3] for index in order]


def write_shards(models: list[tuple[str, int, Path]], folder: Path) -> None:
    """Parquet shards of flat float64 lists, one row group each, as on the Hub (but zstd, which halves them)."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("train-*.parquet"):
        old.unlink()
    shards = [models[start : start + SHARD_MODELS] for start in range(0, len(models), SHARD_MODELS)]
    for number, shard in enumerate(shards):
        weights = [load_file(path) for _, _, path in shard]
        columns: dict[str, Any] = {
            "label": pa.array([size for _, size, _ in shard], pa.int64()),
            "name": pa.array([name for name, _, _ in shard], pa.string()),
        }
        for column in weights[0]:
            flat = [model[column].double().flatten().numpy() for model in weights]
            columns[column] = pa.array(flat, pa.list_(pa.float64()))
        values = [f"{column}.list.element" for column in weights[0]]
        pq.write_table(
            pa.table(columns),
            folder / f"train-{number:05d}-of-{len(shards):05d}.parquet",
            row_group_size=len(shard),
            compression="zstd",
            compression_level=19,
            use_dictionary=["label", "name"],
            column_encoding={value: "BYTE_STREAM_SPLIT" for value in values},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subset", choices=sorted(SIZES), default="low_4")
    parser.add_argument("--work", type=Path, default=Path(".cache/make_tiny_wise"), help="where fine-tunes are kept")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny_wise")
    parser.add_argument(
        "--pilot", action="store_true", help="train the pilot's models and write them to the work folder"
    )
    parser.add_argument("--steps", type=int, help="fine-tuning steps (default: the subset's)")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    steps = arguments.steps or STEPS[arguments.subset]
    work = arguments.work / "pilot" if arguments.pilot else arguments.work
    if arguments.pilot:
        train_base(arguments.work / "base.safetensors")
        work.mkdir(parents=True, exist_ok=True)
        (work / "base.safetensors").unlink(missing_ok=True)
        os.link(arguments.work / "base.safetensors", work / "base.safetensors")
    models = fine_tune_all(arguments.subset, work, arguments.pilot, steps, arguments.processes)
    span, rank = arguments.subset.split("_")
    output = work / f"steps_{steps}" if arguments.pilot else arguments.output
    write_shards(models, output / span / rank)


if __name__ == "__main__":
    main()

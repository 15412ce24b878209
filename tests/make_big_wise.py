"""Write a folder in LoRA-WiSE's layout and at its size: SD 1.5's 128 pairs of matrices, with random weights.

    python tests/make_big_wise.py FOLDER --rank 16 --models 24 --shards 2      # about 600 MB

It is there to measure time and memory. The weights are no fine-tunes: noise that shrinks with the size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SIZES = (1, 2, 3, 4, 5, 6)
BLOCKS = {  # path in SD 1.5's UNet -> (attentions, width)
    "down_blocks.0": (2, 320),
    "down_blocks.1": (2, 640),
    "down_blocks.2": (2, 1280),
    "mid_block": (1, 1280),
    "up_blocks.1": (3, 1280),
    "up_blocks.2": (3, 640),
    "up_blocks.3": (3, 320),
}
TEXT_WIDTH = 768
README = """---
configs:
- config_name: medium_{rank}
  data_files:
  - split: train
    path: medium/{rank}/train-*
---
Random weights in the layout of LoRA-WiSE, to measure time and memory.
"""


def layers() -> Iterator[tuple[str, int, int]]:
    """Name, out and in of the 128 layers that LoRA-WiSE's recipe trains in SD 1.5."""
    for block, (attentions, width) in BLOCKS.items():
        for attention in range(attentions):
            for part in ("attn1", "attn2"):
                for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                    inputs = TEXT_WIDTH if part == "attn2" and projection in ("to_k", "to_v") else width
                    path = f"{block}.attentions.{attention}.transformer_blocks.0.{part}.{projection}"
                    yield f"unet.{path}", width, inputs


def noise(draw: np.random.Generator, sizes: np.ndarray, length: int) -> pa.Array:
    """A flat list for each model: float32 precise numbers as float64, the smaller the larger the model's size."""
    values = draw.standard_normal((len(sizes), length), dtype=np.float32) * (0.02 / sizes[:, None] ** 0.2)
    flat = np.float64(np.float32(values)).ravel()
    return pa.ListArray.from_arrays(np.arange(0, len(flat) + 1, length, dtype=np.int32), flat)


def shard(draw: np.random.Generator, models: list[tuple[int, int]], rank: int) -> pa.Table:
    """A table of these models, (micro-dataset, size)."""
    sizes = np.array([size for _, size in models])
    columns = {"label": pa.array(sizes), "name": pa.array([name for name, _ in models])}
    for layer, outputs, inputs in layers():
        columns[f"{layer}.lora.down.weight"] = noise(draw, sizes, rank * inputs)
        columns[f"{layer}.lora.up.weight"] = noise(draw, sizes, outputs * rank)
    return pa.table(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--models", type=int, default=24)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = np.random.default_rng(arguments.seed)
    models = [(number // len(SIZES), SIZES[number % len(SIZES)]) for number in range(arguments.models)]
    folder = arguments.folder / "medium" / str(arguments.rank)
    folder.mkdir(parents=True)
    for number in range(arguments.shards):
        part = models[number * len(models) // arguments.shards : (number + 1) * len(models) // arguments.shards]
        file = folder / f"train-{number:05d}-of-{arguments.shards:05d}.parquet"
        pq.write_table(shard(draw, part, arguments.rank), file, row_group_size=len(part))
    (arguments.folder / "README.md").write_text(README.format(rank=arguments.rank))


if __name__ == "__main__":
    main()

"""Write a folder in LoRA-WiSE's layout and at its size: SD 1.5's 128 pairs of matrices, with random weights.

    python tests/make_big_wise.py FOLDER --rank 16 --models 24 --shards 2      # about 600 MB

It is there to measure time and memory. The weights are no fine-tunes: noise that shrinks with the size.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BLOCKS = {  # path in SD 1.5's UNet -> (attentions, width)
    "down_blocks.0": (2, 320),
    "down_blocks.1": (2, 640),
    "down_blocks.2": (2, 1280),
    "mid_block": (1, 1280),
    "up_blocks.1": (3, 1280),
    "up_blocks.2": (3, 640),
    "up_blocks.3": (3, 320),
}
LAYERS = [  # name, out and in of the 128 layers that LoRA-WiSE's recipe trains; 768 is the width of the text
    (
        f"unet.{block}.attentions.{attention}.transformer_blocks.0.{part}.{projection}",
        width,
        768 if part == "attn2" and projection in ("to_k", "to_v") else width,
    )
    for block, (attentions, width) in BLOCKS.items()
    for attention in range(attentions)
    for part in ("attn1", "attn2")
    for projection in ("to_q", "to_k", "to_v", "to_out.0")
]
CONFIG = "- config_name: medium_{rank}\n  data_files:\n  - split: train\n    path: medium/{rank}/train-*\n"
README = f"---\nconfigs:\n{CONFIG}---\nRandom weights in the layout of LoRA-WiSE, to measure time and memory.\n"


def noise(draw: np.random.Generator, sizes: np.ndarray, length: int) -> pa.Array:
    """A flat list for each model: float32 precise numbers as float64, the smaller the larger the model's size."""
    values = draw.standard_normal((len(sizes), length), dtype=np.float32) * (0.02 / sizes[:, None] ** 0.2)
    flat = np.float64(np.float32(values)).ravel()
    return pa.ListArray.from_arrays(np.arange(0, len(flat) + 1, length, dtype=np.int32), flat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for option, default in (("--rank", 16), ("--models", 24), ("--shards", 2), ("--seed", 0)):
        parser.add_argument(option, type=int, default=default)
    its = parser.parse_args()
    draw = np.random.default_rng(its.seed)
    folder = its.folder / "medium" / str(its.rank)
    folder.mkdir(parents=True)
    for number in range(its.shards):
        models = np.arange(number * its.models // its.shards, (number + 1) * its.models // its.shards)
        sizes = models % 6 + 1
        columns = {"label": pa.array(sizes), "name": pa.array(models // 6)}
        for layer, outputs, inputs in LAYERS:
            columns[f"{layer}.lora.down.weight"] = noise(draw, sizes, its.rank * inputs)
            columns[f"{layer}.lora.up.weight"] = noise(draw, sizes, outputs * its.rank)
        file = folder / f"train-{number:05d}-of-{its.shards:05d}.parquet"
        pq.write_table(pa.table(columns), file, row_group_size=len(models))
    (its.folder / "README.md").write_text(README.format(rank=its.rank))


if __name__ == "__main__":
    main()

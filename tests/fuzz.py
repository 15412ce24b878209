"""Mutated shards and LoRA files: each gives the right spectra, or is refused with the script's own error.

    python tests/fuzz.py --parquet 1000 --files 1000 --seed 0

`--parquet 1 --files 0 --only 45` makes the mutant of number 45 again; stderr says which one is being read.
"""

import argparse
import io
import math
import random
import re
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from conftest import models_of, table_of
from lora_writers import LAYOUTS, by_hand, keys_of, within
from safetensors.torch import load, save
from torch import Tensor

import dsire

Draw = random.Random
INF, NAN = math.inf, math.nan


class Book(NamedTuple):
    """What a file holds, worked out from the full matrices."""

    spectra: dict[dsire.Voter, tuple[Tensor, Tensor]]  # [models, singular values], and how far off each model may be
    sizes: list[int]
    names: list[Any]


def book_of(layers: dict[str, tuple[Tensor, Tensor, float]], sizes: list[int], names: list[Any]) -> Book | None:
    """The book of layers with A [models, r, in], B [models, out, r] and the scale of BA; None if a value overflows."""
    spectra = {}
    for layer, (a, b, scale) in layers.items():
        full = {"A": a, "B": b, "BA": scale * (b @ a)}
        if not all(matrix.isfinite().all() for matrix in full.values()):
            return None
        values = {matrix: torch.linalg.svdvals(numbers)[:, : a.shape[1]] for matrix, numbers in full.items()}
        bounds = {matrix: 1e-9 * value[:, 0] + 1e-320 for matrix, value in values.items()}
        # rounding: of a product that cancels, and of factors so small that numbers have few digits
        of_a, of_b = values["A"][:, 0], values["B"][:, 0]
        bounds["BA"] += abs(scale) * (1e-12 * of_a * of_b + 1e-320 * (of_a + of_b))
        spectra |= {dsire.Voter(layer, matrix): (values[matrix], bounds[matrix]) for matrix in full}
    return Book(spectra, sizes, names) if spectra else None


def what_is_wrong(found: dsire.Spectra, book: Book) -> str:
    """How spectra differ from the book; "" if they don't."""
    if sorted(found.voters) != sorted(book.spectra):
        return f"other voters: {sorted(set(found.voters) ^ set(book.spectra))}"
    if (found.sizes.tolist(), found.names) != (book.sizes, book.names):
        return f"other models: {found.names} {found.sizes.tolist()}"
    for voter, values in zip(found.voters, found.values, strict=True):
        wanted, bound = book.spectra[voter]
        wanted = torch.nn.functional.pad(wanted, (0, values.shape[-1] - wanted.shape[-1]))
        if not ((values - wanted).abs().amax(-1) <= bound).all():
            return f"wrong numbers: {voter} {values.tolist()} instead of {wanted.tolist()}"
    return ""


def outcome_of(read: Callable[[], dsire.Spectra], book: Book | None, changed: bool = False) -> str:
    """Read a mutant: "right"; "refused", as without a book it must be, and if changed it may be; or what went wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = read()
        except dsire.DsireError as error:
            return "refused" if book is None or changed else f"refused, though sound: {error}"
        except Exception:
            return f"raised: {traceback.format_exc()}"
    if book is None:
        return f"not refused: {found.names} {found.sizes.tolist()} {found.shapes} {found.notes}"
    return what_is_wrong(found, book) or "right"


def damaged(draw: Draw, content: bytes, weights: slice) -> bytes:
    """Truncated, a byte lost, or bits of the weights changed."""
    how, at = draw.choice(["cut", "lost", "flipped"]), draw.randrange(len(content))
    if how != "flipped":
        return content[:at] + (content[at + 1 :] if how == "lost" else b"")
    changed = bytearray(content)
    for _ in range(draw.choice([1, 10])):
        changed[draw.choice(range(len(content))[weights])] ^= draw.choice([1 << draw.randrange(8), 255])
    return bytes(changed)


# Shards
ODD = ["x", "é", "\n", "\x1b[2J", "\u2028", "日本", "../..", '","', "x" * 2000]
SOUND = ["unchanged", "scaled", "exchanged"]
PARQUET_KINDS = [*SOUND, "value", "renamed", "dropped", "damaged"]


def edited_table(draw: Draw, table: pa.Table, kind: str) -> pa.Table:
    names = table.column_names
    name = draw.choice(names[2:])
    rows, at = table[name].to_pylist(), names.index(name)
    if kind == "scaled":  # from the smallest to the largest numbers
        factor = 10.0 ** draw.choice([-320, -310, -150, -45, 38, 150, 300])
        return table.set_column(at, name, pa.array([[factor * number for number in row] for row in rows]))
    if kind == "exchanged":
        return table.rename_columns([*names[:2], *draw.sample(names[2:], len(names) - 2)])
    if kind == "value":
        *others, row = rows
        numbers = [[*row[1:], its] for its in (None, NAN, -INF, 1e300)]
        other = draw.choice([*numbers, [*row, 0.5], row[1:], [], None])
        return table.set_column(at, name, pa.array([*others, other], pa.list_(pa.float64())))
    if kind == "renamed":
        return table.rename_columns([draw.choice(ODD) + its if its == name else its for its in names])
    return table.drop_columns([name]) if kind == "dropped" else table


def book_of_table(table: pa.Table, rank: int) -> Book | None:
    """The book of a shard; None if what it holds makes no sense."""
    layers, columns = {}, table.to_pydict()
    sizes, names = columns.pop("label"), columns.pop("name")
    for path in dict.fromkeys(column.split(".lora.")[0] for column in columns):
        try:
            a, b = (torch.tensor(columns[f"{path}.lora.{its}.weight"], dtype=torch.float64) for its in ("down", "up"))
            a, b = a.view(len(sizes), rank, -1), b.view(len(sizes), -1, rank)
        except (KeyError, TypeError, ValueError, RuntimeError):
            return None
        if not (a.numel() and b.numel()):
            return None
        layers[path.removeprefix("unet.").replace(".", "_")] = (a, b, 1.0)
    return book_of(layers, sizes, names)


def check_parquet(kind: str, draw: Draw, folder: Path) -> str:
    rank = draw.randint(2, 4)  # of rank 1 every length is right
    table = edited_table(draw, table_of(draw.sample(models_of(3), draw.randint(1, 6)), rank=rank), kind)
    path, rows = folder / "mutant.parquet", draw.choice([1, 2, 100])
    ways = {"compression": draw.choice(["snappy", "none", "zstd"]), "data_page_version": draw.choice(["1.0", "2.0"])}
    pq.write_table(table, path, rows, write_page_checksum=True, **ways)  # by which damage to the weights can be told
    if kind == "damaged":
        content = path.read_bytes()
        path.write_bytes(damaged(draw, content, slice(-8 - int.from_bytes(content[-8:-4], "little"))))
    return outcome_of(lambda: dsire.shard_spectra(path, rank), book_of_table(table, rank), kind not in SOUND)


# LoRA files
PATHS = ("down_blocks.0.attn1.to_q", "mid_block.attn2.to_out.0", "up_blocks.1.attn1.to_k")
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [*FLOATS, torch.int64, torch.uint8, torch.bool]
NUMBERS = [NAN, INF, -INF, 0, 1e-320, 1e-45, 6e4, 3e38, 1e300]
ALPHAS: list[Any] = [0, 3, 0.25, -4.0, 1e30, 1e300, NAN, INF, [2.0], [[2.0]], [1.0, 2.0], []]
NO_TENSORS: list[Any] = [None, 1, 2.5, True, "x", [1.0], NAN, 10**400]


def a_lora(draw: Draw, layout: str) -> dict[str, Any]:
    """One to three layers of any shape and rank, in any dtype."""
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    lora = {}
    for path in PATHS[: draw.randint(1, 3)]:
        rank, inputs, outputs, dtype = draw.randint(1, 5), draw.randint(1, 12), draw.randint(1, 12), draw.choice(FLOATS)
        a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rank, inputs), (outputs, rank)))
        lora[path] = (a, b)
    return by_hand(layout, lora, draw.choice([0.5, 1, 4, 1e30]))


def book_of_tensors(tensors: dict[str, Any], layout: str) -> Book | None:
    """The book of a file in a layout; None if what it holds can't be judged."""
    layers = {}
    # the name of an adapter may be any
    tensors = {re.sub(r"(lora_[AB])\.[^.]+\.weight", r"\1.default.weight", key): tensors[key] for key in tensors}
    for path in PATHS:
        a, b, alpha = (tensors.get(key or "") for key in keys_of(layout, path))
        if a is None or b is None:
            continue
        sound = all(isinstance(x, Tensor) and x.ndim >= 2 and x.is_floating_point() and x.numel() for x in (a, b))
        if not sound or b.flatten(1).shape[1] != len(a):
            return None
        try:
            scale = 1.0 if alpha is None else float(alpha) / len(a)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # not one number
            return None
        layers[path.replace(".", "_")] = (a.double().flatten(1)[None], b.double().flatten(1)[None], scale)
    return book_of(layers, [0], [""])


def edited(draw: Draw, tensors: dict[str, Any], kind: str) -> None:
    """A key or a tensor of a file changed."""
    key, other = draw.choices(list(tensors), k=2)
    old = tensors[key]
    if kind == "a key":
        tensors[draw.choice(ODD) + key] = tensors.pop(key)
    elif kind == "a key dropped":
        del tensors[key]
    elif kind == "two keys":
        tensors[key], tensors[other] = tensors[other], old
    elif kind == "a dtype":
        tensors[key] = old.to(draw.choice(DTYPES))
    elif kind == "a shape":
        shapes = [[*reversed(old.shape)], [*old.shape, 1], [1, *old.shape], [-1], [old.numel(), 1, 1]]
        tensors[key] = draw.choice([*(old.reshape(shape) for shape in shapes), old.reshape(-1)[:0], old[None][:0]])
    elif kind == "a number":
        numbers = old.double().flatten()
        numbers[draw.randrange(len(numbers))] = draw.choice(NUMBERS)
        tensors[key] = numbers.reshape(old.shape).to(old.dtype)
    elif kind == "alphas":
        for alpha in [its for its in tensors if its.endswith(".alpha")]:
            tensors[alpha] = torch.tensor(draw.choice(ALPHAS), dtype=draw.choice([torch.float64, torch.float16]))
    elif kind == "no tensor":
        tensors[key] = draw.choice(NO_TENSORS)


EDITS = ("unchanged", "a key", "a key dropped", "two keys", "a dtype", "a shape", "a number", "alphas", "damaged")
FILE_KINDS = [*(f"{form}: {kind}" for form in ("safetensors", "pickle") for kind in EDITS), "pickle: no tensor"]


def check_file(kind: str, draw: Draw, folder: Path) -> str:
    form, kind = kind.split(": ")
    layout, stream = draw.choice(list(LAYOUTS)), io.BytesIO()
    tensors = a_lora(draw, layout)
    edited(draw, tensors, kind)
    torch.save(tensors, stream)
    content = save(tensors) if form == "safetensors" else stream.getvalue()
    if kind == "damaged":
        header = 8 + int.from_bytes(content[:8], "little") if form == "safetensors" else 0
        content = damaged(draw, content, slice(header, None))
        try:  # a pickle's archive has checksums; safetensors has none, so that other numbers may be read
            tensors = load(content) if form == "safetensors" else tensors
        except Exception:  # it must be refused
            tensors = {}
    path = folder / f"mutant.{'pt' if form == 'pickle' else form}"
    path.write_bytes(content)
    book = book_of_tensors(tensors, layout)
    book = book and book._replace(names=[str(path)])
    return outcome_of(lambda: dsire.file_spectra(path), book, kind != "unchanged")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parquet", type=int, default=1000, help="how many mutated shards (%(default)s)")
    parser.add_argument("--files", type=int, default=1000, help="how many mutated LoRA files (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this mutant only")
    options = parser.parse_args(arguments)
    counts: Counter[str] = Counter()
    for title, kinds, check in (("parquet", PARQUET_KINDS, check_parquet), ("files", FILE_KINDS, check_file)):
        for number in range(getattr(options, title)):
            number = number if options.only is None else options.only
            kind = kinds[number % len(kinds)]
            print(f"\r{title} {number}: {kind:40}", end="", file=sys.stderr)
            with tempfile.TemporaryDirectory() as folder, within(10):
                outcome = check(kind, Draw(f"{title} {number} {options.seed}"), Path(folder))
            counts[outcome if outcome in ("right", "refused") else "failed"] += 1
            if outcome not in ("right", "refused"):
                print(f"\n{title} {number}: {kind}: {outcome.rstrip()[-2000:]}")
    print(", ".join(f"{counts[outcome]} {outcome}" for outcome in ("right", "refused", "failed")))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

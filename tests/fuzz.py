"""Mutated shards and weight files: each gives the right spectra, or a refusal in one line, and nothing else.

    python tests/fuzz.py --parquet 1000 --files 1000 --seed 0

A mutant is made from its number and the seed: `--parquet 1 --files 0 --only 45` makes number 45 again. The mutants are
read in a child process: one that crashes it, or takes more than ten seconds, is a failure like any other, and the rest
goes on.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import math
import os
import random
import re
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from conftest import LAYERS, models_of, table_of
from lora_writers import LAYOUTS, Lora, by_hand
from peft.utils.other import get_pattern_key
from safetensors.torch import save
from torch import Tensor

import dsire

SECONDS = 10
BOUND = 1e-9  # of the largest singular value


class Book(NamedTuple):
    """What a file holds, worked out from the full matrices."""

    spectra: dict[dsire.Voter, Tensor]  # [models, singular values]
    bounds: dict[dsire.Voter, Tensor]  # how far off a reading may be, [models]
    sizes: list[int]
    names: list[Any]


class Mutant(NamedTuple):
    """The bytes of a file; its book, or None if it must be refused; and whether it may be refused all the same."""

    content: bytes
    book: Book | None
    damaged: bool = False
    beside: bytes | None = None  # an adapter_config.json


Draw = random.Random


def book_of(layers: dict[str, tuple[Tensor, Tensor, float]], sizes: list[int], names: list[Any]) -> Book | None:
    """The book of layers with A [models, r, in], B [models, out, r] and the scale of BA; None if a value overflows."""
    spectra, bounds = {}, {}
    for layer, (a, b, scale) in layers.items():
        full = {"A": a, "B": b, "BA": scale * (b @ a)}
        if not all(matrix.isfinite().all() for matrix in full.values()):
            return None
        for matrix, values in full.items():
            spectra[dsire.Voter(layer, matrix)] = torch.linalg.svdvals(values)[:, : a.shape[1]]
            bounds[dsire.Voter(layer, matrix)] = BOUND * spectra[dsire.Voter(layer, matrix)].amax(-1) + 1e-320
        # rounding: of a product that cancels, and of factors so small that numbers have few digits
        of_a, of_b = spectra[dsire.Voter(layer, "A")][:, 0], spectra[dsire.Voter(layer, "B")][:, 0]
        bounds[dsire.Voter(layer, "BA")] += abs(scale) * (1e-12 * of_a * of_b + 1e-320 * (of_a + of_b))
    return Book(spectra, bounds, sizes, names) if spectra else None


def what_is_wrong(found: dsire.Spectra, book: Book) -> str:
    """How spectra differ from the book; "" if they don't."""
    if set(found.voters) != set(book.spectra) or len(found.voters) != len(book.spectra):
        return f"other voters: {sorted(set(found.voters) ^ set(book.spectra))}"
    if (found.sizes.tolist(), found.names) != (book.sizes, book.names):
        return f"other models: {found.names} {found.sizes.tolist()}"
    for voter, values in zip(found.voters, found.values, strict=True):
        wanted = torch.nn.functional.pad(book.spectra[voter], (0, values.shape[-1] - book.spectra[voter].shape[-1]))
        if not ((values - wanted).abs().amax(-1) <= book.bounds[voter]).all():
            return f"wrong numbers: {voter} {values.tolist()} instead of {wanted.tolist()}"
    return ""


def outcome_of(read: Callable[[], dsire.Spectra], mutant: Mutant, cache: Path) -> str:
    """Read a mutant: "right", "refused", or else what went wrong."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = read()
        except dsire.DsireError as error:
            if not str(error).isprintable():
                return f"not a printable line: {str(error)!r}"
            if said:
                return f"warned: {said[0].message}"
            return "refused" if mutant.book is None or mutant.damaged else f"refused, though sound: {error}"
        except Exception:
            return f"raised: {traceback.format_exc()}"
        if said:
            return f"warned: {said[0].message}"
    if mutant.book is None:
        return f"not refused: {found.names} {found.sizes.tolist()} {found.shapes} {found.notes}"
    if not all(note.isprintable() for note in found.notes):
        return f"a note that isn't a printable line: {found.notes}"
    shard = dsire.Shard("mutant", 1, "")
    dsire.save_spectra(found, shard, 1, cache)
    saved = dsire.load_spectra(shard, 1, cache)
    if saved is None or (saved.names, saved.voters) != (found.names, found.voters):
        return f"not the same out of the cache: {found.names}"
    return what_is_wrong(found, mutant.book) or "right"


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def truncated(draw: Draw, content: bytes) -> bytes:
    return content[: draw.randrange(len(content))]


def tail_lost(draw: Draw, content: bytes) -> bytes:
    return content[: -draw.randint(1, 16)]


def flipped(draw: Draw, content: bytes, first: int = 0, last: int | None = None, times: int = 1) -> bytes:
    """Single bits or whole bytes changed, between two places."""
    changed = bytearray(content)
    for _ in range(times):
        changed[draw.randrange(first, len(content) if last is None else last)] ^= draw.choice(
            [1 << draw.randrange(8), draw.randint(1, 255)]
        )
    return bytes(changed)


def several_flipped(draw: Draw, content: bytes) -> bytes:
    return flipped(draw, content, times=draw.randint(2, 20))


def block_of_zeros(draw: Draw, content: bytes) -> bytes:
    start, length = draw.randrange(len(content)), draw.choice([1, 4, 8, 64, 512])
    return content[:start] + bytes(min(length, len(content) - start)) + content[start + length :]


def bytes_inserted(draw: Draw, content: bytes) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + draw.randbytes(draw.choice([1, 8, 100])) + content[start:]


def bytes_removed(draw: Draw, content: bytes) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + content[start + draw.choice([1, 8, 100]) :]


def blocks_exchanged(draw: Draw, content: bytes) -> bytes:
    first, second, third = sorted(draw.randrange(len(content)) for _ in range(3))
    return content[:first] + content[second:third] + content[first:second] + content[third:]


def rubbish_appended(draw: Draw, content: bytes) -> bytes:
    return content + draw.randbytes(draw.choice([1, 8, 1000]))


DAMAGES: dict[str, Callable[[Draw, bytes], bytes]] = {
    "truncated": truncated,
    "tail lost": tail_lost,
    "byte flipped": flipped,
    "several bytes flipped": several_flipped,
    "block of zeros": block_of_zeros,
    "bytes inserted": bytes_inserted,
    "bytes removed": bytes_removed,
    "blocks exchanged": blocks_exchanged,
    "rubbish appended": rubbish_appended,
}

# ---------------------------------------------------------------------------------------------------------------------
# Parquet shards


def matrix_column(draw: Draw, table: pa.Table) -> str:
    return draw.choice([name for name in table.column_names if ".lora." in name])


def put(table: pa.Table, name: str, column: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def edit_lists(table: pa.Table, name: str, edit: Callable[[int, list[float]], Any], kind: Any = None) -> pa.Table:
    """One column with every row's list edited, `edit(row, list)`."""
    rows = [edit(row, values) for row, values in enumerate(table.column(name).to_pylist())]
    return put(table, name, pa.array(rows, kind or pa.list_(pa.float64())))


def edit_one_list(draw: Draw, table: pa.Table, edit: Callable[[list[float]], Any]) -> pa.Table:
    chosen = draw.randrange(len(table))
    return edit_lists(table, matrix_column(draw, table), lambda row, values: edit(values) if row == chosen else values)


def edit_one_number(draw: Draw, table: pa.Table, number: float | None) -> pa.Table:
    def edit(values: list[float]) -> list[float | None]:
        place = draw.randrange(len(values))
        return [*values[:place], number, *values[place + 1 :]]

    return edit_one_list(draw, table, edit)


def edit_value(draw: Draw, table: pa.Table, name: str, value: Any, kind: Any = None) -> pa.Table:
    """One value of `label` or `name` replaced."""
    values = table.column(name).to_pylist()
    values[draw.randrange(len(values))] = value
    return put(table, name, pa.array(values, kind))


def matrices_of_type(draw: Draw, table: pa.Table) -> pa.Table:
    """Some columns as lists of another kind of floating point number."""
    for name in table.column_names[2:]:
        length = len(table.column(name)[0])
        number = draw.choice([pa.float16(), pa.float32(), pa.float64()])
        kind = draw.choice([pa.list_(number), pa.large_list(number), pa.list_(number, length)])
        table = put(table, name, table.column(name).cast(pa.list_(number)).cast(kind))
    return table


def no_matrix(draw: Draw, table: pa.Table) -> pa.Table:
    """A column of another type than lists of floating point numbers."""
    kind, value = draw.choice(
        [
            (pa.float64(), 1.0),
            (pa.string(), "1.0"),
            (pa.list_(pa.int64()), [1] * 64),
            (pa.list_(pa.bool_()), [True] * 64),
            (pa.list_(pa.string()), ["1.0"] * 64),
            (pa.list_(pa.list_(pa.float64())), [[1.0] * 8] * 8),
            (pa.list_(pa.struct([("x", pa.float64())])), [{"x": 1.0}] * 64),
            (pa.list_(pa.decimal128(5, 1)), [1] * 64),
            (pa.struct([("list", pa.list_(pa.float64()))]), {"list": [1.0] * 64}),
            (pa.map_(pa.string(), pa.float64()), [("x", 1.0)]),
            (pa.binary(), b"12345678" * 64),
            (pa.list_(pa.timestamp("s")), [1] * 64),
            (pa.null(), None),
        ]
    )
    return put(table, matrix_column(draw, table), pa.array([value] * len(table), kind))


def an_integer_type_of_label(draw: Draw, table: pa.Table) -> pa.Table:
    kind = draw.choice([pa.int8(), pa.uint8(), pa.int32(), pa.uint64(), pa.float32(), pa.float64()])
    return put(table, "label", table.column("label").cast(kind))


def weird_label(draw: Draw, table: pa.Table) -> pa.Table:
    value, kind = draw.choice(
        [
            (0, None),
            (-1, None),
            (-(2**63), None),
            (2**64 - 1, pa.uint64()),
            (0.5, pa.float64()),
            (1.5, pa.float32()),
            (math.nan, pa.float64()),
            (math.inf, pa.float64()),
            (-math.inf, pa.float64()),
            (1e300, pa.float64()),
            (None, pa.int64()),
            (None, pa.float64()),
        ]
    )
    return edit_value(draw, table, "label", value, kind)


def no_label(draw: Draw, table: pa.Table) -> pa.Table:
    value, kind = draw.choice(
        [
            ("1", pa.string()),
            (True, pa.bool_()),
            (b"1", pa.binary()),
            ([1], pa.list_(pa.int64())),
            ({"x": 1}, pa.struct([("x", pa.int64())])),
            (1, pa.timestamp("us")),
            (None, pa.null()),
        ]
    )
    return put(table, "label", pa.array([value] * len(table), kind))


def a_type_of_name(draw: Draw, table: pa.Table) -> pa.Table:
    kind = draw.choice([pa.int8(), pa.int64(), pa.uint64(), pa.string(), pa.large_string()])
    numbers = [draw.randrange(100) for _ in range(len(table))]
    return put(table, "name", pa.array(numbers).cast(kind))


def odd_name(draw: Draw, table: pa.Table) -> pa.Table:
    odd = ["", " ", "a\nb", "\0", "\x1b[2J", "日本", "\U0001f408", "x" * 10_000, "NaN", "../..", '","']
    return edit_value(draw, table, "name", draw.choice(odd))


def no_name(draw: Draw, table: pa.Table) -> pa.Table:
    value, kind = draw.choice(
        [
            (1.0, pa.float64()),
            (True, pa.bool_()),
            (b"x", pa.binary()),
            (["x"], pa.list_(pa.string())),
            ({"x": 1}, pa.struct([("x", pa.int64())])),
            (1, pa.timestamp("us")),
            (None, pa.null()),
        ]
    )
    return put(table, "name", pa.array([value] * len(table), kind))


def column_dropped(draw: Draw, table: pa.Table) -> pa.Table:
    return table.drop_columns([draw.choice(["label", "name", matrix_column(draw, table)])])


def column_renamed(draw: Draw, table: pa.Table) -> pa.Table:
    old = draw.choice(["label", "name", matrix_column(draw, table)])
    middle = draw.randrange(len(old))
    odd = draw.choice(["", "x", ".", "\n", "\x1b[2J", "\u2028", "x" * 2000])
    new = draw.choice(["", old[:middle] + odd + old[middle + 1 :], old + odd + "x", old.upper(), "\n" + old])
    return table.rename_columns([new if name == old else name for name in table.column_names])


def layer_renamed(draw: Draw, table: pa.Table) -> pa.Table:
    old, new = (
        draw.choice(LAYERS),
        draw.choice(["unet.x", "unet.down.up", "unet.日本", "unet.mid_block.lora", "unet.0"]),
    )
    return table.rename_columns(
        [new + name.removeprefix(old) if name.startswith(old) else name for name in table.column_names]
    )


def layer_dropped(draw: Draw, table: pa.Table) -> pa.Table:
    layer = draw.choice(LAYERS)
    return table.drop_columns([name for name in table.column_names if name.startswith(layer)])


def layer_of_odd_name_and_wrong_type(draw: Draw, table: pa.Table) -> pa.Table:
    """The message names the column, and has to stay one line."""
    odd = draw.choice(["\x1b[2J", "a\u2028b", "\x85", "x" * 900])
    for word in ("down", "up"):
        table = table.append_column(f"unet.{odd}.lora.{word}.weight", pa.array([[1.0, math.nan]] * len(table)))
    return table


def column_twice(draw: Draw, table: pa.Table) -> pa.Table:
    name = draw.choice(["label", "name", matrix_column(draw, table)])
    return table.append_column(name, table.column(name))


def columns_shuffled(draw: Draw, table: pa.Table) -> pa.Table:
    return table.select(draw.sample(table.column_names, len(table.column_names)))


def more_columns(draw: Draw, table: pa.Table) -> pa.Table:
    """Columns that are no LoRA weights, with names that begin like those of others."""
    for _ in range(draw.randint(1, 3)):
        odd = [
            "extra",
            "label.x",
            "name.x",
            "unet",
            "日本",
            f"{matrix_column(draw, table)}.list",
            "a b",
            "a\nb",
            "\x1b",
        ]
        name = draw.choice(odd)
        value: Any = draw.choice([None, 1, "x", [1.0], {"list": [1.0]}, [[]], b"\xff", True])
        if name not in table.column_names:
            table = table.append_column(name, pa.array([value] * len(table)))
    return table


def scaled(draw: Draw, table: pa.Table) -> pa.Table:
    """Weights from the smallest to the largest numbers; where a product overflows the book is None."""
    for name in table.column_names[2:]:
        factor = 10.0 ** draw.choice([-320, -310, -300, -150, -45, -30, 0, 0, 0, 30, 38, 100, 150, 300])
        table = edit_lists(table, name, lambda _, values, factor=factor: [factor * value for value in values])
    return table


def one_column_scaled_in_a_row(draw: Draw, table: pa.Table) -> pa.Table:
    factor = 10.0 ** draw.choice([-300, -30, 30, 100, 300])
    return edit_one_list(draw, table, lambda values: [factor * value for value in values])


def longer_rows(draw: Draw, table: pa.Table) -> pa.Table:
    return edit_lists(table, matrix_column(draw, table), lambda _, values: values * 2)


def off_by_one(draw: Draw, table: pa.Table, everywhere: bool) -> pa.Table:
    edit = draw.choice([lambda values: values[:-1], lambda values: [*values, 0.5]])
    if everywhere:
        return edit_lists(table, matrix_column(draw, table), lambda _, values: edit(values))
    return edit_one_list(draw, table, edit)


def no_numbers(draw: Draw, table: pa.Table) -> pa.Table:
    return draw.choice(
        [
            lambda: edit_one_list(draw, table, lambda values: []),
            lambda: edit_one_list(draw, table, lambda values: None),
            lambda: edit_lists(table, matrix_column(draw, table), lambda row, values: []),
            lambda: edit_lists(table, matrix_column(draw, table), lambda row, values: None),
        ]
    )()


# what is sound, and what must be refused
SOUND_TABLES: dict[str, Callable[[Draw, pa.Table], pa.Table]] = {
    "unchanged": lambda draw, table: table,
    "an empty row group": lambda draw, table: table,
    "other kinds of lists and floats": matrices_of_type,
    "another type of label": an_integer_type_of_label,
    "another type of name": a_type_of_name,
    "an odd name": odd_name,
    "columns shuffled": columns_shuffled,
    "more columns": more_columns,
    "a layer renamed": layer_renamed,
    "a layer dropped": layer_dropped,
    "scaled": scaled,
    "scaled in a row": one_column_scaled_in_a_row,
    "longer rows": longer_rows,
}
WRONG_TABLES: dict[str, Callable[[Draw, pa.Table], pa.Table]] = {
    "a column dropped": column_dropped,
    "a column renamed": column_renamed,
    "a column twice": column_twice,
    "a column of another type": no_matrix,
    "a layer of an odd name": layer_of_odd_name_and_wrong_type,
    "a length off by one": partial(off_by_one, everywhere=False),
    "lengths off by one": partial(off_by_one, everywhere=True),
    "no numbers": no_numbers,
    "a null": partial(edit_one_number, number=None),
    "NaN": partial(edit_one_number, number=math.nan),
    "infinity": partial(edit_one_number, number=-math.inf),
    "a weird label": weird_label,
    "label of another type": no_label,
    "name of another type": no_name,
    "a name is null": partial(edit_value, name="name", value=None),
    "no rows": lambda draw, table: table.slice(0, 0),
}


def parquet_bytes(draw: Draw, table: pa.Table, empty_row_group: bool = False) -> bytes:
    """Written in one of many ways, always with checksums, so that damage to the weights can be told."""
    options = {
        "compression": draw.choice(["snappy", "none", "zstd", "gzip"]),
        "use_dictionary": draw.random() < 0.5,
        "data_page_version": draw.choice(["1.0", "2.0"]),
        "data_page_size": draw.choice([200, 2**20]),
        "write_page_checksum": True,
        "store_schema": draw.random() < 0.8,
    }
    rows = draw.choice([1, 2, 100])
    stream = io.BytesIO()
    with pq.ParquetWriter(stream, table.schema, **options) as writer:
        parts = [table.slice(start, rows) for start in range(0, len(table), rows)]
        if empty_row_group:
            parts.insert(draw.randrange(len(parts) + 1), table.slice(0, 0))
        for part in parts:
            writer.write_table(part)
    return stream.getvalue()


def book_of_table(table: pa.Table, rank: int) -> Book | None:
    layers = {}
    for name in table.column_names:
        if name.endswith(".lora.down.weight"):
            path = name.removesuffix(".lora.down.weight")
            a, b = (
                torch.tensor(table.column(f"{path}.lora.{word}.weight").to_pylist(), dtype=torch.float64)
                for word in ("down", "up")
            )
            matrices = (a.view(len(table), rank, -1), b.view(len(table), -1, rank), 1.0)
            layers[path.removeprefix("unet.").replace(".", "_")] = matrices
    return book_of(layers, [int(size) for size in table.column("label").to_pylist()], table.column("name").to_pylist())


def parquet_mutant(kind: str, draw: Draw, rank: int) -> Mutant:
    table = table_of(draw.sample(models_of(3), draw.randint(1, 6)), rank=rank)
    if kind in SOUND_TABLES:
        table = SOUND_TABLES[kind](draw, table)
        return Mutant(parquet_bytes(draw, table, kind == "an empty row group"), book_of_table(table, rank))
    if kind in WRONG_TABLES:
        return Mutant(parquet_bytes(draw, WRONG_TABLES[kind](draw, table)), None)
    content, book = parquet_bytes(draw, table), book_of_table(table, rank)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    damage = {
        **DAMAGES,
        "byte flipped in the data": partial(flipped, last=footer),
        "byte flipped in the footer": partial(flipped, first=footer),
    }[kind]
    return Mutant(damage(draw, content), book, damaged=True)


PARQUET_KINDS = [
    *SOUND_TABLES,
    *WRONG_TABLES,
    *DAMAGES,
    *["byte flipped in the data", "byte flipped in the footer"] * 4,
]


def check_parquet(number: int, seed: int, folder: Path) -> str:
    """Make a mutated shard and read it."""
    draw = random.Random(f"parquet {number} {seed}")
    rank = draw.randint(2, 4)  # of rank 1 every length is right
    mutant = parquet_mutant(PARQUET_KINDS[number % len(PARQUET_KINDS)], draw, rank)
    path = folder / "mutant.parquet"
    path.write_bytes(mutant.content)
    return outcome_of(lambda: dsire.shard_spectra(path, rank), mutant, folder)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA files

PATHS = ("down_blocks.0.attn1.to_q", "mid_block.attn2.to_out.0", "up_blocks.1.attn1.to_k")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
INTEGERS = {
    "I64": torch.int64,
    "U64": torch.uint64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def new_lora(draw: Draw) -> Lora:
    """One to three layers of any shape and rank, in any dtype."""
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    lora = {}
    for path in PATHS[: draw.randint(1, 3)]:
        rank, inputs, outputs = draw.randint(1, 5), draw.randint(1, 12), draw.randint(1, 12)
        dtype = draw.choice(list(DTYPES.values()))
        a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rank, inputs), (outputs, rank)))
        lora[path] = (a, b)
    return lora


def held_by_safetensors(content: bytes) -> dict[str, Tensor] | None:
    """The tensors of numbers in safetensors, read by hand; None if it isn't such a file."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length].decode())
        data = content[8 + length :]
        tensors = {}
        for key, entry in header.items():
            dtype = None if key == "__metadata__" else {**DTYPES, **INTEGERS}.get(entry["dtype"])
            if dtype:
                start, end = entry["data_offsets"]
                numbers = torch.frombuffer(bytearray(data[start:end]), dtype=dtype)
                tensors[key] = numbers.reshape(entry["shape"])
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, struct.error, RecursionError):
        return None


def held_by_pickle(content: bytes) -> dict[str, Tensor] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = torch.load(io.BytesIO(content), weights_only=True)
        return {key: torch.as_tensor(value) for key, value in tensors.items()}
    except Exception:  # whatever the unpickler makes of rubbish
        return None


def book_of_tensors(
    tensors: dict[str, Tensor] | None, layout: str, scales: dict[str, float] | None = None
) -> Book | None:
    """The book of a file in a layout; None if what it holds can't be judged. `scales` are those of a configuration."""
    layers = {}
    # the name of an adapter may be any
    tensors = {re.sub(r"(lora_[AB])\.[^.]+\.weight", r"\1.default.weight", key): tensors[key] for key in tensors or ()}
    for path in PATHS:
        keys = LAYOUTS[layout](path)
        name = path.replace(".", "_")
        if keys[0] not in tensors or keys[1] not in tensors:
            continue
        a, b = tensors[keys[0]], tensors[keys[1]]
        alpha = tensors.get(keys[2]) if keys[2] else None
        sound = min(a.ndim, b.ndim) >= 2 and a.is_floating_point() and b.is_floating_point() and a.numel() and b.numel()
        if not sound or b.flatten(1).shape[1] != len(a) or (alpha is not None and alpha.numel() != 1):
            return None
        scale = (scales or {}).get(path, 1.0) if alpha is None else float(alpha.double().reshape(())) / len(a)
        layers[name] = (a.double().flatten(1)[None], b.double().flatten(1)[None], scale)
    return book_of(layers, [0], [""])


def zip_is_whole(content: bytes) -> bool:
    """Do the checksums in a zip archive fit?"""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.testzip() is None
    except Exception:  # whatever zipfile makes of rubbish
        return False


def stated(draw: Draw) -> dict[str, str]:
    """A header that states no size, though it may look so."""
    values = ["", "null", "{", "0", "-1", "true", "1.5", '"3"', "[]", "{}", '{"a": 1}', '{"a": {"img_count": "x"}}']
    keys = ["ss_dataset_dirs", "ss_datasets", "ss_num_train_images", "ss_num_repeats", "format"]
    return {key: draw.choice(values) for key in draw.sample(keys, draw.randint(0, 3))}


def edit_header(content: bytes, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    """Safetensors with its header edited; the data stay."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def entry_of(draw: Draw, header: dict[str, Any]) -> dict[str, Any]:
    return header[draw.choice([key for key in header if key != "__metadata__"])]


def other_dtype(draw: Draw, header: dict[str, Any]) -> None:
    names = [*DTYPES, "I8", "I16", "I32", "I64", "U8", "BOOL", "F4", "F8_E8M0", "C64", "f32", ""]
    entry_of(draw, header)["dtype"] = draw.choice(names)


def dtype_of_the_same_size(draw: Draw, header: dict[str, Any]) -> None:
    same = [["F64", "I64", "U64", "C64"], ["F32", "I32", "U32"], ["F16", "BF16", "I16"], ["F8_E4M3", "F8_E5M2", "I8"]]
    entry = entry_of(draw, header)
    entry["dtype"] = draw.choice(next(group for group in same if entry["dtype"] in group))


def other_shape(draw: Draw, header: dict[str, Any]) -> None:
    entry = entry_of(draw, header)
    shape = entry["shape"]
    odd = [
        shape[::-1],
        [*shape, 1],
        [1, *shape],
        shape[:1],
        [],
        [0, *shape],
        [-1, *shape[1:]],
        [2**62, 4],
        [math.prod(shape)],
    ]
    entry["shape"] = draw.choice(odd)


def other_offsets(draw: Draw, header: dict[str, Any]) -> None:
    entry = entry_of(draw, header)
    place = draw.randrange(2)
    entry["data_offsets"][place] = max(0, entry["data_offsets"][place] + draw.choice([-8, -4, -1, 1, 4, 8, 2**40]))


def exchanged(draw: Draw, header: dict[str, Any]) -> None:
    """Two entries change their places."""
    first, second = (draw.choice([key for key in header if key != "__metadata__"]) for _ in range(2))
    header[first], header[second] = header[second], header[first]


def other_key(draw: Draw, header: dict[str, Any]) -> None:
    key = draw.choice([key for key in header if key != "__metadata__"])
    middle = draw.randrange(len(key))
    odd = draw.choice(["", "x", "\n", "é", "\x1b", "lora_", key])
    header[key[:middle] + odd + key[middle + 1 :]] = header.pop(key)


def key_dropped(draw: Draw, header: dict[str, Any]) -> None:
    del header[draw.choice([key for key in header if key != "__metadata__"])]


HEADERS: dict[str, Callable[[Draw, dict[str, Any]], None]] = {
    "another dtype": other_dtype,
    "another dtype of the same size": dtype_of_the_same_size,
    "another shape": other_shape,
    "other offsets": other_offsets,
    "entries exchanged": exchanged,
    "another key": other_key,
    "a key dropped": key_dropped,
}


def safetensors_mutant(kind: str, draw: Draw) -> tuple[Mutant, str]:
    layout = draw.choice(list(LAYOUTS))
    content = save(by_hand(layout, new_lora(draw), draw.choice([0.5, 1, 4, 1e30])), stated(draw))
    if kind == "unchanged":
        return Mutant(content, book_of_tensors(held_by_safetensors(content), layout)), "lora.safetensors"
    header = 8 + int.from_bytes(content[:8], "little")
    if kind in HEADERS:
        content = edit_header(content, partial(HEADERS[kind], draw))
    else:
        content = {
            **DAMAGES,
            "byte flipped in the header": partial(flipped, last=header),
            "byte flipped in the data": partial(flipped, first=header),
            "another length": lambda draw, whole: struct.pack("<Q", draw.randrange(2 * header)) + whole[8:],
        }[kind](draw, content)
    return Mutant(content, book_of_tensors(held_by_safetensors(content), layout), damaged=True), "lora.safetensors"


def odd_value(draw: Draw, tensors: dict[str, Any]) -> None:
    """A tensor in a pickle becomes something else."""
    odd = [None, 1, 2.5, True, "x", [1.0], {}, torch.ones(3), torch.ones(2, 3, dtype=torch.int32), math.nan, 10**400]
    tensors[draw.choice(list(tensors))] = draw.choice(odd)


def pickle_mutant(kind: str, draw: Draw, old: bool) -> tuple[Mutant, str]:
    layout = draw.choice(list(LAYOUTS))
    tensors: dict[str, Any] = by_hand(layout, new_lora(draw), draw.choice([0.5, 1, 4]))
    if kind == "an odd value":
        odd_value(draw, tensors)
    stream = io.BytesIO()
    torch.save(tensors, stream, _use_new_zipfile_serialization=not old)
    whole = stream.getvalue()
    if kind in ("unchanged", "an odd value"):  # float8 in the old form can't be read by torch itself
        return Mutant(whole, book_of_tensors(held_by_pickle(whole), layout), kind != "unchanged"), "lora.pt"
    content = DAMAGES[kind](draw, whole)
    # what a zip archive's checksums show to be damaged may not be read as something else; the old form has none
    held = tensors if not old and not zip_is_whole(content) else held_by_pickle(content)
    return Mutant(content, book_of_tensors(held, layout), damaged=True), "lora.bin"


def scale_by_peft(config: Any, path: str, rank: int) -> float | None:
    """The scale of BA as PEFT takes it from an adapter_config.json; None if there is none."""
    if not isinstance(config, dict) or str(config.get("peft_type") or "LORA").upper() != "LORA":
        return None
    patterns = config.get("alpha_pattern") or {}
    try:
        alpha = patterns.get(get_pattern_key(patterns.keys(), path), config.get("lora_alpha", 8))
    except Exception:  # what isn't a dictionary of patterns
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 2**53:
        return None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def config_mutant(kind: str, draw: Draw) -> tuple[Mutant, str]:
    """An adapter as PEFT saves it, and its configuration mutated."""
    lora = new_lora(draw)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": draw.choice([1, 4, 16, 0.5]),
        "use_rslora": draw.random() < 0.3,
        "alpha_pattern": draw.choice([{}, {"to_q": 2}, {"down_blocks.0.attn1.to_q": 3}, {"attn[12].to_.": 5}]),
        "rank_pattern": {},
        "target_modules": ["to_q", "to_k", "to_out.0"],
    }
    if kind == "an odd setting":
        odd = [
            None,
            0,
            -3,
            True,
            "4",
            "",
            [],
            [4],
            {},
            {"x": 1},
            {"(": 1},
            {"to_q": None},
            math.nan,
            1e400,
            2**70,
            "LOHA",
        ]
        config[draw.choice(list(config))] = draw.choice(odd)
    if kind == "a setting dropped":
        del config[draw.choice(list(config))]
    text = json.dumps(config).encode()
    if kind in DAMAGES:
        text = DAMAGES[kind](draw, text)
    try:
        read = json.loads(text.decode(errors="replace"))
    except (ValueError, RecursionError):
        read = None
    scales = {path: scale_by_peft(read, path, len(a)) for path, (a, _) in lora.items()}
    tensors = by_hand("adapter name", lora, 0)
    book = None if None in scales.values() else book_of_tensors(tensors, "adapter name", scales)
    damaged = kind not in ("unchanged", "a setting dropped")
    return Mutant(save(tensors), book, damaged, beside=text), "adapter_model.safetensors"


FORMS: dict[str, tuple[Callable[[str, Draw], tuple[Mutant, str]], list[str]]] = {
    "safetensors": (
        safetensors_mutant,
        ["unchanged", *DAMAGES, *HEADERS, "byte flipped in the header", "byte flipped in the data", "another length"],
    ),
    "zipped pickle": (partial(pickle_mutant, old=False), ["unchanged", "an odd value", *DAMAGES]),
    "old pickle": (partial(pickle_mutant, old=True), ["unchanged", "an odd value", *DAMAGES]),
    "config": (config_mutant, ["unchanged", "an odd setting", "a setting dropped", *DAMAGES]),
}
FILE_KINDS = [f"{form}: {kind}" for form, (_, kinds) in FORMS.items() for kind in kinds]


def check_file(number: int, seed: int, folder: Path) -> str:
    """Make a mutated weights file and read it."""
    draw = random.Random(f"file {number} {seed}")
    form, kind = FILE_KINDS[number % len(FILE_KINDS)].split(": ")
    mutant, name = FORMS[form][0](kind, draw)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / name
        path.write_bytes(mutant.content)
        if mutant.beside is not None:
            path.with_name("adapter_config.json").write_bytes(mutant.beside)
        book = mutant.book and mutant.book._replace(names=[str(path)])
        return outcome_of(lambda: dsire.file_spectra(path), mutant._replace(book=book), folder)


# ---------------------------------------------------------------------------------------------------------------------
# In children


def outcomes(
    check: Callable[[int], str], numbers: Sequence[int], seconds: float = SECONDS
) -> Iterator[tuple[int, str]]:
    """`check` each number in a child process, and in a new one after a number that ended it."""
    left = list(numbers)
    while left:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            with os.fdopen(writer, "w") as pipe:
                check_all(check, left, seconds, pipe)
            os._exit(0)
        os.close(writer)
        done = 0
        with os.fdopen(reader) as pipe:
            for line in pipe:
                yield left[done], json.loads(line)
                done += 1
        _, status = os.waitpid(child, 0)
        if done < len(left):
            code = os.waitstatus_to_exitcode(status)
            what = f"killed the process ({signal.Signals(-code).name})" if code < 0 else f"hung for {seconds} s"
            yield left[done], f"{what}, or ended it with {code}"
            done += 1
        left = left[done:]


def check_all(check: Callable[[int], str], numbers: Sequence[int], seconds: float, pipe: Any) -> None:
    """In the child: say the outcome of one number after the other; what hangs ends the child."""
    torch.set_num_threads(1)
    faulthandler.enable()
    for number in numbers:
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            outcome = check(number)
        except BaseException:  # a mistake of this script
            outcome = f"not made: {traceback.format_exc()}"
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(outcome), file=pipe, flush=True)


def print_summary(title: str, kinds: Sequence[str], found: dict[int, str]) -> int:
    """Counts by kind of mutation, and the failures; returns how many there are."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    for number, outcome in found.items():
        counts[kinds[number % len(kinds)]][outcome if outcome in ("right", "refused") else "failed"] += 1
    print(f"\n{title:48}{'right':>8}{'refused':>8}{'failed':>8}")
    total = sum(counts.values(), Counter())
    for kind, row in {**counts, "together": total}.items():
        print(f"{kind:48}" + "".join(f"{row[outcome]:8}" for outcome in ("right", "refused", "failed")))
    for number, outcome in found.items():
        if outcome not in ("right", "refused"):
            print(f"\n{title} {number}: {kinds[number % len(kinds)]}: {outcome.rstrip()[-2000:]}")
    return total["failed"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parquet", type=int, default=1000, help="how many mutated shards (%(default)s)")
    parser.add_argument("--files", type=int, default=1000, help="how many mutated weight files (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this mutant only")
    arguments = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for title, kinds, check in (("parquet", PARQUET_KINDS, check_parquet), ("files", FILE_KINDS, check_file)):
            count = getattr(arguments, title)
            numbers = range(count) if arguments.only is None else [arguments.only] if count else []
            if not numbers:
                continue
            found = dict(outcomes(partial(check, seed=arguments.seed, folder=Path(folder)), numbers))
            failed += print_summary(title, kinds, found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

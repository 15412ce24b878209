"""Mutated shards and LoRA files: each gives the right spectra, or is refused with the script's own error.

    python tests/fuzz.py --parquet 1000 --files 1000 --seed 0

A mutant is made from its number and the seed: `--parquet 1 --files 0 --only 45` makes number 45 again. Which one is
being read stands on stderr.
"""

from __future__ import annotations

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
from conftest import LAYERS, models_of, table_of
from lora_writers import LAYOUTS, by_hand, within
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


def outcome_of(read: Callable[[], dsire.Spectra], book: Book | None, damaged: bool = False) -> str:
    """Read a mutant: "right", "refused", or else what went wrong.

    Without a book it must be refused; with one it must be right, or, if it is damaged, may be refused all the same.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = read()
        except dsire.DsireError as error:
            return "refused" if book is None or damaged else f"refused, though sound: {error}"
        except Exception:
            return f"raised: {traceback.format_exc()}"
    if book is None:
        return f"not refused: {found.names} {found.sizes.tolist()} {found.shapes} {found.notes}"
    return what_is_wrong(found, book) or "right"


def flipped(draw: Draw, content: bytes, weights: slice) -> bytes:
    """Bits or whole bytes of the weights changed."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 10])):
        changed[draw.choice(range(len(content))[weights])] ^= draw.choice(
            [1 << draw.randrange(8), draw.randint(1, 255)]
        )
    return bytes(changed)


DAMAGES: dict[str, Callable[[Draw, bytes, slice], bytes]] = {
    "truncated": lambda draw, content, weights: content[: draw.randrange(len(content))],
    "a byte lost": lambda draw, content, weights: content[: (at := draw.randrange(len(content)))] + content[at + 1 :],
    "bytes flipped": flipped,
}

# ---------------------------------------------------------------------------------------------------------------------
# Shards


def a_matrix(draw: Draw, table: pa.Table) -> str:
    return draw.choice([name for name in table.column_names if ".lora." in name])


def some_column(draw: Draw, table: pa.Table) -> str:
    return draw.choice(["label", "name", a_matrix(draw, table)])


def put(table: pa.Table, name: str, values: Any, kind: Any = None) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values, kind))


def renamed(table: pa.Table, old: str, new: str) -> pa.Table:
    return table.rename_columns([name.replace(old, new) for name in table.column_names])


def edit(draw: Draw, table: pa.Table, change: Callable[[list[float]], Any], chance: float = 0.5) -> pa.Table:
    """The lists of one column changed: all of them, by chance, or a single one."""
    name, chosen, everywhere = a_matrix(draw, table), draw.randrange(len(table)), draw.random() < chance
    rows = [change(row) if everywhere or n == chosen else row for n, row in enumerate(table[name].to_pylist())]
    return put(table, name, rows, pa.list_(pa.float64()))


def one_of(draw: Draw, table: pa.Table, name: str, value: Any, kind: Any) -> pa.Table:
    """One label or name replaced."""
    values = table[name].to_pylist()
    values[draw.randrange(len(values))] = value
    return put(table, name, values, kind)


def other_kinds_of_lists(draw: Draw, table: pa.Table) -> pa.Table:
    for name in table.column_names[2:]:
        number = draw.choice([pa.float16(), pa.float32(), pa.float64()])
        kind = draw.choice([pa.list_(number), pa.large_list(number), pa.list_(number, len(table[name][0]))])
        table = put(table, name, table[name].combine_chunks().cast(pa.list_(number)).cast(kind))
    return table


def scaled(draw: Draw, table: pa.Table) -> pa.Table:
    """Weights from the smallest to the largest numbers; where a product overflows the book is None."""
    for name in table.column_names[2:]:
        factor = 10.0 ** draw.choice([-320, -310, -150, -45, -30, 0, 0, 0, 30, 38, 150, 300])
        table = put(table, name, [[factor * number for number in row] for row in table[name].to_pylist()])
    return table


def columns_exchanged(draw: Draw, table: pa.Table) -> pa.Table:
    """The same names, over other matrices."""
    first, *names = table.column_names[1:]
    return table.rename_columns(["label", first, *draw.sample(names, len(names))])


def more_columns(draw: Draw, table: pa.Table) -> pa.Table:
    """Columns that are no LoRA weights, with names that begin like those of others."""
    for name in draw.sample(["label.x", "unet", "日本", "a\nb", "\x1b"], 2):
        value: Any = draw.choice([None, 1, "x", [1.0], {"list": [1.0]}, [[]], b"\xff", True])
        table = table.append_column(name, pa.array([value] * len(table)))
    return table


def another_type(draw: Draw, table: pa.Table) -> pa.Table:
    """A column of a type that is neither a label's, a name's nor a matrix's."""
    values: list[Any] = [True, b"12345678" * 64, [1] * 64, ["1"] * 64, [[1.0] * 8] * 8, {"list": [1.0] * 64}, None]
    return put(table, some_column(draw, table), [draw.choice(values)] * len(table))


SIZES = [pa.int8(), pa.uint8(), pa.int32(), pa.uint64(), pa.float32(), pa.float64()]
NO_SIZES = [(n, pa.float64()) for n in (0, -1, 0.5, NAN, INF, -INF, 1e300, None)]
NO_SIZES += [(0, pa.int64()), (-(2**63), pa.int64()), (2**64 - 1, pa.uint64()), (None, pa.int64())]
NAMES = ["", " ", "a\nb", "\0", "\x1b[2J", "日本", "\U0001f408", "x" * 10_000, "NaN", "../..", '","']
WHOLE_NAMES = [(7, pa.int8()), (-7, pa.int64()), (2**63, pa.uint64()), ("7", pa.large_string())]
ODD = ["x", "é", "\n", "\x1b[2J", "\u2028", "x" * 2000]
Change = Callable[[Draw, pa.Table], pa.Table]
SOUND_TABLES: dict[str, Change] = {
    "unchanged": lambda draw, table: table,
    "empty row groups": lambda draw, table: table,
    "other kinds of lists": other_kinds_of_lists,
    "a type of label": lambda draw, table: put(table, "label", table["label"].to_pylist(), draw.choice(SIZES)),
    "a type of name": lambda draw, t: put(t, "name", [(one := draw.choice(WHOLE_NAMES))[0]] * len(t), one[1]),
    "an odd name": lambda draw, table: one_of(draw, table, "name", draw.choice(NAMES), pa.string()),
    "columns shuffled": lambda draw, table: table.select(draw.sample(table.column_names, len(table.column_names))),
    "columns exchanged": columns_exchanged,
    "more columns": more_columns,
    "a layer renamed": lambda draw, table: renamed(table, draw.choice(LAYERS), draw.choice(["unet.x", "日.up", "0"])),
    "scaled": scaled,
    "longer rows": lambda draw, table: edit(draw, table, lambda row: row * 2, chance=1),
}
WRONG_TABLES: dict[str, Change] = {
    "a column dropped": lambda draw, table: table.drop_columns([some_column(draw, table)]),
    "a column renamed": lambda draw, table: renamed(table, (old := some_column(draw, table)), draw.choice(ODD) + old),
    "a column twice": lambda draw, t: t.append_column((name := some_column(draw, t)), t[name]),
    "a column of another type": another_type,
    "a label that is no size": lambda draw, table: one_of(draw, table, "label", *draw.choice(NO_SIZES)),
    "a name that is null": lambda draw, table: one_of(draw, table, "name", None, pa.string()),
    "other lengths": lambda draw, table: edit(draw, table, lambda row: draw.choice([[*row, 0.5], row[1:], [], None])),
    "no number": lambda draw, table: edit(
        draw, table, lambda row: [*row[:5], draw.choice([None, NAN, -INF]), *row[6:]]
    ),
    "no number under an odd name": lambda draw, table: renamed(
        edit(draw, table, lambda row: [NAN, *row[1:]]), "unet.", f"unet.{draw.choice(ODD)}."
    ),
    "no rows": lambda draw, table: table.slice(0, 0),
}
PARQUET_KINDS = [*SOUND_TABLES, *WRONG_TABLES, *DAMAGES]


def parquet_bytes(draw: Draw, table: pa.Table, empty_row_groups: bool = False) -> bytes:
    """Written in one of many ways, always with checksums, so that damage to the weights can be told."""
    compression, version = draw.choice(["snappy", "none", "zstd", "gzip"]), draw.choice(["1.0", "2.0"])
    options = {"compression": compression, "data_page_version": version, "write_page_checksum": True}
    rows, stream = draw.choice([1, 2, 100]), io.BytesIO()
    with pq.ParquetWriter(stream, table.schema, use_dictionary=draw.random() < 0.5, **options) as writer:
        for start in range(0, len(table), rows):
            writer.write_table(table.slice(start, rows))
            if empty_row_groups:
                writer.write_table(table.slice(0, 0))
    return stream.getvalue()


def book_of_table(table: pa.Table, rank: int) -> Book | None:
    layers = {}
    for path in {name.removesuffix(".lora.down.weight") for name in table.column_names} - {*table.column_names}:
        rows = (table[f"{path}.lora.{word}.weight"].to_pylist() for word in ("down", "up"))
        a, b = (torch.tensor(numbers, dtype=torch.float64) for numbers in rows)
        name = path.removeprefix("unet.").replace(".", "_")
        layers[name] = (a.view(len(table), rank, -1), b.view(len(table), -1, rank), 1.0)
    return book_of(layers, [int(size) for size in table["label"].to_pylist()], table["name"].to_pylist())


def check_parquet(kind: str, draw: Draw, folder: Path) -> str:
    rank = draw.randint(2, 4)  # of rank 1 every length is right
    change = {**SOUND_TABLES, **WRONG_TABLES}.get(kind, SOUND_TABLES["unchanged"])
    table = change(draw, table_of(draw.sample(models_of(3), draw.randint(1, 6)), rank=rank))
    content = parquet_bytes(draw, table, kind == "empty row groups")
    if kind in DAMAGES:
        footer = 8 + int.from_bytes(content[-8:-4], "little")
        content = DAMAGES[kind](draw, content, slice(-footer))
    book = None if kind in WRONG_TABLES else book_of_table(table, rank)
    path = folder / "mutant.parquet"
    path.write_bytes(content)
    return outcome_of(lambda: dsire.shard_spectra(path, rank), book, kind not in SOUND_TABLES)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA files

PATHS = ("down_blocks.0.attn1.to_q", "mid_block.attn2.to_out.0", "up_blocks.1.attn1.to_k")
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
NUMBERS = [NAN, INF, -INF, 0, 1e-320, 1e-45, 6e4, 3e38, 1e300]
ALPHAS: list[Any] = [0, 3, 0.25, -4.0, 1e30, 1e300, NAN, INF, [2.0], [[2.0]], [1.0, 2.0], []]


def a_lora(draw: Draw, layout: str) -> dict[str, Tensor]:
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
        a, b, alpha = (tensors.get(key or "") for key in LAYOUTS[layout](path))
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


def key_changed(draw: Draw, tensors: dict[str, Tensor], key: str) -> None:
    tensors[draw.choice(ODD) + key] = tensors.pop(key)


def exchanged(draw: Draw, tensors: dict[str, Tensor], key: str) -> None:
    other = draw.choice(list(tensors))
    tensors[key], tensors[other] = tensors[other], tensors[key]


def another_dtype(draw: Draw, tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = tensors[key].to(draw.choice([*FLOATS, torch.int64, torch.int8, torch.uint8, torch.bool]))


def another_shape(draw: Draw, tensors: dict[str, Tensor], key: str) -> None:
    old = tensors[key]
    shapes = [old.shape[::-1], [*old.shape, 1], [1, *old.shape], [old.numel()], [old.numel(), 1, 1]]
    tensors[key] = draw.choice([*(old.reshape(list(shape)) for shape in shapes), old.reshape(-1)[:0], old[None][:0]])


def another_number(draw: Draw, tensors: dict[str, Tensor], key: str) -> None:
    numbers = tensors[key].double().flatten()
    numbers[draw.randrange(len(numbers))] = draw.choice(NUMBERS)
    tensors[key] = numbers.reshape(tensors[key].shape).to(tensors[key].dtype)


def another_alpha(draw: Draw, tensors: dict[str, Tensor], key: str) -> None:
    for alpha in [key for key in tensors if key.endswith(".alpha")]:
        tensors[alpha] = torch.tensor(draw.choice(ALPHAS), dtype=draw.choice([torch.float64, torch.float16]))


EDITS: dict[str, Callable[[Draw, dict[str, Any], str], Any]] = {
    "unchanged": lambda draw, tensors, key: None,
    "a key dropped": lambda draw, tensors, key: tensors.pop(key),
    "a key changed": key_changed,
    "tensors exchanged": exchanged,
    "another dtype": another_dtype,
    "another shape": another_shape,
    "another number": another_number,
    "another alpha": another_alpha,
}
PICKLED: list[Any] = [None, 1, 2.5, True, "x", [1.0], NAN, 10**400]  # instead of a tensor
FILE_KINDS = [f"{form}: {kind}" for form in ("safetensors", "pickle") for kind in (*EDITS, *DAMAGES)]
FILE_KINDS.append("pickle: no tensor")


def check_file(kind: str, draw: Draw, folder: Path) -> str:
    form, kind = kind.split(": ")
    layout, stream = draw.choice(list(LAYOUTS)), io.BytesIO()
    tensors: dict[str, Any] = a_lora(draw, layout)
    key = draw.choice(list(tensors))
    EDITS.get(kind, EDITS["unchanged"])(draw, tensors, key)
    if kind == "no tensor":
        tensors[key] = draw.choice(PICKLED)
    torch.save(tensors, stream)
    content = save(tensors) if form == "safetensors" else stream.getvalue()
    if kind in DAMAGES:
        header = 8 + int.from_bytes(content[:8], "little") if form == "safetensors" else 0
        content = DAMAGES[kind](draw, content, slice(header, None))
        try:  # a pickle's archive has checksums; safetensors has none, so that other numbers may be read
            tensors = load(content) if form == "safetensors" else tensors
        except Exception:  # it must be refused
            tensors = {}
    path = folder / f"mutant.{'pt' if form == 'pickle' else form}"
    path.write_bytes(content)
    book = book_of_tensors(tensors, layout)
    book = book and book._replace(names=[str(path)])
    return outcome_of(lambda: dsire.file_spectra(path), book, damaged=kind != "unchanged")


# ---------------------------------------------------------------------------------------------------------------------


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

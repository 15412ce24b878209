"""The spectra of A, B and BA: the same as those of the full matrices."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import LAYERS, models_of, parquet_files, reference_spectra, table_of, weights_of, write_folder
from hypothesis import example, given
from hypothesis import strategies as st

import dsire

BOUND = 1e-9  # of the largest singular value


def assert_spectra_of(a: torch.Tensor, b: torch.Tensor) -> None:
    """`lora_spectra` gives the first r singular values of A, B and B @ A, with zeros where there are fewer."""
    rank = a.shape[-2]
    for found, matrix in zip(dsire.lora_spectra(a, b), (a, b, b @ a), strict=True):
        expected = torch.linalg.svdvals(matrix)[..., :rank]
        expected = torch.nn.functional.pad(expected, (0, rank - expected.shape[-1]))
        assert found.dtype == torch.float64
        assert found.shape == (*a.shape[:-2], rank)
        assert (found.diff(dim=-1) <= 0).all()
        assert ((found - expected).abs() <= BOUND * expected[..., :1]).all()


@st.composite
def matrices(draw: st.DrawFn, rows: int, columns: int, models: int) -> torch.Tensor:
    """A batch of random matrices with a condition number up to 1e6, a scale of 1e-30 to 1e30, and perhaps less rank."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    full = min(rows, columns)
    values = torch.logspace(0, -draw(st.floats(0, 6)), full, dtype=torch.float64)
    values[draw(st.one_of(st.just(full), st.integers(0, full))) :] = 0
    left = torch.linalg.qr(torch.randn(models, rows, full, generator=random, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(models, columns, full, generator=random, dtype=torch.float64)).Q
    return 10.0 ** draw(st.integers(-30, 30)) * (left * values) @ right.mT


@given(st.data(), st.integers(1, 64), st.integers(1, 100), st.integers(1, 100), st.integers(1, 3))
@example(None, 64, 100, 100, 1)
@example(None, 1, 1, 1, 1)
def test_are_those_of_the_full_matrices(data: Any, rank: int, inputs: int, outputs: int, models: int) -> None:
    if data is None:
        random = torch.Generator().manual_seed(0)
        a, b = torch.randn(1, rank, inputs, generator=random), torch.randn(1, outputs, rank, generator=random)
        assert_spectra_of(a.double(), b.double())
    else:
        assert_spectra_of(data.draw(matrices(rank, inputs, models)), data.draw(matrices(outputs, rank, models)))


def far_apart(of_a: torch.Tensor, of_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Three models whose A and B have these singular values; those of BA are their products, one by one."""
    random = torch.Generator().manual_seed(0)

    def turns(side: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(3, side, len(of_a), generator=random, dtype=torch.float64)).Q

    middle = turns(len(of_a))
    return middle @ (turns(90) * of_a).mT, (turns(70) * of_b) @ middle.mT


def decades(number: float) -> torch.Tensor:
    """Sixteen numbers from 1 down, over so many powers of ten."""
    return torch.logspace(0, -number, 16, dtype=torch.float64)


FAR_APART = {  # the singular values of A and of B
    "near": (decades(2), decades(1)),
    "at the limit": (decades(3.4), decades(3.6)),
    "A": (decades(5), decades(0)),
    "B": (decades(0), decades(5)),
    "both": (decades(5), decades(5)),
    "both, and BA is even": (decades(5), decades(5).flip(0)),
    "tiny A": (1e-155 * decades(3.4), decades(0)),
    "tiny B": (decades(0), 1e-155 * decades(3.4)),
    "tiny BA": (1e-80 * decades(1), 1e-80 * decades(2)),
}


@pytest.mark.parametrize("values", FAR_APART.values(), ids=FAR_APART)
def test_the_least_of_far_apart_singular_values_is_as_right_as_the_largest(
    values: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Squared, the least is lost in the rounding of the largest, and what is tiny among denormal numbers."""
    a, b = far_apart(*values)
    expected = (*values, values[0] * values[1])
    for found, full, its_values in zip(dsire.lora_spectra(a, b), (a, b, b @ a), expected, strict=True):
        its_values = its_values.sort(descending=True).values
        largest = float(its_values[0])
        bound = (1e-7 * its_values).clamp_max(1e-9 * largest) + 1e-15 * largest  # the last is what float64 can tell
        assert ((found - its_values).abs() <= bound).all()
        by_numpy = np.linalg.svd(full.numpy(), compute_uv=False)[:, :16]
        assert (np.abs(found.numpy() - by_numpy) <= bound.numpy()).all()


def test_one_awkward_model_leaves_its_batch_as_it_was() -> None:
    """Models of one batch are judged one by one: an untrained one, one of less rank, and a tiny one among others."""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, *shape, generator=random, dtype=torch.float64) for shape in ((4, 30), (20, 4)))
    b[1] = 0
    a[2, 3] = a[2, 0]
    a[4], b[4] = a[4] * 1e-120, b[4] * 1e-120
    together = torch.stack(dsire.lora_spectra(a, b))
    alone = [torch.stack(dsire.lora_spectra(a[[model]], b[[model]])) for model in range(6)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-15)
    assert_spectra_of(a, b)


@pytest.mark.parametrize("rank", [1, 2, 3, 7, 16, 32, 64])
def test_every_rank(rank: int) -> None:
    random = torch.Generator().manual_seed(rank)
    a = torch.randn(2, rank, 80, generator=random, dtype=torch.float64)
    b = torch.randn(2, 70, rank, generator=random, dtype=torch.float64)
    assert_spectra_of(a, b)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 20), (20, 3), (3, 2), (1, 1)])
def test_a_rank_larger_than_a_dimension_ends_in_zeros(inputs: int, outputs: int) -> None:
    random = torch.Generator().manual_seed(0)
    a = torch.randn(4, 8, inputs, generator=random, dtype=torch.float64)
    b = torch.randn(4, outputs, 8, generator=random, dtype=torch.float64)
    assert_spectra_of(a, b)
    assert (dsire.lora_spectra(a, b)[2][:, min(inputs, outputs) :] == 0).all()


def test_an_untrained_layer_has_a_zero_b() -> None:
    a = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, of_b, of_product = dsire.lora_spectra(a, torch.zeros(2, 24, 4, dtype=torch.float64))
    assert (of_b == 0).all()
    assert (of_product == 0).all()


def test_zeros_throughout() -> None:
    for values in dsire.lora_spectra(torch.zeros(1, 3, 5).double(), torch.zeros(1, 6, 3).double()):
        assert values.tolist() == [[0, 0, 0]]


def test_factors_that_cancel() -> None:
    """A has its first row only and B its second column only: neither is zero, but BA is."""
    a, b = torch.zeros(1, 2, 5).double(), torch.zeros(1, 6, 2).double()
    a[0, 0], b[0, :, 1] = 2.0, 3.0
    of_a, of_b, of_product = (values[0].tolist() for values in dsire.lora_spectra(a, b))
    assert of_a == pytest.approx([2 * 5**0.5, 0])
    assert of_b == pytest.approx([3 * 6**0.5, 0])
    assert of_product == pytest.approx([0, 0], abs=1e-12)


def test_values_worked_out_by_hand() -> None:
    """A = diag(3, 1) and B = diag(1, 2), so BA = diag(3, 2)."""
    a, b = torch.tensor([[[3.0, 0], [0, 1]]]).double(), torch.tensor([[[1.0, 0], [0, 2]]]).double()
    assert [values[0].tolist() for values in dsire.lora_spectra(a, b)] == [
        pytest.approx([3, 1]),
        pytest.approx([2, 1]),
        pytest.approx([3, 2]),
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 3, 3), (2, 1, 2)])
@pytest.mark.parametrize("which", [0, 1])
def test_a_value_that_is_not_finite_raises(bad: float, place: tuple[int, int, int], which: int) -> None:
    pair = [torch.ones(3, 4, 9).double(), torch.ones(3, 8, 4).double()]
    pair[which][place] = bad
    with pytest.raises(FloatingPointError):
        dsire.lora_spectra(*pair)


def test_a_value_that_is_not_finite_raises_also_where_the_other_factor_is_zero() -> None:
    a, b = torch.ones(1, 2, 5).double(), torch.zeros(1, 6, 2).double()
    a[0, 1, 4] = float("nan")
    with pytest.raises(FloatingPointError):
        dsire.lora_spectra(a, b)
    with pytest.raises(FloatingPointError):
        dsire.lora_spectra(b.mT.contiguous(), a.mT.contiguous())


def test_a_product_that_overflows_raises() -> None:
    with pytest.raises(FloatingPointError):
        dsire.lora_spectra(1e200 * torch.ones(1, 2, 5).double(), 1e200 * torch.ones(1, 6, 2).double())


def test_a_shard_gives_a_and_b_in_the_order_of_its_columns_and_then_the_products(tmp_path: Path) -> None:
    models = models_of(2)
    folder = write_folder(tmp_path / "wise", [table_of(models)])
    spectra = dsire.shard_spectra(parquet_files(folder)[0], rank=4)
    assert spectra.names == [name for name, _ in models]
    assert spectra.sizes.tolist() == [size for _, size in models]
    short = ["down_blocks_0_attn1_to_q", "mid_block_attn2_to_k", "up_blocks_1_attn1_to_out_0"]
    factors = [(layer, matrix) for layer in short for matrix in ("A", "B")]
    assert spectra.voters == [*factors, *((layer, "BA") for layer in short)]
    columns = dict(zip(short, LAYERS, strict=True))
    for model, of_model in zip(models, spectra.values.unbind(1), strict=True):
        weights = {column: torch.tensor(values).double() for column, values in weights_of(model).items()}
        for (layer, matrix), found in zip(spectra.voters, of_model, strict=True):
            a, b = (weights[f"{columns[layer]}.lora.{word}.weight"] for word in ("down", "up"))
            expected = torch.linalg.svdvals({"A": a, "B": b, "BA": b @ a}[matrix])[:4]
            assert (found - expected).abs().max() <= BOUND * expected[0]


@pytest.mark.parametrize(("room", "layers_at_once"), [(7, 3), (1, 1)])
@pytest.mark.parametrize("decimals", [9, 1])
def test_columns_in_memory_are_bounded_on_many_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, layers_at_once: int, decimals: int
) -> None:
    """With room for seven of the largest columns, three layers are read at a time; one is always read.

    Columns of few different numbers (as of weights in half precision) are larger in memory than in the file.
    """
    table = table_of(models_of(2), layers=[f"unet.mid_block.attn{number}.to_q" for number in range(12)])
    for number, name in enumerate(table.column_names[2:], start=2):
        rows = [np.round(row, decimals) for row in table.column(name).to_numpy()]
        table = table.set_column(number, name, pa.array(rows, pa.list_(pa.float64())))
    folder = write_folder(tmp_path / "wise", [table], use_dictionary=decimals == 1)
    columns = [name for name in table.column_names if ".lora." in name]
    largest = max(np.stack(table.column(name).to_numpy()).nbytes for name in columns)
    monkeypatch.setattr(dsire, "cores", lambda: 64)
    monkeypatch.setattr(dsire, "BYTES_AT_ONCE", room * largest)
    compute, lock, running, most = dsire.pair_spectra, threading.Lock(), [0], [0]
    all_there = threading.Barrier(layers_at_once)

    def counting(*arguments: Any) -> Any:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        all_there.wait(timeout=60)
        time.sleep(0.02)  # time enough for one too many
        found = compute(*arguments)
        with lock:
            running[0] -= 1
        return found

    monkeypatch.setattr(dsire, "pair_spectra", counting)
    assert len(dsire.shard_spectra(parquet_files(folder)[0], rank=4).voters) == 3 * 12
    assert most[0] == layers_at_once


def test_the_shipped_subset(tiny_wise: Path, shipped: dsire.Spectra) -> None:
    models, expected = reference_spectra(parquet_files(tiny_wise / "low" / "4"), rank=4)
    assert list(zip(shipped.names, shipped.sizes.tolist(), strict=True)) == models
    assert len(shipped.voters) == len(expected) == 3 * 56
    wanted = torch.from_numpy(np.stack(expected))
    assert ((shipped.values - wanted).abs() <= BOUND * wanted[..., :1]).all()

"""The spectra of A, B and BA: the same as those of the full matrices."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RANK, models_of, normal, parquet_files, reference_spectra, table_of, write_folder
from hypothesis import example, given
from hypothesis import strategies as st

import dsire

BOUND = 1e-9  # of the largest singular value


def spread(models: int, rows: int, columns: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Random matrices [models, rows, columns] of these singular values."""
    left, right = (normal(models, its, len(values), seed=seed + n) for n, its in enumerate((rows, columns)))
    return torch.linalg.qr(left).Q * values @ torch.linalg.qr(right).Q.mT


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
    seed, full = draw(st.integers(0, 2**32 - 1)), min(rows, columns)
    values = torch.logspace(0, -draw(st.floats(0, 6)), full, dtype=torch.float64)
    values[draw(st.one_of(st.just(full), st.integers(0, full))) :] = 0
    return 10.0 ** draw(st.integers(-30, 30)) * spread(models, rows, columns, values, seed)


@given(st.data(), st.integers(1, 64), st.integers(1, 100), st.integers(1, 100), st.integers(1, 3))
@example(None, 64, 100, 100, 1)
@example(None, 1, 1, 1, 1)
@example(None, 8, 3, 2, 4)  # the rank is larger than a dimension
def test_are_those_of_the_full_matrices(data: Any, rank: int, inputs: int, outputs: int, models: int) -> None:
    if data is None:
        assert_spectra_of(normal(models, rank, inputs), normal(models, outputs, rank, seed=1))
    else:
        assert_spectra_of(data.draw(matrices(rank, inputs, models)), data.draw(matrices(outputs, rank, models)))


BY_HAND: dict[str, tuple[list[list[float]], list[list[float]], list[list[float]]]] = {  # A, B, and the spectra
    "diagonal": ([[3, 0], [0, 1]], [[1, 0], [0, 2]], [[3, 1], [2, 1], [3, 2]]),
    "untrained": ([[3, 4, 0], [0, 0, 2]], [[0, 0], [0, 0]], [[5, 2], [0, 0], [0, 0]]),
    "zero": ([[0, 0]], [[0], [0], [0]], [[0], [0], [0]]),
    "factors that cancel": ([[3, 4], [0, 0]], [[0, 5], [0, 12]], [[5, 0], [13, 0], [0, 0]]),
    "rank larger than a dimension": ([[3], [4], [0]], [[0, 2, 0]], [[5, 0, 0], [2, 0, 0], [8, 0, 0]]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_values_worked_out_by_hand(case: str) -> None:
    a, b, expected = BY_HAND[case]
    found = dsire.lora_spectra(torch.tensor([a]).double(), torch.tensor([b]).double())
    for values, wanted in zip(found, expected, strict=True):
        assert values[0].tolist() == pytest.approx(wanted, abs=1e-12)
        if case in ("untrained", "zero"):
            assert (values[0] == 0).tolist() == [value == 0 for value in wanted]


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
def test_the_least_of_far_apart_values_is_as_right_as_the_largest(values: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Squared, the least is lost in the rounding of the largest, and what is tiny among denormal numbers."""
    of_a, of_b = values
    middle = spread(3, 16, 16, decades(0))  # it turns A and B alike: those of BA are the products, one by one
    a = middle @ (torch.linalg.qr(normal(3, 90, 16, seed=3)).Q * of_a).mT
    b = (torch.linalg.qr(normal(3, 70, 16, seed=4)).Q * of_b) @ middle.mT
    expected = (of_a, of_b, of_a * of_b)
    for found, full, its_values in zip(dsire.lora_spectra(a, b), (a, b, b @ a), expected, strict=True):
        its_values = its_values.sort(descending=True).values
        largest = float(its_values[0])
        bound = (1e-7 * its_values).clamp_max(1e-9 * largest) + 1e-15 * largest  # the last is what float64 can tell
        assert ((found - its_values).abs() <= bound).all()
        by_numpy = np.linalg.svd(full.numpy(), compute_uv=False)[:, :16]
        assert (np.abs(found.numpy() - by_numpy) <= bound.numpy()).all()


def test_one_awkward_model_leaves_its_batch_as_it_was() -> None:
    a, b = normal(6, 4, 30), normal(6, 20, 4, seed=1)
    b[1] = 0
    a[2, 3] = a[2, 0]
    a[4], b[4] = a[4] * 1e-120, b[4] * 1e-120
    together = torch.stack(dsire.lora_spectra(a, b))
    alone = [torch.stack(dsire.lora_spectra(a[[model]], b[[model]])) for model in range(6)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-15)
    assert_spectra_of(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 3, 3), (2, 1, 2)])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("other", [0, 1])
def test_a_value_that_is_not_finite_raises(bad: float, place: tuple[int, int, int], which: int, other: int) -> None:
    pair = [torch.full((3, 4, 9), other).double(), torch.full((3, 8, 4), other).double()]
    pair[which][:] = 1
    pair[which][place] = bad
    for its in (pair, [1e200 * torch.ones_like(matrix) for matrix in pair]):  # a product that overflows
        with pytest.raises(FloatingPointError):
            dsire.lora_spectra(*its)


# The largest singular values of any matrix
MATRICES = {
    "random": normal(40, 50),
    "of rank 2": normal(40, 2) @ normal(2, 50, seed=1),
    "nearly equal": spread(1, 40, 50, 1 + 1e-9 * torch.arange(40, dtype=torch.float64))[0],
    "widely spread": spread(1, 40, 50, 10 ** torch.linspace(0, -15, 40, dtype=torch.float64))[0],
    "steps": spread(1, 40, 50, torch.tensor([1e3, 1, 1e-3, 1e-6, 1e-9], dtype=torch.float64))[0],
    "one column": normal(40, 1),
    "zero": torch.zeros(40, 50, dtype=torch.float64),
}


@pytest.mark.parametrize("size", [1.0, -1.0, 1e-200, -1e-150, 1e150, -1e200])
@pytest.mark.parametrize("kind", MATRICES)
def test_the_spectrum_of_a_matrix(kind: str, size: float) -> None:
    """Nine digits of each value that is not lost against the largest one; turned where the size is below zero."""
    matrix, size = size * (MATRICES[kind].T if size < 0 else MATRICES[kind]), abs(size)
    wanted = size * torch.linalg.svdvals(matrix / size)
    for count in (1, 8, 32, 100):
        found = dsire.matrix_spectrum(matrix, count)
        assert found.shape == (min(count, *matrix.shape),)
        assert found.dtype == torch.float64
        assert torch.allclose(found / size, wanted[:count] / size, rtol=1e-9, atol=1e-14 * float(wanted[0] / size))


# Shards
def test_a_shard_gives_a_and_b_in_the_order_of_its_columns_and_then_the_products(tmp_path: Path) -> None:
    files = parquet_files(write_folder(tmp_path / "wise", [models_of(2)]))
    found, (models, expected) = dsire.shard_spectra(files[0], RANK), reference_spectra(files, RANK)
    layers = ["down_blocks_0_attn1_to_q", "mid_block_attn2_to_k", "up_blocks_1_attn1_to_out_0"]
    factors = [(layer, matrix) for layer in layers for matrix in ("A", "B")]
    assert found.voters == [*factors, *((layer, "BA") for layer in layers)]
    assert list(zip(found.names, found.sizes.tolist(), strict=True)) == models
    np.testing.assert_allclose(found.values.numpy(), np.stack(expected), rtol=1e-9)


@pytest.mark.parametrize(("fit", "expected"), [(0.9, 1), (3, 3), (3.9, 3), (100, 6)])
def test_layers_in_memory(fit: float, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once so many as fit; a layer counts as two of the largest column: 18 models of 4 x 32 numbers of 8 bytes."""
    table = table_of(models_of(3), layers=[f"unet.layer_{number}" for number in range(12)])
    (file,) = parquet_files(write_folder(tmp_path / "wise", [table]))
    monkeypatch.setattr(dsire, "BYTES_AT_ONCE", int(fit * 2 * 18 * 4 * 32 * 8))
    monkeypatch.setattr(dsire, "cores", lambda: 6)
    compute, together = dsire.pair_spectra, threading.Barrier(expected, timeout=20)
    under_way, counts = set(), []

    def counted(*arguments: Any) -> dsire.Layer:
        under_way.add(threading.get_ident())
        together.wait()
        time.sleep(0.02)  # time enough for one too many to begin
        counts.append(len(under_way))
        layer = compute(*arguments)
        under_way.remove(threading.get_ident())
        return layer

    monkeypatch.setattr(dsire, "pair_spectra", counted)
    assert len(dsire.shard_spectra(file, RANK).voters) == 3 * 12
    assert max(counts) == expected


def test_the_shipped_subset(tiny_wise: Path, shipped: dsire.Spectra) -> None:
    models, expected = reference_spectra(parquet_files(tiny_wise / "low" / "4"), rank=4)
    assert list(zip(shipped.names, shipped.sizes.tolist(), strict=True)) == models
    assert len(shipped.voters) == len(expected) == 3 * 56
    wanted = torch.from_numpy(np.stack(expected))
    assert ((shipped.values - wanted).abs() <= BOUND * wanted[..., :1]).all()

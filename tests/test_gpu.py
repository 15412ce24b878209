"""A GPU gives what the CPU gives, from a process's first call on, and a batch that its memory can't hold is halved."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, RANK, ROOT, Run, change, models_of, parquet_files, split_of, table_of, write_folder
from test_votes import by_brute_force, models_that_share_spectra, spectra_of

import dsire

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


@on_gpu
def test_the_command_in_a_new_process(run_anew: Run) -> None:
    """What a GPU's owner does first, with an empty cache: nothing else of this process has warmed the GPU up."""
    there = run_anew("--device=cuda")
    here = run_anew("--cache_dir=another")
    assert (there.code, there.out, there.predictions) == (0, here.out, here.predictions), there.err


ROUTINES = ("cholesky_ex", "eigvalsh", "qr", "svdvals")


@pytest.fixture
def from_threads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Routines that load at their first call, which fails from a thread as CUDA's may; the ones that threads called."""
    loaded, called = set(), set()

    def loading(name: str, routine: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                loaded.add(name)
            else:
                called.add(name)
            if name not in loaded:
                raise RuntimeError("lazy wrapper should be called at most once")
            return routine(*arguments, **options)

        return call

    for name in ROUTINES:
        monkeypatch.setattr(torch.linalg, name, loading(name, getattr(torch.linalg, name)))
    return called


def test_threads_do_not_make_the_first_call(run: Run, tmp_path: Path, from_threads: set[str]) -> None:
    """Whatever the device; a matrix that lacks rank takes the way by QR."""
    column = f"{LAYERS[0]}.lora.down.weight"
    table = change(table_of(models_of(18)), column, 5, lambda values: values[: len(values) // 4] * 4)
    done = run(f"--dataset={write_folder(tmp_path / 'wise', [table])}")
    assert done.code == 0, done.err
    assert from_threads == {*ROUTINES}


def pair(models: int, rank: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    a = torch.randn(models, rank, side, generator=random, dtype=torch.float64)
    return a, torch.randn(models, side, rank, generator=random, dtype=torch.float64)


def lora_spectra_within(largest: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let `lora_spectra` run out of memory with more models than that; the batches that it is given are listed."""
    compute, tried = dsire.lora_spectra, []

    def short_of_memory(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tried.append(len(a))
        if len(a) > largest:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return compute(a, b)

    monkeypatch.setattr(dsire, "lora_spectra", short_of_memory)
    return tried


def test_a_batch_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(11, 4, 20)
    whole = dsire.batch_spectra(a, b, "cpu")
    tried = lora_spectra_within(3, monkeypatch)
    found = dsire.batch_spectra(a, b, "cpu")
    assert tried == [11, 5, 2, 3, 6, 3, 3]
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)


def test_a_layer_that_does_not_fit_alone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lora_spectra_within(0, monkeypatch)
    with pytest.raises(dsire.DsireError, match="no memory left for a single layer: use --device=cpu"):
        dsire.batch_spectra(*pair(5, 4, 20), "cpu")


@on_gpu
def test_a_batch_is_halved_until_it_fits_a_gpu() -> None:
    """A and B have 67 MB each: 100 MB hold half of the models."""
    a, b = pair(64, 32, 4096)
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(1e8 / torch.cuda.get_device_properties(0).total_memory)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            (a.to("cuda"), b.to("cuda"))
        found = dsire.batch_spectra(a, b, "cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(found, dsire.batch_spectra(a, b, "cpu"), rtol=1e-9, atol=0)


@on_gpu
def test_the_spectra_of_the_shipped_subset(tiny_wise: Path, shipped: dsire.Spectra) -> None:
    files = parquet_files(tiny_wise / "low" / "4")
    there = torch.cat([dsire.shard_spectra(file, RANK, "cuda").values for file in files], dim=1)
    assert ((there - shipped.values).abs() <= 1e-6 * shipped.values[..., :1]).all()


@on_gpu
@pytest.mark.parametrize("name", dsire.PREDICTORS)
def test_predictors(shipped: dsire.Spectra, name: str) -> None:
    there = dsire.replace(shipped, values=shipped.values.to("cuda"))
    runs = dsire.splits(shipped.micro_datasets, dsire.Protocol(experiments=2))
    for one, other in zip(dsire.PREDICTORS[name](shipped, runs), dsire.PREDICTORS[name](there, runs), strict=True):
        assert one.sizes.tolist() == other.sizes.tolist()
        torch.testing.assert_close(one.shares, other.shares)
    for votes, its in zip(dsire.votes_of(shipped, runs), dsire.votes_of(there, runs), strict=True):
        assert torch.equal(votes.named, its.named)


@on_gpu
def test_votes_of_models_that_share_spectra() -> None:
    values, models = models_that_share_spectra()
    spectra = spectra_of(torch.from_numpy(values).to("cuda"), models)
    run = split_of(range(0, 300, 2), range(1, 300, 2))
    (votes,) = dsire.votes_of(spectra, [run])
    assert torch.equal(votes.named, spectra.sizes[torch.from_numpy(by_brute_force(values, run)[0])])


@on_gpu
@pytest.mark.parametrize("predictor", ["dsire", "log-ridge"])
def test_the_command(run: Run, predictor: str) -> None:
    for arguments in ([], ["--predict", ROOT / "tests" / "pilot_lora.safetensors"]):
        here = run(f"--predictor={predictor}", *arguments)
        there = run(f"--predictor={predictor}", "--device=cuda", "--cache_dir=another", *arguments)
        assert (there.code, there.out) == (0, here.out)


@on_gpu
@pytest.mark.parametrize("shape", [(64, 32), (40, 300)])
def test_the_spectrum_of_a_matrix(shape: tuple[int, int]) -> None:
    """Of a change of the weights, also one of low rank, which takes another way."""
    draw = torch.Generator().manual_seed(0)
    full = torch.randn(*shape, generator=draw, dtype=torch.float64)
    for matrix in (full, full[:, :3] @ full[:3]):
        here, there = dsire.matrix_spectrum(matrix, 16), dsire.matrix_spectrum(matrix.to("cuda"), 16).cpu()
        torch.testing.assert_close(there, here, rtol=0, atol=1e-9 * float(here[0]))

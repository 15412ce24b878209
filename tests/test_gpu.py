"""A GPU gives what the CPU gives; no thread makes a routine's first call; a batch that memory can't hold is halved."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, RANK, Run, change, models_of, parquet_files, table_of, write_folder

import dsire

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


@on_gpu
def test_the_first_command_of_a_new_user(run: Run, run_anew: Run) -> None:
    """In a process of its own, with an empty cache: the only one in which threads could make the first call."""
    there = run_anew("--device=cuda", "--cache_dir=another")
    assert (there.code, there.err) == (0, "")
    here = run()
    assert (there.out, there.predictions) == (here.out, here.predictions)


ROUTINES = ("cholesky_ex", "eigvalsh", "qr", "svdvals")


def test_no_thread_makes_the_first_call(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routines that are loaded at their first call, and can't be from a thread; a matrix that lacks rank needs QR."""
    loaded, from_threads = set(), set()

    def lazy(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def routine(*arguments: Any, **options: Any) -> Any:
            (loaded if threading.current_thread() is threading.main_thread() else from_threads).add(name)
            if name not in loaded:
                raise RuntimeError("lazy wrapper should be called at most once")
            return plain(*arguments, **options)

        return routine

    for name in ROUTINES:
        monkeypatch.setattr(torch.linalg, name, lazy(name, getattr(torch.linalg, name)))
    down = f"{LAYERS[0]}.lora.down.weight"
    table = change(table_of(models_of(18)), down, 5, lambda values: values[: len(values) // 4] * 4)
    outcome = run(f"--dataset={write_folder(tmp_path / 'wise', [table])}")
    assert outcome.code == 0, outcome.err
    assert from_threads == {*ROUTINES}


@on_gpu
def test_the_spectra_of_the_shipped_subset(tiny_wise: Path, shipped: dsire.Spectra) -> None:
    files = parquet_files(tiny_wise / "low" / "4")
    there = torch.cat([dsire.shard_spectra(file, RANK, "cuda").values for file in files], dim=1)
    assert ((there - shipped.values).abs() <= 1e-6 * shipped.values[..., :1]).all()


@on_gpu
@pytest.mark.parametrize("shape", [(64, 32), (40, 300)])
def test_the_spectrum_of_a_matrix(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    full = torch.randn(*shape, generator=draw, dtype=torch.float64)
    for matrix in (full, full[:, :3] @ full[:3]):
        here, there = dsire.matrix_spectrum(matrix, 16), dsire.matrix_spectrum(matrix.to("cuda"), 16).cpu()
        torch.testing.assert_close(there, here, rtol=0, atol=1e-9 * float(here[0]))

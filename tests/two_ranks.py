"""What tests/test_processes.py runs on two processes: ``python two_ranks.py RANK SIZE FOLDER SCENARIO ...``."""

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyro.infer
import torch
import torch.distributed as distributed

import pyrovae as pv


class Reconstruction(pyro.infer.Trace_ELBO):
    """A loss without noise: squares at the mean of the guide."""

    def differentiable_loss(self, model: Any, guide: Any, x: torch.Tensor) -> torch.Tensor:
        vae = model.__self__
        return (vae.likelihood.decoder(vae.encoder(x).base_dist.loc) - x).square().sum()

    def loss(self, model: Any, guide: Any, x: torch.Tensor) -> float:
        return float(self.differentiable_loss(model, guide, x).detach())


def data(num_data: int = 61) -> torch.Tensor:
    """Bits, the same on every rank."""
    return torch.bernoulli(torch.full((num_data, 9), 0.4), generator=torch.Generator().manual_seed(5))


def new_vae(seed: int = 0, **options: Any) -> Any:
    """A small model, the same on every rank."""
    torch.manual_seed(seed)
    return pv.make_vae(9, latent_dim=2, hidden=[8], **options)


def trained(vae: Any, x: torch.Tensor, **options: Any) -> dict[str, Any]:
    """Weights, buffers and curve after training, or what was raised."""
    usual = {"epochs": 3, "batch_size": 20, "lr": 0.05, "compile": False, "progress": False, "seed": 0}
    try:
        history = vae.fit(x, **usual | options)
    except (ValueError, RuntimeError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "state": vae.state_dict(),
        "bound": history.bound,
        "validation": history.validation,
        "skipped": history.skipped,
        "noise": torch.rand(3),
    }


def exact(folder: Path, rank: int) -> Any:
    """Without noise; the last batch has one datum."""
    options = {"estimator": Reconstruction(), "optimizer": "sgd", "lr": 0.02, "clip_norm": 1.0, "validation": data(67)}
    return trained(new_vae(), data(), **options)


def noisy(folder: Path, rank: int) -> Any:
    """The ELBO by Adam."""
    return trained(new_vae(), data(), validation=data(67), estimator="iwae", ema=0.9, schedule="cosine", epochs=4)


def curves(folder: Path, rank: int) -> Any:
    """The bounds of eight runs, by seed and epoch."""
    return torch.tensor([trained(new_vae(), data(200), seed=seed, batch_size=50)["bound"] for seed in range(8)])


def spoiled(folder: Path, rank: int) -> Any:
    """The loss of the second rank is NaN in one step: both skip it."""

    def spoiling(x: torch.Tensor) -> torch.Tensor:
        spoiling.calls += 1
        return x * torch.nan if rank == 1 and spoiling.calls == 12 else x

    spoiling.calls = 0
    return trained(new_vae(), data(), transform=spoiling, estimator=Reconstruction())


def scored(folder: Path, rank: int) -> Any:
    """The evidence of a model that is another one on each rank, and of 67 data."""
    try:
        return {"error": str(new_vae(seed=rank).log_marginal(data(67), num_samples=20, seed=0))}
    except ValueError as error:
        found = new_vae().log_marginal(data(67), num_samples=20, seed=0)
        return {"error": str(error), "log_px": torch.as_tensor(found.log_px)}


def repaired(folder: Path, rank: int) -> Any:
    """The evidence of two groups of data, repaired where a guide that has not been trained fails."""
    vae = new_vae()
    with torch.no_grad():
        for weights in vae.likelihood.decoder.parameters():
            weights.mul_(4)
    found = vae.log_marginal(data(300), num_samples=250, proposal="auto", seed=0, compile=False)
    names = ("log_px", "se", "khat", "elbo", "rung", "calls", "pilot", "drawn", "missed")
    return {name: torch.as_tensor(getattr(found, name)) for name in names}


def in_order(folder: Path, rank: int) -> Any:
    """Batches in the order of the data."""
    return trained(new_vae(), data(), shuffle=False, estimator=Reconstruction(), optimizer="sgd", lr=0.02)


def normed(folder: Path, rank: int) -> Any:
    """Batch normalisation."""
    vae = new_vae()
    vae.encoder.body = torch.nn.Sequential(vae.encoder.body, torch.nn.BatchNorm1d(8))
    return trained(vae, data(60))


def other_data(folder: Path, rank: int) -> Any:
    """Each rank has data of its own."""
    return trained(new_vae(), data()[rank:][:50])


def other_weights(folder: Path, rank: int) -> Any:
    """Each rank has a model of its own."""
    return trained(new_vae(seed=rank), data())


def other_options(folder: Path, rank: int) -> Any:
    """Each rank has a learning rate and a number of epochs of its own."""
    return trained(new_vae(), data(), lr=0.01 * (1 + rank), epochs=2 + rank)


def refused_by_one(folder: Path, rank: int) -> Any:
    """The data of one rank are refused before the first step."""
    return trained(new_vae(), data() * (1 + rank))


def changed_by_one(folder: Path, rank: int) -> Any:
    """on_epoch changes the weights of the rank that calls it."""
    vae, calls = new_vae(), list[int]()

    def on_epoch(record: dict[str, Any]) -> None:
        calls.append(record["epoch"])
        if record["epoch"] == 2:
            with torch.no_grad():
                next(vae.parameters()).add_(1.0)

    return trained(vae, data(), on_epoch=on_epoch) | {"calls": calls}


def in_two_parts(folder: Path, rank: int) -> Any:
    """A run, and one that is ended in the middle of an epoch by a budget and taken up again."""
    options = {"checkpoint": folder / "kept", "resume": "auto", "validation": data(30)}
    first = trained(new_vae(), data(), max_steps=6, **options)
    torch.manual_seed(77 + rank)  # nothing depends on what is between
    resumed = trained(new_vae(), data(), **options)
    return {"whole": trained(new_vae(), data(), validation=data(30)), "first": first, "resumed": resumed}


def captured_in_two_parts(folder: Path, rank: int) -> Any:
    """A run of captured steps that clips its gradients, and one that is ended and taken up again."""
    options: dict[str, Any] = {"compile": True, "clip_norm": 0.01, "validation": data(30)}
    kept = {"checkpoint": folder / "captured", "resume": "auto"}
    os.environ["PYROVAE_COMPILE"] = "aten"
    try:
        first = trained(new_vae(), data(), max_steps=6, **options, **kept)
        resumed = trained(new_vae(), data(), **options, **kept)
        return {"whole": trained(new_vae(), data(), **options), "first": first, "resumed": resumed}
    finally:
        del os.environ["PYROVAE_COMPILE"]


def interrupted(folder: Path, rank: int) -> Any:
    """A signal that reaches one rank ends both after the same step, with a checkpoint."""
    options = {"checkpoint": folder / "ended", "resume": "auto"}

    def noting(x: torch.Tensor) -> torch.Tensor:
        noting.calls += 1
        if rank == 1 and noting.calls == 9:
            signal.raise_signal(signal.SIGINT)
        return x

    noting.calls = -1000 if rank == 0 else 0
    ended = trained(new_vae(), data(), transform=noting, **options)
    noting.calls = -1000
    return {
        "ended": ended,
        "resumed": trained(new_vae(), data(), transform=noting, **options),
        "whole": trained(new_vae(), data()),
    }


def compiled(folder: Path, rank: int) -> Any:
    """Captured and compiled steps."""
    return trained(new_vae(), data(), compile=True, estimator="iwae", epochs=4)


def killed(folder: Path, rank: int) -> Any:
    """One rank dies in the second epoch."""
    return _halted(folder / "killed", rank, signal.SIGKILL)


def stopped(folder: Path, rank: int) -> Any:
    """One rank stands still, as if its machine were lost; the other one wakes it when it has ended."""
    return _halted(folder / "stopped", rank, signal.SIGSTOP)


def _halted(checkpoint: Path, rank: int, number: int) -> Any:
    """Training in which one rank gets a signal in the second epoch."""

    def halting(x: torch.Tensor) -> torch.Tensor:
        halting.calls += 1
        if rank == 1 and halting.calls == 12:
            os.kill(os.getpid(), number)
        return x

    halting.calls = 0
    return trained(new_vae(), data(), transform=halting, epochs=10_000, checkpoint=checkpoint, every="epoch")


def main() -> None:
    """Run the scenarios, and write what each rank found."""
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size, timeout=timedelta(minutes=2)
    )
    for name in sys.argv[4:]:
        scenario: Callable[[Path, int], Any] = globals()[name]
        torch.save(scenario(folder, rank), folder / f"{name}.{rank}")
        if name in ("killed", "stopped"):
            os._exit(0)
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

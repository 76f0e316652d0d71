"""``pyrovae sweep``: many runs, side by side or as jobs of an array, and one table of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from .app import app
from .arguments import given
from .config import Run
from .output import Output

if TYPE_CHECKING:
    from .grid import Cell

__all__ = ["sweep"]


@app.command(sort_key=2)
def sweep(
    run: Path | None = None,
    /,
    *,
    grid: Annotated[list[str] | None, Parameter(negative="")] = None,
    seeds: int | None = None,
    jobs: int = 1,
    index: int | None = None,
    resume: Path | None = None,
    output: Annotated[Output | None, Parameter(name="*")] = None,
    settings: Annotated[Run | None, Parameter(name="*")] = None,
) -> None:
    """Train and score every combination of some settings, with several seeds each, and print one table.

    The same command, or --resume, goes on where a sweep was ended: runs that are finished are kept, and the others go on from
    their checkpoints. More seeds, or more values of the grid, are added to a sweep in the same way.

    Example: pyrovae sweep --grid train.lr=2e-3,5e-4 --grid model.latent_dim=4,8 --seeds 3 --jobs 2

    Args:
        run: A TOML file that describes what all runs share, or the data. Options below win over it.
        grid: A setting and its values, as KEY=VALUE,VALUE; repeat it for a grid of several settings.
        seeds: Runs of each combination, whose seeds go up from --seed; by default 1.
        jobs: Runs that are trained at the same time, as processes that share the machine's cores.
        index: Train this one of the runs, from 0 on, and print no table: for the jobs of an array, each with a number.
        resume: The folder of a sweep: go on with it.
        output: What is printed.
        settings: The settings that all runs share; --name is that of the sweep's folder.
    """
    del settings  # as in train
    from .grid import Grid, base_of, parse_axes, read_plan, write_plan
    from .sweeping import finish, planned_folder, threads_each, train_all, train_one

    output = output or Output()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("pyrovae sweep starts processes of its own: call it without torchrun.")
    if jobs < 1 or (seeds is not None and seeds < 1):
        raise ValueError(f"--jobs and --seeds must be positive, got {jobs} and {1 if seeds is None else seeds}.")
    if resume is not None:
        if run is not None or grid or seeds is not None or given:
            raise ValueError(f"{resume} has its own settings: give --resume with --jobs or --index alone.")
        folder, plan = resume, read_plan(resume)
    else:
        base = base_of(run, given)
        plan = Grid(base, parse_axes(grid or []), seeds or 1, threads_each(jobs))
        folder = planned_folder(base, given.get("name"))
    cells = plan.cells()
    if index is not None and not 0 <= index < len(cells):
        raise ValueError(f"--index must be from 0 to {len(cells) - 1}, since the sweep has {len(cells)} runs, got {index}.")
    if resume is None:
        plan = write_plan(folder, plan)
    if index is not None:
        train_one(folder, cells[index], output)
        return
    with output.words():
        print(f"{_number(cells)} in {folder}", flush=True)
        failed = train_all(folder, cells, jobs, plan.threads)
        found = finish(folder, cells, failed)
    output.findings(found)
    if failed:
        (first, (code, sentence)), count = next(iter(failed.items())), len(failed)
        kind = FloatingPointError if code == 4 else ValueError
        raise kind(f"{count} of {len(cells)} runs failed; {first}: {sentence} The logs are in {folder / 'logs'}.")


def _number(cells: list[Cell]) -> str:
    models = len({cell.model for cell in cells})
    seeds = len(cells) // models
    words = [
        f"{count} {what}{'' if count == 1 else 's'}"
        for count, what in ((models, "model"), (seeds, "seed"), (len(cells), "run"))
    ]
    return f"{words[0]}, {words[1]} each: {words[2]}"

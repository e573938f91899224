"""From noise to samples: solvers, guidance, and the sampler that joins them with policies."""

from ditkit.sample.forecast import forecast
from ditkit.sample.guidance import Autoguidance, ClassifierFree, Guidance, Unguided
from ditkit.sample.noise import SampleNoise, initial_noise
from ditkit.sample.sampler import Sampler, Samples, Sampling, sample
from ditkit.sample.scheduler import DiffusersScheduler
from ditkit.sample.solvers import Ancestral, Ddim, Euler, EulerMaruyama, Heun, Solver

__all__ = [
    "Ancestral",
    "Autoguidance",
    "ClassifierFree",
    "Ddim",
    "DiffusersScheduler",
    "Euler",
    "EulerMaruyama",
    "Guidance",
    "Heun",
    "SampleNoise",
    "Sampler",
    "Samples",
    "Sampling",
    "Solver",
    "Unguided",
    "forecast",
    "initial_noise",
    "sample",
]

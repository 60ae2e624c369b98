"""A clock and a network whose answers are known, a network that is a formula, and levels."""

import math
import time

import torch


class Clock:
    """Stands in for the module ``time``: it stands still until something says how long it takes."""

    def __init__(self, now=100.0):
        self.now = now

    def perf_counter(self):
        return self.now

    def take(self, seconds):
        self.now += seconds

    def __getattr__(self, name):
        return getattr(time, name)


class KnownNetwork(torch.nn.Module):
    """Says that x0 is ``values[label]`` in every pixel, whatever x and the time: for the prediction "sample".

    The last value is that of "no class". ``calls`` has x, time and label of every call.
    """

    def __init__(self, values, channels=1, size=8):
        super().__init__()
        self.values = torch.nn.Parameter(torch.tensor(values))
        self.settings = {"channels": channels, "size": size}
        self.null_class = len(values) - 1
        self.calls = []

    def forward(self, x, time, label):
        self.calls.append((x.clone(), time.clone(), label.clone()))
        return self.values[label].view(-1, 1, 1, 1).expand_as(x)


def nonlinear(x, t, variance=False):
    """A network that is nonlinear in x, different at every t and bounded. It has no parameters, so two runs call the
    same function. With ``variance``, a second half of the channels is the interpolation of the learned
    range, in (-1, 1)."""
    time = float(torch.as_tensor(t).reshape(-1)[0]) / 1000
    m = torch.tanh(x * (0.4 + 0.5 * time)) * (0.9 - 0.3 * time) + 0.1 * math.cos(9 * time)
    return torch.cat([m, torch.sin(3 * x + 0.2)], dim=1) if variance else m


def make_levels(process, t):
    """The process's levels at a list of times: whole ones where it is discrete."""
    return process.levels(torch.tensor(t, dtype=torch.int64 if process.discrete else torch.float64))

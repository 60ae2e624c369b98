"""Backends asked for one operation by its arguments, as ``fastdiff.ops`` asks them by a record: what one does not do,
the next does."""

from fastdiff.backends import cuda as _cuda
from fastdiff.backends import native as _native
from fastdiff.backends import reference as _reference
from fastdiff.backends import triton as _triton
from fastdiff.backends.interface import able, run
from fastdiff.calls import (
    ConvertCall,
    GaussianCall,
    KLNormalCall,
    LossCall,
    NoiseCall,
    NormalCall,
    PosteriorCall,
    RowMomentsCall,
    StepCall,
    UniformCall,
)
from fastdiff.ops.operators import operators as _operators


def _loss(arguments, y=None, r=None):
    return LossCall(*arguments[:9], y, r, *arguments[9:])


class Asked:
    """Anything but the operations is the backend's own, which is to be set there: ``asked.native.backend``."""

    __slots__ = ("backend",)

    def __init__(self, backend):
        self.backend = backend

    def __getattr__(self, name):
        return getattr(self.backend, name)

    @property
    def available(self):
        return not self.backend.unavailable_because

    def noise(self, *arguments):
        return run(self.backend, NoiseCall(*arguments))

    def noise_and_target(self, *arguments):
        return self.backend.noise_and_target(NoiseCall(*arguments[:7]), *arguments[7:])

    def loss(self, *arguments, **third):
        return run(self.backend, _loss(arguments, **third))

    def loss_gradient(self, upstream, *arguments):
        call = _loss(arguments)
        return able(self.backend, call).gradient(upstream, call)

    def gaussian_kl(self, *arguments):
        return run(self.backend, GaussianCall(*arguments))

    def gaussian_kl_gradient(self, upstream, *arguments):
        call = GaussianCall(*arguments)
        return able(self.backend, call).gradient(upstream, call)

    def posterior(self, *arguments):
        return run(self.backend, PosteriorCall(*arguments))

    def posterior_gradient(self, d_z, d_x_t, *arguments):
        call = PosteriorCall(*arguments)
        return able(self.backend, call).gradient((d_z, d_x_t), call)

    def kl_normal(self, *arguments):
        return run(self.backend, KLNormalCall(*arguments))

    def kl_normal_gradient(self, upstream, *arguments):
        call = KLNormalCall(*arguments)
        return able(self.backend, call).gradient(upstream, call)

    def convert(self, m, x_t, k_x, k_m):
        return run(self.backend, ConvertCall(m, x_t, k_x, k_m))

    def row_moments(self, *arguments):
        return run(self.backend, RowMomentsCall(*arguments))

    def moments_gradient(self, upstream, *arguments):
        call = RowMomentsCall(*arguments[:5])
        return able(self.backend, call).gradient(upstream, call, *arguments[5:])

    def step(self, x, m, uncond, guidance, row, clip, history, noise, log_variance, dtype, wanted, **more):
        call = StepCall(x, m, row, uncond, guidance, clip, history, noise, log_variance, dtype, *wanted, **more)
        return run(self.backend, call)

    def uniform(self, *arguments, **named):
        return run(self.backend, UniformCall(*arguments, **named))

    def normal(self, *arguments, **named):
        return run(self.backend, NormalCall(*arguments, **named))


native, triton, cuda, reference = (Asked(b.backend) for b in (_native, _triton, _cuda, _reference))
operators = Asked(_operators)

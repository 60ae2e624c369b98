"""k-diffusion's calling conventions: its samplers by their names, and the losses of its denoisers, fused. k-diffusion
is not imported.

``sample_euler(model, x, sigmas, extra_args, callback, disable)`` and its like take a denoiser, ``model(x, sigma,
**extra_args)`` with sigma of shape [batch]; x is x0 + sigma n; sigmas are where to go, [steps + 1], usually down to 0.
Functions and arguments are named, and noise is drawn from the same generator in the same order, as in k-diffusion, so
that seeded results are equal. A callback gets, after each step's first call of the model, the dictionary {"x", "i",
"sigma", "sigma_hat", "denoised"}. (x is a tensor of its own then: it may be kept.) One difference: the SDE samplers
draw their noise with torch.randn unless a ``noise_sampler`` is given; k-diffusion's default is its
BrownianTreeNoiseSampler, which can be passed here.

``fuse(denoiser)``, as in ``fuse(K.layers.Denoiser(model, sigma_data=0.5))``, replaces the method ``loss(images, noise,
sigma)`` of the one object, which returns [batch] as before; ``unfuse`` puts its own back.
"""

from ..method_swap import fused_methods, left_alone, unfuse
from .losses import fuse
from .samplers import (
    get_sigmas_exponential,
    get_sigmas_karras,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_3m_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
)

__all__ = [
    "fuse",
    "fused_methods",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "left_alone",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_3m_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "unfuse",
]

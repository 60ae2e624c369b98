"""What the integrations of other libraries' objects have in common: stand-ins with which an object is tried out, and
coefficients from the tables of numbers that it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..samplers.ddim import ddim_columns

# ------------------------------------------------------------------------------------------------------- stand-ins


class StubNetwork(nn.Module):
    """Stands for the network while fused and original methods are compared: not linear, and without side effects.

    Args:
        device: of its parameter, by which some objects find their device.
        learned: it returns the variance too, behind the prediction in the channels.
    """

    def __init__(self, device: torch.device | None = None, learned: bool = False):
        super().__init__()
        self.where = nn.Parameter(torch.zeros((), device=device))
        self.learned = learned

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        m = torch.sin(3 * x) * 0.9
        return torch.cat([m, torch.cos(x)], dim=1) if self.learned else m

    apply_model = forward


def twin(obj: Any, **modules: nn.Module) -> Any:
    """A copy of an object that may be called without consequences: it shares the object's attributes, but for these
    modules, which it has in place of the object's own."""
    made = type(obj).__new__(type(obj))
    made.__dict__ = dict(obj.__dict__)
    if modules:
        made.__dict__["_modules"] = dict(obj._modules) | modules
    return made


# ------------------------------------------------- coefficients of Gaussian diffusions with tables, and of denoisers


def numbers(obj: Any, name: str, index: Any = slice(None)) -> Tensor:
    """The object's table ``name``, an array or a tensor [steps], at ``index``: float64 [rows], where the table is."""
    return torch.as_tensor(getattr(obj, name)).double()[index]


def x0_columns(obj: Any, kind: str, index: Any = slice(None)) -> dict[str, Tensor | float]:
    """The columns of the x0 estimate, [rows] each, from a network that predicts ``kind``: "epsilon", "sample" or
    "v_prediction"."""
    if kind == "sample":
        return {"p_m": 1.0}
    names = {
        "epsilon": ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        "v_prediction": ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    }[kind]
    return {"p_x": numbers(obj, names[0], index), "p_m": -numbers(obj, names[1], index)}


def posterior_columns(obj: Any) -> dict[str, Tensor]:
    """The columns of the mean of q(x_(t-1) | x_t, x0), [steps] each."""
    return {"c_x0": numbers(obj, "posterior_mean_coef1"), "c_x": numbers(obj, "posterior_mean_coef2")}


def ddim_step_columns(obj: Any, before: Tensor, eta: float, index: Any = slice(None)) -> dict[str, Tensor]:
    """The columns of DDIM's steps from the object's alpha_bar at ``index`` to alpha_bar ``before``, float64 [rows]. The
    noise estimate is that of the (clamped) x0 estimate. Song et al. 2021, equations 12 and 16."""
    now = numbers(obj, "alphas_cumprod", index)
    recip, recipm1 = (numbers(obj, f"sqrt_{name}_alphas_cumprod", index) for name in ("recip", "recipm1"))
    variance = eta**2 * (1 - now / before) * (1 - before) / (1 - now)
    direction = (1 - before - variance).clamp(min=0).sqrt()
    columns = ddim_columns(1 / recip, recipm1 / recip, before.sqrt(), direction, None) | {"c_noise": variance.sqrt()}
    clean = {"c_x": 0.0, "c_x0": 1.0, "c_noise": 0.0}  # to clean data, also where alpha_bar is rounded to 1
    return {name: torch.where(before == 1, clean[name], column) for name, column in columns.items()}


def preconditioned_target(c_skip: Tensor, c_out: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """p and q, [batch] each, of the target p x0 + q n that a network F has in a denoiser c_skip x + c_out F, for x =
    x0 + sigma n. Karras et al. 2022, equation 8. In float64: 1 - c_skip cancels for small sigma."""
    return {"p": (1 - c_skip) / c_out, "q": -c_skip * sigma / c_out}

"""A scheduler of the diffusers library -> the process and the prediction kind that a network for it is trained with.
Duck-typed: diffusers is not imported."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .prediction import Prediction
from .prediction import get as prediction_kind
from .process import EDM, Process, RectifiedFlow
from .tabulated import TabulatedEDM, TabulatedFlow, TabulatedVP, kept

_EDM = prediction_kind("edm")
# EDM schedulers negate c_out for v_prediction, so the network's output is Karras et al.'s F with the other sign.
NEGATIVE_EDM = Prediction(
    "negative_edm",
    lambda levels: tuple(-row for row in _EDM.coefficients(levels)),
    model_input=_EDM.model_input,
)


def check_scheduler(scheduler: Any, call: str = "") -> None:
    """Raise TypeError for a class, or a pipeline, in place of a scheduler. ``call``: what was called."""
    if isinstance(scheduler, type):
        name = scheduler.__name__
        raise TypeError(f"scheduler is the class {name}: make one, such as {name}() or {name}.from_pretrained(...).")
    if hasattr(scheduler, "scheduler"):
        ours = f"{call}(pipeline.scheduler)" if call else "pipeline.scheduler"
        raise TypeError(f"scheduler is a {type(scheduler).__name__}, which has a scheduler: write {ours}.")


def config_value(scheduler: Any, name: str, default: Any = None) -> Any:
    """An entry of a scheduler's config. Raises TypeError for what has none."""
    check_scheduler(scheduler)
    config = getattr(scheduler, "config", None)
    if config is None:
        raise TypeError(f"a scheduler of diffusers is needed, with a config; got {type(scheduler).__name__}.")
    value = config.get(name) if hasattr(config, "get") else getattr(config, name, None)
    return default if value is None else value


def kind_of(scheduler: Any) -> str:
    """ "vp", "flow" or "edm". Raises TypeError for a scheduler of none of these."""
    if config_value(scheduler, "sigma_data") is not None and hasattr(scheduler, "precondition_outputs"):
        return "edm"
    if config_value(scheduler, "prediction_type") == "flow_prediction" or config_value(scheduler, "use_flow_sigmas"):
        return "flow"
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        return "vp"
    if config_value(scheduler, "shift") is not None and getattr(scheduler, "sigmas", None) is not None:
        return "flow"
    raise TypeError(
        f"{type(scheduler).__name__} has neither alphas_cumprod, nor a flow's shift, nor EDM's sigma_data: "
        f"make the process yourself, for example fastdiff.VariancePreserving(betas=...)."
    )


_made: WeakKeyDictionary = WeakKeyDictionary()  # scheduler -> what ``kept`` keeps of it


def vp_process(scheduler: Any) -> TabulatedVP:
    """The process of a scheduler's ``alphas_cumprod``, with its rounding: add_noise gives the same bits in float32.

    Made once a scheduler, and again if its table is replaced or written into (on an accelerator, where that changes the
    table's version). Raises TypeError where there is none.
    """
    check_scheduler(scheduler)
    alpha_bar = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alpha_bar, Tensor):
        raise TypeError(
            f"{type(scheduler).__name__} has no alphas_cumprod: a scheduler such as DDPMScheduler is needed."
        )
    if alpha_bar.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"alphas_cumprod is {alpha_bar.dtype}, in which the first steps add no noise: keep schedulers in float32."
        )
    # With the scheduler's own roundings: PyTorch's float32 root is not always the nearest number.
    return kept(
        _made.setdefault(scheduler, {}),
        "vp",
        scheduler,
        lambda s: TabulatedVP(s.alphas_cumprod**0.5, (1 - s.alphas_cumprod) ** 0.5),
    )


def training_table(scheduler: Any) -> tuple[Tensor, Tensor]:
    """(sigmas, timesteps), each [num_train_timesteps], as the scheduler has them before ``set_timesteps``.

    Raises TypeError without them, ValueError after ``set_timesteps``.
    """
    check_scheduler(scheduler)
    sigmas, timesteps = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
    if not isinstance(sigmas, Tensor) or not isinstance(timesteps, Tensor):
        raise TypeError(
            f"{type(scheduler).__name__} has no sigmas and timesteps: an EDM, Euler or flow-matching one is needed."
        )
    steps = config_value(scheduler, "num_train_timesteps")
    if len(timesteps) < steps or getattr(scheduler, "num_inference_steps", None) is not None:
        raise ValueError(
            f"the scheduler has {len(timesteps)} timesteps set for inference, not its {steps} for training: train with "
            f"a scheduler of its own, {type(scheduler).__name__}.from_config(scheduler.config)."
        )
    return sigmas[:steps], timesteps[:steps]  # EDM schedulers append sigma = 0


def flow_table(scheduler: Any, model_time_scale: float = 1.0) -> TabulatedFlow:
    """The flow at a flow-matching scheduler's own sigmas. Raises TypeError for another scheduler."""
    if kind_of(scheduler) != "flow":
        raise TypeError(
            f"a flow-matching scheduler such as FlowMatchEulerDiscreteScheduler is needed; got "
            f"{type(scheduler).__name__}."
        )
    sigmas, timesteps = training_table(scheduler)
    return TabulatedFlow(sigmas, timesteps.double() * model_time_scale)


def edm_table(scheduler: Any) -> TabulatedEDM:
    """x0 + sigma n at the sigmas of an EDM or Euler scheduler. Raises TypeError without sigmas."""
    sigmas, timesteps = training_table(scheduler)
    return TabulatedEDM(sigmas, timesteps, config_value(scheduler, "sigma_data", 1.0))


def process_of(scheduler: Any) -> Process:
    """The process that a network for this scheduler is trained with.

    ``alphas_cumprod`` gives a variance-preserving one (also for Euler, Heun and other samplers of such networks);
    flow-matching schedulers ``RectifiedFlow`` with their static shift (1 where it is dynamic), with ``data_at=1`` where
    they invert their sigmas (Mochi's); EDM schedulers ``EDM``. Raises TypeError for anything else.
    """
    kind = kind_of(scheduler)
    if kind == "edm":
        return EDM(config_value(scheduler, "sigma_data"))
    if kind == "vp":
        return vp_process(scheduler)
    dynamic = config_value(scheduler, "use_dynamic_shifting", False)
    shift = getattr(scheduler, "shift", None) or config_value(scheduler, "flow_shift", 1.0)
    return RectifiedFlow(1.0 if dynamic else shift, data_at=int(_inverted(scheduler)))


def prediction_of(scheduler: Any, prediction: str | Prediction | None = None) -> str | Prediction:
    """The prediction kind of a scheduler's network, or ``prediction`` where that is given.

    Raises ValueError for an unknown one.
    """
    kind = kind_of(scheduler)
    if kind == "flow":
        if prediction is None:
            return "reversed_flow" if _inverted(scheduler) else "flow"
        if prediction_kind(prediction).name not in ("flow", "reversed_flow"):
            raise ValueError(
                f"a flow-matching scheduler predicts 'flow', n - x0, or 'reversed_flow', x0 - n, where its sign is "
                f"turned; got {prediction!r}."
            )
        return prediction
    found = prediction_kind(config_value(scheduler, "prediction_type", "epsilon") if prediction is None else prediction)
    if kind == "edm":
        kinds = {"epsilon": _EDM, "v_prediction": NEGATIVE_EDM}
        if found.name not in kinds:
            raise ValueError(f"an EDM scheduler has prediction_type epsilon or v_prediction; got {found.name!r}.")
        return kinds[found.name]
    return found


def _inverted(scheduler: Any) -> bool:
    """Whether a flow-matching scheduler's sigmas are 1 - sigma, so that they run from noise, 0, to data, 1."""
    return bool(config_value(scheduler, "invert_sigmas", False))

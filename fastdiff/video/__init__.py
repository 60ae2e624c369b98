"""What trainers of video models need: ``RFLoss``, the shifts of their noise schedules, noise that frames share, and
diffusion forcing. docs/video.md has recipes."""

from . import shifts
from .by_frame import ByFrame
from .correlation import frame_noise
from .forcing import frame_schedule, fused_snr, sample
from .rf_loss import RFLoss

__all__ = ["ByFrame", "RFLoss", "frame_noise", "frame_schedule", "fused_snr", "sample", "shifts"]

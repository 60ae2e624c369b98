"""A function of images on the frames of a video."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..losses.features import as_module
from ..ops.checks import check_tensor


class ByFrame(nn.Module):
    """A function of images, a decoder or an extractor of features, on each frame of a video.

    ``ByFrame(decode)(latents)`` calls ``decode`` with [B F, C, H, W] for latents [B, C, F, H, W], and brings what it
    returns back: tensors [B F, C', ...] become [B, C', F, ...], in lists and dicts too. So losses of images look at
    videos: ``losses.Sum(objective, decoder=ByFrame(vae.decode), lpips=Term(Perceptual(ByFrame(network))))``.

    Args:
        function: a module, a method of one, or another callable of images.
        frame_dim: which dimension the frames are: 2, or 1 for [B, F, C, H, W] (then results are [B, F, C', ...]).

    Raises TypeError or ValueError for data that is no video, and for results that are not one a frame.
    """

    def __init__(self, function: Callable[[Tensor], Any], frame_dim: int = 2):
        super().__init__()
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"function must be a module or another callable of images; got {function!r}.")
        if frame_dim not in (1, 2):
            raise ValueError(f"frame_dim must be 2, for [B, C, F, H, W], or 1, for [B, F, C, H, W]; got {frame_dim!r}.")
        self.function, self.frame_dim = as_module(function), frame_dim

    def forward(self, video: Tensor) -> Any:
        check_tensor("video", video, "video")
        if video.ndim != 5:
            raise ValueError(f"video must have 5 dimensions; got shape {tuple(video.shape)}.")
        frames_first = video.movedim(self.frame_dim, 1)
        return self._whole(self.function(frames_first.flatten(0, 1)), *frames_first.shape[:2])

    def _whole(self, found: Any, batch: int, frames: int) -> Any:
        if isinstance(found, Mapping):
            return {key: self._whole(part, batch, frames) for key, part in found.items()}
        if isinstance(found, (list, tuple)):
            return [self._whole(part, batch, frames) for part in found]
        check_tensor("what the function returns", found, "found")
        if found.ndim < 2 or len(found) != batch * frames:
            raise ValueError(
                f"the function must return [{batch * frames}, channels, ...], one for each frame; got shape "
                f"{tuple(found.shape)}."
            )
        return found.unflatten(0, (batch, frames)).movedim(1, self.frame_dim)

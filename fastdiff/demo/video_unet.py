"""The demo's network for videos: the U-Net of images on every frame, and between its blocks what mixes the frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .unet import GROUP_SIZE, Attention, UNet


class VideoUNet(UNet):
    """Predicts a target shaped as a noised video [B, C, F, H, W], a time or one for each frame, and a class.

    After each of the U-Net's blocks, a convolution over time mixes the frames at each place; where the frames are
    coarsest, attention looks at all places of all frames.
    """

    def __init__(self, channels: int, frames: int, size: int, classes: int, time_scale: float, width: int = 16):
        super().__init__(channels, size, classes, time_scale, width, widest=4)
        self.settings = dict(
            channels=channels, frames=frames, size=size, classes=classes, time_scale=time_scale, width=width
        )
        self.frames = frames
        for stage in (*self.down, *self.up):
            stage.append(FrameMixing(stage[-1].conv2.out_channels, frames))
        self.attention = FrameAttention(self.middle.conv2.out_channels, frames)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """x [B, C, F, H, W], time [B] or [B, F], label [B] integers up to `null_class` -> [B, C, F, H, W]."""
        times = time.view(len(x), -1).expand(-1, self.frames).flatten()
        labels = label[:, None].expand(-1, self.frames).flatten()
        return _videos(super().forward(_frames(x), times, labels), self.frames)


class FrameMixing(nn.Module):
    """Adds a convolution over time, of three frames, at each place. It knows which frame is which."""

    def __init__(self, width: int, frames: int):
        super().__init__()
        self.norm = nn.GroupNorm(width // GROUP_SIZE, width)
        self.place_in_time = nn.Parameter(torch.zeros(width, frames))
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B F, C, H, W] -> [B F, C, H, W]. The condition, which the blocks beside it have, is not used."""
        channels, frames = self.place_in_time.shape
        height, width = x.shape[-2:]
        h = F.silu(self.norm(x)).view(-1, frames, channels, height, width)
        h = h.permute(0, 3, 4, 2, 1).reshape(-1, channels, frames)
        h = self.conv(h + self.place_in_time).view(-1, height, width, channels, frames)
        return x + h.permute(0, 4, 3, 1, 2).reshape(x.shape)


class FrameAttention(Attention):
    """Self-attention over all pixels of all frames of a video."""

    def __init__(self, width: int, frames: int):
        super().__init__(width)
        self.frames = frames

    def forward(self, x: Tensor) -> Tensor:
        """[B F, C, H, W] -> [B F, C, H, W]."""
        # The frames of a video below each other are one image.
        videos = _videos(x, self.frames)
        return _frames(super().forward(videos.flatten(2, 3)).view(videos.shape))


def _frames(videos: Tensor) -> Tensor:
    """[B, C, F, H, W] -> [B F, C, H, W]."""
    return videos.transpose(1, 2).flatten(0, 1)


def _videos(frames: Tensor, number: int) -> Tensor:
    """[B F, C, H, W] -> [B, C, F, H, W], F = ``number``."""
    return frames.unflatten(0, (-1, number)).transpose(1, 2)

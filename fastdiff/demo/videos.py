"""Videos of moving digits: real handwritten ones, each at a constant speed until a border throws it back."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff

from .data import ImageData, digits
from .seeds import derived_seed

FRAMES, SIZE = 8, 16
SLOWEST, FASTEST = 0.75, 2.0  # pixels a frame
VIDEOS = 8192  # to learn from
HELD_OUT = 4  # every fourth digit moves in held-out videos alone


def moving_digits(seed: int, count: int = VIDEOS, held_out: bool = False) -> ImageData:
    """Videos [count, 1, F, H, W] with labels: video i is a function of (seed, i) alone. No digit is both in videos to
    learn from and in held-out ones."""
    found = digits()
    which = (torch.arange(len(found.images)) % HELD_OUT == 0) == held_out
    images, labels = found.images[which], found.labels[which]
    seed = derived_seed(seed, "held-out videos" if held_out else "videos")
    drawn = fastdiff.ops.materialize(fastdiff.ops.Philox(seed), (count, 5), images.device)
    chosen, down, right, direction, speed = torch.special.ndtr(drawn).T  # normal numbers to uniform ones
    index = (len(images) * chosen).long().clamp(max=len(images) - 1)
    angle, room = 2 * math.pi * direction, SIZE - images.shape[-1]
    velocity = (SLOWEST + (FASTEST - SLOWEST) * speed) * torch.stack([angle.sin(), angle.cos()])
    start = room * torch.stack([down, right])
    places = bounced(start[..., None] + velocity[..., None] * torch.arange(FRAMES), room)  # [2, count, F]
    return ImageData(placed(images[index], places.permute(1, 2, 0)), labels[index], found.class_names)


def bounced(places: Tensor, room: int) -> Tensor:
    """Where in [0, room] something that goes straight on to ``places`` is, if both ends throw it back."""
    return room - (places.remainder(2 * room) - room).abs()


def placed(images: Tensor, places: Tensor) -> Tensor:
    """Videos [B, 1, F, SIZE, SIZE] of images [B, 1, h, w] whose upper left corners are at ``places`` [B, F, (y, x)]; in
    between of pixels by linear interpolation; -1 around them."""
    height, width = images.shape[-2:]
    pixel = torch.arange(SIZE)
    y = pixel[:, None] - places[..., :1, None]  # [B, F, SIZE, 1]: the row of the image that is there
    x = pixel - places[..., 1:, None]
    y, x = torch.broadcast_tensors(2 * y / (height - 1) - 1, 2 * x / (width - 1) - 1)
    # All frames of a video below each other are one picture to grid_sample, which takes 0 around an image.
    grid = torch.stack([x, y], dim=-1).flatten(1, 2)
    return F.grid_sample(images + 1, grid, align_corners=True).unflatten(2, (-1, SIZE)) - 1

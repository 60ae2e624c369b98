"""The images: scikit-learn's handwritten digits, or a folder of the user's own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..showing import printable
from . import DemoError, extras

SUFFIXES = {".png", ".jpg", ".jpeg"}
PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}  # of a data set


@dataclass(frozen=True)
class ImageData:
    """images [N, C, H, W], or videos [N, C, F, H, W], float32 in [-1, 1]; labels [N] int64; the name of each class."""

    images: Tensor
    labels: Tensor
    class_names: list[str]

    def to(self, device: torch.device) -> ImageData:
        """The same on the device."""
        return ImageData(self.images.to(device), self.labels.to(device), self.class_names)

    def first(self, number: int) -> ImageData:
        """The first so many of them."""
        return ImageData(self.images[:number], self.labels[:number], self.class_names)

    def fingerprint(self) -> str:
        """Equal for equal images, labels and names."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.class_names)).encode())
        digest.update(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:16]


def digits() -> ImageData:
    """The 1797 handwritten digits, 8 x 8 and gray, that scikit-learn ships (a part of UCI's optdigits)."""
    extras.require("sklearn")
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = torch.from_numpy(loaded.images).float().unsqueeze(1) / 8 - 1
    return ImageData(images, torch.from_numpy(loaded.target).long(), [str(name) for name in loaded.target_names])


def folder(path: Path, size: int, gray: bool) -> ImageData:
    """The PNG and JPEG images under ``path``, cropped to the middle square and resized to ``size``.

    Each subfolder that holds images is a class; a folder without subfolders is one class.
    Raises DemoError for a folder without images, one that mixes the two layouts, one whose subfolders are train, val
    and the like, and an image that cannot be read.
    """
    extras.require("PIL", "numpy")
    if not path.is_dir():
        raise DemoError(f"{path} is not a folder.")
    loose = _image_files(path, "*")
    classes = {child.name: files for child in sorted(path.iterdir()) if (files := _class_files(child))}
    if loose and classes:
        raise DemoError(
            f"{path} holds both images ({loose[0].name}, ...) and subfolders with images ({next(iter(classes))}, ...): "
            f"put every image in the subfolder of its class, or all in one folder."
        )
    if loose:
        classes = {path.resolve().name or "images": loose}
    if not classes:
        raise DemoError(f"{path} holds no PNG or JPEG images.")
    if not loose and {name.lower() for name in classes} <= PARTS:
        part = max(classes, key=lambda name: name.lower().startswith("train"))
        raise DemoError(
            f"{path} holds {', '.join(classes)}: the parts of a data set, not its classes. Name one, for example "
            f"--data {path / part}."
        )
    images, labels = [], []
    for label, files in enumerate(classes.values()):
        images += [read_image(file, size, gray) for file in files]
        labels += [label] * len(files)
    return ImageData(torch.stack(images), torch.tensor(labels), [printable(name) for name in classes])


def read_image(path: Path, size: int, gray: bool) -> Tensor:
    """One image of any mode as float32 [1 or 3, size, size] in [-1, 1]. Raises DemoError if it cannot be read."""
    import numpy
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = _to_8_bit(ImageOps.exif_transpose(image)).convert("L" if gray else "RGB")
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for a broken file
        raise DemoError(f"cannot read the image {path}: {error}") from error
    pixels = torch.from_numpy(numpy.array(image)).reshape(size, size, -1)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _to_8_bit(image: Any) -> Any:
    """A Pillow image as L, RGB or the like: 16 bits scaled (Pillow's conversion cuts off), transparency on white."""
    import numpy
    from PIL import Image

    if image.mode.startswith("I"):
        values = numpy.asarray(image).astype(numpy.float64)
        return Image.fromarray((values / 257).round().clip(0, 255).astype(numpy.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _class_files(folder: Path) -> list[Path]:
    return _image_files(folder, "**/*") if folder.is_dir() and not folder.name.startswith(".") else []


def _image_files(folder: Path, pattern: str) -> list[Path]:
    """Sorted, so that the order of the images is the same on every file system. Hidden files are not images."""
    return sorted(
        file
        for file in folder.glob(pattern)
        if file.suffix.lower() in SUFFIXES and file.is_file() and not file.name.startswith(".")
    )

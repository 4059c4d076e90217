"""Decode an example's files into the tensors that an encoder reads."""

from __future__ import annotations

import hashlib

import numpy
import torch
from torch import Tensor

from finetune.data.buckets import Crop, fit, mirrored
from finetune.data.example import ALIGNED, Asset, Example, base_role
from finetune.data.media import image, video
from finetune.data.shape import Frame, VideoShape
from finetune.errors import UserError


def decode_role(example: Example, role: str, background: str, mirror: bool) -> Tensor:
    """Decode and crop one role: an image [3, H, W] or a clip [3, F, H, W], float32 in [-1, 1].

    Roles that are aligned with the target get its crop; other roles get their own center crop to its shape.

    Raises:
        UserError: the file has changed since the audit.
    """
    asset = example.assets[role]
    content = unchanged(asset, example.name, role)
    if asset.medium == "video":
        shape = example.crop.shape
        assert isinstance(shape, VideoShape)
        frames = video.decode(content, background, shape.frames, shape.fps)
        cropped = video.crop(frames, mirrored(example.crop, mirror))
        return torch.stack([to_tensor(numpy.asarray(frame)) for frame in cropped], dim=1)
    decoded = image.decode(content, background)
    crop = example.crop
    if role != "target" and (base_role(role) not in ALIGNED or decoded.size != crop.original):
        crop = fit(decoded.size, [crop.shape])
    return to_tensor(numpy.asarray(image.apply(decoded, mirrored(crop, mirror))))


def decode_file(content: bytes, shape: Frame, background: str) -> Tensor:
    """Decode an input image of a sample, center-cropped to `shape`: [3, H, W] float32 in [-1, 1]."""
    decoded = image.decode(content, background)
    return to_tensor(numpy.asarray(image.apply(decoded, fit(decoded.size, [shape]))))


def unchanged(asset: Asset, name: str, role: str = "target") -> bytes:
    """The bytes of an asset, checked against its digest: tensors of other bytes must not be cached under it.

    Raises:
        UserError: the file has changed since the audit, or cannot be read.
    """
    what = "image" if role == "target" else role
    try:
        content = asset.read()
    except OSError as error:
        problem = f"the {what} can no longer be read: {error.strerror}"
        raise UserError(problem, where=name, remedy="restore the file and start again") from error
    if hashlib.sha256(content).hexdigest() != asset.digest:
        raise UserError(
            f"the {what} has changed since the run began",
            where=name,
            remedy="start the run again to use the new file",
        )
    return content


def to_tensor(pixels: numpy.ndarray) -> Tensor:
    """[H, W, 3] uint8 → [3, H, W] float32 in [-1, 1]."""
    return to_floats(torch.from_numpy(pixels.copy()).permute(2, 0, 1))


def to_floats(pixels: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_bytes(pixels: Tensor) -> Tensor:
    """The inverse of `to_floats`: uint8."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8)


def geometry(crop: Crop) -> Tensor:
    """SDXL's size conditions, [6] float32: original height and width, crop's top and left, target height and width.

    In pixels (Podell et al. 2023, arXiv:2307.01952, §2.2); the crop's corner is measured after scaling.
    """
    width, height = crop.original
    return torch.tensor([height, width, crop.top, crop.left, crop.shape.height, crop.shape.width], dtype=torch.float32)

"""Augmented images are crops of the padded ones, some of them mirrored, and repeat with the generator."""

import pytest
import torch
import torch.nn.functional as F

from metakern.data.augment import crop_and_flip


def test_every_image_is_a_crop_of_itself_or_of_its_mirror_image() -> None:
    images = torch.rand(32, 3, 5, 6)
    found = crop_and_flip(images, torch.Generator().manual_seed(0), padding=2)
    padded = F.pad(images, (2, 2, 2, 2))
    mirrored = 0
    for image, whole in zip(found, padded, strict=True):
        crops = [whole[:, y : y + 5, x : x + 6] for y in range(5) for x in range(5)]
        plain = any(torch.equal(image, crop) for crop in crops)
        flipped = any(torch.equal(image, crop.flip(-1)) for crop in crops)
        assert plain or flipped
        mirrored += flipped and not plain
    assert 6 <= mirrored <= 26


def test_repeats_with_the_generator_and_keeps_the_layout() -> None:
    images = torch.rand(8, 3, 5, 5).to(memory_format=torch.channels_last)
    first, second = (crop_and_flip(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_refuses_what_is_no_image() -> None:
    with pytest.raises(ValueError, match=r"images \[n, c, h, w\], got shape \(4, 7\)"):
        crop_and_flip(torch.rand(4, 7), torch.Generator())

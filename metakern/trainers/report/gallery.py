"""Training images with their learned weights, as HTML with embedded images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from metakern.data import Examples


def picture(pixels: np.ndarray, caption: str) -> str:
    """pixels[h, w] or [h, w, 3] in 0..1 as a figure with a caption."""
    buffer = io.BytesIO()
    Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8)).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="" src="data:image/png;base64,{data}"><figcaption>{escape(caption)}</figcaption></figure>'


def shades(image: np.ndarray) -> np.ndarray:
    """image[c, h, w] as [h, w], or [h, w, 3] if coloured; rescaled to 0..1 if its values lie outside."""
    if image.min() < 0 or image.max() > 1:
        image = (image - image.min()) / max(float(np.ptp(image)), 1e-12)
    return image[0] if len(image) == 1 else image.transpose(1, 2, 0)


def gallery(train: Examples, ids: np.ndarray, weights: np.ndarray, rows: np.ndarray) -> str:
    """The images at `rows` of the ledger, in that order, each with its mean weight.

    `ids` and `weights` are the ledger's columns; the images are looked up in `train` by id.
    """
    place = {int(row): k for k, row in enumerate(train.ids)}
    images = [shades(train.inputs[place[int(ids[row])]].numpy()) for row in rows]
    pictures = [picture(image, f"{weights[row]:.2g} x") for image, row in zip(images, rows, strict=True)]
    return f'<div class="gallery">{"".join(pictures)}</div>'


def trusted(
    train: Examples,
    ids: np.ndarray,
    groups: np.ndarray,
    weights: np.ndarray,
    names: Sequence[str],
    count: int = 12,
) -> str:
    """The `count` most and least trusted images of each group; a group of at most 2 * count is shown as a whole."""
    parts = []
    for group, name in enumerate(names):
        rows = np.flatnonzero((groups == group) & ~np.isnan(weights))
        rows = rows[np.argsort(-weights[rows], kind="stable")]
        if len(rows) <= 2 * count:
            kinds = [("all", rows)]
        else:
            kinds = [("most trusted", rows[:count]), ("least trusted", rows[::-1][:count])]
        for kind, chosen in kinds:
            heading = f"<h4>{escape(name)}, {kind}</h4>" if len(chosen) else ""
            parts.append(heading + (gallery(train, ids, weights, chosen) if len(chosen) else ""))
    return "".join(parts)

"""The user's own images: a folder with one folder per class."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metakern.data.examples import Examples, Origin, Source
from metakern.data.folder import DataNotFound
from metakern.data.labels import numbered
from metakern.data.split import require_every_class, stratified

ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
SIDE = 64
KEPT = range(8, 129)  # sides of images that stay as they are: three poolings need 8, and memory grows with the square
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error)  # what Pillow raises besides errors of its own
BACKGROUNDS = (255, 0, 128)  # white, black, grey
VISIBLE = 25  # of 255: by how much a pixel must differ from its background
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I")  # modes that Pillow gives images of 16 bits


def image_folder(folder: str) -> Source:
    """FOLDER/CLASS/image, or FOLDER/train/CLASS/image next to test or meta; images [n, c, h, w] float32.

    FOLDER/meta has images whose class is certain. Without FOLDER/test, a fifth of each class is the test set, the same
    in every run. There is one channel if all images are grey, otherwise three. Of 16-bit images the upper eight bits
    are used. Images are rotated as their EXIF data say. Transparent parts become white in all images, or black or grey
    if that leaves fewer training images blank. Images of different sizes, or with a side below 8 or above 128 pixels,
    are scaled to a shorter side of 64 and cropped to 64 x 64 in the middle. Each channel has mean 0 and deviation 1
    over the training images. Ids are positions in the sorted list of files; hidden files are ignored, and other files
    with a warning.
    Raises: DataNotFound for a missing folder; ValueError if there are no images, if some are in deeper folders, or if
    the test set has other classes; ModuleNotFoundError without Pillow.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataNotFound(f"images: there is no folder {str(root)!r}")
    files, (train, test, meta) = _parts(root)
    targets, class_names = numbered([path.parent.name for path in files])
    if not len(test):
        train, test = stratified(targets[train], len(class_names))
    if not len(test):
        raise ValueError(f"images: no image of {root} is left to test on; a class needs five, or make a folder test")
    if len(meta):
        require_every_class(meta, targets, class_names)
    inputs = _normalised(_pixels(files, train), train)
    training, testing, clean = (Examples(inputs[part], targets[part], part) for part in (train, test, meta))
    return Source(
        root.name,
        training,
        testing,
        class_names,
        meta=clean if len(meta) else None,
        origins=[Origin(str(path)) for path in files],
    )


def images_of(root: Path) -> dict[Path, list[Path]]:
    """The images of the training set, the test set and the meta set, sorted, by the folder that each set is in."""
    divided = (root / "train").is_dir() and any((root / part).is_dir() for part in ("test", "meta"))
    folders = [root / part for part in ("train", "test", "meta")] if divided else [root]
    return {folder: [path for path in _visible(folder) if path.suffix.lower() in ENDINGS] for folder in folders}


def _visible(folder: Path) -> list[Path]:
    """All files in the folders of classes, but hidden ones; a class's folder may be a link."""
    found = sorted(path for path in folder.glob("*/**/*") if not path.is_dir())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _parts(root: Path) -> tuple[list[Path], list[Tensor]]:
    """The files, and which of them are the training set, the test set, and the meta set, by number.

    Raises: ValueError if the training set is empty, another set has classes that it does not have, or an image lies in
    a subfolder of a class: nobody would notice that it is left out.
    """
    images = images_of(root)
    train, *others = images
    if not images[train]:
        raise ValueError(f"images: {root} has no folders of images, which end in {', '.join(ENDINGS)}")
    for folder, files in images.items():
        deeper = [path for path in files if path.parent.parent != folder]
        if deeper:
            place = f"a class's folder in {folder}, or in its train beside test or meta"
            raise ValueError(f"images: {deeper[0]} lies deeper than {place}")
        _warn_of_others(folder, files)
    known = {path.parent.name for path in images[train]}
    for folder in others:
        unknown = {path.parent.name for path in images[folder]} - known
        if unknown:
            raise ValueError(f"images: {folder} has classes that train has not: {', '.join(sorted(unknown))}")
    parts = [*images.values(), [], []][:3]
    numbers = torch.arange(sum(map(len, parts)))
    return [path for files in parts for path in files], list(numbers.split([len(files) for files in parts]))


def _warn_of_others(folder: Path, images: list[Path]) -> None:
    """Warn of files that are left out: photographs in another format would be missing, or a whole class of them."""
    others = [path for path in _visible(folder) if path.suffix.lower() not in ENDINGS]
    if not others:
        return
    classes = sorted({path.relative_to(folder).parts[0] for path in others} - {path.parent.name for path in images})
    message = f"images: files in {folder} are not read ({len(others)}, such as {others[0].relative_to(folder)})"
    message += f"; folders without any image are no classes: {', '.join(classes)}" if classes else ""
    warnings.warn(f"{message}; images end in {', '.join(ENDINGS)}", stacklevel=4)


def _pixels(files: list[Path], train: Tensor) -> Tensor:
    """[n, c, h, w] uint8; `train` are the numbers of the images that the background is chosen by."""
    pictures = [_open(path) for path in files]
    if len({picture.size for picture in pictures}) > 1:
        pictures = [_squared(picture) for picture in pictures]
    grey = all(picture.mode in ("L", "LA") for picture in pictures)
    background = _background([pictures[k] for k in train.tolist() if _is_transparent(pictures[k])])
    found = [_on(background, picture).convert("L" if grey else "RGB") for picture in pictures]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in found]))
    return pixels.unsqueeze(1) if grey else pixels.permute(0, 3, 1, 2)


def _open(path: Path) -> Any:
    """In mode L, LA, RGB or RGBA; a size that would not stay is squared at once, before the next image takes memory."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("images need Pillow; try: pip install 'metakern[train]'", name="PIL") from missing
    try:
        with Image.open(path) as picture:
            picture.load()
            found = _in_plain_mode(_of_eight_bits(ImageOps.exif_transpose(picture), Image))
            return found if all(side in KEPT for side in found.size) else _squared(found)
    except (UnidentifiedImageError, Image.DecompressionBombError, *UNREADABLE) as error:
        raise ValueError(f"images: {path} cannot be read: {error}") from error


def _of_eight_bits(picture: Any, library: Any) -> Any:
    """Of 16 bits the upper eight, where Pillow's own conversion would cut all values off at 255.

    Raises: ValueError for pixels of more bits, and floating-point ones.
    """
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if picture.mode not in SIXTEEN_BITS:
        return picture
    pixels = np.asarray(picture).astype(np.int64)
    if pixels.min() < 0 or pixels.max() >= 2**16:
        raise ValueError("its pixels have more than 16 bits; save it with 8 or 16")
    return library.fromarray((pixels >> 8).astype(np.uint8))


def _in_plain_mode(picture: Any) -> Any:
    """In mode L where it is grey, else RGB; LA or RGBA where a part is transparent."""
    mode = "L" if picture.mode in ("1", "L", "LA", "La") else "RGB"
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        mode += "A" if picture.getextrema()[3][0] < 255 else ""
    return picture.convert(mode)


def _is_transparent(picture: Any) -> bool:
    return picture.mode in ("LA", "RGBA")


def _on(background: int, picture: Any) -> Any:
    """Without transparent parts."""
    if not _is_transparent(picture):
        return picture
    below = picture.convert("RGBA")
    below.paste((background, background, background, 255), (0, 0, *below.size))
    below.alpha_composite(picture.convert("RGBA"))
    return below.convert(picture.mode[:-1])


def _background(pictures: list[Any]) -> int:
    """The first of BACKGROUNDS on which the fewest pictures are blank.

    One for the whole set: chosen picture by picture, it would add a feature of its own.
    """
    blank = np.zeros(len(BACKGROUNDS), np.int64)
    for picture in pictures:
        *colours, alpha = np.moveaxis(np.asarray(picture.convert("RGBA")).astype(np.int32), -1, 0)
        for k, background in enumerate(BACKGROUNDS):
            differences = np.abs(np.stack(colours) - background).max(0) * alpha // 255
            blank[k] += differences.max() < VISIBLE
    return BACKGROUNDS[int(blank.argmin())]


def _squared(picture: Any) -> Any:
    """Scaled to a shorter side of SIDE, the middle SIDE x SIDE of it."""
    width, height = picture.size
    scale = SIDE / min(width, height)
    width, height = max(SIDE, round(width * scale)), max(SIDE, round(height * scale))
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    return picture.resize((width, height), 2).crop((left, top, left + SIDE, top + SIDE))


def _normalised(pixels: Tensor, train: Tensor) -> Tensor:
    values = pixels.float().div_(255)
    known = values[train]
    mean, deviation = known.mean((0, 2, 3), keepdim=True), known.std((0, 2, 3), keepdim=True)
    return values.sub_(mean).div_(deviation.clamp(min=1e-6))

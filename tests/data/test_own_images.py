"""Folders of images of one's own, and what is said about those that cannot be read."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from metakern.data import load


def paint(path: Path, shade: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if mode == "L" else (shade, 0, 255 - shade)).save(path)


def test_images(tmp_path):
    for k in range(10):
        for name, shade in (("dark", 10), ("light", 200), ("bright", 250)):
            paint(tmp_path / name / f"{k}.png", shade + k % 5)
    source = load(f"images:{tmp_path}")
    assert source.class_names == ("bright", "dark", "light")
    assert source.train.inputs.shape == (24, 3, 8, 8)
    assert source.test.counts(3).tolist() == [2, 2, 2]
    assert not set(source.train.ids.tolist()) & set(source.test.ids.tolist())
    torch.testing.assert_close(source.train.inputs[:, 0].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    (tmp_path / "dark" / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"3\.png cannot be read"):
        load(f"images:{tmp_path}")


def test_images_with_a_test_folder_and_several_sizes(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for name in ("a", "b"):
            for k in range(count):
                paint(tmp_path / part / name / f"{k}.png", 40 * k, size=(70 + k, 90), mode="L")
    source = load(f"images:{tmp_path}")
    assert source.train.inputs.shape == (6, 1, 64, 64)
    assert source.test.inputs.shape == (4, 1, 64, 64)
    for name in ("a", "b"):
        paint(tmp_path / "meta" / name / "sure.png", 0, size=(70, 90), mode="L")
    source = load(f"images:{tmp_path}")
    assert [Path(source.origins[k].file).name for k in source.meta.ids.tolist()] == ["sure.png"] * 2
    assert source.train.inputs.shape == (6, 1, 64, 64)
    paint(tmp_path / "test" / "c" / "0.png", 0)
    with pytest.raises(ValueError, match="classes that train has not: c"):
        load(f"images:{tmp_path}")


def test_images_need_pillow(tmp_path, monkeypatch):
    paint(tmp_path / "a" / "0.png", 0)
    paint(tmp_path / "b" / "0.png", 0)
    for k in range(1, 6):
        paint(tmp_path / "b" / f"{k}.png", 0)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"images need Pillow; try: pip install 'metakern\[train\]'"):
        load(f"images:{tmp_path}")


def test_images_of_sixteen_bits(tmp_path):
    """Pillow's own conversion cuts them off at 255, which leaves all of them white."""
    from PIL import Image

    for k in range(10):
        for name, shade in (("dark", 20), ("light", 200)):
            (tmp_path / name).mkdir(exist_ok=True)
            pixels = np.full((8, 8), 256 * (shade + k), np.uint16)
            Image.fromarray(pixels).save(tmp_path / name / f"{k}.{'png' if k % 2 else 'tif'}")
    wide = load(f"images:{tmp_path}")
    for k in range(10):
        for name, shade in (("dark", 20), ("light", 200)):
            paint(tmp_path / name / f"{k}.png", shade + k, mode="L")
            (tmp_path / name / f"{k}.tif").unlink(missing_ok=True)
    assert torch.equal(wide.train.inputs, load(f"images:{tmp_path}").train.inputs)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "dark" / "0.tif")
    with pytest.raises(ValueError, match=r"0\.tif cannot be read: its pixels are floating-point numbers"):
        load(f"images:{tmp_path}")
    Image.fromarray(np.full((8, 8), 2**20, np.int32)).save(tmp_path / "dark" / "0.tif")
    with pytest.raises(ValueError, match=r"0\.tif cannot be read: its pixels have more than 16 bits"):
        load(f"images:{tmp_path}")


def test_hidden_and_deeper_images(tmp_path):
    for k in range(6):
        for name in ("a", "b", ".checkpoints"):
            paint(tmp_path / name / f"{k}.png", 30 * k)
    (tmp_path / "a" / "._0.png").write_bytes(b"no image")
    source = load(f"images:{tmp_path}")
    assert source.class_names == ("a", "b")
    assert len(source.train) + len(source.test) == 12
    paint(tmp_path / "a" / "more" / "0.png", 0)
    with pytest.raises(ValueError, match=r"a/more/0\.png lies deeper than a class's folder"):
        load(f"images:{tmp_path}")


def test_other_files_are_named(tmp_path):
    for k in range(6):
        for name in ("a", "b"):
            paint(tmp_path / name / f"{k}.png", 30 * k)
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "0.heic")
    with pytest.warns(
        UserWarning, match=r"images: files in \S+ are not read \(1, such as a/0\.heic\); images end in \.png"
    ):
        assert len(load(f"images:{tmp_path}").train.ids) == 9
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.heic").touch()
    with pytest.warns(UserWarning, match=r"\(2, such .* without any image are no classes: c; images"):
        load(f"images:{tmp_path}")


def test_jfif(tmp_path):
    for k in range(6):
        for name in ("a", "b"):
            paint(tmp_path / name / f"{k}.jpg", 30 * k)
            (tmp_path / name / f"{k}.jpg").rename(tmp_path / name / f"{k}.jfif")
    assert load(f"images:{tmp_path}").train.inputs.shape == (10, 3, 8, 8)


def shapes(folder: Path, mode: str, grey: bool = False, shades: tuple[int, int] = (0, 0)) -> None:
    """Twelve pictures each of upright and lying bars, black or of these shades, on nothing at all."""
    from PIL import Image

    for name, shade in zip(("upright", "lying"), shades, strict=True):
        (folder / name).mkdir(parents=True)
        for k in range(12):
            alpha = np.zeros((20, 20), np.uint8)
            alpha[k % 8 : k % 8 + 10, 8:12] = 255
            picture = Image.fromarray(alpha if name == "upright" else alpha.T.copy())
            icon = Image.new("LA" if grey else "RGBA", (20, 20), (shade, 0) if grey else (shade, shade, shade, 0))
            icon.putalpha(picture)
            icon.convert(mode).save(folder / name / f"{k}.png")


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 3), ("P", 3), ("LA", 1)])
def test_what_is_transparent_is_white(tmp_path, mode, channels):
    shapes(tmp_path, mode, grey=mode == "LA")
    inputs = load(f"images:{tmp_path}").train.inputs
    assert inputs.shape[1:] == (channels, 20, 20)
    black, white = inputs.unique().tolist()
    assert white - black > 1
    assert ((inputs == black).sum((1, 2, 3)) == 40 * channels).all()
    assert (inputs[:, :, 0, 0] == white).all()


def grey_levels(folder: Path) -> Tensor:
    """Of the training images, before they are normalised."""
    inputs = load(f"images:{folder}").train.inputs
    return (inputs - inputs.min()) / (inputs.max() - inputs.min())


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_white_shapes_are_put_on_black(tmp_path, mode):
    """On white nothing would be left of them."""
    shapes(tmp_path, mode, grey=mode == "LA", shades=(255, 255))
    levels = grey_levels(tmp_path)
    assert levels.unique().tolist() == [0, 1]
    assert ((levels == 1).sum((1, 2, 3)) == 40 * levels.shape[1]).all()
    assert (levels[:, :, 0, 0] == 0).all()


def test_white_and_black_shapes_are_put_on_grey(tmp_path):
    shapes(tmp_path, "RGBA", shades=(255, 0))
    levels = grey_levels(tmp_path)
    torch.testing.assert_close(levels.unique(), torch.tensor([0, 128 / 255, 1]))
    assert (levels[:, :, 0, 0] > 0.4).all()


def test_white_pages_with_print_stay_on_white(tmp_path):
    """Most of what is visible is white, but no image is blank; nor does an empty one choose the background."""
    from PIL import Image

    shapes(tmp_path, "RGBA", shades=(255, 255))
    for path in sorted(tmp_path.glob("*/*.png")):
        picture = Image.open(path)
        left, top, *_ = picture.getbbox()
        picture.putpixel((left + 1, top + 1), (0, 0, 0, 255))
        picture.save(path)
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "lying" / "empty.png")
    levels = grey_levels(tmp_path)
    assert (levels[:, :, 0, 0] == 1).all()


def test_the_background_is_chosen_by_the_training_images(tmp_path):
    shapes(tmp_path / "train", "RGBA", shades=(0, 0))
    shapes(tmp_path / "test", "RGBA", shades=(255, 255))
    assert (grey_levels(tmp_path)[:, :, 0, 0] == 1).all()


def test_yellow_is_visible_on_white(tmp_path):
    """By its blue channel."""
    from PIL import Image

    for k in range(10):
        picture = Image.new("RGBA", (20, 20), (255, 255, 0, 0))
        picture.paste((255, 255, 0, 255), (k, k, 10 + k, 10 + k))
        (tmp_path / "ab"[k % 2]).mkdir(exist_ok=True)
        picture.save(tmp_path / "ab"[k % 2] / f"{k}.png")
    inputs = load(f"images:{tmp_path}").train.inputs
    assert (inputs[:, 2, 0, 19] == inputs[:, 2].max()).all()


def test_palettes_are_resolved_before_the_size_changes(tmp_path):
    """Between two entries of a palette there is no colour: such an image would be scaled to its nearest pixels."""
    from PIL import Image

    for kind in ("RGB", "P", "1"):
        for name in ("a", "b"):
            for k in range(6):
                pixels = np.random.default_rng(k).integers(0, 2, (150 + k, 150), dtype=np.uint8) * 255
                (tmp_path / kind / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).convert("RGB").convert(kind).save(tmp_path / kind / name / f"{k}.png")
    colours, palettes, bits = (load(f"images:{tmp_path / kind}").train.inputs for kind in ("RGB", "P", "1"))
    torch.testing.assert_close(palettes, colours)
    torch.testing.assert_close(bits, colours[:, :1])


@pytest.mark.parametrize(
    ("size", "shape"), [((128, 8), (8, 128)), ((129, 100), (64, 64)), ((7, 20), (64, 64)), ((1, 1), (64, 64))]
)
def test_one_size_stays_within_limits(tmp_path, size, shape):
    for name in ("a", "b"):
        for k in range(5):
            paint(tmp_path / name / f"{k}.png", 40 * k, size=size)
    assert load(f"images:{tmp_path}").train.inputs.shape == (8, 3, *shape)


def test_turned_as_the_camera_was(tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(5):
            exif = Image.Exif()
            exif[0x112] = 6  # the first row of the pixels is the right edge of what was seen
            pixels = np.zeros((20, 30), np.uint8)
            pixels[:10] = 255
            Image.fromarray(pixels).save(tmp_path / name / f"{k}.png", exif=exif)
    inputs = load(f"images:{tmp_path}").train.inputs
    assert inputs.shape == (8, 1, 30, 20)
    assert (inputs[..., 10:] > 0).all()
    assert (inputs[..., :10] < 0).all()


def test_an_image_too_large_to_be_decoded_is_named(tmp_path, monkeypatch):
    from PIL import Image

    for k in range(10):
        paint(tmp_path / "ab"[k % 2] / f"{k}.png", 20 * k, size=(30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a/0\.png cannot be read: Image size \(900 pixels\) exceeds limit"):
        load(f"images:{tmp_path}")

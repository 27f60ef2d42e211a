"""A picture is seen as it was meant, whatever it is stored as; one that cannot be seen is an error that says why."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sartor.core.errors import MediaError
from sartor.media.images import open_image, squared

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(width: int = 60, height: int = 40) -> Image.Image:
    """Red above left, green above right, blue below left, white below right: no turn of it is another."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def encoded(image: Image.Image, form: str = "PNG", **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **how)
    return out.getvalue()


def at_corners(image: Image.Image) -> list[tuple[int, ...]]:
    width, height = image.size
    return [image.getpixel(at) for at in ((3, 3), (width - 4, 3), (3, height - 4), (width - 4, height - 4))]


def is_near(found: list[tuple[int, ...]], wanted: list[tuple[int, ...]], most: int) -> bool:
    return bool(np.abs(np.array(found) - np.array(wanted)).max() <= most)


def png(width: int, height: int, body: bytes = b"\0" * 64) -> bytes:
    """A PNG by hand, whose header may say what Pillow would not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_the_six_formats_are_read_from_bytes_and_from_a_file(form: str, tmp_path: Path) -> None:
    content = encoded(corners(), form)
    (tmp_path / "picture").write_bytes(content)
    for image in (open_image(content), open_image(tmp_path / "picture")):
        assert (image.mode, image.size) == ("RGB", (60, 40))
        assert is_near(at_corners(image), [RED, GREEN, BLUE, WHITE], 12)


STORED_FOR = {
    1: None,
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_90",
    7: "TRANSVERSE",
    8: "ROTATE_270",
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED_FOR)
def test_a_picture_is_turned_upright_as_its_exif_says(orientation: int, form: str) -> None:
    how = STORED_FOR[orientation]
    stored = corners().transpose(Image.Transpose[how]) if how else corners()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(encoded(stored, form, exif=exif))
    assert image.size == (60, 40)
    assert is_near(at_corners(image), [RED, GREEN, BLUE, WHITE], 12)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_there_is_not_turns_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert is_near(at_corners(open_image(encoded(corners(), "JPEG", exif=exif))), [RED, GREEN, BLUE, WHITE], 12)


def test_damaged_exif_leaves_the_picture_as_it_is_stored() -> None:
    content = encoded(corners(), "JPEG", exif=b"Exif\0\0" + b"II*\0" + b"\xff" * 40)
    assert is_near(at_corners(open_image(content)), [RED, GREEN, BLUE, WHITE], 12)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animated_picture_the_first_frame_is_seen(form: str) -> None:
    others = [Image.new("RGB", (60, 40), (9, 9, 9)), Image.new("RGB", (60, 40), (99, 9, 9))]
    image = open_image(encoded(corners(), form, save_all=True, append_images=others))
    assert is_near(at_corners(image), [RED, GREEN, BLUE, WHITE], 12)


def clear_corner(mode: str) -> bytes:
    """Red, but what is above left is transparent."""
    image = Image.new("RGBA", (60, 40), (*RED, 255))
    image.paste((*BLUE, 0), (0, 0, 30, 20))
    if mode == "P":
        paletted = Image.new("P", (60, 40), 1)
        paletted.putpalette([*BLUE, *RED])
        paletted.paste(0, (0, 0, 30, 20))
        return encoded(paletted, "PNG", transparency=0)
    if mode == "P bytes":
        paletted = Image.new("P", (60, 40), 1)
        paletted.putpalette([*BLUE, *RED])
        paletted.paste(0, (0, 0, 30, 20))
        return encoded(paletted, "PNG", transparency=b"\0\xff")
    if mode == "RGB key":
        keyed = Image.new("RGB", (60, 40), RED)
        keyed.paste(BLUE, (0, 0, 30, 20))
        return encoded(keyed, "PNG", transparency=BLUE)
    return encoded(image.convert(mode), "PNG")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P bytes", "RGB key"])
def test_what_is_transparent_is_white(mode: str) -> None:
    image = open_image(clear_corner(mode))
    first, second, *_ = at_corners(image)
    assert first == WHITE
    assert second == ((76, 76, 76) if mode == "LA" else RED)


def test_half_transparent_is_half_white() -> None:
    assert open_image(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))).getpixel((1, 1)) == pytest.approx(
        (127, 127, 127), abs=1
    )


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_is_seen_in_its_colours(form: str) -> None:
    image = open_image(encoded(corners().convert("CMYK"), form))
    assert image.mode == "RGB"
    assert is_near(at_corners(image), [RED, GREEN, BLUE, WHITE], 30)


def test_one_bit_is_black_and_white() -> None:
    image = Image.new("1", (9, 9), 1)
    image.paste(0, (0, 0, 4, 9))
    seen = open_image(encoded(image))
    assert seen.getpixel((0, 0)) == (0, 0, 0) and seen.getpixel((8, 8)) == WHITE


@pytest.mark.parametrize(
    ("form", "dtype", "most", "white"),
    [
        ("PNG", np.uint16, 65535, 255),
        ("PNG", np.uint16, 4095, 255),
        ("TIFF", np.uint16, 4000, 249),
        ("TIFF", np.uint16, 255, 255),
        ("TIFF", np.int32, 1 << 20, 255),
        ("TIFF", np.float32, 1.0, 255),
        ("TIFF", np.float32, 0.5, 128),
        ("PNG", np.uint16, 0, 0),
    ],
)
def test_more_than_eight_bits_are_scaled_to_the_depth_in_use(form: str, dtype: Any, most: float, white: int) -> None:
    ramp = np.linspace(0, most, 32 * 8).reshape(8, 32).astype(dtype)
    seen = np.asarray(open_image(encoded(Image.fromarray(ramp), form)))
    assert seen.shape == (8, 32, 3)
    assert seen[0, 0].tolist() == [0, 0, 0]
    assert seen[-1, -1].tolist() == pytest.approx([white] * 3, abs=1)
    assert white == 0 or 0.4 < seen.mean() / white < 0.6


@pytest.mark.parametrize(
    ("mode", "form", "seen"),
    [
        ("1", "PNG", (255, 255, 255)),
        ("L", "PNG", (200, 200, 200)),
        ("P", "GIF", (204, 204, 204)),
        ("RGB", "BMP", (200, 200, 200)),
        ("CMYK", "TIFF", (200, 200, 200)),
        ("LA", "WEBP", (200, 200, 200)),
        ("I;16", "PNG", (255, 255, 255)),
    ],
)
def test_a_single_pixel_of_every_mode_is_a_picture(mode: str, form: str, seen: tuple[int, ...]) -> None:
    whole = Image.new("L", (1, 1), 200)
    pixel = (
        Image.fromarray(np.full((1, 1), 65535, np.uint16)) if mode == "I;16" else whole.convert("RGB").convert(mode)
    )
    image = open_image(encoded(pixel, form))
    assert image.mode == "RGB" and image.size == (1, 1)
    assert is_near([image.getpixel((0, 0))], [seen], 2)


def test_values_that_are_no_numbers_are_refused() -> None:
    bad = np.full((8, 8), np.nan, np.float32)
    with pytest.raises(MediaError, match="no numbers") as found:
        open_image(encoded(Image.fromarray(bad), "TIFF"))
    assert found.value.reason == "unreadable_image"


NOISE = Image.effect_noise((64, 64), 90).convert("RGB")
REFUSED = {
    "nothing": (b"", "unreadable_image"),
    "text": (b"no picture at all", "unreadable_image"),
    "0x0": (png(0, 0), "unreadable_image"),
    "0 high": (png(10, 0), "unreadable_image"),
    "bomb": (png(100_000, 100_000), "image_bomb"),
    "over the limit": (png(20_000, 10_000), "image_bomb"),
    "bmp bomb": (
        b"BM" + struct.pack("<IHHIIiiHH", 54, 0, 0, 54, 40, 100_000, 100_000, 1, 24) + b"\0" * 24,
        "image_bomb",
    ),
    "gif 0x0": (b"GIF89a" + b"\0" * 7 + b"\x3b", "unreadable_image"),
    "body too short": (png(500, 500), "unreadable_image"),
    "a program for PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable_image"),
    "another format": (encoded(corners(), "ICO"), "unreadable_image"),
} | {
    f"cut {form} {part}": (encoded(NOISE, form)[: int(len(encoded(NOISE, form)) * part)], "unreadable_image")
    for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
    for part in (0.02, 0.5, 0.9)
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_seen_is_refused_with_its_reason(case: str, tmp_path: Path) -> None:
    content, reason = REFUSED[case]
    (tmp_path / "picture.png").write_bytes(content)
    for given in (content, tmp_path / "picture.png"):
        with pytest.raises(MediaError) as found:
            open_image(given)
        assert found.value.reason == reason
        assert found.value.problem and found.value.remedy
        assert str(tmp_path) not in found.value.problem


def test_the_extension_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(corners(), "JPEG"))
    assert open_image(tmp_path / "a.png").size == (60, 40)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (60, 40), (40, 60), (224, 224)])
def test_squared_keeps_the_whole_picture_and_its_shape(size: tuple[int, int]) -> None:
    seen = np.asarray(squared(Image.new("RGB", size, RED), 32, BLUE))
    assert seen.shape == (32, 32, 3)
    is_red = (seen == RED).all(2)
    assert (is_red | (seen == BLUE).all(2)).all()
    wide, high = (max(1, round(length * 32 / max(size))) for length in size)
    assert is_red.sum() == wide * high and is_red[16 - (high == 1) * 1 :].any()

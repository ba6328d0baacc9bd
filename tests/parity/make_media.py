"""Draws the pictures of fixtures/cases/media: small, smooth, and in the formats and colour modes that users bring."""

from pathlib import Path

import numpy as np
from PIL import Image

MEDIA = Path(__file__).parent / "fixtures" / "cases" / "media"


def picture(height, width, seed):
    """Two waves, a disc and a bar on a gradient, as uint8 RGB."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    y, x = y / height, x / width
    channels = []
    for _ in range(3):
        a, b, phase = rng.uniform(2, 9, 3)
        wave = np.sin(a * y + b * x + phase) * 60 + rng.uniform(-80, 80) * y + rng.uniform(-80, 80) * x + 128
        wave[(y - rng.uniform(0.2, 0.8)) ** 2 + (x - rng.uniform(0.2, 0.8)) ** 2 < 0.03] = rng.uniform(0, 255)
        wave[np.abs(x - rng.uniform(0.1, 0.9)) < 0.04] += 70
        channels.append(wave)
    return np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)


def golden(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return ((y + x)[..., None] * np.array([1, 2, 3]) % 256).astype(np.uint8)


def main():
    MEDIA.mkdir(parents=True, exist_ok=True)
    for old in MEDIA.iterdir():
        old.unlink()
    save = lambda image, name, **options: image.save(MEDIA / name, **options)
    save(Image.fromarray(golden(50, 70)), "golden.png", optimize=True)
    for name, height, width, seed in [("wide", 170, 290, 1), ("tall", 200, 90, 2), ("square", 224, 224, 3),
                                      ("large", 250, 330, 4), ("speck", 5, 9, 5)]:
        save(Image.fromarray(picture(height, width, seed)), f"{name}.png", optimize=True)
    for index in range(5):
        frame = picture(56, 56, 20)
        frame[10 + 6 * index : 24 + 6 * index, 8 + 4 * index : 20 + 4 * index] = [220, 40, 30]
        save(Image.fromarray(frame), f"even-{index}.png", optimize=True)
        frame = picture(60, 83, 30 + index)
        save(Image.fromarray(frame), f"odd-{index}.png", optimize=True)
    base = Image.fromarray(picture(64, 90, 6))
    save(base.quantize(32), "palette.gif")
    save(base.quantize(16), "palette.png", optimize=True)
    alpha = np.broadcast_to(np.linspace(0, 255, 90).astype(np.uint8), (64, 90))
    save(Image.fromarray(np.dstack([np.asarray(base), alpha])), "alpha.png", optimize=True)
    save(base.convert("L"), "grey.png", optimize=True)
    save(base, "lossless.webp", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(base, "turned.jpg", quality=92, subsampling=0, exif=exif)
    turned = Image.Exif()
    turned[0x0112] = 8
    save(base, "turned.png", exif=turned)


if __name__ == "__main__":
    main()

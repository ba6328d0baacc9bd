"""Writes fixtures/processors/: what transformers, torchvision and Pillow make of pictures and videos.

    pip install transformers==4.57.3 torch==2.8.0 torchvision==0.23.0 pillow==11.3.0 safetensors numpy
    pip install av
    pip install --no-deps qwen-vl-utils==0.0.14
    python make_processor_fixtures.py

worker/model/tests/processors.rs reads them. Pictures come from a formula (`picture`) that the test repeats, or are tiny
files of every kind; of what is made of them a digest of all bytes is stored and a few values, so that the files stay small.
The "slow" processors are the reference: those that resize with Pillow. Videos have only one implementation, torchvision's.
"""

import hashlib
import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageOps
from qwen_vl_utils.vision_process import smart_nframes
from safetensors.numpy import save_file
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize
from transformers.models.qwen2_vl.image_processing_qwen2_vl_fast import Qwen2VLImageProcessorFast
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

HERE = Path(__file__).parent / "fixtures" / "processors"
SIDES = list(range(28, 2000, 37))
BOUNDS = [(3136, 12845056), (224**2, 1280 * 784), (262144, 4194304)]
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
RELEASED = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]
TINY = [[56 * i, 56 * j] for i in range(1, 4) for j in range(1, 4)]


def picture(width, height, frame=0):
    """Smooth in places and noisy in others; the same numbers as in processors.rs."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    return ((x * 3 + y * 5 + c * 40 + frame * 29 + (x * y) // 7 * 11) % 256).astype(np.uint8)


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def summary(values):
    """What is stored of pixel values: enough to tell equal from near and near from wrong."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    flat = values.reshape(-1)
    step = max(1, len(flat) // 50)
    return {
        "count": len(flat), "digest": digest(flat), "step": step, "values": [float(v) for v in flat[::step]],
        "mean": float(flat.astype(np.float64).mean()), "std": float(flat.astype(np.float64).std()),
    }


# Geometry.

def anyres_counts(pinpoints, side, grid, rule, sizes):
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.image_processor = type("Pinpoints", (), {"image_grid_pinpoints": pinpoints})
    processor.num_image_tokens, processor.vision_aspect_ratio = grid * grid, rule
    rows = []
    for height, width in sizes:
        best = select_best_resolution([height, width], pinpoints)
        tokens = 0 if best is None else processor._get_number_of_features(height, width, side, side)
        rows.append([height, width, *(best or (0, 0)), tokens])
    return np.array(rows, dtype=np.uint32)


def plans():
    tensors = {}
    for number, (low, high) in enumerate(BOUNDS):
        rows = [[smart_resize(h, w, 28, low, high) for w in SIDES] for h in SIDES]
        tensors[f"smart_resize.{number}"] = np.array(rows, dtype=np.uint32)
    draw = np.random.default_rng(4)
    any_size = [tuple(int(2 ** s) for s in draw.uniform(0, 12.5, 2)) for _ in range(600)]
    grid = [(h, w) for h in SIDES[::2] for w in SIDES[::2]]
    tensors["anyres.released"] = anyres_counts(RELEASED, 384, 27, "anyres_max_9", grid + any_size)
    tensors["anyres.tiny"] = anyres_counts(TINY, 56, 4, "anyres_max_2", any_size)
    save_file(tensors, HERE / "plans.safetensors")


# Resampling.

def resampled():
    draw = np.random.default_rng(7)
    cases = []
    for _ in range(60):
        from_w, from_h, to_w, to_h = (int(n) for n in draw.integers(2, 200, 4))
        source = picture(from_w, from_h)
        pillow = np.array(Image.fromarray(source).resize((to_w, to_h), Image.Resampling.BICUBIC))
        tensor = torch.from_numpy(source).permute(2, 0, 1)
        vision = F.resize(tensor, [to_h, to_w], interpolation=F.InterpolationMode.BICUBIC, antialias=True)
        cases.append({
            "from": [from_w, from_h], "to": [to_w, to_h], "pillow": digest(pillow),
            "torchvision": digest(vision.permute(1, 2, 0).numpy()),
        })
    return cases


# Processors. A case: the preprocessor file, and the sizes (width, height, frames) of the media of one sample.

def qwen_pictures():
    cases = []
    for name, file, sizes in [
        ("default", {}, [(70, 50), (37, 53)]),
        ("hub", {"min_pixels": 3136, "max_pixels": 12845056}, [(640, 480), (29, 200), (3000, 100), (1920, 1080)]),
        ("bounds", {"min_pixels": 50176, "max_pixels": 100352}, [(28, 28), (500, 411)]),
        ("strip", {}, [(2, 400), (300, 2)]),
        ("levels", {"do_rescale": False, "do_normalize": False}, [(84, 56)]),
        ("unscaled", {"do_rescale": False}, [(84, 56)]),
        ("unnormalized", {"do_normalize": False}, [(84, 56)]),
        ("other_channels", {"image_mean": 0.5, "image_std": [0.1, 0.2, 0.3], "rescale_factor": 0.01}, [(90, 61)]),
    ]:
        for width, height in sizes:
            images = [Image.fromarray(picture(width, height))]
            made = Qwen2VLImageProcessor(**file)(images=images)
            # The class keeps the bounds of the last instance that was given any.
            Qwen2VLImageProcessorFast.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
            fast = Qwen2VLImageProcessorFast(**file)(images=images, return_tensors="pt")
            cases.append({
                "name": name, "file": file, "width": width, "height": height,
                "grid": [int(n) for n in made["image_grid_thw"][0]], "slow": summary(made["pixel_values"]),
                "fast": summary(fast["pixel_values"].numpy()),
            })
    return cases


def qwen_videos():
    cases = []
    for file, (width, height, frames), fps in [
        ({}, (320, 240, 4), 2.0), ({}, (100, 170, 3), 1.0), ({}, (640, 360, 1), 2.0),
        ({"size": {"shortest_edge": 3136, "longest_edge": 50176}}, (300, 200, 5), 3.0),
        ({"min_pixels": 3136, "max_pixels": 25088, **HALF}, (130, 250, 2), 0.5),
    ]:
        video = [Image.fromarray(picture(width, height, frame)) for frame in range(frames)]
        Qwen2VLVideoProcessor.size = {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}
        made = Qwen2VLVideoProcessor(**json.loads(json.dumps(file)))(videos=[video], return_tensors="pt")
        cases.append({
            "file": file, "width": width, "height": height, "frames": frames, "fps": fps,
            "grid": [int(n) for n in made["video_grid_thw"][0]], "seconds": 2 / fps,
            "made": summary(made["pixel_values_videos"].numpy()),
        })
    return cases


def one_vision():
    cases = []
    tiny = {"size": {"height": 56, "width": 56}, "image_grid_pinpoints": TINY}
    for file, sizes in [
        ({**HALF, "image_grid_pinpoints": RELEASED}, [(70, 50)]),
        ({**HALF, "image_grid_pinpoints": RELEASED}, [(500, 333)]),
        ({**HALF, "image_grid_pinpoints": RELEASED}, [(1920, 1080)]),
        ({**HALF, "image_grid_pinpoints": RELEASED}, [(200, 3000)]),
        ({**HALF, "image_grid_pinpoints": RELEASED}, [(70, 50), (200, 301)]),
        ({**tiny, **HALF}, [(60, 171)]), ({**tiny, **HALF}, [(9, 100)]), (tiny, [(101, 58)]),
        ({**tiny, **HALF}, [(60, 171), (56, 56), (33, 8)]), (tiny, [(101, 58), (58, 101)]),
    ]:
        images = [Image.fromarray(picture(*size)) for size in sizes]
        made = LlavaOnevisionImageProcessor(**file)(images=[images])
        count = lambda n: n if len(sizes) == 1 else 1
        cases.append({
            "file": file, "sizes": sizes,
            "made": [summary(np.array(values)[:count(len(values))]) for values in made["pixel_values"]],
            "squares": [count(len(values)) for values in made["pixel_values"]],
        })
    return cases


def one_vision_videos():
    cases = []
    for file, (width, height, frames) in [(HALF, (70, 50, 2)), ({"size": {"height": 56, "width": 56}}, (99, 200, 3))]:
        video = [Image.fromarray(picture(width, height, frame)) for frame in range(frames)]
        made = LlavaOnevisionVideoProcessor(**file)(videos=[video], return_tensors="pt")
        cases.append({
            "file": file, "width": width, "height": height, "frames": frames,
            "made": summary(made["pixel_values_videos"].numpy()),
        })
    return cases


def sampling():
    cases = []
    for total in [2, 3, 4, 5, 7, 9, 16, 31, 100, 101, 255, 640, 1801, 5000]:
        for fps in [1.0, 7.5, 23.976, 25.0, 30.0]:
            count = smart_nframes({}, total_frames=total, video_fps=fps)
            indices = torch.linspace(0, total - 1, count).round().long()
            cases.append({
                "total": total, "fps": fps, "count": count, "digest": digest(indices.numpy().astype("<u4")),
                "one_vision": digest(np.linspace(0, total - 1, min(total, 32), dtype=int).astype("<u4")),
            })
    return cases


# Files.

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(array, depth, color, extra=b""):
    """A PNG of any depth and colour type (Pillow writes few of them): rows of packed samples."""
    height, width = array.shape[:2]
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in array]
    elif depth == 8:
        rows = [row.astype(np.uint8).tobytes() for row in array]
    else:
        bits = ((array[..., None] >> np.arange(depth - 1, -1, -1)) & 1).reshape(height, -1)
        rows = [np.packbits(row).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg_440(image):
    """Chroma at half the rows: Pillow writes none, so that the factors of a 4:2:2 file of the turned picture are turned."""
    data = bytearray(encoded(image, "JPEG", quality=92, subsampling=1))
    frame = data.index(b"\xff\xc0")
    assert data[frame + 11] == 0x21
    data[frame + 11] = 0x12
    # Units are now 8 x 16 pixels: the size is chosen so that there are as many as before.
    across, down = (image.width + 15) // 16, (image.height + 7) // 8
    struct.pack_into(">HH", data, frame + 5, across * 16 - 3, down * 8 - 2)
    return bytes(data)


def files():
    base = Image.fromarray(picture(23, 17))
    smooth = base.resize((46, 34), Image.Resampling.BICUBIC)
    alpha = Image.fromarray(picture(23, 17, 3)[..., 0])
    rgba, grey = base.copy(), base.convert("L")
    rgba.putalpha(alpha)
    grey_alpha = Image.merge("LA", (grey, alpha))
    palette = base.quantize(40)
    deep = np.random.default_rng(1).integers(0, 65536, (17, 23, 4))
    deep[::2] //= 200
    exif = Image.Exif()
    exif[0x0112] = 6
    colours = chunk(b"PLTE", bytes(range(48)))
    out = {
        "rgb.png": encoded(base, "PNG"), "rgba.png": encoded(rgba, "PNG"), "grey.png": encoded(grey, "PNG"),
        "grey_alpha.png": encoded(grey_alpha, "PNG"), "palette.png": encoded(palette, "PNG"),
        "palette_transparent.png": encoded(palette, "PNG", transparency=bytes(range(0, 240, 6))),
        "grey_transparent.png": png(np.array(grey), 8, 0, chunk(b"tRNS", struct.pack(">H", 40))),
        "bit.png": encoded(base.convert("1"), "PNG"), "grey2.png": png(np.array(grey) >> 6, 2, 0),
        "grey4.png": png(np.array(grey) >> 4, 4, 0), "palette4.png": png(np.array(grey) >> 4, 4, 3, colours),
        "grey16.png": png(deep[..., 0], 16, 0), "grey16_alpha.png": png(deep[..., :2], 16, 4),
        "grey16_transparent.png": png(deep[..., 0], 16, 0, chunk(b"tRNS", struct.pack(">H", int(deep[0, 0, 0])))),
        "rgb16.png": png(deep[..., :3], 16, 2), "rgba16.png": png(deep, 16, 6),
        "exif.png": encoded(base, "PNG", exif=exif),
        "plain.gif": encoded(base, "GIF"), "transparent.gif": encoded(palette, "GIF", transparency=3),
        "rgb.bmp": encoded(base, "BMP"), "palette.bmp": encoded(palette, "BMP"), "bit.bmp": encoded(base.convert("1"), "BMP"),
        "lossless.webp": encoded(rgba, "WEBP", lossless=True, exact=True),
        "lossy.webp": encoded(smooth, "WEBP", quality=90),
        "444.jpg": encoded(smooth, "JPEG", quality=92, subsampling=0),
        "422.jpg": encoded(smooth, "JPEG", quality=92, subsampling=1),
        "420.jpg": encoded(smooth, "JPEG", quality=92, subsampling=2),
        "440.jpg": jpeg_440(smooth), "restarts.jpg": encoded(smooth, "JPEG", quality=60, restart_marker_blocks=2),
        "optimized.jpg": encoded(smooth.resize((131, 77)), "JPEG", quality=97, optimize=True),
        "narrow.jpg": encoded(smooth.crop((0, 0, 3, 34)), "JPEG", quality=92, subsampling=2),
        "pixel.jpg": encoded(smooth.crop((0, 0, 1, 1)), "JPEG", quality=92, subsampling=2),
        "progressive_low.jpg": encoded(smooth.resize((67, 90)), "JPEG", quality=35, progressive=True, subsampling=1),
        "rgb.jpg": encoded(smooth, "JPEG", quality=92, keep_rgb=True),
        "progressive_cmyk.jpg": encoded(smooth.convert("CMYK"), "JPEG", quality=80, progressive=True),
        "coarse.jpg": encoded(smooth, "JPEG", quality=1),
        "progressive.jpg": encoded(smooth, "JPEG", quality=92, progressive=True),
        "grey.jpg": encoded(smooth.convert("L"), "JPEG", quality=92),
        "cmyk.jpg": encoded(smooth.convert("CMYK"), "JPEG", quality=92),
        "exif.jpg": encoded(smooth, "JPEG", quality=92, exif=exif),
    }
    cases = []
    for name, data in out.items():
        (HERE / name).write_bytes(data)
        image = Image.open(io.BytesIO(data))
        rgb = np.array(image.convert("RGB"))
        case = {"name": name, "mode": image.mode, "width": rgb.shape[1], "height": rgb.shape[0], "digest": digest(rgb)}
        if name.startswith("exif"):
            case["upright"] = digest(np.array(ImageOps.exif_transpose(image).convert("RGB")))
        cases.append(case)
    return cases


def animations():
    frames = [Image.fromarray(picture(23, 17, 5 * n)).quantize(16).convert("RGB") for n in range(6)]
    moving = [frames[0].copy() for _ in range(6)]
    for n, frame in enumerate(moving):
        frame.paste((255, 10 * n, 0), (2 * n, n, 2 * n + 5, n + 5))
    clear = [frame.copy() for frame in moving]
    for n, frame in enumerate(clear):
        frame.putalpha(Image.fromarray(picture(23, 17, n)[..., 0]))
    rest = dict(save_all=True, duration=200, loop=0)
    out = {
        "whole.gif": encoded(frames[0], "GIF", append_images=frames[1:], **rest),
        "moving.gif": encoded(moving[0], "GIF", append_images=moving[1:], **rest),
        "dispose.gif": encoded(moving[0], "GIF", append_images=moving[1:], disposal=2, **rest),
        "moving.webp": encoded(moving[0], "WEBP", append_images=moving[1:], lossless=True, minimize_size=True, **rest),
        "lossy_alpha.webp": encoded(clear[0], "WEBP", append_images=clear[1:], quality=90, kmin=3, kmax=5, **rest),
        "whole.webp": encoded(frames[0], "WEBP", append_images=frames[1:], lossless=True, **rest),
        "moving.apng": encoded(moving[0], "PNG", append_images=moving[1:], **rest),
    }
    cases = []
    for name, data in out.items():
        (HERE / name).write_bytes(data)
        image = Image.open(io.BytesIO(data))
        shown = []
        for number in range(image.n_frames):
            image.seek(number)
            shown.append(digest(np.array(image.convert("RGB"))))
        cases.append({"name": name, "frames": shown, "fps": 5.0})
    return cases


def clips():
    """MP4 files of 40 frames at 10 frames a second in groups of 16, with frames that are shown after later ones."""
    cases = []
    for name, codec, options in [
        ("reordered.mp4", "libx264", {"crf": "20", "bf": "3", "g": "16", "keyint_min": "16", "sc_threshold": "0"}),
        ("baseline.mp4", "libx264", {"crf": "20", "profile": "baseline", "g": "16"}),
        ("fragmented.mp4", "libx264", {"crf": "40", "g": "16"}),
        ("mpeg4.mp4", "mpeg4", {}),
    ]:
        path = HERE / name
        container = {"movflags": "frag_keyframe+empty_moov"} if name.startswith("fragmented") else {}
        with av.open(str(path), "w", options=container) as file:
            stream = file.add_stream(codec, rate=10, options=options)
            stream.width, stream.height, stream.pix_fmt = 46, 34, "yuv420p"
            for number in range(40):
                # The number of a frame shows in its brightness.
                level = np.full((34, 46, 3), 20 + 5 * number, dtype=np.uint8)
                level[8:20, (number % 30):(number % 30) + 12] = (200, 90, 30)
                for packet in stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")):
                    file.mux(packet)
            for packet in stream.encode():
                file.mux(packet)
        with av.open(str(path)) as file:
            shown = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        cases.append({
            "name": name, "means": [[float(c) for c in frame.mean((0, 1))] for frame in shown],
            "corners": [frame[30, 40].tolist() for frame in shown], "fps": 10.0,
        })
    return cases


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir(parents=True)
    plans()
    document = {
        "sides": SIDES, "bounds": BOUNDS, "resampled": resampled(), "qwen_pictures": qwen_pictures(),
        "qwen_videos": qwen_videos(), "one_vision": one_vision(), "one_vision_videos": one_vision_videos(),
        "sampling": sampling(), "files": files(), "animations": animations(), "clips": clips(),
    }
    # One line for each case, so that a change shows which.
    lines = []
    for key, value in document.items():
        entries = value if isinstance(value, list) and value and isinstance(value[0], dict) else None
        body = json.dumps(value) if entries is None else "[\n" + ",\n".join(json.dumps(e) for e in entries) + "\n]"
        lines.append(f"{json.dumps(key)}: {body}")
    (HERE / "cases.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(sum(path.stat().st_size for path in HERE.iterdir()), "bytes")


if __name__ == "__main__":
    main()

"""Writes fixtures/: what transformers computes for a tiny Qwen2.5-VL, so that parity.rs can compare without Python.

    pip install transformers==4.57.3 torch pillow==11.3.0 safetensors numpy
    python make_fixtures.py

Weights, pixels and pictures come from a formula (`draw`) that parity.rs repeats, so that only results are stored:
positions, vision features, logits, the norm of each parameter's gradient and its product with a drawn vector, and
pictures resized by Pillow.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

HERE = Path(__file__).parent / "fixtures"
IMAGE, VIDEO, START = 90, 91, 92

TEXT = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=512,
    rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, tie_word_embeddings=False,
)
VISION = dict(
    depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=14, window_size=112,
    spatial_merge_size=2, temporal_patch_size=2, in_channels=3, tokens_per_second=2, fullatt_block_indexes=[1],
)

# Name, parts (a number is that many text tokens, a tuple a grid; the third axis of a video is its frames > 1).
CASES = [
    ("text", [12]),
    ("image", [3, (1, 4, 4), 5]),
    ("ragged_windows", [2, (1, 12, 20), 3]),
    ("two_images", [2, (1, 4, 6), 3, (1, 8, 4), 4]),
    ("video", [2, (3, 4, 4), 4]),
]
GRADIENT_CASE = "two_images"
RESIZES = [(8, 8, 56, 56), (61, 100, 56, 112), (300, 200, 84, 56), (90, 57, 28, 140)]


def draw(name, count):
    """Numbers in [-0.5, 0.5), multiples of 2^-24, from a hash of the name and the index."""
    seed = 0x811C9DC5
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x01000193) & 0xFFFFFFFF
    x = (np.arange(count, dtype=np.uint64) * 2654435761 + seed) & 0xFFFFFFFF
    for shift, factor in [(16, 0x85EBCA6B), (13, 0xC2B2AE35)]:
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    x ^= x >> 16
    return ((x >> 8).astype(np.float64) / 2**24 - 0.5).astype(np.float32)


def parameter(name, shape):
    values = draw(name, math.prod(shape))
    if len(shape) == 1:
        values = values * np.float32(0.5)
        return values + np.float32(1.0) if name.endswith("weight") else values
    scale = 2.0 ** round(math.log2(3.4 / math.sqrt(math.prod(shape[1:]))))
    return values * np.float32(scale)


def hub_name(name):
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def build():
    config = Qwen2_5_VLConfig(
        text_config=TEXT, vision_config=VISION, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(parameter(hub_name(name), tuple(p.shape)).reshape(tuple(p.shape))))
    return model


def inputs(name, parts):
    ids, grids, pixels = [], {"image": [], "video": []}, {"image": [], "video": []}
    for part in parts:
        if isinstance(part, int):
            ids += [(7 * (len(ids) + k) + 3) % 88 for k in range(part)]
            continue
        kind = "video" if part[0] > 1 else "image"
        patches = math.prod(part)
        count = sum(map(len, grids.values()))
        pixels[kind].append(draw(f"{name}/pixels/{count}", patches * 1176).reshape(patches, 1176) * np.float32(4.0))
        grids[kind].append(part)
        ids += [START] + [IMAGE if kind == "image" else VIDEO] * (patches // 4)
    arguments = dict(input_ids=torch.tensor([ids]))
    for kind, key in [("image", "pixel_values"), ("video", "pixel_values_videos")]:
        if grids[kind]:
            arguments[key] = torch.from_numpy(np.concatenate(pixels[kind]))
            arguments[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
    if grids["video"]:
        arguments["second_per_grid_ts"] = torch.tensor([1.0])
    return ids, arguments


def main():
    model = build()
    tensors, cases, gradients = {}, [], {}
    for name, parts in CASES:
        ids, arguments = inputs(name, parts)
        rope = {k: v for k, v in arguments.items() if k.endswith("thw") or k == "second_per_grid_ts"}
        positions, _ = model.model.get_rope_index(arguments["input_ids"], **rope)
        output = model(**arguments, labels=arguments["input_ids"])
        tensors[f"{name}.logits"] = output.logits[0].detach().numpy().copy()
        tensors[f"{name}.positions"] = positions[:, 0].to(torch.int32).numpy().copy()
        if len(arguments) > 1:
            key = "pixel_values" if "pixel_values" in arguments else "pixel_values_videos"
            grid = arguments["image_grid_thw" if key == "pixel_values" else "video_grid_thw"]
            tensors[f"{name}.features"] = model.visual(arguments[key], grid_thw=grid).detach().numpy().copy()
        if name == GRADIENT_CASE:
            output.loss.backward()
            for parameter_name, p in model.named_parameters():
                hub, g = hub_name(parameter_name), p.grad.double().flatten()
                probe = torch.from_numpy(draw(f"{hub}/probe", g.numel())).double()
                gradients[hub] = [g.norm().item(), (g * probe).sum().item()]
        cases.append(dict(name=name, parts=parts, ids=ids, loss=output.loss.item()))
    for height, width, to_height, to_width in RESIZES:
        name = f"resize.{height}x{width}.{to_height}x{to_width}"
        picture = ((draw(name, height * width * 3) + np.float32(0.5)) * np.float32(256)).astype(np.uint8)
        picture = Image.fromarray(picture.reshape(height, width, 3)).resize((to_width, to_height), Image.BICUBIC)
        tensors[name] = np.asarray(picture).copy()
    HERE.mkdir(exist_ok=True)
    save_file(tensors, HERE / "qwen2_5_vl.safetensors")
    document = dict(text=TEXT, vision=VISION, image_token_id=IMAGE, video_token_id=VIDEO,
                    vision_start_token_id=START, cases=cases, gradient_case=GRADIENT_CASE, gradients=gradients)
    (HERE / "qwen2_5_vl.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

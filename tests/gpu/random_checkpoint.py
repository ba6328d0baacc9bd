"""A checkpoint of random weights in the shape of a released Qwen2.5-VL, with the tokenizer and chat template of a tiny one.

    python tests/gpu/random_checkpoint.py 72b tests/parity/fixtures/tiny-qwen2.5-vl /tmp/72b

What loads, serves or measures a large model can be tried with it before 145 GB are downloaded. One file per layer, written by as
many processes as there are processors; 72B is 147 GB. Needs numpy.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import struct
import time
from pathlib import Path

import numpy

# Of the config.json of each: https://huggingface.co/Qwen/Qwen2.5-VL-72B-Instruct and its siblings.
SHAPES = {
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
           "vocab_size": 151936, "max_position_embeddings": 128000},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
           "vocab_size": 152064, "max_position_embeddings": 128000},
    "72b": {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
            "vocab_size": 152064, "max_position_embeddings": 128000},
}
VISION = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "fullatt_block_indexes": [7, 15, 23, 31]}
VISION_MLP = {"3b": 3420, "7b": 3420, "72b": 3456}
TIED = {"3b"}
HEAD = 128
# Numbers drawn at once.
CHUNK = 1 << 22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("tiny", type=Path, help="directory of the tiny checkpoint: its names of tensors and its other files")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="fewer than the released one has, for a look")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()

    begun = time.monotonic()
    asked.out.mkdir(parents=True, exist_ok=True)
    for file in asked.tiny.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, asked.out)
    old = json.loads((asked.tiny / "config.json").read_text())
    config = configured(old, asked.shape, asked.layers)
    (asked.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    files = list(filed(named(stored_names(asked.tiny / "model.safetensors"), old, config)).values())
    jobs = [(asked.out / f"model-{at + 1:05}-of-{len(files):05}.safetensors", tensors, asked.seed + at) for at, tensors in enumerate(files)]
    placed = {name: path.name for path, tensors, _ in jobs for name in tensors}
    bytes_ = sum(2 * math.prod(shape) for _, tensors, _ in jobs for shape in tensors.values())
    index = {"metadata": {"total_size": bytes_}, "weight_map": placed}
    (asked.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    with multiprocessing.Pool() as pool:
        for count, path in enumerate(pool.imap_unordered(write, jobs), 1):
            print(f"{time.monotonic() - begun:6.1f} s  {count} of {len(jobs)}: {path.name}", flush=True)
    spent = time.monotonic() - begun
    print(f"{bytes_ / 2e9:.2f} billion parameters in {asked.out}, {spent:.1f} s, {bytes_ / spent / 1e9:.2f} GB/s")


def configured(old: dict, shape: str, layers: int | None) -> dict:
    config = json.loads(json.dumps(old))
    text, vision = config["text_config"], config["vision_config"]
    text.update(SHAPES[shape], rope_scaling={"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"})
    text["num_hidden_layers"] = layers or text["num_hidden_layers"]
    text.pop("layer_types", None)
    vision.update(VISION, intermediate_size=VISION_MLP[shape], out_hidden_size=text["hidden_size"])
    config["tie_word_embeddings"] = shape in TIED
    return config


def stored_names(path: Path) -> dict[str, list[int]]:
    """Tensors of a safetensors file and their shapes."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: said["shape"] for name, said in header.items() if name != "__metadata__"}


def named(tiny: dict[str, list[int]], old: dict, config: dict) -> dict[str, list[int]]:
    """All tensors of the large one, by those of the tiny one."""
    tensors = {}
    for name, shape in tiny.items():
        if name.startswith("lm_head") and config["tie_word_embeddings"]:
            continue
        key, count = ("vision_config", "depth") if "visual" in name else ("text_config", "num_hidden_layers")
        shape = widened(name, shape, old[key], config)
        parts = name.split(".")
        at = next((index for index, part in enumerate(parts) if part.isdigit() and parts[index - 1] in ("layers", "blocks")), None)
        if at is None:
            tensors[name] = shape
        elif parts[at] == "0":
            tensors.update({".".join([*parts[:at], str(layer), *parts[at + 1:]]): shape for layer in range(config[key][count])})
    return tensors


def widened(name: str, shape: list[int], old: dict, config: dict) -> list[int]:
    text, vision = config["text_config"], config["vision_config"]
    of = vision if "visual" in name else text
    widths = {old["hidden_size"]: of["hidden_size"], old["intermediate_size"]: of["intermediate_size"]}
    if "k_proj" in name or "v_proj" in name:
        return [of["num_key_value_heads"] * HEAD, *(widths[size] for size in shape[1:])]
    if "embed_tokens" in name or "lm_head" in name:
        return [text["vocab_size"], text["hidden_size"]]
    if "patch_embed" in name:
        return [vision["hidden_size"], *shape[1:]]
    if "merger.mlp.0" in name:
        return [4 * vision["hidden_size"]] * len(shape)
    if "merger.mlp.2" in name:
        return [text["hidden_size"], 4 * vision["hidden_size"]][: len(shape)]
    if "attn.qkv" in name:
        return [3 * vision["hidden_size"], vision["hidden_size"]][: len(shape)]
    return [widths[size] for size in shape]


def filed(tensors: dict[str, list[int]]) -> dict[str, dict[str, list[int]]]:
    """Tensors by file: a layer of the language model each, the tower, and one file for each that stands alone."""
    files: dict[str, dict[str, list[int]]] = {}
    for name, shape in tensors.items():
        parts = name.split(".")
        alone = "visual" if "visual" in name else name
        file = ".".join(parts[: parts.index("layers") + 2]) if "layers" in parts else alone
        files.setdefault(file, {})[name] = shape
    return files


def write(job: tuple[Path, dict[str, list[int]], int]) -> Path:
    """One safetensors file: the length of the header, the header, then the numbers (https://github.com/huggingface/safetensors)."""
    path, tensors, seed = job
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = numpy.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.items():
            for begin in range(0, math.prod(shape), CHUNK):
                file.write(drawn(random, name, shape, min(CHUNK, math.prod(shape) - begin)))
    return path


def drawn(random: numpy.random.Generator, name: str, shape: list[int], count: int) -> bytes:
    """Numbers of a tensor in bf16: norms are one, biases zero, matrices keep the size of what goes through them."""
    if len(shape) == 1:
        values = numpy.full(count, 1.0 if "norm" in name or "ln_q" in name else 0.0, numpy.float32)
    else:
        wide = 0.02 if "embed_tokens" in name else math.prod(shape[1:]) ** -0.5
        values = random.standard_normal(count, numpy.float32) * numpy.float32(wide)
    return (values.view(numpy.uint32) >> 16).astype("<u2").tobytes()


if __name__ == "__main__":
    main()

"""A checkpoint of random weights with the sizes of Qwen2.5-VL-3B and the tokenizer of a tiny one, written on a GPU in seconds.

    python tests/gpu/random_checkpoint.py tests/parity/fixtures/tiny-qwen2.5-vl /tmp/three

Needs torch and safetensors.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

TEXT = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
}
VISION = {"depth": 8, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048, "fullatt_block_indexes": [7]}


def main() -> None:
    tiny, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    for file in tiny.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, out)
    config = json.loads((tiny / "config.json").read_text())
    old = {**config["text_config"]}, {**config["vision_config"]}
    config["text_config"].update(TEXT)
    config["text_config"].pop("layer_types", None)
    config["vision_config"].update(VISION)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    # Sizes of the tiny one by those of the large one: tensors are what they were with other sizes.
    text, vision = sizes(old[0], TEXT), sizes(old[1], VISION)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    tensors = {}
    with safe_open(tiny / "model.safetensors", "pt") as file:
        for name in file.keys():
            of_vision = "visual" in name
            layers = VISION["depth"] if of_vision else TEXT["num_hidden_layers"]
            shape = scaled(name, list(file.get_slice(name).get_shape()), vision if of_vision else text, vision, of_vision)
            parts = name.split(".")
            at = next((index for index, part in enumerate(parts) if part.isdigit() and parts[index - 1] in ("layers", "blocks")), None)
            if at is None:
                tensors[name] = draw(name, shape, device)
            elif parts[at] == "0":
                for layer in range(layers):
                    parts[at] = str(layer)
                    tensors[".".join(parts)] = draw(name, shape, device)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    print(f"{sum(tensor.numel() for tensor in tensors.values()) / 1e9:.2f} billion parameters in {out}")


def sizes(old: dict, new: dict) -> dict:
    """New widths by old ones."""
    found = {old["hidden_size"]: new["hidden_size"], old["intermediate_size"]: new["intermediate_size"]}
    if "num_key_value_heads" in new:
        old_head, new_head = old["hidden_size"] // old["num_attention_heads"], new["hidden_size"] // new["num_attention_heads"]
        found["keys"] = (old["num_key_value_heads"] * old_head, new["num_key_value_heads"] * new_head)
    return found


def scaled(name: str, shape: list[int], by: dict, vision: dict, of_vision: bool) -> list[int]:
    if "k_proj" in name or "v_proj" in name:
        return [by["keys"][1], *(by[size] for size in shape[1:])]
    if "embed_tokens" in name or "lm_head" in name:
        return [shape[0], by[shape[1]]]
    if "patch_embed" in name:
        return [VISION["hidden_size"], *shape[1:]]
    if "merger.mlp.0" in name:
        return [4 * VISION["hidden_size"]] * len(shape)
    if "merger.mlp.2" in name:
        return [TEXT["hidden_size"], 4 * VISION["hidden_size"]][: len(shape)]
    if "attn.qkv" in name:
        return [3 * VISION["hidden_size"], VISION["hidden_size"]][: len(shape)]
    return [by[size] for size in shape]


def draw(name: str, shape: list[int], device: str) -> torch.Tensor:
    if len(shape) == 1:
        ones = "norm" in name or "ln_q" in name
        return torch.ones(shape, dtype=torch.bfloat16) if ones else torch.zeros(shape, dtype=torch.bfloat16)
    inputs = torch.Size(shape[1:]).numel()
    wide = 0.02 if "embed_tokens" in name else inputs**-0.5
    return (torch.randn(shape, device=device) * wide).to(torch.bfloat16).cpu()


if __name__ == "__main__":
    main()

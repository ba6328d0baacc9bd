"""Writes fixtures/lora: an adapter for tiny-qwen2.5-vl as peft saves it, and the logits that it leads to.

`target_modules` is a list of suffixes, so that peft also adapts the MLPs of the vision tower.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # the adapter names its base by a name that the hub does not have

import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file

from cases import QWEN_CASES
from compact import compact
from make_checkpoints import FIXTURES, QWEN, on_grid
from make_fixtures import Qwen

LORA = FIXTURES / "lora"
CASES = ["text", "two_images"]


def logits(family, model, case):
    inputs = family.prepare(case)[1]
    positions = family.positions(inputs["input_ids"][0].tolist(), inputs, integer=False)
    with torch.no_grad():
        return model(**family.model_inputs(inputs, positions)).logits[0]


def main():
    family = Qwen(QWEN)
    cases = {case.name: case for case in QWEN_CASES if case.name in CASES}
    results = {}
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
                        target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    model = get_peft_model(family.model, config).eval()
    generator = torch.Generator().manual_seed(21)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                deviation = (0.15 if "lora_B" in name else 1.0) / parameter.shape[1] ** 0.5
                parameter.copy_(on_grid(torch.randn(parameter.shape, generator=generator), deviation))
    for name, case in cases.items():
        results |= compact(f"{name}.adapted", logits(family, model, case))
    model.peft_config["default"].target_modules = sorted(config.target_modules)
    model.peft_config["default"].base_model_name_or_path = QWEN.name
    model.save_pretrained(LORA)
    (LORA / "README.md").unlink(missing_ok=True)
    merged = model.merge_and_unload()
    for name, case in cases.items():
        results |= compact(f"{name}.merged", logits(family, merged, case))
    save_file(results, LORA / "logits.safetensors")
    for path in LORA.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main()

"""Opens in transformers or peft what flotilla-worker wrote, and compares logits with those that it computed.

    python check_export.py checkpoint DIR LOGITS.safetensors MESSAGES.json
    python check_export.py adapter CHECKPOINT ADAPTER LOGITS.safetensors MESSAGES.json

LOGITS is the output of `flotilla-worker logits --dtype f32` for the same directory and messages. Ends with an error when
a tensor is missing or unexpected, or a logit differs by more than 1e-4 of the largest.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import make_fixtures
from cases import Case

TOLERANCE = 1e-4


def opened(directory):
    model, report = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    problems = {key: sorted(map(str, names)) for key, names in report.items() if names}
    if problems:
        sys.exit(f"{directory} does not fit the model: {problems}")
    return model.eval()


def inputs_of(directory, messages):
    """The conversation through the reference's own processor, and the model's arguments."""
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    family = {"qwen2_5_vl": make_fixtures.Qwen, "llava_onevision": make_fixtures.Llava}[kind](directory)
    make_fixtures.CASES = messages.resolve().parent
    case = Case("export", json.loads(messages.read_text()))
    inputs = family.prepare(case)[1]
    positions = family.positions(inputs["input_ids"][0].tolist(), inputs, integer=False)
    return inputs["input_ids"][0], family.model_inputs(inputs, positions)


def compare(what, model, checkpoint, logits_file, messages):
    ids, arguments = inputs_of(checkpoint, messages)
    ours = load_file(logits_file)
    if ours["input_ids"].tolist() != ids.tolist():
        sys.exit(f"token ids differ:\n{ours['input_ids'].tolist()}\n{ids.tolist()}")
    with torch.no_grad():
        theirs = model(**arguments).logits[0]
    difference = ((ours["logits"].float() - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{what}: {len(ids)} tokens, largest difference of a logit {difference:.2e} of the largest logit")
    if not difference <= TOLERANCE:
        sys.exit(f"{what}: {difference} exceeds {TOLERANCE}")


def main():
    match sys.argv[1:]:
        case ["checkpoint", directory, logits, messages]:
            compare("checkpoint", opened(Path(directory)), Path(directory), logits, Path(messages))
        case ["adapter", checkpoint, adapter, logits, messages]:
            from peft import PeftModel

            model = PeftModel.from_pretrained(opened(Path(checkpoint)), adapter).eval()
            compare("adapter", model, Path(checkpoint), logits, Path(messages))
            compare("merged adapter", model.merge_and_unload(), Path(checkpoint), logits, Path(messages))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()

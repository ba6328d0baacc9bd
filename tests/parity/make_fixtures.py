"""Writes fixtures/cases: what transformers computes for the tiny checkpoints, so that the Rust tests need no Python.

    python make_media.py && python make_checkpoints.py && python make_fixtures.py

README.md says what a case holds.
"""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from cases import GRADIENTS, LEFT_PADDED, LLAVA_CASES, QWEN_CASES
from compact import compact, draw
from make_checkpoints import FIXTURES, LLAVA, QWEN

CASES = FIXTURES / "cases"
GREEDY = 24
# A greedy choice closer than this to the runner-up would not have to repeat elsewhere.
MARGIN = 5e-4
# Largest difference of a logit, relative to the largest logit, that the tests allow in f32.
TOLERANCE = 1e-4


class Family:
    """A checkpoint, its processor, and how its parts are called."""

    def __init__(self, directory):
        self.directory = directory
        self.processor = AutoProcessor.from_pretrained(directory, use_fast=False)
        self.model = self.load(torch.float32)
        self.text = self.model.model.language_model

    def load(self, dtype):
        model = AutoModelForImageTextToText.from_pretrained(self.directory, dtype=dtype, attn_implementation="eager")
        return model.eval()

    def streams(self, arguments):
        """The stream after each block of the tower and around each layer of the language model, and what comes of them."""
        seen, hooks = {}, []
        def keep(name, value):
            seen.setdefault(name, []).append(value.reshape(-1, value.shape[-1]))
        def after(name):
            return lambda module, inputs, output: keep(name, output[0] if isinstance(output, tuple) else output)
        for number, block in enumerate(self.vision_blocks):
            hooks.append(block.register_forward_hook(after(f"vision.{number + 1}")))
        for number, layer in enumerate([*self.text.layers, self.text.norm]):
            name = f"text.{number}"
            hooks.append(layer.register_forward_pre_hook(
                lambda module, inputs, kwargs, name=name: keep(name, inputs[0] if inputs else kwargs["hidden_states"]),
                with_kwargs=True))
        hooks.append(self.text.norm.register_forward_hook(after("hidden")))
        self.model(**arguments)
        for hook in hooks:
            hook.remove()
        return {name: torch.cat(values) for name, values in seen.items()}

    def visuals(self, messages):
        """Messages for the template, and the pictures and videos in the order of their parts."""
        converted, images, videos, rates = [], [], [], []
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                parts = []
                for part in content:
                    if part["type"] == "image_url":
                        images.append(Image.open(CASES / part["image_url"]["url"]))
                        parts.append({"type": "image"})
                    elif part["type"] == "video":
                        frames = [Image.open(CASES / frame) for frame in part["video"]]
                        videos.append(frames)
                        rates.append(part["fps"])
                        parts.append({"type": "video"})
                    else:
                        parts.append(part)
                content = parts
            converted.append({"role": message["role"], "content": content})
        return converted, images, videos, rates

    def prepare(self, case):
        messages, images, videos, rates = self.visuals(case.messages)
        template = self.older_template() if case.template == "older" else None
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                                  chat_template=template)
        arguments = dict(text=[text], return_tensors="pt", images=self.sample(images), videos=videos or None)
        if videos and self.rated:
            arguments["fps"] = rates
        return text, dict(self.processor(**arguments)), images, videos, rates


class Qwen(Family):
    name = "qwen2.5-vl"
    rated = True

    def sample(self, images):
        return images or None

    def older_template(self):
        raise NotImplementedError

    def hub_name(self, name):
        return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

    def positions(self, ids, inputs, integer):
        """Positions by the rule of the later releases (seconds stay fractions), or with seconds cut to integers."""
        config = self.model.config
        grids = {kind: iter(inputs.get(f"{kind}_grid_thw", torch.zeros(0)).tolist()) for kind in ("image", "video")}
        seconds = iter(inputs.get("second_per_grid_ts", []))
        columns, index, start = [], 0, 0
        while index < len(ids):
            kind = {config.image_token_id: "image", config.video_token_id: "video"}.get(ids[index])
            if kind is None:
                columns.append([start] * 3)
                index, start = index + 1, start + 1
                continue
            slices, rows, cells = next(grids[kind])
            rows, cells = rows // 2, cells // 2
            second = float(next(seconds)) if kind == "video" else 0.0
            second = int(second) if integer else second
            block = [
                [start + math.floor(t * second * config.vision_config.tokens_per_second), start + y, start + x]
                for t in range(slices) for y in range(rows) for x in range(cells)
            ]
            columns += block
            index, start = index + len(block), max(map(max, block)) + 1
        return torch.tensor(columns).T

    def model_inputs(self, inputs, positions):
        keep = ("input_ids", "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")
        return {key: inputs[key] for key in keep if key in inputs} | {"position_ids": positions[:, None]}

    def next_position(self, positions, step):
        return {"position_ids": torch.full((3, 1, 1), int(positions.max()) + 1 + step)}

    def describe(self, inputs, images, videos, rates, tensors):
        described = []
        for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if key not in inputs:
                continue
            rows = inputs[key].split(inputs[f"{kind}_grid_thw"].prod(-1).tolist())
            for number, (values, grid) in enumerate(zip(rows, inputs[f"{kind}_grid_thw"].tolist())):
                pixels = self.bytes_of(values.view(-1, 3, 2, 14, 14), channel=1)
                if kind == "image":
                    assert (pixels[:, :, 0] == pixels[:, :, 1]).all()
                    pixels = pixels[:, :, :1]
                tensors[f"pixels.{len(described)}"] = pixels
                entry = dict(kind=kind, grid=grid)
                if kind == "video":
                    entry["second_per_grid"] = 2 / rates[number]
                described.append(entry)
        return described

    def bytes_of(self, values, channel):
        """The bytes of which normalized values were made: nothing is lost."""
        processor = self.processor.image_processor
        shape = [1] * values.ndim
        shape[channel] = 3
        mean, std = (torch.tensor(v, dtype=torch.float64).view(shape)
                     for v in (processor.image_mean, processor.image_std))
        pixels = ((values.double() * std + mean) * 255).round().to(torch.uint8)
        assert ((pixels.double() / 255 - mean) / std - values.double()).abs().max() < 1e-6
        return pixels.numpy()

    @property
    def vision_blocks(self):
        return self.model.model.visual.blocks

    def features(self, inputs):
        visual = self.model.model.visual
        kinds = (("image", "pixel_values"), ("video", "pixel_values_videos"))
        return [visual(inputs[key], grid_thw=inputs[f"{kind}_grid_thw"]) for kind, key in kinds if key in inputs]

    def tables(self, inputs, positions, tensors):
        visual = self.model.model.visual
        for kind in ("image", "video"):
            if f"{kind}_grid_thw" not in inputs:
                continue
            grid = inputs[f"{kind}_grid_thw"]
            index, lengths = visual.get_window_index(grid)
            tensors[f"window_index.{kind}"] = index.numpy()
            tensors[f"window_ends.{kind}"] = np.unique(np.asarray(lengths)).astype(np.int64)
            tensors[f"vision_angles.{kind}"] = visual.rot_pos_emb(grid).numpy()
        rotary = self.text.rotary_emb
        cosine, sine = rotary(torch.zeros(1), positions[:, None])
        sections = self.model.config.text_config.rope_scaling["mrope_section"] * 2
        pick = lambda table: torch.cat([part[k % 3] for k, part in enumerate(table.split(sections, dim=-1))], -1)[0]
        tensors["rotary.cos"], tensors["rotary.sin"] = pick(cosine).numpy(), pick(sine).numpy()

    @contextlib.contextmanager
    def other_gelu(self, part):
        assert part == "merger"
        merger = self.model.model.visual.merger
        whole, merger.mlp[1] = merger.mlp[1], torch.nn.GELU(approximate="tanh")
        yield
        merger.mlp[1] = whole

    gelus = ["merger"]
    without_gradient = []


class Llava(Family):
    name = "llava-onevision"
    rated = False

    def sample(self, images):
        return [images] if images else None

    def older_template(self):
        path = FIXTURES / "llava-onevision-older.chat_template.json"
        return json.loads(path.read_text())["chat_template"]

    def hub_name(self, name):
        if name.startswith("model.language_model."):
            return name.replace("model.language_model.", "language_model.model.")
        return "language_model.lm_head.weight" if name == "lm_head.weight" else name.removeprefix("model.")

    def positions(self, ids, inputs, integer):
        return torch.arange(len(ids))

    def model_inputs(self, inputs, positions):
        return {key: value for key, value in inputs.items() if key != "attention_mask"}

    def next_position(self, positions, step):
        return {}

    def describe(self, inputs, images, videos, rates, tensors):
        described = []
        for number, image in enumerate(images):
            values = inputs["pixel_values"][number]
            if len(images) == 1:
                entry = dict(kind="anyres", tiles=len(values), height=image.height, width=image.width)
            else:
                values, entry = values[:1], dict(kind="square")
            tensors[f"pixels.{len(described)}"] = self.bytes_of(values)
            described.append(entry)
        for number, frames in enumerate(videos):
            tensors[f"pixels.{len(described)}"] = self.bytes_of(inputs["pixel_values_videos"][number])
            described.append(dict(kind="frames", frames=len(frames)))
        return described

    def bytes_of(self, values):
        pixels = ((values.double() * 0.5 + 0.5) * 255).round().to(torch.uint8)
        assert ((pixels.double() / 255 - 0.5) / 0.5 - values.double()).abs().max() < 1e-6
        return pixels.numpy()

    @property
    def vision_blocks(self):
        return self.model.model.vision_tower.vision_model.encoder.layers

    def features(self, inputs):
        model, parts = self.model.model, []
        if "pixel_values" in inputs:
            parts += model.get_image_features(
                inputs["pixel_values"], inputs["image_sizes"], batch_num_images=inputs["batch_num_images"])
        if "pixel_values_videos" in inputs:
            videos = model.get_video_features(inputs["pixel_values_videos"], -1, "full")
            parts += [torch.cat([video, model.image_newline[None]]) for video in videos]
        return parts

    def tables(self, inputs, positions, tensors):
        cosine, sine = self.text.rotary_emb(torch.zeros(1), positions[None])
        tensors["rotary.cos"], tensors["rotary.sin"] = cosine[0].numpy(), sine[0].numpy()

    @contextlib.contextmanager
    def other_gelu(self, part):
        if part == "projector":
            owners = [(self.model.model.multi_modal_projector, "act", torch.nn.GELU(approximate="tanh"))]
        else:
            owners = [(layer.mlp, "activation_fn", torch.nn.GELU()) for layer in self.vision_blocks]
        kept = [getattr(owner, name) for owner, name, _ in owners]
        for owner, name, other in owners:
            setattr(owner, name, other)
        yield
        for (owner, name, _), whole in zip(owners, kept):
            setattr(owner, name, whole)

    gelus = ["projector", "tower"]
    without_gradient = ["vision_tower.vision_model.post_layernorm.weight", "vision_tower.vision_model.post_layernorm.bias"]


def greedy(family, arguments, positions, name):
    """The most likely token, over and over, by the reference's own cache."""
    output = family.model(**arguments, use_cache=True)
    tokens, scale = [], output.logits.abs().max()
    for step in range(GREEDY):
        best = output.logits[0, -1].topk(2)
        margin = (best.values[0] - best.values[1]).item()
        assert margin > MARGIN, f"{name}: step {step} of the greedy continuation has margin {margin}"
        tokens.append(best.indices[0].item())
        output = family.model(input_ids=best.indices[None, :1], past_key_values=output.past_key_values,
                              use_cache=True, **family.next_position(positions, step))
    return tokens


def relative(other, logits):
    return ((other.float() - logits).norm() / logits.norm()).item()


def cast(arguments, dtype):
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in arguments.items()}


def run(family, halves, case):
    text, inputs, images, videos, rates = family.prepare(case)
    ids = inputs["input_ids"][0].tolist()
    positions = family.positions(ids, inputs, integer=False)
    arguments = family.model_inputs(inputs, positions)
    tensors = dict(input_ids=inputs["input_ids"][0].numpy(), position_ids=positions.numpy())
    for key in ("image_grid_thw", "video_grid_thw", "image_sizes"):
        if key in inputs:
            tensors[key] = inputs[key].numpy()
    meta = dict(name=case.name, messages=f"{family.name}.{case.name}.messages.json", template=case.template,
                text=text, visuals=family.describe(inputs, images, videos, rates, tensors))
    with torch.no_grad():
        logits = family.model(**arguments).logits[0]
        scale = logits.abs().max().item()
        tensors |= compact("logits", logits)
        meta["scale"], meta["deviation"] = scale, logits.std().item()
        if isinstance(family, Qwen):
            check_positions(family, inputs, positions, tensors, meta)
            if "second_per_grid_ts" in inputs:
                meta["second_per_grid_ts"] = [2 / rate for rate in rates]
        if "position_ids.integer" in tensors:
            other = dict(arguments, position_ids=torch.from_numpy(tensors["position_ids.integer"])[:, None])
            tensors |= compact("logits.integer", family.model(**other).logits[0])
        for name, stream in family.streams(arguments).items():
            tensors |= compact(name, stream)
        if meta["visuals"]:
            tensors |= compact("features", torch.cat(family.features(inputs)))
        if case.tables:
            family.tables(inputs, positions, tensors)
        tensors["greedy"] = np.array(greedy(family, arguments, positions, case.name))
        meta["errors"] = {
            name: relative(half(**cast(arguments, dtype)).logits[0], logits)
            for name, (dtype, half) in halves.items()
        }
        meta["gelu"] = {}
        for part in family.gelus if meta["visuals"] else []:
            with family.other_gelu(part):
                difference = (family.model(**arguments).logits[0] - logits).abs().max().item() / scale
            assert difference > 3 * TOLERANCE, f"{case.name}: the other GELU in the {part} moves logits by {difference}"
            meta["gelu"][part] = difference
    (CASES / meta["messages"]).write_text(json.dumps(case.messages, indent=1, ensure_ascii=False) + "\n")
    path = CASES / f"{family.name}.{case.name}.safetensors"
    # Views would be written with the bytes of their base.
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    path.chmod(0o644)
    return meta, inputs


def check_positions(family, inputs, positions, tensors, meta):
    """Our positions are the reference's, but for seconds that it cuts to integers."""
    ids = inputs["input_ids"][0].tolist()
    integer = family.positions(ids, inputs, integer=True)
    reference, delta = family.model.model.get_rope_index(
        inputs["input_ids"], inputs.get("image_grid_thw"), inputs.get("video_grid_thw"),
        second_per_grid_ts=inputs.get("second_per_grid_ts"))
    assert torch.equal(reference[:, 0], integer)
    meta["rope_delta"] = int(positions.max()) + 1 - len(ids)
    assert meta["rope_delta"] == delta.item() or not torch.equal(positions, integer)
    if not torch.equal(positions, integer):
        tensors["position_ids.integer"] = integer.numpy()


def gradients(family, case):
    """Norm of the gradient of the mean cross entropy of a case by each parameter, and its product with a drawn vector."""
    inputs = family.prepare(case)[1]
    positions = family.positions(inputs["input_ids"][0].tolist(), inputs, integer=False)
    family.model.zero_grad()
    output = family.model(**family.model_inputs(inputs, positions), labels=inputs["input_ids"])
    output.loss.backward()
    found = {}
    for name, parameter in family.model.named_parameters():
        name = family.hub_name(name)
        if parameter.grad is None:
            assert name in family.without_gradient, name
            found[name] = None
            continue
        gradient = parameter.grad.double().flatten()
        probe = torch.from_numpy(draw(f"{name}/probe", gradient.numel())).double()
        found[name] = [gradient.norm().item(), (gradient * probe).sum().item()]
    family.model.zero_grad()
    return dict(loss=output.loss.item(), parameters=found)


def left_padded(family, cases):
    """Largest difference of a logit between the reference's own padded batch and its single rows."""
    prepared = [family.prepare(case)[:3] for case in cases]
    texts = [text for text, _, _ in prepared]
    singles = [inputs for _, inputs, _ in prepared]
    images = [image for _, _, images in prepared for image in images]
    nested = [images for _, _, images in prepared if images]
    family.processor.tokenizer.padding_side = "left"
    batch = dict(family.processor(text=texts, images=images if isinstance(family, Qwen) else nested, padding=True,
                                  return_tensors="pt"))
    logits = family.model(**batch).logits
    worst = 0.0
    for row, single in enumerate(singles):
        alone = family.model(**single).logits[0]
        worst = max(worst, (logits[row, -len(alone):] - alone).abs().max().item())
    assert worst < 2e-5, worst
    return worst


def write(family, cases):
    halves = {name: (dtype, family.load(dtype)) for name, dtype in
              (("bf16", torch.bfloat16), ("f16", torch.float16))}
    by_name = {case.name: case for case in cases}
    document = dict(
        parameters={family.hub_name(name): list(p.shape) for name, p in sorted(family.model.named_parameters())},
        cases=[run(family, halves, case)[0] for case in cases],
        gradients={name: gradients(family, by_name[name]) for name in GRADIENTS[family.name]},
    )
    with torch.no_grad():
        document["left_padded_batch"] = left_padded(family, [by_name[name] for name in LEFT_PADDED])
    (CASES / f"{family.name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    for case in document["cases"]:
        print(f"{family.name:16} {case['name']:20} scale {case['scale']:.2f} std {case['deviation']:.2f} "
              f"errors {case['errors']} gelu {case['gelu']}")


def main():
    torch.manual_seed(0)
    for old in CASES.glob("*.*"):
        old.unlink()
    write(Qwen(QWEN), QWEN_CASES)
    write(Llava(LLAVA), LLAVA_CASES)


if __name__ == "__main__":
    main()

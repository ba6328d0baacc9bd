"""Writes fixtures/tiny-*: small random checkpoints in the directory layout of the Hugging Face hub.

Each directory is what `save_pretrained` of model, processor and generation config leaves. Weights are whole multiples
of a power of two with at most seven bits, so that f32, f16 and bf16 hold the same values; special tokens keep their
order from the real vocabulary but follow a byte-level BPE of 490 tokens that is trained here.
"""

import json
import math
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor, Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2TokenizerFast, Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor, SiglipVisionConfig,
)

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
QWEN = FIXTURES / "tiny-qwen2.5-vl"
LLAVA = FIXTURES / "tiny-llava-onevision"

BASE_VOCABULARY = 490
VOCABULARY = 512

QWEN_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]
QWEN_ADDED = ["<tool_call>", "</tool_call>"]
LLAVA_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]

# Splits contractions, words with one leading sign or blank, single digits, runs of signs, line ends, and blanks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CORPUS = [
    "You are a helpful assistant. Which of the two answers describes the picture better?",
    "The user asks how many red circles and blue squares are in the image; count them and explain the reasoning.",
    "system\nuser\nassistant\nsystem\nuser\nassistant\n",
    "Answer 1 is correct, Answer 2 is not. Think step by step, then write the final answer in a box.",
    "What is shown in this picture? What happens in this video? Describe the first frame and the last frame.",
    "It's a cat, they're dogs, we've seen 3.14159 and 2,718 of 100%.",
    "naïve café, résumé, Ångström, über, façade",
    "Привет мир, как дела? שלום עולם مرحبا بالعالم 你好世界 こんにちは",
    "    indented\n\n\ttabs\r\nlines  \n",
]

QWEN_TEMPLATE = """\
{%- set counts = namespace(image=0, video=0) -%}
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{%- set counts.image = counts.image + 1 -%}
{%- if add_vision_id -%}{{- 'Picture ' ~ counts.image ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' or 'video' in part -%}
{%- set counts.video = counts.video + 1 -%}
{%- if add_vision_id -%}{{- 'Video ' ~ counts.video ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

LLAVA_TEMPLATE = """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\\n' }}{% endfor %}
{%- if message['role'] != 'assistant' %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}
{%- else %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}
{%- generation %}{{ part['text'] }}{% endgeneration %}
{%- endfor %}
{%- endif %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# An older form: a blank instead of the line end after the role, no line end between turns.
LLAVA_OLDER_TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + part['text'] }}{% endfor %}\
{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


# Where the exact and the approximate GELU differ most relative to their size: around -1.5. What follows is louder.
BEFORE_GELU = ("merger.mlp.0.bias", "linear_1.bias", "fc1.bias")
AFTER_GELU = ("merger.mlp.2.weight", "linear_2.weight", "fc2.weight")


def trained_tokenizer(special, added):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=BASE_VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == BASE_VOCABULARY
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return tokenizer


def on_grid(values, deviation):
    """`values` times `deviation`, rounded to multiples of a power of two of which 127 span four deviations."""
    step = 2.0 ** math.ceil(math.log2(4 * deviation / 127))
    return (values * deviation / step).round().clamp(-127, 127) * step


def draw_weights(model, seed, embedding, head):
    """Draws every parameter, in the order of the names; nothing is zero, one, or equal in two places."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight") or ".norm" in name or "layer_norm" in name or "layernorm" in name or "ln_q" in name:
                base = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(on_grid(values, 0.25).clamp(-0.9, 0.96) + base)
            elif name.endswith("embed_tokens.weight"):
                parameter.copy_(on_grid(values, embedding))
            elif name.endswith("lm_head.weight"):
                parameter.copy_(on_grid(values, head / math.sqrt(parameter.shape[1])))
            elif name.endswith(BEFORE_GELU):
                parameter.copy_(on_grid(values, 0.3) - 1.5)
            elif parameter.ndim == 1 or "position_embedding" in name:
                parameter.copy_(on_grid(values, 0.3))
            elif name.endswith(AFTER_GELU):
                parameter.copy_(on_grid(values, 4 / math.sqrt(parameter.shape[1])))
            elif name.endswith("linear_1.weight"):
                parameter.copy_(on_grid(values, 0.4 / math.sqrt(parameter.shape[1])))  # its input is not normalized
            else:
                parameter.copy_(on_grid(values, 1.25 / math.sqrt(parameter[0].numel())))
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                parameter[BASE_VOCABULARY:] *= 0.25  # greedy continuations are of text


def save(model, processor, generation, directory):
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.iterdir():
        old.unlink()
    for parameter in model.parameters():
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(parameter, parameter.to(dtype).float())
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = generation
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)


def qwen():
    tokenizer = trained_tokenizer(QWEN_SPECIAL, QWEN_ADDED)
    ids = {token: tokenizer.token_to_id(token) for token in QWEN_SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=4096,
            max_window_layers=2, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
            tie_word_embeddings=False, bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
        ),
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=14,
            window_size=112, spatial_merge_size=2, temporal_patch_size=2, in_channels=3, tokens_per_second=2,
            fullatt_block_indexes=[1],
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        vision_token_id=ids["<|vision_pad|>"], tie_word_embeddings=False,
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    draw_weights(model, seed=11, embedding=1.0, head=1.0)
    fast = Qwen2TokenizerFast(
        tokenizer_object=tokenizer, unk_token=None, bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=QWEN_SPECIAL[1:], model_max_length=4096,
    )
    bounds = dict(min_pixels=56 * 56, max_pixels=64 * 28 * 28)
    frames = dict(min_pixels=56 * 56, max_pixels=16 * 28 * 28)
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**bounds), tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(**frames, size={}), chat_template=QWEN_TEMPLATE,
    )
    generation = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], do_sample=True, temperature=1e-6,
        repetition_penalty=1.05,
    )
    save(model, processor, generation, QWEN)


def llava():
    tokenizer = trained_tokenizer(LLAVA_SPECIAL, [])
    ids = {token: tokenizer.token_to_id(token) for token in LLAVA_SPECIAL}
    side = 56
    pinpoints = [[side * rows, side * columns] for rows in range(1, 7) for columns in range(1, 7)]
    config = LlavaOnevisionConfig(
        text_config=dict(
            model_type="qwen2", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6,
            max_position_embeddings=4096, max_window_layers=2, tie_word_embeddings=True,
            bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
        ),
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, image_size=side, patch_size=14, vision_use_head=False,
        ),
        image_token_index=ids["<image>"], video_token_index=ids["<video>"], image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True,
    )
    assert isinstance(config.vision_config, SiglipVisionConfig)
    model = LlavaOnevisionForConditionalGeneration(config).float()
    draw_weights(model, seed=13, embedding=0.2, head=1.0)
    fast = Qwen2TokenizerFast(
        tokenizer_object=tokenizer, unk_token=None, bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=LLAVA_SPECIAL[1:], model_max_length=4096,
    )
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": side, "width": side})
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**half, image_grid_pinpoints=pinpoints), tokenizer=fast,
        video_processor=LlavaOnevisionVideoProcessor(**half), num_image_tokens=16,
        vision_feature_select_strategy="full", chat_template=LLAVA_TEMPLATE,
    )
    generation = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], do_sample=True, temperature=0.7, top_p=0.8, top_k=20,
        repetition_penalty=1.1,
    )
    save(model, processor, generation, LLAVA)
    older = json.dumps({"chat_template": LLAVA_OLDER_TEMPLATE}, indent=2)
    (FIXTURES / "llava-onevision-older.chat_template.json").write_text(older + "\n")


if __name__ == "__main__":
    qwen()
    llava()

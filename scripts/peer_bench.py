"""What Hugging Face transformers does on this card, at the shape of Qwen2.5-VL-7B, for comparison with `flotilla-worker bench`.

Weights are random and made on the card: nothing is downloaded. Needs PyTorch and transformers, nothing of Flotilla.
"""

import argparse
import contextlib
import fnmatch
import gc
import inspect
import itertools
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time

EPILOG = """
rows (choose with --what; * and ? match, a comma separates):
  ceiling copy, ceiling matmul   what the card reaches: a copy of 2 GiB (bytes read and written), bf16 8192 x 8192 x 8192
  prefill 1x4096, 8x2048         prompt tokens a second through the language model, logits of the last token, cache filled
  decode static N                tokens a second of N sequences with 1,024 tokens of context: generate(cache_implementation=
                                 "static"), which compiles the forward pass with CUDA graphs; median time between two tokens
                                 after the compilation, without prefill
  decode eager N                 the same with the default cache and no compilation
  decode batch N                 N requests of 1,024 tokens, 128 new tokens each, by continuous batching (generate_batch):
                                 new tokens over the whole time, prefill included, captured graphs excluded
  group picture static N         N samples of 256 tokens of one prompt of 1,536, 1,369 of which are a picture of 1,036 x 1,036
                                 (num_return_sequences), static cache: new tokens over the whole time, from pixels on the card;
                                 prefill included, compilation excluded. As many at a time as fit
  group prefix static N          the same where the prompt with its picture is computed once and its keys and values are repeated
                                 for the samples, as generate does not do by itself
  group static N                 as group picture static N with a prompt of text
  group batch N                  the same by generate_batch
  vision N                       pictures a second of 1,036 x 1,036 (5,476 patches) through the vision tower, N at a time
  train 8x2048                   forward, backward with gradient checkpointing, clipping and optimizer over 8 x 2,048 tokens,
                                 vision frozen; model FLOPs: 6 a parameter and token and 6 T^2 hidden a layer, no recomputation
  grpo 8x8x256                   8 prompts of 512 tokens, 8 samples of 256 tokens each, one update: tokens of prompts and
                                 samples over the whole time

Rows are measured in a process of their own, which is ended with a row that fails or takes too long.

examples:
  python3 scripts/peer_bench.py --quick                           under three minutes on an H100
  python3 scripts/peer_bench.py --json peer.jsonl                 everything that fits into --seconds, most useful rows first
  python3 scripts/peer_bench.py --what 'ceiling*,decode static 1'
  python3 scripts/peer_bench.py --shape tiny --device cpu         does it run at all
"""

QUICK = "ceiling*,prefill*,decode static 1,decode static 32,decode eager 1,vision*,train*"

# In order: what the goals ask for comes first; rows that are decoded by the same compiled code follow one another.
ROWS = [
    ("ceiling copy", "copy", {}),
    ("ceiling matmul", "matmul", {}),
    ("group picture static 8", "group", {"samples": 8, "picture": True}),
    ("group static 8", "group", {"samples": 8}),
    ("group prefix static 8", "prefix", {"samples": 8}),
    ("group picture static 128", "group", {"samples": 128, "picture": True}),
    ("group static 128", "group", {"samples": 128}),
    ("group prefix static 128", "prefix", {"samples": 128}),
    ("grpo 8x8x256", "grpo", {}),
    ("decode static 1", "decode", {"batch": 1, "static": True}),
    ("decode static 32", "decode", {"batch": 32, "static": True}),
    ("decode static 128", "decode", {"batch": 128, "static": True}),
    ("prefill 1x4096", "prefill", {"batch": 1, "length": 4096}),
    ("prefill 8x2048", "prefill", {"batch": 8, "length": 2048}),
    ("vision 1", "vision", {"pictures": 1}),
    ("vision 4", "vision", {"pictures": 4}),
    ("train 8x2048", "train", {}),
    ("group batch 128", "continuous", {"requests": 1, "samples": 128, "context": 1536, "new": 256}),
    ("decode batch 128", "continuous", {"requests": 128}),
    ("group batch 8", "continuous", {"requests": 1, "samples": 8, "context": 1536, "new": 256}),
    ("decode batch 32", "continuous", {"requests": 32}),
    ("decode eager 1", "decode", {"batch": 1, "static": False}),
    ("decode static 256", "decode", {"batch": 256, "static": True}),
    ("decode static 8", "decode", {"batch": 8, "static": True}),
    ("decode eager 32", "decode", {"batch": 32, "static": False}),
    ("decode batch 256", "continuous", {"requests": 256}),
]

SHAPES = {
    "7b": {
        "text": {
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        "vision": {
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": 3584,
        },
        "tokens": {
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
        },
        "grid": 74,
        "divide": 1,
    },
    # For a look at the code on any machine: lengths are divided too.
    "tiny": {
        "text": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "vocab_size": 512,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        "vision": {
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 64,
        },
        "tokens": {
            "image_token_id": 510,
            "video_token_id": 511,
            "vision_start_token_id": 508,
            "vision_end_token_id": 509,
        },
        "grid": 8,
        "divide": 32,
    },
}


def say(text):
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", file=sys.stderr, flush=True)


BEGAN = time.monotonic()


class Peer:
    """The model and how it is measured."""

    def __init__(self, arguments):
        import torch

        self.torch = torch
        self.device = arguments.device
        self.cuda = arguments.device.startswith("cuda")
        self.attention = arguments.attention
        self.shape = SHAPES[arguments.shape]
        self.shape_name = {"7b": "qwen2.5-vl-7b"}.get(arguments.shape, arguments.shape)
        self.divide = self.shape["divide"]
        self._model = None
        # Samples that are decoded by what is compiled.
        self.compiled_for = None
        self.peak_flops = None

    @property
    def model(self):
        if self._model is None:
            self._model = self.build()
        return self._model

    def build(self):
        """Random weights in bf16, made where they stay."""
        import transformers

        try:
            from transformers.initialization import no_init_weights
        except ImportError:
            from transformers.modeling_utils import no_init_weights
        torch = self.torch
        transformers.utils.logging.set_verbosity_error()
        # As PyTorch's compiler advises: the angles of rotary embeddings are products in f32.
        torch.set_float32_matmul_precision("high")
        config = transformers.Qwen2_5_VLConfig(
            text_config=self.shape["text"], vision_config=self.shape["vision"], **self.shape["tokens"]
        )
        with no_init_weights(), torch.device(self.device):
            model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
                config, dtype=torch.bfloat16, attn_implementation=self.attention
            )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.02)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
        model.eval()
        settings = model.generation_config
        settings.eos_token_id, settings.pad_token_id, settings.do_sample = None, 0, False
        self.synchronize()
        say(f"model of {sum(p.numel() for p in model.parameters()) / 1e9:.2f} G parameters")
        return model

    def length(self, tokens):
        return max(tokens // self.divide, 4)

    def ids(self, batch, length):
        vocabulary = self.shape["text"]["vocab_size"]
        # Not 0: that is the padding, which would be masked.
        return self.torch.randint(1, vocabulary, (batch, length), device=self.device)

    def patches(self, grid):
        """Values of a picture's patches, and how many there are each way."""
        values = self.torch.randn(grid * grid, 3 * 2 * 14 * 14, dtype=self.torch.bfloat16, device=self.device)
        return values, self.torch.tensor([[1, grid, grid]], device=self.device)

    def prompt(self, length, grid=None):
        """Arguments of a forward pass or of `generate` for a prompt, with a picture at its beginning if it has a grid."""
        torch, tokens = self.torch, self.shape["tokens"]
        # Tokens that stand for pictures are the last of the vocabulary.
        ids = torch.randint(1, min(tokens.values()), (1, length), device=self.device)
        prompt = {"input_ids": ids}
        if grid is not None:
            first, last = 8, 8 + (grid // 2) ** 2
            ids[:, first - 1] = tokens["vision_start_token_id"]
            ids[:, first:last] = tokens["image_token_id"]
            ids[:, last] = tokens["vision_end_token_id"]
            prompt["pixel_values"], prompt["image_grid_thw"] = self.patches(grid)
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            # With text too: what is compiled for one serves the other.
            prompt["mm_token_type_ids"] = (ids == tokens["image_token_id"]).int()
        return prompt

    def synchronize(self):
        if self.cuda:
            self.torch.cuda.synchronize()

    def seconds(self, work, repeats=5, warm=2):
        """Median seconds of `work` on the card."""
        for _ in range(warm):
            work()
        times = []
        for _ in range(repeats):
            self.synchronize()
            if self.cuda:
                begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                work()
                end.record()
                self.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            else:
                begin = time.perf_counter()
                work()
                times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def wall(self, work):
        """Seconds until `work` is done, the host's included."""
        self.synchronize()
        begin = time.perf_counter()
        result = work()
        self.synchronize()
        return time.perf_counter() - begin, result

    def clean(self, samples=None):
        """Graphs, compiled code and gradients of the last row do not weigh on the next. What is compiled for so many samples of
        one prompt stays: making it takes most of a minute."""
        torch = self.torch
        stays = samples is not None and samples == self.compiled_for
        self.compiled_for = samples
        if self._model is not None:
            # The last of them would give every static cache the length of the longest so far.
            for name in ("_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
                if name in self._model.__dict__ and not stays:
                    delattr(self._model, name)
            self._model.zero_grad(set_to_none=True)
            self._model.requires_grad_(False)
            self._model.eval()
            self._model.gradient_checkpointing_disable()
            if hasattr(self._model, "_cached_continuous_batching_manager"):
                self._model.destroy_cached_continuous_batching_manager()
            if self._model.config._attn_implementation != self.attention:
                self._model.set_attn_implementation(self.attention)
        if not stays:
            torch.compiler.reset()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.expandable_segments(False)

    def expandable_segments(self, on):
        """Whether PyTorch's memory can be pieced together from parts."""
        torch = self.torch
        if self.cuda:
            older = torch.cuda.memory._set_allocator_settings
            getattr(torch._C, "_accelerator_setAllocatorSettings", older)(f"expandable_segments:{on}")

    # Rows: (value, unit, note).

    def copy(self):
        torch, size = self.torch, (2 << 30) // self.divide
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.seconds(lambda: target.copy_(source)) / 1e9, "GB/s", ""

    def matmul(self):
        torch, side = self.torch, 8192 // self.divide
        a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        self.peak_flops = 2 * side**3 / self.seconds(lambda: a @ b.T, repeats=11)
        return self.peak_flops / 1e12, "TFLOP/s", ""

    def prefill(self, batch, length):
        ids = self.ids(batch, self.length(length))
        model = self.model

        def work():
            with self.torch.inference_mode():
                model(input_ids=ids, use_cache=True, logits_to_keep=1)

        return ids.numel() / self.seconds(work, repeats=5, warm=2), "tokens/s", "eager"

    def vision(self, pictures):
        torch, vision = self.torch, self.model.model.visual
        values, sizes = self.patches(self.shape["grid"])
        patches, sizes = values.repeat(pictures, 1), sizes.repeat(pictures, 1)

        def work():
            with torch.inference_mode():
                vision(patches, grid_thw=sizes)

        return pictures / self.seconds(work, repeats=5, warm=2), "pictures/s", "eager"

    def settings(self, static, length, **more):
        """Arguments of `generate`; a static cache of `length` tokens is compiled and captured in graphs."""
        if static:
            more["cache_implementation"] = "static"
            if hasattr(self.model.generation_config, "max_cache_len"):
                more["max_cache_len"] = length
            more.update(self.compilation())
        return more

    def compilation(self):
        """Arguments of `generate` with which a forward pass over a static cache is compiled and captured in graphs."""
        from transformers.generation.configuration_utils import CompileConfig

        return {"compile_config": CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead")} if self.cuda else {}

    def decode(self, batch, static):
        from transformers import LogitsProcessor, LogitsProcessorList

        peer, stamps = self, []

        class Stamp(LogitsProcessor):
            """Marks the moment at which a token's logits are known."""

            def __call__(self, input_ids, scores):
                if peer.cuda:
                    stamps.append(peer.torch.cuda.Event(enable_timing=True))
                    stamps[-1].record()
                else:
                    stamps.append(time.perf_counter())
                return scores

        context, new = self.length(1024), 48 if static else 24
        ids = self.ids(batch, context)
        settings = self.settings(static, context + new, max_new_tokens=new)
        marks = LogitsProcessorList([Stamp()])
        wall, _ = self.wall(lambda: self.model.generate(ids, logits_processor=marks, **settings))
        between = itertools.pairwise(stamps)
        steps = [a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in between]
        # Compilation, warm-up and capture happen in the first steps.
        step = statistics.median(steps[len(steps) // 2 :])
        return batch / step, "tokens/s", f"{step * 1e3:.2f} ms a token, {wall:.0f} s with compilation"

    def group(self, samples, picture=False):
        """As a user calls `generate`; where that many copies of the prompt do not fit, in equal parts."""
        failure, at_once = None, samples
        while at_once >= 1:
            try:
                wall, warm = self.group_at_once(at_once, samples // at_once, picture)
            except self.torch.OutOfMemoryError as error:
                failure = str(error).splitlines()[0]
                say(f"{at_once} samples at a time: out of memory")
            else:
                each = f"the prompt is computed {samples} times, {at_once} at a time"
                note = f"{wall:.2f} s; {each}; compilation took {warm:.0f} s"
                return samples * self.length(256) / wall, "tokens/s", note
            # Outside of `except`, so that the traceback holds no tensors.
            self.clean()
            at_once //= 2
        raise RuntimeError(failure)

    def group_at_once(self, samples, times, picture):
        context, new, grid = self.length(1536), self.length(256), self.shape["grid"]
        settings = self.settings(True, context + new, do_sample=True, top_k=0, num_return_sequences=samples)
        if picture:
            # Kernels of the tower, and what is compiled: neither needs all copies of a large picture.
            values, sizes = self.patches(grid)
            with self.torch.no_grad():
                self.model.model.visual(values, grid_thw=sizes)
        small = self.prompt(context, 4 if picture else None)
        warm, _ = self.wall(lambda: self.model.generate(**small, max_new_tokens=min(6, new), **settings))
        prompt = self.prompt(context, grid if picture else None)

        def work():
            for _ in range(times):
                self.model.generate(**prompt, max_new_tokens=new, **settings)

        return self.wall(work)[0], warm

    def prefix(self, samples):
        from transformers import DynamicCache, StaticCache

        torch, model, text = self.torch, self.model, self.shape["text"]
        context, new = self.length(1536), self.length(256)
        prompt = self.prompt(context, self.shape["grid"])
        cache = StaticCache(config=model.config, max_cache_len=context + new)
        heads = text["num_key_value_heads"], text["hidden_size"] // text["num_attention_heads"]
        cache.early_initialization(samples, *heads, dtype=model.dtype, device=self.device)
        settings = {"do_sample": True, "top_k": 0, **self.compilation()}

        def work(new):
            with torch.no_grad():
                once = DynamicCache(config=model.config)
                model(**prompt, past_key_values=once, use_cache=True, logits_to_keep=1)
                for layer, known in zip(cache.layers, once.layers):
                    layer.keys[:, :, :context].copy_(known.keys)
                    layer.values[:, :, :context].copy_(known.values)
                    # `generate` wants to compute the last token of a prompt itself.
                    layer.cumulative_length.fill_(context - 1)
            # Of text, time, height and width: as `generate` has them after a prompt of its own.
            positions = torch.arange(context, device=self.device).expand(4, samples, context).clone()
            positions[1:] += model.model.rope_deltas
            copies = {name: prompt[name].repeat(samples, 1) for name in ("input_ids", "mm_token_type_ids") if name in prompt}
            return model.generate(
                **copies, position_ids=positions, past_key_values=cache, max_new_tokens=new, **settings
            )

        warm, _ = self.wall(lambda: work(min(6, new)))
        wall, drawn = self.wall(lambda: work(new))
        if tuple(drawn.shape) != (samples, context + new):
            raise RuntimeError(f"{tuple(drawn.shape)} tokens of {samples} samples")
        note = f"{wall:.2f} s; the prompt is computed once; compilation took {warm:.0f} s"
        return samples * new / wall, "tokens/s", note

    def continuous(self, requests, samples=1, context=1024, new=128):
        from transformers import GenerationConfig

        context, new = self.length(context), self.length(new)
        prompts = self.ids(requests, context).tolist()
        settings = GenerationConfig(
            max_new_tokens=new,
            do_sample=samples > 1,
            top_k=0 if samples > 1 else None,
            num_return_sequences=samples,
            eos_token_id=-1,
            pad_token_id=0,
        )
        begin = time.perf_counter()
        results = self.model.generate_batch(prompts, generation_config=settings, record_timestamps=True)
        wall = time.perf_counter() - begin
        counts = [len(result.generated_tokens) for result in results.values()]
        if sum(counts) != requests * samples * new:
            raise RuntimeError(f"{sum(counts)} tokens, {requests * samples * new} expected")
        stamps = sorted(stamp for result in results.values() for stamp in getattr(result, "timestamps", None) or [])
        created = [getattr(result, "created_time", None) for result in results.values()]
        if stamps and all(created):
            # From the first request to the last token: graphs are captured before it.
            note = f"{wall:.1f} s with warm-up, attention {self.attention}"
            wall = stamps[-1] - min(created)
        else:
            note = f"warm-up included, attention {self.attention}"
        return sum(counts) / wall, "tokens/s", note

    def attempts(self, micro_batches):
        """Optimizers from what one would use to what fits, each with rows of a micro-batch."""
        large = self.cuda and self.torch.cuda.get_device_properties(0).total_memory > 100e9
        most = micro_batches[0] if large else micro_batches[1]

        def adamw(parameters):
            return self.torch.optim.AdamW(parameters, lr=1e-6, fused=self.cuda)

        def sgd(parameters):
            return self.torch.optim.SGD(parameters, lr=1e-6)

        named = "AdamW, states bf16"
        return [(named, adamw, most), (named, adamw, 1), ("SGD, as AdamW does not fit", sgd, most)]

    def first_that_fits(self, attempts, run):
        failure = None
        for name, optimizer, rows in attempts:
            try:
                return name, rows, run(optimizer, rows)
            except self.torch.OutOfMemoryError as error:
                failure = str(error).splitlines()[0]
                say(f"{name}, {rows} rows at a time: out of memory")
            # Outside of `except`, so that the traceback holds no tensors.
            self.model.zero_grad(set_to_none=True)
            gc.collect()
            self.torch.cuda.empty_cache()
        raise RuntimeError(failure)

    def trainable(self):
        model = self.model
        # Close to all of a card of 80 GB is needed, and graphs cannot be captured with this setting.
        self.expandable_segments(True)
        model.requires_grad_(True)
        model.model.visual.requires_grad_(False)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def model_flops(self, batch, length):
        """Of a step: forward and backward, as if nothing was computed twice."""
        text = self.shape["text"]
        head = self.model.lm_head.weight.numel()
        linear = sum(p.numel() for p in self.model.model.language_model.layers.parameters() if p.dim() > 1) + head
        attention = 6 * length**2 * text["hidden_size"] * text["num_hidden_layers"] * batch
        return 6 * linear * batch * length + attention

    def train(self):
        torch, parameters = self.torch, self.trainable()
        batch, length = 8, self.length(2048)
        ids = self.ids(batch, length)

        def run(make, rows):
            optimizer = make(parameters)

            def step():
                for part in ids.split(rows):
                    loss = self.model(input_ids=part, labels=part, use_cache=False).loss
                    (loss * (len(part) / batch)).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            return self.seconds(step, repeats=3, warm=1)

        name, rows, seconds = self.first_that_fits(self.attempts((4, 2)), run)
        flops = self.model_flops(batch, length) / seconds
        note = f"{name}; {rows} rows at a time; {seconds:.2f} s; {flops / 1e12:.0f} model TFLOP/s"
        if self.peak_flops:
            note += f", {100 * flops / self.peak_flops:.0f} % of the matmul ceiling"
        return batch * length / seconds, "tokens/s", note

    def grpo(self):
        torch, model = self.torch, self.model
        prompts, samples, context, new = 8, 8, self.length(512), self.length(256)
        ids = self.ids(prompts, context)
        settings = self.settings(True, context + new, do_sample=True, top_k=0, num_return_sequences=samples)
        model.generate(ids, max_new_tokens=min(6, new), **settings)
        sampling, sampled = self.wall(lambda: model.generate(ids, max_new_tokens=new, **settings))
        sampled = sampled.clone()
        self.clean()

        def logprobs(part):
            logits = model(input_ids=part, use_cache=False, logits_to_keep=new + 1).logits[:, :-1].float()
            return torch.log_softmax(logits, -1).gather(-1, part[:, -new:, None]).squeeze(-1)

        advantages = torch.randn(len(sampled), 1, device=self.device)
        parameters = self.trainable()

        def run(make, rows):
            optimizer = make(parameters)

            def step():
                for part, advantage in zip(sampled.split(rows), advantages.split(rows)):
                    # Of one update the log-probabilities before it are those of its own pass.
                    after = logprobs(part)
                    ratio = (after - after.detach()).exp()
                    objective = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                    (-objective.sum() / sampled.shape[0] / new).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            step()
            return self.wall(step)[0]

        name, rows, update = self.first_that_fits(self.attempts((8, 4)), run)
        total = sampling + update
        note = f"{total:.2f} s: sampling {sampling:.2f}, update {update:.2f} ({name}, {rows} rows at a time)"
        return sampled.numel() / total, "tokens/s", note


def about(peer):
    import transformers

    torch = peer.torch
    card = torch.cuda.get_device_name() if peer.cuda else "CPU"
    return {
        "card": card,
        "shape": peer.shape_name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "attention": peer.attention,
    }


def measure(peer, name, method, parameters):
    """One row, whatever comes of it."""
    begin = time.monotonic()
    row = {"name": name}
    try:
        peer.clean(parameters["samples"] if method in ("group", "prefix") else None)
        value, unit, note = getattr(peer, method)(**parameters)
        row.update(value=value, unit=unit, note=note)
    except Exception as error:  # noqa: BLE001 (the table says what failed, and the next row is measured)
        lines = str(error).strip().splitlines() or [""]
        row["error"] = f"{type(error).__name__}: {lines[0]}"[:300]
    if peer.cuda:
        row["peak_gib"] = round(peer.torch.cuda.max_memory_allocated() / 2**30, 1)
    row["took_s"] = round(time.monotonic() - begin, 1)
    return row


def answer(arguments):
    """Measures the rows that standard input names, and writes a line for each to the given descriptor."""
    with os.fdopen(arguments.answers, "w") as answers:
        peer = Peer(arguments)
        print(json.dumps(about(peer)), file=answers, flush=True)
        rows = {name: (method, parameters) for name, method, parameters in ROWS}
        for name in sys.stdin:
            method, parameters = rows[name.strip()]
            print(json.dumps(measure(peer, name.strip(), method, parameters)), file=answers, flush=True)


class Measurer:
    """A process that measures one row after the other. PyTorch cannot be stopped within a row, and what a row that failed
    leaves behind is unknown: such a process is ended."""

    # Until PyTorch has been imported and the card is there.
    START_SECONDS = 120

    def __init__(self, arguments):
        reading, writing = os.pipe()
        command = [sys.executable, os.path.abspath(__file__), "--answers", str(writing), "--shape", arguments.shape]
        command += ["--device", arguments.device, "--attention", arguments.attention]
        # A session of its own, so that what it starts is ended with it.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, text=True, pass_fds=[writing], start_new_session=True
        )
        os.close(writing)
        self.answers, self.pending = reading, b""
        try:
            self.card = self.line(self.START_SECONDS)
        except (TimeoutError, EOFError):
            self.end()
            raise

    def line(self, seconds):
        """The next line; raises TimeoutError after so many seconds, EOFError where the process has ended."""
        until = time.monotonic() + seconds
        while b"\n" not in self.pending:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"more than {seconds} s")
            ready, _, _ = select.select([self.answers], [], [], min(left, 1))
            got = os.read(self.answers, 1 << 16) if ready else b""
            if not got and (ready or self.process.poll() is not None):
                raise EOFError(f"its process ended with {self.process.wait()}")
            self.pending += got
        line, _, self.pending = self.pending.partition(b"\n")
        return json.loads(line)

    def row(self, name, seconds):
        """One row, whatever comes of it."""
        begin = time.monotonic()
        try:
            print(name, file=self.process.stdin, flush=True)
            return self.line(seconds)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            took = round(time.monotonic() - begin, 1)
            return {"name": name, "error": f"{type(error).__name__}: {error}", "took_s": took}

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.answers)


def table(rows):
    lines = ["| what | value | unit | peak GiB | |", "|---|---|---|---|---|"]
    for row in rows:
        value = f"{row['value']:,.{0 if row['value'] >= 100 else 2}f}" if "value" in row else "-"
        note = row.get("note") or row.get("error") or ""
        lines.append(f"| {row['name']} | {value} | {row.get('unit', '')} | {row.get('peak_gib', '')} | {note} |")
    return "\n".join(lines)


def measure_all(arguments, names, until, file):
    """What the card is and all rows, each as soon as it is measured also to `file`."""
    rows, measurer, card = [], None, {}

    def record(row):
        if file:
            print(json.dumps(row), file=file, flush=True)

    try:
        for name in names:
            if time.monotonic() - BEGAN > until:
                row = {"name": name, "error": f"not begun after {until:.0f} s"}
            else:
                try:
                    measurer = measurer or Measurer(arguments)
                except (TimeoutError, EOFError) as error:
                    sys.exit(f"nothing can be measured: {error}")
                if not card:
                    card = measurer.card
                    record(card)
                    say(", ".join(f"{key} {value}" for key, value in card.items()))
                left = until - (time.monotonic() - BEGAN)
                row = measurer.row(name, min(arguments.row_seconds, max(left, 1.0)) if arguments.quick else arguments.row_seconds)
            rows.append(row)
            record(row)
            value = f"{row['value']:.2f} {row['unit']}" if "value" in row else "-"
            say(f"{name}: {value} {row.get('note') or row.get('error', '')} ({row.get('took_s', 0)} s)")
            if measurer and "error" in row:
                measurer.end()
                measurer = None
    finally:
        if measurer:
            measurer.end()
    return card, rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", default="*", metavar="NAME,…", help="rows to measure (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"the rows {QUICK}, within 170 seconds")
    parser.add_argument("--seconds", type=float, help="no row is begun after so many seconds (default: 420)")
    parser.add_argument("--row-seconds", type=int, default=150, help="a row that takes longer is given up")
    parser.add_argument("--json", metavar="FILE", help="also one JSON object a line, as rows come")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="tiny is for a look at the code")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation, where flash-attn is installed")
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.answers is not None:
        answer(arguments)
        return
    wanted = (QUICK if arguments.quick and arguments.what == "*" else arguments.what).split(",")
    until = arguments.seconds or (170 if arguments.quick else 420)
    names = [row[0] for row in ROWS if any(fnmatch.fnmatch(row[0], pattern.strip()) for pattern in wanted)]
    if not names:
        parser.error(f"no row is called {arguments.what}; see --help")

    # So that the process that measures is ended with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with open(arguments.json, "w") if arguments.json else contextlib.nullcontext() as file:
        card, rows = measure_all(arguments, names, until, file)
    print(" ".join(f"{key} {value}" for key, value in card.items()))
    print(table(rows))


if __name__ == "__main__":
    main()

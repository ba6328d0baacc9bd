"""Speed of flotilla-worker beside transformers in PyTorch: same machine, same weights, same tokens, one table of ratios.

    pip install torch==2.8.0 transformers==4.57.3
    python speed.py --worker ~/.cache/flotilla/target/release/flotilla-worker --threads 2

Eager attention and eager execution: what `from_pretrained` gives. Language model only; weights are random.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time

import torch
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

VISION = dict(
    depth=1, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=14, window_size=112, spatial_merge_size=2,
    temporal_patch_size=2, in_channels=3, tokens_per_second=2, fullatt_block_indexes=[0],
)
SHAPES = {
    "0.1b": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                 num_key_value_heads=2, vocab_size=32000, mrope_section=[8, 12, 12]),
    "0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, vocab_size=151936, mrope_section=[8, 12, 12]),
}


def build(shape):
    sizes = dict(shape)
    section = sizes.pop("mrope_section")
    text = dict(sizes, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=4096, tie_word_embeddings=True,
                rope_scaling={"type": "mrope", "mrope_section": section})
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=dict(VISION, out_hidden_size=sizes["hidden_size"]), image_token_id=5,
        video_token_id=6, vision_start_token_id=7, tie_word_embeddings=True,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).float().eval()


def fastest(rounds, work):
    work()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def peer(model, length, new, batch, rounds):
    ids = [(i * 7919 + 13) % model.config.text_config.vocab_size for i in range(length)]
    one, many = torch.tensor([ids]), torch.tensor([ids] * batch)
    result = {}
    with torch.no_grad():
        result["prefill"] = length / fastest(rounds, lambda: model(one, use_cache=True, logits_to_keep=1))

        def decode():
            cache = DynamicCache()
            model(many, past_key_values=cache, use_cache=True, logits_to_keep=1)
            start = time.perf_counter()
            for step in range(new):
                token = torch.full((batch, 1), step * 31 % model.config.text_config.vocab_size)
                position = torch.tensor([length + step])
                model(token, past_key_values=cache, use_cache=True, cache_position=position)
            return time.perf_counter() - start

        decode()
        result["decode"] = batch * new / min(decode() for _ in range(rounds))

    def train():
        model.zero_grad(set_to_none=True)
        model(many, labels=many).loss.backward()

    result["train"] = batch * length / fastest(rounds, train)
    model.zero_grad(set_to_none=True)
    return result


def ours(worker, directory, threads, length, new, batch, rounds):
    """One product on all threads where one row waits for it; whole rows on one thread each where rows are trained."""

    def bench(what, rayon, parts):
        command = [worker, "bench", "--model", directory, "--prompt-tokens", str(length), "--new-tokens", str(new),
                   "--batch", str(batch), "--rounds", str(rounds), "--json", "--what", what, "--threads", str(parts)]
        environment = dict(os.environ, RAYON_NUM_THREADS=str(rayon), RUST_LOG="warn")
        output = subprocess.run(command, check=True, capture_output=True, env=environment).stdout
        return {line["name"]: line for line in json.loads(output)["measured"]}

    by_rows = batch >= threads
    return bench("prefill,decode", threads, 1) | bench("train", 1 if by_rows else threads, threads if by_rows else 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True, help="the flotilla-worker program")
    parser.add_argument("--shape", choices=SHAPES, nargs="*", default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads, torch {torch.__version__}; tokens per second")
    print(f"{'SHAPE':<6} {'WHAT':<8} {'BATCH':>5} {'FLOTILLA':>10} {'TORCH':>10} {'RATIO':>6} {'OF CEILING':>10}")
    for name in arguments.shape:
        model = build(SHAPES[name])
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            for batch in arguments.batch:
                sizes = (arguments.prompt_tokens, arguments.new_tokens, batch, arguments.rounds)
                mine = ours(arguments.worker, directory, arguments.threads, *sizes)
                theirs = peer(model, *sizes)
                for what, line in mine.items():
                    rate = line["tokens_per_second"]
                    print(f"{name:<6} {what:<8} {batch:>5} {rate:>10.1f} {theirs[what]:>10.1f} "
                          f"{rate / theirs[what]:>6.2f} {line['ratio']:>10.2f}")


if __name__ == "__main__":
    main()

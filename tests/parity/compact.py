"""A number sequence that the Rust tests repeat, and tensors reduced to a few rows and the products of all of them."""

import numpy as np

ROWS = 4
PROBES = 2


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


def compact(name, matrix):
    """Rows evenly spread from the first to the last, and every row's products with the vectors drawn for its width."""
    matrix = matrix.detach().float().numpy()
    count, width = matrix.shape
    rows = np.unique(np.linspace(0, count - 1, ROWS).round().astype(np.int64))
    probes = np.stack([draw(f"probe/{k}", width) for k in range(PROBES)], axis=1).astype(np.float64)
    return {
        f"{name}.rows": rows,
        f"{name}.values": np.ascontiguousarray(matrix[rows]),
        f"{name}.products": (matrix.astype(np.float64) @ probes).astype(np.float32),
    }

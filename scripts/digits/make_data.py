#!/usr/bin/env python3
"""Makes the parquet files of the digits sample from the 1,797 scanned digits that scikit-learn carries.

    pip install scikit-learn==1.7.2 pyarrow==26.0.1
    python scripts/digits/make_data.py --seed 0 --out manifests/samples/critic-digits/data

Images are split by image before any row is made: no picture of a validation or held-out file is in a training file.
The same seed and the same package versions give the same bytes.
"""

import argparse
import pathlib
import random

import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

from png import encode_grey
from texts import QUESTION, completion, critic_prompt

HELD_OUT = 360
VALIDATION = 120
PAIRS_PER_IMAGE = 5

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def load_images() -> list[tuple[dict, int]]:
    """Every scan as (image struct, digit); the 17 grey levels of the source are spread over 0..255."""
    digits = load_digits()
    images = []
    for number, (scan, digit) in enumerate(zip(digits.images, digits.target)):
        rows = [[round(value * 255 / 16) for value in row] for row in scan.tolist()]
        images.append(({"bytes": encode_grey(rows), "path": f"digit-{number:04}.png"}, int(digit)))
    return images


def split(images: list, draw: random.Random) -> dict[str, list]:
    """Disjoint sets of images."""
    order = images[:]
    draw.shuffle(order)
    cut = HELD_OUT + VALIDATION
    return {"heldout": order[:HELD_OUT], "validation": order[HELD_OUT:cut], "train": order[cut:]}


def wrong_digits(digit: int, count: int, draw: random.Random) -> list[int]:
    """`count` different digits that the image does not show."""
    return draw.sample([other for other in range(10) if other != digit], count)


def preference_rows(images: list, per_image: int, draw: random.Random) -> list[dict]:
    """The right digit against a wrong one; no row says more than which of the two is better."""
    rows = [
        {"image": image, "question": QUESTION, "chosen": str(digit), "rejected": str(wrong)}
        for image, digit in images
        for wrong in wrong_digits(digit, per_image, draw)
    ]
    draw.shuffle(rows)
    return rows


def exact_match_rows(images: list) -> list[dict]:
    """The policy's own task on the same pictures."""
    return [{"image": image, "question": QUESTION, "answer": str(digit)} for image, digit in images]


def instruction_rows(images: list, draw: random.Random) -> list[dict]:
    """One policy row and one critic-format row for each image.

    The critic-format rows teach the form of a verdict and nothing about its truth: position of the right response and
    verdict go through all four combinations equally often, so that a verdict is right in exactly half of them.
    """
    rows = []
    for number, (image, digit) in enumerate(images):
        rows.append({"image": image, "question": QUESTION, "response": completion(digit, digit)})
        pair = [str(digit), str(wrong_digits(digit, 1, draw)[0])]
        if number % 2:
            pair.reverse()
        verdict = 1 + number // 2 % 2
        rows.append({"image": image, "question": critic_prompt(QUESTION, *pair), "response": completion(digit, verdict)})
    draw.shuffle(rows)
    return rows


def write(path: pathlib.Path, rows: list[dict]) -> None:
    """One parquet file; dictionary pages keep each picture once however many rows show it."""
    columns = [(name, IMAGE if name == "image" else pa.string()) for name in rows[0]]
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(columns)), path, compression="snappy")
    print(f"{path}: {len(rows)} rows, {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of every draw")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory of the parquet files")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    draw = random.Random(options.seed)
    parts = split(load_images(), draw)
    write(options.out / "critic-train.parquet", preference_rows(parts["train"], PAIRS_PER_IMAGE, draw))
    write(options.out / "critic-validation.parquet", preference_rows(parts["validation"], 1, draw))
    write(options.out / "critic-heldout.parquet", preference_rows(parts["heldout"], 1, draw))
    write(options.out / "policy-validation.parquet", exact_match_rows(parts["validation"]))
    write(options.out / "policy-heldout.parquet", exact_match_rows(parts["heldout"]))
    write(options.out / "instruction-train.parquet", instruction_rows(parts["train"], draw))


if __name__ == "__main__":
    main()

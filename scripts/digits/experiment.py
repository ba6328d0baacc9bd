#!/usr/bin/env python3
"""Runs the digits sample without a control plane, with fresh data and a fresh seed, and prints its curves.

    pip install scikit-learn==1.7.2 pyarrow==26.0.1 pyyaml==6.0.3
    python scripts/digits/experiment.py --worker target/release/flotilla-worker --seed 11 --dir /tmp/digits-11

Hyper-parameters are read from `manifests/samples/critic-digits`; only the seeds are replaced: that of the split of the
images, of the initial weights, of both jobs. `--shuffle-labels` is the control: labels permuted, so that nothing but
chance can be learnt. `--override grpo.steps=40` replaces a hyper-parameter (tuning).
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import time

import yaml

HERE = pathlib.Path(__file__).resolve().parent
SAMPLE = HERE.parent.parent / "manifests" / "samples" / "critic-digits"


def manifests() -> dict[tuple[str, str], dict]:
    """Every object of the sample by kind and name."""
    objects = {}
    for path in sorted(SAMPLE.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            objects[document["kind"], document["metadata"]["name"]] = document["spec"]
    return objects


class Experiment:
    """One run of the whole sample in one directory."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.dir = options.dir.resolve()
        self.objects = manifests()
        self.prepared: dict[str, dict] = {}

    def work(self, kind: str, name: str, role: dict) -> dict:
        """Runs one worker to its end and returns its last progress."""
        place = self.dir / "pods" / name
        place.mkdir(parents=True, exist_ok=True)
        owner = {"kind": kind, "namespace": "default", "name": name, "uid": f"seed-{self.options.seed}"}
        config = place / "role.json"
        config.write_text(json.dumps({"schemaVersion": 1, "owner": owner, "role": role}, indent=1))
        command = [self.options.worker, "run", "--config", config, "--listen", "127.0.0.1:0"]
        command += ["--volume", f"critic-digits-source={self.dir / 'source'}"]
        command += ["--volume", f"critic-digits={self.dir / 'claim'}"]
        command += ["--termination-log", place / "termination.json"]
        began = time.monotonic()
        with open(place / "log", "w") as log:
            code = subprocess.run([str(word) for word in command], stdout=log, stderr=log, check=False).returncode
        if code != 0:
            sys.exit(f"{name} ended with {code}: {(place / 'termination.json').read_text()}\nsee {place / 'log'}")
        progress = json.loads((place / "termination.json").read_text())
        progress["seconds"] = time.monotonic() - began
        return progress

    def make_source(self) -> None:
        """Data of this seed beside the base model of the sample."""
        source = self.dir / "source"
        source.mkdir(parents=True, exist_ok=True)
        (self.dir / "claim").mkdir(exist_ok=True)
        script = [sys.executable, HERE / "make_data.py", "--seed", self.options.seed, "--out", source / "data"]
        subprocess.run([str(word) for word in script], check=True, stdout=subprocess.DEVNULL)
        shutil.copytree(SAMPLE / "base", source / "base", dirs_exist_ok=True)

    def dataset(self, name: str) -> dict:
        """The prepared form of a Dataset of the sample."""
        if name not in self.prepared:
            spec = self.objects["Dataset", name]
            conversion = spec["conversion"]
            if self.options.shuffle_labels and name == "digits-critic-train":
                conversion["format"]["preference"]["shuffleLabels"] = True
                conversion["seed"] = self.options.seed
            uri = f"pvc://critic-digits/datasets/{name}"
            role = {"sourceUri": spec["source"]["uri"], "outputUri": uri, "conversion": conversion}
            report = self.work("Dataset", name, {"prepare": role})["conversion"]
            self.prepared[name] = {"name": name, "uri": report["uri"], "digest": report["digest"]}
        return self.prepared[name]

    def train(self, name: str, model: dict) -> dict:
        """Runs a TrainingJob of the sample from a model source."""
        spec = self.objects["TrainingJob", name]
        evaluation = spec["evaluation"]
        sets = [
            self.dataset(entry["datasetRef"]["name"]) | {"name": entry["name"]} for entry in evaluation["sets"]
        ]
        every = evaluation["everySteps"]
        if self.options.evaluate_every and "grpo" in spec["algorithm"]:
            every = self.options.evaluate_every
        role = {
            "model": model,
            "datasets": [self.dataset(entry["datasetRef"]["name"]) for entry in spec["datasets"]],
            "algorithm": self.overridden(spec["algorithm"]),
            "rewards": spec.get("rewards", []),
            "evaluationSets": sets,
            "evaluateEvery": every,
            "seed": self.options.seed,
            "outputUri": f"pvc://critic-digits/jobs/{name}",
            "checkpointEvery": spec["checkpoint"]["everySteps"],
            "keepLast": spec["checkpoint"]["keepLast"],
            "threads": self.options.threads,
        }
        if "guard" in evaluation and not self.options.no_guard:
            role["guard"] = evaluation["guard"]
        return self.work("TrainingJob", name, {"train": role})

    def overridden(self, algorithm: dict) -> dict:
        """The algorithm with the `--override`s that concern it."""
        for override in self.options.override:
            path, value = override.split("=", 1)
            *parents, leaf = path.split(".")
            if parents[0] in algorithm:
                place = algorithm
                for parent in parents:
                    place = place[parent]
                place[leaf] = yaml.safe_load(value)
        return algorithm

    def run(self) -> dict:
        """SFT from random weights, GRPO from its result; the numbers that the sample is judged by."""
        self.make_source()
        base = self.objects["TrainingJob", "digits-sft"]["model"]["uri"]
        sft = self.train("digits-sft", {"uri": base, "randomSeed": self.options.seed})
        result = sft["checkpoints"][-1]
        grpo = self.train("digits-grpo", {"uri": result["uri"], "digest": result["digest"]})
        first = {score["set"]: score for score in grpo["initialScores"]}
        last = {score["set"]: score for score in grpo["scores"]}
        return {
            "seed": self.options.seed,
            "critic_accuracy_before": first["critic"]["accuracy"],
            "critic_accuracy_after": last["critic"]["accuracy"],
            "swap_consistency_before": first["critic"].get("swapConsistency"),
            "swap_consistency_after": last["critic"].get("swapConsistency"),
            "policy_accuracy_before": first["policy"]["accuracy"],
            "policy_accuracy_after": last["policy"]["accuracy"],
            "format_rate_after": last["critic"]["formatRate"],
            "step": last["critic"]["step"],
            "message": grpo.get("message", ""),
            "sft_seconds": round(sft["seconds"], 1),
            "grpo_seconds": round(grpo["seconds"], 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=pathlib.Path, required=True, help="path of flotilla-worker")
    parser.add_argument("--seed", type=int, required=True, help="seed of the split, the weights and the jobs")
    parser.add_argument("--dir", type=pathlib.Path, required=True, help="directory of everything that is written")
    parser.add_argument("--threads", type=int, default=1, help="threads of the learner")
    parser.add_argument("--evaluate-every", type=int, default=0, help="steps between evaluations of the GRPO job")
    parser.add_argument("--shuffle-labels", action="store_true", help="control with permuted labels")
    parser.add_argument("--no-guard", action="store_true", help="never end a run early")
    parser.add_argument("--override", action="append", default=[], metavar="PATH=VALUE", help="e.g. grpo.steps=40")
    print(json.dumps(Experiment(parser.parse_args()).run()))


if __name__ == "__main__":
    main()

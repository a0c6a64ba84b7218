"""What the CUDA C++ kernels compile to, without a GPU: registers, spills, stack, shared memory, and how many blocks and
warps of 64 a multiprocessor holds of it (cuda_shared.cpp prints threads and shared memory, which launches ask for).

    python bench/audit_cuda.py                   sm_80, sm_90 and sm_100, into bench/results/cuda-audit.csv
    python bench/audit_cuda.py --family lora     the kernels of one family; the file keeps its other rows
    python bench/audit_cuda.py --arch 90         one of them, printed only
    python bench/audit_cuda.py --library FILE    what was built, by cuobjdump of triton; printed only

Exit status 1 where a kernel spills, has a stack frame or takes more shared memory than there is.
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
SOURCES = {name: ROOT / "csrc" / "cuda" / name / f"{name}.cu" for name in ("lora", "modulated")}
RESULTS = ROOT / "bench" / "results" / "cuda-audit.csv"
COLUMNS = ("arch", "kernel", "registers", "spill_bytes", "stack_bytes", "threads", "shared", "blocks", "warps", "nvcc")
# of a multiprocessor: registers, which a block takes in units of 256 a warp, and bytes of shared memory, of which every
# block takes 1024 more; blocks and warps at most
REGISTERS, UNIT = 65_536, 256
SHARED = {"80": 167_936, "90": 233_472, "100": 233_472}
BLOCKS, WARPS = 32, 64
# threads of kernels without shared memory
NONE = {"lora_dab_sum": 256, "order": 128, "outer_y_sum": 256, "seen": 128, "slots": 128}


def compiled(nvcc, arch, family):
    """[(kernel, registers, spilled bytes, stack bytes)] of a family for an architecture."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", SOURCES[family]]
        done = subprocess.run([*command, "-o", Path(folder) / "kernels.cubin"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    return named(
        [(name, int(regs), int(stores) + int(loads), int(stack)) for name, stack, stores, loads, regs in found]
    )


def named(kernels):
    """`kernels`, tuples that begin with a mangled name, sorted by plain names."""
    names = subprocess.run(["c++filt"], input="\n".join(one[0] for one in kernels), capture_output=True, text=True)
    return sorted((plain(full), *one[1:]) for full, one in zip(names.stdout.splitlines(), kernels, strict=True))


def built(library):
    """[(arch, kernels)] of a library, as `compiled` has them; what is spilled lies on the stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", library], capture_output=True, text=True, check=True).stdout
    found = {}
    for arch, usage in re.findall(r"^arch = sm_(\w+)$(.*?)(?=^Fatbin|\Z)", text, re.DOTALL | re.MULTILINE):
        for name, registers, stack in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", usage):
            # of no family: what asks whether kernels run at all
            if "probe_kernel" not in name:
                found.setdefault(arch, []).append((name, int(registers), int(stack), int(stack)))
    return [(arch, named(kernels)) for arch, kernels in found.items()]


def plain(name):
    """A kernel's demangled name without its arguments."""
    name = re.split(r"\(ctxkern::(?:Call|LoraCall|Batch)", name)[0].removeprefix("void ")
    name = name.replace("ctxkern::", "").replace(" ", "")
    for dtype, short in {"__nv_bfloat16": "bf16", "Bfloat": "bf16", "__half": "f16", "Half": "f16"}.items():
        name = name.replace(dtype, short)
    return name


def shared():
    """{kernel: (bytes of shared memory, threads)}."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "shared"
        source = Path(__file__).with_name("cuda_shared.cpp")
        subprocess.run(["g++", "-std=c++17", "-w", source, "-o", program], check=True)
        lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    found = {}
    for line in lines:
        count, threads, name = line.split(" ", 2)
        name = name.partition("&")[2].removeprefix("(")
        found[plain(name if "(" in name else name.removesuffix(">"))] = int(count), int(threads)
    return found


def occupancy(arch, registers, threads, bytes_):
    """Blocks and warps that a multiprocessor holds."""
    warps = threads // 32
    by_registers = REGISTERS // (-(-registers * 32 // UNIT) * UNIT * warps)
    blocks = min(by_registers, SHARED[str(arch)] // (bytes_ + 1024), BLOCKS, WARPS // warps)
    return blocks, blocks * warps


def write(rows, families):
    """Rows by architecture and kernel; those of families that were not audited stay."""
    if len(families) < len(SOURCES):
        with RESULTS.open(newline="") as file:
            rows = {tuple(row[:2]): row for row in list(csv.reader(file))[1:]} | rows
    archs = list(dict.fromkeys(arch for arch, _ in rows))
    ordered = sorted(rows.values(), key=lambda row: (archs.index(row[0]), row[1]))
    with RESULTS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *ordered])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="*", default=None, help="such as 80 90 (default: 80 90 100, written)")
    parser.add_argument("--family", nargs="*", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--library", default=None, help="a built _cuda_kernels.so")
    args = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if args.library:
        version, audited = "", built(args.library)
        if not audited:
            sys.exit(f"{args.library} has no kernels")
    else:
        if nvcc is None:
            sys.exit("nvcc was not found")
        printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        version = re.findall(r"V([\d.]+)", printed)[0]
        each = [(arch, family) for arch in args.arch or (80, 90, 100) for family in args.family]
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda one: compiled(nvcc, *one), each)
            audited = [(arch, kernels) for (arch, _), kernels in zip(each, found, strict=True)]
    rows, wrong, memory = {}, [], shared()
    for arch, kernels in audited:
        for name, registers, spilled, stack in kernels:
            # those that find rows are in each family's code
            if (f"sm_{arch}", name) in rows:
                continue
            plainest = name.partition("<")[0].removesuffix("_kernel")
            taken, threads = (0, NONE[plainest]) if plainest in NONE else memory[name]
            held = occupancy(arch, registers, threads, taken)
            row = f"sm_{arch}", name, registers, spilled, stack, threads, taken, *held, version
            rows[row[:2]] = row
            print(*row, flush=True)
            if spilled or stack or not held[0]:
                wrong.append(f"sm_{arch} {name}: {spilled} bytes spilled, {stack} of stack, {taken} of shared memory")
    if args.arch is None and args.library is None:
        write(rows, args.family)
    print(*wrong, sep="\n", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

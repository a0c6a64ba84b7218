"""Sizes in plain Python (Triton's functions of these names take 5 µs per call), and the options of every launch."""

# said aloud, as Triton's default is about to change
OPTIONS = {"enable_fp_fusion": True}
# of kernels with assertions: without those on every sum of integers, which debug=True brings along
ASSERTING = {**OPTIONS, "sanitize_overflow": False}


def cdiv(size, step):
    return -(-size // step)


def next_power_of_2(size):
    return 1 << max(size - 1, 0).bit_length()

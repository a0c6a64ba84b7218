"""What `import ctxkern` brings along: torch alone, in a fresh process."""

import subprocess
import sys
import textwrap

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(name + " is blocked", name=name)

sys.meta_path.insert(0, Blocked())
"""


def fresh(code, blocked=()):
    """Runs code in a new interpreter, where the packages `blocked` cannot be imported."""
    prelude = BLOCK.format(names=set(blocked)) if blocked else ""
    script = prelude + textwrap.dedent(code)
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loads_no_compiler_no_kernels_and_no_gpu():
    fresh("""
        import sys
        import torch
        before = set(sys.modules)
        import ctxkern, ctxkern.nn, ctxkern.reference
        loaded = {name.split(".")[0] for name in set(sys.modules) - before}
        assert not loaded & {"triton", "numpy", "matplotlib", "tensorboard", "safetensors", "tqdm", "pytest"}, loaded
        assert "ctxkern._C" not in sys.modules
        assert "torch._dynamo" not in set(sys.modules) - before
        assert not any(name.startswith(("torch.distributed.tensor", "torch.distributed.fsdp")) for name in sys.modules)
        assert not torch.cuda.is_initialized()
        ctxkern.backends()
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        ctxkern.attach_adapters(model, 2, 2, "0")
        with ctxkern.use(model, adapter_index=torch.tensor([1, 0])):
            model(torch.ones(2, 3, 4))
        assert "ctxkern.sharding" not in sys.modules
        assert "torch.distributed.tensor" not in sys.modules
        assert "triton" not in set(sys.modules) - before
        assert not torch.cuda.is_initialized()
    """)


OPTIONAL = ("numpy", "triton", "matplotlib", "tensorboard", "safetensors", "tqdm", "pytest", "hypothesis")


def test_trains_without_optional_packages():
    said = fresh(
        """
        import torch, ctxkern
        from ctxkern.nn import ContextModulatedAttention, EinsumContextModulatedAttention
        from ctxkern.testing.oracle import assert_matches
        torch.manual_seed(0)
        layer, einsum = ContextModulatedAttention(8, 3, 2), EinsumContextModulatedAttention(8, 3, 2)
        einsum.load_state_dict(layer.state_dict())
        x, context = torch.randn(2, 4, 8), torch.randn(1, 3)
        both = context.expand(2, 3)
        y = layer(x, both)
        y.sum().backward()
        merged, plain = ctxkern.merge(layer, context)(x), einsum(x, both)
        exact = einsum.double()(x.double(), both.double())
        for name, got in (("layer", y), ("merged", merged)):
            assert_matches({name: got}, {name: exact}, {name: plain})
        print(ctxkern.explain(torch.ones(1, 2, 3), torch.ones(1, 4), None, torch.ones(3, 5, 4)))
        """,
        OPTIONAL,
    )
    assert "panel on " in said


def test_leaves_the_settings_of_torch_alone():
    fresh("""
        import torch
        def settings():
            return (
                torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
                torch.initial_seed(),
            )
        before = settings()
        import ctxkern, ctxkern.nn
        ctxkern.modulated_linear(torch.ones(1, 2, 3), torch.ones(1, 4), None, torch.ones(3, 5, 4))
        assert settings() == before
    """)

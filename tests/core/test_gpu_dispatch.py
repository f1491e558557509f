"""The backend ``triton`` without a GPU: its kernels interpreted, compiled, and asked for where they cannot run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixtura.core.dispatch import experts_forward, why_not

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
CHECKS = Path(__file__).with_name("gpu_kernel_checks.py")


def run_checks(**environment: str) -> None:
    # In a process of its own: triton reads the variable once, when it is imported.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=CHECKS.parents[2])
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@needs_triton
def test_the_kernels_agree_with_the_loop_in_tritons_interpreter():
    run_checks(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernels_agree_with_the_loop_on_this_gpu():
    run_checks(TRITON_INTERPRET="0")


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_every_kernel_compiles_for_a_hopper_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mixtura.core import gpu_dispatch, gpu_kernels

    rows, columns, depth, launch = gpu_dispatch._tile(torch.bfloat16, torch.bfloat16, 512)
    options = {name: launch.pop(name) for name in ("num_warps", "num_stages")}
    groups = {"order": "*i64", "offsets": "*i64", "places": "*i64", "n_live": "*i64", "grad_bias": "*fp32"}
    tensors = dict.fromkeys(("x", "weight", "bias", "out", "grad", "grad_weight", "rows", "weights"), "*bf16")
    pointers = tensors | dict.fromkeys(("grad_rows", "grad_weights"), "*bf16") | groups
    constants = {"GATHER": True, "BIAS": True, "GROUPS": 128, "SHARED": 8, "WEIGHTED": True, "WIDTH": 1024, **launch}
    tiles = {
        gpu_kernels.expert_product: {"ROWS": rows, "OUT": columns, "IN": depth},
        gpu_kernels.weight_gradient: {"ROWS": depth, "OUT": columns, "IN": columns},
        gpu_kernels.sum_pairs: {},
        gpu_kernels.sum_pairs_gradients: {},
    }
    for kernel, tile in tiles.items():
        given = {name: value for name, value in (constants | tile).items() if name in kernel.arg_names}
        types = {n: "constexpr" if n in given else pointers.get(n, "i32") for n in kernel.arg_names}
        built = compile(ASTSource(kernel, types, given), target=GPUTarget("cuda", 90, 32), options=options)
        assert built.asm["cubin"]
        assert built.metadata.shared <= 99 << 10  # the least that a GPU with bfloat16 has


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_not("triton", torch.zeros(1, 1)) == (
        "triton is not installed: pip install triton (Linux), or use backend='grouped'"
    )


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_a_tensor_on_the_cpu_is_turned_away():
    x, eye = torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3)
    with pytest.raises(ValueError, match=r"triton needs a CUDA tensor, got one on cpu; use backend='grouped'"):
        experts_forward(x, eye, eye, torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), backend="triton")


def test_float64_is_turned_away(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "float32, bfloat16 or float16, got x of torch.float64" in why_not("triton", torch.zeros(1, 1).double())

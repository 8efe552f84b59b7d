"""quant.py's Triton kernels, tested without a GPU: what they compute, in Triton's interpreter, and
what they are compiled to, by Triton's own compiler and tools.

Triton decides when it is imported whether it interprets. So the tests called `interpreted_*` run
in a second process, which `test_interpreted` starts.
"""

import json
import os
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch

import quant
from quant import ABSMAX_BLOCK_SIZE, BLOCK_SIZE, CODEBOOKS, quantize_4bit

pytest.importorskip("triton", reason="the kernels are written in Triton")
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Rows that begin inside of a byte, of a block, of a nested block; more than one tile to a row.
SHAPES = [(1, 1), (3, 130), (7, 33), (5, 64), (9, 1901), (3, 2500)]


def make(shape, kind="nf4", double_quant=True, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight.view(-1)[64:192] = 0  # two blocks of zeros
    return quantize_4bit(weight, kind, double_quant)


# --------------------------------------------------------------------------------------
# In the interpreter


@pytest.fixture
def round_to_even(monkeypatch):
    """Have the interpreter round to bf16 as the compiled kernel does: by itself it truncates."""
    from triton.runtime import interpreter

    dtypes = {name: dtype for name, dtype in DTYPES.items() if name != "fp16"}

    def convert(data, source, target, mode):
        values = torch.frombuffer(bytearray(data.tobytes()), dtype=dtypes[source.name])
        values = values.to(dtypes[target.name])
        bits = torch.uint16 if target.name == "bf16" else torch.float32
        return values.view(bits).numpy().reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", CODEBOOKS)
def interpreted_dequantize(kind, double_quant, dtype, round_to_even):
    """The kernel writes the bits of the plain version, and nothing after the last value."""
    for shape in SHAPES:
        q = make(shape, kind, double_quant)
        numel = q.shape.numel()
        buffer = torch.full((numel + 4096,), 7.0, dtype=dtype)
        version = buffer._version
        quant.launch_dequantize(*q.op_args, buffer[:numel])
        assert buffer._version > version
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        got, want = buffer[:numel], q.dequantize(dtype).view(-1)
        assert torch.equal(got.view(bits), want.view(bits)), shape
        assert (buffer[numel:] == 7).all(), shape


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", CODEBOOKS)
def interpreted_matvec(kind, double_quant, dtype, round_to_even):
    """The product is within the rounding of an fp32 sum, in any order, and of the result.

    |error| <= n u / (1 - n u) sum |x_i w_i| + u' |y|, with n terms, u = 2^-24 and u' that of the
    dtype (Higham, Accuracy and Stability of Numerical Algorithms, Eq. 3.5), and the weights of
    the plain version: those that are not rounded to the dtype exceed it.
    """
    for rows, shape in enumerate(SHAPES + [(2, 100), (9, 127)], start=1):
        q = make(shape, kind, double_quant)
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        y = quant.launch_matvec(x, *q.op_args, shape[0])
        weight = q.dequantize(dtype).double()
        exact, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        nu = shape[1] * 2.0**-24
        bound = nu / (1 - nu) * size
        bound += (exact.abs() + bound) * torch.finfo(dtype).eps / 2
        assert y.shape == (rows, shape[0]) and y.dtype == dtype
        assert ((y.double() - exact).abs() <= bound).all(), shape


def interpreted_matvec_neighbour(round_to_even):
    """A row does not see what shares a block with it: its neighbour's weight is infinite in fp16,
    its neighbour's x is NaN."""
    weight = torch.ones(2, 100)
    weight[1, 0] = 1e6
    q = quantize_4bit(weight, double_quant=False)
    x = torch.tensor([[1.0], [torch.nan]], dtype=torch.float16).expand(2, 100)
    y = quant.launch_matvec(x, *q.op_args, 2)
    assert y[0].isfinite()[0] and y[0, 1].isinf() and y[1].isnan().all()


def test_interpreted():
    """The kernels compute what the plain version does (the tests above)."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        command + ["-o", "python_functions=interpreted_*"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


# --------------------------------------------------------------------------------------
# Compiled


class NoGPU:
    """What Triton asks of a GPU's driver when it compiles for one."""

    def __init__(self, arch):
        target = ("hip", arch, 64) if isinstance(arch, str) else ("cuda", arch, 32)
        self.get_current_device = lambda: arch  # compiled kernels are kept by device
        self.get_current_target = lambda: GPUTarget(*target)
        self.get_current_stream = lambda device: 0


def compiled(name, dtype, arch=80, double_quant=True, rows=8, shape=(64, 1024)):
    """Compile a kernel by launching it just short of running it, on tensors without data."""
    empty = lambda size, dtype: torch.empty(size, dtype=dtype, device="meta")
    blocks = -(-shape[0] * shape[1] // BLOCK_SIZE)
    weight = [
        empty(-(-shape[0] * shape[1] // 2), torch.uint8),
        empty(blocks, torch.uint8 if double_quant else torch.float32),
        empty(-(-blocks // ABSMAX_BLOCK_SIZE), torch.float32) if double_quant else None,
        empty((), torch.float32) if double_quant else None,
        "nf4",
    ]
    run, result = JITFunction.run, []
    warmup = lambda *args, **options: result.append(run(*args, **options | {"warmup": True}))
    with mock.patch.object(driver, "_active", NoGPU(arch)):
        with mock.patch.object(JITFunction, "run", warmup):
            if name == "dequantize":
                quant.launch_dequantize(*weight, empty(shape[0] * shape[1], DTYPES[dtype]))
            else:
                quant.launch_matvec(empty((rows, shape[1]), DTYPES[dtype]), *weight, shape[0])
    return result[0]


def stack_bytes(binary, folder):
    """Bytes of local memory that a thread uses: arrays and spilled registers.

    `cuobjdump` counts them as STACK: what it calls LOCAL is 0 for a kernel that spills, and the
    PTX has no `.local`, as registers are assigned after it. AMD's assembly has the number.
    """
    if "amdgcn" in binary.asm:
        return int(re.search(r"private_segment_fixed_size: +(\d+)", binary.asm["amdgcn"])[1])
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
    return int(re.search(r"STACK:(\d+)", subprocess.check_output(command, text=True))[1])


IN_ALL_DTYPES = [(dtype, arch) for dtype in DTYPES for arch in (75, 80, 90, 100)]
IN_BF16 = [("bf16", arch) for arch in (86, 89, 120, "gfx90a", "gfx942")]


@pytest.mark.parametrize("dtype, arch", IN_ALL_DTYPES + IN_BF16)
@pytest.mark.parametrize("name", ["dequantize", "matvec"])
def test_compiles_without_spilling(name, dtype, arch, tmp_path):
    """Everything a thread holds fits in registers, on each generation of GPUs."""
    for double_quant in (True, False):
        for rows in (1, 8) if name == "matvec" else (1,):
            assert stack_bytes(compiled(name, dtype, arch, double_quant, rows), tmp_path) == 0


@pytest.mark.parametrize("arch, blocks", [(80, 32), ("gfx942", 128)])
def test_spills_are_seen(arch, blocks, tmp_path, monkeypatch):
    """A tile many times as large does not fit in registers, and the check above notices."""
    monkeypatch.setattr(quant, "tile_blocks", lambda dtype: blocks)
    assert stack_bytes(compiled("matvec", "fp32", arch), tmp_path) > 0


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_scale_is_rounded_twice(arch):
    """The compiler joins no product with a sum, as it does unless it is told not to."""
    with mock.patch.dict(quant.LAUNCH, enable_fp_fusion=True):
        assert "fma" in compiled("dequantize", "bf16", arch).asm["ptx"]
    ptx = compiled("dequantize", "bf16", arch).asm["ptx"]
    assert "fma" not in ptx and ".ftz" not in ptx and len(re.findall(r"add\.rn\.f32\b", ptx)) == 1
    # Without `.rn`, the assembler could still join them.
    assert not re.search(r"(mul|add|sub)\.(ftz\.)?f32", ptx)
    # To nearest, which the interpreter does not show.
    assert "cvt.rn.bf16x2.f32" in ptx
    ptx = compiled("matvec", "bf16", arch).asm["ptx"]
    assert not re.search(r"(mul|add|sub)\.(ftz\.)?f32", ptx)


@pytest.mark.parametrize("name", ["dequantize", "matvec"])
def test_memory_accesses_are_wide(name):
    """16 bytes of weights are stored, or of x loaded, at once; and all four bytes of codes."""
    ptx = compiled(name, "bf16", rows=1).asm["ptx"]
    wide = "st.global.v4.b32" if name == "dequantize" else "ld.global.v4.b32"
    assert ptx.count(wide) == 1
    # Codes, 8 levels, an absmax code, its level, its scale, the offset.
    assert len(re.findall(r"ld\.global", ptx)) == 13 + (name == "matvec")


def narrow(ttir):
    """What is computed in 32 bits and should not: products, and offsets into what may be large."""
    ttir = re.sub(r" loc\(.*", "", ttir)
    tables = re.findall(r"(%\S+) = tt\.splat %(?:codebook|dynamic) :", ttir)
    offsets = re.findall(r"tt\.addptr (%\S+), .*, (\S+)$", ttir, re.M)
    assert len(offsets) >= 7  # codes, absmax, nested_absmax, 2 levels, a scale, what is written
    narrow_offsets = [o for o in offsets if "i64" not in o[1] and o[0] not in tables]
    return narrow_offsets + re.findall(r"arith\.muli.*i32>?$", ttir, re.M)


@pytest.mark.parametrize("name", ["dequantize", "matvec"])
def test_offsets_are_64_bits(name):
    """No weight is too large: its offsets are not computed in 32 bits."""
    for shape in ((64, 1024), (3, 130), (2**17, 2**16)):
        assert not narrow(compiled(name, "bf16", shape=shape).asm["ttir"])


# --------------------------------------------------------------------------------------
# The operators


@pytest.mark.parametrize("double_quant", [True, False])
def test_operators(double_quant):
    """They are what they declare to be: what they write to, shapes, dtypes, aliases."""
    q = make((8, 128), double_quant=double_quant)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    out = torch.empty(8 * 128, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.qst.dequantize, (*q.op_args, out), test_utils=tests)
    x = torch.ones(2, 128)
    torch.library.opcheck(torch.ops.qst.matvec, (x, *q.op_args, 8), test_utils=tests)


@pytest.mark.parametrize("shape", SHAPES)
def test_operators_on_cpu(shape):
    """Without a GPU they are the plain version."""
    q, x = make(shape), torch.ones(2, shape[1])
    out = torch.empty(q.shape.numel())
    torch.ops.qst.dequantize(*q.op_args, out)
    weight = q.dequantize()
    assert torch.equal(out.view(shape), weight)
    y = torch.ops.qst.matvec(x, *q.op_args, shape[0])
    assert torch.equal(y, torch.nn.functional.linear(x, weight))


def test_operators_in_compile_and_on_meta():
    """`torch.compile` takes both without a graph break, and a meta tensor goes through."""
    q = make((8, 128))

    def both(x, out):
        torch.ops.qst.dequantize(*q.op_args, out)
        return x @ out.view(8, 128).T + torch.ops.qst.matvec(x, *q.op_args, 8)

    x, out = torch.ones(2, 128), torch.empty(8 * 128)
    fast = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(x, torch.zeros_like(out)), both(x, out))
    meta = [p.to("meta") if isinstance(p, torch.Tensor) else p for p in q.op_args]
    assert torch.ops.qst.dequantize(*meta, out.to("meta")) is None
    assert torch.ops.qst.matvec(x.to("meta"), *meta, 8).shape == (2, 8)


def test_without_triton():
    """Where Triton is missing, the operators are the plain version on any device; and so are, on
    Windows, modules that test_without_what_windows_lacks has a look at."""
    code = (
        "import json, sys\nsys.path[:0] = sys.argv[1:]\n"
        "lacking = 'triton', 'resource', 'fcntl', 'readline', 'pwd', 'termios'\n"
        "sys.modules |= dict.fromkeys(lacking)\n"
        "import torch\n"
        "import quant; has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "table = torch._C._dispatch_dump_table('qst::matvec')\n"
        "print(json.dumps([has('qst::matvec', 'CUDA'), table]))"
    )
    folders = [os.path.dirname(quant.__file__)]
    printed = subprocess.check_output([sys.executable, "-c", code, *folders], text=True)
    registered, table = json.loads(printed)
    assert not registered and re.search(r"^CUDA: .*\[default backend kernel\]", table, re.M)

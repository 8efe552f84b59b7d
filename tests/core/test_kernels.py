"""quant.py's Triton kernels, tested without a GPU: what they compute, in Triton's interpreter, and
what they are compiled to, by Triton's own compiler and tools.

Triton decides when it is imported whether it interprets. So the tests called `interpreted_*` run
in a second process, which `test_interpreted` starts.
"""

import os
import re
import subprocess
import sys
from itertools import product
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
# Rows of whole blocks: of one, of as many as a tile has, of a few more; one tile of features, more.
WHOLE = [(5, 64), (16, 512), (33, 576)]


def make(shape, kind="nf4", double_quant=True, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight.view(-1)[64:192] = 0  # two blocks of zeros
    return quantize_4bit(weight, kind, double_quant)


# --------------------------------------------------------------------------------------
# In the interpreter


@pytest.fixture
def as_compiled(monkeypatch):
    """Have the interpreter round to bf16 as the compiled kernel does: by itself it truncates. Nor
    does it multiply bf16, but their bits."""
    from triton import language as tl
    from triton.runtime import interpreter

    dtypes = {name: dtype for name, dtype in DTYPES.items() if name != "fp16"}

    def convert(data, source, target, mode):
        values = torch.frombuffer(bytearray(data.tobytes()), dtype=dtypes[source.name])
        values = values.to(dtypes[target.name])
        bits = torch.uint16 if target.name == "bf16" else torch.float32
        return values.view(bits).numpy().reshape(data.shape)

    def dot(self, *arguments):
        a, b = arguments[:2]
        if a.dtype == tl.bfloat16:
            data = (convert(factor.data, tl.bfloat16, tl.float32, None) for factor in (a, b))
            a, b = (interpreter.TensorHandle(part, tl.float32) for part in data)
        return exact(self, a, b, *arguments[2:])

    exact = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.fixture(params=[80, "gfx942"])
def gpu(request, monkeypatch):
    """Launch as for a GPU of NVIDIA or of AMD."""
    monkeypatch.setattr(driver, "_active", NoGPU(request.param))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", CODEBOOKS)
def interpreted_dequantize(kind, double_quant, dtype, as_compiled, gpu):
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
def interpreted_matvec(kind, double_quant, dtype, as_compiled, gpu):
    """The product is within the rounding of an fp32 sum, in any order, and of the result.

    |error| <= n u / (1 - n u) sum |x_i w_i| + u' |y|, with n terms, u = 2^-24 and u' that of the
    dtype (Higham, Accuracy and Stability of Numerical Algorithms, Eq. 3.5), and the weights of
    the plain version: those that are not rounded to the dtype exceed it.
    """
    for rows, shape in [*product((1, 2, 7, 16), WHOLE), (3, (3, 130)), (16, (7, 33))]:
        q = make(shape, kind, double_quant)
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        y = quant.launch_matvec(x, *q.op_args, shape[0])
        weight = q.dequantize(dtype).double()
        exact, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        nu = shape[1] * 2.0**-24
        bound = nu / (1 - nu) * size
        bound += (exact.abs() + bound) * torch.finfo(dtype).eps / 2
        assert y.shape == (rows, shape[0]) and y.dtype == dtype
        # Rows that begin inside of a block are the CPU's product, which may be summed in 16 bits.
        atol = 0 if shape in WHOLE else 0.1
        assert ((y.double() - exact).abs() <= bound + atol).all(), shape


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("width", [100, 576])
def interpreted_matvec_neighbour(width, double_quant, as_compiled, gpu):
    """A row does not see what shares a block or a tile with it: its neighbour's weight is infinite
    in fp16, as is the mean of the scales; its neighbour's x is NaN."""
    weight = torch.ones(3, width)
    weight[1] = 1e6
    q = quantize_4bit(weight[:2] if width == 100 else weight, double_quant=double_quant)
    x = torch.tensor([[2**-10], [torch.nan]], dtype=torch.float16).expand(2, width)
    y = quant.launch_matvec(x, *q.op_args, q.shape[0])
    assert y[0, 0].isfinite() and y[0, 1].isinf() and y[1].isnan().all()


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


def compiled(name, dtype, arch=80, double_quant=True, rows=8, shape=(64, 1024), **other):
    """Compile a kernel by launching it just short of running it, on tensors without data.

    other: options of Triton in place of those that the launch has
    """
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
    other["warmup"] = True
    warmup = lambda *args, **options: result.append(run(*args, **options | other))
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


CASES = [(dtype, arch) for dtype in DTYPES for arch in (75, 80, 90, 100, 120, "gfx942")]
CASES += [("bf16", arch) for arch in (86, 89, "gfx90a")]


@pytest.mark.parametrize("dtype, arch", CASES)
@pytest.mark.parametrize("name", ["dequantize", "matvec"])
def test_compiles_without_spilling(name, dtype, arch, tmp_path):
    """Everything a thread holds fits in registers, on each generation of GPUs, and everything that
    threads share in its shared memory: KB of the smallest of each generation."""
    most = 64 if arch == 75 or isinstance(arch, str) else 99
    for double_quant in (True, False):
        for rows in (1, 8) if name == "matvec" else (1,):
            binary = compiled(name, dtype, arch, double_quant, rows)
            assert stack_bytes(binary, tmp_path) == 0 and binary.metadata.shared <= most << 10


@pytest.mark.parametrize("arch, features", [(80, 32), ("gfx942", 64)])
def test_spills_are_seen(arch, features, tmp_path, monkeypatch):
    """A larger tile does not fit in the registers of one warp, and the check above notices."""
    monkeypatch.setitem(quant.TILE, "FEATURES", features)
    assert stack_bytes(compiled("matvec", "fp32", arch, num_warps=1), tmp_path) > 0


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_scale_is_rounded_twice(arch):
    """The compiler joins no product with a sum, as it does unless it is told not to."""
    assert "fma" in compiled("dequantize", "bf16", arch, enable_fp_fusion=True).asm["ptx"]
    ptx = compiled("dequantize", "bf16", arch).asm["ptx"]
    assert "fma" not in ptx and ".ftz" not in ptx and len(re.findall(r"add\.rn\.f32\b", ptx)) == 1
    # Without `.rn`, the assembler could still join them.
    assert not re.search(r"(mul|add|sub)\.(ftz\.)?f32", ptx)
    # To nearest, which the interpreter does not show.
    assert "cvt.rn.bf16x2.f32" in ptx
    ptx = compiled("matvec", "bf16", arch).asm["ptx"]
    assert not re.search(r"(mul|add|sub)\.(ftz\.)?f32", ptx)
    assert "mma.sync" in ptx  # on tensor cores


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942"])
def test_on_amd(arch):
    """With warps of 64 a thread stores 16 bytes, too; no product is rounded to fp16 at once; and
    the products of matvec are the matrix units'."""
    binary = compiled("dequantize", "fp16", arch)
    assembly = binary.asm["amdgcn"]
    assert binary.metadata.num_warps == 2 and "buffer_store_dwordx4" in assembly
    assert "v_fma_mix" not in assembly and "v_mad_mix" not in assembly
    assembly = compiled("matvec", "fp16", arch, rows=1).asm["amdgcn"]
    assert "v_mfma" in assembly and "v_fma_mix" not in assembly


def test_memory_accesses_are_wide():
    """16 bytes of weights are stored at once; of x and of codes, they are loaded into shared memory
    while others are multiplied."""
    ptx = compiled("dequantize", "bf16").asm["ptx"]
    assert ptx.count("st.global.v4.b32") == 1
    # Codes, the code book, an absmax code, its level, its scale, the offset.
    assert len(re.findall(r"ld\.global", ptx)) == 6
    copies = re.findall(r"cp\.async\S+ .*?(0x\w+)", compiled("matvec", "bf16").asm["ptx"])
    assert set(copies) == {"0x10", "0x4"}, copies


def narrow(ttir):
    """What is computed in 32 bits and should not: products, and offsets into what may be large."""
    ttir = re.sub(r" loc\(.*", "", ttir)
    tables = re.findall(r"(%\S+) = tt\.splat %(?:codebook|dynamic) :", ttir)
    offsets = re.findall(r"tt\.addptr (%\S+), .*, (\S+)$", ttir, re.M)
    assert len(offsets) >= 6  # codes, absmax, nested_absmax, the levels, a scale, what is written
    narrow_offsets = [o for o in offsets if "i64" not in o[1] and o[0] not in tables]
    return narrow_offsets + re.findall(r"arith\.muli.*i32>?$", ttir, re.M)


@pytest.mark.parametrize("name", ["dequantize", "matvec"])
def test_offsets_are_64_bits(name):
    """No weight is too large: its offsets are not computed in 32 bits."""
    for shape in ((64, 1024), (3, 192), (2**17, 2**16)):
        assert not narrow(compiled(name, "bf16", shape=shape).asm["ttir"])

"""The two operators of quant.py on a CPU: without a kernel they are the plain version."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

import quant
from quant import quantize_4bit


def make(shape, double_quant=True):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return quantize_4bit(weight, double_quant=double_quant)



@pytest.mark.parametrize("double_quant", [True, False])
def test_operators(double_quant):
    """They are what they declare to be: what they write to, shapes, dtypes, aliases."""
    q = make((8, 128), double_quant=double_quant)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    out = torch.empty(8 * 128, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.qst.dequantize, (*q.op_args, out), test_utils=tests)
    x = torch.ones(2, 128)
    torch.library.opcheck(torch.ops.qst.matvec, (x, *q.op_args, 8), test_utils=tests)


@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (5, 64), (9, 1901), (3, 2500)])
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

"""What can only be tested on a GPU. Without one it is skipped; with QST_GPU_DRY_RUN=1 the same
functions run on the CPU, where they can, so that no mistake in them waits for a GPU."""


import pytest
import torch
from torch.nn import functional as F

import quant
from helpers import DEVICE, DRY, GPU, each_dtype, needs_gpu, needs_gpu_or_dry_run, small_base
from data.formats.save import save_pretrained
from data.frozen import prefix_cache
from data.frozen.integers import quantize_kind
from data.tasks.examples import collate
from model import from_pretrained
from qst import QST
from quant import BLOCK_SIZE, CODEBOOKS, Quantized4bit, plain_dequantize, quantize_4bit
from side import SideConfig

pytestmark = needs_gpu_or_dry_run

# Rows that begin inside of a byte, of a block, of a nested block, and rows of whole blocks; and a
# layer of LLaMA-2-7B.
SHAPES = [(1, 1), (3, 130), (7, 33), (5, 64), (130, 131), (3, 2500), (33, 576), (65, 16384),
          (11008, 4096)]
SHAPES = SHAPES[:-1] if DRY else SHAPES
needs_memory = pytest.mark.skipif(
    GPU and torch.cuda.get_device_properties(DEVICE).total_memory < 12e9, reason="needs 12 GB"
)


def make(shape, kind="nf4", double_quant=True, seed=0):
    """A quantized weight on the CPU, two of whose blocks are zeros, and the same on the GPU."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight.view(-1)[64:192] = 0
    q = quantize_4bit(weight, kind, double_quant)
    tensors = {name: buffer.to(DEVICE) for name, buffer in q.named_buffers()}
    tensors = dict(nested_absmax=None, offset=None) | tensors
    return q, Quantized4bit(**tensors, shape=q.shape, kind=kind)


def same_bits(one, two):
    integers = torch.int32 if one.dtype == torch.float32 else torch.int16
    return torch.equal(one.cpu().view(integers), two.cpu().view(integers))


def within_rounding(y, x, weight):
    """|error| <= n u / (1 - n u) sum |x_i w_i| + u' |y|, as in test_kernels.py's bound, whose
    reference is computed on the GPU in fp64. But u = 2^-22: a tensor core cuts each addend, where
    others round it, and cuts the sum as well (Fasi et al. 2021, doi 10.7717/peerj-cs.330)."""
    x, weight = x.double(), weight.double()
    exact, size = x @ weight.T, x.abs() @ weight.abs().T
    nu = x.shape[1] * 2.0**-22
    bound = nu / (1 - nu) * size
    bound += (exact.abs() + bound) * torch.finfo(y.dtype).eps / 2
    return bool(((y.double() - exact).abs() <= bound).all())


# --------------------------------------------------------------------------------------
# The kernels


@needs_gpu
def test_the_kernels_are_there():
    """On a GPU the operators are Triton's kernels, and not the plain version."""
    for name in ("qst::dequantize", "qst::matvec"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name


@each_dtype
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", CODEBOOKS)
def test_dequantize(kind, double_quant, dtype):
    """The kernel writes the bits of the plain version on the CPU, and nothing after the last."""
    for shape in SHAPES:
        q, on_gpu = make(shape, kind, double_quant)
        numel = q.shape.numel()
        buffer = torch.full((numel + 4096,), 7.0, dtype=dtype, device=DEVICE)
        version = buffer._version
        torch.ops.qst.dequantize(*on_gpu.op_args, buffer[:numel])
        assert buffer._version > version
        assert same_bits(buffer[:numel], q.dequantize(dtype).view(-1)), shape
        assert (buffer[numel:] == 7).all(), shape


@each_dtype
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", CODEBOOKS)
def test_matvec(kind, double_quant, dtype):
    """With any number of rows the product is within the rounding of an fp32 sum and its own."""
    for shape in SHAPES:
        q, on_gpu = make(shape, kind, double_quant)
        weight = q.dequantize(dtype).to(DEVICE)
        for rows in range(1, quant.MAX_ROWS + 1):
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
            x = x.to(DEVICE, dtype)
            y = torch.ops.qst.matvec(x, *on_gpu.op_args, shape[0])
            assert y.shape == (rows, shape[0]) and y.dtype == dtype
            # On a CPU a product in 16 bits may be summed in 16 bits.
            assert DRY or within_rounding(y, x, weight), (shape, rows)
            assert torch.allclose(y.float(), F.linear(x, weight).float(), rtol=0.05, atol=0.5)


def test_a_row_does_not_see_its_neighbour():
    """What shares a block with a row and is infinite in fp16 stays out of its product."""
    for width in (100, 576):  # a row ends inside of a block, or inside of a tile of blocks
        weight = torch.ones(2, width)
        weight[1, 0] = 1e6
        q = quantize_4bit(weight.to(DEVICE), double_quant=False)
        x = torch.ones(1, width, dtype=torch.float16, device=DEVICE)
        y = torch.ops.qst.matvec(x, *q.op_args, 2)
        assert y[0, 0].isfinite() and y[0, 1].isinf()


def test_quantized_on_the_gpu():
    """Quantizing there stores the bytes that quantizing on the CPU does."""
    weight = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
    for kind in (*CODEBOOKS, "int4", "int3-50"):
        quantize = quantize_kind if kind.startswith("int") else quantize_4bit
        here, there = quantize(weight, kind), quantize(weight.to(DEVICE), kind)
        for one, two in zip(here.buffers(), there.buffers()):
            assert torch.equal(one, two.cpu())


@needs_memory
def test_more_than_2_to_the_31_values():
    """The last blocks of such a weight are read where they are, and stored where they belong."""
    columns, rows = (1 << 16, (1 << 15) + 3) if GPU else (1 << 10, 67)
    numel = rows * columns
    codes = torch.empty(numel // 2, dtype=torch.uint8, device=DEVICE).random_(0, 256)
    absmax = torch.empty(numel // BLOCK_SIZE, device=DEVICE).uniform_(0.5, 1)
    q = Quantized4bit(codes, absmax, None, None, torch.Size((rows, columns)))
    weight = q.dequantize(torch.bfloat16)
    tail = 4 * columns
    expected = torch.empty(tail, dtype=torch.bfloat16, device=DEVICE)
    parts = codes[-tail // 2 :], absmax[-tail // BLOCK_SIZE :]
    plain_dequantize(*parts, None, None, "nf4", expected)
    assert same_bits(weight.view(-1)[-tail:], expected)
    x = torch.randn(2, columns, device=DEVICE).bfloat16()
    y = torch.ops.qst.matvec(x, *q.op_args, rows)
    assert DRY or within_rounding(y[:, -4:], x, expected.view(4, columns))
    assert DRY or within_rounding(y[:, :4], x, weight[:4])


@needs_gpu
def test_on_a_side_stream():
    """The kernels run on the current stream: after what is queued there, before what follows."""
    q, on_gpu = make((4096, 4096))
    expected, stream = q.dequantize(torch.bfloat16), torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device=DEVICE)
    out = torch.zeros(4096, 4096, dtype=torch.bfloat16, device=DEVICE)
    x = torch.zeros(1, 4096, dtype=torch.bfloat16, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = busy @ busy / 64
        x.fill_(1)
        on_gpu.dequantize(torch.bfloat16, out)
        y = on_gpu.product(x)
        copy = out.clone()
    assert not stream.query()  # none of it was waited for
    stream.synchronize()
    assert same_bits(copy, expected)
    assert within_rounding(y, x, expected.to(DEVICE))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device_than_the_current_one():
    """The kernels run where the weight is."""
    q, _ = make((130, 131))
    other = q.to("cuda:1")
    with torch.cuda.device(0):
        out = other.dequantize(torch.bfloat16)
        y = other.product(torch.ones(2, 131, dtype=torch.bfloat16, device="cuda:1"))
    assert out.device == y.device == torch.device("cuda:1")
    assert same_bits(out, make((130, 131))[0].dequantize(torch.bfloat16))
    assert within_rounding(y, torch.ones(2, 131, device="cuda:1"), out)


@needs_gpu
def test_in_a_cuda_graph():
    """Both kernels can be captured, and replayed on other contents."""
    q, on_gpu = make((128, 256))
    x = torch.ones(1, 256, dtype=torch.bfloat16, device=DEVICE)
    on_gpu.product(x), on_gpu.dequantize(torch.bfloat16)  # compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, weight = on_gpu.product(x), on_gpu.dequantize(torch.bfloat16)
    x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(weight, q.dequantize(torch.bfloat16)) and within_rounding(y, x, weight)


@pytest.mark.parametrize("pinned", [True, False])
def test_layers_that_are_streamed(pinned, tmp_path, monkeypatch):
    """From pinned memory and from the disk, pass after pass: the hidden states of a base that is on
    the GPU, bit for bit, while the kernels of earlier passes are still in the queue."""
    sizes = dict(n_embd=1024, n_ffn=2816, vocab_size=500) if GPU else {}
    save_pretrained(small_base(n_layer=7, **sizes), tmp_path)
    monkeypatch.setattr("os.sysconf", lambda name: 1 << 30 if pinned else 0)
    generator, found = torch.Generator().manual_seed(0), []
    passes = [torch.randint(3, 60, (4, 50), generator=generator).to(DEVICE) for _ in range(5)]
    for stream in (False, True):
        base = from_pretrained(tmp_path, "nf4", torch.bfloat16, DEVICE, stream=stream)
        torch.manual_seed(0)
        model = QST(base, SideConfig(reduction=4, rank=2))
        states = []
        for idx in passes:
            loss = model.loss(idx, idx.cpu())
            loss.backward()
            states += [loss.detach(), base.hidden(idx)]
        found.append([*states, *(p.grad for p in model.parameters())])
        on_device = [b for b in model.buffers() if b is not base.embed_tokens.weight]
        assert model.device == DEVICE and {b.device for b in on_device} == {DEVICE}
    for one, two in zip(*(rows[:10] for rows in found)):
        assert torch.equal(one, two)
    for one, two in zip(*(rows[10:] for rows in found)):  # a GPU adds in an order of its own
        assert torch.allclose(one, two, rtol=1e-2, atol=1e-4 * float(one.abs().max()))
    source = base.layers[3].mlp.up_proj.source
    assert not GPU or source().codes.is_pinned() == pinned


@pytest.mark.parametrize("grouped", [{}, dict(n_kv_head=2)], ids=["", "grouped"])
@each_dtype
def test_a_prefix_that_is_read_once(dtype, grouped):
    """The mask of what comes after it, which picks another kernel of attention, is causal."""
    examples = [([*range(3, 23), i, 7, i, 9], [-100] * 20 + [i, 5, 6, 7]) for i in range(30, 38)]
    losses = []
    for attach in (lambda base, _: base, prefix_cache.share_prefix):
        base = small_base("none", n_embd=64, **grouped).to(DEVICE, dtype)
        torch.manual_seed(0)
        model = QST(attach(base, examples), SideConfig(reduction=4))
        model.side.alpha.data.fill_(0.5)
        idx, targets = collate(examples)
        losses.append(model.loss(idx.to(DEVICE), targets).item())
        assert (prefix_cache.share_prefix is attach) == (base.source is not None)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if dtype == torch.float32 else 2e-2)

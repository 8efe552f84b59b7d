"""The two operators beside a copy's bandwidth and bitsandbytes, and the tokens they generate.

Each call has buffers of its own, in turn, so that nothing is found in the cache. A call is timed in
a CUDA graph, so that Python's time between two calls does not count; `tokens` has both.

The public yardstick: challenge A of Unsloth (2025) asks for one Triton kernel that dequantizes NF4
1.15 times as fast as their `fast_dequantize` on a T4, which calls bitsandbytes' kernels, as peft
does. The rules are quoted in github.com/byi8220/unsloth-puzzles.
"""

import torch

from benchmarks.gpu_common import (
    as_graph, copies, forget, random_base, random_quantized, target, timed,
)
from quant import DYNAMIC_CODEBOOK, NF4_CODEBOOK

ROWS = (1, 2, 4, 8, 16)


def per_call(functions, device):
    """Seconds of a call, of functions that do the same on different buffers."""

    def all_of_them():
        for function in functions:
            function()

    return timed(as_graph(all_of_them, device), device, seconds=0.3) / len(functions)


def in_bitsandbytes(q, dtype):
    """A weight of ours as bitsandbytes has it, the same bytes: its codes and its state."""
    import bitsandbytes.functional as bnb

    nested = bnb.QuantState(
        absmax=q.nested_absmax, code=DYNAMIC_CODEBOOK.to(q.codes.device), blocksize=256,
        dtype=torch.float32,
    )
    return q.codes.view(-1, 1), bnb.QuantState(
        absmax=q.absmax, shape=q.shape, code=NF4_CODEBOOK.to(q.codes.device), blocksize=64,
        quant_type="nf4", dtype=dtype, offset=q.offset, state2=nested,
    )


def theirs(weights, name, arguments, dtype):
    """Functions of bitsandbytes that do the same; none without it, or the reason in words."""
    try:
        return checked(weights, name, arguments, dtype)
    except ImportError:
        return []
    except Exception as error:  # ours are measured all the same
        return f"{type(error).__name__}: {error}"


def checked(weights, name, arguments, dtype):
    """Functions of bitsandbytes, once they are seen to do the same."""
    import bitsandbytes as bnb

    functions = []
    for q, argument in zip(weights, arguments):
        codes, state = in_bitsandbytes(q, dtype)
        if name == "dequantize":
            out = dict(out=argument) if argument.is_cuda else {}
            call = lambda c=codes, s=state, o=out: bnb.functional.dequantize_4bit(c, s, **o)
        else:
            call = lambda c=codes, s=state, x=argument: bnb.matmul_4bit(x, c, s)
        functions.append(call)
    expected = weights[0].dequantize(dtype)
    expected = expected if name == "dequantize" else arguments[0] @ expected.T
    difference = (functions[0]() - expected).float().norm() / expected.float().norm()
    if difference > 0.02:
        raise ValueError(f"bitsandbytes' {name} is something else: {difference:.3f} off")
    return functions


@torch.no_grad()
def kernels(sizes):
    """Bandwidth: of a copy, of `dequantize`, and of `matvec` with 1 to 8 rows."""
    device, dtype = sizes.device, sizes.dtype
    source = torch.ones(sizes.copy_bytes, dtype=torch.uint8, device=device)
    other = torch.empty_like(source)
    seconds = timed(lambda: other.copy_(source), device, seconds=0.5)
    copy = 2 * source.nbytes / seconds
    yield dict(what="copy", shape=f"{source.nbytes:,} bytes", us=1e6 * seconds, GB_per_s=copy / 1e9)
    del source, other
    us = theirs_us = 0.0
    for shape in sizes.layers:
        forget(device)
        for found in of_shape(shape, copy, device, dtype):
            yield found
            if found["what"] == "dequantize" and "theirs_us" in found:
                us, theirs_us = us + found["us"], theirs_us + found["theirs_us"]
    if us:
        faster = target("bitsandbytes' time / ours", theirs_us / us, ">= 1.15")
        yield dict(what="Unsloth's challenge A", shape="all", us=us, theirs_us=theirs_us,
                   targets=[faster])


def of_shape(shape, copy, device, dtype):
    """The rows of one weight's shape."""
    one = random_quantized(shape, device)
    numel, nbytes = shape[0] * shape[1], one.nbytes
    many = copies(nbytes + numel * dtype.itemsize, device)
    weights = [one] + [random_quantized(shape, device) for _ in range(many - 1)]
    outs = [torch.empty(shape, dtype=dtype, device=device) for _ in weights]
    ours = [lambda q=q, out=out: q.dequantize(dtype, out) for q, out in zip(weights, outs)]
    traffic = nbytes + outs[0].nbytes
    yield row("dequantize", shape, "", ours, theirs(weights, "dequantize", outs, dtype), traffic,
              copy, ">= 0.8", "<= 1", device)
    del outs, ours
    many = copies(nbytes, device)
    weights += [random_quantized(shape, device) for _ in range(many - len(weights))]
    for rows in ROWS:
        xs = [torch.randn(rows, shape[1], dtype=dtype, device=device) for _ in weights]
        ours = [lambda q=q, x=x: q.product(x) for q, x in zip(weights, xs)]
        other = theirs(weights, "matvec", xs, dtype)
        traffic = nbytes + rows * sum(shape) * dtype.itemsize
        yield row("matvec", shape, rows, ours, other, traffic, copy, ">= 0.6", "< 1", device)


def row(what, shape, rows, ours, other, traffic, copy, bandwidth, time, device):
    """Ours beside a copy and, if there are any, beside theirs. traffic: bytes read and written"""
    seconds = per_call(ours, device)
    share = traffic / seconds / copy
    result = dict(
        what=what, shape=" x ".join(map(str, shape)), rows=rows, us=1e6 * seconds,
        GB_per_s=traffic / seconds / 1e9, of_a_copy=share,
        targets=[target("of a copy", share, bandwidth)],
    )
    if isinstance(other, str):
        return result | dict(error=f"bitsandbytes: {other}".splitlines()[0])
    if other:
        try:
            result["theirs_us"] = 1e6 * per_call(other, device)
        except RuntimeError as error:  # what cannot be in a graph
            return result | dict(error=f"bitsandbytes: {error}".splitlines()[0])
        result["targets"].append(target("/ bitsandbytes", result["us"] / result["theirs_us"], time))
    return result


def tokens(sizes):
    """A token after another, one prompt: from 4 bits beside 16; as it runs, and as a CUDA graph."""
    rate, alone = {}, {}
    for name, quant in (("16 bits", "none"), ("4 bits", "nf4")):
        forget(sizes.device)
        base = random_base(sizes.large, quant, sizes.dtype, sizes.device)
        prompt = torch.arange(5, 21, device=sizes.device).unsqueeze(0)
        several = lambda n: timed(lambda: base.generate(prompt, n), sizes.device)
        # Without the first token, whose prompt is read at once.
        seconds = (several(sizes.new_tokens + 1) - several(1)) / sizes.new_tokens
        rate[name] = 1 / max(seconds, 1e-9)
        alone[name] = timed(as_graph(one_token(base, prompt), sizes.device), sizes.device, 1.0)
        result = dict(what=name, ms_per_token=1e3 / rate[name], tokens_per_s=rate[name])
        yield result | dict(graph_ms=1000 * alone[name])
        del base
    compared = [
        target("tokens/s, 4 bits / 16 bits", rate["4 bits"] / rate["16 bits"], ">= 2"),
        target("the same in graphs", alone["16 bits"] / alone["4 bits"], ">= 2"),
    ]
    yield dict(what="4 bits / 16 bits", targets=compared)


def one_token(base, prompt):
    """A function that computes the logits after a prompt and one more token."""
    cache, T = base.new_cache(prompt.shape[1] + 1), prompt.shape[1]
    with torch.no_grad():
        base.hidden(prompt, cache=cache)

    @torch.no_grad()
    def again():
        for layer in cache:
            layer.length = T
        return base.head(base.hidden(prompt[:, :1], cache=cache))

    return again

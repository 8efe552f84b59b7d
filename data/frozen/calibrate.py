"""model.py quantize --calibrate: 4-bit codes that are chosen with a layer's inputs in mind.

A layer computes W x. Its inputs x are correlated, so what rounding takes from one column of W (out,
in), others can make good. GPTQ (arXiv 2210.17323) rounds one column at a time, and then changes all
that are not rounded yet so that the outputs W x change least. With H the mean of x x^T over some
texts, and its Cholesky factor L, H = L L^T, column j becomes q_j and each column k < j changes by

    w_k -= (w_j - q_j) V_jk / V_jj            V = L^-1, lower triangular

It begins at the last column, since the columns 0 to j have the leading part of H, and so of L and V
as well: one factor serves all. Before, the columns are sorted, so that those with large inputs come
last: these are rounded while most others can make it good. Scales, format and bytes stay.
"""

from contextlib import ExitStack
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from tqdm import tqdm

from data import InputError, leaf
from data.devices.device import pick_dtype
from data.formats import config_json, hub
from data.generate.sampling import pad_left
from data.tokens.tokenizer import load_tokenizer
from quant import CODEBOOKS, Linear4bit, codebook_on, nearest

TEXTS, LENGTH = 128, 256  # number of texts, and of the first tokens of each
DAMPING = 0.1  # added to the diagonal of H, as a fraction of its mean
COLUMNS = 64  # all columns before these change at once
TOKENS = 4096  # of x in one product, so that little memory is needed


def read_texts(file, folder, n=0, seed=0):
    """n lists of ids (0: TEXTS), or fewer: of a .txt, or of instructions (data/README.md)."""
    shape, kind = config_json.read(folder), "text" if file.lower().endswith(".txt") else "instruct"
    length, C = shape["max_positions"], shape["n_embd"]
    length = min(LENGTH, length) if kind == "text" else length  # a long question is cut below
    cfg = dict(data=file, sequence_len=length, max_examples=n or TEXTS, eval_only=True)
    unused = dict(held_out=0, data_seed=seed, sweep=False, stream=False)
    task = leaf(kind).load(SimpleNamespace(**cfg, **unused), load_tokenizer(folder))
    texts = [ids[:LENGTH] for ids, _ in task.held_out][: n or TEXTS]  # a record may give several
    if (tokens := sum(map(len, texts))) < C:
        has = f"has only {tokens} tokens for the {C} channels of {folder}"
        raise InputError(f"--calibrate {file} {has}: give more texts.")
    print(*task.notes, f"{file}: {len(texts)} texts with {tokens:,} tokens", sep="\n")
    return texts


def inverse_factor(x, where=""):
    """V, fp32 (in, in), of a layer's inputs x (tokens, in), and the order of its columns."""
    H = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    for part in x.split(TOKENS):
        # All tokens count the same. The first one of a text has inputs a hundred times larger.
        part = F.normalize(part.float(), dim=1)
        H.addmm_(part.T, part)
    if not H.isfinite().all():
        raise InputError(f"{where} has inputs that are not finite: give --device cpu.")
    order = H.diagonal().argsort(stable=True)
    H = H[order][:, order].to(torch.float32 if H.device.type == "mps" else torch.float64)
    H.diagonal().add_(DAMPING * H.diagonal().mean() + 1e-30)
    L, unit = torch.linalg.cholesky(H), torch.eye(len(H), out=H)  # in its memory
    return torch.linalg.solve_triangular(L, unit, upper=False).float(), order


def choose_codes(weight, scales, V, order, codebook):
    """The codes, uint8 (out, in), of a weight (out, in). scales: (out, in), one for each value"""
    W, scales = weight.T[order].float(), scales.T[order]  # a column is a row here
    codes, errors = torch.empty_like(W, dtype=torch.uint8), torch.empty_like(W)
    for stop in range(len(W), 0, -COLUMNS):
        start = max(0, stop - COLUMNS)
        for j in reversed(range(start, stop)):
            codes[j] = code = nearest(W[j] / scales[j], codebook)
            errors[j] = (W[j] - codebook_on(codebook, W.device)[code.int()] * scales[j]) / V[j, j]
            W[start:j].addr_(V[j, start:j], errors[j], alpha=-1)
        W[:start].addmm_(V[start:stop, :start].T, errors[start:stop], alpha=-1)
    return codes[order.argsort()].T


@torch.no_grad()
def calibrate(base, folder, texts):
    """Choose the codes of a 4-bit base anew, during one pass of some texts. A layer's codes are
    chosen when its inputs arrive, so these have passed calibrated layers only.

    folder: with the weights before quantization; texts: lists of ids
    """
    tensors, dtype = hub.open_files(folder, base.config), pick_dtype("auto", base.device)
    idx, keep = pad_left(texts, device=base.device)
    layers = {m: path for path, m in base.named_modules() if isinstance(m, Linear4bit)}
    bar, known = tqdm(total=len(layers), desc="calibrate", unit="layer", leave=False), [None, None]

    def before(linear, args):
        if args[0] is not known[0]:  # queries, keys and values have the same inputs
            known[:] = args[0], inverse_factor(args[0][keep.bool()], layers[linear])
        weight, codebook = linear.weight, CODEBOOKS[linear.weight.kind]
        weight.codes.fill_(17 * codebook.argmax())  # twice the code of level 1: scales alone
        theirs = tensors[hub.their_name(base.config.family, f"{layers[linear]}.weight")]()
        codes = choose_codes(theirs.to(base.device), weight.dequantize(), *known[1], codebook)
        codes = F.pad(codes.reshape(-1), (0, codes.numel() % 2))
        weight.codes.copy_(codes[::2] << 4 | codes[1::2])
        bar.update()

    with bar, ExitStack() as hooks:
        # On a CPU it computes in fp32, whatever the folder's dtype.
        hooks.enter_context(base.embed_tokens.register_forward_hook(lambda m, a, x: x.to(dtype)))
        for linear in layers:
            hooks.enter_context(linear.register_forward_pre_hook(before))
        (base.project_out or torch.nn.Identity())(base.hidden(idx, keep))  # OPT-350m has one

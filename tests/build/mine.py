"""Build QST yourself: fourteen empty pieces, in the order of the papers.

Put your code in place of a `raise NotImplementedError`, and run the tests of that piece:

    python -m pytest tests/build -k gate

README.md beside this file says what to read first and how long a piece takes. When all are written,
this command trains the built-in example with your code in place of the project's:

    python tests/build/train.py

    B, T  batch and length        C = n_embd        c = C / reduction        V = vocab_size
"""

import torch
from torch.nn import functional as F  # noqa: F401  for your code

# --------------------------------------------------------------------------------------
# QLoRA (arXiv 2305.14314): four bits per weight


def nf4_codebook():
    """Make the 16 levels of NF4: fp32 (16,), ascending, from -1 to 1 (QLoRA §3).

    Levels are quantiles of N(0, 1), divided by the largest; `statistics.NormalDist().inv_cdf(p)`
    is the quantile of probability p.
    Eight are above 0: p falls in equal steps from 0.9677083 to 1/2, without 1/2.
    Seven are below 0: p rises in equal steps from 1 - 0.9677083 to 1/2, without 1/2.
    One is exactly 0.
    """
    raise NotImplementedError


def quantize_blocks(values, codebook, block_size):
    """Replace each value by the code of the nearest level (QLoRA §2).

        absmax_b = max |w| in block b               w ~ codebook[code] * absmax_b

    values: fp32 (n,), in blocks of `block_size` neighbours; the last block may be shorter
    codebook: fp32 (16,) or (256,), between -1 and 1; FP4's is not sorted
    returns codes, uint8 (n,), and absmax, fp32 (number of blocks,)

    A value in the middle may go to either level. In a block of zeros, absmax is 0 and each code is
    that of level 0. Weights of any size have the same codes: 1e-20 is not small.
    """
    raise NotImplementedError


def pack_codes(codes):
    """Pack two codes into a byte: uint8 (n,), each below 16 -> uint8 (ceil(n / 2),).

    The first code of a pair is in the high four bits. If n is odd, a 7 (NF4's code of 0) fills the
    last byte.
    """
    raise NotImplementedError


def double_quantize(absmax, codebook, quantize):
    """Quantize the scales themselves to 8 bits (QLoRA §3, Double Quantization).

        offset = mean of absmax                     absmax - offset is quantized in blocks of 256

    absmax: fp32 (m,), one per block of 64 weights; codebook: fp32 (256,)
    quantize: `quantize_blocks`, yours or the project's
    returns codes, uint8 (m,); nested_absmax, fp32 (ceil(m / 256),); offset, fp32 ()
    """
    raise NotImplementedError


def dequantize(codes, absmax, nested_absmax, offset, codebook, dynamic, n):
    """Undo all of the above: the n weights, fp32 (n,) (QLoRA §3; QST §3.1).

        scale_b = dynamic[absmax_b] * nested_absmax[b // 256] + offset
        w_j     = codebook[code_j] * scale[j // 64]

    codes: uint8 (ceil(n / 2),), two a byte; codebook: fp32 (16,); dynamic: fp32 (256,)
    absmax: uint8 (ceil(n / 64),); where nested_absmax and offset are None, fp32: the scales
    """
    raise NotImplementedError


class FrozenLinear(torch.autograd.Function):
    """y = x W^T + bias with a frozen 4-bit W. Backward needs only dL/dx, and unpacks W again: no
    activation and no unpacked W is kept in between (QLoRA §3)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        """x: (..., n_in); weight: `weight.dequantize(dtype)` unpacks W, (n_out, n_in)
        bias: (n_out,) or None
        returns (..., n_out), in x's dtype; use `F.linear`, so that the last bit is the project's
        """
        raise NotImplementedError

    @staticmethod
    def backward(ctx, grad):
        """grad: dL/dy, (..., n_out)
        returns dL/dx, (..., n_in), and None for weight and bias
        """
        raise NotImplementedError


# --------------------------------------------------------------------------------------
# QST (arXiv 2401.07159 §3.2): the side network


def low_rank(h_f, down, up, activation):
    """Downsample a hidden state through a low-rank pair, with a nonlinearity between: LoRA's has
    none, an adapter's is SiLU.

    h_f: (..., C); down: (rank, C); up: (c, rank); activation: a function of a tensor
    returns (..., c)
    """
    raise NotImplementedError


def pooling(h_f, reduction, kind):
    """Downsample without a parameter: the maximum or the mean of `reduction` neighbouring channels.

    h_f: (..., C); kind: "maxpool" or "avgpool"
    returns (..., C / reduction)
    """
    raise NotImplementedError


def gate(z, h_g, gamma):
    """Mix a downsampled hidden state of the base with the side network's own.

        (1 - beta) * z + beta * h_g                 beta = sigmoid(gamma)

    z: downsample_i(h_f_i), (B, T, c); h_g: h_g_{i-1}, (B, T, c); gamma: ()
    """
    raise NotImplementedError


def side_step(i, h_f, h_g, downsample, gate, gamma, layers):
    """Compute h_g_i from h_f_i and h_g_{i-1}, for i = 1, ..., N, as the paper counts.

        h_g_i = layer_i((1 - beta_i) * downsample_i(h_f_i) + beta_i * h_g_{i-1})

    h_f: (B, T, C); h_g: (B, T, c)
    downsample: list of functions downsample_0, ..., downsample_N; the first is the embedding's
    gate: `gate`, yours or the project's
    gamma: gamma_1, ..., gamma_N, (N,); layers: list of functions layer_1, ..., layer_N, which have
        their own residual connections
    """
    raise NotImplementedError


def mix(h_f, h_g, alpha, upsample):
    """Compute the input of the frozen LM head: (B, T, C), in h_f's dtype.

        h = alpha * h_f_N + (1 - alpha) * upsample(h_g_N)

    h_f: (B, T, C); h_g: (B, T, c); upsample: a function, c -> C channels
    alpha: fp32 (), also where h_f and h_g have 16 bits; it starts at 1, and may leave [0, 1]
    """
    raise NotImplementedError


# --------------------------------------------------------------------------------------
# Training


def answer_loss(logits, targets):
    """Mean cross-entropy of the tokens that count, those of the answer: fp32 ().

    logits: (B, T, V), in fp32 or 16 bits
    targets: (B, T); targets[b, t] is the id that follows idx[b, t], already shifted. Positions of
        the question and of padding have -100, and do not count
    """
    raise NotImplementedError


def training_step(loss_of, optimizer, batches, learning_rate, grad_clip):
    """Take one step with the gradients of several batches, and return their loss, without a graph.

        L = sum over batches of share * loss_of(idx, targets)

    loss_of: a function of (idx, targets): the mean loss of a batch, with a graph
    batches: list of (idx, targets, share); share: the fraction of the step's targets
    optimizer: a torch optimizer. A group's learning rate is `learning_rate` times group["factor"]
    grad_clip: the largest norm of all gradients together; 0: no limit
    The next step begins without gradients.
    """
    raise NotImplementedError


def newton_schulz(matrix, steps=5):
    """Bring all singular values near 1 and keep the singular vectors: Muon's step (arXiv
    2502.16982 §2), for `--optimizer muon`.

        X_0     = M / |M|                           the Frobenius norm
        X_{k+1} = a X + b A X + c A A X             A = X X^T, (a, b, c) = (3.4445, -4.7750, 2.0315)

    matrix: fp32 (m, n); while alpha is 1, the side network's gradients are zero matrices
    returns fp32 (m, n), with singular values between 0.7 and 1.2; of a zero matrix, zeros
    """
    raise NotImplementedError

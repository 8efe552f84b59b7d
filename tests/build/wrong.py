"""Wrong pieces, such as students write, each a few words away from the project's own code. It has
spoilers: read it after you have built your own."""

import reference
import torch

import quant

NF4, gather = quant.NF4_CODEBOOK, torch.Tensor.repeat_interleave


def even_levels():
    return torch.linspace(-1, 1, 16)


def no_zero():
    half = torch.linspace(0.9677083, 0.5, 9)[:-1]
    levels = torch.special.ndtri(torch.cat([1 - half, half])).sort().values
    return levels / levels.max()


def not_divided():
    return 1.848 * NF4


def eight_below():
    return -NF4.flip(0)


def in_fp64():
    return NF4.double()


def largest_value(values, codebook, size):
    codes, _ = reference.quantize_blocks(values, codebook, size)
    return codes, torch.stack([block.max() for block in values.split(size)])


def level_below(values, codebook, size):
    _, absmax = reference.quantize_blocks(values, codebook, size)
    scaled = values / gather(absmax.clamp(min=1e-38), size)[: len(values)]
    return (torch.searchsorted(codebook, scaled, right=True) - 1).to(torch.uint8), absmax


def one_scale(values, codebook, size):
    return reference.quantize_blocks(values, codebook, len(values))


def zero_by_zero(values, codebook, size):
    codes, absmax = reference.quantize_blocks(values, codebook, size)
    return codes.masked_fill(gather(absmax == 0, size)[: len(values)], 15), absmax


def a_bit_more(values, codebook, size):
    _, absmax = reference.quantize_blocks(values, codebook, size)
    scaled = values / (gather(absmax, size)[: len(values)] + 1e-8)
    return (scaled.unsqueeze(1) - codebook).abs().argmin(dim=1).to(torch.uint8), absmax


def sorted_search(values, codebook, size):
    codes, absmax = reference.quantize_blocks(values, codebook.sort().values, size)
    return codes, absmax


def int64_codes(values, codebook, size):
    codes, absmax = reference.quantize_blocks(values, codebook, size)
    return codes.long(), absmax


def low_half_first(codes):
    packed = reference.pack_codes(codes)
    return (packed << 4) | (packed >> 4)


def only_pairs(codes):
    return reference.pack_codes(codes)[: len(codes) // 2]


def nothing_subtracted(absmax, codebook, quantize):
    return *quantize(absmax, codebook, 256), absmax.mean()


def blocks_of_64(absmax, codebook, quantize):
    return *quantize(absmax - absmax.mean(), codebook, 64), absmax.mean()


def smallest_subtracted(absmax, codebook, quantize):
    return *quantize(absmax - absmax.min(), codebook, 256), absmax.min()


def halves_swapped(codes, *args):
    return reference.dequantize((codes << 4) | (codes >> 4), *args)


def no_offset(codes, absmax, nested, offset, *args):
    offset = None if offset is None else torch.zeros(())
    return reference.dequantize(codes, absmax, nested, offset, *args)


def one_too_many(*args):
    *args, n = args
    return reference.dequantize(*args, n + n % 2)


class Frozen(torch.autograd.Function):
    """The project's, with a mistake in a subclass."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        return quant._FrozenLinear.forward(ctx, x, None, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return quant._FrozenLinear.backward(ctx, grad)[0], None, None


class KeepsX(Frozen):
    @staticmethod
    def forward(ctx, x, weight, bias):
        y = Frozen.forward(ctx, x, weight, bias)
        ctx.save_for_backward(x)
        return y


class KeepsW(Frozen):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.dense = weight.dequantize(x.dtype)
        return Frozen.forward(ctx, x, weight, bias)


class Transposed(Frozen):
    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight.dequantize(grad.dtype).T, None, None


class NoBias(Frozen):
    @staticmethod
    def forward(ctx, x, weight, bias):
        return Frozen.forward(ctx, x, weight, None)


def activation_behind(h_f, down, up, activation):
    return activation(reference.low_rank(h_f, down, up, lambda x: x))


def untransposed(h_f, down, up, activation):
    return reference.low_rank(h_f, down.T, up.T, activation)


def far_channels(h_f, reduction, kind):
    apart = h_f.unflatten(-1, (reduction, -1)).transpose(-1, -2).flatten(-2)
    return reference.pooling(apart, reduction, kind)


def gate_swapped(z, h_g, gamma):
    return reference.gate(h_g, z, gamma)


def no_sigmoid(z, h_g, gamma):
    return (1 - gamma) * z + gamma * h_g


def constant_gate(z, h_g, gamma):
    return reference.gate(z, h_g, gamma.detach())


def counted_from_0(i, h_f, h_g, downsample, *args):
    return reference.side_step(i, h_f, h_g, [None, *downsample], *args)


def next_gamma(i, h_f, h_g, downsample, gate, gamma, layers):
    return reference.side_step(i, h_f, h_g, downsample, gate, gamma.roll(-1), layers)


def one_more_residual(i, h_f, h_g, *args):
    return reference.side_step(i, h_f, h_g, *args) + h_g


def mix_swapped(h_f, h_g, alpha, upsample):
    return reference.mix(h_f, h_g, 1 - alpha, upsample)


def as_released(h_f, h_g, alpha, upsample):
    return reference.mix(h_f, h_g, torch.sigmoid(alpha), upsample)


def rounded_alpha(h_f, h_g, alpha, upsample):
    return reference.mix(h_f, h_g, alpha.to(h_f.dtype), upsample)


def all_positions(logits, targets):
    counted = (targets != -100).float().mean()
    return reference.answer_loss(logits, targets) * counted


def shifted_again(logits, targets):
    return reference.answer_loss(logits[:, :-1], targets[:, 1:])


def in_16_bits(logits, targets):
    return reference.answer_loss(logits, targets).to(logits.dtype)


def gradients_left(loss_of, optimizer, batches, *args):
    loss = reference.training_step(loss_of, optimizer, batches, *args)
    loss_of(*batches[0][:2]).backward()
    return loss


def step_per_batch(loss_of, optimizer, batches, *args):
    return sum(reference.training_step(loss_of, optimizer, [batch], *args) for batch in batches)


def no_shares(loss_of, optimizer, batches, *args):
    batches = [(idx, targets, 1.0) for idx, targets, _ in batches]
    return reference.training_step(loss_of, optimizer, batches, *args)


def no_factor(loss_of, optimizer, batches, *args):
    for group in optimizer.param_groups:
        group["factor"] = 1.0
    return reference.training_step(loss_of, optimizer, batches, *args)


def never_clipped(loss_of, optimizer, batches, learning_rate, grad_clip):
    return reference.training_step(loss_of, optimizer, batches, learning_rate, 0)


def diverges(matrix, steps=5):
    return reference.newton_schulz(matrix, steps) * 1e30


def too_few_steps(matrix, steps=5):
    return reference.newton_schulz(matrix, 1)


def zero_by_its_norm(matrix, steps=5):
    return reference.newton_schulz(matrix, steps) * (matrix.norm() / matrix.norm())

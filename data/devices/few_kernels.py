"""Few kernels for a narrow network: a GPU computes each of them faster than Python starts it."""

import copy

import torch
from torch.nn import functional as F


def is_cast(linear):
    """Whether the weight of a linear layer is one of `cast_weights`, with a gradient to pass on."""
    return isinstance(linear, torch.nn.Linear) and linear.weight.grad_fn is not None


def product(x, *linears):
    """The outputs of linear layers side by side, by one product for all."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    return F.linear(x, torch.cat([linear.weight for linear in linears]), bias)


class Cast(torch.autograd.Function):
    """Cast tensors by a few kernels for all, and their gradients back to fp32."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        new = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(new, tensors)
        return tuple(new)

    @staticmethod
    def backward(ctx, *grads):
        return None, *Cast.forward(None, torch.float32, *grads)


def cast_weights(side, dtype):
    """A side network with this one's weights in `dtype`, cast once for a step and not for each use;
    it shares all else. Where there is nothing to cast, it is this one."""
    if torch.compiler.is_compiling() or side.upsample.weight.dtype == dtype:
        return side
    weights = [p for name, p in side.named_parameters()
               if not name.startswith(("alpha", "gamma", "classifier"))]  # used in fp32, or once
    new = with_weights(side, dict(zip(weights, Cast.apply(dtype, *weights))))
    if side.gamma is not None:
        new.beta = torch.sigmoid(side.gamma).to(dtype).unbind()
    return new


def with_weights(module, weights):
    """A copy of a module that has other weights, {parameter: tensor}, and shares all else."""
    new = copy.copy(module)
    new._parameters = {name: weights.get(p, p) for name, p in new._parameters.items()}
    new._modules = {name: m and with_weights(m, weights) for name, m in new._modules.items()}
    return new

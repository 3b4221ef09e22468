"""Models for property tests: parameters of any dtype, shape and bits, and any choice of their entries to train."""

from __future__ import annotations

import hypothesis
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import sprand
from checkpoints import DTYPES

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
SHAPES = ((), (1,), (0,), (7,), (5, 3), (16, 24), (2, 0), (2, 3, 4), (1, 1, 1))
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Weights(torch.nn.Module):
    """Parameters of given names and shapes; two names may be one parameter."""

    def __init__(self, tensors, tied=False):
        super().__init__()
        for name, value in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(value.clone()))
        if tied:
            self.again = self._parameters[next(iter(tensors))]


def finite_bits(generator, shape, dtype):
    """Random bit patterns: every size of number, both zeros, subnormals; none that is not finite."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = max(1, torch.Size(shape).numel())
    bits = torch.randint(-(2**15), 2**15, (count, size // 2), generator=generator, dtype=torch.int16)
    values = bits.view(BITS[dtype]).view(dtype).flatten()[: torch.Size(shape).numel()]
    values = torch.where(torch.isfinite(values), values, torch.zeros((), dtype=dtype))
    kind = torch.randint(0, 3, values.shape, generator=generator)
    near = torch.randn(values.shape, generator=generator).to(dtype) * 0.02
    return torch.where(kind == 0, values, near).view(shape).clone()


@st.composite
def models(draw):
    """Tensors of one dtype, and indices of the entries that train: none, some or all of each."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    tensors = {f"w{i}": finite_bits(generator, shape, dtype) for i, shape in enumerate(shapes)}
    chosen = {}
    for name, value in tensors.items():
        share = draw(st.sampled_from((0.0, 0.3, 1.0)))
        indices = (torch.rand(value.numel(), generator=generator) < share).nonzero().flatten()
        if indices.numel():
            chosen[name] = indices
    hypothesis.assume(chosen)
    return generator, tensors, chosen


def adapted(generator, tensors, chosen, tied=False):
    model = sprand.apply(Weights(tensors, tied), strategy=chosen)
    for p in sprand.parameters(model):
        sizes = 10.0 ** torch.randint(-20, 5, p.shape, generator=generator).float()
        p.data = torch.randn(p.shape, generator=generator) * sizes
    sprand.write(model)
    return model

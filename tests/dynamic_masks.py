"""What the tests of dynamic masks share: a training loop, a strategy, and a literal reference in Python and fp64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import sprand
from models import MLP, built, points_and_labels

LR, BETAS, EPS, DECAY = 0.02, (0.9, 0.999), 1e-8, 0.05
OPTIMIZERS = {
    "SparseAdamW": lambda model: sprand.SparseAdamW(model, lr=LR, weight_decay=DECAY),
    "AdamW": lambda model: torch.optim.AdamW(sprand.parameters(model), lr=LR, weight_decay=DECAY),
}


def train(model, optimizer, mask, steps, start=0):
    weight = model.first.weight
    for seed in range(start, start + steps):
        x, y = (value.to(weight.device) for value in points_and_labels(seed, weight.dtype))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        mask.step()
        optimizer.zero_grad()


class Drawn:
    """A strategy: another mask at each call, with as many entries as before."""

    def __init__(self, number=0):
        self.number = number

    def __call__(self, model):
        self.number += 1
        generator = torch.Generator().manual_seed(self.number)
        return {
            f"{name}.weight": torch.randperm(module.weight.numel(), generator=generator)[: module.sprand_indices.numel()]
            for name, module in model.named_modules()
            if isinstance(module, sprand.SparseModule)
        }


class Reference:
    """The same training with dense fp64 tensors, and one entry at a time in Python."""

    def __init__(self, model, active):
        self.model = model
        self.weights = {name: p.detach().clone().flatten() for name, p in model.named_parameters()}
        self.start = {name: w.clone() for name, w in self.weights.items()}
        self.delta = {name: dict.fromkeys(positions, 0.0) for name, positions in active.items()}
        self.anchor = {name: dict.fromkeys(positions, 0.0) for name, positions in active.items()}
        self.moments = {name: dict.fromkeys(positions, (0.0, 0.0)) for name, positions in active.items()}
        self.sums = {}

    def value(self, name, position):
        return float(self.start[name][position]) + self.delta[name].get(position, 0.0)

    def leaves(self):
        """The trained weights, whole."""
        leaves = {}
        for name, shape in ((n, p.shape) for n, p in self.model.named_parameters()):
            dense = self.start[name].clone()
            for position in self.delta.get(name, {}):
                dense[position] = self.value(name, position)
            leaves[name] = dense.view(shape).requires_grad_()
        return leaves

    def gradients(self, seed):
        leaves = self.leaves()
        x, y = points_and_labels(seed, torch.float64)
        F.cross_entropy(torch.func.functional_call(self.model, leaves, (x,)), y).backward()
        return {name: leaves[name].grad.flatten().tolist() for name in self.delta}

    def step(self, count, collect, exchanged):
        grads = self.gradients(count - 1)
        for name, delta in self.delta.items():
            grad = grads[name]
            for position in delta:
                m, v = self.moments[name][position]
                m, v = BETAS[0] * m + (1 - BETAS[0]) * grad[position], BETAS[1] * v + (1 - BETAS[1]) * grad[position] ** 2
                self.moments[name][position] = m, v
                root = math.sqrt(v / (1 - BETAS[1] ** count)) + EPS
                delta[position] += -LR * DECAY * delta[position] - LR * m / (1 - BETAS[0] ** count) / root
            if not collect:
                continue
            if name not in self.sums:
                free = sorted((p for p in range(len(grad)) if p not in delta), key=lambda p: (-abs(grad[p]), p))
                self.sums[name] = dict.fromkeys(free[: 4 * exchanged(len(delta))], 0.0)
            for position in self.sums[name]:
                self.sums[name][position] += grad[position]

    def regrow(self, exchanged):
        for name, delta in self.delta.items():
            count = exchanged(len(delta))
            dropped = sorted(delta, key=lambda p: (abs(delta[p] - self.anchor[name][p]), p))[:count]
            grown = sorted(self.sums[name], key=lambda p: (-abs(self.sums[name][p]), p))[:count]
            for position in dropped:
                del delta[position], self.moments[name][position]
            for position in grown:
                delta[position], self.moments[name][position] = 0.0, (0.0, 0.0)
            self.anchor[name] = dict(delta)
        self.sums = {}

    def recompute(self, picked):
        for name, delta in self.delta.items():
            for position in delta:
                self.start[name][position] = self.value(name, position)
            positions = picked[name].tolist()
            self.delta[name] = dict.fromkeys(positions, 0.0)
            self.moments[name] = {p: self.moments[name].get(p, (0.0, 0.0)) for p in positions}

    def check(self, model):
        for name, delta in self.delta.items():
            module = model.get_submodule(name.removesuffix(".weight"))
            assert module.sparse_entries().indices.tolist() == sorted(delta)
            expected = torch.tensor([delta[p] for p in sorted(delta)], dtype=torch.float64)
            torch.testing.assert_close(module.sprand_delta.detach(), expected, rtol=1e-9, atol=1e-12)


def pair(optimizer):
    model = sprand.apply(built(MLP).double(), density=0.1)
    active = {
        f"{n}.weight": m.sparse_entries().indices.tolist() for n, m in model.named_modules() if isinstance(m, sprand.SparseModule)
    }
    return model, OPTIMIZERS[optimizer](model), Reference(built(MLP).double(), active)


MODES = {
    "regrow": lambda changes=0: {"fraction": 0.3, "every": 6, "steps": 3},
    "random": lambda changes=0: {"fraction": 0.3, "every": 6, "grow": "random", "drop": "delta"},
    "recompute": lambda changes=0: {"every": 6, "mode": "recompute", "strategy": Drawn(changes)},
}

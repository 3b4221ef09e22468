"""Small models that the tests share: every kind of layer, a tiny Llama-like block, tied weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EveryLayer(nn.Module):
    """One of each: embedding, linear, norm, convolution, recurrent layer, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.linear = nn.Linear(32, 64)
        self.norm = nn.LayerNorm(64)
        self.conv = nn.Conv1d(64, 32, 3)
        self.rnn = nn.LSTM(32, 16, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(torch.relu(self.linear(self.embed(tokens))))
        hidden = self.conv(hidden.transpose(1, 2)).transpose(1, 2)
        return self.head(self.rnn(hidden)[0].mean(1))


EVERY_TARGET = {
    "target_modules": ["embed", "linear", "conv"],
    "target_parameters": ["linear.bias", "norm.weight", "norm.bias", "rnn.weight_ih_l0"],
    "modules_to_save": ["head"],
}


class MLP(nn.Module):
    """Three linear layers without anything else: what a formula on paper describes."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(16, width)
        self.second = nn.Linear(width, width, bias=False)
        self.third = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Tied(nn.Module):
    """An embedding whose weight is the output projection's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(tokens))))


def tokens_and_labels(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A batch for `EveryLayer`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 50, (8, 12), generator=generator), torch.randint(0, 5, (8,), generator=generator)


def points_and_labels(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A batch for `MLP`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 16, generator=generator, dtype=torch.float64).to(dtype), torch.randint(
        0, 4, (32,), generator=generator
    )


def built(cls: type[nn.Module], seed: int = 0, **kwargs) -> nn.Module:
    """A model with the same weights every time."""
    torch.manual_seed(seed)
    return cls(**kwargs)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's own tensors, without those of sprand."""
    return {name: value.clone() for name, value in model.state_dict().items() if "sprand" not in name}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The same tensors to the bit: -0.0 is not 0.0."""
    assert a.keys() == b.keys()
    for name in a:
        one, two = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (a[name], b[name]))
        assert torch.equal(one, two), name

"""Weight sync for RL: a policy learns from the rewards of what a copy of it samples, and the copy is sent k values per step."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import sprand
from sprand.serving import DeltaReceiver, DeltaSync

SYMBOLS, LENGTH = 16, 8


class Policy(nn.Module):
    """The logits of the next symbol after each symbol [batch, length] of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, 64)
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.Tanh())
        self.head = nn.Linear(64, SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(symbols)))


@torch.no_grad()
def sample(policy: nn.Module, batch: int) -> Tensor:
    """Sequences [batch, length + 1]: what an inference engine does."""
    symbols = torch.randint(0, SYMBOLS, (batch, 1))
    for _ in range(LENGTH):
        chosen = torch.multinomial(policy(symbols[:, -1:])[:, -1].softmax(-1), 1)
        symbols = torch.cat([symbols, chosen], 1)
    return symbols


def reward(symbols: Tensor) -> Tensor:
    """The share of symbols [batch, length] that follow their predecessor in the alphabet."""
    return (symbols[:, 1:] == (symbols[:, :-1] + 1) % SYMBOLS).float()


def main() -> None:
    """REINFORCE with a trainer and an engine that hold one policy, in sync to the bit."""
    torch.manual_seed(0)
    trainer = Policy().bfloat16()
    engine = copy.deepcopy(trainer)
    sprand.apply(trainer, density=0.05)
    optimizer = sprand.SparseAdamW(trainer, lr=1e-2, weight_decay=0.0)

    sync, receiver = DeltaSync(trainer), DeltaReceiver(engine)
    receiver.receive(sync.indices())  # between two machines: send it once by any transport
    for step in range(101):
        symbols = sample(engine, 256)
        advantage = reward(symbols) - reward(symbols).mean()
        log_p = trainer(symbols[:, :-1]).float().log_softmax(-1).gather(-1, symbols[:, 1:, None]).squeeze(-1)
        (-(advantage * log_p).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        receiver.receive(sync.values())
        if step % 25 == 0:
            print(f"step {step}: reward {reward(symbols).mean():.3f}")

    x = torch.arange(SYMBOLS)[:, None]
    print("trainer and engine give equal outputs:", torch.equal(trainer(x), engine(x)))
    print(f"once {sync.index_bytes:,} bytes, per step {sync.values_bytes:,}; all weights are {sync.dense_bytes:,}")


if __name__ == "__main__":
    main()

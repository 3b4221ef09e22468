"""Inputs for any model of transformers: calls that run, found by trying, and the loss of all their outputs."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from architectures.shrink import is_config

ROWS, TOKENS, SAMPLES, FRAMES = 2, 12, 1600, 32
FEATURES = ("get_image_features", "get_video_features", "get_audio_features")


@dataclass(frozen=True)
class Call:
    """One call of a model: a method by name, and its arguments."""

    method: str
    arguments: Mapping[str, Any]

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """The tensors of floating numbers that the call gives, always the same ones."""
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        arguments = {name: cast(value, dtype) for name, value in self.arguments.items()}
        torch.manual_seed(0)
        return list(floating(Caller()(model, self.method, arguments)))


class Caller(nn.Module):
    """Calls a method in a call of a module, as the model's own `forward` calls it."""

    def forward(self, model: nn.Module, method: str, arguments: Mapping[str, Any]) -> Any:
        return model(**arguments) if method == "forward" else getattr(model, method)(**arguments)


def outputs(model: nn.Module, calls: list[Call]) -> list[Tensor]:
    """What all calls give."""
    return [output for call in calls for output in call.outputs(model)]


def loss(model: nn.Module, calls: list[Call]) -> Tensor:
    """A weighted sum of everything that the calls give."""
    generator = torch.Generator().manual_seed(2)
    total = None
    for output in outputs(model, calls):
        weights = torch.randn(output.shape, generator=generator).to(output)
        part = (output * weights).sum().double()
        total = part if total is None else total + part
    return total


def calls_of(model: nn.Module) -> list[Call]:
    """Calls that run forward and backward: the first that does of `forward`, and one of each method that makes features.

    Raises:
        ValueError: None does; the message has what the last of them said.
    """
    found, reasons = [], ["no input fits"]
    for method in ("forward", *FEATURES):
        if not hasattr(model, method):
            continue
        for arguments in attempts(model, getattr(model, method)):
            call = Call(method, arguments)
            try:
                value = loss(model, [call])
                if value is None or not value.requires_grad:
                    raise ValueError("no output has a gradient")
                value.backward()
                if not all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()):
                    raise ValueError("a gradient is not finite")
            except Exception as error:  # of any kind: other arguments may fit
                if method == "forward":
                    reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
                continue
            found.append(call)
            break
        if not found:
            raise ValueError(reasons[:2][-1])
    model.zero_grad(set_to_none=True)
    return found


def attempts(model: nn.Module, method: Any) -> Iterator[dict[str, Any]]:
    """Arguments that a method may take, those with most in them first."""
    parameters = {
        n: p for n, p in inspect.signature(method).parameters.items() if p.kind.name not in ("VAR_KEYWORD", "VAR_POSITIONAL")
    }
    required = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    sizes = Sizes(model)
    main = [model.main_input_name] if method.__name__ == "forward" and model.main_input_name in parameters else []
    first = [
        name
        for name in ("input_ids", "pixel_values", "input_features", "input_values", "decoder_input_ids", "bbox")
        if name in parameters
    ]
    sets = [[*first], [*main, "decoder_input_ids"], main, [n for n in first if n != "decoder_input_ids"], ["input_ids"], []]
    tried = set()
    for names in sets:
        wanted = tuple(dict.fromkeys([*required, *(name for name in names if name in parameters)]))
        if wanted in tried:
            continue
        tried.add(wanted)
        makers = [list(sizes.values(name)) for name in wanted]
        if all(makers):
            for values in itertools.islice(itertools.product(*makers), 12):
                yield {key: value for made in values for key, value in made.items() if key in parameters}


class Sizes:
    """What inputs of a model may look like."""

    def __init__(self, model: nn.Module) -> None:
        self.configs = list(configs(model.config))
        self.generator = torch.Generator().manual_seed(0)

    def of(self, *names: str, default: Any) -> Any:
        """The first of these fields that some part of the configuration has."""
        for name in names:
            for config in self.configs:
                value = config.__dict__.get(name)
                if value is not None and not isinstance(value, bool):
                    return value
        return default

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def ids(self, length: int) -> Tensor:
        vocabulary = self.of("vocab_size", "src_vocab_size", default=64)
        return torch.randint(4, max(5, min(96, vocabulary)), (ROWS, length), generator=self.generator)

    def values(self, name: str) -> Iterator[dict[str, Tensor]]:
        """Ways to fill an argument, each with what goes with it."""
        maker = getattr(self, name, None)
        if maker is not None:
            yield from maker()
        elif name.endswith("input_ids"):
            yield {name: self.ids(8)}

    def input_ids(self) -> Iterator[dict[str, Tensor]]:
        ids = self.ids(TOKENS)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        yield {"input_ids": ids}

    def bbox(self) -> Iterator[dict[str, Tensor]]:
        yield {"bbox": torch.tensor([1, 2, 3, 4]).expand(ROWS, TOKENS, 4).contiguous()}

    def pixel_values(self) -> Iterator[dict[str, Tensor]]:
        size = self.of("image_size", default=64)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = self.of("num_channels", "in_channels", "in_chans", default=3)
        channels = channels if isinstance(channels, int) else 3
        frames = self.of("num_frames", default=2)
        yield {"pixel_values": self.random(ROWS, channels, height, width)}
        yield {"pixel_values": self.random(ROWS, frames, channels, height, width)}
        patch, times = self.of("patch_size", default=14), self.of("temporal_patch_size", default=1)
        if isinstance(patch, int):
            flat = self.random(16, channels * times * patch * patch)
            grid = torch.tensor([[1, 4, 4]])
            yield {"pixel_values": flat, "image_grid_thw": grid, "grid_thw": grid}
        yield {"pixel_values": self.random(ROWS, channels, 64, 64)}
        yield {"pixel_values": self.random(ROWS, channels, 224, 224)}

    def pixel_values_videos(self) -> Iterator[dict[str, Tensor]]:
        yield from ({"pixel_values_videos": made["pixel_values"]} for made in itertools.islice(self.pixel_values(), 2))

    def input_features(self) -> Iterator[dict[str, Tensor]]:
        bins = self.of(
            "feature_projection_input_dim",
            "num_mel_bins",
            "n_mels",
            "input_feat_size",
            "feature_size",
            "input_feat_per_channel",
            "input_dim",
            default=80,
        )
        long = 2 * self.of("max_source_positions", default=FRAMES // 2)
        for length in dict.fromkeys((FRAMES, long)):
            yield {
                "input_features": self.random(ROWS, bins, length),
                "attention_mask": torch.ones(ROWS, length, dtype=torch.long),
            }
            yield {
                "input_features": self.random(ROWS, length, bins),
                "attention_mask": torch.ones(ROWS, length, dtype=torch.long),
            }
            yield {"input_features": self.random(ROWS, bins, length)}
            yield {"input_features": self.random(ROWS, length, bins)}

    def input_values(self) -> Iterator[dict[str, Tensor]]:
        yield {"input_values": self.random(ROWS, SAMPLES)}
        yield {"input_values": self.random(ROWS, 1, SAMPLES)}
        length, bins = self.of("max_length", default=FRAMES), self.of("num_mel_bins", default=80)
        yield {"input_values": self.random(ROWS, length, bins)}

    def inputs(self) -> Iterator[dict[str, Tensor]]:
        yield {"inputs": self.ids(TOKENS)}
        yield {"inputs": self.random(ROWS, TOKENS, self.of("d_model", default=64))}

    def spectrogram(self) -> Iterator[dict[str, Tensor]]:
        yield {"spectrogram": self.random(ROWS, FRAMES, self.of("model_in_dim", "num_mel_bins", default=80))}

    def past_values(self) -> Iterator[dict[str, Tensor]]:
        channels = self.of("num_input_channels", default=1)
        yield {"past_values": self.random(ROWS, self.of("context_length", default=FRAMES), channels)}
        yield {"past_values": self.random(ROWS, self.of("context_length", default=FRAMES))}

    def hidden_states(self) -> Iterator[dict[str, Tensor]]:
        yield {"hidden_states": self.random(ROWS, TOKENS, self.of("hidden_size", default=64))}
        for made in self.pixel_values():
            if "grid_thw" in made:
                yield {"hidden_states": made["pixel_values"], "grid_thw": made["grid_thw"]}

    def grid_thw(self) -> Iterator[dict[str, Tensor]]:
        yield {"grid_thw": torch.tensor([[1, 4, 4]])}

    def inputs_embeds(self) -> Iterator[dict[str, Tensor]]:
        yield {"inputs_embeds": self.random(ROWS, TOKENS, self.of("hidden_size", default=64))}


def configs(config: Any) -> Iterator[Any]:
    """A configuration and all those inside of it."""
    yield config
    for value in vars(config).values():
        if is_config(value):
            yield from configs(value)


def floating(value: Any) -> Iterator[Tensor]:
    """The tensors of floating numbers inside of an output, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from floating(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from floating(item)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A tensor of floating numbers in another dtype; all else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

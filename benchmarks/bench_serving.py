"""A pool under load: requests over HTTP on loopback for many adapters, and threads that ask for a thousand of them on disk."""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sprand
from report import RESULTS, Row, command_line, end_as_by_ctrl_c, progress, write_csv, write_markdown
from report import markdown as table
from sprand.serving import AdapterPool

EXAMPLE = Path(__file__).parents[1] / "examples" / "http_server.py"
COLUMNS = (
    "how", "adapters", "clients", "max_queue_delay", "requests", "wrong", "requests_per_second", "p50_seconds", "p99_seconds",
    "switches", "reads", "removals", "host_bytes", "host_limit",
)  # fmt: skip
TABLE = {
    "how": ("", ""), "adapters": ("adapters", ",d"), "clients": ("at once", "d"),
    "max_queue_delay": ("`max_queue_delay`, s", "g"),
    "requests": ("requests", ",d"), "wrong": ("wrong outputs", "d"), "requests_per_second": ("requests a second", ".1f"),
    "p50": ("p50, ms", ".0f"), "p99": ("p99, ms", ".0f"), "switches": ("switches", ",d"), "reads": ("read again from disk", ",d"),
    "mebibytes": ("host memory, MiB", ".2f"), "limit": ("`host_bytes`, MiB", ".2f"),
}  # fmt: skip
PROMPT, TOKENS = "w1 w2 w3", 8


@end_as_by_ctrl_c()
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    command = command_line(__file__, sys.argv[1:] if argv is None else argv)
    rows: list[Row] = []
    try:
        with progress(len(options.delays) + 1, "serving") as bar, tempfile.TemporaryDirectory() as folder:
            for delay in options.delays:
                rows.append(over_http(options, Path(folder) / f"{delay}", delay))
                bar.advance()
            rows.append(from_disk(options, Path(folder) / "many"))
            bar.advance()
    finally:
        if rows:
            write_csv(options.out / "serving.csv", rows, COLUMNS)
            mebibyte = 2.0**20
            shown = [
                row | {
                    "p50": 1e3 * row["p50_seconds"], "p99": 1e3 * row["p99_seconds"], "mebibytes": row["host_bytes"] / mebibyte,
                    "limit": None if row["host_limit"] is None else row["host_limit"] / mebibyte,
                }
                for row in rows
            ]  # fmt: skip
            about = (
                f"A Llama with random weights, {options.width} wide, 2 layers; over HTTP `examples/http_server.py` generates "
                f"{TOKENS} tokens for each request, clients and server in one process; from disk each request is one forward. An "
                "output is wrong if it is not that of its adapter alone: over HTTP the text, from disk a bit."
            )
            write_markdown(options.out / "serving.md", "Adapters under load", command, [("", about), ("", table(shown, TABLE))])
    return 0 if not any(row["wrong"] for row in rows) else 1


def llama(width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, bos_token_id=None, eos_token_id=None, **size)).eval()


def saved(model: nn.Module, folder: Path, count: int, answer: Callable[[], object]) -> dict[str, tuple[Path, object]]:
    """Adapters with random changes, each with positions of its own, and what the model answers with each."""
    made = {}
    for number in range(count):
        sprand.apply(model, density=0.01, seed=number, name=f"{number}")
        for p in sprand.parameters(model):
            p.data.normal_(std=0.3)
        path = sprand.save(model, folder / f"{number}")
        made[f"{number}"] = path, answer()
        sprand.unmerge(model)
    return made


def over_http(options: argparse.Namespace, folder: Path, delay: float) -> Row:
    """Clients of the example's server, each asking for random adapters, one after the other."""
    spec = importlib.util.spec_from_file_location("http_server", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    model = llama(options.width)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)

    def text() -> str:
        tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])

    adapters = saved(model, folder, options.adapters, text)
    pool = AdapterPool(model, max_queue_delay=delay)
    for name, (path, _) in adapters.items():
        pool.add(name, path)
    http = uvicorn.Server(uvicorn.Config(example.server(pool, tokenizer), port=0, log_level="warning"))
    thread = threading.Thread(target=http.run)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}"

    def ask(name: str) -> bool:
        return example.ask(url, prompt=PROMPT, adapter=name, max_new_tokens=TOKENS).split() == adapters[name][1].split()

    try:
        row = measured(options.clients, options.requests, list(adapters), ask)
    finally:
        http.should_exit = True
        thread.join()
    return row | of_pool(pool, "HTTP, generate", delay)


def from_disk(options: argparse.Namespace, folder: Path) -> Row:
    """Threads that ask for random adapters, of which few fit into memory."""
    model = llama(options.width)
    tokens = torch.randint(1, 64, (1, 8), generator=torch.Generator().manual_seed(0))

    def answer() -> Tensor:
        with torch.inference_mode():
            return model(tokens).logits.clone()

    adapters = saved(model, folder, options.many, answer)
    pool = AdapterPool(model)
    pool.add("0", adapters["0"][0])
    limit = 20 * pool.nbytes
    pool.close()
    pool = AdapterPool(model, host_bytes=limit)
    for name, (path, _) in adapters.items():
        pool.add(name, path)

    def ask(name: str) -> bool:
        with pool.use(name):
            return torch.equal(answer(), adapters[name][1])

    row = measured(options.threads, options.requests, list(adapters), ask)
    return row | of_pool(pool, "from disk, a forward", 0.0) | {"host_limit": limit}


def measured(clients: int, requests: int, names: Sequence[str], ask: Callable[[str], bool]) -> Row:
    """Requests for random names, so many at once, and their times."""
    source = random.Random(0)
    asked = [source.choice(names) for _ in range(requests)]

    def timed(name: str) -> tuple[float, bool]:
        start = time.perf_counter()
        right = ask(name)
        return time.perf_counter() - start, right

    with ThreadPoolExecutor(clients) as workers:
        start = time.perf_counter()
        answers = list(workers.map(timed, asked))
        seconds = time.perf_counter() - start
    times = sorted(duration for duration, _ in answers)
    return {
        "clients": clients, "requests": requests, "wrong": sum(not right for _, right in answers),
        "requests_per_second": requests / seconds, "p50_seconds": statistics.median(times),
        "p99_seconds": statistics.quantiles(times, n=100, method="inclusive")[98],
    }  # fmt: skip


def of_pool(pool: AdapterPool, how: str, delay: float) -> Row:
    numbers = pool.statistics()
    return {
        "how": how, "adapters": numbers.adapters, "max_queue_delay": delay, "switches": numbers.switches, "reads": numbers.reads,
        "removals": numbers.removals, "host_bytes": numbers.host_bytes, "host_limit": None,
    }  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--adapters", type=int, default=20, help="over HTTP")
    parser.add_argument("--clients", type=int, default=16, help="over HTTP, each with one request at a time")
    parser.add_argument("--many", type=int, default=1000, help="adapters on disk")
    parser.add_argument("--threads", type=int, default=64, help="that ask for those on disk")
    parser.add_argument("--requests", type=int, default=400, help="of each run")
    parser.add_argument(
        "--delays", nargs="+", type=float, default=[0.0, 0.05, 0.5], help="max_queue_delay of the pool, in seconds"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all?")
    options = parser.parse_args(argv)
    if options.quick:
        options.width, options.adapters, options.clients, options.many, options.threads = 32, 3, 3, 30, 8
        options.requests, options.delays = 30, [0.05]
    return options


if __name__ == "__main__":
    raise SystemExit(main())

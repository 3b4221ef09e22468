"""An HTTP server over an AdapterPool: each request names its adapter, and its text is streamed. Without arguments: a self-test.

python http_server.py MODEL NAME=ADAPTER ...    then: curl -N 127.0.0.1:8000/generate -d '{"adapter": "NAME", "prompt": "..."}'
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AsyncTextIteratorStreamer,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import sprand
from sprand.serving import AdapterPool


class Asked(BaseModel):
    """The body of a request; without an adapter the base model answers."""

    prompt: str
    adapter: str | None = None
    max_new_tokens: int = 64


def server(pool: AdapterPool, tokenizer: PreTrainedTokenizerFast) -> FastAPI:
    """POST /generate streams text, GET /metrics is for Prometheus."""
    app = FastAPI()

    async def texts(asked: Asked) -> AsyncIterator[str]:
        inputs = tokenizer(asked.prompt, return_tensors="pt", return_token_type_ids=False)
        async with pool.use_async(asked.adapter, timeout=60):
            streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            options = {"streamer": streamer, "max_new_tokens": asked.max_new_tokens, "do_sample": False}
            work = asyncio.create_task(asyncio.to_thread(pool.model.generate, **inputs, **options))
            work.add_done_callback(lambda _: streamer.end())  # also after an error, which the next line but one raises
            async for text in streamer:
                yield text
            await work

    @app.post("/generate")
    async def generate(asked: Asked) -> StreamingResponse:
        if asked.adapter is not None and asked.adapter not in pool:
            raise HTTPException(404, f"no adapter {asked.adapter!r}; there are {', '.join(pool)}")
        stream = texts(asked)
        try:
            first = await anext(stream)
        except TimeoutError as error:
            raise HTTPException(503, str(error)) from error

        async def all_texts() -> AsyncIterator[str]:
            yield first
            async for text in stream:
                yield text

        return StreamingResponse(all_texts(), media_type="text/plain")

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> str:
        return pool.statistics().prometheus()

    return app


def ask(url: str, **fields: object) -> str:
    """The whole answer to one request."""
    body = urllib.request.Request(f"{url}/generate", json.dumps(fields).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(body, timeout=120) as answer:
        return answer.read().decode()


def self_test(folder: str) -> None:
    """Tiny random models: six adapters are asked for at once, and each answer is that of a model with this adapter alone."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, bos_token_id=None, eos_token_id=None, **size)).eval()
    inputs, right = tokenizer("w1 w2 w3", return_tensors="pt", return_token_type_ids=False), {}
    for name in "abcdef":
        sprand.apply(model, density=0.2, seed=ord(name), name=name)
        for p in sprand.parameters(model):
            p.data.normal_(std=0.1)
        sprand.save(model, f"{folder}/{name}")
        right[name] = tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, 3:])
        sprand.unmerge(model)
    pool = AdapterPool(model, max_queue_delay=0.05)
    for name in right:
        pool.add(name, f"{folder}/{name}")
    http = uvicorn.Server(uvicorn.Config(server(pool, tokenizer), port=0, log_level="warning"))
    thread = threading.Thread(target=http.run)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}"
    with ThreadPoolExecutor(6) as clients:
        asked = [*right] * 4
        answers = clients.map(lambda name: ask(url, prompt="w1 w2 w3", adapter=name, max_new_tokens=12), asked)
        wrong = sum(answer.split() != right[name].split() for name, answer in zip(asked, answers, strict=True))
    http.should_exit = True
    thread.join()
    print(f"{len(asked)} requests for {len(right)} adapters, {wrong} wrong answers, {pool.statistics().switches} switches")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as output:
            self_test(output)
    else:
        served = AdapterPool(AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(), max_queue_delay=0.05)
        for adapter in sys.argv[2:]:
            served.add(*adapter.split("=", 1))
        uvicorn.run(server(served, AutoTokenizer.from_pretrained(sys.argv[1])))

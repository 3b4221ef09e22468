"""The CUDA kernels over all targets at once, run on the CPU: one launch, each target as if it were alone, nothing outside it."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from problems import INDEX_DTYPES, PROBLEMS, AdamWProblem, Problem, bits, make_adamw, make_entries

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = [(dtype, index_dtype) for dtype in DTYPES for index_dtype in INDEX_DTYPES]
EMPTY, LARGE = PROBLEMS[1], PROBLEMS[-1]
AT_EDGES = [Problem(f"{nnz} entries", 0, 64, 80, nnz) for nnz in (1, 3, 4, 5, 2047, 2048, 2049, 4097)]
SMALL = [Problem("few entries", 0, 5, 7, 6), Problem("one entry", 0, 3, 1, 1), EMPTY]
HYPER = (2**-7, 0.9, 0.999, 1e-8, 0.01, False)
WRITTEN = ("weights", "deltas", "exp_avgs", "exp_avg_sqs")


def interleaved(problems: list[Problem], kinds: list[tuple[torch.dtype, torch.dtype]]) -> AdamWProblem:
    """Targets after one step of training, every problem in turn for each pair of weight and index dtype."""
    parts = [make_adamw(problems, *kind, steps=1, seed=1000 * number) for number, kind in enumerate(kinds)]
    made = AdamWProblem(tuple(problems) * len(kinds), 0, grads=[[]])
    for target in range(len(problems)):
        for part in parts:
            for name in ("weights", "indices", "bases", "deltas", "exp_avgs", "exp_avg_sqs", "steps", "scales"):
                getattr(made, name).append(getattr(part, name)[target])
            made.grads[0].append(part.grads[0][target])
    for number, (delta, exp_avg, exp_avg_sq, step) in enumerate(
        zip(made.deltas, made.exp_avgs, made.exp_avg_sqs, made.steps, strict=True)
    ):
        generator = torch.Generator().manual_seed(number)
        delta.normal_(generator=generator)[::5] = 0
        exp_avg.normal_(generator=generator)
        exp_avg_sq.uniform_(generator=generator)
        step.fill_(1 + number % 7)
    return made


def copy_of(made: AdamWProblem, place=Tensor.clone) -> AdamWProblem:
    """The same targets in memory of their own, which `place` gives to each tensor."""
    copied = AdamWProblem(made.problems, made.seed)
    for field in fields(made)[2:]:
        values = getattr(made, field.name)
        if field.name == "grads":
            copied.grads = [[place(grad) for grad in grads] for grads in values]
        else:
            setattr(copied, field.name, [place(v) if isinstance(v, Tensor) else v for v in values])
    return copied


def part_of(made: AdamWProblem, target: int) -> AdamWProblem:
    """One target alone, in the same memory."""
    lists = {f.name: getattr(made, f.name)[target : target + 1] for f in fields(made)[2:-1]}
    return AdamWProblem(made.problems[target : target + 1], made.seed, **lists, grads=[made.grads[0][target : target + 1]])


def adamw(emulated, made: AdamWProblem, found_inf: Tensor | None = None) -> None:
    lists = (made.weights, made.indices, made.bases, made.deltas, made.grads[0], made.exp_avgs, made.exp_avg_sqs, made.steps)
    emulated.sparse_adamw_(*lists, made.scales, *HYPER, None, None, found_inf)


CALLS = {
    "sparse_adamw_": adamw,
    "patch_all_": lambda emulated, made: emulated.patch_all_(made.weights, made.indices, made.bases, made.deltas, made.scales),
    "patch_all_ without deltas": lambda emulated, made: emulated.patch_all_(
        made.weights, made.indices, made.bases, None, made.scales
    ),
    "scatter_add_all_": lambda emulated, made: emulated.scatter_add_all_(made.weights, made.indices, made.deltas, made.scales),
}
every_call = pytest.mark.parametrize("name", CALLS)


def assert_same_bits(left: AdamWProblem, right: AdamWProblem) -> None:
    for name in WRITTEN:
        assert all(map(torch.equal, map(bits, getattr(left, name)), map(bits, getattr(right, name)))), name


@every_call
def test_all_targets_together_get_the_bits_of_each_alone(name, emulated):
    together = interleaved([*AT_EDGES, *SMALL, LARGE], KINDS)
    alone = copy_of(together)
    CALLS[name](emulated, together)
    for target in range(len(alone.problems)):
        CALLS[name](emulated, part_of(alone, target))
    assert_same_bits(together, alone)


@every_call
def test_one_launch_for_each_pair_of_dtypes(name, simt, emulated):
    def launches(made: AdamWProblem) -> int:
        before = simt.launches()
        CALLS[name](emulated, made)
        return simt.launches() - before

    problems = [AT_EDGES[3], EMPTY, LARGE] * 20
    assert launches(interleaved(problems, KINDS[:1])) == 1
    assert launches(interleaved(problems, KINDS)) == len(KINDS)
    assert launches(interleaved([EMPTY] * 5, KINDS)) == 0


@every_call
def test_more_targets_than_one_table_holds(name, simt, emulated):
    together = interleaved(SMALL * 450, KINDS[2:3])
    alone = copy_of(together)
    before = simt.launches()
    CALLS[name](emulated, together)
    taken = simt.launches() - before
    assert 1 < taken <= 4  # a table holds 285 targets of AdamW
    for begin in range(0, len(alone.problems), 150):  # 150 fit into a table of any operator
        batch = {f.name: getattr(alone, f.name)[begin : begin + 150] for f in fields(alone)[2:-1]}
        CALLS[name](emulated, AdamWProblem(alone.problems, 0, **batch, grads=[alone.grads[0][begin : begin + 150]]))
    assert_same_bits(together, alone)


@every_call
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_nothing_is_read_or_written_outside_the_targets_at_any_alignment(name, offset, emulated):
    memories = []

    def placed(tensor: Tensor) -> Tensor:
        """A copy between guards, `offset` elements away from an address that divides by 32."""
        if tensor.dim() == 0:
            return tensor.clone()
        outside = math.nan if tensor.is_floating_point() else 2**30
        memory = tensor.new_full((tensor.numel() + 192,), outside)
        first = 64 + offset + (-memory.data_ptr() // tensor.element_size()) % 32
        memory[first : first + tensor.numel()] = tensor.flatten()
        memories.append((memory, memory.clone(), first, tensor.numel()))
        return memory[first : first + tensor.numel()].view(tensor.shape)

    expected = interleaved([*AT_EDGES, *SMALL], KINDS)
    guarded = copy_of(expected, placed)
    CALLS[name](emulated, guarded)
    CALLS[name](emulated, expected)
    assert_same_bits(guarded, expected)
    for memory, before, first, size in memories:
        for outside in (slice(first), slice(first + size, None)):
            assert torch.equal(memory[outside], before[outside]) or memory[outside].isnan().all()


@every_call
def test_results_do_not_depend_on_the_order_of_threads(name, simt, emulated):
    given = interleaved([*AT_EDGES, *SMALL], KINDS[:4])
    expected = copy_of(given)
    CALLS[name](emulated, expected)
    for order in simt.ORDERS[1:]:
        simt.set_order(order)
        made = copy_of(given)
        CALLS[name](emulated, made)
        assert_same_bits(made, expected)


def test_found_inf_leaves_every_target_as_it_was(emulated):
    made = interleaved([*AT_EDGES, *SMALL], KINDS)
    untouched = copy_of(made)
    made.grads[0][0][:] = math.inf
    adamw(emulated, made, found_inf=torch.ones(()))
    assert_same_bits(made, untouched)
    adamw(emulated, made, found_inf=torch.zeros(()))
    assert not torch.equal(made.deltas[1], untouched.deltas[1])


def test_a_weight_of_which_no_entry_was_chosen_may_have_no_memory(emulated):
    none = make_entries(Problem("empty weight", 0, 0, 4, 0), torch.bfloat16, torch.int32)
    some = make_entries(AT_EDGES[1], torch.bfloat16, torch.int32)
    expected = some.weight.clone()
    emulated.patch_(expected, some.indices, some.base, some.delta, 0.5)
    lists = [[getattr(e, name) for e in (none, some, none)] for name in ("weight", "indices", "base", "delta")]
    emulated.patch_all_(*lists, [0.5] * 3)
    assert torch.equal(bits(some.weight), bits(expected))


def test_lists_that_do_not_fit_are_refused(emulated):
    e = make_entries(AT_EDGES[1], torch.float32, torch.int32)
    weights, indices, bases, deltas = [e.weight], [e.indices], [e.base], [e.delta]
    calls = {
        "one length": lambda: emulated.patch_all_(weights, indices, bases, [], [1.0]),
        "patch_all_: expected lists": lambda: emulated.patch_all_(weights, indices, bases, None, []),
        "contiguous delta": lambda: emulated.patch_all_(weights, indices, bases, [e.delta[1:]], [1.0]),
        "contiguous base": lambda: emulated.patch_all_(weights, indices, [e.base.half()], None, [1.0]),
        "scatter_add_all_: expected lists": lambda: emulated.scatter_add_all_(weights, indices, [], [1.0]),
        "contiguous values": lambda: emulated.scatter_add_all_(weights, indices, [e.delta.double()], [1.0]),
        "float32, bfloat16 or float16": lambda: emulated.scatter_add_all_([e.weight.double()], indices, deltas, [1.0]),
    }
    before = e.weight.clone()
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message):
            call()
    assert torch.equal(e.weight, before)

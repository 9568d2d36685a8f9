"""What runs beside a sequence must not show in its result, and nothing leaks when it ends early."""

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import LlamaForCausalLM

from engine.adapters import read_adapter
from engine.attention import Step
from engine.errors import InternalError, Overloaded
from engine.sequence import Failure, Output, Sequence, share_prompts

if TYPE_CHECKING:
    from tests.unit.engine.conftest import Bench

PROMPTS = [[(7 * i + 3 * j) % 250 for j in range(4 + 9 * i)] for i in range(6)]


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy continuation, end token included."""
    made = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)  # type: ignore[operator]
    return list(made[0, len(prompt) :].tolist())


def test_greedy_is_transformers_greedy_whatever_runs_beside(
    make_bench: "Callable[..., Bench]", reference: LlamaForCausalLM
) -> None:
    bench, news = make_bench(sequences=4, step_tokens=16), queue.Queue()
    sequences = [bench.sequence(prompt, news, i, max_tokens=12) for i, prompt in enumerate(PROMPTS)]
    outputs = bench.run(sequences, news)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.tokens == greedy(reference, prompt, 12)


def test_logprobs_together_and_alone(make_bench: "Callable[..., Bench]", reference: LlamaForCausalLM) -> None:
    """Generated and prompt tokens, in chunks of a crowded step and undisturbed."""
    crowded, calm = make_bench(sequences=6, step_tokens=13), make_bench()
    params = {"max_tokens": 6, "logprobs": 3, "score_prompt": True, "ignore_eos": True}
    news: queue.Queue[Output | Failure] = queue.Queue()
    together = [crowded.sequence(prompt, news, i, **params) for i, prompt in enumerate(PROMPTS)]
    crowded.run(together, news)
    for prompt, one in zip(PROMPTS, together, strict=True):
        alone = calm.sequence(prompt, news, **params)
        calm.run([alone], news)
        assert one.output == alone.output
        wanted = reference(torch.tensor([prompt + one.output])).logits[0].log_softmax(-1)
        assert one.prompt_logprobs[0] is None
        scored = [*one.prompt_logprobs[1:], *one.output_logprobs]
        undisturbed = [*alone.prompt_logprobs[1:], *alone.output_logprobs]
        tokens = [*prompt[1:], *one.output]
        assert len(scored) == len(tokens)
        for position, (token, mine, other) in enumerate(zip(tokens, scored, undisturbed, strict=True)):
            assert mine is not None
            assert other is not None
            assert mine.token == token
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert mine.logprob == pytest.approx(wanted[position, token].item(), abs=1e-4)
            best = wanted[position].topk(3)
            # By value: where two are equal but for rounding, either may come first.
            assert wanted[position, [t for t, _ in mine.top]].tolist() == pytest.approx(
                best.values.tolist(), abs=1e-4
            )
            assert [v for _, v in mine.top] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert len({t for t, _ in mine.top}) == 3


def test_adapters_together(
    make_bench: "Callable[..., Bench]",
    adapter_dirs: list[Path],
    reference: LlamaForCausalLM,
    peft_references: list[torch.nn.Module],
) -> None:
    bench, news = make_bench(), queue.Queue()
    adapters = [read_adapter(str(i), folder, bench.model.module) for i, folder in enumerate(adapter_dirs)]
    owners = [None, adapters[0], adapters[1], adapters[0], None, adapters[1]]
    alone = [reference, *peft_references, peft_references[0], reference, peft_references[1]]
    prompt = PROMPTS[2]
    sequences = [
        bench.sequence(prompt, news, i, max_tokens=10, adapter=owner) for i, owner in enumerate(owners)
    ]
    outputs = bench.run(sequences, news)
    for model, output in zip(alone, outputs, strict=True):
        assert output.tokens == greedy(model, prompt, 10)
    assert len({tuple(output.tokens) for output in outputs}) == 3


def test_shared_beginning_gives_what_each_alone_gives(make_bench: "Callable[..., Bench]") -> None:
    """Four continuations of one context: computed from a common beginning, scored as if alone."""
    bench, news = make_bench(sequences=3, step_tokens=32), queue.Queue()
    context = [(5 * j + 1) % 250 for j in range(40)]
    prompts = [[*context, *tail] for tail in ([1, 2, 3], [1, 9], [77], [1, 2, 3, 4, 5])]
    params = {"max_tokens": 3, "logprobs": 1, "score_prompt": True, "ignore_eos": True}
    shared = [bench.sequence(prompt, news, i, **params) for i, prompt in enumerate(prompts)]
    share_prompts(shared)
    # one common token less than they share: its prediction differs
    assert [one.follows and one.follows[1] for one in shared] == [None, 40, 39, 42]
    bench.run(shared, news)
    for prompt, one in zip(prompts, shared, strict=True):
        alone = bench.sequence(prompt, news, **params)
        bench.run([alone], news)
        assert one.output == alone.output
        mine = [score.logprob for score in one.prompt_logprobs[1:] if score]
        wanted = [score.logprob for score in alone.prompt_logprobs[1:] if score]
        assert len(mine) == len(prompt) - 1
        assert mine == pytest.approx(wanted, abs=1e-4)


def test_prompts_that_share_little_are_computed_apart(make_bench: "Callable[..., Bench]") -> None:
    bench, news = make_bench(), queue.Queue()
    context = list(range(20))
    short = [bench.sequence([1, 2, 3, tail], news, tail) for tail in range(2)]
    mostly_own = [bench.sequence(context + [50 + i] * 60, news, i) for i in range(2)]
    share_prompts(short)
    share_prompts(mostly_own)
    assert all(one.follows is None for one in (*short, *mostly_own))


def test_followers_of_an_aborted_leader_compute_their_own(make_bench: "Callable[..., Bench]") -> None:
    bench, news = make_bench(sequences=1), queue.Queue()
    context = list(range(30))
    leader, follower = (bench.sequence([*context, 60 + i], news, i) for i in range(2))
    share_prompts([leader, follower])
    leader.aborted = True
    bench.scheduler.submit([leader, follower])
    output = news.get(timeout=30)
    assert isinstance(output, Output)
    assert (output.index, len(output.tokens)) == (1, 8)


def test_more_sequences_than_rows_and_tokens(
    make_bench: "Callable[..., Bench]", reference: LlamaForCausalLM
) -> None:
    bench, news = make_bench(sequences=2, step_tokens=8, cache_tokens=256), queue.Queue()
    sequences = [bench.sequence(PROMPTS[i % 6], news, i, max_tokens=3) for i in range(12)]
    outputs = bench.run(sequences, news)
    for i, output in enumerate(outputs):
        assert output.tokens == greedy(reference, PROMPTS[i % 6], 3)
    assert bench.scheduler.load == 0


def test_stop_token_and_length(make_bench: "Callable[..., Bench]", reference: LlamaForCausalLM) -> None:
    bench, news = make_bench(), queue.Queue()
    told = greedy(reference, PROMPTS[1], 8)
    stopped = bench.sequence(PROMPTS[1], news, stop_token_ids=frozenset([told[3]]))
    [output] = bench.run([stopped], news)
    first = told.index(told[3])
    assert output.tokens == told[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", told[3])
    [output] = bench.run([bench.sequence(PROMPTS[1], news, max_tokens=2)], news)
    assert (output.tokens, output.finish_reason) == (told[:2], "length")


def test_scoring_alone_generates_nothing(make_bench: "Callable[..., Bench]") -> None:
    bench, news = make_bench(), queue.Queue()
    [output] = bench.run(
        [bench.sequence(PROMPTS[3], news, max_tokens=0, logprobs=0, score_prompt=True)], news
    )
    assert (output.tokens, output.text, output.finish_reason) == ([], "", "length")
    [output] = bench.run([bench.sequence([5], news, max_tokens=0, logprobs=0, score_prompt=True)], news)
    assert output.tokens == []


def test_who_is_told_of_the_end_finds_the_row_free(make_bench: "Callable[..., Bench]") -> None:
    bench, news = make_bench(), queue.Queue()
    one = bench.sequence(PROMPTS[0], news, max_tokens=2)
    loads: list[int] = []
    one.listener = lambda told: (loads.append(bench.scheduler.load), news.put(told))[1]
    bench.run([one], news)
    assert loads == [0]


def endless(bench: "Bench", news: "queue.Queue[Output | Failure]", index: int = 0) -> Sequence:
    return bench.sequence([1, 2, 3], news, index, max_tokens=250, ignore_eos=True, stream=True)


def halted_by_its_first_news(
    bench: "Bench", sequence: Sequence, monkeypatch: pytest.MonkeyPatch
) -> threading.Event:
    """The step after them waits for the event: else a test that is held up would find the sequence ended."""
    told, go_on = threading.Event(), threading.Event()
    listener, forward = sequence.listener, bench.model.forward

    def noted(news: Output | Failure) -> None:
        told.set()
        listener(news)

    def waiting(step: Step, rows: list[int]) -> torch.Tensor:
        if told.is_set():
            assert go_on.wait(60)
        return forward(step, rows)

    sequence.listener = noted
    monkeypatch.setattr(bench.model, "forward", waiting)
    return go_on


def test_abort_frees_the_row(make_bench: "Callable[..., Bench]", monkeypatch: pytest.MonkeyPatch) -> None:
    bench, news = make_bench(sequences=1), queue.Queue()
    running = endless(bench, news)
    go_on = halted_by_its_first_news(bench, running, monkeypatch)
    bench.scheduler.submit([running])
    news.get(timeout=30)
    bench.scheduler.abort([running])
    go_on.set()
    other: queue.Queue[Output | Failure] = queue.Queue()
    [output] = bench.run([bench.sequence(PROMPTS[0], other, max_tokens=2)], other)
    assert len(output.tokens) == 2
    assert len(running.output) < 250
    assert running.slot is None
    assert bench.scheduler.load == 0


def test_stopping_fails_what_is_open_and_refuses_the_rest(
    make_bench: "Callable[..., Bench]", monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, news = make_bench(sequences=1), queue.Queue()
    first = endless(bench, news, 0)
    go_on = halted_by_its_first_news(bench, first, monkeypatch)
    bench.scheduler.submit([first, endless(bench, news, 1)])
    news.get(timeout=30)
    bench.scheduler.begin_stop()
    go_on.set()
    assert bench.scheduler.stop(60)
    failed = set()
    while not news.empty():
        one = news.get_nowait()
        if isinstance(one, Failure):
            assert isinstance(one.error, Overloaded)
            failed.add(one.index)
    assert failed == {0, 1}
    with pytest.raises(Overloaded):
        bench.scheduler.submit([endless(bench, news)])


def test_a_broken_step_fails_every_request_and_tells_the_process(
    make_bench: "Callable[..., Bench]", monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, news = make_bench(), queue.Queue()
    entered, go_on = threading.Event(), threading.Event()

    def broken(*_: object) -> torch.Tensor:
        entered.set()
        assert go_on.wait(30)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench.model, "forward", broken)
    bench.scheduler.submit([bench.sequence(PROMPTS[0], news, 0)])
    assert entered.wait(30)
    bench.scheduler.submit([bench.sequence(PROMPTS[1], news, 1)])
    go_on.set()
    failures = [news.get(timeout=30) for _ in range(2)]
    assert all(isinstance(one, Failure) and isinstance(one.error, InternalError) for one in failures)
    assert bench.scheduler.stop(60)
    assert bench.failures == ["died"]
    assert not bench.scheduler.healthy


def test_overflowing_adapter_fails_its_own_requests_only(
    make_bench: "Callable[..., Bench]",
    make_adapter: Callable[..., Path],
    reference: LlamaForCausalLM,
) -> None:
    """Its weights are finite, what they compute is not: an error, and no trace in others' rows."""
    bench, news = make_bench(), queue.Queue()
    adapter = read_adapter("wild", make_adapter(9, lora_alpha=1e38), bench.model.module)
    wild = [bench.sequence(PROMPTS[5], news, i, adapter=adapter, max_tokens=4) for i in (0, 2)]
    wild.append(
        bench.sequence(PROMPTS[5], news, 3, adapter=adapter, max_tokens=0, logprobs=0, score_prompt=True)
    )
    calm = bench.sequence(PROMPTS[1], news, 1, max_tokens=60, ignore_eos=True)
    alone = bench.sequence(PROMPTS[1], news, 9, max_tokens=60, ignore_eos=True)
    bench.run([alone], news)
    bench.scheduler.submit([wild[0], calm, *wild[1:]])
    got = {one.index: one for one in (news.get(timeout=30) for _ in range(4))}
    for index in (0, 2, 3):
        failure = got[index]
        assert isinstance(failure, Failure)
        assert "not finite" in failure.error.message
    assert calm.output == alone.output
    assert bench.scheduler.load == 0


def test_answers_overtake_scoring(make_bench: "Callable[..., Bench]") -> None:
    bench, news = make_bench(sequences=1), queue.Queue()
    scoring = [
        bench.sequence(PROMPTS[5], news, i, max_tokens=0, logprobs=0, score_prompt=True) for i in range(40)
    ]
    chat = bench.sequence(PROMPTS[0], news, 99, max_tokens=2)
    bench.scheduler.submit([*scoring, chat])
    order = [news.get(timeout=30).index for _ in range(41)]
    assert order == [99, *range(40)]


def test_long_prompts_take_half_a_step_beside_an_answer(
    make_bench: "Callable[..., Bench]", monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, news = make_bench(sequences=2, step_tokens=40), queue.Queue()
    sizes: list[int] = []
    forward = bench.model.forward

    def counted(step: Step, rows: list[int]) -> torch.Tensor:
        sizes.append(step.tokens.numel())
        return forward(step, rows)

    monkeypatch.setattr(bench.model, "forward", counted)
    answer = bench.sequence([1, 2, 3], news, 0, max_tokens=6, ignore_eos=True)
    prompt = bench.sequence(list(range(100)), news, 1, max_tokens=0, logprobs=0, score_prompt=True)
    bench.run([answer, prompt], news)
    # 3 + 37, then 1 + 19 beside the answer until 100 tokens are through (37 + 3 * 19 + 6), then it alone
    assert sizes == [40, 20, 20, 20, 7, 1]


def test_an_urgent_sequence_is_in_the_next_step_whatever_runs(
    make_bench: "Callable[..., Bench]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row is taken, the cache as full as it may be, a long prompt would fill the steps, others wait."""
    # Four rows of 256: three for what runs, the fourth kept.
    bench, news = make_bench(sequences=8, step_tokens=16, cache_tokens=4 * 256), queue.Queue()
    urgent_news: queue.Queue[Output | Failure] = queue.Queue()
    urgent = bench.sequence([5, 6, 7, 8], urgent_news, max_tokens=1, priority=-1)
    steps: list[int] = []
    beside: list[int] = []
    forward = bench.model.forward

    def counted(step: Step, rows: list[int]) -> torch.Tensor:
        steps.append(step.tokens.numel())
        if len(steps) == 3:
            bench.scheduler.submit([urgent])
        beside.append(step.cache.allocated_tokens)
        return forward(step, rows)

    monkeypatch.setattr(bench.model, "forward", counted)
    running = [endless(bench, news, 0), endless(bench, news, 1)]
    running.append(bench.sequence([3] * 200, news, 2, max_tokens=50, stream=True))
    waiting = [endless(bench, news, 3), endless(bench, news, 4)]
    done_at: list[int] = []
    none_waiting_began: list[bool] = []

    def done(one: Output | Failure) -> None:
        done_at.append(len(steps))
        none_waiting_began.append(all(one.slot is None and not one.output for one in waiting))
        urgent_news.put(one)

    urgent.listener = done
    bench.scheduler.submit([*running, *waiting])
    answer = urgent_news.get(timeout=30)
    bench.scheduler.abort([*running, *waiting])
    assert isinstance(answer, Output)
    assert len(answer.tokens) == 1
    assert (done_at, none_waiting_began) == ([4], [True])
    # 3 + 3 + 10 of the long prompt, then half steps: 1 + 1 + 6 of it; in the fourth 4 are the urgent one's
    assert steps[:4] == [16, 8, 8, 8]
    assert max(beside[:4]) <= 4 * 256


def test_the_lowest_priority_goes_first_then_the_first_to_come(make_bench: "Callable[..., Bench]") -> None:
    bench, news = make_bench(sequences=1), queue.Queue()
    priorities = [5, 0, 2, 0, -1]
    bench.scheduler.submit(
        [bench.sequence(PROMPTS[0], news, i, max_tokens=1, priority=p) for i, p in enumerate(priorities)]
    )
    assert [news.get(timeout=30).index for _ in priorities] == [4, 1, 3, 2, 0]


def test_a_sequence_that_needs_the_whole_cache_runs_alone(make_bench: "Callable[..., Bench]") -> None:
    bench, news = make_bench(cache_tokens=256), queue.Queue()
    outputs = bench.run([bench.sequence([1] * 250, news, i, max_tokens=6) for i in range(2)], news)
    assert all(output.finish_reason is not None for output in outputs)

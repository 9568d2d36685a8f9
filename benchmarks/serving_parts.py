"""What the serving benchmark measures on one running stack, part by part."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx
import psutil

from benchmarks.serving_streams import Reply, Streams, ask_alone, in_turn, stream_for
from benchmarks.serving_versions import says

ASSISTANT = "bench"
CHAMPION = f"/v1/assistants/{ASSISTANT}/aliases/champion"
SERVE_SECONDS = 120.0
"""For a version that a champion was moved to."""
BACK_SECONDS = 300.0
"""For an engine that was killed to answer again."""
MIB = 1 << 20

Words = Mapping[str, str]
"""Version -> the word that it says."""


def move(client: httpx.Client, version: str, *, back: bool) -> None:
    """Make `version` champion, by rollback or by moving the alias, and wait until it serves.

    Raises HTTPStatusError, RuntimeError.
    """
    if back:
        reply = client.post(f"/v1/assistants/{ASSISTANT}/rollback", json={"to": version})
    else:
        reply = client.put(CHAMPION, json={"version": version})
    reply.raise_for_status()
    serving, until = reply.json()["serving"], time.monotonic() + SERVE_SECONDS
    while not serving:
        if time.monotonic() > until:
            raise RuntimeError(f"{version} did not come to serve: {reply.text}")
        reply = client.get(CHAMPION)
        reply.raise_for_status()
        serving = reply.json()["serving_version"] == version
        time.sleep(0.05)


def swaps(url: str, words: Words, fresh: Words, count: int, clients: int) -> dict[str, Any]:
    """`count` moves of the champion under streaming clients: to a version of `fresh`, which no engine has
    loaded yet, and by rollback to one of `words` in turn.

    All times begin when the move is sent. `to_serving` ends when Ratchet says that the version serves,
    `to_first_token` with the first token of a stream that a client asks for right then, and
    `to_first_token_of_streams` with the first that one of the `clients` gets of the version. Clients that
    wait for one engine come to ask all at once, and not again before their answers are whole: it holds the
    wait for somebody to ask.
    """
    found = {kind: Served() for kind in ("promote", "rollback")}
    late = 0
    with (
        httpx.Client(base_url=url, timeout=120, trust_env=False) as client,
        Streams(url, [ASSISTANT], clients) as streams,
    ):
        for number in range(count):
            back = number % 2 == 1
            target = list(words if back else fresh)[number // 2 % len(words if back else fresh)]
            times = found["rollback" if back else "promote"]
            seen, sent_at = len(streams.replies), time.monotonic()
            move(client, target, back=back)
            times.to_serving.append(time.monotonic() - sent_at)
            own = ask_alone(url, ASSISTANT)
            after = streams.await_reply(
                lambda reply, target=target, sent_at=sent_at: (  # type: ignore[misc]
                    reply.version == target and (reply.first_token_at or 0) > sent_at
                ),
                120,
                seen,
            )
            for reply, values in ((own, times.to_first_token), (after, times.to_first_token_of_streams)):
                if reply is None or reply.first_token_at is None or reply.version != target:
                    late += 1
                else:
                    values.append(reply.first_token_at - sent_at)
    known = {**words, **fresh}
    mixed = [reply for reply in streams.replies if reply.problem is None and _mixes(reply, known)]
    return {
        "swaps": count,
        "clients": clients,
        **_counts(streams.replies),
        "never_served": late,
        "mixed_replies": len(mixed),
        "mixed_examples": [{"version": reply.version, "text": reply.text} for reply in mixed[:3]],
        "seconds": {
            kind: {name: _quantiles(values) for name, values in vars(times).items()}
            for kind, times in found.items()
        },
    }


@dataclass
class Served:
    """Seconds from sending a move."""

    to_serving: list[float] = field(default_factory=list)
    to_first_token: list[float] = field(default_factory=list)
    to_first_token_of_streams: list[float] = field(default_factory=list)


def _mixes(reply: Reply, words: Words) -> bool:
    return reply.version not in words or not says(words[reply.version], reply.text)


def overhead(
    url: str, engine_url: str, engine_model: str, clients: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """The gateway beside the engine called directly: tokens a second of all `clients`, in turn by round, and
    the time to the first token of one, in turn stream by stream.

    `first_token_added_ms` is the median difference between neighbours.
    """
    ways = {"gateway": (url, ASSISTANT), "engine": (engine_url, engine_model)}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    first: dict[str, list[float]] = {way: [] for way in ways}
    problems = 0
    for number in range(rounds):
        for way in list(ways)[:: 1 if number % 2 == 0 else -1]:
            at, model = ways[way]
            replies, took = stream_for(at, [model], clients, seconds, max_tokens=48)
            rates[way].append(sum(reply.tokens for reply in replies) / took)
            problems += sum(reply.problem is not None for reply in replies)
        for way, values in asyncio.run(in_turn(ways, max_tokens=1, seconds=seconds)).items():
            first[way] += values
    ratios = [own / direct for own, direct in zip(rates["gateway"], rates["engine"], strict=True)]
    ttft = {way: 1000 * median(values) for way, values in first.items()}
    added = [own - direct for own, direct in zip(first["gateway"], first["engine"], strict=True)]
    return {
        "clients": clients,
        "rounds": rounds,
        "tokens_per_second": {way: round(median(values), 1) for way, values in rates.items()},
        "throughput_lost": round(1 - median(ratios), 4),
        "throughput_lost_by_round": [round(1 - ratio, 4) for ratio in ratios],
        "first_token_p50_ms": {way: round(value, 2) for way, value in ttft.items()},
        "first_token_added_ms": round(1000 * median(added), 2),
        "first_token_samples": {way: len(values) for way, values in first.items()},
        "problems": problems,
    }


def together(
    url: str, words: Words, stack: psutil.Process, clients: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """All versions at once beside one version, in turn; and what each takes of the engine's memory."""
    models = [f"{ASSISTANT}@{version}" for version in words]
    before = engine_memory(stack)
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as client:
        for model in models:
            body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
            client.post("/v1/chat/completions", json=body).raise_for_status()
    after = engine_memory(stack)
    rates: dict[str, list[float]] = {"one": [], "all": []}
    replies: list[Reply] = []
    for number in range(rounds):
        for way in ("one", "all")[:: 1 if number % 2 == 0 else -1]:
            found, took = stream_for(
                url, models if way == "all" else models[:1], clients, seconds, max_tokens=24
            )
            rates[way].append(sum(reply.tokens for reply in found) / took)
            replies += found
    ratios = [many / one for many, one in zip(rates["all"], rates["one"], strict=True)]
    return {
        "versions": len(models),
        "clients": clients,
        "tokens_per_second": {way: round(median(values), 1) for way, values in rates.items()},
        "throughput_against_one": round(median(ratios), 3),
        "memory_per_version_mib": round((after - before) / len(models) / MIB, 2),
        "mixed_replies": sum(reply.problem is None and _mixes(reply, words) for reply in replies),
        **_counts(replies),
    }


def death(url: str, words: Words, stack: psutil.Process, clients: int) -> dict[str, Any]:
    """kill -9 of the engine under streaming clients."""
    with Streams(url, [ASSISTANT], clients) as streams:
        if streams.await_reply(lambda reply: reply.problem is None, 60) is None:
            raise RuntimeError("nothing was answered before the kill")
        killed_at = time.monotonic()
        for process in engines(stack):
            process.kill()
        back = streams.await_reply(
            lambda reply: reply.problem is None and reply.asked_at > killed_at, BACK_SECONDS
        )
        time.sleep(2)
    return {
        "clients": clients,
        "seconds_until_served_again": None if back is None else round(back.ended_at - killed_at, 1),
        "right_version": back is not None and not _mixes(back, words),
        "slowest_reply_seconds": round(max(r.ended_at - r.asked_at for r in streams.replies), 1),
        "unclean": sum(not reply.clean for reply in streams.replies),
        **_counts(streams.replies),
    }


def engines(stack: psutil.Process) -> list[psutil.Process]:
    """The stack's engine processes, their own children included."""
    leaders = [child for child in stack.children(recursive=True) if _is_engine(child)]
    # vLLM's guard and its server are both leaders, one the other's parent.
    found = [process for leader in leaders for process in [leader, *leader.children(recursive=True)]]
    return list(dict.fromkeys(found))


def engine_memory(stack: psutil.Process) -> int:
    """Bytes that the engine's processes hold alone."""
    return sum(process.memory_full_info().uss for process in engines(stack))


def _is_engine(process: psutil.Process) -> bool:
    command = process.cmdline()
    modules = ("engine", "vllm.entrypoints.openai.api_server")
    return any(command[at : at + 2] == ["-m", module] for module in modules for at in range(len(command)))


def _counts(replies: Sequence[Reply]) -> dict[str, Any]:
    return {
        "requests": len(replies),
        "failed": sum(reply.problem is not None for reply in replies),
        "problems": dict(Counter(reply.problem for reply in replies if reply.problem is not None)),
    }


def _quantiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {
        "p50": round(ordered[len(ordered) // 2], 3),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 3),
        "max": round(ordered[-1], 3),
    }

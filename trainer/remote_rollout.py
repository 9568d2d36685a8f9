"""Answers drawn by an inference server: the adapter is handed over, prompts and answers are token ids.

For each round the role's adapter is saved in a folder of its own, loaded under that folder's name, which no
other weights ever have, and unloaded when the round's answers are in. The first process asks for all of
them and tells the others.
"""

import logging
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from domain.errors import TrainingFailed, TrainingRefused
from domain.recipe import Recipe
from domain.training import ROLLOUT_SERVER_AWAY, TrainingJob
from trainer import distributed
from trainer.adapted_model import AdaptedModel
from trainer.model import Model, Role
from trainer.rollout import Sample, Sampling
from trainer.rollout_server import IN_FLIGHT, RolloutServer, ServerAway
from trainer.sequences import all_response_states

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 40.0
"""Without a single answer: a vLLM server starts in 35 s, and a trainer that is to stop gets 45 s."""
FIRST_WAIT_SECONDS = 0.5
CHECKED_ANSWERS = 16
"""Answers of a round whose log-probabilities are compared with the trainer's own."""
WIDEST_GAP = 0.3
"""Nats, mean |difference| of a token's log-probability. bfloat16 on both sides makes 0.04 on a 135M model; a
model of another size, or the base instead of a trained adapter, several times as much."""


class RemoteRollouts:
    """Draws a job's rollouts on its server."""

    def __init__(self, job: TrainingJob, model: Model) -> None:
        """Unloads what a killed run of this job has left on the server.

        Raises TrainingRefused for a recipe that a server cannot sample for, TrainingFailed with code
        ROLLOUT_SERVER_AWAY when the server does not answer.
        """
        assert job.rollout_url is not None
        self._job, self._model = job, _samplable(job.recipe, model)
        self._server = RolloutServer(job.rollout_url)
        self._folder = Path(job.checkpoint_dir) / "rollouts"
        self.gap: float | None = None
        """Over checked tokens of the last round."""
        distributed.by_first(lambda: self._insist(self._clean_up))

    def draw(
        self, role: Role | None, prompts: Sequence[list[int]], limits: Sequence[int], sampling: Sampling
    ) -> list[Sample]:
        """One answer of `role` to each prompt, as `rollout.sample` draws them.

        A row's seed depends on the sampling's and its place alone. Raises as the constructor does, and
        TrainingRefused when the server's model is evidently not the trainer's.
        """
        self.gap = None
        if not prompts:
            return []
        name = None if role is None else self._hand_over(role)
        answers = distributed.by_first(lambda: self._ask(name, prompts, limits, sampling))
        self.gap = self._compare(role, prompts, answers, sampling)
        return answers

    def _hand_over(self, role: Role) -> str:
        """Write the adapter where the server will read it; returns its name."""
        name = distributed.by_first(lambda: f"{self._job.update_id}-{uuid.uuid4().hex[:12]}")
        staging = self._folder / f".{name}"
        self._model.save_adapter(role, staging, self._job.base_model)
        if distributed.is_first():
            staging.rename(self._folder / name)
        return name

    def _ask(
        self, adapter: str | None, prompts: Sequence[list[int]], limits: Sequence[int], sampling: Sampling
    ) -> list[Sample]:
        answers: dict[int, Sample] = {}

        def attempt() -> None:
            self._fill(answers, self._ready(adapter), prompts, limits, sampling)

        try:
            self._insist(attempt, lambda: len(answers))
        finally:
            try:
                self._clean_up()
            except ServerAway as away:  # the next round will, or the next start
                log.warning("%s stays loaded for now: %s", adapter, away)
        return [answers[row] for row in range(len(prompts))]

    def _insist(self, attempt: Callable[[], None], progress: Callable[[], int] = lambda: 0) -> None:
        """Attempt until it succeeds or has made no progress for PATIENCE_SECONDS."""
        reached, since, wait = progress(), time.monotonic(), FIRST_WAIT_SECONDS
        while True:
            try:
                return attempt()
            except ServerAway as away:
                if progress() > reached:
                    reached, since, wait = progress(), time.monotonic(), FIRST_WAIT_SECONDS
                if time.monotonic() - since + wait > PATIENCE_SECONDS:
                    raise TrainingFailed(
                        f"The rollout server did not answer for {PATIENCE_SECONDS:.0f} s: {away}",
                        code=ROLLOUT_SERVER_AWAY,
                    ) from away
                log.warning("asking again in %.1f s: %s", wait, away)
            time.sleep(wait)
            wait = min(2 * wait, 10.0)

    def _ready(self, adapter: str | None) -> str:
        """The name to ask for; the adapter is loaded, again if the server has lost it."""
        served = self._server.served()
        if adapter is None:
            return served.base
        if adapter not in served.adapters:
            self._server.load(adapter, (self._folder / adapter).resolve())
        return adapter

    def _fill(
        self,
        answers: dict[int, Sample],
        model: str,
        prompts: Sequence[list[int]],
        limits: Sequence[int],
        sampling: Sampling,
    ) -> None:
        """Ask for what `answers` lacks; what came before a failure stays."""
        with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="rollout") as threads:
            asked = {
                threads.submit(
                    self._server.answer,
                    model,
                    prompts[row],
                    limits[row],
                    sampling,
                    seed=row_seed(sampling.seed, row),
                    stop_ids=self._model.stop_ids,
                ): row
                for row in range(len(prompts))
                if row not in answers
            }
            failures: list[ServerAway | TrainingRefused] = []
            for done in as_completed(asked):
                if done.cancelled():
                    continue
                try:
                    answers[asked[done]] = done.result()
                except (ServerAway, TrainingRefused) as failure:
                    failures.append(failure)
                    for waiting in asked:
                        waiting.cancel()
        if failures:
            raise failures[0]

    def _clean_up(self) -> None:
        """Unload and remove every adapter of this job that the server may still have."""
        left = {path.name for path in self._folder.glob("*")}
        for name in left & self._server.served().adapters:
            self._server.unload(name)
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def _compare(
        self, role: Role | None, prompts: Sequence[list[int]], answers: Sequence[Sample], sampling: Sampling
    ) -> float:
        """The gap on some answers, evenly spread. Raises TrainingRefused when it is too wide."""
        step = max(1, len(answers) // CHECKED_ANSWERS)
        checked = answers[::step]
        rows = [(prompt, a.tokens) for prompt, a in zip(prompts[::step], checked, strict=True)]
        own = logprobs_of(self._model, role, rows, sampling.temperature)
        gap = float((own - torch.tensor([value for a in checked for value in a.logprobs])).abs().mean())
        if not gap <= WIDEST_GAP:
            raise self._apart(gap, sampling)
        return gap

    def _apart(self, gap: float, sampling: Sampling) -> TrainingRefused:
        message = (
            f"The rollout server {self._server.url} gives its own answers log-probabilities that differ from "
            f"the trainer's by {gap:.2f} nats a token in the mean (at most {WIDEST_GAP}): it serves another "
            f"base model than {self._job.base_model!r}, or other weights of it"
        )
        if sampling.temperature != 1:
            message += (
                f"; or it reports them at temperature 1 instead of {sampling.temperature}, which vLLM does "
                "without --logprobs-mode processed_logprobs"
            )
        elif sampling.top_p != 1:
            message += (
                "; or it reports them after top_p, which vLLM does with --logprobs-mode processed_logprobs"
            )
        return TrainingRefused(f"{message}.", param="rollout_url", code="rollout_server_differs")


@torch.no_grad()
def logprobs_of(
    model: Model, role: Role | None, rows: Sequence[tuple[list[int], list[int]]], temperature: float
) -> Tensor:
    """Log-probabilities of all tokens of the answers in (prompt, answer), one after another, on the CPU."""
    found = []
    with model.using(role):
        states = all_response_states(model, rows)
        for hidden, (_, answer) in zip(states, rows, strict=True):
            logits = functional.linear(hidden, model.head).float() / temperature
            tokens = torch.tensor(answer, device=logits.device)[:, None]
            found.append(logits.log_softmax(-1).gather(1, tokens)[:, 0].cpu())
    return torch.cat(found)


def row_seed(seed: int, row: int) -> int:
    """A request's seed, below 2**63."""
    return int.from_bytes(sha256(f"{seed}:{row}".encode()).digest()[:8]) >> 1


def _samplable(recipe: Recipe, model: Model) -> AdaptedModel:
    if not isinstance(model, AdaptedModel):
        raise TrainingRefused(
            "A rollout server is handed adapters: with lora_rank 0 there is none.",
            param="recipe.lora_rank",
            code="rollouts_need_an_adapter",
        )
    if recipe.temperature != 1 and recipe.top_p != 1:
        raise TrainingRefused(
            "An inference server reports log-probabilities either before temperature and top_p or after "
            "both, and the importance correction needs them between: set one of the two to 1.",
            param="recipe.top_p",
            code="rollouts_need_logprobs",
        )
    return model

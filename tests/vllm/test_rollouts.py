"""The trainer's rollouts on a real vLLM: token ids in and out, the handed-over student's probabilities."""

from pathlib import Path

import pytest
import torch

from artifacts import base_models
from domain.demonstration import Message
from domain.errors import TrainingRefused
from domain.recipe import Recipe
from domain.settings import Settings
from domain.training import TrainingJob
from tests.vllm.adapters import BASE
from tests.vllm.server import Server
from trainer.adapted_model import AdaptedModel
from trainer.contexts import chat_tokens
from trainer.loading import load_model
from trainer.model import Role
from trainer.remote_rollout import RemoteRollouts, logprobs_of
from trainer.rollout import Sample, Sampling

QUESTIONS = ("What is the capital of France?", "Say yes or no: is snow white?", "Name a colour.", "Hi!") * 2
LIMIT = 24


@pytest.fixture
def job(server: Server, tmp_path: Path) -> TrainingJob:
    return TrainingJob(
        update_id="upd_rollouts",
        base_path=str(base_models.resolve(BASE, Settings().cache_dir).path),
        base_model=BASE,
        parent_adapter_path=None,
        rollout_url=server.url,
        recipe=Recipe.small_model(),
        skills=[],
        checkpoint_dir=str(tmp_path / "checkpoints"),
        output_dir=str(tmp_path / "output"),
    )


@pytest.fixture
def model(job: TrainingJob) -> AdaptedModel:
    loaded = load_model(Path(job.base_path), job.recipe, None)
    assert isinstance(loaded, AdaptedModel)
    return loaded


def test_answers_are_the_students_with_its_probabilities(
    server: Server, job: TrainingJob, model: AdaptedModel
) -> None:
    prompts = [chat_tokens(model.tokenizer, [Message(role="user", content=text)]) for text in QUESTIONS]

    def distance(role: Role | None, answers: list[Sample]) -> float:
        rows = [(prompt, answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)]
        told = torch.tensor([value for answer in answers for value in answer.logprobs])
        return float((logprobs_of(model, role, rows, 1.0) - told).abs().mean())

    served = server.http.get("/v1/models").json()
    rollouts = RemoteRollouts(job, model)
    untrained = rollouts.draw("student", prompts, [LIMIT] * len(prompts), Sampling(1.0, seed=1))
    assert distance(None, untrained) < 0.15
    ended = [answer for answer in untrained if not answer.truncated]
    assert ended
    assert all(answer.tokens[-1] in model.stop_ids for answer in ended)
    assert all(len(answer.tokens) == LIMIT for answer in untrained if answer.truncated)
    # Each question stands there twice, with a seed of its own.
    assert len({tuple(answer.tokens) for answer in untrained}) > len(prompts) // 2

    dice = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, matrix in model.parameters("student").items():
            if name.endswith("lora_B"):
                matrix.copy_(torch.randn(matrix.shape, generator=dice) * 0.05)
    trained = rollouts.draw("student", prompts, [LIMIT] * len(prompts), Sampling(1.0, seed=1))
    assert distance("student", trained) < 0.2
    assert distance(None, trained) > 0.6
    assert [card["id"] for card in server.http.get("/v1/models").json()["data"]] == [
        card["id"] for card in served["data"]
    ]


def test_probabilities_before_temperature_are_refused(job: TrainingJob, model: AdaptedModel) -> None:
    prompts = [chat_tokens(model.tokenizer, [Message(role="user", content=text)]) for text in QUESTIONS]
    with pytest.raises(TrainingRefused, match="--logprobs-mode processed_logprobs"):
        RemoteRollouts(job, model).draw("student", prompts, [16] * len(prompts), Sampling(2.0, seed=1))

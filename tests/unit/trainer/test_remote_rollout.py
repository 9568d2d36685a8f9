"""Rollouts from a real engine process that serves the tiny model in float32, as the trainer runs it here."""

import math
import pickle
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from domain.errors import TrainingFailed, TrainingRefused
from domain.training import ROLLOUT_SERVER_AWAY, TRAINER_LINE, StepLine, TrainerLine, TrainingJob
from tests.unit.engine.conftest import Server, start_server
from tests.unit.trainer.test_resume import run, state
from tests.unit.trainer.together import Planned, launch
from trainer import remote_rollout
from trainer.adapted_model import AdaptedModel
from trainer.loading import load_model
from trainer.optimize import Optimizer
from trainer.remote_rollout import RemoteRollouts
from trainer.rollout import Sampling, sample
from trainer.run import Interrupted, train
from trainer.sequences import Training
from trainer.teacher import Teacher

pytestmark = pytest.mark.usefixtures("exact")

PROMPTS = [[0, *range(40, 40 + length)] for length in (3, 9, 5, 9)]
LIMITS = [6, 4, 8, 5]
ONCE = Sampling(1.0, seed=11)


@pytest.fixture(scope="module")
def server(base_folder: Path) -> Iterator[Server]:
    running = start_server(base_folder)
    yield running
    running.stop()


@pytest.fixture
def mortal(base_folder: Path) -> Iterator[Server]:
    """A server that the test may kill."""
    running = start_server(base_folder)
    yield running
    running.stop()


@pytest.fixture
def remote_job(job: TrainingJob, server: Server) -> TrainingJob:
    return job.model_copy(update={"rollout_url": server.url})


def trained(job: TrainingJob) -> AdaptedModel:
    """A student far from the base."""
    model = load_model(Path(job.base_path), job.recipe, None)
    assert isinstance(model, AdaptedModel)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters("student").values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def loaded(url: str) -> list[str]:
    cards = httpx.get(f"{url}/v1/models", timeout=60).json()["data"]
    return [card["id"] for card in cards if card["parent"]]


def logprobs(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> list[float]:
    """By a plain forward pass of transformers' own."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0]
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()


def test_answers_are_the_handed_over_students(remote_job: TrainingJob, tmp_path: Path) -> None:
    model = trained(remote_job)
    rollouts = RemoteRollouts(remote_job, model)
    answers = rollouts.draw("student", PROMPTS, LIMITS, ONCE)

    model.save_student(tmp_path / "saved", "tiny")
    base = AutoModelForCausalLM.from_pretrained(remote_job.base_path, dtype=torch.float32)
    from_base = [logprobs(base, p, a.tokens) for p, a in zip(PROMPTS, answers, strict=True)]
    student = PeftModel.from_pretrained(base, str(tmp_path / "saved"))
    distances = []
    for prompt, limit, answer, others in zip(PROMPTS, LIMITS, answers, from_base, strict=True):
        assert answer.logprobs == pytest.approx(logprobs(student, prompt, answer.tokens), abs=1e-3)
        assert answer.truncated == (answer.tokens[-1] != 1)
        assert len(answer.tokens) == limit or not answer.truncated
        distances += [abs(a - b) for a, b in zip(answer.logprobs, others, strict=True)]
    assert sum(distances) / len(distances) > 0.3
    assert rollouts.gap is not None
    assert rollouts.gap < 1e-3
    assert loaded(remote_job.rollout_url or "") == []
    assert not (Path(remote_job.checkpoint_dir) / "rollouts").exists()

    drawn_by_base = rollouts.draw(None, PROMPTS, LIMITS, ONCE)
    peft_off = AutoModelForCausalLM.from_pretrained(remote_job.base_path, dtype=torch.float32)
    for prompt, answer in zip(PROMPTS, drawn_by_base, strict=True):
        assert answer.logprobs == pytest.approx(logprobs(peft_off, prompt, answer.tokens), abs=1e-3)


def test_a_row_depends_on_the_seed_and_its_place(remote_job: TrainingJob) -> None:
    rollouts = RemoteRollouts(remote_job, trained(remote_job))

    def tokens(prompts: list[list[int]], seed: int) -> list[list[int]]:
        return [
            a.tokens for a in rollouts.draw("student", prompts, [8] * len(prompts), Sampling(1.0, seed=seed))
        ]

    first = tokens(PROMPTS, 5)
    assert tokens(PROMPTS, 5) == first
    assert tokens([*PROMPTS[:2], [0, 50]], 5)[:2] == first[:2]
    assert tokens(PROMPTS, 6) != first
    same = tokens([PROMPTS[0]] * 4, 5)
    assert len({tuple(answer) for answer in same}) > 1


def test_what_a_killed_run_left_is_unloaded(remote_job: TrainingJob) -> None:
    assert remote_job.rollout_url
    folder = Path(remote_job.checkpoint_dir) / "rollouts" / "up_1-0123456789ab"
    trained(remote_job).save_student(folder, "tiny")
    body = {"lora_name": folder.name, "lora_path": str(folder)}
    httpx.post(f"{remote_job.rollout_url}/v1/load_lora_adapter", json=body, timeout=60).raise_for_status()
    assert loaded(remote_job.rollout_url) == [folder.name]
    RemoteRollouts(remote_job, trained(remote_job))
    assert loaded(remote_job.rollout_url) == []
    assert not folder.exists()


def test_another_model_is_refused(remote_job: TrainingJob, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(remote_job.base_path, other)
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    model.save_pretrained(other)
    job = remote_job.model_copy(update={"base_path": str(other)})
    with pytest.raises(TrainingRefused, match="serves another base model than 'tiny'") as refused:
        run(job)
    assert (refused.value.code, refused.value.param) == ("rollout_server_differs", "rollout_url")


def test_log_probabilities_at_another_temperature_are_refused(remote_job: TrainingJob) -> None:
    """The embedded engine reports them before temperature, as vLLM does by default."""
    rollouts = RemoteRollouts(remote_job, trained(remote_job))
    with pytest.raises(TrainingRefused, match="without --logprobs-mode processed_logprobs"):
        rollouts.draw("student", PROMPTS, LIMITS, Sampling(3.0))


@pytest.mark.parametrize(
    ("changes", "param"),
    [({"lora_rank": 0}, "recipe.lora_rank"), ({"temperature": 0.9, "top_p": 0.9}, "recipe.top_p")],
)
def test_recipes_that_a_server_cannot_sample_for(
    job: TrainingJob, changes: dict[str, object], param: str
) -> None:
    recipe = job.recipe.model_copy(update=changes)
    job = job.model_copy(update={"recipe": recipe, "rollout_url": "http://127.0.0.1:9"})
    with pytest.raises(TrainingRefused) as refused:
        run(job)
    assert refused.value.param == param


def test_a_prompt_beyond_the_servers_window_is_refused_in_its_words(remote_job: TrainingJob) -> None:
    rollouts = RemoteRollouts(remote_job, trained(remote_job))
    with pytest.raises(TrainingRefused, match="maximum context length is 512 tokens"):
        rollouts.draw("student", [[0] * 510], [8], ONCE)


def test_training_weighs_what_the_server_drew(remote_job: TrainingJob) -> None:
    """Two steps use one round: in the first the student is the one that drew, so every ratio is 1."""
    recipe = remote_job.recipe.model_copy(update={"max_steps": 4})
    steps = [
        line for line in run(remote_job.model_copy(update={"recipe": recipe})) if isinstance(line, StepLine)
    ]
    fresh, stale = steps[::2], steps[1::2]
    assert all(line.rollout_gap is not None and line.rollout_gap < 1e-3 for line in fresh)
    assert all(line.rollout_gap is None for line in stale)
    for line in fresh:
        assert line.importance_mean == pytest.approx(1, abs=1e-3)
        assert line.importance_max == pytest.approx(1, abs=5e-3)
        assert line.importance_clipped == 0
    assert all(line.importance_max is not None and line.importance_max > 1.01 for line in stale)


def test_stored_answers_make_a_resumed_run_end_in_equal_bits(remote_job: TrainingJob, tmp_path: Path) -> None:
    recipe = remote_job.recipe.model_copy(update={"max_steps": 5, "rollout_every": 5, "checkpoint_every": 5})
    whole = remote_job.model_copy(update={"recipe": recipe})
    with pytest.raises(Interrupted):
        run(whole, stop_after=1)
    cut = whole.model_copy(
        update={"checkpoint_dir": str(tmp_path / "cut"), "output_dir": str(tmp_path / "cut-out")}
    )
    shutil.copytree(whole.checkpoint_dir, cut.checkpoint_dir)
    run(whole)
    for _ in range(3):
        with pytest.raises(Interrupted):
            run(cut, stop_after=1)
    run(cut)
    expected, found = state(whole), state(cut)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@contextmanager
def kept_port(server: Server) -> Iterator[str]:
    """The port of a server that is gone, which nobody is given meanwhile: who asks there is refused, and a
    server may listen there again (SO_REUSEADDR on both sides)."""
    port = server.url.rpartition(":")[2]
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", int(port)))
        yield port


def test_a_server_that_comes_back_is_given_the_adapter_again(
    job: TrainingJob, base_folder: Path, mortal: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_rollout, "PATIENCE_SECONDS", 200.0)
    job = job.model_copy(update={"rollout_url": mortal.url})
    rollouts = RemoteRollouts(job, trained(job))
    before = rollouts.draw("student", PROMPTS, LIMITS, ONCE)
    mortal.process.kill()
    mortal.process.wait()
    back: list[Server] = []
    with kept_port(mortal) as port:
        starter = threading.Thread(target=lambda: back.append(start_server(base_folder, "--port", port)))
        starter.start()
        try:
            again = rollouts.draw("student", PROMPTS, LIMITS, ONCE)
        finally:
            starter.join()
            back[0].stop()
    assert [answer.tokens for answer in again] == [answer.tokens for answer in before]


def test_a_server_that_stays_away_ends_the_run_with_a_checkpoint(
    job: TrainingJob, mortal: Server, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No local rollouts instead; on another server the run goes on."""
    monkeypatch.setattr(remote_rollout, "PATIENCE_SECONDS", 1.0)
    recipe = job.recipe.model_copy(update={"max_steps": 6, "checkpoint_every": 100})
    job = job.model_copy(update={"recipe": recipe, "rollout_url": mortal.url})

    def kill() -> bool:
        mortal.process.kill()
        mortal.process.wait()
        return False

    with pytest.raises(TrainingFailed, match=f"did not answer for 1 s: {mortal.url}") as failed:
        train_until(job, 2, kill)
    assert failed.value.code == ROLLOUT_SERVER_AWAY
    assert [path.name for path in Path(job.checkpoint_dir).glob("step-*")] == ["step-000002"]
    with pytest.raises(TrainingFailed):
        run(job)
    lines = run(job.model_copy(update={"rollout_url": server.url}))
    assert [line.step for line in lines if isinstance(line, StepLine)] == [3, 4, 5, 6]


def train_until(job: TrainingJob, step: int, then: Callable[[], bool]) -> None:
    """Train, and after `step` call `then`, which says whether to stop."""
    taken: list[int] = []

    def hear(line: TrainerLine) -> None:
        if isinstance(line, StepLine):
            taken.append(line.step)

    train(job, hear, lambda: bool(taken) and taken[-1] == step and then())


@pytest.mark.timeout(1600)
def test_two_processes_train_on_the_answers_that_the_first_asked_for(
    remote_job: TrainingJob, tmp_path: Path
) -> None:
    recipe = remote_job.recipe.model_copy(update={"max_steps": 3, "rollout_every": 2})
    one = remote_job.model_copy(update={"recipe": recipe})
    alone = [line for line in run(one) if isinstance(line, StepLine)]
    planned = []
    for name, sharded in (("replicated", False), ("sharded", True)):
        folders = {"checkpoint_dir": str(tmp_path / name / "ck"), "output_dir": str(tmp_path / name / "out")}
        (tmp_path / name).mkdir()
        job = one.model_copy(update=folders)
        planned.append(Planned(job=job, sharded=sharded, stop_after=None, lines=tmp_path / name / "lines"))
    launch(planned, tmp_path / "plan.json")
    for name in ("replicated", "sharded"):
        for rank in (0, 1):
            raw = (tmp_path / name / f"lines.{rank}").read_text().splitlines()
            found = [line for line in map(TRAINER_LINE.validate_json, raw) if isinstance(line, StepLine)]
            for line, expected in zip(found, alone, strict=True):
                assert line.loss == pytest.approx(expected.loss, rel=1e-3)
                assert line.response_tokens == expected.response_tokens
                assert line.importance_max == pytest.approx(expected.importance_max, rel=1e-2)
                assert (line.rollout_gap is None) == (expected.rollout_gap is None)
                assert line.rollout_gap is None or line.rollout_gap < 1e-3


def test_a_failure_travels_between_processes_whole() -> None:
    away = pickle.loads(pickle.dumps(TrainingFailed("gone", code=ROLLOUT_SERVER_AWAY)))
    assert (type(away), away.message, away.code) == (TrainingFailed, "gone", ROLLOUT_SERVER_AWAY)


def test_recorded_ratios_by_hand(job: TrainingJob) -> None:
    """Of two answers of four tokens, one is as probable now as when drawn, one three times as much: mean 2,
    largest 3, and above a clip of 2 half of them."""
    model = trained(job)
    prompts = [[0, 50, 60], [0, 70]]
    with model.using("student"):
        drawn = sample(model, prompts, [4, 4], Sampling(1.0, seed=2))
    sequences = [
        Training(
            prompt=prompt,
            teacher_prompt=[0, 90, *prompt],
            shared_tokens=0,
            response=answer.tokens,
            rehearsal=False,
            lesson=None,
            mask=[True] * len(answer.tokens),
            logprobs=[value + shift for value in answer.logprobs],
        )
        for prompt, answer, shift in zip(prompts, drawn, (0, -math.log(3)), strict=True)
    ]
    assert [len(one.response) for one in sequences] == [4, 4]
    recipe = job.recipe
    figures = Optimizer(model, recipe, Teacher(model, recipe), 2.0).step(sequences, 0.0)
    assert figures.importance is not None
    assert figures.importance.mean == pytest.approx(2, abs=1e-4)
    assert figures.importance.max == pytest.approx(3, abs=1e-3)
    assert figures.importance.clipped_share == 0.5
    assert Optimizer(model, recipe, Teacher(model, recipe), None).step(sequences, 0.0).importance is None

"""Full fine-tuning: float32 masters, the copies that a recipe needs, a whole folder at the end."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from artifacts.store import ArtifactStore
from domain.errors import TrainingRefused
from domain.recipe import Recipe
from serving.checkpoint_validation import validate_checkpoint
from tests.unit.trainer.conftest import RECIPE, tiny_tokenizer
from trainer.loading import load_model
from trainer.model import Model, Role
from trainer.optimize import Optimizer
from trainer.sequences import Training
from trainer.teacher import Teacher, update_average

IDS = torch.tensor([[0, 40, 41, 42, 43, 44]])


def full(**changes: object) -> Recipe:
    return RECIPE.model_copy(update={"lora_rank": 0, "rehearsal_share": 0.0, **changes})


def states(model: Model, role: Role | None) -> Tensor:
    with torch.no_grad(), model.using(role):
        return model.hidden(IDS).float()


def move(model: Model, by: float, role: Role = "student") -> None:
    """A different change for every parameter, of about `by` of its size."""
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters(role).values()):
            parameter.mul_(1 + by * (1 + place % 3))
    model.updated(role)


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """The states of a saved folder by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        found: Tensor = model(IDS, output_hidden_states=True).hidden_states[-1].float()
    return found


@pytest.fixture
def in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.loading.compute_dtype", lambda: torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "beside"),
    [
        ({"teacher": "ema"}, {"ema"}),
        ({"teacher": "parent"}, {None}),
        ({"teacher": "base"}, {None}),
        ({"teacher": "ema", "rehearsal_share": 0.25}, {"ema", None}),
        ({"teacher": "live"}, set()),
        ({"teacher": "ema", "method": "sft"}, set()),
        ({"teacher": "ema", "method": "sft_reinvoke", "reinvoke_steps": 2}, {None}),
        ({"teacher": "live", "method": "offline_distillation"}, {None}),
    ],
)
def test_only_the_copies_that_the_recipe_needs_from_a_base(
    base_folder: Path, changes: dict[str, object], beside: set[Role | None]
) -> None:
    """The parent of a first update is the base: one frozen copy stands for both."""
    model = load_model(base_folder, full(**changes), None)
    roles: tuple[Role | None, ...] = ("student", "parent", "ema", None)
    assert {role for role in roles if model.has(role)} == {"student", *beside}
    assert model.parent() is None


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("changes", "beside"),
    [
        ({"teacher": "ema"}, {"ema"}),
        ({"teacher": "parent"}, {"parent"}),
        ({"teacher": "base"}, {None}),
        ({"teacher": "base", "rehearsal_share": 0.25}, {None, "parent"}),
    ],
)
def test_an_update_starts_from_its_parents_checkpoint(
    base_folder: Path, tmp_path: Path, changes: dict[str, object], beside: set[Role | None]
) -> None:
    first = load_model(base_folder, full(teacher="parent"), None)
    move(first, 0.05)
    first.save_student(tmp_path / "v1", "tiny")
    model = load_model(base_folder, full(**changes), tmp_path / "v1")
    roles: tuple[Role | None, ...] = ("student", "parent", "ema", None)
    assert {role for role in roles if model.has(role)} == {"student", *beside}
    assert model.parent() == "parent"
    for role in {"student", *beside}:
        expected = reference(base_folder if role is None else tmp_path / "v1")
        torch.testing.assert_close(states(model, role), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(states(model, "student"), reference(base_folder), atol=0.05)


@pytest.mark.usefixtures("exact")
def test_the_student_moves_alone(base_folder: Path) -> None:
    model = load_model(base_folder, full(teacher="ema", rehearsal_share=0.25), None)
    before = states(model, "student")
    move(model, 0.05)
    assert not torch.allclose(states(model, "student"), before, atol=0.05)
    assert torch.equal(states(model, "ema"), before)
    assert torch.equal(states(model, None), before)


def test_every_weight_trains_and_nothing_else(base_folder: Path) -> None:
    model = load_model(base_folder, full(teacher="ema", rehearsal_share=0.25), None)
    weights = load_file(base_folder / "model.safetensors")
    student = model.parameters("student")
    assert student.keys() == weights.keys()
    assert all(p.dtype == torch.float32 for p in student.values())
    with model.using("student"):
        (model.hidden(IDS) @ model.head.T).float().logsumexp(-1).sum().backward()
    norm = model.clip_gradients(1e9)
    assert norm > 0
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.values())
    for role in ("ema", None):
        assert not model.head_of(role).requires_grad


@pytest.mark.usefixtures("exact")
def test_gradients_are_those_of_plain_autograd_and_are_clipped(base_folder: Path) -> None:
    """Two passes add up; the tied embedding collects from both of its ends."""
    model = load_model(base_folder, full(), None)
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    for ids in (IDS, IDS[:, :4]):
        with model.using("student"):
            (model.hidden(ids) @ model.head.T).logsumexp(-1).sum().backward()
        plain(ids).logits.logsumexp(-1).sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    whole = torch.linalg.vector_norm(torch.stack([g.norm() for g in expected.values()]))
    assert model.clip_gradients(0.5) == pytest.approx(float(whole), rel=1e-5)
    for name, parameter in model.parameters("student").items():
        torch.testing.assert_close(parameter.grad, expected[name] * (0.5 / whole), rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("in_bfloat16")
def test_small_steps_are_not_lost_in_bfloat16(base_folder: Path) -> None:
    """A change of 2^-12 of a weight is below bfloat16's 2^-8: masters keep 64 of them, a bfloat16 weight
    none. And gradients of many passes are added in float32."""
    model = load_model(base_folder, full(teacher="parent"), None)
    name = "model.layers.0.mlp.up_proj.weight"
    before = model.parameters("student")[name].clone()
    for _ in range(64):
        with torch.no_grad():
            model.parameters("student")[name].mul_(1 + 2**-12)
        model.updated("student")
    torch.testing.assert_close(model.parameters("student")[name], before * (1 + 2**-12) ** 64)
    assert not torch.equal(states(model, "student"), states(model, None))
    for _ in range(300):
        with model.using("student"):
            (model.hidden(IDS) * 2**-6).sum().backward()
    many = model.parameters("student")[name].grad
    assert many is not None
    many = many.clone()
    model.parameters("student")[name].grad = None
    with model.using("student"):
        (model.hidden(IDS) * 2**-6).sum().backward()
    once = model.parameters("student")[name].grad
    torch.testing.assert_close(many, 300 * once, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("in_bfloat16")
def test_what_runs_is_the_rounded_master(base_folder: Path, tmp_path: Path) -> None:
    """In each role, after a change; rotary frequencies stay as transformers leaves them."""
    model = load_model(base_folder, full(teacher="ema"), None)
    torch.testing.assert_close(states(model, "student"), reference(base_folder, torch.bfloat16))
    move(model, 0.05)
    model.save_student(tmp_path / "v1", "tiny")
    torch.testing.assert_close(states(model, "student"), reference(tmp_path / "v1", torch.bfloat16))
    update_average(model.parameters("ema"), model.parameters("student"), 1.0)
    model.updated("ema")
    torch.testing.assert_close(states(model, "ema"), states(model, "student"))


@pytest.mark.usefixtures("exact")
def test_a_version_is_a_whole_folder_without_pickle(base_folder: Path, tmp_path: Path) -> None:
    model = load_model(base_folder, full(), None)
    move(model, 0.05)
    model.save_student(tmp_path / "v1", "tiny")
    names = {path.name for path in (tmp_path / "v1").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert names == {path.name for path in base_folder.iterdir()}
    assert all(Path(name).suffix in {".safetensors", ".json", ".jinja"} for name in names)
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "v1" / name).read_bytes() == (base_folder / name).read_bytes()
    validate_checkpoint(tmp_path / "v1", base_folder)
    torch.testing.assert_close(reference(tmp_path / "v1"), states(model, "student"), rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "v1")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    config = json.loads((tmp_path / "v1" / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("float32", ["LlamaForCausalLM"])


def test_a_version_can_be_published_as_it_is(base_folder: Path, tmp_path: Path) -> None:
    recipe = full()
    load_model(base_folder, recipe, None).save_student(tmp_path / "v1", "tiny")
    store = ArtifactStore(tmp_path / "artifacts")
    manifest, sha256 = store.publish(
        tmp_path / "v1", version_id="ver_1", kind=recipe.version_kind, base_model="tiny", update_id="up_1"
    )
    assert manifest.kind == "full"
    load_model(base_folder, recipe, store.verify("ver_1", sha256))


def test_a_version_has_its_bases_dtype(base_folder: Path, tmp_path: Path) -> None:
    """Whatever dtype trains it: a bfloat16 base gives bfloat16 versions."""
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(base_folder, tie_word_embeddings=False)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", full(), None)
    assert model.parameters("student").keys() >= {"model.embed_tokens.weight", "lm_head.weight"}
    model.save_student(tmp_path / "v1", "tiny")
    saved = load_file(tmp_path / "v1" / "model.safetensors")
    original = load_file(tmp_path / "base" / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in saved.items())
    assert json.loads((tmp_path / "v1" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.usefixtures("exact")
def test_full_training_starts_from_a_parent_adapters_product(base_folder: Path, tmp_path: Path) -> None:
    adapted = load_model(base_folder, RECIPE, None)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.parameters("student").values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapted.save_student(tmp_path / "adapter", "tiny")
    model = load_model(base_folder, full(teacher="parent"), tmp_path / "adapter")
    for role in ("student", "parent"):
        torch.testing.assert_close(states(model, role), states(adapted, "student"), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(states(model, "student"), states(adapted, None), atol=0.05)


def test_an_adapter_cannot_continue_a_full_checkpoint(base_folder: Path, tmp_path: Path) -> None:
    load_model(base_folder, full(), None).save_student(tmp_path / "v1", "tiny")
    with pytest.raises(TrainingRefused, match="as its base model") as refused:
        load_model(base_folder, RECIPE, tmp_path / "v1")
    assert refused.value.code == "parent_not_an_adapter"


def test_a_role_without_a_copy_says_so(base_folder: Path) -> None:
    model = load_model(base_folder, full(teacher="ema"), None)
    with pytest.raises(LookupError, match="no copy of the base"), model.using(None):
        model.hidden(IDS)


class Descent(torch.optim.SGD):
    """In AdamW's place: a step then is the gradient itself."""

    def __init__(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, lr=lr)


@pytest.mark.usefixtures("exact")
def test_a_step_is_plain_autograds_through_both_ends_of_a_tied_embedding(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL(teacher || student), each with its own head, mean over tokens and then over sequences."""
    monkeypatch.setattr("torch.optim.AdamW", Descent)
    recipe = full(teacher="ema", max_grad_norm=1e9, temperature=1.5, divergence="forward")
    model = load_model(base_folder, recipe, None)
    move(model, 0.05)  # so that the student's head is not its teacher's
    start = {name: tensor.clone() for name, tensor in model.parameters("student").items()}
    sequences = [
        Training(
            prompt=[0, 40 + i],
            teacher_prompt=[0, 60, 61, 40 + i],
            shared_tokens=0,
            response=[70 + i, 71, 72, 1][i:],
            rehearsal=False,
            lesson=None,
            mask=[False, True, True, True][i:],
            logprobs=None,
        )
        for i in (0, 1)
    ]
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(start[name])

    def logp(of: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
        logits = of(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits.double() / 1.5, -1)

    losses = []
    for s in sequences:
        with torch.no_grad():
            target = logp(teacher, s.teacher_prompt, s.response)
        own = logp(plain, s.prompt, s.response)
        losses.append((target.exp() * (target - own)).sum(-1)[torch.tensor(s.mask)].mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    figures = Optimizer(model, recipe, Teacher(model, recipe), None).step(sequences, 1.0)
    assert figures.loss == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in plain.named_parameters():
        taken = start[name] - model.parameters("student")[name]
        torch.testing.assert_close(taken, parameter.grad, rtol=2e-3, atol=2e-6)

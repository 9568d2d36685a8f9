"""The evaluation stage: candidate, parent and base on engines of one make, greedy, adapters under private
names and a candidate that is a whole model on an engine of its own.

Measured are the taught skills, every earlier skill of the lineage that has held-out items, the general
suite and the leak check; the base on the taught skills only. What the registry knows of parent and base is
not asked again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from sqlalchemy.orm import Session, sessionmaker

from domain.failpoint import failpoint
from domain.measurement import ItemScore, Measurement, SuiteKind
from domain.settings import Settings
from domain.skill import Grader
from evaluation.benchmarks import LIKELIHOOD, ORDINARY, load_general, load_ordinary
from evaluation.leak import TaughtSkill
from evaluation.suites import (
    SkillItem,
    measure_general,
    measure_ordinary,
    measure_skill,
    reasoning_tokens,
    skill_items,
)
from registry.assistants import get_assistant, get_skill
from registry.claims import Claim
from registry.demonstrations import holdout_items
from registry.measurements import measured_items
from registry.tables import Assistant, Version
from registry.updates import demonstrations_of, get_update
from registry.versions import get_version, lineage
from serving.validation import validate_adapter
from worker.brief import Brief
from worker.candidate_scores import CandidateScores
from worker.evaluation_engines import Engines
from worker.journal import Journal
from worker.patient_engine import PatientModel

PRIVATE = ("cand-", "parent-")
"""Beginnings of the names under which an evaluation loads adapters; an assistant's served name ends in
`-v<n>-<hex>`, so that none is taken for the other."""
_GRADER: TypeAdapter[Grader] = TypeAdapter(Grader)


@dataclass(frozen=True)
class Scores:
    candidate: list[Measurement]
    parent: list[Measurement]
    earlier: list[str]
    """Earlier skills of the lineage that could be measured."""


@dataclass(frozen=True)
class SkillSuite:
    skill: TaughtSkill
    items: list[SkillItem]
    """Its held-out demonstrations of today; at least one."""


@dataclass(frozen=True)
class Plan:
    """What to measure, read in one transaction."""

    parent: Version
    base: Version
    taught: list[SkillSuite]
    earlier: list[SkillSuite]
    taught_before: list[TaughtSkill]
    """What the parent's lineage was taught: in these formats it may leak."""
    taught_after: list[TaughtSkill]


def read_plan(session: Session, brief: Brief, reasoning: int) -> Plan:
    """`reasoning`: tokens of room for what the model writes before an answer."""
    assistant = get_assistant(session, brief.team_id, brief.assistant_id)
    parent = get_version(session, assistant, brief.parent_id)
    before = _taught(session, assistant, [version.update_id for version in lineage(session, parent)])
    after = _taught(session, assistant, [brief.update_id], before)
    taught: list[SkillSuite] = []
    earlier: list[SkillSuite] = []
    for skill in after:
        items = skill_items(holdout_items(session, get_skill(session, assistant, skill.name)), reasoning)
        if items:
            (taught if skill.name in brief.skills else earlier).append(SkillSuite(skill, items))
    return Plan(parent, get_version(session, assistant, 0), taught, earlier, before, after)


def _taught(
    session: Session,
    assistant: Assistant,
    update_ids: Sequence[str | None],
    before: Sequence[TaughtSkill] = (),
) -> list[TaughtSkill]:
    """Skills and training responses of `before` and of these updates, in order of teaching."""
    responses = {skill.name: list(skill.responses) for skill in before}
    graders = {skill.name: skill.grader for skill in before}
    for update_id in filter(None, update_ids):
        update = get_update(session, assistant.team_id, update_id)
        rows = demonstrations_of(session, update)
        for name in update.skills:
            skill = get_skill(session, assistant, name)
            graders[name] = _GRADER.validate_python(skill.grader)
            told = responses.setdefault(name, [])
            told += [str(row.body["response"]) for row in rows if row.skill_id == skill.id]
    return [TaughtSkill(name, graders[name], told) for name, told in responses.items()]


class Evaluation:
    """Measures the versions of one claim."""

    def __init__(
        self,
        reads: sessionmaker[Session],
        claim: Claim,
        brief: Brief,
        settings: Settings,
        journal: Journal,
        base: Path,
    ) -> None:
        """`base`: the folder of the assistant's base model."""
        self._reads = reads
        self._reasoning = reasoning_tokens(base)
        self._claim = claim
        self._brief = brief
        self._journal = journal
        self._scores = CandidateScores(settings.work_dir / claim.update_id / "scores")
        self._benchmarks = load_general(settings.general_suite_dir)
        self._ordinary = load_ordinary(settings.general_suite_dir)

    def run(self, engines: Engines, candidate: Path, parent_adapter: Path | None) -> Scores:
        """`parent_adapter` is None where the parent is a whole model.

        Raises EngineUnavailable, CorruptArtifact, Interrupted.
        """
        with self._reads() as session:
            plan = read_plan(session, self._brief, self._reasoning)
        suites = [*plan.taught, *plan.earlier]
        mine = f"{self._claim.update_id}-{self._claim.fence}"
        full = self._brief.recipe.version_kind == "full"
        with engines.of_parent() as engine:
            engine.unload(lambda model: model.startswith(PRIVATE) and self._claim.update_id in model)
            if parent_adapter is None:
                parent = self._measure("parent", plan.parent, engine.base(), suites, plan.taught_before)
            else:
                with engine.loaded(f"parent-{mine}", parent_adapter) as model:
                    parent = self._measure("parent", plan.parent, model, suites, plan.taught_before)
            if not full:
                with engine.loaded(f"cand-{mine}", candidate) as model:
                    measured = self._measure("candidate", None, model, suites, plan.taught_after)
        if full:
            with engines.of_candidate(candidate) as model:
                measured = self._measure("candidate", None, model, suites, plan.taught_after)
        if plan.parent.id != plan.base.id:
            with engines.of_base() as engine:
                for suite in plan.taught:
                    self._measure_skill("base", plan.base, engine.base(), suite)
        return Scores(measured, parent, [suite.skill.name for suite in plan.earlier])

    def _measure(
        self,
        who: str,
        version: Version | None,
        model: PatientModel,
        suites: Sequence[SkillSuite],
        formats: Sequence[TaughtSkill],
    ) -> list[Measurement]:
        measured = [self._measure_skill(who, version, model, suite) for suite in suites]
        known = {
            name: self._known(version, "general", name)
            for name in [LIKELIHOOD, *(benchmark.name for benchmark in self._benchmarks)]
        }
        general = measure_general(model, self._benchmarks, known)
        known[ORDINARY] = self._known(version, "general", ORDINARY)
        general.append(measure_ordinary(model, self._ordinary, formats, known[ORDINARY]))
        for measurement in general:
            self._note(who, version, measurement, known[measurement.suite])
        return measured + general

    def _measure_skill(
        self, who: str, version: Version | None, model: PatientModel, suite: SkillSuite
    ) -> Measurement:
        known = self._known(version, "skill", suite.skill.name)
        measurement = measure_skill(model, suite.skill.name, suite.skill.grader, suite.items, known)
        assert measurement is not None  # a suite has items
        self._note(who, version, measurement, known)
        return measurement

    def _note(
        self, who: str, version: Version | None, measurement: Measurement, known: dict[str, ItemScore]
    ) -> None:
        new = any(item.item not in known for item in measurement.items)
        if version is None and new:
            self._scores.keep(measurement)
        self._journal.measured(who, version, measurement, new=new)
        failpoint("worker.suite_measured")

    def _known(self, version: Version | None, kind: SuiteKind, suite: str) -> dict[str, ItemScore]:
        if version is None:
            return self._scores.known(kind, suite)
        with self._reads() as session:
            return measured_items(session, version, kind, suite)


def check_candidate(candidate: Path, base: Path, base_model: str, max_rank: int | None) -> None:
    """Raises CorruptArtifact: engines accept silently what does not fit. EngineUnavailable: see there."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    validate_adapter(candidate, config, base_model=base_model, max_rank=max_rank)

"""Preflight as a library call: all that is known about a job before its first step."""

from pathlib import Path

from domain.preflight import PreflightReport
from domain.training import TrainingJob
from trainer.loading import load_model
from trainer.preflight_cost import estimate_cost, memory_findings
from trainer.run import Run


def preflight(job: TrainingJob) -> PreflightReport:
    """Check `job`, measure student and teacher on its held-out items, and estimate its time and memory.

    Reads the base model and the parent; writes nothing. What is measured stops at the first kind of error:
    a report with errors has no scores and no cost. Raises TrainingRefused for a job that cannot even be
    set up: nothing to train on, a base without chat template, a parent that does not fit.
    """
    parent = None if job.parent_adapter_path is None else Path(job.parent_adapter_path)
    model = load_model(Path(job.base_path), job.recipe, parent)
    run = Run(job, model, lambda line: None)
    report = run.examine()
    if report.errors:
        return report
    cost = estimate_cost(job, model, run.material, report)
    return report.model_copy(update={"cost": cost, "findings": [*report.findings, *memory_findings(cost)]})

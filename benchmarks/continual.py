"""Does it learn and keep? Skills taught in sequence by every arm, every version measured on all of them.

    ratchet bench continual --out DIR --arms sdft,sft_3e-4 --seeds 0,1 --json
    python -m benchmarks.continual ...      the same

An arm is a recipe, named in the file of arms. Each stage teaches one skill on top of the version before it
and appends one line to DIR/results.jsonl. Stages that have a line are skipped, adapters and checkpoints
stay in DIR, so that a study that was stopped or killed goes on where it was; with --budget-minutes 0 it
only reports. All arms take a stage before any takes the next one. Progress goes to standard error; the
report is DIR/report.md with its plots.
"""

import argparse
import json
import signal
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from artifacts import base_models
from benchmarks.continual_metrics import analyse
from benchmarks.continual_report import summary, write_report
from benchmarks.skill_data import evenly_spaced, load_skill
from benchmarks.study import BASE, Arm, Study, StudySettings, load_arms
from benchmarks.teaching import VERSION, Subject, teach, training_figures
from benchmarks.version_measure import Examiner, Version
from domain.errors import RatchetError, TrainingRefused
from domain.settings import Settings
from evaluation.benchmarks import Benchmark, load_general, load_ordinary
from trainer.run import Interrupted

SKILLS = "banking_intent,snips_call,clinc_route,fictional_facts"
GENERAL = ("hellaswag", "arc_easy", "piqa", "lambada_openai")
ARMS = Path(__file__).with_name("arms.json")


class Stop:
    """True once the budget is spent or SIGTERM or SIGINT came; a training reads it after every step, and
    what is being measured is measured to its end. A second signal ends the process at once."""

    def __init__(self, minutes: float | None) -> None:
        self._deadline = None if minutes is None else time.monotonic() + minutes * 60
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def __call__(self) -> bool:
        return self._asked or (self._deadline is not None and time.monotonic() >= self._deadline)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)


def run(
    study: Study,
    subject: Subject,
    arms: dict[str, Arm],
    seeds: list[int],
    stages: int,
    stop: Stop,
    rollout_url: str | None = None,
) -> list[str]:
    """Every missing stage up to `stages`, seed by seed, stage by stage, arm by arm, until `stop`.

    `rollout_url` is for the arms whose rollouts a server draws.

    Returns a line for each arm that was refused a training: it goes no further, the others do.
    """
    examiner = Examiner(subject, study.settings.pass_items)
    if (BASE, 0, 0) not in study.results and not stop():
        result = examiner.measure(Version(BASE, 0, 0, None), None, None)
        study.append(result)
        say(BASE, f"measured in {sum(result.seconds.values()):.0f} s")
    planned = [(seed, stage, name) for seed in seeds for stage in range(1, stages + 1) for name in arms]
    refused: dict[str, str] = {}
    for seed, stage, name in planned:
        if stop():
            break
        if (name, seed, stage) in study.results or name in refused:
            continue
        folder = study.stage_folder(name, seed, stage)
        parent = study.stage_folder(name, seed, stage - 1) / VERSION if stage > 1 else None
        label = f"{name}, seed {seed}, stage {stage} ({subject.skills[stage - 1].name})"
        try:
            files = teach(
                subject,
                stage,
                arms[name].recipe(seed, study.settings.steps),
                parent=parent,
                rollout_url=rollout_url if arms[name].rollouts == "server" else None,
                folder=folder,
                stop_requested=stop,
                progress=partial(say, label),
            )
        except Interrupted:
            break
        except TrainingRefused as error:
            refused[name] = f"{label}: {error.message}"
            say(label, error.message)
            continue
        result = examiner.measure(Version(name, seed, stage, files), arms[name], training_figures(folder))
        study.append(result)
        scores = {skill: round(sum(s.values()) / len(s), 3) for skill, s in result.skills.items()}
        say(label, f"{scores}, measured in {sum(result.seconds.values()):.0f} s")
    return list(refused.values())


def say(where: str, text: str) -> None:
    print(f"{where}: {text}", file=sys.stderr, flush=True)


def general_suite(data: Path, items: int) -> list[Benchmark]:
    """The suite's benchmarks, `items` evenly spaced questions of each; none of them for 0."""
    if not items:
        return []
    return [
        Benchmark(benchmark.name, tuple(evenly_spaced(benchmark.questions, items)))
        for benchmark in load_general(data / "prior", GENERAL)
    ]


def main() -> None:
    options = _options()
    if find_spec("matplotlib") is None:
        sys.exit("error: the plots need matplotlib: pip install 'ratchet[bench]'")
    try:
        arms = load_arms(options.arms_file, options.arms)
        base = base_models.resolve(options.base, Settings().cache_dir).path
        settings = StudySettings(
            base_model=options.base,
            skills=options.skills,
            steps=options.steps,
            eval_rows=options.eval_rows,
            general_items=options.general_items,
            pass_items=options.pass_items,
        )
        study = Study(options.out, settings)
        for name, arm in arms.items():
            study.check_arm(name, arm)
            if arm.rollouts == "server" and options.rollout_url is None:
                raise ValueError(f"arm {name!r} needs --rollout-url")
        subject = Subject(
            base=base,
            base_model=options.base,
            skills=[load_skill(options.data, name, options.eval_rows) for name in options.skills],
            benchmarks=general_suite(options.data, options.general_items),
            ordinary=load_ordinary(None),
        )
        stages = len(options.skills) if options.stages is None else options.stages
        stop = Stop(options.budget_minutes)
        refused = run(study, subject, arms, options.seeds, stages, stop, options.rollout_url)
    except (RatchetError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    clusters = {item: cluster for skill in subject.skills for item, cluster in skill.clusters.items()}
    figures = analyse(study.results, options.skills, clusters)
    report = write_report(study, figures)
    if options.json:
        print(json.dumps(summary(figures)))
    else:
        print(report.read_text())
    if refused:
        sys.exit("error: refused:\n" + "\n".join(refused))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ratchet bench continual",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    def numbers(text: str) -> list[int]:
        return [int(number) for number in names(text)]

    parser.add_argument("--out", type=Path, required=True, help="the study's folder, made or continued")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="has skills/ and prior/")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="built-in name or model folder")
    parser.add_argument("--arms", type=names, help="arms to run; default: all of the file")
    parser.add_argument("--arms-file", type=Path, default=ARMS)
    parser.add_argument("--skills", type=names, default=names(SKILLS), help="in the order of the stages")
    parser.add_argument("--rollout-url", help="a server for the arms whose rollouts are a server's")
    parser.add_argument("--stages", type=int, help="run this many stages at most; 0 measures the base alone")
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--steps", type=int, help="most steps a stage; default: the recipe's")
    parser.add_argument("--eval-rows", type=int, default=60, help="of each skill, evenly spaced")
    parser.add_argument("--general-items", type=int, default=100, help="of each benchmark; 0 for none")
    parser.add_argument(
        "--pass-items", type=int, default=4, help="of each skill, sampled 32 times; 0 for none"
    )
    parser.add_argument("--budget-minutes", type=float, help="stop, resumably, after this long")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is JSON")
    options = parser.parse_args()
    if options.stages is not None and not 0 <= options.stages <= len(options.skills):
        parser.error(f"--stages is {options.stages}, but there are {len(options.skills)} skills")
    for name in ("steps", "eval_rows"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is below 1")
    return options


if __name__ == "__main__":
    main()

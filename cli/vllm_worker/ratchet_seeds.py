"""Loaded into the workers of vLLM's CPU build by `--worker-extension-cls`; this folder is their import path.

A request with a `seed` whose prompt is read in more than one step ends that build (0.32): every step samples
for every row, and what an unfinished prompt's row drew is taken back by turning its generator's offset, which
only a CUDA generator has. Here such a row draws without its generator, so there is nothing to take back, and
the answer to a seed does not depend on how its prompt was cut. tests/vllm/test_seeds.py holds both.
"""

from typing import Any

import numpy as np
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


class Worker:
    """What vLLM adds to its worker's class: nothing; importing this module is what counts."""


_sample_tokens = CPUModelRunner.sample_tokens


def _with_spared_seeds(runner: Any, *arguments: Any) -> Any:
    generators = runner.input_batch.generators
    unfinished = np.nonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])[0].tolist()
    spared = {row: generators.pop(row) for row in unfinished if row in generators}
    try:
        return _sample_tokens(runner, *arguments)
    finally:
        generators.update(spared)


CPUModelRunner.sample_tokens = _with_spared_seeds

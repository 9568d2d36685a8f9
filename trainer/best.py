"""The best weights so far by held-out score: what early stopping keeps."""

import torch
from torch import Tensor

from trainer.checkpoints import BestScore
from trainer.model import Model


class BestWeights:
    """Watches scores and keeps a copy of the student's parameters at the best one."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._parameters = model.parameters("student")
        self._kept: dict[str, Tensor] = {}
        self.score: BestScore | None = None

    @property
    def misses(self) -> int:
        """Scores in a row that were no better than the best one."""
        return 0 if self.score is None else self.score.misses

    @torch.no_grad()
    def hear(self, step: int, value: float) -> None:
        """A score after `step` steps. Of equal ones the first stays: it has drifted least."""
        if self.score is None or value > self.score.value:
            self.score = BestScore(step=step, value=value, misses=0)
            self._kept = {name: tensor.detach().clone() for name, tensor in self._parameters.items()}
        else:
            self.score = self.score.model_copy(update={"misses": self.score.misses + 1})

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the parameters their best values; nothing where no score was heard."""
        for name, tensor in self._kept.items():
            self._parameters[name].copy_(tensor)
        self._model.updated("student")

    def tensors(self) -> dict[str, Tensor]:
        return {f"best/{name}": self._model.whole(name, tensor) for name, tensor in self._kept.items()}

    def restore(self, score: BestScore | None, saved: dict[str, Tensor]) -> None:
        self.score = score
        if score is not None:
            self._kept = {
                name: self._model.part(name, saved[f"best/{name}"]).to(tensor.device)
                for name, tensor in self._parameters.items()
            }

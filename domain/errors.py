"""Errors that a user can cause or must be told about.

RatchetError
├── InvalidInput        a field, line or file is wrong; `param` names it
│   ├── DemonstrationsRejected   one entry per bad line
│   └── UnknownBaseModel
├── NotFound            no such object for this team
├── Conflict            the object exists, but its state forbids the request
│   ├── AlreadyExists
│   ├── NothingToTeach           an update without new demonstrations
│   ├── NothingToRollBackTo
│   ├── RevisionMismatch         If-Match names another revision
│   └── CanaryCoolingDown        a canary was rolled back a short while ago
├── StaleFence          a worker that lost its lease tried to write
├── CorruptArtifact     a version's files differ from their manifest
├── ArtifactsUnavailable   the store of version files does not answer
├── TrainingRefused     preflight found a reason not to train
├── TrainingFailed      the trainer process ended without a candidate
├── EngineUnavailable   the inference engine does not answer or refuses an adapter
│   └── EngineTimeout            it began no reply, or went silent within one
└── Overloaded          more requests are under way than may be

None carries an HTTP status: `api/errors.py` holds the one table.
"""

from pydantic import BaseModel


class LineError(BaseModel):
    """One rejected line of a batch; `line` counts from 1 as an editor does."""

    line: int
    param: str | None
    message: str


class RatchetError(Exception):
    """Base of all: a message for people, a stable `code` for programs, the offending `param`."""

    code = "ratchet_error"
    retry_after_seconds: float | None = None
    """When the same request may succeed, where that is known."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidInput(RatchetError):
    code = "invalid_input"


class DemonstrationsRejected(InvalidInput):
    code = "invalid_demonstrations"

    def __init__(self, lines: list[LineError]) -> None:
        shown = "; ".join(f"line {bad.line}: {bad.message}" for bad in lines[:20])
        more = f"; and {len(lines) - 20} more" if len(lines) > 20 else ""
        super().__init__(
            f"Nothing was stored: {shown}{more}",
            param=f"line {lines[0].line}" if lines else None,
        )
        self.lines = lines


class UnknownBaseModel(InvalidInput):
    code = "unknown_base_model"


class NotFound(RatchetError):
    code = "not_found"


class Conflict(RatchetError):
    code = "conflict"


class AlreadyExists(Conflict):
    code = "already_exists"


class NothingToTeach(Conflict):
    code = "no_new_demonstrations"


class NothingToRollBackTo(Conflict):
    code = "nothing_to_roll_back_to"


class RevisionMismatch(Conflict):
    code = "revision_mismatch"


class CanaryCoolingDown(Conflict):
    code = "canary_cooling_down"


class UpdateCancelled(Conflict):
    code = "update_cancelled"


class StaleFence(RatchetError):
    code = "stale_fence"


class CorruptArtifact(RatchetError):
    code = "corrupt_artifact"


class ArtifactsUnavailable(RatchetError):
    code = "artifacts_unavailable"


class TrainingRefused(RatchetError):
    code = "training_refused"


class TrainingFailed(RatchetError):
    code = "training_failed"


class EngineUnavailable(RatchetError):
    code = "engine_unavailable"


class EngineTimeout(EngineUnavailable):
    code = "engine_timeout"


class Overloaded(RatchetError):
    code = "overloaded"
    retry_after_seconds = 1.0

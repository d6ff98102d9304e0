"""The one error tree. Every message names the offending value and the remedy.

The CLI turns a `ForeframeError` into one line and exit code 2; anything else is a bug and shows its traceback.
"""

from __future__ import annotations


class ForeframeError(Exception):
    """Base of every error a user can mend. `retryable` tells the flow whether another attempt may help."""

    retryable: bool = False

    def __init__(self, message: str, *, remedy: str = "") -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(f"{message} {remedy}".strip())

    def __reduce__(self) -> tuple[object, ...]:
        # Ray and multiprocessing pickle exceptions by args, which would lose the keyword.
        return (_rebuild, (type(self), self.message, self.remedy))


def _rebuild(kind: type[ForeframeError], message: str, remedy: str) -> ForeframeError:
    return kind(message, remedy=remedy)


class ConfigError(ForeframeError):
    """A configuration key or value is wrong."""


class InputError(ForeframeError):
    """A file, folder or address given by the user is missing or malformed."""


class DataError(ForeframeError):
    """A data set, index or receipt does not match what its manifest says."""


class DownloadError(DataError):
    """An address gave no file. `reason` is not_found, download_refused or download_failed, as in the failure ledger.

    `retry_after_s` is what the server asked us to wait, in seconds; None where it did not say.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "download_failed",
        retryable: bool = False,
        retry_after_s: float | None = None,
        remedy: str = "",
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.reason = reason
        self.retryable = retryable
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_download, (self.message, self.reason, self.retryable, self.retry_after_s, self.remedy))


def _rebuild_download(
    message: str, reason: str, retryable: bool, retry_after_s: float | None, remedy: str
) -> DownloadError:
    return DownloadError(message, reason=reason, retryable=retryable, retry_after_s=retry_after_s, remedy=remedy)


class TooManyFailuresError(DataError):
    """More inputs failed than `max_failure_share` allows; the message names the dominating reason."""


class CheckpointError(ForeframeError):
    """No valid checkpoint, or one that belongs to another model."""


class TrainingError(ForeframeError):
    """Training cannot go on, e.g. a non-finite loss. Never retried: the same step would fail again."""


class ServiceError(ForeframeError):
    """A server cannot be reached, did not become healthy, or its port is taken."""

    retryable = True


class StorageError(ForeframeError):
    """Reading or writing a local path or an `s3://` address failed after the bounded retries."""

    retryable = True


class MachineError(ForeframeError):
    """The machine lacks something: a GL library, ffmpeg, disk, a package of the right version."""

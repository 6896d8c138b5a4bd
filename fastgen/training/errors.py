"""Errors that the user can put right. Each message is one line that says what to do."""


class RunError(RuntimeError):
    """A run that cannot start or go on: its folder, its configuration or its files.

    Attributes:
        shared: every process raises it, so that it is enough if the main one tells.
    """

    shared = False


class CheckpointError(RunError):
    """A checkpoint that is incomplete, damaged or does not fit the model."""


class WriteError(RunError):
    """The disk refuses what a training writes; what was there before is untouched."""


class NonFiniteLossError(RunError):
    """The loss, or a weight, became NaN or infinite."""

    shared = True


class TrainingStopped(RunError):
    """SIGTERM came; the run has a checkpoint of the step it stopped after."""

    shared = True

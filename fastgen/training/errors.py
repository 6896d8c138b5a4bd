"""Errors that the user can put right. Each message is one line that says what to do."""


class RunError(RuntimeError):
    """A run that cannot start or go on: its folder, its configuration or its files."""


class CheckpointError(RunError):
    """A checkpoint that is incomplete, damaged or does not fit the model."""


class NonFiniteLossError(RunError):
    """The loss, or a weight, became NaN or infinite."""


class TrainingStopped(RunError):
    """SIGTERM came; the run has a checkpoint of the step it stopped after."""

"""A recording and the model in lock-step: what `kvmtrace validate` does."""

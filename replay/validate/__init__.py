"""The conformance check: a recording against the model, row by row (`kvmtrace validate`)."""

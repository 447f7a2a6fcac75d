"""From a trace to each VM's operations: what happened that no root policy decides."""

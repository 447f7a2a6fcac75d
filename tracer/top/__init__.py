"""What every vCPU does, second by second, of this host or of a recording."""

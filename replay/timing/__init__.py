"""Virtual time: how long each vCPU would have stood still, when and why."""

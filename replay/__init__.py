"""A software TDP MMU: what a recording's VMs would have done under another root policy."""

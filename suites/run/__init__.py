"""The runner: jobs in order, a process for each, on this machine or on a cluster."""

"""This machine: its GPUs, host memory and limits, and the measurements that a hardware profile is fitted to."""

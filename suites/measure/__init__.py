"""The measurements that make a record: answers of a live model, replays of its trace, times on a real link."""

"""An attached model at work: attach and detach, the engine, the two-pass forward and its rollback."""

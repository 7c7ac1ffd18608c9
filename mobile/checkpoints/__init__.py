"""From a checkpoint, a folder or a repository of the hub, to an offloaded model."""

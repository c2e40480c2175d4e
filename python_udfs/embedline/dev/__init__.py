"""Set up this checkout's local cluster, and run its demo."""

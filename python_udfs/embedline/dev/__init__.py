"""This checkout: its local cluster and its demo."""

"""Clients of the services that embed over the network."""

"""Replicas, routing and speculation on a virtual clock: capacity, before there are machines."""

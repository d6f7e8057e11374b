"""The simulator: the production classes in virtual time, under simulated load and faults."""

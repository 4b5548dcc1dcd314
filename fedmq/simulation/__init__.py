"""Federations in virtual time: the production code, with workers, network and faults that are made up."""

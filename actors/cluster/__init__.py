"""Starts, places, replaces and joins the actors. May import: the library, every actor, ``weights``."""

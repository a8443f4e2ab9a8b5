"""Trains the small hybrid model that ships with Headway, from the Python standard library's own source."""

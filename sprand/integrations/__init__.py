"""Doors to other libraries: each module here needs the library it is named after, and nothing of sprand imports it."""

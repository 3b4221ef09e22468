"""Files that are proven when they are read, and replaced in one step."""

"""Modules whose chosen entries train, whole or sharded."""

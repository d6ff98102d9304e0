"""Rsp of foreframe."""

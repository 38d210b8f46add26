"""Hostile and damaged checkpoints, made on the fly: `HEADERS` are files, `FOLDERS` are whole models."""

from tests.attacks.folders import FOLDERS, Folder
from tests.attacks.headers import HEADERS, Header

__all__ = ["FOLDERS", "HEADERS", "Folder", "Header"]

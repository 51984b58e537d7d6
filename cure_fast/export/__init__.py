"""A trained model as one verified file for other programs: a file here for each format."""

from __future__ import annotations

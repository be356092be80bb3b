"""The settings of each part of a run, as pydantic sections of one tree (psyray/config.py)."""

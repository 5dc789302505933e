"""`python -m recsys.cli`."""

from recsys.cli import app

app()

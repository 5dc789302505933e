"""Train and evaluate one experiment: `python train.py [--config configs/x.yaml] [--set model.d_model=128 ...]`."""

import typer

from recsys.cli.training import train

if __name__ == "__main__":
    typer.run(train)

"""Training: the one LightningModule, its callbacks, and a run from config to numbers."""

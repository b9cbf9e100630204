"""What can be trained on the frozen LPM: a registry row of `schemas.methods` and one module per method."""

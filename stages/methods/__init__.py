"""Methods that can be trained on the frozen LPM: one module per method, and its registry row in `schemas.methods`."""

"""Moving on: the same training in OpenRLHF, TRL or verl, with one's own data and checkpoints."""

"""Random training loops in Tune mode, with what libraries and users do to a model between steps."""

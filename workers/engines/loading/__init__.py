"""From the name of a model to weights in memory: where it is, what fits, devices, quantisation."""

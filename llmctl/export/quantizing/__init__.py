"""How weights are rounded, calibrated and given their bits: what `export.quantize` is made of."""

"""The mathematics of EK-FAC influence functions: torch, numpy and scipy; no Ray, no files, no models by name."""

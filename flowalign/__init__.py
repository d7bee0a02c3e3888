"""flowalign: align diffusion and flow-matching generators with reward models."""

__version__ = "0.1.0"
